"""
The models of every stage, and what every run needs once.
In this order: sizes; the ViT; the text tower and CLIP; initial weights; reading and writing weights; the machinery.

    model = init_weights(ViT(**SIZES['nano'], head=64), seed=0)
    model = load('eva.pt')                                 # a ViT or a CLIP in eval mode; model.config rebuilds it
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from tqdm import tqdm

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SIZES = {  # parameters without a head
    'pico':  dict(width=32,   depth=4,  heads=2,  mlp_width=128,  patch_size=4,  image_size=32),   # 54K
    'nano':  dict(width=64,   depth=4,  heads=2,  mlp_width=256,  patch_size=4,  image_size=32),   # 207K
    'micro': dict(width=96,   depth=6,  heads=3,  mlp_width=384,  patch_size=4,  image_size=32),   # 681K
    'mini':  dict(width=128,  depth=8,  heads=4,  mlp_width=512,  patch_size=4,  image_size=32),   # 1.6M
    'ti':    dict(width=192,  depth=12, heads=3,  mlp_width=768,  patch_size=4,  image_size=32),   # 5.4M
    's':     dict(width=384,  depth=12, heads=6,  mlp_width=1536, patch_size=8,  image_size=64),   # 21M
    'b':     dict(width=768,  depth=12, heads=12, mlp_width=3072, patch_size=14, image_size=224),  # 86M
    'l':     dict(width=1024, depth=24, heads=16, mlp_width=4096, patch_size=14, image_size=224),  # 303M
    'g':     dict(width=1408, depth=40, heads=16, mlp_width=6144, patch_size=14, image_size=224),  # 1.01B, EVA
}


ACTIVATIONS = {'gelu': F.gelu, 'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x)}      # the second is OpenAI CLIP's


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] to [B, N, D]. A key bias would add one number to all of a query's logits,
    which softmax cancels: there is none."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # each [B, heads, N, head_dim]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)   # [B, heads, N, head_dim]
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, width, mlp_width, act='gelu'):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.act = ACTIVATIONS[act]
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); layer_scale is the first value of a learnt gain per channel.
    Autocast leaves LayerNorm and the residual stream x in float32."""

    def __init__(self, width, heads, mlp_width, eps=1e-6, act='gelu', layer_scale=None, causal=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, mlp_width, act)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((width,), float(layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((width,), float(layer_scale)))

    def forward(self, x, drop=None):
        """x [B, N, D]; drop [B, 2] multiplies each image's two branches: 0 drops one, 1 / (1 - rate) keeps it."""
        for i, (branch, norm, gamma) in enumerate(((self.attn, self.norm1, self.gamma_1),
                                                   (self.mlp, self.norm2, self.gamma_2))):
            change = branch(norm(x))
            if gamma is not None:
                change = change * gamma
            if drop is not None:
                change = change * drop[:, i, None, None]
            x = x + change
        return x


class ViT(nn.Module):
    """Images to tokens, pre-norm (arXiv:2010.11929), with EVA's biases. `head` is the width of an optional linear layer
    at the end: MIM's prediction, a classifier, CLIP's projection. `pool` says what it sees: None every patch, 'class'
    the class token, 'mean' the average patch. OpenAI's towers have a norm before the blocks (`pre_norm`)."""

    def __init__(self, width, depth, heads, mlp_width, patch_size, image_size, head=0, head_bias=True, pool=None,
                 drop_path=0., eps=1e-6, act='gelu', pre_norm=False, patch_bias=True, mask_token=True,
                 layer_scale=None, mean=CLIP_MEAN, std=CLIP_STD):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        self.pool, self.patch_size, self.image_size = pool, patch_size, image_size
        check_grid(image_size, image_size, patch_size)
        if width % heads:
            raise ValueError(f'width {width} is not a multiple of heads {heads}')
        self.drop_rates = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]   # 0 to drop_path
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size, bias=patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, width))
        self.pre_norm = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, eps, act, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.head = nn.Linear(width, head, bias=head_bias) if head else nn.Identity()

    @property
    def grid(self):
        """Patches along a side."""
        return self.image_size // self.patch_size

    def normalize(self, images):
        """uint8 [B, 3, H, W] to the floats this model was trained on."""
        mean = torch.tensor(self.config['mean'], device=images.device).view(3, 1, 1) * 255
        std = torch.tensor(self.config['std'], device=images.device).view(3, 1, 1) * 255
        return images.float().sub_(mean).div_(std)

    def tokens(self, images, mask=None, keep=None, drop=None):
        """Tokens before the final norm, class token first: [B, 1+N, D], or [B, 1+n, D] with keep.
        images [B, 3, H, W] normalised; mask [B, N] bool, True puts the mask token there; keep [B, n] patches to pass on
        (arXiv:2212.00794); drop [B, depth, 2] numbers in [0, 1), below its layer's rate a branch is dropped."""
        check_grid(*images.shape[2:], self.patch_size)
        x = self.patch_embed(images)                                       # [B, D, h, w]
        positions = resize_positions(self.pos_embed, x.shape[2:])          # [1, 1+N, D]
        x = x.flatten(2).transpose(1, 2)                                   # [B, N, D]
        if mask is not None:
            x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        x = x + positions[:, 1:]
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))   # [B, n, D]
        first = (self.class_token + positions[:, :1]).expand(len(x), -1, -1)
        x = self.pre_norm(torch.cat((first, x), dim=1))                    # [B, 1+N, D]
        if drop is None or not self.config['drop_path']:
            drop = [None] * len(self.blocks)
        else:
            rates = torch.tensor(self.drop_rates, device=drop.device)[:, None]
            drop = ((drop >= rates) / (1 - rates)).unbind(1)               # depth times [B, 2]
        for block, multipliers in zip(self.blocks, drop):
            x = block(x, multipliers)
        return x

    def features(self, images, mask=None, keep=None, drop=None):
        """Tokens after the final norm [B, 1+N, D]."""
        return self.norm(self.tokens(images, mask, keep, drop))

    def forward(self, images, mask=None, keep=None, drop=None):
        """The head's output: [B, N, head] without pooling, else [B, head]; without a head its input."""
        x = self.tokens(images, mask, keep, drop)
        if self.pool == 'class':
            x = x[:, 0]
        else:
            x = x[:, 1:]
            if self.pool == 'mean':
                x = x.mean(dim=1)      # the norm comes after the average: EVA's fc_norm
        return self.head(self.norm(x))

    def patch_features(self, images):
        """The head's output for every patch, whatever the pooling: EVA's MIM target [B, N, head]."""
        return self.head(self.norm(self.tokens(images)[:, 1:]))


