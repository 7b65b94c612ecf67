"""Fine-tuning: its losses and mixing against plain references, clips, the head, evaluation, and real commands."""
import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import data
import finetune
import model as M
import run
from test_commands import refusal
from test_distributed import finish, launch, small
from test_golden import close, fixtures, read

PICO = M.ViTConfig(**M.SIZES['pico'])


def config(*flags):
    return run.parse_config(finetune.Config, finetune.RECIPES, ['--size', 'pico', '--device', 'cpu', *map(str, flags)])


def losses(folder):
    return [(line['step'], line['loss']) for line in run.read_log(str(folder))]


def class_folders(root, classes=('ant', 'bee', 'cow'), num=4, splits=('train', 'val'), size=(40, 32)):
    """Noise photos, brighter from class to class."""
    rng = np.random.default_rng(0)
    for split in splits:
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for n in range(num):
                pixels = rng.integers(60 * k, 60 * k + 60, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{split}{n}.png')
    return str(root)


# losses and mixing

def test_smoothed_cross_entropy_equals_a_plain_one():
    """(1 - s) of the class's own, and s of the mean over classes."""
    logits, labels = torch.randn(5, 7), torch.tensor([0, 3, 6, 3, 1])
    logp = logits.log_softmax(1)
    plain = -(.7 * logp[range(5), labels] + .3 * logp.mean(1)).mean()
    torch.testing.assert_close(F.cross_entropy(logits, finetune.soft_labels(labels, 7, .3)), plain)


def test_mixup_equals_a_plain_one():
    """Pixels and targets of neighbours share one weight."""
    images, targets, u = torch.randn(4, 3, 6, 6), torch.eye(4), torch.rand(67)
    mixed, mixed_targets = finetune.mix_images(images, targets, .8, 0, u)
    weight = finetune.beta(.8, u[3:])
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        torch.testing.assert_close(mixed[i], weight * images[i] + (1 - weight) * images[j])
        torch.testing.assert_close(mixed_targets[i], weight * targets[i] + (1 - weight) * targets[j])


def test_cutmix_targets_are_the_shares_of_pixels():
    """Every pixel is the image's or its neighbour's; the neighbour's are a rectangle, their share the target's."""
    images = torch.arange(4.)[:, None, None, None].expand(4, 3, 20, 20)
    for n in range(20):
        mixed, targets = finetune.mix_images(images, torch.eye(4), 0, 1, data.uniform(0, 'test', torch.tensor(n), 67))
        for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
            pasted = mixed[i, 0] == j
            assert (pasted | (mixed[i, 0] == i)).all() and (mixed[i] == mixed[i, :1]).all()
            assert torch.equal(pasted, pasted.any(1)[:, None] & pasted.any(0))
            torch.testing.assert_close(targets[i, j], pasted.float().mean())


def test_a_batch_mixes_alike_however_it_is_divided():
    images, targets, u = torch.randn(8, 3, 6, 6), torch.eye(8), torch.rand(67)
    for mixup, cutmix in ((.8, 0), (0, 1), (.8, 1)):
        whole, halves = finetune.mix_images(images, targets, mixup, cutmix, u), [
            finetune.mix_images(images[part], targets[part], mixup, cutmix, u) for part in (slice(0, 4), slice(4, 8))]
        for a, b in zip(whole, zip(*halves)):
            assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize('alpha', [.2, .8, 1])
def test_beta_has_the_moments_of_beta(alpha):
    """Mean 1/2, variance 1 / (4 (2 alpha + 1))."""
    x = torch.tensor([finetune.beta(alpha, u) for u in data.uniform(0, 'test', torch.arange(2000), 64)])
    assert abs(x.mean() - .5) < .03 and abs(x.var() * 4 * (2 * alpha + 1) - 1) < .1


@pytest.mark.parametrize('place, side, n, expected', [
    (.5, .5, 20, (5, 15)), (0., .5, 20, (0, 5)), (.99, .5, 20, (14, 20)), (.5, 0., 20, (10, 10)), (.5, 1., 7, (0, 6))])
def test_a_rectangle_is_cut_off_at_the_border(place, side, n, expected):
    assert finetune.span(place, side, n) == expected


def test_averaged_weights_equal_a_plain_average():
    model = M.init_weights(M.ViT(PICO))
    ema, plain = finetune.EMA(model, .9), model.norm.bias.detach().clone()
    for step in range(4):
        with torch.no_grad():
            model.norm.bias.add_(step)
        ema.update(model)
        plain = .9 * plain + .1 * model.norm.bias.detach()
    with ema.in_place_of(model):
        torch.testing.assert_close(model.norm.bias.detach(), plain)
    assert model.norm.bias[0] == 6


def test_layer_decay_equals_beits():
    """Layers count from the embedding, 0, to the head, depth + 1; their factors are decay^(depth + 1 - layer)."""
    model = M.ViT(replace(PICO, head=3, pool='mean', mask_token=False))
    number = dict(patch_embed=0, class_token=0, pos_embed=0, norm=5, head=5)
    names = {id(weight): name for name, weight in model.named_parameters()}
    for group in run.make_optimizer(model, config(), .8).param_groups:
        for weight in group['params']:
            part, *rest = names[id(weight)].split('.')
            layer = 1 + int(rest[0]) if part == 'blocks' else number[part]
            assert group['lr_scale'] == pytest.approx(.8 ** (5 - layer)), names[id(weight)]


# augmentation

def picture():
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((40, 40), Image.BICUBIC)


def test_rand_augment_has_the_published_magnitudes():
    """At 9 of 10: 27 degrees, shear .27, shift .405 of the side, 1 bit, thresholds 26 and + 99, factors 1 +- .81."""
    x, fill, affine = picture(), (123, 117, 104), Image.Transform.AFFINE
    move = lambda *matrix: x.transform(x.size, affine, matrix, Image.BICUBIC, fillcolor=fill)
    expected = {
        'rotate': x.rotate(-27, Image.BICUBIC, fillcolor=fill), 'shear_x': move(1, -.27, 0, 0, 1, 0),
        'shear_y': move(1, 0, 0, -.27, 1, 0), 'translate_x': move(1, 0, -16.2, 0, 1, 0),
        'translate_y': move(1, 0, 0, 0, 1, -16.2), 'posterize': ImageOps.posterize(x, 1),
        'solarize': ImageOps.solarize(x, 26), 'color': ImageEnhance.Color(x).enhance(.19),
        'contrast': ImageEnhance.Contrast(x).enhance(.19), 'brightness': ImageEnhance.Brightness(x).enhance(.19),
        'sharpness': ImageEnhance.Sharpness(x).enhance(.19), 'invert': ImageOps.invert(x),
        'equalize': ImageOps.equalize(x), 'autocontrast': ImageOps.autocontrast(x)}
    pixels = np.asarray(x).astype(int)
    added = np.asarray(data.RAND_AUGMENT['solarize_add'](x, .9, -1))
    assert (added == np.where(pixels < 128, pixels + 99, pixels)).all()
    assert data.RAND_AUGMENT.keys() == expected.keys() | {'solarize_add'}
    for name, image in expected.items():
        difference = np.asarray(data.RAND_AUGMENT[name](x, .9, -1)).astype(int) - np.asarray(image)
        assert abs(difference).max() <= 1, name


def test_rand_augment_does_two_operations_half_of_the_time():
    """A quarter of the images stays as it is (and a few that an operation leaves alone)."""
    x = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    draws = data.uniform(0, 'test', torch.arange(600), data.NUM_AUGMENT).tolist()
    same = sum(torch.equal(data.rand_augment(x, u), x) for u in draws) / 600
    assert .2 < same < .32


def test_colours_of_all_frames_change_alike():
    """Two equal frames stay equal; some clips turn grey, some stay as they are."""
    frame = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    draws = data.uniform(0, 'test', torch.arange(200), data.NUM_AUGMENT).tolist()
    clips = [data.change_colours(torch.stack([frame, frame]), u) for u in draws]
    assert all(torch.equal(a, b) for a, b in clips)
    grey = sum(bool((clip.float().std(1) < 1).all()) for clip in clips)
    same = sum(torch.equal(clip[0], frame) for clip in clips)
    assert 20 < grey < 60 and 15 < same < 50


# clips

def test_the_worlds_clips_show_their_actions():
    """What the name of an action says happens between the first frame and the last, to the last object."""
    world = data.World(frames=8)
    frames, action = world.clips(torch.arange(600))
    of = lambda name, field: frames[field].unflatten(0, (-1, 8))[action == data.ACTIONS.index(name)][..., -1]
    change = lambda name, field: of(name, field)[:, -1] - of(name, field)[:, 0]
    assert (change('move right', 'x') > 0).all() and (change('move left', 'x') < 0).all()
    assert (change('move down', 'y') > 0).all() and (change('move up', 'y') < 0).all()
    assert (change('grow', 'radius') > 0).all() and (change('shrink', 'radius') < 0).all()
    assert of('appear', 'valid')[:, -1].all() and not of('appear', 'valid')[:, 0].any()
    assert of('vanish', 'valid')[:, 0].all() and not of('vanish', 'valid')[:, -1].any()
    assert not change('turn left', 'x').any() and not change('turn left', 'radius').any()


@pytest.mark.parametrize('pair', range(data.NUM_HIDDEN // 2))
def test_single_frames_do_not_tell_an_action_from_its_reversal(pair):
    """Places, sizes and presence of the movers, over all frames, have the same means and spreads in both."""
    frames, action = data.World(frames=4).clips(torch.arange(6000))
    for field in ('x', 'y', 'radius', 'valid', 'matrix'):
        a, b = (frames[field].unflatten(0, (-1, 4))[action == 2 * pair + k][:, :, -2:].double() for k in (0, 1))
        for statistic in (lambda x: x, lambda x: x ** 2):
            u, v = (statistic(x).flatten(1).mean(1) for x in (a, b))            # of each clip
            error = (u.var() / len(u) + v.var() / len(v)).sqrt()
            assert (u.mean() - v.mean()).abs() <= 4 * error + 1e-9


def test_looks_do_not_tell_the_action():
    """Kinds, colours and grounds are drawn apart from the action: chi-squared of each with it is what chance gives."""
    frames, action = data.World(frames=1).clips(torch.arange(6000))
    for field in ('kind', 'colour', 'grounds', 'texture'):
        table = torch.zeros(16, 16).index_put_((action, frames[field][:, -1]), torch.ones(()), accumulate=True).double()
        table = table[:, table.sum(0) > 0]
        expected = table.sum(1, keepdim=True) * table.sum(0) / 6000
        freedom = 15 * (table.shape[1] - 1)
        assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


def frame_folders(root, num_frames=16, names=('ant', 'bee')):
    """Clips whose n-th frame has brightness 8 n everywhere."""
    for split in ('train', 'val'):
        for name in names:
            for clip in range(2):
                folder = root / split / name / f'clip{clip}'
                folder.mkdir(parents=True)
                for n in range(num_frames):
                    Image.new('RGB', (24, 16), (8 * n,) * 3).save(folder / f'{n:05}.png')
    return str(root)


def test_frames_are_sampled_one_from_each_part(tmp_path):
    """Of 16 frames 4: one each of 0..3, 4..7, ...; every one of them sometimes; flipped and cropped alike."""
    clips = data.open_data(frame_folders(tmp_path), 'train', frames=4)
    images = torch.cat([clips.batch(torch.arange(step * 4, step * 4 + 4), 8, 0)['images'] for step in range(20)])
    numbers = images[:, :, 0, 0, 0].float().div(8).round().long()               # [80, 4]
    assert torch.equal(numbers // 4, torch.arange(4).expand(80, 4))
    assert all(len(numbers[:, t].unique()) == 4 for t in range(4))


def test_evaluation_sees_four_times_and_three_crops(tmp_path):
    """All 16 frames, in four choices of 4, each from the left, the middle and the right."""
    root = frame_folders(tmp_path)
    for n in range(16):     # one clip's frames get darker to the right
        ramp = np.tile(np.linspace(8 * n + 8, 8 * n, 24)[None, :, None], (16, 1, 3))
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f'val/ant/clip0/{n:05}.png')
    clips = data.open_data(root, 'val', frames=4, views=data.Views(share=1.))
    images = clips.view(clips.paths.index('ant/clip0'), 8, None).float()       # [12, 4, 3, 8, 8]
    means = images.mean((2, 3, 4)).view(4, 3, 4)
    assert images.shape == (12, 4, 3, 8, 8) and (means[:, 0] > means[:, 1]).all() and (means[:, 1] > means[:, 2]).all()
    times = (means[:, 1] / 8).floor().long()                                    # [4 choices, 4 frames]
    assert torch.equal(times, torch.arange(4)[None] * 4 + torch.arange(4)[:, None])


def test_before_training_the_order_of_frames_does_not_matter(tmp_path):
    """Positions are repeated for each frame, then learnt apart."""
    image = M.init_weights(M.ViT(replace(PICO, head=8)))
    M.save(image, str(tmp_path / 'image.pt'))
    model = M.load(str(tmp_path / 'image.pt'), M.ViT, frames=3, pool='mean', head=5)
    torch.testing.assert_close(model.pos_embed[:, 1:].unflatten(1, (3, -1))[:, 2], image.pos_embed[:, 1:])
    clips = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), model(clips.flip(1)))
        model.pos_embed[:, 1:65] += torch.randn(64, 32)
        assert not torch.allclose(model(clips), model(clips.flip(1)), atol=1e-3)


def test_small_models_tell_time_from_the_start(tmp_path):
    """Each frame's positions are the one's before and the same step; a model of clips keeps what it has learnt."""
    model = finetune.classifier(config('--init', 'scratch', '--frames', 3), ['a', 'b'])
    table = model.pos_embed[0, 1:].unflatten(0, (3, -1)).detach()               # [T, N, D]
    step = table[1, 0] - table[0, 0]
    torch.testing.assert_close(table[1:] - table[:-1], step.expand(2, 64, 32))
    assert step.abs().max() > .1
    M.save(model, str(tmp_path / 'clips.pt'))
    again = finetune.classifier(config('--init', tmp_path / 'clips.pt', '--frames', 3), ['a', 'b'])
    assert torch.equal(again.pos_embed, model.pos_embed)


def test_more_frames_take_the_positions_of_their_time(tmp_path):
    """8 frames' table for 16, as from K-722 to K-400: each frame's twice."""
    model = M.ViT(replace(PICO, frames=2, pool='mean'))
    torch.nn.init.normal_(model.pos_embed)
    M.save(model, str(tmp_path / 'clips.pt'))
    more = M.load(str(tmp_path / 'clips.pt'), M.ViT, frames=4)
    before, after = (x.pos_embed[:, 1:].unflatten(1, (-1, 64)) for x in (model, more))
    assert torch.equal(after, before[:, [0, 0, 1, 1]])


# the head

def saved(path, classes):
    model = M.init_weights(M.ViT(replace(PICO, head=len(classes), pool='mean', mask_token=False)), seed=3)
    M.save(model, str(path), classes=classes)
    return model


def test_classes_of_the_same_name_keep_their_weights(tmp_path):
    old = saved(tmp_path / 'a.pt', ['ant', 'bee', 'cow'])
    model = finetune.classifier(config('--init', tmp_path / 'a.pt'), ['cow', 'dog', 'ant'])
    assert torch.equal(model.head.weight[[0, 2]], old.head.weight[[2, 0]])
    assert model.head.weight[1].abs().max() < .001 and torch.equal(model.norm.weight, old.norm.weight)


def test_a_mapping_moves_weights_between_label_sets(tmp_path):
    """Numbers, names, several whose mean it is, and none."""
    old = saved(tmp_path / 'a.pt', ['ant', 'bee', 'cow'])
    (tmp_path / 'map.txt').write_text('2\n-\nant, bee\n')
    cfg = config('--init', tmp_path / 'a.pt', '--mapping', tmp_path / 'map.txt')
    weight = finetune.classifier(cfg, ['x', 'y', 'z']).head.weight
    torch.testing.assert_close(weight[0], old.head.weight[2])
    torch.testing.assert_close(weight[2], old.head.weight[:2].mean(0))
    assert weight[1].abs().max() < .001


def test_from_pretraining_norm_and_head_start_afresh_and_positions_resize(tmp_path):
    """EVA's: the average patch under a new norm; 48 px make a 12 x 12 grid; the patch embedding does not train."""
    old = M.init_weights(M.ViT(replace(PICO, head=64)), seed=3)
    torch.nn.init.normal_(old.norm.weight)
    M.save(old, str(tmp_path / 'eva.pt'))
    model = finetune.classifier(config('--init', tmp_path / 'eva.pt', '--image_size', 48), ['a', 'b'])
    assert (model.norm.weight == 1).all() and torch.equal(model.blocks[0].mlp.fc1.weight, old.blocks[0].mlp.fc1.weight)
    assert torch.equal(model.pos_embed, M.resize_positions(old.pos_embed, (12, 12))) and model.mask_token is None
    assert not model.patch_embed.weight.requires_grad and model.pos_embed.requires_grad
    assert finetune.classifier(config('--init', 'scratch'), ['a', 'b']).patch_embed.weight.requires_grad


def test_pretraining_that_is_missing_is_run_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(run, 'run_stage', lambda *words: ran.append(words))
    cfg = config('--size', 'nano-video')
    cfg.init = finetune.find_init(cfg)
    assert cfg.init == 'out/mim_pretrain-nano/model.pt'
    finetune.pretrain(cfg)
    assert ran == [('mim_pretrain.py', 'out/mim_pretrain-nano', '--size', 'nano', '--device', 'cpu')]


def from_fixture(path, tmp_path, num_classes, *flags):
    """finetune.classifier of a reference file, whose tensors do not show how many heads it has."""
    M.save(M.load(path, M.ViT, heads=read(path)[0]['num_heads']), str(tmp_path / 'theirs.pt'))
    return finetune.classifier(config('--init', tmp_path / 'theirs.pt', *flags), [str(k) for k in range(num_classes)])


@pytest.mark.parametrize('path', fixtures('eva01_pretrain_to_cls*.pt'))
def test_fine_tuning_starts_as_evas(tmp_path, path):
    """Its logits, once the fresh norm and head have EVA's fresh values."""
    theirs, state, inputs, outputs = read(path)
    model = from_fixture(path, tmp_path, theirs['num_classes'], '--image_size', theirs['finetune_img_size'])
    fresh = {name: inputs['fresh.' + name] for name in ('head.weight', 'head.bias')}
    fresh |= {'norm.' + name: inputs['fresh.fc_norm.' + name] for name in ('weight', 'bias')}
    model.load_state_dict(fresh, strict=False)
    with torch.no_grad():
        close(model(inputs['image']), outputs['logits'])


@pytest.mark.parametrize('path', fixtures('eva01_cls_*.pt'))
def test_gradients_of_fine_tuning_are_evas(tmp_path, path):
    """From a classifier of the same classes, the patch embedding without any, the loss without smoothing."""
    theirs, state, inputs, outputs = read(path)
    pool = 'mean' if theirs['use_mean_pooling'] else 'class'
    model = from_fixture(path, tmp_path, theirs['num_classes'], '--pool', pool)
    model.head.load_state_dict({name: state['head.' + name] for name in ('weight', 'bias')})
    targets = finetune.soft_labels(inputs['labels'], theirs['num_classes'], 0)
    F.cross_entropy(model(inputs['image']), targets).backward()
    assert model.patch_embed.weight.grad is None and model.patch_embed.bias.grad is None
    norms = outputs['grad_norms_stop_grad_conv1']
    for name in ('blocks.0.attn.qkv.weight', 'pos_embed', 'head.weight'):
        norm = model.get_parameter(name).grad.norm().item()
        assert norm == pytest.approx(norms[name], rel=1e-4), name


# evaluation

def test_every_sample_counts_once_on_any_number_of_processes(tmp_path):
    """Parts are as long on each, and what fills the last is left out by its position."""
    dataset = data.open_data(class_folders(tmp_path, num=5), 'val')             # 15 images
    for world in (1, 2, 4, 7):
        parts = [list(data.eval_batches(dataset, 3, 8, 15, 'cpu', rank=rank, world=world)) for rank in range(world)]
        assert len({sum(len(batch['position']) for batch in part) for part in parts}) == 1
        seen = torch.cat([batch['index'][batch['position'] < 15] for part in parts for batch in part])
        assert sorted(seen.tolist()) == list(range(15))


class Oracle(torch.nn.Module):
    """Says the class whose number is the image's brightness / 60, its second choice the next class."""
    pool, image_size, extra = 'mean', 8, {}
    config = replace(PICO, head=4, pool='mean')

    def normalize(self, images):
        return images.float()

    def forward(self, images):
        label = (images.flatten(1).mean(1) / 60).long().clamp(0, 3)
        return F.one_hot(label, 4) * 2. + F.one_hot((label + 1) % 4, 4)


def test_predictions_are_judged_by_their_labels(tmp_path):
    dataset = data.open_data(class_folders(tmp_path), 'val')
    found = finetune.predict(Oracle(), dataset, config(), torch.device('cpu'))
    assert finetune.scores(found, dataset, config()) == dict(top1=1., top5=1.)


def judge(monkeypatch, capsys, oracle, *flags):
    """What --eval prints of the oracle's top1."""
    monkeypatch.setattr(M, 'load', lambda path, kind: oracle)
    finetune.train(config('--eval', '--init', 'oracle.pt', *flags))
    return float(re.search('top1 +([0-9.]+)', capsys.readouterr().out)[1])


def test_only_the_classes_of_the_data_compete(tmp_path, monkeypatch, capsys):
    """Found by their names: 0 means cow, 1 zebra, 2 ant. It says cow for ants, zebra and then ant for bees, ant for
    cows. Of the data's ant, bee, cow, bee is never said."""
    oracle = Oracle()
    oracle.extra = dict(classes=['cow', 'zebra', 'ant', 'bee'])
    assert judge(monkeypatch, capsys, oracle, '--data', class_folders(tmp_path)) == 0
    oracle.extra = dict(classes=['ant', 'zebra', 'cow', 'bee'])         # now right for ants, cows and not for bees
    assert judge(monkeypatch, capsys, oracle, '--data', tmp_path) == pytest.approx(2 / 3, abs=1e-4)


def test_a_mapping_says_which_classes_compete(tmp_path, monkeypatch, capsys):
    """Several of the model's may speak for one of the data's; the largest logit counts."""
    oracle = Oracle()
    oracle.extra = dict(classes=['horse', 'zebra', 'cat', 'dog'])
    (tmp_path / 'map.txt').write_text('horse, dog\nzebra\ncat\n')
    flags = '--data', class_folders(tmp_path / 'data'), '--mapping', tmp_path / 'map.txt'
    assert judge(monkeypatch, capsys, oracle, *flags) == 1


@pytest.mark.parametrize('names', [['ant', 'bee', 'cow', 'dog'], ['0', '1', '2', '3']])
def test_a_model_without_names_counts_the_classes_in_their_order(tmp_path, monkeypatch, capsys, names):
    root = class_folders(tmp_path, names)
    assert judge(monkeypatch, capsys, Oracle(), '--data', root) == 1


def test_folders_with_numbers_mean_the_model_s_numbers(tmp_path, monkeypatch, capsys):
    """Sorted as text 10 comes before 2: a class's number is its name, not its place."""
    for name, brightness in (('0', 10), ('10', 190), ('2', 130)):
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8), (brightness,) * 3).save(tmp_path / 'val' / name / 'a.png')
    (tmp_path / 'train').mkdir()
    oracle = Oracle()
    oracle.forward = lambda images: F.one_hot((images.flatten(1).mean(1) / 60).long(), 11).index_select(
        1, torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 3])).float()
    oracle.config = replace(PICO, head=11, pool='mean')
    assert judge(monkeypatch, capsys, oracle, '--data', tmp_path) == 1


