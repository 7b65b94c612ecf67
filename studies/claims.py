"""
The paper's claims in the paper's setting: images are plenty, labels and captions are a fixed budget, the teacher is
given, EVA may be larger than its teacher. What would show a claim wrong is said in CLAIMS, before any run.

    python studies/claims.py classes --hours 5      # labels that scratch needs for EVA's accuracy; EVA and its teacher
    python studies/claims.py clip                   # pairs that scratch needs; how many learning rates do
    python studies/claims.py photographs --data cifar10_tar                 # classes again, of photographs
    python studies/claims.py classes --csv studies/claims_classes.csv       # table and picture of runs that are kept

Every arm has the best of several learning rates, tried on a seed of its own and judged on images that no result is
measured on. All seeds have the same labelled images; pre-training, order and initial values are each seed's own.
"""
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import grid
import plot
import scaling

sys.path.insert(0, str(grid.ROOT))
import data                         # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

SCRATCH, LONG = 'scratch', 'scratch, all compute'       # LONG may take the FLOPs of EVA's pre-training as well
PRETRAINED = {  # arm: size, and what it reconstructs; one for each seed
    'EVA': ('nano', 'clip'), 'EVA micro': ('micro', 'clip'), 'EVA mini': ('mini', 'clip'),
    'pixels': ('nano', 'pixels'), 'distilled': ('nano', 'distill'), 'distilled mini': ('mini', 'distill')}
SEEDS, TRY_SEED = (0, 1, 2), 3                          # rates and lengths are tried from TRY_SEED on
NUM_TRIED, NUM_JUDGED = 1000, 4000      # images by which rates are chosen, and by which arms are compared
SIDE = 64                               # pixels of labelled scenes: a part of one is still sharp at 32
CORE = 4e10                             # FLOPs a second of one core, about
DRAWS = 4000                            # of the interval of a ratio

CLASSES = dict(
    script='finetune.py', flags='--augment rand --cutmix 1', measure='judged_top1', tried='top1', batch_size=64,
    steps=400, long=(800, 2540), rates={'nano': 3e-3, 'micro': 2e-3, 'mini': 1.5e-3}, factors=(.5, 1, 2), num_tries=1,
    budget='labels', ylabel='top-1, percent')
CLAIMS = {  # arms: on all budgets; also: on the middle one; longer: {arm: steps}, there too; wrong_if: what is asked
    'classes': dict(
        CLASSES, budgets=(250, 1000, 4000, 16_000), middle=1000,
        arms=(LONG, 'teacher', 'EVA'),
        also=(SCRATCH, 'pixels', 'distilled', 'EVA micro', 'EVA mini', 'distilled mini'),
        pairs=[('EVA', LONG), ('EVA', 'teacher'), ('EVA mini', 'teacher'), ('EVA mini', 'distilled mini'),
               ('EVA mini', 'EVA'), ('EVA', 'distilled'), ('EVA', 'pixels'),
               ('EVA mini, 1,600 steps', 'teacher, 1,600 steps'), ('EVA', f'{LONG}, 10,160 steps')],
        longer={'EVA mini': 1600, 'teacher': 1600, 'EVA': 1600, LONG: 10_160},
        wrong_if='''1. scratch does not need more labels than EVA: the interval of the ratio holds 1 at 4,000 or fewer;
2. EVA mini is not above the teacher that it learnt from, which is nano, at the middle budget; if distilled mini is
   level with EVA mini, it is the size and not the mask.
After the runs, before `longer`: 2 was wrong, and all arms but scratch stood at 79 to 80% from 1,000 labels on. If
400 steps were too few to tell them apart, EVA mini is above the teacher after 1,600. If scratch was held back by its
steps and not by its labels, 10,160 steps bring it to EVA's 400.'''),
    'photographs': dict(
        CLASSES, budgets=(1000, 4000, 16_000), middle=4000, arms=(LONG, 'teacher', 'EVA'), also=(SCRATCH, 'pixels'),
        pairs=[('EVA', LONG), ('EVA', 'teacher'), ('EVA', 'pixels')],
        wrong_if='''1. scratch does not need more labels than EVA: the interval of the ratio holds 1 at 4,000 or fewer;
2. EVA is not above its teacher at the middle budget'''),
    'clip': dict(
        script='clip_train.py', flags='', measure='heldout_pairs', tried='seen_pairs', batch_size=128,
        steps=100, long=(200, 1047), rates={'nano': 5e-3}, factors=(.16, .4, 1, 2.5), num_tries=3,
        budgets=(1000, 4000, 16_000), middle=4000, arms=(LONG, 'teacher', 'EVA'), also=(SCRATCH, 'pixels'),
        pairs=[('EVA', LONG), ('EVA', 'teacher'), ('EVA', 'pixels')],
        budget='captioned scenes', ylabel='zero-shot accuracy on pairs never shown, percent',
        wrong_if='scratch does not need more pairs than EVA: the interval of the ratio holds 1 at 16,000 or fewer')}


