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
import detect_seg as D
import model as M
import run
from test_data_objects import write_maps
from test_distributed import config as quick
from test_distributed import finish, gradients, launch, nothing, small

TINY = dict(D.MAPS['pico'], image_size=32, patch_size=8, batch_size=2, steps=2, channels=32, queries=5, layers=(1, 2),
            points=16)


@pytest.fixture(autouse=True)
def tiny_recipes(monkeypatch):
    use_tiny(monkeypatch)


def use_tiny(patch):
    for head in ('linear', 'mask2former'):
        patch.setitem(D.RECIPES[head], 'pico', TINY)


def config(*flags):
    if '--head' not in flags:
        flags = ['--head', 'linear', *flags]
    flags = ['--size', 'pico', '--device', 'cpu', *map(str, flags)]
    return run.parse_config(D.Config, D.RECIPES, flags)


def segment(*flags):
    D.train(config(*flags))


def segmenter(head, num_classes=3, **options):
    """A small new one."""
    vit = M.init_weights(M.ViT(M.ViTConfig(**dict(M.SIZES['pico'], patch_size=8, mask_token=False))))
    config = D.SegmenterConfig(vit.config, num_classes, head, channels=32, queries=5, heads=1, mlp_width=64,
                               layers=(1, 2), points=16, groups=4, **options)
    model = D.Segmenter(config)
    model.vit.load_state_dict(vit.state_dict(), strict='adapter' not in options)
    return D.init_segmenter(model)


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
        rows, columns = D.assign(cost)
        wide = cost if n <= m else cost.T
        best = min(sum(wide[i, j] for i, j in enumerate(chosen))
                   for chosen in itertools.permutations(range(max(n, m)), min(n, m)))
        assert cost[rows, columns].sum() == pytest.approx(best, abs=1e-9)
        assert len(set(rows)) == len(set(columns)) == min(n, m)


def test_assignment_of_large_costs_has_prices_that_prove_it():
    """200 x 100 in rank one, the hardest kind: the best is known, the dearest rows take the cheapest columns."""
    a, b = (x.numpy().astype(np.float64) for x in (uniform(200, stream='a'), uniform(100, stream='b')))
    rows, columns = D.assign(np.outer(a, b))
    best = (np.sort(a)[:100] * np.sort(b)[::-1]).sum()
    assert np.outer(a, b)[rows, columns].sum() == pytest.approx(best, rel=1e-12)


def test_matching_finds_the_masks_that_are_there():
    """Queries that say the truth, in another order, are each given theirs; with a class exchanged they lose."""
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, :, 8:], labels[:, 8:] = 3, 2
    [(classes, goals)] = D.split_labels(labels, 4)
    assert classes.tolist() == [0, 2, 3]
    masks = torch.cat([goals[[2, 0, 1]], torch.zeros(1, 16, 16)])[None] * 8 - 4             # the fourth finds nothing
    logits = F.one_hot(torch.tensor([[3, 0, 2, 4]]), 5) * 20.
    draw = lambda stream, num: uniform(1, num, stream=stream)
    close = D.mask_losses(logits, masks, [(classes, goals)], draw, 0, 64)
    wrong = D.mask_losses(logits[:, [1, 0, 2, 3]], masks, [(classes, goals)], draw, 0, 64)
    assert close[0] < 1e-6 and close[2] < .2 * 3 and wrong[0] > 10


