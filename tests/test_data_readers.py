"""Readers of real data: CLIP's tokenizer, folders of images, tar shards, crops, and a stream that is a function of
(seed, step)."""
import gzip
import io
import json
import os
import random
import re
import signal
import struct
import sys
import tarfile
import zlib
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


@pytest.mark.parametrize('content', [b'', b'hello', b'\x1f\x8bbroken', b'\xff\xfe\x00', b'#version\na b\nab qqq', None,
                                     b'#version\na b c', 'bomb', 'pipe'])
def test_not_a_merge_table(tmp_path, content):
    if content == 'pipe':
        os.mkfifo(tmp_path / 'x.gz')
    elif content == 'bomb':
        (tmp_path / 'x.gz').write_bytes(gzip.compress(b'#version\n' + bytes(data.LONGEST_TEXT)))
    elif content is not None:
        (tmp_path / 'x.gz').write_bytes(gzip.compress(content) if content[:1] == b'#' else content)
    with pytest.raises(data.Refused, match='x.gz.*expected bpe_simple') as error:
        data.Tokenizer.openai(tmp_path / 'x.gz')
    assert content != 'bomb' or 'more than 16,777,216 bytes' in str(error.value)


@pytest.mark.parametrize('merges, message', [
    (['a b', 7], "merge 1 of the vocabulary is '7'"), (['a b', 'ab'], "merge 1 of the vocabulary is 'ab'"),
    (['a b', 'ab c d'], 'expected two known pieces'), (['abc d'], 'expected two known pieces'), ([None], "'None'")])
def test_merges_that_are_none_are_named(merges, message):
    with pytest.raises(data.Refused, match=message):
        data.Tokenizer(merges)


@pytest.mark.parametrize('letters', ['a', 'ab ', '\u65e5\u672c'])
def test_a_text_of_a_million_letters_is_cut(letters):
    """The first 77 ids stay what they are of a shorter text."""
    tokenizer = data.Tokenizer(['a b</w>'])
    assert torch.equal(tokenizer(letters * 10 ** 6), tokenizer(letters * 300))


def test_a_word_is_cut(monkeypatch):
    """The time that a word takes grows with the square of its letters."""
    spelt, spell = [], data.Tokenizer.spell
    monkeypatch.setattr(data.Tokenizer, 'spell', lambda self, word: spelt.append(len(word)) or spell(self, word))
    data.Tokenizer([])('a' * 5000)
    data.Tokenizer.learn(['a' * 5000], num_merges=1)
    assert spelt == [data.LONGEST_WORD] * 2


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
    dataset, before = data.Folder(tmp_path, captions=True), torch.get_rng_state()
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
    return data.Folder(folder, 'test', data.Views(crop=(1, 1), **options))


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


@pytest.mark.parametrize('flip, sides', [(True, {False, True}), (False, {False})])
def test_flips_can_be_switched_off(tmp_path, flip, sides):
    half_red().save(tmp_path / 'a.png')
    seen = [batch['images'][:, 0] for batch in data.batches(seen_whole(tmp_path, flip=flip), 4, 8, 0, 4, 0, 'cpu')]
    red_first = torch.cat([(red[:, :, 0] < red[:, :, -1]).all(1) for red in seen])
    assert set(red_first.tolist()) == sides


def test_evaluation_does_not_depend_on_the_views_of_training(tmp_path):
    """Crop, flip and augmentation are for training; share is for evaluation."""
    half_red((40, 30)).save(tmp_path / 'a.png')
    plain = data.Folder(tmp_path, 'test')
    changed = data.Folder(tmp_path, 'test', data.Views(crop=(.1, .2), flip=False, augment='rand'))
    other = data.Folder(tmp_path, 'test', data.Views(share=.5))
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


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_every_format_is_upright_once(tmp_path, suffix, turn):
    """Red above, green at the left, also in the views of training and evaluation."""
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20] = 255, 0, 0
    upright[:, :10] = 0, 255, 0
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(turn, data.TURNS.get(turn))
    stored = Image.fromarray(upright)
    stored = stored.transpose(back) if back is not None else stored
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f'a.{suffix}'
    stored.save(path, exif=exif, **dict(lossless=True) if suffix == 'webp' else {})
    whole = [.5] * 20 + [0., 0., 0.]
    views = data.read_image(path), data.load_view(path, 40, 1., 0.), data.load_crop(path, 40, whole, (1, 1))
    for view, expected in zip(views, (upright, upright[:, :40], upright[:, 3:57])):
        seen = np.asarray(view if isinstance(view, Image.Image) else view.permute(1, 2, 0)).astype(int)
        expected = np.asarray(Image.fromarray(expected).resize(seen.shape[1::-1])).astype(int)
        assert seen.shape == expected.shape and abs(seen - expected).mean() < 12


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('exif', [b'Exif\0\0MM\0*\xff\xff\xff\xff garbage', b'Exif\0\0no TIFF at all', b'Exif\0\0'])
def test_damaged_metadata_do_not_lose_the_image(tmp_path, exif, suffix):
    save(tmp_path / f'a.{suffix}', exif=exif)
    assert data.read_image(tmp_path / f'a.{suffix}').size == (12, 8)


