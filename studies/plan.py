"""
What pre-training would cost, without data and teacher: parameters, FLOPs, memory on each device, days.

    python studies/plan.py --size g --devices 128 --micro_batch 32      # and any other flag of mim_pretrain.py
    python studies/plan.py --size g --device cuda                       # on a machine that need not have one
"""
import functools
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'studies')]
import data                         # noqa: E402
import grid                         # noqa: E402
import mim_pretrain                 # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

REACHED = .5        # assumed share of what one large matrix product reaches; EVA's own run: .15. gpu.py measures ours
A_MACHINE = 8           # devices, over which weights are sharded
CARDS = 24, 40, 80, 141     # what GPUs have; what makers call GB is 2^30 bytes


@dataclass
class Config(mim_pretrain.Config):
    devices: int = run.option(1, 'how many like this one', low=1)


def default_teacher(size, grid):
    """The ViT of OpenAI's ViT-L/14 for b, l and g, else of the built-in teacher, on a grid of patches as ours."""
    row = dict(M.SIZES['nano'], head=64)
    if size in ('b', 'l', 'g'):
        row = dict(M.SIZES['l'], head=768)
    row['image_size'] = grid * row['patch_size']
    return M.ViTConfig(**row)


def on_meta(config):
    """A ViT of which nothing but the sizes is there."""
    with torch.device('meta'):
        return M.ViT(config)


def images_that_fit(free, memory, again=False):
    """How many images at once so many free bytes have room for, by a run.Memory."""
    fixed = memory.total(0, again)
    return max(0, int((free - fixed) / (memory.total(1, again) - fixed)))


@functools.cache
def matmul_speed(device):
    """FLOP/s of a large matrix product, in bf16 on cuda, elsewhere in float32. Random numbers, a second of warm-up and
    the median: of equal numbers, on clocks that are still cold, a GPU shows a tenth more than it can keep up."""
    n, dtype = (8192, torch.bfloat16) if device.type == 'cuda' else (512, torch.float32)
    x, y = torch.randn(2, n, n, device=device, dtype=dtype)

    def ten():
        for _ in range(10):
            x @ y

    began = time.perf_counter()
    while time.perf_counter() - began < 1:
        seconds_of(ten, device)
    seconds = statistics.median(seconds_of(ten, device) for _ in range(9))
    return 10 * 2 * n ** 3 / seconds


def seconds_of(function, device):
    """How long it takes, until the device is done."""
    synchronize = getattr(torch, device.type).synchronize       # torch.cpu's does nothing
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def find_device(cfg):
    """(the device that is planned for, whether it is here)."""
    if cfg.device == 'cuda' and not torch.cuda.is_available():
        return torch.device('cuda'), False
    return run.find_device(cfg.device, 0, 1), True


def plan(cfg):
    if cfg.epochs:
        raise M.Refused('--epochs needs the data to count; plan with --steps')
    if cfg.target != 'clip':
        raise M.Refused(f'--target {cfg.target} is not planned; only clip is')
    device, is_here = find_device(cfg)
    config = run.vit_config(cfg)
    M.check_grid(config.image_size, config.image_size, config.patch_size)
    teacher = default_teacher(cfg.size, config.image_size // config.patch_size)
    config.head = teacher.head

    # one image
    model = on_meta(config)
    forward = run.flops_per_image(config)
    teacher_forward = run.flops_per_image(teacher)
    flops = run.training_flops(config, teacher)
    print(f'parameters           {run.count_parameters(model):,}')
    print(f'forward              {forward / 1e9:.4g} GFLOP an image')
    print(f'teacher, forward     {teacher_forward / 1e9:.4g} GFLOP an image '
          f'({teacher.width} wide, {teacher.depth} deep)')
    print(f'training             {flops / 1e9:.4g} GFLOP an image (backward costs two forwards)')

    # one device
    share = math.ceil(cfg.batch_size / cfg.devices)
    num = cfg.micro_batch or share
    shards = min(cfg.devices, A_MACHINE)
    drawn = data.is_world(cfg.data)
    memory = run.Memory(model, device, shards, on_meta(teacher), share, drawn)
    parts = memory.parts(num, cfg.checkpoint_activations)
    print(f'on each of {cfg.devices} devices ({device.type}), {num} images at once:')
    for name, size in parts.items():
        print(f'{name:<20} {size / 1e9:.4g} GB')
    kept = run.activation_memory(config, device)
    print(f'  kept                       {kept / 1e6:.4g} MB an image')
    computed_again = run.activation_memory(config, device, True)
    print(f'  --checkpoint_activations   {computed_again / 1e6:.4g} MB an image')
    total = sum(parts.values())
    if is_here:
        print(f'memory               {total / 1e9:.4g} GB; {run.free_memory(device) / 1e9:.4g} GB are free here')
    else:
        print(f'memory               {total / 1e9:.4g} GB; no {device.type} device is here to say what is free')

    # the whole run
    if is_here:
        speed = matmul_speed(device)
        images = cfg.steps * cfg.batch_size
        seconds = images * flops / (cfg.devices * speed * REACHED)
        print(f'matrix product       {speed / 1e12:.4g} TFLOP/s measured on this {device.type}')
        print(f'days                 {seconds / 86400:,.4g} for {cfg.steps:,} steps of {cfg.batch_size:,} images on '
              f'{cfg.devices} like it, if {REACHED:.0%} of that is reached (assumed; studies/gpu.py measures it)')
    else:
        print('matrix product       not measured, and so no days')
    if device.type == 'cuda':
        print_cards(cfg, memory)


def print_cards(cfg, memory):
    """What a run would choose on each card."""
    table = []
    for card in CARDS:
        row = [f'{card} GB', 'none', '', '']
        for way in reversed(run.ways_to_train(cfg, memory.share)):
            if memory.total(*way) <= card * 2 ** 30:
                num, again, _ = way
                activations = 'computed again' if again else 'kept'
                row[1:] = f'{num:,}', activations, f'{memory.total(*way) / 1e9:.0f} GB'
        table.append(row)
    grid.print_table(['a card of', 'images at once', 'activations', 'memory'], table)


if __name__ == '__main__':
    run.main(plan, Config, mim_pretrain.RECIPES)
