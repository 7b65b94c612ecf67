"""
What the studies of how it scales run, and how: real commands, resumable run by run, so many at once. See scaling.py.

A run is a command of its own in out/study/NAME; out/study/runs.csv has a row for each that is finished, and those are
never repeated.
"""
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import detect_seg                   # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402
import segment                      # noqa: E402

STUDIES = ('sizes', 'data', 'targets', 'controls', 'transfer')
GRIDS = {  # by device; the teacher sees more images than any student. cuda's has not been run
    'cpu': dict(fit=('pico', 'nano', 'micro'), held_out='mini', steps=(1600, 3200, 6400), batch_size=16, lr=.75,
                gain=1.9, flags=(), unique=(250, 1000, 4000, 16_000), teacher=('--size', 'nano'), teacher_steps=2000,
                seeds={'pico': 3, 'nano': 3, 'micro': 3}),
    'cuda': dict(fit=('pico', 'nano', 'micro', 'mini', 'ti', 's', 'b'), held_out='l', steps=(1024, 2048, 4096),
                 batch_size=256, lr=3, gain=1.9, flags=('--image_size', 64, '--patch_size', 8),
                 unique=(2000, 8000, 32_000, 128_000),
                 teacher=('--size', 'mini', '--image_size', 64, '--patch_size', 8), teacher_steps=8000,
                 seeds={})}
SEEDS = 0, 1                # where a grid names no other number of them: cheap runs make fits surer for little
WARMUP = 100                # the same for all lengths: they branch off one another
COOLDOWN = .2               # share of a run's steps
BRACKET = .5, 1, 2          # times the rule's learning rate
POOR = 'shapes:objects=1,classes=4'
SECONDS = {  # a step of 16 images on one core that reaches SPEED; before and after the steps (probes, pictures)
    'pico': (.025, 12), 'nano': (.038, 14), 'micro': (.075, 18), 'mini': (.13, 25)}
SPEED, TEACHER_STEP, HEAD_SECONDS = 200e9, .27, 145      # FLOP/s; core-seconds
HEADS = {'boxes': dict(detect_seg.SMALL, stages=1, window=0, drop_path=0, steps=300),      # alike for all sizes
         'segments': dict(segment.SMALL, drop_path=0, steps=600, head='linear')}
COLUMNS = ('name', 'size', 'seed', 'steps', 'lr', 'factor', 'batch_size', 'data', 'unique', 'target', 'teacher', 'head',
           'N', 'flops', 'skill', 'train_skill', 'cosine', 'baseline', 'inpaint_skill', 'knn_top1',
           'linear_top1', 'knn_unnamed', 'linear_unnamed', 'box_ap', 'miou', 'seconds')


# ---- the grids --------------------------------------------------------------------------------------------------

def learning_rate(size, grid):
    """One rule for all sizes: 1 / (width x depth), times the grid's number; `sizes` brackets it at both ends."""
    return grid['lr'] / (M.SIZES[size]['width'] * M.SIZES[size]['depth'])


def student(grid, size, seed, steps, factor=1, teacher=None, target='clip', world='shapes', unique=0, head=''):
    """One run: what tells it from others. head: boxes or segments on top of a student that is there."""
    teacher = '' if target == 'pixels' else teacher or grid['teacher_steps']
    made = dict(size=size, seed=seed, steps=steps, factor=factor, batch_size=grid['batch_size'], teacher=teacher,
                target=target, data=f'shapes:unique={unique}' if unique else world, unique=unique, head=head)
    made['lr'] = float(f'{learning_rate(size, grid) * factor:.4g}')
    usual = dict(factor=1, teacher=grid['teacher_steps'], target='clip', data='shapes', head='')
    parts = [f'{key}={made[key]}' for key, value in usual.items() if made[key] not in (value, '')]
    return dict(made, name='-'.join([size, str(seed), str(steps), *parts]).replace(':', '.').replace(',', '.'))


def lengths(grid, size, seed):
    """One run at a constant rate with branches that cool down: each starts where the rate of the one before it fell."""
    runs = [student(grid, size, seed, steps) for steps in grid['steps']]
    for before, after in zip(runs, runs[1:]):
        after['branch'] = before['name']
    return runs