def unnamed(model, *classes):
    """match_classes of a model without --mapping."""
    return finetune.match_classes(config(), list(classes), model)


def test_numbers_stand_for_classes_of_a_model_without_names_only():
    """Padded or not. A model that has names knows nothing of their numbers; of equal names it means each."""
    model = Oracle()
    model.config = replace(PICO, head=12, pool='mean')
    assert unnamed(model, '2', '007', '10', '0', '12', 'ant') == [[2], [7], [10], [0], [], []]
    model.extra = dict(classes=['crane', 'bee', '7', 'crane'])
    assert unnamed(model, '1', '7', '007', 'crane') == [[], [2], [], [0, 3]]


def test_a_mapping_is_read_in_any_encoding(tmp_path):
    """A byte order mark and Windows' line ends are no part of its names."""
    model = saved(tmp_path / 'a.pt', ['ant', 'bee', 'chaussée'])
    model.extra = dict(classes=['ant', 'bee', 'chaussée'])
    for encoding in ('utf-8-sig', 'utf-16'):
        (tmp_path / 'map.txt').write_text('ant\r\nchaussée, 1\r\n', encoding, newline='')
        cfg = config('--mapping', tmp_path / 'map.txt')
        assert finetune.match_classes(cfg, ['x', 'y'], model) == [[0], [2, 1]]


