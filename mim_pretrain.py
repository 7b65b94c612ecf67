"""
Stage 1, masked image modelling: the ViT sees 60% of an image's patches and regresses the CLIP features of the other
40%. EVA, arXiv:2211.07636, section 2.2.

    python mim_pretrain.py                                 # laptop, minutes: trains its teacher first
    python mim_pretrain.py --image mine.jpg                # what the trained model makes of any picture
    torchrun --nproc_per_node=8 mim_pretrain.py --size g   # the paper's 1B model
"""
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import model as M
import run
from model import print0
from run import option


@dataclass
class Config(run.Run):
    teacher: str = option('', "a CLIP's file; without it the built-in teacher, trained at first use")
    target: str = option('clip', "what is reconstructed: clip (EVA), tokens (k-means codes of its features), distill "
                                 '(no mask), pixels (normalised, as MAE), untrained (random features)')
    mask: str = option('block', "what is hidden: block (EVA's), random, or columns (half of all: EVA's validation)")
    mask_ratio: float = option(105 / 256, 'share of the patches hidden: 105 of 256')
    drop_path: float = option(.1, 'chance of skipping a residual branch in the last block, growing linearly with depth')
    init_gain: float = option(0., "initial weights' standard deviation times sqrt(width), before the cut; 0: EVA's")
    warmup_steps: int = option(100, 'steps of linear warm-up')
    min_lr: float = option(1e-5, 'learning rate at the last step')
    cooldown: int = option(0, 'steps at the end in which the rate falls linearly, constant before; 0: a cosine')
    branch: str = option('', 'folder of a like run of other length: start where its learning rate began to fall')
    study: str = option('', 'only run a study of how it scales: sizes, data, targets, controls or transfer')
    weight_decay: float = option(.05, 'of matrices; vectors and positions have none')
    betas: tuple = option((.9, .98), "AdamW's")
    eps: float = option(1e-6, "AdamW's")
    grad_clip: float = option(3., 'largest global gradient norm')


RECIPES = {  # differences from the defaults. g: the paper; ti to l: EVA-02's; the rest ours, tuned on two cores
    'pico':  dict(batch_size=64, steps=1600, lr=6e-3, drop_path=0., save_every=400),
    'nano':  dict(batch_size=64, steps=1600, lr=4e-3, drop_path=0., save_every=400),
    'micro': dict(batch_size=64, steps=1600, lr=3e-3, drop_path=0., save_every=400),
    'mini':  dict(batch_size=64, steps=1600, lr=2.5e-3, drop_path=0., save_every=400),
    'ti':    dict(batch_size=4000, steps=852_000,   lr=3e-3,   drop_path=0., warmup_steps=3550),   # 240 epochs, IN-21K
    's':     dict(batch_size=4000, steps=852_000,   lr=3e-3,   drop_path=0., warmup_steps=3550),
    'b':     dict(batch_size=2048, steps=1_040_000, lr=1.5e-3, drop_path=0., warmup_steps=6934),     # 150 epochs
    'l':     dict(batch_size=2048, steps=1_040_000, lr=1.5e-3, warmup_steps=6934),
    'g':     dict(batch_size=4096, steps=1_086_300, lr=1e-3,   warmup_steps=14_484,    # 150 x 7,242
                  checkpoint_activations=True),
}
TARGETS = ('clip', 'tokens', 'distill', 'pixels', 'untrained')
VIT_L_14 = ('https://openaipublic.azureedge.net/clip/models/'      # its SHA-256 is part of the address
            'b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt')
NUM_CODES = 512         # k-means centres of --target tokens
NUM_EVAL = 1024         # validation images; the same, with the same masks, for every run of at least as many
BANK = 65_536           # training patches: the picture looks for the nearest among them, k-means for its centres


# ---- the idea ---------------------------------------------------------------------------------------------------