class TextTower(nn.Module):
    """Token ids to one feature, taken at the end token, which has the largest id (arXiv:2103.00020)."""

    def __init__(self, width, depth, heads, vocab, embed, context=77, act='gelu'):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        self.token_embed = nn.Embedding(vocab, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, context, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, 1e-5, act, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-5)
        self.head = nn.Linear(width, embed, bias=False)

    def forward(self, text):
        """text [B, T] ids to [B, embed]. Attention looks back only, so what follows the last end token is cut off."""
        end = text.argmax(dim=1)                                      # [B]
        length = int(end.max()) + 1
        x = self.token_embed(text[:, :length]) + self.pos_embed[:, :length]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[torch.arange(len(x), device=x.device), end]))


class CLIP(nn.Module):
    """An image tower and a text tower into one space (arXiv:2103.00020); vision and text are their configs."""

    def __init__(self, vision, text):
        super().__init__()
        self.visual = ViT(**vision)
        self.text = TextTower(**text)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))   # not a scalar: FSDP2 refuses those
        self.config = dict(vision=self.visual.config, text=self.text.config)

    def encode_image(self, images):
        return self.visual(images)

    def encode_text(self, text):
        return self.text(text)

    def patch_features(self, images):
        return self.visual.patch_features(images)

    def normalize(self, images):
        return self.visual.normalize(images)

    def forward(self, images, text, keep=None, drop=None):
        """Unit features of images and text, each [B, embed], and the factor of their cosines [1]."""
        image_features = F.normalize(self.visual(images, keep=keep, drop=drop).float(), dim=-1)
        text_features = F.normalize(self.text(text).float(), dim=-1)
        return image_features, text_features, self.logit_scale.exp()


