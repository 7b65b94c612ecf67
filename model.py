"""
The models of every stage, in this order: sizes and options; attention, MLP, block; the ViT; the text tower
and CLIP; initial values; names of released weights; reading and writing files.

    model = init_weights(ViT(ViTConfig(**SIZES['nano'], head=64)), seed=0)
    model = load('eva.pt')                 # a ViT or a CLIP in eval mode; model.config describes it
"""
import argparse
import functools
import io
import json
import math
import mmap
import os
import pickle
import re
import sys
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Refused(ValueError):
    """What a user gave and we do not take. It becomes one line and exit code 2; nothing else does."""


SIZES = {  # parameters without a head. The built-in teacher is a nano too; with --init the file's options stay
    'femto': dict(width=16,   depth=2,  heads=1,  mlp_width=64,   patch_size=4,  image_size=32),   # 8K
    '24x3':  dict(width=24,   depth=3,  heads=2,  mlp_width=96,   patch_size=4,  image_size=32),   # 24K
    'pico':  dict(width=32,   depth=4,  heads=2,  mlp_width=128,  patch_size=4,  image_size=32),   # 54K
    '48x4':  dict(width=48,   depth=4,  heads=3,  mlp_width=192,  patch_size=4,  image_size=32),   # 118K
    'nano':  dict(width=64,   depth=4,  heads=2,  mlp_width=256,  patch_size=4,  image_size=32),   # 207K
    'micro': dict(width=96,   depth=6,  heads=3,  mlp_width=384,  patch_size=4,  image_size=32),   # 681K
    'mini':  dict(width=128,  depth=8,  heads=4,  mlp_width=512,  patch_size=4,  image_size=32),   # 1.6M
    'ti':    dict(width=192,  depth=12, heads=3,  mlp_width=768,  patch_size=4,  image_size=32),   # 5.4M
    's':     dict(width=384,  depth=12, heads=6,  mlp_width=1536, patch_size=8,  image_size=64),   # 21M
    'b':     dict(width=768,  depth=12, heads=12, mlp_width=3072, patch_size=14, image_size=224),  # 86M
    'l':     dict(width=1024, depth=24, heads=16, mlp_width=4096, patch_size=14, image_size=224),  # 303M
    'g':     dict(width=1408, depth=40, heads=16, mlp_width=6144, patch_size=14, image_size=224),  # 1B, EVA
}
EVA02_SIZES = {  # an MLP of int(8/3 width), rotary positions; from b on a norm in the MLP. nano and micro are ours
    'nano':  dict(width=64,   depth=4,  heads=2,  mlp_width=170,  patch_size=4,  image_size=32),   # 207K
    'micro': dict(width=96,   depth=6,  heads=3,  mlp_width=256,  patch_size=4,  image_size=32),   # 682K
    'ti':    dict(width=192,  depth=12, heads=3,  mlp_width=512,  patch_size=14, image_size=224),  # 5.5M
    's':     dict(width=384,  depth=12, heads=6,  mlp_width=1024, patch_size=14, image_size=224),  # 22M
    'b':     dict(width=768,  depth=12, heads=12, mlp_width=2048, patch_size=14, image_size=224, mlp_norm=True),
    'l':     dict(width=1024, depth=24, heads=16, mlp_width=2730, patch_size=14, image_size=224, mlp_norm=True),
}
SMALL = SIZES['ti']['width']     # up to this width ViTs are our own sizes and start in our own way
TOKENS = ('pos_embed', 'class_token', 'registers', 'mask_token')    # learnt inputs: no decay, and no layer's
LIMITS = {  # of the numbers in configs, others' are 0 to 2^20: a file may say anything, and what it says is built
    'width': (1, 2 ** 14), 'mlp_width': (1, 2 ** 17), 'embed': (1, 2 ** 17), 'vocab': (2, 2 ** 22), 'depth': (0, 256),
    'heads': (1, 1024), 'patch_size': (1, 1024), 'image_size': (1, 8192), 'frames': (1, 1024), 'tokens': (1, 2 ** 18),
    'context': (2, 2 ** 14), 'global_every': (1, 256), 'layer_scale': (-1e3, 1e3), 'drop_path': (0, .999),
    'mean': (-1e3, 1e3), 'std': (1e-3, 1e3), 'num_classes': (1, 2 ** 20), 'channels': (1, 2 ** 14),
    'stages': (1, 16), 'layers': (0, 64), 'groups': (1, 1024), 'registers': (0, 1024), 'periods': (1e-6, 1e6),
}
WORDS = {  # what strings may be there
    'act': ('gelu', 'quick_gelu', 'gelu_tanh', 'swiglu'), 'pool': ('class', 'mean', 'map'),
    'rope': ('index', 'columns', 'unit'), 'biases': ('', 'qv', 'qkv'),
    'resize': ('bicubic', 'antialias', 'offset', 'bilinear'), 'head': ('linear', 'mask2former'),
}


def check_config(config):
    """Refuses a dataclass with a value of another type than its field's, or outside LIMITS and WORDS."""
    for field in fields(config):
        name = field.name
        value = getattr(config, name)
        if value is field.default:
            continue
        if isinstance(value, list):
            value = tuple(value)        # which `constant` can remember
            setattr(config, name, value)

        # a whole number may stand for any
        is_whole = type(value) is int and isinstance(0., field.type)
        if not is_whole and not isinstance(value, field.type):
            expected = getattr(field.type, '__name__', field.type)
            raise Refused(f'{name} is a {type(value).__name__}, expected {expected}')
        if isinstance(value, str) and value not in WORDS.get(name, [value]):
            raise Refused(f'{name} is {value[:40]!r}, expected {" or ".join(WORDS[name])}')

        # a tuple has as many numbers as its default
        if isinstance(value, tuple) and field.default and len(value) != len(field.default):
            raise Refused(f'{name} has {len(value)} numbers, expected {len(field.default)}')
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(value, (int, float, tuple)):
                check_number(name, number)


def check_number(name, number):
    """Refuses what is no number within LIMITS."""
    low, high = LIMITS.get(name, (0, 2 ** 20))
    if not isinstance(number, (int, float)):
        raise Refused(f'{name} holds a {type(number).__name__}, expected a number')
    if not low <= number <= high:
        number = max(min(number, 1e18), -1e18)      # one of 600 digits fills the line
        raise Refused(f'{name} {number} does not fit; expected {low} to {high}')


@dataclass
class ViTConfig:
    width: int                        # channels of a token
    depth: int                        # blocks
    heads: int                        # of attention; each is width / heads channels wide
    mlp_width: int                    # channels inside of an MLP
    patch_size: int                   # pixels along a side
    image_size: int                   # pixels along a side in training; other multiples of the patch work
    head: int = 0                     # width of a last linear layer: predictions, classes, CLIP's projection
    head_bias: bool = True
    pool: str | None = None           # the head sees every patch, 'class' token or 'mean' patch; 'map' as in forward
    mask_token: bool = True           # what MIM puts in place of hidden patches
    drop_path: float = 0.             # rate at which the last block's branches are dropped; it rises from 0
    frames: int = 1                   # of a clip: all frames' patches in a sequence with its own positions
    mean: tuple = CLIP_MEAN           # of the pixels it was trained on
    std: tuple = CLIP_STD

    eps: float = 1e-6                 # LayerNorm's; OpenAI's towers have 1e-5
    act: str = 'gelu'                 # 'quick_gelu' is OpenAI's, 'gelu_tanh' SigLIP's, 'swiglu' EVA-02's
    biases: str = 'qv'                # of queries, keys and values those that have one
    patch_bias: bool = True           # OpenAI's towers have none
    pre_norm: bool = False            # a norm before the blocks, OpenAI's
    post_norm: bool = False           # x + norm(attention(x)), not x + attention(norm(x)): EVA-02-CLIP-E's
    attn_norm: bool = False           # a norm before attention's projection, EVA-02-CLIP's
    mlp_norm: bool = False            # a norm before fc2, EVA-02's
    layer_scale: float | None = None  # first value of a learnt gain for each channel of a branch
    rope: str | int | None = None     # rotary positions: EVA-02's 'index' counts rows, a number stretches grids to it,
    periods: tuple = ()               # PE's 'columns', DINOv3's 'unit' square, which may have periods of its own
    pos_embed: bool = True            # a learnt table of positions
    align_corners: bool = False       # see resize_positions
    resize: str = 'bicubic'           # and there
    class_token: bool = True          # SigLIP has none
    registers: int = 0                # more learnt tokens, without positions, after the class token
    last_norm: bool = True            # PE-Spatial has none

    window: int = 0                   # ViTDet's: a window of so many patches a side sees itself only,
    global_every: int = 4             # but in each global_every-th block
    rel_pos: int = 0                  # patches along a side for which distances are learnt

    def __post_init__(self):
        check_config(self)
        grid = check_grid(self.image_size, self.image_size, self.patch_size)
        check_number('tokens', self.frames * math.prod(grid))
        if self.width % self.heads:
            raise Refused(f'width {self.width} is not a multiple of heads {self.heads}')
        if self.rope and self.width // self.heads % 4:
            raise Refused(f'width {self.width} / heads {self.heads} must divide by 4, for rotary positions')
        if self.rope and self.window:
            raise Refused('rotary positions count over the whole image; they do not go with --window')
        if (self.window or self.rel_pos) and self.pool != 'map':
            raise Refused("windows and learnt distances need pool='map', which has no class token")
        if self.pool == 'class' and not self.class_token:
            raise Refused("this ViT has no class token; use pool='mean'")
        if self.frames > 1 and not self.pos_embed:
            raise Refused('this ViT has no table of positions, which clips of several frames need')
        if self.periods and 4 * len(self.periods) != self.width // self.heads:
            raise Refused(f'{len(self.periods)} periods do not fit heads of {self.width // self.heads} channels')


