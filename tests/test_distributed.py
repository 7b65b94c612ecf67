"""Several processes do what one does: gradients, samples, losses, saved runs. Processes start slowly, so each number of
them is started once and does everything; the tests compare what they left.
All of it is in float64: sums taken in another order differ by 1e-15 of their size, on every processor."""
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import clip_train
import data
import finetune
import mim_pretrain
import model as M
import run
from conftest import TESTS, computing_in_double

STEPS = 30
STOPS = {1: 4, 2: 9}        # the run that goes on with 1, 2 and 4 processes is stopped after these steps


def config(stage, folder, *flags):
    """A Config whose run takes a second or two."""
    flags = ['--size', 'pico', '--batch_size', '8', '--warmup_steps', '2', '--log_every', '1', '--device', 'cpu',
             '--out_dir', str(folder), *flags]
    if stage is mim_pretrain:
        flags += ['--teacher', str(folder.parent / 'teacher.pt'), '--drop_path', '.5']
    return run.parse_config(stage.Config, stage.RECIPES, flags)


def make_teacher(path):
    vision = M.ViTConfig(**M.SIZES['pico'], head=16, pool='mean', mask_token=False)
    text = M.TextConfig(width=16, depth=1, heads=2, vocab=600, embed=16)
    M.save(M.init_weights(M.CLIP(M.CLIPConfig(vision, text))), str(path))


def small(patch):
    """Two blocks, evaluations of a few images, no pictures; each mask hides another number of patches."""
    some_captions = data.World.some_captions
    patch.setattr(data.World, 'some_captions', lambda world, num: some_captions(world, 200))
    patch.setattr(run, 'NUM_PROBE', 8)
    patch.setattr(run, 'draw_loss', nothing)
    patch.setattr(mim_pretrain, 'NUM_EVAL', 8)
    patch.setattr(mim_pretrain, 'BANK', 512)
    patch.setattr(mim_pretrain, 'draw_features', nothing)
    patch.setattr(mim_pretrain, 'make_mask', unequal_masks)
    patch.setattr(clip_train, 'NUM_EVAL', 8)
    patch.setattr(clip_train, 'NUM_PAIRS', 8)
    patch.setattr(clip_train, 'draw_retrieval', nothing)
    patch.setitem(M.SIZES, 'pico', dict(M.SIZES['pico'], depth=2))
    patch.setattr(run.Log, 'write', write_exactly)


def nothing(*args, **options):
    return {}


def write_exactly(log, step, write=run.Log.write, **values):
    """log.jsonl has six digits; losses.txt beside it has all."""
    if run.get_rank() == 0:
        with open(Path(log.cfg.out_dir, 'losses.txt'), 'a') as file:
            file.write(f'{step} {float(values["loss"])!r}\n')
    write(log, step, **values)


def unequal_masks(kind, index, grid, mask_ratio, seed=0):
    return data.uniform(seed, 'unequal', index, grid * grid) < (.1 + .1 * (index % 7))[:, None]


def gradients(stage, cfg):
    """{name: whole gradient} of the first step."""
    found, original = {}, run.clip_gradients

    def keep(model, largest_norm):
        for name, weight in model.named_parameters():
            grad = weight.grad.full_tensor() if hasattr(weight.grad, 'full_tensor') else weight.grad
            found.setdefault(name, grad.clone())
        return original(model, largest_norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'clip_gradients', keep)
        stage.train(cfg)
    return found


def mim_gradients(folder, *flags):
    return gradients(mim_pretrain, config(mim_pretrain, folder, '--steps', '1', *flags))


def clip_gradients(folder):
    """Three steps with all that EVA-CLIP-g+ adds to CLIP: LAMB, dropped tokens and paths, rates by layer and tower."""
    cfg = config(clip_train, folder, '--steps', '3', '--warmup_steps', '1', '--optimizer', 'lamb', '--lr', '.05',
                 '--text_lr', '.02', '--layer_decay', '.9', '--drop_tokens', '.5', '--drop_path', '.5')
    cfg.text_layer_decay = .8
    return gradients(clip_train, cfg)


def stop_after(patch, step):
    """The last process is told to stop, by SIGTERM, while it logs the step before."""
    write = run.Log.write

    def write_and_signal(log, at, **values):
        write(log, at, **values)
        if at + 1 == step and run.get_rank() == int(os.environ.get('WORLD_SIZE', 1)) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
    patch.setattr(run.Log, 'write', write_and_signal)


def trained(folder, stop=None, **options):
    """Pre-trains in folder, stopped after a step or to the end; the exit code."""
    flags = [word for name, value in options.items() for word in (f'--{name}', str(value))]
    with pytest.MonkeyPatch.context() as patch:
        if stop:
            stop_after(patch, stop)
        try:
            mim_pretrain.train(config(mim_pretrain, folder, *flags))
        except SystemExit as left:
            return left.code