def check_grid(height, width, patch_size):
    for side in (height, width):
        if side % patch_size or side < patch_size:
            near = max(patch_size, side // patch_size * patch_size)
            raise ValueError(f'image_size {side} is not a multiple of {patch_size}; use {near} or {near + patch_size}')


def resize_positions(pos_embed, grid):
    """Position table [1, 1+n, D] for another grid (h, w): [1, 1+h*w, D]. The class token's row stays, the rest is
    interpolated as EVA does: bicubic, float32, corners not aligned."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (side, side) == tuple(grid):
        return pos_embed
    table = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)                   # [1, D, n, n]
    table = F.interpolate(table, size=tuple(grid), mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat((pos_embed[:, :1], table.to(pos_embed.dtype)), dim=1)


def sincos_positions(width, grid):
    """[1, 1+grid*grid, width]: the first half of the channels from the column, the second from the row
    (arXiv:2111.06377); the class token's row is zero."""
    frequencies = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies                             # [grid, width/4]
    side = torch.cat((angles.sin(), angles.cos()), dim=1)                          # [grid, width/2]
    table = torch.cat((side.repeat(grid, 1), side.repeat_interleave(grid, 0)), 1)  # [N, width]
    return torch.cat((torch.zeros(1, width), table))[None]


@torch.no_grad()
def init_weights(model, seed=0):
    """First values of a ViT or a CLIP on the CPU, a function of the seed; returns the model. Biases start at 0, norms
    at 1; ViTs as narrow as ours start from sin-cos positions, which they learn from there (not in the paper)."""
    generator, is_clip = torch.Generator().manual_seed(seed), isinstance(model, CLIP)
    for tower in [module for module in model.modules() if isinstance(module, (ViT, TextTower))]:
        width, depth = tower.config['width'], tower.config['depth']
        for name, weight in tower.named_parameters():
            layer = int(name.split('.')[1]) + 1 if name.startswith('blocks') else 1
            if is_clip:     # OpenAI's standard deviations for both towers, the first match
                pixels = 3 * tower.config.get('patch_size', 1) ** 2     # of a patch; .08 = torch's default if it has 48
                table = {r'token_embed': .02, r'pos_embed': .01, r'patch_embed': (3 * pixels) ** -.5,
                         r'.*(attn\.proj|mlp\.fc2)': (2 * depth * width) ** -.5, r'.*mlp\.fc1': (2 * width) ** -.5,
                         r'.*': width ** -.5}
            else:           # EVA's .015 for g and .02 else; both are .56 / width ** .5, which our small sizes follow
                std = .015 if width == 1408 else .02 if width > SIZES['ti']['width'] else .56 * width ** -.5
                table = {r'.*(attn\.proj|mlp\.fc2)': std / (2 * layer) ** .5, r'.*': std}
            if 'gamma' in name:
                weight.fill_(tower.config['layer_scale'])
            elif weight.ndim == 1:
                weight.fill_(1 if name.endswith('weight') else 0)
            elif name == 'pos_embed' and isinstance(tower, ViT) and width <= SIZES['ti']['width']:
                weight.copy_(sincos_positions(width, tower.grid))
            else:
                std = next(std for pattern, std in table.items() if re.match(pattern, name))
                if is_clip:
                    weight.normal_(0, std, generator=generator)
                else:       # cut at one std, as EVA does, so that .0081 comes out of .015: erf(1 / sqrt(2)) = .683
                    weight.uniform_(-0.6826895, 0.6826895, generator=generator).erfinv_().mul_(2 ** .5 * std)
    if isinstance(model, CLIP):
        model.logit_scale.fill_(math.log(1 / 0.07))
    return model


# What a released tensor is called here, a line each: its name, our name ('-' drops it), and what is done to it. A * is
# one part of a name. 'split' cuts the rows into as many as there are names; 'concat' appends to what came before.

def openai_blocks(theirs, ours):
    return [
        (theirs + '.*.attn.in_proj_weight', ours + '.*.attn.qkv.weight', 'same'),
        (theirs + '.*.attn.in_proj_bias', f'{ours}.*.attn.q_bias - {ours}.*.attn.v_bias', 'split'),
        (theirs + '.*.attn.out_proj.*', ours + '.*.attn.proj.*', 'same'),
        (theirs + '.*.ln_1.*', ours + '.*.norm1.*', 'same'),
        (theirs + '.*.ln_2.*', ours + '.*.norm2.*', 'same'),
        (theirs + '.*.mlp.c_fc.*', ours + '.*.mlp.fc1.*', 'same'),
        (theirs + '.*.mlp.c_proj.*', ours + '.*.mlp.fc2.*', 'same'),
    ]


OPENAI_CLIP = [
    ('visual.class_embedding', 'visual.class_token', 'same'),
    ('visual.positional_embedding', 'visual.pos_embed', 'same'),
    ('visual.conv1.*', 'visual.patch_embed.*', 'same'),
    ('visual.ln_pre.*', 'visual.pre_norm.*', 'same'),
    ('visual.ln_post.*', 'visual.norm.*', 'same'),
    ('visual.proj', 'visual.head.weight', 'transpose'),
    ('token_embedding.weight', 'text.token_embed.weight', 'same'),
    ('positional_embedding', 'text.pos_embed', 'same'),
    ('ln_final.*', 'text.norm.*', 'same'),
    ('text_projection', 'text.head.weight', 'transpose'),
    ('logit_scale', 'logit_scale', 'same'),
    *[(name, '-', 'drop') for name in ('input_resolution', 'context_length', 'vocab_size')],
    *openai_blocks('visual.transformer.resblocks', 'visual.blocks'),
    *openai_blocks('transformer.resblocks', 'text.blocks'),
]

EVA01_MIM = [
    ('cls_token', 'class_token', 'same'),
    *[(name, name, 'same') for name in ('mask_token', 'pos_embed', 'norm.*')],
    ('patch_embed.proj.*', 'patch_embed.*', 'same'),
    ('lm_head.*', 'head.*', 'same'),
    *[(name, name, 'same') for name in ('blocks.*.*', 'blocks.*.*.*', 'blocks.*.*.*.*')],
]


def openai_clip_config(state):
    width, depth = state['text.token_embed.weight'].shape[1], count_layers(state, 'text.')
    text = dict(width=width, depth=depth, heads=max(1, width // 64), vocab=len(state['text.token_embed.weight']),
                embed=len(state['text.head.weight']), context=state['text.pos_embed'].shape[-2], act='quick_gelu')
    return dict(vision=shown_config(state, 'visual.', pool='class', eps=1e-5, act='quick_gelu'), text=text)


FAMILIES = {  # tensors that only it has, its table, its config
    'OpenAI CLIP': (('visual.class_embedding', 'ln_final.weight'), OPENAI_CLIP, openai_clip_config),
    'EVA-01 MIM': (('lm_head.weight', 'blocks.0.mlp.fc1.weight'), EVA01_MIM, lambda state: shown_config(state)),
}


def size_config(cfg, **options):
    """The ViT's options of a run: its size's row with the image and patch size asked for."""
    asked = {name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
    return {**SIZES[cfg.size], **asked, **options}


def count_layers(state, prefix=''):
    layers = [int(name[len(prefix):].split('.')[1]) for name in state if name.startswith(prefix + 'blocks.')]
    return 1 + max(layers, default=-1)


def shown_config(state, prefix='', **options):
    """The ViT's options that its tensors show. A head is 64 wide, EVA-g's 88: the one thing they do not show."""
    def rows(name, dim=0):
        return state[prefix + name].shape[dim] if prefix + name in state else 0
    width, patch_size = state[prefix + 'class_token'].shape[-1], state[prefix + 'patch_embed.weight'].shape[-1]
    grid = math.isqrt(state[prefix + 'pos_embed'].shape[-2] - 1)
    return dict(width=width, depth=count_layers(state, prefix), heads=16 if width == 1408 else max(1, width // 64),
                mlp_width=state[prefix + 'blocks.0.mlp.fc1.weight'].shape[0], patch_size=patch_size,
                image_size=grid * patch_size, head=rows('head.weight'), head_bias=bool(rows('head.bias')),
                pre_norm=bool(rows('pre_norm.weight')), patch_bias=bool(rows('patch_embed.bias')),
                mask_token=bool(rows('mask_token')), layer_scale=1. if rows('blocks.0.gamma_1') else None, **options)


def rename(name, pattern, target):
    """name in the target's form, or None where the pattern does not fit; * stands for one part of a dotted name."""
    match = re.fullmatch(re.escape(pattern).replace(r'\*', r'([^.]+)'), name)
    if match:
        parts = iter(match.groups())
        return re.sub(r'\*', lambda _: next(parts), target)


def original_name(name, rules):
    """What a released file calls our tensor."""
    names = (rename(name, target, pattern) for pattern, targets, _ in rules for target in targets.split())
    return next(filter(None, names), name)


def translate(state, rules):
    """Tensors under our names (those that no rule names keep theirs), and the number of dropped key biases."""
    ours, left, dropped = {}, dict(state), 0
    for pattern, targets, op in rules:
        targets = targets.split()
        for theirs in [name for name in left if rename(name, pattern, '') is not None]:
            tensor = left.pop(theirs)
            parts = tensor.chunk(len(targets)) if op == 'split' else [tensor.T if op == 'transpose' else tensor]
            for target, part in zip(targets, parts):
                name = rename(theirs, pattern, target)
                if target == '-':
                    dropped += op == 'split'
                else:
                    ours[name] = torch.cat((ours[name], part)) if op == 'concat' and name in ours else part
    return {**ours, **left}, dropped


@torch.no_grad()
def fill(model, state, fresh=(), rules=()):
    """Copies tensors into the model, strictly: a missing, extra or wrong-shape tensor is an error that names it.
    Those that start with a name in `fresh` are exempt, and keep the model's initial values."""
    own, fresh = model.state_dict(), tuple(fresh)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(fresh)}
    wrong = [f'missing {original_name(name, rules)}' for name in own
             if name not in state and not name.startswith(fresh)]
    wrong += [f'unexpected {name}' for name in state if name not in own]
    for name in own.keys() & state.keys():     # released tables and tokens lack dimensions of 1 that ours have
        given, expected = list(state[name].shape), list(own[name].shape)
        if [n for n in given if n > 1] != [n for n in expected if n > 1]:
            wrong.append(f'{original_name(name, rules)} of shape {given} instead of {expected}')
    if wrong:
        more = f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        raise ValueError('weights do not fit the model: ' + '; '.join(wrong[:5]) + more)
    for name, tensor in state.items():
        own[name].copy_(tensor.reshape(own[name].shape))


def override(before, changes, state, prefix):
    """A tower's config with changes, and what starts afresh because of them. Positions are resized to a new grid."""
    after = {**before, **changes}
    changed = {name for name in changes if after[name] != before.get(name)}
    fresh = [prefix + name for name in ('head', 'mask_token') if changed & {name, name + '_bias'}]
    if 'pool' in changed and after['pool'] == 'mean':
        fresh.append(prefix + 'norm.')
    if 'image_size' in changed:
        table, grid = state[prefix + 'pos_embed'], after['image_size'] // after['patch_size']
        state[prefix + 'pos_embed'] = resize_positions(table.view(1, *table.shape[-2:]), (grid, grid))
    return after, fresh


def load_state(state, name=None, config=None, expected=None, **overrides):
    """Tensors, of our own format (its class name and config given) or of a family in FAMILIES, to a model in eval mode.
    overrides change the config, CLIP's by tower (vision=dict(...)): a new image_size resizes positions; a new head,
    mask_token or pool='mean' (whose norm EVA starts afresh) starts with initial values instead of the file's."""
    state, rules, dropped = dict(state), (), 0
    if config is None:
        family = next((family for family, (marks, *_) in FAMILIES.items() if state.keys() >= set(marks)), None)
        if family is None:
            some = ', '.join(list(state)[:3]) or 'none'
            raise ValueError(f'tensors of no known model ({some}, ...); known are nanoEVA, {", ".join(FAMILIES)}')
        _, rules, config_of = FAMILIES[family]
        state, dropped = translate(state, rules)
        try:
            config = config_of(state)
        except KeyError as key:
            raise ValueError(f'weights of {family} miss {original_name(key.args[0], rules)}') from None
        name = 'CLIP' if 'vision' in config else 'ViT'
    if expected and name != expected.__name__:
        raise ValueError(f'this is a {name}, expected a {expected.__name__}')
    if name == 'CLIP':
        vision, fresh = override(config['vision'], overrides.get('vision', {}), state, 'visual.')
        text, fresh_text = override(config['text'], overrides.get('text', {}), state, 'text.')
        config, fresh = dict(vision=vision, text=text), fresh + fresh_text
    else:
        config, fresh = override(config, overrides, state, '')
    with torch.device('meta'):             # no time is spent on values that will be replaced
        model = CLIP(**config) if name == 'CLIP' else ViT(**config)
    model.to_empty(device='cpu')
    if fresh:
        init_weights(model)
    fill(model, state, fresh, rules)
    model.extra = {}
    if dropped:
        print0(f'{family} weights: {dropped} key biases dropped (softmax cancels them)')
    return model.eval()


def save(model, path, **extra):
    """One portable file that `load` reads: class, config, tensors, and plain data such as a vocabulary in extra."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    held = dict(format='nanoEVA', name=type(model).__name__, config=model.config, state_dict=state, extra=extra)
    try:
        torch.save(held, path + '.tmp')
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:     # torch's writer raises RuntimeError when the disk is full
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        raise ValueError(f'{path} cannot be written ({first_line(error)})') from None


def load(path, expected=None, **overrides):
    """A ViT or a CLIP in eval mode, recognised by what the file holds; see load_state for the overrides. If one of the
    two classes is expected, the other is refused. What `save` was given beside the model is in `model.extra`."""
    try:
        held = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror or error}); give a checkpoint file') from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError):
        raise ValueError(f'{path} is not a checkpoint of tensors that torch.load reads') from None
    if not isinstance(held, dict):
        raise ValueError(f'{path} holds a {type(held).__name__}, expected a dict of tensors')
    try:
        if held.get('format') == 'nanoEVA':
            model = load_state(held['state_dict'], held['name'], held['config'], expected, **overrides)
            model.extra = held['extra']
            return model
        for wrapper in ('model', 'module', 'state_dict'):
            held = held[wrapper] if isinstance(held.get(wrapper), dict) else held
        state = {name: tensor for name, tensor in held.items() if torch.is_tensor(tensor)}
        return load_state(state, expected=expected, **overrides)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


# The machinery of a run: options, device, optimizer, save and resume, log, pictures, costs.

def option(default, help):
    """A field of a Config; its flag and its line in --help are made from it."""
    return dataclasses.field(default=default, metadata=dict(help=help))


@dataclass
class Run:
    """What means the same in every stage."""
    size: str = option('nano', 'row of SIZES in model.py')
    data: str = option('shapes', 'the built-in world (shapes:unique=N,classes=N,objects=N) or a folder of images')
    init: str = option('', 'file to start from instead of random weights')
    out_dir: str = option('', 'where results go; out/<stage>-<size> if empty')
    steps: int = option(1000, 'updates of the weights')
    epochs: float = option(0., 'passes over finite data, instead of --steps')
    batch_size: int = option(128, 'images in an update, over all processes')
    micro_batch: int = option(0, 'images at once on a device; 0: as many as belong to it')
    lr: float = option(1e-3, 'highest learning rate')
    image_size: int = option(0, "pixels along a side; 0: the size's own")
    patch_size: int = option(0, "pixels along a patch; 0: the size's own")
    seed: int = option(0, 'of weights, order, crops and masks')
    device: str = option('', 'cuda, mps or cpu; the best there is if empty')
    compile: bool = option(None, 'torch.compile the blocks; decided by the device if not given')
    save_every: int = option(500, 'steps between checkpoints')
    log_every: int = option(10, 'steps between lines of log.jsonl')
    workers: int = option(0, 'processes that read images; 0: read in this one')
    eval: bool = option(False, 'only evaluate --init')
    plan: bool = option(False, 'only print parameters, FLOPs and memory')
    image: str = option('', 'only apply --init to this picture')


# options that change how a run is made, not what it computes
NEVER_DIFFER = {'out_dir', 'micro_batch', 'device', 'compile', 'shard', 'save_every', 'log_every', 'workers',
                'eval', 'plan', 'bench', 'image'}


def parse_config(Config, RECIPES, argv=None):
    """Defaults, then the size's recipe, then flags."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, epilog=(
        "Defaults stand in brackets. What the size's row of RECIPES says goes before them, and a flag before both."))

    def one_line(message):
        raise ValueError(f'{message}; --help lists the options')
    parser.error = one_line
    for field in dataclasses.fields(Config):
        help = field.metadata.get('help', '').replace('%', '%%')
        if field.type is bool:
            parser.add_argument(f'--{field.name}', action=argparse.BooleanOptionalAction, help=help)
        elif field.type is tuple:
            parser.add_argument(f'--{field.name}', type=comma_separated, metavar='A,B',
                                help=f'{help} ({",".join(map(str, field.default))})')
        else:
            help += f' ({field.default})' if field.default != '' else ''
            parser.add_argument(f'--{field.name}', type=field.type, metavar=field.type.__name__.upper(), help=help)
    flags = vars(parser.parse_args(argv))
    size = flags.get('size', Config.size)
    if size not in RECIPES:
        raise ValueError(f'--size {size} is unknown; use one of {", ".join(RECIPES)}')
    if 'epochs' in flags and 'steps' in flags:
        raise ValueError('--epochs and --steps both say how long to train; give one of them')
    cfg = Config(**{**RECIPES[size], **flags})
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(f'--{name} {value} is not a number from 0 up')
        if name in ('steps', 'batch_size', 'save_every', 'log_every') and value < 1:
            raise ValueError(f'--{name} {value} is too small; use 1 or more')
        if name == 'betas' and not (len(value) == 2 and all(0 <= beta < 1 for beta in value)):
            raise ValueError(f'--betas {value} are not two numbers from 0 to below 1')
    if cfg.seed > 127:      # each seed of the built-in world owns 2^33 of its 2^40 scenes
        raise ValueError(f'--seed {cfg.seed} is too large; use 0 to 127')
    if cfg.micro_batch and cfg.batch_size % cfg.micro_batch:
        raise ValueError(f'--batch_size {cfg.batch_size} is not a multiple of --micro_batch {cfg.micro_batch}')
    return cfg


def comma_separated(text):
    return tuple(float(part) for part in text.split(','))


def main(train, Config, RECIPES):
    """Runs a stage. What we refuse is one line and exit code 2; what we did not foresee keeps its traceback."""
    try:
        train(parse_config(Config, RECIPES))
    except (ValueError, OSError) as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        raised_in = os.path.dirname(os.path.abspath(frame.tb_frame.f_code.co_filename))
        if raised_in != os.path.dirname(os.path.abspath(__file__)):
            raise
        if get_rank() == 0:
            print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print0('\nstopped; the same command goes on from the last checkpoint')
        sys.exit(130)


def get_rank():
    return int(os.environ.get('RANK', 0))


def print0(*values):
    """Prints on the first process only."""
    if get_rank() == 0:
        print(*values, flush=True)


def first_line(error):
    """What went wrong; torch.distributed.checkpoint wraps it in an error that only names the process."""
    for error, _ in getattr(error, 'failures', {}).values():
        break
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return 'No space left on device' if 'unexpected pos' in text else text      # torch's words for a full disk


def setup(cfg):
    """(rank, number of processes, device)."""
    rank, world = get_rank(), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:
        raise ValueError(f'{world} processes were started, but sharding is not there yet; run it with python')
    there = ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available() + ['cpu']
    known = there + [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    if (cfg.device or there[0]) not in known:
        raise ValueError(f'--device {cfg.device} is not on this machine; use {" or ".join(known)}')
    device = torch.device(cfg.device or there[0])
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision('high')      # TF32 where autocast keeps float32
    return rank, world, device


def autocast(device):
    """bf16 matrix products on cuda, float32 elsewhere; enter it as often as needed."""
    return torch.autocast('cuda', torch.bfloat16) if device.type == 'cuda' else contextlib.nullcontext()


def param_groups(model, weight_decay):
    """Weights with decay, then norms, biases, positions and tokens without. A loop multiplies lr by lr_scale."""
    groups = [dict(params=[], weight_decay=decay, lr_scale=1.) for decay in (weight_decay, 0.)]
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            bare = weight.ndim < 2 or name.split('.')[-1] in ('pos_embed', 'class_token', 'mask_token')
            groups[bare]['params'].append(weight)
    return [group for group in groups if group['params']]


def make_optimizer(model, cfg):
    """Fused AdamW, 2 to 5 times faster than the default on a CPU; cfg has lr, betas, eps and weight_decay."""
    return torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def lr_at(step, cfg):
    """Linear up to lr in warmup_steps, then half a cosine down to min_lr at steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2


@contextlib.contextmanager
def single_process_is_fine():
    """torch.distributed.checkpoint warns that there is one process; without torchrun that is what we want."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed is (disabled, )?unavailable or uninitialized')
        yield


def save_checkpoint(out_dir, step, model, optimizer, cfg, constants={}):
    """Everything a run needs to go on after `step` updates, under a temporary name until it is whole; the last two
    stay. `constants` is what the run measured once (plain data or tensors)."""
    final = os.path.join(out_dir, 'checkpoint', f'step_{step:07d}')
    try:
        shutil.rmtree(final + '.tmp', ignore_errors=True)
        os.makedirs(final + '.tmp')
        state = dict(model=get_model_state_dict(model), optim=get_optimizer_state_dict(model, optimizer))
        with single_process_is_fine():
            dcp.save(state, checkpoint_id=final + '.tmp')
        run = dict(step=step, config=dataclasses.asdict(cfg), constants=constants)
        torch.save(run, os.path.join(final + '.tmp', 'run.pt'))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(final + '.tmp', final)
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(final + '.tmp', ignore_errors=True)
        last = latest_checkpoint(out_dir)
        raise ValueError(f'checkpoint {final} cannot be written ({first_line(error)}); '
                         + (f'{last} is intact, run the same command to go on' if last else 'none was written before')
                         ) from None
    for old in list_checkpoints(out_dir)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(out_dir):
    folder = os.path.join(out_dir, 'checkpoint')
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names) if re.fullmatch(r'step_\d+', name)]


