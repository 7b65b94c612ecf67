"""
Stage 1, masked image modelling: the ViT sees 60% of an image's patches and
regresses the CLIP features of the other 40%. EVA, arXiv:2211.07636, section 2.2.

    python mim_pretrain.py                                 # laptop, minutes
    python mim_pretrain.py --image mine.jpg                # what the trained model makes of any picture
    torchrun --nproc_per_node=8 mim_pretrain.py --size g   # the paper's 1B model
"""
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model as M
import run
from run import option, print0


@dataclass
class Config(run.Run):
    teacher: str = option('', "a teacher's file, or several A,B; without it the built-in one, trained at first use")
    target: str = option('clip', "what is reconstructed: clip (EVA), tokens (k-means codes of its features), distill "
                         '(no mask), pixels (normalised, as MAE), untrained (a random teacher)',
                         choices=('clip', 'tokens', 'distill', 'pixels', 'untrained'))
    target_layer: int = option(0, "the teacher's layer to regress: 0 its projected output (EVA), n its n-th block's",
                               high=256)
    target_norm: str = option('none', "targets minus their channels' means, or also divided by their deviations",
                              choices=('none', 'centre', 'standard'))
    loss_on: str = option('hidden', 'patches that are judged: hidden, or all, where the visible have their own mean',
                          choices=('hidden', 'all'))
    registers: int = option(0, "learnt tokens beside the class token; 0: those of --init's file, if any",
                            high=M.LIMITS['registers'][1])
    mask: str = option('block', "what is hidden: block (EVA's), random, columns (half of all: EVA's validation), "
                       'or roll (blocks that may cross the edges)', choices=('block', 'random', 'columns', 'roll'))
    mask_ratio: float = option(105 / 256, 'share of the patches hidden: 105 of 256', low=0., high=1.)
    init_gain: float = option(0., "initial weights' standard deviation times sqrt(width), before the cut; 0: EVA's",
                              high=100)
    micro_batch: int = option(0, 'images at once on a device; 0: as many as belong to it and fit')
    warmup_steps: int = option(100, 'steps of linear warm-up')
    cooldown: int = option(0, 'steps at the end in which the rate falls linearly, constant before; 0: a cosine')
    branch: str = option('', 'folder of a like run of other length: start where its learning rate began to fall')
    weight_decay: float = option(.05, 'of matrices; vectors and positions have none', high=1000)
    min_lr: float = option(1e-5, 'learning rate at the last step', high=1000)
    # constants of the paper's AdamW
    betas: tuple = (.9, .98)
    eps: float = 1e-6
    grad_clip: float = 3.


SMALL = dict(batch_size=64, steps=1600, save_every=400, init_gain=1.9)
RECIPES = {  # differences from the defaults. g: the paper; ti to l: EVA-02's; the rest ours, tuned on two cores
    'femto': dict(SMALL, lr=1e-2),      # this, 24x3 and 48x4 are sizes of the scaling study
    '24x3':  dict(SMALL, lr=8e-3),
    'pico':  dict(SMALL, lr=6e-3),
    '48x4':  dict(SMALL, lr=5e-3),
    'nano':  dict(SMALL, lr=4e-3),
    'micro': dict(SMALL, lr=3e-3),
    'mini':  dict(SMALL, lr=2.5e-3),
    'ti':    dict(batch_size=4000, steps=852_000,   lr=3e-3,   warmup_steps=3550),      # 240 epochs, IN-21K
    's':     dict(batch_size=4000, steps=852_000,   lr=3e-3,   warmup_steps=3550),
    'b':     dict(batch_size=2048, steps=1_040_000, lr=1.5e-3, warmup_steps=6934),      # 150 epochs
    'l':     dict(batch_size=2048, steps=1_040_000, lr=1.5e-3, warmup_steps=6934, drop_path=.1),
    'g':     dict(batch_size=4096, steps=1_086_300, lr=1e-3,   warmup_steps=14_484, drop_path=.1),  # 150 x 7,242
}
VIT_L_14 = ('https://openaipublic.azureedge.net/clip/models/'      # its SHA-256 is part of the address
            'b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt')
BUILT_IN = Path(__file__).resolve().parent / 'assets' / 'nano-teacher.pt'
NUM_CODES = 512         # k-means centres of --target tokens
NUM_EVAL = 1024         # validation images; the same, with the same masks, for every run of at least as many
FIRST_PICTURE = 100     # steps until there is something to see
BANK = 65_536           # training patches: the picture looks for the nearest among them, k-means for its centres


# ---- the idea ---------------------------------------------------------------------------------------------------

