"""
The models of every stage, in this order: sizes; the ViT; the text tower and CLIP; initial weights; reading and writing
weights; probes of frozen features.

    model = init_weights(ViT(**SIZES['nano'], head=64), seed=0)
    model = load('eva.pt')                                 # a ViT or a CLIP in eval mode; model.config rebuilds it
"""
import argparse
import contextlib
import functools
import inspect
import io
import json
import math
import mmap
import os
import pickle
import re
import sys
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F

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


def swiglu(x):
    """A gate: [..., 2 * mlp_width] to [..., mlp_width] (arXiv:2002.05202)."""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


ACTIVATIONS = {'gelu': F.gelu, 'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x),     # EVA's, OpenAI's
               'swiglu': swiglu}                                                       # EVA-02's


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] to [B, N, D]; rotary as rotary_positions gives it. A key bias would add one
    number to all of a query's logits, which softmax cancels: there is none. `norm`, before proj, is EVA-02-CLIP's.
    ViTDet's: a window of so many patches a side sees itself only; rel_pos is the side that distances are learnt for."""

    def __init__(self, width, heads, causal=False, norm=None, window=0, rel_pos=0):
        super().__init__()
        self.heads, self.causal, self.window = heads, causal, window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.norm = norm or nn.Identity()
        self.proj = nn.Linear(width, width)
        table = lambda: nn.Parameter(torch.zeros(2 * rel_pos - 1, width // heads)) if rel_pos else None
        self.rel_pos_h, self.rel_pos_w = table(), table()
        self.rel_bias = None        # a module that gives logits by place, [heads, N, N]: BEiT's, in segment.py

    def forward(self, x, rotary=None, grid=None):
        if self.window:
            whole, grid, x = grid, (self.window, self.window), split_windows(x, grid, self.window)
        B, N, D = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # each [B, heads, N, head_dim]
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        bias = None if self.rel_pos_h is None else distance_logits(q, grid, self.rel_pos_h, self.rel_pos_w)
        bias = self.rel_bias() if self.rel_bias else bias
        x = F.scaled_dot_product_attention(q, k, v, bias, is_causal=self.causal)    # [B, heads, N, head_dim]
        x = self.proj(self.norm(x.transpose(1, 2).reshape(B, N, D)))
        return join_windows(x, whole, self.window) if self.window else x


class Mlp(nn.Module):
    """[B, N, D] to [B, N, D]; `norm`, before fc2, is EVA-02's."""

    def __init__(self, width, mlp_width, act='gelu', norm=None):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * mlp_width if act == 'swiglu' else mlp_width)
        self.act = ACTIVATIONS[act]
        self.norm = norm or nn.Identity()
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post_norm x + norm(attention(x)), x + norm(mlp(x)).
    layer_scale is the first value of a learnt gain per channel. Autocast leaves LayerNorm and the residual stream x in
    float32."""

    def __init__(self, width, heads, mlp_width, eps=1e-6, act='gelu', layer_scale=None, causal=False, attn_norm=False,
                 mlp_norm=False, post_norm=False, window=0, rel_pos=0):
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, causal, nn.LayerNorm(width, eps) if attn_norm else None, window, rel_pos)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, mlp_width, act, nn.LayerNorm(mlp_width, eps) if mlp_norm else None)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((width,), float(layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((width,), float(layer_scale)))

    def forward(self, x, drop=None, rotary=None, grid=None):
        """x [B, N, D]; drop [B, 2] multiplies each image's two branches: 0 drops one, 1 / (1 - rate) keeps it."""
        attention = lambda x: self.attn(x, rotary, grid)
        for i, (branch, norm, gamma) in enumerate(((attention, self.norm1, self.gamma_1),
                                                   (self.mlp, self.norm2, self.gamma_2))):
            change = norm(branch(x)) if self.post_norm else branch(norm(x))
            if gamma is not None:
                change = change * gamma
            if drop is not None:
                change = change * drop[:, i, None, None]
            x = x + change
        return x


class ViT(nn.Module):
    """Images to tokens, pre-norm (arXiv:2010.11929), with EVA's biases. `head` is the width of an optional linear layer
    at the end: MIM's prediction, a classifier, CLIP's projection. `pool` says what it sees: None every patch, 'class'
    the class token, 'mean' the average patch. OpenAI's towers have a norm before the blocks (`pre_norm`). EVA-02 has
    act='swiglu', mlp_norm, as a CLIP attn_norm, and rotary positions besides the learnt ones: `rope` is 'index' where
    rows count 0, 1, 2, ..., or the number of rows that every grid is stretched to. With `frames` it sees clips: the
    patches of all frames are one sequence, with positions of their own. pool='map' is ViTDet's backbone: the patches as
    a map, without class token and final norm; all blocks but each global_every-th attend within windows."""

    def __init__(self, width, depth, heads, mlp_width, patch_size, image_size, head=0, head_bias=True, pool=None,
                 drop_path=0., eps=1e-6, act='gelu', pre_norm=False, patch_bias=True, mask_token=True,
                 layer_scale=None, attn_norm=False, mlp_norm=False, post_norm=False, rope=None, align_corners=False,
                 frames=1, window=0, global_every=4, rel_pos=0, mean=CLIP_MEAN, std=CLIP_STD):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        self.pool, self.patch_size, self.image_size = pool, patch_size, image_size
        check_grid(image_size, image_size, patch_size)
        if width % heads:
            raise ValueError(f'width {width} is not a multiple of heads {heads}')
        if rope and width // heads % 4:
            raise ValueError(f'width {width} / heads {heads} is not a multiple of 4, as rotary positions need: half of '
                             'the pairs of channels turn with the row, half with the column')
        if (window or rel_pos) and (pool != 'map' or rope) or pool == 'map' and (head or mask_token):
            raise ValueError("window and rel_pos go with pool='map', and that with mask_token=False, head=0, rope=None")
        self.drop_rates = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]   # 0 to drop_path
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size, bias=patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if pool != 'map' else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + frames * self.grid ** 2, width))
        self.pre_norm = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        windows = [window if layer % global_every else 0 for layer in range(1, depth + 1)]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, eps, act, layer_scale, False, attn_norm, mlp_norm,
                                          post_norm, side, rel_pos and (side or rel_pos)) for side in windows)
        self.norm = nn.LayerNorm(width, eps) if pool != 'map' else nn.Identity()
        self.head = nn.Linear(width, head, bias=head_bias) if head else nn.Identity()

    @property
    def grid(self):
        """Patches along a side."""
        return self.image_size // self.patch_size

    def normalize(self, images):
        """uint8 [B, 3, H, W] to the floats this model was trained on."""
        mean, std = (constant(tuple(self.config[name]), images.device).view(3, 1, 1) * 255 for name in ('mean', 'std'))
        return images.float().sub_(mean).div_(std)

    def tokens(self, images, mask=None, keep=None, drop=None, visit=None):
        """Tokens before the final norm, class token (if any) first: [B, 1+N, D], or [B, 1+n, D] with keep.
        images [B, 3, H, W] normalised; mask [B, N] bool, True puts the mask token there; keep [B, n] patches to pass on
        (arXiv:2212.00794); drop [B, depth, 2] numbers in [0, 1), below its layer's rate a branch is dropped. Before a
        block, and at the end (layer = depth), visit(layer, x) returns what goes on in place of x."""
        visit = visit or (lambda layer, x: x)
        if images.ndim == 5:        # clips [B, T, 3, H, W]: as an image with the frames one below another
            images = images.transpose(1, 2).flatten(2, 3)
        check_grid(*images.shape[2:], self.patch_size)
        x = self.patch_embed(images)                                       # [B, D, h, w]
        grid, positions = x.shape[2:], self.pos_embed                      # [1, 1+N, D]
        if self.config['frames'] == 1:
            positions = resize_positions(positions, grid, self.config['align_corners'])
        x = x.flatten(2).transpose(1, 2)                                   # [B, N, D]
        if mask is not None:
            x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        x = x + positions[:, 1:]
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))   # [B, n, D]
        if self.class_token is not None:
            x = torch.cat(((self.class_token + positions[:, :1]).expand(len(x), -1, -1), x), dim=1)
        x = self.pre_norm(x)                                               # [B, 1+N, D]
        rotary = None
        if self.config['rope']:
            head_dim = self.config['width'] // self.config['heads']
            rotary = rotary_positions(grid, head_dim, self.config['rope'], keep, x.device)
        if drop is None or not self.config['drop_path']:
            drop = [None] * len(self.blocks)
        else:
            rates = constant(tuple(self.drop_rates), drop.device)[:, None]
            drop = ((drop >= rates) / (1 - rates)).unbind(1)               # depth times [B, 2]
        for layer, (block, multipliers) in enumerate(zip(self.blocks, drop)):
            x = block(visit(layer, x), multipliers, rotary, grid)
        return visit(len(self.blocks), x)

    def features(self, images, mask=None, keep=None, drop=None):
        """Tokens after the final norm [B, 1+N, D]."""
        return self.norm(self.tokens(images, mask, keep, drop))

    def forward(self, images, mask=None, keep=None, drop=None):
        """The head's output: [B, N, head] per patch, [B, head] pooled; without one its input; a map: [B, D, h, w]."""
        x = self.tokens(images, mask, keep, drop)
        if self.pool == 'map':
            return x.unflatten(1, (images.shape[2] // self.patch_size, -1)).permute(0, 3, 1, 2)
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
        # elsewhere reading the length back would make the CPU wait, so the caller cuts
        length = int(end.max()) + 1 if text.device.type == 'cpu' else text.shape[1]
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


@functools.lru_cache
def constant(values, device):
    """A tuple of numbers as a tensor, moved once: a transfer makes the CPU wait for what the device is doing."""
    return torch.tensor(values, device=device)


def check_grid(height, width, patch_size):
    for side in (height, width):
        if side % patch_size or side < patch_size:
            near = max(patch_size, side // patch_size * patch_size)
            raise ValueError(f'image_size {side} is not a multiple of {patch_size}; use {near} or {near + patch_size}')


def resize_positions(pos_embed, grid, align_corners=False):
    """Position table [1, 1+n, D] for another grid (h, w): [1, 1+h*w, D]. The class token's row stays, the rest is
    interpolated as EVA does: bicubic, in float32, corners not aligned. The second EVA-CLIP package aligns them in
    OpenAI's and OpenCLIP's tables, not in its own."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (side, side) == tuple(grid):
        return pos_embed
    table = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)                   # [1, D, n, n]
    table = F.interpolate(table, size=tuple(grid), mode='bicubic', align_corners=align_corners)       # [1, D, h, w]
    return torch.cat((pos_embed[:, :1], table.flatten(2).transpose(1, 2).to(pos_embed.dtype)), dim=1)


def split_windows(x, grid, window):
    """[B, h*w, D] to [B * windows, window^2, D]. Zeros fill up the bottom and the right; they come after the norm and
    take part in attention, with the biases of q and v: the original's way."""
    (h, w), D = grid, x.shape[2]
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, -w % window, 0, -h % window)).unflatten(2, (-1, window))
    return x.unflatten(1, (-1, window)).transpose(2, 3).reshape(-1, window ** 2, D)


def join_windows(x, grid, window):
    """The inverse of split_windows: [B * windows, window^2, D] to [B, h*w, D]."""
    rows, columns = (-(-n // window) for n in grid)
    x = x.view(-1, rows, columns, window, window, x.shape[2]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :grid[0], :grid[1]].flatten(1, 2)


def distance_logits(q, grid, *tables):
    """What each query adds to its scaled logits by how far away a key is, in rows and in columns (arXiv:2112.01526); q
    itself is not scaled. q [B, heads, h*w, head_dim], tables [2n-1, head_dim] -> [B, heads, h*w, h*w]. A table for
    another side than the grid's is interpolated."""
    def between(table, n):              # the entry of every pair of n rows or columns, [n, n, head_dim]
        if len(table) != 2 * n - 1:
            table = F.interpolate(table.T[None].float(), size=2 * n - 1, mode='linear')[0].T
        place = torch.arange(n, device=table.device)
        return table[place[:, None] - place + n - 1].to(q.dtype)
    rows, columns = map(between, tables, grid)
    q = q.unflatten(2, grid)                                                # [B, heads, h, w, head_dim]
    rows, columns = torch.einsum('bnhwd,hkd->bnhwk', q, rows), torch.einsum('bnhwd,wkd->bnhwk', q, columns)
    return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


def resize_patches(kernel, patch_size):
    """A patch embedding's kernel [D, 3, p, p] for another patch size, bicubic, values not rescaled: EVA's 14 to 16."""
    resized = F.interpolate(kernel.float(), size=(patch_size, patch_size), mode='bicubic', align_corners=False)
    return resized.to(kernel.dtype)


def rotary_positions(grid, head_dim, rope, keep=None, device=None):
    """Cosines and sines [2, 1+N, head_dim/2] of the angles by which EVA-02 turns pairs of channels (arXiv:2303.11331):
    the first half of the pairs by the patch's row, the others by its column; the class token by nothing. grid (h, w),
    rope as in ViT; with keep [B, n] those of the patches passed on, [2, B, 1, 1+n, head_dim/2]."""
    half = head_dim // 2
    frequencies = 10000 ** (-torch.arange(0, half, 2, device=device) / half)                            # [head_dim/4]
    row, column = (torch.arange(n, device=device) * (1 if rope == 'index' else rope / n) for n in grid)
    row, column = (place[:, None] * frequencies for place in (row, column))                 # [h or w, head_dim/4]
    angles = torch.cat((row[:, None].expand(-1, grid[1], -1), column[None].expand(grid[0], -1, -1)), dim=-1)
    angles = F.pad(angles.flatten(0, 1), (0, 0, 1, 0))                                      # [1+N, head_dim/2]
    if keep is not None:
        angles = angles[F.pad(keep + 1, (1, 0))][:, None]                                   # [B, 1, 1+n, head_dim/2]
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, rotary):
    """Turns neighbouring channels of x [B, heads, 1+N, head_dim] by their angles."""
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rotary
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def repeat_positions(pos_embed, before, frames):
    """Position table of `before` frames [1, 1+before*N, D] for another number of them: each has that of its time."""
    table = pos_embed[:, 1:].unflatten(1, (before, -1))[:, torch.arange(frames) * before // frames]
    return torch.cat((pos_embed[:, :1], table.flatten(1, 2)), dim=1)


def sincos_positions(width, grid):
    """[1, 1+grid*grid, width]: the first half of the channels from the column, the second from the row
    (arXiv:2111.06377); the class token's row is zero."""
    frequencies = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies                             # [grid, width/4]
    side = torch.cat((angles.sin(), angles.cos()), dim=1)                          # [grid, width/2]
    table = torch.cat((side.repeat(grid, 1), side.repeat_interleave(grid, 0)), 1)  # [N, width]
    return torch.cat((torch.zeros(1, width), table))[None]


@torch.no_grad()
def init_weights(model, seed=0, gain=0):
    """First values of a ViT or a CLIP on the CPU, a function of the seed; returns the model. Biases start at 0, norms
    at 1; ViTs as narrow as ours start from sin-cos positions, which they learn from there (not in the paper). gain: a
    ViT's standard deviation times the root of its width, before it is cut at one deviation; 0 takes EVA's."""
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
                std = gain * width ** -.5 if gain else std
                table = {r'.*(attn\.proj|mlp\.fc2)': std / (2 * layer) ** .5, r'.*': std}
            if 'gamma' in name:
                weight.fill_(tower.config['layer_scale'])
            elif weight.ndim == 1 or 'rel_pos' in name:
                weight.fill_(1 if name.endswith('weight') else 0)
            elif name == 'pos_embed' and isinstance(tower, ViT) and width <= SIZES['ti']['width'] and width % 4 == 0:
                weight.copy_(repeat_positions(sincos_positions(width, tower.grid), 1, tower.config['frames']))
            else:
                std = next(std for pattern, std in table.items() if re.match(pattern, name))
                if is_clip:
                    weight.normal_(0, std, generator=generator)
                else:       # cut at one std, as EVA does, so that .0081 comes out of .015: erf(1 / sqrt(2)) = .683
                    weight.uniform_(-0.6826895, 0.6826895, generator=generator).erfinv_().mul_(2 ** .5 * std)
    if is_clip:
        model.logit_scale.fill_(math.log(1 / 0.07))
    return model


# What a released tensor is called here, a line each: its name, our name, and what is done to it. A * is one part of a
# name. Several names on a side hold one tensor's rows in turn: 'concat' joins theirs, 'split' cuts theirs, where '-' is
# the key bias. 'squeeze': theirs lacks our dimensions of 1. `save` reads the same tables backwards.

def same(*names):
    return [(name, name, 'same') for name in names]


def under(theirs, ours, rules):
    """The rules of a tower for a model that holds it under a prefix."""
    prefixed = lambda prefix, names: ' '.join(name if name == '-' else prefix + name for name in names.split())
    return [(prefixed(theirs, left), prefixed(ours, right), op) for left, right, op in rules]


EVA = [('cls_token', 'class_token', 'same'), ('patch_embed.proj.*', 'patch_embed.*', 'same'),
       *same('pos_embed', 'blocks.*.norm1.*', 'blocks.*.norm2.*', 'blocks.*.attn.proj.*')]
EVA_QKV = same('mask_token', 'blocks.*.attn.qkv.weight', 'blocks.*.attn.q_bias', 'blocks.*.attn.v_bias')
GELU_MLP = same('blocks.*.mlp.fc1.*', 'blocks.*.mlp.fc2.*', 'blocks.*.gamma_1', 'blocks.*.gamma_2')
EVA01 = EVA + EVA_QKV + GELU_MLP

EVA_L = EVA + GELU_MLP + same('blocks.*.attn.qkv.weight') + [
    ('blocks.*.attn.qkv.bias', 'blocks.*.attn.q_bias - blocks.*.attn.v_bias', 'split'),
    ('mask_token', '-', 'drop'),                       # the decoder's, as what follows
    *[(name, '-', 'drop') for name in ('decoder_pos_embed', 'decoder_embed.*', 'decoder_blocks.*.*.*',
                                       'decoder_blocks.*.*.*.*', 'decoder_norm.*', 'decoder_pred.*')],
]

THREE_PROJECTIONS = [('blocks.*.attn.q_proj.weight blocks.*.attn.k_proj.weight blocks.*.attn.v_proj.weight',
                      'blocks.*.attn.qkv.weight', 'concat')]
ROTARY_TABLES = [('rope.*', '-', 'drop'), ('blocks.*.attn.rope.*', '-', 'drop')]
EVA02 = EVA + THREE_PROJECTIONS + ROTARY_TABLES + same(
    'mask_token', 'blocks.*.attn.q_bias', 'blocks.*.attn.v_bias') + [
    ('blocks.*.attn.inner_attn_ln.*', 'blocks.*.attn.norm.*', 'same'),
    ('blocks.*.mlp.w1.weight blocks.*.mlp.w2.weight', 'blocks.*.mlp.fc1.weight', 'concat'),
    ('blocks.*.mlp.w1.bias blocks.*.mlp.w2.bias', 'blocks.*.mlp.fc1.bias', 'concat'),
    ('blocks.*.mlp.ffn_ln.*', 'blocks.*.mlp.norm.*', 'same'),
    ('blocks.*.mlp.w3.*', 'blocks.*.mlp.fc2.*', 'same'),
]
EVA02_SMALL = EVA + EVA_QKV + ROTARY_TABLES + [('blocks.*.mlp.w12.*', 'blocks.*.mlp.fc1.*', 'same'),
                                               ('blocks.*.mlp.w3.*', 'blocks.*.mlp.fc2.*', 'same')]
EVA02_TIMM = EVA + THREE_PROJECTIONS + same('blocks.*.attn.norm.*', 'blocks.*.mlp.norm.*', 'blocks.*.mlp.fc2.*') + [
    ('blocks.*.attn.q_proj.bias', 'blocks.*.attn.q_bias', 'same'),
    ('blocks.*.attn.v_proj.bias', 'blocks.*.attn.v_bias', 'same'),
    ('blocks.*.mlp.fc1_g.weight blocks.*.mlp.fc1_x.weight', 'blocks.*.mlp.fc1.weight', 'concat'),
    ('blocks.*.mlp.fc1_g.bias blocks.*.mlp.fc1_x.bias', 'blocks.*.mlp.fc1.bias', 'concat'),
]

OPENAI_BLOCKS = under('transformer.resblocks.*.', 'blocks.*.', [
    ('attn.in_proj_weight', 'attn.qkv.weight', 'same'),
    ('attn.in_proj_bias', 'attn.q_bias - attn.v_bias', 'split'),
    ('attn.out_proj.*', 'attn.proj.*', 'same'),
    ('ln_1.*', 'norm1.*', 'same'),
    ('ln_2.*', 'norm2.*', 'same'),
    ('mlp.c_fc.*', 'mlp.fc1.*', 'same'),
    ('mlp.c_proj.*', 'mlp.fc2.*', 'same'),
])
OPENAI_VISION = OPENAI_BLOCKS + [
    ('class_embedding', 'class_token', 'squeeze'),
    ('positional_embedding', 'pos_embed', 'squeeze'),
    ('conv1.weight', 'patch_embed.weight', 'same'),
    ('ln_pre.*', 'pre_norm.*', 'same'),
    ('ln_post.*', 'norm.*', 'same'),
    ('proj', 'head.weight', 'transpose'),
]
OPENAI_TEXT = OPENAI_BLOCKS + [
    ('token_embedding.weight', 'token_embed.weight', 'same'),
    ('positional_embedding', 'pos_embed', 'squeeze'),
    ('ln_final.*', 'norm.*', 'same'),
    ('text_projection', 'head.weight', 'transpose'),
]
LOGIT_SCALE = [('logit_scale', 'logit_scale', 'squeeze')]
OPENAI_CLIP = under('visual.', 'visual.', OPENAI_VISION) + under('', 'text.', OPENAI_TEXT) + LOGIT_SCALE + [
    (name, '-', 'drop') for name in ('input_resolution', 'context_length', 'vocab_size')]
OPENCLIP_TEXT = under('visual.', 'visual.', OPENAI_VISION) + under('text.', 'text.', OPENAI_TEXT) + LOGIT_SCALE

HF_BLOCKS = under('encoder.layers.*.', 'blocks.*.', [
    ('self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight', 'attn.qkv.weight', 'concat'),
    ('self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias', 'attn.q_bias - attn.v_bias', 'split'),
    ('self_attn.out_proj.*', 'attn.proj.*', 'same'),
    ('layer_norm1.*', 'norm1.*', 'same'),
    ('layer_norm2.*', 'norm2.*', 'same'),
    *same('mlp.fc1.*', 'mlp.fc2.*'),
])
HF_CLIP = under('vision_model.', 'visual.', HF_BLOCKS + [
    ('embeddings.class_embedding', 'class_token', 'squeeze'),
    ('embeddings.position_embedding.weight', 'pos_embed', 'squeeze'),
    ('embeddings.patch_embedding.weight', 'patch_embed.weight', 'same'),
    ('embeddings.position_ids', '-', 'drop'),
    ('pre_layrnorm.*', 'pre_norm.*', 'same'),
    ('post_layernorm.*', 'norm.*', 'same'),
]) + under('text_model.', 'text.', HF_BLOCKS + [
    ('embeddings.token_embedding.weight', 'token_embed.weight', 'same'),
    ('embeddings.position_embedding.weight', 'pos_embed', 'squeeze'),
    ('embeddings.position_ids', '-', 'drop'),
    ('final_layer_norm.*', 'norm.*', 'same'),
]) + LOGIT_SCALE + [
    ('visual_projection.weight', 'visual.head.weight', 'same'),
    ('text_projection.weight', 'text.head.weight', 'same'),
]

EVA_ENDS = {  # what EVA's ViTs end with: a tensor that tells, the pooling, its rules
    'MIM':                          ('lm_head.weight', None, same('norm.*') + [('lm_head.*', 'head.*', 'same')]),
    'classifier, mean patch':       ('fc_norm.weight', 'mean', [('fc_norm.*', 'norm.*', 'same')] + same('head.*')),
    'classifier, class token':      ('head.weight', 'class', same('norm.*', 'head.*')),
    'encoder':                      ('norm.weight', None, same('norm.*')),
}
QUICK = dict(act='quick_gelu', eps=1e-5)
FAMILIES = {  # tensors that only it has; its table; what its tensors do not show
    'OpenAI CLIP':              (('visual.class_embedding', 'ln_final.weight'), OPENAI_CLIP, QUICK),
    'OpenCLIP, custom text':    (('visual.class_embedding', 'text.ln_final.weight'), OPENCLIP_TEXT, dict(eps=1e-5)),
    'Hugging Face CLIP':        (('vision_model.pre_layrnorm.weight', 'visual_projection.weight'), HF_CLIP, QUICK),
    'OpenAI CLIP, vision tower': (('class_embedding', 'ln_post.weight'), OPENAI_VISION, QUICK),
}
for _name, _mark, _rules in (('EVA-02', 'blocks.0.mlp.w1.weight', EVA02),
                             ('EVA-02 small', 'blocks.0.mlp.w12.weight', EVA02_SMALL),
                             ('EVA-02 timm', 'blocks.0.mlp.fc1_g.weight', EVA02_TIMM),
                             ('EVA-L', 'blocks.0.attn.qkv.bias', EVA_L),
                             ('EVA-01', 'blocks.0.attn.q_bias', EVA01)):
    FAMILIES[_name + ' CLIP'] = (('visual.' + _mark, 'text.ln_final.weight'), under(
        'visual.', 'visual.', _rules + EVA_ENDS['classifier, class token'][2]) + under('text.', 'text.', OPENAI_TEXT)
        + LOGIT_SCALE + [('text.logit_scale', 'logit_scale', 'squeeze')], {})      # the first package's
    for _end, (_tells, _pool, _last) in EVA_ENDS.items():
        FAMILIES[f'{_name} {_end}'] = ((_mark, _tells), _rules + _last, dict(pool=_pool))


def rename(name, pattern, target):
    """name in the target's form, or None where the pattern does not fit; * stands for one part of a dotted name."""
    match = re.fullmatch(re.escape(pattern).replace(r'\*', r'([^.]+)'), name)
    if match:
        parts = iter(match.groups())
        return re.sub(r'\*', lambda _: next(parts), target)


def original_name(name, rules):
    """What a released file calls our tensor; None where it has no place for it."""
    names = (rename(name, target, theirs.split()[0]) for theirs, targets, _ in rules for target in targets.split())
    return next(filter(None, names), None)


def translate(state, rules):
    """Tensors under our names (those that no rule names keep theirs), the key biases by their names, and how many
    tensors each rule took."""
    ours, left, key_biases, counts = {}, dict(state), {}, [0] * len(rules)
    for i, (theirs, targets, op) in enumerate(rules):
        theirs, targets = theirs.split(), targets.split()
        for name in [name for name in left if rename(name, theirs[0], '') is not None]:
            sources = [rename(name, theirs[0], pattern) for pattern in theirs]
            missing = [source for source in sources if source not in left]
            if missing:
                raise ValueError(f'weights do not fit the model: missing {missing[0]}')
            pieces = [left.pop(source) for source in sources]
            counts[i] += len(pieces)
            if op == 'drop':
                continue
            if len({piece.shape for piece in pieces}) > 1:
                shapes = ', '.join(f'{source} {list(piece.shape)}' for source, piece in zip(sources, pieces))
                raise ValueError(f'weights do not fit the model: {shapes} are to be one tensor')
            tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0].T if op == 'transpose' else pieces[0]
            pieces = [piece.clone() for piece in tensor.chunk(len(targets))] if op == 'split' else [tensor]
            for target, piece in zip(targets, pieces):
                if target == '-':
                    key_biases[name] = piece
                else:
                    ours[rename(name, theirs[0], target)] = piece
    return {**ours, **left}, key_biases, counts


def translate_back(state, rules):
    """Our tensors under a family's names; those that it has no place for keep ours."""
    theirs, left = {}, dict(state)
    for names, targets, op in rules:
        names, targets = names.split(), targets.split()
        for name in [name for name in left if op != 'drop' and rename(name, targets[0], '') is not None]:
            pieces = [None if target == '-' else left.pop(rename(name, targets[0], target)) for target in targets]
            pieces = [torch.zeros_like(pieces[0]) if piece is None else piece for piece in pieces]      # key biases
            tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            tensor = tensor.T if op == 'transpose' else tensor.squeeze() if op == 'squeeze' else tensor
            for target, piece in zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor]):
                theirs[rename(name, targets[0], target)] = piece.contiguous()
    return {**theirs, **left}