def config_of(size, arch='eva'):
    """A size's options of ViTConfig: EVA's, or EVA-02's with arch='eva02'."""
    rows = dict(eva=SIZES, eva02=EVA02_SIZES)
    if arch not in rows:
        raise Refused(f'arch {arch!r} is not known; use {" or ".join(rows)}')
    if size not in rows[arch]:
        raise Refused(f'arch {arch} has no size {size!r}; it has {", ".join(rows[arch])}')
    common = dict(act='swiglu', rope='index') if arch == 'eva02' else {}
    return {**rows[arch][size], **common}


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] to [B, N, D]. Keys need no bias: softmax cancels what it would add,
    one number to all logits of a query. With rotary positions it matters; PE has one there."""

    def __init__(self, config, causal=False, window=0):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.causal = causal
        self.window = window

        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = self.k_bias = self.v_bias = None
        if config.biases:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        if config.biases == 'qkv':
            self.k_bias = nn.Parameter(torch.zeros(width))
        self.rotate = rotate_halves if config.rope == 'unit' else rotate
        self.norm = nn.LayerNorm(width, config.eps) if config.attn_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

        # a vector for each distance in rows and in columns; a window has fewer of them
        self.rel_pos_h = self.rel_pos_w = None
        if config.rel_pos:
            shape = (2 * (window or config.rel_pos) - 1, width // config.heads)
            self.rel_pos_h = nn.Parameter(torch.zeros(shape))
            self.rel_pos_w = nn.Parameter(torch.zeros(shape))

        self.rel_bias = None    # or BEiT's logits by place [heads, N, N], a module in detect_seg.py

    def forward(self, x, rotary=None, grid=None):
        """x [B, N, D]; rotary as rotary_positions gives it; grid (h, w) of windows and distances."""
        image_grid = grid
        if self.window:
            x = split_windows(x, image_grid, self.window)    # [B * windows, window^2, D]
            grid = (self.window, self.window)

        B, N, D = x.shape
        bias = None
        if self.q_bias is not None:
            k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
            bias = torch.cat((self.q_bias, k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        qkv = qkv.view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # each [B, heads, N, head_dim]
        if rotary is not None:
            q = self.rotate(q, rotary)
            k = self.rotate(k, rotary)

        # what is added to the scaled logits [B, heads, N, N]
        logits = None
        if self.rel_pos_h is not None:
            logits = distance_logits(q, grid, self.rel_pos_h, self.rel_pos_w)
        if self.rel_bias is not None:
            logits = self.rel_bias()

        x = F.scaled_dot_product_attention(q, k, v, logits, is_causal=self.causal)
        x = x.transpose(1, 2).reshape(B, N, D)
        x = self.proj(self.norm(x))
        if self.window:
            x = join_windows(x, image_grid, self.window)
        return x


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def swiglu(x):
    """A gate: [..., 2 * mlp_width] to [..., mlp_width] (arXiv:2002.05202)."""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


def gelu_tanh(x):
    return F.gelu(x, approximate='tanh')


ACTIVATIONS = {'gelu': F.gelu, 'quick_gelu': quick_gelu, 'gelu_tanh': gelu_tanh, 'swiglu': swiglu}


class Mlp(nn.Module):
    """[B, N, D] to [B, N, D]."""

    def __init__(self, config):
        super().__init__()
        mlp_width = config.mlp_width
        is_gate = config.act == 'swiglu'    # which halves what it sees
        self.fc1 = nn.Linear(config.width, 2 * mlp_width if is_gate else mlp_width)
        self.act = ACTIVATIONS[config.act]

        # EVA-02 has a norm here
        self.norm = nn.LayerNorm(mlp_width, config.eps) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(mlp_width, config.width)

    def forward(self, x):
        x = self.act(self.fc1(x))    # [B, N, mlp_width]
        return self.fc2(self.norm(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).
    Autocast leaves LayerNorm and the residual stream x in float32."""

    def __init__(self, config, causal=False, window=0):
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.attn = Attention(config, causal, window)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = Mlp(config)

        # layer scale
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale is not None:
            gains = torch.full((config.width,), float(config.layer_scale))
            self.gamma_1 = nn.Parameter(gains)
            self.gamma_2 = nn.Parameter(gains.clone())

    def forward(self, x, multipliers=(None, None), rotary=None, grid=None):
        """x [B, N, D]; multipliers [B] of the two branches: 0 drops it, 1 / (1 - rate) keeps it."""
        x = x + self.branch(x, self.attn, self.norm1, self.gamma_1, multipliers[0], rotary, grid)
        x = x + self.branch(x, self.mlp, self.norm2, self.gamma_2, multipliers[1])
        return x

    def branch(self, x, layer, norm, gamma, multiplier, *places):
        """What a layer adds to x [B, N, D]."""
        x = norm(layer(x, *places)) if self.post_norm else layer(norm(x), *places)

        # layer scale, then dropped paths
        if gamma is not None:
            x = x * gamma
        if multiplier is not None:
            x = x * multiplier[:, None, None]
        return x


class ViT(nn.Module):
    """Images to tokens, pre-norm (arXiv:2010.11929), with EVA's biases."""
    Config = ViTConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.pool = config.pool
        self.patch_size = config.patch_size
        self.image_size = config.image_size
        self.width = config.head or config.width    # of patch_features

        # tokens before the patches: the class token, then registers; ViTDet's maps have none
        width = config.width
        is_map = config.pool == 'map'
        self.class_token = self.registers = None
        if config.class_token and not is_map:
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.registers and not is_map:
            self.registers = nn.Parameter(torch.zeros(1, config.registers, width))
        self.num_before = 0 if is_map else config.class_token + config.registers

        # patches and positions; the table's first row is the class token's, also where there is none
        num_tokens = 1 + config.frames * self.grid ** 2
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if config.mask_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width)) if config.pos_embed else None
        self.pre_norm = nn.LayerNorm(width, config.eps) if config.pre_norm else nn.Identity()

        # blocks: the rate of dropped paths rises from 0, and each global_every-th has no windows
        self.drop_rates = tuple(config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth))
        self.blocks = nn.ModuleList()
        for layer in range(1, config.depth + 1):
            window = config.window if layer % config.global_every else 0
            self.blocks.append(Block(config, window=window))

        # the end
        has_norm = config.last_norm and not is_map
        self.norm = nn.LayerNorm(width, config.eps) if has_norm else nn.Identity()
        self.head = nn.Linear(width, config.head, config.head_bias) if config.head else nn.Identity()

    @property
    def grid(self):
        """Patches along a side."""
        return self.image_size // self.patch_size

    def normalize(self, images):
        """uint8 [B, 3, H, W] to the floats this model was trained on."""
        mean = 255 * constant(self.config.mean, images.device).view(3, 1, 1)
        std = 255 * constant(self.config.std, images.device).view(3, 1, 1)
        return images.float().sub(mean).div_(std)

    def tokens(self, images, mask=None, keep=None, drop=None, between=None):
        """Tokens before the last norm, num_before of them before the patches, mostly a class token: [B, 1+N, D].
        images [B, 3, H, W] normalised, or clips [B, T, 3, H, W].
        mask [B, N] bool: True puts the mask token there; keep [B, n]: patches to pass on, then [B, 1+n, D].
        drop [B, depth, 2] in [0, 1): a branch is dropped below its layer's rate.
        between(layer, x) returns what goes on in place of x, before each block and at the end."""
        if images.ndim == 5:    # as an image with the frames one below another
            images = images.transpose(1, 2).flatten(2, 3)
        grid = check_grid(*images.shape[2:], self.patch_size)
        x = self.embed(images, grid, mask, keep)

        # rotary positions, and what dropped paths are multiplied by, for all blocks
        rotary = None
        if self.config.rope:
            head_dim = self.config.width // self.config.heads
            rotary = rotary_positions(grid, head_dim, self.config.rope, keep, images.device,
                                      self.num_before, self.config.periods)
        multipliers = [(None, None)] * len(self.blocks)
        if drop is not None and self.config.drop_path:
            rates = constant(self.drop_rates, drop.device)[:, None]
            multipliers = ((drop >= rates) / (1 - rates)).permute(1, 2, 0)    # [depth, 2, B]

        # the blocks
        for layer, block in enumerate(self.blocks):
            if between is not None:
                x = between(layer, x)
            x = block(x, multipliers[layer], rotary, grid)
        return x if between is None else between(len(self.blocks), x)

    def embed(self, images, grid, mask, keep):
        """What the blocks see, [B, 1+N, D]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)    # [B, N, D]
        if mask is not None:
            x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)

        # a clip's positions are not resized
        first = self.class_token
        if self.pos_embed is not None:
            positions = self.pos_embed                             # [1, 1+N, D]
            if self.config.frames == 1:
                positions = resize_positions(positions, grid, self.config.align_corners, self.config.resize)
            x = x + positions[:, 1:]
            if first is not None:
                first = first + positions[:, :1]
        if keep is not None:
            index = keep[:, :, None].expand(-1, -1, x.shape[2])
            x = x.gather(1, index)                                 # [B, n, D]

        # the class token with its position, registers without
        if self.registers is not None:
            x = torch.cat((self.registers.expand(len(x), -1, -1), x), dim=1)
        if first is not None:
            x = torch.cat((first.expand(len(x), -1, -1), x), dim=1)
        return self.pre_norm(x)

    def features(self, images, mask=None, keep=None, drop=None):
        """Tokens after the last norm [B, 1+N, D]."""
        return self.norm(self.tokens(images, mask, keep, drop))

    def forward(self, images, mask=None, keep=None, drop=None):
        """What the head makes of every patch [B, N, head], or of the pooled ones [B, head].
        Without a head, what it would see; with 'map', ViTDet's, without class token and last norm [B, D, h, w]."""
        x = self.tokens(images, mask, keep, drop)
        if self.pool == 'map':
            rows = images.shape[2] // self.patch_size
            return x.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
        if self.pool == 'class':
            x = x[:, 0]
        elif self.pool == 'mean':
            x = x[:, self.num_before:].mean(dim=1)    # before the norm: EVA's fc_norm
        else:
            x = x[:, self.num_before:]
        return self.head(self.norm(x))

    def patch_features(self, images, layer=0):
        """What the head makes of every patch, whatever the pooling: EVA's MIM target [B, N, head].
        With layer the patches' tokens after so many blocks [B, N, D]."""
        kept = {}

        def between(i, x):
            kept[i] = x[:, self.num_before:]
            return x

        x = self.tokens(images, between=between if layer else None)
        return kept[layer] if layer else self.head(self.norm(x[:, self.num_before:]))


