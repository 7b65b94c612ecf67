"""
The README's exercises: one change each, and what it does to frozen probes, paired by seed with the code as it is.

    python assets/exercises.py                        # all, 3 seeds each; runs in out/exercises/, what is done is kept
    python assets/exercises.py 'mask ratio' --steps 50 --seeds 1      # one, quickly

A change is a flag, or lines replaced in a copy of the code beside the run. Skill is given where the target and the mask
are the same as before; else only probes compare: top-1 of 16 kinds, in percent, with 95% intervals of Student's t.
"""
import argparse
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'assets')]
from grids import execute       # noqa: E402
from study import interval      # noqa: E402

EXERCISES = {  # flags, or (file, line, what to write instead)
    'random mask': ['--mask', 'random'],
    'mask ratio': ['--mask_ratio', '.75'],
    'MSE': [('mim_pretrain.py', '    return -F.cosine_similarity(predictions.float(), targets.float(), dim=-1).mean()',
             '    return F.mse_loss(predictions.float(), targets.float())')],
    'another teacher layer': [('mim_pretrain.py', '    return teacher.patch_features(images)',
                               '    return teacher.visual.tokens(images)[:, 1:]')],
    'a new size': [
        ('model.py', "    'micro': dict(", "    'deep': dict(width=64, depth=8, heads=2, mlp_width=256, patch_size=4, "
         "image_size=32),\n    'micro': dict("),
        ('mim_pretrain.py', "    'micro': dict(", "    'deep': dict(batch_size=64, steps=1600, lr=2e-3, drop_path=0., "
         "save_every=400),\n    'micro': dict("), '--size', 'deep'],
    'a new shape': [        # hearts become houses
        ('data.py', "    'heart':     lambda x, y, r, a: heart(1.2 * x, .15 - 1.2 * y),",
         "    'heart':     lambda x, y, r, a: (abs(x) < .7) & (y < .8) & (y > -.95 + 1.1 * abs(x)),")],
    'pixels as target': ['--target', 'pixels'],
}       # own photos: study.py photographs
SAME_TASK = 'as it is', 'MSE', 'a new size'


def changed(changes, folder):
    """A folder with the code as an exercise changes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    for file, line, instead in changes:
        text = (folder / file).read_text()
        if text.count(line) != 1:
            sys.exit(f'{file} has {text.count(line)} times the line {line.strip()!r}; the exercise needs it once')
        (folder / file).write_text(text.replace(line, instead))
    return folder / 'mim_pretrain.py'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(EXERCISES))
    parser.add_argument('--steps', type=int, default=1200)
    parser.add_argument('--seeds', type=int, default=3, choices=range(1, 11))
    parser.add_argument('--jobs', type=int, default=2, help='runs at once')
    parser.add_argument('--teacher', default=str(ROOT / 'assets' / 'nano-teacher.pt'))
    args = parser.parse_args()
    if unknown := set(args.names) - EXERCISES.keys():
        parser.error(f'{", ".join(unknown)}: not one of {", ".join(EXERCISES)}')
    folder, names = Path('out/exercises'), ['as it is', *(args.names or EXERCISES)]
    runs = []
    for name in names:
        change = EXERCISES.get(name, [])
        script = changed([line for line in change if isinstance(line, tuple)], folder / name.replace(' ', '-'))
        for seed in range(args.seeds):
            run_name = f"{name.replace(' ', '-')}-{args.steps}-{seed}"
            words = [script, '--steps', args.steps, '--seed', seed, '--save_every', args.steps, '--teacher',
                     os.path.abspath(args.teacher), *(word for word in change if isinstance(word, str)),
                     '--out_dir', folder / run_name]
            runs.append(dict(name=run_name, words=[str(word) for word in words], exercise=name, seed=seed))
    execute(runs, folder, args.jobs)
    report({(one['exercise'], one['seed']): json.loads((folder / one['name'] / 'result.json').read_text())
            for one in runs}, names, args.seeds)


def report(results, names, seeds):
    """A table in markdown: minutes of a run, and the paired differences from the code as it is."""
    print('| change | minutes a run | linear probe | k-NN | skill |\n|---|---|---|---|---|')
    for name in names:
        own, before = ([results[which, seed] for seed in range(seeds)] for which in (name, 'as it is'))
        minutes = sum(result['seconds'] for result in own) / len(own) / 60
        values = lambda key: [a[key] - b[key] * (name != 'as it is') for a, b in zip(own, before)]
        cells = [interval(values(key)) for key in ('linear_top1', 'knn_top1')]
        cells.append(interval(values('skill')) if name in SAME_TASK else '')
        print(f'| {name} | {minutes:.1f} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
