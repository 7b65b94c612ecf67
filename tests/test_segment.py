"""Semantic segmentation: against plain references, on any machine."""
import itertools
import json
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import model as M
import run
import segment as S
from test_distributed import finish, gradients, launch, small

TINY = ['--size', 'pico', '--patch_size', '8', '--image_size', '32', '--batch_size', '2', '--steps', '2', '--channels',
        '32', '--queries', '5', '--layers', '1,2', '--points', '16', '--device', 'cpu']


def config(*flags):
    cfg = run.parse_config(S.Config, S.RECIPES, [*TINY, *map(str, flags)])
    S.check(cfg)
    return cfg


def uniform(*shape, stream='test'):
    return data.uniform(0, stream, torch.arange(1), int(np.prod(shape))).view(shape)


# ---- which query for which mask

def test_assignment_is_optimal_by_brute_force():
    """A thousand random cases of up to 5 x 6, wide and tall, half of them with ties."""
    u = data.uniform(0, 'assign', torch.arange(1000), 33).numpy().astype(np.float64)
    for case in u:
        n, m = 1 + int(5 * case[30]), 1 + int(6 * case[31])
        cost = case[:n * m].reshape(n, m) * 4 - 2
        cost = np.round(cost) if case[32] < .5 else cost
        rows, columns = S.assign(cost)
        wide = cost if n <= m else cost.T
        best = min(sum(wide[i, j] for i, j in enumerate(chosen))
                   for chosen in itertools.permutations(range(max(n, m)), min(n, m)))
        assert cost[rows, columns].sum() == pytest.approx(best, abs=1e-9)
        assert len(set(rows)) == len(set(columns)) == min(n, m)


def test_assignment_of_large_costs_has_prices_that_prove_it():
    """200 x 100 in rank one, the hardest kind: the best is known, the dearest rows take the cheapest columns."""
    a, b = (x.numpy().astype(np.float64) for x in (uniform(200, stream='a'), uniform(100, stream='b')))
    rows, columns = S.assign(np.outer(a, b))
    best = (np.sort(a)[:100] * np.sort(b)[::-1]).sum()
    assert np.outer(a, b)[rows, columns].sum() == pytest.approx(best, rel=1e-12)


def test_matching_finds_the_masks_that_are_there():
    """Queries that say the truth, in another order, are each given theirs; with a class exchanged they lose."""
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, :, 8:], labels[:, 8:] = 3, 2
    classes, goals = S.split_labels(labels[0], 4)
    assert classes.tolist() == [0, 2, 3]
    masks = torch.cat([goals[[2, 0, 1]], torch.zeros(1, 16, 16)])[None] * 8 - 4             # the fourth finds nothing
    logits = F.one_hot(torch.tensor([[3, 0, 2, 4]]), 5) * 20.
    draw = lambda name, i, num: uniform(num, stream=name)
    close = S.mask_losses(logits, masks, [(classes, goals)], draw, 64)
    wrong = S.mask_losses(logits[:, [1, 0, 2, 3]], masks, [(classes, goals)], draw, 64)
    assert close[0] < 1e-6 and close[2] < .2 * 3 and wrong[0] > 10


# ---- parts

def test_deformable_attention_reads_the_place_it_is_sent_to():
    """With no offsets, weights on one level and plain projections it is bilinear interpolation at the query's place."""
    attention = S.DeformableAttention(8, 2, levels=2, points=1)
    for layer in (attention.values, attention.proj):
        torch.nn.init.eye_(layer.weight), torch.nn.init.zeros_(layer.bias)
    for layer in (attention.offsets, attention.weights):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    attention.weights.bias.data[::2] = 50.              # each head's first level
    sizes = [(3, 4), (2, 2)]
    memory = uniform(1, 16, 8)
    places = S.cell_centres([(3, 4)])
    found = attention(torch.zeros(1, 12, 8), places, memory, sizes)
    torch.testing.assert_close(found, memory[:, :12], atol=1e-5, rtol=0)


