"""Masks, loss, baselines and real runs of stage 1."""
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import mim_pretrain
import model as M
import run
from conftest import cut_off
from mim_pretrain import Features, block_mask, interpolate_hidden, make_mask, mim_loss

FOLDERS = os.environ.get('GOLDEN', str(Path(__file__).parent / 'golden')).split(':')
MASKING = [pytest.param(path, id=path.name) for folder in FOLDERS for path in Path(folder).glob('masking*.json')]


def test_loss_ignores_visible_patches():
    """Moving the prediction of a visible patch must not move the loss."""
    predictions, targets = torch.randn(2, 4, 6, 8)                 # each [B=4, N=6, C=8]
    mask = (torch.arange(6) < 3).expand(4, 6)
    before = mim_loss(predictions, targets, mask, mask.sum())
    predictions[:, 3:] += 1
    assert torch.equal(mim_loss(predictions, targets, mask, mask.sum()), before)


def test_loss_of_perfect_directions_is_minus_one():
    """Lengths do not count."""
    targets, mask = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(mim_loss(3 * targets, targets, mask, mask.sum()), torch.tensor(-1.))


@pytest.mark.parametrize('path', MASKING or [pytest.param(None, marks=pytest.mark.skip('no masking.json'))])
def test_block_masks_equal_the_original_generator(path):
    """Number hidden, rate at each position and perimeter, each within sampling error of the original's draws."""
    golden = json.loads(path.read_text())
    params, num = golden['params'], 8000
    grid = params['input_size']
    mask = block_mask(torch.arange(num), grid, params['num_masking_patches'], smallest=params['min_num_patches']).float()
    bound = lambda std: 5 * std * (1 / num + 1 / golden['draws']) ** .5
    total = mask.sum(1)
    assert abs(total.mean() - golden['total_masked']['mean']) < bound(golden['total_masked']['std'])
    assert total.max() == params['num_masking_patches'] and total.min() >= golden['total_masked']['min'] - 4
    rate = torch.tensor(golden['mean_mask']).flatten()
    worst = (mask.mean(0) - rate).abs() / (rate * (1 - rate)).clamp(min=1e-4).sqrt()
    assert worst.max() < bound(1.)
    maps = mask.view(-1, grid, grid)
    perimeter = (maps[:, 1:] != maps[:, :-1]).sum((1, 2)) + (maps[:, :, 1:] != maps[:, :, :-1]).sum((1, 2))
    assert abs(perimeter.float().mean() - golden['perimeter_inner']['mean']) < bound(golden['perimeter_inner']['std'])


@pytest.mark.parametrize('kind, expected', [('random', 26), ('columns', 32)])
def test_masks_hide_the_expected_number(kind, expected):
    assert (make_mask(kind, torch.arange(50), 8, 105 / 256).sum(1) == expected).all()


def test_blocks_are_evas_from_14_x_14_patches_on():
    """EVA's code asks for 16 patches on grids of 14 and of 16 alike; on our 8 x 8 they are of 4."""
    assert [mim_pretrain.smallest_block(grid) for grid in (8, 14, 16, 24)] == [4, 16, 16, 16]


def test_mask_depends_on_its_sample_alone():
    """The same sample has the same mask in any batch, and another with another seed."""
    alone, together = block_mask(torch.tensor([7]), 8, 26), block_mask(torch.arange(20), 8, 26)
    assert torch.equal(alone[0], together[7]) and not torch.equal(together, block_mask(torch.arange(20), 8, 26, seed=1))


def test_interpolation_uses_visible_patches_only():
    """Whatever stands in hidden patches, the filled features are the same; a constant image stays constant."""
    mask = make_mask('block', torch.arange(3), 8, .4)
    features = torch.randn(3, 64, 5)
    filled = interpolate_hidden(features, mask, 8, 1.)
    changed = torch.where(mask[..., None], 100., features)
    torch.testing.assert_close(interpolate_hidden(changed, mask, 8, 1.), filled)
    torch.testing.assert_close(interpolate_hidden(torch.ones(3, 64, 5), mask, 8, 1.), torch.ones(3, 64, 5))


def test_teacher_sees_the_crop_at_its_own_patch_size():
    """A teacher of patch 8 gives as many features as a student of patch 4 has patches."""
    vision = dict(width=16, depth=1, heads=2, mlp_width=32, patch_size=8, image_size=64, head=12)
    teacher = M.init_weights(M.CLIP(M.CLIPConfig(vision, dict(TEXT, embed=12))))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = Features(teacher, grid=8).of(images)
    by_hand = F.interpolate(teacher.normalize(images), size=(64, 64), mode='bicubic', antialias=True)
    torch.testing.assert_close(features, teacher.patch_features(by_hand))


TEXT = dict(width=16, depth=1, heads=2, vocab=600, embed=16)


def small_teacher():
    """A CLIP that never learnt, as wide as pico."""
    vision = dict(M.SIZES['pico'], head=16, pool='mean', mask_token=False)
    return M.init_weights(M.CLIP(M.CLIPConfig(vision, TEXT)))