@pytest.mark.parametrize('turn', [0, 9, 6.5, 'up', (6, 6)])
def test_an_orientation_that_is_none_turns_nothing(turn):
    image = half_red()
    image.getexif()[0x0112] = turn
    assert data.orientation(image) == 1


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('suffix, num', [('png', 10 ** 8), ('gif', 2 * 10 ** 8), ('bmp', 10 ** 10)])
def test_the_pixels_of_a_picture_are_bounded(tmp_path, suffix, num):
    """PIL warns from 90 million on and refuses twice as many; neither is more than one line. A header suffices."""
    save(tmp_path / f'a.{suffix}')
    raw = bytearray((tmp_path / f'a.{suffix}').read_bytes())
    place, form = {'png': (16, '>II'), 'gif': (6, '<HH'), 'bmp': (18, '<ii')}[suffix]
    struct.pack_into(form, raw, place, round(num ** .5), round(num ** .5))
    if suffix == 'png':
        struct.pack_into('>I', raw, 29, zlib.crc32(raw[12:29]))
    (tmp_path / f'a.{suffix}').write_bytes(raw)
    with pytest.raises(data.Unreadable, match=f'a.{suffix} cannot be read: .*') as error:
        with data.open_picture(tmp_path / f'a.{suffix}') as image:
            assert num == 10 ** 8
            raise ValueError(str(image.size))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.eps'])