def block_mask(index, grid, num_hidden, seed=0):
    """Block-wise masks (BEiT's; EVA, section 2.2): rectangles until num_hidden of grid x grid patches are hidden, or
    ten tries in a row fit nowhere, so a mask may fall a little short. index int64 [B] -> [B, N] bool, True = hidden."""
    smallest = max(4, grid * grid // 16)                            # 16 of 256 patches
    mask = torch.zeros(len(index), grid, grid, dtype=torch.bool)
    hidden, failures, places = torch.zeros(len(index)), torch.zeros(len(index)), torch.arange(grid)
    attempt = 0
    while (active := (hidden < num_hidden) & (failures < 10)).any():
        u = data.uniform(seed, f'block {attempt}', index.cpu(), 4).double()
        left_over = num_hidden - hidden
        area = smallest + u[:, 0] * (left_over - smallest)      # the bounds cross when few are left, as in the original
        aspect = torch.exp((2 * u[:, 1] - 1) * math.log(1 / .3))    # log-uniform in .3 to 3.3
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top, left = (u[:, 2] * (grid - height + 1)).floor(), (u[:, 3] * (grid - width + 1)).floor()
        in_rows = (places >= top[:, None]) & (places < (top + height)[:, None])             # [B, grid]
        in_columns = (places >= left[:, None]) & (places < (left + width)[:, None])
        block = in_rows[:, :, None] & in_columns[:, None, :]
        new = (block & ~mask).sum((1, 2))
        taken = active & (height < grid) & (width < grid) & (new > 0) & (new <= left_over)
        mask |= block & taken[:, None, None]
        hidden += new * taken
        failures = torch.where(taken, 0, failures + 1)
        attempt += 1
    return mask.flatten(1)


def make_mask(kind, index, grid, mask_ratio, seed=0):
    """[B, N] bool, True = hidden, for sample numbers index [B]: a function of (seed, index) alone."""
    num_hidden = round(grid * grid * mask_ratio)                    # 105 of 256, 26 of 64
    if kind == 'block':
        return block_mask(index, grid, num_hidden, seed)
    if kind == 'random':
        return data.uniform(seed, 'mask', index.cpu(), grid * grid).argsort(1).argsort(1) < num_hidden
    return (torch.arange(grid * grid) % 2 == 0).expand(len(index), -1)      # columns: every even token


def mim_loss(predictions, targets, mask):
    """Mean negative cosine similarity over the hidden patches only, in fp32; neither side is centred or scaled.
    predictions, targets [B, N, C]; mask [B, N] bool, True = hidden. EVA, section 2.2."""
    predictions, targets = predictions[mask], targets[mask]         # [M, C]
    return -F.cosine_similarity(predictions.float(), targets.float(), dim=-1).mean()


def teacher_features(teacher, images, grid):
    """The target: the projected features of all patches of the same crop, resized so that the teacher's grid is ours.
    images uint8 [B, 3, H, W] -> [B, N, C]."""
    size = grid * teacher.config['vision']['patch_size']
    images = teacher.normalize(images)
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode='bicubic', antialias=True)
    return teacher.patch_features(images)


# ---- other targets: the pilot study -----------------------------------------------------------------------------

def token_loss(predictions, targets, mask, codebook):
    """Cross-entropy of each hidden patch's code, the centre nearest to its features: BEiT v2's way, which EVA's table 1
    compares. predictions [B, N, K] logits; targets [B, N, C]; mask [B, N]; codebook [K, C] of unit length."""
    codes = (targets[mask].float() @ codebook.T).argmax(-1)                     # [M]
    return F.cross_entropy(predictions[mask].float(), codes)


def normalized_patches(images, grid):
    """Each patch's pixels with mean 0 and variance 1: MAE's target. uint8 [B, 3, H, W] -> [B, N, 3 * size * size]."""
    size = images.shape[-1] // grid
    patches = F.unfold(images.float() / 255, size, stride=size).transpose(1, 2)
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


class Target:
    """One of TARGETS: what is reconstructed, with which loss, and how a prediction compares with it. EVA, table 1.
    teacher: a CLIP, or None for pixels; codebook [NUM_CODES, C] for tokens."""

    def __init__(self, kind, grid, teacher=None, codebook=None):
        self.kind, self.grid, self.teacher, self.codebook = kind, grid, teacher, codebook
        self.masked = kind != 'distill'         # distillation sees every patch, and regresses every one

    def of(self, images):
        """images uint8 [B, 3, H, W] -> [B, N, C]; for tokens the features whose codes are predicted."""
        if self.kind == 'pixels':
            return normalized_patches(images, self.grid)
        return teacher_features(self.teacher, images, self.grid)

    def loss(self, predictions, targets, mask):
        """Mean over the patches of the mask [B, N], or of its places, which index without waiting for the device."""
        if self.kind == 'tokens':
            return token_loss(predictions, targets, mask, self.codebook)
        if self.kind == 'pixels':
            return F.mse_loss(predictions[mask].float(), targets[mask].float())     # MAE, arXiv:2111.06377
        return mim_loss(predictions, targets, mask)

    def predict(self, model, images, mask):
        """What the model says of every patch, as of(images) would: [B, N, C]; for tokens the centres' mean."""
        x = model(model.normalize(images), mask if self.masked else None).float()
        return x.softmax(-1) @ self.codebook if self.kind == 'tokens' else x


