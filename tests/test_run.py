"""One claim a test: the machinery of a run, from options to save and resume."""
import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import run
from model import CLIP, SIZES, CLIPConfig, TextConfig, ViT, ViTConfig, init_weights, load
from run import option
from test_model import TEXT, TINY, images, plain, same, tiny


# ---- options

@dataclasses.dataclass
class Config(run.Run):
    micro_batch: int = option(0, 'at once, 100% of a batch if 0')
    scales: tuple = option((.5, 2.), 'of images', high=4)
    mask: str = option('block', 'what is hidden', choices=('', 'block', 'random'))
    share: float = option(.5, 'of something', below=1)
    warmup_steps: int = option(4, 'of lr')
    min_lr: float = 1e-5


RECIPES = {'pico': dict(steps=9, lr=0.5), 'nano': {}}


def parsed(*argv):
    return run.parse_config(Config, RECIPES, list(argv))


def test_options_come_in_order():
    """Defaults, then the size's recipe, then flags."""
    cfg = parsed('--size', 'pico', '--lr', '0.25', '--scales', '0.5,0.6', '--no-compile', '--mask', '')
    assert (cfg.steps, cfg.lr, cfg.scales, cfg.compile, cfg.mask) == (9, 0.25, (0.5, 0.6), False, '')
    assert parsed().compile is None and parsed().min_lr == 1e-5


def test_a_head_has_its_own_recipes():
    """Where a Config has --head, RECIPES is keyed by heads, and each of them by sizes."""
    @dataclasses.dataclass
    class Heads(Config):
        head: str = option('boxes', 'what is found', choices=('boxes', 'linear'))
    tables = dict(boxes=dict(nano=dict(lr=1.)), linear=dict(nano=dict(lr=2.), stuff={}))
    assert run.parse_config(Heads, tables, []).lr == 1
    assert run.parse_config(Heads, tables, ['--head', 'linear']).lr == 2
    with pytest.raises(run.Refused, match='stuff is unknown; use one of nano$'):
        run.parse_config(Heads, tables, ['--size', 'stuff'])


def test_help_says_what_flags_take(capsys):
    """Every option with its choices or bounds; a recipe's constant is none."""
    with pytest.raises(SystemExit):
        parsed('--help')
    shown = ' '.join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert (f'--{field.name}' in shown) == bool(field.metadata)
    for words in ('(block; one of block, random)', '(0.5; 0 to below 1)', '(0; 0 to 127)', '(500; 1 or more)'):
        assert words in shown


@pytest.mark.parametrize('argv, words', [
    (['--size', 'huge'], '--size huge is unknown; use one of pico, nano'),
    (['--batch', '8'], '--batch is not an option'),
    (['--lr', 'x'], "--lr: invalid float value: 'x'"),
    (['--lr', 'nan'], '--lr nan does not fit; use 0 to 1000'),
    (['--steps', '0'], '--steps 0 does not fit; use 1 to 1e.09'),
    (['--seed', '128'], '--seed 128 does not fit; use 0 to 127'),
    (['--share', '1'], '--share 1.0 does not fit; use 0 to below 1'),
    (['--mask', 'round'], '--mask round does not fit; use one of block, random'),
    (['--scales', '1,5'], r'--scales .1.0, 5.0. does not fit; use two numbers, least and most, each 0 to 4'),
    (['--scales', '1;2'], '--scales'),
    (['--epochs', '1', '--steps', '2'], '--epochs and --steps')])
def test_wrong_options_are_one_line(argv, words):
    with pytest.raises(run.Refused, match=words) as error:
        parsed(*argv)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('argv, place', [
    (['--plan'], 'studies/plan.py'), (['--bench'], 'studies/speed.py'), (['--study', 'sizes'], 'studies/scaling.py'),
    (['--shard=none'], 'torchrun'), (['--betas', '.9,.8'], 'constant, in Config and RECIPES')])
def test_a_flag_that_is_gone_says_where_it_went(argv, place):
    with pytest.raises(run.Refused, match=place) as error:
        parsed(*argv)
    assert argv[0].partition('=')[0] in str(error.value)


def test_main_shortens_what_we_refuse(monkeypatch, capsys):
    """It is one line and exit code 2."""
    monkeypatch.setattr(sys, 'argv', ['stage.py', '--device', 'abacus'])
    with pytest.raises(SystemExit) as exit:
        run.main(run.setup, Config, RECIPES)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith('error: --device abacus is not on this machine')


@pytest.mark.parametrize('error', [ValueError('of ours'), OSError('of the system')])
def test_main_keeps_the_traceback_of_everything_else(monkeypatch, error):
    """A mistake of ours is not the user's, even if it is a ValueError that we raise."""
    def train(cfg):
        raise error
    monkeypatch.setattr(sys, 'argv', ['stage.py'])
    with pytest.raises(type(error), match=str(error)):
        run.main(train, Config, RECIPES)


# ---- optimizer

