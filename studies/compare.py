"""
Is a change more than noise? mim_pretrain.py with your edits against the last commit, seed by seed.

    python studies/compare.py                                   # what you edited, 3 seeds; 6 runs of some minutes
    python studies/compare.py --steps 400 --seeds 5             # shorter runs, more of them
    python studies/compare.py --ours="--mask random"            # a flag of your side; nothing needs to be edited
    python studies/compare.py --against HEAD~3 -- --size micro  # another commit; after -- come flags of both sides

Both sides run from a copy of their code in out/compare, so you can go on editing; the same command goes on where it
was stopped. One seed means the same weights (unless parameters are added), order, crops and masks on both sides.
Skill is only compared where both sides solve the same task: the same targets behind the same masks.
"""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import grid

MEASURES = 'skill', 'linear_top1', 'knn_top1'
NOT_USED = 'clip_train.py', 'finetune.py', 'detect_seg.py'      # what mim_pretrain.py does not run
TEACHER = grid.ROOT / 'assets' / 'nano-teacher.pt'
TAKES = '--against takes a revision of git or a folder with the code'
MOST_SEEDS = 100


# ---- the two sides ----------------------------------------------------------------------------------------------

def code_of(place):
    """{name: text} of the Python files that mim_pretrain.py may use, in a folder or in a revision of git."""
    code = {}
    if os.path.isdir(place):
        for path in Path(place).glob('*.py'):
            code[path.name] = path.read_text()
    else:
        for name in git('ls-tree', '--name-only', place).splitlines():
            if name.endswith('.py'):
                code[name] = git('show', f'{place}:./{name}')

    if 'mim_pretrain.py' not in code:
        grid.refuse(f'{place} has no mim_pretrain.py; {TAKES}')
    return {name: code[name] for name in sorted(code) if name not in NOT_USED}


def git(*words):
    done = subprocess.run(['git', *words], cwd=grid.ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().split('\n')[-1]
        grid.refuse(f'git {" ".join(words)}: {reason}; {TAKES}')
    return done.stdout


def runs_of(code, flags, seeds, folder):
    """A run for each seed, from a copy of the code in a folder that is named by code and flags."""
    key = hashlib.sha256(json.dumps([code, flags]).encode()).hexdigest()[:10]
    copy = folder / key
    copy.mkdir(parents=True, exist_ok=True)
    for name, text in code.items():
        (copy / name).write_text(text)

    script = copy.resolve() / 'mim_pretrain.py'
    runs = []
    for seed in range(seeds):
        words = ['--teacher', TEACHER, *flags, '--seed', seed]
        runs.append(grid.make_run(folder, script, words, dict(name=f'{key}/seed-{seed}', seed=seed)))
    return runs


# ---- what came out ----------------------------------------------------------------------------------------------

def compare(ours, theirs, names, seeds, jobs, folder=Path('out/compare')):
    """Runs two sides, each (code, flags), and prints a table; names: what it calls them."""
    pairs = []
    for pair in zip(runs_of(*ours, seeds, folder), runs_of(*theirs, seeds, folder)):
        pairs += pair
    rows = grid.run_all(pairs, folder, jobs)
    by_seed = [{row['seed']: row for row in rows[side::2]} for side in (0, 1)]
    report(*by_seed, names)


def report(ours, theirs, names):
    """ours, theirs: {seed: row}."""
    table = []
    for measure in MEASURES:
        means = []
        for side in (ours, theirs):
            means.append(grid.percent([row.get(measure) for row in side.values()]))
        table.append([measure, *means, *judge(ours, theirs, measure)])

    print(f"\n{len(ours)} paired seeds, in percent, with 95% intervals of Student's t")
    grid.print_table(['', *names, 'difference', '', 'seeds that would tell'], table)


def check_seeds(seeds):
    if not 2 <= seeds <= MOST_SEEDS:
        grid.refuse(f'--seeds {seeds}: an interval needs 2 to {MOST_SEEDS}')


def judge(ours, theirs, measure):
    """(difference with its interval, noise or not, how many seeds would tell a difference of this size)."""
    differences = grid.differences(ours, theirs, measure)
    if not differences:
        return '', 'not measured', ''

    # other targets, or other masks: the position baseline is not the same
    baselines = grid.differences(ours, theirs, 'baseline')
    if measure == 'skill' and any(baselines):
        return '', 'another task', ''

    mean, half = grid.interval(differences)
    verdict = 'noise' if abs(mean) <= half else 'not noise'
    return grid.percent(differences), verdict, seeds_to_tell(differences)


def seeds_to_tell(differences):
    """The fewest seeds whose interval would not hold 0, if mean and deviation of the pairs stayed as they are."""
    mean, deviation = grid.spread(differences)
    for n in range(2, MOST_SEEDS + 1):
        if grid.t95(n - 1) * deviation / n ** .5 < abs(mean):
            return str(n)
    return f'more than {MOST_SEEDS}'


# ---- the command ------------------------------------------------------------------------------------------------

def parse(words):
    """(options, flags of both sides)."""
    both = []
    if '--' in words:
        place = words.index('--')
        both = words[place + 1:]
        words = words[:place]

    parser = grid.make_parser(__doc__)
    parser.add_argument('--seeds', type=int, default=3, help='of each side (3)')
    parser.add_argument('--steps', type=int, help="of each run; the size's own if not given")
    parser.add_argument('--against', default='HEAD', help='a revision of git, or a folder with the code (HEAD)')
    parser.add_argument('--ours', default='', help='flags of your side only, in quotes')
    args, unknown = parser.parse_known_args(words)

    if unknown:
        grid.refuse(f'{unknown[0]}: flags of mim_pretrain.py go after -- (both sides) or in --ours="..."')
    check_seeds(args.seeds)
    if args.steps is not None:
        both = ['--steps', str(args.steps), *both]

    # the two that a run here is told apart by
    for word in [*both, *args.ours.split()]:
        if word.split('=')[0] in ('--seed', '--out_dir'):
            grid.refuse(f'{word} is set for each run; use --seeds N')
    return args, both


def main(words):
    args, both = parse(words)
    ours = code_of(grid.ROOT)
    theirs = code_of(args.against)
    own = args.ours.split()

    # is there anything to compare?
    names = sorted(ours.keys() | theirs.keys())
    changed = [name for name in names if ours.get(name) != theirs.get(name)]
    if not changed and not own:
        print(f'nothing differs from {args.against}: edit mim_pretrain.py, model.py, data.py or run.py, '
              'or give your side a flag with --ours')
        return

    print(f'ours differs from {args.against} in: ' + ', '.join([*changed, *own]))
    compare((ours, both + own), (theirs, both), ('ours', args.against), args.seeds, args.jobs)


if __name__ == '__main__':
    main(sys.argv[1:])
