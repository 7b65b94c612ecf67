"""
Data for every stage: a built-in world that needs no download, readers of real images, the tokenizer, and loading that
is a pure function of (seed, step, sample).

    python data.py                 # the world's checks as a table, and a contact sheet in out/world.png

The world is a function from an integer to a scene: index -> image, caption, classes, boxes, semantic map. What is
hidden in its images can be told from what is seen: rows, rings, grids and mirror pairs repeat their objects, and the
type of the scene decides which grounds, colours, classes and layouts go together. That is what makes masked
prediction worth scaling; scenes of independent objects stop rewarding a larger model at once.
"""
import functools
import glob
import gzip
import hashlib
import html
import http.client
import importlib.util
import io
import json
import math
import os
import re
import runpy
import tarfile
import urllib.request
import zlib
from collections import Counter

import ftfy
import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

# ---- randomness without state -----------------------------------------------------------------------------------

def mix(x):
    """splitmix64's finaliser on int64 tensors (torch's int64 wraps; >> is arithmetic, so sign bits are masked off)."""
    x = (x ^ ((x >> 30) & 0x3ffffffff)) * -0x40a7b892e31b1a47
    x = (x ^ ((x >> 27) & 0x1fffffffff)) * -0x6b2fb644ecceee15
    return x ^ ((x >> 31) & 0x1ffffffff)


def uniform(seed, stream, index, num):
    """num uniform numbers in [0, 1) for each entry of index (int64): [*index.shape, num] float32, multiples of 2^-24.
    A pure function of its arguments, the same on every device. stream names what is drawn: 'crop', 'mask', ..."""
    key = mix(torch.tensor((seed << 32) + zlib.crc32(stream.encode()), device=index.device))
    x = mix(mix(index + key).unsqueeze(-1) + torch.arange(1, num + 1, device=index.device) * -0x61c8864680b583eb)
    return ((x >> 40) & 0xffffff).float() * 2 ** -24


def pick(u, num):
    """An integer in [0, num) from a uniform number: exact on every device, unlike floor(u * num) in float32."""
    return ((u * 2 ** 24).long() * num) >> 24


# ---- the world: what there is -----------------------------------------------------------------------------------

WORLD_VERSION = 1       # changing what the world draws means measuring the README's numbers again
WORLD_HASH = 'ccfbdc66e0b6'      # of its first scenes; a test compares
WORLD_SEED = 7          # of the vocabulary; a run's own seed only chooses which scenes it sees
VAL_START, HELDOUT_START = 2 ** 40, 2 ** 41     # training indices stay below 2^40
SIDE = 1024             # scenes are laid out in integers, 1024ths of the image's side: exact on every device
MAX_OBJECTS = 6

KINDS = {  # coarse classes, with the words that captions use for them; the first is the name
    'disc': ('disc', 'circle'), 'square': ('square', 'box'), 'triangle': ('triangle',), 'star': ('star',),
    'cross': ('cross', 'plus'), 'ring': ('ring', 'hoop'), 'heart': ('heart',), 'moon': ('moon', 'crescent'),
    'arrow': ('arrow', 'pointer'), 'drop': ('drop', 'droplet'), 'flower': ('flower', 'blossom'),
    'gear': ('gear', 'cog'), 'diamond': ('diamond', 'rhombus'), 'leaf': ('leaf',), 'hourglass': ('hourglass',),
    'bar': ('bar', 'plank')}
TEXTURES = {'plain': ('plain', 'solid'), 'striped': ('striped', 'lined'), 'dotted': ('dotted', 'spotted'),
            'checkered': ('checkered', 'chequered'), 'ringed': ('ringed',), 'zigzag': ('zigzag', 'jagged'),
            'gridded': ('gridded', 'netted'), 'split': ('split', 'halved')}
PARTS = ('none', 'band', 'belt', 'eye')         # captions never name them: a label that only pixels can teach
COLOURS = {'red': (214, 48, 40), 'orange': (240, 140, 30), 'yellow': (240, 215, 50), 'green': (60, 165, 65),
           'cyan': (60, 200, 205), 'blue': (50, 85, 200), 'purple': (135, 60, 175), 'pink': (240, 130, 175),
           'white': (238, 238, 235), 'black': (35, 35, 40)}
STUFF = {'sand': (186, 172, 140), 'grass': (118, 146, 104), 'water': (112, 140, 164), 'brick': (168, 122, 108),
         'sky': (160, 178, 196), 'wood': (152, 124, 98), 'stone': (134, 134, 132), 'snow': (200, 204, 208),
         'tile': (164, 158, 164), 'soil': (112, 98, 86)}
# Every kind is outlined, and every texture drawn, in a colour of its own: cues that a 4-pixel patch can show. With
# silhouettes alone a small ViT knows a fifth of the kinds after 40,000 images, and no teacher is trained in minutes.
OUTLINES = ((250, 250, 250), (15, 15, 15), (255, 225, 0), (255, 115, 0), (200, 0, 0), (255, 0, 200), (255, 165, 200),
            (110, 0, 160), (0, 0, 225), (0, 160, 255), (0, 235, 235), (120, 120, 120), (0, 170, 90), (140, 225, 40),
            (120, 70, 20), (0, 80, 80))
SECOND_COLOURS = ((128, 128, 128), (255, 255, 255), (0, 0, 0), (90, 90, 90), (255, 240, 190), (40, 20, 90),
                  (110, 60, 20), (190, 190, 190))
LAYOUTS = ('single', 'free', 'row', 'ring', 'grid', 'mirror')
# What happens in clips: each of eight motions, and the same backwards in time. A frame alone cannot tell which of the
# two it is from, except in the last: there the small object follows the large one.
ACTIONS = ('move right', 'move left', 'move down', 'move up', 'turn right', 'turn left', 'grow', 'shrink', 'meet',
           'part', 'appear', 'vanish', 'circle right', 'circle left', 'lead right', 'lead left')
NUM_HIDDEN = 14         # actions that one frame does not show
NUM_KINDS, NUM_TEXTURES, NUM_PARTS, NUM_COLOURS, NUM_STUFF = 16, 8, 4, 10, 10
NUM_FINE = 240          # 15 of the 32 (texture, part) pairs of each kind, of Zipf frequency: the long-tailed vocabulary
NUM_SCENE_TYPES = 32
CELLS, RADIUS, OUTLINE = 128, 51, 8     # a shape's table: 128 x 128 cells, 51 of them an object's radius
TILE = 64                   # a ground's texture repeats every 64 cells, which are 384 of the 1024


# Whether points lie inside a shape of radius 1: x to the right, y down, r and a their polar form, angle 0 pointing up.
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
    'bar':       lambda x, y, r, a: (abs(x) < .97) & (abs(y) < .33),
}


def heart(x, y):
    """The sextic curve; here y points up."""
    return (x * x + y * y - 1) ** 3 < x * x * y ** 3


