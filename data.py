"""
Data for every stage: a built-in world that needs no download; readers of images, captions, clips, COCO and
LVIS jsons and label maps; the tokenizer; and loading that is a pure function of (seed, step, sample).

The world is a function from an integer to a scene: index -> image, caption, classes, boxes, semantic map.
What is hidden in its images can be told from what is seen: rows, rings, grids and mirror pairs repeat their
objects, and the type of the scene decides which grounds, colours, classes and layouts go together. That is
what makes masked prediction worth scaling: scenes of independent objects stop rewarding a larger model.
"""
import contextlib
import functools
import gc
import glob
import gzip
import hashlib
import html
import http.client
import io
import json
import math
import os
import re
import signal
import stat
import tarfile
import threading
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from model import Refused, check_file, first_line

# ---- files that people give ---------------------------------------------------------------------

LONGEST_TEXT = 2 ** 24          # bytes of a list of classes, of templates and the like
LONGEST_JSON = 2 ** 32          # and of a json: LVIS's has a quarter of it


def decode(held, errors='strict'):
    """Bytes as text: UTF-8, with a byte order mark or without, or UTF-16 with one."""
    is_wide = held.startswith((b'\xff\xfe', b'\xfe\xff'))
    return held.decode('utf-16' if is_wide else 'utf-8-sig', errors)


def read_text(path, most=LONGEST_TEXT):
    """What a file of text holds. Refused where it is none."""
    check_file(path, most)
    try:
        with open(path, 'rb') as file:
            return decode(file.read())
    except OSError as error:
        raise Refused(f'{path} cannot be read ({error.strerror})') from None
    except UnicodeDecodeError as error:
        raise Refused(f'{path} is not a text in UTF-8 (byte {error.start:,}); save it as UTF-8') from None


def read_json(path):
    """What a JSON file holds, whatever that is. Refused where it is none."""
    text = read_text(path, LONGEST_JSON)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f'{path} is not JSON ({first_line(error)})') from None


def printable(text):        # what a file names may command a terminal
    return ''.join(letter if letter.isprintable() else '?' for letter in text)


def first_three(names):     # of a list that may be long
    return ', '.join(names[:3]) + ', ...' * (len(names) > 3)


@contextlib.contextmanager
def without_gc():
    """Meanwhile Python looks for no cycles: among a million new objects that takes as long as making them.
    Afterwards they count as its oldest, those it looks through least often."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()           # to the oldest
        if was_on:
            gc.enable()


def file_size(path):
    """Bytes of a file; None: there is none."""
    try:
        held = os.stat(path)
    except (OSError, ValueError):           # a name may have a zero byte
        return None
    return held.st_size if stat.S_ISREG(held.st_mode) else None


def natural(name):
    """The key that sorts numbers in names as numbers: frame2 before frame10."""
    padded = re.sub('[0-9]+', lambda digits: digits[0].zfill(20), name)
    return padded, name         # 1 and 01 have an order too


def find_classes(names, known, what):
    """The number in known of each of names. what: whose names these are, for the line of a refusal."""
    number = {name: k for k, name in enumerate(known)}
    for name in names:
        if name not in number:
            none = f'none of the {len(known):,} known: {first_three(known):.100}'
            raise Refused(f"{what} has the class '{name:.60}', which is {none}")
    return [number[name] for name in names]


# ---- randomness without state -------------------------------------------------------------------

def hash64(x):
    """splitmix64's finaliser on int64 tensors. Torch's >> is arithmetic: the sign's bits are masked off."""
    x = (x ^ ((x >> 30) & 0x3ffffffff)) * -0x40a7b892e31b1a47
    x = (x ^ ((x >> 27) & 0x1fffffffff)) * -0x6b2fb644ecceee15
    return x ^ ((x >> 31) & 0x1ffffffff)


def uniform(seed, stream, index, num):
    """num multiples of 2^-24 in [0, 1) for each entry of index, [*index.shape, num]. stream: 'crop', ..."""
    key = hash64(torch.tensor((seed << 32) + zlib.crc32(stream.encode())))      # one number: no device waits for it
    steps = torch.arange(1, num + 1, device=index.device) * -0x61c8864680b583eb
    x = hash64(hash64(index + key).unsqueeze(-1) + steps)
    return ((x >> 40) & 0xffffff).float() * 2 ** -24


def pick(u, num):           # an integer in [0, num), exact on every device, as floor(u * num) is not
    return ((u * 2 ** 24).long() * num) >> 24


def permutation(index, length, seed, epoch):
    """A bijection of [0, length) keyed by (seed, epoch) that takes no memory; epoch an int or a tensor.
    A Feistel network on the next power of four, applied until the result is below length."""
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    low_bits = (1 << half) - 1
    key = hash64(torch.tensor((seed << 32) + zlib.crc32(b'order'), device=index.device))
    key = hash64(key + epoch)
    def shuffle(x):
        left = x >> half
        right = x & low_bits
        for turn in range(1, 5):
            mixed = hash64(right + key + (turn << 32)) & low_bits
            left, right = right, left ^ mixed
        return left << half | right

    x = shuffle(index)
    while (x >= length).any():
        x = torch.where(x < length, x, shuffle(x))
    return x


