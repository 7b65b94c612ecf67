"""
Stage 3, what is where: boxes with masks, or a class for every pixel.
EVA was judged by both: arXiv:2211.07636, sections 3.3 and 3.4.

    python detect_seg.py --size micro --init eva.pt                     # the built-in world: boxes, masks
    python detect_seg.py --head linear --size micro --init eva.pt       # classes: what frozen patches know
    python detect_seg.py --head mask2former --size micro --init eva.pt  # classes, by queries
    python detect_seg.py --data bccd --init eva.pt                      # train.json, val.json and images
    python detect_seg.py --init out/detect_seg-micro/model.pt --image a.jpg
    torchrun --nproc_per_node=8 detect_seg.py --size g --data coco --init eva.pt

The file goes from the bottom up, head by head, and the loop that they share comes last.
boxes:        ViTDet (arXiv:2203.16527) with Cascade Mask R-CNN; average precision.
linear:       a classifier of patches, the first thing to read; mean IoU.
mask2former:  Mask2Former on ViTDet's pyramid or, with --adapter, on ViT-Adapter, which is EVA's.

Boxes are [x1, y1, x2, y2] in pixels; pixel i covers i to i + 1.
Places are (x, y) from 0 to 1 over an image; cell i of n covers i/n to (i+1)/n.
"""
import colorsys
import functools
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import model as M
import run
from data import IGNORED, clip_boxes, has_area
from model import Refused
from run import option, print0


@dataclass
class Config(run.Run):
    head: str = option('boxes', 'what is trained on the ViT', choices=('boxes', 'linear', 'mask2former'))
    images: str = option('', "boxes: folder of the json's images, if they do not lie beside it")
    vocabulary: str = option('coarse', 'boxes of the built-in world: 16 kinds, or 240 classes as in LVIS',
                             choices=('coarse', 'fine'))
    classes: str = option('', "maps: file with a name for each value of the label maps, '-' where it is none; "
                              "if empty the data's classes.txt, or what its layout tells (ADE20K, COCO-Stuff)")
    adapter: bool = option(False, 'mask2former: ViT-Adapter, instead of the pyramid of the last map')
    stages: int = option(1, 'boxes: heads of the cascade; 1 is Mask R-CNN', low=1, high=5)
    window: int = option(0, 'boxes: patches along the side of an attention window; 0: all blocks are global')
    soft: bool = option(False, "boxes: test as for EVA's published numbers, by soft-NMS and maskness")
    freeze: bool = option(None, 'the ViT stays as it is; if not given: so does that of --init under linear')
    scale_jitter: tuple = option((.1, 2.), 'train on images at so much of the size at which they fit',
                                 low=.01)
    scales: tuple = option((1.,), 'maps: test at these sizes and take the mean', low=.01, high=10)
    flip: bool = option(False, 'maps: test the mirror image too')
    layer_decay: float = option(.9, "each layer of the ViT learns at so much of the next one's rate", high=1)
    warmup_steps: int = option(50, 'steps of linear warm-up')

    # constants of a recipe; those of maps stand in RECIPES
    schedule: str = 'steps'
    drop_at: float = 8 / 9              # share of the steps after which the learning rate is a tenth
    weight_decay: float = .1
    betas: tuple = (.9, .999)
    eps: float = 1e-8
    grad_clip: float = 1.
    channels: int = 256                 # of the pyramid and the heads
    hidden: int = 1024                  # boxes: width of their heads
    proposals: int = 1000               # boxes: regions of an image that the heads look at
    num_boxes: int = 512                # boxes: those of them that the heads learn from
    queries: int = 100                  # mask2former: masks that it proposes
    layers: tuple = (6, 9)              # mask2former: of its encoder and decoder
    points: int = 12544                 # mask2former: of a mask, from which it is learnt


SMALL_BOXES = dict(image_size=128, patch_size=8, batch_size=8, steps=1500, lr=1e-3, channels=48,
                   hidden=192, proposals=200, num_boxes=64, scale_jitter=(.6, 1.4))
LARGE_BOXES = dict(image_size=1024, patch_size=16, batch_size=64, steps=45_000, lr=1e-4, stages=3,
                   window=16)
EVA_BOXES = dict(LARGE_BOXES, image_size=1280, lr=2.5e-5, drop_path=.6, warmup_steps=500)
BOXES = {  # differences from the defaults; g is EVA on COCO, g-lvis EVA on LVIS; s, b, l: ours
    'pico': SMALL_BOXES, 'nano': SMALL_BOXES, 'micro': SMALL_BOXES, 'mini': SMALL_BOXES, 'ti': SMALL_BOXES,
    's': dict(image_size=512, batch_size=16, steps=45_000, lr=1e-4, stages=3, drop_path=.1),
    'b': dict(LARGE_BOXES, drop_path=.1),
    'l': dict(LARGE_BOXES, drop_path=.4),
    'g': EVA_BOXES,
    'g-lvis': dict(EVA_BOXES, lr=2e-4, steps=75_000, drop_at=.9333),
}

MAP = dict(schedule='linear', weight_decay=.05, scale_jitter=(.5, 2.), patch_size=16)
SMALL_MAP = dict(MAP, image_size=128, patch_size=8, batch_size=8, steps=1500, lr=2e-3, channels=64,
                 queries=30, layers=(1, 3), points=512)
EVA_MAP = dict(MAP, image_size=896, channels=1024, queries=200, layers=(6, 8), layer_decay=.95,
               drop_path=.5)
MAPS = {  # g: EVA on ADE20K, from g-stuff, EVA on COCO-Stuff; s, b, l: not tried
    'pico': SMALL_MAP, 'nano': SMALL_MAP, 'micro': SMALL_MAP, 'mini': SMALL_MAP, 'ti': SMALL_MAP,
    's': dict(MAP, image_size=512, batch_size=16, steps=40_000, lr=1e-4, drop_path=.1),
    'b': dict(MAP, image_size=512, batch_size=16, steps=80_000, lr=6e-5, drop_path=.1),
    'l': dict(MAP, image_size=640, batch_size=16, steps=80_000, lr=2e-5, drop_path=.3),
    'g': dict(EVA_MAP, batch_size=64, steps=20_000, warmup_steps=500, lr=2.5e-5),
    'g-stuff': dict(EVA_MAP, batch_size=32, steps=60_000, warmup_steps=1500, lr=1.5e-5),
}
WITH_ADAPTER = {size: dict(MAPS[size], adapter=True) for size in ('g', 'g-stuff')}
RECIPES = {'boxes': BOXES, 'linear': MAPS, 'mask2former': {**MAPS, **WITH_ADAPTER}}

NUM_EVAL = 500              # validation images of the built-in world; of others all
NUM_ASKED = 50              # LVIS: classes that a batch is asked for
TILE = 320                  # pixels along a side of a picture in a run's sheet
LINEAR_RATE = 10.           # times --lr, of a linear head: it starts from nothing, on features that are there
SAID = 'box_ap', 'box_ap50', 'mask_ap', 'mask_ap50', 'miou', 'pixel_accuracy'       # during a run
IMAGENET_MEAN = .485, .456, .406        # the released models'
IMAGENET_STD = .229, .224, .225
LARGEST_GROWTH = math.log(1000 / 16)    # of a box's side in one step: a wild prediction must not overflow
STRIDE = 512 / 896          # of the windows that an image is tested in, as a share of their side
NO_OBJECT = .1              # weight of a query that should find nothing, beside one that should find a mask
CLASS_WEIGHT = 2.           # of Mask2Former's three losses
PIXEL_WEIGHT = 5.
DICE_WEIGHT = 5.


# ---- boxes: coding, matching, suppression -------------------------------------------------------

def box_area(boxes):
    """boxes [..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a, b):
    """Intersection over union of boxes a [n, 4] and b [m, 4]: [n, m], 0 where they share nothing.
    In place, which takes two thirds of the time."""
    width = torch.minimum(a[:, 2, None], b[:, 2]) - torch.maximum(a[:, 0, None], b[:, 0])
    height = torch.minimum(a[:, 3, None], b[:, 3]) - torch.maximum(a[:, 1, None], b[:, 1])
    shared = width.clamp_(min=0).mul_(height.clamp_(min=0))             # [n, m]
    union = (box_area(a)[:, None] + box_area(b)).sub_(shared)
    return shared.div_(union.clamp_(min=1e-30))                         # never 0 / 0


def encode_boxes(boxes, targets, weights):
    """How to get from boxes [n, 4] to targets [n, 4]: arXiv:1311.2524.
    The centre's shift in widths and heights, and the log of the growth, each times its weight [4]."""
    size = boxes[:, 2:] - boxes[:, :2]
    goal = targets[:, 2:] - targets[:, :2]
    shift = (targets[:, :2] + .5 * goal - boxes[:, :2] - .5 * size) / size
    return torch.cat((shift, (goal / size).log()), 1) * boxes.new_tensor(weights)


def decode_boxes(boxes, deltas, weights):
    """The inverse of encode_boxes. boxes [n, 4], deltas [n, 4] -> [n, 4]."""
    size = boxes[:, 2:] - boxes[:, :2]
    shift, growth = (deltas / boxes.new_tensor(weights)).split(2, dim=1)
    centre = boxes[:, :2] + .5 * size + shift * size
    half = .5 * size * growth.clamp(max=LARGEST_GROWTH).exp()
    return torch.cat((centre - half, centre + half), 1)


def make_anchors(grids, strides, ratios=(.5, 1., 2.), sizes=None):
    """The boxes that region proposals start from: [h * w * 3, 4] for each level, in the order y, x, ratio.
    They are centred on the top left corner of every cell. ratios: of height to width.
    grids: each level's (h, w). sizes: each level's, if None 8 strides."""
    levels = []
    for i, (h, w) in enumerate(grids):
        size = sizes[i] if sizes else 8 * strides[i]
        width = torch.tensor([math.sqrt(size ** 2 / ratio) for ratio in ratios])
        height = width * torch.tensor(ratios)
        half = torch.stack((width, height), 1) / 2                              # [3, 2]
        y, x = torch.meshgrid(torch.arange(h) * strides[i], torch.arange(w) * strides[i], indexing='ij')
        corner = torch.stack((x, y), 2).view(-1, 1, 2)                          # [h * w, 1, 2]
        levels.append(torch.cat((corner - half, corner + half), 2).flatten(0, 1))
    return levels


def match(iou, thresholds, labels, low_quality=False):
    """Which target each box belongs to. iou [targets, boxes] -> index and label [boxes].
    index: its best target, the first of equals; label: labels[i] if thresholds[i - 1] <= IoU < thresholds[i].
    low_quality: every target's best boxes get label 1, whatever their IoU, and keep their index."""
    num_targets, num_boxes = iou.shape
    if num_targets == 0:
        index = torch.zeros(num_boxes, dtype=torch.long, device=iou.device)
        return index, torch.full_like(index, labels[0])

    best, index = iou.max(0)
    level = torch.bucketize(best, torch.tensor(thresholds, device=iou.device), right=True)
    label = torch.tensor(labels, device=iou.device)[level]
    if low_quality:
        is_best = iou == iou.max(1, keepdim=True).values
        label[is_best.any(0)] = 1
    return index, label


def sample(labels, num, positive_share, u):
    """Indices of at most num boxes: those of label 1, at most num * positive_share, and those of label 0.
    labels [n]; u [n]: uniform numbers, of which the lowest win."""
    order = u.argsort(stable=True)
    positive = order[labels[order] == 1][:int(num * positive_share)]
    negative = order[labels[order] == 0][:num - len(positive)]
    return positive, negative


def nms(boxes, scores, threshold, classes=None, block=128):
    """Greedy non-maximum suppression. boxes [n, 4], scores [n], classes [n] -> indices, best first.
    A box stays if no better one that stays, of the same class, overlaps it by an IoU above threshold.
    Of equal scores the lower index goes first."""
    # in float32, 3 / 10 is above the double .3, and so is float32's own .3: compare with one below
    limit = np.float32(threshold)
    if float(limit) > threshold:
        limit = np.nextafter(limit, np.float32(-1))

    def suppresses(i, j):
        over = pairwise_iou(boxes[i], boxes[j]) > float(limit)
        if classes is not None:
            over &= classes[i, None] == classes[j]
        return over

    left = scores.argsort(descending=True, stable=True)
    kept = [left[:0]]
    while len(left):
        # within a block one after another, on the CPU: a GPU would wait at every step
        first = left[:block]
        over = suppresses(first, first).triu(1).cpu().numpy()           # [i, j]: j goes, if i stays
        keep = np.ones(len(first), dtype=bool)
        for i in range(len(first)):
            if keep[i]:
                keep &= ~over[i]

        # what stays of it suppresses all later boxes at once
        first = first[torch.from_numpy(keep).to(first.device)]
        left = left[block:]
        left = left[~suppresses(first, left).any(0)]
        kept.append(first)
    return torch.cat(kept)


def soft_nms(boxes, scores, threshold=.6, min_score=1e-3, method='linear', sigma=.5):
    """Soft-NMS (arXiv:1704.04503), all classes at once. boxes [n, 4], scores [K, n] -> new scores [K, n].
    The best box left is taken and lowers the scores of those it overlaps, until none left has min_score.
    linear and naive: times 1 - IoU, or 0, from the threshold on. gaussian: times exp(-IoU^2 / sigma).
    What is not taken gets 0. The very first is always taken."""
    iou = pairwise_iou(boxes, boxes)
    if method == 'gaussian':
        factor = (-iou ** 2 / sigma).exp()
    elif method == 'linear':
        factor = torch.where(iou.double() >= threshold, 1 - iou, 1.)
    else:
        factor = torch.where(iou.double() >= threshold, 0., 1.)

    left = scores.clone()
    taken = torch.zeros_like(scores)
    for turn in range(scores.shape[1]):
        best, index = left.max(1)                                   # [K]
        take = best >= min_score
        if turn == 0:
            take |= (best == best.max()) & (best > 0)
        row = take.nonzero()[:, 0]
        if len(row) == 0:
            break
        index = index[row]
        taken[row, index] = best[row]
        left[row] *= factor[index]
        left[row, index] = -torch.inf
    return taken


def choose_detections(boxes, scores, image_size, threshold=.05, iou=.5, most=100, soft=None):
    """What is reported of one image: boxes [n, 4], scores [n], classes [n], rows [n], best first.
    boxes [R, 4] for all classes; scores [R, K].
    What scores above the threshold goes through NMS class by class, and the best `most` stay.
    soft: options of soft_nms, which takes its place; all that it takes stay."""
    finite = boxes.isfinite().all(1) & scores.isfinite().all(1)
    boxes = clip_boxes(boxes[finite], image_size)
    scores = scores[finite]

    if soft is None:
        rows, classes = (scores > threshold).nonzero(as_tuple=True)
        scores = scores[rows, classes]
        order = nms(boxes[rows], scores, iou, classes)[:most]
        scores = scores[order]
    else:
        scores = torch.where(scores > threshold, scores, -torch.inf)
        taken = soft_nms(boxes, scores.T, **soft)                   # [K, R]
        classes, rows = (taken > 0).nonzero(as_tuple=True)
        scores, order = taken[classes, rows].sort(descending=True, stable=True)
    rows = rows[order]
    return boxes[rows], scores, classes[order], rows