def family_of(state):
    """The name of the first family all of whose marks the tensors' names have."""
    family = next((family for family, (marks, *_) in FAMILIES.items() if state.keys() >= set(marks)), None)
    if family is None:
        some = ', '.join(list(state)[:3]) or 'none'
        raise ValueError(f'tensors of no known model ({some}, ...); known are nanoEVA, OpenAI CLIP, OpenCLIP, '
                         'Hugging Face CLIP, EVA-01, EVA-L, EVA-02 and their CLIPs')
    return family


def tower_config(state, prefix='', act='gelu', eps=1e-6, pool='class'):
    """The ViT's options that its tensors under our names show. A head is 64 wide but in the largest models, which have
    16, and EVA-02-CLIP-E, whose MLP is the widest, has its norms after its branches: the things they do not show."""
    def rows(name, dim=0):
        return state[prefix + name].shape[dim] if prefix + name in state else 0
    width, patch_size = state[prefix + 'class_token'].shape[-1], state[prefix + 'patch_embed.weight'].shape[-1]
    mlp_width, grid = state[prefix + 'blocks.0.mlp.fc2.weight'].shape[1], state[prefix + 'pos_embed'].shape[-2] - 1
    swiglu = state[prefix + 'blocks.0.mlp.fc1.weight'].shape[0] == 2 * mlp_width
    return dict(width=width, depth=count_layers(state, prefix), mlp_width=mlp_width, patch_size=patch_size,
                heads=16 if width in (1280, 1408, 1664, 1792) else max(1, width // 64),
                image_size=math.isqrt(grid) * patch_size, head=rows('head.weight'),
                head_bias=bool(rows('head.bias')) or not rows('head.weight'),
                pool=pool, eps=eps, act='swiglu' if swiglu else act, pre_norm=bool(rows('pre_norm.weight')),
                patch_bias=bool(rows('patch_embed.bias')), mask_token=bool(rows('mask_token')),
                layer_scale=1. if rows('blocks.0.gamma_1') else None, attn_norm=bool(rows('blocks.0.attn.norm.weight')),
                mlp_norm=bool(rows('blocks.0.mlp.norm.weight')), post_norm=mlp_width > 8 * width,
                rope=None if not swiglu else 'index' if pool is None else 16)


def count_layers(state, prefix=''):
    layers = [int(name[len(prefix):].split('.')[1]) for name in state if name.startswith(prefix + 'blocks.')]
    return 1 + max(layers, default=-1)


def family_config(state, family):
    """The config of a family's tensors, under our names: a ViT's, or a CLIP's by tower."""
    _, rules, options = FAMILIES[family]
    try:
        if 'logit_scale' not in (ours for _, ours, _ in rules):
            return tower_config(state, **options)
        width, depth = state['text.token_embed.weight'].shape[1], count_layers(state, 'text.')
        text = dict(width=width, depth=depth, heads=max(1, width // 64), vocab=len(state['text.token_embed.weight']),
                    embed=len(state['text.head.weight']), context=state['text.pos_embed'].shape[-2],
                    act=options.get('act', 'gelu'))
        return dict(vision=tower_config(state, 'visual.', **options), text=text)
    except KeyError as key:
        raise ValueError(f'weights of {family} miss {original_name(key.args[0], rules) or key}') from None
    except IndexError:
        raise ValueError(f'weights of {family} lack a dimension') from None


def override(before, changes, state, prefix, tower):
    """A tower's config with changes, and what starts afresh because of them. Positions are resized to a new grid, the
    patch embedding to a new patch."""
    known = inspect.signature(tower).parameters
    for name in changes:
        if name not in known:
            raise ValueError(f'{tower.__name__} has no option {name}; it has {", ".join(known)}')
    after = {**before, **changes}
    changed = {name for name in changes if after[name] != before.get(name)}
    fresh = [prefix + name for name in ('head', 'mask_token') if changed & {name, name + '_bias'}]
    if 'pool' in changed and after['pool'] == 'mean':
        fresh.append(prefix + 'norm.')
    if 'pool' in changed and after['pool'] == 'map':
        for name in [name for name in state if re.match(prefix + r'(class_token|mask_token|norm\.|head\.)', name)]:
            del state[name]
    if changed & {'rel_pos', 'window'}:
        fresh += [f'{prefix}blocks.{layer}.attn.rel_pos' for layer in range(after['depth'])]
    if changed & {'image_size', 'patch_size'}:
        check_grid(after['image_size'], after['image_size'], after['patch_size'])
        if before.get('frames', 1) > 1:
            raise ValueError('positions of clips are not resized: keep the image_size and patch_size of the weights')
        table, grid = state[prefix + 'pos_embed'], after['image_size'] // after['patch_size']
        state[prefix + 'pos_embed'] = resize_positions(table.view(1, *table.shape[-2:]), (grid, grid),
                                                       after.get('align_corners', False))
    if 'patch_size' in changed:
        state[prefix + 'patch_embed.weight'] = resize_patches(state[prefix + 'patch_embed.weight'], after['patch_size'])
    frames = before.get('frames', 1)
    if after.get('frames', 1) != frames:
        table = state[prefix + 'pos_embed']
        state[prefix + 'pos_embed'] = repeat_positions(table.view(1, *table.shape[-2:]), frames, after['frames'])
    return after, fresh


def check_tensors(model, state, fresh, rules):
    """A missing, extra or wrong-shape tensor is an error that names it; those that start as `fresh` does may miss."""
    own, theirs = model.state_dict(), lambda name: original_name(name, rules) or name
    wrong = [f'missing {theirs(name)}' for name in own if name not in state and not name.startswith(fresh)]
    wrong += [f'unexpected {name}' for name in state if name not in own]
    for name in [name for name in own if name in state]:     # released ones may lack dimensions of 1 that ours have
        given, expected = list(state[name].shape), list(own[name].shape)
        if [n for n in given if n > 1] != [n for n in expected if n > 1]:
            wrong.append(f'{theirs(name)} of shape {given} instead of {expected}')
    if wrong:
        more = f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        raise ValueError('weights do not fit the model: ' + '; '.join(wrong[:5]) + more)


@torch.no_grad()
def fill(model, state, fresh=(), rules=(), assign=False):
    """Gives a model on the meta device its tensors, strictly; those that start with a name in `fresh` get initial
    values. With assign they are the given ones where those are float32: what is mapped from a file stays there."""
    fresh = tuple(fresh)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(fresh)}
    check_tensors(model, state, fresh, rules)
    if fresh:
        empty = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items() if name not in state}
        model.load_state_dict(empty, strict=False, assign=True)
        init_weights(model)         # the others are on the meta device still, where this costs nothing
    filled, seen = {}, set()
    for name, parameter in model.state_dict().items():
        if name in state:
            tensor = state[name].reshape(parameter.shape).float().contiguous()
            storage = None if tensor.is_meta else tensor.untyped_storage().data_ptr()
            filled[name] = tensor.clone() if not assign or storage in seen else tensor     # no two share their memory
            seen |= {storage} - {None}
    model.load_state_dict(filled, strict=False, assign=True)


