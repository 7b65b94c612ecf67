"""
How masked feature reconstruction scales: sizes of one shape are fitted, a larger one is predicted, then run.

    python studies/scaling.py --hours 5     # all of it; stopped, or after so many hours, the same command goes on
    python studies/scaling.py --report      # tables and pictures again, of the runs that are kept in studies/

Loss is 1 - a measure of how well hidden features are predicted: 0 is perfect, 1 the best constant for each position.
Which measure is chosen on the pilot's two sizes alone, by how far it tells them apart in units of its own luck. N
counts the weights of blocks and patch embedding. A seed means the same images, order and masks for every size, so
sizes are compared seed by seed.
"""
import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import grid
import law
import plot

sys.path.insert(0, str(grid.ROOT))
import data                         # noqa: E402
import mim_pretrain as mim          # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

RECIPES = {  # by device. cuda's has not been run
    'cpu': dict(sizes=('femto', '24x3', 'pico', '48x4', 'nano', 'micro', 'mini'), held_out='ti',
                pilot=('pico', 'nano'), bracket=('femto', 'nano', 'mini'), steps=(3200, 6400), longest=12_800,
                batch_size=16, lr=.75, pilot_seeds=4, seeds=3, held_out_seeds=3,
                image_size=32, patch_size=4, teacher='nano', teacher_steps=(2000, 4000)),
    'cuda': dict(sizes=('pico', 'nano', 'micro', 'mini', 'ti', 's', 'b'), held_out='l',
                 pilot=('pico', 'nano'), bracket=('nano', 'mini', 'b'), steps=(2048, 4096), longest=8192,
                 batch_size=256, lr=3, pilot_seeds=3, seeds=3, held_out_seeds=2, image_size=64, patch_size=8,
                 teacher='mini', teacher_steps=(5000, 10_000))}
WARMUP = 100                # steps; the same for both lengths, as they branch off one another
COOLDOWN = .2               # share of a run's steps
BRACKET = .5, 2             # times the rule's learning rate
POOR = 'shapes:objects=1,fine=4'
HEAD = '--head linear --steps 600'
NUM_JUDGED = 8192           # validation images
MEASURES = 'skill', 'skill_rest', 'r2'
PROBES = 'linear_top1', 'knn_top1'
DRAWING = 1.5e8             # FLOPs that take as long as an image's scene, mask and targets
EVA = {  # epochs: training cosine of EVA's 1B model, block masks, from its authors' log
    1: .6578, 2: .6974, 5: .7248, 10: .7273, 25: .7291, 50: .7310, 75: .7358, 100: .7394, 125: .7443, 150: .7490}


# ---- the runs ---------------------------------------------------------------------------------------------------

def student(recipe, size, seed, steps, factor=1, world='shapes', head=''):
    """One run's columns: what tells it from others."""
    row = M.SIZES[size]
    lr = factor * recipe['lr'] / (row['width'] * row['depth'])          # one rule for all sizes
    name = f'{size}-{seed}-{steps}'
    if factor != 1:
        name += f'-rate-{factor}'
    if world != 'shapes':
        name += '-poor'
    if head:
        name += '-head'
    config, N = vit_of(size, recipe)
    images = steps * recipe['batch_size']
    flops = images * run.training_flops(config)
    return dict(name=name, size=size, seed=seed, steps=steps, lr=float(f'{lr:.4g}'), factor=factor, world=world,
                head=head, batch_size=recipe['batch_size'], N=N, flops=flops, work=flops + images * DRAWING)


def lengths(recipe, size, seed):
    """One run at a constant rate with branches that cool down: each starts where the one before it cooled."""
    runs = [student(recipe, size, seed, steps) for steps in recipe['steps']]
    for before, after in zip(runs, runs[1:]):
        after['after'] = before['name']
    return runs


