"""
The models of every stage, in this order: sizes; the ViT; the text tower and CLIP; initial weights; reading and writing
weights; probes of frozen features.

    model = init_weights(ViT(**SIZES['nano'], head=64), seed=0)
    model = load('eva.pt')                                 # a ViT or a CLIP in eval mode; model.config rebuilds it
"""
import contextlib
import math
import os
import pickle
import re

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