@pytest.mark.parametrize('raw', [b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', b'%PDF-1.4\n'])
def test_no_picture_starts_a_program(tmp_path, monkeypatch, name, raw):
    """PIL gives EPS to Ghostscript, whatever the file's name."""
    def start(*args, **options):
        raise AssertionError(args)
    monkeypatch.setattr('subprocess.Popen', start)
    monkeypatch.setattr('subprocess.check_call', start)
    monkeypatch.setattr('PIL.EpsImagePlugin.Ghostscript', start)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(data.Unreadable, match='cannot identify'):
        data.read_image(tmp_path / name)


def test_pipes_and_folders_are_no_pictures(tmp_path):
    """They neither hang nor count as samples that can be read."""
    make_folder(tmp_path, 4)
    os.mkfifo(tmp_path / '004.png')
    os.mkfifo(tmp_path / '000.txt')
    (tmp_path / '005.png').mkdir()
    dataset = data.Folder(tmp_path, 'test')
    list(data.eval_batches(dataset, 4, 8, 9, 'cpu'))
    assert data.report_broken(dataset) == '1 of 5 images could not be read and were left out: 004.png'
    with pytest.raises(data.Refused, match='no caption for any'):
        data.Folder(tmp_path, captions=True)
    with pytest.raises(data.Unreadable, match='004.png is not a file'):
        data.read_image(tmp_path / '004.png')


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_one_pixel(tmp_path, suffix):
    save(tmp_path / f'a.{suffix}', (1, 1))
    dataset = data.Folder(tmp_path, 'test')
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
    assert data.report_broken(dataset) == '3 of 11 images could not be read and were left out: 000.png, 004b.jpg, 009.png'
    for batch in stream:
        wanted = data.sample_index(batch['position'], 11, 0).tolist()
        assert batch['index'].tolist() == [{0: 1, 5: 6, 10: 1}.get(i, i) for i in wanted]
        levels = torch.tensor([int(dataset.paths[i][:3]) * 20 for i in batch['index']])
        assert torch.equal(batch['images'].long().amax((1, 2, 3)), levels)


@pytest.mark.parametrize('broken', [['000'], ['001', '002', '005']])
def test_what_replaces_an_image_does_not_count_twice(tmp_path, broken):
    """As judged its position is beyond every end; in training it stays, for randomness hangs on it."""
    make_folder(tmp_path, 6)
    for name in broken:
        (tmp_path / f'{name}.png').write_bytes(b'')
    dataset = data.Folder(tmp_path, 'test')
    found = [(batch['index'], batch['position']) for batch in data.eval_batches(dataset, 4, 8, 6, 'cpu')]
    index, position = map(torch.cat, zip(*found))
    assert sorted(index[position < 6].tolist()) == [i for i in range(6) if f'{i:03}' not in broken]
    assert (position == data.REPLACED).sum() == len(broken)
    assert torch.cat([batch['position'] for batch in take(dataset, 0, 3)]).tolist() == list(range(12))


def test_one_broken_image_is_not_the_whole_validation(tmp_path):
    """Of 14 images the only one below 5% is broken: 7 are validation."""
    make_folder(tmp_path, 14)
    first = data.Folder(tmp_path, 'val')
    (tmp_path / first.paths[first.index(torch.zeros(1, dtype=torch.long), 0)[0]]).write_bytes(b'')
    val = data.Folder(tmp_path, 'val')
    seen = torch.cat([batch['position'] for batch in data.eval_batches(val, 4, 8, 99, 'cpu')])
    assert len(val) == 7 and (seen < 7).sum() == 6 and len(val.broken) == 1


# clips

def make_clip(folder, frames):
    for frame in frames:
        save(folder / f'frame{frame}.png', colour=(20 * frame,) * 3)


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    for clip in 'ab':
        make_clip(tmp_path / 'train/up' / clip, range(12))
        make_clip(tmp_path / 'val/down' / clip, range(12))
    clips = data.open_data(str(tmp_path), 'val', frames=4)
    batch = clips.batch(torch.arange(1), 8, train=False)
    assert [view[:, 0, 4, 4].tolist() for view in batch['images'][0]][::3] == [
        [0, 60, 120, 180], [20, 80, 140, 200], [20, 80, 140, 200], [40, 100, 160, 220]]


def test_clips_that_cannot_be_used_are_counted_and_the_others_stay(tmp_path):
    """Too few frames, a picture beside the clips, a broken frame."""
    for i in range(8):
        make_clip(tmp_path / f'{"ab"[i % 2]}/{i}', range(3 if i == 2 else 6))
    save(tmp_path / 'b/stray.png')
    for name in os.listdir(tmp_path / 'a/4'):
        (tmp_path / 'a/4' / name).write_bytes(b'')
    clips = data.open_data(str(tmp_path), 'test', frames=4)
    assert clips.paths == ['a/0', 'a/4', 'a/6', 'b/1', 'b/3', 'b/5', 'b/7'] and clips.labels == [0, 0, 0, 1, 1, 1, 1]
    list(data.eval_batches(clips, 4, 8, 9, 'cpu'))
    assert data.report_broken(clips).splitlines() == [
        '2 clips have fewer than 4 frames and were left out: a/2, b',
        '1 of 7 clips could not be read and were left out: a/4']
    with pytest.raises(data.Refused, match='no clips in it .*; 9 clips have fewer than 7 frames'):
        data.open_data(str(tmp_path), 'test', frames=7)


def test_data_that_vanish_are_one_line(tmp_path):
    make_clip(tmp_path / 'a/0', range(4))
    clips = data.open_data(str(tmp_path), 'test', frames=4)
    for name in os.listdir(tmp_path / 'a/0'):
        (tmp_path / 'a/0' / name).unlink()
    with pytest.raises(data.Refused, match='none of 1 clips can be used; the last: .*a/0 has no frames'):
        next(data.eval_batches(clips, 4, 8, 9, 'cpu'))


@pytest.mark.parametrize('workers', [0, 1])
def test_what_a_reader_process_refuses_is_one_line(tmp_path, workers):
    dataset, before = data.Folder(make_folder(tmp_path, 8), 'test'), torch.multiprocessing.active_children()
    for path in dataset.paths:
        (tmp_path / path).unlink()
    with pytest.raises(data.Refused) as error:
        take(dataset, 0, 3, workers)
    for child in set(torch.multiprocessing.active_children()) - set(before):
        child.kill()            # else it waits five seconds
    assert re.fullmatch(f'{tmp_path}: none of 8 images can be used; the last: .* does not exist', str(error.value))


def test_a_reader_process_that_dies_is_one_line_where_data_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data, '__defaults__', (.1,))
    before = torch.multiprocessing.active_children()
    stream = data.batches(data.Folder(make_folder(tmp_path), 'test'), 4, 8, 0, 1000, 0, 'cpu', workers=1)
    next(stream)
    child, = set(torch.multiprocessing.active_children()) - set(before)
    os.kill(child.pid, signal.SIGKILL)
    child.join()                # torch's own handler would raise here
    with pytest.raises(data.Refused, match='a process that reads data died .*; try fewer --workers'):
        list(stream)


def test_nothing_broken_reports_nothing(tmp_path):
    assert data.report_broken(data.Folder(make_folder(tmp_path))) == ''


# folders

@pytest.mark.parametrize('make, message', [
    (lambda root: None, "does not exist; expected a folder of images, a folder of"),
    (lambda root: root.mkdir(), 'no images in it or below; looked for .jpg'),
    (lambda root: root.write_text('x'), 'no images in 1 tar shards'),
    (lambda root: (root.mkdir(), [(root / f'{i}.jpg').write_text('x') for i in range(4)]), 'can be used'),
    (lambda root: save(root / 'test/a.png'), 'only a folder of tests; to use it give .*/my_photos/test as --data'),
    (lambda root: make_folder(root, 3), 'has 3 images, too few .* give at least 4'),
    (lambda root: (make_folder(root / 'a', 2), save(root / 'b/c.png'), save(root / 'd.png')), 'too few .* least 4; 1 images have no class'),
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
    assert '00026.jpg' in whole['val'] and whole['val'] == sorted(whole['val'])


@pytest.mark.parametrize('num, val', [(4, 2), (7, 3), (15, 7), (16, 8), (100, 8)])
def test_validation_is_at_least_8_and_at_most_half(num, val):
    splits = data.split_by_hash([f'{i:05}.jpg' for i in range(num)])
    assert (len(splits['train']), len(splits['val'])) == (num - val, val)


def test_any_number_of_images_can_be_tested_on(tmp_path):
    assert len(data.Folder(make_folder(tmp_path, 1), 'test')) == 1


@pytest.mark.parametrize('base', ['', 'images/'])
def test_train_and_val_folders_are_the_splits(tmp_path, base):
    """Ids agree although val lacks the first class; annotations beside images/ are not images."""
    for name in ('train/ant/1.png', 'train/blue_bird/2.png', 'train/cat/3.png', 'val/blue_bird/4.png', 'val/cat/5.png'):
        save(tmp_path / f'{base}{name}')
    if base:
        save(tmp_path / 'annotations/train/6.png')
    train, val = data.Folder(tmp_path), data.Folder(tmp_path, 'val', captions=True)
    assert train.paths == ['ant/1.png', 'blue_bird/2.png', 'cat/3.png']
    assert val.paths == ['blue_bird/4.png', 'cat/5.png']
    assert train.classes == val.classes == ['ant', 'blue_bird', 'cat']
    assert train.labels == [0, 1, 2] and val.labels == [1, 2]
    assert val.has_captions and val.caption(0) == 'a photo of a blue bird'


def test_nested_class_folders_give_labels(tmp_path):
    """The class is the first folder below those that all images share."""
    for name in ('pets/dog/a/1.png', 'pets/dog/b/2.png', 'pets/cat/3.png', 'pets/cat/4.png'):
        save(tmp_path / name)
    train, val = data.Folder(tmp_path, captions=True), data.Folder(tmp_path, 'val')
    for dataset in (train, val):
        assert [dataset.classes[label] for label in dataset.labels] == [path.split('/')[1] for path in dataset.paths]
    batch = next(data.batches(train, 2, 8, 0, 1, 0, 'cpu'))
    assert batch['captions'] == [f'a photo of a {train.classes[label]}' for label in batch['labels']]


def test_caption_files_come_before_class_names(tmp_path):
    for name in ('dog/a.png', 'cat/b.png', 'cat/c.png'):
        save(tmp_path / 'train' / name)
    save(tmp_path / 'val/cat/d.png')
    (tmp_path / 'train/dog/a.txt').write_text('  my dog \n')
    (tmp_path / 'train/cat/c.txt').write_text(' \n')
    dataset = data.Folder(tmp_path, captions=True)
    assert [dataset.caption(i) for i in range(3)] == ['a photo of a cat', 'a photo of a cat', 'my dog']


def test_images_without_a_caption_are_left_out_only_where_captions_are_asked_for(tmp_path):
    """An empty file is none, as no file; one of blanks is met when it is read, and replaced."""
    make_folder(tmp_path, 8)
    with pytest.raises(data.Refused, match='no caption for any; .* 8 images have no caption'):
        data.Folder(tmp_path, captions=True)
    for i in range(7):
        (tmp_path / f'{i:03}.txt').write_text({2: '', 3: ' \n'}.get(i, f'\ufeffgrey {i}'))
    plain, dataset = data.Folder(tmp_path, 'test'), data.Folder(tmp_path, 'test', captions=True)
    assert len(plain) == 8 and not plain.broken and 'captions' not in plain.sample(0, 8, None)
    assert dataset.some_captions(99) == ['grey 0', 'grey 1', 'grey 4', 'grey 5', 'grey 6']
    list(data.eval_batches(dataset, 4, 8, 99, 'cpu'))
    assert data.report_broken(dataset).splitlines() == [
        '2 images have no caption and were left out: 002.png, 007.png',
        '1 of 6 images have no caption and were left out: 003.png']
    assert not data.Folder(tmp_path, 'val', captions=True).broken           # training's to say


@pytest.mark.parametrize('names, classes', [
    (('train/cat/1', 'train/dog/2', 'valid/cat/3', 'test/cat/4'), ['cat', 'dog']),
    (('Training/cat/1', 'Training/dog/2', 'Validation/cat/3', 'Testing/cat/4'), ['cat', 'dog']),
    (('images/train/cat/1', 'images/train/dog/2', 'images/validation/cat/3', 'images/test/cat/4'), ['cat', 'dog']),
    (('cat/1', 'dog/2', 'val/cat/3', 'test/cat/4'), ['cat', 'dog']),
    (('1', '2', 'valid/3', 'test/4'), [])])
def test_folders_by_the_names_of_splits_are_splits(tmp_path, names, classes):
    for name in names:
        save(tmp_path / f'{name}.png')
    found = {split: data.Folder(tmp_path, split) for split in ('train', 'val', 'test')}
    assert {split: ''.join(path[-5] for path in dataset.paths) for split, dataset in found.items()} == {
        'train': '12', 'val': '3', 'test': '3'}
    assert all(dataset.classes == classes for dataset in found.values())


@pytest.mark.parametrize('split, num', [('train', 4), ('val', 4), ('test', 8)])
def test_training_alone_is_split_and_test_is_never_read(tmp_path, split, num):
    make_folder(tmp_path / 'train', 8)
    make_folder(tmp_path / 'test', 30)
    dataset = data.Folder(tmp_path, split)
    assert len(dataset) == num and dataset.root == str(tmp_path / 'train')


@pytest.mark.parametrize('stray', ['stray.png', 'pets/stray.png'])
def test_a_stray_picture_does_not_take_the_others_labels(tmp_path, stray):
    for name in ('pets/cat/1', 'pets/cat/2', 'pets/dog/3', 'pets/dog/4'):
        save(tmp_path / f'{name}.png')
    save(tmp_path / stray)
    dataset = data.Folder(tmp_path, 'test')
    assert dataset.labels == [0, 0, 1, 1] and dataset.classes == ['cat', 'dog']
    assert data.report_broken(dataset) == f'1 images have no class and were left out: {stray}'


def test_few_with_a_class_are_labels_only_where_asked_for(tmp_path):
    make_folder(tmp_path, 8)
    with pytest.raises(data.Refused, match='no class for any; expected .* 8 images have no class'):
        data.Folder(tmp_path, labels=True)
    for name in ('10/a', '9/b'):
        save(tmp_path / f'{name}.png')
    assert data.Folder(tmp_path, 'test').labels is None and len(data.Folder(tmp_path, 'test')) == 10
    asked = data.Folder(tmp_path, 'test', labels=True)
    assert asked.paths == ['9/b.png', '10/a.png'] and asked.labels == [0, 1] and asked.classes == ['9', '10']


def test_validation_without_classes_takes_none_of_trainings_images(tmp_path):
    for name in ('train/cat/1', 'train/dog/2', 'val/3'):
        save(tmp_path / f'{name}.png')
    assert [data.Folder(tmp_path, split).labels for split in ('train', 'val')] == [None, None]


def test_natural_order():
    """Numbers as numbers, with any number of digits or zeros; an order of all names."""
    names = ['a1', 'a2', 'a02', 'a10', 'a\u0663', 'b' + '9' * 5000, 'b1', '', '3', '10', '\u0663', '\u00b2']
    ordered = ['', '3', '10', 'a1', 'a02', 'a2', 'a10', 'a\u0663', 'b1', 'b' + '9' * 5000, '\u00b2', '\u0663']
    assert sorted(names, key=data.natural) == ordered == sorted(reversed(names), key=data.natural)


@pytest.mark.parametrize('known, message', [(['cat', 'dog'], "2 known: cat, dog$"), (list('abcd'), '4 known: a, b, c, ...$')])
def test_find_classes_goes_by_name(known, message):
    assert data.find_classes(known[::-1], known, 'x') == list(range(len(known)))[::-1]
    with pytest.raises(data.Refused, match=f"^x has the class 'eel', which is none of the {message}"):
        data.find_classes([known[0], 'eel'], known, 'x')


def test_identity_knows_names_and_classes(tmp_path):
    for name in ('cat/1', 'cat/2', 'dog/3', 'dog/4'):
        save(tmp_path / f'{name}.png')
    before = data.Folder(tmp_path, 'test').identity()
    assert before == data.Folder(tmp_path, 'test').identity() and json.loads(json.dumps(before)) == before
    (tmp_path / 'dog/4.png').rename(tmp_path / 'dog/5.png')
    after = data.Folder(tmp_path, 'test').identity()
    assert before['names'] != after['names'] and before['samples'] == after['samples'] == 4
    assert after['classes'] == ['cat', 'dog'] and data.World().identity() != data.World(objects=1).identity()


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


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_tar_are_where_tarfile_finds_them(tmp_path, form):
    """Of plain headers, and of those that are not: long names, times with fractions, owners of more than 7 digits."""
    names = ['0.jpg', 'folder/1.txt', 'caf\u00e9.cls', 'x' * 96 + '.jpg', f'{"d" * 60}/{"e" * 60}.jpg']
    with tarfile.open(tmp_path / 'a.tar', 'w', format=form) as archive:
        for n, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * n
            info.mtime = 1700000000.5 if form == tarfile.PAX_FORMAT else 1700000000
            info.uid = 0 if form == tarfile.USTAR_FORMAT else 8 ** 7 * (n % 2)
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(tmp_path / 'a.tar') as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert list(data.tar_members(tmp_path / 'a.tar')) == expected and [name for name, *_ in expected] == names


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
    train, val = [data.open_data(spec, split, captions=True) for spec, split in (
        (f'{damaged}/{{00000..00002}}.tar', 'train'), (str(damaged), 'val'))]
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
        f'1 of {len(part)} images could not be read and were left out: 00001.tar/00013',
        '1 images have no caption and were left out: 00001.tar/00012',
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
    make_shard(tmp_path / 'a.tar', members)
    shard = data.Shards([str(tmp_path / 'a.tar')], 'test', captions=True)
    batch = next(data.eval_batches(shard, 4, 8, 4, 'cpu'))
    assert shard.classes == ['cat', 'dog']
    assert batch['captions'] == [f'my {shard.classes[label]}' for label in batch['labels']]


NO_CAPTIONS = ['{}', '{"caption": null}', '{"caption": ""}', '{"caption": " "}', '{"caption": 7}', '{"caption": [1, ""]}',
               '[]', '"caption"', '{"text": "a dog"}', '{"caption": "\xa0"}', '{"caption": "a', '[' * 100_000, '{"caption": ' + '9' * 5000 + '}']


def test_what_is_no_caption_is_left_out_and_counted(tmp_path):
    members = {}
    for i, held in enumerate(NO_CAPTIONS + ['{"caption": "a \\ud83d dog"}'] * 4):
        members |= {f'{i}.jpg': jpeg(10 * i), f'{i}.json': held.encode()}
    make_shard(tmp_path / 'a.tar', members | {'20.jpg': jpeg(0), '20.txt': b' \n', '1.txt': b'seen'})
    shard = data.open_data(str(tmp_path), 'test', captions=True)
    assert shard.some_captions(9) == ['seen'] + ['a ? dog'] * 4
    assert data.report_broken(shard) == (
        f'{len(NO_CAPTIONS)} images have no caption and were left out: a.tar/0, a.tar/2, a.tar/3, ...')
    plain = data.open_data(str(tmp_path), 'test')
    assert len(plain) == len(NO_CAPTIONS) + 5 and not plain.broken


@pytest.mark.parametrize('held', ['{"caption": null}', '{"text": "a dog"}'])
def test_shards_without_any_caption_are_refused(tmp_path, held):
    members = {f'{i}.{kind}': raw for i in range(4) for kind, raw in (('jpg', jpeg(i)), ('json', held.encode()))}
    make_shard(tmp_path / 'a.tar', members)
    with pytest.raises(data.Refused, match='a.tar: no caption for any; expected .txt or .json members .*; 4 images have no'):
        data.open_data(str(tmp_path), captions=True)


def test_of_several_captions_the_samples_number_chooses(tmp_path):
    """All are seen, each as often; as judged the first; the crops are those of one caption."""
    for name, held in (('a', ['one', 2, '', 'two', 'three']), ('b', 'one')):
        held = json.dumps(dict(caption=held)).encode()
        members = {f'{i}.{kind}': raw for i in range(8) for kind, raw in (('jpg', jpeg(9 * i)), ('json', held))}
        make_shard(tmp_path / f'{name}.tar', members)
    several, single = [data.open_data(str(tmp_path / name), captions=True) for name in ('a.tar', 'b.tar')]
    seen = [caption for batch in take(several, 0, 75) for caption in batch['captions']]
    assert all(abs(seen.count(word) - 100) < 35 for word in ('one', 'two', 'three'))
    assert {caption for batch in data.eval_batches(several, 4, 8, 9, 'cpu') for caption in batch['captions']} == {'one'}


def test_a_caption_is_bounded(tmp_path):
    members = {f'{i}.{kind}': raw for i in range(4)
               for kind, raw in (('jpg', jpeg(i)), ('txt', '\u2603'.encode() * 500_000))}
    make_shard(tmp_path / 'a.tar', members)
    dataset = data.open_data(str(tmp_path), captions=True)
    assert dataset.caption(0) == '\u2603' * data.LONGEST_CAPTION


def test_one_sample_without_a_class_does_not_take_the_others(tmp_path):
    """Not UTF-8, empty, missing: no class; numbers sort as numbers."""
    members = {f'{i}.jpg': jpeg(9 * i) for i in range(8)}
    classes = [b'10\n', b'9', b'', b'caf\xe9', None, b'9', b'2', b'10']
    members |= {f'{i}.cls': raw for i, raw in enumerate(classes) if raw is not None}
    make_shard(tmp_path / 'a.tar', members)
    shard = data.open_data(str(tmp_path), 'test')
    assert shard.label_names == ['2', '9', '10'] and shard.labels == [2, 1, 1, 0, 2]
    assert data.report_broken(shard) == '3 images have no class and were left out: a.tar/2, a.tar/3, a.tar/4'


def test_members_that_come_again_are_counted(tmp_path):
    """The last counts, as when a tar is unpacked; shards of one name in two folders are two."""
    for name, level in (('a', 50), ('b', 100)):
        (tmp_path / name).mkdir()
        members = {f'{i}.jpg': jpeg(level) for i in range(4)}
        make_shard(tmp_path / name / '0.tar', members)
        if name == 'b':
            with tarfile.open(tmp_path / name / '0.tar', 'a') as archive:
                archive.addfile(archive.getmember('3.jpg'), io.BytesIO(jpeg(200)[:archive.getmember('3.jpg').size]))
    shards = data.Shards([str(tmp_path / name / '0.tar') for name in 'ab'], 'test')
    assert len(shards) == 8
    assert data.report_broken(shards) == '1 members are there again, of which the last counts: b/0.tar/3.jpg at byte 5,120'


def test_odd_members_are_no_samples(tmp_path):
    """Links, folders, pipes, hidden files and a size beyond the end; what stands before counts."""
    make_shard(tmp_path / 'a.tar', {f'{i}.jpg': jpeg(9 * i) for i in range(4)} | {'._0.jpg': b'x', '.jpg': b'x'})
    with tarfile.open(tmp_path / 'a.tar', 'a') as archive:
        for i, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f'odd{i}.jpg')
            info.type, info.linkname = kind, '0.jpg'
            archive.addfile(info)
    shard = data.open_data(str(tmp_path), 'test')
    assert len(shard) == 4 and not shard.broken
    raw = bytearray((tmp_path / 'a.tar').read_bytes())
    with tarfile.open(tmp_path / 'a.tar') as archive:
        end = archive.getmembers() and archive.offset
    for size in (2 ** 60, 2 ** 63 - 1, -512, -2 ** 70):
        info = tarfile.TarInfo('9.jpg')
        info.size = size
        raw[end:end + 512] = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / 'a.tar').write_bytes(raw)
        shard = data.open_data(str(tmp_path), 'test')
        assert len(shard) == 4 and data.report_broken(shard) == f'1 shards are cut short or damaged: {tmp_path}/a.tar'


@pytest.mark.parametrize('kind', ['pipe', 'gzip', 'empty', 'folder'])
def test_what_is_no_tar_among_shards_is_named(tmp_path, kind):
    make_shard(tmp_path / 'a.tar', shard_members(0, 4))
    path = tmp_path / 'b.tar'
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    else:
        path.write_bytes(gzip.compress((tmp_path / 'a.tar').read_bytes()) if kind == 'gzip' else b'')
    shard = data.open_data(str(tmp_path), 'test')
    assert len(shard) == 4 and data.report_broken(shard) == f'1 shards are cut short or damaged: {path}'
    with pytest.raises(data.Refused, match=f'no images in 1 tar shards; .*; 1 shards are cut short or damaged: {path}'):
        data.Shards([str(path)])


def test_names_are_printed_in_one_line(tmp_path):
    name = b'a\n\x1b[31m\xff'.decode('utf-8', 'surrogateescape')
    make_shard(tmp_path / 'a.tar', shard_members(0, 4) | {f'{name}.jpg': b'no image'})
    shard = data.open_data(str(tmp_path), 'test')
    list(data.eval_batches(shard, 4, 8, 9, 'cpu'))
    assert data.report_broken(shard).endswith('and were left out: a.tar/a??[31m?')


def test_brace_ranges():
    assert data.expand('a/{08..11}.tar') == ['a/08.tar', 'a/09.tar', 'a/10.tar', 'a/11.tar']


@pytest.mark.parametrize('spec, num', [('{00000..99999999}.tar', '100,000,000'), ('{5..1}.tar', '-3'), ('{0..100000}', '100,001')])
def test_ranges_are_bounded(spec, num):
    with pytest.raises(data.Refused, match=f'is a range of {num} shards; expected 1 to 100,000'):
        data.open_data(spec)


@pytest.mark.parametrize('spec, message', [('{00000..00003}.tar', '00003.tar does not exist'), ('none.tar', 'does not exist')])
def test_absent_shards_are_named(damaged, spec, message):
    with pytest.raises(data.Refused, match=message):
        data.open_data(f'{damaged}/{spec}')


def test_shards_without_images_say_what_was_looked_for(tmp_path):
    make_shard(tmp_path / 'a.tar', {'0.txt': b'words'})
    with pytest.raises(data.Refused, match='no images in 1 tar shards; looked for .jpg'):
        data.open_data(str(tmp_path))


def class_folders(root, *places):
    """Four pictures in each of these folders."""
    for place in places:
        (root / place).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (8, 8), (60 * i, 0, 0)).save(root / place / f'{i}.png')


