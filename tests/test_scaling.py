"""The scaling study: branches, grids, running and resuming, fits and pictures."""
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_train
import detect_seg
import mim_pretrain
import model as M
import run
import segment
from test_commands import refusal
from test_mim_pretrain import config, small      # noqa: F401    small: a fixture that every test here uses

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'assets'))
import exercises        # noqa: E402
import grids            # noqa: E402
import scaling          # noqa: E402

GRID = grids.GRIDS['cpu']
WEIGHTS = {size: grids.count(size, GRID) for size in ('pico', 'nano', 'micro', 'mini')}


# ---- constant learning rates and branches

def test_the_rate_before_a_cooldown_does_not_depend_on_steps():
    """Warm-up, then constant, then linear to min_lr; a longer run begins alike."""
    cfg = lambda steps: mim_pretrain.Config(steps=steps, lr=1., warmup_steps=10, min_lr=0., cooldown=20)
    rates = [run.lr_at(step, cfg(100)) for step in range(101)]
    assert rates[10:81] == [1.] * 71 and rates[90] == pytest.approx(.5) and rates[100] == 0
    assert [run.lr_at(step, cfg(200)) for step in range(81)] == rates[:81]


def test_a_branch_equals_a_run_of_its_own(tmp_path):
    """6 steps of which 3 cool down, and a branch of it to 10 steps: bit for bit what a run of 10 steps alone is."""
    flags = lambda steps, cooldown: ['--steps', str(steps), '--cooldown', str(cooldown), '--warmup_steps', '1',
                                     '--save_every', str(steps - cooldown), '--out_dir', str(tmp_path / str(steps))]
    mim_pretrain.train(config(tmp_path, *flags(6, 3)))
    mim_pretrain.train(config(tmp_path, *flags(10, 4), '--branch', str(tmp_path / '6')))
    mim_pretrain.train(config(tmp_path, *flags(10, 4), '--out_dir', str(tmp_path / 'alone')))
    branch, alone = (M.load(str(tmp_path / name / 'model.pt')).state_dict() for name in ('10', 'alone'))
    assert all(torch.equal(branch[name], alone[name]) for name in alone)
    log = [json.loads(line)['step'] for line in open(tmp_path / '10' / 'log.jsonl')]
    assert log == list(range(3, 10))


def test_where_a_cooldown_begins_stays(tmp_path):
    """However many checkpoints come after it."""
    mim_pretrain.train(config(tmp_path, '--steps', '8', '--cooldown', '6', '--save_every', '2'))
    kept = [os.path.basename(path) for path in run.list_checkpoints(str(tmp_path / 'run'))]
    assert kept == ['step_0000002', 'step_0000004', 'step_0000006']


def test_branches_that_cannot_be_are_one_line(tmp_path):
    """No such run, another rate, rates that fall too soon, a cool-down that does not fit."""
    usual = ['--steps', '8', '--cooldown', '3', '--warmup_steps', '1', '--save_every', '3']
    mim_pretrain.train(config(tmp_path, *usual, '--steps', '6'))
    own = ['--branch', str(tmp_path / 'run')]
    for flags, words in ((['--branch', 'nowhere'], 'no checkpoint up to step 5'), ([*own, '--lr', '.5'], '--lr 0.5'),
                         ([*own, '--steps', '4', '--cooldown', '2'], 'no checkpoint up to step 2'),
                         ([*own, '--cooldown', '0'], 'give both runs --cooldown'),
                         (['--cooldown', '99'], '--cooldown 99 is longer')):
        with pytest.raises(ValueError, match=words):
            mim_pretrain.train(config(tmp_path, *usual, '--out_dir', str(tmp_path / 'other'), *flags))


def test_an_unknown_study_is_refused_in_one_line(monkeypatch, capsys):
    assert 'sizes, data, targets, controls, transfer' in refusal(monkeypatch, capsys, mim_pretrain, '--study', 'depth')


# ---- grids

@pytest.mark.parametrize('device', grids.GRIDS)
@pytest.mark.parametrize('study', grids.STUDIES)
def test_every_run_is_a_command_that_is_understood(study, device, tmp_path):
    """Names are unique, branches point to runs of the study, the stage takes the flags, and no student sees as
    many images as the teacher."""
    grid = grids.GRIDS[device]
    taught = grid['teacher_steps'] * clip_train.RECIPES[grid['teacher'][1]]['batch_size']
    first, then = grids.runs_of(study, grid)
    names = [one['name'] for one in first + then]
    assert len(set(names)) == len(names) and all(one.get('branch', names[0]) in names for one in first + then)
    for one in first + then:
        script, *words = grids.command(one, grid, tmp_path)
        assert os.path.exists(script)
        stage = {'': mim_pretrain, 'boxes': detect_seg, 'segments': segment}[one['head']]
        cfg = run.parse_config(stage.Config, stage.RECIPES, words)
        if one['head']:
            M.check_grid(cfg.image_size, cfg.image_size, cfg.patch_size)
        else:
            mim_pretrain.check(cfg)
            assert cfg.steps * cfg.batch_size < taught and cfg.save_every == cfg.steps - cfg.cooldown