def test_batch_norm_is_torchs():
    """In training, its gradient too, and what it remembers for testing."""
    ours, theirs = S.BatchNorm(3), torch.nn.BatchNorm2d(3)
    x, y = (uniform(4, 3, 5, 5).requires_grad_() for _ in range(2))
    weight = uniform(4, 3, 5, 5, stream='weight')
    (ours(x) * weight).sum().backward()
    (theirs(y) * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.variance, theirs.running_var, atol=1e-3, rtol=0)        # theirs divides by n - 1
    ours.eval(), theirs.eval()
    theirs.running_var.copy_(ours.variance)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_a_new_adapter_leaves_the_vit_as_it_was():
    """Its injectors start at nothing, so that the patches after the last block are the plain ViT's; 6 blocks are cut
    into four parts; patches are 8 wide."""
    vit = M.ViT(**M.SIZES['pico'] | dict(depth=6, patch_size=8, image_size=32, mask_token=False))
    vit = M.init_weights(vit)
    adapter = S.Adapter(32, 2, 8).eval()
    images, seen = uniform(1, 3, 32, 64), []
    vit.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    maps = adapter(vit, images)
    torch.testing.assert_close(seen[0], vit.tokens(images))
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 32), (8, 16), (4, 8), (2, 4)]


def test_windows_cover_the_image_and_agree_with_a_whole():
    """A model that looks at single pixels says the same in windows, whatever the image's size."""
    model = lambda images: images[:, :2] * 3
    for size in ((16, 16), (40, 23), (9, 50)):
        images = uniform(2, 3, *size)
        torch.testing.assert_close(S.slide(model, images, (16, 16), (9, 9)), images[:, :2] * 3)


def test_mirrored_and_scaled_views_are_turned_back():
    """A model of single pixels says of an image with two halves the same in every view."""
    class Brighter(torch.nn.Module):
        vit = M.ViT(**M.SIZES['pico'])
        normalize = vit.normalize

        def forward(self, images):
            return torch.cat((images[:, :1], -images[:, :1]), 1)
    image = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    image[..., :12] = 255
    cfg = config('--flip', '--scales', '1,2')
    found = S.predict(Brighter(), image, cfg)
    assert (found[..., :11] == 0).all() and (found[..., 13:] == 1).all()
    whole = S.predict(Brighter(), image, config('--whole'))
    assert torch.equal(whole[0] == 0, image[0, 0] > 0)


# ---- data

def write_maps(folder, num=4, size=(24, 20), K=3, mode='L', split=('train', 'val'), images='images',
               labels='annotations'):
    """Images whose colour tells the class of each pixel, with label maps."""
    for name in split:
        for base in (images, labels):
            os.makedirs(folder / base / name, exist_ok=True)
        for i in range(num):
            classes = (uniform(*size, stream=f'{name}{i}').numpy() * K).astype(np.uint8)
            classes = np.kron(classes[::4, ::4], np.ones((4, 4), np.uint8))[:size[0], :size[1]]
            Image.fromarray(np.stack([classes * 80] * 3, -1)).save(folder / images / name / f'{i}.png')
            label = Image.fromarray(classes.astype(np.uint16) if mode == 'I;16' else classes)
            if mode == 'P':
                label.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
            label.save(folder / labels / name / f'{i}.png')
    return folder


