"""
How masked feature reconstruction scales: grids of real runs, a fit, a prediction made before its run.

    python studies/scaling.py sizes          # model size x length; the largest is predicted before it is run
    python studies/scaling.py data           # few images, seen again and again, or many
    python studies/scaling.py targets        # other targets, weaker teachers, the ceiling of each size
    python studies/scaling.py controls       # a poor world, in which size should buy little
    python studies/scaling.py transfer       # boxes and semantic maps from the models of `sizes`
    python studies/scaling.py                # tables and pictures of studies/scaling.csv

Loss is 1 - skill: 0 is a perfect prediction, 1 the best constant for each position. For one teacher it is proportional
to 1 - cosine, so exponents are the same; unlike that it can be read across teachers and worlds. N counts the weights
of blocks and patch embedding, D the images seen, FLOPs three forward passes for every image, without head and teacher.
"""
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import grid
import plot

sys.path.insert(0, str(grid.ROOT))
import model as M                   # noqa: E402
import run                          # noqa: E402

STUDIES = 'sizes', 'data', 'targets', 'controls', 'transfer'
RECIPES = {  # by device; the teacher sees more images than any student. cuda's has not been run
    'cpu': dict(sizes=('pico', 'nano', 'micro'), held_out='mini', steps=(1600, 3200, 6400), batch_size=16, lr=.75,
                seeds=3, image_size=32, patch_size=4, unique=(250, 1000, 4000, 16_000), teacher='nano',
                teacher_steps=2000),
    'cuda': dict(sizes=('pico', 'nano', 'micro', 'mini', 'ti', 's', 'b'), held_out='l', steps=(1024, 2048, 4096),
                 batch_size=256, lr=3, seeds=2, image_size=64, patch_size=8, unique=(2000, 8000, 32_000, 128_000),
                 teacher='mini', teacher_steps=8000)}
WARMUP = 100                # steps; the same for all lengths, as they branch off one another
COOLDOWN = .2               # share of a run's steps
BRACKET = .5, 2             # times the rule's learning rate, of the smallest and of the largest size
POOR = 'shapes:objects=1,fine=4'
HEADS = {'boxes': '--head boxes --steps 300', 'segments': '--head linear --steps 600'}      # of the small recipe
EVA = {  # epochs: training cosine of EVA's 1B model, block masks, from its authors' log
    1: .6578, 2: .6974, 5: .7248, 10: .7273, 25: .7291, 50: .7310, 75: .7358, 100: .7394, 125: .7443, 150: .7490}


# ---- the runs ---------------------------------------------------------------------------------------------------

def student(recipe, size, seed, steps, unique=0, **special):
    """One run's columns: what tells it from others. special: what is not as usual."""
    usual = dict(factor=1, teacher=recipe['teacher_steps'], target='clip', data='shapes', head='')
    if unique:
        special['data'] = f'shapes:unique={unique}'
    if special.get('target') == 'pixels':
        special['teacher'] = ''
    made = {**usual, **special}

    # one rule for all sizes; `sizes` brackets it at both ends
    row = M.SIZES[size]
    lr = made['factor'] * recipe['lr'] / (row['width'] * row['depth'])

    words = [size, str(seed), str(steps)]
    for key, value in made.items():
        if value not in (usual[key], ''):
            words.append(f'{key}={value}')
    name = '-'.join(words).replace(':', '.').replace(',', '.')
    return dict(name=name, size=size, seed=seed, steps=steps, lr=float(f'{lr:.4g}'),
                batch_size=recipe['batch_size'], unique=unique, **made)


def lengths(recipe, size, seed):
    """One run at a constant rate with branches that cool down: each starts where the one before it cooled."""
    runs = [student(recipe, size, seed, steps) for steps in recipe['steps']]
    for before, after in zip(runs, runs[1:]):
        after['after'] = before['name']
    return runs


