"""Commands as a user types them: what is refused is one line and exit code 2, before any work."""
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import clip_train
import data
import detect_seg
import finetune
import mim_pretrain
import model as M
import run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEACHER = os.path.join(ROOT, 'assets', 'nano-teacher.pt')


def refusal(monkeypatch, capsys, stage, *flags):
    """The one line that a stage's command prints when it refuses."""
    monkeypatch.setattr(sys, 'argv', [stage.__name__ + '.py', *flags])
    with pytest.raises(SystemExit) as stop:
        run.main(stage.train, stage.Config, stage.RECIPES)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: ')
    return lines[0]


@pytest.mark.parametrize('flags, expected', [
    (['--size', 'huge'], 'femto, 24x3, pico'),
    (['--batch_size', '0'], '--batch_size 0'),
    (['--data', 'nowhere'], 'nowhere'),
    (['--data', 'shapes:objects=99'], 'objects=99'),
    (['--data', 'shapes:colour=3'], 'colour'),
    (['--mask', 'round'], 'block, random, columns'),
    (['--mask_ratio', '1.5'], 'mask_ratio'),
    (['--mask_ratio', '.001'], 'hides 0 of 64'),
    (['--patch_size', '16'], '2 x 2 patches are too small for block masks'),
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


HUGE = '99999999999999999999'
OUT_OF_BOUNDS = {
    run.Run: [
        ('size', ['', 'gg']), ('data', ['']), ('steps', ['0', '-1', HUGE, '1e3', 'nan', '']), ('epochs', ['-1', 'nan', 'inf', '1e308', 'x']),
        ('batch_size', ['0', '-4', HUGE, '2.5']), ('lr', ['-1', 'nan', 'inf', '1e308']), ('image_size', ['-4', HUGE, '1000000']),
        ('patch_size', ['-1', HUGE, '2000']), ('seed', ['-1', '128', HUGE]), ('save_every', ['0', HUGE]), ('log_every', ['0', '-1']),
        ('workers', ['-1', '1000', HUGE]), ('drop_path', ['-0.1', '1', 'nan', 'inf']), ('warmup_steps', ['-1', HUGE]),
    ],
    mim_pretrain: [
        ('target', ['', 'CLIP']), ('mask', ['', 'round']), ('mask_ratio', ['-1', '1e308', 'nan']), ('target_layer', ['-1', HUGE]),
        ('init_gain', ['-1', 'inf', '1e308']), ('micro_batch', ['-1', HUGE]), ('cooldown', ['-1', HUGE]),
        ('weight_decay', ['-1', 'nan', '1e308']), ('min_lr', ['-1', 'inf']), ('target_norm', ['', 'std']),
        ('loss_on', ['', 'visible']), ('registers', ['-1', '1025', HUGE]),
    ],
    clip_train: [
        ('embed', ['0', '-1', HUGE]), ('drop_tokens', ['1', '-1', 'nan']), ('optimizer', ['', 'sgd']), ('text_lr', ['-1', 'nan', '1e308']),
        ('layer_decay', ['-1', '1.5', 'nan']),
    ],
    finetune: [
        ('probe', ['knn']), ('frames', ['-1', HUGE]), ('pool', ['', 'map']), ('smoothing', ['-1', '1.1', 'nan']), ('mixup', ['2', 'nan']),
        ('cutmix', ['-1', 'inf']), ('augment', ['all']), ('layer_decay', ['-1', '1e308']), ('ema', ['1', '-1', 'nan']), ('micro_batch', ['-1']),
    ],
    detect_seg: [
        ('head', ['', 'mask']), ('vocabulary', ['', 'all']), ('stages', ['0', '6', HUGE]), ('window', ['-1', '1000', HUGE]),
        ('scale_jitter', ['', '1', '1,2,3', '2,1', '0,1', 'nan,1', '1,nan', 'inf,inf', '1,1e308', 'a,b', '1,']),
        ('scales', ['', '0', '-1', 'inf', 'nan', '1,nan', '1e308', 'x', '1,,2']), ('layer_decay', ['1e308', 'nan', '-1']),
    ],
}
STAGES = mim_pretrain, clip_train, finetune, detect_seg
BOUNDS = [(stage, name, value) for stage in STAGES for owner in (run.Run, stage)
          for name, values in OUT_OF_BOUNDS[owner] for value in values]


@pytest.mark.parametrize('stage, name, value', BOUNDS, ids=[f'{stage.__name__} {name}={value}' for stage, name, value in BOUNDS])
def test_what_no_option_takes_is_one_line_with_its_name(stage, name, value):
    """Zeros, negatives, numbers beyond any computer, NaN, other types, too few or too many: before any work."""
    with pytest.raises(run.Refused, match=f'--{name}[^\\n]*$'):
        run.parse_config(stage.Config, stage.RECIPES, [f'--{name}={value}'])


@pytest.mark.parametrize('name', ['image_size', 'patch_size'])
@pytest.mark.parametrize('stage', STAGES)
def test_no_pixels_are_the_sizes_own(stage, name):
    """Or its recipe's, as --help says."""
    flags = ['--size', 'pico']
    as_it_is = run.parse_config(stage.Config, stage.RECIPES, flags)
    assert run.parse_config(stage.Config, stage.RECIPES, [*flags, f'--{name}=0']) == as_it_is


@pytest.mark.parametrize('stage, flags, expected', [
    (mim_pretrain, ['--image_size', '2'], 'multiple of 4'),
    (mim_pretrain, ['--image_size', '8192', '--patch_size', '1'], 'tokens'),
    (mim_pretrain, ['--batch_size', '6', '--micro_batch', '4'], 'multiple of 4'),
    (mim_pretrain, ['--steps', '10', '--cooldown', '20'], '--cooldown 20'),
    (mim_pretrain, ['--target', 'pixels', '--target_layer', '3'], '--target_layer'),
    (mim_pretrain, ['--target_layer', '100', '--teacher', TEACHER], '--target_layer 100'),
    (mim_pretrain, ['--mask_ratio', '0'], '--mask_ratio'),
    (clip_train, ['--image_size', '30'], 'use 28 or 32'),
    (clip_train, ['--words', 'a dog'], '--words'),
    (clip_train, ['--text_lr', '1', '--lr', '0'], '--text_lr'),
    (finetune, ['--init', 'scratch', '--image_size', '2'], 'multiple of 4'),
    (finetune, ['--init', 'scratch', '--frames', '1024', '--image_size', '1024'], 'tokens'),
    (finetune, ['--init', 'scratch', '--mapping', 'names.txt'], '--mapping'),
    (finetune, ['--init', 'scratch', '--cutmix', '1e-30'], '--cutmix'),
    (detect_seg, ['--image_size', '4'], 'multiple of 8'),
    (detect_seg, ['--patch_size', '2', '--image_size', '64'], 'patch_size 2 is not a multiple of 4'),
    (detect_seg, ['--window', '250'], 'window'),
    (detect_seg, ['--head', 'linear', '--image_size', '8000'], 'tokens'),
    (detect_seg, ['--image_size', '8'], 'one patch'),
    (detect_seg, ['--head', 'linear', '--window', '2'], '--window'),
    (detect_seg, ['--head', 'linear', '--adapter'], '--adapter'),
    (detect_seg, ['--head', 'mask2former', '--image_size', '64', '--patch_size', '64'], 'one patch'),
])
def test_options_that_do_not_go_together_are_one_line(monkeypatch, capsys, tmp_path, stage, flags, expected):
    """Each alone is within its bounds."""
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(monkeypatch, capsys, stage, '--size', 'pico', *flags)


@pytest.mark.parametrize('stage, flags', [(mim_pretrain, ['--teacher', TEACHER]), (clip_train, []),
                                          (finetune, ['--init', 'scratch'])])
def test_a_training_that_cannot_fit_is_one_line(monkeypatch, capsys, tmp_path, stage, flags):
    """Where there is a megabyte: before any step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, 'free_memory', lambda device: 1e6)
    monkeypatch.setattr(data.World, 'some_captions', lambda world, num: ['two blue rings'])
    assert 'training needs' in refusal(monkeypatch, capsys, stage, '--size', 'pico', '--device', 'cpu', *flags)


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
    assert 'no caption for any' in refusal(monkeypatch, capsys, clip_train, '--data', 'flat')
    assert 'contrast' in refusal(monkeypatch, capsys, clip_train, '--batch_size', '1')


def test_an_unwritable_out_dir_is_refused(monkeypatch, capsys, tmp_path):
    """Here a file stands where the folder should be: that stops root too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').write_text('')
    assert 'taken' in refusal(monkeypatch, capsys, clip_train, '--out_dir', 'taken/run')


def test_plan_counts_the_papers_parameters(tmp_path):
    """The real command, with neither data nor teacher."""
    flags = ['--size', 'g', '--devices', '128', '--micro_batch', '32']
    command = [sys.executable, os.path.join(ROOT, 'studies', 'plan.py'), *flags]
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