def test_lr_endpoints():
    """Up to lr over the warm-up, down to min_lr at the end."""
    cfg = Config(steps=100, lr=1., warmup_steps=10, min_lr=0.1)
    assert run.lr_at(0, cfg) == pytest.approx(0.1) and run.lr_at(9, cfg) == run.lr_at(10, cfg) == 1
    assert run.lr_at(55, cfg) == pytest.approx(0.55) and run.lr_at(100, cfg) == pytest.approx(0.1)
    assert run.lr_at(0, Config(steps=100, lr=1., warmup_steps=0, min_lr=0.1)) == 1


@pytest.mark.parametrize('schedule, expected', [('linear', [.25, .495, .5, .01]), ('steps', [.25, .5, 1., .1])])
def test_other_schedules(schedule, expected):
    """linear falls from the first step on; steps is constant, then a tenth. Both are warmed up in the first four."""
    cfg = Config(steps=100, lr=1., warmup_steps=4, min_lr=0., schedule=schedule, drop_at=.9)
    assert [run.lr_at(step, cfg) for step in (0, 1, 50, 99)] == pytest.approx(expected)


def two_towers(**options):
    return CLIP(CLIPConfig(ViTConfig(**TINY, head=8, pool='class', **options), TextConfig(**TEXT)))


def test_param_groups():
    """Matrices decay; biases, norms, gains, positions and tokens do not; frozen weights are left out."""
    model = two_towers(layer_scale=0.1)
    model.visual.patch_embed.weight.requires_grad_(False)
    names = {id(weight): name for name, weight in model.named_parameters()}
    decayed, bare = run.param_groups(model, 0.05)
    assert (decayed['weight_decay'], bare['weight_decay'], decayed['lr_scale'], bare['lr_scale']) == (0.05, 0, 1, 1)
    ends = {names[id(weight)].split('.')[-2] for weight in decayed['params']}
    assert ends == {'qkv', 'proj', 'fc1', 'fc2', 'head', 'token_embed'}
    assert len(decayed['params']) + len(bare['params']) == len(names) - 1
    assert {'logit_scale', 'visual.class_token', 'visual.pos_embed', 'visual.head.bias', 'text.pos_embed'} \
        <= {names[id(weight)] for weight in bare['params']}


def test_layer_decay():
    """lr_scale is decay to the number of layers above: 1 for head and last norm; each tower counts its own blocks."""
    model = two_towers()
    names = {id(weight): name for name, weight in model.named_parameters()}
    scales = {names[id(weight)]: group['lr_scale'] for group in run.param_groups(model, 0.05, layer_decay=.5)
              for weight in group['params']}
    depth, text_depth = TINY['depth'], TEXT['depth']
    for name, above in {'visual.head.weight': 0, 'visual.norm.bias': 0, 'logit_scale': 0, 'text.head.weight': 0,
                        f'visual.blocks.{depth - 1}.mlp.fc1.weight': 1, 'visual.blocks.0.attn.q_bias': depth,
                        'visual.patch_embed.weight': depth + 1, 'visual.pos_embed': depth + 1,
                        'text.token_embed.weight': text_depth + 1}.items():
        assert scales[name] == .5 ** above, name


# ---- processes and devices

@pytest.mark.parametrize('name, local_rank, processes, gpus, expected', [
    ('', 0, 1, 0, 'cpu'), ('', 3, 4, 8, 'cuda:3'), ('cuda:1', 0, 1, 2, 'cuda:1'), ('cpu', 1, 2, 8, 'cpu'),
    ('cuda', 0, 1, 0, 'not on this machine'), ('cuda:7', 0, 1, 2, 'not on this machine'),
    ('cuda:1', 0, 2, 2, 'nproc_per_node=1, not 2'), ('', 0, 8, 4, 'nproc_per_node=4, not 8')])