def losses_and_gradients(model, images, labels, first):
    """Sums, counts and gradients of images that stand at first, first + 1, ... of the run."""
    position = first + torch.arange(len(images))
    model.zero_grad()
    losses = model(dict(images=images, labels=labels), lambda stream, num: data.uniform(0, stream, position, num))
    sums = torch.stack([total for total, _ in losses.values()])
    counts = torch.stack([torch.as_tensor(count) for _, count in losses.values()])
    sums.sum().backward()
    return sums.detach(), counts, {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize('head', ['linear', 'mask2former'])
def test_losses_are_sums_over_images(head, double):
    """Those of a batch are those of its two parts, which have as many images and another number of masks: what they are
    divided by can be the whole batch's."""
    model = segmenter(head)
    images = uniform(4, 3, 32, 32)
    labels = (uniform(4, 32, 32, stream='labels') * torch.tensor([1, 2, 3, 3])[:, None, None]).long()
    labels[3] = D.IGNORED
    sums, counts, whole = losses_and_gradients(model, images, labels, 0)
    parts = [losses_and_gradients(model, images[n:n + 2], labels[n:n + 2], n) for n in (0, 2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], sums, atol=0, rtol=1e-9)
    torch.testing.assert_close(parts[0][1] + parts[1][1], counts, atol=0, rtol=1e-9)
    for name, gradient in whole.items():
        assert_near(parts[0][2][name] + parts[1][2][name], gradient, name)


def assert_near(ours, gradient, name):
    """To a 1e-9 of its largest part: sums in another order, in float64."""
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(ours, gradient, atol=1e-9 * gradient.abs().max().item() + 1e-12, rtol=0, msg=name)


def test_masks_are_learnt_with_the_types_they_are_judged_with():
    """Under autocast, as on a GPU: what makes the masks computes in bfloat16 both times, the losses are float32."""
    model = segmenter('mask2former')
    images = uniform(2, 3, 32, 32)
    labels = torch.arange(3).repeat_interleave(11)[:32].expand(2, 32, 32)
    seen = []
    for part in (model.head.pixels.finest, model.head.decoder.mask):
        part.register_forward_hook(lambda part, inputs, output: seen.append(output.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(dict(images=images, labels=labels), lambda stream, num: uniform(2, num, stream=stream))
        scores = model(dict(images=images))
    assert set(seen) == {torch.bfloat16} and len(seen) == 8
    assert scores.dtype == losses['pixels'][0].dtype == torch.float32


@pytest.mark.parametrize('head', ['linear', 'mask2former'])
def test_images_without_any_label_teach_nothing(head):
    """Their losses are 0 and count as 0, and every weight still gets a gradient."""
    model = segmenter(head)
    labels = torch.full((2, 32, 32), D.IGNORED)
    sums, counts, gradients = losses_and_gradients(model, torch.zeros(2, 3, 32, 32), labels, 0)
    assert not sums.any() and not counts.any()
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
    assert head == 'linear' or gradients['head.pixels.finest.weight'] is not None


# ---- parts

def test_deformable_attention_reads_the_place_it_is_sent_to():
    """With no offsets, weights on one level and plain projections it is bilinear interpolation at the query's place."""
    attention = D.DeformableAttention(8, 2, levels=2, points=1)
    for layer in (attention.values, attention.proj):
        torch.nn.init.eye_(layer.weight), torch.nn.init.zeros_(layer.bias)
    for layer in (attention.offsets, attention.weights):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    attention.weights.bias.data[::2] = 50.              # each head's first level
    sizes = [(3, 4), (2, 2)]
    memory = uniform(1, 16, 8)
    places = D.cell_centres([(3, 4)])
    found = attention(torch.zeros(1, 12, 8), places, memory, sizes)
    torch.testing.assert_close(found, memory[:, :12], atol=1e-5, rtol=0)


def test_batch_norm_is_torchs():
    """In training, its gradient too, and what it remembers for testing."""
    ours, theirs = D.BatchNorm(3), torch.nn.BatchNorm2d(3)
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
    config = M.ViTConfig(**M.SIZES['pico'] | dict(depth=6, patch_size=8, image_size=32, mask_token=False))
    vit = M.init_weights(M.ViT(config))
    adapter = D.Adapter(32, 2, 8).eval()
    images, seen = uniform(1, 3, 32, 64), []
    vit.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    maps = adapter(vit, images)
    torch.testing.assert_close(seen[0], vit.tokens(images))
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 32), (8, 16), (4, 8), (2, 4)]


def test_place_bias_is_beits():
    """Each pair of tokens takes the row of the table that BEiT's loops give it; the grid is no square."""
    h, w = 2, 3
    bias = D.PlaceBias(2, (h, w))
    torch.nn.init.normal_(bias.table)
    found, last = bias(), len(bias.table) - 3
    assert found.shape == (2, 1 + h * w, 1 + h * w)
    for i, j in itertools.product(range(h * w), repeat=2):
        down, right = i // w - j // w, i % w - j % w
        row = (down + h - 1) * (2 * w - 1) + right + w - 1
        assert torch.equal(found[:, 1 + i, 1 + j], bias.table[row])
    assert torch.equal(found[:, 0, 1], bias.table[last]) and torch.equal(found[:, 1, 0], bias.table[last + 1])
    assert torch.equal(found[:, 0, 0], bias.table[last + 2])


def test_windows_cover_the_image_and_agree_with_a_whole():
    """A model that looks at single pixels says the same in windows, whatever the image's size."""
    model = lambda batch: batch['images'][:, :2] * 3
    for size in ((16, 16), (40, 23), (9, 50)):
        images = uniform(2, 3, *size)
        torch.testing.assert_close(D.slide(model, images, (16, 16), (9, 9)), images[:, :2] * 3)


class Brighter(torch.nn.Module):
    """Says of single pixels whether they are brighter than the mean; the second class is a flat one."""
    vit = M.ViT(M.ViTConfig(**M.SIZES['pico']))
    normalize = vit.normalize

    def forward(self, batch):
        images = batch['images']
        return torch.cat((images[:, :1], -images[:, :1]), 1)


def test_mirrored_and_scaled_views_are_turned_back():
    """A model of single pixels says of an image with two halves the same in every view."""
    image = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    image[..., :12] = 255
    found = D.predict(Brighter(), image, config('--flip', '--scales', '1,2'))
    assert (found[..., :11] == 0).all() and (found[..., 13:] == 1).all()


def test_a_scale_given_twice_counts_twice(monkeypatch):
    """Of three views two agree: what they say wins, wherever the other stands."""
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def scores(model, images, crop, stride):
        sure = .6 if images.shape[2] == 32 else -1.         # at scale 1 the first class, at others the second
        return torch.tensor([sure, -sure])[None, :, None, None].expand(-1, -1, *images.shape[2:])
    monkeypatch.setattr(D, 'slide', scores)
    for scales, label in (('1,1.25,1', 0), ('1,1.25', 1), ('1.25,1,1', 0)):
        assert (D.predict(Brighter(), image, config('--scales', scales)) == label).all(), scales


# ---- commands

@pytest.fixture
def no_pictures(monkeypatch):
    """Nor long evaluations."""
    hurry(monkeypatch)


def hurry(patch):
    patch.setattr(D, 'draw_sheet', nothing)
    patch.setattr(run, 'draw_loss', nothing)
    patch.setattr(D, 'NUM_EVAL', 2)


@pytest.mark.parametrize('head', [['linear'], ['mask2former'], ['mask2former', '--adapter']])
def test_training_evaluating_and_drawing(head, tmp_path, capsys, monkeypatch):
    """A run leaves its files; --eval repeats its numbers; --image draws any picture."""
    monkeypatch.setattr(D, 'NUM_EVAL', 8)
    out = tmp_path / 'run'
    segment('--head', *head, '--out_dir', out)
    result = json.loads((out / 'result.json').read_text())
    assert {'model.pt', 'classes.png', 'loss.png', 'log.jsonl'} <= set(os.listdir(out))
    capsys.readouterr()
    segment('--init', out / 'model.pt', '--eval')
    assert f'{result["miou"]:.4g}' in capsys.readouterr().out
    Image.new('RGB', (50, 30)).save(tmp_path / 'a.png')
    segment('--init', out / 'model.pt', '--image', tmp_path / 'a.png', '--out_dir', tmp_path)
    assert Image.open(tmp_path / 'a.found.png').width > 1024


def test_a_frozen_vit_stays_as_it_is(tmp_path, no_pictures):
    """Under the linear head by default; --no-freeze lets it learn."""
    config = M.ViTConfig(**M.SIZES['pico'] | dict(patch_size=8, image_size=32, head=5))
    eva = M.init_weights(M.ViT(config), 3)
    M.save(eva, str(tmp_path / 'eva.pt'))
    for name, flags, frozen in (('frozen', [], True), ('free', ['--no-freeze'], False)):
        segment('--init', tmp_path / 'eva.pt', *flags, '--out_dir', tmp_path / name)
        model = M.load(str(tmp_path / name / 'model.pt'), D.Segmenter)
        same = torch.equal(model.vit.blocks[0].mlp.fc1.weight, eva.blocks[0].mlp.fc1.weight)
        assert same == frozen and torch.equal(model.vit.norm.weight, eva.norm.weight) == frozen


def test_real_images_of_which_one_is_all_ignored(tmp_path, no_pictures):
    """From a segmentor with other classes; an image without any class trains to a finite loss."""
    write_maps(tmp_path / 'data', num=2)
    Image.fromarray(np.full((24, 20), 255, np.uint8)).save(tmp_path / 'data' / 'annotations' / 'train' / '0.png')
    segment('--head', 'mask2former', '--steps', 1, '--out_dir', tmp_path / 'before')
    segment('--head', 'mask2former', '--data', tmp_path / 'data', '--init', tmp_path / 'before' / 'model.pt',
            '--out_dir', tmp_path / 'run')
    log = run.read_log(str(tmp_path / 'run'))
    assert np.isfinite(log[-1]['loss']) and log[-1]['skipped'] == 0


@pytest.mark.parametrize('head', ['linear', 'mask2former'])
def test_a_segmentors_classes_are_taken_over_by_name(head, tmp_path, no_pictures, capsys):
    """Whatever their places; new ones start afresh. Of one without names all, in their order, which is said."""
    before = segmenter(head)
    path = str(tmp_path / 'before.pt')
    K = before.config.num_classes
    names = [f'class {k}' for k in range(K)]
    M.save(before, path, classes=names)
    cfg = config('--head', head, '--init', path, '--image_size', before.vit.image_size)

    def rows(model):
        return model.head.bias if head == 'linear' else model.head.decoder.classes.bias
    with torch.no_grad():
        rows(before).copy_(torch.arange(1., len(rows(before)) + 1))
    M.save(before, path, classes=names)
    wanted = [names[1], 'new', names[0]]
    last = [K + 1.] if head == 'mask2former' else []            # no object
    assert rows(D.next_segmenter(cfg, wanted)).tolist() == [2., 0., 1., *last]
    M.save(before, path)
    assert rows(D.next_segmenter(cfg, [*wanted, 'more'])).tolist() == [0., 0., 0., 0., *last]
    assert rows(D.next_segmenter(cfg, [f'other {k}' for k in range(K)])).tolist() == rows(before).tolist()
    assert 'has no names for its' in capsys.readouterr().out


def test_a_segmentor_is_judged_by_the_names_of_its_classes(tmp_path, no_pictures, capsys):
    """Other values for the same names give the same numbers; other names are refused."""
    folder = write_maps(tmp_path / 'data', num=2)
    segment('--data', folder, '--steps', 1, '--out_dir', tmp_path / 'run')
    evaluate = ['--data', folder, '--init', tmp_path / 'run' / 'model.pt', '--eval']
    capsys.readouterr()
    segment(*evaluate)
    numbers = capsys.readouterr().out

    for path in (tmp_path / 'data' / 'annotations' / 'val').iterdir():
        Image.fromarray(2 - np.array(Image.open(path))).save(path)
    (tmp_path / 'data' / 'classes.txt').write_text('class 2\nclass 1\nclass 0')
    segment(*evaluate)
    assert capsys.readouterr().out == numbers and 'miou' in numbers
    (tmp_path / 'data' / 'classes.txt').write_text('class 0\nroad\nclass 2')
    with pytest.raises(M.Refused, match="has the class 'road'"):
        segment(*evaluate)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, no_pictures):
    """Two steps, or one, a checkpoint and another: the same weights and averages."""
    flags = '--head', 'mask2former', '--adapter'
    segment(*flags, '--out_dir', tmp_path / 'straight')
    segment(*flags, '--out_dir', tmp_path / 'parts', '--save_every', 1)
    os.remove(tmp_path / 'parts' / 'result.json')
    segment(*flags, '--out_dir', tmp_path / 'parts', '--save_every', 1)
    first, second = (M.load(str(tmp_path / name / 'model.pt'), D.Segmenter).state_dict()
                     for name in ('straight', 'parts'))
    assert all(torch.equal(first[name], second[name]) for name in first)