def config(tmp_path, *flags):
    """A Config whose run takes a second, with a teacher made on the spot."""
    teacher = tmp_path / 'teacher.pt'
    if not teacher.exists():
        M.save(small_teacher(), str(teacher))
    flags = ['--size', 'pico', '--teacher', str(teacher), '--batch_size', '8', '--steps', '6', '--warmup_steps', '2',
             '--log_every', '1', '--out_dir', str(tmp_path / 'run'), '--device', 'cpu', *flags]
    return run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, flags)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(mim_pretrain, 'NUM_EVAL', 32)
    monkeypatch.setattr(run, 'NUM_PROBE', 32)
    monkeypatch.setattr(mim_pretrain, 'BANK', 1024)


def losses(folder):
    return [json.loads(line)['loss'] for line in open(folder / 'log.jsonl')]


def test_stopped_and_resumed_run_has_the_same_losses(tmp_path):
    """A run that ends after step 4 of 6, its last checkpoint at 3, goes on as if it had not."""
    mim_pretrain.train(config(tmp_path))
    straight = losses(tmp_path / 'run')
    cut = config(tmp_path, '--save_every', '3', '--out_dir', str(tmp_path / 'cut'))
    cut_off(mim_pretrain.train, cut)
    mim_pretrain.train(cut)
    assert losses(tmp_path / 'cut') == straight


def test_micro_batches_give_the_loss_of_the_whole(tmp_path, double):
    """Parts with unequal numbers of hidden patches add up to the global mean: in float64, whose log has six digits."""
    mim_pretrain.train(config(tmp_path))
    mim_pretrain.train(config(tmp_path, '--micro_batch', '2', '--out_dir', str(tmp_path / 'micro')))
    assert losses(tmp_path / 'micro') == pytest.approx(losses(tmp_path / 'run'), rel=2e-6)


def test_a_run_leaves_what_the_design_says(tmp_path):
    mim_pretrain.train(config(tmp_path))
    left = {path.name for path in (tmp_path / 'run').iterdir()}
    assert left >= {'model.pt', 'result.json', 'log.jsonl', 'loss.png', 'features.png'}
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result.keys() >= {'cosine', 'baseline', 'inpaint', 'skill', 'seconds', 'parameters', 'command'}
    assert run.read_log(str(tmp_path / 'run'), 'evals.jsonl')[-1]['skill'] == result['skill']


def test_every_recipe_builds_its_own_size(monkeypatch):
    """Also one whose name has a dash, as a reader's own may: it is not taken for another's recipe."""
    monkeypatch.setitem(M.SIZES, 'nano-deep', dict(M.SIZES['nano'], depth=8))
    monkeypatch.setitem(mim_pretrain.RECIPES, 'nano-deep', mim_pretrain.RECIPES['nano'])
    for size in mim_pretrain.RECIPES:
        built = run.vit_config(run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, ['--size', size]))
        assert dataclasses.asdict(built).items() >= M.SIZES[size].items()


def test_position_baseline_is_the_best_constant():
    """No other constant per position has a larger mean cosine on the hidden patches."""
    cfg = type('cfg', (), dict(mask='random', mask_ratio=.4, workers=0))
    target = Features(small_teacher().requires_grad_(False), grid=8)
    val = mim_pretrain.make_validation(cfg, data.World('val'), target, 32, 32, torch.device('cpu'))
    guess = torch.randn(64, 16, requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=.05)
    for _ in range(200):
        loss = mim_loss(guess.expand_as(val.targets), val.targets, val.mask, val.mask.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -1e-3 < val.baseline + loss.item() < 1e-2


def test_eval_and_image_only_look_at_a_trained_model(tmp_path, capsys):
    """--eval prints the run's own skill again, --image leaves a row of pictures, and neither changes the weights."""
    mim_pretrain.train(config(tmp_path))
    before = (tmp_path / 'run' / 'model.pt').read_bytes()
    skill = json.loads((tmp_path / 'run' / 'result.json').read_text())['skill']
    capsys.readouterr()
    mim_pretrain.train(config(tmp_path, '--eval'))
    assert f'skill                {skill:.4g}' in capsys.readouterr().out
    Image.new('L', (50, 70), 90).save(tmp_path / 'grey.png')
    mim_pretrain.train(config(tmp_path, '--image', str(tmp_path / 'grey.png')))
    assert Image.open(tmp_path / 'run' / 'grey.features.png').size[0] > 5 * 128
    assert (tmp_path / 'run' / 'model.pt').read_bytes() == before


def test_a_model_of_clips_is_neither_teacher_nor_student(tmp_path):
    """It has positions for frames that an image has not: one line, before any work."""
    vit = M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['pico'], head=4, frames=2)))
    path = str(tmp_path / 'clips.pt')
    M.save(vit, path)
    for flags in (['--teacher', path], ['--init', path], ['--eval', '--init', path]):
        with pytest.raises(run.Refused, match='clips.pt is a model of clips of 2 frames'):
            mim_pretrain.train(config(tmp_path, *flags))


