"""Commands as a user types them: what is refused is one line and exit code 2, before any work."""
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import clip_train
import mim_pretrain
import model as M
import run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def refusal(monkeypatch, capsys, stage, *flags):
    """The one line that a stage's command prints when it refuses."""
    monkeypatch.setattr(sys, 'argv', [stage.__name__ + '.py', *flags])
    with pytest.raises(SystemExit) as stop:
        run.main(stage.train, stage.Config, stage.RECIPES)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: ')
    return lines[0]


@pytest.mark.parametrize('flags, expected', [
    (['--size', 'huge'], 'pico, nano'),
    (['--batch_size', '0'], '--batch_size 0'),
    (['--data', 'nowhere'], 'nowhere'),
    (['--data', 'shapes:objects=99'], 'objects=99'),
    (['--data', 'shapes:colour=3'], 'colour'),
    (['--mask', 'round'], 'block, random, columns'),
    (['--mask_ratio', '1.5'], 'mask_ratio'),
    (['--mask_ratio', '.001'], 'hides 0 of 64'),
    (['--patch_size', '16'], 'hides 2 of 4'),
    (['--epochs', '1'], 'shapes:unique=N'),
    (['--betas', '.9'], 'a constant'),
    (['--plan'], 'studies/plan.py'),
    (['--image', 'missing.jpg'], 'model.pt'),
    (['--patch_size', '5'], 'multiple of 5'),
    (['--device', 'abacus'], 'abacus'),
    (['--steps', '5', '--epochs', '1'], '--epochs'),
    (['--teacher', 'missing.pt'], 'missing.pt'),
    (['--nonsense'], 'nonsense')])
def test_pretraining_refuses_in_one_line(monkeypatch, capsys, tmp_path, flags, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(monkeypatch, capsys, mim_pretrain, *flags)


def test_a_teacher_that_is_not_one_is_refused(monkeypatch, capsys, tmp_path):
    """A picture cannot teach."""
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (8, 8)).save('picture.pt', 'PNG')
    assert 'picture.pt' in refusal(monkeypatch, capsys, mim_pretrain, '--teacher', 'picture.pt')


def test_an_empty_folder_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.mkdir('empty')
    assert 'empty' in refusal(monkeypatch, capsys, mim_pretrain, '--data', 'empty')


def test_clip_refuses_pictures_without_words(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.mkdir('flat')
    for n in range(4):
        Image.new('RGB', (40, 40), (n, 0, 0)).save(f'flat/{n}.png')
    assert 'captions' in refusal(monkeypatch, capsys, clip_train, '--data', 'flat')
    assert 'contrast' in refusal(monkeypatch, capsys, clip_train, '--batch_size', '1')


def test_an_unwritable_out_dir_is_refused(monkeypatch, capsys, tmp_path):
    """Here a file stands where the folder should be: that stops root too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').write_text('')
    assert 'taken' in refusal(monkeypatch, capsys, clip_train, '--out_dir', 'taken/run')


def test_plan_counts_the_papers_parameters(tmp_path):
    """The real command, with neither data nor teacher."""
    command = [sys.executable, os.path.join(ROOT, 'studies', 'plan.py'), '--size', 'g']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '1,012,229,632' in done.stdout and not os.listdir(tmp_path)


def test_unfinished_run_with_other_options_is_refused(tmp_path, monkeypatch, capsys):
    """The differences are named; options that do not change weights may differ."""
    monkeypatch.chdir(tmp_path)
    flags = ['--size', 'pico', '--steps', '4', '--batch_size', '4', '--out_dir', 'run', '--device', 'cpu']
    cfg = run.parse_config(clip_train.Config, clip_train.RECIPES, flags)
    model = M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['pico'])))
    run.save_checkpoint('run', 2, model, run.make_optimizer(model, cfg), cfg)
    line = refusal(monkeypatch, capsys, clip_train, *flags[:-2], '--lr', '0.5', '--log_every', '3')
    assert '--lr 0.5' in line and 'log_every' not in line


def test_a_truncated_image_among_good_ones_is_reported(tmp_path, capsys, monkeypatch):
    """Training goes on, and says which picture it replaced."""
    monkeypatch.setattr(clip_train, 'NUM_EVAL', 8)
    for colour in ('red', 'green'):
        for split in ('train', 'val'):
            (tmp_path / 'photos' / split / colour).mkdir(parents=True)
            for n in range(3):
                noise = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
                Image.fromarray(noise).save(tmp_path / 'photos' / split / colour / f'{n}.jpg')
    broken = tmp_path / 'photos' / 'train' / 'red' / '1.jpg'
    broken.write_bytes(broken.read_bytes()[:300])
    flags = ['--size', 'pico', '--data', str(tmp_path / 'photos'), '--steps', '2', '--batch_size', '6', '--out_dir',
             str(tmp_path / 'out'), '--device', 'cpu']
    clip_train.train(run.parse_config(clip_train.Config, clip_train.RECIPES, flags))
    assert '1 of 6 images could not be read' in capsys.readouterr().out