def star(r, a):
    """Inside the lines from each of five points at radius 1 to the inner corners at .42, 36 degrees further."""
    a = abs((a + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    x, y = .42 * math.sin(math.pi / 5), .42 * math.cos(math.pi / 5)
    return r * (np.cos(a) * x + np.sin(a) * (1 - y)) < x


def signed_distance(inside):
    """Exact Euclidean distance to the outline in cells, negative inside. inside: [n, n] bool array."""
    n = len(inside)
    gaps = (np.arange(n)[:, None] - np.arange(n)) ** 2          # squared distance between two rows or columns
    far = 4 * n * n

    def to(cells):      # separable: first within columns, then over columns
        columns = np.where(cells[None], gaps[:, :, None], far).min(1)                      # [n, n]
        return np.sqrt((columns[:, None, :] + gaps[None]).min(2).astype(np.float64))
    return np.where(inside, .5 - to(~inside), to(inside) - .5)


def wave(phase):
    """A sine of period 1."""
    return np.sin(2 * math.pi * phase)


def bands(phase):
    """A square wave with soft edges, 0 to 1."""
    return np.clip(.5 + 1.6 * wave(phase), 0, 1)


# How much of the second colour a surface shows, 0 to 1, at points of an object of radius 1.
SURFACES = {
    'plain':     lambda x, y: 0 * x,
    'striped':   lambda x, y: bands(1.5 * y),
    'dotted':    lambda x, y: np.clip(3.5 - 9 * np.hypot(1.6 * x % 1 - .5, 1.6 * y % 1 - .5), 0, 1),
    'checkered': lambda x, y: np.clip(.5 + 2 * wave(.85 * x + .25) * wave(.85 * y + .25), 0, 1),
    'ringed':    lambda x, y: bands(1.7 * np.hypot(x, y)),
    'zigzag':    lambda x, y: bands(1.5 * y + 1.4 * abs(1.5 * x % 1 - .5)),
    'gridded':   lambda x, y: 1. * (np.maximum(bands(1.5 * x - .1), bands(1.5 * y - .1)) > .4),
    'split':     lambda x, y: np.clip(.5 + 6 * x, 0, 1),
}
# Where a part pattern marks an object of radius 1 with a shade of its colour.
MARKS = {
    'none':      lambda x, y: x > 9,
    'band':      lambda x, y: abs(np.hypot(x, y) - .55) < .11,
    'belt':      lambda x, y: abs(y - .1) < .16,
    'eye':       lambda x, y: np.hypot(x + .35, y + .25) < .26,
}
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
    'soil':      lambda x, y, n: wave(3 * (x + y) / TILE),
}


@functools.lru_cache(maxsize=4)
def world_tables(device):
    """What rendering looks up, made once a process: shapes' signed distances [16 * CELLS^2] in cells, surfaces'
    palette codes [8 * 4 * CELLS^2] (0..15 between the colours, 16 the mark), grounds' textures [10 * TILE^2]."""
    c = (np.arange(CELLS) + .5 - CELLS / 2) / RADIUS
    x, y = np.meshgrid(c, c)
    shapes = np.stack([signed_distance(inside(x, y, np.hypot(x, y), np.arctan2(x, -y))) for inside in SHAPES.values()])
    surfaces = np.stack([np.where(mark(x, y), 16, np.round(15 * surface(x, y)))
                         for surface in SURFACES.values() for mark in MARKS.values()])
    noise = uniform(WORLD_SEED, 'noise', torch.arange(TILE * TILE), 1).view(TILE, TILE).double().numpy()
    for _ in range(6):      # smooth, wrapping around, then stretch back to 0..1
        noise = sum(np.roll(noise, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    noise = np.clip((noise - noise.mean()) / noise.std() / 4 + .5, 0, 1)
    tx, ty = np.meshgrid(np.arange(TILE), np.arange(TILE))
    grounds = np.stack([ground(tx, ty, noise) for ground in GROUNDS.values()])
    return (torch.tensor(shapes, dtype=torch.float32).flatten().to(device),
            torch.tensor(surfaces).long().flatten().to(device),
            torch.tensor(grounds, dtype=torch.float32).flatten().to(device))


# ---- the world: the grammar -------------------------------------------------------------------------------------

def choose(u, cumulative_weights):
    """Index drawn in proportion to integer weights. u [...], cumulative_weights [..., n] or [n]."""
    level = ((u * 2 ** 24).long() * cumulative_weights[..., -1]) >> 24
    return (level.unsqueeze(-1) >= cumulative_weights).sum(-1)


@functools.lru_cache(maxsize=8)
def grammar(device, classes, uniform_classes):
    """The fixed vocabulary and its statistics: which fine classes there are, how often each occurs in each type of
    scene, which colours and grounds go with it, and the 24 of 160 (kind, colour) pairs held out of training."""
    draw = lambda stream, rows, num: uniform(WORLD_SEED, stream, torch.arange(rows), num)
    pairs = draw('fine', NUM_KINDS, NUM_TEXTURES * NUM_PARTS).argsort(1)[:, :NUM_FINE // NUM_KINDS]     # [16, 15]
    order = draw('rank', 1, NUM_FINE).argsort(1)[0]         # fine class of each rank
    kind, pair = order % NUM_KINDS, pairs[order % NUM_KINDS, order // NUM_KINDS]
    fine = torch.stack([kind, pair // NUM_PARTS, pair % NUM_PARTS], 1)[:classes]        # [240, (kind, texture, part)]
    rank = torch.arange(1, len(fine) + 1)
    frequency = torch.full_like(rank, 1000) if uniform_classes else 100_000 // (rank + 4)
    boost = torch.where(draw('boost', NUM_SCENE_TYPES, len(fine)) < .15, 12, 1)         # a scene type's own classes
    if uniform_classes:
        boost.fill_(1)
    palette = torch.where(draw('palette', NUM_SCENE_TYPES, NUM_COLOURS).argsort(1) < 3, 10, 1)      # 3 colours of 10
    layouts = torch.tensor([4, 3, 4, 3, 3, 4]) * torch.where(draw('layouts', NUM_SCENE_TYPES, 6).argsort(1) < 2, 4, 1)
    grounds = draw('grounds', NUM_SCENE_TYPES, NUM_STUFF).argsort(1)[:, :3]             # three different ones
    held_out = torch.zeros(NUM_KINDS, NUM_COLOURS, dtype=torch.bool)
    for k in range(NUM_KINDS):      # one or two colours of each kind: 24 of 160 = 15% of the pairs
        held_out[k, (3 * k) % NUM_COLOURS] = True
        held_out[k, (3 * k + 4) % NUM_COLOURS] |= k % 2 == 1
    steps = torch.arange(NUM_COLOURS)
    swap = lambda wanted: torch.stack([torch.stack([(c + steps)[wanted[k, (c + steps) % NUM_COLOURS]][0] % NUM_COLOURS
                                                    for c in range(NUM_COLOURS)]) for k in range(NUM_KINDS)])
    turn = [(round(1024 * math.cos(i * math.pi / 32)), round(1024 * math.sin(i * math.pi / 32))) for i in range(64)]
    tables = dict(fine=fine, classes=(frequency * boost).cumsum(-1), palette=palette.cumsum(-1), grounds=grounds,
                  layouts=layouts.cumsum(-1), scene_types=(10_000 // (torch.arange(NUM_SCENE_TYPES) + 3)).cumsum(-1),
                  held_out=held_out, allowed=swap(~held_out), forbidden=swap(held_out), turn=torch.tensor(turn),
                  colours=torch.tensor(list(COLOURS.values())), stuff=torch.tensor(list(STUFF.values())),
                  outlines=torch.tensor(OUTLINES), second=torch.tensor(SECOND_COLOURS))
    return {name: table.to(device) for name, table in tables.items()}


def pose(turn, size, height, flip=1):
    """From places to cells of a shape's table: [..., 4] of turn [..., (cos, sin)], the radii across and down [...]."""
    cos, sin = turn.unbind(-1)
    return torch.stack([flip * cos, sin, flip * -sin, cos], -1) * (4 * RADIUS) // torch.stack(
        [size, size, height, height], -1)


class World:
    """The built-in world as a data set without end. options: unique=N (only N scenes, visited again and again),
    classes=N (only the N most frequent fine classes, all equally frequent: the poor control), objects=1 (one each).
    split: 'train', 'val', or 'heldout' (only attribute pairs that training never shows). frames=N: clips of ACTIONS."""
    reads_files, KNOBS = False, ('unique', 'classes', 'objects')

    def __init__(self, split='train', unique=0, classes=0, objects=MAX_OBJECTS, frames=0):
        for name, value, low, high in (('unique', unique, 0, 2 ** 33), ('classes', classes, 0, NUM_FINE),
                                       ('objects', objects, 1, MAX_OBJECTS)):
            if not low <= value <= high:
                raise ValueError(f'shapes:{name}={value} is outside {low} to {high}')
        self.split, self.unique, self.num_fine, self.max_objects = split, unique, classes, objects
        self.frames, self.has_captions, self.classes = frames, not frames, list(ACTIONS if frames else KINDS)
        self.label_names = self.classes
        self.broken = set()         # as in Folder: nothing drawn is ever unreadable

    def __len__(self):
        return self.unique if self.unique and self.split == 'train' else 2 ** 40

    def index(self, position, seed):
        """Which scenes stand at these positions of a run (position = step * batch_size + place), int64 [B]."""
        if self.split != 'train':
            return position + (VAL_START if self.split == 'val' else HELDOUT_START)
        if self.unique:
            return sample_index(position, self.unique, seed)
        return (position + (seed << 33)) % 2 ** 40

    def some_captions(self, num):
        """Captions of the first scenes, from which a tokenizer learns its vocabulary."""
        return self.batch(torch.arange(num), 0, want=('captions',))['captions']

    def batch(self, position, image_size, seed=0, device='cpu', scale=None, flip=False, augment='',
              want=('images', 'captions')):
        """dict of the scenes at these positions: position, index, every field of scenes(), labels among them (kind of
        the largest object), unnamed (its part pattern); as wanted images uint8 [B, 3, H, W] on device, captions (list
        of B), semantic [B, H, W] (grounds, then 10 + kind), and of what is visible boxes [B, 6, 4] (xyxy, pixels),
        masks [B, 6, H, W] and num_visible [B, 6]. Of clips: images [B, T, 3, H, W], labels (actions), position, index.
        A world without end needs no augmentation: scale, flip and augment are for real images."""
        index = self.index(position.to(device), seed)
        if self.frames:
            frames, labels = self.clips(index)
            images = self.draw(frames, image_size)['images'].unflatten(0, (-1, self.frames))
            return dict(images=images, labels=labels, position=position, index=index)
        scenes = self.scenes(index)
        largest = (scenes['radius'] * scenes['valid']).argmax(1, keepdim=True)
        out = dict(scenes, position=position, index=index, unnamed=scenes['part'].gather(1, largest)[:, 0])
        if {'images', 'semantic', 'boxes'} & set(want):
            drawn = self.draw(scenes, image_size, annotate=bool({'semantic', 'boxes'} & set(want)))
            out |= {name: x for name, x in drawn.items() if name != 'masks' or name in want}
        if 'captions' in want:
            out['captions'] = captions(scenes, index)
        return out

    def draw(self, scenes, image_size, annotate=False):
        """render of any number of scenes, a few at a time."""
        pixels = 2 ** 16 if scenes['x'].device.type == 'cpu' else 2 ** 24       # at once: what a CPU's cache holds
        chunk = max(1, pixels // image_size ** 2)
        parts = [self.render({k: v[i:i + chunk] for k, v in scenes.items()}, image_size, annotate)
                 for i in range(0, len(scenes['x']), chunk)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def scenes(self, index):
        """The scene of each index as integers, exact on every device: type, layout, rotation_step, ground, ... [B];
        valid, kind, texture, part, fine, colour, x, y, radius [B, 6]; matrix [B, 6, 4], from places to table cells."""
        g = grammar(index.device, self.num_fine or NUM_FINE, bool(self.num_fine))
        u = uniform(WORLD_SEED, 'scene', index, 26).unbind(1)
        o = uniform(WORLD_SEED, 'objects', index, MAX_OBJECTS * 10).view(-1, MAX_OBJECTS, 10)
        scene_type = choose(u[0], g['scene_types'])
        layout = choose(u[1], g['layouts'][scene_type]) if self.max_objects > 1 else torch.zeros_like(index)
        is_layout = lambda *names: sum(layout == LAYOUTS.index(name) for name in names).bool()
        at = lambda options: torch.stack([x.expand(len(index), MAX_OBJECTS) for x in options]).gather(
            0, layout[None, :, None].expand(1, -1, MAX_OBJECTS))[0]      # the entry of each scene's own layout

        i = torch.arange(MAX_OBJECTS, device=index.device)
        big = pick(u[2], 2)
        num = torch.stack([index * 0 + 1, 2 + pick(u[2], 4), 3 + pick(u[2], 3), 4 + pick(u[2], 3), 4 + 2 * big,
                           2 + 2 * pick(u[2], 3)]).gather(0, layout[None])[0].clamp(max=self.max_objects)[:, None]

        # who repeats whom: rows, rings and grids show one class (or two in turn, or two colours); mirrors show pairs
        repeats = is_layout('row', 'ring', 'grid')[:, None]
        mode = pick(u[3], 4)[:, None] * repeats        # 0, 1: all alike; 2: class and colour in turn; 3: colour in turn
        own = torch.where(is_layout('mirror')[:, None], i - i % 2, i)
        class_of = torch.where(repeats, i % 2 * (mode == 2), own)
        colour_of = torch.where(repeats, i % 2 * (mode >= 2), own)
        leader = torch.where(repeats, 0, own)
        drawn = lambda slot, source: o[:, :, slot].gather(1, source)
        rank = choose(drawn(0, class_of), g['classes'][scene_type][:, None])
        kind, texture, part = g['fine'][rank].unbind(-1)
        wanted = choose(drawn(1, colour_of), g['palette'][scene_type][:, None])
        colour = g['forbidden' if self.split == 'heldout' else 'allowed'][kind, wanted]

        # places and sizes
        a, b, c = (drawn(slot, leader) for slot in (2, 3, 4))
        turn = g['turn']
        line = turn[torch.tensor([0, 0, 16, 8, 24], device=index.device)[pick(u[4], 5)]][:, None]   # a row's direction
        gap = (SIDE - 80) // num
        along, across = (2 * i - num + 1) * gap // 2, pick(u[5], 401)[:, None] - 200
        orbit, radius = turn[(pick(u[4], 64)[:, None] + i * 64 // num) % 64], 270 + pick(u[5], 60)[:, None]
        columns = 2 + big[:, None]
        cell = 380 - 60 * big[:, None]
        left = 90 + pick(a, 340)
        x = at([332 + pick(a, 361), 110 + pick(a, 805), 512 + (along * line[..., 0] - across * line[..., 1]) // 1024,
                512 + radius * orbit[..., 0] // 1024, 512 + (2 * (i % columns) - columns + 1) * cell // 2,
                torch.where(i % 2 == 0, left, SIDE - 1 - left)])
        y = at([332 + pick(b, 361), 110 + pick(b, 805), 512 + (along * line[..., 1] + across * line[..., 0]) // 1024,
                512 + radius * orbit[..., 1] // 1024, 512 + (2 * (i // columns) - 1) * cell // 2, 110 + pick(b, 805)])
        size = at([320 + pick(c, 180), 170 + pick(c, 180), gap * 9 // 16, 175 + pick(c, 40), cell * 9 // 16,
                   170 + pick(c, 150)])
        growth = (pick(u[6], 3)[:, None] - 1) * is_layout('row', 'ring')[:, None]
        size = size * (32 + 3 * growth * (2 * i - num + 1)) // 32
        rotation_step = pick(u[7], 4) * repeats[:, 0]       # 0, 22.5, 45 or 90 degrees from one to the next
        steps = torch.tensor([0, 4, 8, 16], device=index.device)[rotation_step]
        rotation = (pick(drawn(5, leader), 13) - 6 + i * steps[:, None]) % 64
        height = size * (13 + pick(drawn(6, class_of), 4)) // 16
        flip = torch.where(is_layout('mirror')[:, None] & (i % 2 == 1), -1, 1)
        matrix = pose(turn[rotation], size, height, flip)

        grounds = g['grounds'][scene_type]                                                              # [B, 3]
        tilt = turn[(torch.where(u[8] < .75, 16, 0) + pick(u[9], 7) - 3) % 64]
        first = 180 + pick(u[10], 400)
        ground = torch.stack([first, first + 150 + pick(u[11], 500), tilt[:, 0], tilt[:, 1], pick(u[12], 64),
                              pick(u[13], 3), pick(u[14], 60), pick(u[15], TILE), pick(u[16], TILE)], 1)
        tint = torch.stack([torch.stack([pick(u[17 + r], 41) - 20 + pick(u[20 + c], 25) - 12 for c in range(3)], 1)
                            for r in range(3)], 1)                                                      # [B, 3, 3]
        return dict(type=scene_type, layout=layout, mode=mode[:, 0], rotation_step=rotation_step, valid=i < num,
                    kind=kind, texture=texture, part=part, fine=rank, colour=colour, x=x, y=y, radius=size,
                    matrix=matrix, grounds=grounds, ground=ground, ground_colour=g['stuff'][grounds] + tint,
                    contrast=16 + pick(u[23], 20), light=torch.stack([pick(u[24], 61) - 30, pick(u[25], 61) - 30], 1),
                    jitter=torch.stack([pick(drawn(slot, colour_of), 41) - 20 for slot in (7, 8, 9)], -1),
                    labels=kind.gather(1, (size * (i < num)).argmax(1, keepdim=True))[:, 0])

    def clips(self, index):
        """The scenes of each index's clip, frame after frame, fields [B * T, ...], and its action [B]. Grounds, kinds
        and colours are the scene's; what moves is drawn apart from them, so that looks say nothing of the action. The
        last object moves, in some motions with the one before it; the first rests."""
        scenes, turn = self.scenes(index), grammar(index.device, NUM_FINE, False)['turn']
        u = [x[:, None] for x in uniform(WORLD_SEED, 'action', index, 6).unbind(1)]                     # each [B, 1]
        action = pick(u[0], len(ACTIONS))
        motion = lambda *motions: sum(action // 2 == m for m in motions)                # 1 if it is one of them
        sign = 1 - 2 * (action % 2)
        time = (2 * torch.arange(self.frames, device=index.device) + 1) * 512 // self.frames - 512
        time = time * sign                                                              # [B, T], within -512 to 512
        x, y, size = 362 + pick(u[1], 301), 362 + pick(u[2], 301), 150 + pick(u[3], 80)
        way, rotation = time * 300 // 512, pick(u[5], 64) + motion(2) * time * 12 // 512
        cos, sin = turn[(pick(u[4], 64) + motion(6) * time * 24 // 512) % 64].unbind(-1)
        reach = motion(4) * (120 + (512 - time) * 250 // 1024) + motion(6) * 260        # of the mover, from (x, y)
        across, down = reach * cos // 1024, reach * sin // 1024                         # [B, T]
        hidden = motion(5) * (time < pick(u[5], 513) - 256)
        mover = (x + across + motion(0, 7) * way, y + down + motion(1) * way,
                 size * (1024 + motion(3) * time * 6 // 5) // 1024, 1 - hidden)
        other = (x - motion(4) * across + motion(7) * (way - 260 * sign), y - motion(4) * down,
                 size * 5 // 8, motion(4, 6, 7))
        frames = {name: field.repeat_interleave(self.frames, 0) for name, field in scenes.items()}
        x, y, size, there = (torch.stack([a.expand_as(time), b.expand_as(time)], -1).flatten(0, 1)
                             for a, b in zip(other, mover))                             # each [B * T, 2]
        matrix = pose(turn[rotation.expand_as(time).reshape(-1, 1) % 64], size, size * 15 // 16)
        frames['valid'][:, 1:] = False
        for name, field in dict(x=x, y=y, radius=size, valid=there > 0, matrix=matrix).items():
            frames[name][:, -2:] = field
        return frames, action[:, 0]

    def render(self, s, size, annotate=False):
        """Draws scenes: dict(images uint8 [B, 3, H, W]) and, if asked, semantic [B, H, W], boxes, num_visible.
        What lies where is integer arithmetic (in float32, below 2^24), so masks and boxes are exact on every device."""
        shapes, surfaces, stuff = world_tables(s['x'].device)
        g = grammar(s['x'].device, NUM_FINE, False)
        pixels = (2 * torch.arange(size, device=s['x'].device) + 1) * (SIDE // 2) // size       # their centres
        canvas, owner = self.ground(s, pixels, stuff)                                       # [B, H, W, 3], [B, H, W]
        owner = owner if annotate else None

        b, k = s['valid'].nonzero(as_tuple=True)                                                # M objects
        m = s['matrix'][b, k].float() / 4096
        dx = (pixels - s['x'][b, k][:, None]).float()[:, None, :]                               # [M, 1, W]
        dy = (pixels - s['y'][b, k][:, None]).float()[:, :, None]                               # [M, H, 1]
        across, down = ((dx * m[:, None, None, i] + dy * m[:, None, None, i + 1]).floor_().add_(CELLS // 2)
                        .clamp_(0, CELLS - 1) for i in (0, 2))
        cell = down.mul_(CELLS).add_(across).long()                                             # [M, H, W]
        distance = shapes.take(cell + (s['kind'][b, k] * CELLS ** 2)[:, None, None])
        surface = surfaces.take(cell.add_(((s['texture'] * NUM_PARTS + s['part'])[b, k] * CELLS ** 2)[:, None, None]))
        main = g['colours'][s['colour'][b, k]].float() + s['jitter'][b, k]                      # [M, 3]
        second = .3 * main + .7 * g['second'][s['texture'][b, k]]
        mark = torch.where(main.mean(1, keepdim=True) > 60, .4 * main, main + 90)       # a shade of the colour itself
        outline = g['outlines'][s['kind'][b, k]].float()
        blend = torch.linspace(0, 1, 16, device=main.device)[:, None]
        palette = torch.cat([main[:, None] + blend * (second - main)[:, None], mark[:, None], outline[:, None]], 1)
        surface[distance > -OUTLINE] = 17
        surface += 18 * torch.arange(len(b), device=b.device)[:, None, None]             # into palette [M, 18, 3]
        paint = palette.flatten(0, 1)[surface.flatten()].view(*surface.shape, 3)                # [M, H, W, 3]
        edge = s['radius'][b, k].float() * size / (RADIUS * SIDE)                               # pixels per cell
        alpha = distance.mul(-edge[:, None, None]).add_(.5).clamp_(0, 1)
        for layer in range(MAX_OBJECTS):                    # painters' order: later objects hide earlier ones
            here = k == layer
            images = b[here]
            canvas[images] = torch.lerp(canvas[images], paint[here], alpha[here].unsqueeze(-1))
            if annotate:
                owner[images] = torch.where(distance[here] <= 0, NUM_STUFF + layer, owner[images])
        light = (s['light'][:, None, None, 0] * (pixels - 512)[None, None, :]
                 + s['light'][:, None, None, 1] * (pixels - 512)[None, :, None]).float() / (512 * 200)      # +-30%
        canvas *= 1 + light.unsqueeze(-1)
        out = dict(images=canvas.round_().clamp_(0, 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous())
        return out | self.annotations(s, owner) if annotate else out

    def ground(self, s, pixels, stuff):
        """Up to three grounds, parted by two wavy lines: colours [B, H, W, 3] and stuff classes [B, H, W]."""
        first, second, cos, sin, phase, frequency, swing, shift_x, shift_y = s['ground'][..., None, None].unbind(1)
        mirror = (s['layout'] == LAYOUTS.index('mirror'))[:, None, None]
        x, y = pixels[None, None, :], pixels[None, :, None]
        x = torch.where(mirror, torch.minimum(x, SIDE - 1 - x), x)                              # [B, 1, W]
        depth = ((x - 512) * cos + (y - 512) * sin) // 1024 + 512                               # [B, H, W]
        side = ((y - 512) * cos - (x - 512) * sin) // 1024 + 512
        turn = grammar(x.device, NUM_FINE, False)['turn'][:, 1]
        depth += turn[(side * (frequency + 1) // 16 + phase) % 64] * swing // 1024
        region = (depth > first).long() + (depth > second)                                      # [B, H, W] in 0, 1, 2
        owner = s['grounds'].gather(1, region.flatten(1)).view_as(region)
        place = ((y // 6 + shift_y) % TILE) * TILE + (x // 6 + shift_x) % TILE
        brightness = stuff.take(owner * TILE ** 2 + place) * s['contrast'][:, None, None]
        rows = region + 3 * torch.arange(len(region), device=region.device)[:, None, None]
        colour = s['ground_colour'].float().flatten(0, 1)[rows.flatten()].view(*region.shape, 3)
        return colour.add_(brightness.unsqueeze(-1)), owner

    def annotations(self, s, owner):
        """Semantic map and boxes from who owns each pixel. owner [B, H, W]: a stuff class, or 10 + the object's row."""
        kinds = torch.cat([torch.arange(NUM_STUFF, device=owner.device).expand(len(owner), -1),
                           NUM_STUFF + s['kind']], 1)                                           # [B, 10 + 6]
        semantic = kinds.gather(1, owner.flatten(1)).view_as(owner)
        visible = owner[:, None] == NUM_STUFF + torch.arange(MAX_OBJECTS, device=owner.device)[:, None, None]
        columns, rows = visible.any(2), visible.any(3)                                          # [B, 6, W], [B, 6, H]
        first = lambda seen: seen.int().argmax(-1)
        last = lambda seen: seen.shape[-1] - first(seen.flip(-1))
        boxes = torch.stack([first(columns), first(rows), last(columns), last(rows)], -1)
        num_visible = visible.flatten(2).sum(-1)
        boxes = boxes * (num_visible > 0)[..., None]
        return dict(semantic=semantic, boxes=boxes, num_visible=num_visible, masks=visible)


NUMBERS = ('no', 'one', 'two', 'three', 'four', 'five', 'six')
PHRASES = {'row': ('{} in a row', 'a row of {}', '{} in a line'), 'ring': ('{} around a centre', 'a round of {}'),
           'grid': ('a grid of {}', '{} in rows and columns'), 'mirror': ('{} and the same mirrored', '{}, seen twice')}


def captions(scenes, index):
    """What a person would say of each scene: names of kinds, textures and colours, the layout, often the grounds;
    attributes are left out at random. Parts and rotations are never named."""
    names = ('layout', 'mode', 'valid', 'kind', 'texture', 'colour', 'x', 'y', 'radius', 'grounds')
    fields = {name: scenes[name].tolist() for name in names}
    draws = uniform(WORLD_SEED, 'caption', index, 24).tolist()
    return [caption({k: v[n] for k, v in fields.items()}, iter(draws[n])) for n in range(len(draws))]


def caption(s, draw):
    """One scene's caption. s: the scene's fields as lists; draw: an iterator of uniform numbers."""
    choice = lambda options: options[int(next(draw) * len(options))]
    word = lambda names: names[-1] if next(draw) < .2 else names[0]     # a synonym now and then

    def noun(i, count=1):
        words = []
        if next(draw) < .75:
            words.append(list(COLOURS)[s['colour'][i]])
        if next(draw) < (.55 if s['texture'][i] else .2):
            words.append(word(list(TEXTURES.values())[s['texture'][i]]))
        kind = word(list(KINDS.values())[s['kind'][i]])
        words.append(kind if count == 1 else plural(kind))
        article = ('an' if words[0][0] in 'aeiou' else 'a') if count == 1 else NUMBERS[count] if count else ''
        return ' '.join([article] * bool(article) + words)

    count, layout = sum(s['valid']), LAYOUTS[s['layout']]
    if layout == 'single' or count == 1:
        text = noun(0)
    elif layout == 'free':
        i, j = sorted(range(count), key=lambda n: -s['radius'][n])[:2]       # the two largest
        dx, dy = s['x'][j] - s['x'][i], s['y'][j] - s['y'][i]
        relation = ('left of' if dx > 0 else 'right of') if abs(dx) > abs(dy) else ('above' if dy > 0 else 'below')
        text = f'{noun(i)} {relation if next(draw) < .7 else "and"} {noun(j)}'
    elif layout == 'mirror':
        text = choice(PHRASES[layout]).format(' and '.join(noun(i) for i in range(0, min(count, 4), 2)))
    elif s['mode'] >= 2:
        text = choice(PHRASES[layout]).format(f'{noun(0, 0)} and {noun(1, 0)} in turn')
    else:
        text = choice(PHRASES[layout]).format(noun(0, count))
    if next(draw) < .75:
        names = [list(STUFF)[stuff] for stuff in s['grounds'][:2]]
        text += f' on {names[0]}' + (f' and {names[1]}' if next(draw) < .7 else '')
    return text


def plural(word):
    return {'leaf': 'leaves', 'box': 'boxes', 'cross': 'crosses', 'hourglass': 'hourglasses', 'plus': 'pluses',
            'rhombus': 'rhombuses'}.get(word, word + 's')


# ---- words to numbers ------------------------------------------------------------------------------------------

CLIP_MERGES = 'https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz'
CLIP_MERGES_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
NUM_CLIP_MERGES = 48894         # 49,408 ids = 256 bytes + 256 bytes that end a word + 48,894 merges + 2 specials
START, END = '<|startoftext|>', '<|endoftext|>'
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
                     regex.IGNORECASE)


def byte_letters():
    """{byte: the printable character that stands for it}, in the order of CLIP's ids: a merge table is plain text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def clean(text):
    """CLIP's cleaning. ftfy and html.unescape leave printable ASCII without '&' alone, and most captions are that."""
    if text.isascii() and text.isprintable() and '&' not in text:
        return text.lower()
    return regex.sub(r'\s+', ' ', html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip().lower()


def merge_pair(symbols, pair, merged):
    """The list with every adjacent (a, b) == pair, from the left, replaced by merged."""
    result, i = [], 0
    while i < len(symbols):
        found = symbols[i] == pair[0] and i + 1 < len(symbols) and symbols[i + 1] == pair[1]
        result.append(merged if found else symbols[i])
        i += 2 if found else 1
    return result


class Tokenizer:
    """CLIP's byte-level BPE. Ids: 256 bytes, the same 256 ending a word ('</w>'), one per merge, start, end (highest).
    merges: list of 'a b' by falling priority; all that a checkpoint needs to store."""

    def __init__(self, merges, context=77):
        self.merges, self.context, self.cache, self.letters = list(merges), context, {}, byte_letters()
        self.pieces = [letter + end for end in ('', '</w>') for letter in self.letters.values()]       # by id
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.ranks = {}                                     # (id, id) -> (priority, id of the two together)
        for rank, line in enumerate(self.merges):
            pair = line.split()
            if len(pair) != 2 or not self.ids.keys() >= set(pair):
                raise ValueError(f'merge {rank + 1} is {line[:80]!r}; expected two pieces that earlier lines made')
            merged = self.ids.setdefault(''.join(pair), len(self.pieces))
            self.pieces.append(''.join(pair))
            self.ranks[self.ids[pair[0]], self.ids[pair[1]]] = rank, merged
        self.start, self.end = len(self.pieces), len(self.pieces) + 1
        self.pieces += [START, END]
        self.vocab_size = len(self.pieces)

    def __call__(self, texts):
        """Captions (or one) -> ids [B, context] int64: start, words, end, zeros. Too long: cut, and the last is end."""
        texts = [texts] if isinstance(texts, str) else texts
        result = np.zeros((len(texts), self.context), dtype=np.int64)
        for row, text in zip(result, texts):
            ids = [self.start]
            for chunk in clean(text).split(' '):            # no match of WORD crosses a space
                ids += self.cache.get(chunk) or self.encode(chunk)
            ids = ids[:self.context - 1] + [self.end]
            row[:len(ids)] = ids
        return torch.from_numpy(result)

    def encode(self, chunk):
        """Ids of cleaned text without spaces, remembered by chunk ('dog.') and by word ('dog')."""
        if chunk not in self.cache:
            words = WORD.findall(chunk)
            ids = self.merge(chunk) if words == [chunk] else [i for word in words for i in self.encode(word)]
            if len(self.cache) >= 1 << 17:                  # some 30 MB; the web never runs out of new words
                self.cache.clear()
            self.cache[chunk] = ids
        return self.cache[chunk]

    def spell(self, word):
        """'cat' -> ['c', 'a', 't</w>']: one letter per byte of UTF-8."""
        letters = [self.letters[byte] for byte in word.encode('utf-8', 'replace')]
        return letters[:-1] + [letters[-1] + '</w>']

    def merge(self, word):
        """Ids of one word: the merge of highest priority first, until none applies."""
        if word in (START, END):
            return [self.start if word == START else self.end]
        ids = [self.ids[letter] for letter in self.spell(word)]
        while found := [(self.ranks[pair], pair) for pair in zip(ids, ids[1:]) if pair in self.ranks]:
            (_, merged), pair = min(found)
            ids = merge_pair(ids, pair, merged)
        return ids

    def decode(self, ids):
        """Text of a list or tensor of ids, a space after each word, as CLIP's (to which padding, id 0, is '!' too)."""
        byte_of = {letter: byte for byte, letter in self.letters.items()}
        text = ''.join(self.pieces[i] for i in torch.as_tensor(ids).tolist())
        return bytes(byte_of[letter] for letter in text).decode('utf-8', errors='replace').replace('</w>', ' ')

    @classmethod
    def from_file(cls, path):
        """CLIP's merge table, bpe_simple_vocab_16e6.txt.gz or the same unpacked: a header line, then 'a b' lines."""
        try:
            with open(path, 'rb') as file:
                raw = file.read()
            lines = (gzip.decompress(raw) if raw[:2] == b'\x1f\x8b' else raw).decode('utf-8').split('\n')
            if '#version' not in lines[0]:
                raise ValueError("the first line lacks '#version'")
            return cls([line for line in lines[1:NUM_CLIP_MERGES + 1] if line.strip()])
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise ValueError(f'{path}: no BPE merge table ({error}); expected bpe_simple_vocab_16e6.txt.gz') from error

    @classmethod
    def openai(cls, path='', folder='out'):
        """CLIP's tokenizer: from the file given, an installed package, or the download (once, checked, into folder)."""
        if path:
            return cls.from_file(path)
        specs = [importlib.util.find_spec(name) for name in ('clip', 'open_clip', 'eva_clip')]   # imports nothing
        places = [place for spec in specs if spec for place in spec.submodule_search_locations or []] + [folder]
        paths = [os.path.join(place, os.path.basename(CLIP_MERGES)) for place in places]
        path = next((path for path in paths if os.path.exists(path)), None)
        return cls.from_file(path or fetch(CLIP_MERGES, CLIP_MERGES_SHA256, paths[-1],
                                         'pass --bpe FILE with a copy of bpe_simple_vocab_16e6.txt.gz'))

    @classmethod
    def learn(cls, captions, num_merges=1000, context=77):
        """A small vocabulary of the same form from the 5,000 most frequent words: each merge is the most frequent pair
        (ties: the last in the alphabet). Fewer merges when every word has become one piece."""
        bare, merges, words = cls([]), [], Counter()
        for caption in captions:
            words.update(WORD.findall(clean(caption)))
        words = [(bare.spell(word), count) for word, count in words.most_common(5000)]
        pairs = Counter()
        for pieces, count in words:
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += count
        while len(merges) < num_merges and pairs:
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            merges.append(' '.join(best))
            for i, (pieces, count) in enumerate(words):
                if best[0] in pieces and best[1] in pieces:
                    words[i] = merge_pair(pieces, best, ''.join(best)), count
                    for symbols, change in ((pieces, -count), (words[i][0], count)):
                        for pair in zip(symbols, symbols[1:]):
                            pairs[pair] += change
            pairs = +pairs                                  # drops those that are no more
        return cls(merges, context)


def fetch(url, sha256, path, advice):
    """The file at url as path, only if it is the known one; returns path, at once if it is there."""
    if os.path.exists(path):
        return path
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            raw = reply.read()
    except (OSError, http.client.HTTPException) as error:   # URLError and timeouts are OSErrors
        raise ValueError(f'{url} could not be fetched ({error}); {advice}') from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f'{url} gave {len(raw):,} bytes that are not the known file; {advice}')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(f'{path}.{os.getpid()}', 'wb') as file:       # several processes may fetch at once
        file.write(raw)
    os.replace(file.name, path)
    return path


# ---- images from files ------------------------------------------------------------------------------------------

SUFFIXES = tuple('.jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .tga'.split())
TURNS = dict(zip(range(2, 9), (Image.Transpose[name] for name in (      # EXIF orientation -> what makes it upright
    'FLIP_LEFT_RIGHT', 'ROTATE_180', 'FLIP_TOP_BOTTOM', 'TRANSPOSE', 'ROTATE_270', 'TRANSVERSE', 'ROTATE_90'))))
NUM_CROP = 23                   # uniform numbers a crop takes: 10 tries of (area, aspect), top, left, flip
NUM_AUGMENT = 10                # what follows them: RandAugment's or jitter's; then when a clip's frames are taken


def to_rgb(image):
    """Any PIL mode -> 'RGB': deep pixels scaled to 8 bits (PIL would clip them), transparency over white."""
    if image.mode.startswith('I') or image.mode == 'F':
        pixels = np.nan_to_num(np.asarray(image).astype(np.float64))
        tops = (65535,) if ';16' in image.mode else (1, 255, 65535)     # 32-bit pixels do not say what their white is
        top = next((top for top in tops if pixels.max() <= top), pixels.max())
        return Image.fromarray((pixels.clip(0) * (255 / top)).round().astype(np.uint8)).convert('RGB')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    if image.mode == 'RGB':
        image.load()
        return image
    return image.convert('RGB')


def read_part(path, box_of, size=None):
    """-> (PIL 'RGB' image, box_of(width, height) of the upright image). Where the box is at least 4 x size, a JPEG is
    decoded at 1/2, 1/4 or 1/8, which is much faster, and the box is scaled with it. OSError if it cannot be."""
    try:
        with Image.open(path) as image:
            turn = image.getexif().get(0x0112, 1)
            box = box_of(*(image.size[::-1] if turn in (5, 6, 7, 8) else image.size))
            if size and (shrink := min(box[2] - box[0], box[3] - box[1]) / (2 * size)) >= 2:
                width, height = image.size
                drafted = image.draft('RGB', (math.ceil(width / shrink), math.ceil(height / shrink)))
                box = [side * drafted[1][2] / width for side in box] if drafted else box
            image = to_rgb(image)
            return image.transpose(TURNS[turn]) if turn in TURNS else image, box
    except Exception as error:  # decoders raise SyntaxError, ValueError, struct.error and more for damaged files
        raise OSError(f'{path} cannot be read: {error}') from error


def read_image(path):
    """The whole upright image, PIL 'RGB'. OSError if it cannot be read."""
    return read_part(path, lambda width, height: (0, 0, width, height))[0]


def crop_box(u, width, height, scale=(.2, 1), ratio=(3 / 4, 4 / 3)):
    """torchvision's random resized crop from NUM_CROP given uniform numbers: (left, top, right, bottom), whole pixels.
    Ten tries of (share of the area, aspect), then the largest central box whose aspect is within ratio."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area, aspect in zip(u[0:20:2], u[1:20:2]):
        area, aspect = scale[0] + (scale[1] - scale[0]) * area, math.exp(low + (high - low) * aspect)
        area *= width * height
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def central_box(width, height, share=224 / 256, place=.5):
    """The evaluation view: shorter side to 256/224 of the size, centre crop = the central square of 7/8 of it. CLIP's
    has a share of 1. place: of the square along the longer side, from 0 to 1."""
    side = min(width, height) * share
    left, top = (width - side) * (place if width > height else .5), (height - side) * (place if height > width else .5)
    return left, top, left + side, top + side


def load_box(path, image_size, box_of):
    """The part box_of(width, height) of one image -> uint8 [3, S, S], bicubic."""
    image, box = read_part(path, box_of, image_size)
    if isinstance(box[0], float):       # maybe parts of pixels: the evaluation view, and what was decoded smaller
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # torch takes a third of PIL's time, and rarely differs by 1 or 2
    part = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None]
    return F.interpolate(part, size=(image_size, image_size), mode='bicubic', antialias=True)[0]


def load_crop(path, image_size, u=None, scale=(.2, 1), flip=True, share=224 / 256):
    """One image -> uint8 [3, S, S]. u: NUM_CROP uniform numbers; None for the evaluation view, the central square of
    that share of the shorter side."""
    def box_of(width, height):
        return central_box(width, height, share) if u is None else crop_box(u, width, height, scale)
    image = load_box(path, image_size, box_of)
    return image.flip(-1) if u is not None and flip and u[22] < .5 else image


FILL = 123, 117, 104            # what comes in from beyond the border: CLIP's mean colour


def moved(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def enhanced(kind):
    return lambda image, m, sign: getattr(ImageEnhance, kind)(image).enhance(1 + sign * .9 * m)


# m: magnitude, 0 to 1; sign: 1 or -1. timm's "increasing" set: a larger m always changes more
RAND_AUGMENT = {
    'autocontrast': lambda x, m, sign: ImageOps.autocontrast(x),
    'equalize':     lambda x, m, sign: ImageOps.equalize(x),
    'invert':       lambda x, m, sign: ImageOps.invert(x),
    'rotate':       lambda x, m, sign: x.rotate(sign * 30 * m, Image.Resampling.BICUBIC, fillcolor=FILL),
    'posterize':    lambda x, m, sign: ImageOps.posterize(x, max(1, 4 - int(4 * m))),
    'solarize':     lambda x, m, sign: ImageOps.solarize(x, 256 - int(256 * m)),
    'solarize_add': lambda x, m, sign: x.point(lambda v: min(255, v + int(110 * m)) if v < 128 else v),
    'color': enhanced('Color'), 'contrast': enhanced('Contrast'), 'brightness': enhanced('Brightness'),
    'sharpness': enhanced('Sharpness'),
    'shear_x':      lambda x, m, sign: moved(x, 1, sign * .3 * m, 0, 0, 1, 0),
    'shear_y':      lambda x, m, sign: moved(x, 1, 0, 0, sign * .3 * m, 1, 0),
    'translate_x':  lambda x, m, sign: moved(x, 1, 0, sign * .45 * m * x.width, 0, 1, 0),
    'translate_y':  lambda x, m, sign: moved(x, 1, 0, 0, 0, 1, sign * .45 * m * x.height),
}


def rand_augment(image, u):
    """RandAugment (arXiv:1909.13719), timm's m9-mstd0.5-inc1: two of the fifteen, each done half of the time, with a
    magnitude of 9 +- .5 of 10. image uint8 [3, S, S]; u: 10 uniform numbers."""
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    for which, does, sign, a, b in (u[0:5], u[5:10]):
        normal = math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b)
        if does < .5:
            change = list(RAND_AUGMENT.values())[int(which * len(RAND_AUGMENT))]
            image = change(image, min(1, max(0, .9 + .05 * normal)), 1 if sign < .5 else -1)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def jitter(images, u):
    """EVA's for videos: brightness, contrast and saturation change with a chance of .8 (by up to .4, which is ours),
    and all turns grey with .2; every frame alike. images uint8 [..., 3, S, S]; u: 5 uniform numbers."""
    grey = lambda x: (x * torch.tensor([.299, .587, .114]).view(3, 1, 1)).sum(-3, keepdim=True)
    x = images.float()
    if u[0] < .8:
        x = x * (.6 + .8 * u[1])
        x = torch.lerp(grey(x).mean().expand_as(x), x, .6 + .8 * u[2])
        x = torch.lerp(grey(x).expand_as(x), x, .6 + .8 * u[3])
    if u[4] < .2:
        x = grey(x).expand_as(x)
    return x.round().clamp(0, 255).to(torch.uint8)


AUGMENTS = {'rand': rand_augment, 'jitter': jitter}


def list_files(root):
    """-> (images, texts): sorted paths below root of images, relative, with '/'; of .txt files, without their suffix.
    What begins with a dot is left out."""
    names = [name.replace(os.sep, '/') for name in glob.iglob('**/*', root_dir=root, recursive=True)]
    texts = {name[:-4] for name in names if name.endswith('.txt')}
    return sorted(name for name in names if name.lower().endswith(SUFFIXES)), texts


def split_by_hash(paths):
    """5% of the paths, by each one's hash, are validation; at least one, and not all (a single image is both)."""
    value = {path: hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in paths}
    num = sum(int.from_bytes(value[path], 'big') < .05 * 2 ** 64 for path in paths)
    val = set(sorted(paths, key=value.get)[:max(1, min(num, len(paths) - 1))])
    return {'train': [path for path in paths if path not in val] or paths, 'val': sorted(val)}


def class_names(paths):
    """The class of each path: its first folder below those that all share; [] unless every image lies in such a one."""
    parts = [path.split('/')[:-1] for path in paths]
    depth = len(os.path.commonprefix(parts))                # takes any sequences, not only strings
    return [part[depth] for part in parts] if all(len(part) > depth for part in parts) else []


class Folder:
    """Any folder of images, flat or nested. train/ and val/ (or images/train, images/val) are the splits if both exist,
    else split_by_hash. 'test' is val/ or, without it, every image: for sets that nothing was trained on. Class folders
    give labels and 'a photo of a ...'; a .txt beside an image is its caption."""
    reads_files, frames = True, 0       # worker processes help

    def __init__(self, path, split='train'):
        bases = [base for base in (path, os.path.join(path, 'images'))
                 if os.path.isdir(os.path.join(base, 'train')) and os.path.isdir(os.path.join(base, 'val'))]
        split = 'val' if bases and split == 'test' else split
        self.root = os.path.join(bases[0], split) if bases else path
        (files, texts), others = self.find(self.root), []
        if bases:               # the other split's classes count too, so that both give the same ids
            others, _ = self.find(os.path.join(bases[0], 'val' if split == 'train' else 'train'))
        self.paths = files if bases or split == 'test' else split_by_hash(files)[split]
        if not self.paths:
            raise ValueError(f'{self.root}: no images in it or below; looked for {" ".join(SUFFIXES)} and .tar shards '
                             '(json lists and the like are not read: unpack them)')
        names = class_names(files + others)
        self.classes = self.label_names = sorted(set(names))
        class_of, ids = dict(zip(files, names)), {name: i for i, name in enumerate(self.classes)}
        self.labels = [ids[class_of[path]] for path in self.paths] if names else None
        self.texts = {path for path in self.paths if os.path.splitext(path)[0] in texts}   # images with a caption file
        self.has_captions = bool(names) or len(self.texts) == len(self.paths)
        self.broken = set()     # (what, name) of what could not be read, met so far
        self.sample(0, 8, None, 1., False, [])              # ValueError unless some image can be read

    def find(self, root):
        """(samples, those with a caption) below root; see list_files."""
        return list_files(root)

    def __len__(self):
        return len(self.paths)

    def some_captions(self, num):
        """Captions of the first num images, from which a tokenizer learns its vocabulary."""
        return [self.caption(i) for i in range(min(num, len(self)))]

    def caption(self, i, broken=None):
        """The .txt beside image i, else its class in a sentence, else ''."""
        if self.paths[i] in self.texts:
            path = os.path.join(self.root, os.path.splitext(self.paths[i])[0] + '.txt')
            with open(path, 'rb') as file:
                return as_text(file.read(), path, broken)
        return f'a photo of a {self.classes[self.labels[i]].replace("_", " ")}' if self.classes else ''

    def image(self, i):
        """What PIL can open of image i: a path, or its bytes as a file."""
        return os.path.join(self.root, self.paths[i])

    def load(self, i, image_size, u, scale, flip):
        """Image i; scale as in batch."""
        view = dict(u=u, scale=scale, flip=flip) if isinstance(scale, tuple) else dict(share=scale)
        return load_crop(self.image(i), image_size, **view)

    def sample(self, first, image_size, u, scale, flip, broken):
        """-> (index, image [3, S, S], caption) of image first or the next that can be read; others' names to broken."""
        for offset in range(len(self)):
            i = (first + offset) % len(self)
            try:
                caption = self.caption(i, broken)           # 'left of the house' is untrue of the mirror image
                turnable = flip and not re.search(r'\b(left|right)', caption, re.IGNORECASE)
                return i, self.load(i, image_size, u, scale, turnable), caption
            except OSError as error:
                broken.append((f'of {len(self):,} images could not be read and were replaced', self.paths[i]))
                last = error
        raise ValueError(f'{self.root}: none of its {len(self):,} images can be decoded; the last: {last}')

    def batch(self, position, image_size, seed, device='cpu', scale=(.2, 1), flip=True, augment=''):
        """position [B] int64 -> dict: images uint8 [B, 3, S, S], position and index [B], labels [B], captions, broken.
        scale: from and to which share of the area a random crop takes; a number: central_box's, for evaluation.
        augment: one of AUGMENTS."""
        index, broken = sample_index(position, len(self), seed).tolist(), []
        u = uniform(seed, 'crop', position, NUM_CROP + NUM_AUGMENT + self.frames).tolist()
        samples = [self.sample(i, image_size, row, scale, flip, broken) for i, row in zip(index, u)]
        index, images, captions = zip(*samples)
        if augment:
            images = [AUGMENTS[augment](image, row[NUM_CROP:]) for image, row in zip(images, u)]
        batch = dict(images=torch.stack(images).contiguous(), position=position, index=torch.tensor(index))
        if self.labels is not None:
            batch['labels'] = torch.tensor([self.labels[i] for i in index])
        if self.has_captions:
            batch['captions'] = list(captions)
        return to_device(batch, device) | {'broken': broken}


def as_text(raw, name, broken=None):
    """Bytes of a caption as text; what is not UTF-8 in them becomes U+FFFD, noted in broken."""
    text = raw.decode('utf-8', 'replace').strip()
    if broken is not None and '\ufffd' in text and '\ufffd'.encode() not in raw:
        broken.append(('captions are not UTF-8', name))
    return text


def json_caption(text):
    """The caption in img2dataset's JSON; '' if there is none."""
    try:
        return str(json.loads(text)['caption'] or '')
    except (ValueError, LookupError, TypeError):
        return ''


def expand(spec):
    """'x/{00000..00003}.tar' -> the four paths; every range in it counts, outer first."""
    found = re.search(r'\{(\d+)\.\.(\d+)\}', spec)
    if not found:
        return [spec]
    first, last = found.groups()
    return [path for n in range(int(first), int(last) + 1)
            for path in expand(spec[:found.start()] + str(n).zfill(len(first)) + spec[found.end():])]


def tar_members(path):
    """-> ([(name, offset, size)] of a tar's files, whether it is whole). Of a damaged one: what comes before."""
    members = []
    try:
        with tarfile.open(path, 'r:') as archive:
            for member in archive:
                if member.isfile():
                    members.append((member.name, member.offset_data, member.size))
            archive.fileobj.seek(archive.offset)
            whole = archive.fileobj.read(512) == bytes(512)         # the block of zeros that ends every tar
    except (OSError, tarfile.TarError):
        whole = False
    end = os.path.getsize(path) if os.path.exists(path) else 0
    return [member for member in members if member[1] + member[2] <= end], whole


class Clips(Folder):
    """A folder of clips, each a folder of frames in the order of their names; splits and classes as Folder's. T frames
    of each are seen, one from every T-th of it: [T, 3, S, S]. In evaluation VIEWS[0] choices of frames times VIEWS[1]
    squares along the longer side: [12, T, 3, S, S]."""
    VIEWS = 4, 3

    def __init__(self, path, split='train', frames=8):
        self.frames = frames
        super().__init__(path, split)

    def find(self, root):
        num_frames = Counter(os.path.dirname(name) for name in list_files(root)[0])
        short = min(num_frames, key=num_frames.get, default='')
        if num_frames[short] < self.frames:
            raise ValueError(f'{os.path.join(root, short)} has {num_frames[short]} frames, fewer than --frames '
                             f'{self.frames}; each clip is a folder of its frames')
        return sorted(num_frames), set()

    def load(self, i, image_size, u, scale, flip):
        folder = os.path.join(self.root, self.paths[i])
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and name[0] != '.')
        at = lambda places: [os.path.join(folder, names[int((t + place) * len(names) / self.frames)])
                             for t, place in enumerate(places)]
        if isinstance(scale, tuple):        # one crop for the whole clip
            return torch.stack([load_crop(path, image_size, u, scale, flip) for path in at(u[NUM_CROP + NUM_AUGMENT:])])
        (num_times, num_boxes), views = self.VIEWS, []
        for time in range(num_times):
            for place in range(num_boxes):
                box = lambda *size: central_box(*size, scale, place / (num_boxes - 1))
                views.append(torch.stack([load_box(path, image_size, box)
                                          for path in at([(time + .5) / num_times] * self.frames)]))
        return torch.stack(views)


class Shards(Folder):
    """Samples in tar files, as img2dataset and webdataset write them: members of one basename are an image, its caption
    (.txt, or "caption" in .json) and its class (.cls). 5% by hash of shard and basename are validation. Every shard's
    headers are read once at the start; after that a sample is read where it lies, in the order of a folder's."""

    def __init__(self, paths, split='train'):
        self.root, self.shards, self.broken = os.path.commonpath(paths) if len(paths) > 1 else paths[0], paths, set()
        rows = {}               # 'shard/basename' -> {what: (shard, offset, size)}
        for shard, path in enumerate(paths):
            members, whole = tar_members(path)
            if not whole:
                self.broken.add(('shards are cut short or damaged', path))
            for name, offset, size in members:
                base, _, suffix = os.path.basename(name).partition('.')
                what = 'image' if f'.{suffix.lower()}' in SUFFIXES else suffix
                key = f'{os.path.basename(path)}/{os.path.join(os.path.dirname(name), base)}'
                rows.setdefault(key, {})[what] = shard, offset, size
        rows = {key: row for key, row in rows.items() if 'image' in row}
        if not rows:
            raise ValueError(f'{self.root}: no images in {len(paths)} tar shards; looked for {" ".join(SUFFIXES)}')
        described = {key for key, row in rows.items() if 'txt' in row or 'json' in row}
        self.has_captions = bool(described)
        if described:           # a caption for each, or for none
            self.broken |= {('images without a caption were left out', key) for key in rows.keys() - described}
        paths = sorted(described or rows)
        self.paths = paths if split == 'test' else split_by_hash(paths)[split]
        self.rows = np.array([[rows[key].get(what, (0, 0, 0)) for what in ('image', 'txt', 'json', 'cls')]
                              for key in self.paths])                                       # [n, 4, 3] int64
        labelled = all('cls' in row for row in rows.values())
        class_of = {key: self.read(*row['cls']).decode().strip() for key, row in rows.items()} if labelled else {}
        names = sorted(set(class_of.values()), key=lambda name: (len(name) if name.isdecimal() else 0, name))
        ids = {name: i for i, name in enumerate(names)}
        self.labels = [ids[class_of[key]] for key in self.paths] if labelled else None
        self.label_names = names
        self.classes = [] if all(name.isdecimal() for name in names) else names     # numbers are no names
        self.sample(0, 8, None, 1., False, [])              # ValueError unless some image can be read

    def read(self, shard, offset, size):
        with open(self.shards[shard], 'rb') as file:
            file.seek(offset)
            return file.read(size)

    def caption(self, i, broken=None):
        for what, place in zip(('txt', 'json'), self.rows[i, 1:3]):
            if place[2]:
                text = as_text(self.read(*place), f'{self.paths[i]}.{what}', broken)
                return text if what == 'txt' else json_caption(text)
        return ''

    def image(self, i):
        return io.BytesIO(self.read(*self.rows[i, 0]))


def report_broken(dataset):
    """A line for each kind of trouble with the data, '' if there was none."""
    lines = []
    for what in sorted({what for what, _ in dataset.broken}):
        names = sorted(name.encode('utf-8', 'replace').decode() for kind, name in dataset.broken if kind == what)
        lines.append(f'{len(names):,} {what}: {", ".join(names[:3])}' + ', ...' * (len(names) > 3))
    return '\n'.join(lines)


# ---- loading ----------------------------------------------------------------------------------------------------

def permutation(index, length, seed, epoch):
    """A bijection of [0, length) keyed by (seed, epoch), in no memory: index int64 tensor -> same shape. epoch: int or
    tensor. A Feistel network on the next power of four, applied until the result is below length (cycle walking)."""
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    key = mix(mix(torch.tensor((seed << 32) + zlib.crc32(b'order'), device=index.device)) + epoch)

    def shuffle(x):
        left, right = x >> half, x & ((1 << half) - 1)
        for turn in range(1, 5):
            left, right = right, left ^ (mix(right + key + (turn << 32)) & ((1 << half) - 1))
        return left << half | right

    x = shuffle(index)
    while (x >= length).any():
        x = torch.where(x < length, x, shuffle(x))
    return x


def sample_index(position, length, seed):
    """Which sample is at a position (= step * batch_size + place) of the endless stream: each epoch its own order."""
    return permutation(position % length, length, seed, position // length)


def to_device(batch, device):
    """The batch with its tensors on the device (asynchronously from pinned memory)."""
    return {name: x.to(device, non_blocking=True) if torch.is_tensor(x) else x for name, x in batch.items()}


class Batches(torch.utils.data.Dataset):
    """Item t: dataset.batch of positions begins[t], begins[t] + 1, ...: num of them, fewer at end."""

    def __init__(self, dataset, begins, num, end, options):
        self.dataset, self.begins, self.num, self.end, self.options = dataset, begins, num, end, options

    def __len__(self):
        return len(self.begins)

    def __getitem__(self, t):
        begin = self.begins[t]
        return self.dataset.batch(torch.arange(begin, min(begin + self.num, self.end)), **self.options)

    def stream(self, device, workers):
        """The items in order, on the device, read by worker processes where that helps; notes broken images."""
        self.options['device'] = 'cpu' if self.dataset.reads_files else device
        loader = (self[t] for t in range(len(self)))
        if workers and self.dataset.reads_files:            # its own generator: leaves torch's global one alone
            loader = torch.utils.data.DataLoader(self, batch_size=None, num_workers=workers,
                                                 generator=torch.Generator(), pin_memory='cuda' in str(device))
        for batch in loader:    # one pass; the workers end with it, or when the caller drops it
            self.dataset.broken.update(map(tuple, batch.pop('broken', ())))
            yield to_device(batch, device)


def batches(dataset, batch_size, image_size, start, steps, seed, device, workers=0, scale=(.2, 1), flip=True,
            augment='', rank=0, world=1):
    """The batches of steps start to steps - 1, dicts as of dataset.batch: a function of (seed, step) alone.
    With several processes (world), each gets its rank's part of the global batch_size."""
    if batch_size % world:
        raise ValueError(f'batch_size {batch_size} does not divide over {world} processes; use a multiple of {world}')
    num, end = batch_size // world, steps * batch_size
    options = dict(image_size=image_size, seed=seed, scale=scale, flip=flip, augment=augment)
    begins = range(start * batch_size + rank * num, end, batch_size)
    return Batches(dataset, begins, num, end, options).stream(device, workers)


def eval_batches(dataset, batch_size, image_size, num, device, workers=0, share=224 / 256, rank=0, world=1):
    """The first num samples, once each, in a fixed shuffled order, evaluation view; the last batch may be short. Of
    several processes each has a part of the same length: positions from num on only fill the last."""
    num, options = min(num, len(dataset)), dict(image_size=image_size, seed=0, scale=share, flip=False)
    part = math.ceil(num / world)
    begins, end = range(rank * part, (rank + 1) * part, batch_size), (rank + 1) * part
    return Batches(dataset, begins, batch_size, end, options).stream(device, workers)


def open_data(spec, split='train', frames=0):
    """--data -> a dataset: 'shapes' or 'shapes:unique=2000,objects=1' is the built-in World, else Shards or Folder;
    with frames clips."""
    name, _, knobs = spec.partition(':')
    if name == 'shapes':
        pairs = [knob.partition('=')[::2] for knob in knobs.split(',') if knob]
        if wrong := [f'{key}={value}' for key, value in pairs if key not in World.KNOBS or not value.isdecimal()]:
            raise ValueError(f'--data {spec}: {wrong[0]!r} is not a knob; expected shapes:unique=N,classes=N,objects=N')
        return World('val' if split == 'test' else split, **{key: int(value) for key, value in pairs}, frames=frames)
    shards = sorted(glob.glob(os.path.join(glob.escape(spec), '*.tar'))) if os.path.isdir(spec) else expand(spec)
    if absent := [path for path in shards if not os.path.exists(path)]:
        raise ValueError(f"--data {spec}: {absent[0]} does not exist; expected a folder of images, a folder of .tar "
                         "shards or a range of them like {00000..00099}.tar, or 'shapes', the built-in world")
    if frames:
        return Clips(spec, split, frames)
    return Shards(shards, split) if shards else Folder(spec, split)


if __name__ == '__main__':
    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'assets', 'world.py'), run_name='__main__')
