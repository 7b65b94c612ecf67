"""Readers of real data: CLIP's tokenizer, folders of images, tar shards, crops, and a stream that is a function of
(seed, step)."""
import gzip
import io
import json
import os
import random
import sys
import tarfile
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402

FIXTURES = [Path(folder) for folder in os.environ.get('GOLDEN', str(Path(__file__).parent / 'golden')).split(':')]
TABLE = 'bpe_simple_vocab_16e6.txt.gz'


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden(name):
    """Path of a fixture; skips the test where it is absent."""
    for folder in FIXTURES:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f'{name} is in none of {FIXTURES}')


def save(path, size=(12, 8), colour=(200, 30, 60), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path, **options)


def make_folder(root, num=12, size=(12, 8)):
    """num images of different grey levels: 000.png, 001.png, ..."""
    for i in range(num):
        save(root / f'{i:03}.png', size, (i * 20 % 256,) * 3)
    return root


def half_red(size=(64, 32)):
    """Left half red, right half blue."""
    image = Image.new('RGB', size, (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1]))
    return image


# tokenizer

@pytest.mark.parametrize('name', ['tokenizer.json'])
def test_tokenizer_gives_clips_ids(name):
    expected = json.loads(golden(name).read_text())
    text = data.Tokenizer.from_file(golden(TABLE))(list(expected))                    # [73, 77]
    for row, (caption, ids) in zip(text.tolist(), expected.items()):
        assert row == ids + [0] * (77 - len(ids)), caption


@pytest.mark.parametrize('name', ['tokenizer_decoded.json'])
def test_tokenizer_decodes_as_clip(name):
    tokenizer, ids = data.Tokenizer.from_file(golden(TABLE)), json.loads(golden('tokenizer.json').read_text())
    for caption, expected in json.loads(golden(name).read_text()).items():
        assert tokenizer.decode(ids[caption][1:-1]) == expected


def test_shortcut_of_clean_changes_nothing():
    """Printable ASCII without '&' takes a short way; ftfy and html.unescape must agree on it."""
    rng = random.Random(0)
    letters = [chr(i) for i in range(32, 127)] + [' '] * 20 + ['&', '\n', '\x1b', '\x1c', '\xa0', '\u200b', '\u2019']
    for _ in range(300):
        text = ''.join(rng.choices(letters, k=30))
        slow = data.regex.sub(r'\s+', ' ', data.html.unescape(data.html.unescape(ftfy.fix_text(text))).strip())
        assert ' '.join(data.clean(text).split(' ')).split() == slow.strip().lower().split()


def test_entities_are_resolved_twice():
    """ftfy leaves entities alone where it sees a '<'."""
    assert data.clean('<b> A &amp;lt; B') == '<b> a < b'


def test_merges_follow_the_header(tmp_path):
    path = tmp_path / 'bpe.txt.gz'
    path.write_bytes(gzip.compress(b'"v#version: 0.2\na b\nab c</w>\n'))
    tokenizer = data.Tokenizer.from_file(path)
    assert tokenizer.vocab_size == 512 + 2 + 2 and tokenizer('abc')[0, :4].tolist() == [514, 513, 515, 0]


@pytest.mark.parametrize('content', [b'', b'hello', b'\x1f\x8bbroken', b'\xff\xfe\x00', b'#version\na b\nab qqq', None])
def test_not_a_merge_table(tmp_path, content):
    if content is not None:
        (tmp_path / 'x.gz').write_bytes(gzip.compress(content) if content[:1] == b'#' else content)
    with pytest.raises(data.Refused, match='x.gz.*expected bpe_simple'):
        data.Tokenizer.openai(tmp_path / 'x.gz')


def test_offline_without_a_table_says_what_to_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'CLIP_MERGES', 'http://127.0.0.1:9/bpe_simple_vocab_16e6.txt.gz')
    with pytest.raises(data.Refused, match='--bpe FILE'):
        data.Tokenizer.openai(folder=tmp_path)


def test_fetched_table_must_be_the_known_one(tmp_path, monkeypatch):
    (tmp_path / TABLE).write_bytes(b'something else')
    monkeypatch.setattr(data, 'CLIP_MERGES', (tmp_path / TABLE).as_uri())
    with pytest.raises(data.Refused, match='invalid hash value'):
        data.Tokenizer.openai(folder=tmp_path / 'out')
    assert not os.listdir(tmp_path / 'out')