def smallest_block(grid):
    """Patches of a block at least: EVA's 16 from 14 x 14 patches on, a sixteenth of smaller grids."""
    return 16 if grid >= 14 else max(4, grid * grid // 16)


def block_mask(index, grid, num_hidden, seed=0, smallest=None):
    """Block-wise masks (BEiT's; EVA, section 2.2): rectangles of at least `smallest` patches until
    num_hidden of grid x grid are hidden, or ten tries in a row fit nowhere: some fall a little short.
    index int64 [B], the samples' numbers -> [B, N] bool, True = hidden."""
    smallest = smallest or smallest_block(grid)
    mask = torch.zeros(len(index), grid, grid, dtype=torch.bool)
    num = torch.zeros(len(index))                       # hidden so far
    failures = torch.zeros(len(index))
    active = num < num_hidden
    attempt = 0

    while active.any():
        # one rectangle for each sample, its aspect log-uniform in .3 to 3.3
        u = data.uniform(seed, f'block {attempt}', index.cpu(), 4).double()
        wanted = num_hidden - num
        area = smallest + u[:, 0] * (wanted - smallest)         # crosses when few are wanted, as EVA's
        aspect = torch.exp((2 * u[:, 1] - 1) * math.log(1 / .3))
        height = (area * aspect).sqrt().round()
        width = (area / aspect).sqrt().round()
        top = (u[:, 2] * (grid - height + 1)).floor()
        left = (u[:, 3] * (grid - width + 1)).floor()

        # the patches inside it
        rows = inside(grid, top, height)                        # [B, grid]
        columns = inside(grid, left, width)
        block = rows[:, :, None] & columns[:, None, :]          # [B, grid, grid]

        # it is taken if it hides something new, and no more than wanted
        new = (block & ~mask).sum((1, 2))
        fits = (height < grid) & (width < grid)
        taken = active & fits & (new > 0) & (new <= wanted)
        mask |= block & taken[:, None, None]
        num += new * taken
        failures = torch.where(taken, 0, failures + 1)
        active = (num < num_hidden) & (failures < 10)
        attempt += 1

    return mask.flatten(1)


def inside(grid, start, length):
    """Which of grid rows, or columns, lie in start to start + length. Both [B] -> [B, grid] bool."""
    place = torch.arange(grid)
    # [B, 1], to compare with every place
    start = start[:, None]
    length = length[:, None]
    return (place >= start) & (place < start + length)


def make_mask(kind, index, grid, mask_ratio, seed=0):
    """[B, N] bool, True = hidden, for sample numbers index [B]: a function of (seed, index) alone."""
    num_hidden = round(grid * grid * mask_ratio)        # 105 of 256, 26 of 64
    if kind == 'block':
        return block_mask(index, grid, num_hidden, seed)

    if kind == 'random':
        u = data.uniform(seed, 'mask', index.cpu(), grid * grid)
        return u.argsort(1).argsort(1) < num_hidden

    if kind == 'roll':                  # CAPI's
        return roll(block_mask(index, grid, num_hidden, seed), index, seed)

    assert kind == 'columns', kind      # every even patch: EVA's validation
    even = torch.arange(grid * grid) % 2 == 0
    return even.expand(len(index), -1)


def mim_loss(predictions, targets, mask, num_hidden):
    """Mean negative cosine similarity over the hidden patches only; neither side is centred.
    predictions, targets [B, N, C]; mask [B, N] bool, True = hidden;
    num_hidden: of the global batch, so that parts of it add up. EVA, section 2.2."""
    # in float32: bfloat16 has less than three digits
    predictions = predictions.float()
    targets = targets.float()
    losses = -F.cosine_similarity(predictions, targets, dim=-1)                     # [B, N]
    return (losses * mask).sum() / num_hidden


class Features:
    """The target: a frozen teacher's projected features of every patch. Its class token
    is left out: what it says of the whole image has no place behind a patch's mask."""

    def __init__(self, teacher, grid, layer=0, hides=True):
        self.teacher = teacher
        self.grid = grid
        self.layer = layer
        self.hides = hides              # distillation sees every patch, and regresses every one
        self.statistics = None          # of --target_norm: means and deviations [2, C]
        self.targets = [self]           # of several teachers one each

    def of(self, images):
        """The same crop as the student's, resized so that the teacher's grid is the student's.
        images uint8 [B, 3, H, W] -> [B, N, C]."""
        size = self.grid * self.teacher.patch_size
        images = self.teacher.normalize(images)
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode='bicubic', antialias=True)

        # a reader's own teacher need not know of layers
        if not self.layer:
            features = self.teacher.patch_features(images)
        else:
            features = self.teacher.patch_features(images, self.layer)
        return features if self.statistics is None else standardise(features, self.statistics)

    loss = staticmethod(mim_loss)

    def width(self, images):
        """How many numbers the model says of each patch."""
        # by the features themselves, whatever the teacher
        features = self.of(images[:1])
        if features.ndim != 3:
            raise M.Refused(f'the teacher gives features of shape {list(features.shape)}; expected [B, N, C]')
        _, num, width = features.shape
        if num != self.grid ** 2:
            raise M.Refused(f'the teacher gives {num} features of an image that the student sees as {self.grid} x '
                            f'{self.grid} patches; a teacher needs one for each')
        return width

    def read(self, predictions):
        """Predictions as something to compare with `of`: [B, N, C]."""
        return predictions.float()

    def split(self, x):
        """What each teacher has of predictions or targets [B, N, C]: of one, all."""
        return [x]


