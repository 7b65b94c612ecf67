"""
What all studies share: many commands at once, each run once; rows in a csv; intervals; tables.

A run is a command of a stage with an out_dir of its own. Once it is finished it has a row in runs.csv, and what has a
row is never started again: a study that was stopped goes on where it was. A row with other settings is refused.
"""
import argparse
import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Student's t by degrees of freedom from 1 on: 95% of it lies within plus or minus this
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
       2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def refuse(message):
    """What a user gave and we do not take: one line and exit code 2, as the stages do."""
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def make_parser(doc):
    """What the commands of all studies have."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument('--jobs', type=int, default=2, help='runs at once (2)')
    return parser


# ---- runs -------------------------------------------------------------------------------------------------------

def make_run(folder, script, flags, columns):
    """A run with the out_dir folder/NAME. columns: its name, and what its row says beside its result."""
    out_dir = Path(folder) / columns['name']
    words = [ROOT / script, *flags, '--out_dir', out_dir]
    return dict(columns, words=[str(word) for word in words])


def run_all(runs, folder, jobs=2, more=None, until=None, later=0):
    """Runs so many at once, in order; a run with `after` waits for the run of that name. -> their rows.
    more(run, result): what else goes into a row. until: the time at which all stop and save.
    later: the work that comes after these runs, in the unit of `work`, of which a run without one counts 1."""
    if jobs < 1:
        refuse(f'--jobs {jobs} is too small; use 1 or more')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'runs.csv'
    refuse_others(runs, path)
    done = {row['name'] for row in read_csv(path)}
    waiting = [one for one in runs if one['name'] not in done]
    running = {}                        # name: (run, its process)
    began, finished = time.time(), 0.

    print(f'{len(waiting)} of {len(runs)} runs to do, {jobs} at once; what each prints is in {folder}/NAME.log', flush=True)
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while waiting or running:
            if until and time.time() > until:
                sys.exit(f'the hours are over with {len(waiting) + len(running)} runs to do; the same command goes on')

            # start what has room and waits for nothing
            unfinished = {one['name'] for one in waiting} | running.keys()
            ready = [one for one in waiting if one.get('after') not in unfinished]
            for one in ready[:jobs - len(running)]:
                waiting.remove(one)
                running[one['name']] = one, start(one, folder, jobs)

            # note what has ended
            for name, (one, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    fail(one, process.returncode, folder)
                add_row(path, finished_row(one, folder, more))
                finished += one.get('work', 1)
                left = [*waiting, *(other for other, _ in running.values())]
                work = later + sum(other.get('work', 1) for other in left)
                minutes = (time.time() - began) / 60
                print(f'{minutes:6.1f} min  {name}; {len(left)} left, about {minutes * work / finished:.0f} min', flush=True)
            time.sleep(.05)
    finally:
        # stopped or failed: the others save, and go on at the next call
        for one, process in running.values():
            process.send_signal(signal.SIGTERM)
        for one, process in running.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    rows = {row['name']: row for row in read_csv(path)}
    return [rows[one['name']] for one in runs]


def leave(number, frame):
    """A signal's handler: run_all stops its runs on the way out."""
    print('\nstopped: runs save, and the same command goes on', file=sys.stderr)
    sys.exit(128 + number)


def start(one, folder, jobs):
    """A run's process; it gets its share of the cores, and writes to NAME.log."""
    log = folder / f"{one['name']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    cores = max(1, (os.cpu_count() or 1) // jobs)
    environment = {'OMP_NUM_THREADS': str(cores), **os.environ}
    with open(log, 'a') as file:
        return subprocess.Popen([sys.executable, *one['words']], env=environment, stdout=file, stderr=file)


def fail(one, code, folder):
    """Ends the study with the last line that a failed run wrote."""
    log = folder / f"{one['name']}.log"
    last = (log.read_text().strip() or 'no output').splitlines()[-1]
    if code == 2:                       # a stage refused what it was given
        refuse(last.removeprefix('error: '))

    command = ' '.join(one['words'])
    sys.exit(f"{one['name']}: {last}\n{log} says more of: python {command}")


def finished_row(one, folder, more):
    result = json.loads((folder / one['name'] / 'result.json').read_text())
    row = {**one, **result}
    if more:
        row.update(more(one, result))

    # not results
    for key in ('words', 'after', 'work', 'command', 'stage', 'options'):
        row.pop(key, None)
    return row


# ---- rows -------------------------------------------------------------------------------------------------------

def refuse_others(runs, path):
    """One name is one run: a row whose columns say something else is of other settings."""
    rows = {row['name']: row for row in read_csv(path)}
    for one in runs:
        row = rows.get(one['name'], {})
        for column in one.keys() - {'words', 'after', 'work'}:
            ours, theirs = number_or_text(str(six_digits(one[column]))), row.get(column)
            if theirs not in (None, ours):
                refuse(f"{path} has {one['name']} with {column} {theirs} instead of {ours}; move that folder away, or take "
                       f'another --out_dir where there is one')


def add_row(path, row):
    """For two studies in one folder: one at a time."""
    with open(f'{path}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_csv(path, [*read_csv(path), row])


def read_kept(path, *columns):
    """The rows of a csv that a user names, which must have these columns."""
    try:
        rows = read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        refuse(f'{path} cannot be read: {error}')
    if not rows:
        refuse(f'{path} has no rows')
    for number, row in enumerate(rows, 2):
        for column in columns:
            if row.get(column) is None:
                refuse(f'{path}, line {number}: no {column}; is it of another study?')
    return rows


def read_csv(path):
    """A list of dicts: numbers where they are numbers, None where nothing is."""
    if not os.path.exists(path):
        return []
    with open(path, newline='') as file:
        return [{name: number_or_text(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def number_or_text(cell):
    if cell is None or cell.lower() in ('', 'nan'):
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def write_csv(path, rows):
    """Written beside and renamed: a kill leaves the old file or the new one."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    beside = f'{path}.tmp'
    with open(beside, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: six_digits(x) for name, x in row.items()})
    os.replace(beside, path)


def six_digits(x):
    return f'{x:.6g}' if isinstance(x, float) else x


# ---- what they say ----------------------------------------------------------------------------------------------

def t95(freedom):
    if freedom <= len(T95):
        return T95[freedom - 1]
    return 1.96 + 2.45 / freedom        # to .001


def spread(values):
    """(mean, standard deviation); of one value the deviation is nan."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    squares = [(value - mean) ** 2 for value in values]
    return mean, math.sqrt(sum(squares) / (len(values) - 1))


def interval(values):
    """(mean, half-width of its 95% interval of Student's t over seeds)."""
    mean, deviation = spread(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, t95(len(values) - 1) * deviation / math.sqrt(len(values))


def percent(values):
    """'mean ± half-width' in percent; '' where a value is missing."""
    if not values or None in values:
        return ''
    mean, half = interval(values)
    if len(values) == 1:
        return f'{100 * mean:.1f}'
    return f'{100 * mean:.1f} ± {100 * half:.1f}'


def differences(ours, theirs, measure):
    """ours - theirs for each seed that both have; ours, theirs: {seed: row}."""
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        a, b = ours[seed].get(measure), theirs[seed].get(measure)
        if a is None or b is None:
            return []
        found.append(a - b)
    return found


def print_table(head, rows):
    """A table in markdown."""
    print()
    for row in [head, ['---'] * len(head), *rows]:
        cells = [str(cell) for cell in row]
        print(f'| {" | ".join(cells)} |')
