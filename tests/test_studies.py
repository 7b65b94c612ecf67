"""The studies: branches, running and resuming, tables, fits and pictures, what tells a change from noise."""
import contextlib
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_train
import detect_seg
import finetune
import mim_pretrain
import model as M
import run
from test_clip_train import few_captions        # noqa: F401    it and small: fixtures that every test here uses
from test_mim_pretrain import config, small      # noqa: F401

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'studies'))
import claims           # noqa: E402
import compare          # noqa: E402
import exercises        # noqa: E402
import gpu              # noqa: E402
import grid             # noqa: E402
import law              # noqa: E402
import plan             # noqa: E402
import plot             # noqa: E402
import scaling          # noqa: E402
import speed            # noqa: E402
import study            # noqa: E402
import vocabulary       # noqa: E402

STAGES = {stage.__name__ + '.py': stage for stage in (mim_pretrain, clip_train, finetune, detect_seg)}
RECIPE = scaling.RECIPES['cpu']
WEIGHTS = np.array([scaling.vit_of(size, RECIPE)[1] for size in (*RECIPE['sizes'], RECIPE['held_out'])], float)


def refused(capsys, function, *arguments):
    """The one line that a study prints when it refuses."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: ')
    return lines[0]


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
        with pytest.raises(run.Refused, match=words):
            mim_pretrain.train(config(tmp_path, *usual, '--out_dir', str(tmp_path / 'other'), *flags))


# ---- commands

def understood(words):
    """The Config that a run's command is taken as."""
    stage = STAGES[Path(words[0]).name]
    assert os.path.exists(words[0])
    return run.parse_config(stage.Config, stage.RECIPES, words[1:])


@pytest.mark.parametrize('device', scaling.RECIPES)
def test_every_run_of_scaling_is_a_command_that_is_understood(device, tmp_path):
    """Names are unique, branches point to runs of the study, the stage takes the flags, and no student sees as
    many images as the teacher."""
    recipe = scaling.RECIPES[device]
    taught = max(recipe['teacher_steps']) * clip_train.RECIPES[recipe['teacher']]['batch_size']
    runs = sum(scaling.phases(recipe).values(), [])
    names = [one['name'] for one in runs]
    assert len(set(names)) == len(names) and all(one.get('after', names[0]) in names for one in runs)
    for one in runs:
        cfg = understood(scaling.as_command(one, recipe, tmp_path)['words'])
        M.check_grid(cfg.image_size, cfg.image_size, cfg.patch_size)
        if not one['head']:
            assert cfg.steps * cfg.batch_size < taught and cfg.save_every == cfg.steps - cfg.cooldown


@pytest.mark.parametrize('name', study.STUDIES)
def test_every_run_of_a_study_is_a_command_that_is_understood(name):
    """And no two have one folder."""
    own = study.STUDIES[name]
    for script, out_dir, *flags in own.get('before', []):
        understood([str(ROOT / script), '--out_dir', out_dir, *flags])
    runs = [study.make_run(name, arm, steps, lr, seed, 'shapes') for arm, steps in study.cells_of(own)
            for lr in own.get('rates', (None,)) for seed in own['seeds']]
    folders = {understood(one['words']).out_dir for one in runs}
    assert len(folders) == len(runs)


def test_the_held_out_size_comes_last():
    """None of its runs is in a part before the prediction is made, its rates included."""
    names = list(scaling.phases(RECIPE))
    for name, runs in scaling.phases(RECIPE).items():
        before = names.index(name) < names.index('held out')
        assert not (before and RECIPE['held_out'] in {one['size'] for one in runs})


def test_a_plan_for_a_gpu_needs_none(capsys):
    """bf16 sizes, and which cards have room, without a card; nothing is said of speed."""
    flags = ['--size', 'g', '--device', 'cuda', '--micro_batch', '64', '--no-checkpoint_activations']
    plan.plan(run.parse_config(plan.Config, mim_pretrain.RECIPES, flags))
    said = capsys.readouterr().out
    assert '542.1 MB an image' in said and 'no days' in said
    assert '| 40 GB | none |' in said and '| 80 GB | 64 | kept |' in said


def memory(num, **more):
    """The plan's for g on a GPU: the sum and its parts."""
    once = more.pop('once', False)
    parts = run.Memory(G, torch.device('cuda'), **more).parts(num, once=once)
    return sum(parts.values()), parts


G = plan.on_meta(M.ViTConfig(**M.SIZES['g'], head=768))


