"""
How masked feature reconstruction scales: grids of real runs, fits and pictures.

    python mim_pretrain.py --study sizes      # model size x length; the largest is predicted before it is run
    python mim_pretrain.py --study data       # few images, seen again and again, or many
    python mim_pretrain.py --study targets    # what is reconstructed, weaker teachers, and the ceiling of each size
    python mim_pretrain.py --study controls   # a poor world, in which size should buy nothing
    python mim_pretrain.py --study transfer   # boxes and semantic maps from the models of `sizes`
    python assets/scaling.py sizes --jobs 4   # any of them, so many runs at once (2), each with its share of the cores
    python assets/scaling.py                  # fits and draws assets/scaling.csv and the prediction beside it

What is run, and how, is in grids.py. Loss is 1 - skill: 0 is a perfect prediction, 1 the best constant for each
position. For one teacher it is proportional to 1 - cosine, the training loss + 1, so exponents are the same; unlike
that it can be read across teachers and worlds. N counts the weights of blocks and patch embedding, FLOPs three forward
passes of those for every image, without head and teacher. Intervals are 90%.
"""
import argparse
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'assets')]
import data                         # noqa: E402
import mim_pretrain                 # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402
from grids import (BRACKET, GRIDS, POOR, STUDIES, TEACHER_STEP, bracketed, command, core_seconds,     # noqa: E402
                   count, execute, read, runs_of, slowness, teach)

EVA = {  # epochs: training cosine of EVA's 1B model, block masks, from its authors' log
    1: .6578, 2: .6974, 5: .7248, 10: .7273, 25: .7291, 50: .7310, 75: .7358, 100: .7394, 125: .7443, 150: .7490}


# ---- a study ----------------------------------------------------------------------------------------------------

def study(name, out_dir='out/study', device='', jobs=2):
    """Runs what is not finished yet, two at once, then fits and draws."""
    grid = GRIDS['cuda' if run.find_device(device, 0, 1).type == 'cuda' else 'cpu']
    folder, device = Path(out_dir), ['--device', device] if device else []
    folder.mkdir(parents=True, exist_ok=True)
    first, then = runs_of(name, grid)
    done = {row['name']: row for row in read(folder / 'runs.csv')}
    for one in first + then:
        if any(done.get(one['name'], one)[key] != one[key] for key in ('lr', 'batch_size')):
            raise ValueError(f"{folder} has {one['name']} with other settings than {name}'s; take another --out_dir")
    waiting = [one for one in first + then if one['name'] not in done]
    cores = os.cpu_count() or 1
    wanted = sorted({one['teacher'] for one in waiting if one['teacher'] and not one['head']}, reverse=True)
    wanted = [steps for steps in wanted if not (folder / f'teacher-{steps}' / 'result.json').exists()]
    minutes, slow = sum(map(core_seconds, waiting)) / 60 / min(jobs, cores), slowness()
    print(f'--study {name}: {len(waiting)} of {len(first + then)} runs to do, {jobs} at once, '
          f'about {minutes * slow:.0f} min')
    for steps in wanted:
        print(f'  before them, a teacher of {steps} steps, about {steps * TEACHER_STEP * slow / 60 / cores:.0f} min')
    for one in waiting:
        print(f"  {one['name']:<40} lr {one['lr']:g}", flush=True)
    execute([teach(steps, grid, folder) for steps in wanted], folder, 1, device)
    for steps in wanted:
        result = json.loads((folder / f'teacher-{steps}' / 'result.json').read_text())
        print(f"teacher of {steps} steps: {result['seconds'] / 60:.1f} min, zero-shot {result['zero_shot_top1']:.3f}")
    began = time.time()
    for part in (first, then):
        if part is then and then:
            write_prediction(folder, grid)
        execute([dict(one, words=command(one, grid, folder)) for one in part], folder, jobs, device, grid)
    print(f'{(time.time() - began) / 60:.1f} min, teachers apart')
    report(read(folder / 'runs.csv'), grid, folder)
    draw_sizes(folder, grid)


# ---- the fits ---------------------------------------------------------------------------------------------------