# ---- boxes: region proposals --------------------------------------------------------------------

def choose_proposals(logits, deltas, anchors, image_size, before, after, threshold=.7):
    """One image's region proposals: boxes [m, 4] and logits [m], best first.
    The `before` best anchors of each level are moved and clipped; NMS within levels leaves `after` of them.
    By level: logits [n], deltas [n, 4], anchors [n, 4]."""
    boxes, scores, levels = [], [], []
    for level, anchor in enumerate(anchors):
        score, index = logits[level].topk(min(before, len(anchor)))
        boxes.append(decode_boxes(anchor[index], deltas[level][index], (1., 1., 1., 1.)))
        scores.append(score)
        levels.append(torch.full_like(index, level))
    boxes = clip_boxes(torch.cat(boxes), image_size)
    scores = torch.cat(scores)
    levels = torch.cat(levels)

    index = has_area(boxes).nonzero()[:, 0]
    index = index[nms(boxes[index], scores[index], threshold, levels[index])[:after]]
    return boxes[index], scores[index]


def rpn_targets(anchors, targets, u, num=256, positive_share=.5):
    """What the region proposals of one image learn from. anchors [n, 4], targets [m, 4], u [n] uniform.
    -> labels [n], 1 an object, 0 none, -1 not asked; and the box that each anchor should become [n, 4]."""
    iou = pairwise_iou(targets, anchors)
    index, label = match(iou, (.3, .7), (0, -1, 1), low_quality=True)
    positive, negative = sample(label, num, positive_share, u)
    asked = torch.full_like(label, -1)
    asked[positive] = 1
    asked[negative] = 0
    goals = targets[index] if len(targets) else torch.zeros_like(anchors)
    return asked, goals


def rpn_losses(logits, deltas, anchors, labels, goals):
    """Two sums: cross-entropy of the anchors asked, is there an object? L1 of the positive ones' moves.
    logits and labels [B, n]; deltas and goals [B, n, 4]; anchors [n, 4]."""
    # is there an object?
    asked = labels >= 0
    objectness = F.binary_cross_entropy_with_logits(
        logits[asked], labels[asked].to(logits), reduction='sum')

    # how should the anchor move?
    positive = labels == 1
    start = anchors.expand_as(goals)[positive]
    wanted = encode_boxes(start, goals[positive], (1., 1., 1., 1.))
    move = F.l1_loss(deltas[positive], wanted, reduction='sum')
    return objectness, move


# ---- boxes: regions and their masks -------------------------------------------------------------

def bin_weights(start, end, out, size, ratio):
    """RoIAlign along one axis, whose cells have their centres at 0 to size - 1.
    Boxes from start to end [R] fall into `out` bins. A bin's value is the mean over its points,
    each interpolated between two cells. ratio: points in a bin; 0: one per cell begun.
    -> the first cell needed [R], the last plus 1 [R], and the cells' weights [R, out, most cells]."""
    step = (end - start) / out                                              # [R], a bin's side
    if ratio:
        num = torch.full_like(step, ratio)
    else:
        num = step.ceil().clamp(min=0)
    share = num.clamp(min=1)

    # the points of every bin
    most = max(1, int(num.max())) if len(num) else 1
    points = torch.arange(most, device=start.device)
    bins = start[:, None] + torch.arange(out, device=start.device) * step[:, None]      # [R, out]
    offsets = (points + .5) * step[:, None] / share[:, None]                # [R, points]
    at = bins[:, :, None] + offsets[:, None]                                # [R, out, points]

    # beyond the map by more than a cell a point counts as 0, up to there as the border's cell
    used = (points < num[:, None])[:, None] & (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)

    # the cells that these points lie between
    begin = torch.where(used, at, size - 1.).flatten(1).amin(1).floor()
    stop = torch.where(used, at, 0.).flatten(1).amax(1).floor() + 2
    stop = torch.maximum(stop.clamp(max=size), begin + 1)
    most = int((stop - begin).max()) if len(num) else 1
    cells = begin[:, None] + torch.arange(most, device=start.device)        # [R, cells]

    # a point gives each cell 1 minus their distance
    distance = (at[..., None] - cells[:, None, None]).abs()                 # [R, out, points, cells]
    weights = (1 - distance).clamp_(min=0).mul_(used[..., None]).sum(2)     # [R, out, cells]
    return begin.long(), stop.long(), weights / share[:, None, None]


class PoolBoxes(torch.autograd.Function):
    """weights of y @ window of the map @ weights of x, for each box [R, C, out, out].
    Bilinear interpolation is separable, and so is its mean over a bin. Two small products a box
    take half the time of visiting every point (a third on channels-last maps).
    features [B, C, H, W]; image [R]; y and x as of bin_weights."""

    @staticmethod
    def forward(ctx, features, image, y, x):
        # the part of the map that each box needs
        top, bottom, rows = y                                   # [R], [R], [R, out, cells]
        left, right, columns = x
        tall = map(slice, top.tolist(), bottom.tolist())
        wide = map(slice, left.tolist(), right.tolist())
        ctx.windows = list(zip(image.tolist(), tall, wide))
        ctx.weights = rows, columns
        ctx.shape = features.shape

        # channels last, as matrix products want them
        cells = features.permute(0, 2, 3, 1).contiguous()       # [B, H, W, C]
        R, out, _ = rows.shape
        pooled = cells.new_empty(R, out, out, cells.shape[3])

        # a box has the weights of its own h and w cells, then zeros
        for n, (i, tall, wide) in enumerate(ctx.windows):
            window = cells[i, tall, wide]                       # [h, w, C]
            h, w, _ = window.shape
            down = rows[n, :, :h]
            across = columns[n, :, :w]
            window = across @ window                            # [h, out, C]
            result = pooled[n].flatten(1)                       # [out, out * C]
            torch.mm(down, window.flatten(1), out=result)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        rows, columns = ctx.weights
        B, C, H, W = ctx.shape
        gradient = gradient.permute(0, 2, 3, 1).contiguous()    # [R, out, out, C]
        cells = gradient.new_zeros(B, H, W, C)

        # the transposed products, added up where boxes overlap
        for n, (i, tall, wide) in enumerate(ctx.windows):
            h = tall.stop - tall.start
            w = wide.stop - wide.start
            down = rows[n, :, :h]
            across = columns[n, :, :w]
            window = down.T @ gradient[n].flatten(1)            # [h, out * C]
            window = window.view(h, -1, C)                      # [h, out, C]
            cells[i, tall, wide] += across.T @ window
        return cells.permute(0, 3, 1, 2), None, None, None


def roi_align(features, boxes, image, out, scale=1., ratio=0, aligned=True):
    """RoIAlign (arXiv:1703.06870), the map under each box in out x out bins: [R, C, out, out].
    features [B, C, H, W]; boxes [R, 4] in pixels of `scale` cells; image [R]: which of the batch.
    ratio: points in a bin along an axis; 0 adapts it to the box.
    aligned: cell i covers i to i + 1, as pixels do. Without it, the way before detectron2,
    its value stands at i, and a box is at least one cell wide."""
    boxes = boxes.detach().float() * scale
    if aligned:
        boxes = boxes - .5
    x1, y1, x2, y2 = boxes.unbind(1)
    if not aligned:
        x2 = torch.maximum(x2, x1 + 1)
        y2 = torch.maximum(y2, y1 + 1)

    # how much each cell counts in each bin
    H, W = features.shape[2:]
    y = bin_weights(y1, y2, out, H, ratio)
    x = bin_weights(x1, x2, out, W, ratio)

    # bfloat16 would misplace what is interpolated
    with torch.autocast(features.device.type, enabled=False):
        return PoolBoxes.apply(features.float(), image, y, x)


def box_levels(boxes, strides):
    """Which level of the pyramid each of boxes [n, 4] is pooled from: [n]. arXiv:1612.03144.
    With a side of 14 strides of the third level (224 pixels) it is that one; a doubling is one level on."""
    side = box_area(boxes).sqrt()
    # counted from 2 as in the paper: near 4 a side that is a last digit short of a border rounds up to it
    level = torch.floor(4 + torch.log2(side / (14 * strides[2]) + 1e-8))
    return (level - 2).clamp(0, len(strides) - 1).long()


def pool_boxes(pyramid, strides, boxes, out):
    """Features of every box, each from its own level: [sum of n, C, out, out].
    pyramid: maps [B, C, h, w], finest first; boxes: a tensor [n, 4] for each image."""
    nums = torch.tensor([len(part) for part in boxes])
    image = torch.arange(len(boxes)).repeat_interleave(nums).to(boxes[0].device)
    boxes = torch.cat(boxes)
    level = box_levels(boxes, strides)

    order, pooled = [], []
    for i, features in enumerate(pyramid):
        here = (level == i).nonzero()[:, 0]
        order.append(here)
        pooled.append(roi_align(features, boxes[here], image[here], out, 1 / strides[i]))
    return torch.cat(pooled)[torch.cat(order).argsort()]


def pixels_reached(low, high, cells, num):
    """Which of `num` pixels a row of cells from low to high reaches, with half a cell more on both sides.
    -> the first, the last plus 1, and the places of their centres between low and high, -1 to 1."""
    reach = .5 / cells * (high - low)
    begin = max(0, math.floor(low - reach))
    stop = max(begin, min(num, math.ceil(high + reach)))
    centres = torch.arange(begin, stop) + .5
    return begin, stop, (centres - low) / (high - low) * 2 - 1


def paste_mask(mask, box, size):
    """A probability map [m, m] in its box [4] as part of an image of (height, width): [height, width].
    A pixel takes the value at its centre.
    The map fades to 0 from half a cell inside its border to half a cell outside."""
    height, width = size
    x1, y1, x2, y2 = box.tolist()
    left, right, x = pixels_reached(x1, x2, mask.shape[1], width)
    top, bottom, y = pixels_reached(y1, y2, mask.shape[0], height)
    y, x = torch.meshgrid(y, x, indexing='ij')
    places = torch.stack((x, y), 2).to(mask.device)                         # [h, w, 2]

    canvas = mask.new_zeros(height, width)
    part = F.grid_sample(mask[None, None], places[None], align_corners=False)
    canvas[top:bottom, left:right] = part[0, 0]
    return canvas


def mask_targets(masks, boxes, size):
    """What the mask head should say: each object within its box, bool [n, size, size].
    masks: an object's polygons [[x, y, ...], ...], or bool [H, W]; boxes [n, 4], on the CPU."""
    targets = [torch.zeros(0, size, size, dtype=torch.bool)]
    for mask, box in zip(masks, boxes):
        if isinstance(mask, list):
            corner = box[:2].numpy()
            side = (box[2:] - box[:2]).clamp(min=.1).numpy()
            parts = [(np.reshape(part, (-1, 2)) - corner) * (size / side) for part in mask]
            runs = data.fill_polygons(parts, (size, size))
            cells = torch.from_numpy(data.decode_mask(runs, (size, size)))
        else:
            mask = torch.as_tensor(mask, dtype=torch.float32).cpu()
            first = torch.zeros(1, dtype=torch.long)
            cells = roi_align(mask[None, None], box[None], first, size)[0, 0] >= .5
        targets.append(cells[None])
    return torch.cat(targets)