def test_learnt_vocabulary_round_trip():
    captions = ['a red star left of a dotted ring', 'two dotted stars on sand', "a star's ring, caf\u00e9"] * 3
    tokenizer = data.Tokenizer.learn(captions, num_merges=20)
    assert len(tokenizer.merges) == 20 and tokenizer.vocab_size == 512 + 20 + 2
    again = data.Tokenizer(tokenizer.merges)
    for caption in captions + ['never seen: \u65e5\u672c']:
        ids = again(caption)[0]
        end = ids.argmax()                                                            # the end token is the highest id
        assert ids[end] == again.end and again.decode(ids[1:end]).replace(' ', '') == caption.replace(' ', '')
        assert torch.equal(ids, tokenizer(caption)[0])


def test_learnt_merges_are_the_most_frequent_pairs():
    """'ab' is seen 5 times, then 'ab' + 'c' 3 times; ties go to the last in the alphabet."""
    assert data.Tokenizer.learn(['abc abc abc', 'abd abd'], num_merges=2).merges == ['a b', 'ab c</w>']
    assert data.Tokenizer.learn(['ab cd'], num_merges=9).merges == ['c d</w>', 'a b</w>']


# order

@pytest.mark.parametrize('length', [1, 2, 3, 5, 64, 100, 1000, 4097])
def test_permutation_is_a_bijection(length):
    for epoch in (0, 1, 7):
        order = data.permutation(torch.arange(length), length, 3, epoch)
        assert torch.equal(order.sort().values, torch.arange(length))


def test_permutation_mixes():
    """Neighbours end up apart, epochs and seeds differ: correlations of 10,000 stay below 5 / sqrt(10,000)."""
    index = torch.arange(10_000)
    orders = [data.permutation(index, 10_000, seed, epoch).double() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    pairs = [(orders[0], index), (orders[0][1:], orders[0][:-1]), (orders[0], orders[1]), (orders[0], orders[2])]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a, b.double()]))[0, 1]) < .05


def test_every_epoch_sees_every_sample():
    index = data.sample_index(torch.arange(21), 7, seed=0).view(3, 7)
    assert torch.equal(index.sort(1).values, torch.arange(7).expand(3, 7)) and len(index.unique(dim=0)) == 3


def take(dataset, start, steps, workers=0, **options):
    return list(data.batches(dataset, 4, 8, start, steps, 0, 'cpu', workers, **options))


def same(a, b):
    return len(a) == len(b) and all(x.keys() == y.keys() and all(
        torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k] for k in x) for x, y in zip(a, b))


@pytest.mark.parametrize('workers', [1, 2])
def test_stream_does_not_depend_on_workers(tmp_path, workers):
    for name in ('cat', 'dog'):
        make_folder(tmp_path / name)
    dataset, before = data.Folder(tmp_path), torch.get_rng_state()
    stream = take(dataset, 0, 7, workers)
    assert same(stream, take(dataset, 0, 7)) and set(stream[0]) == {'images', 'position', 'index', 'labels', 'captions'}
    assert torch.equal(before, torch.get_rng_state())


def test_stream_can_start_in_the_middle(tmp_path):
    dataset = data.Folder(make_folder(tmp_path))
    assert same(take(dataset, 3, 7), take(dataset, 0, 7)[3:]) and not same(take(dataset, 3, 7), take(dataset, 0, 4))


def test_processes_share_the_global_batch(tmp_path):
    dataset = data.Folder(make_folder(tmp_path))
    parts = [take(dataset, 1, 4, rank=rank, world=2) for rank in (0, 1)]
    for whole, *halves in zip(take(dataset, 1, 4), *parts):
        assert torch.equal(whole['images'], torch.cat([half['images'] for half in halves]))
        assert torch.equal(whole['position'], torch.cat([half['position'] for half in halves]))
    with pytest.raises(data.Refused, match='multiple of 3'):
        take(dataset, 0, 1, world=3)


def test_workers_end_when_the_stream_is_dropped(tmp_path):
    stream = data.batches(data.Folder(make_folder(tmp_path)), 4, 8, 0, 1000, 0, 'cpu', workers=1)
    next(stream)
    children = torch.multiprocessing.active_children()
    stream.close()
    del stream
    assert children and not any(child.is_alive() for child in children)