def test_classes_that_are_matched_by_luck_are_said(tmp_path, monkeypatch, capsys):
    """As many folders as an unnamed model has classes: in their order, in one line; of other numbers refused."""
    monkeypatch.setattr(M, 'load', lambda path, kind: Oracle())
    flags = '--eval', '--init', 'oracle.pt', '--data'
    finetune.train(config(*flags, class_folders(tmp_path / 'a', ('ant', 'bee', 'cow', 'dog'))))
    said = [line for line in capsys.readouterr().out.splitlines() if 'has no names' in line]
    assert len(said) == 1 and "'ant' to 'dog'" in said[0]
    with pytest.raises(run.Refused, match="class 'ant' is none of the model's"):
        finetune.train(config(*flags, class_folders(tmp_path / 'b')))
    with pytest.raises(run.Refused, match='whether class 10 comes before or after 2'):
        finetune.train(config(*flags, class_folders(tmp_path / 'c', ('c1', 'c2', 'c3', 'c10'))))


def test_several_right_labels_by_file_name(tmp_path):
    """ReaL's list is in the order of the file names, whatever the folders; an empty entry is not judged."""
    for name, file in (('bee', 'a'), ('ant', 'b'), ('bee', 'c'), ('ant', 'd')):
        (tmp_path / 'val' / name).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / f'val/{name}/{file}.png')
    (tmp_path / 'train').mkdir()
    dataset = data.open_data(str(tmp_path), 'val')
    (tmp_path / 'real.json').write_text('[[0, 1], [], [1], [0]]')
    index = torch.tensor([dataset.paths.index(path) for path in ('ant/d.png', 'bee/c.png', 'ant/b.png', 'bee/a.png')])
    found = dict(top=torch.tensor([[0], [0], [1], [1]]), labels=torch.zeros(4).long(), index=index)
    scores = finetune.scores(found, dataset, config('--real', tmp_path / 'real.json'))
    assert scores['real_top1'] == pytest.approx(2 / 3)          # d and a are right, c wrong, b not judged