def load_state(state, name=None, config=None, expected=None, assign=False, **overrides):
    """Tensors, of our own format (its class name and config given) or of a family in FAMILIES, to a model in eval mode.
    overrides change the config, CLIP's by tower (vision=dict(...)): a new image_size resizes positions, a new
    patch_size patch kernels too; a new head, mask_token or pool='mean' (whose norm EVA starts afresh) starts with
    initial values instead of the file's. With assign the model takes the tensors themselves, else copies."""
    state, rules, key_biases, family = dict(state), (), {}, None
    if config is None:
        family = family_of(state)
        rules = FAMILIES[family][1]
        state, key_biases, counts = translate(state, rules)
        config = family_config(state, family)
        name = 'CLIP' if 'vision' in config else 'ViT'
    if expected and name != expected.__name__:
        raise ValueError(f'this is a {name}, expected a {expected.__name__}')
    if name == 'CLIP':
        if overrides.keys() - {'vision', 'text'}:
            raise ValueError(f"a CLIP's options go by tower: vision=dict({', '.join(overrides)}=...) or text=dict(...)")
        vision, fresh = override(config['vision'], overrides.get('vision', {}), state, 'visual.', ViT)
        text, fresh_text = override(config['text'], overrides.get('text', {}), state, 'text.', TextTower)
        config, fresh = dict(vision=vision, text=text), fresh + fresh_text
    else:
        config, fresh = override(config, overrides, state, '', ViT)
    if config.get('vision', config).get('rope'):
        for bias, values in key_biases.items():
            if not bias.startswith('text.') and values.any():
                raise ValueError(f'{bias} has key biases; under rotary positions they matter, and this ViT has none')
    try:
        with torch.device('meta'):             # no time is spent on values that will be replaced
            model = CLIP(**config) if name == 'CLIP' else ViT(**config)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f'this config makes no {name}: {first_line(error)}') from None
    fill(model, state, fresh, rules, assign)
    model.extra = {}
    if family:
        note(family, counts, key_biases, overrides)
    return model.eval()