@pytest.mark.parametrize('mode', ['L', 'P', 'I;16'])
def test_label_maps_of_all_kinds(mode, tmp_path):
    """Grey, palette and 16 bits hold the same classes."""
    maps = S.Maps(config('--data', write_maps(tmp_path, mode=mode), '--classes', 3))
    image, classes = maps.look(0)
    assert (np.array(image)[..., 0] // 80 == classes).all() and classes.max() == 2


def test_crops_show_the_same_part_of_image_and_labels(tmp_path):
    """Scaled, cut, mirrored: the colour still tells the class; what is beyond the image is ignored."""
    cfg = config('--data', write_maps(tmp_path), '--classes', 3, '--jitter', '1,2')
    maps = S.Maps(cfg)
    before, S.distort = S.distort, lambda image, u: torch.from_numpy(np.array(image)).permute(2, 0, 1)
    try:
        batch = maps.batch(torch.arange(16), 20)
    finally:
        S.distort = before
    known = batch['labels'] != S.IGNORED
    right = (batch['images'][:, 0].float() / 80).round() == batch['labels']
    assert known.float().mean() > .9 and right[known].float().mean() > .8       # bilinear edges
    again = maps.batch(torch.arange(8, 16), 20)
    assert torch.equal(again['labels'], batch['labels'][8:])


def test_crops_are_not_mostly_of_one_class_if_others_are_near(monkeypatch):
    """Of an image with a corner of another class, crops in which each has its quarter are twice as many."""
    labels = np.zeros((64, 64), np.int16)
    labels[:32, :32] = 1
    image, counts, u = Image.new('RGB', (64, 64)), [], data.uniform(0, 'cut', torch.arange(60), 32).tolist()
    for share in (.75, 1.):
        monkeypatch.setattr(S, 'LARGEST_SHARE', share)
        parts = [S.cut(image, labels, 16, (4., 4.), row)[1] for row in u]
        counts.append(sum(.25 < (part == 1).float().mean().item() < .75 for part in parts))
    assert counts[0] >= 2 * counts[1] > 0


def test_colours_change_within_their_limits():
    """Half of the images or more change; a grey stays grey under hue and saturation."""
    image = Image.new('RGB', (4, 4), (120, 120, 120))
    found = torch.stack([S.distort(image, row) for row in data.uniform(0, 'distort', torch.arange(200), 8).tolist()])
    changed = (found != 120).flatten(1).any(1).float().mean()
    assert .5 < changed < .9 and (found.amax(1) - found.amin(1)).max() <= 2
    assert found.min() >= (120 - 32) // 2 - 1


def test_known_layouts(tmp_path):
    """ADE20K's folders and ignored label 0; CamVid's; names with gaps, as COCO-Stuff's values have."""
    for root, images, labels in (('ade', 'images/training', 'annotations/training'),
                                 ('ade', 'images/validation', 'annotations/validation'),
                                 ('camvid', 'train', 'trainannot')):
        write_maps(tmp_path / root, images=os.path.dirname(images), labels=os.path.dirname(labels), num=1,
                   split=[os.path.basename(images)])
        os.makedirs(tmp_path / root / labels, exist_ok=True)
        Image.fromarray(np.uint8([[0, 1], [2, 255]])).save(tmp_path / root / labels / '0.png')
        Image.new('RGB', (2, 2)).save(tmp_path / root / images / '0.png')
    maps = S.Maps(config('--data', tmp_path / 'ade'), 'val')
    assert len(maps.classes) == 150 and maps.look(0)[1].tolist() == [[-1, 0], [1, -1]]
    assert S.Maps(config('--data', tmp_path / 'camvid', '--classes', 3)).look(0)[1].tolist() == [[0, 1], [2, -1]]
    (tmp_path / 'camvid' / 'classes.txt').write_text('road\n-\ncar\n')
    maps = S.Maps(config('--data', tmp_path / 'camvid'))
    write_maps(tmp_path / 'stuff', num=1, split=['val2017'])
    Image.fromarray(np.uint8([[0, 10], [11, 181]])).save(tmp_path / 'stuff' / 'annotations' / 'val2017' / '0.png')
    Image.new('RGB', (2, 2)).save(tmp_path / 'stuff' / 'images' / 'val2017' / '0.png')
    stuff = S.Maps(config('--data', tmp_path / 'stuff'), 'val')
    assert len(stuff.classes) == 171 and stuff.look(0)[1].tolist() == [[0, 10], [-1, 170]]
    assert maps.classes == ['road', 'car'] and maps.look(0)[1].tolist() == [[0, -1], [1, -1]]


def spoil(folder, how, names):
    for name in names:
        path = folder / 'annotations' / 'train' / f'{name}.png'
        if how == 'value':
            Image.fromarray(np.full((24, 20), 7, np.uint8)).save(path)
        elif how == 'size':
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
        elif how == 'colours':
            Image.new('RGB', (20, 24)).save(path)
        elif how == 'missing':
            os.remove(path)


@pytest.mark.parametrize('how, message', [
    ('value', '0.png holds the value 7, which is none of the 3 classes'), ('size', '0.png is of 8 x 8 pixels'),
    ('colours', 'has 3 channels'), ('missing', 'none of the 4 images')])
def test_label_maps_that_do_not_fit(how, message, tmp_path):
    """All of them: one line. One of them: it is left out, and counted."""
    cfg = config('--data', write_maps(tmp_path), '--classes', 3)
    spoil(tmp_path, how, [0])
    maps = S.Maps(cfg)
    list(data.batches(maps, 4, 16, 0, 1, 0, 'cpu'))
    assert len(maps.broken) == 1
    spoil(tmp_path, how, range(1, 4))
    with pytest.raises(ValueError, match=re.escape(message)):
        S.Maps(cfg)


# ---- commands

@pytest.fixture
def no_pictures(monkeypatch):
    """Nor long evaluations."""
    monkeypatch.setattr(S, 'draw_maps', lambda *args: None)
    monkeypatch.setattr(run, 'draw_curves', lambda *args, **options: None)
    monkeypatch.setattr(S, 'NUM_EVAL', 2)


def segment(*flags):
    S.train(run.parse_config(S.Config, S.RECIPES, [*TINY, *map(str, flags)]))


@pytest.mark.parametrize('head', [['linear'], ['mask2former'], ['mask2former', '--adapter']])
def test_training_evaluating_and_drawing(head, tmp_path, capsys, monkeypatch):
    """A run leaves its files; --eval repeats its numbers; --image draws any picture."""
    monkeypatch.setattr(S, 'NUM_EVAL', 8)
    out = tmp_path / 'run'
    segment('--head', *head, '--out_dir', out)
    result = json.loads((out / 'result.json').read_text())
    assert {'model.pt', 'classes.png', 'loss.png', 'log.jsonl'} <= set(os.listdir(out))
    capsys.readouterr()
    segment('--init', out / 'model.pt', '--eval')
    assert f'{result["miou"]:.4g}' in capsys.readouterr().out
    Image.new('RGB', (50, 30)).save(tmp_path / 'a.png')
    segment('--init', out / 'model.pt', '--image', tmp_path / 'a.png', '--out_dir', tmp_path)
    assert Image.open(tmp_path / 'a.classes.png').width > 1024


def test_a_frozen_vit_stays_as_it_is(tmp_path, no_pictures):
    """Under the linear head by default; --no-freeze lets it learn."""
    eva = M.init_weights(M.ViT(**M.SIZES['pico'] | dict(patch_size=8, image_size=32, head=5)), 3)
    M.save(eva, str(tmp_path / 'eva.pt'))
    for flag, frozen in (('--head=linear', True), ('--no-freeze', False)):
        segment('--init', tmp_path / 'eva.pt', flag, '--out_dir', tmp_path / flag)
        model = M.load_as(S.Segmenter, S.load_segmenter, str(tmp_path / flag / 'model.pt'))
        same = torch.equal(model.vit.blocks[0].mlp.fc1.weight, eva.blocks[0].mlp.fc1.weight)
        assert same == frozen and torch.equal(model.vit.norm.weight, eva.norm.weight) == frozen


def test_real_images_of_which_one_is_all_ignored(tmp_path, no_pictures):
    """From a segmentor with other classes; an image without any class trains to a finite loss, alone to one of zero."""
    write_maps(tmp_path / 'data', num=2)
    Image.fromarray(np.full((24, 20), 255, np.uint8)).save(tmp_path / 'data' / 'annotations' / 'train' / '0.png')
    segment('--head', 'mask2former', '--steps', 1, '--out_dir', tmp_path / 'before')
    segment('--head', 'mask2former', '--data', tmp_path / 'data', '--classes', 3, '--init',
            tmp_path / 'before' / 'model.pt', '--out_dir', tmp_path / 'run')
    log = run.read_log(str(tmp_path / 'run'))
    assert np.isfinite(log[-1]['loss']) and log[-1]['skipped'] == 0
    for head in ('linear', 'mask2former'):
        model = S.build(config('--head', head), 3)
        labels = torch.full((2, 32, 32), S.IGNORED)
        losses = model(torch.zeros(2, 3, 32, 32), labels, lambda name, i, num: uniform(num), None)
        losses.sum().backward()
        assert not losses.any() and not model.head.counts(labels).any()
        assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, no_pictures):
    """Two steps, or one, a checkpoint and another: the same weights and averages."""
    flags = '--head', 'mask2former', '--adapter'
    segment(*flags, '--out_dir', tmp_path / 'straight')
    segment(*flags, '--out_dir', tmp_path / 'parts', '--save_every', 1)
    os.remove(tmp_path / 'parts' / 'result.json')
    segment(*flags, '--out_dir', tmp_path / 'parts', '--save_every', 1)
    first, second = (M.load_as(S.Segmenter, S.load_segmenter, str(tmp_path / name / 'model.pt')).state_dict()
                     for name in ('straight', 'parts'))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path, monkeypatch, no_pictures):
    """What the losses are divided by is the whole batch's."""
    small(monkeypatch)
    flags = TINY[:-2] + ['--head', 'mask2former', '--batch_size', '4']
    whole = gradients(S, tmp_path / 'whole', *flags)
    parts = gradients(S, tmp_path / 'parts', *flags, '--micro_batch', '1')
    for name, gradient in whole.items():
        assert_near(parts[name], gradient, name)