def test_a_frozen_teacher_has_weights_alone():
    """4 bytes each of ViT-L's 304 million: neither gradients nor AdamW's state, nor activations beside g's."""
    teacher = plan.on_meta(plan.default_teacher('g', 16))
    assert memory(8, teacher=teacher)[0] - memory(8)[0] == pytest.approx(4 * 304e6, rel=.01)


def test_autocast_copies_unsharded_weights():
    """2 bytes a weight; sharded ones are gathered in bf16 already, two blocks or, for micro-batches, all of them."""
    assert memory(8)[1]['bf16 copies'] == pytest.approx(2 * 1.012e9, rel=.001)
    assert memory(8, shards=8)[1]['bf16 copies'] == 0
    assert memory(8, shards=8)[1]['gathered'] * 20 == memory(8, shards=8, once=True)[1]['gathered']


def test_frozen_blocks_keep_nothing():
    """A head alone has gradients and AdamW's state, and no activations of the blocks."""
    model = plan.on_meta(M.ViTConfig(**M.SIZES['g'], head=768))
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    memory = run.Memory(model, torch.device('cuda')).parts(8)
    assert memory['AdamW'] == 8 * (768 * 1408 + 768) and memory['activations'] < 1e9


def test_what_fits_fits():
    """The largest number of images stays below the memory, one more does not."""
    num = plan.images_that_fit(80e9, run.Memory(G, torch.device('cuda')))
    assert memory(num)[0] <= 80e9 < memory(num + 1)[0]


def test_a_measured_product_is_a_median(monkeypatch):
    """One measurement on a fast clock does not count, nor one that something disturbed."""
    seconds = [1., 1., 1e-3, 1e3, 1., 1., 1., 1., 1.]
    monkeypatch.setattr(plan.time, 'perf_counter', iter([0., 2.]).__next__)     # warm-up is over at once
    monkeypatch.setattr(plan, 'seconds_of', lambda function, device: seconds.pop())
    assert plan.matmul_speed.__wrapped__(torch.device('cpu')) == 10 * 2 * 512 ** 3


# ---- running

def stand_in(name, code='pass', **columns):
    """A run that notes when it ran, and writes a result."""
    code = ('import json, os, sys, time; name = sys.argv[1]; time.sleep(.05); os.makedirs(name, exist_ok=True); '
            f'open("order.txt", "a").write(name + "\\n"); {code}; '
            'json.dump(dict(skill=.5, command="python a, b"), open(name + "/result.json", "w"))')
    return dict(columns, name=name, words=['-c', code, name], lr=.005859)


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    """A study that fails at its third run goes on with it; a branch waits for what it branches off."""
    monkeypatch.chdir(tmp_path)
    runs = [stand_in('b', after='a'), stand_in('a'), stand_in('c', after='b', row='x, y')]
    broken = dict(runs[2], words=['-c', 'import sys; sys.exit("no such thing")'])
    with pytest.raises(SystemExit, match='c: no such thing'):
        grid.run_all([*runs[:2], broken], tmp_path)
    assert [row['name'] for row in grid.read_csv('runs.csv')] == ['a', 'b']
    rows = grid.run_all(runs, tmp_path, 2, lambda one, result: dict(N=7, nothing=math.nan))
    assert open('order.txt').read().split() == ['a', 'b', 'c']
    assert rows[2] == dict(name='c', lr=.005859, skill=.5, row='x, y', N=7, nothing=None)


def test_rows_of_other_data_are_refused(tmp_path, capsys):
    grid.write_csv(tmp_path / 'runs.csv', [dict(name='a', data='shapes', lr=.001, skill=.5)])
    assert grid.run_all([dict(name='a', data='shapes', lr=.001, words=[])], tmp_path)[0]['skill'] == .5
    line = refused(capsys, grid.run_all, [dict(name='a', data='photos', lr=.001, words=[])], tmp_path)
    assert 'a with data shapes instead of photos' in line


def test_two_studies_in_one_folder_lose_no_rows(tmp_path):
    """Each waits until the other has written."""
    path = tmp_path / 'runs.csv'
    code = f"import sys; sys.path.insert(0, '{ROOT}/studies'); import grid; " \
           f"[grid.add_row('{path}', dict(name=f'{{sys.argv[1]}}-{{n}}')) for n in range(100)]"
    both = [subprocess.Popen([sys.executable, '-c', code, name]) for name in 'ab']
    assert [process.wait() for process in both] == [0, 0]
    assert len(grid.read_csv(path)) == 200


@pytest.mark.parametrize('text, words', [('', 'no rows'), ('arm\nEVA\n', 'line 2: no seed'), ('arm,seed\nEVA,nan\n', 'no seed'),
                                         (b'\xff\xfe', 'cannot be read')])
