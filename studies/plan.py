"""
What pre-training would cost, without data and teacher: parameters, FLOPs, memory on each device, days.

    python studies/plan.py --size g --devices 128 --micro_batch 32      # and any other flag of mim_pretrain.py
"""
import functools
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mim_pretrain                 # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

REACHED = .5        # assumed share of what one large matrix product reaches; EVA's own run: .15. speed.py measures ours


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


def memory_of(config, num, device, shards=1, checkpointed=False):
    """{what: bytes} that a ViT's training with AdamW takes on each of `shards` devices, num images at once."""
    with torch.device('meta'):
        parameters = run.count_parameters(M.ViT(config))
    weights = 4 * parameters / shards
    if shards > 1:          # two blocks are whole at a time, in what autocast makes bf16
        weights += 2 * (2 if device.type == 'cuda' else 4) * parameters / config.depth
    activations = num * run.activation_memory(config, device, checkpointed)
    return dict(weights=weights, gradients=weights, AdamW=8 * parameters / shards, activations=activations)


def free_memory(device):
    """Free bytes of a GPU; of a CPU all that the machine has."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


@functools.cache
def matmul_speed(device):
    """FLOP/s of a large matrix product, the best of ten: on cuda in bf16, elsewhere in float32."""
    n, dtype = (8192, torch.bfloat16) if device.type == 'cuda' else (768, torch.float32)
    x = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(seconds_of(lambda: x @ x, device) for _ in range(10))


def seconds_of(function, device):
    """How long it takes, until the device is done."""
    synchronize = getattr(torch, device.type).synchronize       # torch.cpu's does nothing
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def plan(cfg):
    device = run.setup(cfg)[2]
    config = run.vit_config(cfg)
    M.check_grid(config.image_size, config.image_size, config.patch_size)
    teacher = default_teacher(cfg.size, config.image_size // config.patch_size)
    config.head = teacher.head

    # one image
    forward = run.flops_per_image(config)
    teacher_forward = run.flops_per_image(teacher)
    flops = run.training_flops(config, teacher)
    with torch.device('meta'):
        parameters = run.count_parameters(M.ViT(config))
    print(f'parameters           {parameters:,}')
    print(f'forward              {forward / 1e9:.4g} GFLOP an image')
    print(f'teacher, forward     {teacher_forward / 1e9:.4g} GFLOP an image '
          f'({teacher.width} wide, {teacher.depth} deep)')
    print(f'training             {flops / 1e9:.4g} GFLOP an image (backward costs two forwards)')

    # one device
    num = cfg.micro_batch or math.ceil(cfg.batch_size / cfg.devices)
    memory = memory_of(config, num, device, cfg.devices, cfg.checkpoint_activations)
    print(f'on each of {cfg.devices} devices, {num} images at once:')
    for name, size in memory.items():
        print(f'{name:<20} {size / 1e9:.4g} GB')
    kept = memory_of(config, 1, device)['activations']
    print(f'  kept                       {kept / 1e6:.4g} MB an image')
    computed_again = memory_of(config, 1, device, checkpointed=True)['activations']
    print(f'  --checkpoint_activations   {computed_again / 1e6:.4g} MB an image')
    total = sum(memory.values())
    free = free_memory(device)
    print(f'memory               {total / 1e9:.4g} GB; {free / 1e9:.4g} GB are free here')

    # the whole run
    speed = matmul_speed(device)
    images = cfg.steps * cfg.batch_size
    seconds = images * flops / (cfg.devices * speed * REACHED)
    print(f'matrix product       {speed / 1e12:.4g} TFLOP/s measured on this {device.type}')
    print(f'days                 {seconds / 86400:,.4g} for {cfg.steps:,} steps of {cfg.batch_size:,} images on {cfg.devices} '
          f'like it, if {REACHED:.0%} of that is reached (assumed; studies/speed.py measures it)')


if __name__ == '__main__':
    run.main(plan, Config, mim_pretrain.RECIPES)