# ---- measuring --------------------------------------------------------------------------------------------------

class Validation(NamedTuple):
    images: torch.Tensor        # uint8 [B, 3, H, W]
    mask: torch.Tensor          # bool [B, N], True = hidden
    targets: torch.Tensor       # [B, N, C]
    position: torch.Tensor      # [B, N], cosine of the best constant vector per position
    inpaint: torch.Tensor       # [B, N], cosine of features interpolated from what is visible


def hidden_distance(mask, grid):
    """Steps (chessboard king's) from each patch to the nearest visible one, 0 for visible patches: [B, N]."""
    hidden = mask.view(-1, 1, grid, grid).float()
    distance = torch.zeros_like(hidden)
    for _ in range(grid):
        distance += hidden
        hidden = -F.max_pool2d(F.pad(-hidden, (1,) * 4, value=-1.), 3, 1)       # erode: beyond the border is hidden too
    return distance.view_as(mask).long()


def interpolate_hidden(features, mask, grid, sharpness):
    """Fills hidden patches with the mean of the visible ones, weighted by exp(-sharpness * squared distance)."""
    place = torch.arange(grid * grid, device=mask.device)
    row, column = place // grid, place % grid
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2                       # [N, N]
    weights = (-sharpness * squared).float().expand(len(mask), -1, -1).masked_fill(mask[:, None, :], -torch.inf)
    return weights.softmax(-1) @ features.float()                                               # [B, N, C]


@torch.no_grad()
def make_validation(cfg, dataset, target, image_size, num, device):
    """Validation images, masks and targets, and the two baselines that any prediction has to beat."""
    grid = target.grid
    images = torch.cat([batch['images'] for batch in
                        data.eval_batches(dataset, 64, image_size, num, device, cfg.workers)])
    mask = make_mask(cfg.mask, torch.arange(len(images)), grid, cfg.mask_ratio, seed=-1).to(device)
    targets = torch.cat([target.of(part) for part in images.split(64)])
    # the sum of unit vectors points where their mean cosine is largest: no constant per position can do better
    directions = F.normalize(targets.float(), dim=-1) * mask[..., None]
    position = F.cosine_similarity(directions.sum(0).expand_as(targets), targets, dim=-1)
    visible = torch.cat([target.of(paint_hidden(*part)) for part in zip(images.split(64), mask.split(64))])
    inpaint = [F.cosine_similarity(interpolate_hidden(visible, mask, grid, sharpness), targets, dim=-1)
               for sharpness in (.25, .5, 1., 2.)]
    inpaint = max(inpaint, key=lambda cosine: cosine[mask].mean())      # the best of four kernels: a strict baseline
    return Validation(images, mask, targets, position, inpaint)


def paint_hidden(images, mask, value=128):
    """Images with their hidden patches painted grey. images uint8 [B, 3, H, W], mask [B, N]."""
    grid = math.isqrt(mask.shape[1])
    pixels = F.interpolate(mask.view(-1, 1, grid, grid).float(), size=images.shape[-2:], mode='nearest') > 0
    return torch.where(pixels, value, images)


@torch.no_grad()
def evaluate(model, target, val, autocast):
    """Cosine on the hidden validation patches, what the two baselines reach there, and skill = (cosine - baseline) /
    (1 - baseline) over the position baseline; also by the distance to the nearest visible patch."""
    cosine = []
    for images, mask, targets in zip(val.images.split(64), val.mask.split(64), val.targets.split(64)):
        with autocast:
            predictions = target.predict(model, images, mask)                       # [B, N, C]
        cosine.append(F.cosine_similarity(predictions.float(), targets.float(), dim=-1))
    cosine, distance = torch.cat(cosine), hidden_distance(val.mask, math.isqrt(val.mask.shape[1]))     # [B, N]

    def skill(cosine, patches):
        baseline = val.position[patches].mean()
        return ((cosine[patches].mean() - baseline) / (1 - baseline)).item()
    metrics = {name: x[val.mask].mean().item()
               for name, x in (('cosine', cosine), ('baseline', val.position), ('inpaint', val.inpaint))}
    metrics |= dict(skill=skill(cosine, val.mask), inpaint_skill=skill(val.inpaint, val.mask))
    for name, patches in (('1', distance == 1), ('2', distance == 2), ('3+', distance >= 3)):
        if patches.any():
            metrics[f'skill_distance_{name}'] = skill(cosine, patches)
    return metrics