def fit(xs, losses, groups=None, places=None, draws=400, num=32):
    """L = E + sum of c * x^-e over the rows of xs [k, n], fitted to losses [n], errors relative. Given the exponents, E
    and the factors c are linear: every exponent of a lattice (k = 2: num^2 pairs) is tried, and E and c, none of them
    negative, are solved for exactly. Runs count by how their length scatters (places [n]: which length a run has; by
    default its place in its group), as short runs scatter more.

    Bootstrap: so many times other runs' residuals are added to the fit, and it is fitted again. Groups change places as
    a whole: a run and its branches share their luck. Few groups tell little of how large luck is: each draw stretches
    it by sqrt(f / chi^2 of f degrees of freedom), which makes Student's t of a normal deviate.
    -> dict(E [1 + draws], factors [1 + draws, k], exponents [1 + draws, k]; row 0 is the fit. scale [k], noise: groups'
    residuals, stretch [draws])."""
    xs, y = np.atleast_2d(np.asarray(xs, float)), np.asarray(losses, float)
    k, n = xs.shape
    scale = np.exp(np.log(xs).mean(1))                                              # factors near 1
    groups = [[i] for i in range(n)] if groups is None else groups
    if places is None:
        places = np.zeros(n, int)
        for group in groups:
            places[group] = range(len(group))
    freedom = max(1, len(groups) - 3)               # E, a factor and an exponent have taken their share of the luck
    residuals = np.ones(n)                          # all alike first, then how far a length's runs lay from that fit
    for _ in range(2):
        sigma = np.array([max(1e-6, math.sqrt(np.mean(residuals[places == place] ** 2))) for place in places])
        best = solve(xs / scale[:, None], y * sigma, y[:, None], num)
        predicted = predict(dict(best, scale=scale), xs)[0]                         # [n]
        residuals = y / predicted - 1
    noise = [residuals[group] * math.sqrt(len(groups) / freedom) for group in groups]
    rng, samples = np.random.default_rng(0), np.empty((n, draws))
    stretch = np.sqrt(freedom / rng.chisquare(freedom, draws))
    for draw in range(draws):
        for group in groups:
            samples[group, draw] = predicted[group] * (1 + noise[rng.integers(len(noise))] * stretch[draw])
    rest = solve(xs / scale[:, None], y * sigma, samples, num)
    both = {key: np.concatenate((best[key], rest[key])) for key in best}
    return dict(both, scale=scale, noise=noise, stretch=stretch)


def solve(xs, sigma, samples, num):
    """Best E >= 0, factors >= 0 and exponents for each column of samples [n, S]; its rows have deviations sigma [n]."""
    (k, n), S = xs.shape, samples.shape[1]
    lattice = np.array(list(itertools.product(np.geomspace(.05, 2, num), repeat=k)))            # [pairs, k]
    powers = np.exp(-lattice[:, None, :] * np.log(xs.T))                                        # [pairs, n, k]
    columns = np.concatenate((np.ones((len(lattice), n, 1)), powers), 2) / sigma[:, None]
    goal, least = samples / sigma[:, None], np.full(S, np.inf)
    found = dict(E=np.zeros(S), factors=np.zeros((S, k)), exponents=np.ones((S, k)))
    for used in (used for m in range(1, min(k + 1, n) + 1) for used in itertools.combinations(range(k + 1), m)):
        here = columns[:, :, used] if max(used) else columns[:1, :, used]       # E alone has no exponents to choose
        q, r = np.linalg.qr(here)
        projected = q.transpose(0, 2, 1) @ goal                                                 # [pairs, used, S]
        numbers = np.linalg.solve(r + 1e-12 * np.eye(len(used)), projected)
        error = (goal ** 2).sum(0) - (projected ** 2).sum(1)                                    # [pairs, S]
        error[(numbers < 0).any(1)] = np.inf
        pair = error.argmin(0)
        better = np.flatnonzero(error[pair, range(S)] < least * (1 - 1e-9))
        least[better] = error[pair[better], better]
        whole = np.zeros((len(better), k + 1))
        whole[:, used] = numbers[pair[better], :, better]
        found['E'][better], found['factors'][better] = whole[:, 0], whole[:, 1:]
        found['exponents'][better] = lattice[pair[better]]
    return found