# ---- other targets: the pilot study, EVA's table 1 --------------------------------------------------------------

class Tokens(Features):
    """BEiT v2's way: the code of each patch, the k-means centre nearest to its features.
    codebook [NUM_CODES, C] of unit length; stored with the run."""
    codebook = None

    def loss(self, predictions, targets, mask, num_hidden):
        """Cross-entropy of the hidden patches' codes. predictions [B, N, NUM_CODES] logits."""
        similarity = targets.float() @ self.codebook.T
        codes = similarity.argmax(-1)                           # [B, N]

        # torch wants the classes second
        logits = predictions.transpose(1, 2).float()            # [B, K, N]
        losses = F.cross_entropy(logits, codes, reduction='none')
        return (losses * mask).sum() / num_hidden

    def width(self, images):
        return NUM_CODES

    def read(self, predictions):
        """The mean of the centres."""
        chances = predictions.float().softmax(-1)
        return chances @ self.codebook


class Pixels(Features):
    """MAE's target (arXiv:2111.06377): each patch's pixels with mean 0 and variance 1."""

    def __init__(self, grid):
        super().__init__(None, grid)

    def of(self, images):
        """uint8 [B, 3, H, W] -> [B, N, 3 * size * size]."""
        size = images.shape[-1] // self.grid
        images = images.float() / 255
        patches = F.unfold(images, size, stride=size)
        patches = patches.transpose(1, 2)                       # [B, N, 3 * size^2]
        mean = patches.mean(-1, keepdim=True)
        variance = patches.var(-1, keepdim=True)

        # a patch of one colour has no variance
        return (patches - mean) / (variance + 1e-6).sqrt()

    def loss(self, predictions, targets, mask, num_hidden):
        # MAE's mean squared error
        predictions = predictions.float()
        losses = (predictions - targets).square().mean(-1)      # [B, N]
        return (losses * mask).sum() / num_hidden


def in_parts(function, images, num=64):
    """function of so many images at once, joined."""
    return torch.cat([function(part) for part in images.split(num)])


def learn_codebook(features, rounds=20):
    """k-means by cosine of features [n, C]: centres of unit length [NUM_CODES, C]. A centre
    that nothing is nearest to stays where it was."""
    features = F.normalize(features.float(), dim=-1)
    first = data.permutation(torch.arange(NUM_CODES) % len(features), len(features), seed=0, epoch=0)
    centres = features[first.to(features.device)]

    for _ in range(rounds):
        nearest = in_parts(lambda part: (part @ centres.T).argmax(-1), features, 8192)
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        found = sums.norm(dim=-1, keepdim=True) > 0
        centres = torch.where(found, F.normalize(sums, dim=-1), centres)
    return centres


# ---- more than EVA ----------------------------------------------------------------------------------------------

class Several(Features):
    """Several teachers, a head each: the student's head is as wide as all of their features. Each teacher's are
    standardised, so that no channel counts for more for its size (as PHI-S, arXiv:2410.01680, without its rotation),
    then brought to unit length, so that no teacher does. The loss is the mean of theirs."""

    def __init__(self, targets):
        teachers = torch.nn.ModuleList(target.teacher for target in targets)
        super().__init__(teachers, targets[0].grid, hides=targets[0].hides)
        self.targets = targets

        # of any image, on the teachers' device
        device = next(teachers.parameters()).device
        image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device)
        self.widths = [target.width(image) for target in targets]

    def of(self, images):
        parts = [F.normalize(target.of(images).float(), dim=-1) for target in self.targets]
        return torch.cat(parts, dim=-1)

    def width(self, images):
        return sum(self.widths)

    def split(self, x):
        return x.split(self.widths, dim=-1)

    def loss(self, predictions, targets, mask, num_hidden):
        losses = []
        for ours, theirs in zip(self.split(predictions), self.split(targets)):
            losses.append(mim_loss(ours, theirs, mask, num_hidden))
        return sum(losses) / len(losses)

    def read(self, predictions):
        parts = [F.normalize(part.float(), dim=-1) for part in self.split(predictions)]
        return torch.cat(parts, dim=-1)


def measure_statistics(features, norm):
    """Each channel's mean and deviation [2, C] over features [B, N, C]; to centre only, the latter is 1."""
    features = features.flatten(0, 1).float()
    mean = features.mean(0)
    if norm == 'centre':
        return torch.stack((mean, torch.ones_like(mean)))

    # a channel that is always the same has none
    deviation = (features.var(0) + 1e-6).sqrt()
    return torch.stack((mean, deviation))