@functools.lru_cache
def constant(values, device):
    """A tuple of numbers as a tensor, moved once: a transfer makes the CPU wait for the device."""
    return torch.tensor(values, device=device)


def check_grid(height, width, patch_size):
    """How many patches (h, w) an image has."""
    for side in (height, width):
        if side % patch_size or side < patch_size:
            near = max(patch_size, side // patch_size * patch_size)
            raise Refused(f'image_size {side} is not a multiple of {patch_size}; use {near} or {near + patch_size}')
    return height // patch_size, width // patch_size


def resize_positions(pos_embed, grid, align_corners=False, resize='bicubic'):
    """Position table [1, 1+n, D] for another grid (h, w): [1, 1+h*w, D]. The class token's row stays.
    Bicubic, in float32, as EVA does it. One EVA-CLIP package aligns corners in OpenAI's tables. PE is bilinear;
    DINOv2 has 'antialias' with registers, without them factors that are .1 of a row too large, 'offset'."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (side, side) == tuple(grid):
        return pos_embed
    table = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)     # [1, D, n, n]
    options = dict(size=tuple(grid), mode='bicubic', align_corners=align_corners)
    if resize == 'offset':
        options.update(size=None, scale_factor=((grid[0] + .1) / side, (grid[1] + .1) / side))
    elif resize == 'antialias':
        options.update(antialias=True)
    elif resize == 'bilinear':
        options.update(mode='bilinear')
    table = F.interpolate(table, **options)
    table = table.flatten(2).transpose(1, 2).to(pos_embed.dtype)                        # [1, h*w, D]
    return torch.cat((pos_embed[:, :1], table), dim=1)


def repeat_positions(pos_embed, before, frames):
    """Position table of `before` frames [1, 1+before*N, D] for others: each has those of the one at its time."""
    table = pos_embed[:, 1:].unflatten(1, (before, -1))                     # [1, before, N, D]
    table = table[:, torch.arange(frames) * before // frames].flatten(1, 2)
    return torch.cat((pos_embed[:, :1], table), dim=1)


def resize_patches(kernel, patch_size):
    """A patch embedding's kernel [D, 3, p, p] for another patch size, as EVA goes from 14 to 16."""
    return F.interpolate(kernel.float(), (patch_size, patch_size), mode='bicubic').to(kernel.dtype)


def rotary_positions(grid, head_dim, rope, keep=None, device=None, num_before=1, periods=()):
    """Cosines and sines [2, 1+N, head_dim/2] of the angles by which pairs of channels turn (arXiv:2303.11331):
    half of them with the patch's row, half with its column; those of num_before tokens before the patches not.
    grid (h, w), rope and periods as in ViTConfig; with keep [B, n] for the kept patches, [2, B, 1, 1+n, head_dim/2]."""
    half = head_dim // 2
    rows = torch.arange(grid[0], device=device)
    columns = torch.arange(grid[1], device=device)
    frequencies = 10000 ** (-torch.arange(0, half, 2, device=device) / half)     # [head_dim/4]
    if rope == 'columns':       # from 1, as the class token is at 0
        rows = rows + 1
        columns = columns + 1
    elif rope == 'unit':        # patches' centres from -1 to 1
        rows = (2 * rows + 1) / grid[0] - 1
        columns = (2 * columns + 1) / grid[1] - 1
        frequencies = 2 * math.pi * 100 ** (-torch.arange(0, half, 2, device=device) / half)
        if periods:
            frequencies = 2 * math.pi / constant(periods, device)
    elif rope != 'index':
        rows = rows * (rope / grid[0])
        columns = columns * (rope / grid[1])

    by_row = (rows[:, None] * frequencies).repeat_interleave(grid[1], 0)         # [N, head_dim/4]
    by_column = (columns[:, None] * frequencies).repeat(grid[0], 1)
    angles = (by_column, by_row) if rope == 'columns' else (by_row, by_column)
    angles = F.pad(torch.cat(angles, dim=1), (0, 0, num_before, 0))              # [1+N, head_dim/2]
    if keep is not None:
        index = F.pad(keep + num_before, (num_before, 0))                        # the first row is not turned
        angles = angles[index][:, None]                                          # [B, 1, 1+n, head_dim/2]
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, rotary):
    """Turns neighbouring channels of x [B, heads, 1+N, head_dim] by their angles."""
    cos, sin = rotary
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x, rotary):
    """Turns each channel of x [B, heads, 1+N, head_dim] with the one half a head further: DINOv3's."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def split_windows(x, grid, window):
    """[B, h*w, D] to [B * windows, window^2, D]. Zeros fill up the bottom and the right. As in the original
    they come after the norm and take part in attention, with the biases of q and v."""
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, -grid[1] % window, 0, -grid[0] % window))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    return x.reshape(-1, window ** 2, x.shape[-1])


def join_windows(x, grid, window):
    """The inverse of split_windows: [B * windows, window^2, D] to [B, h*w, D]."""
    x = x.view(-1, math.ceil(grid[0] / window), math.ceil(grid[1] / window), window, window, x.shape[2])
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)           # [B, rows * window, columns * window, D]
    return x[:, :grid[0], :grid[1]].flatten(1, 2)


def distance_logits(q, grid, table_h, table_w):
    """What each query adds to its logits by a key's distance in rows and in columns (arXiv:2112.01526).
    q [B, heads, h*w, head_dim], not scaled; tables [2n-1, head_dim] -> [B, heads, h*w, h*w]."""
    def by_distance(table, n):    # the entry of every pair of n rows or columns [n, n, head_dim]
        if len(table) != 2 * n - 1:
            table = F.interpolate(table.T[None].float(), size=2 * n - 1, mode='linear')[0].T
        place = torch.arange(n, device=table.device)
        return table[place[:, None] - place + n - 1].to(q.dtype)

    q = q.unflatten(2, grid)                                    # [B, heads, h, w, head_dim]
    rows = torch.einsum('bnhwd,hkd->bnhwk', q, by_distance(table_h, grid[0]))
    columns = torch.einsum('bnhwd,wkd->bnhwk', q, by_distance(table_w, grid[1]))
    return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


@dataclass
class TextConfig:
    width: int              # channels of a token
    depth: int              # blocks
    heads: int              # of attention
    vocab: int              # tokens it knows
    embed: int              # width of its output, as the image tower's head
    context: int = 77       # tokens at most
    act: str = 'gelu'       # 'quick_gelu' is OpenAI's

    def __post_init__(self):
        check_config(self)


class TextTower(nn.Module):
    """Token ids to one feature, taken at the end token, which has the largest id (arXiv:2103.00020)."""
    Config = TextConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.token_embed = nn.Embedding(config.vocab, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.context, width))

        # the ViT's blocks, to which it does not matter what a patch is
        block = ViTConfig(width, config.depth, config.heads, 4 * width, 1, 1, eps=1e-5, act=config.act)
        self.blocks = nn.ModuleList(Block(block, causal=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, 1e-5)
        self.head = nn.Linear(width, config.embed, bias=False)

    def forward(self, text):
        """text [B, T] ids to [B, embed]."""
        # attention looks back only: what follows the last end token can go
        end = text.argmax(dim=1)                                    # [B]
        if text.device.type == 'cpu':    # a GPU would make the CPU wait; there the caller cuts
            text = text[:, :int(end.max()) + 1]
        x = self.token_embed(text) + self.pos_embed[:, :text.shape[1]]
        for block in self.blocks:
            x = block(x)                                            # [B, T, D]
        return self.head(self.norm(x[torch.arange(len(x), device=x.device), end]))


@dataclass
class CLIPConfig:
    vision: ViTConfig       # or a dict, as files hold it
    text: TextConfig

    def __post_init__(self):
        self.vision = ViTConfig(**self.vision) if isinstance(self.vision, dict) else self.vision
        self.text = TextConfig(**self.text) if isinstance(self.text, dict) else self.text


class CLIP(nn.Module):
    """An image tower and a text tower into one space (arXiv:2103.00020)."""
    Config = CLIPConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        self.text = TextTower(config.text)
        self.patch_size = self.visual.patch_size
        self.width = self.visual.width
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))   # FSDP2 refuses scalars

    def encode_image(self, images):
        return self.visual(images)                     # [B, embed]

    def encode_text(self, text):
        return self.text(text)                         # [B, embed]

    def patch_features(self, images, layer=0):
        return self.visual.patch_features(images, layer)      # [B, N, embed]

    def normalize(self, images):
        return self.visual.normalize(images)           # [B, 3, H, W]

    def forward(self, images, text, keep=None, drop=None):
        """Unit features of images and text, each [B, embed], and the factor of their cosines [1]."""
        image_features = F.normalize(self.visual(images, keep=keep, drop=drop).float(), dim=-1)
        text_features = F.normalize(self.text(text).float(), dim=-1)
        return image_features, text_features, self.logit_scale.exp()


def sincos_positions(width, grid):
    """[1, 1+grid*grid, width] (arXiv:2111.06377): half the channels from column, half from row; class token zero."""
    frequencies = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies                                    # [grid, width/4]
    side = torch.cat((angles.sin(), angles.cos()), dim=1)                                 # [grid, width/2]
    table = torch.cat((side.repeat(grid, 1), side.repeat_interleave(grid, 0)), dim=1)     # [N, width]
    return torch.cat((torch.zeros(1, width), table))[None]


@torch.no_grad()
def init_weights(model, seed=0, gain=0):
    """First values of a ViT or a CLIP on the CPU, a function of the seed; returns the model.
    gain: a ViT's standard deviation times the root of its width, before it is cut; 0 takes EVA's, or EVA-02's
    in pre-training with SwiGLU. Small ViTs of EVA learn positions from sin-cos ones on, which is not in the paper."""
    generator = torch.Generator().manual_seed(seed)
    is_clip = isinstance(model, CLIP)
    towers = [part for part in model.modules() if isinstance(part, (ViT, TextTower))]
    for tower in towers:
        config = tower.config
        width = config.width
        has_sincos = isinstance(tower, ViT) and width <= SMALL and width % 4 == 0
        if config.act == 'swiglu' and not (config.pool or gain or is_clip):
            init_eva02(tower, generator)
            continue

        # standard deviations: EVA's .015 for g and .02 else are .56 / sqrt(width), which small ones follow
        std = .015 if width == SIZES['g']['width'] else .02
        if gain or width <= SMALL:
            std = (gain or .56) * width ** -.5
        table = {'': std}

        # OpenAI's for both towers, by the first part that fits the name
        if is_clip:
            pixels = 3 * getattr(config, 'patch_size', 1) ** 2    # 48 in a patch give .08, torch's default
            ends = (2 * config.depth * width) ** -.5
            table = {'token_embed': .02, 'pos_embed': .01, 'patch_embed': (3 * pixels) ** -.5,
                     'attn.proj': ends, 'mlp.fc2': ends, 'mlp.fc1': (2 * width) ** -.5, '': width ** -.5}

        for name, weight in tower.named_parameters():
            std = next(std for part, std in table.items() if part in name)
            if 'gamma' in name:
                weight.fill_(config.layer_scale)
            elif weight.ndim == 1 or 'rel_pos' in name:
                weight.fill_(name.endswith('weight'))    # norms 1, biases 0
            elif name == 'pos_embed' and has_sincos:
                weight.copy_(repeat_positions(sincos_positions(width, tower.grid), 1, config.frames))
            elif is_clip:
                weight.normal_(0, std, generator=generator)
            else:
                # EVA's are smaller where a branch ends, by the depth
                if 'attn.proj' in name or 'mlp.fc2' in name:
                    layer = int(name.split('.')[1]) + 1
                    std = std / (2 * layer) ** .5

                cut_normal(weight, std, generator)
    if is_clip:
        model.logit_scale.fill_(math.log(1 / 0.07))
    return model


def cut_normal(weight, std, generator):
    """A normal cut at one std, so that .0081 comes out of .015: erf(1 / sqrt(2)) = .683."""
    weight.uniform_(-0.6826895, 0.6826895, generator=generator)
    weight.erfinv_().mul_(2 ** .5 * std)


def init_eva02(vit, generator):
    """EVA-02's first values for pre-training: Xavier's, which do not fall with the depth. With a norm in the MLP
    q, k, v and both halves of fc1 are matrices of their own, and some grow with the depth."""
    gain = math.log(2 * vit.config.depth) ** .5 if vit.config.mlp_norm else 1
    for name, weight in vit.named_parameters():
        if name.startswith('patch_embed'):
            fan_in = vit.patch_embed.weight[0].numel()
            bound = fan_in ** -.5                          # a convolution's bias, not zero in EVA-02
            if weight.ndim > 1:
                bound = (6 / (fan_in + len(weight))) ** .5
            weight.uniform_(-bound, bound, generator=generator)
        elif 'gamma' in name:
            weight.fill_(vit.config.layer_scale)
        elif weight.ndim == 1:
            weight.fill_(name.endswith('weight'))          # norms 1, biases 0
        elif weight.ndim == 3:
            cut_normal(weight, .02, generator)             # tokens and positions
        else:
            num = dict(qkv=3, fc1=2).get(name.split('.')[-2], 1) if vit.config.mlp_norm else 1
            pieces = weight.chunk(num)
            for piece in pieces:
                piece.normal_(0, (2 / sum(piece.shape)) ** .5, generator=generator)
            if 'attn.qkv' in name:
                pieces[-1].mul_(gain)                      # of the values; of a fused matrix gain is 1
            elif 'attn.proj' in name or 'mlp' in name:
                weight.mul_(gain)


# What a released tensor is called here, a line each: its name, our name, and what is done to it. A * is a part of a
# name without dots, ** any. Several names on a side hold the rows of one tensor in turn: 'concat' joins theirs,
# 'split' cuts them, where '-' is the key bias. 'squeeze': theirs lacks dimensions of 1. `save` reads tables backwards.

def same(*names):
    return [(name, name, 'same') for name in names]


def under(theirs, ours, rules):
    """The rules of a tower for a model that holds it under a prefix."""
    def prefixed(prefix, names):
        return ' '.join(name if name == '-' else prefix + name for name in names.split())
    return [(prefixed(theirs, left), prefixed(ours, right), op) for left, right, op in rules]


EVA = [('cls_token', 'class_token', 'same'), ('patch_embed.proj.*', 'patch_embed.*', 'same'),
       *same('pos_embed', 'blocks.*.norm1.*', 'blocks.*.norm2.*', 'blocks.*.attn.proj.*')]
EVA_BIASES = same('mask_token', 'blocks.*.attn.q_bias', 'blocks.*.attn.v_bias')
EVA_QKV = EVA_BIASES + same('blocks.*.attn.qkv.weight')
GELU_MLP = same('blocks.*.mlp.fc1.*', 'blocks.*.mlp.fc2.*', 'blocks.*.gamma_1', 'blocks.*.gamma_2')
EVA01 = EVA + EVA_QKV + GELU_MLP

QKV = same('blocks.*.attn.qkv.weight') + [
    ('blocks.*.attn.qkv.bias', 'blocks.*.attn.q_bias - blocks.*.attn.v_bias', 'split')]
EVA_L = EVA + GELU_MLP + QKV + [('mask_token', '-', 'drop'), ('decoder_**', '-', 'drop')]

THREE_PROJECTIONS = [('blocks.*.attn.q_proj.weight blocks.*.attn.k_proj.weight blocks.*.attn.v_proj.weight',
                      'blocks.*.attn.qkv.weight', 'concat')]
ROTARY_TABLES = [('rope.*', '-', 'drop'), ('blocks.*.attn.rope.*', '-', 'drop')]
EVA02 = EVA + EVA_BIASES + THREE_PROJECTIONS + ROTARY_TABLES + under('blocks.*.', 'blocks.*.', [
    ('attn.inner_attn_ln.*', 'attn.norm.*', 'same'), ('mlp.w1.* mlp.w2.*', 'mlp.fc1.*', 'concat'),
    ('mlp.ffn_ln.*', 'mlp.norm.*', 'same'), ('mlp.w3.*', 'mlp.fc2.*', 'same')])
EVA02_SMALL = EVA + EVA_QKV + ROTARY_TABLES + under('blocks.*.mlp.', 'blocks.*.mlp.', [
    ('w12.*', 'fc1.*', 'same'), ('w3.*', 'fc2.*', 'same')])
EVA02_TIMM = EVA + THREE_PROJECTIONS + under('blocks.*.', 'blocks.*.', [
    *same('attn.norm.*', 'mlp.norm.*', 'mlp.fc2.*'), ('attn.q_proj.bias', 'attn.q_bias', 'same'),
    ('attn.v_proj.bias', 'attn.v_bias', 'same'), ('mlp.fc1_g.* mlp.fc1_x.*', 'mlp.fc1.*', 'concat')])

# DINOv3 and DINOv2 under their own and timm's names
DINO = EVA + QKV + EVA_BIASES + GELU_MLP + same('norm.*') + under('blocks.*.', 'blocks.*.', [
    ('attn.qkv.bias_mask', '-', 'drop'), ('ls*.gamma', 'gamma_*', 'same'), ('mlp.w12.*', 'mlp.fc1.*', 'same'),
    ('mlp.w1.* mlp.w2.*', 'mlp.fc1.*', 'concat'), ('mlp.fc1_g.* mlp.fc1_x.*', 'mlp.fc1.*', 'concat'),
    ('mlp.w3.*', 'mlp.fc2.*', 'same')]) + [
    (name, 'registers', 'same') for name in ('storage_tokens', 'register_tokens', 'reg_token')] + [
    ('rope_embed.periods', 'periods', 'same'), ('local_cls_norm.*', '-', 'drop')]
HF_DINO_BLOCKS = [
    ('attention.q_proj.weight attention.k_proj.weight attention.v_proj.weight', 'attn.qkv.weight', 'concat'),
    ('attention.q_proj.bias', 'attn.q_bias', 'same'), ('attention.v_proj.bias', 'attn.v_bias', 'same'),
    ('attention.o_proj.*', 'attn.proj.*', 'same'),
    ('attention.attention.query.weight attention.attention.key.weight attention.attention.value.weight',
     'attn.qkv.weight', 'concat'),
    ('attention.attention.query.bias attention.attention.key.bias attention.attention.value.bias',
     'attn.q_bias - attn.v_bias', 'split'),
    ('attention.output.dense.*', 'attn.proj.*', 'same'), ('layer_scale*.lambda1', 'gamma_*', 'same'),
    ('mlp.gate_proj.* mlp.up_proj.*', 'mlp.fc1.*', 'concat'), ('mlp.up_proj.*', 'mlp.fc1.*', 'same'),
    ('mlp.down_proj.*', 'mlp.fc2.*', 'same'), ('mlp.weights_in.*', 'mlp.fc1.*', 'same'),
    ('mlp.weights_out.*', 'mlp.fc2.*', 'same'), *same('norm*.*', 'mlp.fc*.*')]
HF_DINO = under('embeddings.', '', [
    ('cls_token', 'class_token', 'same'), ('register_tokens', 'registers', 'same'), *same('mask_token'),
    ('position_embeddings', 'pos_embed', 'same'), ('patch_embeddings.projection.*', 'patch_embed.*', 'same'),
    ('patch_embeddings.*', 'patch_embed.*', 'same')]) + [*same('norm.*'), ('layernorm.*', 'norm.*', 'same')]
HF_DINO += under('layer.*.', 'blocks.*.', HF_DINO_BLOCKS) + under('encoder.layer.*.', 'blocks.*.', HF_DINO_BLOCKS)

OPENAI_BLOCKS = under('transformer.resblocks.*.', 'blocks.*.', [
    ('attn.in_proj_weight', 'attn.qkv.weight', 'same'),
    ('attn.in_proj_bias', 'attn.q_bias - attn.v_bias', 'split'),
    ('attn.out_proj.*', 'attn.proj.*', 'same'), ('ln_*.*', 'norm*.*', 'same'),
    ('mlp.c_fc.*', 'mlp.fc1.*', 'same'), ('mlp.c_proj.*', 'mlp.fc2.*', 'same')])
OPENAI_VISION = OPENAI_BLOCKS + [
    ('class_embedding', 'class_token', 'squeeze'), ('positional_embedding', 'pos_embed', 'squeeze'),
    ('conv1.weight', 'patch_embed.weight', 'same'), ('ln_pre.*', 'pre_norm.*', 'same'),
    ('ln_post.*', 'norm.*', 'same'), ('proj', 'head.weight', 'transpose')]
OPENAI_TEXT = OPENAI_BLOCKS + [
    ('token_embedding.weight', 'token_embed.weight', 'same'), ('positional_embedding', 'pos_embed', 'squeeze'),
    ('ln_final.*', 'norm.*', 'same'), ('text_projection', 'head.weight', 'transpose')]
LOGIT_SCALE = [('logit_scale', 'logit_scale', 'squeeze')]
OPENCLIP = under('visual.', 'visual.', OPENAI_VISION) + under('text.', 'text.', OPENAI_TEXT) + LOGIT_SCALE
OPENAI_CLIP = under('visual.', 'visual.', OPENAI_VISION) + under('', 'text.', OPENAI_TEXT) + LOGIT_SCALE + [
    (name, '-', 'drop') for name in ('input_resolution', 'context_length', 'vocab_size')]

HF_BLOCKS = under('encoder.layers.*.', 'blocks.*.', [
    ('self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight', 'attn.qkv.weight', 'concat'),
    ('self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias', 'attn.q_bias - attn.v_bias', 'split'),
    ('self_attn.out_proj.*', 'attn.proj.*', 'same'), ('layer_norm*.*', 'norm*.*', 'same'),
    ('mlp.*.*', 'mlp.*.*', 'same')])
HF_BLOCKS += under('embeddings.', '', [
    ('position_embedding.weight', 'pos_embed', 'squeeze'), ('position_ids', '-', 'drop')])
HF_VISION = HF_BLOCKS + under('embeddings.', '', [
    ('class_embedding', 'class_token', 'squeeze'), ('patch_embedding.weight', 'patch_embed.weight', 'same')]) + [
    ('pre_layrnorm.*', 'pre_norm.*', 'same'), ('post_layernorm.*', 'norm.*', 'same')]
HF_TEXT = HF_BLOCKS + [
    ('embeddings.token_embedding.weight', 'token_embed.weight', 'same'), ('final_layer_norm.*', 'norm.*', 'same')]
HF_CLIP = under('vision_model.', 'visual.', HF_VISION) + under('text_model.', 'text.', HF_TEXT) + LOGIT_SCALE + [
    (f'{tower}_projection.weight', f'{tower}.head.weight', 'same') for tower in ('visual', 'text')]

# of SigLIP and PE the image tower, without what pools its tokens
SIGLIP = HF_VISION + [('embeddings.patch_embedding.bias', 'patch_embed.bias', 'same'), ('head.**', '-', 'drop')]
SIGLIP_TIMM = EVA + QKV + GELU_MLP + same('norm.*') + [('attn_pool.**', '-', 'drop')]
SIGLIP_TEXT = [(name, '-', 'drop') for name in ('text_model.**', 'text.**', 'logit_scale', 'logit_bias')]
PE_BIASES = 'blocks.*.attn.q_bias blocks.*.attn.k_bias blocks.*.attn.v_bias'
PE = [('transformer.resblocks.*.attn.in_proj_bias', PE_BIASES, 'split'),
      ('transformer.resblocks.*.ls_*.gamma', 'blocks.*.gamma_*', 'same'),
      ('attn_pool.**', '-', 'drop'), ('proj', '-', 'drop')] + OPENAI_VISION
PE_TIMM = EVA + GELU_MLP + same('norm.*', 'blocks.*.attn.qkv.weight') + [
    ('blocks.*.attn.qkv.bias', PE_BIASES, 'split'), ('norm_pre.*', 'pre_norm.*', 'same'),
    ('attn_pool.**', '-', 'drop'), ('head.*', '-', 'drop')]
PE_TEXT = [(name, '-', 'drop') for name in ('transformer.**', 'token_embedding.weight', 'positional_embedding',
                                            'ln_final.*', 'text_projection', 'logit_scale')]

EVA_ENDS = {  # what EVA's ViTs end with: a tensor that tells, the pooling, its rules
    'MIM':                     ('lm_head.weight', None, same('norm.*') + [('lm_head.*', 'head.*', 'same')]),
    'classifier, mean patch':  ('fc_norm.weight', 'mean', [('fc_norm.*', 'norm.*', 'same')] + same('head.*')),
    'classifier, class token': ('head.weight', 'class', same('norm.*', 'head.*')),
    'encoder':                 ('norm.weight', None, same('norm.*')),
}


def eva_families(name, mark, rules):
    """The ViTs of one of EVA's generations, which the tensor `mark` tells, and the CLIP that has one."""
    clip = under('visual.', 'visual.', rules + same('norm.*', 'head.*')) + under('text.', 'text.', OPENAI_TEXT)
    clip += LOGIT_SCALE + [('text.logit_scale', 'logit_scale', 'squeeze')]       # the first package's
    families = {f'{name} CLIP': (('visual.' + mark, 'text.ln_final.weight'), clip, {})}
    for end, (end_mark, pool, end_rules) in EVA_ENDS.items():
        families[f'{name} {end}'] = ((mark, end_mark), rules + end_rules, dict(pool=pool))
    return families


HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16}       # by width, where they are not 64 wide
QUICK = dict(act='quick_gelu', eps=1e-5)
DINOV3_OPTIONS = dict(IMAGENET, pool=None, heads={4096: 32}, eps=1e-5, rope='unit', pos_embed=False)
DINOV2_OPTIONS = dict(IMAGENET, pool=None, heads={}, rope=None, resize='offset')
SIGLIP_OPTIONS = dict(HALF, pool=None, heads={1152: 16, 1536: 16}, act='gelu_tanh')
PE_OPTIONS = dict(HALF, pool=None, heads={1536: 16}, eps=1e-5, rope='columns', resize='bilinear')
FAMILIES = {  # a family's files are the first to have these tensors; its table; what its tensors do not show
    'DINOv3 of satellite images': (
        ('local_cls_norm.weight', 'blocks.0.attn.qkv.bias', 'blocks.0.ls1.gamma'), DINO,
        dict(DINOV3_OPTIONS, mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))),
    'DINOv3': (('rope_embed.periods', 'blocks.0.ls1.gamma'), DINO, DINOV3_OPTIONS),
    'DINOv3 timm': (('reg_token', 'blocks.0.gamma_1'), DINO, DINOV3_OPTIONS),
    'Hugging Face DINOv3': (('layer.0.layer_scale1.lambda1',), HF_DINO, DINOV3_OPTIONS),
    'DINOv2': (('pos_embed', 'blocks.0.ls1.gamma'), DINO, DINOV2_OPTIONS),
    'Hugging Face DINOv2': (('encoder.layer.0.layer_scale1.lambda1',), HF_DINO, DINOV2_OPTIONS),
    'SigLIP': (('vision_model.embeddings.patch_embedding.bias',),
               under('vision_model.', '', SIGLIP) + SIGLIP_TEXT, SIGLIP_OPTIONS),
    'SigLIP, vision tower': (('embeddings.patch_embedding.bias',), SIGLIP, SIGLIP_OPTIONS),
    'PE-Core timm': (('visual.norm_pre.weight', 'visual.attn_pool.latent'),
                     under('visual.', '', PE_TIMM) + SIGLIP_TEXT + PE_TEXT, PE_OPTIONS),
    'PE-Core timm, vision tower': (('norm_pre.weight', 'attn_pool.latent'), PE_TIMM, PE_OPTIONS),
    'SigLIP timm': (('visual.attn_pool.latent',), under('visual.', '', SIGLIP_TIMM) + SIGLIP_TEXT, SIGLIP_OPTIONS),
    'SigLIP timm, vision tower': (('attn_pool.latent', 'blocks.0.attn.qkv.bias'), SIGLIP_TIMM, SIGLIP_OPTIONS),
    'PE-Core': (('visual.attn_pool.probe',), under('visual.', '', PE) + PE_TEXT, PE_OPTIONS),
    'PE-Core, vision tower': (('attn_pool.probe',), PE, PE_OPTIONS),
    'OpenAI CLIP': (('visual.class_embedding', 'ln_final.weight'), OPENAI_CLIP, QUICK),
    'OpenCLIP, custom text': (('visual.class_embedding', 'text.ln_final.weight'), OPENCLIP, dict(eps=1e-5)),
    'Hugging Face CLIP': (('vision_model.pre_layrnorm.weight', 'visual_projection.weight'), HF_CLIP, QUICK),
    'OpenAI CLIP, vision tower': (('class_embedding', 'ln_post.weight'), OPENAI_VISION, QUICK),
    'PE-Spatial or PE-Lang': (('ln_pre.weight', 'conv1.weight'), PE, dict(PE_OPTIONS, last_norm=False)),
    **eva_families('EVA-02', 'blocks.0.mlp.w1.weight', EVA02),
    **eva_families('EVA-02 small', 'blocks.0.mlp.w12.weight', EVA02_SMALL),
    **eva_families('EVA-02 timm', 'blocks.0.mlp.fc1_g.weight', EVA02_TIMM),
    **eva_families('EVA-L', 'blocks.0.attn.qkv.bias', EVA_L),
    **eva_families('EVA-01', 'blocks.0.attn.q_bias', EVA01),
}


