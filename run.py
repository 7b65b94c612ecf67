"""
What every run needs once: options, device, optimizer, schedule, save and resume, log, curves, costs. The loops are in
the stage files; they call these by name.
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from model import SIZES, Block, ViT, first_line, get_rank, knn_accuracy, linear_probe, print0


def option(default, help):
    """A field of a Config; its flag and its line in --help are made from it."""
    return dataclasses.field(default=default, metadata=dict(help=help))


@dataclass
class Run:
    """What means the same in every stage."""
    size: str = option('nano', 'row of SIZES in model.py')
    data: str = option('shapes', 'the built-in world (shapes:unique=N,classes=N,objects=N), images in a folder or .tar')
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


def draw_sheet(path, columns, tile=128):
    """A picture of titled columns of images, {title: [n, 3, H, W] with values 0 to 255}, each drawn `tile` wide."""
    step, font = tile + 6, ImageFont.load_default(14)
    sheet = Image.new('RGB', (len(columns) * step + 6, len(next(iter(columns.values()))) * step + 30), 'white')
    for x, (title, column) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((6 + x * step, 6), title, fill='black', font=font)
        for y, picture in enumerate(column.clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()):
            resample = Image.BICUBIC if picture.shape[0] > tile else Image.NEAREST
            sheet.paste(Image.fromarray(picture).resize((tile, tile), resample), (6 + x * step, 28 + y * step))
    sheet.save(path)


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


def size_config(cfg, **options):
    """The ViT's options of a run: its size's row with the image and patch size asked for."""
    asked = {name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
    return {**SIZES[cfg.size], **asked, **options}


NUM_PROBE = 2048        # training images that fit the probes, and validation images that judge them


def pooled_features(model):
    """What the probes see of a model: images uint8 [B, 3, H, W] -> the mean of its final patch tokens [B, D]. EVA's
    class token has no loss in pre-training, so it says nothing."""
    return lambda images: model.features(model.normalize(images))[:, 1:].mean(1)


@torch.no_grad()
def probe(encode, train_set, val_set, image_size, num, cfg, device):
    """Top-1 of frozen features on the data's labels, by k-NN and by a closed-form linear map; {} without labels.
    The world has two: the largest object's kind, which captions name, and its part pattern, which they never do
    (`unnamed`). encode: images uint8 [B, 3, H, W] -> [B, D]."""
    features, labels = [], []
    for dataset in (train_set, val_set):
        x, y = [], []
        for batch in data.eval_batches(dataset, 64, image_size, num, device, cfg.workers):
            if 'labels' not in batch:
                return {}
            y.append({name: batch[key] for name, key in (('top1', 'labels'), ('unnamed', 'unnamed')) if key in batch})
            x.append(encode(batch['images']).float())
        features.append(torch.cat(x))
        labels.append({name: torch.cat([rows[name] for rows in y]).to(device) for name in y[0]})
    return {f'{how}_{name}': measure(features[0], labels[0][name], features[1], labels[1][name])
            for name in labels[0] for how, measure in (('knn', knn_accuracy), ('linear', linear_probe))}