def note(family, counts, key_biases, overrides):
    """Says what of a file is not in the model, and what was supposed."""
    (_, rules, options), notes = FAMILIES[family], []
    openai = any(count for (theirs, *_), count in zip(rules, counts) if theirs == 'input_resolution')   # in no other's
    if options.get('act') == 'quick_gelu' and not openai and 'act' not in overrides.get('vision', overrides):
        notes.append("QuickGELU supposed, OpenAI's; LAION's models need vision=dict(act='gelu'), text=dict(act='gelu')")
    if key_biases:
        numbers = sum(bias.numel() for bias in key_biases.values())
        notes.append(f'{len(key_biases)} key biases dropped ({numbers:,} numbers, which softmax cancels)')
    dropped = [f'{theirs} ({count})' for (theirs, _, op), count in zip(rules, counts) if count and op == 'drop']
    if dropped:
        notes.append('dropped ' + ', '.join(dropped))
    if notes:
        print0(f'{family} weights: ' + '; '.join(notes))


def own_family(model, names):
    """The family whose names `save` writes: names is its name, or 'eva' or 'openai' for the one that fits the model."""
    if names == 'openai':
        names = 'OpenAI CLIP' if isinstance(model, CLIP) else 'OpenAI CLIP, vision tower'
    elif names == 'eva':
        config = model.config.get('vision', model.config)
        names = 'EVA-02 ' if config['mlp_norm'] else 'EVA-02 small ' if config['act'] == 'swiglu' else 'EVA-01 '
        end = next(end for end, (_, pool, _) in EVA_ENDS.items() if pool == config['pool'])
        names += 'CLIP' if isinstance(model, CLIP) else end
    if names not in FAMILIES:
        raise ValueError(f"names {names!r} are not known; use 'ours', 'eva', 'openai', or one of {', '.join(FAMILIES)}")
    return names