def test_another_teacher_is_said(tmp_path, monkeypatch, capsys):
    """One of other weights in the same file: the run goes on, in one line."""
    flags = ['--save_every', '3']

    def stop(self, step, **metrics):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, 'say', stop)
        mim_pretrain.train(config(tmp_path, *flags))
    teacher = small_teacher()
    torch.nn.init.normal_(teacher.visual.head.weight)
    M.save(teacher, str(tmp_path / 'teacher.pt'))
    mim_pretrain.train(config(tmp_path, *flags))
    assert capsys.readouterr().out.count('the teacher changed') == 1


def test_weights_then_evaluation_then_pictures_then_result(tmp_path, monkeypatch):
    """What a run leaves comes in the order of its worth."""
    order = []

    def note(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: (order.append(name), function(*args, **options))[1])
    note(run, 'save_model')
    note(mim_pretrain, 'evaluate')
    note(mim_pretrain, 'draw_features')
    note(run, 'draw_loss')
    rename = os.replace
    monkeypatch.setattr(os, 'replace', lambda new, path: (order.append(path.rpartition('/')[2]), rename(new, path)))
    mim_pretrain.train(config(tmp_path))
    assert order[-8:] == ['save_model', 'model.pt', 'evaluate', 'draw_features', 'features.png', 'draw_loss', 'loss.png',
                          'result.json']


def test_a_skill_that_is_undefined_is_null(tmp_path, monkeypatch):
    """Of a single validation image its own mean is the baseline, and cannot be beaten: no number, and no crash."""
    monkeypatch.setattr(mim_pretrain, 'NUM_EVAL', 1)
    mim_pretrain.train(config(tmp_path, '--mask', 'columns'))
    result = json.loads((tmp_path / 'run' / 'result.json').read_text(), parse_constant=lambda name: 1 / 0)
    assert result['baseline'] == pytest.approx(1, abs=1e-6) and isinstance(result['cosine'], float)


def test_what_stands_for_a_broken_image_is_not_judged(tmp_path):
    """Each validation image counts once, also in the probes."""
    for name in ('blue', 'red'):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for n in range(5):
            Image.new('RGB', (40, 40), name).save(tmp_path / 'photos' / name / f'{n}.png')
    (tmp_path / 'photos' / 'red' / '2.png').write_bytes(b'no picture')
    dataset = data.open_data(str(tmp_path / 'photos'), 'test')
    cfg = config(tmp_path)
    assert len(mim_pretrain.make_validation(cfg, dataset, mim_pretrain.Pixels(8), 32, 10, 'cpu').images) == 9
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'knn_accuracy', lambda *examples: seen.append([len(x) for x in examples]))
        patch.setattr(run, 'linear_probe', lambda *examples: None)
        run.probe(lambda images: images.float().flatten(1), dataset, dataset, 8, 10, cfg, 'cpu')
    assert seen == [[9, 9, 9, 9]]


def test_init_continues_from_given_weights(tmp_path):
    """A run that starts from another's model.pt, with a learning rate of nearly nothing, has its last loss."""
    mim_pretrain.train(config(tmp_path))
    init = ['--init', str(tmp_path / 'run' / 'model.pt'), '--lr', '1e-12', '--min_lr', '0']
    mim_pretrain.train(config(tmp_path, *init, '--out_dir', str(tmp_path / 'again')))
    first, again = (json.loads((tmp_path / name / 'result.json').read_text())['cosine'] for name in ('run', 'again'))
    assert abs(first - again) < 1e-5


# targets

def test_token_loss_is_cross_entropy_of_the_nearest_centre():
    """By hand, patch by patch; visible patches do not count."""
    torch.manual_seed(0)
    predictions, targets, mask = torch.randn(2, 5, 7), torch.randn(2, 5, 3), torch.rand(2, 5) < .6
    codebook = F.normalize(torch.randn(7, 3), dim=1)
    losses = []
    for b, n in mask.nonzero().tolist():
        nearest = max(range(7), key=lambda k: F.cosine_similarity(targets[b, n], codebook[k], dim=0))
        losses.append(-predictions[b, n].log_softmax(0)[nearest])
    tokens = mim_pretrain.Tokens(None, grid=1)
    tokens.codebook = codebook
    torch.testing.assert_close(tokens.loss(predictions, targets, mask, mask.sum()), sum(losses) / len(losses))


def test_kmeans_finds_directions_that_are_there(monkeypatch):
    """Points around 8 directions, of any length: the centres are those directions."""
    monkeypatch.setattr(mim_pretrain, 'NUM_CODES', 64)
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(8, 16), dim=1)
    points = (directions.repeat(100, 1) + .02 * torch.randn(800, 16)) * (1 + torch.rand(800, 1))
    centres = mim_pretrain.learn_codebook(points, rounds=10)
    assert ((directions @ centres.T).max(1).values > .99).all() and ((directions @ centres.T).max(0).values > .99).all()
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(64))