def assert_near(ours, gradient, name):
    """To a thousandth of its largest part: sums in another order, through norms of maps of four cells."""
    torch.testing.assert_close(ours, gradient, atol=1e-3 * gradient.abs().max().item() + 1e-6, rtol=0, msg=name)


def first_gradients(folder, world):
    """Of the first step, on images of which every second has no class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(M.SIZES, 'pico', dict(M.SIZES['pico'], depth=4))
        return gradients(S, folder / f'run-{world}', *TINY, '--data', str(folder / 'data'), '--classes', '3', '--head',
                         'mask2former', '--adapter')


def test_two_processes_of_which_one_sees_no_class(tmp_path):
    """Each weight's gradient is that of one process with the whole batch, through batch normalisation too."""
    write_maps(tmp_path / 'data', num=2)
    Image.fromarray(np.full((24, 20), 255, np.uint8)).save(tmp_path / 'data' / 'annotations' / 'train' / '0.png')
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        one = first_gradients(tmp_path, 1)
    finish(launch(2, tmp_path, first_gradients), tmp_path)
    for rank in (0, 1):
        two = torch.load(tmp_path / f'found-2-{rank}.pt')
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            assert_near(two[name], gradient, name)


def measures(folder, world):
    """The numbers of a run of one step, on five images of unlike sizes."""
    cfg = config('--data', folder / 'data', '--classes', 3, '--steps', 1, '--batch_size', 4, '--head', 'mask2former',
                 '--out_dir', folder / f'whole-{world}')
    S.train(cfg)
    return json.loads((folder / f'whole-{world}' / 'result.json').read_text())