@functools.lru_cache(maxsize=None)
def expression(pattern):
    """The regular expression of a pattern in the tables."""
    return re.compile(re.escape(pattern).replace(r'\*\*', '(.+)').replace(r'\*', '([^.]+)'))


def rename(name, pattern, target):
    """name in the target's form, or None where the pattern does not fit."""
    match = expression(pattern).fullmatch(name)
    return match and target.replace('**', '*').replace('*', '{}').format(*match.groups())


def original_name(name, rules):
    """What a released file calls our tensor; None where it has no place for it."""
    for theirs, ours, _ in rules:
        for pattern in ours.split():
            if rename(name, pattern, '') is not None:
                return rename(name, pattern, theirs.split()[0])


def translate(state, rules):
    """Released tensors under our names; key biases under theirs; the names of what else is dropped.
    Tensors that no rule names keep theirs."""
    left = dict(state)
    ours, key_biases, dropped = {}, {}, []
    for patterns, targets, op in rules:
        patterns = patterns.split()
        targets = targets.split()
        for first in [name for name in left if rename(name, patterns[0], '') is not None]:
            # the rows of all names on the left, zeros for a key bias
            names = [rename(first, patterns[0], pattern) for pattern in patterns]
            pieces = []
            for name in names:
                if name not in left and name != '-':
                    raise Refused(f'weights do not fit the model: missing {name}')
                pieces.append(torch.zeros_like(pieces[0]) if name == '-' else left.pop(name))
            if len({piece.shape for piece in pieces}) > 1:
                raise Refused(f'weights do not fit the model: {", ".join(names)} differ in shape')
            dimensions = dict(concat=(1, 2), split=(1, 2), transpose=(2,)).get(op)
            if dimensions and pieces[0].ndim not in dimensions:
                raise Refused(f'weights do not fit the model: {first} has {pieces[0].ndim} dimensions')
            tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            if op == 'transpose':
                tensor = tensor.T
            if op == 'squeeze':
                tensor = tensor.squeeze()

            # cut for the names on the right
            pieces = [piece.clone() for piece in tensor.chunk(len(targets))] if len(targets) > 1 else [tensor]
            for target, piece in zip(targets, pieces):
                if op == 'drop':
                    dropped.append(first)
                elif target == '-':
                    key_biases[first] = piece
                else:
                    ours[rename(first, patterns[0], target)] = piece.contiguous()
    return {**ours, **left}, key_biases, dropped