def test_normalized_patches_are_mae_targets():
    images, side = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), 4
    patches = mim_pretrain.Pixels(grid=2).of(images)
    patch = images[1, :, side:, :side].float() / 255                               # third patch: below the first
    expected = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    torch.testing.assert_close(patches[1, 2], expected.flatten())


def test_distillation_sees_and_regresses_every_patch(tmp_path):
    """The first step's loss is the unmasked model's cosine over all patches."""
    cfg = config(tmp_path, '--target', 'distill', '--steps', '1')
    mim_pretrain.train(cfg)
    teacher = M.load(cfg.teacher)
    options = M.ViTConfig(**M.SIZES['pico'], head=16, mask_token=False)
    model = M.init_weights(M.ViT(options), cfg.seed, cfg.init_gain)
    images = data.World().batch(torch.arange(8), 32)['images']
    predictions, targets = model(model.normalize(images)), Features(teacher, grid=8).of(images)
    expected = -F.cosine_similarity(predictions, targets, dim=-1).mean().item()
    assert losses(tmp_path / 'run') == [pytest.approx(expected, abs=1e-5)]


def test_another_teacher_layer_is_regressed_whatever_its_width(tmp_path):
    """After the first block pico has 32 channels, where its head has 16; the student predicts as many."""
    mim_pretrain.train(config(tmp_path, '--target_layer', '1', '--steps', '2'))
    assert M.load(str(tmp_path / 'run/model.pt')).config.head == M.SIZES['pico']['width']


def test_pictures_of_losses_show_baselines_under_the_cosine_only(tmp_path, monkeypatch):
    """The loss of pixels is no cosine: nothing to compare with is drawn."""
    drawn = []
    finish = run.Log.finish
    monkeypatch.setattr(run.Log, 'finish', lambda log, model, label, lines, **metrics: drawn.append(len(lines))
                        or finish(log, model, label, lines, **metrics))
    mim_pretrain.train(config(tmp_path, '--steps', '1'))
    mim_pretrain.train(config(tmp_path, '--steps', '1', '--target', 'pixels', '--out_dir', str(tmp_path / 'pixels')))
    assert drawn == [2, 0]


@pytest.mark.parametrize('target', ('clip', 'tokens', 'distill', 'pixels', 'untrained'))
def test_every_target_trains_and_resumes(tmp_path, target, monkeypatch):
    """Two runs of six steps, one of them stopped after three, end with the same result; --eval says it again."""
    monkeypatch.setattr(mim_pretrain, 'NUM_CODES', 32)
    result = lambda name: json.loads((tmp_path / name / 'result.json').read_text())
    mim_pretrain.train(config(tmp_path, '--target', target, '--mask', 'columns'))
    flags = ['--target', target, '--mask', 'columns', '--save_every', '3', '--out_dir', str(tmp_path / 'cut')]
    save_checkpoint = run.save_checkpoint

    def save_and_stop(*args, **options):
        save_checkpoint(*args, **options)
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, 'save_checkpoint', save_and_stop)
        mim_pretrain.train(config(tmp_path, *flags))
    mim_pretrain.train(config(tmp_path, *flags))
    measured = ('cosine', 'skill', 'knn_top1', 'linear_top1', 'knn_unnamed', 'linear_unnamed')
    assert {name: result('run')[name] for name in measured} == {name: result('cut')[name] for name in measured}
    assert target != 'tokens' or M.load(str(tmp_path / 'run/model.pt')).extra['codebook'].shape == (32, 16)


def test_probes_of_any_checkpoint(tmp_path, capsys):
    """--eval --init of a CLIP measures its image tower's patches; of a run's model what the run itself said."""
    mim_pretrain.train(config(tmp_path))
    said = json.loads((tmp_path / 'run/result.json').read_text())
    capsys.readouterr()
    mim_pretrain.train(config(tmp_path, '--eval'))
    out = capsys.readouterr().out
    assert all(f'{name:<20} {said[name]:.4g}' in out for name in ('cosine', 'knn_top1', 'linear_unnamed'))
    mim_pretrain.train(config(tmp_path, '--eval', '--init', str(tmp_path / 'teacher.pt')))
    out = capsys.readouterr().out
    assert 'linear_top1' in out and 'cosine' not in out


def test_probes_see_the_largest_object(monkeypatch):
    """An encoder that is told the kind of the largest object is right about kinds; told its part, about parts."""
    world, scenes = data.World(), {}
    for dataset in (world, data.World('val')):
        batch = dataset.batch(torch.arange(96), 32)
        for image, *answer in zip(batch['images'], batch['kind'], batch['part'], batch['radius'], batch['valid']):
            kind, part, radius, valid = answer
            largest = max(valid.nonzero()[:, 0].tolist(), key=lambda i: radius[i])
            scenes[image.numpy().tobytes()] = kind[largest], part[largest]
    encode = lambda which, num: lambda images: F.one_hot(
        torch.stack([scenes[image.numpy().tobytes()][which] for image in images]), num).float()
    cfg = type('cfg', (), dict(workers=0))
    measure = lambda which, num: run.probe(encode(which, num), world, data.World('val'), 32, 96, cfg, 'cpu')
    assert measure(0, 16)['linear_top1'] > .9 and measure(1, 4)['linear_unnamed'] == measure(1, 4)['knn_unnamed'] == 1