def test_the_held_out_size_comes_last():
    """None of its runs is in the part that the prediction is made from, its bracket included."""
    first, then = grids.runs_of('sizes', GRID)
    assert {one['size'] for one in first} == {'pico', 'nano', 'micro'} and {one['size'] for one in then} == {'mini'}
    seeds = {(one['size'], one['steps']): 0 for one in first if one['factor'] == 1}
    assert sum(one['factor'] == 1 for one in first) - len(seeds) >= 8          # degrees of freedom


# ---- running

def stand_in(name, branch=None):
    """A run that notes when it ran, and writes a result."""
    code = ('import json, os, sys, time; name = sys.argv[1]; time.sleep(.05); os.makedirs(name, exist_ok=True); '
            'open("order.txt", "a").write(name + "\\n"); json.dump(dict(skill=.5, baseline=.3), '
            'open(name + "/result.json", "w"))')
    one = grids.student(GRID, 'pico', 0, 400)
    return dict(one, name=name, words=['-c', code, name], **({'branch': branch} if branch else {}))


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    """A study that fails at its third run goes on with it; a branch waits for what it branches off."""
    monkeypatch.chdir(tmp_path)
    runs = [stand_in('b', branch='a'), stand_in('a'), stand_in('c', branch='b')]
    broken = dict(runs[2], words=['-c', 'import sys; sys.exit("error: no such thing")'])
    with pytest.raises(SystemExit, match='c: error: no such thing'):
        grids.execute([*runs[:2], broken], tmp_path, 2, (), GRID)
    assert [row['name'] for row in grids.read('runs.csv')] == ['a', 'b']
    grids.execute(runs, tmp_path, 2, (), GRID)
    assert open('order.txt').read().split() == ['a', 'b', 'c']
    row = grids.read('runs.csv')[2]
    assert (row['name'], row['skill'], row['N'], row['lr']) == ('c', .5, 52256, .005859) and row['box_ap'] is None


def test_a_study_that_is_stopped_stops_its_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = 'import signal, time; signal.signal(15, lambda *_: open("told", "w").close() or exit(143)); ' \
           'open("up", "w").close(); time.sleep(60)'
    monkeypatch.setattr(grids.time, 'sleep', lambda _: os.path.exists('up') and sys.exit(130) or time.monotonic())
    with pytest.raises(SystemExit):
        grids.execute([dict(stand_in('a'), words=['-c', code])], tmp_path, 2, (), GRID)
    assert os.path.exists('told')


# ---- fits

def made_up(noise, seed=0, sizes=('pico', 'nano', 'micro'), law=(.25, 3., .3, 30., .5)):
    """Rows whose losses follow a known law, each run and its branches with some luck of their own."""
    E, A, a, B, b = law
    rng, rows = np.random.default_rng(seed), []
    for size in sizes:
        for s in grids.SEEDS:
            luck = noise * rng.normal()
            for one in grids.lengths(GRID, size, s):
                N, D = WEIGHTS[size], one['steps'] * one['batch_size']
                loss = (E + A * N ** -a + B * D ** -b) * (1 + luck + noise / 3 * rng.normal())
                rows.append(dict(one, N=N, flops=D * run.training_flops(M.SIZES[size]), skill=1 - loss,
                                 train_skill=1 - loss, knn_top1=.9 - loss, linear_top1=.9 - loss, knn_unnamed=None,
                                 linear_unnamed=None, box_ap=None, miou=None))
    return rows


@pytest.mark.parametrize('E, c, e', [(.3, 5., .4), (0., 2., .15), (.2, 9., .8)])
def test_one_power_law_is_found(E, c, e):
    """Exact losses: the exponent to the lattice's step, the curve within a thousandth, beyond the points too."""
    x = np.geomspace(5e4, 2e6, 6)
    law = scaling.fit(x, E + c * x ** -e, draws=1, num=48)
    assert law['exponents'][0, 0] == pytest.approx(e, rel=.06) and law['E'][0] == pytest.approx(E, abs=.02)
    assert scaling.predict(law, [6e6])[0, 0] == pytest.approx(E + c * 6e6 ** -e, abs=2e-3)


def test_the_joint_law_is_found():
    """Weights and images at once, from three sizes and three lengths."""
    law = scaling.joint(made_up(0.), draws=1)
    assert law['exponents'][0, 0] == pytest.approx(.3, rel=.1) and law['exponents'][0, 1] == pytest.approx(.5, rel=.1)
    N, D = WEIGHTS['mini'], 6400 * 16
    assert scaling.predict(law, [[N], [D]])[0, 0] == pytest.approx(.25 + 3 * N ** -.3 + 30 * D ** -.5, abs=1e-3)