def one_cannot_read(folder, **options):
    """A run whose second process finds no fourth batch."""
    batches = data.batches

    def three(*args, **named):
        stream = batches(*args, **named)
        yield from itertools.islice(stream, 3)
        if run.get_rank() == 1:
            raise run.Refused('the folder is gone')
        yield from stream
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'batches', three)
        trained(folder, **options)


def refusal(function):
    try:
        function()
    except ValueError as error:
        return str(error)


def ema_run(folder, until):
    """A sharded model and its slow copy, `until` steps from the last checkpoint on; returns the copy, whole."""
    cfg = config(mim_pretrain, folder)
    _, _, device, mesh = run.setup(cfg)
    model = run.to_device(M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['pico'], head=4))), cfg, device, mesh)
    optimizer = run.make_optimizer(model, cfg)
    ema = finetune.EMA(model, .5)
    start, _ = run.resume(str(folder), model, optimizer, cfg, ema)
    for step in range(start, until):
        images = data.World().batch(torch.arange(4) + step, 32)['images']
        model(model.normalize(images), torch.ones(4, 64) > 0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    run.save_checkpoint(str(folder), until, model, optimizer, cfg, ema=ema)
    with ema.in_place_of(model):
        return {name: x.full_tensor() if hasattr(x, 'full_tensor') else x.clone()
                for name, x in model.state_dict().items()}


def damage(folder, how):
    """A copy of the run in folder/chain whose checkpoint is broken."""
    broken = folder / f'damaged-{how}'
    checkpoint = broken / 'checkpoint' / f'step_{STOPS[1]:07d}'
    if run.get_rank() == 0:
        shutil.copytree(folder / 'chain', broken)
        shard = max(checkpoint.glob('*.distcp'), key=lambda path: path.stat().st_size)
        if how == 'missing':
            shard.unlink()
        else:
            path = {'truncated': shard, 'metadata': checkpoint / '.metadata', 'run': checkpoint / 'run.pt'}[how]
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    torch.distributed.barrier()
    return refusal(lambda: trained(broken, steps=STEPS))


def work(folder, world):
    """Everything that `world` processes show, as one dict."""
    torch.manual_seed(run.get_rank())                         # nothing may depend on torch's own generator
    found = dict(mim=mim_gradients(folder / f'mim-{world}'), clip=clip_gradients(folder / f'clip-{world}'))
    if world == 2:
        found['mim, micro'] = mim_gradients(folder / 'micro', '--micro_batch', '2')
        found['mim, again'] = mim_gradients(folder / 'again', '--checkpoint_activations')
        found['damaged'] = {how: damage(folder, how) for how in ('missing', 'truncated', 'metadata', 'run')}
        found['too many'] = refusal(lambda: mim_pretrain.train(config(mim_pretrain, folder / 'x', '--batch_size', '3')))
        found['teacher'] = first_trains_the_teacher(folder)
        found['straight'] = trained(folder / 'straight', steps=6, save_every=2)
        trained(folder / 'killed', steps=6, save_every=2)
        found['codes'] = [trained(folder / 'cut', stop, steps=6) for stop in (3, None)]
        found['gone'] = refusal(lambda: one_cannot_read(folder / 'gone', steps=6))
        trained(folder / 'gone', steps=6)
    found['ema'] = ema_run(folder / 'ema', {1: 2, 2: 4, 4: 6}[world])
    found['chain'] = trained(folder / 'chain', STOPS.get(world), steps=STEPS)
    return found


def first_trains_the_teacher(folder):
    """Which process trains the built-in teacher, here at once; all have its path afterwards."""
    trainers = folder / 'trainers'

    def train_at_once(script, out_dir, *flags):
        time.sleep(.5)
        with open(trainers, 'a') as file:
            file.write(f'{run.get_rank()} {script}\n')
    cfg = config(mim_pretrain, folder / 'x', '--out_dir', 'x')
    cfg.teacher = ''
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'run_stage', train_at_once)
        patch.setattr(mim_pretrain, 'BUILT_IN', folder / 'nothing')
        path = mim_pretrain.find_teacher(cfg)
    return path, trainers.read_text()


def die_while_saving(folder, world):
    """The first process is killed when the second checkpoint is written, before it has its name."""
    save, calls = run.dcp.save, []

    def save_and_die(*args, **options):
        save(*args, **options)
        calls.append(1)
        if len(calls) == 2 and run.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.dcp, 'save', save_and_die)
        trained(folder / 'killed', steps=6, save_every=2)