@pytest.mark.parametrize('text, words', [
    ('{"a": 1}', 'no JSON list of 12 rows'), ('[[0]]', 'no JSON list of 12 rows'), ('[[0], ', 'not JSON'),
    ([0] * 12, 'row 0 is 0, expected a list of labels, 0 to 2'), ([[0]] * 11 + [[3]], r'row 11 is \[3\]'),
    ([[1], [-1]] + [[0]] * 10, r'row 1 is \[-1\]'), ([['1']] * 12, 'row 0'), ([[True]] * 12, 'row 0'),
    ([[1.5]] * 12, 'row 0'), ([[]] * 12, 'no label at all')])
def test_right_labels_are_checked_before_training(tmp_path, text, words):
    """Lists of the data's classes, one for each image; otherwise one line, and nothing is written."""
    (tmp_path / 'real.json').write_text(text if isinstance(text, str) else json.dumps(text))
    flags = ['--real', tmp_path / 'real.json', '--data', class_folders(tmp_path / 'data'), '--out_dir', tmp_path / 'x']
    with pytest.raises(run.Refused, match=words) as error:
        finetune.train(config(*flags, '--init', 'scratch'))
    assert 'real.json' in str(error.value) and not (tmp_path / 'x').exists()


# real runs

def interrupted(tmp_path, classes=('ant', 'bee', 'cow')):
    """Flags of a run on photos that stopped after its first step."""
    flags = ['--data', class_folders(tmp_path / 'data', classes), '--init', 'scratch', '--steps', 3, '--save_every', 1]
    flags += ['--batch_size', 4, '--out_dir', tmp_path / 'run']

    def stop(self, step, **metrics):
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, 'say', stop)
        finetune.train(config(*flags))
    return flags