def test_each_process_has_a_device(monkeypatch, name, local_rank, processes, gpus, expected):
    """Its own GPU where there are some; a device that is not there, or too few of them, is one line."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    if ' ' in expected or '=' in expected:
        with pytest.raises(ValueError, match=expected):
            run.find_device(name, local_rank, processes)
    else:
        assert str(run.find_device(name, local_rank, processes)) == expected


def test_a_batch_is_whole_micro_batches():
    with pytest.raises(run.Refused, match='--batch_size 8 is no multiple of 3: processes x --micro_batch'):
        run.setup(Config(batch_size=8, micro_batch=3, device='cpu'))


def test_a_thread_makes_batches_ahead():
    """In order, at most two before they are asked for; what goes wrong in the thread is raised here."""
    made = []

    def items():
        for n in range(5):
            made.append(n)
            yield dict(n=n)
        raise ValueError('of the reader')
    stream = run.in_thread(items())
    assert next(stream) == dict(n=0) and len(made) <= 3
    assert [next(stream)['n'] for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match='of the reader'):
        next(stream)


CUDA = torch.device('cuda')
CPU = torch.device('cpu')


def settled(device=CUDA, **options):
    cfg = Config(**options)
    run.settle_device(cfg, device)
    return cfg


@pytest.fixture
def threads(monkeypatch):
    """Two threads on two cores, as where nobody said anything; afterwards what it was."""
    before = torch.get_num_threads()
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_blocks_are_compiled_where_a_compiler_is(monkeypatch, capsys):
    """On a GPU; without a C compiler not, which is said, and refused if it was asked for."""
    monkeypatch.setattr(run.shutil, 'which', lambda name: '/usr/bin/' + name)
    assert settled().compile and not settled(eval=True).compile and not settled(CPU).compile
    monkeypatch.setattr(run.shutil, 'which', lambda name: None)
    monkeypatch.delenv('CC', raising=False)
    assert not settled().compile and 'install gcc' in capsys.readouterr().out
    with pytest.raises(run.Refused, match='--compile needs a C compiler'):
        settled(compile=True)


@pytest.mark.parametrize('device, data, given, num', [
    (CUDA, 'photos', None, 8), (CUDA, 'shapes:unique=9', None, 0), (CPU, 'photos', None, 0), (CUDA, 'photos', 3, 3)])
def test_several_processes_read_files_for_a_gpu(monkeypatch, device, data, given, num):
    monkeypatch.setattr(os, 'cpu_count', lambda: 16)
    assert settled(device, data=data, workers=given, compile=False).workers == num


@pytest.mark.parametrize('size, num', [('nano', 1), ('micro', 2)])
def test_small_models_compute_in_one_thread(threads, size, num):
    settled(CPU, size=size)
    assert torch.get_num_threads() == num


def test_a_variable_decides_before_size(threads, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    settled(CPU, size='nano')
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize('num', [1, 2])
def test_where_one_thread_computes_another_prepares(threads, num):
    """The next batches; where several compute, the loop's own does."""
    torch.set_num_threads(num)

    def prepare(batch):
        return dict(batch, thread=threading.current_thread())
    batches = run.ahead([dict(n=0), dict(n=1)], CPU, prepare)
    found = [(batch['n'], batch['thread'] is threading.current_thread()) for batch in batches]
    assert found == [(0, num == 2), (1, num == 2)]