def test_eval_is_how_evas_own_cosine_is_measured(tmp_path, monkeypatch, capsys):
    """A released EVA with OpenAI's CLIP as teacher: the mean cosine on even tokens of the evaluation view, by hand."""
    from test_golden import fixtures, read
    evas, clips = ([read(mark.values[0])[1] for mark in fixtures(name, but='jit') if mark.values[0]]
                   for name in ('eva01_mim*.pt', 'openai_clip*.pt'))
    pairs = [(eva, clip) for eva in evas for clip in clips if len(eva['lm_head.weight']) == clip['visual.proj'].shape[1]]
    if not pairs:
        pytest.skip('no fixtures of an EVA-01 and an OpenAI CLIP of one width')
    torch.save({'model': pairs[0][0]}, tmp_path / 'eva_psz14.pt')
    torch.save(pairs[0][1], tmp_path / 'ViT-L-14.pt')
    for split in ('train', 'val'):
        for name in ('n01440764', 'n01443537'):
            (tmp_path / f'IN1K/{split}/{name}').mkdir(parents=True)
            for i in range(6):
                pixels = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / f'IN1K/{split}/{name}/{i}.png')
    model, teacher = M.load(str(tmp_path / 'eva_psz14.pt')), M.load(str(tmp_path / 'ViT-L-14.pt'))
    cosines = []
    for path in (tmp_path / 'IN1K/val').glob('*/*.png'):
        image = data.load_view(path, model.image_size)[None]
        grid, even = model.grid, torch.arange(0, model.grid ** 2, 2)
        mask = torch.zeros(1, grid ** 2, dtype=torch.bool)
        mask[:, even] = True
        size = grid * teacher.visual.patch_size
        crop = F.interpolate(teacher.normalize(image), size=(size, size), mode='bicubic', antialias=True)
        with torch.no_grad():
            cosines.append(F.cosine_similarity(model(model.normalize(image), mask)[:, even],
                                               teacher.patch_features(crop)[:, even], dim=-1).mean())
    monkeypatch.chdir(tmp_path)
    command = 'mim_pretrain.py --eval --init eva_psz14.pt --teacher ViT-L-14.pt --data IN1K --mask columns'
    monkeypatch.setattr(sys, 'argv', command.split())
    run.main(mim_pretrain.train, mim_pretrain.Config, mim_pretrain.RECIPES)
    found = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()
                 if line.startswith(('cosine', 'linear_top1')))
    assert float(found['cosine']) == pytest.approx(torch.stack(cosines).mean().item(), abs=2e-4)
    assert 'linear_top1' in found


def test_b_on_real_images_takes_openais_clip_checked(tmp_path, monkeypatch):
    """The file fetched is ViT-L/14, wanted with the SHA-256 that OpenAI's address holds; another size takes none."""
    wanted = []
    monkeypatch.setattr(data, 'fetch', lambda url, sha256, path, advice: wanted.append((url, sha256)) or path)
    cfg = run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, ['--size', 'b', '--data', str(tmp_path)])
    assert mim_pretrain.find_teacher(cfg).endswith('ViT-L-14.pt')
    (url, sha256), = wanted
    assert url.endswith('/ViT-L-14.pt') and sha256 in url and len(sha256) == 64


# more than EVA

def final_config(folder):
    return M.load(str(folder / 'model.pt')).config


def test_eva02_trains_from_scratch(tmp_path):
    """--arch eva02 alone changes the blocks: SwiGLU and rotary positions, as config_of has them."""
    mim_pretrain.train(config(tmp_path, '--arch', 'eva02', '--size', 'nano', '--steps', '2'))
    expected = M.ViTConfig(**M.config_of('nano', 'eva02'), head=16)
    assert final_config(tmp_path / 'run') == expected


@pytest.mark.parametrize('size', ('ti', 's', 'b', 'l'))
def test_eva02_on_real_images_names_the_teacher_to_fetch(tmp_path, size):
    """EVA-CLIP-g is nothing that a command fetches unasked: one line with its file's name."""
    flags = ['--size', size, '--arch', 'eva02', '--data', str(tmp_path)]
    cfg = run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, flags)
    with pytest.raises(run.Refused, match='--teacher EVA01_CLIP_g_14_psz14_s11B.pt$'):
        mim_pretrain.find_teacher(cfg)


@pytest.mark.parametrize('size, batch, epochs, lr, drop_path', [
    ('ti', 4000, 240, 3e-3, 0), ('s', 4000, 240, 3e-3, 0), ('b', 2048, 150, 1.5e-3, 0), ('l', 2048, 150, 1.5e-3, .1)])