def translate_back(state, rules):
    """Our tensors under a family's names; those that it has no place for keep ours."""
    return translate(state, [(ours, theirs, op) for theirs, ours, op in rules if op != 'drop'])[0]


def family_of(state):
    """The name of the first family whose marks the tensors' names have."""
    for family, (marks, _, _) in FAMILIES.items():
        if state.keys() >= set(marks):
            return family
    some = ', '.join(list(state)[:3]) or 'none'
    has_words = any(re.search('token_embed|word_embed', name) for name in state)
    if has_words and not any(name.startswith('vis') for name in state):
        raise Refused(f'a text tower ({some}, ...); give the file of an image tower, or of both')
    raise Refused(f'tensors of no known model ({some}, ...); known are nanoEVA, OpenAI CLIP, OpenCLIP, Hugging Face '
                  'CLIP, EVA-01, EVA-L, EVA-02 and their CLIPs, DINOv2, DINOv3, SigLIP, SigLIP 2, PE')


def count_layers(state, prefix=''):
    layers = [int(name[len(prefix):].split('.')[1]) for name in state if name.startswith(prefix + 'blocks.')]
    return 1 + max(layers, default=-1)


def vit_config(state, prefix='', pool='class', heads=HEADS, **options):
    """The options that a ViT's tensors under our names show, and two that they do not: heads are 64 wide but at the
    widths in heads; EVA-02-CLIP-E, whose MLP is the widest, has its norms after its branches. options: the rest."""
    shapes = {name[len(prefix):]: tensor.shape for name, tensor in state.items() if name.startswith(prefix)}
    width = shapes['patch_embed.weight'][0]
    mlp_width = shapes['blocks.0.mlp.fc2.weight'][1]
    patch_size = shapes['patch_embed.weight'][-1]
    head = shapes.get('head.weight', (0,))[0]
    registers = shapes.get('registers', (0, 0))[-2]

    # a table of a square number of rows has none for a class token; 224 pixels where there is no table
    has_table = options.get('pos_embed', True)
    rows = shapes['pos_embed'][-2] if has_table else 1 + (224 // patch_size) ** 2
    side = math.isqrt(rows)
    biases = 'qv' if 'blocks.0.attn.q_bias' in shapes else ''
    if 'blocks.0.attn.k_bias' in shapes:
        biases = 'qkv'

    # rows count 0, 1, 2 in MIM and are stretched to 16 elsewhere
    act = 'gelu'
    rope = None
    if shapes['blocks.0.mlp.fc1.weight'][0] == 2 * mlp_width:
        act = 'swiglu'
        rope = 16 if pool else 'index'
    shown = dict(
        width=width, depth=count_layers(shapes), heads=heads.get(width, max(1, width // 64)), mlp_width=mlp_width,
        patch_size=patch_size, image_size=patch_size * side, pool=pool, act=act, rope=rope,
        head=head, head_bias='head.bias' in shapes or not head, post_norm=mlp_width > 8 * width,
        mask_token='mask_token' in shapes, layer_scale=1. if 'blocks.0.gamma_1' in shapes else None,
        patch_bias='patch_embed.bias' in shapes, pre_norm='pre_norm.weight' in shapes, biases=biases,
        attn_norm='blocks.0.attn.norm.weight' in shapes, mlp_norm='blocks.0.mlp.norm.weight' in shapes,
        class_token='class_token' in shapes or rows != side ** 2, registers=registers)
    return {**shown, **options}


def fit_positions(config, ours, periods):
    """Makes what a released ViT knows of positions ours: its table, how it is resized, its rotary periods."""
    # a row for the class token: there is none, or timm has added it to the token, in files with registers
    table = ours.get('pos_embed')
    if table is not None and math.isqrt(table.shape[-2]) ** 2 == table.shape[-2]:
        if config['registers'] or not config['class_token']:
            ours['pos_embed'] = F.pad(table, (0, 0, 1, 0))
    if config.get('resize') == 'offset' and config['registers']:
        config['resize'] = 'antialias'

    # DINOv3's are rounded to bfloat16 in its own files; Hugging Face and timm compute them anew
    if periods is not None:
        config['heads'] = config['width'] // (4 * len(periods))
        if not periods.is_meta:
            config['periods'] = periods.float().tolist()


def read_family(state, changes):
    """The config and our names of a released file's tensors, and its rules; says what of it is left out."""
    family = family_of(state)
    _, rules, options = FAMILIES[family]
    ours, key_biases, dropped = translate(state, rules)
    periods = ours.pop('periods', None)
    try:
        if LOGIT_SCALE[0] in rules:
            vocab, width = ours['text.token_embed.weight'].shape
            text = dict(width=width, depth=count_layers(ours, 'text.'), heads=max(1, width // 64), vocab=vocab,
                        embed=len(ours['text.head.weight']), context=ours['text.pos_embed'].shape[-2],
                        act=options.get('act', 'gelu'))
            vision = vit_config(ours, 'visual.', **options)
            config = dict(vision=vision, text=text)
        else:
            config = vision = vit_config(ours, **options)
            fit_positions(vision, ours, periods)
    except KeyError as error:
        original = original_name(error.args[0], rules) or original_name('visual.' + error.args[0], rules)
        raise Refused(f'weights of {family} miss {original}') from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError):
        raise Refused(f'weights of {family} lack a dimension') from None
    is_masked = any(name + '_mask' in dropped for name in key_biases)       # by DINOv3
    for name, bias in key_biases.items():
        if vision['rope'] and not is_masked and not name.startswith('text.') and bias.any():
            raise Refused(f'{name} has key biases; under rotary positions they matter, this ViT has none')

    notes = [f'{family} weights']
    is_told = 'act' in changes.get('vision', changes) or 'input_resolution' in state     # OpenAI's own
    if options.get('act') == 'quick_gelu' and not is_told:
        notes.append("QuickGELU supposed, OpenAI's; LAION's need vision=dict(act='gelu'), text=dict(act='gelu')")
    if key_biases:
        notes.append(f'{len(key_biases)} key biases dropped, which {"a mask" if is_masked else "softmax"} cancels')
    if dropped:
        notes.append(f'{len(dropped)} tensors dropped, of which {dropped[0]}')
    if os.environ.get('RANK', '0') == '0':
        print('; '.join(notes), flush=True)
    return config, ours, rules


def told_activations(path):
    """{tower: activation} of a CLIP in Hugging Face's names, whose tensors do not show it: what the config.json beside
    its file says; {} if there is none."""
    beside = os.path.join(os.path.dirname(path), 'config.json')
    if not os.path.exists(beside):
        return {}
    try:
        with open(beside, encoding='utf-8') as file:
            about = json.load(file)
    except (OSError, ValueError, RecursionError):
        raise Refused(f'{beside} is not JSON') from None

    found = {}
    for tower in ('vision', 'text'):
        part = about.get(f'{tower}_config') if isinstance(about, dict) else None
        if not isinstance(part, dict):
            raise Refused(f'{beside} has no {tower}_config; give the config.json of {path}')
        found[tower] = part.get('hidden_act', 'quick_gelu')     # left out where it is the default
        if found[tower] not in ('gelu', 'quick_gelu'):
            raise Refused(f'{beside} has hidden_act {str(found[tower])[:40]!r} in {tower}_config; '
                          'expected gelu or quick_gelu')
    return found


def with_activations(path, kind, changes):
    """changes, and of a CLIP in Hugging Face's names the activations that the config.json beside its file tells."""
    found = told_activations(path)
    if found and kind is ViT:
        return dict(act=found['vision']) | changes
    towers = {tower: dict(act=act) | changes.get(tower, {}) for tower, act in found.items()}
    return changes | towers


def load(path, kind=None, **changes):
    """A model in eval mode, recognised by what the file holds; `.extra` is what `save` was given beside it.
    kind: None, a ViT or a CLIP; ViT, also a CLIP's image tower; CLIP; or a class, for other files with from_released.
    changes to the config, a CLIP's by tower: vision=dict(...), text=dict(...). Positions and patches are
    resized; a head of another shape starts afresh, as does any where the pooling changes."""
    held = read(path)
    size = os.path.getsize(path)
    is_ours = held.get('format') == 'nanoEVA'
    try:
        if is_ours:
            check_parts(held)
            state, extra = held['state_dict'], held['extra']
        else:
            state, extra = unwrap(held), {}
        check_tensors(state, size)

        # the model, and what was saved beside it
        if not is_ours and state.keys() >= set(FAMILIES['Hugging Face CLIP'][0]):
            changes = with_activations(path, kind, changes)
        if is_ours or kind in (None, ViT, CLIP):
            model = build(held, kind, changes)
        else:
            model = kind.from_released(state)
        check_finite(model)
        if extra:
            check_extra(extra, held['config'], size)
    except Refused as error:
        raise Refused(f'{path}: {first_line(error)[:500]}') from None
    model.extra = extra
    return model.eval()


def build(held, kind, changes):
    """The model of what a file holds: first as it is there, strictly, then as it is asked for."""
    if held.get('format') == 'nanoEVA':
        name, config, state, rules = held['name'], held['config'], held['state_dict'], ()
    else:
        config, state, rules = read_family(unwrap(held), changes)
        name = 'CLIP' if 'vision' in config else 'ViT'
    expected = ['ViT', 'CLIP'] if kind in (None, ViT) else [kind.__name__]
    if name not in expected:
        raise Refused(f'this is a {name}, expected a {" or a ".join(expected)}')

    model = on_meta({'ViT': ViT, 'CLIP': CLIP}.get(name, kind), config)
    state = fitting(model, state, rules)
    if kind is ViT and name == 'CLIP':
        model = model.visual
        state = {name.removeprefix('visual.'): x for name, x in state.items() if name.startswith('visual.')}
    if changes:
        model, state = changed(model, state, changes)
    fill(model, state)
    return model


def on_meta(Class, config):
    """A model without values: no time is spent on those that will be replaced."""
    try:
        config = Class.Config(**config)
        check_config(config)
        with torch.device('meta'):
            return Class(config)
    except Exception as error:      # a file's config may hold anything
        raise Refused(f'this config makes no {Class.__name__}: {first_line(error)}') from None


def changed(model, state, changes):
    """A model on the meta device with a changed config, and its tensors."""
    config = asdict(model.config)
    for name, value in changes.items():
        if name not in config:
            by_tower = f'; a CLIP is changed by tower, vision=dict({name}=...)' if isinstance(model, CLIP) else ''
            raise Refused(f'a {type(model).__name__} has no {name}{by_tower}')
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    if config.get('rope') == 'index' and config['frames'] == 1 and config['pool'] and 'rope' not in changes:
        config['rope'] = model.grid     # after pre-training EVA-02 stretches other grids to that of pre-training
    other = on_meta(type(model), config)
    prefix = 'visual.' if isinstance(model, CLIP) else ''
    before = getattr(model, 'visual', model).config
    after = getattr(other, 'visual', other).config

    positions = prefix + 'pos_embed'
    kernel = prefix + 'patch_embed.weight'
    if before.frames == 1 and before.pos_embed:
        grid = check_grid(after.image_size, after.image_size, after.patch_size)
        state[positions] = resize_positions(state[positions], grid, after.align_corners, after.resize)
    if before.frames != after.frames:
        state[positions] = repeat_positions(state[positions], before.frames, after.frames)
    if before.patch_size != after.patch_size:
        state[kernel] = resize_patches(state[kernel], after.patch_size)

    # another pooling gives the head another meaning; EVA's norm of the mean is another one
    if before.pool != after.pool:
        gone = ('head.', 'norm.') if after.pool == 'mean' else 'head.'
        state = {name: x for name, x in state.items() if not name.removeprefix(prefix).startswith(gone)}

    # these start afresh where they do not fit; on the meta device, where all others are, that costs nothing
    own = other.state_dict()
    optional = re.compile(prefix + r'(class_token|registers|mask_token|norm\.|head\.|.*\.rel_pos_|.*\.attn\.norm\.)')
    unfit = [name for name, x in state.items() if name not in own or own[name].shape != x.shape]
    state = {name: x for name, x in state.items() if name not in unfit or not optional.match(name)}
    fresh = {name: torch.empty(x.shape) for name, x in own.items() if optional.match(name) and name not in state}
    other.load_state_dict(fresh, strict=False, assign=True)
    values = init_weights(other).state_dict()
    return other, {**state, **{name: values[name] for name in fresh}}


def fitting(model, state, rules=()):
    """The tensors in the model's shapes, of which released ones may lack dimensions of 1, in float32.
    A missing, extra or wrong-shape one is refused by its name in the file."""
    own = model.state_dict()
    fitted = {}
    storages = set()
    wrong = [f'unexpected {name}' for name in state if name not in own]
    for name, tensor in own.items():
        given = state.get(name)
        original = original_name(name, rules) or name
        if given is None:
            wrong.append(f'missing {original}')
        elif [n for n in given.shape if n != 1] != [n for n in tensor.shape if n != 1]:
            wrong.append(f'{original} of shape {list(given.shape)} instead of {list(tensor.shape)}')
        elif not given.is_floating_point():
            wrong.append(f'{original} of {given.dtype} instead of floats')
        else:
            given = given.detach().reshape(tensor.shape).float().contiguous()

            # what two names share would be trained as one
            storage = given.untyped_storage().data_ptr()
            fitted[name] = given.clone() if storage in storages else given
            storages.add(storage)
    if wrong:
        raise Refused('weights do not fit the model: ' + '; '.join(wrong[:5]))
    return fitted


def check_parts(held):
    """Refuses a file of ours that lacks a part, or has something else in its place."""
    for part, kind in dict(name=str, config=dict, state_dict=dict, extra=dict).items():
        if part not in held:
            raise Refused(f'it has no {part}, as `save` writes it')
        if not isinstance(held[part], kind):
            raise Refused(f'its {part} is a {type(held[part]).__name__}, expected a {kind.__name__}')


def check_tensors(state, size):
    """Refuses what is no plain tensor, as sparse, quantised and meta ones, or larger than its file of size bytes."""
    for name, x in state.items():
        if not isinstance(name, str):
            raise Refused(f'a name in it is a {type(name).__name__}, expected strings')
        if type(x) not in (torch.Tensor, nn.Parameter):
            raise Refused(f'{name} is a {type(x).__name__}, expected a tensor')
        if x.layout != torch.strided or x.device.type != 'cpu' or x.dtype not in SAFETENSORS.values():
            raise Refused(f'{name} is a {x.layout} tensor of {x.dtype} on {x.device}, expected plain numbers')
        if x.nbytes > size:
            raise Refused(f'{name} of shape {list(x.shape)} is larger than the file')


def check_finite(model):
    """Refuses weights that are NaN or infinite."""
    for name, x in model.state_dict().items():
        if x.sum().isfinite():          # one pass without a copy; then they are counted
            continue
        num = (~x.isfinite()).sum().item()
        if num:
            raise Refused(f'{num} of {x.numel()} values of {name} are NaN or infinite; use an earlier file')


def check_extra(extra, config, size):
    """Refuses what a stage cannot have given to `save`, in a file of size bytes, beside a model of this config."""
    for name in ('merges', 'classes'):
        texts = extra.get(name, [])
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise Refused(f'its {name} are no list of strings')
    outputs = config.get('num_classes', config.get('head', 0))
    if 'classes' in extra and len(extra['classes']) != outputs:
        raise Refused(f'it names {len(extra["classes"])} classes, its head has {outputs}')
    if 'image_size' in extra:
        check_number('image_size', extra['image_size'])

    # what a MIM predicts; codes have their centres [K, C]
    for name, kind in (('target', str), ('target_layer', int), ('teacher', str)):
        value = extra.get(name, kind())
        if type(value) is not kind:
            raise Refused(f'its {name} is a {type(value).__name__}, expected a {kind.__name__}')
    target = extra.get('target', '')
    if target == 'tokens' or 'codebook' in extra:
        codebook = extra.get('codebook')
        check_tensors(dict(codebook=codebook), size)
        if codebook.ndim != 2 or len(codebook) != outputs or not codebook.sum().isfinite():
            raise Refused(f'its codebook is no finite table of {outputs} rows')

    # means and deviations of each teacher's channels [2, C]
    statistics = extra.get('statistics', [])
    if not isinstance(statistics, list):
        raise Refused(f'its statistics are a {type(statistics).__name__}, expected a list')
    check_tensors({f'statistics {n}': table for n, table in enumerate(statistics)}, size)
    for table in statistics:
        if table.ndim != 2 or len(table) != 2 or not table.sum().isfinite():
            raise Refused('its statistics are no finite tables of 2 rows')


def fill(model, state, rules=()):
    """Gives a model on the meta device its tensors, strictly; where they are mapped from a file, they stay."""
    model.load_state_dict(fitting(model, state, rules), assign=True)


def save(model, path, names='ours', **extra):
    """One portable file that `load` reads: class, config, tensors, and plain data such as a vocabulary.
    With names='eva' or 'openai' the tensors alone under their names, for timm, EVA's code, OpenAI's."""
    state = model.state_dict() if names == 'ours' else export(model, names)
    held = state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    if names == 'ours':
        held = dict(format='nanoEVA', name=type(model).__name__, config=asdict(model.config),
                    state_dict=state, extra=extra)
    try:
        torch.save(held, path + '.tmp')
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:     # torch's writer raises RuntimeError when the disk is full
        if os.path.isfile(path + '.tmp'):
            os.remove(path + '.tmp')
        raise Refused(f'{path} cannot be written ({first_line(error)})') from None


def export(model, names):
    """The model's tensors under EVA's or OpenAI's names. Their reader has to know heads, act, eps and rope."""
    is_clip = isinstance(model, CLIP)
    config = model.config.vision if is_clip else model.config
    if names == 'openai':
        family = 'OpenAI CLIP' if is_clip else 'OpenAI CLIP, vision tower'
    elif names == 'eva':
        family = 'EVA-01'
        if config.act == 'swiglu':
            family = 'EVA-02' if config.mlp_norm else 'EVA-02 small'
        ends = {None: 'MIM', 'mean': 'classifier, mean patch', 'class': 'classifier, class token'}
        family += ' CLIP' if is_clip else f' {ends[config.pool]}'
    else:
        raise Refused(f"names {names!r} are not known; use 'ours', 'eva' or 'openai'")

    # nothing hides patches from a classifier or a CLIP
    rules = FAMILIES[family][1]
    state = model.state_dict()
    if config.pool:
        state.pop('visual.mask_token' if is_clip else 'mask_token', None)
    homeless = [name for name in state if not original_name(name, rules)]
    if is_clip and config.pool != 'class':
        homeless.append(f'pool={config.pool!r}')
    if homeless:
        raise Refused(f"{family} has no name for {', '.join(homeless[:3])}; use names='eva' or 'ours'")
    return translate_back(state, rules)


SAFETENSORS = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
               'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8,
               'BOOL': torch.bool}
LONGEST_INDEX = 2 ** 22     # bytes of the JSON or the pickle that says where a file's tensors lie


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes, the length of a JSON header; the header; raw bytes."""
    with open(path, 'rb') as file:      # what is written to the copy stays in memory
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(mapped[:8], 'little')
    if start > LONGEST_INDEX:
        raise ValueError('the header is too long')
    header = json.loads(mapped[8:start])
    header.pop('__metadata__', None)

    # each tensor begins where the one before ends
    state = {}
    end = 0
    for name, about in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
        dtype, count = SAFETENSORS[about['dtype']], math.prod(about['shape'])
        first, last = about['data_offsets']
        if first != end or last != end + count * dtype.itemsize:
            raise ValueError(f'{name} does not lie where the one before ends')
        state[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + first).view(about['shape'])
        end = last
    return state


class Tensors(dict):
    """Stands for a module of a TorchScript archive, whatever its class: its tensors by name, and no code."""

    def __setstate__(self, attributes):
        for name, value in attributes.items():
            if torch.is_tensor(value):
                self[name] = value
            elif isinstance(value, Tensors):
                self.update({f'{name}.{inner}': tensor for inner, tensor in value.items()})
            if len(self) > 2 ** 16:     # modules that hold one twice, which holds one twice, and so on
                raise pickle.UnpicklingError('too many tensors')


class ArchiveUnpickler(pickle.Unpickler):
    """Reads a TorchScript archive's modules: tensors, containers, stand-ins. Nothing of the file is run."""

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(folder + '/data.pkl')))
        self.archive, self.folder, self.storages = archive, folder, {}

    def find_class(self, module, name):
        if module.split('.')[0] == '__torch__':
            return Tensors
        known = {('collections', 'OrderedDict'): dict, ('torch._utils', '_rebuild_tensor_v2'): self.tensor}
        known |= {('torch.jit._pickle', f'build_{kind}list'): list for kind in ('int', 'double', 'bool', 'tensor')}
        for kind in ('Double', 'Float', 'Half', 'BFloat16', 'Long', 'Int'):
            known['torch', f'{kind}Storage'] = getattr(torch, f'{kind}Storage').dtype
        if (module, name) not in known:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return known[module, name]

    def persistent_load(self, name):
        _, dtype, key, *_ = name
        if key not in self.storages:
            data = bytearray(self.archive.read(f'{self.folder}/data/{key}'))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0)
        return self.storages[key]

    @staticmethod
    def tensor(storage, offset, shape, stride, *_):
        return torch.as_strided(storage, shape, stride, offset)      # raises where it would leave the storage