def export(model, names):
    """The model's tensors under a family's names; says what a reader of these must be told."""
    family = own_family(model, names)
    rules = FAMILIES[family][1]
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.get('vision', model.config)['pool']:            # nothing hides patches from a classifier or a CLIP
        state = {name: tensor for name, tensor in state.items() if not name.endswith('mask_token')}
    theirs = translate_back(state, rules)
    homeless = [name for name in state if not original_name(name, rules)]
    if homeless:
        raise ValueError(f"{family} has no names for {', '.join(homeless[:3])}; use names='eva' or 'ours'")
    ours, _, counts = translate(theirs, rules)
    if any('pre_norm' in targets and not count for (_, targets, _), count in zip(rules, counts)):
        raise ValueError(f"{family} has a norm before its blocks, this model has none; use names='eva' or 'ours'")
    shown = family_config(ours, family)
    towers = [(model.config, shown)] if 'vision' not in shown else zip(model.config.values(), shown.values())
    told = [f'{name}={config[name]!r}' for config, shown in towers for name in shown
            if config[name] != shown[name] and name not in ('mask_token', 'layer_scale')]
    if told:
        print0(f'the names of {family} do not tell a reader of {", ".join(told)}')
    return theirs


def save(model, path, names='ours', **extra):
    """One portable file that `load` reads: class, config, tensors, and plain data such as a vocabulary in extra. With
    names='eva' or 'openai' the tensors alone under their names, for timm, EVA's code, OpenCLIP or OpenAI's."""
    state = model.state_dict() if names == 'ours' else export(model, names)
    held = state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    if names == 'ours':
        held = dict(format='nanoEVA', name=type(model).__name__, config=model.config, state_dict=state, extra=extra)
    try:
        torch.save(held, path + '.tmp')
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:     # torch's writer raises RuntimeError when the disk is full
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        raise ValueError(f'{path} cannot be written ({first_line(error)})') from None


