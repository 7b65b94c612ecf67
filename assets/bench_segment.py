"""
What is slow in semantic segmentation: python detect_seg.py --head mask2former --bench. On one thread, with random
weights and numbers that are functions of nothing.
"""
import time

import numpy as np
import torch

import data
import run
import segment
from model import print0


def best_of(work, times=5):
    taken = []
    for _ in range(times):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def costs_of_200_queries():
    """{what: [200, 100]}: uniform, full of ties, and products, of which every row wants the same columns."""
    u = data.uniform(0, 'assign', torch.arange(200), 101).double().numpy()
    return {'uniform': u[:, :100], 'ties, 0 to 8': np.floor(9 * u[:, :100]), 'rank one, the worst': u[:, :1] * u[0, 1:]}


def training_step(size, *flags):
    """A step of a recipe's batch from random weights, and how many images that is."""
    cfg = run.parse_config(segment.Config, segment.RECIPES, ['--size', size, '--device', 'cpu', *flags])
    segment.check(cfg)
    scenes = segment.Scenes(cfg)
    model, num = segment.build(cfg, len(scenes.classes)), cfg.batch_size
    optimizer, position = run.make_optimizer(model, cfg, cfg.layer_decay), torch.arange(num)

    def step():
        batch = scenes.batch(position, cfg.image_size)
        losses = model(model.normalize(batch['images']), batch['labels'],
                       lambda stream, i, num: data.uniform(0, stream, position[i], num))
        (losses / model.head.counts(batch['labels'])).sum().backward()
        run.clip_gradients(model, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, num


def bench():
    """Prints the core's own seconds, the best of a few, and the memory of a large image."""
    torch.set_num_threads(1)
    for name, cost in costs_of_200_queries().items():
        print0(f'{1e3 * best_of(lambda: segment.assign(cost)):8.1f} ms  assignment of 200 x 100, {name}')
    cfg = run.parse_config(segment.Config, segment.RECIPES, ['--size', 'nano', '--device', 'cpu'])
    segment.check(cfg)
    model, images = segment.build(cfg, 26).eval(), torch.zeros(1, 3, 2000, 2000)
    with torch.no_grad():
        taken = best_of(lambda: segment.slide(model, images, (128, 128), (73, 73)), 1)
    print0(f'{taken:8.1f} s   2,000 x 2,000 pixels in windows of 128, nano; most memory held '
           f'{run.peak_memory(torch.device("cpu")) / 1e9:.2f} GB')
    for size in ('nano', 'micro'):
        for flags in (['linear', '--freeze'], ['mask2former'], ['mask2former', '--adapter']):
            step, num = training_step(size, '--head', *flags)
            print0(f'{best_of(step, 3):8.2f} s   training step of {size}, {num} images, {" ".join(flags)}')