def predict(law, xs):
    """Losses at xs [k, m], of the fit and of each draw: [1 + draws, m]."""
    xs = np.atleast_2d(np.asarray(xs, float)) / law['scale'][:, None]
    return law['E'][:, None] + sum(law['factors'][:, j, None] * x ** -law['exponents'][:, j, None]
                                   for j, x in enumerate(xs))


def interval(values):
    """The middle 90%."""
    return tuple(np.quantile(values, (.05, .95)).tolist())


def bounded(values, used=None):
    """A number of the fit with its interval; an exponent's is over the draws whose factor is used, so not 0."""
    used = np.ones(len(values), bool) if used is None else used
    if not used[0] or not used[1:].any():
        return 'none'
    low, high = interval(values[1:][used[1:]])
    without = 1 - used[1:].mean()
    return f'{values[0]:.2f} ({low:.2f} to {high:.2f}' + (f'; none in {without:.0%} of draws)' if without else ')')


def forecast(law, xs, place):
    """What one run will lose: {loss, low, high}, 90%, the fit's uncertainty and the luck of one run of that length, the
    place-th of each group, together."""
    losses, rng = predict(law, xs)[:, 0], np.random.default_rng(1)
    luck = np.array([group[place] for group in law['noise']])
    chosen = luck[rng.integers(len(luck), size=len(law['stretch']))] * law['stretch']
    low, high = interval(losses[1:] * (1 + chosen))
    return dict(loss=float(losses[0]), low=low, high=high)


# ---- what the runs say ------------------------------------------------------------------------------------------

def usual(rows, grid, **wanted):
    """The rows of masked features of the world with the strong teacher at the rule's rate; `wanted` says what else."""
    wanted = dict(dict(target='clip', data='shapes', head='', factor=1, teacher=grid['teacher_steps']), **wanted)
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def loss_of(rows):
    return [1 - row['skill'] for row in rows]


def cells(rows):
    """{(size, steps): losses of its seeds}, small sizes first."""
    found = {}
    for row in sorted(rows, key=lambda row: (row['N'], row['steps'], row['seed'])):
        found.setdefault((row['size'], row['steps']), []).append(1 - row['skill'])
    return found


def pooled(found):
    """Seeds' standard deviation pooled over cells, and its degrees of freedom."""
    squares = sum(((np.array(losses) - np.mean(losses)) ** 2).sum() for losses in found.values())
    freedom = sum(len(losses) - 1 for losses in found.values())
    return math.sqrt(squares / freedom) if freedom else math.nan, freedom


def pooled_by_length(found, steps):
    """{length: pooled deviation of its cells, degrees of freedom}, for each of `steps`."""
    return {n: pooled({cell: losses for cell, losses in found.items() if cell[1] == n}) for n in steps}


def joint(rows, **options):
    """L(N, D) = E + A N^-a + B D^-b; D: images seen. A run and its branches share their luck; one that lacks a length
    is left out."""
    of = {}
    for row in sorted(rows, key=lambda row: row['steps']):      # a place in a group is a length, whatever came first
        of.setdefault((row['size'], row['seed']), []).append(row)
    most = max(map(len, of.values()))
    rows = [row for own in of.values() if len(own) == most for row in own]
    groups = np.arange(len(rows)).reshape(-1, most).tolist()
    xs = [[row['N'] for row in rows], [row['steps'] * row['batch_size'] for row in rows]]
    return fit(xs, loss_of(rows), groups, **options)


def enough(rows, *keys):
    """Whether E, a factor and an exponent of each key can be told apart: three of its values or more."""
    return all(len({row[key] for row in rows}) > 2 for key in keys)


def write_prediction(folder, grid):
    """What the largest size will lose at each length, said before it is run: prediction.json, never written again."""
    path = folder / 'prediction.json'
    if not path.exists():
        rows = [row for size in grid['fit'] for row in usual(read(folder / 'runs.csv'), grid, size=size)]
        law, N = joint(rows), count(grid['held_out'], grid)
        losses = {steps: forecast(law, [[N], [steps * grid['batch_size']]], place)
                  for place, steps in enumerate(grid['steps'])}
        path.write_text(json.dumps(dict(size=grid['held_out'], N=N, runs=len(rows), losses=losses), indent=2) + '\n')
    for steps, said in json.loads(path.read_text())['losses'].items():
        print(f"prediction, {grid['held_out']} at {steps} steps: loss {said['loss']:.4f} "
              f"(90%: {said['low']:.4f} to {said['high']:.4f})", flush=True)