def test_a_csv_that_is_not_ours_is_one_line(text, words, tmp_path, capsys):
    path = tmp_path / 'rows.csv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in refused(capsys, grid.read_kept, path, 'arm', 'seed')


def test_what_a_stage_refuses_is_passed_on(tmp_path, capsys):
    code = 'import sys; print("error: --size huge is unknown", file=sys.stderr); sys.exit(2)'
    line = refused(capsys, grid.run_all, [dict(name='a', words=['-c', code])], tmp_path)
    assert line == 'error: --size huge is unknown'


def test_a_study_that_is_stopped_stops_its_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = 'import signal, time; signal.signal(15, lambda *_: open("told", "w").close() or exit(143)); ' \
           'open("up", "w").close(); [time.sleep(.1) for _ in range(600)]'
    monkeypatch.setattr(grid.time, 'sleep', lambda _: os.path.exists('up') and sys.exit(130) or time.monotonic())
    with pytest.raises(SystemExit):
        grid.run_all([dict(name='a', words=['-c', code])], tmp_path)
    assert os.path.exists('told')


# ---- intervals and tables

def test_an_interval_by_hand():
    """Three values of deviation 1: Student's t of two degrees of freedom, over the root of three."""
    mean, half = grid.interval([1., 2., 3.])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** .5)
    assert grid.t95(30) == 2.042 and grid.t95(60) == pytest.approx(2.000, abs=1e-3)


def test_differences_are_of_one_seed():
    """Of those that both have; none where a number is missing."""
    ours = {0: dict(skill=.5), 1: dict(skill=.7), 2: dict(skill=.9, miou=1.)}
    theirs = {1: dict(skill=.4), 2: dict(skill=.8)}
    assert grid.differences(ours, theirs, 'skill') == pytest.approx([.3, .1])
    assert grid.differences(ours, theirs, 'miou') == []


@pytest.mark.parametrize('name, expected', [
    ('targets', '| clip at 1200 - pixels at 1200 | 28.9 ± 3.5 |'),
    ('clip', '| EVA at 80 - teacher at 80 | 5.0 ± 6.4 |'),
    ('segment', '| EVA at 400 - scratch at 400 | 27.2 ± 0.8 |')])
def test_tables_come_out_of_the_csv(name, expected, monkeypatch, capsys):
    """The numbers that the docs quote."""
    monkeypatch.setattr(sys, 'argv', ['study.py', name, '--csv', str(ROOT / f'studies/{name}.csv')])
    study.main()
    assert expected in capsys.readouterr().out


# ---- fits

def made_up(noise, seed=0, num=7, a=.3, A=(3., 3.5), seeds=4):
    """Losses [S, num, 2] that follow a known law, with luck of a seed and of each of its runs."""
    rng = np.random.default_rng(seed)
    smooth = WEIGHTS[:num, None] ** -a * A
    shared = .3 + 5 * noise * rng.normal(size=(seeds, 1, 2))
    return shared + smooth + noise * rng.normal(size=(seeds, num, 2))


def made_up_rows(noise, num=7, **more):
    """The same as rows of a csv."""
    runs = {one['name']: one for one in sum(scaling.phases(RECIPE).values(), [])}
    rows = []
    sizes = [*RECIPE['sizes'], RECIPE['held_out']][:num]
    for seed, own in enumerate(made_up(noise, num=num, **more)):
        for size, losses in zip(sizes, own):
            for steps, loss in zip(RECIPE['steps'], losses):
                one = runs.get(f'{size}-{seed}-{steps}')
                if one:
                    rows.append(dict(one, skill=1 - loss, skill_rest=1 - 2 * loss, r2=1 - loss / 2, linear_top1=.9 - loss,
                                     knn_top1=.8 - loss, miou=None))
    return rows


@pytest.mark.parametrize('a', [.1, .3, .8])
def test_the_law_is_found(a):
    """Exact losses: the exponent to the lattice's step, an A for each length."""
    found, A = law.fit(WEIGHTS[:7], made_up(0., a=a))
    assert found == pytest.approx(a, rel=.03)
    assert A[1] / A[0] == pytest.approx(3.5 / 3., rel=.01)


def test_what_all_sizes_of_a_seed_share_changes_no_fit():
    """The luck of a seed's images is no size's."""
    losses = made_up(.003)
    shifted = losses + np.arange(8.).reshape(4, 1, 2)
    for ours, theirs in zip(law.fit(WEIGHTS[:7], losses), law.fit(WEIGHTS[:7], shifted)):
        assert ours == pytest.approx(theirs)


