"""
Stage 2, transfer: the pre-trained ViT gets a new head and learns the classes of images,
or the actions of videos. EVA, arXiv:2211.07636, section 3.

    python finetune.py                                     # laptop, minutes: kinds of the world's objects
    python finetune.py --size nano-video                   # its actions, from clips
    python finetune.py --image mine.jpg                    # the five likeliest classes
    torchrun --nproc_per_node=8 finetune.py --size g --data imagenet --init eva_21k.pt
"""
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model as M
import run
from run import Refused, option, print0


@dataclass
class Config(run.Run):
    init: str = option('', 'file to start from, or scratch; out/mim_pretrain-SIZE/model.pt if empty')
    probe: str = option('', 'linear: train only the head; k-NN is mim_pretrain.py --eval --init FILE', ('', 'linear'))
    frames: int = option(0, 'of a clip: learn actions from that many; 0: images', high=1024)
    pool: str = option('mean', 'the head sees the mean of the patches or the class token', ('mean', 'class'))
    mapping: str = option('', "file with a line for each class: which of --init's classes it takes over")
    real: str = option('', 'JSON list of the right labels of each validation image, as ImageNet-ReaL has them')
    smoothing: float = option(.1, 'share of the target spread over all classes', high=1)
    mixup: float = option(0., "mix whole images by Beta(a, a), 0: don't", high=1)
    cutmix: float = option(0., "mix by pasting a rectangle of Beta(a, a)'s area, 0: don't", high=1)
    augment: str = option('', 'of files: RandAugment m9-mstd0.5-inc1, or colours (for clips)', ('', 'rand', 'colour'))
    layer_decay: float = option(.8, 'factor on the learning rate from each layer to the one below', high=1)
    freeze_patches: bool = option(True, 'keep the pre-trained patch embedding as it is')
    ema: float = option(0., 'decay of averaged weights, which are then evaluated and kept; 0: none', below=1)
    micro_batch: int = option(0, 'images at once on a device; 0: as many as belong to it and fit')
    warmup_steps: int = option(100, 'steps of linear warm-up')
    crop: float = .2        # smallest share of a real image's area that a training view takes
    view: float = .875      # share of a real image's shorter side that evaluation sees


IN1K = dict(batch_size=512, steps=25_020, warmup_steps=5004, lr=3e-5, layer_decay=.95, drop_path=.4, smoothing=.3,
            augment='rand', crop=.08, view=1., ema=.9999)                               # 10 epochs
LINEAR = dict(probe='linear', pool='class', batch_size=16_000, steps=7200, warmup_steps=800, lr=1., weight_decay=0.,
              smoothing=0., crop=.08, view=1.)                                          # 90 epochs
VIDEO = dict(batch_size=256, augment='colour', crop=.44, view=1., freeze_patches=False, drop_path=.2)
RECIPES = {  # differences from the defaults. g and g-...: the paper's; ti to l: ours, not tried; above: on two cores
    'pico':         dict(batch_size=64, lr=3e-3),
    'nano':         dict(batch_size=64, lr=3e-3),
    'micro':        dict(batch_size=64, lr=2e-3),
    'mini':         dict(batch_size=64, lr=1.5e-3),
    'nano-video':   dict(frames=4, image_size=16, batch_size=32, steps=1500, lr=2e-3, layer_decay=1.),
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
    'g-k400':       dict(VIDEO, frames=16, steps=937, warmup_steps=0, lr=1e-6, min_lr=1e-6, layer_decay=.95),  # 1 epoch
}
HEAD_SCALE = .001       # of a new head's first weights: BEiT's, so that fine-tuning starts from near equal logits
NUM_EVAL = 2048         # validation scenes, of which the world has no end; no more than a short run trains on


# ---- the idea ---------------------------------------------------------------------------------------------------