def test_two_processes_judge_each_image_once(tmp_path):
    """The same numbers as one, though their images are seen in unlike numbers of windows."""
    for num, size in ((5, (24, 40)), (3, (30, 200))):           # three of the images are replaced
        write_maps(tmp_path / 'data', num, size)
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        one = measures(tmp_path, 1)
    finish(launch(2, tmp_path, measures), tmp_path)
    for rank in (0, 1):
        two = torch.load(tmp_path / f'found-2-{rank}.pt')
        for name in ('miou', 'pixel_accuracy', 'class_accuracy'):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name


@pytest.mark.parametrize('flags, message', [
    (['--head', 'cubic'], '--head cubic is unknown'), (['--adapter'], '--adapter goes with'),
    (['--channels', '40'], '--channels 40'), (['--head=mask2former', '--adapter', '--image_size=40'], '5 x 5 patches'),
    (['--layers', '2'], '--layers'), (['--jitter', '2,1'], '--jitter'),
    (['--scales', '0'], '--scales'), (['--image_size', '36'], 'image_size 36'),
    (['--data', 'nowhere'], 'no label maps for train'), (['--init', 'nowhere.pt'], 'nowhere.pt cannot be read'),
    (['--eval', '--init', 'nowhere.pt'], 'nowhere.pt cannot be read')])
def test_wrong_options_are_one_line(flags, message, tmp_path):
    """Before any training."""
    with pytest.raises(ValueError, match=re.escape(message)):
        segment(*flags, '--out_dir', tmp_path / 'run')


def test_an_eva_is_no_segmentor(tmp_path):
    """--eval of a file that holds something else says what to do."""
    M.save(M.ViT(**M.SIZES['pico']), str(tmp_path / 'eva.pt'))
    with pytest.raises(ValueError, match='this is a ViT, expected a Segmenter; train one with --init'):
        M.load_as(S.Segmenter, S.load_segmenter, str(tmp_path / 'eva.pt'))