def process(rank, world, port, folder, what):
    """What one of `world` processes runs, with torchrun's variables."""
    local = 2 if world == 4 else world          # four are as on two machines of two
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % local), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(local),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(folder / f'{name}-{rank}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    torch.set_num_threads(1)
    with computing_in_double():
        small(pytest.MonkeyPatch())
        found = what(folder, world)
    torch.save(found, folder / f'found-{world}-{rank}.pt')
    torch.distributed.destroy_process_group()


def launch(world, folder, what):
    """Starts `world` processes that call what(folder, world); imports are made once and forked."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['preloaded'])
    processes = [context.Process(target=process, args=(rank, world, port, folder, what)) for rank in range(world)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', TESTS, prepend=os.pathsep)       # where the server that forks looks for it
        for one in processes:
            one.start()
    return processes


def finish(processes, folder):
    for one in processes:
        one.join(timeout=300)
    for rank, one in enumerate(processes):
        assert one.exitcode == 0, (folder / f'stderr-{rank}').read_text()[-3000:]


@pytest.fixture(scope='module')
def shown(tmp_path_factory):
    """{number of processes: what they found}, of 1, 2 and 4, in this order."""
    folder = tmp_path_factory.mktemp('processes')
    make_teacher(folder / 'teacher.pt')
    with computing_in_double(), pytest.MonkeyPatch.context() as patch:
        small(patch)
        found = {1: work(folder, 1)}
        trained(folder / 'undisturbed', steps=STEPS)
        found['slow weights'] = ema_run(folder / 'slow', 6)
    dying = launch(2, folder, die_while_saving)
    dying[0].join(timeout=300)
    dying[1].kill()
    found['left by the killed'] = sorted(os.listdir(folder / 'killed' / 'checkpoint'))
    for world in (2, 4):
        finish(launch(world, folder, work), folder)
        found[world] = torch.load(folder / f'found-{world}-0.pt')
    return found, folder


def losses(folder):
    """Of every step, in all digits: of a step that was done again the last."""
    rows = [line.split() for line in open(folder / 'losses.txt')]
    of_step = {int(step): float(loss) for step, loss in rows}
    return torch.tensor([of_step[step] for step in sorted(of_step)], dtype=torch.float64)


def close(gradients, expected):
    """The names whose gradients differ by more than 1e-9 of their length."""
    assert gradients.keys() == expected.keys() and {x.dtype for x in gradients.values()} == {torch.float64}
    return [name for name, x in expected.items() if (gradients[name] - x).norm() > 1e-9 * x.norm() + 1e-12]


@pytest.mark.parametrize('world', [2, 4])
@pytest.mark.parametrize('stage', ['mim', 'clip'])
def test_gradients_are_those_of_one_process(shown, stage, world):
    """Of the global batch: its rows have unequal numbers of hidden patches, and dropped paths; its pairs contrast
    across processes."""
    assert close(shown[0][world][stage], shown[0][1][stage]) == []


@pytest.mark.parametrize('world', [2, 4])
def test_lambs_steps_are_those_of_one_process(shown, world):
    """Contrast across processes, samples' own patches and paths, lengths of sharded matrices: losses and weights."""
    one, several = (shown[1] / f'clip-{n}' for n in (1, world))
    assert len(losses(one)) == 3
    torch.testing.assert_close(losses(several), losses(one), atol=1e-9, rtol=0)
    one, several = (torch.load(folder / 'model.pt')['state_dict'] for folder in (one, several))
    for name in one:
        torch.testing.assert_close(several[name], one[name], atol=1e-9, rtol=1e-9, msg=lambda text: f'{name}: {text}')


@pytest.mark.parametrize('how', ['mim, micro', 'mim, again'])
def test_gradients_do_not_depend_on_how_they_are_made(shown, how):
    """In micro-batches, with activations computed again."""
    assert close(shown[0][2][how], shown[0][1]['mim']) == []


def test_a_run_goes_on_with_another_number_of_processes(shown):
    """Four steps by one process, five by two, the rest by four: the losses of an undisturbed run."""
    found, folder = shown
    assert [found[world]['chain'] for world in (1, 2, 4)] == [143, 143, None]
    assert len(losses(folder / 'undisturbed')) == STEPS and STEPS - STOPS[2] >= 20
    torch.testing.assert_close(losses(folder / 'chain'), losses(folder / 'undisturbed'), atol=1e-9, rtol=0)


def weights_equal(one, other):
    one, other = (M.load(str(folder / 'model.pt')).state_dict() for folder in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_sigterm_to_one_process_saves_all_at_the_same_step(shown):
    """It leaves with 143 after a checkpoint; resumed, the weights are bit-equal to those of a run left alone."""
    found, folder = shown
    assert found[2]['codes'] == [143, None] and weights_equal(folder / 'cut', folder / 'straight')


def test_where_one_process_cannot_read_all_save(shown):
    """All say why and leave after the same step; resumed, the weights are bit-equal to those of a run left alone."""
    for rank in range(2):
        assert torch.load(shown[1] / f'found-2-{rank}.pt')['gone'] == 'the folder is gone'
    assert sorted(os.listdir(shown[1] / 'gone' / 'checkpoint')) == ['step_0000003']
    assert weights_equal(shown[1] / 'gone', shown[1] / 'straight')


def test_killed_while_saving(shown):
    """SIGKILL during a save leaves the checkpoint before, from which the run goes on to bit-equal weights."""
    found, folder = shown
    assert found['left by the killed'] == ['step_0000002', 'step_0000004.tmp']
    assert weights_equal(folder / 'killed', folder / 'straight')
    assert sorted(os.listdir(folder / 'killed' / 'checkpoint')) == ['step_0000002', 'step_0000004']


@pytest.mark.parametrize('how', ['missing', 'truncated', 'metadata', 'run'])
def test_a_damaged_checkpoint_is_one_line_on_every_process(shown, how):
    found, folder = shown
    for rank in range(2):
        said = torch.load(folder / f'found-2-{rank}.pt')['damaged'][how]
        assert f'step_{STOPS[1]:07d} is damaged; delete that folder' in said and '\n' not in said


def test_a_batch_smaller_than_the_processes_is_refused(shown):
    for rank in range(2):
        said = torch.load(shown[1] / f'found-2-{rank}.pt')['too many']
        assert said == '--batch_size 3 is no multiple of 2: processes x --micro_batch'


def test_only_the_first_process_trains_the_teacher(shown):
    for rank in range(2):
        path, trainers = torch.load(shown[1] / f'found-2-{rank}.pt')['teacher']
        assert (path, trainers) == ('out/teacher/model.pt', '0 clip_train.py\n')


def test_ema_goes_on_with_another_number_of_processes(shown):
    """Two steps each by 1, 2 and 4 processes: the slow weights of six steps by one."""
    for name, x in shown[0][4]['ema'].items():
        torch.testing.assert_close(x, shown[0]['slow weights'][name], atol=1e-9, rtol=1e-9)


def test_samples_do_not_depend_on_processes_and_workers(tmp_path):
    """Images (so indices and crops) and masks of three steps are the same for 1, 2, 4 processes, 0, 1, 3 workers."""
    from PIL import Image
    for n in range(12):
        noise = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(tmp_path / f'{n}.png')
    dataset, cfg, cpu = data.open_data(str(tmp_path)), config(mim_pretrain, tmp_path / 'x'), torch.device('cpu')

    def steps(world, workers):
        parts = []
        for rank in range(world):
            batches = data.batches(dataset, 8, 32, 2, 5, 0, cpu, workers, rank=rank, world=world)
            parts.append(list(mim_pretrain.add_masks(batches, cfg, 8, 4, 2, rank, world, cpu)))
        return {name: torch.stack([torch.cat([part[name] for part in step]) for step in zip(*parts)])
                for name in ('index', 'images', 'mask', 'drop')}
    expected = steps(1, 0)
    for world, workers in ((2, 0), (4, 0), (1, 1), (2, 3)):
        for name, x in steps(world, workers).items():
            assert torch.equal(x, expected[name])


def long_run(folder, world):
    trained(folder / 'disturbed', steps=200, save_every=1)


@pytest.mark.long
def test_twenty_kills(tmp_path):
    """Two processes killed at 20 random moments, saving after every step, end with bit-equal weights and losses."""
    make_teacher(tmp_path / 'teacher.pt')
    finish(launch(2, tmp_path, long_run), tmp_path)
    (tmp_path / 'disturbed').rename(tmp_path / 'undisturbed')
    moment, log, killed = random.Random(0), tmp_path / 'disturbed' / 'log.jsonl', []
    for _ in range(20):
        processes, before = launch(2, tmp_path, long_run), log.stat().st_mtime_ns if log.exists() else 0
        while all(one.is_alive() for one in processes) and not (log.exists() and log.stat().st_mtime_ns > before):
            time.sleep(.01)             # until it trains
        time.sleep(3 * moment.random())
        for one in processes:
            one.kill()
            one.join()
        killed.append(sorted(os.listdir(log.parent / 'checkpoint')))
        print(killed[-1])
    finish(launch(2, tmp_path, long_run), tmp_path)
    assert any(name.endswith('.tmp') for names in killed for name in names), 'no kill fell into a save'
    assert weights_equal(tmp_path / 'undisturbed', tmp_path / 'disturbed')
    assert torch.equal(losses(tmp_path / 'undisturbed'), losses(tmp_path / 'disturbed'))
