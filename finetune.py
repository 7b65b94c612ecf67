"""
Stage 2, transfer: the pre-trained ViT gets a new head and learns the classes of images or the actions of videos. EVA,
arXiv:2211.07636, section 3.

    python finetune.py                                     # laptop, minutes: kinds of the world's objects
    python finetune.py --size nano-video                   # its actions, from clips
    python finetune.py --image mine.jpg                    # the five likeliest classes
    torchrun --nproc_per_node=8 finetune.py --size g --data imagenet --init eva_21k.pt
"""
import contextlib
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import model as M
import run
from model import print0
from run import option


@dataclass
class Config(run.Run):
    size: str = option('nano', 'row of RECIPES here: a row of SIZES in model.py, or one of its recipes, as g-560')
    init: str = option('', "file to start from (out/mim_pretrain-SIZE's if empty), or scratch")
    probe: str = option('', 'instead of fine-tuning, frozen features: linear (trains a head), or knn')
    frames: int = option(0, 'of a clip: learn actions from that many; 0: images')
    pool: str = option('mean', "what the head sees: mean (of the patches, under a fresh norm) or class (token)")
    mapping: str = option('', "file with a line for each class: which of --init's classes it takes over")
    real: str = option('', 'JSON list of the right labels of each validation image, as ImageNet-ReaL has them')
    smoothing: float = option(.1, 'share of the target spread over all classes')
    mixup: float = option(0., "mix whole images by Beta(a, a), 0: don't")
    cutmix: float = option(0., "mix by pasting a rectangle of Beta(a, a)'s area, 0: don't")
    erase: float = option(0., 'chance of a rectangle of noise in an image')
    augment: str = option('', 'of real images: rand (RandAugment m9-mstd0.5-inc1) or jitter (colours, for videos)')
    crop: float = option(.2, 'smallest share of a real image that a random crop takes')
    view: float = option(.875, "share of a real image's shorter side that evaluation sees")
    drop_path: float = option(.1, 'chance of skipping a residual branch in the last block, growing linearly with depth')
    layer_decay: float = option(.8, 'factor on the learning rate from each layer to the one below')
    freeze_patches: bool = option(True, 'keep the pre-trained patch embedding as it is')
    ema: float = option(0., 'decay of averaged weights, which are then evaluated and kept; 0: none')
    warmup_steps: int = option(100, 'steps of linear warm-up')
    min_lr: float = option(0., 'learning rate at the last step')
    weight_decay: float = option(.05, 'of matrices; vectors and positions have none')
    betas: tuple = option((.9, .98), "AdamW's")
    eps: float = option(1e-6, "AdamW's")
    grad_clip: float = option(1e9, "largest global gradient norm; EVA's fine-tuning has no limit")


SMALL = dict(batch_size=64, steps=1000, drop_path=0., save_every=500)
IN1K = dict(batch_size=512, steps=25_020, warmup_steps=5004, lr=3e-5, layer_decay=.95, drop_path=.4, smoothing=.3,
            augment='rand', crop=.08, view=1., ema=.9999)                               # 10 epochs
LINEAR = dict(probe='linear', pool='class', batch_size=16_000, steps=7200, warmup_steps=800, lr=1., weight_decay=0.,
              drop_path=0., smoothing=0., crop=.08, view=1.)                            # 90 epochs