def test_compiled_blocks_compute_the_same(monkeypatch, double):
    """Also with activations computed again; names of weights stay. Traced but not turned into C++, which takes long."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
    config = ViTConfig(width=16, depth=2, heads=2, mlp_width=32, patch_size=4, image_size=8, head=4)
    whole, cpu = init_weights(ViT(config)), torch.device('cpu')
    model = run.to_device(init_weights(ViT(config)), Config(compile=True, checkpoint_activations=True), cpu)
    assert plain(model).keys() == plain(whole).keys()
    for one in (whole, model):
        one(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)).square().mean().backward()
    for (name, weight), other in zip(whole.named_parameters(), model.parameters()):
        if weight.grad is not None:
            torch.testing.assert_close(other.grad, weight.grad, atol=1e-12, rtol=1e-9, msg=name)


@pytest.mark.parametrize('script, code', [('import sys; sys.exit(2)', 2), (
    'import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); os.kill(os.getppid(), 15); '
    '[time.sleep(.1) for _ in range(600)]', 143)])
def test_another_stage_ends_us_as_it_ended(tmp_path, script, code):
    """With its exit code; a SIGTERM to us goes on to it, and we leave when it has."""
    (tmp_path / 'stage.py').write_text(script)
    with pytest.raises(SystemExit) as left:
        run.run_stage(str(tmp_path / 'stage.py'), str(tmp_path / 'out'))
    assert left.value.code == code


# ---- save and resume

def train(out_dir, cfg, steps, stop=None, about={}):
    """A few steps as a stage makes them; returns the weights. With stop, ends there with a checkpoint."""
    model = init_weights(ViT(ViTConfig(**TINY, head=4)), cfg.seed)
    optimizer = run.make_optimizer(model, cfg)
    start, constants = run.resume(out_dir, model, optimizer, cfg, about=about)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group['lr'] = run.lr_at(step, cfg) * group['lr_scale']
        mask = torch.arange(16).expand(2, 16) % 3 == step % 3
        model(images(seed=step), mask).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == stop:
            measured = dict(mean=torch.tensor([1., 2.]), n=3)
            run.save_checkpoint(out_dir, stop, model, optimizer, cfg, measured, about=about)
            break
    return plain(model), start, constants


def test_resumed_run_is_bit_equal(tmp_path, recwarn):
    """Stopping after three of six steps and going on gives the weights of not stopping, without a warning."""
    cfg = Config(size='pico', steps=6, lr=0.01)
    whole, _, _ = train(str(tmp_path / 'a'), cfg, 6)
    train(str(tmp_path / 'b'), cfg, 6, stop=3)
    resumed, start, constants = train(str(tmp_path / 'b'), cfg, 6)
    assert start == 3 and constants['n'] == 3 and constants['mean'].tolist() == [1, 2]
    same(whole, resumed)
    assert not [str(w.message) for w in recwarn if 'torch.distributed' in str(w.message)]


def test_resume_refuses_other_options(tmp_path):
    """Options that change the weights are listed; those that do not may differ."""
    train(str(tmp_path), Config(steps=6, lr=0.01), 6, stop=1)
    train(str(tmp_path), Config(steps=6, lr=0.01, save_every=7, workers=3, micro_batch=2, device='cpu'), 2)
    with pytest.raises(ValueError, match=r'--lr 0.02 \(was 0.01\), --seed 1 \(was 0\)'):
        train(str(tmp_path), Config(steps=6, lr=0.02, seed=1), 6)


def test_runs_from_before_an_option_was_added_go_on(tmp_path):
    @dataclasses.dataclass
    class Later(Config):
        flavour: str = option('plain', 'added since')

    train(str(tmp_path), Config(steps=6), 6, stop=1)
    assert train(str(tmp_path), Later(steps=6), 2)[1] == 1
    with pytest.raises(ValueError, match='--flavour sweet'):
        train(str(tmp_path), Later(steps=6, flavour='sweet'), 2)


def described(**changed):
    """What `run.describe` makes of two small sets, with changes."""
    about = dict(classes=['ant', 'bee'], vocabulary=[('a', 'b')], teacher='1f',
                 **{'training data': dict(samples=9, names='0a', classes=['ant', 'bee'])})
    return about | changed


@pytest.mark.parametrize('now, words', [
    (dict(classes=['ant', 'bee', 'eel']), 'other classes, which changed since: added eel;'),
    (dict(classes=['bee']), 'removed ant;'), (dict(classes=['bee', 'cow']), 'added cow, removed ant;'),
    (dict(classes=['bee', 'ant']), 'they have another order;'),
    (dict(vocabulary=[('b', 'a')]), 'another vocabulary')])
def test_resume_refuses_other_classes_and_words(tmp_path, now, words):
    """What would give the weights another meaning is one line that tells nobody to delete a whole checkpoint."""
    train(str(tmp_path), Config(steps=6), 6, stop=1, about=described())
    with pytest.raises(run.Refused, match=words) as error:
        train(str(tmp_path), Config(steps=6), 2, about=described(**now))
    assert 'step_0000001' in str(error.value) and '\n' not in str(error.value)
    assert 'damaged' not in str(error.value) and 'delete' not in str(error.value)


@pytest.mark.parametrize('then, now, words', [
    (described(), described(), []),
    (described(), described(teacher='2f'), ['the teacher changed']),
    (described(), described(**{'training data': dict(samples=7, names='0b', classes=[])}),
     ['the training data changed, of which there are 7 (were 9)']),
    ({}, described(teacher='2f'), [])])
def test_resume_says_what_else_changed(tmp_path, capsys, then, now, words):
    """A line each, and the run goes on; a checkpoint from before it knew its data goes on without."""
    train(str(tmp_path), Config(steps=6), 6, stop=1, about=then)
    capsys.readouterr()
    assert train(str(tmp_path), Config(steps=6), 2, about=now)[1] == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('since')]
    assert len(lines) == len(words) and all(line.endswith(word) for line, word in zip(lines, words))


def test_steps_follow_the_number_of_images(tmp_path):
    """A run of --epochs goes on where there are fewer images now, and so fewer steps; one of --steps has its own."""
    train(str(tmp_path), Config(steps=6, epochs=2.), 6, stop=1)
    assert train(str(tmp_path), Config(steps=5, epochs=2.), 2)[1] == 1
    with pytest.raises(run.Refused, match=r'--epochs 0.0 \(was 2.0\), --steps 5 \(was 6\)'):
        train(str(tmp_path), Config(steps=5), 2)


def test_teachers_are_told_apart_by_their_weights():
    one, other = init_weights(tiny(), 0), init_weights(tiny(), 0)
    assert run.hash_of(one.state_dict()) == run.hash_of(other.state_dict())
    with torch.no_grad():
        other.pos_embed[0, 3, 2] += 1e-3
    assert run.hash_of(one.state_dict()) != run.hash_of(other.state_dict())


def test_a_checkpoint_of_other_shapes_is_not_called_damaged(tmp_path):
    """It is whole, but of another model; the line says which weights."""
    train(str(tmp_path), Config(steps=6), 6, stop=1)
    model = ViT(ViTConfig(**TINY, head=5))
    cfg = Config(steps=6)
    with pytest.raises(run.Refused, match=r'step_0000001 is of another model: its head.bias is \[4\], here \[5\]'):
        run.resume(str(tmp_path), model, run.make_optimizer(model, cfg), cfg)


def test_a_checkpoint_of_another_stage_is_refused(tmp_path, monkeypatch):
    train(str(tmp_path), Config(steps=6), 6, stop=1)
    monkeypatch.setattr(run, 'stage_of', lambda Config: Path('finetune.py'))
    with pytest.raises(run.Refused, match='step_0000001 is not of finetune.py; use another --out_dir'):
        train(str(tmp_path), Config(steps=6), 2)


@pytest.mark.parametrize('facts', [[], dict(format=run.FORMAT), dict(format=run.FORMAT, step=1, config={})])
def test_a_checkpoint_without_its_facts_is_damaged(tmp_path, facts):
    train(str(tmp_path), Config(steps=6), 6, stop=1)
    torch.save(facts, tmp_path / 'checkpoint' / 'step_0000001' / 'run.pt')
    with pytest.raises(run.Refused, match='step_0000001 is damaged') as error:
        train(str(tmp_path), Config(steps=6), 2)
    assert '\n' not in str(error.value)


def test_a_run_continued_by_other_code_says_so(tmp_path, capsys, monkeypatch):
    """Which file changed since, in one line; the run goes on. With the same code nothing is said."""
    train(str(tmp_path), Config(steps=6), 6, stop=1)
    train(str(tmp_path), Config(steps=6), 1)
    assert 'code' not in capsys.readouterr().out
    edited = {**run.code_of(Config), 'model.py': 'another hash'}
    monkeypatch.setattr(run, 'code_of', lambda Config: edited)
    assert train(str(tmp_path), Config(steps=6), 2)[1] == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if 'code' in line]
    assert len(lines) == 1 and 'model.py' in lines[0] and 'test_run.py' not in lines[0]


def test_a_checkpoint_remembers_the_code_of_its_stage_and_the_model():
    hashes = run.code_of(Config)
    assert list(hashes) == ['test_run.py', 'model.py'] and all(len(name) == 64 for name in hashes.values())


def test_an_earlier_checkpoint_is_refused_in_one_line(tmp_path):
    """The first version's had no format number."""
    train(str(tmp_path), Config(steps=6), 6, stop=1)
    path = tmp_path / 'checkpoint' / 'step_0000001' / 'run.pt'
    facts = torch.load(path)
    del facts['format']
    torch.save(facts, path)
    with pytest.raises(run.Refused, match='step_0000001 is of another version.*--out_dir NAME') as error:
        train(str(tmp_path), Config(steps=6), 2)
    assert '\n' not in str(error.value)