@pytest.mark.parametrize('train, val', [('TRAIN', 'Val'), ('Training', 'dev'), ('train', 'VALID')])
def test_splits_are_known_in_any_case(tmp_path, train, val):
    class_folders(tmp_path, f'{train}/a', f'{train}/b', f'{val}/a', f'{val}/b')
    assert len(data.open_data(str(tmp_path), 'train')) == len(data.open_data(str(tmp_path), 'val')) == 8


@pytest.mark.parametrize('folders, words', [
    (('seg_train/a', 'seg_test/a'), 'are seg_test, seg_train classes'), (('training_set/a', 'test_set/a'), 'classes'),
    (('val/a', 'validation/a', 'train/a'), 'both of the split val'), (('car', 'bus', 'train'), 'images beside')])
def test_folders_that_may_be_splits_or_classes_are_refused(tmp_path, folders, words):
    """Neither guessed nor trained on: whether train/ beside car/ is a class, and what seg_test/ is."""
    class_folders(tmp_path, *folders)
    with pytest.raises(data.Refused, match=words):
        data.open_data(str(tmp_path), 'train')


def test_a_shard_beside_splits_is_refused(tmp_path):
    class_folders(tmp_path, 'train/a', 'val/a')
    make_shard(tmp_path / 'val_backup.tar', {'0.jpg': jpeg(0)})
    with pytest.raises(data.Refused, match='val_backup.tar beside'):
        data.open_data(str(tmp_path))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_classes_of_validation_alone_mean_that_there_are_none(tmp_path, split):
    """As in Tiny-ImageNet, whose validation lies in one folder: said, and no probe is 0 for it."""
    class_folders(tmp_path, 'train/n1/images', 'train/n2/images', 'val/images')
    dataset = data.open_data(str(tmp_path), split)
    assert dataset.labels is None and 'classes are in validation only' in data.report_broken(dataset)