def phases(recipe):
    """{what for: its runs}, in order; a name means one run. What is held out comes after all that is fitted."""
    sizes, held_out = recipe['sizes'], recipe['held_out']
    short, long = recipe['steps']
    found = {name: [] for name in ('pilot', 'sizes', 'held out', 'rates', 'poor world', 'heads', 'longest')}
    for seed in range(recipe['pilot_seeds']):
        for size in sizes[::-1]:
            if size in recipe['pilot']:
                found['pilot'] += lengths(recipe, size, seed)
            elif seed < recipe['seeds']:
                found['sizes'] += lengths(recipe, size, seed)
    for seed in range(recipe['held_out_seeds']):
        found['held out'] += lengths(recipe, held_out, seed)
        for size in (held_out, sizes[-1]):                  # does the held-out size go ahead if it learns longer?
            one = student(recipe, size, seed, recipe['longest'])
            found['longest'].append(dict(one, after=f'{size}-{seed}-{long}'))

    for factor in BRACKET:
        for size in (held_out, *recipe['bracket'][::-1]):
            found['rates'].append(student(recipe, size, 0, short, factor))
    for size in sizes[:-1]:
        found['poor world'].append(student(recipe, size, 0, short, world=POOR))
    for size in (held_out, *sizes[::-1]):
        found['heads'].append(student(recipe, size, 0, long, head=HEAD))
    return found


def as_command(one, recipe, folder, device=()):
    """The run of a student, or of a head on top of a student that is there."""
    if one['head']:
        script, flags = 'detect_seg.py', one['head'].split()
        flags += ['--init', folder / one['name'].removesuffix('-head') / 'model.pt',
                  '--image_size', 2 * recipe['image_size'], '--patch_size', recipe['patch_size']]
    else:
        cooldown = round(COOLDOWN * one['steps'])
        script = 'mim_pretrain.py'
        flags = ['--size', one['size'], *vit_flags(recipe), '--drop_path', 0, '--init_gain', 1.9,
                 '--data', one['world'], '--batch_size', one['batch_size'],
                 '--steps', one['steps'], '--cooldown', cooldown, '--save_every', one['steps'] - cooldown,
                 '--lr', one['lr'], '--warmup_steps', WARMUP, '--min_lr', 0, '--teacher', teacher_of(recipe, folder)]
        if 'after' in one:
            flags += ['--branch', folder / one['after']]
    return grid.make_run(folder, script, [*flags, '--seed', one['seed'], *device], one)


def vit_flags(recipe):
    return ['--image_size', str(recipe['image_size']), '--patch_size', str(recipe['patch_size'])]


def teacher_of(recipe, folder):
    """The longest trained is the students'; the other shows that it has learnt what it can."""
    return folder / 'teachers' / f"steps-{max(recipe['teacher_steps'])}" / 'model.pt'


def vit_of(size, recipe):
    """(its ViTConfig, N)."""
    row = dict(M.SIZES[size], image_size=recipe['image_size'], patch_size=recipe['patch_size'])
    config = M.ViTConfig(**row)
    with torch.device('meta'):
        return config, weights_in(M.ViT(config))


def weights_in(vit):
    """N: of blocks and patch embedding."""
    return run.count_parameters(vit.blocks) + run.count_parameters(vit.patch_embed)


def weights_of(recipe):
    """N of the sizes that are fitted: [R]."""
    return np.array([vit_of(size, recipe)[1] for size in recipe['sizes']], float)


