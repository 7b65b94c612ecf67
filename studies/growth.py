"""
What grows, and how its cost does: seconds at three sizes each, and the power of the size that they follow.

    python studies/growth.py            # on one core
    python studies/growth.py --large    # and a ten times larger folder and set of shards

Seconds are one core's own, because others use the machine too, the median of three; opening data ends with the
first batch. MiB are what the largest size takes beyond what the process began with.
"""
import argparse
import functools
import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'studies')]
import data                         # noqa: E402
import detect_seg                   # noqa: E402
import grid                         # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

SIDE = 64                           # pixels of the pictures
PER_SHARD = 1000                    # samples
PER_IMAGE = 10                      # objects
NUM_CLASSES = 80
WIDTH = 192                         # of a block


# ---- what is made: (folder, size) -> what is timed takes --------------------------------------------------------

@functools.lru_cache
def picture():
    """The bytes of a JPEG."""
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG')
    return file.getvalue()


def make_pictures(folder, num):
    """One file under many names; file systems allow some 65,000 of them."""
    folder.mkdir(parents=True)
    (folder / '0.jpg').write_bytes(picture())
    for n in range(1, num):
        os.link(folder / '0.jpg', folder / f'{n}.jpg')


def make_folder(folder, num):
    for k in range(NUM_CLASSES):
        of_class = len(range(k, num, NUM_CLASSES))
        if of_class:
            make_pictures(folder / f'class{k}', of_class)
    return str(folder)


def make_shards(folder, num):
    """Samples of an image, a caption and a class."""
    folder.mkdir()
    for start in range(0, num, PER_SHARD):
        with tarfile.open(folder / f'{start // PER_SHARD:05}.tar', 'w') as archive:
            for n in range(start, min(start + PER_SHARD, num)):
                members = {'jpg': picture(), 'txt': b'a caption', 'cls': b'%d' % (n % NUM_CLASSES)}
                for suffix, held in members.items():
                    info = tarfile.TarInfo(f'{n:09}.{suffix}')
                    info.size = len(held)
                    archive.addfile(info, io.BytesIO(held))
    return str(folder)


def coco(num):
    """A COCO json's dict of so many objects, each a polygon of ten points."""
    rng = np.random.default_rng(0)
    num_images = -(-num // PER_IMAGE)
    angle = np.linspace(0, 6, 10)
    circle = np.stack((np.cos(angle), np.sin(angle)), 1)            # [10, 2]
    annotations = []
    for n in range(num):
        corner = rng.uniform(0, SIDE - 20, 2)
        size = rng.uniform(5, 20, 2)
        points = (corner + size * (1 + circle) / 2).round(2)
        annotations.append(dict(
            id=n + 1, image_id=n % num_images, category_id=int(rng.integers(NUM_CLASSES)), iscrowd=0,
            bbox=[*corner.tolist(), *size.tolist()], area=float(size.prod()),
            segmentation=[points.ravel().tolist()]))
    images = [dict(id=i, file_name=f'{i}.jpg', width=SIDE, height=SIDE) for i in range(num_images)]
    categories = [dict(id=k, name=f'class {k}') for k in range(NUM_CLASSES)]
    return dict(images=images, annotations=annotations, categories=categories)


def make_json(folder, num):
    truth = coco(num)
    make_pictures(folder / 'train', len(truth['images']))
    (folder / 'train.json').write_text(json.dumps(truth))
    return str(folder)


def make_detections(folder, num):
    """One for each object, a little beside it."""
    truth = coco(num)
    rng = np.random.default_rng(1)
    results = []
    for row in truth['annotations']:
        box = row['bbox'] + rng.normal(0, 1, 4)
        results.append(dict(row, bbox=box.clip(1).tolist(), score=float(rng.uniform())))
    return truth, results


def make_tokens(folder, num):
    return torch.randn(1, num, WIDTH)           # [B, N, D]


def make_batch(folder, num):
    return torch.randn(num, 16, WIDTH)          # 4 x 4 patches each


# ---- what is timed ----------------------------------------------------------------------------------------------

def first_batch(dataset):
    next(data.batches(dataset, 4, SIDE, 0, 1, 0, 'cpu'))


def open_folder(path):
    first_batch(data.open_data(path))


def open_shards(path):
    first_batch(data.open_data(path, captions=True, labels=True))


def open_json(path):
    first_batch(data.open_instances(path, 'train'))


def evaluate(detections):
    detect_seg.average_precision(*detections)


def train_block(tokens):
    """Forward and backward."""
    config = M.ViTConfig(width=WIDTH, depth=1, heads=3, mlp_width=4 * WIDTH, patch_size=8, image_size=SIDE)
    block = M.Block(config)
    block(tokens).sum().backward()


@dataclass
class Growth:
    what: str
    first: int                      # the smallest size
    factor: int                     # from each to the next
    make: Callable
    work: Callable
    has_large: bool = False         # --large adds a size


GROWTHS = (
    Growth('images in a folder', 100, 10, make_folder, open_folder, True),
    Growth('samples in shards', 100, 10, make_shards, open_shards, True),
    Growth('annotations in a json', 1000, 10, make_json, open_json),
    Growth('detections in an evaluation', 1000, 10, make_detections, evaluate),
    Growth('tokens of an image, a block', 256, 4, make_tokens, train_block),
    Growth('images in a batch, a block', 4, 4, make_batch, train_block))


# ---- the table --------------------------------------------------------------------------------------------------

def median_seconds(work, made, times):
    seconds = []
    for _ in range(times):
        began = time.process_time()
        work(made)
        seconds.append(time.process_time() - began)
    return float(np.median(seconds))


def peak(work, made):
    """MiB that work(made) takes, in a process of its own: a peak never falls."""
    fork = multiprocessing.get_context('fork')
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=send_peak, args=(work, made, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


def send_peak(work, made, send):
    device = torch.device('cpu')
    before = run.peak_memory(device)
    work(made)
    send.send((run.peak_memory(device) - before) / 2 ** 20)


def row_of(growth, folder, share=1., large=False, times=3):
    """(what, sizes, seconds, MiB of the largest, power) of one line. share: of its sizes."""
    first = max(4, round(growth.first * share))         # fewer images have no validation set
    num_sizes = 4 if large and growth.has_large else 3
    sizes = [first * growth.factor ** n for n in range(num_sizes)]
    seconds = []
    for size in sizes:
        made = growth.make(Path(folder) / f'{growth.make.__name__}-{size}', size)
        seconds.append(median_seconds(growth.work, made, times))
    memory = peak(growth.work, made)
    power = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    return growth.what, sizes, seconds, memory, power


def main(argv=None, share=1., times=3):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = grid.refuse
    parser.add_argument('--large', action='store_true', help='a ten times larger folder and set of shards, too')
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for growth in GROWTHS:
            what, sizes, seconds, memory, power = row_of(growth, folder, share, args.large, times)
            sizes = ' / '.join(f'{size:,}' for size in sizes)
            seconds = ' / '.join(f'{spent:.3g}' for spent in seconds)
            rows.append((what, sizes, seconds, f'{memory:,.0f}', f'{power:.2f}'))
    grid.print_table(('what grows', 'sizes', 'seconds', 'MiB', 'power'), rows)


if __name__ == '__main__':
    main()