def standardise(features, statistics):
    """features [B, N, C] by each channel's mean and deviation [2, C]."""
    mean, deviation = statistics
    return (features.float() - mean) / deviation


def roll(mask, index, seed=0):
    """Masks [B, N] moved by a random shift of each sample, over one edge and in at the other: blocks rarely reach
    a corner, and so every place is hidden as often as any (CAPI, arXiv:2502.08769). index int64 [B]."""
    grid = math.isqrt(mask.shape[1])
    shift = (data.uniform(seed, 'roll', index.cpu(), 2) * grid).long()              # [B, 2]
    place = torch.arange(grid)
    row = (place + shift[:, :1]) % grid                                             # [B, grid]
    column = (place + shift[:, 1:]) % grid
    moved = row[:, :, None] * grid + column[:, None, :]                             # [B, grid, grid]
    return mask.gather(1, moved.flatten(1))


# ---- measuring --------------------------------------------------------------------------------------------------

@dataclass
class Validation:
    """The images that a run is judged on, and the cosines that it has to beat."""
    images: torch.Tensor        # uint8 [B, 3, H, W]
    mask: torch.Tensor          # bool [B, N], True = hidden
    targets: torch.Tensor       # [B, N, C]
    baseline: float             # of the best constant vector for each position
    inpaint: float              # of features interpolated from what is visible


@torch.no_grad()
def make_validation(cfg, dataset, target, image_size, num, device):
    """The first num validation images with their masks and targets, and the two baselines."""
    batches = data.eval_batches(dataset, 64, image_size, num, device, cfg.workers)
    images = torch.cat([batch['images'][batch['position'] < num] for batch in batches])
    numbers = torch.arange(len(images))
    mask = make_mask(cfg.mask, numbers, target.grid, cfg.mask_ratio, seed=-1).to(device)
    targets = in_parts(target.of, images).float()

    # the sum of unit vectors points where their mean cosine is largest: no constant does better
    directions = F.normalize(targets, dim=-1) * mask[..., None]
    best = directions.sum(0).expand_as(targets)
    baseline = hidden_cosine(target, best, targets, mask)

    # the features of the image without its hidden patches, blurred over them: the best of four kernels
    visible = in_parts(target.of, paint_hidden(images, mask))
    inpaint = -1.
    for sharpness in (.25, .5, 1., 2.):
        filled = interpolate_hidden(visible, mask, target.grid, sharpness)
        inpaint = max(inpaint, hidden_cosine(target, filled, targets, mask))
    return Validation(images, mask, targets, baseline, inpaint)


def hidden_cosine(target, predictions, targets, mask):
    """Mean cosine on the hidden patches, a number; of several teachers the mean of theirs."""
    cosines = []
    for ours, theirs in zip(target.split(predictions), target.split(targets)):
        cosines.append(F.cosine_similarity(ours, theirs, dim=-1)[mask].mean().item())
    return sum(cosines) / len(cosines)


def paint_hidden(images, mask):
    """Images with their hidden patches grey. images uint8 [B, 3, H, W], mask [B, N]."""
    grid = math.isqrt(mask.shape[1])
    squares = mask.view(-1, 1, grid, grid).float()
    pixels = F.interpolate(squares, size=images.shape[-2:], mode='nearest') > 0     # [B, 1, H, W]
    return torch.where(pixels, 128, images)


def interpolate_hidden(features, mask, grid, sharpness):
    """Each patch's mean of the visible ones [B, N, C], weighted by exp(-sharpness * distance^2)."""
    place = torch.arange(grid * grid, device=mask.device)
    row, column = place // grid, place % grid
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2           # [N, N]
    logits = (-sharpness * squared).float().expand(len(mask), -1, -1)
    logits = logits.masked_fill(mask[:, None, :], -torch.inf)
    return logits.softmax(-1) @ features.float()


@torch.no_grad()
def evaluate(model, target, val):
    """Cosine on the hidden validation patches beside the baselines', and
    skill = (cosine - baseline) / (1 - baseline)."""
    parts = []
    for images, mask in zip(val.images.split(64), val.mask.split(64)):
        predictions = model(model.normalize(images), mask if target.hides else None)
        parts.append(target.read(predictions))
    cosine = hidden_cosine(target, torch.cat(parts), val.targets, val.mask)

    room = 1 - val.baseline or math.nan     # a single validation image is its own mean
    return dict(cosine=cosine, baseline=val.baseline, inpaint=val.inpaint,
                skill=(cosine - val.baseline) / room,
                inpaint_skill=(val.inpaint - val.baseline) / room)


# ---- the picture ------------------------------------------------------------------------------------------------