def latest_checkpoint(out_dir):
    """The newest whole checkpoint's folder, or None."""
    return (list_checkpoints(out_dir) or [None])[-1]


def resume(out_dir, model, optimizer, cfg):
    """Loads the latest checkpoint, if any: (updates already made, the run's constants)."""
    path = latest_checkpoint(out_dir)
    if path is None:
        return 0, {}
    damaged = f'{path} is damaged; delete that folder, and the run goes on from the one before'
    try:
        run = torch.load(os.path.join(path, 'run.pt'), map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f'{damaged} ({first_line(error)})') from None
    now, then = dataclasses.asdict(cfg), run['config']
    changed = [f'--{name} {now.get(name)} (was {then.get(name)})' for name in sorted(now.keys() | then.keys())
               if now.get(name) != then.get(name) and name not in NEVER_DIFFER]
    if changed:
        raise ValueError(f'{out_dir} holds an unfinished run with other options: {", ".join(changed)}; '
                         'repeat its options, or start another with --out_dir NAME')
    state = dict(model=get_model_state_dict(model), optim=get_optimizer_state_dict(model, optimizer))
    try:
        with single_process_is_fine():
            dcp.load(state, checkpoint_id=path)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        raise ValueError(f'{damaged} ({first_line(error)})') from None
    set_model_state_dict(model, state['model'])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state['optim'])
    print0(f'continuing {out_dir} at step {run["step"]}')
    return run['step'], run['constants']