def test_the_order_in_which_runs_finish_changes_no_prediction():
    """A place in a group is a length, whichever study ran it first; a run without all its lengths is left out."""
    rows, N, D = made_up(.01), WEIGHTS['mini'], 6400 * 16
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    guesses = [scaling.forecast(scaling.joint(some, draws=50, num=8), [[N], [D]], 2)
               for some in (rows, sorted(shuffled, key=lambda row: rows.index(row) // 3), rows + [dict(rows[0], seed=9)])]
    assert guesses[0] == guesses[1] == guesses[2]


def test_numbers_of_a_fit_are_never_negative():
    """A law that rises with size is fitted as one that size does not change."""
    x = np.geomspace(1e4, 1e6, 5)
    law = scaling.fit(x, .3 + .02 * np.log10(x))
    assert (law['E'] >= 0).all() and (law['factors'] >= 0).all()
    assert scaling.predict(law, [1e7])[0, 0] <= .42


def test_intervals_cover_what_is_held_out():
    """Of 50 made-up studies, the 90% interval holds the largest size's own run in four fifths or more, and is of use:
    narrower than half the drop from the smallest size."""
    N, D = WEIGHTS['mini'], 6400 * 16
    held, widths = [], []
    for seed in range(50):
        guess = scaling.forecast(scaling.joint(made_up(.01, seed), draws=100, num=16), [[N], [D]], 2)
        rng = np.random.default_rng(1000 + seed)
        loss = (.25 + 3 * N ** -.3 + 30 * D ** -.5) * (1 + .01 * rng.normal() + .01 / 3 * rng.normal())
        held.append(guess['low'] <= loss <= guess['high'])
        widths.append(guess['high'] - guess['low'])
    drop = 3 * (WEIGHTS['pico'] ** -.3 - N ** -.3)
    assert np.mean(held) >= .8 and np.mean(widths) < drop / 2


def test_pooled_deviation_by_hand():
    """Within cells only, over their degrees of freedom."""
    std, freedom = scaling.pooled({'a': [1., 3.], 'b': [10., 10., 13.]})
    assert freedom == 3 and std == pytest.approx(((1 + 1 + 1 + 1 + 4) / 3) ** .5)


def test_ranks_are_compared():
    assert scaling.spearman([1, 2, 3, 4], [10, 20, 30, 1e6]) == pytest.approx(1)
    assert scaling.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert scaling.spearman([1, 2, 3, 4], [0, 0, 5, 5]) == pytest.approx(scaling.spearman([2, 1, 4, 3], [0, 0, 5, 5]))


def test_a_study_is_reported_and_drawn_from_its_csv(tmp_path, capsys):
    """The prediction is written before the held-out size is there and not again; report and pictures need the csv
    alone."""
    for row in made_up(.003):
        grids.keep(tmp_path, row)
    scaling.write_prediction(tmp_path, GRID)
    said = (tmp_path / 'prediction.json').read_text().replace('"runs": 18', '"runs": 17')
    (tmp_path / 'prediction.json').write_text(said)
    for row in made_up(.003, seed=1, sizes=('mini',))[:3]:
        grids.keep(tmp_path, row)
    scaling.write_prediction(tmp_path, GRID)
    assert (tmp_path / 'prediction.json').read_text() == said
    scaling.report(grids.read(tmp_path / 'runs.csv'), GRID, tmp_path)
    out = capsys.readouterr().out
    assert '9 degrees of freedom' in out and 'mini at 1600: predicted' in out and 'L(N, D) = E' in out
    assert Image.open(tmp_path / 'scaling.png').size[0] == 2 * 720 and (tmp_path / 'eva.png').exists()


@pytest.mark.parametrize('study', grids.STUDIES)
def test_a_study_alone_is_reported(study, tmp_path, capsys):
    """In a folder of its own, with one seed of each of its runs, and with its first run alone."""
    first, then = grids.runs_of(study, GRID)
    rows = [dict(one, N=WEIGHTS[one['size']], flops=1e9 * one['steps'], skill=.5 + one['steps'] / 1e5 + i / 1e4,
                 train_skill=.6, linear_top1=.7 + i / 1e3, knn_top1=.7 - i / 1e3) for i, one in enumerate(first + then)]
    for some in (rows[:1], rows):
        scaling.report([dict.fromkeys(grids.COLUMNS) | row for row in some], GRID, tmp_path)
    assert (tmp_path / 'eva.png').exists()


def test_runs_of_another_grid_are_not_taken_for_this_ones(tmp_path):
    grids.keep(tmp_path, dict(grids.student(GRID, 'pico', 0, GRID['steps'][0]), lr=.123))
    with pytest.raises(ValueError, match='pico-0-1600 with other settings'):
        scaling.study('sizes', tmp_path, 'cpu')


# ---- exercises

@pytest.mark.parametrize('name', exercises.EXERCISES)
def test_every_exercise_changes_the_code_as_it_is(name, tmp_path):
    """Its lines are there once, and what comes out is Python."""
    lines = [change for change in exercises.EXERCISES[name] if isinstance(change, tuple)]
    exercises.changed(lines, tmp_path)
    for file, _, _ in lines:
        compile((tmp_path / file).read_text(), file, 'exec')
        assert (tmp_path / file).read_text() != (ROOT / file).read_text()
