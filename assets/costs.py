"""
What --plan and --bench print, without data and teacher.

    python mim_pretrain.py --plan --size g --devices 128   # parameters, FLOPs, memory on each device, days
    python mim_pretrain.py --bench --size s                # a step beside its matrix products, where the time goes

On cuda --bench times the recipe in bf16, the default teacher included, with and without compiled blocks and
checkpointed activations, and finds the largest micro-batch.
"""
import dataclasses
import functools
import math
import time

import torch

import data
import mim_pretrain
import model as M
import run

PLANNED_MFU = .5        # assumed by --plan: half of what one large matrix product reaches. EVA's own runs: .15


def plan(cfg, config, device, teacher=None):
    """Prints what training a ViT costs on --devices like this one: parameters, FLOPs, memory on each, days."""
    batch_size, forward = cfg.micro_batch or math.ceil(cfg.batch_size / cfg.devices), run.flops_per_image(config)
    shards = cfg.devices if cfg.shard == 'full' else 1
    memory = run.training_memory(config, batch_size, device, shards, cfg.checkpoint_activations)
    flops, speed = run.training_flops(config, teacher), run.matmul_speed(device)
    with torch.device('meta'):
        run.print0(f'parameters           {run.count_parameters(M.ViT(**config)):,}')
    run.print0(f'forward              {forward / 1e9:.4g} GFLOP an image')
    if teacher:
        run.print0(f'teacher, forward     {run.flops_per_image(teacher) / 1e9:.4g} GFLOP an image '
                   f'({teacher["width"]} wide, {teacher["depth"]} deep)')
    run.print0(f'training             {flops / 1e9:.4g} GFLOP an image (backward costs two forwards)')
    run.print0(f'on each of {cfg.devices} devices, {batch_size} images at once:')
    for name, size in memory.items():
        run.print0(f'{name:<20} {size / 1e9:.4g} GB')
    for name, checkpointed in (('  kept', False), ('  --checkpoint_activations', True)):
        size = run.activation_bytes(config, 2 if device.type == 'cuda' else 4, checkpointed)
        run.print0(f'{name:<28} {size / 1e6:.4g} MB an image')
    run.print0(f'memory               {sum(memory.values()) / 1e9:.4g} GB; '
               f'{run.available_memory(device) / 1e9:.4g} GB are free here')
    days = cfg.steps * cfg.batch_size * flops / (cfg.devices * speed * PLANNED_MFU) / 86400
    run.print0(f'matrix product       {speed / 1e12:.4g} TFLOP/s measured on this {device.type}')
    run.print0(f'days                 {days:,.4g} for {cfg.steps:,} steps of {cfg.batch_size:,} images on '
               f'{cfg.devices} like it, if {PLANNED_MFU:.0%} of that is reached (assumed; --bench measures it)')


def pretraining(cfg, config, device):
    """mim_pretrain.py's, with the default teacher at our grid: OpenAI's ViT-L/14 for b, l, g, else the built-in one."""
    teacher = dict(M.SIZES['l'], head=768) if cfg.size in ('b', 'l', 'g') else dict(M.SIZES['nano'], head=64)
    teacher['image_size'] = config['image_size'] // config['patch_size'] * teacher['patch_size']
    (plan if cfg.plan else bench)(cfg, {**config, 'head': teacher['head']}, device, teacher)


def bench(cfg, config, device, teacher):
    """config, teacher: what two ViTs are made of."""
    if device.type == 'cuda':
        return bench_gpu(cfg, config, device, teacher)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    beside_products(cfg, config, device)
    run.print0()
    split(cfg, config, device, teacher)
    run.print0(f'\nmost memory held: {run.peak_memory(device) / 1e9:.2f} GB')


def frozen(teacher, cfg, device):
    """A CLIP with this image tower, which never learnt: it takes the same time."""
    text = dict(width=16, depth=1, heads=2, vocab=600, embed=teacher['head'])
    clip = M.CLIP(dict(teacher, mask_token=False), text)
    return run.to_device(M.init_weights(clip).requires_grad_(False), cfg, device)