def test_recipes_of_ti_to_l_are_eva02s(size, batch, epochs, lr, drop_path):
    """Its table of settings, with the 14.2M images of ImageNet-21K; one epoch is warm-up."""
    cfg = run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, ['--size', size])
    epoch = 14.2e6 / batch
    assert (cfg.batch_size, cfg.lr, cfg.drop_path, cfg.weight_decay) == (batch, lr, drop_path, .05)
    assert cfg.warmup_steps == pytest.approx(epoch, rel=1e-3)
    assert cfg.steps == pytest.approx(epochs * epoch, rel=1e-3)


def start_file(tmp_path, kind):
    """A file to go on from, of another size than pico."""
    if kind == 'assets':
        return str(Path(mim_pretrain.__file__).parent / 'assets' / 'nano-eva.pt')
    path = str(tmp_path / f'{kind}.pt')
    options = dict(M.config_of('nano', 'eva02'), depth=2, mlp_norm=kind == 'released', head=24)
    M.save(M.init_weights(M.ViT(M.ViTConfig(**options)), seed=5), path, names='eva' if kind == 'released' else 'ours')
    return path


@pytest.mark.parametrize('kind', ('assets', 'ours', 'released'))
def test_init_keeps_the_files_architecture(tmp_path, kind):
    """Whatever --size and --arch say: only the head is as wide as the teacher's features."""
    path = start_file(tmp_path, kind)
    arch = 'eva02' if kind == 'assets' else 'eva'
    mim_pretrain.train(config(tmp_path, '--init', path, '--arch', arch, '--steps', '2'))
    assert final_config(tmp_path / 'run') == dataclasses.replace(M.load(path).config, head=16)


def test_init_goes_on_from_the_files_weights(tmp_path):
    """With a rate of nothing an EVA-02 is left as the file has it."""
    path = start_file(tmp_path, 'ours')
    mim_pretrain.train(config(tmp_path, '--init', path, '--lr', '0', '--min_lr', '0', '--steps', '2'))
    theirs = M.load(path).state_dict()
    for name, weight in M.load(str(tmp_path / 'run' / 'model.pt')).state_dict().items():
        assert name.startswith('head.') or torch.equal(weight, theirs[name])


def test_registers_are_learnt(tmp_path):
    """They move away from where they began, and are no patches: predictions stay one a patch."""
    cfg = config(tmp_path, '--registers', '3', '--steps', '3')
    mim_pretrain.train(cfg)
    model = M.load(str(tmp_path / 'run' / 'model.pt'))
    began = M.init_weights(M.ViT(model.config), cfg.seed, cfg.init_gain)
    assert model.registers.shape == (1, 3, 32) and not torch.allclose(model.registers, began.registers, atol=1e-5)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 16)


def test_loss_on_all_has_a_mean_of_each_part(tmp_path):
    """The first step's loss: half the hidden patches' mean cosine, half the visible ones', by hand."""
    cfg = config(tmp_path, '--loss_on', 'all', '--steps', '1')
    mim_pretrain.train(cfg)
    model = M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['pico'], head=16)), cfg.seed, cfg.init_gain)
    images = data.World().batch(torch.arange(8), 32)['images']
    mask = make_mask('block', torch.arange(8), 8, cfg.mask_ratio)
    targets = Features(M.load(cfg.teacher), grid=8).of(images)
    cosines = F.cosine_similarity(model(model.normalize(images), mask), targets, dim=-1)
    expected = -(cosines[mask].mean() + cosines[~mask].mean()).item() / 2
    assert losses(tmp_path / 'run') == [pytest.approx(expected, abs=1e-5)]


def test_micro_batches_of_all_patches_add_up(tmp_path, double):
    """Hidden and visible patches are counted over the whole batch, not over its parts."""
    flags = ['--loss_on', 'all', '--steps', '3']
    mim_pretrain.train(config(tmp_path, *flags))
    mim_pretrain.train(config(tmp_path, *flags, '--micro_batch', '2', '--out_dir', str(tmp_path / 'micro')))
    assert losses(tmp_path / 'micro') == pytest.approx(losses(tmp_path / 'run'), rel=2e-6)