def test_a_law_that_rises_with_size_is_fitted_as_flat():
    """A is never negative."""
    assert (law.fit(WEIGHTS[:7], -made_up(0.))[1] == 0).all()


def test_intervals_cover_what_is_held_out():
    """Of 50 made-up studies the 90% interval holds the held-out difference in four fifths or more, and is of use:
    narrower than half the drop from pico to mini."""
    held, shares = [], []
    for seed in range(50):
        losses = made_up(.003, seed, num=8)
        _, low, high = law.forecast(WEIGHTS[:7], losses[:, :7], WEIGHTS[7], 3)
        measured = (losses[:3, 7] - losses[:3, 6]).mean(0)
        held.append((low <= measured) & (measured <= high))
        exact = made_up(0.)[0]
        shares.append((high - low) / (exact[2] - exact[6]))
    assert np.mean(held) >= .8 and np.mean(shares) < .5


def test_the_expected_width_is_that_of_studies_as_lucky():
    """Twice the luck, twice the width."""
    drop = np.array([.02, .02])
    one, two = [law.expected_width(WEIGHTS[:7], WEIGHTS[7], WEIGHTS[2:5:2], drop, deviation, 4, 3, tries=10)
                for deviation in (.001, .002)]
    assert two / one == pytest.approx([2, 2], rel=.25)


def test_the_measure_that_tells_the_pilots_sizes_apart_is_chosen():
    """By their paired difference in units of its own deviation, not by how large it is."""
    rows = made_up_rows(.003)
    luck = np.random.default_rng(0)
    for row in rows:
        row['r2'] = .5 + .2 * (row['size'] == 'nano') + .3 * luck.normal()
    chosen, ratios = scaling.choose_measure(rows, RECIPE)
    assert chosen in ('skill', 'skill_rest') and ratios['skill'].mean() > ratios['r2'].mean()


def test_a_perfect_prediction_has_every_measure_at_one():
    """And a constant for each position at nought."""
    torch.manual_seed(0)
    places = torch.arange(4).repeat(50)
    targets = F.normalize(torch.randn(200, 8) + torch.randn(4, 8)[places], dim=-1)
    axes = torch.linalg.eigh(targets.T @ targets)[1]
    constant = scaling.at_place(targets, places)
    assert scaling.skill(targets, targets, places) == pytest.approx(1, abs=1e-5)
    assert scaling.skill(constant, targets, places) == pytest.approx(0, abs=1e-5)
    assert scaling.whitened_r2(targets, targets, places, axes) == pytest.approx(1, abs=1e-4)
    assert scaling.whitened_r2(constant, targets, places, axes) == pytest.approx(0, abs=1e-4)


def test_a_study_is_reported_and_drawn_from_its_csv(tmp_path, capsys):
    """The prediction is written before the held-out size is there and not again; report and pictures need the rows
    alone."""
    rows = made_up_rows(.003)
    grid.write_csv(tmp_path / 'runs.csv', rows)
    scaling.write_prediction(tmp_path, RECIPE)
    said = (tmp_path / 'prediction.json').read_text().replace('"seeds": 4', '"seeds": 5')
    (tmp_path / 'prediction.json').write_text(said)
    grid.write_csv(tmp_path / 'runs.csv', made_up_rows(.003, num=8))
    scaling.write_prediction(tmp_path, RECIPE)
    assert (tmp_path / 'prediction.json').read_text() == said

    curves = [dict(name=row['name'], images=images, loss=.4) for row in rows for images in (1000, 20_000, 60_000)]
    grid.write_csv(tmp_path / 'curves.csv', curves)
    files = [tmp_path / name for name in ('runs.csv', 'curves.csv', 'prediction.json')]
    scaling.report(*files, tmp_path, RECIPE)
    out = capsys.readouterr().out
    assert '| ti - mini, 6400 steps |' in out and 'exponent a' in out and '48x4 - pico' in out
    assert Image.open(tmp_path / 'scaling.png').size[0] == 2 * 720 and (tmp_path / 'eva.png').exists()