# ---- boxes: the detector ------------------------------------------------------------------------

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map [B, C, H, W]; it comes out channels last."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormConv(nn.Conv2d):
    """A convolution without bias, then ChannelNorm. [B, inputs, H, W] -> [B, outputs, H, W]."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(outputs, 1e-6)

    def forward(self, x):
        return self.norm(super().forward(x))


def enlarge(inputs, outputs):
    """To a map of twice the side."""
    return nn.ConvTranspose2d(inputs, outputs, 2, 2)


def two_convs(inputs, outputs):
    return NormConv(inputs, outputs, 1), NormConv(outputs, outputs, 3)


class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: maps at 4, 2, 1, 1/2 and 1/4 of the scale of the ViT's last map,
    made of that map alone. [B, D, h, w] -> a list of five [B, channels, ...], the finest first."""

    def __init__(self, width, channels):
        super().__init__()
        half = width // 2
        self.levels = nn.ModuleList([
            nn.Sequential(enlarge(width, half), ChannelNorm(half, 1e-6), nn.GELU(),
                          enlarge(half, half // 2), *two_convs(half // 2, channels)),
            nn.Sequential(enlarge(width, half), *two_convs(half, channels)),
            nn.Sequential(*two_convs(width, channels)),
            nn.Sequential(nn.MaxPool2d(2), *two_convs(width, channels))])

    def forward(self, x):
        levels = [level(x) for level in self.levels]
        return levels + [levels[-1][:, :, ::2, ::2]]


class Proposer(nn.Module):
    """Region proposals (arXiv:1506.01497): is there an object at each anchor, and how should it move?"""

    def __init__(self, channels, num_ratios=3):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.objectness = nn.Conv2d(channels, num_ratios, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_ratios, 1)

    def forward(self, pyramid):
        """-> logits [B, n] and deltas [B, n, 4] of each level, in the order of make_anchors."""
        logits, deltas = [], []
        for x in pyramid:
            for conv in self.convs:
                x = conv(x).relu()
            objectness = self.objectness(x).permute(0, 2, 3, 1)             # [B, h, w, 3]
            moves = self.deltas(x).permute(0, 2, 3, 1)                      # [B, h, w, 3 * 4]
            logits.append(objectness.flatten(1).float())
            deltas.append(moves.reshape(len(x), -1, 4).float())
        return logits, deltas


class BoxHead(nn.Module):
    """One head of the cascade: pooled features [n, C, 7, 7] -> logits [n, K + 1] and deltas [n, 4].
    The last logit is the background's; the deltas are for whatever class it is."""

    def __init__(self, channels, mlp_width, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(NormConv(channels, channels, 3) for _ in range(4))
        self.fc = nn.Linear(channels * 49, mlp_width)
        self.classes = nn.Linear(mlp_width, num_classes + 1)
        self.deltas = nn.Linear(mlp_width, 4)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        x = self.fc(x.flatten(1)).relu()
        return self.classes(x).float(), self.deltas(x).float()


class MaskHead(nn.Module):
    """Pooled features [n, C, 14, 14] -> a mask's logits for each class [n, K, 28, 28]."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(NormConv(channels, channels, 3) for _ in range(4))
        self.up = enlarge(channels, channels)
        self.classes = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return self.classes(self.up(x).relu()).float()


def label_boxes(boxes, target, iou, num_classes):
    """What each of boxes [n, 4] shows, by an IoU of at least `iou`.
    -> the object's class [n], num_classes where there is none; its box [n, 4]; its index [n].
    target: dict(boxes [m, 4], labels [m])."""
    index, label = match(pairwise_iou(target['boxes'], boxes), (iou,), (0, 1))
    if len(target['boxes']) == 0:
        return torch.full_like(index, num_classes), torch.zeros_like(boxes), index
    classes = torch.where(label == 1, target['labels'][index], num_classes)
    return classes, target['boxes'][index], index


def federated_classes(labels, weights, num, u):
    """LVIS: which classes a batch is asked for, bool [K]. Those that are there and, up to `num` in all,
    others drawn without replacement by their weights (frequency^.5 in EVA); the background counts as one.
    labels [n], weights [K], u [K] uniform numbers."""
    there = torch.zeros(len(weights) + 1, dtype=torch.bool, device=weights.device)
    there[labels] = True

    # the classes with the largest u^(1/w) are such a draw: compare log(u) / w
    key = u.double().log() / weights
    key = torch.where(there[:-1] | (weights <= 0), -torch.inf, key)
    num_possible = int((key > -torch.inf).sum())
    num_more = max(0, min(num - int(there.sum()), num_possible))
    there[key.topk(num_more).indices] = True
    return there[:-1]


def class_loss(logits, labels, sigmoid=False, asked=None):
    """Sum over boxes of the cross-entropy. logits [n, K + 1], labels [n]; K is the background.
    sigmoid: a yes-or-no question for each class, or of the classes `asked` only (bool [K], LVIS)."""
    if not sigmoid:
        return F.cross_entropy(logits, labels, reduction='sum')

    # the background is no class: no to all others
    goals = F.one_hot(labels, logits.shape[1]).to(logits)
    losses = F.binary_cross_entropy_with_logits(
        logits[:, :-1], goals[:, :-1], reduction='none')    # [n, K]
    if asked is not None:
        losses = losses * asked
    return losses.sum()


def box_loss(boxes, deltas, labels, goals, weights):
    """Sum of L1 over the encoded deltas of the boxes that show an object: labels [n] >= 0.
    boxes, deltas and goals [n, 4]; weights [4] as of encode_boxes."""
    # the background may lie anywhere
    positive = labels >= 0
    wanted = encode_boxes(boxes[positive], goals[positive], weights)
    return F.l1_loss(deltas[positive], wanted, reduction='sum')


def class_mask_loss(logits, labels, goals):
    """Sum over pixels of the cross-entropy of each box's mask, in the channel of its class.
    logits [n, K, m, m], labels [n], goals bool [n, m, m]."""
    # what other classes' channels say does not count
    rows = torch.arange(len(labels), device=labels.device)
    logits = logits[rows, labels]           # [n, m, m]
    goals = goals.to(logits)
    return F.binary_cross_entropy_with_logits(
        logits, goals, reduction='sum')


@dataclass
class DetectorConfig:
    vit: M.ViTConfig                    # the backbone, with pool='map'; a dict becomes one
    num_classes: int
    channels: int = 256                 # of the pyramid and the heads
    hidden: int = 1024                  # width of the box heads
    stages: int = 3                     # of the cascade
    sigmoid: bool = False               # classes are independent, as for LVIS
    anchor_sizes: tuple = None          # of the five levels; if None 8 of their strides
    num_anchors: int = 256              # of an image, from which the proposals learn
    before: tuple = (2000, 1000)        # proposals before NMS, in training and in testing
    after: tuple = (1000, 1000)         # and after it
    num_boxes: int = 512                # of an image, from which the box heads learn
    positive_share: float = .25         # at most so much of them shows an object

    def __post_init__(self):
        if isinstance(self.vit, dict):
            self.vit = M.ViTConfig(**self.vit)


class Detector(nn.Module):
    """ViTDet with Cascade Mask R-CNN (arXiv:1712.00726); with one box head Mask R-CNN (arXiv:1703.06870)."""
    Config = DetectorConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vit = M.ViT(config.vit)
        patch = config.vit.patch_size
        if patch % 4:
            raise Refused(f'patch_size {patch} is not a multiple of 4, as the pyramid needs')
        self.strides = [patch // 4, patch // 2, patch, 2 * patch, 4 * patch]

        K = config.num_classes
        C = config.channels
        self.pyramid = Pyramid(config.vit.width, C)
        self.proposer = Proposer(C)
        self.box_heads = nn.ModuleList(BoxHead(C, config.hidden, K) for _ in range(config.stages))
        self.mask_head = MaskHead(C, K)
        # LVIS: how likely a batch is asked for each class [K]; only training needs it
        self.register_buffer('class_weights', None, persistent=False)

    def normalize(self, images):
        """uint8 [B, 3, H, W] -> float [B, 3, H, W]."""
        return self.vit.normalize(images)

    def forward(self, batch, draw=None, drop=None, choose={}):
        """batch: dict(images [B, 3, H, W] normalised and padded to squares,
        sizes [(height, width)] of what is no padding,
        targets [dict(boxes [n, 4], labels [n], masks as of mask_targets)]).
        With draw, draw(stream, num) -> uniform numbers [B, num]: {loss: (sum, what to divide it by)}.
        Without: what `detect` finds. drop: the ViT's; choose: options of choose_detections."""
        config = self.config
        sizes = batch['sizes']
        device = batch['images'].device

        # what is at each place, and which anchors show an object
        pyramid = self.pyramid(self.vit(batch['images'], drop=drop))    # five [B, C, h, w]
        logits, deltas = self.proposer(pyramid)                         # [B, n], [B, n, 4] each
        grids = [x.shape[2:] for x in pyramid]
        anchors = make_anchors(grids, self.strides, sizes=config.anchor_sizes)
        anchors = [level.to(device) for level in anchors]               # [n, 4] each

        # region proposals: a tensor [n, 4] for each image
        which = 0 if draw else 1
        boxes = []
        with torch.no_grad():
            for i, size in enumerate(sizes):
                found, _ = choose_proposals([x[i] for x in logits], [x[i] for x in deltas],
                                            anchors, size, config.before[which], config.after[which])
                boxes.append(found)
        pyramid = pyramid[:4]
        if draw is None:
            return self.detect(pyramid, boxes, sizes, choose)

        # what the proposals and what the heads learn
        targets = []
        for target in batch['targets']:             # masks stay where they are
            there = dict(boxes=target['boxes'].to(device), labels=target['labels'].to(device))
            targets.append(dict(target, **there))
        losses = self.proposal_losses(
            torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), targets, draw)
        boxes = self.sample_boxes(boxes, targets, draw)
        class_draw = batch.get('class_draw')
        losses.update(self.region_losses(pyramid, boxes, sizes, targets, class_draw))
        return losses

    def proposal_losses(self, logits, deltas, anchors, targets, draw):
        """logits [B, n], deltas [B, n, 4], anchors [n, 4] -> the two losses of the region proposals."""
        num = self.config.num_anchors
        u = draw('anchors', len(anchors))                               # [B, n]
        labels, goals = [], []
        for i, target in enumerate(targets):
            label, goal = rpn_targets(anchors, target['boxes'], u[i], num)
            labels.append(label)
            goals.append(goal)

        objectness, move = rpn_losses(
            logits, deltas, anchors, torch.stack(labels), torch.stack(goals))
        count = num * len(targets)
        return {'proposal_objectness': (objectness, count), 'proposal_boxes': (move, count)}

    def sample_boxes(self, boxes, targets, draw):
        """The boxes from which the heads learn: of each image's proposals [n, 4] and its
        objects themselves at most num_boxes, of which at most positive_share show an object."""
        config = self.config
        both = [torch.cat((boxes[i], target['boxes'])) for i, target in enumerate(targets)]
        u = draw('boxes', max(len(part) for part in both))
        sampled = []
        for i, part in enumerate(both):
            classes, _, _ = label_boxes(part, targets[i], .5, config.num_classes)
            label = (classes < config.num_classes).long()
            rows = sample(label, config.num_boxes, config.positive_share, u[i, :len(part)])
            sampled.append(part[torch.cat(rows)])
        return sampled

    def cascade_head(self, number, pyramid, boxes):
        """One box head on all images' boxes: logits [n, K + 1], deltas [n, 4], the deltas' weights [4]."""
        pooled = pool_boxes(pyramid, self.strides, boxes, 7)
        if pooled.requires_grad:            # every head pulls at the same pyramid: their average does
            pooled.register_hook(lambda gradient: gradient / len(self.box_heads))
        logits, deltas = self.box_heads[number](pooled)
        scale = 1 + number                  # each head moves boxes less far than the one before
        return logits, deltas, (10. * scale, 10. * scale, 5. * scale, 5. * scale)

    def refine(self, boxes, deltas, weights, sizes):
        """Each image's boxes [n, 4], moved by all images' deltas [sum of n, 4] and clipped."""
        nums = [len(part) for part in boxes]
        moved = decode_boxes(torch.cat(boxes), deltas.detach(), weights).split(nums)
        return [clip_boxes(part, size) for part, size in zip(moved, sizes)]

    def region_losses(self, pyramid, boxes, sizes, targets, class_draw):
        """The losses of all heads. The first box head sees `boxes` [n, 4] of each image, the next
        ones what the one before made of them; they ask for an IoU of .5, .6, .7.
        class_draw [K]: uniform numbers for class_weights."""
        K = self.config.num_classes
        losses = {}
        for number in range(len(self.box_heads)):
            # which object each box shows
            labelled = []
            for part, target in zip(boxes, targets):
                labelled.append(label_boxes(part, target, .5 + .1 * number, K))
            labels = torch.cat([classes for classes, _, _ in labelled])
            goals = torch.cat([goal for _, goal, _ in labelled])
            if number == 0:
                losses['masks'] = self.mask_loss(pyramid, boxes, labelled, targets)

            # the head's classes
            logits, deltas, weights = self.cascade_head(number, pyramid, boxes)
            asked = None
            if self.class_weights is not None:
                asked = federated_classes(labels, self.class_weights, NUM_ASKED, class_draw)
            loss = class_loss(logits, labels, self.config.sigmoid, asked)
            losses[f'classes_{number}'] = loss, len(labels)

            # and its boxes, which are the next one's
            foreground = torch.where(labels < K, labels, -1)
            loss = box_loss(torch.cat(boxes), deltas, foreground, goals, weights)
            losses[f'boxes_{number}'] = loss, len(labels)
            boxes = self.refine(boxes, deltas, weights, sizes)
            boxes = [part[has_area(part)] for part in boxes]
        return losses

    def mask_loss(self, pyramid, boxes, labelled, targets):
        """Cross-entropy of the masks of the boxes that show an object, in the channel of its class.
        boxes: [n, 4] of each image; labelled: what label_boxes says of them."""
        shown, labels, goals = [], [], []
        for part, (classes, _, index), target in zip(boxes, labelled, targets):
            rows = (classes < self.config.num_classes).nonzero()[:, 0]
            masks = [target['masks'][i] for i in index[rows].tolist()]
            shown.append(part[rows])
            labels.append(classes[rows])
            goals.append(mask_targets(masks, part[rows].cpu(), 28))
        labels = torch.cat(labels)
        goals = torch.cat(goals).to(labels.device)

        # every weight needs a gradient in every process: without any, one box that counts zero times
        if len(labels) == 0:
            pooled = pool_boxes(pyramid, self.strides, [boxes[0][:1]], 14)
            return 0 * self.mask_head(pooled).sum(), 0
        logits = self.mask_head(pool_boxes(pyramid, self.strides, shown, 14))
        return class_mask_loss(logits, labels, goals), goals.numel()

    def detect(self, pyramid, boxes, sizes, choose):
        """What is found in each image, best first: dict(boxes [n, 4], scores [n], classes [n],
        masks [n, 28, 28], probabilities). boxes: each image's proposals [n, 4].
        Scores are the heads' mean, boxes the last one's."""
        nums = [len(part) for part in boxes]
        scores = 0.
        for number in range(len(self.box_heads)):
            logits, deltas, weights = self.cascade_head(number, pyramid, boxes)
            share = logits.sigmoid() if self.config.sigmoid else logits.softmax(1)
            scores = scores + share / len(self.box_heads)               # [sum of nums, K + 1]
            boxes = self.refine(boxes, deltas, weights, sizes)

        # what is reported, without the background
        found = []
        for part, score, size in zip(boxes, scores[:, :-1].split(nums), sizes):
            found.append(choose_detections(part, score, size, **choose))

        # the masks of their classes
        boxes = [part[0] for part in found]
        classes = torch.cat([part[2] for part in found])
        masks = self.mask_head(pool_boxes(pyramid, self.strides, boxes, 14))
        rows = torch.arange(len(classes), device=classes.device)
        masks = masks[rows, classes].sigmoid().split([len(part) for part in boxes])
        return [dict(boxes=box, scores=score, classes=label, masks=mask)
                for (box, score, label, _), mask in zip(found, masks)]

    @staticmethod
    def from_released(state):
        """A Detector in eval mode of a released one's tensors."""
        federated = any('fed_loss' in name for name in state)       # LVIS's
        return read_released(Detector, state, DETECTOR, detector_config, sigmoid=federated)


def read_released(Class, state, rules, config_of, **options):
    """A model in eval mode of a released one's tensors.
    config_of(state): what the tensors, under our names, show, as a dict; options: what they do not."""
    state, _, _ = M.translate(state, rules)
    try:
        config = config_of(state)
    except KeyError as error:
        name = error.args[0]
        name = M.original_name(name, rules) or M.original_name('vit.' + name, rules) or name
        raise Refused(f'weights of a {Class.__name__} miss {name}') from None
    except (IndexError, ValueError, TypeError, ArithmeticError):
        raise Refused(f'weights of a {Class.__name__} lack a dimension') from None
    vit = {**config['vit'], **options.get('vit', {})}
    model = M.on_meta(Class, {**config, **options, 'vit': vit})
    M.fill(model, state, rules)
    return model.eval()


@torch.no_grad()
def init_detector(model, seed=0):
    """First values of all but the ViT, a function of the seed; returns the model.
    As detectron2's: He's where a ReLU follows, small where something is predicted.
    Independent classes start improbable, at .01."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) or name.startswith('vit'):
            continue
        fan_in = layer.weight[0].numel()
        if isinstance(layer, nn.ConvTranspose2d):
            fan_in = len(layer.weight)

        std = (2 / fan_in) ** .5
        if name == 'mask_head.classes':
            std = .001
        elif name.startswith('proposer') or name.endswith('classes'):
            std = .01
        elif name.endswith('deltas'):
            std = .001
        layer.weight.normal_(0, std, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    if model.config.sigmoid:
        for head in model.box_heads:
            head.classes.bias.fill_(math.log(.01 / .99))
    return model


def maskness(masks, threshold=.5):
    """How sure masks [n, m, m] are of themselves: the mean probability of the pixels above threshold [n].
    EVA multiplies scores by it when masks are judged."""
    inside = masks > threshold
    return (masks * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)


def to_original(found, size, original):
    """Detections on an image's original (height, width): scaled, clipped, dropped if nothing is left."""
    down = original[0] / size[0]
    across = original[1] / size[1]
    boxes = found['boxes'] * found['boxes'].new_tensor((across, down, across, down))
    boxes = clip_boxes(boxes, original)
    kept = has_area(boxes)
    return {name: x[kept] for name, x in dict(found, boxes=boxes).items()}


def spline(places, at):
    """The cubic spline through values at n places, in order, at m others: the values' weights [m, n], float64.
    The first two pieces are one polynomial, and so are the last two, and go on outside ('not a knot')."""
    def basis(x):
        cubic = x[:, None] ** np.arange(4)
        bends = (x[:, None] - places[2:-2]).clip(0) ** 3    # another third derivative from a knot on
        return np.concatenate((cubic, bends), 1)

    scale = abs(places).max()
    at = at / scale
    places = places / scale
    return np.linalg.solve(basis(places).T, basis(at).T).T


@torch.no_grad()
def stretch_distances(vit, grid):
    """Makes the global blocks' tables of relative positions anew for a grid (h, w).
    EVA's way of testing at 1536 pixels, and BEiT's: a spline through places ever further apart."""
    for block in vit.blocks:
        if block.attn.window:
            continue
        for name, side in zip(('rel_pos_h', 'rel_pos_w'), grid):
            table = getattr(block.attn, name)
            if len(table) == 2 * side - 1:
                continue
            far = np.cumsum(1.0903078 ** np.arange(len(table) // 2))        # 1, 1 + q, 1 + q + q^2, ...
            places = np.concatenate((-far[::-1], [0], far))
            weights = torch.from_numpy(spline(places, np.arange(1. - side, side)))
            table = weights.to(table.device) @ table.double()
            setattr(block.attn, name, nn.Parameter(table.float()))


# What the released detectors call our tensors: rules as in model.py, whose EVA blocks are used.
DETECTOR = M.under('backbone.net.', 'vit.', M.EVA + M.EVA_QKV + M.GELU_MLP + M.same(
    'blocks.*.attn.rel_pos_h', 'blocks.*.attn.rel_pos_w'))
for _i in range(4):
    DETECTOR += [
        (f'backbone.simfp_{_i + 2}.*.*', f'pyramid.levels.{_i}.*.*', 'same'),
        (f'backbone.simfp_{_i + 2}.*.norm.*', f'pyramid.levels.{_i}.*.norm.*', 'same'),
        (f'roi_heads.box_head.*.conv{_i + 1}.weight', f'box_heads.*.convs.{_i}.weight', 'same'),
        (f'roi_heads.box_head.*.conv{_i + 1}.norm.*', f'box_heads.*.convs.{_i}.norm.*', 'same'),
        (f'roi_heads.mask_head.mask_fcn{_i + 1}.weight', f'mask_head.convs.{_i}.weight', 'same'),
        (f'roi_heads.mask_head.mask_fcn{_i + 1}.norm.*', f'mask_head.convs.{_i}.norm.*', 'same'),
        (f'proposal_generator.rpn_head.conv.conv{_i}.*', f'proposer.convs.{_i}.*', 'same')]
DETECTOR += [
    ('proposal_generator.rpn_head.objectness_logits.*', 'proposer.objectness.*', 'same'),
    ('proposal_generator.rpn_head.anchor_deltas.*', 'proposer.deltas.*', 'same'),
    ('roi_heads.box_head.*.fc1.*', 'box_heads.*.fc.*', 'same'),
    ('roi_heads.box_predictor.*.cls_score.*', 'box_heads.*.classes.*', 'same'),
    ('roi_heads.box_predictor.*.bbox_pred.*', 'box_heads.*.deltas.*', 'same'),
    ('roi_heads.box_predictor.*.fed_loss_cls_weights', '-', 'drop'),
    ('roi_heads.mask_head.deconv.*', 'mask_head.up.*', 'same'),
    ('roi_heads.mask_head.predictor.*', 'mask_head.classes.*', 'same')]


def detector_config(state):
    """What the tensors of a released detector, under our names, show, as a dict."""
    def shape(name):
        return state[name].shape

    head_dim = shape('vit.blocks.0.attn.rel_pos_h')[1]
    tables = []                 # a side of the grid that each block's relative positions are for
    for i in range(M.count_layers(state, 'vit.')):
        tables.append((shape(f'vit.blocks.{i}.attn.rel_pos_h')[0] + 1) // 2)
    largest = max(tables)       # a global block's
    width = shape('vit.patch_embed.weight')[0]
    patch = shape('vit.patch_embed.weight')[-1]
    vit = dict(
        width=width, depth=len(tables), heads=width // head_dim,
        mlp_width=shape('vit.blocks.0.mlp.fc1.weight')[0], patch_size=patch,
        image_size=patch * math.isqrt(shape('vit.pos_embed')[1] - 1), pool='map', mask_token=False,
        window=tables[0], rel_pos=largest, global_every=1 + tables.index(largest),
        mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return dict(
        vit=vit, num_classes=shape('mask_head.classes.bias')[0], channels=shape('proposer.convs.0.bias')[0],
        hidden=shape('box_heads.0.fc.weight')[0], stages=sum(name.endswith('fc.bias') for name in state))


# ---- boxes: average precision -------------------------------------------------------------------
# In numpy. Boxes here are a json's (x, y, width, height), masks run lengths as of data.encode_mask.

COCO_IOUS = np.linspace(.5, .95, 10)        # an average precision is the mean over these
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS = {'': (0, 1e10), 's': (0, 32 ** 2), 'm': (32 ** 2, 96 ** 2), 'l': (96 ** 2, 1e10)}


def overlap_boxes(a, b, crowd):
    """IoU of detections a [n, 4] and objects b [m, 4]: [n, m]. crowd: bool [m].
    A crowd's union is the detection alone, as it need not cover the whole crowd."""
    low = np.maximum(a[:, None, :2], b[:, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[:, :2] + b[:, 2:])
    shared = (high - low).clip(0).prod(2)                               # [n, m]
    return divide(shared, a[:, 2] * a[:, 3], b[:, 2] * b[:, 3], crowd)


def divide(shared, area_a, area_b, crowd):
    """IoU [n, m] of what is shared [n, m] by areas [n] and [m]; 0 where nothing is."""
    area_a = area_a[:, None]
    union = np.where(crowd, area_a, area_a + area_b - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def overlap_masks(a, b, crowd):
    """As overlap_boxes, of masks: lists of n and of m run lengths.
    How many pixels of an object lie before a place is a polygon through the ends of its runs.
    So what a detection's run shares with it is the difference of two interpolations."""
    shared = np.zeros((len(a), len(b)))
    for j, theirs in enumerate(b):
        ends = np.cumsum(theirs)
        before = np.cumsum(theirs * (np.arange(len(theirs)) % 2))
        for i, ours in enumerate(a):
            places = np.cumsum(ours[:len(ours) // 2 * 2])           # a run of ones begins, ends, ...
            inside = np.interp(places, ends, before)
            shared[i, j] = (inside[1::2] - inside[::2]).sum()

    area_a = np.array([data.mask_area(runs) for runs in a])
    area_b = np.array([data.mask_area(runs) for runs in b])
    return divide(shared, area_a, area_b, crowd)


def match_detections(iou, ignored, crowd):
    """Which detections, best first, find an object, for A ranges of areas and T thresholds of IoU.
    Each takes the best object that is left, the last of equals; one that is ignored only if no other fits.
    A crowd is never used up. iou [n, m], ignored bool [A, m], crowd bool [m].
    -> bool [n, A, T]: found one; found one that is ignored."""
    n, m = iou.shape
    shape = len(ignored), len(COCO_IOUS)
    found = np.zeros((n, *shape), dtype=bool)
    void = np.zeros((n, *shape), dtype=bool)
    free = np.ones((*shape, m), dtype=bool)
    thresholds = np.minimum(COCO_IOUS, 1 - 1e-10)[:, None]
    for i in np.flatnonzero((iou >= COCO_IOUS[0]).any(1)):
        fits = free & (iou[i] >= thresholds)                            # [A, T, m]
        counting = fits & ~ignored[:, None]
        counts = counting.any(2)                                        # [A, T]
        fits = np.where(counts[..., None], counting, fits)
        found[i] = fits.any(2)
        void[i] = found[i] & ~counts

        best = m - 1 - np.where(fits, iou[i], -1)[..., ::-1].argmax(2)  # [A, T], the last of equals
        taken = found[i][..., None] & (np.arange(m) == best[..., None])
        free &= ~taken | crowd
    return found, void


def precision_curve(found, counts, num):
    """Precision at the recalls of COCO_RECALLS: [T, 101].
    found, counts: bool [n, T], whether each detection, best first, found an object, and counts at all.
    num: of objects."""
    right = (found & counts).cumsum(0)
    precision = right / (counts.cumsum(0) + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]        # what a lower threshold may still reach
    precision = np.concatenate((precision, np.zeros((1, precision.shape[1]))))      # a recall not reached
    curves = []
    for column, recall in zip(precision.T, right.T / num):
        curves.append(column[recall.searchsorted(COCO_RECALLS)])
    return np.stack(curves)


def by_id(rows):
    return sorted(rows, key=lambda row: row['id'])


def by_pair(rows):
    """{(image's id, category's id): their rows}."""
    pairs = {}
    for row in rows:
        pairs.setdefault((row['image_id'], row['category_id']), []).append(row)
    return pairs


def best_of(rows, most):
    """Best first, of equals the first."""
    return sorted(rows, key=lambda row: -row['score'])[:most]


def lvis_results(images, objects, results, most):
    """LVIS counts the best `most` detections of an image.
    Of these it takes the categories that are known to be in it, or not to be. objects: as of by_pair."""
    of_image = {image['id']: [] for image in images}
    for row in results:
        of_image[row['image_id']].append(row)

    kept = []
    for image in images:
        for row in best_of(of_image[image['id']], most):
            category = row['category_id']
            if (image['id'], category) in objects or category in image['neg_category_ids']:
                kept.append(row)
    return kept


def outside(areas):
    """Which areas [n] do not lie in each range, ends included: [A, n]."""
    low, high = np.array(list(COCO_AREAS.values())).T[:, :, None]
    return (areas < low) | (areas > high)


def judge_pair(image, objects, found, kind):
    """What an image's detections of one category are worth. objects, found: json rows, found best first.
    -> scores [n]; whether each finds an object, and counts, bool [n, A, T]; which objects count [A, m]."""
    crowd = np.array([bool(row.get('iscrowd')) for row in objects], dtype=bool)
    if kind == 'bbox':
        ours = np.array([row['bbox'] for row in found], dtype=np.float64).reshape(-1, 4)
        theirs = np.array([row['bbox'] for row in objects], dtype=np.float64).reshape(-1, 4)
        iou = overlap_boxes(ours, theirs, crowd)
        areas = ours[:, 2] * ours[:, 3]
    else:
        size = image['height'], image['width']
        ours = [data.read_segmentation(row['segmentation'], size) for row in found]
        theirs = [data.read_segmentation(row['segmentation'], size) for row in objects]
        iou = overlap_masks(ours, theirs, crowd)
        areas = np.array([data.mask_area(runs) for runs in ours])

    # objects of another size, and crowds, need not be found
    ignored = outside(np.array([row['area'] for row in objects], dtype=np.float64)) | crowd
    hits, void = match_detections(iou, ignored, crowd)

    # nor is one wrong that finds nothing, if it is of another size, or LVIS does not know of all objects
    pardoned = outside(areas)
    if found and found[0]['category_id'] in image.get('not_exhaustive_category_ids', ()):
        pardoned[:] = True
    void |= ~hits & pardoned.T[:, :, None]
    scores = np.array([row['score'] for row in found], dtype=np.float64)
    return scores, hits, ~void, ~ignored


def precision_and_recall(truth, results, kind, most):
    """See average_precision. Of the categories by id, -1 where there is no object:
    precision [K, areas, IoUs, 101 recalls] and recall [K, areas, most, IoUs]."""
    images = {image['id']: image for image in by_id(truth['images'])}
    objects = by_pair(truth['annotations'])
    if data.is_lvis(truth):
        results = lvis_results(images.values(), objects, results, most[-1])
    results = by_pair(results)
    pairs = {category['id']: [] for category in by_id(truth['categories'])}
    for image, category in sorted(objects.keys() | results.keys()):
        pairs[category].append((image, category))

    shape = len(pairs), len(COCO_AREAS)
    precision = np.full((*shape, len(COCO_IOUS), len(COCO_RECALLS)), -1.)
    recall = np.full((*shape, len(most), len(COCO_IOUS)), -1.)
    for k, category in enumerate(pairs):
        # all images' detections, best first, and how good they are among those of their image
        judged, places = [], []
        for pair in pairs[category]:
            found = best_of(results.get(pair, []), most[-1])
            judged.append(judge_pair(images[pair[0]], objects.get(pair, []), found, kind))
            places.append(np.arange(len(found)))
        if not judged:
            continue
        scores, hits, counts, wanted = zip(*judged)
        order = np.argsort(-np.concatenate(scores), kind='stable')
        place = np.concatenate(places)[order]
        hits = np.concatenate(hits)[order]
        counts = np.concatenate(counts)[order]
        nums = np.concatenate(wanted, 1).sum(1)                         # objects in each range of areas

        for a in np.flatnonzero(nums):
            precision[k, a] = precision_curve(hits[:, a], counts[:, a], nums[a])
            right = hits[:, a] & counts[:, a]
            for m, limit in enumerate(most):
                recall[k, a, m] = right[place < limit].sum(0) / nums[a]
    return precision, recall


def known_mean(x):
    """Mean of what is no -1; -1 of nothing."""
    known = x[x > -1]
    return float(known.mean()) if known.size else -1.


def average_precision(truth, results, kind='bbox', most=(1, 10, 100)):
    """COCO's 12 numbers, and the same `per_category` {id: ...}; a number of nothing is -1.
    Where categories have frequencies the way is LVIS's (arXiv:1908.03195), with APr, APc and APf.
    truth: a json's dict of images, annotations and categories.
    results: dicts of image_id, category_id, score, and bbox or segmentation, as kind says.
    most: how many detections count of an image and, in COCO, a category; LVIS takes one number, (300,)."""
    precision, recall = precision_and_recall(truth, results, kind, most)
    categories = by_id(truth['categories'])

    def numbers(precision, recall):
        result = dict(AP=known_mean(precision[:, 0]))
        result['AP50'] = known_mean(precision[:, 0, 0])
        result['AP75'] = known_mean(precision[:, 0, 5])
        sizes = list(enumerate(COCO_AREAS))[1:]
        for a, name in sizes:
            result['AP' + name] = known_mean(precision[:, a])
        for m, limit in enumerate(most):
            result[f'AR{limit}'] = known_mean(recall[:, 0, m])
        for a, name in sizes:
            result['AR' + name] = known_mean(recall[:, a, -1])
        return result

    result = numbers(precision, recall)
    if data.is_lvis(truth):
        for letter in 'rcf':
            rows = [category['frequency'] == letter for category in categories]
            result['AP' + letter] = known_mean(precision[rows, 0])
    result['per_category'] = {}
    for k, category in enumerate(categories):
        result['per_category'][category['id']] = numbers(precision[k:k + 1], recall[k:k + 1])
    return result


# ---- boxes: start, test, show -------------------------------------------------------------------

def new_detector(cfg, dataset):
    """A Detector on a new ViT or that of --init."""
    config = run.vit_config(cfg)
    # distances are learnt where there are windows; the table of positions is resized at every step
    rel_pos = config.image_size // config.patch_size if cfg.window else 0
    vit = start_vit(cfg, patch_size=config.patch_size, pool='map', window=cfg.window, rel_pos=rel_pos)
    model = Detector(DetectorConfig(
        vit.config, len(dataset.classes), cfg.channels, cfg.hidden, cfg.stages, dataset.lvis,
        before=(2 * cfg.proposals, cfg.proposals), after=(cfg.proposals, cfg.proposals),
        num_boxes=cfg.num_boxes))
    model.vit.load_state_dict(vit.state_dict())
    if cfg.init:                    # EVA keeps the patch embedding as it was pre-trained
        model.vit.patch_embed.requires_grad_(False)
    if dataset.lvis:
        model.class_weights = dataset.frequencies().sqrt()
    return init_detector(model, cfg.seed)


def ways_to_choose(cfg, lvis):
    """choose_detections's options for COCO's or LVIS's usual numbers; with --soft for EVA's."""
    if lvis:
        return dict(threshold=.001, most=1000) if cfg.soft else dict(threshold=.02, most=300)
    if cfg.soft:
        return dict(threshold=0., soft=dict(method='linear', threshold=.6))
    return dict(threshold=.05, most=100)


@torch.no_grad()
def find(model, batch, originals, choose, device):
    """What is found in a batch, on images of their original (height, width): dicts as of Detector.detect,
    and `pasted`, a list of masks, bool [height, width]."""
    with run.autocast(device):
        found = model(normalize(model, batch), choose=choose)
    results = []
    for part, size, original in zip(found, batch['sizes'], originals):
        part = to_original(part, size, original)
        part['pasted'] = []
        for mask, box in zip(part['masks'], part['boxes']):
            part['pasted'].append(paste_mask(mask, box, original) >= .5)
        results.append(part)
    return results


def result_rows(found, image, categories):
    """Detections as rows of COCO's results; mask_score is EVA's for masks."""
    labels = found['classes'].tolist()
    scores = found['scores'].tolist()
    mask_scores = (found['scores'] * maskness(found['masks'])).tolist()
    rows = []
    for n, (x1, y1, x2, y2) in enumerate(found['boxes'].tolist()):
        rows.append(dict(
            image_id=image, category_id=categories[labels[n]]['id'], bbox=[x1, y1, x2 - x1, y2 - y1],
            segmentation=dict(counts=data.encode_mask(found['pasted'][n].cpu())),
            score=scores[n], mask_score=mask_scores[n]))
    return rows


def judge_boxes(model, dataset, cfg, device, num, rank, world):
    """AP of boxes and masks of the first num images; each process looks at its part of them."""
    choose = ways_to_choose(cfg, dataset.lvis)
    batch_size = math.ceil(cfg.batch_size / world / 2)
    seen = {}                   # {image id: (image, its objects, what was found)}, rows of COCO's jsons
    for batch in data.eval_batches(
            dataset, batch_size, cfg.image_size, num, device, cfg.workers, rank=rank, world=world):
        truth = dataset.truth(batch)
        originals = [(image['height'], image['width']) for image, _ in truth]
        found = find(model, batch, originals, choose, device)
        for n, (image, objects) in enumerate(truth):
            if batch['position'][n] < num:  # later ones fill the last process's part
                rows = result_rows(found[n], image['id'], dataset.categories)
                seen[image['id']] = image, objects, rows

    # all processes' images as one json
    seen = dict(run.gather_lists(list(seen.items())))
    truth = dict(images=[], annotations=[], categories=dataset.categories)
    results = []
    for image, objects, rows in seen.values():
        truth['images'].append(image)
        truth['annotations'] += objects
        results += rows
    mask_results = results
    if cfg.soft:
        mask_results = [dict(row, score=row['mask_score']) for row in results]

    # the numbers of both
    most = (300,) if dataset.lvis else (1, 10, 100)
    metrics = {}
    for name, value in percent(average_precision(truth, results, 'bbox', most)).items():
        metrics[f'box_{name}'] = value
    for name, value in percent(average_precision(truth, mask_results, 'segm', most)).items():
        metrics[f'mask_{name}'] = value
    if dataset.coarse:
        metrics.update(vocabulary_gap(truth, results, dataset.coarse, metrics['box_ap']))
    return metrics


def percent(numbers):
    """average_precision's numbers as they are printed; -1, of nothing, stays."""
    return {name.lower(): max(-1., 100 * value)
            for name, value in numbers.items() if name != 'per_category'}


def vocabulary_gap(truth, results, coarse, fine_ap):
    """What many classes cost: AP of the same boxes once their classes count as coarse ones, and as one.
    gap is 1 - fine / coarse: EVA, section 3.3, where LVIS is fine and COCO coarse.
    coarse: each class's coarse one."""
    metrics = {}
    for name, group in (('coarse', coarse), ('one_class', [0] * len(coarse))):
        objects = [dict(row, category_id=group[row['category_id']]) for row in truth['annotations']]
        found = [dict(row, category_id=group[row['category_id']]) for row in results]
        categories = [dict(id=k) for k in sorted(set(group))]
        mapped = dict(truth, annotations=objects, categories=categories)
        metrics[f'box_ap_{name}'] = percent(average_precision(mapped, found))['ap']
    coarse_ap = metrics['box_ap_coarse']
    metrics['gap'] = 1 - fine_ap / coarse_ap if coarse_ap > 0 else -1.
    return metrics


def draw_objects(image, boxes, labels, masks, words, side):
    """A PIL image of uint8 [3, H, W] with boxes [n, 4], masks (bool [H, W]) and words, `side` long."""
    pixels = image.permute(1, 2, 0).cpu().float()
    for label, mask in zip(labels, masks):
        colour = pixels.new_tensor(class_colour(label))
        pixels = torch.where(mask.cpu()[..., None], .55 * pixels + .45 * colour, pixels)
    picture = Image.fromarray(pixels.byte().numpy())
    scale = side / max(picture.size)
    picture = picture.resize([max(1, round(n * scale)) for n in picture.size], Image.Resampling.BICUBIC)

    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    for box, label, word in zip(boxes.tolist(), labels, words):
        x1, y1, x2, y2 = [n * scale for n in box]
        corners = x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)
        draw.rectangle(corners, outline=class_colour(label), width=2)
        draw.text((x1 + 3, y1 + 1), word, fill='white', font=font, stroke_width=2, stroke_fill='black')
    return picture


def draw_found(image, found, names, side, threshold=.5):
    """draw_objects of what was found with at least this score."""
    rows = (found['scores'] >= threshold).nonzero()[:, 0].tolist()
    labels = found['classes'][rows].tolist()
    words = [f'{names[label]} {found["scores"][row]:.2f}' for label, row in zip(labels, rows)]
    masks = [found['pasted'][row] for row in rows]
    return draw_objects(image, found['boxes'][rows], labels, masks, words, side)


def show_boxes(model, dataset, cfg, device, num=6):
    """The sheet's columns and legend: validation images with the truth, and with what was found."""
    batch = next(iter(data.eval_batches(dataset, num, cfg.image_size, num, device)))
    found = find(model, batch, batch['sizes'], ways_to_choose(cfg, dataset.lvis), device)
    columns = {'truth': [], 'found': []}
    for n, target in enumerate(batch['targets']):
        height, width = batch['sizes'][n]
        image = batch['images'][n, :, :height, :width]
        masks = []
        for mask in target['masks']:
            if isinstance(mask, list):
                runs = data.fill_polygons(mask, (height, width))
                mask = torch.from_numpy(data.decode_mask(runs, (height, width)))
            masks.append(mask)
        labels = target['labels'].tolist()
        words = [dataset.classes[label] for label in labels]
        columns['truth'].append(draw_objects(image, target['boxes'], labels, masks, words, TILE))
        columns['found'].append(draw_found(image, found[n], dataset.classes, TILE))
    return columns, {}


def boxes_in(model, image, names, cfg, device):
    """What is found in a PIL image, and no legend."""
    original = image.height, image.width
    S = cfg.image_size
    size = tuple(max(1, round(n * S / max(original))) for n in original)
    small = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    batch = dict(images=data.pad_to(pixels, S)[None].to(device), sizes=[size])
    found = find(model, batch, [original], ways_to_choose(cfg, model.config.sigmoid), device)[0]
    return draw_found(torch.from_numpy(np.array(image)).permute(2, 0, 1), found, names, 2 * TILE), {}


# ---- maps: mean IoU -----------------------------------------------------------------------------

def confusion(predictions, labels, num_classes):
    """How many pixels of each class are taken for each: [K, K], rows are the truth.
    predictions, labels: of one shape; labels that are no class do not count."""
    known = (labels >= 0) & (labels < num_classes)
    pairs = labels[known].long() * num_classes + predictions[known].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def mean_iou(counts):
    """The numbers of all images' confusion matrix [K, K], and the IoU of each class [K].
    It is nan where a class is neither there nor predicted; 0 where it is predicted but never there."""
    counts = counts.double()
    right = counts.diagonal()
    there = counts.sum(1)
    iou = right / (there + counts.sum(0) - right)
    return dict(miou=iou.nanmean().item(),
                pixel_accuracy=(right.sum() / there.sum()).item(),
                class_accuracy=(right / there).nanmean().item()), iou


# ---- maps: a linear classifier of patches -------------------------------------------------------

class LinearHead(nn.Conv2d):
    """A linear classifier of patches, whose logits are interpolated to pixels."""

    def __init__(self, width, num_classes):
        super().__init__(width, num_classes, 1)

    def scores(self, maps, size):
        """Logits [B, K, H, W] of the only one of maps, [B, D, h, w]; size is (H, W)."""
        logits = self(maps[0]).float()
        return F.interpolate(logits, size=size, mode='bilinear')

    def losses(self, maps, labels, draw):
        """Cross-entropy of the pixels that have a class. labels [B, H, W]; nothing is drawn."""
        scores = self.scores(maps, labels.shape[1:])
        loss = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction='sum')

        num = (labels != IGNORED).sum()
        return {'pixels': (loss, num)}


# ---- maps: which query for which mask -----------------------------------------------------------

def assign(cost):
    """The cheapest way to give every row a column of its own: rows in order and their columns.
    cost: numpy [n, m], finite; where columns are fewer every column gets a row. The Hungarian algorithm:
    rows have prices u, columns v, u[i] + v[j] <= cost[i, j]; rows enter one by one, by the shortest path."""
    n, m = cost.shape
    if n > m:
        columns, rows = assign(cost.T)
        order = rows.argsort()
        return rows[order], columns[order]

    cost = np.pad(cost, ((0, 0), (0, 1)), constant_values=np.inf)
    u = np.zeros(n)
    v = np.zeros(m + 1)
    row_of = np.full(m + 1, -1)         # column m stands for the row that enters
    for row in range(n):
        column = m
        row_of[column] = row
        distance = np.full(m + 1, np.inf)
        way = np.full(m + 1, m)         # the column before, on the shortest path
        used = np.zeros(m + 1, dtype=bool)

        # the nearest column is used, until it is a free one
        while row_of[column] >= 0:
            used[column] = True
            i = row_of[column]
            reduced = np.where(used, np.inf, cost[i] - u[i] - v)
            way[reduced < distance] = column
            distance = np.where(used, np.inf, np.minimum(reduced, distance))
            column = distance.argmin()
            step = distance[column]
            u[row_of[used]] += step
            v[used] -= step
            distance -= step

        # along the path each column takes the row of the one before
        while column != m:
            row_of[column] = row_of[way[column]]
            column = way[column]

    columns = np.flatnonzero(row_of[:m] >= 0)
    return np.arange(n), columns[row_of[columns].argsort()]


def split_labels(labels, num_classes):
    """labels [H, W] -> the classes that are there [n], and the mask of each, float [n, H, W]."""
    classes = labels.unique()
    classes = classes[(classes >= 0) & (classes < num_classes)]
    return classes, (labels == classes[:, None, None]).float()


def sample_points(maps, points):
    """maps [n, H, W] at points [n, P, 2] (or [1, P, 2] for all), (x, y) from 0 to 1: [n, P], bilinear."""
    places = 2 * points.expand(len(maps), -1, -1) - 1
    return F.grid_sample(maps[:, None].float(), places[:, None], align_corners=False)[:, 0, 0]


@torch.no_grad()
def match_cost(logits, masks, classes, goals, points):
    """What each query would cost for each mask, [Q, n], judged at the same points for all.
    logits [Q, K + 1], masks [Q, h, w]; classes [n], goals [n, H, W]; points [1, P, 2]."""
    masks = sample_points(masks, points)                # [Q, P]
    goals = sample_points(goals, points)                # [n, P]

    # the cross-entropy of all pairs, as two products
    pixels = F.softplus(-masks) @ goals.T
    pixels = pixels + F.softplus(masks) @ (1 - goals).T
    pixels = pixels / points.shape[1]

    inside = masks.sigmoid()
    both = inside @ goals.T
    sizes = inside.sum(1)[:, None] + goals.sum(1)
    dice = 1 - (2 * both + 1) / (sizes + 1)

    unlike = -logits.float().softmax(1)[:, classes]
    cost = CLASS_WEIGHT * unlike + PIXEL_WEIGHT * pixels
    return cost + DICE_WEIGHT * dice


@torch.no_grad()
def uncertain_points(masks, candidates, others):
    """Points to learn from, [n, P, 2]: the others, a quarter of the P, and those of
    candidates [n, 3P, 2] where masks [n, h, w] are least sure."""
    num = candidates.shape[1] // 3 - others.shape[1]
    doubt = -sample_points(masks, candidates).abs()     # [n, 3P]
    rows = doubt.topk(num, dim=1).indices
    chosen = candidates.gather(1, rows[..., None].expand(-1, -1, 2))
    return torch.cat((chosen, others), 1)


def mask_losses(logits, masks, targets, draw, layer, P):
    """Sums of a layer's losses, [3]: of queries' classes, of P pixels of masks, of masks' overlap.
    logits [B, Q, K + 1], masks [B, Q, h, w]; targets: split_labels of each image;
    draw(stream, num) gives [B, num] random numbers. Images without labels do not count."""
    B, Q, num_logits = logits.shape
    K = num_logits - 1

    # random points: to judge all pairs at, and for each mask to learn from
    most = max(len(classes) for classes, _ in targets)
    num = P - int(.75 * P)
    judged = draw(f'match {layer}', P * 2).view(B, P, 2)
    candidates = draw(f'candidates {layer}', most * 3 * P * 2)
    candidates = candidates.view(B, most, 3 * P, 2)
    others = draw(f'others {layer}', most * num * 2)
    others = others.view(B, most, num, 2)

    # the queries that are to find a mask, and what they should say
    labels = torch.full((B, Q), K, device=logits.device)        # the others: nothing
    known = []
    chosen = []
    goals = []
    for i, (classes, wanted) in enumerate(targets):
        cost = match_cost(logits[i], masks[i], classes, wanted, judged[i:i + 1])
        cost = cost.nan_to_num(1e9, 1e9, -1e9).double()
        pairs = torch.from_numpy(np.stack(assign(cost.cpu().numpy())))
        queries, columns = pairs.to(logits.device)
        labels[i, queries] = classes[columns]
        n = len(queries)
        if n:
            known.append(i)

        # the pixels of these queries, and of the masks they are to find
        found = masks[i, queries]
        points = uncertain_points(found, candidates[i, :n], others[i, :n])
        chosen.append(sample_points(found, points))
        goals.append(sample_points(wanted[columns], points))
    chosen = torch.cat(chosen)                          # [all n, P]
    goals = torch.cat(goals)

    # classes of all queries, pixels and overlap of those with a mask
    weight = torch.ones(K + 1, device=logits.device)
    weight[K] = NO_OBJECT
    said = logits[known].flatten(0, 1).float()
    labels = labels[known].flatten()
    class_loss = F.cross_entropy(said, labels, weight, reduction='sum')

    pixels = F.binary_cross_entropy_with_logits(chosen, goals, reduction='none')
    inside = chosen.sigmoid()
    both = (inside * goals).sum(1)
    sizes = inside.sum(1) + goals.sum(1)
    dice = 1 - (2 * both + 1) / (sizes + 1)
    return torch.stack((class_loss, pixels.mean(1).sum(), dice.sum()))


# ---- maps: Mask2Former (arXiv:2112.01527) -------------------------------------------------------

def to_maps(x, sizes):
    """Tokens [B, N, C] of several maps, one after another -> [B, C, h, w] each."""
    parts = x.split([h * w for h, w in sizes], 1)
    return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes)]


def to_tokens(maps):
    """The inverse of to_maps."""
    return torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)


def cell_centres(sizes, device=None):
    """(x, y) from 0 to 1 of the cells of maps of these (h, w), one map after another: [N, 2]."""
    places = []
    for h, w in sizes:
        y = (torch.arange(h, device=device) + .5) / h
        x = (torch.arange(w, device=device) + .5) / w
        places.append(torch.cartesian_prod(y, x).flip(1))
    return torch.cat(places)


def sine_positions(size, channels, device=None):
    """Positions of a map's cells, [h * w, channels] (arXiv:2005.12872): sines and cosines in turn,
    half of the channels of the row, half of the column, as angles up to 2 pi."""
    half = channels // 2
    frequencies = 10000 ** -(torch.arange(0, half, 2, device=device) / half)

    def waves(n):
        angles = 2 * math.pi * torch.arange(1, n + 1, device=device) / (n + 1e-6)
        angles = angles[:, None] * frequencies                          # [n, channels/4]
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)

    h, w = size
    rows = waves(h)[:, None].expand(-1, w, -1)
    columns = waves(w).expand(h, -1, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1)


def sample_levels(values, sizes, places, weights):
    """Each query's weighted sum of samples of several maps, [B, Q, heads * head_dim]. values: cells of
    maps of these sizes, [B, N, heads, head_dim]; places [B, Q, heads, levels, P, 2]; weights without the 2."""
    B, Q, heads, _, _ = weights.shape
    places = 2 * places.float() - 1
    places = places.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)     # [levels, B * heads, Q, P, 2]
    weights = weights.float().permute(3, 0, 2, 1, 4).flatten(1, 2)
    weights = weights[:, :, None]                                   # [levels, B * heads, 1, Q, P]

    total = 0
    for i, level in enumerate(values.split([h * w for h, w in sizes], 1)):
        level = level.float().permute(0, 2, 3, 1).reshape(B * heads, -1, *sizes[i])
        samples = F.grid_sample(level, places[i], align_corners=False)      # [B * heads, head_dim, Q, P]
        total = total + (samples * weights[i]).sum(-1)
    return total.view(B, -1, Q).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Attention to a few points of several maps, around a place that each query has (arXiv:2010.04159).
    Offsets are in cells. ratio: the values' width as a share of the width."""

    def __init__(self, width, heads, levels, points=4, ratio=1.):
        super().__init__()
        self.shape = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.values = nn.Linear(width, int(width * ratio))
        self.proj = nn.Linear(int(width * ratio), width)

    def forward(self, queries, places, memory, sizes):
        """[B, Q, D] to the same. places [Q, 2] or [B, Q, levels, 2]; memory [B, N, D]: maps of these sizes."""
        B, Q, _ = queries.shape
        heads = self.shape[0]
        offsets = self.offsets(queries).view(B, Q, *self.shape, 2)
        offsets = offsets / offsets.new_tensor([(w, h) for h, w in sizes])[:, None]
        if places.ndim == 2:
            places = places[:, None]                                    # the same for all levels
        places = places[..., None, :, None, :] + offsets

        weights = self.weights(queries).view(B, Q, heads, -1).softmax(-1).view(B, Q, *self.shape)
        values = self.values(memory).unflatten(2, (heads, -1))
        with torch.autocast(queries.device.type, enabled=False):        # bfloat16 would misplace samples
            samples = sample_levels(values, sizes, places, weights)
        return self.proj(samples.to(values.dtype))


class EncoderLayer(nn.Module):
    """Deformable self-attention of all cells of three maps, then an MLP, norms after each: [B, N, C]."""

    def __init__(self, config):
        super().__init__()
        self.attn = DeformableAttention(config.channels, config.heads, levels=3)
        self.norms = nn.ModuleList(nn.LayerNorm(config.channels) for _ in range(2))
        self.fc1 = nn.Linear(config.channels, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.channels)

    def forward(self, x, positions, places, sizes):
        x = self.norms[0](x + self.attn(x + positions, places, x, sizes))
        return self.norms[1](x + self.fc2(self.fc1(x).relu()))


class PixelDecoder(nn.Module):
    """Lets the three coarser of four maps exchange what they know, and adds it to the finest.
    inputs: the maps' channels. Maps are [B, C_i, h, w], finest first."""

    def __init__(self, inputs, config):
        super().__init__()
        C = config.channels

        def normed(conv):
            return nn.Sequential(conv, nn.GroupNorm(config.groups, C))
        self.inputs = nn.ModuleList(normed(nn.Conv2d(n, C, 1)) for n in inputs[:0:-1])      # coarsest first
        self.level_embed = nn.Parameter(torch.zeros(3, C))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers[0]))
        self.lateral = normed(nn.Conv2d(inputs[0], C, 1, bias=False))
        self.output = normed(nn.Conv2d(C, C, 3, padding=1, bias=False))
        self.finest = nn.Conv2d(C, C, 1)

    def forward(self, maps):
        """-> [B, C, h, w] of the three, coarsest first, and of the finest."""
        levels = [project(x) for project, x in zip(self.inputs, maps[:0:-1])]
        sizes = [tuple(level.shape[2:]) for level in levels]
        positions = []
        for level, size, embed in zip(levels, sizes, self.level_embed):
            positions.append(sine_positions(size, level.shape[1], level.device) + embed)
        positions = torch.cat(positions)                                # [N, C]
        centres = cell_centres(sizes, positions.device)

        x = to_tokens(levels)                                           # [B, N, C]
        for layer in self.layers:
            x = layer(x, positions, centres, sizes)
        levels = to_maps(x, sizes)

        finest = self.lateral(maps[0])
        finest = finest + F.interpolate(levels[-1], size=finest.shape[2:], mode='bilinear')
        return levels, self.finest(self.output(finest).relu())


class DecoderLayer(nn.Module):
    """Queries look at a map within their own masks, then at each other, then an MLP, norms after each."""

    def __init__(self, config):
        super().__init__()
        self.cross = nn.MultiheadAttention(config.channels, config.heads, batch_first=True)
        self.attn = nn.MultiheadAttention(config.channels, config.heads, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(config.channels) for _ in range(3))
        self.fc1 = nn.Linear(config.channels, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.channels)

    def forward(self, x, positions, memory, memory_positions, blocked):
        """x [B, Q, C]; memory [B, N, C]; blocked [B, Q, N] bool: cells that a query must not see."""
        blocked = blocked.repeat_interleave(self.cross.num_heads, 0)
        keys = memory + memory_positions
        seen, _ = self.cross(x + positions, keys, memory, attn_mask=blocked, need_weights=False)
        x = self.norms[0](x + seen)
        heard, _ = self.attn(x + positions, x + positions, x, need_weights=False)
        x = self.norms[1](x + heard)
        return self.norms[2](x + self.fc2(self.fc1(x).relu()))


class MaskDecoder(nn.Module):
    """Queries that each become a class, or none, and a mask.
    Before each layer and after the last they predict both; the layer sees only where the mask is."""

    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.queries = nn.Parameter(torch.zeros(config.queries, C))
        self.positions = nn.Parameter(torch.zeros(config.queries, C))
        self.level_embed = nn.Parameter(torch.zeros(3, C))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers[1]))
        self.norm = nn.LayerNorm(C)
        self.classes = nn.Linear(C, config.num_classes + 1)
        self.mask = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))

    def predict(self, x, finest):
        """logits [B, Q, K + 1] and masks [B, Q, H, W] of queries x [B, Q, C]."""
        x = self.norm(x)
        masks = torch.einsum('bqc,bchw->bqhw', self.mask(x), finest)
        return self.classes(x).float(), masks.float()

    def forward(self, levels, finest):
        """Maps as PixelDecoder gives them -> the predictions of all layers, the last one last."""
        x = self.queries.expand(len(finest), -1, -1)
        predictions = [self.predict(x, finest)]
        for i, layer in enumerate(self.layers):
            level = levels[i % 3]                                       # coarsest first
            size = level.shape[2:]
            memory = to_tokens([level]) + self.level_embed[i % 3]
            places = sine_positions(size, level.shape[1], level.device)

            # a query sees where its mask is more likely than not; everything, if that is nowhere
            _, masks = predictions[-1]
            blocked = F.interpolate(masks.detach(), size=size, mode='bilinear').flatten(2) < 0
            blocked = blocked & ~blocked.all(2, keepdim=True)

            x = layer(x, self.positions, memory, places, blocked)
            predictions.append(self.predict(x, finest))
        return predictions