def test_two_checkpoints_stay(tmp_path):
    for stop in (1, 2, 3):
        train(str(tmp_path), Config(steps=6), 6, stop=stop)
    assert sorted(os.listdir(tmp_path / 'checkpoint')) == ['step_0000002', 'step_0000003']


def test_half_written_checkpoint_is_ignored(tmp_path):
    train(str(tmp_path), Config(steps=6), 6, stop=1)
    (tmp_path / 'checkpoint' / 'step_0000002.tmp').mkdir()
    assert run.list_checkpoints(str(tmp_path))[-1].endswith('step_0000001')
    train(str(tmp_path), Config(steps=6), 6, stop=2)
    assert run.list_checkpoints(str(tmp_path))[-1].endswith('step_0000002')


@pytest.mark.parametrize('broken', ['run.dcp.save', 'run.torch.save'])
def test_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch, broken):
    """A full disk is one line, and the checkpoint before it still resumes."""
    train(str(tmp_path), Config(steps=6), 6, stop=1)

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        with pytest.raises(ValueError, match='step_0000002 cannot be written .*No space left on device.*earlier ones are whole'):
            train(str(tmp_path), Config(steps=6), 6, stop=2)
    assert os.listdir(tmp_path / 'checkpoint') == ['step_0000001']
    assert train(str(tmp_path), Config(steps=6), 2)[1] == 1


def test_init_takes_no_checkpoint_folder(tmp_path):
    """Its metadata is a pickle, which could do anything: neither the folder nor a file in it is read as weights."""
    train(str(tmp_path), Config(steps=6), 6, stop=1)
    folder = tmp_path / 'checkpoint' / 'step_0000001'
    for path in (folder, *folder.iterdir()):
        with pytest.raises(ValueError) as error:
            load(str(path))
        assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_finished_run_says_so(tmp_path, capsys, monkeypatch):
    """A folder with a result is a finished run: one line names it and what to type for another."""
    cfg = Config(out_dir=str(tmp_path / 'a'), steps=2)
    assert not run.finished(cfg)
    monkeypatch.setattr(sys, 'argv', ['/somewhere/stage.py', '--data=/home/me/x', '--out_dir', str(tmp_path / 'a')])
    log = run.Log(cfg, 0)
    log.write(0, loss=1.)
    run.save_model(tiny(), cfg.out_dir + '/model.pt')
    log.finish(tiny(), 'loss', {}, skill=0.5)
    result = json.loads((tmp_path / 'a' / 'result.json').read_text())
    assert result['skill'] == 0.5 and result['parameters'] == run.count_parameters(tiny()) and result['seconds'] >= 0
    assert result['command'] == 'python stage.py --data=x --out_dir a'
    capsys.readouterr()
    assert run.finished(cfg)
    shown = capsys.readouterr().out
    assert 'result.json' in shown and '--out_dir NAME' in shown and shown.count('\n') == 1


def finish(folder, **options):
    """A run of Config that ended in a folder; its Config."""
    cfg = Config(out_dir=str(folder), **options)
    assert not run.finished(cfg)
    run.save_model(tiny(), f'{folder}/model.pt')
    run.Log(cfg, 0).finish(tiny(), 'loss', {})
    return cfg


