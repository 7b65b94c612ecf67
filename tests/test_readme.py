"""What README and docs show is run, or at least understood."""
import json
import re
import shlex
from pathlib import Path

import pytest

import clip_train
import detect_seg
import finetune
import mim_pretrain
import model as M
import run

ROOT = Path(__file__).resolve().parent.parent
STAGES = {stage.__name__ + '.py': stage for stage in (mim_pretrain, clip_train, finetune, detect_seg)}
CHAPTERS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def blocks(path, language=r'\w*'):
    """The blocks of code of a chapter."""
    return re.findall(rf'^```{language}\n(.*?)^```$', path.read_text(), re.S | re.M)


def commands(path):
    """(script, its words) of every command line of a chapter, but for those cut short by '...'."""
    for line in '\n'.join(blocks(path)).replace('\\\n', ' ').split('\n'):
        words = shlex.split(line, comments=True) if re.search(r'(^|&& |; )(python|torchrun) ', line) else []
        scripts = [word for word in words if word.endswith('.py')]
        if scripts and '...' not in words:
            yield scripts[0], words[words.index(scripts[0]) + 1:]


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda path: path.name)
def test_commands_are_understood(path):
    """Every flag of a stage exists and every value is one of its kind; every other script is there."""
    for script, words in commands(path):
        if script in STAGES:
            run.parse_config(STAGES[script].Config, STAGES[script].RECIPES, words)
        else:
            assert (ROOT / script).exists(), script


def test_the_readme_shows_commands_of_every_stage():
    assert {script for script, _ in commands(ROOT / 'README.md')} >= set(STAGES)


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r'(?:\]\(|src=")([^)"#:]+)[)"]', path.read_text()):
        assert (path.parent / link).exists(), link


def test_the_readme_is_read_in_ten_minutes():
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) <= 300
    tables = re.findall(r'(?:^\|.*\n)+', (ROOT / 'README.md').read_text(), re.M)
    assert max(table.count('\n') for table in tables) <= 12       # a head, a line, ten rows


def test_the_idea_gives_the_losses_of_pretraining(tmp_path, monkeypatch, capsys):
    """The README's program, for 10 steps, beside mim_pretrain.py with the same options."""
    monkeypatch.setattr(mim_pretrain, 'NUM_EVAL', 32)
    monkeypatch.setattr(run, 'NUM_PROBE', 32)
    monkeypatch.setattr(mim_pretrain, 'BANK', 1024)
    monkeypatch.chdir(ROOT)
    program = next(block for block in blocks(ROOT / 'README.md', 'python') if 'block_mask' in block)
    assert program.count('steps, batch_size, top_lr, min_lr = 1600,') == 1
    exec(program.replace('= 1600,', '= 10,'), {})
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]

    flags = ['--teacher', 'assets/nano-teacher.pt', '--steps', '10', '--log_every', '1', '--device', 'cpu']
    flags += ['--out_dir', str(tmp_path / 'run')]
    mim_pretrain.train(run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, flags))
    logged = [json.loads(line)['loss'] for line in open(tmp_path / 'run' / 'log.jsonl')]
    assert len(logged) == 10 and printed == pytest.approx(logged, abs=1e-5)


def test_a_module_of_the_readers_own_is_a_teacher(tmp_path, monkeypatch):
    """docs/own_teacher.md's ten lines: the student's predictions are as wide as its features."""
    monkeypatch.setattr(mim_pretrain, 'NUM_EVAL', 32)
    monkeypatch.setattr(run, 'NUM_PROBE', 32)
    monkeypatch.setattr(mim_pretrain, 'BANK', 1024)
    names = {'__name__': 'a reader'}
    exec(blocks(ROOT / 'docs' / 'own_teacher.md', 'python')[0], names)
    teacher = names['Quarters']()
    flags = ['--size', 'pico', '--steps', '2', '--batch_size', '8', '--device', 'cpu', '--out_dir', str(tmp_path / 'run')]
    mim_pretrain.train(run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, flags), teacher=teacher)
    assert M.load(str(tmp_path / 'run' / 'model.pt')).config.head == teacher.width


def test_using_a_model_prints_what_the_readme_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    readme = (ROOT / 'README.md').read_text()
    exec(next(block for block in blocks(ROOT / 'README.md', 'python') if 'nano-eva.pt' in block), {})
    assert re.search(r'It prints `(.*?)`', readme)[1][:30] == capsys.readouterr().out.strip()[:30]
