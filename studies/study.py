"""
The tables of docs/results.md and of the stages' chapters: a grid of real commands each, over paired seeds.

    python studies/study.py targets                          # what is reconstructed x how long it trains
    python studies/study.py longer         # features, distillation, pixels, up to 16 times as long; 5.5 core-hours
    python studies/study.py photographs --data cifar10_tar   # features and pixels on photographs
    python studies/study.py choices                          # what the loss is on, masks, registers, blocks, teachers
    python studies/study.py choices_photographs --data cifar10_tar       # what the loss is on
    python studies/study.py clip                             # CLIP from scratch, its teacher, pixels, EVA
    python studies/study.py finetune                         # classes from EVA, pixels, the teacher, scratch
    python studies/study.py finetune_photographs --data cifar10_tar      # the same, after the study of photographs
    python studies/study.py video                            # actions from EVA and scratch; from single frames
    python studies/study.py detect                           # boxes and masks from EVA, pixels, scratch
    python studies/study.py segment                          # a class for every pixel, frozen and fine-tuned
    python studies/study.py targets --csv studies/targets.csv    # only the tables, of runs that are there

Runs go to out/study-NAME/, their numbers to runs.csv there. One seed means the same weights, order and masks for all
arms. Where several learning rates are given, each arm has the best of them, tried on one seed.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import grid
import plot

sys.path.insert(0, str(grid.ROOT))
import data                         # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402
import torch                        # noqa: E402

PROBES = 'linear_top1', 'knn_top1', 'linear_unnamed', 'knn_unnamed', 'skill'
CLASSES = 'top1', 'top5', 'hidden_top1', 'shuffled_top1'
BOXES = 'box_ap', 'box_ap50', 'box_ap75', 'mask_ap', 'mask_ap50'
MAPS = 'miou', 'pixel_accuracy', 'class_accuracy'
PAIRS = 'heldout_pairs', 'heldout_among_24', 'seen_pairs', 'zero_shot_top1', 'retrieval'

EVA, TEACHER = 'assets/nano-eva.pt', 'assets/nano-teacher.pt'
PIXEL_MODEL = ('mim_pretrain.py', 'out/pixels', '--target', 'pixels')       # stage, out_dir, flags
LAPTOP = '--size', 'micro', '--image_size', '64', '--patch_size', '8'
PHOTOGRAPHS = 'out/study-photographs'
PHOTO_TEACHER = f'{PHOTOGRAPHS}/teacher'
LOSS_ON = {'hidden': '', 'all': '--loss_on all', 'distill': '--target distill'}
SCRATCH = '--init scratch --layer_decay 1'
LONG = 'scratch, all compute'       # as many FLOPs as teacher, EVA and this stage took together, as counted by hand

STUDIES = {  # before: commands whose weights the arms need. arms: {name: flags}, the first is what others compare with
    'targets': dict(
        script='mim_pretrain.py', seeds=range(5), steps=(300, 600, 1200), lengths={'untrained': (1200,)},
        before=[('clip_train.py', 'out/teacher')], teacher='out/teacher/model.pt', measures=PROBES,
        arms={target: f'--target {target}' for target in ('clip', 'tokens', 'distill', 'pixels', 'untrained')}),
    'longer': dict(
        script='mim_pretrain.py', seeds=range(3), steps=(300, 1200, 4800), measures=PROBES,
        arms={**LOSS_ON, 'pixels': '--target pixels'}, pairs=[('all', 'distill')]),
    'photographs': dict(
        script='mim_pretrain.py', seeds=range(3), steps=(1200,), measures=PROBES,
        before=[('clip_train.py', PHOTO_TEACHER, '--steps', '700')], teacher=f'{PHOTO_TEACHER}/model.pt',
        arms={target: f'--target {target}' for target in ('clip', 'pixels')}),
    'choices': dict(
        script='mim_pretrain.py', seeds=range(3), steps=(300, 1200), measures=PROBES,
        before=[('clip_train.py', PHOTO_TEACHER, '--steps', '700', '--data', 'cifar10_tar')],
        arms={**LOSS_ON, 'rolled masks': '--mask roll', 'registers': '--registers 4', 'EVA-02 blocks': '--arch eva02',
              'photographs teacher': f'--teacher {PHOTO_TEACHER}/model.pt',
              'two teachers': f'--teacher {TEACHER},{PHOTO_TEACHER}/model.pt'}),
    'choices_photographs': dict(
        script='mim_pretrain.py', seeds=range(3), steps=(300, 1200), measures=PROBES,
        before=[('clip_train.py', PHOTO_TEACHER, '--steps', '700')], teacher=f'{PHOTO_TEACHER}/model.pt', arms=LOSS_ON),
    'clip': dict(
        script='clip_train.py', seeds=range(1, 6), steps=(80,), lengths={LONG: (1726,)}, measures=PAIRS,
        rates=(8e-4, 2e-3, 5e-3, 1.25e-2, 3e-2), try_seed=1, judged='seen_pairs', before=[PIXEL_MODEL],
        arms={'EVA': f'--vision {EVA}', 'teacher': f'--vision {TEACHER}', 'pixels': '--vision out/pixels/model.pt',
              'scratch': '', LONG: ''}),
    'finetune': dict(
        script='finetune.py', seeds=range(5), steps=(200,), lengths={LONG: (3913,)}, measures=CLASSES,
        rates=(1.5e-3, 4e-3), try_seed=5, judged='top1', before=[PIXEL_MODEL],
        arms={'EVA': f'--init {EVA}', 'teacher': f'--init {TEACHER}', 'pixels': '--init out/pixels/model.pt',
              'scratch': SCRATCH, LONG: SCRATCH}),
    'finetune_photographs': dict(
        script='finetune.py', seeds=range(3), steps=(400,), rates=(4e-3,), measures=CLASSES,
        arms={'EVA': f'--init {PHOTOGRAPHS}/clip-1200-SEED/model.pt', 'teacher': f'--init {PHOTO_TEACHER}/model.pt',
              'pixels': f'--init {PHOTOGRAPHS}/pixels-1200-SEED/model.pt', 'scratch': SCRATCH}),
    'video': dict(
        script='finetune.py', seeds=range(3), steps=(1500,), rates=(1.5e-3, 4e-3), try_seed=3, judged='top1',
        measures=CLASSES, flags='--size nano-video',
        arms={'EVA': f'--init {EVA}', 'scratch': SCRATCH, 'EVA, one frame': f'--init {EVA} --frames 1'}),
    'detect': dict(
        script='detect_seg.py', seeds=range(3), steps=(500,), lengths={LONG: (1461,)}, rates=(1e-3,), measures=BOXES,
        flags='--size micro', before=[('mim_pretrain.py', 'out/laptop-eva', *LAPTOP),
                                      ('mim_pretrain.py', 'out/laptop-pixels', *LAPTOP, '--target', 'pixels')],
        arms={'EVA': '--init out/laptop-eva/model.pt', 'pixels': '--init out/laptop-pixels/model.pt',
              'scratch': SCRATCH, LONG: SCRATCH}),
    'segment': dict(
        script='detect_seg.py', seeds=range(3), steps=(400,), rates=(1.5e-3, 4e-3), try_seed=3, judged='miou',
        measures=MAPS, flags='--head linear --image_size 64 --patch_size 4', before=[PIXEL_MODEL],
        arms={'EVA, frozen': f'--freeze --init {EVA}', 'teacher, frozen': f'--freeze --init {TEACHER}',
              'pixels, frozen': '--freeze --init out/pixels/model.pt', 'scratch, frozen': f'--freeze {SCRATCH}',
              'EVA': f'--no-freeze --init {EVA}', 'scratch': f'--no-freeze {SCRATCH}'}),
}

# of the pictures of `clip`, as counted by hand: a step of 128 pairs, and the stages before it
CLIP_BATCH, CLIP_STEP_TFLOP = 128, .01311
CLIP_TFLOP_BEFORE = {'scratch': 0, 'pixels': 9.30, 'teacher': 9.18, 'EVA': 21.59, LONG: 0}


# ---- the grid ---------------------------------------------------------------------------------------------------

def cells_of(study):
    """[(arm, steps)]."""
    cells = []
    for arm in study['arms']:
        lengths = study.get('lengths', {}).get(arm, study['steps'])
        cells += [(arm, steps) for steps in lengths]
    return cells


def make_run(name, arm, steps, lr, seed, spec):
    study = STUDIES[name]
    flags = study.get('flags', '').split() + study['arms'][arm].replace('SEED', str(seed)).split()
    flags += ['--data', spec, '--steps', steps, '--seed', seed]
    words = [arm.replace(', ', '-').replace(' ', '-'), str(steps)]
    if lr:
        flags += ['--lr', lr]
        words.append(f'{lr:g}')
    if 'teacher' in study:
        flags += ['--teacher', study['teacher']]

    # clip draws what is measured on the way; elsewhere that would only cost time
    flags += ['--save_every', max(20, steps // 8) if name == 'clip' else steps]
    columns = dict(name='-'.join([*words, str(seed)]), row=arm, lr=lr, seed=seed, steps=steps, data=spec, work=steps)
    return grid.make_run(f'out/study-{name}', study['script'], flags, columns)


def tried_steps(arm, steps):
    """How long a learning rate is tried."""
    return steps // 6 if arm == LONG else steps


def run_study(name, spec, jobs):
    study, folder = STUDIES[name], f'out/study-{name}'
    for script, out_dir, *flags in study.get('before', []):
        run.run_stage(script, out_dir, '--data', spec, *flags)
    rates = dict.fromkeys(study['arms'], study.get('rates', (None,))[0])

    # the best rate of each arm, on one seed
    if 'judged' in study:
        tries = [make_run(name, arm, tried_steps(arm, steps), lr, study['try_seed'], spec)
                 for lr in study['rates'] for arm, steps in cells_of(study)]
        tried = grid.run_all(tries, folder, jobs, in_shares)
        for row in sorted(tried, key=lambda row: row[study['judged']]):
            rates[row['row']] = row['lr']

    # all seeds
    runs = [make_run(name, arm, steps, rates[arm], seed, spec) for seed in study['seeds']
            for arm, steps in cells_of(study)]
    grid.run_all(runs, folder, jobs, in_shares)
    rows = grid.read_csv(f'{folder}/runs.csv')
    if 'teacher' in study and not any(row['row'] == 'teacher' for row in rows):
        rows += frozen_rows(spec, study['teacher'], study['seeds'])
        grid.write_csv(f'{folder}/runs.csv', rows)
    return rows


def in_shares(one, result):
    """Detection and segmentation say percent, the others shares of 1: these are shares too."""
    percentages = [measure for measure in BOXES + MAPS if measure in result]
    return {measure: result[measure] / 100 for measure in percentages}


def frozen_rows(spec, teacher, seeds):
    """Rows of probes of what no run made: the teacher, raw pixels, and by seed ViTs that never learnt."""
    config, cpu = M.ViTConfig(**M.SIZES['nano']), torch.device('cpu')
    train_set, val_set = data.open_data(spec, 'train'), data.open_data(spec, 'val')

    def row(name, seed, encode):
        cfg = SimpleNamespace(workers=0)
        measured = run.probe(encode, train_set, val_set, config.image_size, run.NUM_PROBE, cfg, cpu)
        return dict(name=f'{name}-{seed}', row=name, steps=0, seed=seed, **measured)

    def pixels(images):
        return images.flatten(1).float()
    rows = [row('teacher', 0, run.pooled_features(M.load(teacher, M.CLIP).visual)), row('raw pixels', 0, pixels)]
    for seed in seeds:
        untrained = M.init_weights(M.ViT(config), seed).eval()
        rows.append(row('random ViT', seed, run.pooled_features(untrained)))
    return rows


# ---- tables -----------------------------------------------------------------------------------------------------

def group(rows, study):
    """{(arm, steps): {seed: row}}, each arm at the learning rate that most seeds have."""
    found = {}
    frozen = [('teacher', 0), ('raw pixels', 0), ('random ViT', 0)]
    for arm, steps in frozen + cells_of(study):
        by_rate = {}
        for row in rows:
            if (row['row'], row['steps']) == (arm, steps) and row['seed'] in study['seeds']:
                by_rate.setdefault(row.get('lr'), {})[row['seed']] = row
        if by_rate:
            found[arm, steps] = max(by_rate.values(), key=len)
    return found


def report(rows, study):
    """Every arm at every length; differences paired by seed; the learning rates that were tried."""
    found = group(rows, study)
    measures = []
    for measure in study['measures']:
        if any(row.get(measure) is not None for row in rows):
            measures.append(measure)

    print("\nPercent, with 95% intervals of Student's t over seeds")
    table = []
    for (arm, steps), seeds in found.items():
        own = list(seeds.values())
        cells = [grid.percent([row.get(measure) for row in own]) for measure in measures]
        table.append([arm, steps or '', own[0].get('lr') or '', len(own), *cells])
    grid.print_table(['', 'steps', 'learning rate', 'seeds', *measures], table)

    print('\nPaired differences')
    table = []
    for a, b in contrasts(found, study):
        cells = [grid.percent(grid.differences(found[a], found[b], measure)) for measure in measures]
        table.append([f'{a[0]} at {a[1]} - {b[0]} at {b[1]}', *cells])
    grid.print_table(['', *measures], table)

    if 'judged' in study:
        print(f"\n{study['judged']} by learning rate, seed {study['try_seed']}")
        report_rates(rows, study)


def contrasts(found, study):
    """Pairs of cells: the first arm against each other at each length that both have, or at their longest; `pairs`
    likewise; an arm's longest against its shortest."""
    arms = list(dict.fromkeys(arm for arm, _ in found))
    longest = {arm: max(cell for cell in found if cell[0] == arm) for arm in arms}
    first = next(arm for arm in arms if arm in study['arms'])

    def shared(ours, theirs):
        return [steps for arm, steps in found if arm == ours and (theirs, steps) in found]
    for arm in arms:
        reference = first
        if first == 'EVA, frozen' and 'frozen' not in arm and 'EVA' in arms:
            reference = 'EVA'
        if arm == reference:
            continue

        lengths = shared(arm, reference)
        for steps in lengths:
            yield (reference, steps), (arm, steps)
        if not lengths and len(found[longest[arm]]) > 1:         # of one seed there is no interval
            yield longest[reference], longest[arm]
    for ours, theirs in study.get('pairs', []):
        for steps in shared(ours, theirs):
            yield (ours, steps), (theirs, steps)
    for arm in arms:
        shortest = min(cell for cell in found if cell[0] == arm)
        if shortest != longest[arm]:
            yield longest[arm], shortest