@pytest.mark.parametrize('name, left', [
    ('result.json', None), ('model.pt', None), ('result.json', 0), ('result.json', 40), ('model.pt', 1000)])
def test_a_run_whose_result_or_model_is_not_whole_is_not_finished(tmp_path, name, left):
    """Missing, empty or cut short; until both are there again."""
    cfg = finish(tmp_path)
    assert run.finished(cfg)
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(whole[:left])
    assert not run.finished(cfg)
    path.write_bytes(whole)
    assert run.finished(cfg)


@pytest.mark.parametrize('text', ['[]', 'null', '"done"', '{"skill": ', '\ufeff{'])
def test_a_result_that_is_no_object_is_none(tmp_path, text):
    cfg = finish(tmp_path)
    (tmp_path / 'result.json').write_text(text)
    assert not run.finished(cfg)


def test_a_finished_run_with_other_options_is_refused(tmp_path):
    """Options that decide what is computed; a folder may have another place."""
    finish(tmp_path, lr=.5, data='/a/photos')
    assert run.finished(Config(out_dir=str(tmp_path), lr=.5, data='/b/photos', workers=2, scales=(.5, 2.)))
    with pytest.raises(run.Refused, match=r'--lr 0\.25 \(was 0\.5\), --scales \(0\.5, 1\.0\) \(was \(0\.5, 2\.0\)\); '):
        run.finished(Config(out_dir=str(tmp_path), lr=.25, data='/a/photos', scales=(.5, 1.)))


def test_another_stages_result_is_refused(tmp_path, monkeypatch):
    cfg = finish(tmp_path)
    monkeypatch.setattr(run, 'stage_of', lambda Config: Path('finetune.py'))
    with pytest.raises(run.Refused, match='result.json is of test_run.py, not of finetune.py'):
        run.finished(cfg)


def test_a_folder_belongs_to_one_run(tmp_path):
    """The second is refused while the first lives, and leaves nothing; the first may ask again."""
    cfg = Config(out_dir=str(tmp_path))
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(run.Refused, match=f'another run is writing to {tmp_path}'):
        run.finished(cfg)
    assert os.listdir(tmp_path) == []
    os.close(other)
    assert not run.finished(cfg) and not run.finished(cfg)


def test_a_readers_process_does_not_hold_the_folder(tmp_path):
    """It may live a little longer than the run that started it: what it inherited is closed."""
    run.finished(Config(out_dir=str(tmp_path)))
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(theirs, repr(run.locked).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(ours, 9) == b'None' and run.locked is not None
    run.unlock()
    os.close(ours)
    os.close(theirs)


def test_a_file_system_without_locks_does_without(tmp_path, monkeypatch):
    def unknown(descriptor, how):
        raise OSError(38, 'Function not implemented')
    monkeypatch.setattr(fcntl, 'flock', unknown)
    assert not run.finished(Config(out_dir=str(tmp_path)))


def test_out_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot be written'):
        run.finished(Config(out_dir=str(tmp_path / 'file' / 'x')))


def test_log_drops_what_will_be_done_again(tmp_path):
    """Resuming at step 2 keeps the lines of steps 0 and 1, also after a line cut short."""
    cfg = Config(out_dir=str(tmp_path), steps=9)
    log = run.Log(cfg, 0)
    for step in range(4):
        log.write(step, loss=torch.tensor(0.5), lr=1e-3)
    with open(tmp_path / 'log.jsonl', 'a') as file:
        file.write('{"step": 4, "lo')
    log = run.Log(cfg, 2)
    log.write(2, loss=0.25)
    lines = run.read_log(str(tmp_path))
    assert [line['step'] for line in lines] == [0, 1, 2] and [line['loss'] for line in lines] == [0.5, 0.5, 0.25]


def test_log_survives_lines_that_are_none(tmp_path):
    """Whatever stands in log.jsonl: what is no line of a log is left out, and the run goes on."""
    rows = ['{"step": 0, "loss": 1}', 'nonsense', '[1]', '{}', '{"step": "1"}', '[' * 10 ** 5, '', '\udcff',
            '{"step": 1, "loss": null, "seconds": "1", "skipped": []}']
    (tmp_path / 'log.jsonl').write_bytes('\n'.join(rows).encode('utf-8', 'surrogateescape'))
    log = run.Log(Config(out_dir=str(tmp_path), steps=9), 2)
    assert [line['step'] for line in run.read_log(str(tmp_path))] == [0, 1] and log.skipped == 0
    run.save_model(tiny(), f'{tmp_path}/model.pt')
    log.finish(tiny(), 'loss', {})


def test_what_is_written_is_json(tmp_path):
    """It has no NaN and no infinity: null stands for them, also inside of lists."""
    assert json.loads(run.to_json(dict(a=math.nan, b=[1., -math.inf], c='NaN'))) == dict(a=None, b=[1., None], c='NaN')
    log = run.Log(Config(out_dir=str(tmp_path), steps=9), 0)
    log.write(0, loss=math.nan)
    log.finish(tiny(), 'loss', {}, skill=math.inf)
    texts = [(tmp_path / name).read_text() for name in ('log.jsonl', 'evals.jsonl', 'result.json')]
    assert all('null' in text and 'NaN' not in text and 'Infinity' not in text for text in texts)


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), MemoryError(), run.Refused('no'), KeyError()])
def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch, capsys, error):
    """Whatever it is: the result is written, and one line names the picture."""
    def fail(*args):
        raise error
    monkeypatch.setattr(run, 'draw_loss', fail)
    finish(tmp_path)
    warnings = [line for line in capsys.readouterr().out.splitlines() if 'warning' in line]
    assert len(warnings) == 1 and 'loss.png was not written' in warnings[0] and (tmp_path / 'result.json').exists()