def report(rows, grid, folder):
    """Prints what there is, as tables in markdown, and draws it."""
    sized = usual(rows, grid)
    if sized:
        report_sizes(rows, sized, grid, folder)
    for title, wanted in (('ceiling: nothing hidden, every patch regressed', dict(target='distill')),
                          ('poor world', dict(data=POOR)),
                          *((f'teacher of {steps} steps', dict(teacher=grid['teacher_steps'] // part))
                            for part in (4, 2) for steps in [grid['teacher_steps'] // part])):
        if found := cells(usual(rows, grid, **wanted)):
            print(f'\n{title}: ' + ', '.join(f'{size} {np.mean(losses):.4f}' for (size, _), losses in found.items()))
    for row in rows:
        if (row['size'] in (grid['fit'][0], grid['fit'][-1]) and row['steps'] == grid['steps'][0] and row['seed'] == 0
                and row['data'] == 'shapes' and row['factor'] == 1 and not row['head']
                and row['teacher'] in (None, grid['teacher_steps'])):
            print(f"target {row['target']}, {row['size']}, {row['steps']} steps: linear {row['linear_top1']:.3f}, "
                  f"k-NN {row['knn_top1']:.3f}")
    for row in rows:
        if row['unique']:
            gap = row['train_skill'] - row['skill']
            print(f"{row['unique']:,} images, {row['size']}: loss {1 - row['skill']:.4f}, train - val skill {gap:+.4f}")
    draw(rows, sized, grid, folder)


def report_sizes(rows, sized, grid, folder):
    found, steps = cells(sized), grid['steps']
    std, freedom = pooled(found)
    sizes = list(dict.fromkeys(size for size, _ in found))
    print('\n| size | N | learning rate | ' + ' | '.join(f'{n} steps' for n in steps) + ' |\n'
          + '|---' * (3 + len(steps)) + '|')
    for size in sizes:
        one = next(row for row in sized if row['size'] == size)
        print(f"| {size} | {one['N']:,} | {one['lr']:.2g} | " + ' | '.join(
            f'{np.mean(found[size, n]):.4f}' if (size, n) in found else '' for n in steps) + ' |')
    print(f'\nloss is 1 - skill; seeds\' pooled standard deviation {std:.4f} ({freedom} degrees of freedom)')
    pairs = dict.fromkeys([*zip(sizes, sizes[1:]), (sizes[0], sizes[-1])])
    luck = pooled_by_length(found, steps)
    for n, (own, freedom) in luck.items():
        drops = [(f'{a} - {b}', np.mean(found[a, n]) - np.mean(found[b, n])) for a, b in pairs
                 if a != b and {(a, n), (b, n)} <= found.keys()]
        print(f'{n} steps, own deviation {own:.4f} ({freedom}): ' + ', '.join(
            f'{pair} {drop:.4f} = {drop / std:.1f} deviations, {drop / own:.1f} own' for pair, drop in drops))
    for size, tried_at in bracketed(grid):
        tried = {row['factor']: 1 - row['skill'] for factor in BRACKET
                 for row in usual(rows, grid, size=size, seed=0, steps=tried_at, factor=factor)}
        if len(tried) == len(BRACKET):
            best = min(tried, key=tried.get)
            tie = tried[1] - tried[best] < 2 * 2 ** .5 * luck[tried_at][0]      # of two runs that differ by luck alone
            verdict = ('inside' if best == 1 else 'within luck of the best, which is at an end' if tie else
                       'the best is at an end, so the rule does not hold')
            print(f'learning rate of {size}, {tried_at} steps, times '
                  + ', '.join(f'{x:g}: {tried[x]:.4f}' for x in BRACKET) + f': {verdict}')
    if (folder / 'prediction.json').exists():
        judge(json.loads((folder / 'prediction.json').read_text()), found, sizes)
    for name, xs, losses, places in laws(sized, grid):
        report_law(name, fit(xs, losses, places=places))
    if enough(sized, 'N', 'steps'):
        report_law('L(N, D) = E + A N^-a + B D^-b', joint(sized))
    for probe in ('knn_top1', 'linear_top1', 'knn_unnamed', 'linear_unnamed', 'box_ap', 'miou'):
        pairs = transfer(rows, sized, probe)
        if len(pairs) > 2:
            rho = spearman([x for _, x, _ in pairs], [y for _, _, y in pairs])
            print(f'skill and {probe}: Spearman {rho:.2f} over {len(pairs)} runs')


def judge(said, found, sizes):
    """How the prediction did, and how "as the next smaller size" would have."""
    for steps, guess in said['losses'].items():
        cell = (said['size'], int(steps))
        if cell in found:
            loss = np.mean(found[cell])
            smaller = np.mean(found[sizes[sizes.index(cell[0]) - 1], int(steps)])
            drop, width = np.mean(found[sizes[0], int(steps)]) - loss, guess['high'] - guess['low']
            print(f"{cell[0]} at {steps}: predicted {guess['loss']:.4f} ({guess['low']:.4f} to {guess['high']:.4f}, "
                  f'{width / drop:.2f} of the drop from {sizes[0]}), is {loss:.4f}: off by '
                  f'{loss - guess["loss"]:+.4f}; as the next smaller would be off by {loss - smaller:+.4f}')


def report_law(name, law):
    """One line; exponents are those of a lattice, 13% apart."""
    print(f'{name}: E {bounded(law["E"])}, ' + ', '.join(
        f'exponent {bounded(law["exponents"][:, j], law["factors"][:, j] > 0)}' for j in range(len(law['scale'])))
        + '; illustrative, from runs of minutes')


def laws(sized, grid):
    """What is fitted by itself: name, x, loss, which runs scatter alike. A run and its branches count as runs of their
    own here: one size has too few seeds to tell their luck apart."""
    last = [row for row in sized if row['steps'] == grid['steps'][-1]]
    if enough(last, 'N'):
        yield f"L(N) at {grid['steps'][-1]} steps", [row['N'] for row in last], loss_of(last), None
    widest = max(grid['fit'], key=lambda size: M.SIZES[size]['width'])
    same = [row for row in sized if row['size'] == widest]
    if enough(same, 'steps'):
        yield (f'L(D) of {widest}', [row['steps'] * row['batch_size'] for row in same], loss_of(same),
               np.array([row['steps'] for row in same]))
    front = envelope(sized)
    if len(front) > 3:
        yield 'L(C) of the envelope', [x for x, _ in front], [y for _, y in front], None


def envelope(sized):
    """(student FLOPs, mean loss) of the cells that no cheaper one reaches."""
    costs = {(row['size'], row['steps']): row['flops'] for row in sized}
    front = []
    for cost, loss in sorted((costs[cell], float(np.mean(losses))) for cell, losses in cells(sized).items()):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def transfer(rows, sized, probe):
    """(size, skill, what a probe or a head reaches) of each run."""
    skills = {(row['size'], row['seed'], row['steps']): row for row in sized}
    key = lambda row: (row['size'], row['seed'], row['steps'])
    source = [row for row in rows if row['head']] if probe in ('box_ap', 'miou') else sized
    return [(row['size'], skills[key(row)]['skill'], row[probe]) for row in source
            if row.get(probe) is not None and key(row) in skills]


def spearman(xs, ys):
    rank = lambda values: [np.sum(np.array(values) < x) + np.sum(np.array(values) <= x) for x in values]    # ties share
    return float(np.corrcoef(rank(xs), rank(ys))[0, 1])


# ---- pictures ---------------------------------------------------------------------------------------------------

def draw(rows, sized, grid, folder):
    """scaling.png, transfer.png and eva.png, of what there is."""
    dots = lambda curves: {name: [(x, y, y, y) for x, y in curve] for name, curve in curves.items()}
    panel = lambda ylabel, xlabel, curves, points, log='xy': (curves or points) and run.draw_curves(
        None, curves, {}, xlabel, ylabel, log, points, (720, 460))
    sizes = sorted({row['size'] for row in rows if not row['head']}, key=list(M.SIZES).index)
    panels = list(draw_laws(sized, grid, panel, folder)) if enough(sized, 'N', 'steps') else []
    middle = [row for row in rows if row['steps'] == grid['steps'][1] and row['seed'] == 0 and not row['head']]
    curves = {}
    for size in dict.fromkeys(row['size'] for row in middle if row['unique']):
        own = [row for row in middle if row['size'] == size and (row['unique'] or row in sized)]
        own = sorted((row['unique'] or row['steps'] * row['batch_size'], 1 - row['skill'], 1 - row['train_skill'])
                     for row in own)
        curves[f'{size}, validation'], curves[f'{size}, training'] = [(x, y) for x, y, _ in own], [
            (x, y) for x, _, y in own]
    title = f"loss at {grid['steps'][1]} steps against unique images (last: all new)"
    panels.append(panel(title, 'unique images', curves, dots(curves)))
    at = lambda place, **wanted: [(count(size, grid), float(np.mean(losses))) for (size, _), losses in cells(
        usual(rows, grid, steps=grid['steps'][place], **wanted)).items()]
    for title, place, first, then, other in (
            ('loss with 40% hidden and with nothing hidden', 0, 'hidden', 'ceiling: nothing hidden',
             dict(target='distill')),
            ('loss in a rich and in a poor world', -1, 'the world', 'poor world', dict(data=POOR))):
        curves = {first: at(place), then: at(place, **other)}
        panels.append(all(curves.values()) and panel(
            f"{title}, {grid['steps'][place]} steps", 'weights N', curves, dots(curves)))
    tile(folder / 'scaling.png', panels)
    panels = []
    for probe, name in (('knn_top1', 'k-NN'), ('linear_top1', 'linear probe'), ('box_ap', 'box AP'), ('miou', 'mIoU')):
        found = transfer(rows, sized, probe)
        panels.append(panel(f'{name} against validation skill', 'skill', {}, {
            size: [(x, y, y, y) for own, x, y in found if own == size] for size in sizes
            if any(own == size for own, _, _ in found)}, ''))
    tile(folder / 'transfer.png', panels)
    tile(folder / 'eva.png', [panel("EVA's own training curve: 1 - cosine, block masks", 'epochs of 29.6M images',
                                    {'EVA, 1B weights': [(x, 1 - y) for x, y in EVA.items()]}, {}, 'x')])


def draw_laws(sized, grid, panel, folder):
    """Loss against compute with the envelope's fit, against N with the joint fit and the prediction, and by budget."""
    found = cells(sized)
    one = {(row['size'], row['steps']): row for row in sized}
    sizes = list(dict.fromkeys(size for size, _ in found))
    std = {n: deviation for n, (deviation, _) in pooled_by_length(found, grid['steps']).items()}
    dot = lambda x, cell: (x, *np.mean(found[cell]) + np.nan_to_num([-std[cell[1]], 0, std[cell[1]]]))
    law, front = joint(sized), envelope(sized)
    line = np.geomspace(front[0][0], max(row['flops'] for row in sized), 40)
    fitted = fit([x for x, _ in front], [y for _, y in front], draws=1) if len(front) > 3 else None
    by_size = {size: [dot(one[cell]['flops'], cell) for cell in found if cell[0] == size]
               for size in sizes}
    yield panel('loss (1 - skill) against compute', "student's training FLOPs", {
        **{size: [(x, y) for x, _, y, _ in dots] for size, dots in by_size.items()},
        **({'envelope': list(zip(line, predict(fitted, line)[0]))} if fitted else {})}, by_size)
    Ns = np.geomspace(min(row['N'] for row in sized), max(row['N'] for row in sized), 40)
    by_length = {f'{n} steps': [dot(one[cell]['N'], cell) for cell in found if cell[1] == n]
                 for n in grid['steps']}
    lines = {f'{n} steps': list(zip(Ns, predict(law, [Ns, np.full(40, n * grid['batch_size'])])[0]))
             for n in grid['steps']}
    if (folder / 'prediction.json').exists():
        said = json.loads((folder / 'prediction.json').read_text())
        by_length['predicted, 90%'] = [(said['N'] * 1.08, guess['low'], guess['loss'], guess['high'])   # beside it
                                       for guess in said['losses'].values()]
    yield panel('loss against weights, and the joint fit', 'weights N (blocks, patch embedding)', lines, by_length)
    yield panel('loss by budget: the fit, and what was measured', 'weights N', *budgets(found, one, law, Ns))


def budgets(found, one, law, Ns):
    """Curves of the joint fit at four budgets of FLOPs, and each size's loss there, between two of its lengths."""
    cost = {row['N']: row['flops'] / row['steps'] / row['batch_size'] for row in one.values()}
    seen = {}
    for cell, row in one.items():
        seen.setdefault(row['N'], []).append((row['steps'] * row['batch_size'], float(np.mean(found[cell]))))
    few, many = (pick(x for own in seen.values() for x, _ in own) for pick in (min, max))
    whole = sorted(row['flops'] for row in one.values())
    curves, points = {}, {}
    for budget in np.geomspace(whole[0], whole[-1], 6)[1:-1]:
        name = f'{budget / 1e12:.2g} TFLOP'
        images = budget / np.exp(np.interp(np.log(Ns), np.log(sorted(cost)), np.log([cost[N] for N in sorted(cost)])))
        inside = (images > few / 2) & (images < many * 2)
        curves[name] = list(zip(Ns[inside], predict(law, [Ns[inside], images[inside]])[0]))
        for N, own in seen.items():
            own, D = sorted(own), budget / cost[N]
            if own[0][0] <= D <= own[-1][0]:
                loss = float(np.interp(np.log(D), np.log([x for x, _ in own]), [y for _, y in own]))
                points.setdefault(name, []).append((N, loss, loss, loss))
    return curves, points


def tile(path, panels):
    """Panels in two columns."""
    panels = [picture for picture in panels if picture]
    if panels:
        W, H, across = *panels[0].size, min(2, len(panels))
        sheet = Image.new('RGB', (across * W, math.ceil(len(panels) / across) * H), 'white')
        for i, picture in enumerate(panels):
            sheet.paste(picture, (i % across * W, i // across * H))
        sheet.save(path)


@torch.no_grad()
def draw_sizes(folder, grid):
    """same_image.png: validation images, masked, the teacher's features, what each size predicts behind the mask."""
    found = {size: folder / f"{size}-0-{grid['steps'][-1]}" / 'model.pt' for size in (*grid['fit'], grid['held_out'])}
    models = {size: M.load(str(path)) for size, path in found.items() if path.exists()}
    if models:
        target = mim_pretrain.Target('clip', 8, M.load(str(folder / f"teacher-{grid['teacher_steps']}" / 'model.pt')))
        images = data.World('val').batch(torch.arange(6), next(iter(models.values())).image_size)['images']
        mask = mim_pretrain.make_mask('block', torch.arange(6), 8, 105 / 256, seed=-1)
        targets = target.of(images)
        rgb = M.principal_axes(targets)
        as_image = lambda x: x.transpose(1, 2).unflatten(2, (8, 8)) * 255                   # [B, N, 3] -> [B, 3, h, w]
        columns = {'input': images, 'masked': mim_pretrain.paint_hidden(images, mask),
                   'teacher': as_image(rgb(targets))}
        for size, model in models.items():
            predictions = torch.nn.functional.normalize(target.predict(model, images, mask), dim=-1)
            predictions = predictions * targets.norm(dim=-1).mean()             # only directions were learnt
            columns[size] = as_image(torch.where(mask[..., None], rgb(predictions), .75 + .25 * rgb(targets)))
        run.draw_sheet(folder / 'same_image.png', columns, tile=96)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', choices=STUDIES, help='without it: only fit and draw')
    parser.add_argument('--csv', default='assets/scaling.csv', help='what is drawn; pictures go beside it')
    parser.add_argument('--out_dir', default='out/study')
    parser.add_argument('--device', default='')
    parser.add_argument('--jobs', type=int, default=2, help='runs at once')
    args = parser.parse_args()
    if args.name:
        return study(args.name, args.out_dir, args.device, args.jobs)
    rows = read(args.csv)
    if not rows:
        parser.error(f'{args.csv} has no runs')
    report(rows, GRIDS['cuda' if any(row['size'] in ('s', 'b', 'l') for row in rows) else 'cpu'], Path(args.csv).parent)


if __name__ == '__main__':
    main()