@pytest.mark.parametrize('before, after, words', [
    (None, 'eel', 'added eel'), ('cow', None, 'removed cow'), ('ant', 'dog', 'added dog, removed ant')])
def test_a_run_does_not_go_on_with_other_classes(tmp_path, before, after, words):
    """A folder more, less, or renamed: the line says which, the checkpoint stays, and with the old classes it goes on."""
    flags = interrupted(tmp_path)
    shutil.move(tmp_path / 'data', tmp_path / 'kept')
    shutil.copytree(tmp_path / 'kept', tmp_path / 'data')
    for split in ('train', 'val'):
        folder = tmp_path / 'data' / split
        if after:
            shutil.copytree(folder / (before or 'cow'), folder / after)
        if before:
            shutil.rmtree(folder / before)
    with pytest.raises(run.Refused, match=f'changed since: {words}') as error:
        finetune.train(config(*flags))
    assert 'damaged' not in str(error.value) and (tmp_path / 'run/checkpoint/step_0000001').exists()
    shutil.rmtree(tmp_path / 'data')
    shutil.move(tmp_path / 'kept', tmp_path / 'data')
    finetune.train(config(*flags))
    assert (tmp_path / 'run/model.pt').exists()


def test_a_run_goes_on_with_other_samples_and_says_so(tmp_path, capsys):
    flags = interrupted(tmp_path)
    (tmp_path / 'data/train/ant/train0.png').unlink()
    capsys.readouterr()
    finetune.train(config(*flags))
    assert 'the training data changed, of which there are 11 (were 12)' in capsys.readouterr().out