def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path, capsys):
    """Its line is missing, and said: a full disk may be empty again when weights are written."""
    log = run.Log(Config(out_dir=str(tmp_path), steps=9), 0)
    (tmp_path / 'log.jsonl').unlink()
    (tmp_path / 'log.jsonl').mkdir()
    log.write(0, loss=1.)
    log.close()
    assert 'log.jsonl was not written' in capsys.readouterr().out


def failing(num, error):
    for n in range(num):
        yield dict(n=n)
    raise error


@pytest.mark.parametrize('error', [run.Refused('the folder is gone'), OSError('of the system')])
def test_what_is_trained_is_saved_where_reading_fails(tmp_path, capsys, error):
    """The step before has its batch, and then asks to stop; with a checkpoint made, the error ends the run."""
    log = run.Log(Config(out_dir=str(tmp_path), steps=9), 0)
    steps = [(batch['n'], log.stopping()) for _, batch in zip(range(9), log.watch(failing(3, error)))]
    assert steps == [(0, 0), (1, 0), (2, run.FAILED)]
    with pytest.raises(type(error), match=str(error)):
        log.leave(3)
    assert 'stopped after step 3, which is saved' in capsys.readouterr().out


def test_nothing_is_read_beyond_the_last_step(tmp_path):
    log = run.Log(Config(out_dir=str(tmp_path), steps=3), 0)
    steps = [(step, log.stopping()) for step, _ in zip(range(3), log.watch(iter([dict(n=0)] * 3)))]
    log.close()
    assert steps == [(0, 0), (1, 0), (2, 0)]


def test_where_the_first_batch_fails_there_is_nothing_to_save(tmp_path):
    log = run.Log(Config(out_dir=str(tmp_path), steps=9), 0)
    with pytest.raises(run.Refused, match='the folder is gone'):
        next(log.watch(failing(0, run.Refused('the folder is gone'))))
    log.close()


def test_log_counts_over_interruptions(tmp_path):
    """Skipped steps and seconds run on; each line has the speed, also in TFLOP/s, and memory."""
    cfg = Config(out_dir=str(tmp_path), steps=9, batch_size=10)
    log = run.Log(cfg, 0, flops=1e6)
    log.skipped += 1
    log.write(0, loss=1.)
    log.close()
    log = run.Log(cfg, 1, flops=1e6)
    log.write(1, loss=1.)
    log.close()
    first, second = run.read_log(str(tmp_path))
    assert first['skipped'] == second['skipped'] == 1 and second['seconds'] >= first['seconds']
    assert first['tflops'] == pytest.approx(first['images_per_second'] * 1e6 / 1e12, rel=1e-4)
    assert 0.05 < first['memory_gb'] < 100


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_are_noted_and_obeyed(tmp_path, capsys, number, code):
    """Nothing happens until the loop asks; then the exit code is the signal's, and handlers are as before."""
    before = signal.getsignal(number)
    log = run.Log(Config(out_dir=str(tmp_path), steps=9), 0)
    assert log.stopping() == 0
    os.kill(os.getpid(), number)
    assert log.stopping() == number
    with pytest.raises(SystemExit) as left:
        log.leave(3)
    assert left.value.code == code and signal.getsignal(number) is before
    assert 'stopped after step 3' in capsys.readouterr().out


class Weight:
    """One weight of 1, its optimizer and a log: each step adds a gradient of the given norm."""

    def __init__(self, folder, fused=True):
        self.weight = torch.nn.Parameter(torch.ones(1))
        kind = torch.optim.AdamW if fused else torch.optim.SGD
        self.optimizer = kind([self.weight], lr=.1, **dict(fused=True) if fused else {})
        self.log = run.Log(Config(out_dir=str(folder), steps=99), 0)

    def step(self, norm):
        self.weight.grad = torch.full((1,), norm)
        self.log.update(self.optimizer, torch.tensor(norm))
        return self.weight.item()


@pytest.mark.parametrize('fused', [True, False])
def test_gradients_that_are_not_finite_are_skipped(tmp_path, fused):
    """The weight stays as it was, the next step moves it, and the log counts one."""
    one = Weight(tmp_path, fused)
    before = one.step(1.)
    assert one.step(math.nan) == before != one.step(1.)
    one.log.write(2, loss=1.)
    assert run.read_log(str(tmp_path))[-1]['skipped'] == 1