# ---- the picture ------------------------------------------------------------------------------------------------

@torch.no_grad()
def draw_features(path, model, target, images, mask, bank_images):
    """features.png, a row per image: input, masked input, the targets (the teacher's features), the prediction (hidden
    patches only, the targets faded around them), and hidden patches filled with the training patch whose target is
    nearest to the prediction."""
    grid = math.isqrt(mask.shape[1])
    size = images.shape[-1] // grid
    targets_of = lambda x: torch.cat([target.of(part) for part in x.split(64)]).float()
    targets, predictions = targets_of(images), target.predict(model, images, mask)              # [B, N, C]
    predictions = F.normalize(predictions, dim=-1) * targets.norm(dim=-1).mean()        # only directions were learnt
    rgb = M.principal_axes(targets)
    bank = F.normalize(targets_of(bank_images), dim=-1).flatten(0, 1)                                # [BANK, C]
    patches = F.unfold(bank_images.float(), size, stride=size).transpose(1, 2).flatten(0, 1)    # [BANK, 3 * size^2]
    filled = F.unfold(images.float(), size, stride=size).transpose(1, 2)                        # [B, N, 3 * size^2]
    for n in range(len(images)):
        nearest = (F.normalize(predictions[n][mask[n]], dim=-1) @ bank.T).argmax(1)
        filled[n, mask[n]] = patches[nearest]
    filled = F.fold(filled.transpose(1, 2), images.shape[-2:], size, stride=size)
    as_image = lambda x: x.transpose(1, 2).unflatten(2, (grid, grid)) * 255             # [B, N, 3] -> [B, 3, h, w]
    faded = .75 + .25 * rgb(targets)
    columns = {'input': images, 'masked': paint_hidden(images, mask),
               'target' if target.kind == 'pixels' else "teacher's features": as_image(rgb(targets)),
               'prediction': as_image(torch.where(mask[..., None].cpu(), rgb(predictions), faded)),
               'nearest patches': filled}
    run.draw_sheet(path, columns)


# ---- the loop ---------------------------------------------------------------------------------------------------

def find_teacher(cfg):
    """The teacher's weights: --teacher; else EVA's for b, l and g on real images; else the built-in one, trained at
    first use by clip_train.py's default command, the same for every size so that their skills compare."""
    if cfg.teacher:
        return cfg.teacher
    if cfg.data.partition(':')[0] == 'shapes':
        if cfg.size in ('l', 'g'):
            print0(f'a rehearsal: {cfg.size} on the built-in world with its small teacher. For real: --data DIR')
    elif cfg.size in ('b', 'l', 'g'):
        print0("teacher: OpenAI's ViT-L/14, fetched once into out/")
        return run.on_first(data.fetch, VIT_L_14, VIT_L_14.split('/')[-2], 'out/ViT-L-14.pt', 'pass --teacher FILE')
    else:
        print0('teacher: the built-in one, which has seen drawn scenes only. Train one on your own pictures with '
               '`python clip_train.py --data DIR`, and pass it with --teacher')
    run.on_first(run.run_stage, 'clip_train.py', 'out/teacher', *(['--device', cfg.device] if cfg.device else []))
    return 'out/teacher/model.pt'


def find_target(cfg, grid, device, kind=None, codebook=None):
    """The Target of a run: its teacher, if any, is a frozen CLIP, or for `untrained` that CLIP before it learnt."""
    kind = kind or cfg.target
    if kind == 'pixels':
        return Target(kind, grid)
    teacher = M.load(find_teacher(cfg), M.CLIP)
    if kind == 'untrained':
        teacher = M.init_weights(M.CLIP(**teacher.config)).eval()
    codebook = None if codebook is None else codebook.to(device)
    return Target(kind, grid, run.to_device(teacher.requires_grad_(False), cfg, device), codebook)


def width_of(target, patch_size):
    """How many numbers the model says of each patch."""
    if target.kind == 'tokens':
        return NUM_CODES if target.codebook is None else len(target.codebook)
    return 3 * patch_size ** 2 if target.kind == 'pixels' else target.teacher.visual.config['head']