def open_archive(path):
    """The zip that a file is, or None. Nothing but code is compressed in those of torch, and it is short."""
    if not zipfile.is_zipfile(path):
        return None
    archive = zipfile.ZipFile(path)
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    longest = max(entry.file_size for entry in entries if entry.filename.endswith('data.pkl'))
    if total > 4 * os.path.getsize(path) or longest > LONGEST_INDEX:
        raise zipfile.BadZipFile(f'{total} bytes in it')
    return archive


def read(path):
    """What a file holds, a dict mostly of tensors: torch.save's, which stay in the file until they are used,
    a .safetensors file's, or a TorchScript archive's, OpenAI's format."""
    check_file(path)
    try:
        with open(path, 'rb') as file:
            is_safetensors = file.read(9)[8:] == b'{'
        archive = None if is_safetensors else open_archive(path)
        scripted = [name for name in archive.namelist() if name.endswith('/constants.pkl')] if archive else []
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # torch's, of kinds of tensors that are refused anyway
            if is_safetensors:
                held = read_safetensors(path)
            elif scripted:
                held = ArchiveUnpickler(archive, scripted[0].rsplit('/', 1)[0]).load()
            else:
                with torch.serialization.safe_globals([argparse.Namespace]):     # the options in EVA's files
                    held = torch.load(path, map_location='cpu', weights_only=True, mmap=archive is not None)
    except OSError as error:
        raise Refused(f'{path} cannot be read ({error.strerror or error}); give a checkpoint file') from None
    except Exception as error:      # a damaged file may raise anything
        code = re.search(r'GLOBAL ([\w.]+)', str(error))
        if code:
            raise Refused(f'{path} asks for {code[1]}, which is code and no tensor; it was not run') from None
        raise Refused(f'{path} is not a checkpoint of tensors, or not a whole one') from None
    if not isinstance(held, dict):
        raise Refused(f'{path} holds a {type(held).__name__}, expected a dict of tensors')
    return held