def test_data_that_vanish_end_a_run_that_is_saved(tmp_path, monkeypatch, double):
    """Its folder goes after the second step: both are in a checkpoint, and with the folder back the losses are those
    of a run left alone."""
    flags = ['--data', class_folders(tmp_path / 'data'), '--init', 'scratch', '--steps', 9, '--batch_size', 4]
    flags += ['--log_every', 1]             # more steps than batches are made ahead
    finetune.train(config(*flags, '--out_dir', tmp_path / 'whole'))
    write = run.Log.write

    def write_and_move(log, step, **values):
        write(log, step, **values)
        if step == 1:
            shutil.move(tmp_path / 'data', tmp_path / 'away')
    with monkeypatch.context() as patch, pytest.raises(run.Refused, match='could not be read|can be used'):
        patch.setattr(run.Log, 'write', write_and_move)
        finetune.train(config(*flags, '--out_dir', tmp_path / 'parts'))
    assert len(losses(tmp_path / 'parts')) >= 2
    assert os.listdir(tmp_path / 'parts/checkpoint') == [f'step_{len(losses(tmp_path / "parts")):07d}']
    shutil.move(tmp_path / 'away', tmp_path / 'data')
    finetune.train(config(*flags, '--out_dir', tmp_path / 'parts'))
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'whole')


