"""Damaged inputs of every kind are answered well: a run that ends and counts what it left out, or one line that names
the file. tests/mutate.py makes them and judges; it runs as a program, so that torch is loaded once and every command
has a process of its own."""
import os
import subprocess
import sys

import pytest

import mutate

HERE = os.path.dirname(os.path.abspath(__file__))


def judge(said, code=0, name='boxes/x', megabytes=0., folder='/data'):
    return mutate.fault(name, folder, code, said, 1., megabytes)


def run_mutations(*flags):
    """Fails with a line for each that is not answered well."""
    command = [sys.executable, os.path.join(HERE, 'mutate.py'), *map(str, flags)]
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_there_are_many_mutations():
    """Of four kinds of sets more than 300, no two of one name."""
    names = [name for name, _ in mutate.trials()]
    kinds = {name.partition('/')[0] for name in names}
    assert len(names) == len(set(names)) > 2000 and kinds == set(mutate.SETS)


def test_a_mutation_is_a_function_of_the_seed():
    """The same bytes again, and others of another seed."""
    name = '00000.tar is noise'
    change = dict(mutate.shard_mutations())[name]
    made = []
    for seed in (0, 0, 1):
        files = mutate.shard_set(2)
        change(mutate.np.random.default_rng(seed), files)
        made.append(files['00000.tar'])
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize('said, options, expected', [
    ('error: /data/a.json: no', dict(code=2), ''),
    ('KeyError: 1', dict(code=1), 'exit 1'), ('', dict(code=-9), 'exit -9'),
    ('error: it cannot be read', dict(code=2), 'names no file'),
    ('error: /data/a.json: no\nerror: /data/a.json: no', dict(code=2), '2 lines'),
    ('error: /data/a.json: no\nof this', dict(code=2), '1 lines'),
    ('error: /data/' + 1000 * 'x', dict(code=2), '1013 characters'),
    ('error: /data/a\0', dict(code=2), '15 characters'),
    ('Traceback (most recent call last):\nerror: /data/a.json', dict(code=2), 'Traceback'),
    ('UserWarning: odd\nerror: /data/a.json', dict(code=2), 'UserWarning'),
    ('error: /data/a.json: no', dict(code=2, megabytes=2000.), '2000 MB'),
    ('well', dict(name='boxes/box null'), 'cost nothing'),
    ('1 masks were left out: annotation 3', dict(name='boxes/box null'), 'cost nothing')])
def test_bad_answers_are_seen(said, options, expected):
    """Other exit codes, tracebacks, warnings, lines that are two, long or name no file, memory, losses not counted."""
    wrong = judge(said, **options)
    assert expected in wrong if expected else wrong == ''


@pytest.mark.parametrize('result, expected', [('{"loss": 1}', ''), ('{"loss": NaN}', 'NaN in result.json')])
def test_a_loss_that_is_counted_is_well(result, expected, tmp_path):
    """As long as what the run leaves is JSON."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'result.json').write_text(result)
    said = '1 annotations have no box of four numbers and were left out: annotation 3'
    assert judge(said, name='boxes/box null', folder=str(tmp_path)) == expected


def test_some_mutations_are_answered_well():
    """25 of all, drawn by a seed."""
    run_mutations('--some', 25, '--seed', 1)


@pytest.mark.long
@pytest.mark.parametrize('seed', range(2))
def test_all_mutations_are_answered_well(seed):
    """Half an hour each."""
    run_mutations('--seed', seed)