def make_step(cfg, config, num, device, teacher=None):
    """A function that makes one training step on `num` images of noise."""
    model = run.to_device(M.init_weights(M.ViT(**config)), cfg, device)
    optimizer, autocast = run.make_optimizer(model, cfg), run.autocast(device)
    grid, size = config['image_size'] // config['patch_size'], config['image_size']
    images = torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, device=device)
    mask = mim_pretrain.make_mask('block', torch.arange(num), grid, 105 / 256).to(device)
    hidden, drop = mask.nonzero(as_tuple=True), torch.rand(num, config['depth'], 2, device=device)
    targets = torch.randn(num, grid ** 2, config['head'], device=device)

    def step():
        with torch.no_grad(), autocast:
            wanted = targets if teacher is None else mim_pretrain.teacher_features(teacher, images, grid)
        with autocast:
            predictions = model(model.normalize(images), mask, drop=drop)
        mim_pretrain.mim_loss(predictions, wanted, hidden).backward()
        if run.clip_gradients(model, cfg.grad_clip).isfinite():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def matrix_products(config, num, device):
    """A function that makes the matrix products of a ViT's training step on `num` images and nothing else: three for
    each of the forward pass's, its own and one for the gradient of either side. Each layer has weights of its own."""
    N, D, mlp_width = (config['image_size'] // config['patch_size']) ** 2, config['width'], config['mlp_width']
    rows = num * (1 + N)
    shapes = [(rows, D, 3 * D), (rows, D, D), (rows, D, mlp_width), (rows, mlp_width, D)] * config['depth']
    shapes += [(num * N, 3 * config['patch_size'] ** 2, D), (num * N, D, config['head'])]
    make = functools.cache(lambda *shape: torch.randn(shape, device=device))        # by shape: shared by the layers
    weights = [torch.randn(out, into, device=device) for _, into, out in shapes]
    heads = make(num * config['heads'], 1 + N, D // config['heads'])

    def products():
        for (rows, into, out), weight in zip(shapes, weights):
            x, y = make(rows, into), make(rows, out)
            torch.mm(x, weight.T), torch.mm(y, weight), torch.mm(y.T, x)
        for _ in range(config['depth']):
            scores, _ = torch.bmm(heads, heads.mT), torch.bmm(heads, heads.mT)      # q k; gradients of attention
            for x in (scores, scores, scores.mT, scores.mT):
                torch.bmm(x, heads)                                                 # values; gradients of q, k, v
    return products


def beside_products(cfg, config, device, num=4, rounds=7):
    """Medians over paired rounds, in turn because machines drift; the core's own seconds, because others use it too."""
    config = {**config, 'image_size': 224, 'patch_size': 14, 'head': 768}
    step, products = make_step(cfg, config, num, device), matrix_products(config, num, device)
    step(), products()
    pairs = [(core_seconds(step), core_seconds(products)) for _ in range(rounds)]
    median = lambda x: sorted(x)[len(x) // 2]
    run.print0(f'{cfg.size} at 224 px, patch 14, {num} images, float32, one core: a training step takes '
               f'{median([a for a, _ in pairs]):.3g} s, its matrix products alone '
               f'{median([b / a for a, b in pairs]):.2f} of that')


def core_seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began


class Clock:
    """Adds up the core's seconds between calls under a name."""

    def __init__(self):
        self.sums, self.last = {}, time.process_time()

    def __call__(self, name):
        now = time.process_time()
        self.sums[name], self.last = self.sums.get(name, 0) + now - self.last, now


def split(cfg, config, device, teacher, steps=20):
    """Where the time of the recipe's own step goes; its data are the built-in world's."""
    size, grid = config['image_size'], config['image_size'] // config['patch_size']
    num = min(cfg.micro_batch or cfg.batch_size, max(1, int(5e10 / run.flops_per_image(config))))   # a second or two
    model = run.to_device(M.init_weights(M.ViT(**config)), cfg, device)
    teacher, optimizer, clock = frozen(teacher, cfg, device), run.make_optimizer(model, cfg), Clock()
    batches = data.batches(data.World(), num, size, 0, 2 + steps, 0, device)
    for step in range(2 + steps):
        if step == 2:
            clock = Clock()       # the first two warm up
        images = next(batches)['images']
        clock('data')
        mask = mim_pretrain.make_mask('block', step * num + torch.arange(num), grid, 105 / 256)
        drop = torch.rand(num, config['depth'], 2)
        clock('masks')
        with torch.no_grad():
            targets = mim_pretrain.teacher_features(teacher, images, grid)
        clock('teacher')
        loss = mim_pretrain.mim_loss(model(model.normalize(images), mask, drop=drop), targets, mask)
        loss.backward()
        clock('model')
        run.clip_gradients(model, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock('optimizer')
    whole = sum(clock.sums.values())
    run.print0(f'{cfg.size} at {size} px, patch {config["patch_size"]}, {num} images, one core: '
               f'{num * steps / whole:.4g} images/s, of which')
    for name, part in clock.sums.items():
        run.print0(f'  {name:<12} {part / whole:6.1%}   {part / steps * 1e3:.1f} ms')
    masks = 512 / core_seconds(lambda: mim_pretrain.block_mask(torch.arange(512), 16, 105))
    run.print0(f'{num * steps / clock.sums["masks"]:,.0f} masks/s on this grid, {masks:,.0f} on 16 x 16, 512 at once')


def bench_gpu(cfg, config, device, teacher):
    """A line for each way to train: the largest micro-batch that fits, images/s, share of a matrix product's speed."""
    flops, speed = run.training_flops(config, teacher), run.matmul_speed(device)
    run.print0(f'{cfg.size} at {config["image_size"]} px, patch {config["patch_size"]}, bf16, with a teacher of '
               f'{teacher["width"]} x {teacher["depth"]} on {torch.cuda.get_device_name(device)}; '
               f'8192^3 product: {speed / 1e12:.0f} TFLOP/s')
    run.print0('compile  checkpoint  images at once  images/s   MFU  memory')
    for compile in (False, True):
        for checkpoint in (False, True):
            options = dataclasses.replace(cfg, compile=compile, checkpoint_activations=checkpoint)
            num, per_second, memory = fastest(options, config, device, teacher)
            run.print0(f'{compile!s:<8} {checkpoint!s:<11} {num:>14} {per_second:9.1f} '
                       f'{per_second * flops / speed:6.1%} {memory / 1e9:5.0f} GB')


def fastest(cfg, config, device, teacher):
    """(images at once, images/s, bytes) of the largest power of two, and half of it on top, that fits in memory."""
    best = 0, 0., 0
    for num in [n for power in range(3, 11) for n in (2 ** power, 3 * 2 ** power // 2)]:
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            step = make_step(cfg, config, num, device, frozen(teacher, cfg, device))
            for _ in range(3):
                step()
            taken = sorted(run.seconds(step, device) for _ in range(7))[3]
        except torch.OutOfMemoryError:
            return best
        best = num, num / taken, run.peak_memory(device)
        del step
    return best