def test_eval_says_what_could_not_be_read(tmp_path, monkeypatch, capsys):
    """Broken photos are named, and no other counts twice for them: without them the score is the same."""
    root = class_folders(tmp_path / 'data', ('ant', 'bee', 'cow', 'dog'))
    oracle = Oracle()
    oracle.extra = dict(classes=['ant', 'bee', 'dog', 'cow'])           # right for half
    (tmp_path / 'data/val/ant/val0.png').write_bytes(b'no picture')
    monkeypatch.setattr(M, 'load', lambda path, kind: oracle)
    finetune.train(config('--eval', '--init', 'oracle.pt', '--data', root))
    said = capsys.readouterr().out
    assert f'top1                 {7 / 15:.4g}' in said and '1 of 16 images could not be read' in said


def test_a_stopped_run_goes_on_with_the_same_losses(tmp_path, monkeypatch, double):
    """With averaged weights, mixing and dropped paths; the patch embedding stays as it was."""
    M.save(M.init_weights(M.ViT(replace(PICO, head=8))), str(tmp_path / 'eva.pt'))
    flags = ['--init', tmp_path / 'eva.pt', '--steps', 4, '--batch_size', 4, '--log_every', 1, '--save_every', 2]
    flags += ['--ema', .9, '--mixup', .8, '--cutmix', 1, '--drop_path', .2]
    finetune.train(config(*flags, '--out_dir', tmp_path / 'whole'))
    class Stop(Exception):
        pass

    def stop(self, step, **metrics):
        raise Stop
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(run.Log, 'say', stop)
        finetune.train(config(*flags, '--out_dir', tmp_path / 'parts'))
    finetune.train(config(*flags, '--out_dir', tmp_path / 'parts', '--micro_batch', 2))
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'whole') and len(losses(tmp_path / 'whole')) == 4
    whole, parts = (M.load(str(tmp_path / name / 'model.pt')) for name in ('whole', 'parts'))
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), atol=1e-9, rtol=0)
    assert torch.equal(whole.patch_embed.weight, M.load(str(tmp_path / 'eva.pt')).patch_embed.weight)


def test_averaged_weights_are_what_a_run_leaves(tmp_path, double):
    """After one step .9 of the first weights and .1 of those that the step made."""
    start = finetune.classifier(config('--init', 'scratch'), ['x'] * 16).state_dict()
    left = {}
    for ema in (0, .9):
        finetune.train(config('--init', 'scratch', '--steps', 1, '--batch_size', 4, '--ema', ema,
                              '--out_dir', tmp_path / str(ema)))
        left[ema] = M.load(str(tmp_path / str(ema) / 'model.pt')).state_dict()
    for name, first in start.items():
        torch.testing.assert_close(left[.9][name], .9 * first + .1 * left[0][name], atol=1e-9, rtol=0)


def test_photographs_train_and_are_told_apart(tmp_path, capsys):
    """Brightness is easily learnt; pictures, scores and names are left, and a photo gets its class."""
    root, out = class_folders(tmp_path / 'photos'), tmp_path / 'run'
    flags = ['--data', root, '--out_dir', out]
    finetune.train(config(*flags, '--init', 'scratch', '--steps', 40, '--batch_size', 12, '--augment', 'rand',
                          '--lr', .003, '--warmup_steps', 2))
    result = json.loads((out / 'result.json').read_text())
    assert result['top1'] > .6 and {'model.pt', 'loss.png'} <= {path.name for path in out.iterdir()}
    capsys.readouterr()
    finetune.train(config(*flags, '--eval'))
    assert f'top1                 {result["top1"]:.4g}' in capsys.readouterr().out
    finetune.train(config(*flags, '--image', f'{root}/val/ant/val0.png'))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and {line.split()[1] for line in lines} == {'ant', 'bee', 'cow'}


def on_photos(folder, world):
    """A run with everything that draws numbers, validated on 15 photos: no number of processes divides them."""
    flags = ['--data', folder / 'photos', '--init', folder / 'eva.pt', '--steps', 3, '--batch_size', 8]
    flags += ['--log_every', 1]
    flags += ['--ema', .9, '--mixup', .8, '--cutmix', 1, '--drop_path', .2, '--augment', 'rand']
    finetune.train(config(*flags, '--warmup_steps', 1, '--out_dir', folder / str(world)))


def test_two_processes_do_what_one_does(tmp_path, monkeypatch, double):
    """The same losses and averaged weights, and a validation in which every photo counts once."""
    class_folders(tmp_path / 'photos', num=5)
    small(monkeypatch)
    M.save(M.init_weights(M.ViT(replace(PICO, head=8))), str(tmp_path / 'eva.pt'))
    two = launch(2, tmp_path, on_photos)
    on_photos(tmp_path, 1)
    finish(two, tmp_path)
    assert losses(tmp_path / '1') == losses(tmp_path / '2')
    one, two = (json.loads((tmp_path / world / 'result.json').read_text()) for world in '12')
    assert one['top1'] == two['top1'] and one['top1'] * 15 == pytest.approx(round(one['top1'] * 15))
    one, two = (M.load(str(tmp_path / world / 'model.pt')).state_dict() for world in '12')
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