def principal_axes(features):
    """A function that turns features [..., C] into RGB, 0 to 1: the three axes on which these differ most."""
    features = features.flatten(0, -2).float().cpu()
    mean = features.mean(0)
    centred = features - mean
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -3:].flip(1)                # [C, 3]
    low, high = (centred @ axes).quantile(torch.tensor([.02, .98]), dim=0)

    def rgb(x):
        return (((x.float().cpu() - mean) @ axes - low) / (high - low)).clamp(0, 1)
    return rgb


@torch.no_grad()
def draw_features(path, model, target, images, mask, bank):
    """features.png, a row per image: input, masked input, the targets' main colours, the prediction
    (only the hidden patches in full colour), and each hidden patch as the training patch of bank
    [n, 3, H, W] whose target is nearest to the prediction."""
    grid = target.grid
    size = images.shape[-1] // grid
    targets = in_parts(target.of, images).float()                                   # [B, N, C]
    predictions = target.read(model(model.normalize(images), mask if target.hides else None))
    predictions = F.normalize(predictions, dim=-1)

    # hidden patches filled with the nearest of the bank
    bank_targets = F.normalize(in_parts(target.of, bank).float(), dim=-1).flatten(0, 1)
    bank_patches = F.unfold(bank.float(), size, stride=size).transpose(1, 2).flatten(0, 1)
    filled = F.unfold(images.float(), size, stride=size).transpose(1, 2)            # [B, N, 3 * size^2]
    for patches, prediction, hidden in zip(filled, predictions, mask):
        nearest = (prediction[hidden] @ bank_targets.T).argmax(1)
        patches[hidden] = bank_patches[nearest]
    filled = F.fold(filled.transpose(1, 2), images.shape[-2:], size, stride=size)

    # features as colours; only the predictions' directions were learnt
    rgb = principal_axes(targets)
    colours = rgb(targets)                                                          # [B, N, 3]
    predicted = rgb(predictions * targets.norm(dim=-1).mean())
    shown = torch.where(mask[..., None].cpu(), predicted, .75 + .25 * colours)

    def as_image(x):
        return x.transpose(1, 2).unflatten(2, (grid, grid)) * 255                   # [B, 3, h, w]

    title = "teacher's features" if target.teacher else 'target'
    run.draw_sheet(path, {'input': images, 'masked': paint_hidden(images, mask), title: as_image(colours),
                          'prediction': as_image(shown), 'nearest patches': filled})


# ---- the loop ---------------------------------------------------------------------------------------------------

def find_teacher(cfg):
    """The teacher's file without --teacher: EVA's for b, l and g on real images; else the built-in one, the same for
    every size so that their skills compare: what clip_train.py's default command made, or makes at first use."""
    on_world = data.is_world(cfg.data)
    if not on_world and cfg.arch == 'eva02' and cfg.size in ('ti', 's', 'b', 'l'):
        raise M.Refused("EVA-02's teacher is EVA-CLIP-g; give its file: --teacher EVA01_CLIP_g_14_psz14_s11B.pt")
    if not on_world and cfg.size in ('b', 'l', 'g'):
        print0("teacher: OpenAI's ViT-L/14, fetched once into out/")
        return run.on_first(data.fetch, VIT_L_14, VIT_L_14.split('/')[-2], 'out/ViT-L-14.pt', 'pass --teacher FILE')
    if not on_world:
        print0('teacher: the built-in one, which has seen drawn scenes only. Train one on your own pictures with '
               '`python clip_train.py --data DIR`, and pass it with --teacher')
    if on_world and cfg.size in ('l', 'g'):
        print0(f'a rehearsal: {cfg.size} on the built-in world with its small teacher. For real: --data DIR')

    if BUILT_IN.exists():
        return str(BUILT_IN)
    flags = ['--device', cfg.device] if cfg.device else []
    run.on_first(run.run_stage, 'clip_train.py', 'out/teacher', *flags)
    return 'out/teacher/model.pt'


def teacher_files(cfg):
    """--teacher's files: one, also where its name has commas, or several."""
    if os.path.exists(cfg.teacher):
        return [cfg.teacher]
    paths = [path.strip() for path in cfg.teacher.split(',')]
    return [path for path in paths if path]


def load_teacher(path):
    """Any model that says something of each patch of an image."""
    teacher = M.load(path)
    run.refuse_clips(getattr(teacher, 'visual', teacher), path)
    if isinstance(teacher, M.ViT) and teacher.pool and teacher.config.head:
        raise M.Refused(f'{path} is a classifier, whose head says nothing of single patches; as a teacher take what it '
                        'was fine-tuned from')
    return teacher