# ---- the runs ---------------------------------------------------------------------------------------------------

class Setting:
    """A claim on one data set: the commands of its runs, and where they and what they start from lie."""

    def __init__(self, name, spec, folder):
        self.claim, self.spec = CLAIMS[name], spec
        self.folder = folder / name
        self.shared = folder / f'pretrained-{Path(spec).name}'
        self.recipe = scaling.RECIPES['cpu']
        if spec != 'shapes':
            self.recipe = dict(self.recipe, teacher_steps=(700,))

    def teacher(self):
        """The command of the small CLIP that is given. Its batch is its stage's own."""
        steps = max(self.recipe['teacher_steps'])
        flags = ['--data', self.spec, '--size', 'nano', *scaling.vit_flags(self.recipe), '--steps', steps]
        columns = dict(name=f'steps-{steps}', work=seconds('nano', steps * 128))
        return grid.make_run(self.shared / 'teachers', 'clip_train.py', flags, columns)

    def student(self, arm, seed):
        """The command of one of PRETRAINED: a run of the scaling study, whose target may be another."""
        size, target = PRETRAINED[arm]
        one = scaling.student(self.recipe, size, seed, max(self.recipe['steps']), world=self.spec)
        one.update(name=named(arm, seed), arm=arm, work=seconds(size, one['steps'] * one['batch_size']))
        command = scaling.as_command(one, self.recipe, self.shared)
        command['words'] += ['--target', target]
        return command

    def run(self, arm, budget, steps, factor, seed):
        """The command of an arm with so many labels or captions; factor: times the usual learning rate."""
        size = size_of(arm)
        lr = factor * self.claim['rates'][size]
        flags = [*self.claim['flags'].split(), '--size', size, '--steps', steps, '--lr', f'{lr:g}', '--seed', seed,
                 '--save_every', max(100, steps // 4)]

        # a try starts from what another seed pre-trained
        init = self.shared / named(arm, seed % len(SEEDS)) / 'model.pt'
        if arm == 'teacher':
            init = scaling.teacher_of(self.recipe, self.shared)
        if self.claim['script'] == 'clip_train.py':
            flags += ['--data', f'{self.spec}:unique={budget}']
            if arm not in (SCRATCH, LONG):
                flags += ['--vision', init]
        else:
            flags += ['--data', self.labelled(budget)]
            if arm in (SCRATCH, LONG):
                init = random_weights(seed, self.shared)
                flags += ['--no-freeze_patches', '--layer_decay', 1]
            flags += ['--init', init]
        columns = dict(name=named(arm, budget, steps, factor, seed), arm=arm, budget=budget, steps=steps,
                       factor=factor, seed=seed, work=seconds(size, steps * self.claim['batch_size']))
        return grid.make_run(self.folder, self.claim['script'], flags, columns)

    def labelled(self, budget):
        """A folder of PNG files by class: train/, so many, and val/, by which rates and lengths are chosen."""
        place = self.folder / f'labels-{budget}'
        if place.exists():
            return place
        side = SIDE if self.spec == 'shapes' else 32
        dataset = data.open_data(self.spec, 'train', views=data.Views(share=1.), labels=True)
        most = max(self.claim['budgets'])
        beside = place.with_suffix('.tmp')
        for batch in data.eval_batches(dataset, 500, side, most + NUM_TRIED, torch.device('cpu')):
            for position, label, image in zip(batch['position'].tolist(), batch['labels'].tolist(), batch['images']):
                split = 'train' if position < budget else 'val' if position >= most else ''
                if split:
                    path = beside / split / dataset.label_names[label] / f'{position:06d}.png'
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        beside.rename(place)
        return place


def run_claim(name, spec, folder, jobs, until):
    """Pre-trains, tries, then runs what is not there yet. -> all rows."""
    setting = Setting(name, spec, folder)
    claim = setting.claim
    val_set = data.open_data(spec, 'val', views=data.Views(share=1.), labels=True)

    def more(one, result):
        if claim['script'] != 'finetune.py':
            return {}
        return dict(judged_top1=accuracy(M.load(setting.folder / one['name'] / 'model.pt'), val_set))

    def phase(title, runs, place=setting.folder, more=more):
        hours = sum(one['work'] for one in runs) / 3600
        print(f'\n{title}: {len(runs)} runs, about {hours:.1f} core-hours in all', flush=True)
        return grid.run_all(runs, place, jobs, more, until)

    arms = *claim['arms'], *claim['also']
    phase('teacher', [setting.teacher()], setting.shared / 'teachers', None)
    students = [setting.student(arm, seed) for seed in SEEDS for arm in arms if arm in PRETRAINED]
    phase('pre-training', students, setting.shared, None)

    # the best rate of each arm on the middle budget; the best length of LONG on each
    factors = best_rates(setting, arms, phase)
    tries = [setting.run(LONG, budget, steps, factors[LONG], TRY_SEED)
             for budget in claim['budgets'] for steps in claim['long']]
    long = best(phase('lengths', tries), claim, 'budget', 'steps')

    runs = []
    for seed in SEEDS:
        for budget in claim['budgets']:
            for arm in arms if budget == claim['middle'] else claim['arms']:
                steps = long[budget] if arm == LONG else claim['steps']
                runs.append(setting.run(arm, budget, steps, factors[arm], seed))
    runs += [setting.run(arm, claim['middle'], steps, factors[arm], seed)
             for seed in SEEDS for arm, steps in claim.get('longer', {}).items()]
    phase('the claim', runs)
    return grid.read_csv(setting.folder / 'runs.csv')


def best_rates(setting, arms, phase):
    """{arm: its best factor}. Where that is the least or the greatest of those tried, one beyond is tried too."""
    claim = setting.claim
    tried = {arm: set(claim['factors']) for arm in arms}
    while True:
        tries = [setting.run(arm, claim['middle'], lengths(claim, arm)[0], factor, TRY_SEED + n)
                 for n in range(claim['num_tries']) for arm in arms for factor in sorted(tried[arm])]
        factors = best(phase('learning rates', tries), claim, 'arm', 'factor')

        before = {arm: set(own) for arm, own in tried.items()}
        for arm, factor in factors.items():
            if factor == max(before[arm]):
                tried[arm].add(2 * factor)
            if factor == min(before[arm]):
                tried[arm].add(factor / 2)
        if tried == before:
            return factors


def named(arm, *others):
    words = arm.replace(',', '').split()
    return '-'.join([*words, *[f'{x:g}' for x in others]])


def size_of(arm):
    return PRETRAINED[arm][0] if arm in PRETRAINED else 'nano'


def lengths(claim, arm):
    return claim['long'] if arm == LONG else (claim['steps'],)


def seconds(size, images):
    """Of one core, about: the arithmetic, drawing or reading, and what a run takes to start and to judge."""
    config = M.ViTConfig(**M.SIZES[size])
    return images * (run.training_flops(config) / CORE + .002) + 15


def best(rows, claim, key, chosen):
    """{key: its `chosen`}, the one with the highest measure, over seeds, of images that no result is measured on."""
    totals = {}
    for row in rows:
        own = totals.setdefault(row[key], {})
        own[row[chosen]] = own.get(row[chosen], 0) + row[claim['tried']]
    return {name: max(own, key=own.get) for name, own in totals.items()}


def random_weights(seed, shared):
    """A ViT that has learnt nothing, with the initial values that pre-training begins with."""
    path = shared / f'random-{seed}.pt'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        M.save(M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['nano'])), seed, gain=1.9), str(path))
    return path