def finished(cfg):
    """Whether this run is done, which it says in one line. If not, makes sure that its folder can be written."""
    result = os.path.join(cfg.out_dir, 'result.json')
    if os.path.exists(result):
        print0(f'this run is finished: {result} holds its result; use --out_dir NAME for another')
        return True
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.out_dir).close()
    except OSError as error:
        raise ValueError(f'--out_dir {cfg.out_dir} cannot be written ({error.strerror}); use another') from None
    return False


def read_log(out_dir):
    """log.jsonl as a list of dicts; a last line cut short by a kill is left out."""
    path = os.path.join(out_dir, 'log.jsonl')
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith('}\n')]


class Log:
    """A bar with the time left on stderr, and out_dir/log.jsonl. Starting at `start` drops the lines of steps that will
    be done again. `seconds` runs on over interruptions. Only the first process writes."""

    def __init__(self, cfg, start):
        self.cfg, self.step, self.in_a_row, self.skipped = cfg, start, 0, 0
        kept = [line for line in read_log(cfg.out_dir) if line['step'] < start]
        self.began = time.time() - (kept[-1]['seconds'] if kept else 0)
        self.last_write = time.time()
        self.file = None
        if get_rank() == 0:
            path = os.path.join(cfg.out_dir, 'log.jsonl')
            with open(path + '.tmp', 'w') as file:
                file.writelines(json.dumps(line) + '\n' for line in kept)
            os.replace(path + '.tmp', path)
            self.file = open(path, 'a', buffering=1)
        self.bar = tqdm(total=cfg.steps, initial=start, desc=cfg.size, dynamic_ncols=True, disable=get_rank() > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 15)

    def due(self, step):
        """Whether this step is logged: reading numbers back from a device costs time."""
        return (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps

    def is_finite(self, grad_norm):
        """False for a gradient that must not be applied; ten in a row end the run, its last checkpoint whole."""
        finite = math.isfinite(grad_norm)
        self.in_a_row, self.skipped = (0, self.skipped) if finite else (self.in_a_row + 1, self.skipped + 1)
        if self.in_a_row == 10:
            raise ValueError(f'gradients were not finite ten times in a row, near step {self.step}; lower --lr. '
                             f'The last checkpoint is {latest_checkpoint(self.cfg.out_dir)}')
        return finite

    def write(self, step, **values):
        """A line of log.jsonl; values are numbers. The bar shows them, and step + 1 of its steps done."""
        now = time.time()
        values['images_per_second'] = (step + 1 - self.step) * self.cfg.batch_size / (now - self.last_write)
        values['seconds'] = now - self.began
        self.step, self.last_write = step + 1, now
        values = {name: float(f'{float(value):.6g}') for name, value in values.items()}
        if self.file:
            self.file.write(json.dumps(dict(step=step, **values)) + '\n')
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", img_s=f"{values['images_per_second']:.0f}", refresh=False)
        self.bar.update(step + 1 - self.bar.n)

    def say(self, step, **metrics):
        """Metrics measured during the run: a line above the bar and in evals.jsonl."""
        if self.file:
            with open(os.path.join(self.cfg.out_dir, 'evals.jsonl'), 'a') as file:
                file.write(json.dumps(dict(step=step, **metrics)) + '\n')
            self.bar.write(f'step {step + 1}: ' + ', '.join(f'{name} {value:.3f}' for name, value in metrics.items()))
        self.last_write = time.time()

    def finish(self, model, ylabel, lines, **metrics):
        """loss.png, with lines {name: loss} to compare with, and result.json, which says that a run is done."""
        self.bar.close()
        if self.file:
            self.file.close()
            curve = [(line['step'], line['loss']) for line in read_log(self.cfg.out_dir)]
            draw_curves(os.path.join(self.cfg.out_dir, 'loss.png'), {'loss': curve}, lines, ylabel=ylabel)
            result = dict(metrics, skipped=self.skipped, seconds=round(time.time() - self.began, 1),
                          parameters=count_parameters(model), command=command_line())
            path = os.path.join(self.cfg.out_dir, 'result.json')
            with open(path + '.tmp', 'w') as file:
                json.dump(result, file, indent=2)
            os.replace(path + '.tmp', path)
            print0(table(result), f'\n{self.cfg.out_dir}/: {", ".join(sorted(os.listdir(self.cfg.out_dir)))}')


def table(values):
    """A dict as aligned lines."""
    forms = {float: '.4g', int: ','}
    return '\n'.join(f'{name:<20} {format(value, forms.get(type(value), ""))}' for name, value in values.items())


def command_line():
    """The command as typed, without this machine's absolute paths."""
    return shlex.join(['python', *(re.sub(r'^(--\w+=)?/.*/', r'\1', word) for word in sys.argv)])


def draw_curves(path, curves, lines={}, xlabel='step', ylabel=''):
    """A picture of {name: [(x, y), ...]}, with dashed horizontal lines {name: y}."""
    from PIL import Image, ImageDraw, ImageFont
    colours = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'    # Okabe and Ito's
    W, H, left, right, top, bottom = 960, 600, 90, 30, 50, 70
    font, picture = ImageFont.load_default(18), Image.new('RGB', (W, H), 'white')
    draw = ImageDraw.Draw(picture)
    points = [(x, y) for curve in curves.values() for x, y in curve if math.isfinite(y)]
    xs = [x for x, _ in points] or [0, 1]
    ys = [y for _, y in points] + list(lines.values()) or [0, 1]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, margin = (x1 if x1 > x0 else x0 + 1), 0.05 * (y1 - y0) or 0.5
    y0, y1 = y0 - margin, y1 + margin

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (W - left - right), H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom)
    for y in ticks(y0, y1):
        draw.line((place(x0, y), place(x1, y)), fill='#dddddd')
        draw.text((left - 8, place(x0, y)[1]), f'{y:g}', fill='black', font=font, anchor='rm')
    for x in ticks(x0, x1):
        draw.line((*place(x, y0), place(x, y0)[0], H - bottom + 6), fill='black')
        draw.text((place(x, y0)[0], H - bottom + 10), f'{x:g}', fill='black', font=font, anchor='mt')
    draw.rectangle((left, top, W - right, H - bottom), outline='black')
    draw.text(((left + W - right) / 2, H - 22), xlabel, fill='black', font=font, anchor='mm')
    draw.text((8, top / 2), ylabel, fill='black', font=font, anchor='lm')
    for i, (name, shape) in enumerate([*curves.items(), *lines.items()]):
        colour, key = colours[i % len(colours)], top + 18 + 24 * i
        if name in curves:
            draw.line([place(x, y) for x, y in shape if math.isfinite(y)], fill=colour, width=3)
            draw.line((W - right - 50, key, W - right - 14, key), fill=colour, width=3)
        else:
            for start, end, y in ((left, W - right, place(x0, shape)[1]), (W - right - 50, W - right - 14, key)):
                for x in range(start, end, 14):
                    draw.line((x, y, min(x + 8, end), y), fill=colour, width=2)
        draw.text((W - right - 58, key), name, fill='black', font=font, anchor='rm')
    picture.save(path)