def report_rates(rows, study):
    tried = {(row['row'], row['steps'], row['lr']): row[study['judged']] for row in rows
             if row['seed'] == study['try_seed']}
    table = []
    for arm, steps in cells_of(study):
        values = [tried.get((arm, tried_steps(arm, steps), lr)) for lr in study['rates']]
        table.append([arm, *[grid.percent([value]) for value in values]])
    grid.print_table(['', *study['rates']], table)


def draw_clip(rows, folder):
    """clip_pairs.png and clip_compute.png: accuracy on held-out pairs, over the pairs that this stage saw, and over
    the compute of all stages."""
    by_pairs, by_compute = {}, {}
    for (arm, steps), seeds in group(rows, STUDIES['clip']).items():
        curves = []
        for row in seeds.values():
            lines = run.read_log(folder / row['name'], 'evals.jsonl')
            curve = {line['step'] + 1: line['heldout_pairs'] for line in lines}
            curves.append({**curve, steps: row['heldout_pairs']})

        # the mean over seeds, where all have been measured
        shared = sorted(set.intersection(*[set(curve) for curve in curves]))
        mean = []
        for step in shared:
            total = sum(curve[step] for curve in curves)
            mean.append((step, 100 * total / len(curves)))
        by_compute[arm] = [(CLIP_TFLOP_BEFORE[arm] + step * CLIP_STEP_TFLOP, y) for step, y in mean]
        if arm != LONG:
            by_pairs[arm] = [(step * CLIP_BATCH, y) for step, y in mean]
    label = 'zero-shot accuracy on held-out pairs, percent'
    plot.draw_curves(folder / 'clip_pairs.png', by_pairs, xlabel='pairs seen in this stage', ylabel=label)
    plot.draw_curves(folder / 'clip_compute.png', by_compute, xlabel='TFLOP of all stages', ylabel=label)


def main():
    parser = grid.make_parser(__doc__)
    parser.add_argument('name', choices=STUDIES)
    parser.add_argument('--data', default='shapes', help='as of the stages')
    parser.add_argument('--csv', default='', help='only print the tables of these rows')
    args = parser.parse_args()
    study = STUDIES[args.name]
    if args.csv:
        rows = grid.read_kept(args.csv, 'row', 'steps', 'seed')
        if not group(rows, study):
            grid.refuse(f'{args.csv} has no runs of {args.name}')
    else:
        rows = run_study(args.name, args.data, args.jobs)
    report(rows, study)
    if args.name == 'clip' and not args.csv:
        draw_clip(rows, Path('out/study-clip'))


if __name__ == '__main__':
    main()