class Mask2FormerHead(nn.Module):
    """Pixel decoder, mask decoder, and their losses. inputs: channels of four maps, finest first."""

    def __init__(self, inputs, config):
        super().__init__()
        self.config = config
        self.pixels = PixelDecoder(inputs, config)
        self.decoder = MaskDecoder(config)

    def scores(self, maps, size):
        """For each pixel and class the sum over queries of their certainty of both: [B, K, H, W]."""
        logits, masks = self.decoder(*self.pixels(maps))[-1]
        classes = logits.softmax(-1)[..., :-1]
        scores = torch.einsum('bqk,bqhw->bkhw', classes, masks.sigmoid())
        return F.interpolate(scores, size=size, mode='bilinear')

    def losses(self, maps, labels, draw):
        """Sums of the losses of all layers' predictions, and what to divide them by: the weights of all
        queries, the number of masks. labels [B, H, W]; draw as in mask_losses."""
        targets = [split_labels(x, self.config.num_classes) for x in labels]
        sums = 0
        with torch.autocast(labels.device.type, enabled=False):
            predictions = self.decoder(*self.pixels(maps))
            for layer, (logits, masks) in enumerate(predictions):
                sums = sums + mask_losses(logits, masks, targets, draw, layer, self.config.points)

        # a query without a mask weighs NO_OBJECT, in an image without labels nothing
        Q = self.config.queries
        num = [min(Q, len(classes)) for classes, _ in targets]
        num = sums.new_tensor(num)                      # masks, [B]
        weights = torch.where(num > 0, num + NO_OBJECT * (Q - num), 0)

        classes, pixels, dice = sums
        return {'classes': (CLASS_WEIGHT * classes, weights.sum()),
                'pixels': (PIXEL_WEIGHT * pixels, num.sum()),
                'dice': (DICE_WEIGHT * dice, num.sum())}


