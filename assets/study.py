"""
The README's studies: a grid of real commands, those already done skipped, and a table with intervals.

    python assets/study.py targets                           # what is reconstructed x how long it trains
    python assets/study.py longer                            # the same at 8 and 16 times the shortest length
    python assets/study.py photographs --data cifar10_tar    # features, pixels and scratch on photographs
    python assets/study.py clip                              # CLIP from scratch, from its teacher, pixels, EVA
    python assets/study.py finetune                          # classes from EVA, pixels, the teacher, scratch
    python assets/study.py finetune_photographs --data cifar10_tar      # the same, after the study of photographs
    python assets/study.py detect                            # boxes and masks from EVA, pixels, scratch
    python assets/study.py segment                           # a class for every pixel, from frozen ViTs and fine-tuned
    python assets/study.py video                             # actions from EVA and scratch; from single frames

Runs go to out/study-NAME/, two at a time on half of the cores each (--jobs); every number of theirs to assets/NAME.csv.
Intervals are 95% of Student's t over seeds. Seeds are paired: one seed means the same weights, order and masks.
"""
import argparse
import csv
import functools
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
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data                         # noqa: E402
import detect_seg                   # noqa: E402
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

CLIP_STEPS, CLIP_BATCH = 80, 128
CLIP_RATES = (8e-4, 2e-3, 5e-3, 1.25e-2, 3e-2)
CLIP_ARMS = {  # where the image tower comes from, the learning rates tried on seed 1, seeds at the best of them
    'scratch': ('', CLIP_RATES, 5), 'pixels': ('out/study-clip/pixels/model.pt', CLIP_RATES, 5),
    'teacher': ('assets/nano-teacher.pt', CLIP_RATES, 5), 'EVA': ('assets/nano-eva.pt', CLIP_RATES, 5),
    'scratch, all compute': ('', (8e-4, 2e-3, 5e-3), 5)}      # 20 times as long; rates tried at a sixth of it
CLIP_MEASURES = ('heldout_pairs', 'heldout_among_24', 'seen_pairs', 'zero_shot_top1', 'retrieval')

PIXELS, PHOTOGRAPHS = 'out/study-clip/pixels/', 'out/study-photographs/'
LAPTOP = ['--size', 'micro', '--image_size', 64, '--patch_size', 8]
STARTS = {'EVA': 'assets/nano-eva.pt', 'pixels': PIXELS + 'model.pt', 'teacher': 'assets/nano-teacher.pt',
          'scratch': 'scratch'}
FINETUNE = {  # arms: {name: (where it starts, own flags)}, {} is the seed. judged: what says which rate is best
    'finetune': dict(
        script='finetune.py', judged='top1', steps=200, seeds=5, rates=(1.5e-3, 4e-3), has_probes=True,
        before={PIXELS: ['--target', 'pixels']}, arms={arm: (start, []) for arm, start in STARTS.items()}),
    'finetune_photographs': dict(
        script='finetune.py', judged='top1', steps=400, seeds=3, rates=(4e-3,), has_probes=True, arms={
            'EVA': (PHOTOGRAPHS + 'clip-1200-{}/model.pt', []), 'pixels': (PHOTOGRAPHS + 'pixels-1200-{}/model.pt', []),
            'teacher': (PHOTOGRAPHS + 'teacher/model.pt', []), 'scratch': ('scratch', [])}),
    'video': dict(
        script='finetune.py', judged='top1', steps=1500, seeds=3, rates=(1.5e-3, 4e-3), flags=['--size', 'nano-video'],
        arms={'EVA': (STARTS['EVA'], []), 'scratch': ('scratch', []),
              'EVA, one frame': (STARTS['EVA'], ['--frames', 1])}),
    'detect': dict(
        script='detect_seg.py', judged='box_ap50', steps=500, seeds=3, rates=(1e-3,), flags=['--size', 'micro'],
        before={'out/laptop-eva/': LAPTOP, 'out/laptop-pixels/': [*LAPTOP, '--target', 'pixels']}, arms={
            'EVA': ('out/laptop-eva/model.pt', []), 'pixels': ('out/laptop-pixels/model.pt', []),
            'scratch': ('scratch', [])}),
    'segment': dict(
        script='detect_seg.py', judged='miou', steps=400, seeds=3, rates=(1.5e-3, 4e-3),
        flags=['--head', 'linear', '--image_size', 64, '--patch_size', 4], before={PIXELS: ['--target', 'pixels']},
        arms={**{f'{arm}, frozen': (start, ['--freeze']) for arm, start in STARTS.items()},
              'EVA': (STARTS['EVA'], ['--no-freeze']), 'scratch': ('scratch', ['--no-freeze'])}),
}
FINETUNE_MEASURES = ('top1', 'top5', 'hidden_top1', 'shuffled_top1', 'linear_top1', 'knn_top1')
PERCENTAGES = ('miou', 'pixel_accuracy', 'class_accuracy', 'box_ap', 'box_ap50', 'box_ap75', 'mask_ap', 'mask_ap50')


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