def some_images(dataset, num, image_size, cfg, device):
    """The first training images: among their patches the picture looks for the nearest."""
    return next(iter(data.batches(dataset, num, image_size, 0, 1, cfg.seed, device)))['images']


def look(cfg, train_set, val_set, device):
    """--eval: what any checkpoint's frozen features and, if it predicts what the target is, its predictions are worth;
    --image: its row of pictures for any photo."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    held = M.load(path)
    model = (held.visual if isinstance(held, M.CLIP) else held).to(device)
    size = model.image_size
    predicts = model.config['head'] and not model.pool
    if cfg.image or predicts:       # a model that predicts no patches needs no teacher
        target = find_target(cfg, model.grid, device, held.extra.get('target', cfg.target), held.extra.get('codebook'))
        width = width_of(target, model.patch_size)
        predicts = predicts and model.config['head'] == width
    if cfg.image and not predicts:
        raise ValueError(f"{path} predicts {model.config['head']} numbers a patch, the target has {width}; "
                         'use the teacher it was trained with')
    if cfg.eval:
        metrics = run.probe(run.pooled_features(model), train_set, val_set, size, run.NUM_PROBE, cfg, device)
        if predicts:
            val = make_validation(cfg, val_set, target, size, NUM_EVAL, device)
            metrics |= evaluate(model, target, val, run.autocast(device))
        print0(run.table(metrics))
        return run.report_broken(train_set, val_set)
    images = data.load_crop(cfg.image, size)[None].to(device)
    mask = make_mask(cfg.mask, torch.tensor([cfg.seed]), model.grid, cfg.mask_ratio).to(device)
    os.makedirs(cfg.out_dir, exist_ok=True)
    path = f'{cfg.out_dir}/{Path(cfg.image).stem}.features.png'
    draw_features(path, model, target, images, mask, some_images(train_set, BANK // model.grid ** 2, size, cfg, device))
    print0(path)


def check(cfg):
    """The student's options, or one line about what does not fit."""
    config = run.size_config(cfg, drop_path=cfg.drop_path)
    M.check_grid(config['image_size'], config['image_size'], config['patch_size'])
    num_patches = (config['image_size'] // config['patch_size']) ** 2
    if cfg.target not in TARGETS:
        raise ValueError(f'target {cfg.target!r} is not one of {", ".join(TARGETS)}')
    if cfg.mask not in ('block', 'random', 'columns'):
        raise ValueError(f'mask {cfg.mask!r} is not one of block, random, columns')
    num_hidden, smallest = round(num_patches * cfg.mask_ratio), max(4, num_patches // 16) if cfg.mask == 'block' else 1
    if not smallest <= num_hidden < num_patches:
        raise ValueError(f'mask_ratio {cfg.mask_ratio} hides {num_hidden} of {num_patches} patches; {cfg.mask} masks '
                         f'hide {smallest} to {num_patches - 1}. EVA hides .41')
    if cfg.drop_path >= 1:
        raise ValueError(f'drop_path {cfg.drop_path} is not below 1')
    return config


def add_masks(batches, cfg, grid, depth, start, rank, world):
    """Adds its samples' masks [B, N] and what decides on dropped paths [B, depth, 2]; on the CPU, where none wait."""
    num = cfg.batch_size // world
    for step, batch in enumerate(batches, start):
        position = step * cfg.batch_size + rank * num + torch.arange(num)
        batch['mask'] = make_mask(cfg.mask, position, grid, cfg.mask_ratio, cfg.seed) | (cfg.target == 'distill')
        batch['drop'] = data.uniform(cfg.seed, 'drop', position, 2 * depth).unflatten(1, (-1, 2))
        yield batch


def train(cfg):
    """Pre-trains; leaves model.pt, features.png, loss.png, log.jsonl and result.json. --eval and --image only look."""
    if cfg.study:
        return run.study(cfg)
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/mim_pretrain-{cfg.size}'
    config = check(cfg)
    grid, image_size = config['image_size'] // config['patch_size'], config['image_size']
    if cfg.plan or cfg.bench:
        return run.costs('pretraining', cfg, config, device)
    train_set, val_set = data.open_data(cfg.data, 'train'), data.open_data(cfg.data, 'val')
    if cfg.eval or cfg.image:
        return look(cfg, train_set, val_set, device)
    if run.finished(cfg):
        return
    run.settle_steps(cfg, train_set)
    run.check_memory(cfg, config, device, world)
    target = find_target(cfg, grid, device)
    config |= dict(head=width_of(target, config['patch_size']), mask_token=target.masked)
    model = (M.load(cfg.init, M.ViT, **config, pool=None) if cfg.init else
             M.init_weights(M.ViT(**config), cfg.seed, cfg.init_gain))
    model = run.to_device(model, cfg, device, mesh)
    optimizer = run.make_optimizer(model, cfg)
    start, constants = run.resume(cfg.out_dir, model, optimizer, cfg)
    autocast, constants = run.autocast(device), {'target': cfg.target, **constants}
    bank = some_images(train_set, max(8, BANK // grid ** 2), image_size, cfg, device)
    if cfg.target == 'tokens':
        if 'codebook' not in constants:         # stored with the run
            features = torch.cat([target.of(part) for part in bank.split(64)]).flatten(0, 1)
            first = data.permutation(torch.arange(NUM_CODES) % len(features), len(features), seed=0, epoch=0)
            constants['codebook'] = M.kmeans(features, features[first.to(device)]).cpu()
        target.codebook = constants['codebook'].to(device)
    most = max(8, cfg.steps * cfg.batch_size)           # a rehearsal of one step is not judged on 1024 images
    val = make_validation(cfg, val_set, target, image_size, min(NUM_EVAL, most), device)
    baseline, inpaint = val.position[val.mask].mean().item(), val.inpaint[val.mask].mean().item()
    print0(f'EVA {cfg.size}: {run.count_parameters(model) / 1e6:.2f}M parameters, {image_size} px, '
           f'{val.mask.sum(1).float().mean():.1f} of {grid * grid} patches hidden on average; '
           f'{cfg.steps:,} steps of {cfg.batch_size} images on {device}. '
           f'Cosine to beat: {baseline:.3f} (position mean), {inpaint:.3f} (inpainting)')
    measure = lambda: evaluate(model, target, val, autocast) | run.probe(
        run.pooled_features(model), train_set, val_set, image_size, min(run.NUM_PROBE, most), cfg, device)
    teacher = target.teacher and {**target.teacher.visual.config, 'image_size': grid * target.teacher.visual.patch_size}
    log = run.Log(cfg, start, device, run.training_flops(config, teacher))
    batches = data.batches(train_set, cfg.batch_size, image_size, start, cfg.steps, cfg.seed, device, cfg.workers,
                           rank=rank, world=world)
    batches = run.ahead(add_masks(batches, cfg, grid, len(model.blocks), start, rank, world), device)
    for step, batch in zip(range(start, cfg.steps), batches):
        for group in optimizer.param_groups:
            group['lr'] = run.lr_at(step, cfg) * group['lr_scale']
        parts = [batch[name].split(cfg.micro_batch or len(batch[name])) for name in ('images', 'mask', 'drop')]
        num_hidden, loss = run.total(run.send(batch['mask'].sum(), device)), 0      # of the whole batch, all processes
        for images, mask, drop in zip(*parts):                                      # uint8 [B, 3, H, W], [B, N], ...
            hidden = tuple(run.send(place, device) for place in mask.nonzero(as_tuple=True))    # M rows, M patches
            with torch.no_grad(), autocast:
                targets = target.of(images)                                         # [B, N, C]
            with autocast:
                predictions = model(model.normalize(images), run.send(mask, device) if target.masked else None,
                                    drop=run.send(drop, device))                    # [B, N, C]
            part = target.loss(predictions, targets, hidden) * (len(hidden[0]) / num_hidden)    # its share of the mean
            (part * world).backward()                                               # FSDP divides by the processes
            loss += part.detach()
        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        if log.is_finite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if log.due(step):
            log.write(step, loss=run.total(loss), lr=optimizer.param_groups[0]['lr'], grad_norm=grad_norm)
        done, stopping = step + 1, log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg, constants)
            if stopping:
                log.leave(done)
            draw_features(f'{cfg.out_dir}/features.png', model, target, val.images[:8], val.mask[:8], bank)
            log.say(step, **measure())
    metrics = measure()
    run.save_model(model, f'{cfg.out_dir}/model.pt', **constants)
    draw_features(f'{cfg.out_dir}/features.png', model, target, val.images[:8], val.mask[:8], bank)
    lines = {'position mean': -baseline, 'inpainting': -inpaint} if cfg.target in ('clip', 'untrained') else {}
    log.finish(model, 'training loss', lines, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