# ---- maps: ViT-Adapter (arXiv:2205.08534) -------------------------------------------------------

def average_of_all(x):
    """The mean of each channel over all processes, which have as many images each: [B, C, h, w] -> [C]."""
    return run.gather(x.mean((0, 2, 3))[None]).mean(0)


class BatchNorm(nn.Module):
    """Batch normalisation of [B, C, h, w] over the images of all processes, on any device."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer('mean', torch.zeros(channels))
        self.register_buffer('variance', torch.ones(channels))

    def forward(self, x):
        mean = self.mean
        variance = self.variance
        if self.training:
            mean = average_of_all(x.float())
            variance = average_of_all((x.float() - mean[:, None, None]).square())
            with torch.no_grad():
                self.mean.lerp_(mean, .1)
                self.variance.lerp_(variance, .1)
        scale = self.weight.float() * (variance + 1e-5).rsqrt()
        shift = self.bias - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def conv_norm_relu(inputs, outputs, stride):
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, BatchNorm(outputs), nn.ReLU())


class SpatialPrior(nn.Module):
    """A small convolutional network: images [B, 3, H, W] -> maps [B, D, ...] at 1/4, 1/8, 1/16, 1/32."""

    def __init__(self, width, inner):
        super().__init__()
        channels = [inner, 2 * inner, 4 * inner, 4 * inner]
        self.stem = nn.Sequential(conv_norm_relu(3, inner, 2), conv_norm_relu(inner, inner, 1),
                                  conv_norm_relu(inner, inner, 1), nn.MaxPool2d(3, 2, padding=1))
        self.convs = nn.ModuleList(conv_norm_relu(channels[i], channels[i + 1], 2) for i in range(3))
        self.projections = nn.ModuleList(nn.Conv2d(n, width, 1) for n in channels)

    def forward(self, images):
        maps = [self.stem(images)]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        return [project(x) for project, x in zip(self.projections, maps)]


class Injector(nn.Module):
    """The ViT's patches look at the spatial maps. Its gain starts at 0: the ViT is at first what it was."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)
        self.memory_norm = nn.LayerNorm(width, 1e-6)
        self.attn = DeformableAttention(width, heads, levels=3, ratio=.5)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x, places, memory, sizes):
        """x [B, h * w, D], patches at these places; memory [B, N, D], maps of these sizes."""
        return x + self.gamma * self.attn(self.norm(x), places, self.memory_norm(memory), sizes)


