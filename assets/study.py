"""
The README's studies: a grid of real commands, those already done skipped, and a table with intervals.

    python assets/study.py targets                           # what is reconstructed x how long it trains
    python assets/study.py longer                            # the same at 8 and 16 times the shortest length
    python assets/study.py photographs --data cifar10_tar    # features, pixels and scratch on photographs

Runs go to out/study-NAME/, two at a time on half of the cores each (--jobs); every number of theirs to assets/NAME.csv.
Intervals are 95% of Student's t over seeds. Seeds are paired: one seed means the same weights, order and masks.
"""
import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data                         # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

STUDIES = {  # runs: {target: steps}, the target to compare with first
    'targets': dict(teacher='out/teacher', teacher_flags=[], seeds=5, runs={
        'clip': (300, 600, 1200), 'tokens': (300, 600, 1200), 'distill': (300, 600, 1200), 'pixels': (300, 600, 1200),
        'untrained': (1200,)}),
    'longer': dict(teacher='out/teacher', teacher_flags=[], seeds=3, runs={
        'clip': (2400, 4800), 'tokens': (4800,), 'distill': (4800,)}),
    'photographs': dict(teacher='out/study-photographs/teacher', teacher_flags=['--steps', '700'], seeds=3, runs={
        'clip': (1200,), 'pixels': (1200,)}),
}
MEASURES = ('linear_top1', 'knn_top1', 'linear_unnamed', 'knn_unnamed', 'skill')
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}   # by n - 1


def command(script, flags, out_dir, cores):
    """One command in a process of its own; its result.json, at once if it is there."""
    result = ROOT / out_dir / 'result.json'
    if not result.exists():
        environment = dict(os.environ, OMP_NUM_THREADS=str(cores))
        words = [sys.executable, script, *map(str, flags), '--out_dir', out_dir]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'{" ".join(words)}\n{done.stderr[-2000:]}')
    return json.loads(result.read_text())


def frozen(spec, teacher, seeds):
    """Probes of what no run made: the teacher, raw pixels, and by seed ViTs that never learnt."""
    cfg, cpu = SimpleNamespace(workers=0), torch.device('cpu')
    train_set, val_set, config = data.open_data(spec, 'train'), data.open_data(spec, 'val'), M.SIZES['nano']
    probe = lambda encode: run.probe(encode, train_set, val_set, config['image_size'], run.NUM_PROBE, cfg, cpu)
    yield 'teacher', 0, probe(run.pooled_features(M.load(str(ROOT / teacher / 'model.pt')).visual))
    yield 'raw pixels', 0, probe(lambda images: images.flatten(1).float())
    for seed in range(seeds):
        yield 'random ViT', seed, probe(run.pooled_features(M.init_weights(M.ViT(**config), seed).eval()))


def interval(values):
    """'mean ± half-width' in percent, 95% of Student's t; of one value no interval."""
    mean, n = sum(values) / len(values), len(values)
    if n == 1:
        return f'{100 * mean:.1f}'
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return f'{100 * mean:.1f} ± {100 * T95[n - 1] * std / math.sqrt(n):.1f}'


def report(study, records):
    """Tables in markdown: every row at every length, then differences paired by seed."""
    by = {}
    for record in records:
        by.setdefault((record['row'], record['steps']), {})[record['seed']] = record
    measures = [name for name in MEASURES if any(name in record for record in records)]
    print('| | steps | seeds | ' + ' | '.join(measures) + ' |\n' + '|---' * (3 + len(measures)) + '|')
    for (row, steps), seeds in by.items():
        cells = [interval([r[name] for r in seeds.values()]) if all(name in r for r in seeds.values()) else ''
                 for name in measures]
        print(f'| {row} | {steps or ""} | {len(seeds)} | ' + ' | '.join(cells) + ' |')
    runs = study['runs']
    last = lambda row: (row, max(runs[row]))
    contrasts = [(last(row), last('clip')) for row in runs if row != 'clip']
    contrasts += [(('clip', max(runs['tokens']) // 2), last('tokens'))] if 'tokens' in runs else []
    contrasts += [(last(row), (row, min(runs[row]))) for row in runs if len(runs[row]) > 1]
    contrasts += [(last(row), ('random ViT', 0)) for row in runs]
    print('\nPaired differences\n\n| | seeds | ' + ' | '.join(measures) + ' |\n' + '|---' * (2 + len(measures)) + '|')
    for a, b in contrasts:
        seeds = sorted(by.get(a, {}).keys() & by.get(b, {}).keys())
        if seeds:
            cells = [interval([by[a][s][name] - by[b][s][name] for s in seeds])
                     if name in by[a][seeds[0]] and name in by[b][seeds[0]] else '' for name in measures]
            name = lambda key: f'{key[0]} at {key[1]}' if key[1] else key[0]
            print(f'| {name(a)} - {name(b)} | {len(seeds)} | ' + ' | '.join(cells) + ' |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=STUDIES)
    parser.add_argument('--data', default='shapes', help='as of the stages')
    parser.add_argument('--jobs', type=int, default=2, help='runs at once')
    args = parser.parse_args()
    study, began = STUDIES[args.name], time.time()
    cores = max(1, (os.cpu_count() or 1) // args.jobs)
    spec = args.data if args.data.startswith('shapes') else os.path.abspath(args.data)
    command('clip_train.py', ['--data', spec, *study['teacher_flags']], study['teacher'], cores * args.jobs)
    records = [dict(row=row, steps=0, seed=seed, **metrics)
               for row, seed, metrics in frozen(spec, study['teacher'], study['seeds'])]

    def one(job):
        row, steps, seed = job
        flags = ['--target', row, '--steps', steps, '--seed', seed, '--save_every', steps, '--data', spec,
                 '--teacher', f'{study["teacher"]}/model.pt']
        result = command('mim_pretrain.py', flags, f'out/study-{args.name}/{row}-{steps}-{seed}', cores)
        print(f'{(time.time() - began) / 60:6.1f} min  {row} {steps} {seed}: skill {result["skill"]:.3f}, '
              f'linear {result["linear_top1"]:.3f}', file=sys.stderr, flush=True)
        return dict(row=row, steps=steps, seed=seed, **result)

    jobs = [(row, steps, seed) for seed in range(study['seeds']) for row in study['runs'] for steps in study['runs'][row]]
    with ThreadPoolExecutor(args.jobs) as pool:
        records += pool.map(one, jobs)
    order = list(study['runs'])
    records.sort(key=lambda record: (order.index(record['row']) if record['steps'] else -1, record['steps'],
                                     record['seed']))
    names = ['row', 'steps', 'seed', *MEASURES, 'cosine', 'baseline', 'inpaint', 'inpaint_skill', 'seconds']
    with open(ROOT / f'assets/{args.name}.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, names, extrasaction='ignore')
        writer.writeheader()
        writer.writerows({name: f'{x:.5g}' if isinstance(x, float) else x for name, x in record.items()}
                         for record in records)
    report(study, records)
    print(f'\n{sum(r.get("seconds", 0) for r in records) / 60:.0f} minutes of runs, {args.jobs} at once')


if __name__ == '__main__':
    main()