def run_all(folder, device, jobs, hours):
    """Runs what is not finished yet, in order, then reports."""
    kind = run.find_device(device, 0, 1).type
    recipe = RECIPES['cuda' if kind == 'cuda' else 'cpu']
    flags = ['--device', device] if device else []
    until = time.time() + 3600 * hours if hours else None

    grid.refuse_others(itertools.chain(*phases(recipe).values()), folder / 'runs.csv')
    done = {row['name'] for row in grid.read_csv(folder / 'runs.csv')}

    teachers = []
    for steps in recipe['teacher_steps']:
        words = ['--size', recipe['teacher'], *vit_flags(recipe), '--steps', steps, *flags]
        about = dict(name=f'steps-{steps}', work=steps)
        teachers.append(grid.make_run(folder / 'teachers', 'clip_train.py', words, about))
    rows = grid.run_all(teachers, folder / 'teachers', jobs, until=until)
    grid.print_table(['teacher', 'zero-shot'], [[row['name'], row['zero_shot_top1']] for row in rows])
    judges = {}

    def more(one, result):
        return computed(one, recipe, folder, judges)
    later = sum(one['work'] for one in itertools.chain(*phases(recipe).values()) if one['name'] not in done)
    for name, runs in phases(recipe).items():
        if name == 'held out':
            write_prediction(folder, recipe)
        print(f'\n{name}:', flush=True)
        later -= sum(one['work'] for one in runs if one['name'] not in done)
        for one in runs:
            # of the shorter run only the row was kept: its steps are taken again
            if one.get('after') in done and not (folder / one['after']).exists():
                del one['after']
        commands = [as_command(one, recipe, folder, flags) for one in runs]
        grid.run_all(commands, folder, jobs, more, until, later)
    report(folder / 'runs.csv', folder / 'curves.csv', folder / 'prediction.json', folder, recipe)


# ---- what is measured of a run ----------------------------------------------------------------------------------

def computed(one, recipe, folder, judges):
    """What else goes into a student's row: its measures. Its curve goes into curves.csv."""
    if one['head']:
        return {}
    curves = grid.read_csv(folder / 'curves.csv')
    curves = [row for row in curves if row['name'] != one['name']]
    grid.write_csv(folder / 'curves.csv', curves + curve_of(one, folder))

    if one['world'] not in judges:
        judges[one['world']] = make_judge(one['world'], recipe, folder)
    val, target = judges[one['world']]
    model = M.load(folder / one['name'] / 'model.pt')
    assert weights_in(model) == one['N'], f"{one['name']} is not of size {one['size']}"
    return judge(model, target, val)