class Extractor(nn.Module):
    """The spatial maps look at the ViT's patches; then an MLP with a 3 x 3 convolution in it."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)
        self.memory_norm = nn.LayerNorm(width, 1e-6)
        self.mlp_norm = nn.LayerNorm(width, 1e-6)
        self.attn = DeformableAttention(width, heads, levels=1, ratio=.5)
        self.fc1 = nn.Linear(width, width // 4)
        self.fc2 = nn.Linear(width // 4, width)
        self.conv = nn.Conv2d(width // 4, width // 4, 3, padding=1, groups=width // 4)

    def forward(self, x, places, memory, grid, sizes):
        """x [B, N, D], maps of these sizes; memory [B, h * w, D], the patches of this grid."""
        x = x + self.attn(self.norm(x), places, self.memory_norm(memory), [grid])
        maps = to_maps(self.fc1(self.mlp_norm(x)), sizes)
        maps = [self.conv(level) for level in maps]
        return x + self.fc2(F.gelu(to_tokens(maps)))


class Adapter(nn.Module):
    """ViT-Adapter: maps beside a plain ViT, with 4, 2, 1 and 1/2 cells a patch along a side.
    Before each quarter of the blocks the patches take from the maps, after it they give to them.
    The convolutions see the image resized so that patches are 16 pixels wide."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.prior = SpatialPrior(width, inner)
        self.level_embed = nn.Parameter(torch.zeros(3, width))
        self.injectors = nn.ModuleList(Injector(width, heads) for _ in range(4))
        self.extractors = nn.ModuleList(Extractor(width, heads) for _ in range(6))      # 3 at the end
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norms = nn.ModuleList(BatchNorm(width) for _ in range(4))

    def forward(self, vit, images, drop=None):
        """images [B, 3, H, W] -> four maps [B, D, h, w], finest first."""
        h, w = (n // vit.patch_size for n in images.shape[2:])
        sizes = [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]
        cells = cell_centres(sizes, images.device)
        centres = cell_centres([(h, w)], images.device)

        resized = F.interpolate(images, size=(16 * h, 16 * w), mode='bilinear')
        finest, *maps = self.prior(resized)
        beside = to_tokens([x + embed[:, None, None] for x, embed in zip(maps, self.level_embed)])
        after = []                                          # the patches after each quarter of the blocks
        begins = [len(vit.blocks) * i // 4 for i in range(5)]

        def between(layer, x):
            """At a quarter's end the maps look at the patches; at its beginning these at the maps."""
            nonlocal beside
            if layer not in begins:
                return x
            quarter = begins.index(layer)
            patches = x[:, 1:]
            if quarter > 0:
                after.append(patches)
                last = 6 if quarter == 4 else quarter
                for extract in self.extractors[quarter - 1:last]:
                    beside = extract(beside, cells, patches, (h, w), sizes)
            if quarter == 4:
                return x
            patches = self.injectors[quarter](patches, centres, beside, sizes)
            return torch.cat((x[:, :1], patches), 1)

        vit.tokens(images, drop=drop, between=between)
        maps = to_maps(beside, sizes)
        maps = [self.up(maps[0]) + finest, *maps]
        found = []
        for norm, level, patches in zip(self.norms, maps, after):
            patches = F.interpolate(to_maps(patches, [(h, w)])[0], size=level.shape[2:], mode='bilinear')
            found.append(norm(patches + level))
        return found


class PlaceBias(nn.Module):
    """BEiT's relative positions (arXiv:2106.08254), [heads, 1 + N, 1 + N]: a logit by how far away a
    patch is, and one each for class token to patch, patch to class token, class token to itself."""

    def __init__(self, heads, grid):
        super().__init__()
        self.grid = tuple(grid)
        self.table = nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))

    def forward(self):
        h, w = self.grid
        y = torch.arange(h, device=self.table.device)
        x = torch.arange(w, device=self.table.device)
        down = y[:, None] - y + h - 1                                           # [h, h]
        right = x[:, None] - x + w - 1                                          # [w, w]
        rows = down[:, None, :, None] * (2 * w - 1) + right[:, None]            # of the table, [h, w, h, w]

        # the class token's are the last three
        num = len(self.table) - 3
        rows = F.pad(rows.reshape(h * w, h * w), (1, 0, 1, 0), value=num)
        rows[1:, 0] = num + 1
        rows[0, 0] = num + 2
        return self.table[rows].permute(2, 0, 1)