def clip_costs():
    """{arm: (pairs, images without captions, TFLOP) of the stages before}, and the TFLOP of a step of this one. A
    training step is three forward passes; a text tower reads up to its batch's longest caption."""
    clip = M.load(str(ROOT / 'assets/nano-teacher.pt'))
    text, tokenizer = clip.config['text'], data.Tokenizer(clip.extra['merges'])
    captions = data.World().some_captions(2048)
    longest = [(tokenizer(captions[n:n + CLIP_BATCH]) > 0).sum(1).max() for n in range(0, 2048, CLIP_BATCH)]
    L, D = float(sum(longest)) / len(longest), text['width']
    image = run.flops_per_image(clip.config['vision']) / 1e12
    pair = image + text['depth'] * (2 * L * 12 * D * D + 4 * L * L * D) / 1e12
    pairs, images = 700 * 128, 1600 * 64                # the default commands of the two stages
    teacher, eva = pairs * 3 * pair, images * 4 * image        # MIM: the student's three passes, the teacher's one
    return {'scratch': (0, 0, 0), 'pixels': (0, images, images * 3 * image), 'teacher': (pairs, 0, teacher),
            'EVA': (pairs, images, teacher + eva), 'scratch, all compute': (0, 0, 0)}, CLIP_BATCH * 3 * pair