def first_gradients(folder, world):
    """Of the first step, on images of which every second has no class."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        hurry(patch)
        patch.setitem(M.SIZES, 'pico', dict(M.SIZES['pico'], depth=4))
        return gradients(D, quick(D, folder / f'run-{world}', '--batch_size', '2', '--data', str(folder / 'data'),
                                  '--head', 'mask2former', '--adapter', '--steps', '1'))


def test_two_processes_of_which_one_sees_no_class(tmp_path, double):
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
    """The numbers of a run of one step, on images of unlike sizes."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        hurry(patch)
        segment('--data', folder / 'data', '--steps', 1, '--batch_size', 4, '--head', 'mask2former', '--out_dir',
                folder / f'whole-{world}')
    return json.loads((folder / f'whole-{world}' / 'result.json').read_text())


def test_two_processes_judge_each_image_once(tmp_path, double):
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
            assert two[name] == pytest.approx(one[name], rel=1e-9), name


@pytest.mark.parametrize('flags, message', [
    (['--head', 'cubic'], '--head cubic'), (['--adapter'], '--adapter goes with'),
    (['--head', 'mask2former', '--adapter', '--image_size=40'], '5 x 5 patches'),
    (['--scale_jitter', '2,1'], '--scale_jitter'), (['--scales', '0'], '--scales'),
    (['--image_size', '36'], 'image_size 36'), (['--classes', 'nowhere.txt', '--data', 'DATA'], 'nowhere.txt'),
    (['--classes', 'nowhere.txt'], '--classes is not an option of --data shapes'),
    (['--data', 'nowhere'], 'no label maps for train'), (['--init', 'nowhere.pt'], 'nowhere.pt does not exist'),
    (['--eval', '--init', 'nowhere.pt'], 'nowhere.pt does not exist')])
