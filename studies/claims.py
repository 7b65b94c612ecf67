"""
The paper's claims in the paper's setting: images are plenty, labels and captions are a fixed budget, the teacher is
given, EVA may be larger than its teacher. What would show a claim wrong is said in CLAIMS, before any run.

    python studies/claims.py classes --hours 5      # labels that scratch needs for EVA's accuracy; EVA and its teacher
    python studies/claims.py clip                   # pairs that scratch needs; how many learning rates do
    python studies/claims.py photographs --data cifar10_tar                 # classes again, of photographs
    python studies/claims.py classes --csv studies/claims_classes.csv       # table and picture of runs that are kept

Teacher and students are pre-trained first, into --out_dir. Then every arm gets the best of several learning rates,
tried on a seed of its own and judged on images that no result is measured on. All seeds have the same teacher and the
same labelled images; pre-training, order and initial values are each seed's own. A changed CLAIMS wants an --out_dir of
its own: what has a row is not run again.
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
import clip_train                   # noqa: E402
import data                         # noqa: E402
import finetune                     # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

SCRATCH, LONG = 'scratch', 'scratch, all compute'       # LONG may take the FLOPs of EVA's pre-training as well
PRETRAINED = {  # arm: size, and what it reconstructs; one for each seed
    'EVA': ('nano', 'clip'), 'EVA micro': ('micro', 'clip'), 'EVA mini': ('mini', 'clip'),
    'pixels': ('nano', 'pixels'), 'distilled': ('nano', 'distill'), 'distilled mini': ('mini', 'distill')}
SEEDS = 0, 1, 2
TRY_SEED = 3            # of rates and lengths; further tries have the seeds after it. More SEEDS: (0, 1, 2, 10, 11)
WIDEST = 16             # times the usual rate, or as far below it: where tries end
NUM_TRIED, NUM_JUDGED = 1000, 4000      # images by which rates are chosen, and by which arms are compared
SIDE = 64                               # pixels of labelled scenes: a part of one is still sharp at 32
CORE = 6.5e10                           # FLOPs a second of one core, about
DRAWS = 4000                            # of the interval of a ratio

# of a claim. budgets: numbers of labels or captions; arms: on all of them; also: on the middle one;
# long: LONG's lengths, of which the best is taken; factors: times the stage's own learning rate, tried on the middle
# budget at an arm's first length; tried, measure: by which rates are chosen, and by which arms are compared
CLASSES = dict(
    stage=finetune, flags='--augment rand --cutmix 1', steps=400, long=(800, 2540), factors=(.5, 1, 2), num_tries=1,
    tried='top1', measure='judged_top1', budget='labels', ylabel='top-1, percent')
CLAIMS = {
    'classes': dict(
        CLASSES, budgets=(250, 1000, 4000, 16_000), middle=1000,
        arms=(LONG, 'teacher', 'EVA'), also=(SCRATCH, 'pixels', 'distilled', 'EVA micro', 'EVA mini'),
        pairs=[('EVA', LONG), ('EVA', 'teacher'), ('EVA mini', 'teacher'), ('EVA mini', 'EVA'), ('EVA', 'distilled'),
               ('EVA', 'pixels')],
        wrong_if='''1. scratch does not need more labels than EVA: the interval of the ratio holds 1 at 4,000 or fewer;
2. EVA mini is not above the teacher that it learnt from, which is nano, at the middle budget. If it is above, and
   distilled mini is level with it, it is the size and not the mask''',

        # asked after those runs: 2 was wrong, and all arms but scratch stood at 79 to 80% from 1,000 labels on
        longer={'teacher': 1600, 'EVA': 1600, 'EVA mini': 1600, LONG: 10_160}, longer_seeds=(0,),
        longer_wrong_if='''1. if 400 steps were too few to tell arms apart, EVA mini is above the teacher after 1,600;
2. if scratch was held back by its steps and not by its labels, 10,160 steps bring it to EVA's 400'''),
    'photographs': dict(
        CLASSES, budgets=(1000, 4000, 16_000), middle=4000, arms=(LONG, 'teacher', 'EVA'), also=(),
        pairs=[('EVA', LONG), ('EVA', 'teacher')],
        wrong_if='''1. scratch does not need more labels than EVA: the interval of the ratio holds 1 at 4,000 or fewer;
2. EVA is not above its teacher at the middle budget'''),
    'clip': dict(
        stage=clip_train, flags='', steps=100, long=(200, 1047), factors=(.5, 1.5, 4, 10), num_tries=3,
        tried='seen_pairs', measure='heldout_pairs',
        budgets=(1000, 4000, 16_000), middle=4000, arms=(LONG, 'teacher', 'EVA'), also=(SCRATCH, 'pixels'),
        pairs=[('EVA', LONG), ('EVA', 'teacher'), ('EVA', 'pixels')],
        budget='captioned scenes', ylabel='zero-shot accuracy on pairs never shown, percent',
        wrong_if='scratch does not need more pairs than EVA: the interval of the ratio holds 1 at 16,000 or fewer')}


# ---- the runs ---------------------------------------------------------------------------------------------------

class Setting:
    """A claim on one data set: the commands of its runs, and where they and what they start from lie."""

    def __init__(self, name, spec, folder):
        self.claim, self.spec = CLAIMS[name], spec
        self.folder = folder / f'{name}-{Path(spec).name}'
        self.shared = folder / f'pretrained-{Path(spec).name}'
        self.recipe = scaling.RECIPES['cpu']
        if spec != 'shapes':
            self.recipe = dict(self.recipe, teacher_steps=(700,))

    def teacher(self):
        """The command of the small CLIP that is given. Its batch is its stage's own."""
        steps = max(self.recipe['teacher_steps'])
        flags = ['--data', self.spec, '--size', 'nano', *scaling.vit_flags(self.recipe), '--steps', steps]
        columns = dict(name=f'steps-{steps}', data=self.spec, work=seconds('nano', steps * 128))
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
        stage, size = self.claim['stage'], size_of(arm)
        usual = stage.RECIPES[size]
        lr = factor * usual['lr']
        flags = [*self.claim['flags'].split(), '--size', size, '--steps', steps, '--lr', f'{lr:g}', '--seed', seed,
                 '--save_every', max(100, steps // 4)]

        # a try starts from what the first seeds pre-trained
        pretrained = seed if seed in SEEDS else seed - TRY_SEED
        init = self.shared / named(arm, pretrained) / 'model.pt'
        if arm == 'teacher':
            init = scaling.teacher_of(self.recipe, self.shared)
        if stage is clip_train:
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
                       factor=factor, seed=seed, lr=lr, data=self.spec, work=seconds(size, steps * usual['batch_size']))
        return grid.make_run(self.folder, f'{stage.__name__}.py', flags, columns)

    def labelled(self, budget):
        """A folder of PNG files by class: train/, so many, and val/, by which rates and lengths are chosen."""
        most = max(self.claim['budgets'])
        folders = {number: self.folder / f'labels-{number}-of-{most}' for number in self.claim['budgets']}
        missing = {number: place for number, place in folders.items() if not place.exists()}
        if missing:
            self.write_labelled(missing, most)
        return folders[budget]

    def write_labelled(self, folders, most):
        """The first images of the training data, {number: its folder}; val/ are those after `most`."""
        print(f'{most + NUM_TRIED:,} labelled images are written', flush=True)
        side = SIDE if self.spec == 'shapes' else 32
        beside = {number: place.with_suffix('.tmp') for number, place in folders.items()}
        dataset = data.open_data(self.spec, 'train', views=data.Views(share=1.), labels=True)
        for batch in data.eval_batches(dataset, 500, side, most + NUM_TRIED, torch.device('cpu')):
            for position, label, image in zip(batch['position'].tolist(), batch['labels'].tolist(), batch['images']):
                png = Image.fromarray(image.permute(1, 2, 0).numpy())
                for number, place in beside.items():
                    split = 'train' if position < number else 'val' if position >= most else ''
                    if split:
                        path = place / split / dataset.label_names[label] / f'{position:06d}.png'
                        path.parent.mkdir(parents=True, exist_ok=True)
                        png.save(path)
        if position + 1 < most + NUM_TRIED:
            raise M.Refused(f'{self.spec} has {position + 1:,} images to train with; {most + NUM_TRIED:,} are needed')
        for number, place in folders.items():
            beside[number].rename(place)


def run_claim(name, spec, folder, jobs, until):
    """Pre-trains, tries, then runs what is not there yet. -> all rows."""
    setting = Setting(name, spec, folder)
    claim = setting.claim
    arms = *claim['arms'], *claim['also']
    val_set = data.open_data(spec, 'val', views=data.Views(share=1.), labels=True)

    def more(one, result):
        if claim['stage'] is clip_train:
            return {}
        return dict(judged_top1=accuracy(M.load(setting.folder / one['name'] / 'model.pt'), val_set))

    def phase(title, runs, place=setting.folder, more=more):
        print(f'\n{title}: about {hours(runs, place):.1f} core-hours', flush=True)
        return grid.run_all(runs, place, jobs, more, until)
    everything = sum(one['work'] for one in expected(setting, arms))
    print(f'all of it, from nothing: about {everything / 3600:.0f} core-hours')

    phase('teacher', [setting.teacher()], setting.shared / 'teachers', None)
    phase('pre-training', students(setting, arms), setting.shared, None)

    # the best rate of each arm on the middle budget; the best length of LONG on each
    factors = best_rates(setting, arms, phase)
    long = best(phase('lengths', tried_lengths(setting, factors)), claim, 'budget', 'steps')
    phase('the claim', final_runs(setting, arms, factors, long))
    if 'longer' in claim:
        phase('longer', longer_runs(setting, factors))
    return grid.read_csv(setting.folder / 'runs.csv')


def hours(runs, folder):
    """Core-hours of those that have no row yet."""
    done = {row['name'] for row in grid.read_csv(folder / 'runs.csv')}
    return sum(one['work'] for one in runs if one['name'] not in done) / 3600


def students(setting, arms):
    return [setting.student(arm, seed) for seed in SEEDS for arm in arms if arm in PRETRAINED]


def tried_rates(setting, tried):
    """tried: {arm: its factors}."""
    claim = setting.claim
    return [setting.run(arm, claim['middle'], lengths(claim, arm)[0], factor, TRY_SEED + n)
            for n in range(claim['num_tries']) for arm in tried for factor in sorted(tried[arm])]


def tried_lengths(setting, factors):
    claim = setting.claim
    return [setting.run(LONG, budget, steps, factors[LONG], TRY_SEED)
            for budget in claim['budgets'] for steps in claim['long']]


def final_runs(setting, arms, factors, long):
    """long: {budget: LONG's steps}."""
    claim = setting.claim
    runs = []
    for seed in SEEDS:
        for budget in claim['budgets']:
            here = arms if budget == claim['middle'] else claim['arms']
            for arm in here:
                steps = long[budget] if arm == LONG else claim['steps']
                runs.append(setting.run(arm, budget, steps, factors[arm], seed))
    return runs


def longer_runs(setting, factors):
    """None of a claim that asks for none."""
    claim = setting.claim
    if 'longer' not in claim:
        return []
    return [setting.run(arm, claim['middle'], steps, factors[arm], seed)
            for seed in claim['longer_seeds'] for arm, steps in claim['longer'].items()]


def expected(setting, arms):
    """All runs of a claim, if the first rates that are tried do, and LONG is best at its longest."""
    claim = setting.claim
    factors = dict.fromkeys(arms, 1)
    long = dict.fromkeys(claim['budgets'], max(claim['long']))
    return [setting.teacher(), *students(setting, arms), *tried_rates(setting, dict.fromkeys(arms, claim['factors'])),
            *tried_lengths(setting, factors), *final_runs(setting, arms, factors, long), *longer_runs(setting, factors)]


def best_rates(setting, arms, phase):
    """{arm: its best factor}. Where that is the least or the greatest of those tried, one beyond is tried too."""
    claim = setting.claim
    tried = {arm: set(claim['factors']) for arm in arms}
    while True:
        runs = tried_rates(setting, tried)
        factors = best(phase('learning rates', runs), claim, 'arm', 'factor')
        beyond = {}
        for arm, factor in factors.items():
            if factor == max(tried[arm]) < WIDEST:
                beyond[arm] = 2 * factor
            elif factor == min(tried[arm]) > 1 / WIDEST:
                beyond[arm] = factor / 2
        if not beyond:
            return factors
        for arm, factor in beyond.items():
            tried[arm].add(factor)


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
    return images * (run.training_flops(config) / CORE + .001) + 15


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
        labels = torch.tensor([number.get(val_set.label_names[k], -1) for k in batch['labels'].tolist()])
        right.append(model(model.normalize(batch['images'])).argmax(-1) == labels)
    return torch.cat(right).double().mean().item()


# ---- what they say ----------------------------------------------------------------------------------------------

def report(rows, name, folder):
    """Tables of the arms, of how many times the labels scratch needs, and of differences; a picture."""
    claim = CLAIMS[name]
    print(f"\nsaid before the runs; wrong if:\n{claim['wrong_if']}")
    if 'longer' in claim:
        print(f"\nsaid after these, before the longer runs:\n{claim['longer_wrong_if']}")
    cells = cells_of(rows, claim)
    report_arms(rows, cells, claim)
    report_ratios(cells, claim)
    report_pairs(cells, claim)
    draw(cells, claim, folder / f'claims_{name}.png')


def cells_of(rows, claim):
    """{(arm, budget): {seed: row}}, each at the rate and length that most seeds have; longer runs are arms of their
    own."""
    groups = {}
    for row in rows:
        if row['seed'] in SEEDS:
            arm = row['arm']
            if row['steps'] not in lengths(claim, arm):
                arm += f", {row['steps']:,} steps"
            groups.setdefault((arm, row['budget']), {}).setdefault((row['steps'], row['factor']), {})[row['seed']] = row
    return {cell: max(own.values(), key=len) for cell, own in groups.items()}


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
        if row['seed'] not in SEEDS and (row['arm'], row['budget'], row['steps']) == wanted:
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
            row.append('' if ratios is None else words_of(ratios, budget, claim['budgets']))
        table.append(row)
    grid.print_table(['', *[f'{budget:,}' for budget in claim['budgets']]], table)


def label_ratio(cells, claim, arm, budget):
    """Ratios [1 + draws]: of the means, and of means redrawn by Student's t. Between budgets scratch's accuracy is
    linear in their logarithm. inf: scratch gets there with no budget; 0: it is beyond with the smallest already."""
    rng = np.random.default_rng(0)
    ours, scratch = [redrawn_means(cells, claim, one, rng) for one in (arm, LONG)]
    if budget not in ours or set(scratch) != set(claim['budgets']):
        return None
    wanted = ours[budget]
    curve = np.stack([scratch[other] for other in claim['budgets']], 1)
    curve = np.maximum.accumulate(curve, axis=1)                        # [1 + draws, budgets]
    places = np.log(claim['budgets'])
    needed = []
    for y, own in zip(wanted, curve):
        rises = np.append(True, np.diff(own) > 0)                       # of a level stretch its least budget counts
        needed.append(math.exp(np.interp(y, own[rises], places[rises])))
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


def words_of(ratios, budget, budgets):
    """'3.1 (2.2 to 4.8)'; beyond what was measured '> 16' or '< 0.25'."""
    def word(x):
        if math.isinf(x):
            return f'> {max(budgets) / budget:g}'
        return f'{x:.2g}' if x else f'< {min(budgets) / budget:g}'
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
    for place, arm in enumerate(claim['arms']):
        shift = 1.04 ** (place - 1)                                     # side by side
        points[arm] = []
        for budget in claim['budgets']:
            values = [100 * row[claim['measure']] for row in cells.get((arm, budget), {}).values()]
            if len(values) > 1:
                mean, half = grid.interval(values)
                points[arm].append((shift * budget, mean - half, mean, mean + half))
        curves[arm] = [(x, y) for x, _, y, _ in points[arm]]
    if any(curves.values()):
        plot.draw_curves(path, curves, points, claim['budget'], claim['ylabel'], 'x')
        print(f'\n{path}')
    else:
        print('\nno cell has two seeds: no intervals, no ratios, no picture')


def main():
    parser = grid.make_parser(__doc__)
    parser.add_argument('name', choices=CLAIMS)
    parser.add_argument('--data', default='', help='as of the stages (classes, clip: shapes)')
    parser.add_argument('--hours', type=float, default=0, help='stop after so many; 0: when all is done')
    parser.add_argument('--csv', default='', help='only the tables and the picture of these rows')
    parser.add_argument('--out_dir', default='out/claims', help='for runs and pictures (out/claims)')
    args = parser.parse_args()
    claim, folder = CLAIMS[args.name], Path(args.out_dir)
    if args.csv:
        columns = 'arm', 'budget', 'steps', 'factor', 'seed', claim['tried'], claim['measure']
        rows = grid.read_kept(args.csv, *columns)
    elif args.name == 'photographs' and not args.data:
        grid.refuse('photographs needs --data: a folder or tar shards with classes')
    else:
        until = time.time() + 3600 * args.hours if args.hours else None
        try:
            rows = run_claim(args.name, args.data or 'shapes', folder, args.jobs, until)
        except M.Refused as error:
            grid.refuse(error)
    folder.mkdir(parents=True, exist_ok=True)
    report(rows, args.name, folder)


if __name__ == '__main__':
    main()