def ticks(low, high):
    """Five or so round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def count_parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def flops_per_image(config):
    """Of a ViT's forward pass at its image_size, a multiply-add as two."""
    N = (config['image_size'] // config['patch_size']) ** 2
    D, mlp_width = config['width'], config['mlp_width']
    linear = 2 * (1 + N) * (4 * D * D + 2 * D * mlp_width)       # qkv, proj, fc1, fc2
    attention = 4 * (1 + N) ** 2 * D                             # scores, and the sum of values
    head = 2 * (1 if config.get('pool') else N) * D * config.get('head', 0)
    return config['depth'] * (linear + attention) + 2 * N * D * 3 * config['patch_size'] ** 2 + head


def activation_bytes(config, element=4):
    """What a ViT keeps of one image for the backward pass; a matrix product's input has `element` bytes (bf16: 2)."""
    tokens = 1 + (config['image_size'] // config['patch_size']) ** 2
    D, mlp_width = config['width'], config['mlp_width']
    # float32: the inputs of two norms; else: their outputs, q, k, v, attention's output, before and after GELU
    return config['depth'] * tokens * (2 * D * 4 + element * (6 * D + 2 * mlp_width))


def training_memory(config, batch_size, device):
    """Bytes that training a ViT with AdamW takes on one device: {what: bytes}."""
    with torch.device('meta'):
        parameters = count_parameters(ViT(**config))
    activations = batch_size * activation_bytes(config, 2 if device.type == 'cuda' else 4)      # bf16 under autocast
    return dict(weights=4 * parameters, gradients=4 * parameters, AdamW=8 * parameters, activations=activations)


def plan(config, batch_size, device):
    """Prints what training a ViT costs: parameters, FLOPs and memory on one device. The teacher is not counted."""
    memory, forward = training_memory(config, batch_size, device), flops_per_image(config)
    print0(f'parameters           {memory["weights"] // 4:,}')
    print0(f'forward              {forward / 1e9:.4g} GFLOP an image')
    print0(f'training             {3 * forward / 1e9:.4g} GFLOP an image (backward costs two forwards)')
    for name, size in memory.items():
        note = f'  ({batch_size} images of {size / batch_size / 1e6:.4g} MB)' if name == 'activations' else ''
        print0(f'{name:<20} {size / 1e9:.4g} GB{note}')
    print0(f'memory               {sum(memory.values()) / 1e9:.4g} GB of {available_memory(device) / 1e9:.4g} GB free')


def available_memory(device):
    """Free bytes of a device; infinite where the system does not say."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists('/proc/meminfo'):
        return math.inf
    with open('/proc/meminfo') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith('MemAvailable'))


def check_memory(config, batch_size, device):
    """Refuses before any work a training that would not fit."""
    needed, there = sum(training_memory(config, batch_size, device).values()), available_memory(device)
    if needed > there:
        raise ValueError(f'training needs {needed / 1e9:.1f} GB with {batch_size} images at once, {there / 1e9:.1f} GB '
                         f'are free on {device.type}; use a smaller --micro_batch or --size')


def to_device(model, cfg, device):
    """Moves a model; its blocks are compiled in place on cuda, or where --compile asks for it."""
    model.to(device)
    if cfg.compile or cfg.compile is None and device.type == 'cuda':
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    return model


def settle_steps(cfg, dataset):
    """Turns --epochs into steps, and keeps the warm-up within a quarter of a short run."""
    if cfg.epochs and len(dataset) >= 2 ** 40:
        raise ValueError('--epochs needs data that ends, a folder or shapes:unique=N; use --steps')
    if cfg.epochs:
        cfg.steps = max(1, round(cfg.epochs * len(dataset) / cfg.batch_size))
    cfg.warmup_steps = min(cfg.warmup_steps, cfg.steps // 4)


@torch.no_grad()
def knn_accuracy(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Accuracy of the k nearest training features' votes, weighted exp(cosine / temperature) (arXiv:2104.14294).
    train_x [n, D], train_y [n] labels, test_x [m, D], test_y [m]."""
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    num_labels, right = int(train_y.max()) + 1, 0
    for x, y in zip(test_x.split(1024), test_y.split(1024)):
        cosine, nearest = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)                # each [1024, k]
        votes = torch.zeros(len(x), num_labels, device=x.device)
        votes.scatter_add_(1, train_y[nearest], ((cosine - 1) / temperature).exp())
        right += (votes.argmax(dim=1) == y).sum().item()
    return right / len(test_x)


@torch.no_grad()
def linear_probe(train_x, train_y, test_x, test_y, ridge=1e-3):
    """Accuracy of the best linear map to one-hot labels, in closed form: ridge regression on standardised features.
    Shapes as in knn_accuracy."""
    mean, std = train_x.float().mean(0), train_x.float().std(0) + 1e-6
    standard = lambda x: F.pad((x.float() - mean) / std, (0, 1), value=1.).cpu().double()   # [n, D + 1], last a bias
    x, y = standard(train_x), F.one_hot(train_y).cpu().double()
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1]), x.T @ y)
    return ((standard(test_x) @ weights).argmax(1) == test_y.cpu()).float().mean().item()