@pytest.mark.parametrize('norm, deviates', [('centre', False), ('standard', True)])
def test_targets_are_centred_or_standardised_a_channel(norm, deviates):
    """Over the bank they have mean 0, and with `standard` deviation 1, else the teacher's own."""
    target = Features(small_teacher().requires_grad_(False), grid=8)
    bank = data.World().batch(torch.arange(16), 32)['images']
    plain = target.of(bank).flatten(0, 1)
    cfg = type('cfg', (), dict(target='clip', target_layer=0, target_norm=norm))
    mim_pretrain.settle_target(target, cfg, {}, bank)
    found = target.of(bank).flatten(0, 1)
    torch.testing.assert_close(found.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    expected = torch.ones(16) if deviates else plain.std(0)
    torch.testing.assert_close(found.std(0), expected, atol=1e-3, rtol=1e-3)


def other_teacher(tmp_path):
    """A ViT of other patches and width, without a head."""
    path = tmp_path / 'other.pt'
    options = dict(width=24, depth=1, heads=2, mlp_width=32, patch_size=8, image_size=32, mask_token=False)
    M.save(M.init_weights(M.ViT(M.ViTConfig(**options)), seed=1), str(path))
    return path


def two_teachers(tmp_path):
    return f'{tmp_path}/teacher.pt,{other_teacher(tmp_path)}'


@pytest.mark.parametrize('flags', (['two'], ['--target_norm', 'standard', '--mask', 'roll']), ids=('two', 'standard'))
def test_statistics_are_constants_of_the_run(tmp_path, flags, monkeypatch):
    """A run that stopped goes on with those that it began with, and measures none."""
    flags = ['--teacher', two_teachers(tmp_path)] if flags == ['two'] else flags
    mim_pretrain.train(config(tmp_path, *flags, '--steps', '2'))
    cut = config(tmp_path, *flags, '--steps', '2', '--save_every', '1', '--out_dir', str(tmp_path / 'cut'))

    def stop(self, step, **metrics):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, 'say', stop)
        mim_pretrain.train(cut)
    monkeypatch.setattr(mim_pretrain, 'measure_statistics', None)
    mim_pretrain.train(cut)
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'run')


def test_eval_of_two_teachers_says_the_skill_again(tmp_path, capsys):
    """The model keeps their statistics; in another order they are refused."""
    config(tmp_path)        # makes the first teacher
    teachers = two_teachers(tmp_path)
    mim_pretrain.train(config(tmp_path, '--teacher', teachers, '--steps', '4'))
    said = json.loads((tmp_path / 'run/result.json').read_text())
    assert final_config(tmp_path / 'run').head == 16 + 24
    capsys.readouterr()
    mim_pretrain.train(config(tmp_path, '--teacher', teachers, '--eval'))
    assert f'skill                {said["skill"]:.4g}' in capsys.readouterr().out
    turned = ','.join(reversed(teachers.split(',')))
    with pytest.raises(run.Refused, match='in their order'):
        mim_pretrain.train(config(tmp_path, '--teacher', turned, '--eval'))


@pytest.mark.parametrize('flags', (['--target_layer', '1'], ['--target', 'tokens', '--target_norm', 'standard']),
                         ids=('layer', 'tokens'))
def test_a_model_knows_what_it_predicts(tmp_path, flags, capsys, monkeypatch):
    """--eval without the run's flags says its skill again."""
    monkeypatch.setattr(mim_pretrain, 'NUM_CODES', 32)
    mim_pretrain.train(config(tmp_path, *flags, '--steps', '4'))
    said = json.loads((tmp_path / 'run/result.json').read_text())
    capsys.readouterr()
    mim_pretrain.train(config(tmp_path, '--eval'))
    assert f'skill                {said["skill"]:.4g}' in capsys.readouterr().out


def test_a_model_knows_its_teacher(tmp_path, capsys):
    """--eval with another one of the same width says so."""
    mim_pretrain.train(config(tmp_path, '--steps', '2'))
    teacher = small_teacher()
    torch.nn.init.normal_(teacher.visual.head.weight)
    M.save(teacher, str(tmp_path / 'other.pt'))
    for name, times in (('teacher.pt', 0), ('other.pt', 1)):
        capsys.readouterr()
        mim_pretrain.train(config(tmp_path, '--eval', '--teacher', str(tmp_path / name)))
        assert capsys.readouterr().out.count('learnt from another teacher') == times


def test_codes_of_another_width_are_refused(tmp_path, monkeypatch):
    """The centres are vectors of the teacher's features."""
    monkeypatch.setattr(mim_pretrain, 'NUM_CODES', 32)
    mim_pretrain.train(config(tmp_path, '--target', 'tokens', '--steps', '2'))
    with pytest.raises(run.Refused, match='learnt from other teachers'):
        mim_pretrain.train(config(tmp_path, '--eval', '--teacher', str(other_teacher(tmp_path))))


def test_a_classifier_is_no_teacher(tmp_path):
    """Its head never saw a single patch."""
    path = str(tmp_path / 'classes.pt')
    M.save(M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['pico'], head=4, pool='mean'))), path)
    with pytest.raises(run.Refused, match='classes.pt is a classifier'):
        mim_pretrain.train(config(tmp_path, '--teacher', path))


def test_a_readers_teacher_judges_its_student(tmp_path, capsys):
    """train(cfg, teacher) with --eval says the run's skill again."""
    teacher = small_teacher().requires_grad_(False)
    mim_pretrain.train(config(tmp_path, '--steps', '4'), teacher=teacher)
    said = json.loads((tmp_path / 'run/result.json').read_text())
    capsys.readouterr()
    cfg = config(tmp_path, '--eval')
    cfg.teacher = ''
    mim_pretrain.train(cfg, teacher=teacher)
    assert f'skill                {said["skill"]:.4g}' in capsys.readouterr().out