# ---- maps: the model ----------------------------------------------------------------------------

@dataclass
class SegmenterConfig:
    vit: M.ViTConfig                # or the dict of one
    num_classes: int
    head: str = 'linear'            # or mask2former
    adapter: dict = None            # heads and inner width of an Adapter; without one maps are the pyramid's
    bias: tuple = None              # the grid (h, w) for which each block has a PlaceBias, if it has
    channels: int = 256             # the rest is Mask2Former's: width of its decoders
    queries: int = 100              # masks that it proposes
    heads: int = 8                  # of attention
    mlp_width: int = 1024
    layers: tuple = (6, 9)          # of its encoder and of its decoder
    points: int = 12544             # of a mask, from which it is learnt
    groups: int = 32                # of channels that are normalised together

    def __post_init__(self):
        if isinstance(self.vit, dict):
            self.vit = M.ViTConfig(**self.vit)


class Segmenter(nn.Module):
    """A ViT, for Mask2Former a pyramid of maps or an Adapter, and a head that gives every pixel a class."""
    Config = SegmenterConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.vit.width
        self.vit = M.ViT(config.vit)
        self.adapter = None
        self.pyramid = None

        # the four maps that Mask2Former sees
        if config.adapter:
            self.adapter = Adapter(width, **config.adapter)
            self.vit.norm = nn.Identity()
            inputs = [width] * 4
        elif config.head == 'mask2former':
            self.pyramid = Pyramid(width, config.channels)
            inputs = [config.channels] * 4

        if config.head == 'linear':
            self.head = LinearHead(width, config.num_classes)
        else:
            self.head = Mask2FormerHead(inputs, config)
        if config.bias:
            for block in self.vit.blocks:
                block.attn.rel_bias = PlaceBias(config.vit.heads, config.bias)

    def normalize(self, images):
        """uint8 [B, 3, H, W] to the floats that the ViT was trained on."""
        return self.vit.normalize(images)

    def maps(self, images, drop=None):
        """What the head sees: maps [B, C, h, w], finest first."""
        if self.adapter:
            return self.adapter(self.vit, images, drop)

        tokens = self.vit.features(images, drop=drop)
        grid = [n // self.vit.patch_size for n in images.shape[2:]]
        last = to_maps(tokens[:, 1:], [grid])[0]        # [B, D, h, w]
        return self.pyramid(last)[:4] if self.pyramid else [last]

    def forward(self, batch, draw=None, drop=None):
        """batch: images [B, 3, H, W] normalised -> scores [B, K, H, W]. With draw, and labels [B, H, W],
        losses {name: (sum, what to divide it by)}. draw(stream, num) gives [B, num] random numbers."""
        images = batch['images']
        maps = self.maps(images, drop)

        if draw is None:
            return self.head.scores(maps, images.shape[2:])
        return self.head.losses(maps, batch['labels'], draw)

    @staticmethod
    def from_released(state, **options):
        """A Segmenter in eval mode of a released one's tensors; options: what they do not show."""
        # EVA's adapter gives the class token no position
        name = 'backbone.pos_embed'
        if name in state and state[name].ndim == 3:
            state = {**state, name: F.pad(state[name][:, 1:], (0, 0, 1, 0))}
        return read_released(Segmenter, state, SEGMENTER, segmenter_config, **options)


# What EVA's released segmentors call our tensors: rules as in model.py, whose EVA blocks are used.
DEFORMABLE = [
    ('sampling_offsets.*', 'offsets.*', 'same'), ('attention_weights.*', 'weights.*', 'same'),
    ('value_proj.*', 'values.*', 'same'), ('output_proj.*', 'proj.*', 'same')]
INTERACTION = M.under('attn.', 'attn.', DEFORMABLE) + M.same('gamma') + [
    ('query_norm.*', 'norm.*', 'same'), ('feat_norm.*', 'memory_norm.*', 'same'),
    ('ffn_norm.*', 'mlp_norm.*', 'same'), ('ffn.dwconv.dwconv.*', 'conv.*', 'same'),
    ('ffn.fc1.*', 'fc1.*', 'same'), ('ffn.fc2.*', 'fc2.*', 'same')]
BATCH_NORM = M.same('weight', 'bias') + [
    ('running_mean', 'mean', 'same'), ('running_var', 'variance', 'same'),
    ('num_batches_tracked', '-', 'drop')]
ADAPTER = M.same('level_embed', 'up.*')
ADAPTER += M.under('interactions.*.injector.', 'injectors.*.', INTERACTION)
ADAPTER += M.under('interactions.*.extractor.', 'extractors.*.', INTERACTION)
ADAPTER += M.under('interactions.3.extra_extractors.0.', 'extractors.4.', INTERACTION)
ADAPTER += M.under('interactions.3.extra_extractors.1.', 'extractors.5.', INTERACTION)
for i in range(4):
    ADAPTER += M.under(f'norm{i + 1}.', f'norms.{i}.', BATCH_NORM)
    ADAPTER += [(f'spm.fc{i + 1}.*', f'prior.projections.{i}.*', 'same')]
for i in range(3):
    ADAPTER += [(f'spm.stem.{3 * i}.weight', f'prior.stem.{i}.0.weight', 'same')]
    ADAPTER += M.under(f'spm.stem.{3 * i + 1}.', f'prior.stem.{i}.1.', BATCH_NORM)
    ADAPTER += [(f'spm.conv{i + 2}.0.weight', f'prior.convs.{i}.0.weight', 'same')]
    ADAPTER += M.under(f'spm.conv{i + 2}.1.', f'prior.convs.{i}.1.', BATCH_NORM)
PIXEL_DECODER = M.under('encoder.layers.*.attentions.0.', 'layers.*.attn.', DEFORMABLE) + [
    ('encoder.layers.*.ffns.0.layers.0.0.*', 'layers.*.fc1.*', 'same'),
    ('encoder.layers.*.ffns.0.layers.1.*', 'layers.*.fc2.*', 'same'),
    ('encoder.layers.*.norms.*.*', 'layers.*.norms.*.*', 'same'),
    ('level_encoding.weight', 'level_embed', 'same'), ('mask_feature.*', 'finest.*', 'same'),
    ('input_convs.*.conv.*', 'inputs.*.0.*', 'same'), ('input_convs.*.gn.*', 'inputs.*.1.*', 'same'),
    ('lateral_convs.0.conv.*', 'lateral.0.*', 'same'), ('lateral_convs.0.gn.*', 'lateral.1.*', 'same'),
    ('output_convs.0.conv.*', 'output.0.*', 'same'), ('output_convs.0.gn.*', 'output.1.*', 'same')]
ATTENTION = M.same('in_proj_weight', 'in_proj_bias', 'out_proj.*')
MASK_DECODER = [
    *M.under('transformer_decoder.layers.*.attentions.0.attn.', 'layers.*.cross.', ATTENTION),
    *M.under('transformer_decoder.layers.*.attentions.1.attn.', 'layers.*.attn.', ATTENTION),
    ('transformer_decoder.layers.*.ffns.0.layers.0.0.*', 'layers.*.fc1.*', 'same'),
    ('transformer_decoder.layers.*.ffns.0.layers.1.*', 'layers.*.fc2.*', 'same'),
    ('transformer_decoder.layers.*.norms.*.*', 'layers.*.norms.*.*', 'same'),
    ('transformer_decoder.post_norm.*', 'norm.*', 'same'), ('query_feat.weight', 'queries', 'same'),
    ('query_embed.weight', 'positions', 'same'), ('level_embed.weight', 'level_embed', 'same'),
    ('cls_embed.*', 'classes.*', 'same'), ('mask_embed.*.*', 'mask.*.*', 'same')]
PLACE_BIAS = [('blocks.*.attn.relative_position_bias_table', 'blocks.*.attn.rel_bias.table', 'same'),
              ('blocks.*.attn.relative_position_index', '-', 'drop')]
SEGMENTER = M.under('backbone.', 'vit.', M.EVA + M.EVA_QKV + M.GELU_MLP + PLACE_BIAS)
SEGMENTER += M.under('backbone.', 'adapter.', ADAPTER)
SEGMENTER += M.under('decode_head.pixel_decoder.', 'head.pixels.', PIXEL_DECODER)
SEGMENTER += M.under('decode_head.', 'head.decoder.', MASK_DECODER)


def segmenter_config(state):
    """What the tensors of a released segmentor, under our names, show, as a dict."""
    def num_layers(name):
        return sum(M.rename(key, f'{name}.layers.*.fc1.bias', '') is not None for key in state)

    def attention_heads(name):
        return len(state[f'{name}.offsets.bias']) // (3 * 4 * 2)                # levels, points, x and y

    shown = M.vit_config(state, 'vit.', pool=None)
    shown.update(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    bias = None
    if 'vit.blocks.0.attn.rel_bias.table' in state:
        grid = shown['image_size'] // shown['patch_size']
        bias = (grid, grid)
        shown['heads'] = state['vit.blocks.0.attn.rel_bias.table'].shape[1]

    inner = len(state['adapter.prior.stem.0.0.weight'])
    queries, channels = state['head.decoder.queries'].shape
    return dict(
        vit=shown, num_classes=len(state['head.decoder.classes.bias']) - 1, head='mask2former',
        adapter=dict(heads=attention_heads('adapter.injectors.0.attn'), inner=inner), bias=bias,
        channels=channels, queries=queries, heads=attention_heads('head.pixels.layers.0.attn'),
        mlp_width=len(state['head.pixels.layers.0.fc1.bias']),
        layers=(num_layers('head.pixels'), num_layers('head.decoder')))


# ---- maps: start, test, show --------------------------------------------------------------------

@torch.no_grad()
def init_segmenter(model, seed=0):
    """First values of all but the ViT, a function of the seed; returns the model.
    Matrices are Xavier's, embeddings normal. Deformable attention first looks evenly at points
    1, 2, 3, 4 cells away, each head in another direction."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.startswith('vit.'):
            continue
        if name.endswith(('level_embed', 'decoder.queries', 'decoder.positions')):
            weight.normal_(generator=generator)
        elif weight.ndim > 1:
            fans = weight[0, 0].numel() * (weight.shape[0] + weight.shape[1])
            bound = (6 / fans) ** .5
            weight.uniform_(-bound, bound, generator=generator)
        elif name.endswith('bias'):
            weight.zero_()

    for attention in [module for module in model.modules() if isinstance(module, DeformableAttention)]:
        heads, levels, points = attention.shape
        angle = 2 * math.pi * torch.arange(heads) / heads
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(1, keepdim=True)           # on a square's border
        offsets = direction[:, None, None] * torch.arange(1, points + 1)[:, None]
        offsets = offsets.expand(-1, levels, -1, -1)                            # [heads, levels, points, 2]
        attention.offsets.bias.copy_(offsets.flatten())
        attention.offsets.weight.zero_()
        attention.weights.weight.zero_()
    return model


def holds_segmenter(path):
    """Whether a file holds one, ours or a released one."""
    held = M.read(path)
    return held.get('name') == 'Segmenter' or any(name.startswith('decode_head.') for name in M.unwrap(held))


def new_segmenter(cfg, num_classes):
    """New heads on a new ViT or that of --init."""
    config = run.vit_config(cfg)
    vit = start_vit(cfg, image_size=config.image_size, patch_size=config.patch_size, pool=None)
    config = vit.config
    adapter = None
    if cfg.adapter:
        if config.depth < 4 or vit.grid % 2:
            raise Refused(f'a ViT of {config.depth} blocks and {vit.grid} x {vit.grid} patches is not for '
                          '--adapter; it needs 4 blocks or more, and an even number of patches a side')
        adapter = dict(heads=config.heads, inner=min(64, config.width // 4))
    model = Segmenter(SegmenterConfig(
        config, num_classes, cfg.head, adapter, channels=cfg.channels, queries=cfg.queries,
        heads=cfg.channels // 32, mlp_width=4 * cfg.channels, layers=cfg.layers, points=cfg.points,
        groups=min(32, cfg.channels // 8)))
    model.vit.load_state_dict(vit.state_dict(), strict=not adapter)             # whose ViT has no last norm
    return init_segmenter(model, cfg.seed)


def next_segmenter(cfg, num_classes):
    """From another segmentor everything is taken but what names its classes, unless there are as many."""
    before = M.load(cfg.init, Segmenter)
    size = before.vit.image_size
    if cfg.image_size != size:
        raise Refused(f'{cfg.init} is of {size} pixels; use --image_size {size}')
    vit = replace(before.config.vit, drop_path=0. if cfg.freeze else cfg.drop_path)
    model = Segmenter(replace(before.config, vit=vit, num_classes=num_classes, points=cfg.points))
    state = init_segmenter(model, cfg.seed).state_dict()
    for name, weight in before.state_dict().items():
        if weight.shape == state[name].shape:
            state[name] = weight
    model.load_state_dict(state)
    return model


def windows(size, crop, stride):
    """Corners (y, x) of the windows over an image of (height, width); the last are moved back into it."""
    corners = []
    for n, side, step in zip(size, crop, stride):
        last = max(0, n - side)
        corners.append([min(i * step, last) for i in range(-(-last // step) + 1)])
    return [(y, x) for y in corners[0] for x in corners[1]]


def slide(model, images, crop, stride):
    """Mean scores [B, K, H, W] of overlapping windows of images [B, 3, H, W], normalised.
    Images smaller than a window are padded with the mean. crop, stride: (height, width)."""
    H, W = images.shape[2:]
    images = F.pad(images, (0, max(0, crop[1] - W), 0, max(0, crop[0] - H)))
    total = None
    times = images.new_zeros(images.shape[2:])
    for y, x in windows((H, W), crop, stride):
        rows = slice(y, y + crop[0])
        columns = slice(x, x + crop[1])
        scores = model(dict(images=images[:, :, rows, columns]))
        if total is None:
            total = scores.new_zeros(*scores.shape[:2], *images.shape[2:])
        total[:, :, rows, columns] += scores
        times[rows, columns] += 1
    return (total / times)[:, :, :H, :W]


@torch.no_grad()
def predict(model, images, cfg):
    """The class of each pixel of images uint8 [B, 3, H, W]: [B, H, W]. Windows move over the image at
    the size at which its shorter side is --image_size; with --scales, at other sizes, and --flip,
    mirrored, too. Of all these views the scores' softmax is added up, as EVA does."""
    size = images.shape[2:]
    crop = (cfg.image_size, cfg.image_size)
    stride = [max(1, round(STRIDE * n)) for n in crop]
    views = [(scale, False) for scale in cfg.scales]
    if cfg.flip:
        views += [(scale, True) for scale in cfg.scales]

    total = 0
    for scale, mirrored in views:
        scaled = [max(1, round(n * scale * cfg.image_size / min(size))) for n in size]
        view = F.interpolate(images.float(), size=scaled, mode='bilinear')
        if mirrored:
            view = view.flip(-1)
        with run.autocast(images.device):
            scores = slide(model, model.normalize(view), crop, stride)
        if mirrored:
            scores = scores.flip(-1)
        total = total + F.interpolate(scores, size=size, mode='bilinear').softmax(1)
    return total.argmax(1)


def judge_maps(model, dataset, cfg, device, num, rank, world):
    """Mean IoU and accuracies of the first num images, of which each process looks at its share."""
    K = len(dataset.classes)
    counts = torch.zeros(K, K, dtype=torch.long, device=device)
    for images, labels in dataset.truth(range(rank, num, world), device):
        counts += confusion(predict(model, images, cfg), labels, K)
    numbers, _ = mean_iou(run.sum_over_processes(counts))
    return {name: 100 * number for name, number in numbers.items()}


def draw_classes(image, classes, num):
    """A PIL image of uint8 [3, H, W] under the colours of its classes [H, W]; black where there is none."""
    colours = torch.tensor([class_colour(k) for k in range(num)] + [(0, 0, 0)]).float()
    pixels = .4 * image.permute(1, 2, 0).cpu().float() + .6 * colours[classes.cpu()]
    return Image.fromarray(pixels.byte().numpy())


def legend_of(classes, names):
    """{name: colour} of the classes that are there."""
    return {names[k]: class_colour(k) for k in classes.unique().tolist() if k != IGNORED}


def show_maps(model, dataset, cfg, device, num=4):
    """The sheet's columns and legend: validation images, what is predicted, the truth."""
    K = len(dataset.classes)
    columns = {'image': [], 'found': [], 'truth': []}
    legend = {}
    for images, labels in dataset.truth(range(num), device):
        predictions = predict(model, images, cfg)
        for image, predicted, label in zip(images, predictions, labels):
            columns['image'].append(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()))
            columns['found'].append(draw_classes(image, predicted, K))
            columns['truth'].append(draw_classes(image, label, K))
        legend.update(legend_of(torch.cat((predictions, labels)), dataset.classes))
    return columns, legend


def classes_in(model, image, names, cfg, device):
    """A PIL image under what is predicted, and the legend."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    classes = predict(model, pixels[None].to(device), cfg)[0]
    return draw_classes(pixels, classes, len(names)), legend_of(classes, names)


# ---- what all heads share -----------------------------------------------------------------------

BOXES_ONLY = 'images', 'vocabulary', 'stages', 'window', 'soft'
MAPS_ONLY = 'classes', 'scales', 'flip'


def settle(cfg):
    """Refuses options of other heads; settles what was not given."""
    for name in MAPS_ONLY if cfg.head == 'boxes' else BOXES_ONLY:
        if getattr(cfg, name) != getattr(Config, name):
            raise Refused(f'--{name} is not an option of --head {cfg.head}')
    if cfg.adapter and cfg.head != 'mask2former':
        raise Refused('--adapter goes with --head mask2former')
    if cfg.freeze is None:
        cfg.freeze = cfg.head == 'linear' and bool(cfg.init)
    if not cfg.out_dir:
        cfg.out_dir = f'out/detect_seg-{cfg.size}'
        if cfg.head != 'boxes':
            cfg.out_dir += f'-{cfg.head}'


def open_dataset(cfg, split):
    """--data, for the head."""
    if cfg.head == 'boxes':
        return data.open_instances(cfg.data, split, cfg.images, cfg.scale_jitter, cfg.vocabulary)
    return data.open_maps(cfg.data, split, cfg.classes, cfg.scale_jitter, cfg.image_size)


def num_eval(cfg, dataset):
    return NUM_EVAL if cfg.data.partition(':')[0] == 'shapes' else len(dataset)


def start_vit(cfg, **options):
    """The ViT that training starts from: that of --init, which may be a CLIP's, or a new one."""
    drop_path = 0. if cfg.freeze else cfg.drop_path
    options.update(head=0, mask_token=False, drop_path=drop_path)
    if cfg.init:
        return M.load(cfg.init, M.ViT, **options)
    return M.init_weights(M.ViT(run.vit_config(cfg, **options)), cfg.seed)


def build(cfg, dataset):
    """The model that training starts from."""
    if cfg.head == 'boxes':
        model = new_detector(cfg, dataset)
    elif cfg.init and holds_segmenter(cfg.init):
        model = next_segmenter(cfg, len(dataset.classes))
    else:
        model = new_segmenter(cfg, len(dataset.classes))
    if cfg.freeze:
        model.vit.requires_grad_(False)
    return model


def normalize(model, batch):
    """The batch with images as the model sees them, float; padding is 0, the mean."""
    images = model.normalize(batch['images'])
    for image, (height, width) in zip(images, batch.get('sizes', [])):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return dict(batch, images=images)


def evaluate(model, dataset, cfg, device, num, rank=0, world=1):
    """Numbers in per cent of the first num validation images, of which each process looks at its part."""
    judge = judge_boxes if cfg.head == 'boxes' else judge_maps
    model.eval()
    with torch.no_grad(), run.gathered(model):
        metrics = judge(model, dataset, cfg, device, num, rank, world)
    model.train()
    return metrics


def draw_sheet(model, dataset, cfg, device):
    """The picture of a run: validation images, what was found, the truth."""
    show = show_boxes if cfg.head == 'boxes' else show_maps
    model.eval()
    columns, names = show(model, dataset, cfg, device)
    model.train()
    what = 'objects' if cfg.head == 'boxes' else 'classes'
    run.draw_sheet(f'{cfg.out_dir}/{what}.png', columns, TILE, names)


def class_colour(k):
    """A colour for each class, next to each other's unlike."""
    rgb = colorsys.hsv_to_rgb(k * .618034 % 1, (.9, .55, .75)[k % 3], (.9, 1., .6)[k // 3 % 3])
    return tuple(round(255 * x) for x in rgb)


def apply_model(cfg, device, rank, world):
    """--eval: the numbers of any model, ours or released; --image: what it finds in a picture."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    model = M.load(path, Detector if cfg.head == 'boxes' else Segmenter).to(device)
    if cfg.image_size == RECIPES[cfg.head][cfg.size]['image_size']:         # no other was asked for
        default = cfg.image_size if cfg.head == 'boxes' else model.vit.image_size
        cfg.image_size = model.extra.get('image_size', default)
    grid = cfg.image_size // model.vit.patch_size
    if model.config.vit.rel_pos not in (0, grid):
        stretch_distances(model.vit, (grid, grid))

    K = model.config.num_classes
    if cfg.eval:
        dataset = open_dataset(cfg, 'val')
        if len(dataset.classes) != K:
            raise Refused(f'{path} knows {K} classes, --data {cfg.data} has {len(dataset.classes)}')
        metrics = evaluate(model, dataset, cfg, device, num_eval(cfg, dataset), rank, world)
        run.report_broken(dataset)
        print0(run.table(metrics))
        return

    try:
        image = data.read_image(cfg.image)
    except OSError as error:
        raise Refused(f'--image {cfg.image} cannot be read ({M.first_line(error)})') from None
    names = model.extra.get('classes') or [str(k) for k in range(K)]
    apply = boxes_in if cfg.head == 'boxes' else classes_in
    picture, legend = apply(model, image, names, cfg, device)
    os.makedirs(cfg.out_dir, exist_ok=True)
    path = f'{cfg.out_dir}/{Path(cfg.image).stem}.found.png'
    run.draw_sheet(path, {'image': [image], 'found': [picture]}, 2 * TILE, legend)
    print0(path)


# ---- the loop -----------------------------------------------------------------------------------

def train(cfg):
    """Trains a head and its ViT; --eval and --image only apply one.
    Leaves model.pt, objects.png or classes.png, loss.png, log.jsonl and result.json."""
    rank, world, device, mesh = run.setup(cfg)
    settle(cfg)
    if cfg.eval or cfg.image:
        return apply_model(cfg, device, rank, world)

    # data, model, and where an earlier run stopped
    train_set = open_dataset(cfg, 'train')
    val_set = open_dataset(cfg, 'val')
    if run.finished(cfg):
        return
    run.settle_steps(cfg, train_set)
    model = build(cfg, train_set)
    if not cfg.freeze:
        run.check_memory(cfg, model.config.vit, device, world)
    model = run.to_device(model, cfg, device, mesh)
    optimizer = run.make_optimizer(model, cfg, cfg.layer_decay)
    for group in optimizer.param_groups:
        if cfg.head == 'linear' and group['lr_scale'] == 1:
            group['lr_scale'] = LINEAR_RATE
    start, constants = run.resume(cfg.out_dir, model, optimizer, cfg)

    K = len(train_set.classes)
    num = min(num_eval(cfg, val_set), max(8, cfg.steps * cfg.batch_size))
    print0(f'{cfg.head} on {cfg.size} from {cfg.init or "scratch"}: '
           f'{run.count_parameters(model) / 1e6:.2f}M parameters, {K} classes, '
           f'{cfg.image_size} px; {cfg.steps:,} steps of {cfg.batch_size} images on {device}')
    log = run.Log(cfg, start, device)
    batches = data.batches(
        train_set, cfg.batch_size, cfg.image_size, start, cfg.steps, cfg.seed, device,
        cfg.workers, rank=rank, world=world)
    share = cfg.batch_size // world

    for step, batch in zip(range(start, cfg.steps), batches):
        lr = run.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale']

        # random numbers are functions of an image's place in the run
        position = step * cfg.batch_size + rank * share + torch.arange(share)
        position = position.to(device)

        def draw(stream, num):
            return data.uniform(cfg.seed, stream, position, num)        # [B, num]

        drop = draw('drop', 2 * len(model.vit.blocks)).unflatten(1, (-1, 2))
        whole_batch = torch.tensor(step, device=device)
        batch['class_draw'] = data.uniform(cfg.seed, 'classes', whole_batch, K)     # LVIS, [K]

        # each loss is a mean over what counts in the global batch; FSDP takes the processes' mean
        with run.autocast(device):
            losses = model(normalize(model, batch), draw, drop)         # {name: (sum, count)}
        sums = torch.stack([part.float() for part, _ in losses.values()])
        counts = [torch.as_tensor(count, device=device).float() for _, count in losses.values()]
        counts = run.sum_over_processes(torch.stack(counts))
        loss = (sums / counts.clamp(min=1)).sum()
        (loss * world).backward()

        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        if log.is_finite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # log, save, evaluate
        if log.due(step):
            total = run.sum_over_processes(loss)
            log.write(step, loss=total, lr=lr, grad_norm=grad_norm)
        done = step + 1
        stopping = log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg, constants)
            if stopping:
                log.leave(done)
            draw_sheet(model, val_set, cfg, device)
            metrics = evaluate(model, val_set, cfg, device, min(num, 100), rank, world)
            log.say(step, **{name: metrics[name] for name in SAID if name in metrics})

    # what the run leaves behind, the weights first
    run.save_model(model, f'{cfg.out_dir}/model.pt', classes=train_set.classes, image_size=cfg.image_size)
    metrics = evaluate(model, val_set, cfg, device, num, rank, world)
    draw_sheet(model, val_set, cfg, device)
    log.finish(model, 'training loss', {}, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
