"""
What pre-training would cost, without data and teacher: parameters, FLOPs, memory on each device, days.

    python studies/plan.py --size g --devices 128 --micro_batch 32      # and any other flag of mim_pretrain.py
    python studies/plan.py --size g --device cuda                       # on a machine that need not have one
"""
import functools
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'studies')]
import grid                         # noqa: E402
import mim_pretrain                 # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

REACHED = .5        # assumed share of what one large matrix product reaches; EVA's own run: .15. gpu.py measures ours
DRAWING = 190       # bytes a pixel that drawing scenes takes for a while (counted), of 2^24 pixels at a time
RESERVE = 1e9       # of a GPU, for its libraries and for gaps between tensors (assumed)
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


def memory_of(config, num, device, shards=1, checkpointed=False, teacher=None, batch_size=0, drawn=False):
    """{what: bytes} that a ViT's training with AdamW takes on each of `shards` devices, num images at once.
    device: only its type counts, it need not be here. teacher: its options. batch_size: images of each device's
    part of a batch, drawn by the built-in world or read from files."""
    with torch.device('meta'):
        parameters = run.count_parameters(M.ViT(config))
    half = device.type == 'cuda'        # autocast computes in bf16

    # the model. Sharded, two blocks are whole at a time, in bf16 already; else autocast keeps bf16 copies of all
    weights = 4 * parameters / shards
    gradients = weights
    copies = 2 * parameters if half else 0
    if shards > 1:
        two_blocks = 2 * (2 if half else 4) * parameters / config.depth
        weights += two_blocks
        gradients += two_blocks
        copies = 0
    memory = {'weights': weights, 'bf16 copies': copies, 'gradients': gradients, 'AdamW': 8 * parameters / shards}

    # a frozen teacher is whole everywhere; autocast makes its bf16 copies a layer at a time.
    # It is done before the student's activations are there: the larger of the two counts
    activations = run.activation_memory(config, device, checkpointed) + passing_memory(config, device)
    if teacher:
        with torch.device('meta'):
            memory['teacher'] = 4 * run.count_parameters(M.ViT(teacher))
        activations = max(activations, passing_memory(teacher, device))
    memory['activations'] = num * activations

    # on a GPU: this batch and the next two, and drawing them beside the training
    if half:
        pixels = batch_size * config.image_size ** 2
        memory['batches'] = 3 * 3 * pixels
        memory['drawing'] = DRAWING * min(pixels, 2 ** 24) if drawn else 0
        memory['reserve'] = RESERVE
    return memory


def passing_memory(config, device):
    """Bytes an image of a ViT that are not kept for the gradients: what it is made of, the block that is at work,
    and predictions and targets on their way through the loss."""
    D = config.width
    N = (config.image_size // config.patch_size) ** 2
    element = 2 if device.type == 'cuda' else 4
    pixels = 3 * config.image_size ** 2 * (1 + 4 + element)             # uint8, normalised, for the convolution
    block = (1 + N) * (8 * D + element * (3 * D + 2 * config.mlp_width))
    outputs = N * config.head * (2 * element + 2 * 4)                   # both sides, and in float32
    return pixels + block + outputs


def images_that_fit(memory, config, device, *options, **more):
    """How many images at once a device with so many bytes has room for; the rest as of memory_of."""
    fixed = sum(memory_of(config, 0, device, *options, **more).values())
    with_one = sum(memory_of(config, 1, device, *options, **more).values())
    return max(0, int((memory - fixed) / (with_one - fixed)))


def free_memory(device):
    """Free bytes of a GPU; of a CPU all that the machine has."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


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
    device, is_here = find_device(cfg)
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
    part = math.ceil(cfg.batch_size / cfg.devices)
    num = cfg.micro_batch or part
    on_world = cfg.data.partition(':')[0] == 'shapes'
    beside = dict(teacher=teacher, batch_size=part, drawn=on_world)
    memory = memory_of(config, num, device, cfg.devices, cfg.checkpoint_activations, **beside)
    print(f'on each of {cfg.devices} devices ({device.type}), {num} images at once:')
    for name, size in memory.items():
        print(f'{name:<20} {size / 1e9:.4g} GB')
    kept = run.activation_memory(config, device)
    print(f'  kept                       {kept / 1e6:.4g} MB an image')
    computed_again = run.activation_memory(config, device, True)
    print(f'  --checkpoint_activations   {computed_again / 1e6:.4g} MB an image')
    total = sum(memory.values())
    if is_here:
        print(f'memory               {total / 1e9:.4g} GB; {free_memory(device) / 1e9:.4g} GB are free here')
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
        print_cards(cfg, config, total, device, beside)


def print_cards(cfg, config, total, device, beside):
    """Which cards have room for this plan, and for how many images at once at most."""
    table = []
    for card in CARDS:
        fits = 'yes' if total <= card * 2 ** 30 else 'no'
        kept = images_that_fit(card * 2 ** 30, config, device, cfg.devices, False, **beside)
        again = images_that_fit(card * 2 ** 30, config, device, cfg.devices, True, **beside)
        table.append([f'{card} GB', fits, f'{kept:,}', f'{again:,}'])
    grid.print_table(['a card of', 'this plan fits', 'images at once at most', '--checkpoint_activations'], table)


if __name__ == '__main__':
    run.main(plan, Config, mim_pretrain.RECIPES)
