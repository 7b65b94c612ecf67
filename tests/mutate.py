"""
Damaged inputs, by a seed: small valid sets, and many hundred ways to spoil each. The command that reads a set must
end well and count what it left out, or refuse it in one line that names the file, whatever is in it.

    python tests/mutate.py                          # all of them: a line for each that is not answered so
    python tests/mutate.py --some 40 --seed 3       # 40 of them
    python tests/mutate.py --only boxes/images/0    # those whose names start so, and all that is said

A set is a dict of files: path -> what is in it, which is bytes, or what `write` makes them of. A mutation is a name
and a function of (rng, files) that changes files in place; one more is a line more in one of the tables.
"""
import argparse
import bz2
import copy
import functools
import gzip
import importlib
import io
import json
import lzma
import os
import re
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib

import numpy as np
from PIL import Image

SIZE = (24, 32)             # height, width of the pictures
SECONDS = 10                # that a command may take, and
MEGABYTES = 1000            # of memory beyond what its libraries take


# ---- small valid sets ---------------------------------------------------------------------------

def encode(pixels, format='PNG', mode=None, **options):
    """The bytes of a picture of pixels [H, W] or [H, W, 3]."""
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels))
    image = image.convert(mode) if mode else image
    image.save(file, format, **options)
    return file.getvalue()