@pytest.mark.parametrize('workers', [0, 1])
def test_eval_batches_repeat_nothing(tmp_path, workers):
    dataset = data.Folder(make_folder(tmp_path, 30))
    stream = list(data.eval_batches(dataset, 4, 8, 10, 'cpu', workers))
    assert [len(batch['images']) for batch in stream] == [4, 4, 2]
    assert len(torch.cat([batch['index'] for batch in stream]).unique()) == 10
    assert sum(len(batch['images']) for batch in data.eval_batches(dataset, 4, 8, 999, 'cpu')) == len(dataset)


# crops

def seen_whole(folder, **options):
    """A folder whose images are seen whole."""
    return data.Folder(folder, views=data.Views(crop=(1, 1), **options))


def test_crops_lie_inside_the_image():
    u = data.uniform(0, 'crop', torch.arange(2000), data.NUM_CROP).tolist()
    sizes = [(1, 1), (1, 90), (90, 1), (2, 3), (500, 375), (32, 32), (3, 1000), (7, 5)]
    for row, (width, height) in zip(u, sizes * 250):
        left, top, right, bottom = data.crop_box(row, (.2, 1), width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_crops_take_the_asked_share_of_the_area():
    """Area uniform in [.2, 1], less what aspect excludes; aspect within 3/4 and 4/3; no place preferred."""
    u = data.uniform(0, 'crop', torch.arange(4000), data.NUM_CROP).tolist()
    boxes = torch.tensor([data.crop_box(row, (.2, 1), 1000, 1000) for row in u]).double()
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = w * h / 1e6
    assert area.min() > .198 and area.max() <= 1 and .5 < area.mean() < .6
    assert (w / h).min() > .745 and (w / h).max() < 1.34 and abs((w / h).log().mean()) < .01
    assert ((boxes[:, 0] + boxes[:, 2]) / 2 - 500).mean().abs() < 10
    assert abs(torch.corrcoef(torch.stack([boxes[:, 0] / (1001 - w), boxes[:, 1] / (1001 - h)]))[0, 1]) < .1


def test_reduced_jpeg_decoding_keeps_the_crop(tmp_path):
    """A JPEG decoded at 1/8, 1/4, 1/2 and the same image as PNG give nearly the same crops (a ramp: places show)."""
    x, y = np.meshgrid(np.linspace(0, 255, 1003), np.linspace(0, 255, 805))
    image = Image.fromarray(np.stack([x, y, 0 * x + 128], -1).astype(np.uint8))
    for name, options in (('a.jpg', dict(quality=98, subsampling=0)), ('a.png', {}), ('t.jpg', dict(quality=98))):
        if name == 't.jpg':              # turned by 90 degrees, with the EXIF note to turn it back
            options['exif'], image = Image.Exif(), image.transpose(Image.Transpose.ROTATE_90)
            options['exif'][0x0112] = 6
        image.save(tmp_path / name, **options)
    for row in data.uniform(0, 'crop', torch.arange(8), data.NUM_CROP).tolist():
        for size in (16, 40, 100):
            crops = [data.load_crop(tmp_path / name, size, row).float() for name in ('a.png', 'a.jpg', 't.jpg')]
            assert max((crop - crops[0]).abs().mean() for crop in crops) < 1.5


def test_evaluation_view_is_resize_and_centre_crop(tmp_path):
    """224 of 256: CLIP's two steps, to 1 of 255, where their roundings have nothing to round."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((480, 384), Image.BICUBIC)
    image.save(tmp_path / 'a.png')
    steps = np.asarray(image.resize((320, 256), Image.BICUBIC).crop((48, 16, 272, 240))).astype(float)
    view = data.load_view(tmp_path / 'a.png', 224).permute(1, 2, 0).numpy()
    assert abs(view - steps).max() <= 1


def test_captions_that_name_sides_are_not_flipped(tmp_path):
    for name, caption in (('a', 'a cat to the Left of a dog'), ('b', 'a bright cat'), ('c', 'the rightmost cat')):
        save(tmp_path / f'train/{name}.png')
        half_red().save(tmp_path / f'train/{name}.png')
        (tmp_path / f'train/{name}.txt').write_text(caption + '\n')
    (tmp_path / 'val').mkdir()
    flipped = {}
    for batch in data.batches(seen_whole(tmp_path), 3, 8, 0, 12, 0, 'cpu'):
        for caption, image in zip(batch['captions'], batch['images'].float()):
            flipped.setdefault(caption, set()).add(bool(image[0, :, 0].mean() < image[0, :, -1].mean()))
    assert flipped == {
        'a cat to the Left of a dog': {False}, 'the rightmost cat': {False}, 'a bright cat': {False, True}}


def test_flips_can_be_switched_off(tmp_path):
    half_red().save(tmp_path / 'a.png')
    for batch in data.batches(seen_whole(tmp_path, flip=False), 4, 8, 0, 4, 0, 'cpu'):
        assert (batch['images'][:, 0, :, 0] > batch['images'][:, 0, :, -1]).all()


def test_evaluation_does_not_depend_on_the_views_of_training(tmp_path):
    """Crop, flip and augmentation are for training; share is for evaluation."""
    half_red((40, 30)).save(tmp_path / 'a.png')
    plain = data.Folder(tmp_path)
    changed = data.Folder(tmp_path, views=data.Views(crop=(.1, .2), flip=False, augment='rand'))
    other = data.Folder(tmp_path, views=data.Views(share=.5))
    position = torch.arange(1)
    images = [dataset.batch(position, 8, train=False)['images'] for dataset in (plain, changed, other)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert torch.equal(images[0][0], data.load_view(tmp_path / 'a.png', 8))


# odd images

@pytest.mark.parametrize('mode, suffix', [('CMYK', 'jpg'), ('CMYK', 'tif'), ('L', 'jpg'), ('P', 'png'), ('P', 'gif'),
                                          ('RGBA', 'webp'), ('LA', 'png'), ('1', 'png'), ('L', 'bmp'), ('LAB', 'tif')])
def test_modes_become_rgb(tmp_path, mode, suffix):
    """White on the left, black on the right stays so in every mode."""
    image = Image.new('RGB', (16, 16), 'white')
    image.paste((0, 0, 0), (8, 0, 16, 16))
    path = tmp_path / f'a.{suffix}'
    if mode == 'LAB':
        image = Image.merge('LAB', [image.convert('L')] + [Image.new('L', (16, 16), 128)] * 2)
    image.convert(mode).save(path)
    pixels = np.asarray(data.read_image(path)).astype(int)
    assert pixels.shape == (16, 16, 3) and pixels[:, :4].min() > 235 and pixels[:, 12:].max() < 20


@pytest.mark.parametrize('dtype, top', [(np.uint16, 65535), (np.int32, 65535), (np.int32, 255), (np.float32, 1),
                                        (np.int32, 10 ** 6)])
def test_deep_pixels_are_scaled(tmp_path, dtype, top):
    ramp = np.linspace(0, top, 256).astype(dtype).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / 'a.tif')
    pixels = np.asarray(data.read_image(tmp_path / 'a.tif')).astype(int)
    assert abs(pixels[..., 0].ravel() - np.arange(256)).max() <= 1


def test_16_bit_png_is_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / 'a.png')
    assert np.asarray(data.read_image(tmp_path / 'a.png')).tolist() == np.full((4, 4, 3), 128).tolist()


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparency_is_white(tmp_path, mode):
    image = Image.new('RGBA', (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image = image.quantize(4) if mode == 'P' else image.convert(mode)
    image.save(tmp_path / 'a.png')
    pixels = np.asarray(data.read_image(tmp_path / 'a.png'))
    assert pixels[0, 0].max() < 10 and pixels[2:, 2:].min() > 245


@pytest.mark.parametrize('turn', range(1, 9))
def test_exif_orientation_is_applied(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    half_red().save(tmp_path / 'a.png', exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'a.png')))
    assert np.array_equal(np.asarray(data.read_image(tmp_path / 'a.png')), expected)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_metadata_does_not_lose_the_image(tmp_path):
    save(tmp_path / 'a.jpg', exif=b'Exif\0\0MM\0*\xff\xff\xff\xff garbage')
    assert data.read_image(tmp_path / 'a.jpg').size == (12, 8)


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_one_pixel(tmp_path, suffix):
    save(tmp_path / f'a.{suffix}', (1, 1))
    dataset = data.Folder(tmp_path)
    for batch in (*take(dataset, 0, 5), *data.eval_batches(dataset, 4, 8, 1, 'cpu')):
        assert (batch['images'].int() - torch.tensor([200, 30, 60]).view(3, 1, 1)).abs().max() < 6


@pytest.mark.parametrize('workers', [0, 1])
def test_broken_images_are_replaced_and_counted(tmp_path, workers):
    make_folder(tmp_path / 'train', 10)
    save(tmp_path / 'val/a.png')
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / 'train/004b.jpg')
    whole = (tmp_path / 'train/004b.jpg').read_bytes()
    (tmp_path / 'train/004b.jpg').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'train/000.png').write_bytes(b'')
    (tmp_path / 'train/009.png').write_bytes((tmp_path / 'train/009.png').read_bytes()[:50])
    dataset = data.Folder(tmp_path)
    stream = take(dataset, 0, 6, workers)
    assert {name for _, name in dataset.broken} == {'004b.jpg', '000.png', '009.png'} and len(dataset) == 11
    assert data.report_broken(dataset) == '3 of 11 images could not be read and were replaced: 000.png, 004b.jpg, 009.png'
    for batch in stream:
        wanted = data.sample_index(batch['position'], 11, 0).tolist()
        assert batch['index'].tolist() == [{0: 1, 5: 6, 10: 1}.get(i, i) for i in wanted]
        levels = torch.tensor([int(dataset.paths[i][:3]) * 20 for i in batch['index']])
        assert torch.equal(batch['images'].long().amax((1, 2, 3)), levels)


def test_nothing_broken_reports_nothing(tmp_path):
    assert data.report_broken(data.Folder(make_folder(tmp_path))) == ''


# folders

@pytest.mark.parametrize('make, message', [
    (lambda root: None, "does not exist; expected a folder of images, a folder of"),
    (lambda root: root.mkdir(), 'no images in it or below; looked for .jpg'),
    (lambda root: root.write_text('x'), 'no images in 1 tar shards'),
    (lambda root: (root.mkdir(), (root / 'a.jpg').write_text('x'), (root / 'b.png').write_text('x')), 'can be used'),
    (lambda root: (save(root / 'train/a.png'), (root / 'val').mkdir(), (root / 'train/a.png').unlink()), 'no images')])
def test_unusable_folders_say_what_was_looked_for(tmp_path, make, message):
    make(tmp_path / 'my_photos')
    with pytest.raises(data.Refused, match=f'my_photos.*{message}'):
        data.open_data(str(tmp_path / 'my_photos'))


@pytest.mark.parametrize('spec', ['shapes:unique', 'shapes:unique=', 'shapes:=3', 'shapes:unique=many'])
def test_wrong_knobs(spec):
    with pytest.raises(data.Refused, match='unique=N'):
        data.open_data(spec)


def test_mixed_formats_nested_and_upper_case(tmp_path):
    for name in ('b.JPG', 'a.png', 'deep/er/c.WebP', 'deep/d.bmp', 'e.gif', 'f.TIFF', '.hidden.png', '.cache/g.png'):
        save(tmp_path / name, format={'webp': 'WebP'}.get(name.split('.')[-1].lower()))
    (tmp_path / 'notes.md').write_text('not an image')
    train, val = data.Folder(tmp_path), data.Folder(tmp_path, 'val')
    assert sorted(train.paths + val.paths) == ['a.png', 'b.JPG', 'deep/d.bmp', 'deep/er/c.WebP', 'e.gif', 'f.TIFF']
    assert train.labels is None and train.classes == [] and not train.has_captions
    assert 'labels' not in next(data.batches(train, 2, 8, 0, 1, 0, 'cpu'))


def test_split_by_hash_is_stable_and_disjoint():
    """A path's side depends on that path alone: adding others moves nothing; about 5% are validation."""
    paths = [f'{i:05}.jpg' for i in range(4000)]
    half, whole = data.split_by_hash(paths[:2000]), data.split_by_hash(paths)
    assert sorted(whole['train'] + whole['val']) == paths and not set(whole['train']) & set(whole['val'])
    assert set(half['val']) == set(whole['val']) & set(paths[:2000]) and 150 < len(whole['val']) < 250
    assert data.split_by_hash(['00026.jpg', '00029.jpg']) in (          # both would be validation by hash
        {'train': ['00026.jpg'], 'val': ['00029.jpg']}, {'train': ['00029.jpg'], 'val': ['00026.jpg']})
    assert '00026.jpg' in whole['val'] and whole['val'] == sorted(whole['val'])


@pytest.mark.parametrize('num', [1, 2, 3])
def test_small_folders_have_both_splits(tmp_path, num):
    make_folder(tmp_path, num)
    assert len(data.Folder(tmp_path)) == max(1, num - 1) and len(data.Folder(tmp_path, 'val')) == 1


@pytest.mark.parametrize('base', ['', 'images/'])
def test_train_and_val_folders_are_the_splits(tmp_path, base):
    """Ids agree although val lacks the first class; annotations beside images/ are not images."""
    for name in ('train/ant/1.png', 'train/blue_bird/2.png', 'train/cat/3.png', 'val/blue_bird/4.png', 'val/cat/5.png'):
        save(tmp_path / f'{base}{name}')
    if base:
        save(tmp_path / 'annotations/train/6.png')
    train, val = data.Folder(tmp_path), data.Folder(tmp_path, 'val')
    assert train.paths == ['ant/1.png', 'blue_bird/2.png', 'cat/3.png']
    assert val.paths == ['blue_bird/4.png', 'cat/5.png']
    assert train.classes == val.classes == ['ant', 'blue_bird', 'cat']
    assert train.labels == [0, 1, 2] and val.labels == [1, 2]
    assert val.has_captions and val.caption(0) == 'a photo of a blue bird'


def test_nested_class_folders_give_labels(tmp_path):
    """The class is the first folder below those that all images share."""
    for name in ('pets/dog/a/1.png', 'pets/dog/b/2.png', 'pets/cat/3.png', 'pets/cat/4.png'):
        save(tmp_path / name)
    train, val = data.Folder(tmp_path), data.Folder(tmp_path, 'val')
    for dataset in (train, val):
        assert [dataset.classes[label] for label in dataset.labels] == [path.split('/')[1] for path in dataset.paths]
    batch = next(data.batches(train, 3, 8, 0, 1, 0, 'cpu'))
    assert batch['captions'] == [f'a photo of a {train.classes[label]}' for label in batch['labels']]


def test_caption_files_come_before_class_names(tmp_path):
    for name in ('dog/a.png', 'cat/b.png', 'cat/c.png'):
        save(tmp_path / 'train' / name)
    save(tmp_path / 'val/cat/d.png')
    (tmp_path / 'train/dog/a.txt').write_text('  my dog \n')
    dataset = data.Folder(tmp_path)
    assert [dataset.caption(i) for i in range(3)] == ['a photo of a cat', 'a photo of a cat', 'my dog']


def test_captions_need_a_file_for_every_image(tmp_path):
    make_folder(tmp_path, 4)
    for i in range(4):
        assert not data.Folder(tmp_path).has_captions
        (tmp_path / f'{i:03}.txt').write_text(f'image {i}')
    assert data.Folder(tmp_path).has_captions and data.Folder(tmp_path, 'val').has_captions


# tar shards

def jpeg(level, size=(12, 8)):
    out = io.BytesIO()
    Image.new('RGB', size, (level,) * 3).save(out, 'JPEG', quality=95)
    return out.getvalue()


def make_shard(path, members):
    """A tar of {name: bytes}, in this order."""
    with tarfile.open(path, 'w') as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def shard_members(first, num):
    """num samples as image datasets have them: image, caption, class."""
    return {f'{i:05}.{suffix}': content for i in range(first, first + num)
            for suffix, content in (('jpg', jpeg(i * 5)), ('txt', f'grey {i}'.encode()), ('cls', str(i % 2).encode()))}


@pytest.fixture
def damaged(tmp_path):
    """Three shards: one whole; one with a member that lacks its caption, an undecodable image, a caption that is not
    UTF-8; one cut off inside its third image. Samples 0 to 9, 10 to 19, 20 to 29."""
    make_shard(tmp_path / '00000.tar', shard_members(0, 10))
    members = shard_members(10, 10) | {'00013.jpg': b'no image', '00014.txt': 'caf\u00e9'.encode('latin-1')}
    del members['00012.txt']
    make_shard(tmp_path / '00001.tar', members)
    make_shard(tmp_path / '00002.tar', shard_members(20, 10))
    with tarfile.open(tmp_path / '00002.tar') as archive:
        end = archive.getmember('00022.jpg').offset_data + 100
    (tmp_path / '00002.tar').write_bytes((tmp_path / '00002.tar').read_bytes()[:end])
    return tmp_path


def test_damage_in_shards_is_skipped_and_counted(damaged):
    train, val = data.open_data(f'{damaged}/{{00000..00002}}.tar'), data.open_data(str(damaged), 'val')
    assert len(train) + len(val) == 10 + 9 + 2
    shown = set()
    for batch in data.eval_batches(train, 4, 8, 99, 'cpu'):
        for image, caption, label in zip(batch['images'].float(), batch['captions'], batch['labels']):
            number = round(image.mean().item() / 5)         # what the picture shows, its caption and class belong to it
            assert caption == ('caf\ufffd' if number == 14 else f'grey {number}') and label == number % 2
            shown.add(number)
    assert shown == {int(name[-5:]) for name in train.paths} - {13}
    list(data.eval_batches(val, 4, 8, 99, 'cpu'))
    lines = '\n'.join([data.report_broken(train), data.report_broken(val)]).splitlines()
    part = train if '00001.tar/00013' in train.paths else val
    assert set(lines) == {
        '1 captions are not UTF-8: 00001.tar/00014',
        f'1 of {len(part)} images could not be read and were replaced: 00001.tar/00013',
        '1 images without a caption were left out: 00001.tar/00012',
        f'1 shards are cut short or damaged: {damaged}/00002.tar'}


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_stream_of_shards_is_a_function_of_the_step(damaged, workers):
    """The same from the start and from the middle, for any number of workers, and so is what it reports."""
    stream, dataset = take(data.open_data(str(damaged)), 0, 7), data.open_data(str(damaged))
    assert same(take(dataset, 0, 7, workers), stream)
    assert same(take(data.open_data(str(damaged)), 3, 7, workers), stream[3:])
    whole = data.open_data(str(damaged))
    take(whole, 0, 7)
    assert dataset.broken == whole.broken


@pytest.mark.parametrize('damage', ['cut inside a header', 'a header of noise', 'no tar at all', 'lost its end'])
def test_a_shard_gives_what_comes_before_its_damage(tmp_path, damage):
    path = tmp_path / 'a.tar'
    make_shard(path, shard_members(0, 6))
    with tarfile.open(path) as archive:
        header = archive.getmember('00004.jpg').offset
    raw = path.read_bytes()
    path.write_bytes({'cut inside a header': raw[:header + 200], 'no tar at all': b'<html>404</html>' * 100,
                      'a header of noise': raw[:header] + bytes(range(256)) * 2 + raw[header + 512:],
                      'lost its end': raw[:header]}[damage])
    if damage == 'no tar at all':
        with pytest.raises(data.Refused, match='no images in 1 tar shards'):
            data.Shards([str(path)])
    else:
        shard = data.Shards([str(path)], 'test')
        assert len(shard) == 4 and data.report_broken(shard) == f'1 shards are cut short or damaged: {path}'


def test_json_captions_and_named_classes(tmp_path):
    members = {}
    for i, name in enumerate(['cat', 'dog', 'dog', 'cat']):
        members |= {f'{i}.png': jpeg(40 * i), f'{i}.json': json.dumps({'caption': f'my {name}'}).encode(),
                    f'{i}.cls': name.encode()}
    make_shard(tmp_path / 'a.tar', members | {'3.json': b'{"caption": null'})
    batch = next(data.eval_batches(data.Shards([str(tmp_path / 'a.tar')]), 4, 8, 4, 'cpu'))
    train = data.Shards([str(tmp_path / 'a.tar')])
    assert train.classes == ['cat', 'dog']
    for caption, label, i in zip(batch['captions'], batch['labels'].tolist(), batch['index'].tolist()):
        assert caption == ('' if train.paths[i].endswith('3') else f'my {train.classes[label]}')


def test_brace_ranges():
    assert data.expand('a/{08..11}.tar') == ['a/08.tar', 'a/09.tar', 'a/10.tar', 'a/11.tar']


@pytest.mark.parametrize('spec, message', [('{00000..00003}.tar', '00003.tar does not exist'), ('none.tar', 'does not exist')])
def test_absent_shards_are_named(damaged, spec, message):
    with pytest.raises(data.Refused, match=message):
        data.open_data(f'{damaged}/{spec}')


def test_shards_without_images_say_what_was_looked_for(tmp_path):
    make_shard(tmp_path / 'a.tar', {'0.txt': b'words'})
    with pytest.raises(data.Refused, match='no images in 1 tar shards; looked for .jpg'):
        data.open_data(str(tmp_path))