@torch.no_grad()
def accuracy(model, val_set):
    """Top-1 on validation images that were not used to choose anything."""
    number = {name: k for k, name in enumerate(model.extra['classes'])}
    right = []
    for batch in data.eval_batches(val_set, 100, model.image_size, NUM_JUDGED, torch.device('cpu')):
        labels = torch.tensor([number[val_set.label_names[k]] for k in batch['labels'].tolist()])
        right.append(model(model.normalize(batch['images'])).argmax(-1) == labels)
    return torch.cat(right).double().mean().item()


# ---- what they say ----------------------------------------------------------------------------------------------

def report(rows, name, folder):
    """Tables of the arms, of how many times the labels scratch needs, and of differences; a picture."""
    claim = CLAIMS[name]
    print(f"\nwrong if:\n{claim['wrong_if']}")
    cells = {}
    for row in rows:
        if row['seed'] in SEEDS:
            arm = row['arm']
            if row['steps'] not in lengths(claim, arm):
                arm += f", {row['steps']:,} steps"
            cells.setdefault((arm, row['budget']), {})[row['seed']] = row
    report_arms(rows, cells, claim)
    report_ratios(cells, claim)
    report_pairs(cells, claim)
    draw(cells, claim, folder / f'claims_{name}.png')


def report_arms(rows, cells, claim):
    table = []
    for arm in dict.fromkeys(arm for arm, _ in cells):
        own = [cells.get((arm, budget), {}) for budget in claim['budgets']]
        values = [[row[claim['measure']] for row in cell.values()] for cell in own]
        factor = next((row['factor'] for cell in own for row in cell.values()), '')

        tried = tries_of(rows, claim, arm)
        words = ', '.join(f'{rate:g}: {tried[rate]:.1f}' for rate in sorted(tried))
        near = sum(value >= .9 * max(tried.values()) for value in tried.values())
        near = f'{near} of {len(tried)}' if tried else ''
        table.append([arm, max(map(len, values)), *[grid.percent(x) for x in values], factor, words, near])
    head = [f"{budget:,} {claim['budget']}" for budget in claim['budgets']]
    grid.print_table(['', 'seeds', *head, 'rate, times the usual', 'when tried at', 'within 90% of the best'], table)