def runs_of(study, recipe):
    """(runs, runs that wait for a prediction made from the first). A name means one run in all studies."""
    sizes, held_out = recipe['sizes'], recipe['held_out']
    short, middle, long = recipe['steps']
    largest_first = sizes[::-1]
    runs, then = [], []
    if study == 'sizes':
        for seed in range(recipe['seeds']):
            for size in largest_first:
                runs += lengths(recipe, size, seed)
        then = lengths(recipe, held_out, 0)
        for factor in BRACKET:
            runs.append(student(recipe, sizes[0], 0, long, factor=factor))
            then.append(student(recipe, held_out, 0, middle, factor=factor))
    elif study == 'data':
        for size in (sizes[-1], sizes[1]):
            for unique in (*recipe['unique'], 0):
                runs.append(student(recipe, size, 0, middle, unique=unique))
    elif study == 'targets':
        for size in (held_out, *largest_first):
            runs.append(student(recipe, size, 0, short, target='distill'))
        for part in (4, 2, 1):
            for size in largest_first:
                runs.append(student(recipe, size, 0, middle, teacher=recipe['teacher_steps'] // part))
        for size in (sizes[-1], sizes[0]):
            for target in ('clip', 'tokens', 'pixels', 'untrained'):
                runs.append(student(recipe, size, 0, short, target=target))
    elif study == 'controls':
        for seed in (0, 1):
            for world in (POOR, 'shapes'):
                for size in largest_first:
                    runs.append(student(recipe, size, seed, long, data=world))
    elif study == 'transfer':
        for head in HEADS:
            for size in (*sizes, held_out):
                runs.append(student(recipe, size, 0, short, head=head))
                runs.append(student(recipe, size, 0, long, head=head))
    return runs, then


def as_command(one, recipe, folder, device=()):
    """The run of a student, or of a head on top of a student that is there."""
    if one['head']:
        script, flags = 'detect_seg.py', HEADS[one['head']].split()
        flags += ['--init', folder / f"{one['size']}-{one['seed']}-{one['steps']}" / 'model.pt',
                  '--image_size', 2 * recipe['image_size'], '--patch_size', recipe['patch_size']]
    else:
        cooldown = round(COOLDOWN * one['steps'])
        script = 'mim_pretrain.py'
        flags = ['--size', one['size'], *vit_flags(recipe), '--drop_path', 0, '--init_gain', 1.9,
                 '--data', one['data'], '--target', one['target'], '--batch_size', one['batch_size'],
                 '--steps', one['steps'], '--cooldown', cooldown, '--save_every', one['steps'] - cooldown,
                 '--lr', one['lr'], '--warmup_steps', WARMUP, '--min_lr', 0]
        if one['teacher']:
            flags += ['--teacher', folder / f"teacher-{one['teacher']}" / 'model.pt']
        if 'after' in one:
            flags += ['--branch', folder / one['after']]
    return grid.make_run(folder, script, [*flags, '--seed', one['seed'], *device], one)


def vit_flags(recipe):
    return ['--image_size', str(recipe['image_size']), '--patch_size', str(recipe['patch_size'])]


def run_study(name, folder, device, jobs):
    """Runs what is not finished yet, then fits and draws."""
    kind = run.find_device(device, 0, 1).type
    recipe = RECIPES['cuda' if kind == 'cuda' else 'cpu']
    flags = ['--device', device] if device else []
    first, then = runs_of(name, recipe)

    # the same name must mean the same run
    done = {row['name']: row for row in grid.read_csv(folder / 'runs.csv')}
    for one in first + then:
        row = done.get(one['name'], one)
        if (row['lr'], row['batch_size']) != (one['lr'], one['batch_size']):
            grid.refuse(f"{folder} has {one['name']} with other settings; take another --out_dir")

    # teachers, then students
    for steps in sorted({one['teacher'] for one in first if one['teacher'] and not one['head']}):
        run.run_stage('clip_train.py', str(folder / f'teacher-{steps}'), '--size', recipe['teacher'],
                      *vit_flags(recipe), '--steps', str(steps), *flags)

    def more(one, result):
        return computed(one, result, recipe, folder)
    grid.run_all([as_command(one, recipe, folder, flags) for one in first], folder, jobs, more)
    if then:
        write_prediction(folder, recipe)
        grid.run_all([as_command(one, recipe, folder, flags) for one in then], folder, jobs, more)
    report(grid.read_csv(folder / 'runs.csv'), recipe, folder / 'prediction.json', folder)


def vit_of(size, recipe):
    """(its ViTConfig, N)."""
    row = dict(M.SIZES[size], image_size=recipe['image_size'], patch_size=recipe['patch_size'])
    config = M.ViTConfig(**row)
    with torch.device('meta'):
        vit = M.ViT(config)
    return config, run.count_parameters(vit.blocks) + run.count_parameters(vit.patch_embed)


def computed(one, result, recipe, folder):
    """What else goes into a student's row: N, FLOPs, how well it did on its last training images."""
    if one['head']:
        return {}
    config, N = vit_of(one['size'], recipe)
    row = dict(N=N, flops=one['steps'] * one['batch_size'] * run.training_flops(config))
    if one['target'] == 'clip':
        log = run.read_log(folder / one['name'])
        last = [line['loss'] for line in log if line['step'] >= .95 * one['steps']]
        baseline = result['baseline']
        row['train_skill'] = (-np.mean(last) - baseline) / (1 - baseline)
    return row


# ---- the fit ----------------------------------------------------------------------------------------------------

def fit(N, D, losses, draws=400, num=32):
    """L = E + A N^-a + B D^-b of runs of sizes N [R], each at lengths D [L], to losses [R, L], errors relative.
    Short runs scatter more, so each length counts by how its runs scatter.

    Bootstrap: so many times the residuals of other runs are added to the fit, and it is fitted again. A run's lengths
    change places together: it and its branches share their luck. Few runs tell little of how large luck is: each draw
    stretches it by sqrt(f / chi^2 of f degrees of freedom), which makes Student's t of a normal deviate.

    -> dict(numbers [1 + draws, 5]: E, A, B, a, b, the fit first; units of N and D; noise [R, L]; stretch [draws])."""
    losses = np.array(losses, float)
    R, L = losses.shape
    units = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())          # so that A and B are near 1
    x = np.repeat(N, L) / units[0]                                      # [R * L]
    y = np.tile(D, R) / units[1]

    # all lengths alike first, then by how far their runs lay from that fit
    spread = np.ones(L)
    for _ in range(2):
        sigma = (spread * losses).flatten()
        numbers = solve(x, y, sigma, losses.reshape(1, -1), num)
        predicted = loss_at(numbers, x, y).reshape(R, L)
        residuals = losses / predicted - 1
        spread = np.sqrt((residuals ** 2).mean(0)).clip(1e-6)

    # again, with the luck of others; E, a factor and an exponent have taken their share of the luck
    freedom = max(1, R - 3)
    noise = residuals * math.sqrt(R / freedom)
    rng = np.random.default_rng(0)
    stretch = np.sqrt(freedom / rng.chisquare(freedom, draws))
    others = rng.integers(R, size=(draws, R))
    samples = predicted * (1 + noise[others] * stretch[:, None, None])  # [draws, R, L]
    again = solve(x, y, sigma, samples.reshape(draws, -1), num)
    return dict(numbers=np.concatenate((numbers, again)), units=units, noise=noise, stretch=stretch)


def solve(x, y, sigma, samples, num):
    """The best E, A, B >= 0, a and b of each of the samples [S, n], at x, y [n], with deviations sigma [n]: [S, 5].
    Given the exponents, E, A and B are linear: every pair of exponents of a lattice is tried, and the rest, none of it
    negative, is solved for exactly by trying which of the three are above 0."""
    exponents = np.geomspace(.05, 2, num)
    lattice = np.array(list(itertools.product(exponents, exponents)))           # [P, 2]
    a, b = lattice[:, :1], lattice[:, 1:]
    powers_of_x = x ** -a                                                       # [P, n]
    powers_of_y = y ** -b
    terms = np.stack((np.ones_like(powers_of_x), powers_of_x, powers_of_y), -1)
    terms = terms / sigma[:, None]                                              # [P, n, 3]
    goal = (samples / sigma).T                                                  # [n, S]

    best = np.zeros((len(samples), 5))
    least = np.full(len(samples), np.inf)
    for used in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        # least squares: |goal|^2 - |its part in the plane of the terms|^2
        q, r = np.linalg.qr(terms[:, :, used])
        part = q.transpose(0, 2, 1) @ goal                                      # [P, used, S]
        factors = np.linalg.solve(r + 1e-12 * np.eye(len(used)), part)
        error = (goal ** 2).sum(0) - (part ** 2).sum(1)                         # [P, S]
        error[(factors < 0).any(1)] = np.inf

        pair = error.argmin(0)                                                  # [S]
        better = np.flatnonzero(error.min(0) < least * (1 - 1e-9))
        least[better] = error.min(0)[better]
        best[better] = 0
        best[better[:, None], used] = factors[pair[better], :, better]
        best[better, 3:] = lattice[pair[better]]
    return best


def loss_at(numbers, x, y):
    """numbers [S, 5]; x, y [m] in units -> [S, m]."""
    E, A, B, a, b = numbers.T[:, :, None]           # each [S, 1]
    by_size = A * x ** -a
    by_length = B * y ** -b
    return E + by_size + by_length


def predict(law, N, D):
    """Losses at N, D (a number or [m]) of the fit and of each draw: [1 + draws, m]."""
    x = np.atleast_1d(N) / law['units'][0]
    y = np.atleast_1d(D) / law['units'][1]
    return loss_at(law['numbers'], x, y)


def forecast(law, N, D, place):
    """What one run will lose: {loss, low, high}, 90%, of the fit's uncertainty and the luck of one run together.
    place: which of the lengths it has."""
    losses = predict(law, N, D)[:, 0]
    rng = np.random.default_rng(1)
    luck = rng.choice(law['noise'][:, place], len(losses) - 1)
    low, high = middle_90(losses[1:] * (1 + luck * law['stretch']))
    return dict(loss=float(losses[0]), low=low, high=high)


def middle_90(values):
    low, high = np.quantile(values, (.05, .95))
    return float(low), float(high)


def joint(rows, **options):
    """The fit to rows; a run that lacks a length is left out."""
    runs = {}
    for row in sorted(rows, key=lambda row: row['steps']):
        runs.setdefault((row['size'], row['seed']), []).append(row)
    most = max(len(own) for own in runs.values())
    runs = [own for own in runs.values() if len(own) == most]

    N = [own[0]['N'] for own in runs]
    D = [row['steps'] * row['batch_size'] for row in runs[0]]
    losses = [[1 - row['skill'] for row in own] for own in runs]
    return fit(N, D, losses, **options)


def can_be_fitted(rows):
    """Whether floor, factor and exponent can be told apart: three sizes and three lengths."""
    num_sizes = len({row['size'] for row in rows})
    num_lengths = len({row['steps'] for row in rows})
    return min(num_sizes, num_lengths) > 2


def write_prediction(folder, recipe):
    """What the largest size will lose at each length, said before it is run: prediction.json, never written again."""
    path = folder / 'prediction.json'
    if not path.exists():
        rows = usual(grid.read_csv(folder / 'runs.csv'), recipe)
        rows = [row for row in rows if row['size'] in recipe['sizes']]
        law = joint(rows)
        N = vit_of(recipe['held_out'], recipe)[1]
        losses = {}
        for place, steps in enumerate(recipe['steps']):
            losses[steps] = forecast(law, N, steps * recipe['batch_size'], place)
        said = dict(size=recipe['held_out'], N=N, runs=len(rows), losses=losses)
        path.write_text(json.dumps(said, indent=2) + '\n')
    print(f'prediction: {path.read_text()}', flush=True)


# ---- what the runs say ------------------------------------------------------------------------------------------

def usual(rows, recipe, **special):
    """The rows of masked features of the world with the strong teacher at the rule's rate; special: what is not so."""
    wanted = dict(target='clip', data='shapes', head=None, factor=1, teacher=recipe['teacher_steps'])
    wanted.update(special)

    def is_wanted(row):
        return all(row[key] == value for key, value in wanted.items())
    return [row for row in rows if is_wanted(row)]


def cells(rows):
    """{(size, steps): losses of its seeds}, small sizes first."""
    found = {}
    for row in sorted(rows, key=lambda row: (row['N'], row['steps'], row['seed'])):
        found.setdefault((row['size'], row['steps']), []).append(1 - row['skill'])
    return found


def pooled(groups):
    """(seeds' standard deviation pooled over groups of losses, its degrees of freedom)."""
    squares, freedom = 0., 0
    for losses in groups:
        squares += np.square(np.array(losses) - np.mean(losses)).sum()
        freedom += len(losses) - 1
    if not freedom:
        return math.nan, 0
    return math.sqrt(squares / freedom), freedom


def pooled_at(found, steps):
    """The same of the cells of one length."""
    groups = [losses for cell, losses in found.items() if cell[1] == steps]
    return pooled(groups)


def report(rows, recipe, prediction, pictures):
    """Prints what there is, as tables in markdown, and draws it. prediction: a path; pictures: a folder."""
    sized = usual(rows, recipe)
    found = cells(sized)
    said = json.loads(prediction.read_text()) if prediction.exists() else None
    if sized:
        report_sizes(found, recipe)
    if said:
        judge(said, found)
    if can_be_fitted(sized):
        E, _, _, a, b = [bounded(values) for values in joint(sized)['numbers'].T]
        print(f'\nL(N, D) = E + A N^-a + B D^-b: E {E}, a {a}, b {b}')
        print('with 90% intervals; illustrative, from runs of minutes')
    report_all(rows)
    for probe in ('knn_top1', 'linear_top1', 'knn_unnamed', 'linear_unnamed', 'box_ap', 'miou'):
        pairs = transfer(rows, sized, probe)
        if len(pairs) > 2:
            rho = spearman([x for _, x, _ in pairs], [y for _, _, y in pairs])
            print(f'skill and {probe}: Spearman {rho:.2f} over {len(pairs)} runs')
    draw(rows, sized, recipe, said, pictures)


def report_sizes(found, recipe):
    """Mean losses, the luck of seeds, and how far neighbours are apart in units of it."""
    sizes = list(dict.fromkeys(size for size, _ in found))
    table = [[size] for size in sizes] + [["seeds' deviation"], ['degrees of freedom']]
    for n in recipe['steps']:
        for row, size in zip(table, sizes):
            row.append(f'{np.mean(found[size, n]):.4f}' if (size, n) in found else '')
        deviation, freedom = pooled_at(found, n)
        table[-2].append(f'{deviation:.4f}')
        table[-1].append(freedom)
    grid.print_table(['loss', *[f'{n} steps' for n in recipe['steps']]], table)

    print()
    deviation, freedom = pooled(found.values())
    print(f'pooled deviation {deviation:.4f} ({freedom} degrees of freedom)')
    for n, (a, b) in itertools.product(recipe['steps'], zip(sizes, sizes[1:])):
        if (a, n) in found and (b, n) in found:
            drop = np.mean(found[a, n]) - np.mean(found[b, n])
            print(f'{n} steps: {b} is {drop:.4f} below {a}, {drop / deviation:.1f} deviations')


def judge(said, found):
    """How the prediction did, and how far off it would have been to say "as the next smaller size"."""
    sizes = list(dict.fromkeys(size for size, _ in found))
    table = []
    for steps, guess in said['losses'].items():
        cell = said['size'], int(steps)
        if cell in found:
            loss = np.mean(found[cell])
            smaller = np.mean(found[sizes[-2], int(steps)])
            row = [guess['loss'], guess['low'], guess['high'], loss, loss - guess['loss'], loss - smaller]
            table.append([f'{cell[0]} at {steps}', *[f'{x:.4f}' for x in row]])
    grid.print_table(['', 'predicted', '90% from', 'to', 'measured', 'missed by', 'as the next smaller'], table)


def bounded(values):
    """A number of the fit with its interval over the draws."""
    low, high = middle_90(values[1:])
    return f'{values[0]:.2f} ({low:.2f} to {high:.2f})'


def report_all(rows):
    """Means over seeds of all students."""
    keys = 'target', 'data', 'teacher', 'factor', 'size', 'steps'
    groups = {}
    for row in rows:
        if not row['head']:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    table = []
    for group, own in groups.items():
        means = [mean_of(own, name) for name in ('skill', 'train_skill', 'linear_top1', 'knn_top1')]
        table.append([*group, len(own), *means])
    grid.print_table([*keys, 'seeds', 'skill', 'train skill', 'linear probe', 'k-NN'], table)


def mean_of(rows, name):
    values = [row[name] for row in rows if row[name] is not None]
    return f'{np.mean(values):.3f}' if values else ''


def transfer(rows, sized, probe):
    """(size, skill, what a probe or a head reaches) of each run."""
    skills = {(row['size'], row['seed'], row['steps']): row['skill'] for row in sized}
    source = sized
    if probe in ('box_ap', 'miou'):
        source = [row for row in rows if row['head']]
    pairs = []
    for row in source:
        key = row['size'], row['seed'], row['steps']
        if row.get(probe) is not None and key in skills:
            pairs.append((row['size'], skills[key], row[probe]))
    return pairs


def spearman(xs, ys):
    """Correlation of ranks; equal values share one."""
    def ranks(values):
        values = np.array(values)
        return [np.sum(values < x) + np.sum(values <= x) for x in values]
    return float(np.corrcoef(ranks(xs), ranks(ys))[0, 1])


# ---- pictures ---------------------------------------------------------------------------------------------------

def draw(rows, sized, recipe, said, folder):
    """scaling.png, transfer.png and eva.png, of what there is."""
    if can_be_fitted(sized):
        plot.draw_panels(folder / 'scaling.png', draw_laws(sized, recipe, said))

    panels = []
    for probe in ('knn_top1', 'linear_top1', 'box_ap', 'miou'):
        points = {size: [] for size in (*recipe['sizes'], recipe['held_out'])}
        for size, x, y in transfer(rows, sized, probe):
            points[size].append((x, y, y, y))
        panels.append(panel(f'{probe} against validation skill', 'skill', {}, points, ''))
    plot.draw_panels(folder / 'transfer.png', panels)

    curve = {'EVA, 1B weights': [(epochs, 1 - cosine) for epochs, cosine in EVA.items()]}
    title = "EVA's own training curve: 1 - cosine, block masks"
    plot.draw_panels(folder / 'eva.png', [panel(title, 'epochs of 29.6M images', curve, {}, 'x')])


def panel(title, xlabel, curves, points, log='xy'):
    return plot.draw_curves(None, curves, points, xlabel, title, log, (720, 460))


def draw_laws(sized, recipe, said):
    """Loss against compute; loss against weights with the joint fit and the prediction."""
    found = cells(sized)
    one = {(row['size'], row['steps']): row for row in sized}
    by_size, by_length, curves = {}, {}, {}
    for cell, losses in found.items():
        size, steps = cell
        mean = np.mean(losses)
        deviation = np.nan_to_num(pooled_at(found, steps)[0])
        bar = mean - deviation, mean, mean + deviation
        by_size.setdefault(size, []).append((one[cell]['flops'], *bar))
        by_length.setdefault(f'{steps} steps', []).append((one[cell]['N'], *bar))
        curves.setdefault(size, []).append((one[cell]['flops'], mean))
    first = panel('loss (1 - skill) against compute', "student's training FLOPs", curves, by_size)

    law = joint(sized)
    weights = [row['N'] for row in sized]
    N = np.geomspace(min(weights), max(weights), 40)
    curves = {}
    for n in recipe['steps']:
        fitted = predict(law, N, n * recipe['batch_size'])[0]
        curves[f'{n} steps'] = list(zip(N, fitted))
    if said:
        beside = 1.08 * said['N']                   # not under what was measured
        by_length['predicted, 90%'] = [(beside, guess['low'], guess['loss'], guess['high'])
                                       for guess in said['losses'].values()]
    return [first, panel('loss against weights, and the joint fit', 'weights N', curves, by_length)]


def main():
    parser = grid.make_parser(__doc__)
    parser.add_argument('name', nargs='?', choices=STUDIES, help='without it: tables and pictures of --csv')
    parser.add_argument('--csv', default='studies/scaling.csv', help='earlier runs')
    parser.add_argument('--out_dir', default='out/study', help='for runs and pictures (out/study)')
    parser.add_argument('--device', default='', help='of the runs')
    args = parser.parse_args()
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.name:
        return run_study(args.name, folder, args.device, args.jobs)

    rows = grid.read_csv(args.csv)
    if not rows:
        grid.refuse(f'{args.csv} has no runs')
    sizes = {row['size'] for row in rows}
    recipe = RECIPES['cpu' if sizes <= {'pico', 'nano', 'micro', 'mini'} else 'cuda']
    report(rows, recipe, Path(args.csv).parent / 'prediction.json', folder)
    print(f'{folder}: scaling.png, transfer.png, eva.png')


if __name__ == '__main__':
    main()