def soft_labels(labels, num_classes, smoothing):
    """Class ids [B] to targets [B, K]: 1 - smoothing on the class, and smoothing spread over all."""
    targets = F.one_hot(labels, num_classes).float()

    share = smoothing / num_classes
    return targets * (1 - smoothing) + share


def beta(alpha, u):
    """A number from Beta(alpha, alpha), alpha up to 1, out of uniform numbers u [2n], n pairs.
    Johnk's way: of the first pair whose powers 1 / alpha add up to at most 1, the share of the first."""
    powers = u.double() ** (1 / alpha)
    x, y = powers.view(-1, 2).unbind(1)         # each [n]
    total = x + y

    first = (total <= 1).int().argmax()
    return (x / total)[first].item()


def swap(x):
    """[B, ...], B even, with neighbours exchanged: 1, 0, 3, 2, ... They are always in the same process."""
    # [B / 2, 2, ...]
    pairs = x.unflatten(0, (-1, 2))
    return pairs.flip(1).flatten(0, 1)


def span(place, side, n):
    """Where a rectangle begins and ends along n pixels, cut off at the border: (first, end).
    place: of its middle; side: its length; both as shares of n."""
    half = int(side * n) // 2
    middle = int(place * n)

    # within the border
    first = max(0, middle - half)
    end = min(n, middle + half)
    return first, end


def mix_images(images, targets, mixup, cutmix, u):
    """Mixes each image with its neighbour, by one weight for the whole batch, as EVA.
    By mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899); where both are on, a coin decides.
    images [B, ..., H, W], B even; targets [B, K]; u: 67 uniform numbers."""
    others = swap(images)
    H, W = images.shape[-2:]
    if mixup and (u[0] < .5 or not cutmix):
        # mixup: a weighted mean of all pixels
        weight = beta(mixup, u[3:])
        images = torch.lerp(others, images, weight)
    else:
        # cutmix: a rectangle of the other image
        kept = beta(cutmix, u[3:])
        side = math.sqrt(1 - kept)
        top, bottom = span(u[1].item(), side, H)
        left, right = span(u[2].item(), side, W)
        images = images.clone()
        images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        # what is left is counted: the border may have cut off some
        pasted = (bottom - top) * (right - left)
        weight = 1 - pasted / (H * W)

    return images, torch.lerp(swap(targets), targets, weight)


class EMA:
    """Averaged weights, shard by shard: after each step they move 1 - decay of the way to the model's."""

    def __init__(self, model, decay):
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        for name, weight in model.named_parameters():
            self.weights[name].lerp_(weight, 1 - self.decay)

    @contextlib.contextmanager
    def in_place_of(self, model):
        """Within it the model has these weights, to evaluate or save them."""
        own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        model.load_state_dict(self.weights)
        yield
        model.load_state_dict(own)


# ---- the head ---------------------------------------------------------------------------------------------------

def find_init(cfg):
    """--init, else what mim_pretrain.py's default command leaves for this size."""
    return cfg.init or f'out/mim_pretrain-{run.size_of(cfg)}/model.pt'


def pretrain(cfg):
    """Runs that command on the world, where --init is what it leaves and is missing."""
    size = run.size_of(cfg)
    folder = f'out/mim_pretrain-{size}'
    if cfg.init != f'{folder}/model.pt' or Path(cfg.init).exists():
        return
    if not cfg.data.startswith('shapes') or size not in ('pico', 'nano', 'micro', 'mini'):
        raise Refused(f'{cfg.init} is missing; run mim_pretrain.py --size {size}, or give --init FILE or scratch')
    run.on_first(run.run_stage, 'mim_pretrain.py', folder, '--size', size, '--device', cfg.device)


