"""
What is slow in detection besides the convolutions: python detect_seg.py --bench. Random inputs of the sizes that
published comparisons use; they are functions of nothing, so that another implementation can be given the same.
"""
import time

import numpy as np
import torch

import data
from coco import average_precision, clip_boxes, fill_polygons, runs_to_string
from detect_seg import nms, pool_boxes, soft_nms
from model import print0


def random_boxes(num, side, low, high, stream):
    """Boxes within a square image, their sides log-uniform from low to high: [num, 4]."""
    u = data.uniform(0, stream, torch.arange(num), 4)
    size = low * (high / low) ** u[:, :2]
    corner = u[:, 2:] * (side - size)
    return torch.cat((corner, corner + size), 1)


def random_pyramid(channels=256, side=1024, strides=(4, 8, 16, 32)):
    """Maps of noise, as of a square image, each [1, channels, h, w] and channels last."""
    return [data.uniform(0, f'level {stride}', torch.arange((side // stride) ** 2), channels)
            .view(1, side // stride, side // stride, channels).permute(0, 3, 1, 2) for stride in strides]


def random_rows(boxes, categories, num, side):
    """Octagons in boxes as rows of a COCO json, num of them for each image."""
    corners, rows = np.array([.3, 0, .7, 0, 1, .3, 1, .7, .7, 1, .3, 1, 0, .7, 0, .3]).reshape(8, 2), []
    for n, ((x1, y1, x2, y2), category) in enumerate(zip(boxes.double().tolist(), categories.tolist())):
        outline = (x1, y1) + corners * (x2 - x1, y2 - y1)
        rows.append(dict(id=n + 1, image_id=n // num, category_id=category, bbox=[x1, y1, x2 - x1, y2 - y1], iscrowd=0,
                         area=.82 * (x2 - x1) * (y2 - y1), segmentation=[outline.ravel().tolist()]))
    return rows


def random_truth(num_images=500, num_objects=7, num_results=50, num_categories=80, side=640):
    """A COCO json, and detections of which a third lie near an object of theirs."""
    categories = torch.arange(num_images * num_objects) * 7 % num_categories
    boxes = random_boxes(len(categories), side, 16, 400, 'objects')
    truth = dict(images=[dict(id=i, height=side, width=side) for i in range(num_images)],
                 categories=[dict(id=k) for k in range(num_categories)],
                 annotations=random_rows(boxes, categories, num_objects, side))
    u = data.uniform(0, 'results', torch.arange(num_images * num_results), 7)
    target = torch.arange(len(u)) // num_results * num_objects + data.pick(u[:, 0], num_objects)
    near = boxes[target] + .3 * (u[:, 3:] - .5) * (boxes[target, 2:] - boxes[target, :2]).repeat(1, 2)
    near = torch.where(u[:, 1:2] < 1 / 3, near, random_boxes(len(u), side, 16, 400, 'free'))
    results = random_rows(clip_boxes(near, (side, side)), categories[target], num_results, side)
    for row, score in zip(results, u[:, 2].tolist()):
        runs = fill_polygons(row['segmentation'], (side, side))
        row |= dict(score=score, segmentation=dict(size=[side, side], counts=runs_to_string(runs)))
    return truth, results


def bench():
    """Prints the seconds, best of three on one thread, of what is slow in detection besides the convolutions."""
    torch.set_num_threads(1)        # what is repeated a thousand times is too small to share
    pyramid, boxes = random_pyramid(), random_boxes(8000, 1024, 16, 800, 'boxes')
    scores, (truth, results) = data.uniform(0, 'scores', torch.arange(8000), 1)[:, 0], random_truth()
    pool = lambda out: pool_boxes(pyramid, (4, 8, 16, 32), [boxes[:512]], out)
    for name, work in (('RoIAlign 7 x 7, 512 boxes, 256 channels, 4 levels of 1,024 pixels', lambda: pool(7)),
                       ('RoIAlign 14 x 14', lambda: pool(14)),
                       ('NMS of 8,000 boxes', lambda: nms(boxes, scores, .5)),
                       ('soft-NMS of 1,000 boxes, 80 classes',
                        lambda: soft_nms(boxes[:1000], data.uniform(0, 'soft', torch.arange(80), 1000))),
                       ('COCO boxes, 500 images x 50 detections', lambda: average_precision(truth, results)),
                       ('COCO masks, the same', lambda: average_precision(truth, results, 'segm'))):
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        print0(f'{min(seconds):8.3f} s  {name}')