def clip_study(jobs, cores, began):
    """The paper's section 2.3 in small: each arm at its own best learning rate, chosen on seed 1 by the pairs of colour
    and kind that training shows, then more seeds; from scratch also with the compute of all stages together."""
    before, step_cost = clip_costs()
    long = CLIP_STEPS + round(before['EVA'][2] / step_cost)
    command('mim_pretrain.py', ['--target', 'pixels'], 'out/study-clip/pixels', cores)

    def one(job):
        arm, lr, seed, steps = job
        start = ['--vision', CLIP_ARMS[arm][0]] if CLIP_ARMS[arm][0] else []
        name = f'{arm.replace(", ", "-").replace(" ", "-")}-{steps}-{lr:g}-{seed}'
        save_every = 20 if steps == CLIP_STEPS else 200
        flags = ['--steps', steps, '--lr', lr, '--seed', seed, '--save_every', save_every, *start]
        result = command('clip_train.py', flags, f'out/study-clip/{name}', cores)
        lines = [json.loads(line) for line in open(ROOT / f'out/study-clip/{name}/evals.jsonl')]
        curve = {line['step'] + 1: line['heldout_pairs'] for line in lines} | {steps: result['heldout_pairs']}
        print(f'{(time.time() - began) / 60:6.1f} min  {arm} {steps} {lr:g} {seed}: held-out pairs '
              f'{result["heldout_pairs"]:.3f}, seen {result["seen_pairs"]:.3f}', file=sys.stderr, flush=True)
        return dict(row=arm, steps=steps, lr=lr, seed=seed, curve=curve, **result)

    *short_arms, long_arm = CLIP_ARMS
    sweep, final, best = [], [], {}
    with ThreadPoolExecutor(jobs) as pool:
        for arms, steps, tried in ((short_arms, CLIP_STEPS, CLIP_STEPS), ([long_arm], long, long // 6)):
            sweep += pool.map(one, [(arm, lr, 1, tried) for arm in arms for lr in CLIP_ARMS[arm][1]])
            for arm in arms:
                best[arm] = max((r for r in sweep if r['row'] == arm), key=lambda r: r['seen_pairs'])['lr']
            final += pool.map(one, [(arm, best[arm], seed, steps) for seed in range(1, 6) for arm in arms
                                    if seed <= CLIP_ARMS[arm][2]])
    save_csv('clip', ['row', 'steps', 'lr', 'seed', *CLIP_MEASURES, 'skipped', 'seconds'],
             sweep + [r for r in final if r not in sweep])
    clip_report(sweep, final, best, before, step_cost)


def clip_report(sweep, final, best, before, step_cost):
    """The table, the paired differences, and two curves of the held-out pairs' accuracy: over the pairs that this stage
    saw, and over the compute of all stages."""
    print('| image tower | pairs here | pairs in all | images without captions | TFLOP in all | learning rate | '
          'rates within 90% | ' + ' | '.join(CLIP_MEASURES) + ' |\n' + '|---' * (7 + len(CLIP_MEASURES)) + '|')
    curves, compute = {}, {}
    for arm in CLIP_ARMS:
        runs = [r for r in final if r['row'] == arm]
        pairs, images, cost = before[arm]
        here, tried = runs[0]['steps'] * CLIP_BATCH, [r for r in sweep if r['row'] == arm]
        top = max(r['seen_pairs'] for r in tried)
        good = [r['lr'] for r in tried if r['seen_pairs'] >= .9 * top and not r['skipped']]
        print(f'| {arm} | {here:,} | {here + pairs:,} | {images:,} | {cost + runs[0]["steps"] * step_cost:.1f} | '
              f'{best[arm]:g} | {min(good):g} to {max(good):g} | '
              + ' | '.join(interval([r[name] for r in runs]) for name in CLIP_MEASURES) + ' |')
        mean = [(step, sum(r['curve'][step] for r in runs) / len(runs)) for step in sorted(runs[0]['curve'])
                if all(step in r['curve'] for r in runs)]
        compute[arm] = [(cost + step * step_cost, 100 * y) for step, y in mean]
        if here == CLIP_STEPS * CLIP_BATCH:
            curves[arm] = [(step * CLIP_BATCH, 100 * y) for step, y in mean]
    print('\nPaired differences\n\n| | ' + ' | '.join(CLIP_MEASURES) + ' |\n' + '|---' * (1 + len(CLIP_MEASURES)) + '|')
    by = {arm: {r['seed']: r for r in final if r['row'] == arm} for arm in CLIP_ARMS}
    for other in [arm for arm in CLIP_ARMS if arm != 'EVA']:
        cells = [interval([by['EVA'][s][name] - by[other][s][name] for s in by[other]]) for name in CLIP_MEASURES]
        print(f'| EVA - {other} | ' + ' | '.join(cells) + ' |')
    print('\nSeen pairs by learning rate, one seed\n\n| | ' + ' | '.join(f'{lr:g}' for lr in CLIP_RATES) + ' |\n'
          + '|---' * (1 + len(CLIP_RATES)) + '|')
    for arm in CLIP_ARMS:
        tried = {r['lr']: 100 * r['seen_pairs'] for r in sweep if r['row'] == arm}
        print(f'| {arm} | ' + ' | '.join(f'{tried[lr]:.1f}' if lr in tried else '' for lr in CLIP_RATES) + ' |')
    label = 'zero-shot accuracy on held-out pairs, percent'
    run.draw_curves(str(ROOT / 'assets/clip_pairs.png'), curves, xlabel='pairs seen in this stage', ylabel=label)
    run.draw_curves(str(ROOT / 'assets/clip_compute.png'), compute, xlabel='TFLOP of all stages', ylabel=label)


@functools.cache
def probes_of(start, seed, spec):
    """k-NN and a linear map on the frozen features that an arm starts from."""
    cfg, model = SimpleNamespace(workers=0), M.ViT(**M.SIZES['nano'])
    model = M.init_weights(model, seed) if start == 'scratch' else M.load(str(ROOT / start))
    encode = run.pooled_features(model.visual if isinstance(model, M.CLIP) else model)
    return run.probe(encode, data.open_data(spec, 'train'), data.open_data(spec, 'val'), 32, run.NUM_PROBE, cfg,
                     torch.device('cpu'))


def classifier_costs():
    """TFLOP of the stages before finetune.py, and of a step of it."""
    return clip_costs()[0]['EVA'][2], 64 * 3 * run.flops_per_image(M.SIZES['nano']) / 1e12


def detection_costs():
    """TFLOP of the teacher and the laptop EVA (as in clip_costs), and of a step of detect_seg.py's micro recipe."""
    cfg = run.parse_config(detect_seg.Config, detect_seg.RECIPES, ['--size', 'micro', '--device', 'cpu'])
    dataset, position = detect_seg.open_instances(cfg, 'train'), torch.arange(cfg.batch_size)
    model, batch = detect_seg.build(cfg, dataset), dataset.batch(position, cfg.image_size)
    with FlopCounterMode(display=False) as counter:
        losses = model(detect_seg.prepare(model, batch['images'], batch['sizes']), batch['sizes'], batch['targets'],
                       lambda stream, num: data.uniform(0, stream, position, num))
        sum(part / max(1, num) for part, num in losses.values()).backward()
    eva = 1600 * 64 * (3 * run.flops_per_image(M.SIZES['micro']) + run.flops_per_image(M.SIZES['nano'])) / 1e12
    return clip_costs()[0]['teacher'][2] + eva, counter.get_total_flops() / 1e12


COSTS = {'finetune': classifier_costs, 'detect': detection_costs}       # studies with an arm of all stages' compute


def finetune_study(name, spec, jobs, cores, began):
    """Fine-tuning by where it starts: each arm at the best of its rates, chosen on a seed of its own where there are
    several, then more seeds; of COSTS from scratch also with the compute of all stages together (its rates are tried at
    a sixth of it)."""
    study, arms = FINETUNE[name], dict(FINETUNE[name]['arms'])
    seeds, rates, long = study['seeds'], study['rates'], study['steps']
    for folder, words in study.get('before', {}).items():
        command('mim_pretrain.py', words, folder.rstrip('/'), cores * jobs)
    if name in COSTS:
        before, step_cost = COSTS[name]()
        long += round(before / step_cost)
        arms['scratch, all compute'] = 'scratch', []

    def one(job):
        arm, lr, seed = job
        start, own = arms[arm][0].format(seed % seeds), list(arms[arm][1])
        if start == 'scratch':
            own += ['--layer_decay', 1]
        steps = study['steps'] if arm != 'scratch, all compute' else long if seed < seeds else long // 6
        folder = f'out/study-{name}/{arm.replace(", ", "-").replace(" ", "-")}-{lr:g}-{seed}'
        words = [*study.get('flags', []), *own, '--data', spec, '--init', start, '--steps', steps, '--lr', lr]
        result = command(study['script'], [*words, '--seed', seed, '--save_every', 10 ** 6], folder, cores)
        result |= {measure: result[measure] / 100 for measure in PERCENTAGES if measure in result}
        print(f'{(time.time() - began) / 60:6.1f} min  {arm} {lr:g} {seed}: {result[study["judged"]]:.3f}',
              file=sys.stderr, flush=True)
        probes = probes_of(start, seed * (start == 'scratch'), spec) if study.get('has_probes') else {}
        return dict(row=arm, lr=lr, seed=seed, steps=steps, **result, **probes)

    with ThreadPoolExecutor(jobs) as pool:
        sweep = list(pool.map(one, [(arm, lr, seeds) for lr in rates for arm in arms if len(rates) > 1]))
        best = {arm: rates[0] for arm in arms}
        best |= {r['row']: r['lr'] for r in sorted(sweep, key=lambda r: r[study['judged']])}
        final = list(pool.map(one, [(arm, best[arm], seed) for seed in range(seeds) for arm in arms]))
    measures = [measure for measure in FINETUNE_MEASURES + PERCENTAGES if measure in final[0]]
    save_csv(name, ['row', 'lr', 'seed', 'steps', *measures, 'seconds'], sweep + final)
    by = {arm: {r['seed']: r for r in final if r['row'] == arm} for arm in arms}
    print('| starts from | learning rate | ' + ' | '.join(measures) + ' |\n' + '|---' * (2 + len(measures)) + '|')
    for arm in arms:
        cells = [interval([r[measure] for r in by[arm].values()]) if measure in by[arm][0] else ''
                 for measure in measures]
        print(f'| {arm} | {best[arm]:g} | ' + ' | '.join(cells) + ' |')
    for other in [arm for arm in arms if arm not in ('EVA', 'EVA, frozen')]:
        ours = 'EVA, frozen' if 'frozen' in other else 'EVA'
        cells = [interval([by[ours][s][measure] - by[other][s][measure] for s in by[other]])
                 if measure in by[other][0] else '' for measure in measures]
        print(f'| {ours} - {other} | | ' + ' | '.join(cells) + ' |')


def save_csv(name, columns, records):
    with open(ROOT / f'assets/{name}.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows({name: f'{x:.5g}' if isinstance(x, float) else x for name, x in record.items()}
                         for record in records)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=[*STUDIES, 'clip', *FINETUNE])
    parser.add_argument('--data', default='shapes', help='as of the stages')
    parser.add_argument('--jobs', type=int, default=2, help='runs at once')
    args = parser.parse_args()
    began, cores = time.time(), max(1, (os.cpu_count() or 1) // args.jobs)
    if args.name == 'clip':
        return clip_study(args.jobs, cores, began)
    spec = args.data if args.data.startswith('shapes') else os.path.abspath(args.data)
    if args.name in FINETUNE:
        return finetune_study(args.name, spec, args.jobs, cores, began)
    study = STUDIES[args.name]
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

    jobs = [(row, steps, seed) for seed in range(study['seeds']) for row in study['runs']
            for steps in study['runs'][row]]
    with ThreadPoolExecutor(args.jobs) as pool:
        records += pool.map(one, jobs)
    order = list(study['runs'])
    records.sort(key=lambda record: (order.index(record['row']) if record['steps'] else -1, record['steps'],
                                     record['seed']))
    names = ['row', 'steps', 'seed', *MEASURES, 'cosine', 'baseline', 'inpaint', 'inpaint_skill', 'seconds']
    save_csv(args.name, names, records)
    report(study, records)
    print(f'\n{sum(r.get("seconds", 0) for r in records) / 60:.0f} minutes of runs, {args.jobs} at once')


if __name__ == '__main__':
    main()