@pytest.mark.parametrize('norms, ends', [([math.inf] * 10 + [1.], True), ([math.nan] * 9 + [1.] + [math.nan] * 9, False)])
def test_ten_bad_gradients_end_the_run(tmp_path, norms, ends):
    """Ten in a row, at the next line of the log; a good one starts the count again."""
    one = Weight(tmp_path)
    for norm in norms:
        one.step(norm)
    with pytest.raises(run.Refused, match='not finite ten times') if ends else contextlib.nullcontext():
        one.log.write(18, loss=1.)


# ---- pictures and costs

def test_the_loss_is_drawn(tmp_path):
    """Curve and lines leave their colours in the picture; no points, one point and NaN are fine."""
    path = str(tmp_path / 'x.png')
    run.draw_loss(path, [(0, 1.), (10, 2.), (20, math.nan)], {'chance': 0.5}, 'title')
    colours = {colour for _, colour in Image.open(path).getcolors(1 << 20)}
    assert {(0, 114, 178), (213, 94, 0)} <= colours
    run.draw_loss(path, [], {}, '')
    run.draw_loss(path, [(3, 1.)], {}, '')


def test_a_sheet_holds_its_images_and_its_legend(tmp_path):
    """Columns of tensors and of PIL images, which keep their shape, above the colours that names stand for."""
    path = str(tmp_path / 'x.png')
    red = torch.tensor([255., 0, 0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    run.draw_sheet(path, {'tensor': red, 'PIL': [Image.new('RGB', (80, 40), 'blue')]}, 40, {'grass': (0, 255, 0)})
    sheet = Image.open(path)
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert counts[255, 0, 0] == 2 * 40 * 40 and counts[0, 0, 255] == 40 * 20 and counts[0, 255, 0] > 100


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """Of a picture, too, at the end of a long run."""
    def full(*args, **options):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(run.Refused, match='x.png cannot be written .No space left on device'):
        run.draw_sheet(str(tmp_path / 'x.png'), {'black': torch.zeros(1, 3, 4, 4)})


def test_activations_of_g():
    """.54 GB an image; computed again, .07."""
    config = ViTConfig(**SIZES['g'])
    cuda = torch.device('cuda')
    assert run.activation_memory(config, cuda) / 1e9 == pytest.approx(.542, abs=1e-3)
    assert run.activation_memory(config, cuda, checkpointed=True) / 1e9 == pytest.approx(.07, abs=5e-3)


def on_meta(size, **options):
    with torch.device('meta'):
        return ViT(ViTConfig(**{**SIZES[size], **options}))


@pytest.mark.parametrize('shards', [1, 8])
def test_weights_gradients_and_adamw_take_16_bytes_a_parameter(shards):
    """Of g, shared by the processes."""
    memory = run.Memory(on_meta('g'), torch.device('cpu'), shards).parts(1)
    assert sum(memory[name] for name in ('weights', 'gradients', 'AdamW')) == 16 * 1_011_147_520 / shards


def test_too_large_is_refused(monkeypatch):
    """A training that cannot fit is one line before it starts; one that fits passes."""
    monkeypatch.setattr(run, 'free_memory', lambda device: 4e9)
    run.settle_memory(Config(batch_size=1), on_meta('pico'), torch.device('cpu'), 1)
    with pytest.raises(run.Refused, match=r'needs \d+\.\d of \d+\.\d GB with 1 images at once, activations .*micro_batch'):
        run.settle_memory(Config(batch_size=10), on_meta('g'), torch.device('cpu'), 1)


@pytest.mark.parametrize('gigabytes, num, again', [(141, 128, False), (80, 64, False), (40, 32, False), (24, 64, True)])
def test_memory_decides_how_g_is_trained(monkeypatch, gigabytes, num, again):
    """All images at once; else parts of 16 and more; else activations are computed again."""
    monkeypatch.setattr(run, 'free_memory', lambda device: gigabytes * 2 ** 30)
    cfg = Config(batch_size=128, micro_batch=0)
    run.settle_memory(cfg, on_meta('g', head=768), torch.device('cuda'), 1)
    assert (cfg.micro_batch, cfg.checkpoint_activations) == (num, again)


def test_a_flag_decides_before_memory(monkeypatch):
    monkeypatch.setattr(run, 'free_memory', lambda device: 141 * 2 ** 30)
    cfg = Config(batch_size=128, micro_batch=8, checkpoint_activations=True)
    run.settle_memory(cfg, on_meta('g', head=768), torch.device('cuda'), 1)
    assert (cfg.micro_batch, cfg.checkpoint_activations) == (8, True)


def test_epochs_become_steps():
    """--epochs counts passes over the images; without it --steps stands; a short run has a short warm-up."""
    by_epochs, by_steps = Config(epochs=2, batch_size=10), Config(steps=8)
    run.settle_steps(by_epochs, range(1000))
    run.settle_steps(by_steps, range(1000))
    assert by_epochs.steps == 200 and by_steps.steps == 8 and by_steps.warmup_steps == 2