def test_wrong_options_are_one_line(flags, message, tmp_path):
    """Before any training."""
    flags = [str(write_maps(tmp_path)) if word == 'DATA' else word for word in flags]
    with pytest.raises(M.Refused, match=re.escape(message)):
        segment(*flags, '--out_dir', tmp_path / 'run')


def test_an_eva_is_no_segmentor(tmp_path):
    """--eval of a file that holds something else says what to do."""
    M.save(M.ViT(M.ViTConfig(**M.SIZES['pico'])), str(tmp_path / 'eva.pt'))
    with pytest.raises(M.Refused, match='this is a ViT, expected a Segmenter'):
        M.load(str(tmp_path / 'eva.pt'), D.Segmenter)


def test_a_segmentor_of_the_earlier_format_loads(tmp_path):
    """Whose config is a dict of its options, the ViT's too."""
    model = segmenter('mask2former', adapter=dict(heads=2, inner=8)).eval()
    vit = {name: value for name, value in vars(model.config.vit).items()}
    config = dict(vars(model.config), vit=vit)
    held = dict(format='nanoEVA', name='Segmenter', config=config, state_dict=model.state_dict(), extra={})
    torch.save(held, tmp_path / 'model.pt')
    again = M.load(str(tmp_path / 'model.pt'), D.Segmenter)
    images = uniform(1, 3, 32, 32)
    assert torch.equal(again(dict(images=images)), model(dict(images=images)))