SAFETENSORS = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
               'I64': torch.int64, 'I32': torch.int32, 'U8': torch.uint8, 'BOOL': torch.bool}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: the length of a JSON header in 8 bytes, the header, raw bytes."""
    with open(path, 'rb') as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)      # what is written to it stays in memory
    start, state = 8 + int.from_bytes(mapped[:8], 'little'), {}
    header = json.loads(mapped[8:start])
    header.pop('__metadata__', None)
    for name, about in header.items():
        dtype, (first, last) = SAFETENSORS[about['dtype']], about['data_offsets']
        if last - first != math.prod(about['shape']) * dtype.itemsize or first < 0 or start + last > len(mapped):
            raise ValueError(f'{name} does not lie in the file')
        tensor = torch.frombuffer(mapped, dtype=dtype, count=(last - first) // dtype.itemsize, offset=start + first)
        state[name] = tensor.view(about['shape'])
    return state


STORAGES = {'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
            'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32}


class Stand:
    """Stands for an object of whatever class a TorchScript archive names: attributes, no code."""


class ArchiveUnpickler(pickle.Unpickler):
    """Reads a TorchScript archive's tree of modules: tensors, containers and stand-ins. Nothing of the file is run."""

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(folder + '/data.pkl')))
        self.archive, self.folder, self.storages = archive, folder, {}

    def find_class(self, module, name):
        if module.split('.')[0] == '__torch__':
            return Stand
        known = {('torch', storage): dtype for storage, dtype in STORAGES.items()}
        known |= {('collections', 'OrderedDict'): dict, ('torch._utils', '_rebuild_tensor_v2'): self.tensor}
        known |= {('torch.jit._pickle', f'build_{kind}list'): list for kind in ('int', 'double', 'bool', 'tensor')}
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
        return torch.as_strided(storage, shape, stride, offset)          # raises where it would leave the storage