@pytest.mark.parametrize('flags', [['--probe', 'linear'], ['--frames', 2, '--probe', 'linear']])
def test_a_linear_probe_trains_the_head_only(tmp_path, flags):
    M.save(M.init_weights(M.ViT(replace(PICO, head=8))), str(tmp_path / 'eva.pt'))
    flags += ['--init', tmp_path / 'eva.pt', '--out_dir', tmp_path]
    cfg = config('--steps', 2, '--batch_size', 4, '--lr', 1, *flags)
    before = finetune.classifier(cfg, ['x'] * 16)
    finetune.train(cfg)
    after = M.load(str(tmp_path / 'model.pt')).state_dict()
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    assert moved == {'head.weight', 'head.bias'}


def test_clips_of_folders_train(tmp_path):
    """A real run on frames, with other colours, evaluated over 4 x 3 views, and with its frames shuffled."""
    cfg = config('--data', frame_folders(tmp_path / 'clips', 4), '--init', 'scratch', '--frames', 4, '--steps', 2,
                 '--batch_size', 2, '--augment', 'colour', '--out_dir', tmp_path / 'run')
    finetune.train(cfg)
    assert {'top1', 'top5', 'shuffled_top1'} <= json.loads((tmp_path / 'run' / 'result.json').read_text()).keys()


@pytest.mark.parametrize('view', [.875, 1.])
def test_an_image_is_seen_as_the_recipe_says(tmp_path, monkeypatch, view):
    """--image shows the model the central square of `view` of the shorter side, as evaluation does."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    oracle, seen = Oracle(), []
    monkeypatch.setattr(oracle, 'normalize', lambda images: seen.append(images) or images.float())
    monkeypatch.setattr(M, 'load', lambda path, kind: oracle)
    cfg = config('--init', 'oracle.pt', '--image', tmp_path / 'a.png')
    cfg.view = view
    finetune.train(cfg)
    expected = Image.fromarray(pixels).resize((8, 8), Image.BICUBIC, box=(32 - 24 * view, 24 - 24 * view,
                                                                           32 + 24 * view, 24 + 24 * view))
    assert torch.equal(seen[0][0, 0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_confusions_show_the_commonest_first(tmp_path, monkeypatch):
    """Bees that it took for cows twice, then an ant that it took for a bee; what was right is not shown."""
    shown = {}
    monkeypatch.setattr(run, 'draw_sheet', lambda path, sheet: shown.update(sheet))
    dataset = data.open_data(class_folders(tmp_path, num=2), 'val')
    position = torch.arange(6)
    labels = dataset.batch(position, 8, train=False)['labels']
    bees, ant = position[labels == 1], position[labels == 0][0]
    said = labels.clone()
    said[bees], said[ant] = 2, 1
    found = dict(labels=labels, top=said[:, None], position=position)
    finetune.draw_confusions('', found, dataset, 8)
    assert {title: len(images) for title, images in shown.items()} == {'bee: cow?': 2, 'ant: bee?': 1}
    assert list(shown) == ['bee: cow?', 'ant: bee?']
    assert torch.equal(shown['ant: bee?'], dataset.batch(ant[None], 8, train=False)['images'])


# what is refused

@pytest.mark.parametrize('flags, expected', [
    (['--pool', 'max'], 'mean, class'), (['--probe', 'knn'], 'linear'), (['--cutmix', '2'], '--cutmix'),
    (['--augment', 'cut'], 'rand, colour'), (['--drop_path', '1'], '--drop_path'),
    (['--frames', '4', '--augment', 'rand'], 'colour'), (['--size', 'g'], 'mim_pretrain.py --size g'),
    (['--mixup', '.5', '--batch_size', '3'], 'pairs'), (['--init', 'missing.pt'], 'missing.pt'),
    (['--real', 'real.json'], 'for images in files'), (['--mapping', 'no.txt', '--init', 'a.pt'], 'no.txt')])
def test_fine_tuning_refuses_in_one_line(monkeypatch, capsys, tmp_path, flags, expected):
    monkeypatch.chdir(tmp_path)
    saved('a.pt', ['ant', 'bee'])
    assert expected in refusal(monkeypatch, capsys, finetune, *flags)


def test_data_that_cannot_be_learnt_from_is_refused(monkeypatch, capsys, tmp_path):
    """Classes in validation only; too few frames; a list of right labels or a mapping of another length."""
    monkeypatch.chdir(tmp_path)
    refuse = lambda *flags: refusal(monkeypatch, capsys, finetune, '--size', 'pico', *flags)
    root = class_folders(tmp_path / 'b', splits=['train'])
    class_folders(tmp_path / 'b', ('ant', 'bee', 'cow', 'dog'), splits=['val'])
    assert "'dog' is in validation only" in refuse('--data', root)
    assert 'fewer than 8 frames' in refuse('--data', frame_folders(tmp_path / 'c', 5), '--frames', '8')
    saved(tmp_path / 'm.pt', ['x', 'y'])
    (tmp_path / 'map.txt').write_text('0\n1\n')
    root = class_folders(tmp_path / 'd')
    (tmp_path / 'real.json').write_text('[[0], [1]]')
    assert 'list of 12 rows' in refuse('--data', root, '--real', str(tmp_path / 'real.json'))
    assert '2 lines' in refuse('--data', root, '--init', str(tmp_path / 'm.pt'), '--mapping', str(tmp_path / 'map.txt'))
    assert 'none of the model' in refuse('--data', root, '--init', str(tmp_path / 'm.pt'), '--eval')