def find_target(cfg, kind, grid, device, teacher=None):
    """What is reconstructed. teacher: a module of the caller's, instead of --teacher's file."""
    if kind == 'pixels':
        return Pixels(grid)
    paths = teacher_files(cfg)
    if teacher is not None:
        teachers = [teacher]
    elif len(paths) > 1:
        teachers = [load_teacher(path) for path in paths]
    else:
        teachers = [load_teacher(paths[0] if paths else find_teacher(cfg))]

    targets = []
    for teacher in teachers:
        if kind == 'untrained':
            if not isinstance(teacher, (M.ViT, M.CLIP)):
                raise M.Refused("--target untrained draws a teacher's weights anew: it has to be of model.py")
            teacher = M.init_weights(type(teacher)(teacher.config)).eval()
        depth = len(getattr(getattr(teacher, 'visual', teacher), 'blocks', []))
        if cfg.target_layer > depth:
            raise M.Refused(f'--target_layer {cfg.target_layer} is none of the teacher\'s {depth} blocks')
        teacher = run.to_device(teacher.requires_grad_(False), cfg, device)
        if kind == 'tokens':
            return Tokens(teacher, grid, cfg.target_layer)
        targets.append(Features(teacher, grid, cfg.target_layer, hides=kind != 'distill'))
    return targets[0] if len(targets) == 1 else Several(targets)


@torch.no_grad()
def settle_target(target, cfg, constants, bank):
    """Gives the target what a run measures once, on the bank of images, and returns the run's constants with it;
    constants: those of an earlier part of the run, or of its model."""
    constants = {'target': cfg.target, 'target_layer': cfg.target_layer, **constants}
    parts = target.targets
    widths = [part.of(bank[:1]).shape[-1] for part in parts]

    # of several teachers each is standardised
    norm = 'standard' if len(parts) > 1 else cfg.target_norm
    if norm != 'none' and 'statistics' not in constants:
        features = [in_parts(part.of, bank) for part in parts]
        constants['statistics'] = [measure_statistics(x, norm).cpu() for x in features]
    measured = constants.get('statistics', [])
    if 'codebook' in constants:
        measured = [constants['codebook']]
    if measured and [table.shape[-1] for table in measured] != widths:
        raise M.Refused('this model learnt from other teachers; give its own with --teacher, in their order')
    for part, statistics in zip(parts, constants.get('statistics', [])):
        part.statistics = statistics.to(bank.device)

    if constants['target'] == 'tokens':
        if 'codebook' not in constants:
            features = in_parts(target.of, bank).flatten(0, 1)
            constants['codebook'] = learn_codebook(features).cpu()
        target.codebook = constants['codebook'].to(bank.device)
    return constants


def first_images(dataset, num, image_size, cfg, device):
    """The first training images: the picture's bank of patches."""
    batches = data.batches(dataset, num, image_size, 0, 1, cfg.seed, device)
    return next(iter(batches))['images']


def teacher_flops(target):
    """Of an image, of the teachers' ViTs on our grid; 0 of those that are none of ours."""
    total = 0
    for part in target.targets:
        vit = getattr(part.teacher, 'visual', part.teacher)
        if isinstance(vit, M.ViT):
            config = dataclasses.replace(vit.config, image_size=target.grid * vit.patch_size)
            total += run.flops_per_image(config)
    return total


def check(cfg, config):
    """Refuses options that do not go together, and a mask ratio that a grid cannot have."""
    num = len(teacher_files(cfg))
    if cfg.target == 'pixels' and cfg.target_layer:
        raise M.Refused('--target_layer is a layer of the teacher, which --target pixels does not ask')
    if cfg.target == 'pixels' and cfg.target_norm != 'none':
        raise M.Refused('--target_norm is of the features of a teacher; --target pixels has its own')
    if num > 1 and cfg.target in ('tokens', 'pixels'):
        raise M.Refused(f'--target {cfg.target} has one teacher or none; --teacher names {num} files')
    if num > 1 and cfg.target_norm == 'centre':
        raise M.Refused('--target_norm centre is for one teacher; of several each is standardised')
    if cfg.target == 'distill' and cfg.loss_on == 'all':
        raise M.Refused('--loss_on all is for masks; --target distill hides nothing and judges every patch already')
    grid = config.image_size // config.patch_size
    num_hidden = round(grid * grid * cfg.mask_ratio)
    least = smallest_block(grid) if cfg.mask in ('block', 'roll') else 1
    if grid * grid <= least:
        raise M.Refused(f'images of {grid} x {grid} patches are too small for {cfg.mask} masks')
    if not least <= num_hidden < grid * grid:
        raise M.Refused(f'--mask_ratio {cfg.mask_ratio} hides {num_hidden} of {grid * grid} patches; {cfg.mask} masks '
                        f'hide {least} to {grid * grid - 1}. EVA hides .41')


def load_model(cfg, path, *names, **changes):
    """A file's model, of the file's architecture whatever --size and --arch say, but for the options of these names."""
    asked = {name: getattr(cfg, name) for name in names if getattr(cfg, name)}
    model = M.load(path, M.ViT, **changes, **asked)
    run.refuse_clips(model, path)
    return model