def several(scale=1.):
    """Two teachers with statistics; the second's features are multiplied by scale."""
    targets = []
    for seed in range(2):
        teacher = M.ViT(M.ViTConfig(**M.SIZES['pico'], head=8 + seed))
        teacher = M.init_weights(teacher, seed).requires_grad_(False)
        targets.append(Features(teacher, grid=8))
    teacher.head.weight.mul_(scale)
    target = mim_pretrain.Several(targets)
    images = data.World().batch(torch.arange(8), 32)['images']
    cfg = type('cfg', (), dict(target='clip', target_layer=0, target_norm='none'))
    mim_pretrain.settle_target(target, cfg, {}, images)
    return target, images


def test_two_teachers_have_a_head_and_a_mean_each():
    """The loss is the mean of what each gives alone, on its own channels of the predictions."""
    target, images = several()
    torch.manual_seed(0)
    predictions = torch.randn(8, 64, 8 + 9)
    mask = make_mask('block', torch.arange(8), 8, .4)
    alone = []
    for part, ours in zip(target.targets, (predictions[..., :8], predictions[..., 8:])):
        alone.append(mim_loss(ours, part.of(images), mask, mask.sum()))
    together = target.loss(predictions, target.of(images), mask, mask.sum())
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
    found = mim_pretrain.hidden_cosine(target, target.read(predictions), target.of(images), mask)
    assert found == pytest.approx(-together.item(), abs=1e-6)


def test_a_teachers_scale_does_not_count():
    """One of features ten times as large has the same targets: each is standardised by its own statistics."""
    (plain, images), (scaled, _) = several(), several(10.)
    torch.testing.assert_close(scaled.of(images), plain.of(images), atol=1e-2, rtol=0)
    assert plain.targets[1].statistics[1].max() < .2 * scaled.targets[1].statistics[1].min()


def test_a_rolled_mask_is_the_block_mask_moved_around():
    """Over one edge and in at the other, by rows and columns of its own."""
    index = torch.arange(20)
    masks = block_mask(index, 8, 26, seed=3).view(-1, 8, 8)
    rolled = make_mask('roll', index, 8, 26 / 64, seed=3).view(-1, 8, 8)
    found = []
    for mask, moved in zip(masks, rolled):
        shifts = [(y, x) for y in range(8) for x in range(8) if torch.equal(moved, mask.roll((-y, -x), (0, 1)))]
        found.append(shifts[0] if shifts else None)
    assert None not in found and len(set(found)) > 10


def test_rolled_masks_hide_every_place_as_often():
    """Within sampling error; blocks alone hide the middle more than the corners."""
    num = 8000
    rates = {kind: make_mask(kind, torch.arange(num), 8, 26 / 64).float().mean(0) for kind in ('block', 'roll')}
    bound = 5 * (.4 * .6 / num) ** .5
    spread = {kind: (rate - rate.mean()).abs().max().item() for kind, rate in rates.items()}
    assert spread['roll'] < bound < spread['block'] / 2


@pytest.mark.parametrize('flags, expected', [
    (['--teacher', 'a.pt,b.pt', '--target', 'tokens'], '--target tokens has one teacher'),
    (['--teacher', 'a.pt,b.pt', '--target', 'pixels'], '--target pixels has one teacher'),
    (['--teacher', 'a.pt,b.pt', '--target_norm', 'centre'], '--target_norm centre'),
    (['--teacher', 'a.pt,b.pt'], 'a.pt does not exist'),
    (['--target', 'pixels', '--target_norm', 'standard'], '--target_norm is of the features of a teacher'),
    (['--target', 'distill', '--loss_on', 'all'], '--loss_on all'),
    (['--arch', 'eva02'], "has no size 'pico'"),
    (['--mask', 'roll', '--mask_ratio', '.01'], 'roll masks hide 4 to 63'),
])
def test_what_does_not_go_together_is_one_line(tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(run.Refused) as error:
        mim_pretrain.train(config(tmp_path, *flags))
    assert expected in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('names, expected', [
    (['text_model.embeddings.token_embedding.weight', 'text_model.final_layer_norm.bias'], 'a text tower'),
    (['stem.weight', 'stages.0.bias'], 'known are')])
def test_a_file_that_is_no_teacher_is_one_line(tmp_path, names, expected):
    """A text tower alone, and an unknown family; also as the second of two."""
    path = str(tmp_path / 'x.pt')
    torch.save({name: torch.zeros(4, 4) for name in names}, path)
    cfg = config(tmp_path)
    for teacher in (path, f'{cfg.teacher},{path}'):
        with pytest.raises(run.Refused, match=f'x.pt: [^\\n]*{expected}[^\\n]*$'):
            mim_pretrain.train(config(tmp_path, '--teacher', teacher))


def test_a_teacher_of_another_grid_is_one_line(tmp_path):
    """A module whose features are not one for each patch of the student."""
    teacher = small_teacher().requires_grad_(False)
    features = teacher.patch_features
    teacher.patch_features = lambda images: features(images)[:, 1:]
    with pytest.raises(run.Refused, match='63 features of an image that the student sees as 8 x 8 patches'):
        mim_pretrain.train(config(tmp_path), teacher=teacher)
