"""
What pre-training would cost, without data and teacher: parameters, FLOPs, memory on each device, days.

    python studies/plan.py --size g --devices 128 --micro_batch 32      # and any other flag of mim_pretrain.py
"""
import math
import sys
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
    memory = run.training_memory(config, num, device, cfg.devices, cfg.checkpoint_activations)
    print(f'on each of {cfg.devices} devices, {num} images at once:')
    for name, size in memory.items():
        print(f'{name:<20} {size / 1e9:.4g} GB')
    kept = run.training_memory(config, 1, device)['activations']
    print(f'  kept                       {kept / 1e6:.4g} MB an image')
    computed_again = run.training_memory(config, 1, device, checkpointed=True)['activations']
    print(f'  --checkpoint_activations   {computed_again / 1e6:.4g} MB an image')
    total = sum(memory.values())
    free = run.available_memory(device)
    print(f'memory               {total / 1e9:.4g} GB; {free / 1e9:.4g} GB are free here')

    # the whole run
    speed = run.matmul_speed(device)
    images = cfg.steps * cfg.batch_size
    seconds = images * flops / (cfg.devices * speed * REACHED)
    print(f'matrix product       {speed / 1e12:.4g} TFLOP/s measured on this {device.type}')
    print(f'days                 {seconds / 86400:,.4g} for {cfg.steps:,} steps of {cfg.batch_size:,} images on {cfg.devices} '
          f'like it, if {REACHED:.0%} of that is reached (assumed; studies/speed.py measures it)')


if __name__ == '__main__':
    run.main(plan, Config, mim_pretrain.RECIPES)