def unwrap(held):
    """The tensors of a checkpoint: of the innermost of the usual dicts, without wrappers' prefixes."""
    for wrapper in 8 * ('model', 'module', 'state_dict', 'model_ema'):      # in any order
        if isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    state = {str(name).replace('_orig_mod.', ''): x for name, x in held.items() if torch.is_tensor(x)}
    state = {name.replace('visual.trunk.', 'visual.'): x for name, x in state.items()}      # timm in OpenCLIP
    for prefix in ('module.', 'visual.'):
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix):]: tensor for name, tensor in state.items()}
    return state


def check_file(path, most=2 ** 50):
    """Refuses what is no file of at most so many bytes: a pipe or a device might never end."""
    if not os.path.exists(path):
        raise Refused(f'{path} does not exist')
    if not os.path.isfile(path):
        raise Refused(f'{path} is not a file')
    size = os.path.getsize(path)
    if size > most:
        raise Refused(f'{path} has {size:,} bytes, of which at most {most:,} are read')


def first_line(error):
    """What went wrong; torch.distributed.checkpoint wraps it in an error that only names the process."""
    for error, _ in getattr(error, 'failures', {}).values():
        break
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = ''.join(filter(str.isprintable, text))       # a file's names may command a terminal
    is_full = re.search(r'unexpected pos \d', text)     # torch's words for a disk
    return 'No space left on device' if is_full else text


if __name__ == '__main__':
    try:
        if len(sys.argv) != 2:
            raise Refused('usage: python model.py WEIGHTS')
        model = load(sys.argv[1])
    except Refused as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f'a {type(model).__name__} of {parameters:,} parameters: {model.config}')
    for name, tensor in model.state_dict().items():
        print(f'{name}: {list(tensor.shape)}')