def test_pictures_that_are_not_read_are_said(tmp_path):
    class_folders(tmp_path, 'a')
    (tmp_path / 'a' / 'x.heic').write_bytes(b'x')
    (tmp_path / 's').mkdir()
    make_shard(tmp_path / 's' / '0.tar', {f'{i}.jpg': jpeg(i) for i in range(4)} | {'photo.v1.png': b'x'})
    assert 'a/x.heic' in data.report_broken(data.open_data(str(tmp_path), 'train'))
    assert '1 members have two endings' in data.report_broken(data.open_data(str(tmp_path / 's'), 'train'))


def test_a_class_folder_that_is_linked_twice_counts_twice(tmp_path):
    """Only a link to a folder above is not followed."""
    class_folders(tmp_path, 'd/a')
    os.symlink(tmp_path / 'd' / 'a', tmp_path / 'd' / 'b')
    os.symlink(tmp_path / 'd', tmp_path / 'd' / 'a' / 'up')
    dataset = data.open_data(str(tmp_path / 'd'), 'test')
    assert dataset.classes == ['a', 'b'] and len(dataset) == 8


def test_identity_tells_other_contents_under_the_same_names(tmp_path):
    """A picture of another size, or another class in a shard."""
    class_folders(tmp_path, 'f/a')
    (tmp_path / 's').mkdir()
    make_shard(tmp_path / 's' / '0.tar', {f'{i}.jpg': jpeg(i) for i in range(4)} | {f'{i}.cls': b'%d' % (i % 2) for i in range(4)})
    before = [data.open_data(str(tmp_path / place), 'test').identity() for place in 'fs']
    Image.new('RGB', (80, 80), 'red').save(tmp_path / 'f' / 'a' / '0.png')
    make_shard(tmp_path / 's' / '0.tar', {f'{i}.jpg': jpeg(i) for i in range(4)} | {f'{i}.cls': b'%d' % (i // 2) for i in range(4)})
    after = [data.open_data(str(tmp_path / place), 'test').identity() for place in 'fs']
    assert before[0] != after[0] and before[1] != after[1]