def tries_of(rows, claim, arm):
    """{rate, times the usual: percent, the mean over seeds}."""
    wanted = arm, claim['middle'], lengths(claim, arm)[0]
    values = {}
    for row in rows:
        if row['seed'] >= TRY_SEED and (row['arm'], row['budget'], row['steps']) == wanted:
            values.setdefault(row['factor'], []).append(100 * row[claim['tried']])
    return {factor: np.mean(own) for factor, own in values.items()}


def report_ratios(cells, claim):
    """How many times as many labels scratch needs for the accuracy of an arm."""
    print(f"\ntimes the {claim['budget']} that `{LONG}` needs for the same, 95%")
    table = []
    for arm in claim['arms']:
        if arm == LONG:
            continue
        row = [arm]
        for budget in claim['budgets']:
            ratios = label_ratio(cells, claim, arm, budget)
            row.append('' if ratios is None else words_of(ratios, max(claim['budgets']) / budget))
        table.append(row)
    grid.print_table(['', *[f'{budget:,}' for budget in claim['budgets']]], table)


def label_ratio(cells, claim, arm, budget):
    """Ratios [1 + draws]: of the means, and of means redrawn by Student's t. Between budgets scratch's accuracy is
    linear in their logarithm; what it reaches at none of them is inf, what it has at the least is 0."""
    rng = np.random.default_rng(0)
    ours, scratch = [redrawn_means(cells, claim, one, rng) for one in (arm, LONG)]
    if budget not in ours or set(scratch) != set(claim['budgets']):
        return None
    wanted = ours[budget]
    curve = np.stack([scratch[other] for other in claim['budgets']], 1)
    curve = np.maximum.accumulate(curve, axis=1)                        # [1 + draws, budgets]
    places = np.log(claim['budgets'])
    needed = [math.exp(np.interp(y, own, places)) for y, own in zip(wanted, curve)]
    ratios = np.array(needed) / budget
    ratios[wanted > curve[:, -1]] = math.inf
    ratios[wanted < curve[:, 0]] = 0
    return ratios