VIDEO = dict(batch_size=256, augment='jitter', crop=.44, view=1., freeze_patches=False)
RECIPES = {  # differences from the defaults. g and g-...: the paper's; ti to l: ours, not tried; above: on two cores
    'pico':         dict(SMALL, lr=3e-3),
    'nano':         dict(SMALL, lr=3e-3),
    'micro':        dict(SMALL, lr=2e-3),
    'mini':         dict(SMALL, lr=1.5e-3),
    'nano-video':   dict(SMALL, frames=4, image_size=16, batch_size=32, steps=1500, lr=2e-3, layer_decay=1.),
    'ti':           dict(IN1K, batch_size=1024, lr=5e-4, layer_decay=.75, drop_path=.1, smoothing=.1),
    's':            dict(IN1K, batch_size=1024, lr=5e-4, layer_decay=.75, drop_path=.1, smoothing=.1),
    'b':            dict(IN1K, batch_size=1024, lr=2e-4, layer_decay=.75, drop_path=.1, smoothing=.1),
    'l':            dict(IN1K, batch_size=1024, lr=1e-4, layer_decay=.8, drop_path=.2),
    'g-21k':        dict(batch_size=4096, steps=207_960, warmup_steps=51_990, lr=1e-4, min_lr=1e-6, layer_decay=.85,
                         drop_path=.4, cutmix=1., crop=.5, view=1.),                    # 60 epochs of ImageNet-21K
    'g':            dict(IN1K, image_size=336),                                         # from g-21k, as g-560
    'g-560':        dict(IN1K, image_size=560, steps=37_530),
    'g-clip':       dict(IN1K, batch_size=1024, warmup_steps=2502, layer_decay=.9),     # from EVA-CLIP's image tower
    'g-clip-336':   dict(IN1K, image_size=336, steps=50_040, layer_decay=.9),           # 20 epochs
    'g-linear':     dict(LINEAR),
    'g-linear-336': dict(LINEAR, image_size=336, lr=.6),
    'g-k722':       dict(VIDEO, frames=8, steps=98_440, warmup_steps=12_305, lr=8e-6, layer_decay=1., drop_path=.3,
                         mixup=.8, cutmix=1.),                                          # 40 epochs, from EVA
    'g-k400':       dict(VIDEO, frames=16, steps=937, warmup_steps=0, lr=1e-6, min_lr=1e-6, layer_decay=.95,
                         drop_path=.2),                                                 # 1 epoch, from g-k722
}
HEAD_SCALE = .001       # of a new head's first weights: BEiT's, so that fine-tuning starts from near equal logits
NUM_EVAL = 2048         # validation scenes, of which the world has no end


# ---- the idea ---------------------------------------------------------------------------------------------------