def make_judge(world, recipe, folder):
    """(the validation images with masks and targets, the target)."""
    teacher = M.load(teacher_of(recipe, folder))
    target = mim.Features(teacher, recipe['image_size'] // recipe['patch_size'])
    cfg = SimpleNamespace(mask=mim.Config.mask, mask_ratio=mim.Config.mask_ratio, workers=0)
    validation = data.open_data(world, 'val')
    val = mim.make_validation(cfg, validation, target, recipe['image_size'], NUM_JUDGED, torch.device('cpu'))
    return val, target


@torch.no_grad()
def judge(model, target, val):
    """{measure: value} over the hidden patches of val."""
    predictions, targets, places = [], [], []
    batches = zip(val.images.split(64), val.targets.split(64), val.mask.split(64))
    for images, wanted, mask in batches:
        said = target.read(model(model.normalize(images), mask))        # [B, N, C]
        predictions.append(said[mask])
        targets.append(wanted[mask])
        places.append(mask.nonzero()[:, 1])
    predictions = F.normalize(torch.cat(predictions), dim=-1)           # [V, C]
    targets = F.normalize(torch.cat(targets), dim=-1)
    places = torch.cat(places)                                          # [V]

    # what targets differ in from their position's mean, by principal axes
    left = targets - at_place(targets, places)
    axes = torch.linalg.eigh(left.T @ left)[1]                          # [C, C], the widest last
    widest = axes[:, -1:]

    def without_widest(x):
        return x - x @ widest @ widest.T
    found = dict(skill=skill(predictions, targets, places))
    found['skill_rest'] = skill(without_widest(predictions), without_widest(targets), places)
    found['r2'] = whitened_r2(predictions, targets, places, axes)
    return found


def at_place(x, places):
    """Each vector's mean over all that share its position. x [V, C], places [V] -> [V, C]."""
    sums = torch.zeros(int(places.max()) + 1, x.shape[1]).index_add_(0, places, x)
    counts = torch.bincount(places)[:, None].clamp(min=1)
    return (sums / counts)[places]


def skill(predictions, targets, places):
    """(cosine - baseline) / (1 - baseline); the baseline is of the best constant for each position."""
    targets = F.normalize(targets, dim=-1)
    cosine = F.cosine_similarity(predictions, targets, dim=-1).mean()
    baseline = F.cosine_similarity(at_place(targets, places), targets, dim=-1).mean()
    return ((cosine - baseline) / (1 - baseline)).item()


def whitened_r2(predictions, targets, places, axes):
    """The share of the targets' variance around their position's mean that predictions explain, each principal axis
    counting alike: the mean of squared correlations."""
    theirs = (targets - at_place(targets, places)) @ axes
    ours = (predictions - at_place(predictions, places)) @ axes
    products = (theirs * ours).sum(0)
    squares = (theirs ** 2).sum(0) * (ours ** 2).sum(0)
    return (products ** 2 / squares.clamp(min=1e-12)).mean().item()


def curve_of(one, folder, windows=24):
    """Rows of curves.csv: the mean training loss in windows of steps that grow, as 1 - cosine."""
    log = run.read_log(folder / one['name'])
    edges = np.unique(np.geomspace(50, one['steps'], windows + 1).round())
    edges = edges[edges > log[0]['step']]                   # a branch begins where it left
    rows = []
    for low, high in zip(edges, edges[1:]):
        losses = [1 + line['loss'] for line in log if low <= line['step'] < high]
        if losses:
            images = one['batch_size'] * math.sqrt(low * high)
            rows.append(dict(name=one['name'], images=round(images), loss=float(np.mean(losses))))
    return rows


# ---- the prediction ---------------------------------------------------------------------------------------------

def array_of(rows, recipe, sizes, measure):
    """Losses [S, R, L] of the seeds that have every one of these sizes and lengths."""
    loss = {}
    for row in usual(rows):
        loss[row['seed'], row['size'], row['steps']] = 1 - row[measure]
    found = []
    for seed in range(recipe['pilot_seeds']):
        cells = [[loss.get((seed, size, steps)) for steps in recipe['steps']] for size in sizes]
        if None not in sum(cells, []):
            found.append(cells)
    return np.array(found)


def usual(rows, factor=1, world='shapes'):
    return [row for row in rows if not row['head'] and row['factor'] == factor and row['world'] == world]


def choose_measure(rows, recipe):
    """The measure by which the pilot's sizes are most of their paired deviation apart, and all: {measure: ratios}."""
    ratios = {}
    for measure in MEASURES:
        losses = array_of(rows, recipe, recipe['pilot'], measure)
        if len(losses) < 2:
            return None, {}
        paired = losses[:, 0] - losses[:, 1]                            # [S, L]
        ratios[measure] = paired.mean(0) / paired.std(0, ddof=1)
    chosen = max(ratios, key=lambda measure: ratios[measure].mean())
    return chosen, ratios


def write_prediction(folder, recipe):
    """How far below the largest fitted size the held-out one will be, and what rivals say; never written again."""
    path = folder / 'prediction.json'
    if not path.exists():
        rows = grid.read_csv(folder / 'runs.csv')
        run.replace(str(path), json.dumps(predict(rows, recipe), indent=2) + '\n')
    print(f'prediction: {path.read_text()}', flush=True)


def predict(rows, recipe):
    measure, _ = choose_measure(rows, recipe)
    sizes, held_out = recipe['sizes'], recipe['held_out']
    N_new = vit_of(held_out, recipe)[1]
    N, losses = fitted(rows, recipe, measure)
    said = law.forecast(N, losses, N_new, recipe['held_out_seeds'])

    # the rivals: as the largest, and a straight line in log N through the two largest
    mean = losses.mean(0)                                               # [R, L]
    line = (mean[-1] - mean[-2]) * math.log(N_new / N[-1]) / math.log(N[-1] / N[-2])
    found = dict(size=held_out, N=N_new, below=sizes[-1], measure=measure, seeds=len(losses))
    for place, steps in enumerate(recipe['steps']):
        difference, low, high = [float(values[place]) for values in said]
        found[str(steps)] = dict(difference=difference, low=low, high=high, same=0., line=float(line[place]))
    return found


# ---- tables -----------------------------------------------------------------------------------------------------

def report(runs, curves, prediction, pictures, recipe):
    """Prints what there is, as tables in markdown, and draws it. runs, curves, prediction: paths."""
    rows = grid.read_csv(runs)
    measure, ratios = choose_measure(rows, recipe)
    if not measure:
        return print('the pilot is not finished: nothing to report')
    table = [[name, *[f'{x:.1f}' for x in values]] for name, values in ratios.items()]
    grid.print_table(['pilot: signal over its paired deviation', *recipe['steps']], table)
    report_width(rows, recipe, measure)

    sizes = sizes_of(rows, recipe)
    report_sizes(rows, recipe, sizes, measure)
    report_neighbours(rows, recipe, sizes, measure)
    report_fit(rows, recipe, measure)
    if Path(prediction).exists():
        said = json.loads(Path(prediction).read_text())
        report_prediction(rows, recipe, said)
        report_lengths(rows, recipe, said)
    report_rates(rows, measure)
    draw(rows, grid.read_csv(curves), recipe, measure, pictures)


def sizes_of(rows, recipe):
    """Sizes of which something usual is there, small ones first."""
    there = {row['size'] for row in usual(rows)}
    return [size for size in (*recipe['sizes'], recipe['held_out']) if size in there]


def report_width(rows, recipe, measure):
    losses = array_of(rows, recipe, recipe['pilot'], measure)
    paired = losses[:, 0] - losses[:, 1]
    deviation = paired.std(0, ddof=1) / math.sqrt(2)                    # of one run, its seed's luck apart
    N = weights_of(recipe)
    pair = [vit_of(size, recipe)[1] for size in recipe['pilot']]
    N_new = vit_of(recipe['held_out'], recipe)[1]
    shares = law.expected_width(N, N_new, pair, paired.mean(0), deviation, recipe['seeds'], recipe['held_out_seeds'])
    said = ', '.join(f'{share:.2f} at {steps}' for share, steps in zip(shares, recipe['steps']))
    print(f"\nexpected width of the interval over the drop from {recipe['pilot'][0]} to {recipe['sizes'][-1]}: {said}")


def by_cell(rows):
    """{(size, steps): {seed: row}} of the usual runs."""
    cells = {}
    for row in usual(rows):
        cells.setdefault((row['size'], row['steps']), {})[row['seed']] = row
    return cells


def report_sizes(rows, recipe, sizes, measure):
    """Mean losses and their deviations over seeds, and the probes after the longest run."""
    cells = by_cell(rows)
    head = ['size', 'N', 'seeds']
    for steps in recipe['steps']:
        head += [f'loss, {steps} steps', 'deviation']

    table = []
    for size in sizes:
        longest = list(cells.get((size, recipe['steps'][-1]), {}).values())
        row = [size, f'{vit_of(size, recipe)[1]:,}', len(longest)]
        for steps in recipe['steps']:
            losses = [1 - own[measure] for own in cells.get((size, steps), {}).values()]
            row += mean_and_deviation(losses)
        for probe in PROBES:
            row += mean_and_deviation([own[probe] for own in longest])[:1]
        table.append(row)
    grid.print_table([*head, *PROBES], table)


def mean_and_deviation(values):
    """Both in words; '' where there is none."""
    if not values:
        return ['', '']
    mean, deviation = grid.spread(values)
    return [f'{mean:.4f}', f'{deviation:.4f}']


def report_neighbours(rows, recipe, sizes, measure):
    """How much better each size is than the next smaller one, seed by seed."""
    cells = by_cell(rows)
    head = ['in percent, paired, 95%']
    for steps in recipe['steps']:
        head += [f'{measure}, {steps} steps', f'{PROBES[0]}, {steps} steps']

    table = []
    for small, large in zip(sizes, sizes[1:]):
        row = [f'{large} - {small}']
        for steps in recipe['steps']:
            ours = cells.get((large, steps), {})
            theirs = cells.get((small, steps), {})
            for name in (measure, PROBES[0]):
                row.append(grid.percent(grid.differences(ours, theirs, name)))
        table.append(row)
    grid.print_table(head, table)


def fitted(rows, recipe, measure):
    """(N [R], losses [S, R, L]) of the sizes that are fitted, if all of them are there."""
    losses = array_of(rows, recipe, recipe['sizes'], measure)
    return (weights_of(recipe), losses) if len(losses) > 1 else None


def report_fit(rows, recipe, measure):
    found = fitted(rows, recipe, measure)
    if not found:
        return
    N, losses = found
    a, A, luck = law.bootstrap(N, losses)
    E = losses.mean((0, 1)) - law.size_term(N, a, A, N).mean(-2)        # [1 + draws, L]
    is_known = np.quantile(a, .05) > law.EXPONENTS[0]       # else the floor is what the smallest exponent tried makes it
    print(f'\n{len(losses)} seeds have all sizes: exponent a {bounded(a)}')
    for place, steps in enumerate(recipe['steps']):
        floor = bounded(E[:, place]) if is_known else 'not identified'
        print(f"{steps} steps: floor E {floor}; a run's own deviation {luck[:, place].std():.4f}")

    # the same forecast one size earlier, whose answer is known
    earlier = law.forecast(N[:-1], losses[:, :-1], N[-1], len(losses))
    known = (losses[:, -1] - losses[:, -2]).mean(0)
    for place, steps in enumerate(recipe['steps']):
        said = [f'{values[place]:.4f}' for values in earlier]
        print(f"{recipe['sizes'][-1]} from the smaller ones, {steps} steps: {said[0]} ({said[1]} to {said[2]}), "
              f'measured {known[place]:.4f}')


def bounded(values):
    """A number of the fit with its 90% interval over the draws."""
    low, high = np.quantile(values[1:], (.05, .95))
    return f'{values[0]:.3f} ({low:.3f} to {high:.3f})'


def measured_difference(rows, said, steps):
    """The held-out size's loss minus that of the largest fitted, seed by seed."""
    cells = by_cell(rows)
    both = [cells.get((size, steps), {}) for size in (said['size'], said['below'])]
    return [-difference for difference in grid.differences(*both, said['measure'])]


def report_prediction(rows, recipe, said):
    table = []
    for steps in recipe['steps']:
        guess = said[str(steps)]
        row = [f"{said['size']} - {said['below']}, {steps} steps"]
        row += [f"{guess[name]:.4f}" for name in ('difference', 'low', 'high')]
        differences = measured_difference(rows, said, steps)
        if differences:
            measured = np.mean(differences)
            row += [f'{measured:.4f}', len(differences)]
            row += [f'{measured - guess[name]:.4f}' for name in ('difference', 'same', 'line')]
        table.append(row)
    grid.print_table(['', 'predicted', '90% from', 'to', 'measured', 'seeds', 'missed by', '"the same" misses by',
                      'a line in log N by'], table)


def report_lengths(rows, recipe, said):
    """The same difference after longer runs, too."""
    lengths = *recipe['steps'], recipe['longest']
    row = [grid.percent(measured_difference(rows, said, steps)) for steps in lengths]
    grid.print_table(['loss, paired, 95%', *[f'{steps} steps' for steps in lengths]],
                     [[f"{said['size']} - {said['below']}, in percent", *row]])


def report_rates(rows, measure):
    """Loss of one seed at half, one and two times the rule's rate."""
    table = []
    for size, losses in rates_of(rows, measure).items():
        table.append([size, *[f'{loss:.4f}' for _, loss in losses]])
    grid.print_table(['rate', *[f'x {factor}' for factor in (.5, 1, 2)]], table)


def rates_of(rows, measure):
    """{size: [(factor, loss)]} of the sizes that have all three."""
    found = {}
    others = [row for row in rows if row['factor'] != 1]
    for row in others:
        usual_one = [own for own in usual(rows) if all(own[key] == row[key] for key in ('size', 'seed', 'steps'))]
        for own in (row, *usual_one):
            found.setdefault(row['size'], {})[own['factor']] = 1 - own[measure]
    return {size: sorted(losses.items()) for size, losses in found.items() if len(losses) == 3}


# ---- pictures ---------------------------------------------------------------------------------------------------

def draw(rows, curves, recipe, measure, folder):
    """scaling.png, six panels; one of them alone, law.png; eva.png."""
    sizes = sizes_of(rows, recipe)
    colours = plot.ramp((*recipe['sizes'], recipe['held_out']))
    panels = [draw_curves(rows, curves, sizes, colours)]
    found = fitted(rows, recipe, measure)
    if found:
        panels.append(draw_law(rows, recipe, measure, *found))
        plot.draw_panels(folder / 'law.png', panels[-1:])
        panels.append(draw_valleys(rows, curves, recipe, sizes, colours))
        panels.append(draw_residuals(recipe, *found))
    panels.append(panel('loss at three learning rates, times the rule\'s', 'factor',
                        rates_of(rows, measure), {}, 'x', colours=colours))
    panels.append(draw_probes(rows, recipe, sizes))
    plot.draw_panels(folder / 'scaling.png', panels)

    curve = {'EVA, 1B weights': [(epochs, 1 - cosine) for epochs, cosine in EVA.items()]}
    title = "EVA's own training curve: 1 - cosine, block masks"
    plot.draw_panels(folder / 'eva.png', [panel(title, 'epochs of 29.6M images', curve, {}, 'x')])


def panel(title, xlabel, curves, points, log='', **more):
    return plot.draw_curves(None, curves, points, xlabel, title, log, (720, 460), **more)


def draw_curves(rows, curves, sizes, colours):
    """Every run's training loss."""
    size_of = {row['name']: row['size'] for row in usual(rows)}
    thin = {size: {} for size in sizes}
    for row in curves:
        if row['name'] in size_of:
            own = thin[size_of[row['name']]]
            own.setdefault(row['name'], []).append((row['images'], row['loss']))
    thin = {size: list(own.values()) for size, own in thin.items()}
    return panel('1 - cosine in training, every run', 'images', {}, {}, 'xy', thin=thin, colours=colours)


def draw_law(rows, recipe, measure, N, losses):
    """Loss over weights at both lengths: the law, its band, what was fitted, what was not, and what came after."""
    a, A, _ = law.bootstrap(N, losses)
    N_new = vit_of(recipe['held_out'], recipe)[1]
    wide = np.geomspace(min(N), N_new, 40)
    E = losses.mean((0, 1)) - law.size_term(N, a, A, N).mean(1)         # [1 + draws, L]
    heights = E[:, None] + law.size_term(wide, a, A, N)                 # [1 + draws, 40, L]
    low, high = np.quantile(heights[1:], (.05, .95), axis=0)

    lines, bands = {}, {}
    for place, steps in enumerate(recipe['steps']):
        lines[f'{steps} steps'] = list(zip(wide, heights[0, :, place]))
        bands[f'{steps} steps'] = list(zip(wide, low[:, place], high[:, place]))

    # the runs, of the same seeds for all sizes
    points = {}
    cells = by_cell(row for row in rows if row['seed'] < recipe['seeds'])
    for steps in recipe['steps']:
        for size in (*recipe['sizes'], recipe['held_out']):
            name = f'{size}, after' if size == recipe['held_out'] else f'{steps} steps'
            values = [1 - row[measure] for row in cells.get((size, steps), {}).values()]
            if values:
                points.setdefault(name, []).append(with_interval(vit_of(size, recipe)[1], values))
    return panel('loss over weights: law, 90% band, and what was held out', 'weights N', lines, points, 'x', bands=bands)


def with_interval(x, values):
    """A point with the standard error of its mean."""
    mean, deviation = grid.spread(values)
    error = deviation / math.sqrt(len(values)) if len(values) > 1 else 0.
    return x, mean - error, mean, mean + error


def draw_valleys(rows, curves, recipe, sizes, colours):
    """Training loss at a constant rate over weights, at four budgets of compute. A size smaller than a valley's left
    end would need a longer run."""
    flops = {size: run.training_flops(vit_of(size, recipe)[0]) for size in sizes}
    means = constant_rate(rows, curves, recipe)
    budgets = []
    for size, share in ((sizes[0], .2), (sizes[0], .9), (sizes[1], .9), (sizes[3], .9)):
        budgets.append(share * flops[size] * recipe['batch_size'] * recipe['steps'][-1] * (1 - COOLDOWN))
    valleys = {}
    for budget in sorted(budgets):
        valley = []
        for size in sizes:
            images, losses = means.get(size, ([0], [0]))
            D = budget / flops[size]
            if images[0] <= D <= images[-1]:
                valley.append((vit_of(size, recipe)[1], float(np.interp(math.log(D), np.log(images), losses))))
        if len(valley) > 1:
            valleys[f'{budget / 1e12:.2g} TFLOP'] = valley
    points = {name: [(x, y, y, y) for x, y in valley] for name, valley in valleys.items()}
    return panel('1 - cosine at equal compute, constant rate', 'weights N', valleys, points, 'xy')


def constant_rate(rows, curves, recipe):
    """{size: (images [n], mean training loss [n])} of the parts of runs before their rate falls."""
    wanted = {row['name']: row for row in usual(rows)}
    own = {}
    for point in curves:
        row = wanted.get(point['name'])
        if not row:
            continue
        if point['images'] < (1 - COOLDOWN) * row['steps'] * row['batch_size']:
            own.setdefault(row['size'], {}).setdefault(point['images'], []).append(point['loss'])
    means = {}
    for size, found in own.items():
        images = sorted(found)
        means[size] = images, [np.mean(found[x]) for x in images]
    return means


def draw_residuals(recipe, N, losses):
    """What the law leaves of each run, in deviations."""
    a, A = law.fit(N, losses)
    rest = law.residuals(N, losses, a, A)                               # [S, R, L]
    rest = rest / rest.std((0, 1))
    points = {}
    for place, steps in enumerate(recipe['steps']):
        shift = 1.06 ** (2 * place - 1)                                 # side by side
        points[f'{steps} steps'] = [(n * shift, y, y, y) for n, own in zip(N, rest[:, :, place].T) for y in own]
    return panel('what the law leaves of each run, in deviations', 'weights N', {}, points, 'x')


def draw_probes(rows, recipe, sizes):
    """Probes and a linear segmentation head over weights, beside a world in which size should buy little."""
    names = {'linear_top1': 'linear probe', 'knn_top1': 'k-NN'}
    long = recipe['steps'][-1]
    lines, points = {}, {}
    for probe, name in names.items():
        for world, title in (('shapes', name), (POOR, f'{name}, poor world')):
            values = {}
            for row in usual(rows, world=world):
                if world == POOR or row['steps'] == long:
                    values.setdefault(row['N'], []).append(100 * row[probe])
            own = [with_interval(x, values[x]) for x in sorted(values)]
            if own:
                points[title] = own
                lines[title] = [(x, y) for x, _, y, _ in own]
    heads = sorted((row['N'], row['miou']) for row in rows if row['head'])
    if heads:
        lines['mIoU'] = heads
        points['mIoU'] = [(x, y, y, y) for x, y in heads]
    return panel(f'percent, frozen, after {long} steps', 'weights N', lines, points, 'x')


def main():
    parser = grid.make_parser(__doc__)
    parser.add_argument('--hours', type=float, default=0, help='stop after so many; 0: when all is done')
    parser.add_argument('--report', action='store_true', help='only tables and pictures, of the runs in studies/')
    parser.add_argument('--out_dir', default='out/scaling', help='for runs and pictures (out/scaling)')
    parser.add_argument('--device', default='', help='of the runs')
    args = parser.parse_args()
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not args.report:
        try:
            return run_all(folder, args.device, args.jobs, args.hours)
        except M.Refused as error:
            grid.refuse(error)

    kept = grid.ROOT / 'studies'
    if not (kept / 'scaling.csv').exists():
        grid.refuse('no runs are kept yet; start with --hours 5')
    report(kept / 'scaling.csv', kept / 'scaling_curves.csv', kept / 'prediction.json', folder, RECIPES['cpu'])
    print(f'{folder}: scaling.png, law.png, eva.png')


if __name__ == '__main__':
    main()