def redrawn_means(cells, claim, arm, rng):
    """{budget: [1 + draws]}: an arm's mean, and what else it could have been. Seeds deviate alike at all budgets."""
    values = {}
    for budget in claim['budgets']:
        own = [row[claim['measure']] for row in cells.get((arm, budget), {}).values()]
        if own:
            values[budget] = np.array(own)
    deviations = np.concatenate([own - own.mean() for own in values.values()] or [[]])
    freedom = len(deviations) - len(values)
    if freedom < 1:                     # one seed says nothing of the next
        return {}
    deviation = math.sqrt((deviations ** 2).sum() / freedom)
    means = {}
    for budget, own in values.items():
        errors = deviation / math.sqrt(len(own)) * rng.standard_t(freedom, DRAWS)
        means[budget] = own.mean() + np.append(0, errors)
    return means


def words_of(ratios, most):
    """'3.1 (2.2 to 4.8)'; beyond what was measured '> 16'."""
    def word(x):
        return f'> {most:g}' if math.isinf(x) else f'{x:.1f}' if x else '< 1'
    low, high = np.quantile(ratios[1:], (.025, .975), method='nearest')
    return f'{word(ratios[0])} ({word(low)} to {word(high)})'


def report_pairs(cells, claim):
    """Differences of arms, paired by seed."""
    table = []
    for ours, theirs in claim['pairs']:
        row = [f'{ours} - {theirs}']
        for budget in claim['budgets']:
            both = cells.get((ours, budget), {}), cells.get((theirs, budget), {})
            row.append(grid.percent(grid.differences(*both, claim['measure'])))
        if any(row[1:]):
            table.append(row)
    grid.print_table(['paired, 95%', *[f'{budget:,}' for budget in claim['budgets']]], table)


def draw(cells, claim, path):
    """Accuracy over the budget, with 95% intervals."""
    curves, points = {}, {}
    for arm in claim['arms']:
        points[arm] = []
        for budget in claim['budgets']:
            values = [100 * row[claim['measure']] for row in cells.get((arm, budget), {}).values()]
            if len(values) > 1:
                mean, half = grid.interval(values)
                points[arm].append((budget, mean - half, mean, mean + half))
        curves[arm] = [(x, y) for x, _, y, _ in points[arm]]
    if any(curves.values()):
        plot.draw_curves(path, curves, points, claim['budget'], claim['ylabel'], 'x')


def main():
    parser = grid.make_parser(__doc__)
    parser.add_argument('name', choices=CLAIMS)
    parser.add_argument('--data', default='shapes', help='as of the stages')
    parser.add_argument('--hours', type=float, default=0, help='stop after so many; 0: when all is done')
    parser.add_argument('--csv', default='', help='only the tables and the picture of these rows')
    parser.add_argument('--out_dir', default='out/claims', help='for runs and pictures (out/claims)')
    args = parser.parse_args()
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.csv:
        rows = grid.read_csv(args.csv)
    else:
        until = time.time() + 3600 * args.hours if args.hours else None
        rows = run_claim(args.name, args.data, folder, args.jobs, until)
    if not rows:
        grid.refuse(f'{args.csv} has no runs')
    report(rows, args.name, folder)


if __name__ == '__main__':
    main()