def teacher_hash(target):
    """By which a run knows its teacher again."""
    return run.hash_of(target.teacher.state_dict() if target.teacher else {})


def apply_model(cfg, device, teacher=None):
    """--eval: what any model's frozen features and, if it predicts what the target is, its predictions are worth;
    --image: its row of pictures for any photo."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    model = run.to_device(load_model(cfg, path, 'image_size', 'patch_size'), cfg, device)
    train_set = data.open_data(cfg.data, 'train')
    val_set = data.open_data(cfg.data, 'val')
    ours = 'target' in model.extra      # of a released file --teacher has to say what it predicts
    predicts = model.config.head and not model.pool and (ours or cfg.teacher or cfg.image)
    if predicts:
        cfg.target = model.extra.get('target', cfg.target)
        cfg.target_layer = model.extra.get('target_layer', cfg.target_layer)
        cfg.target_norm = 'none' if ours else cfg.target_norm       # the file has its statistics, or none
        check(cfg, model.config)
        target = find_target(cfg, cfg.target, model.grid, device, teacher)
        num_bank = max(8, BANK // model.grid ** 2)
        bank = first_images(train_set, num_bank, model.image_size, cfg, device)
        predicts = model.config.head == target.width(bank)
        if predicts:
            settle_target(target, cfg, model.extra, bank)
            if model.extra.get('teacher', '') not in ('', teacher_hash(target)):
                print0(f'{path} learnt from another teacher: its cosine and skill here are of features it never saw')
        elif ours:
            print0(f"{path} learnt from another teacher, with {model.config.head} features a patch: only probes")
    if cfg.image and not predicts:
        raise M.Refused(f'{path} does not predict the features of this teacher; use a model of mim_pretrain.py '
                        'and the teacher that it was trained with')

    if cfg.image:
        images = data.load_view(cfg.image, model.image_size)[None].to(device)
        mask = make_mask(cfg.mask, torch.tensor([cfg.seed]), model.grid, cfg.mask_ratio).to(device)
        picture = f'{cfg.out_dir}/{Path(cfg.image).stem}.features.png'
        draw_features(picture, model, target, images, mask, bank)
        print0(picture)
        return run.report_broken(train_set)

    encode = run.pooled_features(model)
    metrics = run.probe(encode, train_set, val_set, model.image_size, run.NUM_PROBE, cfg, device)
    if predicts:
        val = make_validation(cfg, val_set, target, model.image_size, NUM_EVAL, device)
        metrics |= evaluate(model, target, val)
    print0(run.table(metrics))
    run.report_broken(train_set, val_set)


def add_masks(batches, cfg, grid, depth, start, rank, world, device):
    """Adds to each batch its samples' masks [B, N] and the random numbers of drop path [B, depth, 2]."""
    num = cfg.batch_size // world
    for step, batch in enumerate(batches, start):
        position = step * cfg.batch_size + rank * num + torch.arange(num)
        mask = make_mask(cfg.mask, position, grid, cfg.mask_ratio, cfg.seed)
        if cfg.target == 'distill':
            mask = torch.ones_like(mask)
        drop = data.uniform(cfg.seed, 'drop', position, 2 * depth).unflatten(1, (-1, 2))
        batch['mask'] = run.send(mask, device)
        batch['drop'] = run.send(drop, device)
        yield batch