def module_tensors(module, prefix=''):
    """{name: tensor} of a tree of stand-ins."""
    state = {}
    for name, value in vars(module).items():
        if torch.is_tensor(value):
            state[prefix + name] = value
        elif isinstance(value, Stand):
            state.update(module_tensors(value, f'{prefix}{name}.'))
    return state


def read(path):
    """What a file holds, mostly a dict of tensors: torch.save's (which stay in the file until used), a .safetensors
    file's, or a TorchScript archive's, OpenAI's format."""
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                scripted = [name for name in archive.namelist() if name.endswith('/constants.pkl')]
                if scripted:
                    return module_tensors(ArchiveUnpickler(archive, scripted[0].rsplit('/', 1)[0]).load())
        with open(path, 'rb') as file:
            if file.read(9)[8:] == b'{':
                return read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):     # the options that EVA's files keep
            return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror or error}); give a checkpoint file') from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError,
            AssertionError, OverflowError, zipfile.BadZipFile) as error:
        code = re.search(r'GLOBAL ([\w.]+)', str(error))
        if code:
            raise ValueError(f'{path} asks for {code[1]}, which is code and no tensor; nothing of it was run') from None
        raise ValueError(f'{path} is not a checkpoint of tensors, or not a whole one') from None


def unwrap(held):
    """The tensors of a checkpoint: in the innermost of the usual dicts, without the prefixes that wrappers leave."""
    for wrapper in ('model', 'module', 'state_dict', 'model_ema'):
        held = held[wrapper] if isinstance(held.get(wrapper), dict) else held
    state = {str(name).replace('_orig_mod.', ''): tensor for name, tensor in held.items() if torch.is_tensor(tensor)}
    for prefix in ('module.', 'visual.'):
        if state and all(name.startswith(prefix) for name in state):
            state = {name[len(prefix):]: tensor for name, tensor in state.items()}
    return {name.replace('visual.trunk.', 'visual.'): tensor for name, tensor in state.items()}      # timm in OpenCLIP