@pytest.mark.parametrize('part', ['pilot', 'sizes', 'poor world'])
def test_an_unfinished_study_is_reported(part, tmp_path, capsys):
    """With its pilot alone, with half of its sizes, with other worlds and rates."""
    there = made_up_rows(.003)
    pilot = [row for row in there if row['size'] in RECIPE['pilot']]
    rows = {'pilot': pilot, 'sizes': there[:len(there) // 2] + pilot, 'poor world': list(there)}[part]
    if part == 'poor world':
        for name in ('rates', 'poor world'):
            rows += [dict(one, skill=.5, skill_rest=.4, r2=.3, linear_top1=.9, knn_top1=.9)
                     for one in scaling.phases(RECIPE)[name]]
    grid.write_csv(tmp_path / 'runs.csv', rows)
    files = [tmp_path / name for name in ('runs.csv', 'curves.csv', 'prediction.json')]
    scaling.report(*files, tmp_path, RECIPE)
    assert 'expected width' in capsys.readouterr().out and (tmp_path / 'scaling.png').exists()


def test_runs_with_other_settings_are_not_taken_for_this_ones(tmp_path, capsys):
    one = dict(scaling.student(RECIPE, 'pico', 0, RECIPE['steps'][0]), lr=.123)
    grid.write_csv(tmp_path / 'runs.csv', [one])
    assert 'pico-0-3200 with lr 0.123 instead of 0.005859' in refused(capsys, scaling.run_all, tmp_path, 'cpu', 2, 0)


def test_curves_are_drawn(tmp_path):
    """Of nothing, of one point, on logarithmic axes."""
    for curves, log in (({'a': []}, ''), ({'a': [(3, 1.)]}, 'xy'), ({'a': [(1, 1e3), (1e6, 1.)]}, 'xy')):
        plot.draw_curves(tmp_path / 'curve.png', curves, {'b': [(10, 2., 3., 4.)]}, log=log)
        assert Image.open(tmp_path / 'curve.png').size == (960, 600)


# ---- a change, or noise?

PICO = ['--', '--size', 'pico', '--batch_size', '4', '--device', 'cpu']        # flags of both sides


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """The working tree, measured on few images, and a copy of it that differs by one line."""
    monkeypatch.chdir(tmp_path)
    few = {'mim_pretrain.py': dict(BANK=1024, NUM_EVAL=32), 'run.py': dict(NUM_PROBE=32)}
    for name in ('tree', 'other'):
        os.mkdir(name)
        for path in ROOT.glob('*.py'):
            text = path.read_text()
            for constant, value in few.get(path.name, {}).items():
                text, num = re.subn(rf'^{constant} = [0-9_]+', f'{constant} = {value}', text, flags=re.M)
                assert num == 1
            Path(name, path.name).write_text(text)
    text = Path('other', 'mim_pretrain.py').read_text()
    Path('other', 'mim_pretrain.py').write_text(text.replace("losses = -F.cosine", "losses = -2 * F.cosine", 1))
    monkeypatch.setattr(grid, 'ROOT', tmp_path / 'tree')
    monkeypatch.setattr(grid, 'start', start_here)


def start_here(one, folder, jobs):
    """A run of mim_pretrain.py in this process, where torch is imported already; all our modules are imported anew,
    from the folder of its script."""
    script, *flags = one['words']
    place = Path(script).parent
    ours = [path.stem for path in place.glob('*.py')]
    log = folder / f"{one['name']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, open(log, 'w') as file, contextlib.redirect_stdout(file):
        for path in ROOT.glob('*.py'):
            patch.setitem(sys.modules, path.stem, None)         # not to be imported
        for name in ours:
            del sys.modules[name]
        patch.syspath_prepend(place)
        stage = importlib.import_module('mim_pretrain')
        assert all(Path(sys.modules[name].__file__).parent == place for name in ours)
        stage.train(stage.run.parse_config(stage.Config, stage.RECIPES, flags))
    return SimpleNamespace(poll=lambda: 0, returncode=0)


def test_a_changed_line_is_compared_seed_by_seed(trees, capsys):
    """Two real runs a side, each of its own code; the same command again runs nothing."""
    command = ['--steps', '4', '--seeds', '2', '--against', 'other', *PICO]
    compare.main(command)
    out = capsys.readouterr().out
    assert 'differs from other in: mim_pretrain.py' in out and '4 of 4 runs to do' in out
    assert '| skill |' in out and '| linear_top1 |' in out and 'noise |' in out
    first = [[json.loads(line)['loss'] for line in open(path)] for path in Path('out/compare').glob('*/seed-0/log.jsonl')]
    assert sorted(first)[0] == pytest.approx([2 * loss for loss in sorted(first)[1]], rel=.2)
    compare.main(command)
    assert '0 of 4 runs to do' in capsys.readouterr().out


def test_where_nothing_differs_nothing_runs(trees, capsys):
    shutil.copy('tree/mim_pretrain.py', 'other')
    compare.main(['--against', 'other', *PICO])
    assert capsys.readouterr().out.startswith('nothing differs from other') and not os.path.exists('out')


def test_a_revision_of_git_is_the_other_side(trees, capsys):
    """As committed, not as edited since; files of other stages do not count."""
    git = lambda *words: subprocess.run(['git', '-C', 'tree', '-c', 'user.name=a', '-c', 'user.email=a@b', *words],
                                        check=True, capture_output=True)
    git('init', '-q')
    git('add', '.')
    git('commit', '-q', '-m', 'one')
    Path('tree/finetune.py').write_text('')
    compare.main([])
    assert capsys.readouterr().out.startswith('nothing differs from HEAD')
    Path('tree/data.py').write_text('')
    assert compare.code_of('HEAD') == {**compare.code_of('tree'), 'data.py': (ROOT / 'data.py').read_text()}


@pytest.mark.parametrize('words, expected', [
    (['--against', 'nowhere'], 'nowhere'), (['--against', '.'], 'no mim_pretrain.py'), (['--seeds', '1'], '--seeds 1'),
    (['--steps', 'few'], 'few'), (['--mask', 'random'], '--mask: flags'), (['--', '--seed', '3'], '--seeds N'),
    (['--against', 'other', '--jobs', '0'], '--jobs 0')])
def test_compare_refuses_in_one_line(trees, capsys, words, expected):
    assert expected in refused(capsys, compare.main, words)


def rows_of(values, **same):
    return {seed: dict(skill=value, linear_top1=value, **same) for seed, value in enumerate(values)}


def test_verdicts():
    """An interval that holds 0 is noise; skill is compared within one task only."""
    theirs = rows_of([.5, .6, .7], baseline=.4)
    assert compare.judge(rows_of([.6, .71, .81], baseline=.4), theirs, 'skill')[1] == 'not noise'
    assert compare.judge(rows_of([.6, .5, .8], baseline=.4), theirs, 'skill')[1] == 'noise'
    assert compare.judge(rows_of([.6, .71, .81], baseline=.3), theirs, 'skill')[1] == 'another task'
    assert compare.judge(rows_of([.6, .71, .81], baseline=.3), theirs, 'linear_top1')[1] == 'not noise'
    assert compare.judge(theirs, theirs, 'knn_top1')[1] == 'not measured'


def test_seeds_that_would_tell():
    """The fewest whose interval is narrower than the difference seen, if it and the deviation stayed."""
    differences = [.01, .03, -.01]                      # mean .01, deviation .02
    n = int(compare.seeds_to_tell(differences))
    assert grid.t95(n - 1) * .02 / n ** .5 < .01 <= grid.t95(n - 2) * .02 / (n - 1) ** .5
    assert compare.seeds_to_tell([.01, -.01]) == compare.seeds_to_tell([0., 0.]) == 'more than 100'


# ---- exercises

@pytest.mark.parametrize('name', exercises.EXERCISES)
def test_every_exercise_changes_the_code_as_it_is(name):
    """Its lines are there once, what comes out is Python, and its flags are understood."""
    flags, lines = exercises.EXERCISES[name]
    code = compare.code_of(ROOT)
    changed = exercises.change(code, lines)
    for file, _, _ in lines:
        compile(changed[file], file, 'exec')
        assert changed[file] != code[file]
    if '--size' not in flags:
        run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, flags.split())
    assert flags or lines


# ---- on a GPU

class Step:
    """Has room for so many images."""
    device = torch.device('cpu')

    def take(self, num):
        if num > 50:
            raise torch.OutOfMemoryError

    def whole(self):
        pass

    forget = whole


def test_fewer_images_are_tried_where_memory_ends():
    rows = list(speed.time_sizes(Step(), 80))
    assert [row['images at once'] for row in rows] == [80, 60, 45]
    assert ['images/s' in row for row in rows] == [False, False, True]


@pytest.fixture
def at_once(monkeypatch):
    """gpu.py's items and the stages' commands in this process: everything is imported already."""
    def run_within(words, seconds):
        gpu.main(words[2:])

    def start(one, folder, jobs):
        script = next(n for n, word in enumerate(one['words']) if word.endswith('.py') and os.path.exists(word))
        stage = STAGES[Path(one['words'][script]).name]
        said = folder / f"{one['name']}.log"
        with open(said, 'w') as file, contextlib.redirect_stdout(file):
            stage.train(run.parse_config(stage.Config, stage.RECIPES, one['words'][script + 1:]))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(gpu, 'run_within', run_within)
    monkeypatch.setattr(grid, 'start', start)
    monkeypatch.setattr(clip_train, 'NUM_EVAL', 16)


def records(tmp_path, *flags):
    """What gpu.py leaves."""
    gpu.main(['--device', 'cpu', '--size', 'pico', '--out_dir', str(tmp_path), *flags])
    return json.loads((tmp_path / 'gpu.json').read_text())


def test_every_kind_of_item_runs_on_a_cpu(at_once, tmp_path, monkeypatch):
    """None fails; each has rows, in the json and in the table. Items that run the same function are one kind."""
    kinds = {item[1]: name for name, item in gpu.ITEMS.items()}
    monkeypatch.setattr(gpu, 'ITEMS', {name: gpu.ITEMS[name] for name in kinds.values()})
    found = records(tmp_path)
    assert found.keys() == gpu.ITEMS.keys()
    assert all(record['rows'] and not record['error'] for record in found.values()), found
    assert (tmp_path / 'gpu.md').read_text().count('| --- |') >= len(found)


@pytest.mark.long
def test_the_whole_command_runs_on_a_cpu(tmp_path):
    """As it is typed, torchrun included."""
    words = [sys.executable, str(ROOT / 'studies' / 'gpu.py'), '--device', 'cpu', '--out_dir', str(tmp_path)]
    subprocess.run([*words, '--minutes', '30'], check=True)
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert [record['error'] for record in found.values()] == [''] * len(gpu.ITEMS)
    assert found['torchrun']['rows'][0]['resumed at'] == 1


def works(args):
    yield dict(number=1)


def breaks(args):
    yield dict(number=1)
    raise ValueError('no such thing')


def is_killed(args):
    yield dict(number=1)
    raise KeyboardInterrupt


def test_an_item_that_fails_is_recorded_and_the_rest_goes_on(at_once, tmp_path, monkeypatch):
    """With its error and the rows that it had; the same command tries it again, and not what is done."""
    monkeypatch.setattr(gpu, 'ITEMS', {'first': (.5, breaks), 'second': (.5, works)})
    found = records(tmp_path)
    assert found['first']['error'] == 'ValueError: no such thing' and found['first']['rows'] == [dict(number=1)]
    assert found['second']['error'] == ''
    monkeypatch.setattr(gpu, 'ITEMS', {'first': (.5, works), 'second': (.5, breaks)})
    assert all(record['error'] == '' for record in records(tmp_path).values())


def test_what_is_cut_off_keeps_its_rows(at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'ITEMS', {'first': (1., is_killed)})
    with pytest.raises(KeyboardInterrupt):
        records(tmp_path)
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert found['first'] == dict(card='CPU', error='cut off', rows=[dict(number=1)])


def test_what_no_longer_fits_is_named(at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'ITEMS', {'first': (1., works)})
    assert records(tmp_path, '--minutes', '-1')['first']['error'] == 'not run: out of time'


def test_the_minutes_are_shared_out():
    assert sum(share for share, *_ in gpu.ITEMS.values()) == pytest.approx(1)


def test_an_item_that_takes_too_long_ends_with_what_it_started(tmp_path):
    """A grandchild would go on writing."""
    writes = f'import time\nwhile True: open("{tmp_path}/alive", "w").close(); time.sleep(.1)'
    words = [sys.executable, '-c', f'import subprocess, sys; subprocess.run([sys.executable, "-c", {writes!r}])']
    assert gpu.run_within(words, 1.5) == 'out of time'
    (tmp_path / 'alive').unlink()
    time.sleep(.5)
    assert not (tmp_path / 'alive').exists()


def test_the_first_error_of_a_command_is_told(tmp_path):
    """torchrun prints its own after the one that matters."""
    (tmp_path / 'a.log').write_text('step 1\n[rank0]: ValueError: too large\nChildFailedError: see above\n')
    with pytest.raises(RuntimeError, match='ValueError: too large'):
        gpu.wait(SimpleNamespace(wait=lambda: 1), tmp_path / 'a')


def test_rare_classes_count_as_frequent_ones_in_the_vocabulary_study():
    """Between a class of 95 boxes and one of 5 of the same spread the border lies half-way."""
    x = torch.cat([torch.linspace(-3, 1, 95), torch.linspace(-1, 3, 5)])[:, None]
    y = torch.cat([torch.zeros(95), torch.ones(5)]).long()
    near = torch.tensor([[-.2], [.2]])
    assert vocabulary.right_by_class(x, y, near, torch.tensor([0, 1]), 2).tolist() == [1, 1]


def test_the_table_of_claims_comes_out_of_its_csv(tmp_path, monkeypatch, capsys):
    """The numbers that the chapter quotes."""
    words = ['claims.py', 'classes', '--csv', str(ROOT / 'studies/claims_classes.csv'), '--out_dir', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', words)
    claims.main()
    out = capsys.readouterr().out
    assert '| EVA | 2.2 (1.9 to 2.6) | > 16 (> 16 to > 16) |' in out
    assert '| EVA mini - teacher |  | 0.5 ± 0.5 |' in out
    assert (tmp_path / 'claims_classes.png').exists()


def test_the_table_of_longer_runs_comes_out_of_its_csv(monkeypatch, capsys):
    """The paired differences that README quotes."""
    monkeypatch.setattr(sys, 'argv', ['study.py', 'longer', '--csv', str(ROOT / 'studies/longer.csv')])
    study.main()
    out = capsys.readouterr().out
    assert '| hidden at 4800 - distill at 4800 | 1.4 ± 3.9 |' in out
    assert '| all at 4800 - distill at 4800 | 2.6 ± 3.0 |' in out
    assert '| hidden at 4800 - hidden at 300 | 11.4 ± 2.6 |' in out


@pytest.mark.parametrize('accuracy, expected', [(.625, 2), (.75, 4), (.9, math.inf), (.4, 0)])
def test_the_labels_that_scratch_needs_are_read_off_its_curve(accuracy, expected):
    """Scratch has 50% with 250 labels and 25 points more with each four times as many."""
    claim = dict(budgets=(250, 1000), measure='top1')
    cells = {('EVA', 250): accuracy, (claims.LONG, 250): .5, (claims.LONG, 1000): .75}
    cells = {key: {seed: dict(top1=value) for seed in range(2)} for key, value in cells.items()}
    assert claims.label_ratio(cells, claim, 'EVA', 250)[0] == pytest.approx(expected)


def test_a_level_stretch_of_scratch_counts_from_where_it_begins():
    """50, 75 and 75%: 75% are had with 1,000 labels, not with 4,000."""
    claim = dict(budgets=(250, 1000, 4000), measure='top1')
    cells = {('EVA', 250): .75, (claims.LONG, 250): .5, (claims.LONG, 1000): .75, (claims.LONG, 4000): .75}
    cells = {key: {seed: dict(top1=value) for seed in range(2)} for key, value in cells.items()}
    assert claims.label_ratio(cells, claim, 'EVA', 250)[0] == pytest.approx(4)


def test_rates_that_are_all_alike_end_the_tries():
    setting = SimpleNamespace(claim=dict(factors=(.5, 1, 2), num_tries=1, middle=1000, steps=400, tried='top1'),
                              run=lambda arm, budget, steps, factor, seed: factor)
    alike = lambda title, runs: [dict(arm='EVA', factor=factor, top1=.1) for factor in runs]
    assert claims.best_rates(setting, ['EVA'], alike)['EVA'] >= 1 / claims.WIDEST


def test_a_cell_of_a_claim_has_one_rate():
    """A seed at another rate is not one more seed."""
    row = dict(arm='EVA', budget=1000, steps=400, factor=2, seed=0)
    others = dict(row, seed=1), dict(row, seed=1, factor=1)
    cells = claims.cells_of([row, *others], claims.CLAIMS['classes'])
    assert cells == {('EVA', 1000): {0: row, 1: others[0]}}


def test_too_few_images_for_the_labels_are_refused(tmp_path):
    """17 photographs, 8 of them for validation, where 16,000 are to have labels."""
    for number in range(17):
        path = tmp_path / 'few' / 'train' / 'ab'[number % 2] / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32)).save(path)
    setting = claims.Setting('photographs', str(tmp_path / 'few'), tmp_path)
    with pytest.raises(M.Refused, match='9 images to train with; 17,000 are needed'):
        setting.labelled(1000)


@pytest.mark.parametrize('top, expected', [(1, [.5, 1, 2]), (4, [.5, 1, 2, 4, 8]), (.25, [.125, .25, .5, 1, 2])])
def test_learning_rates_are_tried_until_the_best_has_neighbours(top, expected):
    tried = []

    def phase(title, runs):
        tried[:] = runs
        return [dict(arm='EVA', factor=factor, top1=-abs(math.log(factor / top))) for factor in runs]
    claim = dict(factors=(.5, 1, 2), num_tries=1, middle=1000, steps=400, tried='top1')
    setting = SimpleNamespace(claim=claim, run=lambda arm, budget, steps, factor, seed: factor)
    assert claims.best_rates(setting, ['EVA'], phase) == {'EVA': top}
    assert tried == expected