def train(cfg, teacher=None):
    """Pre-trains; leaves model.pt, features.png, loss.png, log.jsonl and result.json.
    teacher: any module with normalize, patch_features and patch_size, instead of --teacher's file."""
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/mim_pretrain-{cfg.size}'
    if cfg.eval or cfg.image:
        return apply_model(cfg, device, teacher)

    # the student's options: those of --init's file, or of a row of SIZES
    if cfg.init:
        model = load_model(cfg, cfg.init, 'image_size', 'patch_size', 'registers', pool=None, drop_path=cfg.drop_path)
        config = model.config
    else:
        config = run.vit_config(cfg, drop_path=cfg.drop_path, registers=cfg.registers)
    check(cfg, config)
    grid = config.image_size // config.patch_size
    train_set = data.open_data(cfg.data, 'train')
    val_set = data.open_data(cfg.data, 'val')
    run.settle_steps(cfg, train_set)
    if run.finished(cfg):
        return
    run.introduce(train_set, val_set)

    # the target, and a student whose predictions are as wide
    target = find_target(cfg, cfg.target, grid, device, teacher)
    one = first_images(train_set, 1, config.image_size, cfg, device)
    options = dict(head=target.width(one), mask_token=target.hides)
    config = dataclasses.replace(config, **options)
    with torch.device('meta'):
        sizes = M.ViT(config)
    run.settle_memory(cfg, sizes, device, world, teacher=target.teacher)
    num_bank = max(8, BANK // grid ** 2)
    bank = first_images(train_set, num_bank, config.image_size, cfg, device)
    if cfg.init:
        model, weights = M.changed(model, model.state_dict(), options)
        M.fill(model, weights)
    else:
        model = M.init_weights(M.ViT(config), cfg.seed, cfg.init_gain)
    model = run.to_device(model, cfg, device, mesh)
    optimizer = run.make_optimizer(model, cfg)

    # where an earlier run stopped, and whether it learnt from the same
    about = run.describe(train_set, val_set, teacher=teacher_hash(target))
    start, constants = run.resume(cfg.out_dir, model, optimizer, cfg, about=about)
    constants = settle_target(target, cfg, constants, bank)

    # what it is judged on; a rehearsal of one step is not judged on 1,024 images
    most = max(8, cfg.steps * cfg.batch_size)
    val = make_validation(cfg, val_set, target, config.image_size, min(NUM_EVAL, most), device)

    def measure(num_probe):
        metrics = evaluate(model, target, val)
        encode = run.pooled_features(model)
        num = min(num_probe, most)
        return metrics | run.probe(encode, train_set, val_set, config.image_size, num, cfg, device)

    def draw():
        path = f'{cfg.out_dir}/features.png'
        with run.optional(path):
            draw_features(path, model, target, val.images[:8], val.mask[:8], bank)

    @torch.no_grad()
    def add_targets(batch):
        batch['targets'] = in_parts(target.of, batch['images'], cfg.micro_batch)        # [B, N, C]
        return batch

    family = 'EVA-02' if cfg.arch == 'eva02' else 'EVA'
    name = cfg.init or f'{family} {cfg.size}'
    print0(f'{name}: {run.count_parameters(model) / 1e6:.2f}M parameters, {config.image_size} px, '
           f'{val.mask.sum(1).float().mean():.1f} of {grid * grid} patches hidden on average; '
           f'{cfg.steps:,} steps of {cfg.batch_size} images on {device}. '
           f'Cosine to beat: {val.baseline:.3f} (position mean), {val.inpaint:.3f} (inpainting)')
    num_seen = val.mask.sum().item() / grid ** 2        # vectors that a position's mean is of
    if val_set.reads_files and num_seen < 100:
        print0(f'{len(val.images)} validation images are few: the mean of their own features is up to '
               f'{num_seen ** -.5:.2f} too good, and skill too low')
    flops = run.training_flops(config) + teacher_flops(target)
    log = run.Log(cfg, start, device, flops)
    batches = data.batches(train_set, cfg.batch_size, config.image_size, start, cfg.steps,
                           cfg.seed, device, cfg.workers, rank=rank, world=world)
    batches = add_masks(batches, cfg, grid, config.depth, start, rank, world, device)
    batches = run.ahead(batches, device, add_targets)

    for step, batch in zip(range(start, cfg.steps), log.watch(batches)):
        lr = run.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale']

        # a micro-batch at a time, of which the last sums gradients over the processes
        mask = batch['mask']                                    # [B, N], True = hidden
        num_hidden = run.sum_over_processes(mask.sum())         # of the global batch
        num_visible = cfg.batch_size * grid ** 2 - num_hidden
        parts = [batch[name].split(cfg.micro_batch) for name in ('images', 'mask', 'drop', 'targets')]
        last = len(parts[0]) - 1
        total = 0.
        for n, (images, mask, drop, targets) in enumerate(zip(*parts)):
            run.accumulate(model, cfg, n == last)
            seen = mask if target.hides else None
            predictions = model(model.normalize(images), seen, drop=drop)       # [B, N, C]
            loss = target.loss(predictions, targets, mask, num_hidden)
            if cfg.loss_on == 'all':
                # the visible have a mean of their own: they are more, and easier
                visible = target.loss(predictions, targets, ~mask, num_visible)
                loss = (loss + visible) / 2
            (loss * world).backward()                           # FSDP divides by the processes
            total += loss.detach()

        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        log.update(optimizer, grad_norm)
        optimizer.zero_grad(set_to_none=True)

        if log.due(step):
            log.write(step, loss=run.sum_over_processes(total), lr=lr, grad_norm=grad_norm)
        done = step + 1
        stopping = log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg, constants, about=about)
            if stopping:
                log.leave(done)
            log.say(step, **measure(run.NUM_PROBE // 4))
        if done < cfg.steps and (done == FIRST_PICTURE or done % cfg.save_every == 0):
            draw()

    # what a run leaves, the weights first
    run.save_model(model, f'{cfg.out_dir}/model.pt', **constants, teacher=about['teacher'])
    metrics = measure(run.NUM_PROBE)
    draw()
    cosine_loss = cfg.target in ('clip', 'distill', 'untrained') and cfg.loss_on == 'hidden'
    lines = {'position mean': -val.baseline, 'inpainting': -val.inpaint} if cosine_loss else {}
    log.finish(model, 'training loss', lines, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