def soft_labels(labels, num_classes, smoothing):
    """Class ids [B] -> [B, K]: 1 - smoothing on the class, and smoothing spread over all."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def beta(alpha, u):
    """A number from Beta(alpha, alpha), alpha up to 1, out of uniform numbers u [2n]: the first pair of their powers
    1 / alpha whose sum is at most 1, as the first's share (Johnk's way)."""
    x, y = (u.double() ** (1 / alpha)).view(-1, 2).unbind(1)
    first = (x + y <= 1).int().argmax()
    return (x[first] / (x[first] + y[first])).item()


def mix(images, targets, mixup, cutmix, u):
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) of each image with its neighbour, a coin deciding if both
    are on; one weight for the batch, as EVA's. images [B, ..., H, W], targets [B, K], B even; u: 67 uniform numbers."""
    swap = lambda x: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)      # neighbours are always in the same process
    height, width = images.shape[-2:]
    if mixup and (u[0] < .5 or not cutmix):
        weight = beta(mixup, u[3:])
        images = images * weight + swap(images) * (1 - weight)
    else:
        side = math.sqrt(1 - beta(cutmix, u[3:]))
        (top, bottom), (left, right) = (
            (max(0, int(place * n) - int(side * n) // 2), min(n, int(place * n) + int(side * n) // 2))
            for place, n in ((u[1].item(), height), (u[2].item(), width)))
        images = images.clone()
        images[..., top:bottom, left:right] = swap(images)[..., top:bottom, left:right]
        weight = 1 - (bottom - top) * (right - left) / (height * width)     # what the border cut off is given back
    return images, targets * weight + swap(targets) * (1 - weight)


def erase(images, position, chance, seed):
    """Random erasing (arXiv:1708.04896): in a share `chance` of the images a rectangle of 2% to a third of the area
    turns into noise. images [B, ..., H, W], normalised; position [B], the samples' numbers."""
    (H, W), spans = images.shape[-2:], []
    u = data.uniform(seed, 'erase', position, 5).T[..., None]                                   # five [B, 1]
    area, aspect = H * W * (.02 + (1 / 3 - .02) * u[0]), torch.exp((2 * u[1] - 1) * math.log(1 / .3))
    for n, side, place in ((H, area * aspect, u[2]), (W, area / aspect, u[3])):
        side, at = side.sqrt().round().clamp(max=n), torch.arange(n, device=u.device)
        first = (place * (n - side + 1)).floor()
        spans.append((at >= first) & (at < first + side) & (u[4] < chance))                     # [B, H], [B, W]
    inside = (spans[0][:, :, None] & spans[1][:, None]).view(len(images), *[1] * (images.ndim - 3), H, W)
    a, b = data.uniform(seed, 'erase noise', position, 2 * images[0].numel()).chunk(2, dim=1)
    noise = (-2 * (1 - a).log()).sqrt() * torch.cos(2 * math.pi * b)                            # normal (Box, Muller)
    return torch.where(inside, noise.view_as(images), images)


# ---- the head ---------------------------------------------------------------------------------------------------

def vit_options(cfg, num_classes):
    """What a run asks of its ViT, whatever it starts from."""
    sizes = {name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
    return dict(head=num_classes, pool=cfg.pool, mask_token=False, drop_path=cfg.drop_path, frames=max(1, cfg.frames),
                **sizes)


def classifier(cfg, classes):
    """The ViT of --init, or a new one, with a head for these classes; of those it knew before, their weights."""
    options, rows = vit_options(cfg, len(classes)), []
    before = None if cfg.init == 'scratch' else load_tower(cfg.init)
    if before is None:
        model = M.init_weights(M.ViT(**{**M.SIZES[cfg.size.partition('-')[0]], **options}), cfg.seed)
    else:
        state = {name: tensor for name, tensor in before.state_dict().items() if not name.startswith('head.')}
        model = M.load_state(state, 'ViT', {**before.config, 'head': 0}, head_bias=True, **options)
        model.patch_embed.requires_grad_(not cfg.freeze_patches)        # EVA lets no gradient pass its output
        if cfg.mapping or 'classes' in before.extra:
            rows = match_classes(cfg, classes, class_names(before))
    with torch.no_grad():
        model.head.weight.mul_(HEAD_SCALE)
        for row, olds in enumerate(rows):
            if olds:
                model.head.weight[row] = before.head.weight[olds].mean(0)
                model.head.bias[row] = before.head.bias[olds].mean()
    if cfg.frames > 1 and (before is None or before.config['frames'] == 1):
        tell_time(model)
    if cfg.probe == 'linear':
        model.requires_grad_(False).head.requires_grad_(True)
    return model


@torch.no_grad()
def tell_time(model):
    """A small model's positions differ from frame to frame from the start, by a ramp along a random direction. Not in
    the paper, whose are equal: a model then starts out blind to the order of frames."""
    frames, width = model.config['frames'], model.config['width']
    if width > M.SIZES['ti']['width']:
        return
    direction = 2 * data.uniform(0, 'time', torch.arange(width), 1)[:, 0] - 1
    ramp = torch.linspace(-.5, .5, frames)[:, None] * direction                         # [T, D]
    model.pos_embed[:, 1:] += ramp.repeat_interleave(model.grid ** 2, 0)


def load_tower(path):
    """A ViT, or the image tower of a CLIP, with what was saved beside it."""
    held = M.load(path)
    tower = held.visual if isinstance(held, M.CLIP) else held
    tower.extra = held.extra
    return tower


def class_names(model):
    """Of a classifier's head; numbers where it was saved without."""
    return model.extra.get('classes') or [str(i) for i in range(model.config['head'] if model.pool else 0)]


def match_classes(cfg, classes, known):
    """For each class the numbers of the known ones that it means: those of its name, or by --mapping, a file with a
    line for each class, in order: numbers or names with commas between them, or - for none."""
    number = {**{str(i): i for i in range(len(known))}, **{name: i for i, name in enumerate(known)}}
    if not cfg.mapping:
        return [[number[name]] if name in number else [] for name in classes]
    with open(cfg.mapping) as file:
        lines = file.read().splitlines()
    if len(lines) != len(classes):
        raise ValueError(f'--mapping {cfg.mapping} has {len(lines)} lines, the data {len(classes)} classes; it needs a '
                         f'line for each, in the order {", ".join(classes[:3])}, ...')
    words = [[word.strip() for word in line.split(',') if word.strip() not in ('', '-')] for line in lines]
    try:
        return [[number[word] for word in row] for row in words]
    except KeyError as word:
        raise ValueError(f"--mapping {cfg.mapping}: {word} is none of the model's {len(known)} classes") from None


# ---- measuring --------------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(model, dataset, cfg, device, processes=(0, 1), columns=None, order=None):
    """What the model says of validation samples, each once however many processes there are, (rank, world): dict of top
    [n, 5] classes, confidence [n] in the first, and the samples' labels, index and position [n]. columns: for each
    class of the data those of the model; order: of the frames. A rehearsal is not judged on all scenes."""
    rows, autocast = [], run.autocast(device)
    num = len(dataset) if dataset.reads_files else min(NUM_EVAL, max(64, cfg.steps * cfg.batch_size))
    batch_size = cfg.micro_batch or min(256, max(32, cfg.batch_size // processes[1]))
    batch_size = max(1, batch_size // math.prod(getattr(dataset, 'VIEWS', (1,))))
    batches = data.eval_batches(dataset, batch_size, model.image_size, num, device, cfg.workers, cfg.view, *processes)
    for batch in batches:
        images = batch['images']                            # [B, 3, H, W], [B, T, 3, H, W] or [B, views, T, 3, H, W]
        views = images.flatten(0, 1) if images.ndim == 6 else images
        with autocast:
            logits = model(model.normalize(views if order is None else views[:, order]))        # [B * views, K]
        if columns is not None:
            logits = logits[:, columns].amax(-1)
        probabilities = logits.float().softmax(-1).unflatten(0, (len(images), -1)).mean(1)      # [B, K]
        confidence, top = probabilities.topk(min(5, probabilities.shape[1]))
        rows.append(torch.cat([top, *(batch[name].to(device)[:, None] for name in ('labels', 'index', 'position')),
                               confidence[:, :1].double()], 1))
    rows = run.gather(torch.cat(rows)).cpu()
    rows = rows[rows[:, -2] < num]                          # what filled the last process's part
    labels, index, position = rows[:, -4:-1].long().unbind(1)
    return dict(top=rows[:, :-4].long(), labels=labels, index=index, position=position, confidence=rows[:, -1])


def columns_of(model, dataset, cfg):
    """For each class of the data the model's, [K, m], by match_classes; None where they are the same."""
    known, classes = class_names(model), dataset.label_names
    if not classes:
        raise ValueError(f'{cfg.data} has no classes to judge by; expected a folder for each, or .cls files in shards')
    if not cfg.mapping and (classes == known or 'classes' not in model.extra and len(classes) == len(known)):
        return None
    rows = match_classes(cfg, classes, known)
    if [] in rows:
        raise ValueError(f"{cfg.data}: class {classes[rows.index([])]!r} is none of the model's; say which it is with "
                         '--mapping FILE')
    longest = max(map(len, rows))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])


def scores(found, dataset, cfg):
    """top1, top5; of the world's actions that one frame does not show; of several right labels, where there are any,
    in the order of the files' names."""
    right = found['top'] == found['labels'][:, None]                                    # [n, 5]
    metrics = dict(top1=right[:, 0].double().mean().item(), top5=right.any(1).double().mean().item())
    if cfg.frames and isinstance(dataset, data.World):
        metrics['hidden_top1'] = right[found['labels'] < data.NUM_HIDDEN, 0].double().mean().item()
    if cfg.real:
        with open(cfg.real) as file:
            sets = json.load(file)
        names = [os.path.basename(path) for path in dataset.paths]
        if len(sets) != len(names):
            raise ValueError(f'--real {cfg.real} has {len(sets)} entries, the data {len(names)} validation images')
        sets = dict(zip(sorted(names), sets))
        said = zip(found['top'][:, 0].tolist(), (names[i] for i in found['index'].tolist()))
        judged = [top in sets[name] for top, name in said if sets[name]]
        metrics['real_top1'] = sum(judged) / len(judged)
    return metrics


def evaluate(model, dataset, cfg, device, processes, columns=None, picture='', classes=()):
    """scores of validation samples; at the end, which names a folder for pictures, of clips also out of order."""
    found = predict(model, dataset, cfg, device, processes, columns)
    metrics = scores(found, dataset, cfg)
    if cfg.frames > 1 and picture:
        order = data.permutation(torch.arange(cfg.frames), cfg.frames, seed=0, epoch=0).tolist()
        shuffled = predict(model, dataset, cfg, device, processes, columns, order)
        metrics['shuffled_top1'] = scores(shuffled, dataset, cfg)['top1']
    if picture:
        draw_confusion(f'{picture}/confusion.png', found, classes)
        draw_mistakes(f'{picture}/mistakes.png', found, dataset, classes, model.image_size, cfg.view)
    return metrics


def draw_confusion(path, found, classes, most=40):
    """A row for each class: its share taken for each. Of many classes the most mistaken."""
    labels, said, K = found['labels'], found['top'][:, 0], len(classes)
    wrong = torch.bincount(torch.cat([labels[said != labels], said[said != labels]]), minlength=K)
    chosen = wrong.topk(min(K, most)).indices.sort().values
    counts = torch.stack([torch.bincount(said[labels == k], minlength=K) for k in chosen])          # [40, K]
    shares = counts[:, chosen] / counts.sum(1, keepdim=True).clamp(min=1)
    run.draw_matrix(path, shares, [classes[k] for k in chosen])


def draw_mistakes(path, found, dataset, classes, image_size, view, rows=4, columns=8):
    """For the classes most often said wrongly the samples it was surest of; of a clip the middle frame."""
    wrong = (found['top'][:, 0] != found['labels']).nonzero()[:, 0]
    wrong, sheet = wrong[found['confidence'][wrong].argsort(descending=True)], {}
    said = found['top'][wrong, 0]
    for k in torch.bincount(said, minlength=len(classes)).topk(min(columns, len(classes))).indices.tolist():
        position = found['position'][wrong[said == k]][:rows]
        if len(position):
            images = dataset.batch(position, image_size, seed=0, scale=view)['images']
            while images.ndim > 4:
                images = images[:, images.shape[1] // 2]
            sheet[f'no {classes[k]}'[:18]] = F.pad(images, (0, 0) * 3 + (0, rows - len(images)), value=255)
    if sheet:
        run.draw_sheet(path, sheet)


# ---- the loop ---------------------------------------------------------------------------------------------------

def check(cfg):
    """One line about what does not fit."""
    for name, allowed in (('pool', ('mean', 'class')), ('probe', ('linear', 'knn')), ('augment', tuple(data.AUGMENTS))):
        if getattr(cfg, name) not in (*allowed, Config.__dataclass_fields__[name].default):
            raise ValueError(f'--{name} {getattr(cfg, name)} is unknown; use {" or ".join(allowed)}')
    for name in ('mixup', 'cutmix', 'smoothing', 'erase', 'view', 'crop', 'layer_decay', 'drop_path', 'ema'):
        if getattr(cfg, name) > (.9999999 if name in ('drop_path', 'ema') else 1):
            raise ValueError(f'--{name} {getattr(cfg, name)} is too large; it is a share of 1')
    if cfg.bench:
        raise ValueError('--bench measures pre-training: python mim_pretrain.py --bench')
    if cfg.frames and (cfg.augment == 'rand' or cfg.probe == 'knn'):
        raise ValueError('--augment rand and --probe knn are for images; with --frames use jitter and linear')


def check_classes(cfg, train_set, val_set):
    """Names of the classes, all of which have training images that can be read."""
    classes = train_set.label_names
    if not train_set.reads_files:
        return classes
    if not classes:
        raise ValueError(f'{cfg.data} has no classes; expected a folder for each, or .cls files in shards')
    of_class = [[] for _ in classes]
    for i, label in enumerate(train_set.labels):
        of_class[label].append(i)
    if os.path.isdir(train_set.root) and any(path.startswith(classes[0] + '/') for path in train_set.paths):
        for name in sorted(os.listdir(train_set.root)):
            if os.path.isdir(os.path.join(train_set.root, name)) and name[0] != '.' and name not in classes:
                raise ValueError(f'{train_set.root}: class folder {name!r} has no image')
    for name, indices in zip(classes, of_class):
        if not any(readable(train_set, i) for i in indices):
            found = f'none of its {len(indices)} images can be read' if indices else 'it is in validation only'
            raise ValueError(f'{train_set.root}: class {name!r} cannot be learnt, {found}')
    return classes


def readable(dataset, i):
    try:
        dataset.load(i, 8, None, 1., False)
        return True
    except OSError:
        return False


def find_init(cfg):
    """--init, else what mim_pretrain.py's default command left for this size; on the world it is run first."""
    size = cfg.size.partition('-')[0]
    path = cfg.init or f'out/mim_pretrain-{size}/model.pt'
    if not cfg.init and not os.path.exists(path):
        if not cfg.data.startswith('shapes') or size not in ('pico', 'nano', 'micro', 'mini'):
            raise ValueError(f'{path} is not there to start from; make it with `python mim_pretrain.py --size {size}`, '
                             'or pass --init FILE, or --init scratch')
        flags = ['--size', size] + ['--device', cfg.device] * bool(cfg.device)
        run.on_first(run.run_stage, 'mim_pretrain.py', os.path.dirname(path), *flags)
    return path


@torch.no_grad()
def look(cfg, device, processes):
    """--eval: the scores of a classifier on the data's val/, or on all of data that is not split; --image: the five
    likeliest classes."""
    model = load_tower(cfg.init or f'{cfg.out_dir}/model.pt').to(device)
    if not model.pool or not model.config['head']:
        raise ValueError(f'{cfg.init or cfg.out_dir} is no classifier; fine-tune it first')
    if cfg.image:
        classes = class_names(model)
        image = data.load_crop(cfg.image, model.image_size, scale=cfg.view)[None].to(device)
        clip = image[:, None].expand(-1, model.config['frames'], -1, -1, -1)        # a photo: a clip that stands still
        chances = model(model.normalize(clip)).float().softmax(-1)[0]
        for chance, k in zip(*(x.tolist() for x in chances.topk(min(5, len(chances))))):
            print0(f'{chance:6.1%}  {classes[k]}')
        return
    cfg.frames = model.config['frames'] if model.config['frames'] > 1 else cfg.frames
    test_set = data.open_data(cfg.data, 'test', cfg.frames)
    print0(run.table(evaluate(model, test_set, cfg, device, processes, columns_of(model, test_set, cfg))))


def train(cfg):
    """Fine-tunes; leaves model.pt, confusion.png, mistakes.png, loss.png, log.jsonl and result.json."""
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/finetune-{cfg.size}'
    check(cfg)
    if cfg.plan:
        config = {**M.SIZES[cfg.size.partition('-')[0]], **vit_options(cfg, 1000)}
        return run.costs('plan', cfg, config, device)
    if cfg.eval or cfg.image:
        return look(cfg, device, (rank, world))
    train_set, val_set = (data.open_data(cfg.data, split, cfg.frames) for split in ('train', 'val'))
    classes = check_classes(cfg, train_set, val_set)
    if (cfg.mixup or cfg.cutmix) and cfg.batch_size // world % 2:
        raise ValueError(f'--mixup and --cutmix mix pairs; a --batch_size of {cfg.batch_size} leaves one alone')
    if run.finished(cfg):
        return
    cfg.init = find_init(cfg)
    run.settle_steps(cfg, train_set)
    model = classifier(cfg, classes)
    run.check_memory(cfg, model.config, device, world)
    if cfg.probe == 'knn':
        tower = (model if cfg.init == 'scratch' else load_tower(cfg.init)).to(device)       # with its own norm
        num = 50_000 if train_set.reads_files else run.NUM_PROBE
        return print0(run.table(run.probe(run.pooled_features(tower), train_set, val_set, tower.image_size, num, cfg,
                                          device)))
    model = run.to_device(model, cfg, device, mesh)
    if cfg.probe == 'linear':
        optimizer = torch.optim.SGD([dict(params=model.head.parameters(), lr_scale=1.)], lr=cfg.lr, momentum=.9)
    else:
        optimizer = run.make_optimizer(model, cfg, cfg.layer_decay)
    ema = run.EMA(model, cfg.ema) if cfg.ema else None
    start, _ = run.resume(cfg.out_dir, model, optimizer, cfg, ema)
    print0(f'{cfg.size}: {run.count_parameters(model) / 1e6:.2f}M parameters from {cfg.init}, {model.image_size} px'
           + f', {cfg.frames} frames' * bool(cfg.frames) + f', {len(classes)} classes; {cfg.steps:,} steps of '
           f'{cfg.batch_size} on {device}')

    def measure(picture=''):
        with ema.in_place_of(model) if ema else contextlib.nullcontext():
            return evaluate(model, val_set, cfg, device, (rank, world), None, picture, classes)
    autocast, log = run.autocast(device), run.Log(cfg, start, device, run.training_flops(model.config))
    batches = data.batches(train_set, cfg.batch_size, model.image_size, start, cfg.steps, cfg.seed, device, cfg.workers,
                           scale=(cfg.crop, 1), augment=cfg.augment, rank=rank, world=world)
    for step, batch in zip(range(start, cfg.steps), run.ahead(batches, device)):
        for group in optimizer.param_groups:
            group['lr'] = run.lr_at(step, cfg) * group['lr_scale']
        images = model.normalize(batch['images'])                               # [B, 3, H, W] or [B, T, 3, H, W]
        position = step * cfg.batch_size + rank * len(images) + torch.arange(len(images))       # on the CPU
        drop = data.uniform(cfg.seed, 'drop', position, 2 * len(model.blocks)).unflatten(1, (-1, 2))
        targets = soft_labels(batch['labels'], len(classes), cfg.smoothing)     # [B, K]
        if cfg.mixup or cfg.cutmix:
            u = data.uniform(cfg.seed, 'mix', torch.tensor(step), 67)
            images, targets = mix(images, targets, cfg.mixup, cfg.cutmix, u)
        if cfg.erase:
            images = erase(images, run.send(position, device), cfg.erase, cfg.seed)
        parts, loss = [x.split(cfg.micro_batch or len(x)) for x in (images, targets, run.send(drop, device))], 0
        for images, targets, drop in zip(*parts):
            with autocast:
                logits = model(images, drop=drop)                               # [B, K]
            part = F.cross_entropy(logits.float(), targets) * (len(images) / len(position))
            part.backward()                                                     # FSDP takes the mean over processes
            loss += part.detach()
        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        if log.is_finite(grad_norm):
            optimizer.step()
            if ema:
                ema.update(model)
        optimizer.zero_grad(set_to_none=True)
        if log.due(step):
            log.write(step, loss=run.total(loss) / world, lr=optimizer.param_groups[0]['lr'], grad_norm=grad_norm)
        done, stopping = step + 1, log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg, ema=ema)
            if stopping:
                log.leave(done)
            log.say(step, **measure())

    metrics = measure(cfg.out_dir)
    with ema.in_place_of(model) if ema else contextlib.nullcontext():
        run.save_model(model, f'{cfg.out_dir}/model.pt', classes=classes)
    log.finish(model, 'training loss', {f'blind: ln {len(classes)}': math.log(len(classes))}, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