def sample_index(position, length, seed):  # at a position of the endless stream of epochs
    return permutation(position % length, length, seed, position // length)


# ---- the world: what there is -------------------------------------------------------------------

WORLD_VERSION = 1       # changing what the world draws means measuring the README's numbers again
WORLD_HASH = 'ccfbdc66e0b6'      # of its first scenes; a test compares
WORLD_SEED = 7          # of the vocabulary; a run's own seed only chooses which scenes it sees
VAL_START = 2 ** 40     # training indices stay below
HELDOUT_START = 2 ** 41
SIDE = 1024             # scenes are laid out in integers, 1024ths of the image's side: exact on every device
MAX_OBJECTS = 6

KINDS = {  # coarse classes, with the words that captions use for them; the first is the name
    'disc': ('disc', 'circle'), 'square': ('square', 'box'), 'triangle': ('triangle',), 'star': ('star',),
    'cross': ('cross', 'plus'), 'ring': ('ring', 'hoop'), 'heart': ('heart',), 'moon': ('moon', 'crescent'),
    'arrow': ('arrow', 'pointer'), 'drop': ('drop', 'droplet'), 'flower': ('flower', 'blossom'),
    'gear': ('gear', 'cog'), 'diamond': ('diamond', 'rhombus'), 'leaf': ('leaf',),
    'hourglass': ('hourglass',), 'bar': ('bar', 'plank')}
TEXTURES = {
    'plain': ('plain', 'solid'), 'striped': ('striped', 'lined'), 'dotted': ('dotted', 'spotted'),
    'checkered': ('checkered', 'chequered'), 'ringed': ('ringed',), 'zigzag': ('zigzag', 'jagged'),
    'gridded': ('gridded', 'netted'), 'split': ('split', 'halved')}
PARTS = ('none', 'band', 'belt', 'eye')     # captions never name them: a label that only pixels can teach
COLOURS = {
    'red': (214, 48, 40), 'orange': (240, 140, 30), 'yellow': (240, 215, 50), 'green': (60, 165, 65),
    'cyan': (60, 200, 205), 'blue': (50, 85, 200), 'purple': (135, 60, 175), 'pink': (240, 130, 175),
    'white': (238, 238, 235), 'black': (35, 35, 40)}
STUFF = {
    'sand': (186, 172, 140), 'grass': (118, 146, 104), 'water': (112, 140, 164), 'brick': (168, 122, 108),
    'sky': (160, 178, 196), 'wood': (152, 124, 98), 'stone': (134, 134, 132), 'snow': (200, 204, 208),
    'tile': (164, 158, 164), 'soil': (112, 98, 86)}
# Every kind is outlined, and every texture drawn, in a colour of its own: cues that a 4-pixel patch can
# show. With silhouettes alone a small ViT knows a fifth of the kinds after 40,000 images.
OUTLINES = (
    (250, 250, 250), (15, 15, 15), (255, 225, 0), (255, 115, 0), (200, 0, 0), (255, 0, 200), (255, 165, 200),
    (110, 0, 160), (0, 0, 225), (0, 160, 255), (0, 235, 235), (120, 120, 120), (0, 170, 90), (140, 225, 40),
    (120, 70, 20), (0, 80, 80))
SECOND_COLOURS = (
    (128, 128, 128), (255, 255, 255), (0, 0, 0), (90, 90, 90),
    (255, 240, 190), (40, 20, 90), (110, 60, 20), (190, 190, 190))
LAYOUT_NUMBERS = {  # objects: at least, in steps of, so many choices; then x, y, size: from, one of so many
    'single': (1, 0, 1, 332, 361, 332, 361, 320, 180), 'free': (2, 1, 4, 110, 805, 110, 805, 170, 180),
    'row': (3, 1, 3, 512, 1, 512, 1, 0, 1), 'ring': (4, 1, 3, 512, 1, 512, 1, 175, 40),
    'grid': (4, 2, 2, 512, 1, 512, 1, 0, 1), 'mirror': (2, 2, 3, 90, 340, 110, 805, 170, 150)}
LAYOUTS = tuple(LAYOUT_NUMBERS)
# What happens in clips: each of eight motions, and the same backwards in time. A frame alone cannot tell
# which of the two it is from, except in the last: there the small object follows the large one.
ACTIONS = (
    'move right', 'move left', 'move down', 'move up', 'turn right', 'turn left', 'grow', 'shrink',
    'meet', 'part', 'appear', 'vanish', 'circle right', 'circle left', 'lead right', 'lead left')
NUM_HIDDEN = 14         # actions that one frame does not show
NUM_KINDS, NUM_TEXTURES, NUM_PARTS, NUM_COLOURS, NUM_STUFF = 16, 8, 4, 10, 10
NUM_FINE = 240          # 15 of the 32 (texture, part) pairs of each kind, long-tailed by Zipf's law
NUM_SCENE_TYPES = 32
CELLS = 128             # a shape's table has 128 x 128 cells, of which
RADIUS = 51             # are an object's radius, and
OUTLINE = 8             # its outline's width
TILE = 64               # a ground's texture repeats every 64 cells, which are 384 of the 1024


def star(r, a):             # five points at radius 1, between them inner corners at .42
    a = abs((a + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    x = .42 * math.sin(math.pi / 5)
    y = .42 * math.cos(math.pi / 5)
    return r * (np.cos(a) * x + np.sin(a) * (1 - y)) < x


def heart(x, y):            # the sextic curve; here y points up
    return (x * x + y * y - 1) ** 3 < x * x * y ** 3


def wave(phase):            # a sine of period 1
    return np.sin(2 * math.pi * phase)


def bands(phase):           # a square wave with soft edges, 0 to 1
    return np.clip(.5 + 1.6 * wave(phase), 0, 1)


# Whether points lie inside a shape of radius 1: x to the right, y down; r and a polar, angle 0 up.
SHAPES = {
    'disc':      lambda x, y, r, a: r < .92,
    'square':    lambda x, y, r, a: np.maximum(abs(x), abs(y)) < .8,
    'triangle':  lambda x, y, r, a: (y < .7) & (y > -.95 + 1.75 * abs(x)),
    'star':      lambda x, y, r, a: star(r, a),
    'cross':     lambda x, y, r, a: (np.minimum(abs(x), abs(y)) < .28) & (np.maximum(abs(x), abs(y)) < .95),
    'ring':      lambda x, y, r, a: (r < .96) & (r > .36),
    'heart':     lambda x, y, r, a: heart(1.2 * x, .15 - 1.2 * y),
    'moon':      lambda x, y, r, a: (r < .95) & (np.hypot(x - .45, y + .1) > .72),
    'arrow':     lambda x, y, r, a: ((abs(x) < .24) & (abs(y) < .9)) | ((y < .05) & (y > -.98 + 1.25 * abs(x))),
    'drop':      lambda x, y, r, a: (np.hypot(x, y - .35) < .58) | ((y < .2) & (y > -.98 + 2.1 * abs(x))),
    'flower':    lambda x, y, r, a: r < .64 + .34 * np.cos(5 * a),
    'gear':      lambda x, y, r, a: r < .8 + .15 * np.sign(np.cos(8 * a)),
    'diamond':   lambda x, y, r, a: abs(x) / .62 + abs(y) < 1,
    'leaf':      lambda x, y, r, a: np.maximum(np.hypot(x - .62, y), np.hypot(x + .62, y)) < 1.12,
    'hourglass': lambda x, y, r, a: (abs(x) < .12 + .75 * abs(y)) & (abs(y) < .85),
    'bar':       lambda x, y, r, a: (abs(x) < .97) & (abs(y) < .33)}
# How much of the second colour a surface shows, 0 to 1, at points of an object of radius 1.
SURFACES = {
    'plain':     lambda x, y: 0 * x,
    'striped':   lambda x, y: bands(1.5 * y),
    'dotted':    lambda x, y: np.clip(3.5 - 9 * np.hypot(1.6 * x % 1 - .5, 1.6 * y % 1 - .5), 0, 1),
    'checkered': lambda x, y: np.clip(.5 + 2 * wave(.85 * x + .25) * wave(.85 * y + .25), 0, 1),
    'ringed':    lambda x, y: bands(1.7 * np.hypot(x, y)),
    'zigzag':    lambda x, y: bands(1.5 * y + 1.4 * abs(1.5 * x % 1 - .5)),
    'gridded':   lambda x, y: 1. * (np.maximum(bands(1.5 * x - .1), bands(1.5 * y - .1)) > .4),
    'split':     lambda x, y: np.clip(.5 + 6 * x, 0, 1)}
# Where a part pattern marks an object of radius 1 with a shade of its colour.
MARKS = {
    'none':      lambda x, y: x > 9,
    'band':      lambda x, y: abs(np.hypot(x, y) - .55) < .11,
    'belt':      lambda x, y: abs(y - .1) < .16,
    'eye':       lambda x, y: np.hypot(x + .35, y + .25) < .26}
# Brightness of a ground's texture, -1 to 1: x, y in cells, repeating every TILE; n smooth noise, 0 to 1.
GROUNDS = {
    'sand':      lambda x, y, n: 1.4 * n - .7,
    'grass':     lambda x, y, n: wave((4 * x + 6 * wave(2 * y / TILE)) / TILE) * (.5 + n),
    'water':     lambda x, y, n: wave((3 * y + 8 * wave(2 * x / TILE)) / TILE),
    'brick':     lambda x, y, n: np.where((y % 16 < 4) | ((x + 16 * ((y // 16) % 2)) % 32 < 4), 1., -.3),
    'sky':       lambda x, y, n: .3 * wave(y / TILE),
    'wood':      lambda x, y, n: wave((5 * y + 3 * n) / TILE),
    'stone':     lambda x, y, n: .8 * np.sign(n - .5),
    'snow':      lambda x, y, n: np.where(n > .68, 1., -.2),
    'tile':      lambda x, y, n: np.where((x % 32 < 5) | (y % 32 < 5), -1., .3),
    'soil':      lambda x, y, n: wave(3 * (x + y) / TILE)}


# ---- the world: the grammar ---------------------------------------------------------------------

def choose(u, cumulative_weights):  # an index, drawn in proportion to integer weights [..., n]
    level = pick(u, cumulative_weights[..., -1])
    return (level.unsqueeze(-1) >= cumulative_weights).sum(-1)


@functools.lru_cache(maxsize=8)
def grammar(device, fine=0):
    """The vocabulary and its statistics: the fine classes (only `fine` of them, equally frequent), which of them,
    of colours and of grounds each type of scene shows, and the (kind, colour) pairs that training never does."""
    def draw(stream, rows, num):
        return uniform(WORLD_SEED, stream, torch.arange(rows), num)

    # fine classes by falling frequency; each type of scene has its own that it shows more often
    order = draw('rank', 1, NUM_FINE).argsort(1)[0]
    kind = order % NUM_KINDS
    pair = draw('fine', NUM_KINDS, NUM_TEXTURES * NUM_PARTS).argsort(1)[kind, order // NUM_KINDS]
    vocabulary = torch.stack([kind, pair // NUM_PARTS, pair % NUM_PARTS], 1)        # [240, 3]
    own = draw('boost', NUM_SCENE_TYPES, NUM_FINE) < .15
    frequency = 100_000 // (torch.arange(NUM_FINE) + 5) * torch.where(own, 12, 1)   # [types, 240]
    if fine:
        vocabulary = vocabulary[:fine]
        frequency = torch.full((NUM_SCENE_TYPES, fine), 1000)

    # each type of scene prefers three colours and two layouts
    palette = torch.where(draw('palette', NUM_SCENE_TYPES, NUM_COLOURS).argsort(1) < 3, 10, 1)
    preferred = draw('layouts', NUM_SCENE_TYPES, len(LAYOUTS)).argsort(1) < 2
    layouts = torch.tensor([4, 3, 4, 3, 3, 4]) * torch.where(preferred, 4, 1)

    # one or two colours of each kind are held out: 24 of 160 = 15% of the pairs
    kinds = torch.arange(NUM_KINDS)
    held_out = torch.zeros(NUM_KINDS, NUM_COLOURS, dtype=torch.bool)
    held_out[kinds, 3 * kinds % NUM_COLOURS] = True
    held_out[kinds[1::2], (3 * kinds[1::2] + 4) % NUM_COLOURS] = True

    # for each kind and colour the first colour from there on, around the circle, that is or is not
    colour = torch.arange(NUM_COLOURS)
    ahead = held_out[:, (colour[:, None] + colour) % NUM_COLOURS].int()             # [kinds, colours, steps]
    angle = torch.arange(64).double() * (math.pi / 32)
    tables = dict(
        fine=vocabulary, classes=frequency.cumsum(-1), palette=palette.cumsum(-1), layouts=layouts.cumsum(-1),
        scene_types=(10_000 // (torch.arange(NUM_SCENE_TYPES) + 3)).cumsum(-1),
        grounds=draw('grounds', NUM_SCENE_TYPES, NUM_STUFF).argsort(1)[:, :3],
        turn=(1024 * torch.stack([angle.cos(), angle.sin()], 1)).round().long(), held_out=held_out,
        allowed=(colour + ahead.argmin(-1)) % NUM_COLOURS, forbidden=(colour + ahead.argmax(-1)) % NUM_COLOURS,
        colours=torch.tensor(list(COLOURS.values())), stuff=torch.tensor(list(STUFF.values())),
        outlines=torch.tensor(OUTLINES), second=torch.tensor(SECOND_COLOURS),
        layout_numbers=torch.tensor(list(LAYOUT_NUMBERS.values())))
    return {name: table.to(device) for name, table in tables.items()}


def pose(turn, size, height, flip=1):
    """From places to a table's cells: matrices [..., 4]. size, height: the radii across and down [...]."""
    cos, sin = turn.unbind(-1)
    matrix = torch.stack([flip * cos, sin, flip * -sin, cos], -1)
    return matrix * (4 * RADIUS) // torch.stack([size, size, height, height], -1)


@dataclass(eq=False)
class World:
    """The built-in world as a data set without end."""
    split: str = 'train'        # train, val, or heldout: only attribute pairs that training never shows
    unique: int = 0             # only so many scenes, visited again and again
    fine: int = 0               # only so many fine classes, all equally frequent: the poor control
    objects: int = MAX_OBJECTS  # 1: one in each scene
    frames: int = 0             # clips of ACTIONS, of so many frames
    reads_files = False
    BOUNDS = {'unique': (0, 2 ** 33), 'fine': (0, NUM_FINE), 'objects': (1, MAX_OBJECTS)}

    def __post_init__(self):
        for name, (low, high) in self.BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise Refused(f'shapes:{name}={getattr(self, name)} is outside {low} to {high}')
        self.has_captions = not self.frames
        self.classes = self.label_names = list(ACTIONS if self.frames else KINDS)
        self.broken = set()         # as in Folder: nothing drawn is ever unreadable

    def __len__(self):
        return self.unique if self.unique and self.split == 'train' else 2 ** 40

    def identity(self):         # what a checkpoint remembers of its data
        return dict(asdict(self), classes=self.classes)

    def index(self, position, seed):  # which scenes stand at these positions [B] of a run
        if self.split != 'train':
            return position + (VAL_START if self.split == 'val' else HELDOUT_START)
        if self.unique:
            return sample_index(position, self.unique, seed)
        return (position + (seed << 33)) % 2 ** 40

    def some_captions(self, num):  # of the first, for a tokenizer to learn from
        return self.batch(torch.arange(num), 0, want=('captions',))['captions']

    def batch(self, position, image_size, seed=0, device='cpu', train=True, want=('images', 'captions')):
        """dict of position, index, the fields of scenes() and as wanted captions (list), images uint8 [B, 3, H, W],
        semantic, boxes, num_visible, masks (annotate). Of clips images [B, T, 3, H, W], labels."""
        index = self.index(position.to(device), seed)
        batch = dict(position=position, index=index)
        if self.frames:
            frames, labels = self.clips(index)
            images = draw_scenes(frames, image_size)[0].unflatten(0, (-1, self.frames))
            return dict(batch, images=images, labels=labels)

        scenes = self.scenes(index)
        batch |= scenes
        if set(want) != {'captions'}:
            batch['images'], owner = draw_scenes(scenes, image_size)
        if 'semantic' in want or 'boxes' in want:
            batch |= annotate(scenes, owner)
        if 'masks' not in want:
            batch.pop('masks', None)
        if 'captions' in want:
            batch['captions'] = captions(scenes, index)
        return batch

    def scenes(self, index):
        """The scene of each index as integers, exact on every device.
        [B]: type, layout, mode, rotation_step, contrast; labels, unnamed: the largest object's kind, part.
        [B, 6]: valid, kind, texture, part, fine, colour, x, y, radius. The others are for drawing."""
        g = grammar(index.device, self.fine)
        u = uniform(WORLD_SEED, 'scene', index, 26).unsqueeze(-1).unbind(1)                     # each [B, 1]
        o = uniform(WORLD_SEED, 'objects', index, MAX_OBJECTS * 10).view(-1, MAX_OBJECTS, 10)

        def drawn(slot, source):        # a number of each object's, or of the one that it repeats
            return o[:, :, slot].gather(1, source)                                              # [B, 6]

        # the type of the scene, how its objects are laid out, and how many there are
        scene_type = choose(u[0], g['scene_types'])                                             # [B, 1]
        layout = choose(u[1], g['layouts'][scene_type])
        if self.objects == 1:
            layout = torch.zeros_like(layout)                                                   # single
        numbers = g['layout_numbers'][layout].unbind(-1)                                        # each [B, 1]
        num = (numbers[0] + numbers[1] * pick(u[2], numbers[2])).clamp(max=self.objects)
        i = torch.arange(MAX_OBJECTS, device=index.device)
        valid = i < num                                                                         # [B, 6]

        # who repeats whom: rows, rings, grids show one class, or two in turn, or two colours; mirrors pairs
        _, _, row, ring, grid, mirror = (layout == k for k in range(len(LAYOUTS)))
        repeats = row | ring | grid
        mode = pick(u[3], 4) * repeats      # 0, 1: all alike; 2: class and colour in turn; 3: colour in turn
        odd = i % 2
        leader = (i - odd * mirror) * ~repeats
        class_of = leader + odd * (mode == 2)
        colour_of = leader + odd * (mode >= 2)
        fine = choose(drawn(0, class_of), g['classes'][scene_type])
        kind, texture, part = g['fine'][fine].unbind(-1)
        wanted = choose(drawn(1, colour_of), g['palette'][scene_type])
        colours = g['forbidden'] if self.split == 'heldout' else g['allowed']
        jitter = torch.stack([drawn(slot, colour_of) for slot in (7, 8, 9)], -1)

        # places and sizes: a row along a line, a ring around the middle, a grid of 2 or 3 columns, or drawn
        gap = (SIDE - 80) // num
        order = 2 * i - num + 1             # -2, 0, 2 for three objects
        along = order * gap // 2
        aside = pick(u[5], 401) - 200
        direction = torch.tensor([0, 0, 16, 8, 24], device=index.device)[pick(u[4], 5)]
        line_x, line_y = g['turn'][direction].unbind(-1)
        orbit = 270 + pick(u[5], 60)
        orbit_x, orbit_y = g['turn'][(pick(u[4], 64) + i * 64 // num) % 64].unbind(-1)
        big = pick(u[2], 2)
        cell = 380 - 60 * big
        x, y, size = (numbers[k] + pick(drawn(k // 2 + 1, leader), numbers[k + 1]) for k in (3, 5, 7))
        x = x + row * ((along * line_x - aside * line_y) // 1024) + ring * (orbit * orbit_x // 1024)
        y = y + row * ((along * line_y + aside * line_x) // 1024) + ring * (orbit * orbit_y // 1024)
        x = x + grid * ((2 * (i % (2 + big)) - (1 + big)) * cell // 2)
        y = y + grid * ((2 * (i // (2 + big)) - 1) * cell // 2)
        x = torch.where(mirror & (odd > 0), SIDE - 1 - x, x)
        size = size + row * (gap * 9 // 16) + grid * (cell * 9 // 16)

        # along a row or a ring objects may grow or shrink, and turn
        growth = (pick(u[6], 3) - 1) * (row | ring)
        size = size * (32 + 3 * growth * order) // 32
        rotation_step = pick(u[7], 4) * repeats             # 0, 22.5, 45 or 90 degrees from one to the next
        steps = torch.tensor([0, 4, 8, 16], device=index.device)[rotation_step]
        rotation = (pick(drawn(5, leader), 13) - 6 + i * steps) % 64
        height = size * (13 + pick(drawn(6, class_of), 4)) // 16

        # grounds, parted by two lines: where these are, their tilt, waves and shifts; colours
        grounds = g['grounds'][scene_type[:, 0]]                                                # [B, 3]
        tilt = g['turn'][(16 * (u[8] < .75) + pick(u[9], 7) - 3) % 64]
        first = 180 + pick(u[10], 400)
        second = first + 150 + pick(u[11], 500)
        waves = pick(torch.cat(u[12:17], 1), torch.tensor([64, 3, 60, TILE, TILE], device=index.device))
        shade = pick(torch.cat(u[17:20], 1), 41) - 20                                           # of each
        tint = pick(torch.cat(u[20:23], 1), 25) - 12                                            # of all
        largest = (size * valid).argmax(1, keepdim=True)
        fields = dict(
            type=scene_type, layout=layout, mode=mode, rotation_step=rotation_step,
            contrast=16 + pick(u[23], 20), labels=kind.gather(1, largest), unnamed=part.gather(1, largest))
        fields = {name: field[:, 0] for name, field in fields.items()}
        return dict(
            fields, valid=valid, kind=kind, texture=texture, part=part, fine=fine,
            colour=colours[kind, wanted], jitter=pick(jitter, 41) - 20, x=x, y=y, radius=size,
            matrix=pose(g['turn'][rotation], size, height, flip=1 - 2 * odd * mirror),
            grounds=grounds, ground=torch.cat([first, second, tilt[:, 0], waves], 1),          # [B, 9]
            ground_colour=g['stuff'][grounds] + shade[:, :, None] + tint[:, None],              # [B, 3, 3]
            light=pick(torch.cat(u[24:], 1), 61) - 30)

    def clips(self, index):
        """The scenes of each index's clip, frame after frame [B * T, ...], and its action [B]. The last object moves,
        maybe the one before too; how is drawn apart from the scene, so that looks say nothing of it."""
        turn = grammar(index.device)['turn']
        u = uniform(WORLD_SEED, 'action', index, 6).unsqueeze(-1).unbind(1)             # each [B, 1]
        action = pick(u[0], len(ACTIONS))
        moves, sinks, turns, grows, meets, appears, circles, leads = (action // 2 == m for m in range(8))
        sign = 1 - 2 * (action % 2)
        frame = torch.arange(self.frames, device=index.device)
        time = sign * ((2 * frame + 1) * 512 // self.frames - 512)          # [B, T], from -512 to 512

        # the mover goes straight on, or turns around (x, y) at a distance, or comes near
        x = 362 + pick(u[1], 301)
        y = 362 + pick(u[2], 301)
        size = 150 + pick(u[3], 80)
        way = time * 300 // 512
        rotation = (pick(u[5], 64) + turns * time * 12 // 512) % 64
        cos, sin = turn[(pick(u[4], 64) + circles * time * 24 // 512) % 64].unbind(-1)
        reach = meets * (120 + (512 - time) * 250 // 1024) + circles * 260
        across = reach * cos // 1024
        down = reach * sin // 1024
        hidden = appears & (time < pick(u[5], 513) - 256)

        def pair(other, mover):
            return torch.stack(torch.broadcast_tensors(other, mover), -1).flatten(0, 1)     # [B * T, 2]
        radius = pair(size * 5 // 8, size * (1024 + grows * time * 6 // 5) // 1024)
        moving = dict(
            x=pair(x - meets * across + leads * (way - 260 * sign), x + across + (moves | leads) * way),
            y=pair(y - meets * down, y + down + sinks * way),
            radius=radius,
            valid=pair(meets | circles | leads, ~hidden),
            matrix=pose(turn[rotation.reshape(-1, 1)], radius, radius * 15 // 16))

        # the first object of the scene rests, the others are not there
        scenes = self.scenes(index)
        frames = {name: field.repeat_interleave(self.frames, 0) for name, field in scenes.items()}
        frames['valid'][:, 1:] = False
        for name, field in moving.items():
            frames[name][:, -2:] = field
        return frames, action[:, 0]


# ---- the world: images and captions -------------------------------------------------------------

def distance_to(cells):
    """Euclidean distance from every cell to the nearest of these cells. bool array [n, n] -> [n, n]."""
    n = len(cells)
    gaps = (np.arange(n)[:, None] - np.arange(n)) ** 2              # squared, between two rows or columns
    columns = np.where(cells[None], gaps[:, :, None], 4 * n * n).min(1)     # separable: first within columns
    return np.sqrt((columns[:, None, :] + gaps[None]).min(2).astype(np.float64))


@functools.lru_cache(maxsize=4)
def world_tables(device):
    """What drawing looks up. shapes [16 * CELLS^2]: signed distances to the outline, negative inside.
    surfaces [8 * 4 * CELLS^2]: palette codes, 16 the mark. grounds [10 * TILE^2]: brightness."""
    centre = (np.arange(CELLS) + .5 - CELLS / 2) / RADIUS
    x, y = np.meshgrid(centre, centre)
    shapes = []
    for is_inside in SHAPES.values():
        inside = is_inside(x, y, np.hypot(x, y), np.arctan2(x, -y))
        shapes.append(np.where(inside, .5 - distance_to(~inside), distance_to(inside) - .5))
    surfaces = [np.where(mark(x, y), 16, np.round(15 * surface(x, y)))
                for surface in SURFACES.values() for mark in MARKS.values()]

    # noise that wraps around, smoothed six times, then stretched back to 0..1
    noise = uniform(WORLD_SEED, 'noise', torch.arange(TILE * TILE), 1).view(TILE, TILE).double().numpy()
    for _ in range(6):
        noise = sum(np.roll(noise, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    noise = np.clip((noise - noise.mean()) / noise.std() / 4 + .5, 0, 1)
    x, y = np.meshgrid(np.arange(TILE), np.arange(TILE))
    grounds = [ground(x, y, noise) for ground in GROUNDS.values()]
    def flat(tables, dtype):
        return torch.tensor(np.stack(tables)).flatten().to(device, dtype)
    return flat(shapes, torch.float32), flat(surfaces, torch.long), flat(grounds, torch.float32)


AT_ONCE = 2 ** 22               # pixels that a GPU draws at a time


def draw_scenes(scenes, image_size):
    """Images uint8 [B, 3, H, W], and who owns each pixel [B, H, W]: a stuff class, or 10 + the object's row.
    Places are integers (in float32, below 2^24): exact on every device."""
    device = scenes['x'].device
    most = 2 ** 16 if device.type == 'cpu' else AT_ONCE         # pixels at a time: what a CPU's cache holds
    num = max(1, most // image_size ** 2)
    if len(scenes['x']) > num:
        starts = range(0, len(scenes['x']), num)
        parts = [{name: field[n:n + num] for name, field in scenes.items()} for n in starts]
        images, owners = zip(*(draw_scenes(part, image_size) for part in parts))
        return torch.cat(images), torch.cat(owners)

    scenes = SimpleNamespace(**scenes)
    shapes, surfaces, _ = world_tables(device)
    g = grammar(device)
    pixels = (2 * torch.arange(image_size, device=device) + 1) * (SIDE // 2) // image_size  # their centres
    canvas, owner = render_ground(scenes, pixels)                           # [B, H, W, 3], [B, H, W]

    # the M objects that are there, and for each the table cell under every pixel
    b, row = scenes.valid.nonzero(as_tuple=True)
    names = 'x', 'y', 'radius', 'matrix', 'kind', 'texture', 'part', 'colour', 'jitter'
    objects = SimpleNamespace(**{name: getattr(scenes, name)[b, row] for name in names})
    matrix = (objects.matrix.float() / 4096)[..., None, None].unbind(1)     # four of [M, 1, 1]
    dx = (pixels - objects.x[:, None]).float()[:, None, :]                  # [M, 1, W]
    dy = (pixels - objects.y[:, None]).float()[:, :, None]                  # [M, H, 1]

    # the cell of each object's table that a pixel shows
    across = dx * matrix[0] + dy * matrix[1]
    across = across.floor_().add_(CELLS // 2).clamp_(0, CELLS - 1)
    down = dx * matrix[2] + dy * matrix[3]
    down = down.floor_().add_(CELLS // 2).clamp_(0, CELLS - 1)
    cell = down.mul_(CELLS).add_(across).long()                             # [M, H, W]
    surface = objects.texture * NUM_PARTS + objects.part
    distance = shapes.take(cell + (objects.kind * CELLS ** 2)[:, None, None])
    code = surfaces.take(cell.add_((surface * CELLS ** 2)[:, None, None]))
    code[distance > -OUTLINE] = 17

    # each object's palette: 16 colours from the first to the second, its mark (a shade), its outline
    main = g['colours'][objects.colour].float() + objects.jitter            # [M, 3]
    other = .3 * main + .7 * g['second'][objects.texture]
    mark = torch.where(main.mean(1, keepdim=True) > 60, .4 * main, main + 90)
    outline = g['outlines'][objects.kind].float()
    blend = torch.linspace(0, 1, 16, device=device)[:, None]
    between = main[:, None] + blend * (other - main)[:, None]
    palette = torch.cat([between, mark[:, None], outline[:, None]], 1).flatten(0, 1)        # [M * 18, 3]
    code += 18 * torch.arange(len(b), device=device)[:, None, None]
    paint = palette[code]                                                   # [M, H, W, 3]

    # painters' order: later objects hide earlier ones
    pixels_per_cell = objects.radius.float() * image_size / (RADIUS * SIDE)
    alpha = (.5 - distance * pixels_per_cell[:, None, None]).clamp_(0, 1)
    for layer in range(MAX_OBJECTS):
        here = row == layer
        images = b[here]
        canvas[images] = torch.lerp(canvas[images], paint[here], alpha[here].unsqueeze(-1))
        owner[images] = torch.where(distance[here] <= 0, NUM_STUFF + layer, owner[images])

    # light falls off by up to 30% along a slope
    light_x, light_y = scenes.light[..., None, None].unbind(1)              # each [B, 1, 1]
    light = (light_x * (pixels - 512) + light_y * (pixels - 512)[:, None]).float() / (512 * 200)
    canvas *= 1 + light.unsqueeze(-1)
    images = canvas.round_().clamp_(0, 255).to(torch.uint8)
    return images.permute(0, 3, 1, 2).contiguous(), owner


def render_ground(scenes, pixels):
    """Up to three grounds, parted by two wavy lines: colours [B, H, W, 3] and stuff classes [B, H, W]."""
    ground = scenes.ground[..., None, None].unbind(1)                                       # each [B, 1, 1]
    first, second, cos, sin, phase, frequency, swing, shift_x, shift_y = ground
    mirror = (scenes.layout == LAYOUTS.index('mirror'))[:, None, None]
    x = torch.where(mirror, torch.minimum(pixels, SIDE - 1 - pixels), pixels)               # [B, 1, W]
    y = pixels[:, None]                                                                     # [H, 1]

    # which of the three is where
    depth = ((x - 512) * cos + (y - 512) * sin) // 1024 + 512                               # [B, H, W]
    side = ((y - 512) * cos - (x - 512) * sin) // 1024 + 512
    sine = grammar(x.device)['turn'][:, 1]
    depth += sine[(side * (frequency + 1) // 16 + phase) % 64] * swing // 1024
    region = (depth > first).long() + (depth > second)                                      # in 0, 1, 2
    owner = scenes.grounds.gather(1, region.flatten(1)).view_as(region)

    # its colour and texture
    place = ((y // 6 + shift_y) % TILE) * TILE + (x // 6 + shift_x) % TILE
    textures = world_tables(x.device)[2]
    brightness = textures.take(owner * TILE ** 2 + place) * scenes.contrast[:, None, None]
    rows = region + 3 * torch.arange(len(region), device=x.device)[:, None, None]
    colour = scenes.ground_colour.float().flatten(0, 1)[rows]
    return colour.add_(brightness.unsqueeze(-1)), owner.to(torch.uint8)


def annotate(scenes, owner):
    """What owner [B, H, W] says: semantic [B, H, W] (grounds, then 10 + kind), and of what is
    visible masks [B, 6, H, W], boxes [B, 6, 4] (xyxy, pixels; zeros if nothing is), num_visible [B, 6]."""
    grounds = torch.arange(NUM_STUFF, device=owner.device).expand(len(owner), -1)
    class_of = torch.cat([grounds, NUM_STUFF + scenes['kind']], 1)                          # [B, 10 + 6]
    semantic = class_of.gather(1, owner.flatten(1).long()).view(owner.shape)
    objects = torch.arange(MAX_OBJECTS, device=owner.device)
    masks = owner[:, None] == NUM_STUFF + objects[:, None, None]                            # [B, 6, H, W]

    # from the first to the last column and row in which something is
    seen = torch.stack([masks.any(2), masks.any(3)], 2).int()                               # [B, 6, 2, side]
    first = seen.argmax(-1)
    last = seen.shape[-1] - seen.flip(-1).argmax(-1)
    num_visible = masks.flatten(2).sum(-1)
    boxes = torch.cat([first, last], -1) * (num_visible > 0)[..., None]
    return dict(semantic=semantic, boxes=boxes, num_visible=num_visible, masks=masks)


NUMBERS = ('no', 'one', 'two', 'three', 'four', 'five', 'six')
PHRASES = {
    'row': ('{} in a row', 'a row of {}', '{} in a line'),
    'ring': ('{} around a centre', 'a round of {}'),
    'grid': ('a grid of {}', '{} in rows and columns'),
    'mirror': ('{} and the same mirrored', '{}, seen twice')}
PLURALS = {'leaf': 'leaves', 'box': 'boxes', 'cross': 'crosses', 'hourglass': 'hourglasses', 'plus': 'pluses',
           'rhombus': 'rhombuses'}


def captions(scenes, index):
    """What a person would say of each scene: attributes are left out at random, parts always."""
    names = ('layout', 'mode', 'valid', 'kind', 'texture', 'colour', 'x', 'y', 'radius', 'grounds')
    rows = zip(*(scenes[name].tolist() for name in names))
    numbers = uniform(WORLD_SEED, 'caption', index, 24).tolist()
    return [caption(SimpleNamespace(**dict(zip(names, row))), iter(u)) for row, u in zip(rows, numbers)]


def caption(scene, draw):
    """One scene's caption. scene: its fields as lists; draw: an iterator of uniform numbers."""
    count = sum(scene.valid)
    layout = LAYOUTS[scene.layout]
    if layout == 'single' or count == 1:
        text = describe(scene, 0, draw)
    elif layout == 'free':
        i, j = sorted(range(count), key=lambda n: -scene.radius[n])[:2]         # the two largest
        dx = scene.x[j] - scene.x[i]
        dy = scene.y[j] - scene.y[i]
        relation = 'above' if dy > 0 else 'below'
        if abs(dx) > abs(dy):
            relation = 'left of' if dx > 0 else 'right of'
        text = describe(scene, i, draw)
        text += f' {relation} ' if next(draw) < .7 else ' and '
        text += describe(scene, j, draw)
    else:
        phrases = PHRASES[layout]
        phrase = phrases[int(next(draw) * len(phrases))]
        if layout == 'mirror':
            text = ' and '.join(describe(scene, i, draw) for i in range(0, min(count, 4), 2))
        elif scene.mode >= 2:
            text = ' and '.join(describe(scene, i, draw, count=0) for i in (0, 1)) + ' in turn'
        else:
            text = describe(scene, 0, draw, count)
        text = phrase.format(text)
    names = list(STUFF)
    if next(draw) < .75:
        text += ' on ' + names[scene.grounds[0]]
        if next(draw) < .7:
            text += ' and ' + names[scene.grounds[1]]
    return text


def describe(scene, i, draw, count=1):
    """'a red striped disc', 'four red discs'; no number where count is 0. Object i of the scene."""
    def word(names, k):         # of class k, now and then the other one
        words = list(names.values())[k]
        return words[-1] if next(draw) < .2 else words[0]
    words = []
    if next(draw) < .75:
        words.append(list(COLOURS)[scene.colour[i]])
    if next(draw) < (.55 if scene.texture[i] else .2):
        words.append(word(TEXTURES, scene.texture[i]))
    words.append(word(KINDS, scene.kind[i]))
    if count == 1:
        return ' '.join(['an' if words[0][0] in 'aeiou' else 'a', *words])
    words[-1] = PLURALS.get(words[-1], words[-1] + 's')
    return ' '.join([NUMBERS[count], *words] if count else words)


# ---- words to numbers ---------------------------------------------------------------------------

CLIP_MERGES = 'https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz'
CLIP_MERGES_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
NUM_CLIP_MERGES = 48894         # 49,408 ids = 256 bytes + 256 that end a word + 48,894 merges + 2 specials
CONTEXT = 77                    # ids of a caption
LONGEST_CAPTION = 10_000        # characters; of more the rest is cut
LONGEST_WORD = 1000             # of them without a space: more than 77 pieces hold
START = '<|startoftext|>'
END = '<|endoftext|>'
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def clean(text):
    """CLIP's cleaning. It leaves printable ASCII without '&' alone, and most captions are that."""
    if text.isascii() and text.isprintable() and '&' not in text:
        return text.lower()
    try:
        import ftfy                 # needed by captions alone
    except ImportError:
        raise Refused('captions are mended by ftfy, which is not installed; pip install ftfy') from None
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r'\s+', ' ', text.strip()).strip().lower()


def merge_pair(symbols, pair, merged):
    """The list with every adjacent (a, b) == pair, from the left, replaced by merged."""
    result = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] = merged
        else:
            result.append(symbol)
    return result


class Tokenizer:
    """CLIP's byte-level BPE. merges: list of 'a b' by falling priority; all that a checkpoint must store.
    Ids: 256 bytes, the same 256 ending a word ('</w>'), one per merge, start, end (highest)."""

    def __init__(self, merges):
        self.merges = list(merges)
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable}          # what stands for each, by id
        self.letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
        letters = list(self.letters.values())
        self.pieces = letters + [letter + '</w>' for letter in letters]         # by id
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.ranks = {}                                     # (id, id) -> (priority, id of the two together)
        for rank, line in enumerate(self.merges):
            pair = line.split() if isinstance(line, str) else []
            if len(pair) != 2 or not self.ids.keys() >= set(pair):
                found = repr(str(line)[:40])
                raise Refused(f'merge {rank:,} of the vocabulary is {found}; expected two known pieces')
            left, right = pair
            merged = self.ids.setdefault(left + right, len(self.pieces))
            self.pieces.append(left + right)
            self.ranks[self.ids[left], self.ids[right]] = rank, merged
        self.start = len(self.pieces)
        self.end = self.start + 1
        self.special = {START: [self.start], END: [self.end]}
        self.pieces += [START, END]
        self.vocab_size = len(self.pieces)
        self.encode = functools.lru_cache(1 << 17)(self.encode)             # some 30 MB

    def __call__(self, texts):
        """Captions (or one) -> ids [B, 77] int64: start, words, end, zeros. Where too long, end is last."""
        texts = [texts] if isinstance(texts, str) else texts
        result = np.zeros((len(texts), CONTEXT), dtype=np.int64)
        for row, text in zip(result, texts):
            ids = [self.start]
            text = clean(text[:LONGEST_CAPTION])
            for chunk in text.split(' '):                   # no match of WORD crosses a space
                ids += self.encode(chunk[:LONGEST_WORD])
            ids = ids[:CONTEXT - 1] + [self.end]
            row[:len(ids)] = ids
        return torch.from_numpy(result)

    def encode(self, chunk):
        """Ids of cleaned text without spaces, remembered by chunk ('dog.') and by word ('dog'). Those of a
        word: the merge of highest priority first, until none applies."""
        words = WORD.findall(chunk)
        if words != [chunk]:
            return [i for word in words for i in self.encode(word)]
        if chunk in self.special:
            return self.special[chunk]
        ids = [self.ids[letter] for letter in self.spell(chunk)]
        while True:
            pairs = [pair for pair in zip(ids, ids[1:]) if pair in self.ranks]
            if not pairs:
                return ids
            best = min(pairs, key=self.ranks.get)
            ids = merge_pair(ids, best, self.ranks[best][1])

    def spell(self, word):      # 'cat' -> ['c', 'a', 't</w>']: one letter per byte of UTF-8
        letters = [self.letters[byte] for byte in word.encode('utf-8', 'replace')]
        letters[-1] += '</w>'
        return letters

    def decode(self, ids):
        """Text of a list or tensor of ids, a space after each word, as CLIP's (to which padding, id 0, is '!')."""
        byte_of = {letter: byte for byte, letter in self.letters.items()}
        text = ''.join(self.pieces[i] for i in torch.as_tensor(ids).tolist())
        return bytes(byte_of[letter] for letter in text).decode('utf-8', errors='replace').replace('</w>', ' ')

    @classmethod
    def from_file(cls, path):
        """CLIP's bpe_simple_vocab_16e6.txt.gz: a header line, then 'a b' lines."""
        try:
            check_file(path)
            with gzip.open(path) as file:
                table = file.read(LONGEST_TEXT + 1)
            if len(table) > LONGEST_TEXT:
                raise ValueError(f'it has more than {LONGEST_TEXT:,} bytes')
            lines = table.decode('utf-8').split('\n')
            if '#version' not in lines[0]:
                raise ValueError("the first line lacks '#version'")
            return cls([line for line in lines[1:NUM_CLIP_MERGES + 1] if line.strip()])
        except (OSError, EOFError, zlib.error, ValueError) as error:
            expected = os.path.basename(CLIP_MERGES)
            raise Refused(f'{path}: no BPE merge table ({error}); expected {expected}') from None

    @classmethod
    def openai(cls, path='', folder='out'):  # from this file, or downloaded once into folder
        table = os.path.join(folder, os.path.basename(CLIP_MERGES))
        advice = 'pass --bpe FILE with a copy of bpe_simple_vocab_16e6.txt.gz'
        return cls.from_file(path or fetch(CLIP_MERGES, CLIP_MERGES_SHA256, table, advice))

    @classmethod
    def learn(cls, captions, num_merges=1000):
        """A small vocabulary of the same form from the 5,000 most frequent words: each merge is the most
        frequent pair (ties: the last in the alphabet), until every word has become one piece."""
        bare = cls([])
        counts = Counter(word for caption in captions for word in WORD.findall(clean(caption)))
        words = [(bare.spell(word[:LONGEST_WORD]), count) for word, count in counts.most_common(5000)]
        pairs = Counter()

        def count_pairs(pieces, count):
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += count

        for pieces, count in words:
            count_pairs(pieces, count)
        merges = []
        while len(merges) < num_merges and pairs:
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            merges.append(' '.join(best))
            for i, (pieces, count) in enumerate(words):
                if best[0] in pieces and best[1] in pieces:
                    count_pairs(pieces, -count)
                    pieces = merge_pair(pieces, best, ''.join(best))
                    count_pairs(pieces, count)
                    words[i] = pieces, count
            pairs = +pairs                                  # drops those that are no more
        return cls(merges)


def fetch(url, sha256, path, advice):
    """The file at url as path, only if it is the known one; returns path, at once if it is there."""
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        try:                                                # several processes may fetch at once
            torch.hub.download_url_to_file(url, path, sha256, progress=False)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise Refused(f'{url} could not be fetched ({error}); {advice}') from error
    return path


# ---- images from files --------------------------------------------------------------------------

SUFFIXES = tuple('.jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .tga'.split())
FORMATS = 'JPEG PNG WEBP BMP GIF TIFF PPM JPEG2000 TGA'.split()  # EPS, say, would start a program
LARGEST_PICTURE = 2 ** 30       # bytes of a file; PIL bounds its pixels
NUM_CROP = 23                   # uniform numbers a crop takes: 10 tries of (area, aspect), top, left, flip
NUM_AUGMENT = 10                # what follows them: those of AUGMENTS; then when a clip's frames are taken
FILL = (123, 117, 104)          # what comes in from beyond the border: CLIP's mean colour


@dataclass(frozen=True)
class Views:
    """How the images of files are seen."""
    crop: tuple = (.2, 1.)      # in training: a random part, so much of the area
    flip: bool = True           # mirrored half of the time
    augment: str = ''           # and changed: one of AUGMENTS
    share: float = 224 / 256    # in evaluation: the central square, so much of the shorter side; CLIP's is 1


def to_rgb(image):
    """Any PIL mode -> 'RGB': deep pixels scaled to 8 bits (PIL would clip them), transparency over white."""
    image.load()                # some formats know their mode only then
    if image.mode.startswith('I') or image.mode == 'F':
        pixels = np.asarray(image).astype(np.float32)
        np.nan_to_num(pixels, copy=False).clip(0, out=pixels)
        white = 65535 if ';16' in image.mode else pixels.max() or 1     # 32 bits do not say what is white
        pixels *= 255 / white
        image = Image.fromarray(pixels.round(out=pixels).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


class Unreadable(Refused, OSError):
    """A damaged file among many is replaced, as any that gives an OSError; alone it is refused.
    Reports say 'images REASON: NAME DETAIL'."""
    def __init__(self, message, reason='could not be read', detail=''):
        super().__init__(message)
        self.reason = reason
        self.detail = detail


@contextlib.contextmanager
def open_picture(source):
    """The PIL image in a file, or in its bytes as io.BytesIO: of FORMATS, of a bounded size, not yet
    decoded. Whatever goes wrong while it is open becomes Unreadable."""
    name = 'a picture' if isinstance(source, io.BytesIO) else source
    try:
        if source is name:
            check_file(source, LARGEST_PICTURE)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')         # of pictures that are large, or damaged in part
            with Image.open(source, formats=FORMATS) as image:
                yield image
    except Exception as error:  # decoders raise SyntaxError, ValueError, struct.error and more
        raise Unreadable(f'{name} cannot be read: {first_line(error)}') from error


TURNS = {  # what makes a picture upright, by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def orientation(image):
    """EXIF's orientation of an open picture, 1 to 8; 1 where its metadata are damaged."""
    if image.format == 'TIFF':
        image.load()            # turns it, and only then is its size that of the upright picture
        return 1
    try:
        turn = image.getexif().get(0x112)
    except Exception:           # as many kinds as decoders raise
        turn = 1
    return turn if turn in TURNS else 1


def read_part(path, box_of, size=math.inf):
    """-> (upright PIL 'RGB' image, box_of(width, height) in it, whether it was decoded smaller: a JPEG
    is, at 1/2 to 1/8, where the box is at least 4 x size, which is much faster). Or Unreadable."""
    with open_picture(path) as image:
        turn = orientation(image)
        width, height = image.size
        box = box_of(height, width) if turn >= 5 else box_of(width, height)

        shrink = min(box[2] - box[0], box[3] - box[1]) / (2 * size)
        smaller = None
        if shrink >= 2:
            smaller = image.draft('RGB', (math.ceil(width / shrink), math.ceil(height / shrink)))
        if smaller:
            box = [side * smaller[1][2] / width for side in box]

        if turn > 1:
            image = image.transpose(TURNS[turn])
        return to_rgb(image), box, bool(smaller)


def read_image(path):           # whole and upright, PIL
    return read_part(path, lambda width, height: (0, 0, width, height))[0]


def read_sized(path, size):
    """The whole image, PIL: upright or, if only that may be of this (width, height), as it is stored."""
    image = read_image(path)
    if image.size != size:
        with open_picture(path) as stored:
            image = to_rgb(stored)
    return image


def to_tensor(image):       # PIL 'RGB' -> uint8 [3, H, W]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_box(u, crop, width, height):
    """torchvision's random resized crop from NUM_CROP uniform numbers: (left, top, right, bottom), integers.
    Ten tries of (share of the area, aspect), then the largest central box of aspect 3/4 to 4/3."""
    low = math.log(3 / 4)
    high = math.log(4 / 3)
    for area, aspect in zip(u[0:20:2], u[1:20:2]):
        area = (crop[0] + (crop[1] - crop[0]) * area) * (width * height)
        aspect = math.exp(low + (high - low) * aspect)
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(u[20] * (height - h + 1))
            left = int(u[21] * (width - w + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * (4 / 3)))
    h = min(height, round(width / (3 / 4)))
    left = (width - w) // 2
    top = (height - h) // 2
    return left, top, left + w, top + h


def load_crop(path, image_size, u, crop=(.2, 1)):
    """A random crop of one image, bicubic: uint8 [3, S, S]. u: NUM_CROP uniform numbers."""
    image, box, smaller = read_part(path, functools.partial(crop_box, u, crop), image_size)
    if smaller:                 # the box may cut through pixels
        return to_tensor(image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))
    # torch takes a third of PIL's time, and rarely differs by 1 or 2
    part = to_tensor(image.crop(box))[None]
    return F.interpolate(part, size=(image_size, image_size), mode='bicubic', antialias=True)[0]


def load_view(path, image_size, share=224 / 256, place=.5):
    """The evaluation view of one image, bicubic: uint8 [3, S, S], a square of that share of the shorter side
    (224 / 256: CLIP's resize to 256, crop 224). place: where on the longer side, 0 to 1."""
    def box_of(width, height):
        side = min(width, height) * share
        left = (width - side) * (place if width > height else .5)
        top = (height - side) * (place if height > width else .5)
        return left, top, left + side, top + side
    image, box, _ = read_part(path, box_of, image_size)
    return to_tensor(image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))


def moved(image, *matrix):
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


# m: magnitude, 0 to 1; sign: 1 or -1. timm's "increasing" set: a larger m always changes more
RAND_AUGMENT = {
    'autocontrast': lambda x, m, sign: ImageOps.autocontrast(x),
    'equalize':     lambda x, m, sign: ImageOps.equalize(x),
    'invert':       lambda x, m, sign: ImageOps.invert(x),
    'rotate':       lambda x, m, sign: x.rotate(sign * 30 * m, Image.Resampling.BICUBIC, fillcolor=FILL),
    'posterize':    lambda x, m, sign: ImageOps.posterize(x, max(1, 4 - int(4 * m))),
    'solarize':     lambda x, m, sign: ImageOps.solarize(x, 256 - int(256 * m)),
    'solarize_add': lambda x, m, sign: x.point(lambda v: min(255, v + int(110 * m)) if v < 128 else v),
    'color':        lambda x, m, sign: ImageEnhance.Color(x).enhance(1 + sign * .9 * m),
    'contrast':     lambda x, m, sign: ImageEnhance.Contrast(x).enhance(1 + sign * .9 * m),
    'brightness':   lambda x, m, sign: ImageEnhance.Brightness(x).enhance(1 + sign * .9 * m),
    'sharpness':    lambda x, m, sign: ImageEnhance.Sharpness(x).enhance(1 + sign * .9 * m),
    'shear_x':      lambda x, m, sign: moved(x, 1, sign * .3 * m, 0, 0, 1, 0),
    'shear_y':      lambda x, m, sign: moved(x, 1, 0, 0, sign * .3 * m, 1, 0),
    'translate_x':  lambda x, m, sign: moved(x, 1, 0, sign * .45 * m * x.width, 0, 1, 0),
    'translate_y':  lambda x, m, sign: moved(x, 1, 0, 0, 0, 1, sign * .45 * m * x.height)}


def rand_augment(image, u):
    """RandAugment (arXiv:1909.13719), timm's m9-mstd0.5-inc1: two of the fifteen, each with a chance of .5,
    at a magnitude of 9 +- .5 of 10. image uint8 [3, S, S]; u: 10 uniform numbers."""
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    for which, does, sign, a, b in (u[0:5], u[5:10]):
        if does < .5:
            normal = math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b)
            magnitude = min(1, max(0, .9 + .05 * normal))
            change = list(RAND_AUGMENT.values())[int(which * len(RAND_AUGMENT))]
            image = change(image, magnitude, 1 if sign < .5 else -1)
    return to_tensor(image)


def change_colours(images, u):
    """EVA's colour jitter for videos: brightness, contrast and saturation change with a chance of .8 (by up to .4: ours),
    and all turns grey with .2. images uint8 [..., 3, S, S], frames alike; u: 5 uniform numbers."""
    def grey(x):
        return (x * torch.tensor([.299, .587, .114]).view(3, 1, 1)).sum(-3, keepdim=True)
    x = images.float()
    if u[0] < .8:
        x = x * (.6 + .8 * u[1])
        x = torch.lerp(grey(x).mean().expand_as(x), x, .6 + .8 * u[2])
        x = torch.lerp(grey(x).expand_as(x), x, .6 + .8 * u[3])
    if u[4] < .2:
        x = grey(x).expand_as(x)
    return x.round().clamp(0, 255).to(torch.uint8)


AUGMENTS = {'rand': rand_augment, 'colour': change_colours}


# ---- folders, clips and shards ------------------------------------------------------------------

SPLIT_FOLDERS = {  # names of the folders that hold a split, in small letters
    'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'dev': 'val',
    'test': 'test', 'testing': 'test'}
LIKE_A_SPLIT = re.compile('train|val|test|dev|pred', re.IGNORECASE)     # seg_train, seg_test
UNREAD = '.heic', '.heif', '.avif', '.jxl', '.svg', '.psd', '.raw', '.dng'       # pictures, but none of SUFFIXES
SAMPLE_TEXT = 2 ** 20           # bytes of a caption's file, or of the json that holds it
SAMPLE_CLASS = 1000             # and of a class's


def find_splits(path):
    """-> (path or, where the splits are there, path/images; {'train', 'val' or 'test': its folder})."""
    for base in (os.path.join(path, 'images'), path):
        found = {}
        for name in sorted(os.listdir(base)) if os.path.isdir(base) else []:
            place = os.path.join(base, name)
            split = SPLIT_FOLDERS.get(name.casefold())
            if split in found:
                raise Refused(f'{place} and {found[split]} are both of the split {split}; keep one of them')
            if split and os.path.isdir(place):
                found[split] = place
        if found:
            break
    return base, found


def leads_up(folder, name):     # whether it is a link to its folder or to one above
    place = os.path.join(folder, name)
    if not os.path.islink(place):
        return False
    here = os.path.realpath(folder) + os.sep
    return here.startswith(os.path.realpath(place) + os.sep)


def list_files(root, skip=()):
    """-> (paths of images below root, with '/', in natural order; those of .txt files, without suffix; those
    of pictures that are not read). Hidden ones do not count, nor folders in skip. Refused where a folder
    cannot be read."""
    def refuse(error):
        raise Refused(f'{error.filename} cannot be read ({error.strerror})')

    images = []
    texts = set()
    unread = []
    for folder, inner, names in os.walk(root, onerror=refuse, followlinks=True):
        inner[:] = [name for name in inner if name[0] != '.']
        inner[:] = [name for name in inner if os.path.join(folder, name) not in skip]
        inner[:] = [name for name in inner if not leads_up(folder, name)]
        place = f'{os.path.relpath(folder, root)}/'.removeprefix('./')
        for name in names:
            if name.lower().endswith(SUFFIXES) and name[0] != '.':
                images.append(place + name)
            elif name.endswith('.txt'):
                texts.add(place + name[:-4])
            elif name.lower().endswith(UNREAD):
                unread.append(place + name)
    return sorted(images, key=natural), texts, unread


def split_by_hash(paths):
    """5% of the paths, by each one's hash, are validation; at least 8, and at most half."""
    value = {path: hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in paths}
    num = sum(int.from_bytes(value[path], 'big') < .05 * 2 ** 64 for path in paths)
    val = set(sorted(paths, key=value.get)[:min(max(num, 8), len(paths) // 2)])
    train = [path for path in paths if path not in val]
    return {'train': train, 'val': [path for path in paths if path in val]}


def read_captions(raw, kind):
    """The captions in the bytes of a 'txt', which is one, or of a 'json': its "caption", or a list."""
    found = decode(raw, 'replace')
    if kind == 'json':
        try:
            found = json.loads(found)['caption']
        except (ValueError, LookupError, TypeError, RecursionError):
            return []
    found = found if isinstance(found, list) else [found]
    texts = [text.strip()[:LONGEST_CAPTION] for text in found if isinstance(text, str)]
    whole = [text.encode('utf-8', 'replace').decode() for text in texts]    # json has halves of letters
    return [text for text in whole if text]


REPLACED = 2 ** 62      # position of a sample that stands for an unreadable one: beyond every end


class Files:
    """What readers of files share. Each has sample(i, image_size, u): a dict of sample i, in training by
    uniform numbers u, or, where u is None, as judged; OSError if it cannot be read."""
    reads_files = True          # worker processes help
    has_captions = False
    frames = 0
    what = 'images'             # its samples, in reports

    def __len__(self):
        return len(self.paths)

    def identity(self):
        """What a checkpoint remembers of its data."""
        classes = getattr(self, 'label_names', self.classes)
        names = '\n'.join(self.paths).encode('utf-8', 'surrogateescape')
        digest = hashlib.blake2b(names, digest_size=8)
        digest.update(self.contents())
        return dict(samples=len(self.paths), names=digest.hexdigest(), classes=classes)

    def contents(self):
        """What tells data from others with files of the same names: here the sizes of these."""
        sizes = [file_size(self.image(i)) for i in range(len(self.paths))]
        return repr([size for size in sizes if size is not None]).encode()

    def index(self, position, seed):  # which samples stand at these positions [B] of a run
        return sample_index(position, len(self), seed).tolist()

    def image(self, i):
        """What PIL can open of image i: a path, or its bytes as a file."""
        return os.path.join(self.root, self.paths[i])

    def trouble(self, i, error):
        """What reports say of sample i: a pair for broken."""
        reason = getattr(error, 'reason', 'could not be read')
        name = self.paths[i] + getattr(error, 'detail', '')
        return f'of {len(self.paths):,} {self.what} {reason} and were left out', name

    def first_readable(self, first, image_size, u, broken):
        """(i, sample i), the first from `first` on that can be read; others' names go to broken."""
        num = len(self.paths)
        for i in range(first, first + num):
            i = i % num
            try:
                return i, self.sample(i, image_size, u)
            except OSError as error:
                last = error
                broken.append(self.trouble(i, error))
        raise Refused(f'{self.root}: none of {num:,} {self.what} can be used; the last: {last}')

    def batch(self, position, image_size, seed=0, train=True):
        """The samples at these positions [B], as seen in training (train) or as judged: one dict, tensors stacked,
        other things in lists; and broken, position: as judged REPLACED where a sample stands for another."""
        broken = []
        samples = []
        position = position.clone()
        numbers = uniform(seed, 'crop', position, NUM_CROP + NUM_AUGMENT + self.frames + 1).tolist()
        for n, first in enumerate(self.index(position, seed)):
            u = numbers[n] if train else None
            i, sample = self.first_readable(first, image_size, u, broken)
            samples.append(sample)
            if i != first and not train:
                position[n] = REPLACED
        broken += [('captions are not UTF-8', self.paths[sample['index']]) for sample in samples
                   if '\ufffd' in sample.get('captions', '')]
        batch = {name: [sample[name] for sample in samples] for name in samples[0]}
        for name, values in batch.items():
            if torch.is_tensor(values[0]):
                batch[name] = torch.stack(values).contiguous()
        return dict(batch, position=position, broken=broken)


class Folder(Files):
    """Any folder of images, flat or nested. The splits are train/ (else all but val/ and test/) and val/
    (else split_by_hash), see SPLIT_FOLDERS; 'test' is val/ or, without it, every image; test/ is never
    read. Class folders give labels and 'a photo of a ...'; a .txt beside an image is its caption."""
    sources = {'caption': 'a .txt beside each, or class folders', 'class': 'a folder for each'}

    def __init__(self, path, split='train', views=Views(), frames=0, captions=False, labels=False):
        self.views = views
        self.frames = frames
        self.has_captions = captions
        self.broken = set()     # (what, name) of what could not be used, met so far

        # where this split is, and the other
        base, folders = find_splits(path)
        if list(folders) == ['test']:
            only = folders['test']
            raise Refused(f'{path} has only a folder of tests; to use it give {only} as --data')
        train = folders.get('train', base)
        val = folders.get('val', train)
        if list(folders) == ['train'] and list_files(base, [train])[0]:
            raise Refused(f'{base} has images beside {train}; give {train} as --data, or call it something '
                          'else if it is a class')
        self.root = train if split == 'train' else val
        other = val if split == 'train' else train
        files, texts, unread = self.find(self.root, folders.values())
        self.broken |= {('pictures are of a kind that is not read (make them JPEG or PNG)', name) for name in unread}
        others = self.find(other, folders.values())[0] if val != train else []
        if not files:
            looked = ' '.join(SUFFIXES) + ' and .tar shards'
            message = f'{self.root}: no {self.what} in it or below; looked for {looked}'
            raise nothing_left(self, message + ' (json lists and the like are not read: unpack them)')

        # a class is the first folder below those that all share; the other split's count too
        names = files + others
        parts = [name.split('/')[:-1] for name in names]
        shared = os.path.commonprefix([part for part in parts if part])     # takes any sequences
        depth = len(shared)
        class_of = {name: part[depth] for name, part in zip(names, parts) if len(part) > depth}
        files, class_of = self.with_class(files, others, class_of, labels)
        class_of = self.common_classes(class_of, files, others, split, labels)
        classes = {*class_of.values()}
        if len(classes) > 1 and all(map(LIKE_A_SPLIT.search, classes)):
            raise Refused(f'{path}: are {", ".join(sorted(classes))} classes? Splits are called train/, val/ and test/')

        # of a caption's file more than its size is seen when it is read
        self.texts = set()      # images with one
        if captions:
            for name in files:
                stem = os.path.splitext(name)[0]
                if stem in texts and file_size(os.path.join(self.root, stem + '.txt')):
                    self.texts.add(name)
            files = self.only(files, self.texts | class_of.keys(), 'caption')

        self.paths = files if 'val' in folders or split == 'test' else self.part(files, split)
        self.set_labels(class_of)
        self.classes = self.label_names
        self.first_readable(0, 8, None, [])                 # refused unless some image can be read

    find = staticmethod(list_files)     # samples, and which of them may have texts

    def only(self, names, kept, lacking):
        """Those of names that are kept; others, lacking a 'class' or a 'caption', go to broken."""
        reason = f'{self.what} have no {lacking} and were left out'
        self.broken |= {(reason, name) for name in names if name not in kept}
        left = [name for name in names if name in kept]
        if not left:
            expected = self.sources[lacking]
            raise nothing_left(self, f'{self.root}: no {lacking} for any; expected {expected}')
        return left

    def with_class(self, names, others, class_of, labels):
        """-> (names with a class, class_of): the rest are left out where labels are asked for, or at least
        half, also of the other split's, have one; else nothing has a class."""
        def most(of):
            return 2 * sum(name in class_of for name in of) >= len(of)
        if labels or most(names) and most(others):
            return self.only(names, class_of, 'class'), class_of
        return names, {}

    def common_classes(self, class_of, names, others, split, labels):
        """class_of, or nothing where a class is in validation only: then the splits' folders are not of one
        kind. Where labels are asked for it stays, for who learns them to refuse."""
        here = {class_of.get(name) for name in names}
        there = {class_of.get(name) for name in others}
        only = (there - here if split == 'train' else here - there) - {None}
        if labels or not others or not only:
            return class_of
        reason = 'classes are in validation only, so that no image has a class'
        self.broken |= {(reason, name) for name in only}
        return {}

    def part(self, names, split):
        """The names of a split by hash. What was left out of both is training's to report."""
        if len(names) < 4:
            found = f'{self.root} has {len(names)} {self.what}'
            raise nothing_left(self, f'{found}, too few to set some apart for validation; give at least 4')
        if split == 'val':
            self.broken.clear()
        return split_by_hash(names)[split]

    def set_labels(self, class_of):
        """class_of: {path: the name of its class}, of both splits, or empty."""
        self.label_names = sorted(set(class_of.values()), key=natural)
        classes = [class_of[path] for path in self.paths] if class_of else []
        self.labels = find_classes(classes, self.label_names, self.root) or None

    def some_captions(self, num):  # of the first, for a tokenizer to learn from
        found = []
        for i in range(min(num, len(self))):
            with contextlib.suppress(OSError):
                found.append(self.caption(i))
        return found

    def caption(self, i, u=0.):
        """Of those beside image i the one at u, 0 to 1; without any its class in a sentence."""
        found = self.captions(i)
        if found:
            return found[int(u * len(found))]
        if not self.classes:
            raise Unreadable(f'{self.paths[i]} has no caption', 'have no caption')
        return 'a photo of a ' + self.classes[self.labels[i]].replace('_', ' ')

    def captions(self, i):
        if self.paths[i] not in self.texts:
            return []
        path = os.path.join(self.root, os.path.splitext(self.paths[i])[0] + '.txt')
        with open(path, 'rb') as file:
            return read_captions(file.read(SAMPLE_TEXT), 'txt')

    def view(self, i, image_size, u):
        """Image i as seen in training, or, without u, as judged."""
        if u is None:
            return load_view(self.image(i), image_size, self.views.share)
        return load_crop(self.image(i), image_size, u, self.views.crop)

    def sample(self, i, image_size, u):
        """dict of sample i: images [3, S, S], index, labels if there are any, captions if asked for."""
        image = self.view(i, image_size, u)
        if u is not None:
            if self.views.flip and u[22] < .5:
                image = image.flip(-1)
            if self.views.augment:
                image = AUGMENTS[self.views.augment](image, u[NUM_CROP:])
        sample = dict(images=image, index=torch.tensor(i))
        if self.labels is not None:
            sample['labels'] = torch.tensor(self.labels[i])
        if self.has_captions:
            sample['captions'] = self.caption(i, u[-1] if u else 0.)
        return sample


class Clips(Folder):
    """A folder of clips, each a folder of frames, of which T are seen, one from every T-th: [T, 3, S, S]. Judged
    are 4 choices of frames times 3 squares along the longer side: [12, T, 3, S, S]."""
    VIEWS = (4, 3)
    what = 'clips'

    def find(self, root, skip):
        num_frames = Counter(os.path.dirname(name) for name in list_files(root, skip)[0])
        short = {name for name, num in num_frames.items() if num < self.frames}
        if root == self.root:
            reason = f'clips have fewer than {self.frames} frames and were left out'
            self.broken |= {(reason, name or '.') for name in short}
        return sorted(num_frames.keys() - short, key=natural), set(), []

    def frame_paths(self, i, times):
        """A frame from every T-th of clip i. times: T numbers from 0 to 1, where in its part each lies."""
        folder = self.image(i)
        names = [name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES)]
        names = sorted((name for name in names if name[0] != '.'), key=natural)
        if not names:
            raise Unreadable(f'{folder} has no frames')
        places = [int((t + time) * len(names) / self.frames) for t, time in enumerate(times)]
        return [os.path.join(folder, names[place]) for place in places]

    def view(self, i, image_size, u):
        if u is not None:
            paths = self.frame_paths(i, u[NUM_CROP + NUM_AUGMENT:-1])
            return torch.stack([load_crop(path, image_size, u, self.views.crop) for path in paths])
        views = []
        for time in (.125, .375, .625, .875):
            paths = self.frame_paths(i, [time] * self.frames)
            for place in (0, .5, 1):
                frames = [load_view(path, image_size, self.views.share, place) for path in paths]
                views.append(torch.stack(frames))
        return torch.stack(views)


PLAIN_HEADER = re.compile(      # of a member of a tar: its name, size, checksum and kind; other fields as most have them
    rb'(.{100})(?:[0-7]{7}\0){3}([0-7]{11})\0[0-7]{11}\0([0-7]{6})\0 ([0x]).{172}[0-7\0]{16}\0', re.DOTALL)


class Member(tarfile.TarInfo):
    """A member of a tar, read faster: of a plain header no more than is used here."""
    @classmethod
    def frombuf(cls, header, encoding, errors):
        found = PLAIN_HEADER.match(header)
        if found:
            name, size, checksum, kind = found.groups()
            if int(checksum, 8) == sum(header) - sum(header[148:156]) + 8 * ord(' '):     # without its own
                member = cls(name.partition(b'\0')[0].decode(encoding, errors))
                member.size = int(size, 8)
                member.type = kind
                return member
        return super().frombuf(header, encoding, errors)


def tar_members(path):
    """Yields (name, offset, size) of each file in a tar. Damage raises errors of many kinds."""
    check_file(path)
    end = os.path.getsize(path)
    with tarfile.open(path, 'r:', tarinfo=Member) as archive:
        for member in archive:
            archive.members.clear()         # it would keep all
            if archive.offset <= member.offset or member.size < 0:      # it would go round for ever
                raise tarfile.ReadError('a negative size')
            is_whole = member.isfile() and not member.issparse()
            if is_whole and member.offset_data + member.size <= end:
                yield member.name, member.offset_data, member.size
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(512) != bytes(512):         # the zeros that end every tar
            raise tarfile.ReadError('no end')
        if archive.fileobj.read(2 ** 20).strip(b'\0'):
            raise tarfile.ReadError('more behind its end')


class Shards(Folder):
    """Samples in tar files, as img2dataset and webdataset write them: members of one basename are an image,
    its caption (.txt, or "caption" in .json) and class (.cls). Each is read where it lies."""
    sources = {'caption': '.txt or .json members with a caption', 'class': '.cls members'}

    def __init__(self, paths, split='train', views=Views(), captions=False, labels=False):
        self.views = views
        self.shards = paths
        self.root = os.path.commonpath(paths)
        self.has_captions = captions
        self.broken = set()
        members = self.find_members()
        if not members:
            message = f'{self.root}: no images in {len(paths)} tar shards; looked for '
            raise nothing_left(self, message + ' '.join(SUFFIXES))

        names = sorted(members, key=natural)
        names, class_of = self.with_class(names, [], self.read_classes(members), labels)
        if captions:
            names = self.only(names, self.with_caption(members), 'caption')

        self.paths = names if split == 'test' else self.part(names, split)
        self.rows = np.array([[members[name].get(kind, (0, 0, 0)) for kind in ('image', 'txt', 'json')]
                              for name in self.paths])                              # [n, 3, 3] int64
        self.set_labels(class_of)
        self.classes = [] if all(map(str.isdecimal, self.label_names)) else self.label_names
        self.first_readable(0, 8, None, [])                 # refused unless some image can be read

    def find_members(self):
        """{'shard/basename': {'image', 'txt', 'json' or 'cls': (shard, offset, size)}} of every image."""
        rows = {}
        root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in self.shards])
        for shard, path in enumerate(self.shards):
            place = os.path.relpath(path, root)
            try:
                for name, offset, size in tar_members(path):
                    folder, name = os.path.split(name)
                    base, _, suffix = name.partition('.')
                    what = 'image' if base and f'.{suffix.lower()}' in SUFFIXES else suffix
                    key = os.path.join(place, folder.lstrip('/'), base)
                    if base and what == suffix and suffix.lower().endswith(SUFFIXES + UNREAD):
                        reason = 'members have two endings, of which the first counts: no pictures'
                        self.broken.add((reason, f'{key}.{suffix}'))
                    row = rows.setdefault(key, {})
                    if what in row:
                        reason = 'members are there again, of which the last counts'
                        self.broken.add((reason, f'{key}.{suffix} at byte {row[what][1]:,}'))
                    row[what] = shard, offset, size
            except Exception:           # what comes before the damage counts
                self.broken.add(('shards are cut short or damaged', path))

        members = {key: row for key, row in rows.items() if 'image' in row}
        alone = [key for key in rows.keys() - members.keys() if rows[key].keys() & {'txt', 'json', 'cls'}]
        self.broken |= {('members have no image', key) for key in alone}
        return members

    def read_classes(self, members):
        """{name: class} of the members whose .cls is a word in UTF-8."""
        class_of = {}
        for name, row in members.items():
            raw = self.read(*row['cls'], SAMPLE_CLASS) if 'cls' in row else b''
            with contextlib.suppress(UnicodeDecodeError):
                class_of[name] = raw.decode('utf-8-sig').strip()
        return {name: label for name, label in class_of.items() if label}

    def with_caption(self, members):
        """Names of the members with a caption; a .txt or .json without goes."""
        for row in members.values():
            for kind in ('txt', 'json'):
                if kind in row and not read_captions(self.read(*row[kind], SAMPLE_TEXT), kind):
                    del row[kind]
        return {name for name, row in members.items() if 'txt' in row or 'json' in row}

    def read(self, shard, offset, size, most):
        with open(self.shards[shard], 'rb', buffering=0) as file:     # no more than is asked for
            file.seek(offset)
            return file.read(min(size, most))

    def contents(self):
        return self.rows.tobytes() + repr(self.labels).encode()

    def captions(self, i):
        _, text, held = self.rows[i]
        row, kind = (text, 'txt') if text[2] else (held, 'json')
        return read_captions(self.read(*row, SAMPLE_TEXT), kind)

    def image(self, i):
        return io.BytesIO(self.read(*self.rows[i, 0], LARGEST_PICTURE))


def report_broken(dataset):     # a line for each kind of trouble
    lines = []
    for kind in sorted({what for what, _ in dataset.broken}):
        names = sorted((name for what, name in dataset.broken if what == kind), key=natural)
        lines.append(f'{len(names):,} {kind}: {printable(first_three(names))}')
    return '\n'.join(lines)


def nothing_left(dataset, message):
    """What refuses a data set of which nothing is left, with the reasons why."""
    return Refused('; '.join([message, *report_broken(dataset).splitlines()]))


# ---- masks --------------------------------------------------------------------------------------
# A mask is kept as COCO does: the lengths of its runs down the columns, starting with one, perhaps empty,
# of zeros. Boxes are [x1, y1, x2, y2] in pixels, a json's [x, y, width, height]; pixel i covers i to i + 1,
# so a width is x2 - x1. All equals what COCO's own tools give.

def encode_mask(mask):          # bool [H, W] -> run lengths
    flat = np.asarray(mask, dtype=bool).T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return np.diff(edges, prepend=0, append=flat.size)


def decode_mask(runs, size):    # size: (height, width) -> bool [H, W]
    height, width = size
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def string_to_runs(text):
    """COCO's compressed form: numbers in groups of 5 bits, lowest first, bit 32 where more follow, plus 48
    as ASCII; from the fourth on, each is a run's difference to the one two earlier. Else a ValueError."""
    bits = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(bits < 32)                                # the last group of each number
    groups = np.diff(last, prepend=-1)                              # how many it has
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or bits[-1] > 31 or groups.max() > 7:
        raise ValueError('no compressed runs')

    # the numbers, whose highest bit is the sign
    first = last - groups + 1
    place = 5 * (np.arange(len(bits)) - first.repeat(groups))
    runs = np.add.reduceat((bits & 31) << place, first)
    runs -= (bits[last] & 16) << (place[last] + 1)

    # the sums of their differences
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def mask_area(runs):
    return int(runs[1::2].sum())


def polygon_runs(points, size):
    """Run lengths of a polygon [n, 2] (x, y), bit for bit as COCO's tools fill it: the outline is walked in
    fifths of a pixel, and the fill changes where it passes the middle of a column."""
    height, width = size
    here = (5 * np.reshape(points, (-1, 2)).astype(np.float64) + .5).astype(np.int64)       # truncates, as C
    there = np.roll(here, -1, axis=0)

    # every edge is walked from its lower end along its longer side, one place a fifth
    span = abs(there - here)                                        # [n, 2]
    is_wide = span[:, 0] >= span[:, 1]
    flip = np.where(is_wide, here[:, 0] > there[:, 0], here[:, 1] > there[:, 1])
    low = np.where(flip[:, None], there, here)
    high = np.where(flip[:, None], here, there)
    steps = span.max(1)
    slope = (high - low) / np.maximum(steps, 1)[:, None]
    edge = np.repeat(np.arange(len(here)), steps + 1)
    step = np.arange(len(edge)) - (np.cumsum(steps + 1) - steps - 1)[edge]
    step = np.where(flip[edge], steps[edge] - step, step)
    x, y = (low[edge] + slope[edge] * step[:, None] + .5).astype(np.int64).T

    # where x changes in the middle of a column
    turn = np.flatnonzero(x[1:] != x[:-1])
    x = np.minimum(x[turn], x[turn + 1])
    y = np.minimum(y[turn], y[turn + 1])
    middle = (x % 5 == 2) & (x >= 0) & (x < 5 * width)
    row = np.clip(-((2 - y[middle]) // 5), 0, height)               # the first pixel whose middle is below
    place, times = np.unique(x[middle] // 5 * height + row, return_counts=True)
    place = place[(times % 2 == 1) & (place < height * width)]      # twice is not at all
    return np.diff(place, prepend=0, append=height * width)


def fill_polygon(points, size):     # bool [H, W]
    return decode_mask(polygon_runs(points, size), size)


def paint_polygons(polygons, size):
    """The union of an object's parts, each [x, y, x, y, ...]: bool [H, W]."""
    mask = np.zeros(size, dtype=bool)
    for part in polygons:
        mask |= fill_polygon(part, size)
    return mask


def fill_polygons(polygons, size):  # its run lengths
    if len(polygons) == 1:          # most have one part
        return polygon_runs(polygons[0], size)
    return encode_mask(paint_polygons(polygons, size))


def read_segmentation(segmentation, size):
    """Run lengths of what a COCO json holds: polygons, or RLE with its counts as a list or as a string."""
    if isinstance(segmentation, list):
        return fill_polygons(segmentation, size)
    counts = segmentation['counts']
    return string_to_runs(counts) if isinstance(counts, str) else np.array(counts)


def clip_boxes(boxes, image_size):  # boxes [..., 4] cut at an image of (height, width)
    height, width = image_size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor((width, height, width, height)))


def has_area(boxes):        # [..., 4] -> [...] bool
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def pad_to(images, side):       # zeros at right and bottom: [..., side, side]
    return F.pad(images, (0, side - images.shape[-1], 0, side - images.shape[-2]))


def nearest_part(pixels, whole, corner, size):
    """The nearest pixels of a part of pixels [H, W] stretched to whole: [h, w]. All (width, height)."""
    columns, rows = [((np.arange(n) + first + .5) * num / of).astype(int).clip(max=num - 1)
                     for n, first, num, of in zip(size, corner, pixels.shape[::-1], whole)]
    return pixels[rows][:, columns]


def bilinear_part(image, whole, corner, size):
    """The part of a PIL image stretched to whole, bilinear: PIL of size, from corner on."""
    fraction = np.array(image.size) / whole
    box = [*(corner * fraction), *((corner + size) * fraction)]
    return image.resize(size.astype(int).tolist(), Image.Resampling.BILINEAR, box=box)


# ---- images with objects ------------------------------------------------------------------------

REPEAT = .001           # LVIS: images of classes in fewer of them than this share are shown more often
SMALLEST = 8            # visible pixels of an object of the world that counts
PLACES = ('{}', '../{}2017', '../images/{}', 'images/{}', '..', '.')        # of images, beside the json
LISTED_AGAIN = 'images are listed twice', 'annotations have the id of another'
LONGEST_OUTLINE = 200   # times its image's longer side: more is no object's, and takes gigabytes


def is_lvis(truth):         # a json's categories have LVIS's frequencies
    return any('frequency' in category for category in truth['categories'])


def whole(value):
    """The whole number that a json holds, also as '64' or 64.0; None: it holds none."""
    if type(value) is int:                                  # True is none
        return value
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def read_id(value):
    """A whole number or a text; None: neither."""
    if type(value) is int:
        return value
    number = whole(value)
    return value if number is None and isinstance(value, str) else number


def id_order(name):         # the key that sorts ids: numbers before texts
    return isinstance(name, str), name


REAL = frozenset((int, float))


def are_numbers(values, low=-2 ** 31, high=2 ** 31):
    """Whether all are finite numbers from low to high; True is none."""
    if not REAL.issuperset(map(type, values)):
        return False
    return low <= min(values) and max(values) <= high and math.isfinite(sum(values))    # min passes over NaN


def read_coco(spec, split):
    """--data -> (path of the COCO or LVIS json of a split, the lists that it holds)."""
    names = ('{}.json', 'annotations/{}.json', 'annotations/instances_{}*.json', 'annotations/lvis*_{}.json')
    names = [name.format(split) for name in names]
    paths = [path for name in names for path in sorted(glob.glob(os.path.join(glob.escape(spec), name)))]
    if not paths:
        raise Refused(f"--data {spec}: no boxes; looked for {', '.join(names)} in it. Or use 'shapes', the built-in world")
    path = paths[0]
    held = read_json(path)
    for name in ('images', 'annotations', 'categories'):
        if not isinstance(held, dict) or not isinstance(held.get(name), list):
            raise Refused(f'{path} is not a COCO json: it has no list of {name}')
    return path, held


def read_categories(path, rows):
    """A json's categories in the order of their ids, each with id, name and, of LVIS's, frequency."""
    if not rows:
        raise Refused(f'{path} has no categories')
    categories = []
    for row in rows:
        held = row if isinstance(row, dict) else {}
        category = dict(id=read_id(held.get('id')), name=held.get('name'))
        if category['id'] is None or not isinstance(category['name'], str):
            raise Refused(f'{path}: a category is {row!r:.60}; expected an id and a name')
        if held.get('frequency') is not None:
            category['frequency'] = held['frequency']
        categories.append(category)

    # each once
    for key in ('id', 'name'):
        value, num = Counter(row[key] for row in categories).most_common(1)[0]
        if num > 1:
            raise Refused(f'{path}: {num} categories have the {key} {value!r:.40}')

    # frequencies of all or of none
    if any('frequency' in row for row in categories):
        for row in categories:
            if row.get('frequency') not in ('r', 'c', 'f'):
                expected = "r, c or f, as LVIS's all have and COCO's none"
                raise Refused(f"{path}: {row['name']!r:.40} has no frequency {expected}")

    return sorted(categories, key=lambda row: id_order(row['id']))      # ids may have gaps


def image_trouble(row):
    """Settles an image of a json: id, width, height, file_name. -> what is wrong with it, or ''."""
    if not isinstance(row, dict):
        return 'images are no objects of the json'
    row['id'] = read_id(row.get('id'))
    row['width'] = whole(row.get('width')) or 0
    row['height'] = whole(row.get('height')) or 0
    if row['id'] is None:
        return 'images have no id'
    if not 1 <= min(row['width'], row['height']) <= max(row['width'], row['height']) < 2 ** 31:
        return 'images have no width or height'

    # LVIS gives addresses, whose last two parts are COCO's path
    address = str(row.get('coco_url', ''))
    name = row.get('file_name') or '/'.join(address.split('/')[-2:])
    row['file_name'] = name
    if not isinstance(name, str) or not name:
        return 'images have no file_name'
    if os.path.isabs(name) or '..' in re.split(r'[/\\]', name):
        return 'images lie outside of their folder'
    return ''


def object_trouble(row, size, label_of):
    """Settles an annotation of a json: category_id, now a label; box [x1, y1, x2, y2] within its image of (height,
    width); area, iscrowd, segmentation. -> what is wrong with it, or ''. label_of: {category id: label}."""
    if not isinstance(row, dict):
        return 'annotations are no objects of the json'
    row['category_id'] = label_of.get(read_id(row.get('category_id')))
    if size is None or row['category_id'] is None:
        return 'annotations name an unknown image or category'

    # its box
    box = row.get('bbox')
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
        return 'annotations have no box of four numbers'
    height, width = size
    x, y, w, h = box
    left = x if x > 0 else 0
    top = y if y > 0 else 0
    right = x + w if x + w < width else width
    bottom = y + h if y + h < height else height
    if left >= right or top >= bottom:
        return 'boxes have no area within their image'
    row['box'] = [left, top, right, bottom]

    # what is judged
    area = row.get('area')
    if type(area) not in REAL or not 0 <= area <= 1e10:
        row['area'] = w * h
    is_crowd = row.get('iscrowd') or 0
    row['iscrowd'] = 1 if is_crowd is True else whole(is_crowd)
    if row['iscrowd'] not in (0, 1):
        return 'annotations have an iscrowd that is neither 0 nor 1'

    # its mask: if there is none, the box
    mask = row.get('segmentation') or [[left, top, right, top, right, bottom, left, bottom]]
    if isinstance(mask, list) and not isinstance(mask[0], list):
        mask = [mask]                       # a single polygon's numbers
    row['segmentation'] = mask
    if isinstance(mask, list):
        return polygon_trouble(mask, max(height, width))
    return run_trouble(mask, size)


def polygon_trouble(parts, side):
    """What is wrong with the polygons of an object in an image with this longer side, or ''."""
    num = 0
    for part in parts:
        if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
            return 'polygons have no three points'
        if not are_numbers(part, -side, 2 * side):
            return 'polygons are no numbers or lie far outside of their image'
        num += len(part) / 2
    if num * 3 > LONGEST_OUTLINE and sum(map(outline, parts)) > LONGEST_OUTLINE * side:
        return 'polygons have endless outlines'
    return ''


def outline(part):          # how long it is, along the longer axis of each edge
    points = np.reshape(part, (-1, 2))
    return abs(points - np.roll(points, -1, axis=0)).max(1).sum()


def run_trouble(mask, size):
    """What is wrong with the run lengths of an object in an image of (height, width), or ''."""
    if not isinstance(mask, dict):
        return 'masks are neither polygons nor run lengths'
    held = mask.get('size')
    if not isinstance(held, list) or [whole(side) for side in held] != [*size]:
        return 'masks are of another size than their image'
    runs = mask.get('counts')
    if isinstance(runs, str):
        try:
            runs = string_to_runs(runs).tolist()
        except ValueError:
            runs = None
    if not isinstance(runs, list) or set(map(type, runs)) != {int} or min(runs) < 0:
        return 'run lengths are no whole numbers'
    if sum(runs) != size[0] * size[1]:
        return 'run lengths do not add up to their image'
    return '' if any(runs[1::2]) else 'masks are empty'


class Instances(Files):
    """Images with boxes and masks from a COCO or LVIS json. What cannot be used is left out and counted in
    broken. Crowds are not learnt from, and judged as COCO does."""
    coarse = None

    def __init__(self, spec, split='train', images='', scale_jitter=(1., 1.), classes=None):
        path, held = read_coco(spec, split)
        self.path = path
        self.scale_jitter = scale_jitter
        self.broken = set()

        # categories that the json lacks have no objects
        categories = read_categories(path, held['categories'])
        names = [row['name'] for row in categories]
        self.classes = names if classes is None else list(classes)
        labels = find_classes(names, self.classes, path)
        label_of = {row['id']: k for row, k in zip(categories, labels)}
        self.categories = [dict(id=k, name=name) for k, name in enumerate(self.classes)]
        for row, k in zip(categories, labels):
            self.categories[k] = dict(row, id=k)
        self.lvis = is_lvis(dict(categories=self.categories))

        # the split's images that are there
        rows = self.usable_images(path, held['images'])
        names = sorted(row['file_name'] for row in rows)
        folders = [images] if images else [os.path.join(os.path.dirname(path), place.format(split)) for place in PLACES]
        there = [folder for folder in folders for name in names[:20] if os.path.isfile(os.path.join(folder, name))]
        self.root = (there or folders)[0]
        absent = {name for name in names if not os.path.isfile(os.path.join(self.root, name))}
        self.broken |= {('images of the json are not there', name) for name in absent}
        self.images = [row for row in rows if row['file_name'] not in absent]
        self.paths = [row['file_name'] for row in self.images]
        if not self.images:
            num = len(held['images'])
            message = f'{path}: none of its {num:,} images is in {self.root}; use --images DIR'
            raise nothing_left(self, message)
        if self.lvis:
            self.settle_absences(path, split, label_of)

        # their objects
        self.rows = self.usable_rows(held, label_of)
        ends = [max(row['box'][2:]) for rows in self.rows.values() for row in rows]
        if ends and max(ends) <= 1:
            raise Refused(f'{path}: no box reaches beyond the first pixel; boxes are in pixels, not in shares of the image')
        crowds = [row['iscrowd'] for rows in self.rows.values() for row in rows]
        if all(crowds):
            message = f'{path}: no object is left to learn from'
            if crowds:
                message += f'; {len(crowds):,} are crowds (iscrowd 1), which are not learnt'
            raise nothing_left(self, message)

        # an epoch shows each image once, LVIS's sqrt(REPEAT / share) times for its rarest class (arXiv:1908.03195)
        repeats = np.ones(len(self.images))
        if self.lvis and split == 'train':
            share = self.frequencies().numpy() / len(self.images)
            factor = np.sqrt(REPEAT / share.clip(1e-9))
            for i, image in enumerate(self.images):
                labels = [row['category_id'] for row in self.rows[image['id']]]
                repeats[i] = factor[labels].max(initial=1.)
        self.shares = np.cumsum(repeats)
        self.first_readable(0, 8, None, [])                 # refused unless some image can be used

    def leave_out(self, what, n, row, trouble):
        """Counts a json's row, named by its id or, without one, by its place."""
        number = read_id(row.get('id')) if isinstance(row, dict) else None
        is_one = number is not None and trouble not in LISTED_AGAIN
        name = f'{what} {number!s:.40}' if is_one else f'{what}s[{n}]'
        self.broken.add((trouble + ' and were left out', name))

    def usable_images(self, path, rows):
        """A json's images that can be used. Refused if two files have one id."""
        images = {}
        for n, row in enumerate(rows):
            trouble = image_trouble(row)
            if not trouble and row['id'] in images:
                trouble = 'images are listed twice'
                if row['file_name'] != images[row['id']]['file_name']:
                    raise Refused(f"{path}: two images have the id {row['id']!r:.40}")
            if trouble:
                self.leave_out('image', n, row, trouble)
            else:
                images[row['id']] = row
        return list(images.values())

    def settle_absences(self, path, split, label_of):
        """LVIS: which classes an image is known not to show, and of which it does not mark all objects,
        as labels. One that does not say knows of none; not all of those that are judged may."""
        silent = set()
        for image in self.images:
            for key in ('neg_category_ids', 'not_exhaustive_category_ids'):
                if not isinstance(image.get(key), list):
                    silent.add(image['file_name'])
                    image[key] = []
                image[key] = [label_of[k] for k in map(read_id, image[key]) if k in label_of]

        # of training images nobody asks
        if split == 'train':
            return
        if len(silent) == len(self.images):
            raise Refused(f'{path} has frequencies, as LVIS, but no image has neg_category_ids and '
                          "not_exhaustive_category_ids; without 'frequency' it is judged as COCO")
        reason = 'images do not say what they lack: other classes are not judged'
        self.broken |= {(reason, name) for name in silent}

    def usable_rows(self, held, label_of):
        """{image id: its annotations that can be used}, as object_trouble settles them."""
        sizes = {row['id']: (row['height'], row['width']) for row in self.images}
        listed = {row['id'] for row in held['images'] if isinstance(row, dict)}
        gone = listed - sizes.keys() - {None}
        rows = {name: [] for name in sizes}
        ids = set()
        for n, row in enumerate(held['annotations']):
            number = image = None
            if isinstance(row, dict):
                number = read_id(row.get('id'))
                image = read_id(row.get('image_id'))
            if image in gone:               # with its objects
                continue

            trouble = object_trouble(row, sizes.get(image), label_of)
            if not trouble and number is not None and number in ids:
                trouble = 'annotations have the id of another'
            if trouble:
                self.leave_out('annotation', n, row, trouble)
                continue
            ids.add(number)
            row['image_id'] = image
            rows[image].append(row)
        return rows

    def contents(self):
        digest = hashlib.blake2b()
        with open(self.path, 'rb') as file:
            for part in iter(functools.partial(file.read, 2 ** 20), b''):
                digest.update(part)
        return super().contents() + digest.digest()

    def frequencies(self):      # in how many images each class is [K]
        counts = torch.zeros(len(self.classes))
        for rows in self.rows.values():
            labels = {row['category_id'] for row in rows}
            counts[list(labels)] += 1
        return counts

    def __len__(self):
        return round(self.shares[-1])

    def index(self, position, seed):
        """Which images stand at these positions [B]: each epoch shows each as often as it should."""
        u = uniform(seed, 'repeat', position // len(self), 1)[:, 0]
        place = (sample_index(position, len(self), seed) + u.double()).numpy() * self.shares[-1] / len(self)
        return self.shares.searchsorted(place, 'right').clip(max=len(self.images) - 1).tolist()

    def sample(self, i, image_size, u):
        """dict of images uint8 [3, S, S] (padded with zeros), sizes (height, width without), targets (boxes, labels,
        masks), index: in training with large-scale jitter (arXiv:2012.07177), else as large as fits."""
        original = np.array([self.images[i]['width'], self.images[i]['height']])
        image = self.picture(i, tuple(original))
        low, high = self.scale_jitter
        scale = 1. if u is None else low + (high - low) * u[0]
        whole = (original * scale * image_size / original.max()).round().clip(1)        # (width, height)
        size = np.minimum(whole, image_size)
        corner = np.zeros(2) if u is None else np.floor((whole - size) * u[1:3])
        pixels = to_tensor(bilinear_part(image, whole, corner, size))
        height, width = pixels.shape[1:]

        # boxes move with it, and objects of which nothing is left go
        rows = [row for row in self.rows[self.images[i]['id']] if not row['iscrowd']]
        boxes = torch.tensor([row['box'] for row in rows], dtype=torch.float32).view(-1, 4)
        boxes = boxes * boxes.new_tensor(whole / original).repeat(2) - boxes.new_tensor(corner).repeat(2)
        inside = clip_boxes(boxes, (height, width))
        is_cut = (boxes - inside).abs().amax(1) > .01           # pixels: more than rounding
        kept = has_area(inside)
        boxes = inside[kept]
        is_cut = is_cut[kept].tolist()
        rows = [row for row, keep in zip(rows, kept.tolist()) if keep]

        # so do masks; then the mirror image
        mirror = u is not None and u[3] < .5
        masks = [move_mask(row['segmentation'], original, whole, corner, size, mirror) for row in rows]
        if mirror:
            pixels = pixels.flip(-1)
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack((width - x2, y1, width - x1, y2), 1)

        # an object that the crop cut has a box around what is left of it
        for n, mask in enumerate(masks):
            if is_cut[n]:
                boxes[n] = bounds(mask, (height, width))
        kept = has_area(boxes)
        masks = [mask for mask, keep in zip(masks, kept.tolist()) if keep]
        labels = torch.tensor([row['category_id'] for row in rows], dtype=torch.long)
        target = dict(boxes=boxes[kept], labels=labels[kept], masks=masks)
        return dict(images=pad_to(pixels, image_size), sizes=(height, width), targets=target, index=i)

    def picture(self, i, size):
        """Image i, PIL, of (width, height), as its json describes it."""
        path = self.image(i)
        image = read_sized(path, size)
        if image.size != size:
            message = f'{path} has {image.width} x {image.height} pixels, not the {size[0]} x {size[1]} of its json'
            raise Unreadable(message, 'are of another size than their json says')
        return image

    def truth(self, batch):
        """A COCO json's images of a batch, each with the list of its annotations, crowds too."""
        images = [self.images[i] for i in batch['index']]
        return [(image, self.rows[image['id']]) for image in images]


def bounds(mask, size):
    """The box [4] around an object, polygons or bool [h, w], in an image of (height, width); else zeros."""
    corner = np.zeros(2)
    if isinstance(mask, list):              # only as much is filled as they may cover
        parts = [np.reshape(part, (-1, 2)) for part in mask]
        points = np.concatenate(parts)
        corner = np.floor(points.min(0)).clip(0)
        width, height = (np.ceil(points.max(0)).clip(max=size[::-1]) - corner).clip(0).astype(int)
        mask = paint_polygons([part - corner for part in parts], (height, width))
    mask = np.asarray(mask)
    x = np.flatnonzero(mask.any(0))
    y = np.flatnonzero(mask.any(1))
    if len(x) == 0:
        return torch.zeros(4)
    low = corner + (x[0], y[0])
    high = corner + (x[-1] + 1, y[-1] + 1)
    return torch.from_numpy(np.concatenate((low, high)))


def move_mask(mask, original, whole, corner, size, mirror):
    """An object's polygons, or its RLE as bool [h, w], in a part of an image that was stretched from original to
    whole: from corner on, of size, maybe mirrored. All (width, height)."""
    if isinstance(mask, list):
        parts = [np.reshape(part, (-1, 2)) * (whole / original) - corner for part in mask]
        if mirror:
            parts = [part * (-1, 1) + (size[0], 0) for part in parts]
        return [part.ravel().tolist() for part in parts]
    shape = original[::-1].tolist()
    part = nearest_part(decode_mask(read_segmentation(mask, shape), shape), whole, corner, size)
    return torch.from_numpy(part[:, ::-1].copy() if mirror else part)


@dataclass(eq=False)
class WorldInstances(World):
    """The built-in world as images with objects: coarse classes are its kinds, textured ones pairs of kind and
    texture, which captions name, fine ones of kind, texture and part, which they do not. The last two stand by
    falling frequency; a third each are called frequent, common and rare."""
    vocabulary: str = 'coarse'

    def __post_init__(self):
        super().__post_init__()
        fine = grammar('cpu')['fine']                                   # [240, 3] by falling frequency
        share = 1000 / (torch.arange(NUM_FINE) + 5)                     # up to a factor
        self.lvis = self.vocabulary != 'coarse'
        told_by = dict(coarse=1, textured=2, fine=3)[self.vocabulary]   # how many of kind, texture, part
        classes, self.class_of = fine[:, :told_by].unique(dim=0, return_inverse=True)
        self.share = torch.zeros(len(classes)).index_add_(0, self.class_of, share)
        self.coarse = None                                              # of other classes: their kind
        if self.lvis:
            order = self.share.argsort(descending=True, stable=True)
            classes, self.share = classes[order], self.share[order]
            self.class_of = order.argsort()[self.class_of]              # [240]
            self.coarse = classes[:, 0].tolist()
            words = list(TEXTURES), PARTS
            self.classes = []
            for kind, *others in classes.tolist():
                texture, *part = [words[i][k] for i, k in enumerate(others)]
                self.classes.append(' '.join([texture, list(KINDS)[kind], *part]))
        self.categories = [dict(id=k, name=name) for k, name in enumerate(self.classes)]
        if self.lvis:
            for k, row in enumerate(self.categories):
                row['frequency'] = 'fcr'[3 * k // len(self.classes)]

    def frequencies(self):      # of each class, up to a factor [K]
        return self.share if self.lvis else torch.ones(NUM_KINDS)

    def batch(self, position, image_size, seed=0, device='cpu', train=True):  # as Instances.batch
        drawn = super().batch(position, image_size, seed, device, want=('images', 'boxes', 'masks'))
        labels = self.class_of.to(device)[drawn['fine']]                # [B, 6]
        targets = []
        for n, seen in enumerate(drawn['num_visible'] >= SMALLEST):
            boxes = drawn['boxes'][n, seen].float()
            targets.append(dict(boxes=boxes, labels=labels[n, seen], masks=list(drawn['masks'][n, seen])))
        return dict(images=drawn['images'], sizes=[(image_size, image_size)] * len(targets), targets=targets,
                    index=drawn['index'].tolist(), position=position)

    def truth(self, batch):     # as Instances.truth
        found = []
        names = list(range(len(self.classes)))
        for name, (height, width), target in zip(batch['index'], batch['sizes'], batch['targets']):
            image = dict(id=name, height=height, width=width,
                         neg_category_ids=names, not_exhaustive_category_ids=[])        # LVIS's
            rows = []
            objects = zip(target['boxes'].tolist(), target['labels'].tolist(), target['masks'])
            for (x1, y1, x2, y2), label, mask in objects:
                runs = encode_mask(mask.cpu())
                rows.append(dict(image_id=name, category_id=label, area=mask_area(runs),
                                 bbox=[x1, y1, x2 - x1, y2 - y1], segmentation=dict(counts=runs)))
            found.append((image, rows))
        return found


# ---- images with a class for every pixel --------------------------------------------------------

MOST_VALUES = 2 ** 15   # of label maps that have names
IGNORED = -1            # a pixel's class where there is none to learn
UNKNOWN = -2            # what a value means that label maps must not hold
LARGEST_SHARE = .75     # of a crop that one class may have, if ten tries find another
MAP_PLACES = (('images/{}', 'annotations/{}'), ('{}', '{}annot'), ('images/{}', 'labels/{}'))   # {}: the split
SPLITS = {  # its names, also ADE20K's and COCO-Stuff's
    'train': ('train', 'training', 'train2017'), 'val': ('val', 'validation', 'val2017')}
STUFF_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)       # COCO-Stuff's values that are no class


def name_values(root, classes, folder, label):
    """Names of the values 0, 1, ... of label maps, '-' where one is none: the lines of the file `classes`, or of
    the data's classes.txt, or known from the folder's name, of COCO-Stuff also from a label map's."""
    split = os.path.basename(folder)
    is_ade = split in ('training', 'validation')
    path = classes or os.path.join(root, 'classes.txt')
    if classes and not os.path.exists(classes):
        raise Refused(f'--classes {classes} does not exist; expected a file of names, a line for '
                      "each value of the label maps, '-' where one is none")
    if os.path.exists(path):
        names = read_names(path)
    elif is_ade:
        names = [str(k) for k in range(150)]
    elif '_labelTrainIds' in label:
        names = [str(k) for k in range(182 - len(STUFF_GAPS))]
    elif split in ('train2017', 'val2017'):
        names = ['-' if k in STUFF_GAPS else str(k) for k in range(182)]
    else:
        raise Refused(f'--data {root}: which classes are there? Give --classes FILE, a line for each name')
    if is_ade and len(names) == 150:                # its lists of names leave out the value 0, which is none
        names = ['-'] + names
    return names


def read_names(path):
    """The lines of a file that names values. Refused where they cannot."""
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not any(name != '-' for name in names):
        raise Refused(f'{path} names no class; expected a line for each value of the label maps')
    if len(names) > MOST_VALUES:
        raise Refused(f'{path} has {len(names):,} lines; at most {MOST_VALUES:,} values have names')
    lines = {}
    for n, name in enumerate(names, 1):
        if not name:
            raise Refused(f"{path}: line {n} is empty; '-' stands for a value that is no class")
        if name != '-' and name in lines:
            raise Refused(f'{path}: lines {lines[name]} and {n} are both {name!r:.40}')
        lines[name] = n
    return names


def label_table(names):
    """What each value means, int16 [65536]: a class, from 0 on, IGNORED ('-' and 255), or UNKNOWN."""
    there = np.array([name != '-' for name in names])
    table = np.full(65536, UNKNOWN, dtype=np.int16)
    table[:len(names)] = np.where(there, there.cumsum() - 1, IGNORED)
    if len(names) <= 255:
        table[255] = IGNORED
    return table


class LabelMaps(Files):
    """Images with label maps: PNGs of the same name with 8 or 16 bits a pixel, grey or with a palette. What
    cannot be used is left out and counted in broken."""

    def __init__(self, spec, split='train', classes='', scale_jitter=(.5, 2.), names=None):
        looked = [(os.path.join(spec, images.format(name)), os.path.join(spec, labels.format(name)))
                  for images, labels in MAP_PLACES for name in SPLITS[split]]
        places = [place for place in looked if all(map(os.path.isdir, place))]
        if not places:
            expected = "looked for images/train + annotations/train, and in other data sets' places"
            raise Refused(f"--data {spec}: no label maps for {split}; {expected}. Or use 'shapes', the built-in world")
        self.root, folder = places[0]
        self.scale_jitter = scale_jitter
        label_of = {os.path.splitext(name)[0]: os.path.join(folder, name) for name in list_files(folder)[0]}
        images = list_files(self.root)[0]
        self.paths = []
        self.labels = []        # of each image, the path of its label map
        self.broken = set()
        for name in images:
            stem = os.path.splitext(name)[0]
            label = label_of.get(stem) or label_of.get(stem + '_labelTrainIds')         # COCO-Stuff's
            if label:
                self.paths.append(name)
                self.labels.append(label)
            else:
                self.broken.add(('images have no label map and were left out', name))
        if not self.paths:
            raise Refused(f'{folder}: none of the {len(images):,} images in {self.root} has a PNG of its name here')
        values = name_values(spec, classes, self.root, self.labels[0])
        own = [name for name in values if name != '-']
        self.classes = own if names is None else list(names)
        numbers = find_classes(own, self.classes, f'--data {spec}')
        self.table = label_table(values)
        known = self.table >= 0
        self.table[known] = np.array(numbers)[self.table[known]]
        self.check_labelled()

    def check_labelled(self):
        """Refuses a set in which nothing that can be used has a class. Reads until something has."""
        unused = set()
        last = 'no value but 255 and those without a name'
        for i in range(len(self.paths)):
            try:
                if (self.read(i)[1] != IGNORED).any():
                    return
            except OSError as error:
                unused.add(self.trouble(i, error))
                last = error
        self.broken |= unused
        raise nothing_left(self, f'{self.root}: not one pixel has a class; {last}')

    def read(self, i):
        """Image i, PIL, and its classes, int16 [H, W]. Unreadable if they cannot be used."""
        values = self.read_values(self.labels[i])
        height, width = values.shape
        image = read_sized(self.image(i), (width, height))
        if image.size != (width, height):
            sizes = f'{width} x {height} pixels, its image {image.width} x {image.height}'
            message = f'{self.labels[i]} has {sizes}'
            raise Unreadable(message, 'are of another size than their label map')

        # whole numbers that have a name, or 255
        numbers = values
        if values.dtype not in (np.uint8, np.uint16):
            numbers = np.nan_to_num(values.astype(np.float64), nan=-1).clip(-1, 65536).astype(np.int64)
        classes = np.append(self.table, (UNKNOWN, UNKNOWN))[numbers]        # of 65536 and of -1
        unknown = values[(classes == UNKNOWN) | (numbers != values)]
        if unknown.size:
            value = unknown[0]
            expected = f'none of the {len(self.classes)} classes; see --classes'
            message = f'{self.labels[i]} holds the value {value}, {expected}'
            raise Unreadable(message, 'have a label map with a value that is no class', f' ({value})')
        return image, classes

    def read_values(self, path):
        """The numbers [H, W] in a label map."""
        try:
            with open_picture(path) as picture:
                values = np.array(picture)
                is_jpeg = picture.format == 'JPEG'
        except Unreadable as error:
            raise Unreadable(str(error), 'have a label map that cannot be read') from None
        if is_jpeg:
            message = f'{path} is a JPEG, which blurs classes'
            raise Unreadable(message, 'have a label map that is a JPEG')
        if values.ndim != 2:
            message = f'{path} has {values.shape[2]} numbers a pixel; expected one, its class'
            raise Unreadable(message, 'have a label map in colours')
        return values

    def sample(self, i, image_size, u):
        """dict of images uint8 [3, S, S] and labels int64 [S, S], to learn from; truth is for judging."""
        image, labels = crop_maps(*self.read(i), image_size, self.scale_jitter, u)
        return dict(images=image, labels=labels)

    def contents(self):
        return super().contents() + repr([os.path.getsize(path) for path in self.labels]).encode()

    def truth(self, positions, device):
        """Yields each image that can be used, uint8 [1, 3, H, W], with its classes [1, H, W]."""
        for i in positions:
            try:
                image, classes = self.read(i)
            except OSError as error:
                self.broken.add(self.trouble(i, error))
                continue
            yield to_tensor(image)[None].to(device), torch.from_numpy(classes).long()[None].to(device)


def crop_maps(image, labels, S, scale_jitter, u):
    """A PIL image at a random scale (1: its shorter side is S), a random square of it, with other colours, maybe
    mirrored; labels [H, W]. -> uint8 [3, S, S] filled up with the mean, int64 [S, S] with IGNORED."""
    low, high = scale_jitter
    scale = (low + (high - low) * u[0]) * S / min(image.size)
    whole = np.array([max(1, round(side * scale)) for side in image.size])          # (width, height)
    size = np.minimum(whole, S)

    # a square that is not mostly of one class, if ten tries find one
    for top, left in zip(u[1:21:2], u[2:22:2]):
        corner = ((whole - size + 1) * (left, top)).astype(int)
        part = nearest_part(labels, whole, corner, size)
        counts = np.bincount(part[part != IGNORED])
        if (counts > 0).sum() > 1 and counts.max() < LARGEST_SHARE * counts.sum():
            break

    part = torch.from_numpy(part.astype(np.int64))
    pixels = distort(bilinear_part(image, whole, corner, size), u[21:29])
    if u[29] < .5:
        pixels = pixels.flip(-1)
        part = part.flip(-1)
    w, h = size.tolist()
    canvas = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, S, S)
    canvas[:, :h, :w] = pixels
    return canvas, F.pad(part, (0, S - w, 0, S - h), value=IGNORED)


def distort(image, u):
    """Photometric distortion (arXiv:1512.02325), each with a chance of a half: brightness by up to 32, contrast and
    saturation by .5 to 1.5, hue by up to 36 degrees. u: 8 uniform numbers. -> uint8 [3, H, W]."""
    pixels = np.asarray(image).astype(np.float32)
    contrast = .5 + u[3] if u[2] < .5 else 1.
    if u[0] < .5:
        pixels = pixels + (64 * u[1] - 32)
    pixels = pixels.clip(0, 255)
    if u[4] < .5:               # before hue and saturation, or after
        pixels = (pixels * contrast).clip(0, 255)
    if u[5] < .75:              # 1 - 1/2 * 1/2: one of the two or both
        hsv = np.array(Image.fromarray(pixels.astype(np.uint8)).convert('HSV')).astype(np.float32)
        if u[5] < .5:
            hsv[..., 1] = (hsv[..., 1] * (.5 + u[6])).clip(0, 255)
        if u[5] >= .25:
            hsv[..., 0] = (hsv[..., 0] + (2 * u[7] - 1) * 25.6) % 256
        pixels = np.asarray(Image.fromarray(hsv.astype(np.uint8), 'HSV').convert('RGB')).astype(np.float32)
    if u[4] >= .5:
        pixels = (pixels * contrast).clip(0, 255)
    return torch.from_numpy(pixels.round().astype(np.uint8)).permute(2, 0, 1)


@dataclass(eq=False)
class WorldMaps(World):
    """The built-in world's semantic maps: 10 grounds and 16 kinds of objects."""
    image_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.classes = [*STUFF, *KINDS]

    def batch(self, position, image_size, seed=0, device='cpu', train=True):  # as LabelMaps.batch
        drawn = super().batch(position, image_size, seed, device, want=('images', 'semantic'))
        return dict(images=drawn['images'], labels=drawn['semantic'])

    def truth(self, positions, device):     # as LabelMaps.truth, several at once
        for n in range(0, len(positions), 16):
            yield tuple(self.batch(torch.tensor(positions[n:n + 16]), self.image_size, 0, device).values())


# ---- loading ------------------------------------------------------------------------------------

MOST_SHARDS = 100_000

def is_world(spec):     # --data shapes, shapes:knob=N
    return spec.partition(':')[0] == 'shapes'


def open_world(kind, spec, split, names=None, **options):
    """'shapes' or 'shapes:unique=2000,objects=1' -> a World of this kind; None if spec is something else.
    names: those that its classes must have, in their order."""
    name, _, knobs = spec.partition(':')
    if name != 'shapes':
        return None
    for knob in filter(None, knobs.split(',')):
        key, _, value = knob.partition('=')
        if key not in World.BOUNDS or not value.isdecimal():
            raise Refused(f"--data {spec}: no knob '{knob}'; expected shapes:unique=N,fine=N,objects=N")
        options[key] = int(value)
    world = kind('val' if split == 'test' else split, **options)
    if names is None:
        return world

    numbers = find_classes(world.classes, names, f'--data {spec}')
    if numbers != list(range(len(names))):
        raise Refused(f'--data {spec} has {len(world.classes)} classes, expected {len(names)} in another order')
    return world


@without_gc()
def open_data(spec, split='train', frames=0, views=Views(), captions=False, labels=False):
    """--data -> World, Shards or Folder; with frames, clips. split: train, val or test. With captions,
    or labels, samples without one are left out, and a set without any is refused."""
    world = open_world(World, spec, split, frames=frames)
    if world:
        return world
    shards = expand(spec)
    if os.path.isdir(spec):
        shards = sorted(glob.glob(os.path.join(glob.escape(spec), '*.tar')))
        splits = ', '.join(find_splits(spec)[1].values())
        if shards and splits:
            raise Refused(f'--data {spec} has {shards[0]} beside {splits}; give one of them, or move it away')
    for path in shards:
        if not os.path.exists(path):
            raise Refused(f"--data {spec}: {path} does not exist; expected a folder of images, a folder of .tar "
                          "shards or a range of them like {00000..00099}.tar, or 'shapes', the built-in world")
    if frames:
        return Clips(spec, split, views, frames, captions, labels)
    if shards:
        return Shards(shards, split, views, captions, labels)
    return Folder(spec, split, views, 0, captions, labels)


def expand(spec):               # 'x/{00..11}.tar' -> the twelve paths
    found = re.search(r'\{([0-9]{1,9})\.\.([0-9]{1,9})\}', spec)
    if not found:
        return [spec]
    first, last = found.groups()
    num = int(last) + 1 - int(first)
    if not 0 < num <= MOST_SHARDS:
        raise Refused(f'--data {spec} is a range of {num:,} shards; expected 1 to {MOST_SHARDS:,}')
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [spec[:found.start()] + number + spec[found.end():] for number in numbers]


@without_gc()
def open_instances(spec, split, images='', scale_jitter=(1., 1.), vocabulary='coarse', classes=None):
    """--data -> WorldInstances or Instances. classes: whose numbers labels are; if None the data's own."""
    check_scale_jitter(scale_jitter)
    world = open_world(WorldInstances, spec, split, classes, vocabulary=vocabulary)
    return world or Instances(spec, split, images, scale_jitter, classes)


@without_gc()
def open_maps(spec, split, classes='', scale_jitter=(.5, 2.), image_size=0, names=None):
    """--data of label maps -> WorldMaps, of image_size, or LabelMaps. classes: a file that names the values.
    names: of the classes whose numbers labels are; if None the data's own."""
    check_scale_jitter(scale_jitter)
    world = open_world(WorldMaps, spec, split, names, image_size=image_size)
    return world or LabelMaps(spec, split, classes, scale_jitter, names)


def check_scale_jitter(scale_jitter):
    if len(scale_jitter) != 2 or not 0 < scale_jitter[0] <= scale_jitter[1]:
        raise Refused(f'--scale_jitter {scale_jitter} are not two shares of the size, the smaller first')


def read_batch(dataset, num, end, options, begin):  # num positions from begin on
    return dataset.batch(torch.arange(begin, min(begin + num, end)), **options)


def stream(dataset, begins, num, end, device, workers, **options):
    """read_batch of each of begins, on the device, read by worker processes where that helps."""
    if not dataset.reads_files:
        options['device'] = device
    read = functools.partial(read_batch, dataset, num, end, options)
    loader = map(read, begins)
    if workers and dataset.reads_files:
        loader = torch.utils.data.DataLoader(
            begins, batch_size=None, collate_fn=read, num_workers=workers, pin_memory='cuda' in str(device),
            generator=torch.Generator())                # leaves torch's global one alone
    loader = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # torch's would raise wherever the loop just is

    try:
        for batch in loader:    # one pass; the workers end with it, or when the caller drops it
            dataset.broken.update(map(tuple, batch.pop('broken', ())))
            for name, x in batch.items():
                if torch.is_tensor(x):
                    batch[name] = x.to(device, non_blocking=True)       # asynchronously from pinned memory
            yield batch
    except Refused as error:    # torch's copy of a worker's: its traceback, then the line
        line = str(error).strip().splitlines()[-1]
        raise Refused(line.partition('Refused: ')[2] or line) from None
    except (RuntimeError, ConnectionError, EOFError) as error:      # the last two: its batch went with it
        if type(error) is RuntimeError and not str(error).startswith('DataLoader worker'):
            raise
        raise Refused(f'a process that reads data died ({first_line(error)}); try fewer --workers') from None


def batches(dataset, batch_size, image_size, start, steps, seed, device, workers=0, rank=0, world=1):
    """The batches of steps start to steps - 1, a function of (seed, step): of each the part of this rank."""
    if batch_size % world:
        raise Refused(f'batch_size {batch_size} does not divide over {world} processes; use a multiple of {world}')
    num = batch_size // world
    end = steps * batch_size
    begins = range(start * batch_size + rank * num, end, batch_size)
    return stream(dataset, begins, num, end, device, workers, image_size=image_size, seed=seed, train=True)


def eval_batches(dataset, batch_size, image_size, num, device, workers=0, rank=0, world=1):
    """The first num samples, once each, in a fixed shuffled order, as judged; the last batch may be short.
    Of several processes each has a part of the same length: positions from num on only fill the last."""
    part = math.ceil(min(num, len(dataset)) / world)
    end = (rank + 1) * part
    begins = range(rank * part, end, batch_size)
    return stream(dataset, begins, batch_size, end, device, workers, image_size=image_size, train=False)