def classifier(cfg, classes):
    """The ViT of --init, or a new one, with a head for these classes. Those it knew keep their weights."""
    options = dict(head=len(classes), head_bias=True, pool=cfg.pool, mask_token=False, drop_path=cfg.drop_path,
                   frames=max(1, cfg.frames))
    before = None if cfg.init == 'scratch' else M.load(cfg.init, M.ViT)
    if before is None:
        model = M.init_weights(M.ViT(run.vit_config(cfg, **options)), cfg.seed)
    else:
        asked = {name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
        model = M.load(cfg.init, M.ViT, **options, **asked)
        model.patch_embed.requires_grad_(not cfg.freeze_patches)        # EVA lets no gradient pass its output

    # a new head, with what the one before knew
    with torch.no_grad():
        model.head.weight.mul_(HEAD_SCALE)
        model.head.bias.zero_()
        if before and (cfg.mapping or 'classes' in before.extra):
            for k, known in enumerate(match_classes(cfg, classes, before)):
                if known:
                    model.head.weight[k] = before.head.weight[known].mean(0)
                    model.head.bias[k] = before.head.bias[known].mean()
    if cfg.probe == 'linear':
        model.requires_grad_(False).head.requires_grad_(True)
    is_new = before is None or before.config.frames == 1
    if cfg.frames > 1 and is_new and model.config.width <= M.SIZES['ti']['width']:
        tell_time(model)
    return model


@torch.no_grad()
def tell_time(model):
    """A small model's positions differ from frame to frame from the start, by a ramp along a random direction.
    Not in the paper, whose are equal: a model then starts out blind to the order of frames."""
    direction = 2 * data.uniform(0, 'time', torch.arange(model.config.width), 1)[:, 0] - 1      # [D]
    ramp = torch.linspace(-.5, .5, model.config.frames)[:, None] * direction                    # [T, D]
    model.pos_embed[:, 1:] += ramp.repeat_interleave(model.grid ** 2, 0)


def match_classes(cfg, classes, model):
    """For each class of the data the numbers of the model's classes that it means: those of its name, or, of a model
    without names, its number; [] if none is. --mapping FILE says others, a line for each class of the data: names or
    numbers, with commas, or - for none."""
    names = model.extra.get('classes')
    numbers = {}
    for k, name in enumerate(names or []):
        numbers.setdefault(name, []).append(k)          # ImageNet has two cranes
    if names and not cfg.mapping:
        return [numbers.get(name, []) for name in classes]

    for k in range(model.config.head if model.pool else 0):
        numbers.setdefault(str(k), [k])
    if not cfg.mapping:
        return [numbers.get(name.lstrip('0') or '0', []) for name in classes]

    lines = data.read_text(cfg.mapping).splitlines()
    if len(lines) != len(classes):
        raise Refused(f'--mapping {cfg.mapping} has {len(lines)} lines; expected {len(classes)}, one for each class')
    rows = []
    for line in lines:
        words = [word.strip() for word in line.split(',') if word.strip() not in ('', '-')]
        if not numbers.keys() >= set(words):
            raise Refused(f"--mapping {cfg.mapping}: {line!r} is none of the model's classes")
        rows.append([k for word in words for k in numbers[word]])
    return rows


@torch.no_grad()
def predict(model, dataset, cfg, device, processes=(0, 1), columns=None, order=None):
    """What the model says of validation samples, each once: a dict of top [n, 5], labels, index and position [n].
    processes: rank, and how many. columns [K, m]: each class's logits, the largest counts. order: of the frames."""
    num = len(dataset) if dataset.reads_files else min(NUM_EVAL, max(64, cfg.steps * cfg.batch_size))
    views = math.prod(getattr(dataset, 'VIEWS', (1,)))                  # of a sample; clips of files have 12
    batch_size = max(1, 64 // views)
    rows = []
    for batch in data.eval_batches(dataset, batch_size, model.image_size, num, device, cfg.workers, *processes):
        images = batch['images'].flatten(0, 1) if views > 1 else batch['images']
        if order is not None:
            images = images[:, order]
        logits = model(model.normalize(images)).float()                 # [B * views, K]
        if columns is not None:
            logits = logits[:, columns].amax(-1)                        # [B * views, K, m] to [B * views, K]
        chances = logits.softmax(-1).unflatten(0, (-1, views)).mean(1)  # [B, K]
        row = {name: batch[name].to(device) for name in ('labels', 'index', 'position')}
        rows.append(dict(row, top=chances.topk(min(5, chances.shape[1])).indices))
    # of all processes, without what filled the last one's part
    found = {name: run.gather(torch.cat([row[name] for row in rows])).cpu() for name in rows[0]}
    counted = found['position'] < num
    return {name: x[counted] for name, x in found.items()}


def scores(found, dataset, cfg):
    """top1, top5; of the world's actions also of those that one frame does not show; by --real's labels."""
    right = found['top'] == found['labels'][:, None]                    # [n, 5]
    metrics = dict(top1=right[:, 0].double().mean().item(), top5=right.any(1).double().mean().item())
    if cfg.frames and isinstance(dataset, data.World):
        metrics['hidden_top1'] = right[found['labels'] < data.NUM_HIDDEN, 0].double().mean().item()
    if cfg.real:
        labels = real_labels(cfg, dataset)
        said = zip(found['top'][:, 0].tolist(), found['index'].tolist())
        judged = [top in labels[i] for top, i in said if labels[i]]
        metrics['real_top1'] = sum(judged) / len(judged) if judged else math.nan
    return metrics


def real_labels(cfg, dataset):
    """The right labels of each image, by its number; the file has them in the order of the images' names,
    or, where these are equal, of their paths."""
    if not dataset.reads_files:
        raise Refused(f'--real is for images in files, not for {cfg.data}')
    rows = data.read_json(cfg.real)
    num = len(dataset.paths)
    if not isinstance(rows, list) or len(rows) != num:
        raise Refused(f'--real {cfg.real} is no JSON list of {num:,} rows, one for each validation image')

    # row by row
    K = len(dataset.label_names)
    for n, row in enumerate(rows):
        if not isinstance(row, list) or not all(type(k) is int and 0 <= k < K for k in row):
            raise Refused(f'--real {cfg.real}: row {n} is {str(row)[:60]}, expected a list of labels, 0 to {K - 1}')
    if not any(rows):
        raise Refused(f'--real {cfg.real} has no label at all')

    def place(path):
        return data.natural(Path(path).name), data.natural(path)

    of_path = dict(zip(sorted(dataset.paths, key=place), rows))
    return [of_path[path] for path in dataset.paths]


def draw_confusions(path, found, dataset, image_size, rows=4, columns=8):
    """The commonest confusions, a column of samples each; of a clip the middle frame."""
    pairs = torch.stack([found['labels'], found['top'][:, 0]], 1)       # [n, 2]
    wrong = pairs[:, 0] != pairs[:, 1]
    kinds, counts = pairs[wrong].unique(dim=0, return_counts=True)
    sheet = {}
    for pair in kinds[counts.argsort(descending=True)][:columns]:
        position = found['position'][(pairs == pair).all(1)][:rows]
        images = dataset.batch(position, image_size, train=False)['images']
        while images.ndim > 4:
            images = images[:, images.shape[1] // 2]
        label, said = (dataset.label_names[k] for k in pair)
        sheet[f'{label}: {said}?'] = images
    if sheet:
        run.draw_sheet(path, sheet)


@torch.no_grad()
def apply_model(cfg, device, processes):
    """--image: the five likeliest classes of a picture. --eval: the scores on val/, or on all of data without it."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    model = run.to_device(M.load(path, M.ViT), cfg, device)
    names = model.extra.get('classes', [])      # a released model has none, but its classes in their order
    if not model.pool or not model.config.head:
        raise Refused(f'{path} is no classifier; fine-tune it first')
    if cfg.image:
        image = data.load_view(cfg.image, model.image_size, cfg.view).to(device)        # [3, S, S]
        clip = image.expand(1, model.config.frames, -1, -1, -1)         # to a model of clips, one of equal frames
        logits = model(model.normalize(clip))[0]    # [K]
        chances, top = logits.float().softmax(-1).topk(min(5, len(logits)))
        for chance, k in zip(chances.tolist(), top.tolist()):
            print0(f'{chance:6.1%}  {names[k] if names else k}')
        return

    # of the model's classes only the data's compete
    cfg.frames = model.config.frames if model.config.frames > 1 else cfg.frames
    dataset = data.open_data(cfg.data, 'test', cfg.frames, data.Views(share=cfg.view), labels=True)
    run.say_judged(dataset)
    if cfg.real:
        real_labels(cfg, dataset)           # refuses a wrong file before anything is judged
    classes = dataset.label_names
    columns = match_classes(cfg, classes, model)
    if not names and not any(columns) and len(classes) == model.config.head:
        if sorted(classes) != classes:
            raise Refused(f'{path} has no names for its {len(classes)} classes, and whether class 10 comes before '
                          'or after 2 depends on who trained it; say with --mapping FILE')
        run.say_order(path, classes)
        columns = [[k] for k in range(len(classes))]
    if [] in columns:
        raise Refused(f"{cfg.data}: class {classes[columns.index([])]!r} is none of the model's; use --mapping FILE")
    longest = max(len(numbers) for numbers in columns)
    columns = torch.tensor([numbers + numbers[:1] * (longest - len(numbers)) for numbers in columns])
    print0(run.table(scores(predict(model, dataset, cfg, device, processes, columns), dataset, cfg)))
    run.report_broken(dataset)


# ---- the loop ---------------------------------------------------------------------------------------------------

def open_sets(cfg, world):
    """The training and the validation set. Every class has an image to learn from."""
    if cfg.frames and cfg.augment == 'rand':
        raise Refused('--augment rand is for images; with --frames use colour')
    if (cfg.mixup or cfg.cutmix) and cfg.batch_size // world % 2:
        raise Refused(f'--mixup and --cutmix mix pairs; a --batch_size of {cfg.batch_size} leaves one alone')
    views = data.Views(crop=(cfg.crop, 1), augment=cfg.augment, share=cfg.view)
    train_set = data.open_data(cfg.data, 'train', cfg.frames, views, labels=True)
    val_set = data.open_data(cfg.data, 'val', cfg.frames, views, labels=True)
    if cfg.real:
        real_labels(cfg, val_set)           # refuses a wrong file now, not after the last step
    if train_set.reads_files:
        unseen = set(range(len(train_set.label_names))) - set(train_set.labels)
        if unseen:
            raise Refused(f'{train_set.root}: class {train_set.label_names[min(unseen)]!r} is in validation only')
    return train_set, val_set


def train(cfg):
    """Fine-tunes; leaves model.pt, confusions.png, loss.png, log.jsonl and result.json."""
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/finetune-{cfg.size}'
    if cfg.eval or cfg.image:
        return apply_model(cfg, device, (rank, world))
    if cfg.init == 'scratch' and cfg.mapping:
        raise Refused('--mapping says what to take over of --init FILE, not of scratch')
    for name in ('mixup', 'cutmix'):
        if 0 < getattr(cfg, name) < .01:        # whose powers, in `beta`, are too small for a float
            raise Refused(f'--{name} {getattr(cfg, name)} does not fit; use 0, or .01 to 1')
    train_set, val_set = open_sets(cfg, world)
    run.settle_steps(cfg, train_set)
    cfg.init = find_init(cfg)
    if run.finished(cfg):
        return
    run.introduce(train_set, val_set)
    pretrain(cfg)

    classes = train_set.label_names
    about = run.describe(train_set, val_set, classes=classes)
    model = classifier(cfg, classes)
    run.settle_memory(cfg, model, device, world)
    model = run.to_device(model, cfg, device, mesh)
    if cfg.probe == 'linear':
        optimizer = torch.optim.SGD([dict(params=model.head.parameters(), lr_scale=1.)], cfg.lr, momentum=.9)
    else:
        optimizer = run.make_optimizer(model, cfg, cfg.layer_decay)
    ema = EMA(model, cfg.ema) if cfg.ema else None
    averaged = ema.in_place_of if ema else contextlib.nullcontext
    start, _ = run.resume(cfg.out_dir, model, optimizer, cfg, ema, about)
    print0(f'{cfg.size}: {run.count_parameters(model) / 1e6:.2f}M parameters from {cfg.init}, {model.image_size} px, '
           f'{len(classes)} classes; {cfg.steps:,} steps of {cfg.batch_size} on {device}')
    log = run.Log(cfg, start, device, run.training_flops(model.config))
    batches = data.batches(train_set, cfg.batch_size, model.image_size, start, cfg.steps, cfg.seed,
                           device, cfg.workers, rank, world)
    batches = run.ahead(batches, device)
    num = cfg.batch_size // world               # samples of this process in a step
    micro = cfg.micro_batch                     # at once

    for step, batch in zip(range(start, cfg.steps), log.watch(batches)):
        # learning rate
        for group in optimizer.param_groups:
            group['lr'] = run.lr_at(step, cfg) * group['lr_scale']

        # batch: images, and numbers that decide which branches are dropped
        images = model.normalize(batch['images'])               # [B, 3, H, W] or [B, T, 3, H, W]
        position = step * cfg.batch_size + rank * num + torch.arange(num)
        drop = data.uniform(cfg.seed, 'drop', position, 2 * len(model.blocks))
        drop = run.send(drop.unflatten(1, (-1, 2)), device)     # [B, depth, 2]

        # targets
        targets = soft_labels(batch['labels'], len(classes), cfg.smoothing)     # [B, K]
        if cfg.mixup or cfg.cutmix:
            u = data.uniform(cfg.seed, 'mix', torch.tensor(step), 67)
            images, targets = mix_images(images, targets, cfg.mixup, cfg.cutmix, u)

        # forward, loss, backward, a micro-batch at a time; FSDP takes the mean over processes
        total = 0.
        for begin in range(0, num, micro):
            part = slice(begin, begin + micro)
            run.accumulate(model, cfg, begin + micro == num)
            logits = model(images[part], drop=drop[part])                       # [b, K]
            loss = F.cross_entropy(logits.float(), targets[part]) * micro / num
            loss.backward()
            total += loss.detach()

        # clip, step
        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        log.update(optimizer, grad_norm)
        if ema:
            ema.update(model)
        optimizer.zero_grad(set_to_none=True)

        # log, save, evaluate
        if log.due(step):
            loss = run.sum_over_processes(total) / world
            log.write(step, loss=loss, lr=optimizer.param_groups[0]['lr'], grad_norm=grad_norm)
        done = step + 1
        stopping = log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg, ema=ema, about=about)
            if stopping:
                log.leave(done)
            with averaged(model):
                found = predict(model, val_set, cfg, device, (rank, world))
            log.say(step, **scores(found, val_set, cfg))

    # what stays: the weights, then what they are worth
    with averaged(model):
        run.save_model(model, f'{cfg.out_dir}/model.pt', classes=classes)
        found = predict(model, val_set, cfg, device, (rank, world))
        metrics = scores(found, val_set, cfg)
        if cfg.frames > 1:
            order = data.permutation(torch.arange(cfg.frames), cfg.frames, seed=0, epoch=0)
            shuffled = predict(model, val_set, cfg, device, (rank, world), order=order)
            metrics['shuffled_top1'] = scores(shuffled, val_set, cfg)['top1']
    picture = f'{cfg.out_dir}/confusions.png'
    with run.optional(picture):
        draw_confusions(picture, found, val_set, model.image_size)
    log.finish(model, 'training loss', {f'blind: ln {len(classes)}': math.log(len(classes))}, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