def photo(seed, format='PNG', size=SIZE, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    return encode(pixels.astype(np.uint8), format, **options)


def coco_rows(image):
    """Annotations of each form: a polygon, runs as a list and as a string, a box alone, a crowd."""
    runs = dict(size=list(SIZE), counts=[100, 8, 660])
    forms = [dict(bbox=[2, 3, 10, 8], segmentation=[[2, 3, 12, 3, 12, 11, 2, 11]]),
             dict(bbox=[4, 4, 1, 8], segmentation=runs),
             dict(bbox=[4, 4, 1, 8], segmentation=dict(runs, counts='T38dd0')),
             dict(bbox=[8, 2, 12, 15]), dict(bbox=[0, 0, 20, 20], segmentation=runs, iscrowd=1)]
    return [dict(id=10 * image + k, image_id=image, category_id=1 + k % 2, area=80.) | dict(iscrowd=0) | form
            for k, form in enumerate(forms)]


def coco_set(num=2):
    """Detection: train.json, val.json and the pictures of both."""
    files = {}
    for split in ('train', 'val'):
        images = [dict(id=1 + i, file_name=f'{i}.png', height=SIZE[0], width=SIZE[1]) for i in range(num)]
        rows = [row for image in images for row in coco_rows(image['id'])]
        categories = [dict(id=1, name='cat'), dict(id=2, name='dog')]
        files[f'{split}.json'] = copy.deepcopy(dict(images=images, annotations=rows, categories=categories))
        files |= {f'{split}/{i}.png': photo(i) for i in range(num)}
    return files


def lvis_set():
    files = coco_set()
    for split in ('train', 'val'):
        for image in files[f'{split}.json']['images']:
            image.update(neg_category_ids=[1], not_exhaustive_category_ids=[2])
        for category in files[f'{split}.json']['categories']:
            category.update(frequency='f')
    return files


def shard_set(num=24):
    """Two shards of pictures, captions and classes: members [name, bytes, type of member]."""
    members = []
    for i in range(num):
        about = json.dumps(dict(caption=f'number {i} in json'))
        for suffix, content in dict(jpg=photo(i, 'JPEG'), txt=b'a photo of number %d' % i, cls=b'%d' % (i % 3),
                                    json=about.encode()).items():
            members.append([f'{i:05}.{suffix}', content, tarfile.REGTYPE])
    return {'00000.tar': members[:2 * num], '00001.tar': members[2 * num:]}


def map_set(num=4):
    """Segmentation: pictures, label maps of three classes, and these classes' names."""
    files = {'classes.txt': b'sky\nsea\nland\n'}
    for split in ('train', 'val'):
        for i in range(num):
            labels = np.random.default_rng(i).integers(0, 3, SIZE)
            files[f'images/{split}/{i}.png'] = photo(i)
            files[f'annotations/{split}/{i}.png'] = encode(labels.astype(np.uint8))
    return files


@functools.cache
def weights():
    """What a file of ours holds."""
    import torch
    import model as M
    config = M.ViTConfig(**M.SIZES['pico'] | dict(depth=1, head=2, pool='mean', mask_token=False))
    with tempfile.TemporaryDirectory() as folder:
        M.save(M.init_weights(M.ViT(config)), f'{folder}/w.pt', classes=['cat', 'dog'])
        return torch.load(f'{folder}/w.pt', weights_only=True)


def weight_set(num=16):
    """Weights, and two class folders of pictures to fine-tune them on."""
    folders = {f'data/{"cat" if i % 2 else "dog"}/{i}.png': photo(i) for i in range(num)}
    return {'w.pt': copy.deepcopy(weights()), **folders}


# ---- the bytes of a file, and writing a set -----------------------------------------------------

DEEP = 'a very deep list'       # stands for one in a json: Python's writer has a limit, as its reader has


def pack(name, content):
    """The bytes of a json's value, of a shard's members, of what a file of weights holds."""
    file = io.BytesIO()
    if isinstance(content, bytes):
        file.write(content)
    elif name.endswith('.json'):
        file.write(json.dumps(content).replace(f'"{DEEP}"', '[' * 20_000 + ']' * 20_000).encode())
    elif name.endswith('.pt'):
        import torch
        torch.save(content, file)
    else:
        archive = tarfile.open(fileobj=file, mode='w', format=tarfile.GNU_FORMAT)
        for member, held, kind in content:
            info = tarfile.TarInfo(member)
            info.size = len(held)
            info.type = kind
            archive.addfile(info, io.BytesIO(held))
        archive.close()
    return file.getvalue()


def write(root, files):
    for name, content in files.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if callable(content):           # makes something else at this path
            content(path)
            continue
        with open(path, 'wb') as file:
            file.write(pack(name, content))


# ---- mutations of any value and of any file -----------------------------------------------------

NASTY = {
    'null': None, 'true': True, 'zero': 0, 'minus one': -1, 'a half': .5, 'a number': 7, 'a whole float': 2.,
    'NaN': float('nan'), 'infinite': float('inf'), 'huge': 1e308, 'a long integer': 2 ** 70,
    'an empty text': '', 'a text': 'cat', 'a number as text': '2', 'a long text': 'x' * 10 ** 6,
    'a long number as text': '9' * 5000, 'other digits': '\u0663', 'half a character': '\udc80',
    'a zero byte': 'a\0b', 'a path out of here': '../../../etc/passwd', 'an empty list': [], 'a list': [1, 2],
    'a list of lists': [[1], [2]], 'a list of null': [None], 'an empty dict': {}, 'a dict': {'a': 1},
    'a deep list': DEEP}


def edit(name, function, *values):
    """A mutation of one file: function(rng, what is in it, *values) changes that in place, or returns what will be."""
    def change(rng, files):
        changed = function(rng, files[name], *values)
        if changed is not None:
            files[name] = changed
    return change


def put(name, content):
    return edit(name, lambda rng, held: content)


def places(value, path=()):
    """The path of keys to everything inside a value of dicts and lists."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def walk(name, value, wanted):
    """Every value at the paths that are wanted, of a file, replaced by every nasty one, and removed."""
    def replace(rng, held, path, what):
        for key in path[:-1]:
            held = held[key]
        if what == 'removed':
            del held[path[-1]]
        else:
            held[path[-1]] = copy.deepcopy(NASTY[what])

    for path in filter(wanted, places(value)):
        for what in ['removed', *NASTY]:
            yield f'{"/".join(map(str, path))} is {what}', edit(name, replace, path, what)


def cut(rng, held):
    return held[:rng.integers(1, len(held))]


def flip(rng, held):
    at = rng.integers(len(held))
    return held[:at] + bytes([held[at] ^ 1 << rng.integers(8)]) + held[at + 1:]


DAMAGES = {  # what becomes of a file's bytes
    'cut': cut, 'cut elsewhere': cut, 'cut again': cut, 'flipped at a bit': flip, 'flipped at another': flip,
    'empty': lambda rng, held: b'', 'noise': lambda rng, held: rng.bytes(1000),
    'zeros': lambda rng, held: bytes(len(held)),
    'a web page': lambda rng, held: b'<html>404</html>\n' * 100, 'twice': lambda rng, held: held + held,
    'longer by noise': lambda rng, held: held + rng.bytes(999), 'gzipped': lambda rng, held: gzip.compress(held),
    'a pickle of code': lambda rng, held: b"cos\nsystem\n(S'touch RAN'\ntR.",
    'a git-lfs pointer': lambda rng, held: b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'}
NO_FILES = {  # what stands where a file should
    'a pipe': os.mkfifo, 'a folder': os.mkdir, 'a link to nowhere': lambda path: os.symlink('nowhere', path),
    'a link to itself': lambda path: os.symlink(path, path), 'a device': lambda path: os.symlink('/dev/zero', path)}


def spoil(name):
    """A file's bytes damaged, or something else in its place, or nothing."""
    def damage(rng, held, function):
        return function(rng, pack(name, held))

    for what, function in DAMAGES.items():
        yield f'{name} is {what}', edit(name, damage, function)
    for what, other in NO_FILES.items():
        yield f'{name} is {what}', put(name, other)
    yield f'{name} is absent', lambda rng, files: files.pop(name)


# ---- pictures -----------------------------------------------------------------------------------

def lying_png(width, height):
    """A header that says so many pixels, a checksum that is right, and little more."""
    held = bytearray(photo(0))
    held[16:24] = width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
    held[29:33] = zlib.crc32(held[12:29]).to_bytes(4, 'big')
    return bytes(held)


def turned(orientation, format='JPEG'):
    exif = Image.Exif()
    exif[0x112] = orientation
    return photo(0, format, exif=exif)


LYING_EXIF = b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + bytes(30)         # of 65,535 entries, it says
EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n'
PICTURES = {
    'of 60,000 x 60,000': lying_png(60_000, 60_000), 'of no width': lying_png(0, 24), 'of 2^31': lying_png(2 ** 31, 9),
    'an EPS': EPS, 'a PDF': b'%PDF-1.4\n%%EOF', 'an SVG': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    'turned': turned(6), 'turned by 99': turned(99), 'a turned TIFF': turned(6, 'TIFF'),
    'of damaged metadata': photo(0, 'JPEG', exif=LYING_EXIF), 'smaller': photo(0, size=(12, 16)),
    'of a pixel': photo(0, size=(1, 1)), 'a line': photo(0, size=(1, 3000)), 'a GIF': photo(0, 'GIF'),
    'a TGA': photo(0, 'TGA'), 'a WebP': photo(0, 'WEBP'), 'a TIFF': photo(0, 'TIFF'), 'grey': photo(0, mode='L'),
    'of a bit': photo(0, mode='1'), 'of a palette': photo(0, mode='P'), 'CMYK': photo(0, 'JPEG', mode='CMYK'),
    'half transparent': photo(0, mode='RGBA'), 'LAB': photo(0, 'TIFF', mode='LAB'),
    'of NaN': encode(np.full(SIZE, np.nan, np.float32), 'TIFF'), 'of 16 bits': encode(np.zeros(SIZE, np.uint16))}


# ---- detection ----------------------------------------------------------------------------------

def runs(counts, size=SIZE):
    return dict(segmentation=dict(size=list(size), counts=counts))


ROWS = {  # what is wrong with one annotation, and what the report says of it
    'annotations have no box of four numbers': {
        'box null': dict(bbox=None), 'box empty': dict(bbox=[]), 'box of text': dict(bbox=list('abcd')),
        'box of NaN': dict(bbox=[float('nan')] * 4), 'box of lists': dict(bbox=[[1], [1], [5], [5]])},
    'boxes have no area within their image': {
        'box outside': dict(bbox=[90, 90, 5, 5]), 'box of no area': dict(bbox=[3, 3, 0, 5]),
        'box the wrong way': dict(bbox=[20, 20, -5, -5])},
    'annotations name an unknown image or category': {
        'image unknown': dict(image_id=999), 'image null': dict(image_id=None),
        'category unknown': dict(category_id=99), 'category a list': dict(category_id=[1])},
    'annotations have the id of another': {'id of another': dict(id=22)},
    'annotations have an iscrowd that is neither 0 nor 1': {'crowd of seven': dict(iscrowd=7)},
    'masks are of another size than their image': {'mask of another size': runs([40, 41], (9, 9))},
    'run lengths do not add up to their image': {
        'mask of too few runs': runs([5, 5]), 'mask of too long runs': runs([5, 10 ** 12]),
        'mask of cut runs': runs('T38')},
    'run lengths are no whole numbers': {
        'mask of text runs': runs(['a']), 'mask of half runs': runs([.5, 767.5]),
        'mask of odd letters': runs('\u00e9\u00e8'), 'mask of negative runs': runs([-5, 773]),
        'mask of no counts': dict(segmentation=dict(size=list(SIZE)))},
    'masks are empty': {'mask of nothing': runs([768])},
    'polygons have no three points': {
        'mask of two points': dict(segmentation=[[1, 1, 5, 5]]),
        'mask of an odd number': dict(segmentation=[[1, 1, 5, 5, 1, 5, 7]])},
    'polygons are no numbers or lie far outside of their image': {
        'mask of NaN': dict(segmentation=[[float('nan')] * 6]), 'mask far away': dict(segmentation=[[1e30] * 6]),
        'mask of a long way': dict(segmentation=[[0, 0, 10 ** 9, 0, 10 ** 9, 10 ** 9]])},
    'polygons have endless outlines': {'mask of a scribble': dict(segmentation=[[0, 0, 30, 20] * 5000])},
    'masks are neither polygons nor run lengths': {'mask of text': dict(segmentation='a mask')}}
TABLES = {  # what is done to rows of a table of the json: which of them, and how
    'images of one id': ('images', slice(2), dict(id=1)),
    'images of one file': ('images', slice(2), dict(file_name='0.png')),
    'images the other way': ('images', slice(9), dict(height=SIZE[1], width=SIZE[0])),
    'categories of one id': ('categories', slice(2), dict(id=1)),
    'categories of one name': ('categories', slice(2), dict(name='cat')),
    'a category renamed': ('categories', slice(1), dict(name='cow')),
    'annotations of one id': ('annotations', slice(2), dict(id=10)),
    'annotations all crowds': ('annotations', slice(99), dict(iscrowd=1)),
    'annotations all outside': ('annotations', slice(99), dict(bbox=[99, 99, 2, 2]))}


def box_mutations():
    def is_wanted(path):        # one row of each table, masks of every form, and the tables themselves
        return len(path) < 2 or path[1] == 0 or path[1] < 5 and path[2:3] == ('segmentation',)

    def change_rows(rng, held, table, which, fields):
        for row in held[table][which]:
            row.update(fields)

    def change_one(rng, held, fields):
        held['annotations'][rng.integers(5)].update(fields)

    def double(rng, held, table):
        held[table] *= 2

    yield from walk('train.json', coco_set()['train.json'], is_wanted)
    for faults in ROWS.values():
        for what, fields in faults.items():
            yield what, edit('train.json', change_one, fields)
    for name in ('train.json', 'val.json'):
        for what, change in TABLES.items():
            yield f'{name}: {what}', edit(name, change_rows, *change)
        for table in ('images', 'annotations', 'categories'):
            yield f'{name}: {table} twice', edit(name, double, table)
            yield f'{name}: {table} reversed', edit(name, lambda rng, held, table: held[table].reverse(), table)
        for code in ('utf-8-sig', 'utf-16', 'utf-32', 'cp037'):
            yield f'{name} in {code}', edit(name, lambda rng, held, code: json.dumps(held).encode(code), code)
        yield from spoil(name)
    for what, content in PICTURES.items():
        yield f'a picture {what}', put('train/0.png', content)
    yield from spoil('train/0.png')


def lvis_mutations():
    def is_wanted(path):
        added = {'frequency', 'neg_category_ids', 'not_exhaustive_category_ids'}
        return path[1:2] == (0,) and not added.isdisjoint(path)
    yield from walk('val.json', lvis_set()['val.json'], is_wanted)


# ---- shards -------------------------------------------------------------------------------------

CAPTIONS = {
    'empty': b'', 'blank': b' \n\t ', 'in latin-1': b'caf\xe9', 'with a zero byte': b'a\0b', 'long': b'word ' * 10 ** 6,
    'of one long word': b'w' * 10 ** 6, 'with a mark': b'\xef\xbb\xbfa dog', 'in UTF-16': 'a dog'.encode('utf-16')}
CLASSES = {
    'empty': b'', 'a text': b'cat', 'negative': b'-1', 'a half': b'1.5', 'in latin-1': b'\xe9', 'long': b'9' * 5000,
    'of other digits': '\u0663'.encode(), 'a superscript': '\u00b2'.encode(), 'of two lines': b'1\n2\n',
    'with zeros': b'001'}
NAMES = {
    'absolute': '/00000.jpg', 'out of here': '../../00000.jpg', 'long': 'x' * 5000 + '.jpg', 'in capitals': '00000.JPG',
    'of other digits': '\u0663.jpg', 'of two suffixes': '00000.seg.png', 'without suffix': '00000', 'hidden': '.jpg',
    'of two lines': 'a\nb.jpg', 'of half a character': 'a\udc80.jpg', 'in a folder with a dot': 'v1.2/00000.jpg',
    "a Mac's": '__MACOSX/._00000.jpg', 'there twice': '00001.jpg'}
KINDS = {
    'a link': tarfile.SYMTYPE, 'a hard link': tarfile.LNKTYPE, 'a device': tarfile.CHRTYPE, 'a folder': tarfile.DIRTYPE,
    'a pipe': tarfile.FIFOTYPE, 'sparse': tarfile.GNUTYPE_SPARSE, 'a pax header': tarfile.XHDTYPE,
    'a global header': tarfile.XGLTYPE, 'a long name': tarfile.GNUTYPE_LONGNAME, 'of no kind': b'?'}
HEADERS = {  # where in the first header, and what stands there
    'of a huge size': (124, b'77777777777\0'), 'of 2^80 bytes': (124, b'\x80' + b'\xff' * 11),
    'of no size': (124, bytes(12)), 'of a negative size': (124, b'\xff' * 12),
    'of a text as size': (124, b'abcdefghijk\0'), 'of a size too small': (124, b'00000000007\0'),
    'of no name': (0, bytes(100)), 'of no magic': (257, bytes(8))}
ORDERS = {
    'reversed': lambda rng, members: members.reverse(), 'shuffled': lambda rng, members: rng.shuffle(members),
    'by suffix': lambda rng, members: members.sort(key=lambda member: member[0][-3:]),
    'twice': lambda rng, members: members.extend(members[:]), 'none': lambda rng, members: members.clear(),
    'packed by bzip2': lambda rng, members: bz2.compress(pack('a.tar', members)),
    'packed by xz': lambda rng, members: lzma.compress(pack('a.tar', members))}


def shard_mutations():
    def change_one(rng, members, suffix, place, value):     # place: of name, bytes, type
        them = [member for member in members if member[0].endswith(suffix)]
        them[rng.integers(len(them))][place] = value

    def drop(rng, members, suffix, which):
        gone = [member for member in members if member[0].endswith(suffix)][which]
        return [member for member in members if member not in gone]

    def change_json(rng, members, value):                   # which counts where there is no .txt
        change_one(rng, members, 'json', 1, pack('.json', value))
        return drop(rng, members, 'txt', slice(None))

    def overwrite(rng, members, begin, value):              # with a checksum that is right
        held = bytearray(pack('.tar', members))
        held[begin:begin + len(value)] = value
        held[148:156] = b' ' * 8
        held[148:156] = b'%06o\0 ' % sum(held[:512])
        return bytes(held)

    def of_shard(function, *values):
        return edit('00000.tar', function, *values)

    for what, order in ORDERS.items():
        yield f'members {what}', of_shard(order)
    for suffix, contents in dict(txt=CAPTIONS, cls=CLASSES, jpg=PICTURES).items():
        for what, content in contents.items():
            yield f'a {suffix} {what}', of_shard(change_one, suffix, 1, content)
    for what, name in NAMES.items():
        yield f'a name {what}', of_shard(change_one, 'jpg', 0, name)
    for what, kind in KINDS.items():
        yield f'a member {what}', of_shard(change_one, 'jpg', 2, kind)
    for what, value in NASTY.items():
        yield f'a caption is {what}', of_shard(change_json, dict(caption=value))
        yield f'a json is {what}', of_shard(change_json, value)
    for suffix in ('txt', 'json', 'cls', 'jpg'):
        yield f'a {suffix} less', of_shard(drop, suffix, slice(1))
        yield f'no {suffix}', of_shard(drop, suffix, slice(None))
    for what, change in HEADERS.items():
        yield f'a header {what}', of_shard(overwrite, *change)
    yield from spoil('00000.tar')


# ---- label maps ---------------------------------------------------------------------------------

def labels(value=1, dtype=np.uint8, size=SIZE):
    return np.full(size, value, dtype)


MAPS = {
    'of a value too large': encode(labels(3)), 'of 200': encode(labels(200)),
    'of 65535': encode(labels(65535, np.uint16)), 'of -1': encode(labels(-1, np.int32), 'TIFF'),
    'of 2^31': encode(labels(2 ** 31 - 1, np.int32), 'TIFF'),
    'of NaN': encode(labels(np.nan, np.float32), 'TIFF'), 'of halves': encode(labels(.5, np.float32), 'TIFF'),
    'in RGB': photo(0), 'in RGBA': photo(0, mode='RGBA'), 'grey and alpha': photo(0, mode='LA'),
    'a JPEG': photo(0, 'JPEG', mode='L'), 'lying down': encode(labels(size=SIZE[::-1])),
    'of a pixel': encode(labels(size=(1, 1))), 'a row higher': encode(labels(size=(25, 32))), 'an EPS': EPS,
    'of 60,000 x 60,000': lying_png(60_000, 60_000), 'of text': b'1 1 1\n', 'all ignored': encode(labels(255)),
    'of one class': encode(labels()), 'of 16 bits': encode(labels(1, np.uint16)),
    'of a bit': encode(labels(), mode='1'), 'of a palette': encode(labels(), mode='P'),
    'a GIF': encode(labels(), 'GIF')}
CLASS_FILES = {
    'with a mark': b'\xef\xbb\xbfsky\nsea\nland\n', 'in UTF-16': 'sky\nsea\nland'.encode('utf-16'),
    'in latin-1': b'sky\ncaf\xe9\nland\n', 'of Windows': b'sky\r\nsea\r\nland\r\n', 'of two': b'sky\nsea\n',
    'of one': b'sky\n', 'of none': b'-\n-\n-\n', 'of 300': b''.join(b'%d\n' % n for n in range(300)),
    'of 70,000': b''.join(b'%d\n' % n for n in range(70_000)), 'of doubles': b'sky\nsky\nland\n',
    'with empty lines': b'\n\nsky\n\nsea\nland\n', 'of zero bytes': b'\0\n\0\n\0\n',
    'numbered': b'0: sky\n1: sea\n2: land\n',
    'of a long line': b'x' * 10 ** 6 + b'\nsea\nland\n', 'in a line': b'sky, sea, land'}


def map_mutations():
    def fill_all(split, content, rng, files):
        files |= {name: content for name in files if name.startswith(f'annotations/{split}')}

    for what, content in MAPS.items():
        yield f'a map {what}', put('annotations/train/1.png', content)
        for split in ('train', 'val'):
            yield f'all of {split} {what}', functools.partial(fill_all, split, content)
    for what, content in CLASS_FILES.items():
        yield f'classes {what}', put('classes.txt', content)
    for what, content in PICTURES.items():
        yield f'a picture {what}', put('images/train/1.png', content)
    for name in ('annotations/train/0.png', 'annotations/val/0.png', 'images/train/0.png', 'classes.txt'):
        yield from spoil(name)


# ---- weights ------------------------------------------------------------------------------------

def other_tensors(torch):
    """What may stand in a file where a tensor should: functions of the tensor that was there."""
    def convert(name, x):
        return x.to(getattr(torch, name))

    types = 'float16 bfloat16 float64 int32 uint8 bool complex64 float8_e4m3fn'.split()
    return {name: functools.partial(convert, name) for name in types} | {
        'NaN': lambda x: x * torch.nan, 'infinite': lambda x: x / 0, 'sparse': lambda x: x.to_sparse(),
        'quantised': lambda x: torch.quantize_per_tensor(x, .1, 0, torch.qint8), 'on meta': lambda x: x.to('meta'),
        'expanded': lambda x: torch.zeros(1).expand(10 ** 11), 'one number': lambda x: torch.zeros(()).expand(x.shape),
        'a parameter': torch.nn.Parameter, 'flat': lambda x: x.flatten(), 'longer': lambda x: torch.cat([x, x[:1]]),
        'empty': lambda x: x[:0], 'a scalar': lambda x: torch.tensor(1.), 'deeper': lambda x: x[None],
        'a list': lambda x: x.tolist(), 'a dict': lambda x: dict(a=x), 'a text': lambda x: 'x', 'null': lambda x: None}


def weight_mutations():
    import torch

    def is_wanted(path):        # the config and what lies beside the tensors
        return path[0] != 'state_dict' or len(path) == 1

    def replace(rng, held, tensor, other):
        held['state_dict'][tensor] = other(held['state_dict'][tensor])

    def rename(rng, held, tensor, name):
        held['state_dict'][name] = held['state_dict'].pop(tensor)

    def configure(rng, held, fields):
        held['config'].update(fields)

    yield from walk('w.pt', weights(), is_wanted)
    for tensor in ('pos_embed', 'patch_embed.weight', 'blocks.0.attn.qkv.weight', 'blocks.0.norm1.weight', 'head.bias'):
        for what, other in other_tensors(torch).items():
            yield f'{tensor} is {what}', edit('w.pt', replace, tensor, other)
        for name in ('x', '', 7, None, ('a', 1), 'module.' + tensor):
            yield f'{tensor} is called {name!r}', edit('w.pt', rename, tensor, name)
    for name in ('mean', 'std'):
        for three in ([0] * 3, [float('nan')] * 3, [1e308] * 3, ['a'] * 3, [[1]] * 3):
            yield f'{name} is {three}', edit('w.pt', configure, {name: three})
    yield 'within', edit('w.pt', lambda rng, held: dict(model=dict(module=held)))
    yield 'only tensors', edit('w.pt', lambda rng, held: held['state_dict'])
    yield from spoil('w.pt')


# ---- running a command, and judging its answer --------------------------------------------------

SETS = {  # a valid set, its mutations, and the command that reads it in ROOT
    'boxes': (coco_set, box_mutations, 'detect_seg --data ROOT'),
    'lvis': (lvis_set, lvis_mutations, 'detect_seg --data ROOT'),
    'captions': (shard_set, shard_mutations, 'clip_train --batch_size 16 --steps 1 --data ROOT'),
    'classes': (shard_set, shard_mutations, 'finetune --init scratch --batch_size 16 --steps 1 --data ROOT'),
    'maps': (map_set, map_mutations, 'detect_seg --head linear --data ROOT'),
    'weights': (weight_set, weight_mutations, 'finetune --init ROOT/w.pt --batch_size 8 --steps 1 --data ROOT/data')}
COSTS = {  # a mutation that is named so must be refused, or counted in a line of these words
    'boxes/a picture (smaller|of a pixel|a line)': 'another size',
    'captions/a caption is (null|true|zero|a half|NaN|an empty|a list|a dict|a deep)': 'no caption',
    '(captions|classes)/a cls (empty|in latin-1|less)': 'no class', 'captions/a txt in latin-1': 'UTF-8',
    '.*/a (picture|jpg) (of 60|of no|of 2|an EPS|a PDF|an SVG)': 'could not be read',
    'maps/a map (of a v|of 200|of 65|of -1|of 2|of N|of h)': 'value that is no class',
    'maps/a map (in|grey)': 'in colours', 'maps/a map a J': 'is a JPEG',
    'maps/a map (ly|of a pixel|a row)': 'another size',
    'maps/a map (an E|of 60|of text)': 'label map that cannot be read'}
COSTS |= {f'boxes/{what}$': reason for reason, faults in ROWS.items() for what in faults}
TINY = dict(image_size=32, patch_size=8, batch_size=4, steps=1, channels=32)         # a step sees all


def run_stage(command):
    """Runs it in this process -> its exit code."""
    name, *flags = command.split()
    stage = importlib.import_module(name)
    if name == 'detect_seg':
        stage.BOXES['pico'] = dict(TINY, hidden=16, proposals=20, num_boxes=8)
        stage.MAPS['pico'] = dict(stage.MAP, **TINY)
    sys.argv = [f'{name}.py', '--size', 'pico', '--device', 'cpu', *flags]
    try:
        stage.run.main(stage.train, stage.Config, stage.RECIPES)
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def attempt(command):
    """Runs it in a child process -> (exit code or -signal, what it said, seconds, megabytes more than ours)."""
    begin = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.alarm(6 * SECONDS)       # others may have the cores
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = run_stage(command)
            sys.stdout.flush()
            os._exit(code)
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        text = said.read().decode(errors='replace').replace('\r', '\n')
    return os.waitstatus_to_exitcode(status), text, time.monotonic() - begin, (usage.ru_maxrss - before) / 1024


def fault(name, folder, code, said, seconds, megabytes):
    """What is wrong with an answer to the mutation of this name, or ''."""
    lines = [line for line in said.splitlines() if line and '/s' not in line]       # nor the bar of the steps
    errors = [line for line in lines if line.startswith('error: ')]
    noise = [line for line in lines if re.search('Traceback|Warning|Exception', line)]
    if code not in (0, 2):
        return f'exit {code}: {lines[-1] if lines else ""}'
    if noise:
        return noise[0]
    if megabytes > MEGABYTES:
        return f'{megabytes:.0f} MB'
    if code == 2 and (len(errors) != 1 or errors[0] != lines[-1]):
        return f'{len(errors)} lines of errors'
    if code == 2 and (len(errors[0]) > 1000 or not errors[0].isprintable()):
        return f'an error of {len(errors[0])} characters: {errors[0]!r}'
    if code == 2:
        return '' if folder in errors[0] else f'names no file: {errors[0]}'

    counted = [line for line in lines if re.match('[0-9,]+ .*: ', line)]
    for pattern, word in COSTS.items():
        if re.match(pattern, name) and not any(word in line for line in counted):
            return f'cost nothing; expected to read: {word}'
    with open(f'{folder}/out/result.json') as file:
        return 'NaN in result.json' if 'NaN' in file.read() else ''


def trials(wanted=''):
    """(kind/name, change) of every mutation whose kind/name starts so."""
    for kind, (_, mutations, _) in SETS.items():
        for name, change in mutations():
            if f'{kind}/{name}'.startswith(wanted):
                yield f'{kind}/{name}', change


def trial(name, change, seed):
    """-> (what is wrong or '', exit code, what was said, seconds, megabytes)."""
    make, _, command = SETS[name.partition('/')[0]]
    files = make()
    rng = np.random.default_rng([seed, zlib.crc32(name.encode('utf-8', 'replace'))])
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')         # of what we do here
            change(rng, files)
            write(folder, files)
        answer = attempt(command.replace('ROOT', folder) + f' --out_dir {folder}/out')
        wrong = fault(name, folder, *answer)
        code, said, seconds, megabytes = answer
        return wrong.replace(folder, 'ROOT'), code, said.replace(folder, 'ROOT'), seconds, megabytes


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--some', type=int, default=0, help='so many, drawn by the seed; 0: all')
    parser.add_argument('--only', default='', help='how their names start')
    options = parser.parse_args()
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

    # what takes long to import, once: every child has it
    import torch
    import torch._dynamo
    import clip_train, detect_seg, finetune
    torch.set_num_threads(1)

    chosen = list(trials(options.only))
    if options.some:
        drawn = np.random.default_rng(options.seed).choice(len(chosen), options.some, replace=False)
        chosen = [chosen[n] for n in sorted(drawn)]
    num_wrong = 0
    for name, change in chosen:
        wrong, code, said, seconds, megabytes = trial(name, change, options.seed)
        if options.only:
            print(f'== {name}: exit {code}, {seconds:.1f} s, {megabytes:.0f} MB\n{said}')
        if wrong:
            num_wrong += 1
            print(f'{name}: {wrong[:300]}', flush=True)
    print(f'{len(chosen)} mutations, {num_wrong} not answered well')
    sys.exit(num_wrong > 0)


if __name__ == '__main__':
    main()