def load(path, expected=None, **overrides):
    """A ViT or a CLIP in eval mode, recognised by what the file holds; see load_state for the overrides. If one of the
    two classes is expected, the other is refused. What `save` was given beside the model is in `model.extra`."""
    held = read(path)
    if not isinstance(held, dict):
        raise ValueError(f'{path} holds a {type(held).__name__}, expected a dict of tensors')
    try:
        if held.get('format') == 'nanoEVA':
            model = load_state(held['state_dict'], held['name'], held['config'], expected, assign=True, **overrides)
            model.extra = held['extra']
            return model
        return load_state(unwrap(held), expected=expected, assign=True, **overrides)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def load_as(Class, load_released, path, held=None):
    """A stage's own Class of model in eval mode, from a file of ours or, by load_released(tensors), a released one.
    What `save` was given beside it is in `.extra`. held: what the file holds, if it has been read."""
    held = held or read(path)
    try:
        if not isinstance(held, dict) or held.get('format') != 'nanoEVA':
            model = load_released(unwrap(held))
            model.extra = {}
            return model
        if held['name'] != Class.__name__:
            raise ValueError(f"this is a {held['name']}, expected a {Class.__name__}; train one with --init {path}")
        with torch.device('meta'):
            model = Class(**held['config'])
        fill(model, held['state_dict'], assign=True)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    model.extra = held['extra']
    return model.eval()


def describe(path):
    """Prints what a file is, and which of its tensors become which of ours."""
    model, held = load(path), read(path)
    towers = dict(vision=model.visual, text=model.text) if isinstance(model, CLIP) else {'': model}
    ours = held.get('format') == 'nanoEVA'
    state = held['state_dict'] if ours else unwrap(held)
    family = 'nanoEVA' if ours else family_of(state)
    parameters, vision = sum(weight.numel() for weight in model.parameters()), towers.get('vision', model)
    print(f'{path}: names of {family}, {os.path.getsize(path) / 1e6:,.1f} MB')
    print(f'a {type(model).__name__} of {parameters:,} parameters, {vision.image_size} px in {vision.grid} x '
          f'{vision.grid} patches of {vision.patch_size} px')
    for tower, module in towers.items():
        print(tower, *(f'{name}={value}' for name, value in module.config.items() if name not in ('mean', 'std')))
    rules = FAMILIES[family][1] if not ours else same(*dict.fromkeys(re.sub(r'\.\d+\.', '.*.', n) for n in state))
    for (theirs, targets, op), count in zip(rules, translate(state, rules)[2]):
        if count:
            print(f'{count:5} {op:9} {theirs}' + (f' -> {targets}' if targets != theirs and op != 'drop' else ''))


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


@torch.no_grad()
def kmeans(features, centres, rounds=20):
    """Centres of unit length [K, C] of features [n, C] by cosine, from the given ones. A centre that nothing is nearest
    to stays where it was."""
    features, centres = (F.normalize(x.float(), dim=-1) for x in (features, centres))
    for _ in range(rounds):
        nearest = torch.cat([(part @ centres.T).argmax(-1) for part in features.split(8192)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = torch.where(sums.norm(dim=-1, keepdim=True) > 0, F.normalize(sums, dim=-1), centres)
    return centres


def principal_axes(features):
    """Three axes on which features look most different, and their range: what turns [..., C] into RGB."""
    features = features.flatten(0, -2).float().cpu()
    mean = features.mean(0)
    axes = torch.linalg.eigh((features - mean).T @ (features - mean))[1][:, -3:].flip(1)        # [C, 3]
    projected = (features - mean) @ axes
    low, high = projected.quantile(.02, dim=0), projected.quantile(.98, dim=0)
    return lambda x: (((x.float().cpu() - mean) @ axes - low) / (high - low)).clamp(0, 1)


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


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: python model.py WEIGHTS')
    try:
        describe(sys.argv[1])
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