def bracketed(grid):
    """The (size, steps) that are run at other learning rates too: as long as time allows, as short runs scatter."""
    return (grid['fit'][0], grid['steps'][2]), (grid['held_out'], grid['steps'][1])


def runs_of(study, grid):
    """The runs of a study, in two parts: the second starts when the first is done and fitted. One name means one run
    in all studies; whether it branched off makes no difference to its numbers but the seconds."""
    fit, held_out, (short, middle, long) = grid['fit'], grid['held_out'], grid['steps']
    least, most = ([student(grid, size, 0, steps, factor) for factor in BRACKET if factor != 1]
                   for size, steps in bracketed(grid))
    seeds = {size: range(grid['seeds'].get(size, len(SEEDS))) for size in fit}
    grow = [one for seed in range(max(map(len, seeds.values()))) for size in reversed(fit) if seed in seeds[size]
            for one in lengths(grid, size, seed)]
    ends = [student(grid, size, 0, short, target=target) for size in (fit[-1], fit[0])
            for target in ('clip', 'tokens', 'pixels', 'untrained')]
    column = [student(grid, size, 0, middle, teacher=grid['teacher_steps'] // part) for part in (4, 2, 1)
              for size in reversed(fit)]
    ceilings = [student(grid, size, 0, short, target='distill') for size in (held_out, *reversed(fit))]
    heads = [student(grid, size, 0, steps, head=head) for head in ('boxes', 'segments') for size in (*fit, held_out)
             for steps in (short, long)]
    few = [student(grid, size, 0, middle, unique=unique) for size in (fit[-1], fit[1])
           for unique in (*grid['unique'], 0)]
    poor = [student(grid, size, seed, long, world=world) for seed in SEEDS for world in (POOR, 'shapes')
            for size in reversed(fit)]
    first, then = {'sizes': (grow + least, lengths(grid, held_out, 0) + most), 'data': (few, []),
                   'targets': (ceilings + column + ends, []), 'controls': (poor, []), 'transfer': (heads, [])}[study]
    return list({one['name']: one for one in first}.values()), then     # what two rows share is run once


def command(one, grid, folder):
    """A run's words after `python`."""
    script, name = 'mim_pretrain.py', one['name']
    if one['head']:
        init, vit = folder / f"{one['size']}-{one['seed']}-{one['steps']}" / 'model.pt', vit_of(one['size'], grid)
        recipe = dict(HEADS[one['head']], image_size=2 * vit['image_size'], patch_size=vit['patch_size'])
        script, flags = 'detect_seg.py', ['--init', init]
        for key, value in recipe.items():
            flags += [f'--{key}', ','.join(map(str, value)) if isinstance(value, tuple) else value]
    else:
        cooldown = round(COOLDOWN * one['steps'])
        flags = ['--steps', one['steps'], '--cooldown', cooldown, '--save_every', one['steps'] - cooldown,
                 '--lr', one['lr'], '--min_lr', 0, '--warmup_steps', WARMUP, '--batch_size', one['batch_size'],
                 '--drop_path', 0, '--init_gain', grid['gain'], '--data', one['data'], '--target', one['target'],
                 *grid['flags']]
        flags += ['--teacher', folder / f"teacher-{one['teacher']}" / 'model.pt'] if one['teacher'] else []
        flags += ['--branch', folder / one['branch']] if 'branch' in one else []
    words = [ROOT / script, '--size', one['size'], '--seed', one['seed'], *flags, '--out_dir', folder / name]
    return [str(word) for word in words]


def teach(steps, grid, folder):
    """The teacher of so many steps, as a run."""
    words = [ROOT / 'clip_train.py', *grid['teacher'], '--steps', steps, '--out_dir', folder / f'teacher-{steps}']
    return dict(name=f'teacher-{steps}', words=[str(word) for word in words])


# ---- running ----------------------------------------------------------------------------------------------------

def core_seconds(one):
    """What a run takes of a core that reaches SPEED; nan if nobody measured it. A branch begins where the one before it
    cooled, so at .4 of its steps."""
    if one['head']:
        return HEAD_SECONDS
    step, around = SECONDS.get(one['size'], (math.nan, 0))
    return step * one['steps'] * (1 - .5 * (1 - COOLDOWN) * ('branch' in one)) + around


def slowness():
    """How much longer than that this machine takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    speed = run.matmul_speed(torch.device('cpu'))
    torch.set_num_threads(threads)
    return SPEED / speed


def execute(runs, folder, jobs, device=(), grid=None):
    """Runs commands, so many at once, in order but for those that wait for the run they branch off. A run whose row is
    there is not started, and one whose result is there says so at once. Stopped, it stops them, and they save."""
    done = {row['name'] for row in read(folder / 'runs.csv')}
    waiting, running, began, finished = [one for one in runs if one['name'] not in done], {}, time.time(), []
    left = {one['name']: core_seconds(one) for one in waiting} if grid else {}
    cores = str(max(1, (os.cpu_count() or 1) // jobs))
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        while waiting or running:
            unfinished = {one['name'] for one in waiting} | running.keys()
            ready = [one for one in waiting if one.get('branch') not in unfinished]
            for one in ready[:jobs - len(running)]:
                waiting.remove(one)
                running[one['name']] = one, start([*one['words'], *device], folder / f"{one['name']}.log", cores)
            for name, (one, child) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[name]
                if child.returncode:
                    lines = (folder / f'{name}.log').read_text().strip().splitlines() or ['no output']
                    sys.exit(f'{name}: {lines[-1]}\n(python {" ".join(one["words"])})')
                if grid:
                    keep(folder, record(one, folder, grid))
                    finished.append(left.pop(name))
                    minutes = (time.time() - began) / 60
                    print(f'{minutes:6.1f} min  {name}; {len(left)} runs left, '
                          f'about {minutes * sum(left.values()) / sum(finished):.0f} min', flush=True)
            time.sleep(.05)
    finally:
        for one, child in running.values():
            child.send_signal(signal.SIGTERM)
        for one, child in running.values():
            child.wait()
        signal.signal(signal.SIGTERM, before)


def start(words, log, cores):
    with open(log, 'w') as file:
        return subprocess.Popen([sys.executable, *words], env=dict(os.environ, OMP_NUM_THREADS=cores), stdout=file,
                                stderr=subprocess.STDOUT)


def vit_of(size, grid):
    """A size's options in a grid."""
    return {**M.SIZES[size], **{flag[2:]: value for flag, value in zip(grid['flags'][::2], grid['flags'][1::2])}}


def count(size, grid):
    """N, the weights of blocks and patch embedding."""
    with torch.device('meta'):
        vit = M.ViT(**vit_of(size, grid))
    return run.count_parameters(vit.blocks) + run.count_parameters(vit.patch_embed)


def record(one, folder, grid):
    """A finished run's row: its result, its size and compute, and how well it did on its last training images."""
    result = json.loads((folder / one['name'] / 'result.json').read_text())
    if one['head']:
        return {**one, **{key: result[key] for key in COLUMNS if key in result}, 'skill': None}
    images = one['steps'] * one['batch_size']
    last = [line['loss'] for line in run.read_log(folder / one['name']) if line['step'] >= .95 * one['steps']]
    train = -sum(last) / len(last) if last and one['target'] == 'clip' else math.nan
    return {**one, **result, 'N': count(one['size'], grid),
            'flops': images * run.training_flops(vit_of(one['size'], grid)),
            'train_skill': (train - result['baseline']) / (1 - result['baseline'])}


def read(path):
    """runs.csv as a list of dicts, with numbers where they are numbers and None where nothing is."""
    if not Path(path).exists():
        return []
    with open(path, newline='') as file:
        return [{key: value if key in ('name', 'size', 'data', 'target', 'head') else number(value)
                 for key, value in row.items()} for row in csv.DictReader(file)]


def number(text):
    return None if text in ('', 'nan') else float(text) if set(text) & set('.en') else int(text)


def keep(folder, row):
    """Adds a row to runs.csv, written beside and renamed."""
    rows = [*read(folder / 'runs.csv'), row]
    with open(folder / 'runs.csv.tmp', 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
        writer.writeheader()
        writer.writerows({key: f'{x:.6g}' if isinstance(x, float) else x for key, x in one.items()} for one in rows)
    os.replace(folder / 'runs.csv.tmp', folder / 'runs.csv')
