"""
Boxes and instance masks: the detector that EVA trained (arXiv:2211.07636, section 3.3), ViTDet (arXiv:2203.16527) with
Cascade Mask R-CNN, on our ViT. The data and COCO's and LVIS's average precision are in coco.py.

    python detect_seg.py --size micro --init eva.pt                    # laptop: the built-in world at 128 pixels
    python detect_seg.py --data bccd --init eva.pt                     # a folder with train.json, val.json and images
    python detect_seg.py --init out/detect_seg-micro/model.pt --image a.jpg
    torchrun --nproc_per_node=8 detect_seg.py --size g --data coco --init eva.pt
    python detect_seg.py --head linear --size micro --init eva.pt      # a class for every pixel: segment.py

Boxes are [x1, y1, x2, y2] in pixels; pixel i covers i to i + 1.
"""
import math
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import coco
import data
import model as M
import run
from coco import clip_boxes, has_area, pad_to
from model import print0
from run import option


@dataclass
class Config(run.Run):
    images: str = option('', "folder of the json's images, if they do not lie beside it")
    vocabulary: str = option('coarse', "of the built-in world: coarse (16 kinds) or fine (240, long-tailed, as LVIS)")
    stages: int = option(1, 'of the cascade; 1 is Mask R-CNN')
    channels: int = option(256, 'of the pyramid and the heads')
    hidden: int = option(1024, 'width of the box heads')
    proposals: int = option(1000, 'regions of an image that the box heads look at')
    num_boxes: int = option(512, 'those of them that the box heads learn from')
    jitter: tuple = option((.1, 2.), 'large-scale jitter: the image at so much of the size it fits at')
    window: int = option(0, 'patches along the side of an attention window; 0: all blocks are global')
    soft: bool = option(False, "test as EVA's published numbers: soft-NMS, and for masks scores times maskness")
    drop_path: float = option(0., 'chance of skipping a residual branch in the last block, growing linearly with depth')
    warmup_steps: int = option(50, 'steps of linear warm-up')
    drop_at: float = option(8 / 9, 'share of the steps after which the learning rate is a tenth')
    weight_decay: float = option(.1, 'of matrices; vectors and positions have none')
    layer_decay: float = option(.9, "each layer of the ViT learns at so much of the next one's rate")
    betas: tuple = option((.9, .999), "AdamW's")
    eps: float = option(1e-8, "AdamW's")
    grad_clip: float = option(1., 'largest global gradient norm')


SMALL = dict(image_size=128, patch_size=8, batch_size=8, steps=1500, lr=1e-3, channels=48, hidden=192, proposals=200,
             num_boxes=64, jitter=(.6, 1.4))
RECIPES = {  # differences from the defaults. g: EVA on COCO; for LVIS add --lr 2e-4 --steps 75000 --drop_at .9333
    'pico': SMALL, 'nano': SMALL, 'micro': SMALL, 'mini': SMALL, 'ti': SMALL,
    's': dict(image_size=512, batch_size=16, steps=45_000, lr=1e-4, stages=3, drop_path=.1),        # s, b, l: ours
    'b': dict(image_size=1024, batch_size=64, steps=45_000, lr=1e-4, stages=3, window=16, patch_size=16, drop_path=.1),
    'l': dict(image_size=1024, batch_size=64, steps=45_000, lr=1e-4, stages=3, window=16, patch_size=16, drop_path=.4),
    'g': dict(image_size=1280, batch_size=64, steps=45_000, lr=2.5e-5, stages=3, window=16, patch_size=16, drop_path=.6,
              warmup_steps=500),
}
NUM_EVAL = 500              # validation images of the built-in world; of others all
NUM_ASKED = 50              # classes that a batch of LVIS's kind is asked for

LARGEST_GROWTH = math.log(1000 / 16)        # of a box's side in one step: a wild prediction must not overflow


# ---- boxes ------------------------------------------------------------------------------------------------------

def box_area(boxes):
    """boxes [..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a, b):
    """Intersection over union of boxes a [n, 4] and b [m, 4]: [n, m], 0 where they share nothing (never 0 / 0)."""
    low, high = torch.maximum, torch.minimum
    x1, y1, x2, y2 = a.T[:, :, None]                                    # each [n, 1]
    left, top, right, bottom = b.T.contiguous()                         # each [m]
    shared = high(x2, right).sub_(low(x1, left)).clamp_(min=0)
    shared.mul_(high(y2, bottom).sub_(low(y1, top)).clamp_(min=0))
    union = (box_area(a)[:, None] + box_area(b)).sub_(shared)
    return shared.div_(union.clamp_(min=1e-30))


def encode_boxes(boxes, targets, weights):
    """How to get from boxes to targets, both [n, 4]: shift of the centre in widths and heights, log of the growth, each
    times its weight [4], so that all four are of order 1. arXiv:1311.2524."""
    size, goal = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, :2] + .5 * goal - boxes[:, :2] - .5 * size) / size
    return torch.cat((shift, (goal / size).log()), 1) * boxes.new_tensor(weights)


def decode_boxes(boxes, deltas, weights):
    """The inverse of encode_boxes. boxes [n, 4]; deltas [n, 4]."""
    size = boxes[:, 2:] - boxes[:, :2]
    shift, growth = (deltas / boxes.new_tensor(weights)).split(2, dim=1)
    centre = boxes[:, :2] + .5 * size + shift * size
    half = .5 * size * growth.clamp(max=LARGEST_GROWTH).exp()
    return torch.cat((centre - half, centre + half), 1)


def make_anchors(grids, strides, ratios=(.5, 1., 2.), sizes=None):
    """The boxes that the region proposals start from, a tensor [h * w * 3, 4] for each level: of these sizes, or 8
    strides, and ratios of height to width, centred on the top left corner of every cell. grids: each level's (h, w)."""
    levels = []
    for (h, w), stride, size in zip(grids, strides, sizes or [8 * stride for stride in strides]):
        width = torch.tensor([math.sqrt(size ** 2 / ratio) for ratio in ratios])
        half = torch.stack((width, width * torch.tensor(ratios)), 1) / 2                        # [3, 2]
        y, x = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing='ij')
        corner = torch.stack((x, y), 2).view(-1, 1, 2)                                          # [h * w, 1, 2]
        levels.append(torch.cat((corner - half, corner + half), 2).flatten(0, 1))
    return levels


def match(iou, thresholds, labels, low_quality=False):
    """Which target each box belongs to. iou [targets, boxes] -> index of its best target [boxes] (the first of equals)
    and its label [boxes]: labels[i] where thresholds[i - 1] <= best IoU < thresholds[i]. low_quality: a target's best
    boxes are positive whatever their IoU, and keep their own best target."""
    if not len(iou):
        return torch.zeros_like(iou.sum(0), dtype=torch.long), torch.full_like(iou.sum(0), labels[0], dtype=torch.long)
    best, index = iou.max(0)
    label = torch.bucketize(best, torch.tensor(thresholds, device=iou.device), right=True)
    label = torch.tensor(labels, device=iou.device)[label]
    if low_quality:
        label[(iou == iou.max(1, keepdim=True).values).any(0)] = 1
    return index, label


def sample(labels, num, positive_share, u):
    """At most num boxes of labels 1 and 0, of which at most num * positive_share are 1 (what positives lack, negatives
    fill): indices of positives and of negatives. labels [n]; u [n] random numbers, of which the lowest win."""
    order = u.argsort(stable=True)
    positive = order[labels[order] == 1][:int(num * positive_share)]
    return positive, order[labels[order] == 0][:num - len(positive)]


def nms(boxes, scores, threshold, classes=None, block=128):
    """Greedy non-maximum suppression: indices, best first, of the boxes that no better one of the same class overlaps
    by an IoU above the threshold. Of equal scores the lower index goes first. boxes [n, 4]; scores, classes [n]."""
    limit = np.float32(threshold)       # 3 / 10 is above .3 in float32, but .3 is rounded up as well: round it down
    limit = float(np.nextafter(limit, np.float32(-1)) if float(limit) > threshold else limit)

    def suppresses(i, j):
        over = pairwise_iou(boxes[i], boxes[j]) > limit
        return over if classes is None else over.logical_and_(classes[i, None] == classes[j])

    left, kept = scores.argsort(descending=True, stable=True), [scores.new_zeros(0, dtype=torch.long)]
    while len(left):
        first, left = left[:block], left[block:]
        over = suppresses(first, first).triu(1)         # [i, j]: j goes, if i stays
        keep, before = torch.ones_like(first, dtype=torch.bool), None
        while before is None or not torch.equal(keep, before):      # the greedy choice is the only fixed point
            keep, before = ~(over & keep[:, None]).any(0), keep
        kept.append(first[keep])
        left = left[~suppresses(first[keep], left).any(0)]
    return torch.cat(kept)


def soft_nms(boxes, scores, threshold=.6, min_score=1e-3, method='linear', sigma=.5):
    """Soft-NMS (arXiv:1704.04503) for all classes at once: the best box left is taken and lowers the scores of those it
    overlaps, until the best left is below min_score. linear: times 1 - IoU from the threshold on; gaussian: times
    exp(-IoU^2 / sigma); naive: times 0 from the threshold on. boxes [n, 4]; scores [K, n] -> new scores [K, n], 0 for
    boxes not taken. The very first is always taken."""
    iou, left, taken = pairwise_iou(boxes, boxes), scores.clone(), torch.zeros_like(scores)
    if method == 'gaussian':
        factor = (-iou ** 2 / sigma).exp()
    else:
        factor = torch.where(iou.double() >= threshold, 1 - iou if method == 'linear' else 0., 1.)
    for turn in range(scores.shape[1]):
        best, index = left.max(1)                                                   # [K]
        take = best >= min_score if turn else (best >= min_score) | (best == best.max()) & (best > 0)
        row = take.nonzero()[:, 0]
        if not len(row):
            break
        taken[row, index[row]] = best[row]
        left[row] *= factor[index[row]]
        left[row, index[row]] = -torch.inf
    return taken


def choose_detections(boxes, scores, image_size, threshold=.05, iou=.5, most=100, soft=None):
    """What is reported of one image: boxes [n, 4], scores [n] and classes [n], best first, and the row each came from.
    boxes [R, 4] for all classes; scores [R, K]. Pairs of a row and a class that score above the threshold go through
    NMS class by class, and the best `most` stay. With soft, a dict of soft_nms's options, all that it takes stay."""
    finite = boxes.isfinite().all(1) & scores.isfinite().all(1)
    boxes, scores = clip_boxes(boxes[finite], image_size), scores[finite]
    if soft is not None:
        taken = soft_nms(boxes, scores.T.where(scores.T > threshold, -torch.inf), **soft)      # [K, R]
        classes, rows = (taken > 0).nonzero(as_tuple=True)
        scores, order = taken[classes, rows].sort(descending=True, stable=True)
        classes, rows = classes[order], rows[order]
    else:
        rows, classes = (scores > threshold).nonzero(as_tuple=True)
        scores = scores[rows, classes]
        keep = nms(boxes[rows], scores, iou, classes)[:most]
        rows, classes, scores = rows[keep], classes[keep], scores[keep]
    return boxes[rows], scores, classes, rows


def choose_proposals(logits, deltas, anchors, image_size, before, after, threshold=.7):
    """One image's region proposals: the `before` best anchors of each level, moved and clipped, NMS within each level,
    the `after` best. logits [n], deltas [n, 4] and anchors [n, 4] by level -> boxes [m, 4], logits [m], best first."""
    boxes, scores, levels = [], [], []
    for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors)):
        score, index = logit.topk(min(before, len(logit)))
        boxes.append(decode_boxes(anchor[index], delta[index], (1., 1., 1., 1.)))
        scores.append(score)
        levels.append(torch.full_like(index, level))
    boxes, scores, levels = clip_boxes(torch.cat(boxes), image_size), torch.cat(scores), torch.cat(levels)
    index = has_area(boxes).nonzero()[:, 0]
    index = index[nms(boxes[index], scores[index], threshold, levels[index])[:after]]
    return boxes[index], scores[index]


def rpn_targets(anchors, targets, u, num=256, positive_share=.5):
    """What the region proposals of one image learn from. anchors [n, 4], targets [m, 4] -> labels [n] (1 object, 0
    none, -1 not asked) and the target box of each anchor [n, 4]; u [n] random numbers."""
    index, label = match(pairwise_iou(targets, anchors), (.3, .7), (0, -1, 1), low_quality=True)
    positive, negative = sample(label, num, positive_share, u)
    label = torch.full_like(label, -1)
    label[positive], label[negative] = 1, 0
    return label, targets[index] if len(targets) else torch.zeros_like(anchors)


def rpn_losses(logits, deltas, anchors, labels, targets):
    """Sums over the anchors asked: cross-entropy of what is an object, L1 of how the positive ones should move.
    logits and labels [B, n], deltas and targets [B, n, 4], anchors [n, 4]."""
    asked, positive = labels >= 0, labels == 1
    objectness = F.binary_cross_entropy_with_logits(logits[asked], labels[asked].to(logits), reduction='sum')
    goal = encode_boxes(anchors.expand_as(targets)[positive], targets[positive], (1., 1., 1., 1.))
    move = F.l1_loss(deltas[positive], goal, reduction='sum')
    return objectness, move


# ---- regions and masks ------------------------------------------------------------------------------------------

def bin_weights(start, end, out, size, ratio):
    """RoIAlign along one axis. Boxes from start to end [R], in units of cells whose centres are 0 to size - 1, fall
    into `out` bins; a bin's value is the mean of linear interpolations at evenly spaced points, as many as `ratio`, or
    one per cell begun if it is 0. -> begin and stop of the cells needed [R] and their weights [R, out, most cells]."""
    step = (end - start) / out
    num = torch.full_like(step, ratio) if ratio else step.ceil().clamp(min=0)                   # [R]
    points = torch.arange(max(1, int(num.max())) if len(num) else 1, device=start.device)
    bins = start[:, None] + torch.arange(out, device=start.device) * step[:, None]              # [R, out]
    at = bins[:, :, None] + ((points + .5) * step[:, None] / num.clamp(min=1)[:, None])[:, None]    # [R, out, points]
    used = (points < num[:, None])[:, None] & (at >= -1) & (at <= size)     # a cell beyond the map counts as 0
    at = at.clamp(0, size - 1)
    begin = torch.where(used, at, size - 1.).flatten(1).amin(1).floor()
    stop = torch.where(used, at, 0.).flatten(1).amax(1).floor() + 2
    stop = torch.maximum(stop.clamp(max=size), begin + 1)
    cells = begin[:, None] + torch.arange(int((stop - begin).max()) if len(num) else 1, device=start.device)
    hats = (1 - (at[..., None] - cells[:, None, None]).abs()).clamp_(min=0).mul_(used[..., None])
    return begin.long(), stop.long(), hats.sum(2) / num.clamp(min=1)[:, None, None]


class PoolBoxes(torch.autograd.Function):
    """rows @ window @ columns for each box: bilinear interpolation is separable, and so is its mean over a bin. Two
    small matrix products a box take half the time of visiting every point (a third on channels-last maps)."""

    @staticmethod
    def windows(image, y, x):
        """(box, image, its rows of the map, its columns) of every box. image [R]; y and x as bin_weights gives them."""
        places = zip(image.tolist(), y[0].tolist(), y[1].tolist(), x[0].tolist(), x[1].tolist())
        for n, (i, top, bottom, left, right) in enumerate(places):
            yield n, i, slice(top, bottom), slice(left, right)

    @staticmethod
    def forward(ctx, features, image, y, x):
        ctx.places, ctx.shape = (image, y, x), features.shape
        cells = features.permute(0, 2, 3, 1).contiguous()                               # [B, H, W, C]
        rows, columns = y[2], x[2]                                                      # each [R, out, cells]
        pooled = cells.new_empty(len(image), rows.shape[1], columns.shape[1], cells.shape[3])
        for n, i, tall, wide in PoolBoxes.windows(image, y, x):
            window = cells[i, tall, wide]                                               # [h, w, C]
            window = torch.matmul(columns[n, :, :window.shape[1]], window)              # [h, out, C]
            torch.mm(rows[n, :, :len(window)], window.flatten(1), out=pooled[n].flatten(1))
        return pooled.permute(0, 3, 1, 2)                                               # [R, C, out, out]

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.permute(0, 2, 3, 1).contiguous()                            # [R, out, out, C]
        image, y, x = ctx.places
        B, C, H, W = ctx.shape
        cells = gradient.new_zeros(B, H, W, C)
        for n, i, tall, wide in PoolBoxes.windows(image, y, x):
            window = y[2][n, :, :tall.stop - tall.start].T @ gradient[n].flatten(1)     # [h, out * C]
            window = window.view(-1, *gradient.shape[2:])                               # [h, out, C]
            cells[i, tall, wide] += torch.matmul(x[2][n, :, :wide.stop - wide.start].T, window)
        return cells.permute(0, 3, 1, 2), None, None, None


def roi_align(features, boxes, image, out, scale=1., ratio=0, aligned=True):
    """RoIAlign (arXiv:1703.06870): the map under each box in out x out bins, [R, C, out, out]. features [B, C, H, W];
    boxes [R, 4] in pixels, each scale cells of the map; image [R], which one of the batch. ratio: points in a bin along
    an axis, 0 adapts it to the box. aligned: cell i covers i to i + 1, as pixels do; without it, the way before
    detectron2, its value stands at i, and a box is at least one cell wide."""
    x1, y1, x2, y2 = (boxes.detach().float() * scale - .5 * aligned).unbind(1)
    if not aligned:
        x2, y2 = torch.maximum(x2, x1 + 1), torch.maximum(y2, y1 + 1)
    y = bin_weights(y1, y2, out, features.shape[2], ratio)
    x = bin_weights(x1, x2, out, features.shape[3], ratio)
    with torch.autocast(features.device.type, enabled=False):       # bfloat16 would misplace what is interpolated
        return PoolBoxes.apply(features.float(), image, y, x)


def box_levels(boxes, strides):
    """Which level of the pyramid each box is pooled from: the third (stride 16) from 14 of its strides (224 pixels)
    on, the next for each doubling of the side. boxes [n, 4] -> [n]. arXiv:1612.03144, which counts from level 2: sums
    near 4 are rounded so coarsely that a box a last digit short of a border is on it, whatever the processor's log2."""
    level = torch.floor(4 + torch.log2(box_area(boxes).sqrt() / (14 * strides[2]) + 1e-8))
    return (level - 2).clamp(0, len(strides) - 1).long()


def pool_boxes(pyramid, strides, boxes, out):
    """Features of every box, each from its own level. pyramid: maps [B, C, H, W], finest first; boxes: a tensor [n, 4]
    for each image -> [sum of n, C, out, out]."""
    image = torch.cat([torch.full((len(part),), i, device=part.device) for i, part in enumerate(boxes)])
    boxes = torch.cat(boxes)
    level = box_levels(boxes, strides)
    order, pooled = [], []
    for i, (features, stride) in enumerate(zip(pyramid, strides)):
        here = (level == i).nonzero()[:, 0]
        order.append(here)
        pooled.append(roi_align(features, boxes[here], image[here], out, 1 / stride))
    return torch.cat(pooled)[torch.cat(order).argsort()]


def paste_mask(mask, box, size):
    """A probability map [m, m] in its box [4] as part of an image of (height, width): [height, width]. A pixel takes
    the value at its centre; the map fades to 0 from half a cell inside its border to half a cell outside."""
    height, width = size
    x1, y1, x2, y2 = box.tolist()
    reach = .5 / mask.shape[-1]                     # half a cell, as a part of the box
    def centres(low, high, num):                    # pixels that the map reaches, and their places, -1 to 1 in the box
        begin = max(0, math.floor(low - reach * (high - low)))
        stop = max(begin, min(num, math.ceil(high + reach * (high - low))))
        return begin, stop, torch.arange(begin, stop, device=mask.device) + .5
    left, right, x = centres(x1, x2, width)
    top, bottom, y = centres(y1, y2, height)
    x, y = (x - box[0]) / (box[2] - box[0]) * 2 - 1, (y - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), 2)[None]
    canvas = mask.new_zeros(height, width)
    canvas[top:bottom, left:right] = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
    return canvas


def mask_targets(masks, boxes, size):
    """What the mask head should say: each object within its box, bool [n, size, size]. masks: an object's polygons
    [[x, y, ...], ...] or bool [H, W] each; boxes [n, 4]."""
    targets = []
    for mask, box in zip(masks, boxes):
        if isinstance(mask, list):
            corner, side = box[:2].numpy(), (box[2:] - box[:2]).clamp(min=.1).numpy()
            parts = [(np.reshape(part, (-1, 2)) - corner) * (size / side) for part in mask]
            targets.append(torch.from_numpy(coco.decode_mask(coco.fill_polygons(parts, (size, size)), (size, size))))
        else:
            cells = torch.as_tensor(mask, dtype=torch.float32)[None, None]
            first = torch.zeros(1, dtype=torch.long)
            targets.append(roi_align(cells, box[None].to(cells.device), first, size)[0, 0].cpu() >= .5)
    return torch.stack(targets) if targets else torch.zeros(0, size, size, dtype=torch.bool)


# ---- the detector -----------------------------------------------------------------------------------------------

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map [B, C, H, W]; what comes out lies in memory channels last."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormConv(nn.Conv2d):
    """A convolution without bias, then ChannelNorm."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(outputs, 1e-6)

    def forward(self, x):
        return self.norm(super().forward(x))


class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: maps at 4, 2, 1, 1/2 and 1/4 of the last map's scale, which is all that it
    sees; no activation at the end. [B, D, h, w] to a list of five [B, channels, ...], the finest first."""

    def __init__(self, width, channels):
        super().__init__()
        last = lambda width: (NormConv(width, channels, 1), NormConv(channels, channels, 3))
        up = lambda width: nn.ConvTranspose2d(width, width // 2, 2, 2)
        self.levels = nn.ModuleList((
            nn.Sequential(up(width), ChannelNorm(width // 2, 1e-6), nn.GELU(), up(width // 2), *last(width // 4)),
            nn.Sequential(up(width), *last(width // 2)),
            nn.Sequential(*last(width)),
            nn.Sequential(nn.MaxPool2d(2), *last(width))))

    def forward(self, x):
        levels = [level(x) for level in self.levels]
        return levels + [levels[-1][:, :, ::2, ::2]]


class Proposer(nn.Module):
    """The region proposal network (arXiv:1506.01497): is there an object at each anchor, and how should it move?"""

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
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
        return logits, deltas


class BoxHead(nn.Module):
    """One stage of the cascade: pooled features [n, C, 7, 7] to logits [n, K + 1], the background last, and one set of
    deltas for all classes [n, 4]."""

    def __init__(self, channels, hidden, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(NormConv(channels, channels, 3) for _ in range(4))
        self.fc = nn.Linear(channels * 49, hidden)
        self.classes = nn.Linear(hidden, num_classes + 1)
        self.deltas = nn.Linear(hidden, 4)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        x = self.fc(x.flatten(1)).relu()
        return self.classes(x).float(), self.deltas(x).float()


class MaskHead(nn.Module):
    """Pooled features [n, C, 14, 14] to a mask's logits for each class, [n, K, 28, 28]."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(NormConv(channels, channels, 3) for _ in range(4))
        self.up = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.classes = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return self.classes(self.up(x).relu()).float()


def label_boxes(boxes, target, iou, num_classes):
    """The class [n] (num_classes: background), box [n, 4] and index [n] of the object that each of boxes [n, 4] shows,
    by an IoU of at least `iou`. target: dict(boxes [m, 4], labels [m])."""
    index, label = match(pairwise_iou(target['boxes'], boxes), (iou,), (0, 1))
    if not len(target['boxes']):
        return torch.full_like(index, num_classes), torch.zeros_like(boxes), index
    return torch.where(label == 1, target['labels'][index], num_classes), target['boxes'][index], index


def class_loss(logits, labels, sigmoid=False, asked=None):
    """Sum over boxes of softmax's cross-entropy, or of one yes-or-no question for each class, of those `asked` only
    (bool [K]; LVIS). logits [n, K + 1]; labels [n], K is background."""
    if not sigmoid:
        return F.cross_entropy(logits, labels, reduction='sum')
    goal = F.one_hot(labels, logits.shape[1])[:, :-1].to(logits)
    loss = F.binary_cross_entropy_with_logits(logits[:, :-1], goal, reduction='none')
    return (loss if asked is None else loss * asked).sum()


def federated_classes(labels, weights, num, u):
    """Which classes a batch is asked for: those that are there and, up to `num` in all, others drawn without
    replacement by their weights (frequency^.5 in EVA); the background counts as one. labels [n], weights [K], u [K]
    uniform numbers -> bool [K]. The largest keys u^(1/w) are such a draw."""
    there = torch.zeros(len(weights) + 1, dtype=torch.bool, device=weights.device)
    there[labels] = True
    key = torch.where(there[:-1] | (weights <= 0), -torch.inf, u.double().log() / weights)
    drawn = key.topk(max(0, min(num - int(there.sum()), int((key > -torch.inf).sum())))).indices
    there[drawn] = True
    return there[:-1]


def box_loss(boxes, deltas, labels, goals, weights):
    """Sum over the boxes that are no background (label -1 here) of L1 on their encoded deltas. All [n, ...]."""
    positive = labels >= 0
    return F.l1_loss(deltas[positive], encode_boxes(boxes[positive], goals[positive], weights), reduction='sum')


def class_mask_loss(logits, labels, goals):
    """Sum over pixels of the cross-entropy of each box's mask, in the channel of its class. logits [n, K, m, m], labels
    [n], goals bool [n, m, m]."""
    logits = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(logits, goals.to(logits), reduction='sum')


class Detector(nn.Module):
    """ViTDet with Cascade Mask R-CNN (arXiv:1712.00726); one stage is Mask R-CNN (arXiv:1703.06870). vit: the config of
    the backbone, pool='map'. sigmoid: independent classes, as for LVIS. anchor_sizes: of the five levels, else 8 of
    their strides. before and after NMS: numbers of proposals in training and in testing."""

    def __init__(self, vit, num_classes, channels=256, hidden=1024, stages=3, sigmoid=False, anchor_sizes=None,
                 num_anchors=256, before=(2000, 1000), after=(1000, 1000), num_boxes=512, positive_share=.25):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        self.vit = M.ViT(**vit)
        patch = self.vit.patch_size
        if patch % 4:
            raise ValueError(f'patch_size {patch} is not a multiple of 4, as the finest level of the pyramid needs')
        self.strides = [patch // 4, patch // 2, patch, 2 * patch, 4 * patch]
        self.pyramid = Pyramid(vit['width'], channels)
        self.proposer = Proposer(channels)
        self.box_heads = nn.ModuleList(BoxHead(channels, hidden, num_classes) for _ in range(stages))
        self.mask_head = MaskHead(channels, num_classes)

    def normalize(self, images):
        return self.vit.normalize(images)

    def forward(self, images, sizes, targets=None, draw=None, drop=None, asked=None, **test):
        """images [B, 3, H, W], normalised and padded to multiples of the patch from their own (height, width) in sizes.
        With targets, dicts of boxes [n, 4], labels [n] and masks (see mask_targets), -> {loss: (sum, what to divide it
        by)}; draw(stream, num) gives random numbers [B, num], drop is ViT's. Without, what `detect` finds."""
        pyramid = self.pyramid(self.vit(images, drop=drop))
        anchors = [level.to(images.device) for level in make_anchors(
            [level.shape[2:] for level in pyramid], self.strides, sizes=self.config['anchor_sizes'])]
        logits, deltas = self.proposer(pyramid)
        training = targets is not None
        before, after = (self.config[name][0 if training else 1] for name in ('before', 'after'))
        with torch.no_grad():
            boxes = [choose_proposals([x[i] for x in logits], [x[i] for x in deltas], anchors, size, before, after)[0]
                     for i, size in enumerate(sizes)]
        if not training:
            return self.detect(pyramid[:4], boxes, sizes, **test)
        losses = self.proposal_losses(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), targets, draw)
        return losses | self.region_losses(pyramid[:4], boxes, sizes, targets, draw, asked)

    def proposal_losses(self, logits, deltas, anchors, targets, draw):
        num = self.config['num_anchors']
        u = draw('anchors', len(anchors))
        labels, goals = zip(*(rpn_targets(anchors, target['boxes'], u[i], num) for i, target in enumerate(targets)))
        objectness, move = rpn_losses(logits, deltas, anchors, torch.stack(labels), torch.stack(goals))
        return {'proposal_objectness': (objectness, num * len(targets)), 'proposal_boxes': (move, num * len(targets))}

    def stage(self, number, pyramid, boxes):
        """Logits [n, K + 1], deltas [n, 4] and what the deltas are times, of all images' boxes by one head."""
        pooled = pool_boxes(pyramid, self.strides[:4], boxes, 7)
        if pooled.requires_grad:        # every stage pulls at the same pyramid: their average does
            pooled.register_hook(lambda gradient: gradient / len(self.box_heads))
        return *self.box_heads[number](pooled), [weight * (1 + number) for weight in (10., 10., 5., 5.)]

    def refine(self, boxes, deltas, weights, sizes):
        """Each image's boxes, moved and clipped."""
        moved = decode_boxes(torch.cat(boxes), deltas.detach(), weights).split([len(part) for part in boxes])
        return [clip_boxes(part, size) for part, size in zip(moved, sizes)]

    def region_losses(self, pyramid, boxes, sizes, targets, draw, asked):
        """The heads' losses. Stage 0 sees a sample of proposals and the objects themselves, the next ones what it made
        of them, and asks for IoUs of .5, .6, .7."""
        K, losses = self.config['num_classes'], {}
        boxes = [torch.cat((part, target['boxes'])) for part, target in zip(boxes, targets)]
        u = draw('boxes', max(map(len, boxes)))
        for number in range(len(self.box_heads)):
            labelled = [label_boxes(part, target, .5 + .1 * number, K) for part, target in zip(boxes, targets)]
            if number == 0:
                chosen = [torch.cat(sample(torch.where(labels < K, 1, 0), self.config['num_boxes'],
                                           self.config['positive_share'], u[i, :len(labels)]))
                          for i, (labels, _, _) in enumerate(labelled)]
                boxes = [part[rows] for part, rows in zip(boxes, chosen)]
                labelled = [tuple(x[rows] for x in part) for part, rows in zip(labelled, chosen)]
                losses['masks'] = self.mask_loss(pyramid, boxes, labelled, targets)
            labels, goals = (torch.cat([part[i] for part in labelled]) for i in (0, 1))
            logits, deltas, weights = self.stage(number, pyramid, boxes)
            columns = asked(labels, draw) if asked else None
            losses[f'classes_{number}'] = class_loss(logits, labels, self.config['sigmoid'], columns), len(labels)
            foreground = torch.where(labels < K, labels, -1)
            losses[f'boxes_{number}'] = box_loss(torch.cat(boxes), deltas, foreground, goals, weights), len(labels)
            boxes = [part[has_area(part)] for part in self.refine(boxes, deltas, weights, sizes)]
        return losses

    def mask_loss(self, pyramid, boxes, labelled, targets):
        """Cross-entropy of the masks of the boxes that show an object, each in the channel of its class."""
        K, some, labels, goals = self.config['num_classes'], [], [], []
        for part, (label, _, index), target in zip(boxes, labelled, targets):
            rows = (label < K).nonzero()[:, 0]
            some.append(part[rows])
            labels.append(label[rows])
            goals.append(mask_targets([target['masks'][i] for i in index[rows].tolist()], part[rows].cpu(), 28))
        labels, goals = torch.cat(labels), torch.cat(goals).to(boxes[0].device)
        if not len(labels):         # every weight needs a gradient in every process: one box, counted zero times
            logits = self.mask_head(pool_boxes(pyramid, self.strides[:4], [boxes[0][:1]], 14))
            return 0 * logits.sum(), 0
        logits = self.mask_head(pool_boxes(pyramid, self.strides[:4], some, 14))
        return class_mask_loss(logits, labels, goals), goals.numel()

    def detect(self, pyramid, boxes, sizes, **options):
        """What is found in each image: dict(boxes [n, 4], scores [n], classes [n], masks [n, 28, 28] probabilities),
        best first. Scores are the stages' mean, boxes the last one's. options: choose_detections's."""
        scores, counts = 0, [len(part) for part in boxes]
        for number in range(len(self.box_heads)):
            logits, deltas, weights = self.stage(number, pyramid, boxes)
            scores = scores + (logits.sigmoid() if self.config['sigmoid'] else logits.softmax(1)) / len(self.box_heads)
            boxes = self.refine(boxes, deltas, weights, sizes)
        found = [choose_detections(part, score[:, :-1], size, **options)
                 for part, score, size in zip(boxes, scores.split(counts), sizes)]
        classes = torch.cat([part[2] for part in found])
        masks = self.mask_head(pool_boxes(pyramid, self.strides[:4], [part[0] for part in found], 14))
        masks = masks[torch.arange(len(classes), device=classes.device), classes].sigmoid()
        masks = masks.split([len(part[0]) for part in found])
        return [dict(boxes=part[0], scores=part[1], classes=part[2], masks=mask) for part, mask in zip(found, masks)]


def maskness(masks, threshold=.5):
    """How sure masks [n, m, m] are of themselves: the mean probability of the pixels above the threshold [n], by which
    EVA multiplies the scores when masks are judged."""
    inside = masks > threshold
    return (masks * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)


def to_original(found, size, original):
    """Detections on an image's original (height, width): boxes scaled, clipped and, if nothing is left, dropped."""
    scale = [n / m for n, m in zip(original, size)]
    boxes = clip_boxes(found['boxes'] * found['boxes'].new_tensor((scale[1], scale[0]) * 2), original)
    kept = has_area(boxes)
    return {name: x[kept] for name, x in dict(found, boxes=boxes).items()}


def spline(places, at):
    """Weights [m, n] of values at n places, in order, in the cubic spline through them at m others; the first two
    pieces are one polynomial, and the last two, which also go on outside ('not a knot'). float64."""
    n, h, value = len(places), np.diff(places), np.eye(len(places))
    slope, inner, system = np.diff(value, axis=0) / h[:, None], np.arange(1, n - 1), np.zeros((n, n))
    system[inner, inner - 1], system[inner, inner], system[inner, inner + 1] = h[:-1], 2 * (h[:-1] + h[1:]), h[1:]
    system[0, :3], system[-1, -3:] = (h[1], -h[0] - h[1], h[0]), (h[-1], -h[-2] - h[-1], h[-2])
    bend = np.linalg.solve(system, np.pad(6 * np.diff(slope, axis=0), ((1, 1), (0, 0))))        # second derivatives
    i = np.clip(np.searchsorted(places, at), 1, n - 1) - 1                                      # which piece
    t, width = (at - places[i])[:, None], h[i][:, None]
    first = slope[i] - width * (2 * bend[i] + bend[i + 1]) / 6
    return value[i] + t * first + t ** 2 * bend[i] / 2 + t ** 3 * (bend[i + 1] - bend[i]) / (6 * width)


@torch.no_grad()
def stretch_distances(vit, grid):
    """Makes the global blocks' tables of relative positions anew for a grid (h, w), EVA's way of testing at 1536 pixels
    (BEiT's): a spline through places that lie further apart the further they are from 0."""
    for block in vit.blocks:
        for name, side in zip(('rel_pos_h', 'rel_pos_w'), grid):
            table = getattr(block.attn, name)
            if not block.attn.window and len(table) != 2 * side - 1:
                far = np.cumsum(1.0903078 ** np.arange(len(table) // 2))            # 1, 1 + q, 1 + q + q^2, ...
                weights = spline(np.concatenate((-far[::-1], [0], far)), np.arange(1. - side, side))
                table = torch.from_numpy(weights).to(table.device) @ table.double()
                setattr(block.attn, name, nn.Parameter(table.float()))


# What the released detectors call our tensors: rules as in model.py, whose EVA blocks are used.
DETECTOR = M.under('backbone.net.', 'vit.', M.EVA + M.EVA_QKV + M.GELU_MLP + M.same(
    'blocks.*.attn.rel_pos_h', 'blocks.*.attn.rel_pos_w'))
for _i in range(4):
    DETECTOR += [(f'backbone.simfp_{_i + 2}.*.*', f'pyramid.levels.{_i}.*.*', 'same'),
                 (f'backbone.simfp_{_i + 2}.*.norm.*', f'pyramid.levels.{_i}.*.norm.*', 'same'),
                 (f'roi_heads.box_head.*.conv{_i + 1}.weight', f'box_heads.*.convs.{_i}.weight', 'same'),
                 (f'roi_heads.box_head.*.conv{_i + 1}.norm.*', f'box_heads.*.convs.{_i}.norm.*', 'same'),
                 (f'roi_heads.mask_head.mask_fcn{_i + 1}.weight', f'mask_head.convs.{_i}.weight', 'same'),
                 (f'roi_heads.mask_head.mask_fcn{_i + 1}.norm.*', f'mask_head.convs.{_i}.norm.*', 'same'),
                 (f'proposal_generator.rpn_head.conv.conv{_i}.*', f'proposer.convs.{_i}.*', 'same')]
DETECTOR += [('proposal_generator.rpn_head.objectness_logits.*', 'proposer.objectness.*', 'same'),
             ('proposal_generator.rpn_head.anchor_deltas.*', 'proposer.deltas.*', 'same'),
             ('roi_heads.box_head.*.fc1.*', 'box_heads.*.fc.*', 'same'),
             ('roi_heads.box_predictor.*.cls_score.*', 'box_heads.*.classes.*', 'same'),
             ('roi_heads.box_predictor.*.bbox_pred.*', 'box_heads.*.deltas.*', 'same'),
             ('roi_heads.box_predictor.*.fed_loss_cls_weights', '-', 'drop'),
             ('roi_heads.mask_head.deconv.*', 'mask_head.up.*', 'same'),
             ('roi_heads.mask_head.predictor.*', 'mask_head.classes.*', 'same')]
IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)        # the released detectors'


def detector_config(state, sigmoid):
    """What the tensors of a released detector, under our names, show. Their heads are 16, as EVA-g's."""
    shape = lambda name: state[name].shape
    depth = M.count_layers(state, 'vit.')
    tables = [(len(state[f'vit.blocks.{i}.attn.rel_pos_h']) + 1) // 2 for i in range(depth)]
    width, patch = shape('vit.patch_embed.weight')[0], shape('vit.patch_embed.weight')[-1]
    vit = dict(width=width, depth=depth, heads=width // shape('vit.blocks.0.attn.rel_pos_h')[1],
               mlp_width=shape('vit.blocks.0.mlp.fc1.weight')[0], patch_size=patch, mask_token=False, pool='map',
               image_size=patch * math.isqrt(shape('vit.pos_embed')[1] - 1), window=tables[0], rel_pos=max(tables),
               global_every=1 + tables.index(max(tables)), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    hidden, num_classes = shape('box_heads.0.fc.weight')[0], len(state['mask_head.classes.bias'])
    return dict(vit=vit, num_classes=num_classes, channels=len(state['proposer.convs.0.bias']), hidden=hidden,
                stages=len([name for name in state if name.endswith('fc.bias')]), sigmoid=sigmoid)


def load_detector(state, **changes):
    """A Detector in eval mode of a released detector's tensors; changes to its config may be given."""
    theirs = state.keys()
    state, _, _ = M.translate(state, DETECTOR)
    try:
        config = detector_config(state, any('fed_loss' in name for name in theirs)) | changes
    except (KeyError, IndexError) as error:
        raise ValueError(f'weights of a detector miss {M.original_name(str(error.args[0]), DETECTOR)}') from None
    with torch.device('meta'):
        model = Detector(**config)
    M.fill(model, state, (), DETECTOR, assign=True)
    return model.eval()


def open_instances(cfg, split):
    """--data -> coco.Scenes or coco.Instances."""
    if cfg.vocabulary not in ('coarse', 'fine'):
        raise ValueError(f'--vocabulary {cfg.vocabulary} is not one of coarse, fine')
    if len(cfg.jitter) != 2 or not 0 < cfg.jitter[0] <= cfg.jitter[1]:
        raise ValueError(f'--jitter {cfg.jitter} are not two shares of the size, the smaller first')
    if cfg.data.partition(':')[0] == 'shapes':
        return coco.Scenes(data.open_data(cfg.data, split), cfg.vocabulary)
    return coco.Instances(cfg.data, split, cfg.images, cfg.jitter)


# ---- measuring and looking --------------------------------------------------------------------------------------

def prepare(model, images, sizes):
    """uint8 [B, 3, S, S] as the model sees them; the padding is 0, the mean."""
    images = model.normalize(images)
    for image, (height, width) in zip(images, sizes):
        image[:, height:], image[:, :, width:] = 0, 0
    return images


def ways_of_testing(cfg, lvis):
    """How detections are chosen: COCO's or LVIS's usual numbers; with --soft those of EVA's published results."""
    if lvis:
        return dict(threshold=.001, most=1000) if cfg.soft else dict(threshold=.02, most=300)
    return dict(threshold=0., soft=dict(method='linear', threshold=.6)) if cfg.soft else dict(threshold=.05, most=100)


@torch.no_grad()
def find(model, batch, originals, options, device):
    """What is found in a batch, on images of their original (height, width): dicts as of Detector.detect, and `pasted`,
    the masks as a list of bool [height, width]."""
    with run.autocast(device):
        found = model(prepare(model, batch['images'], batch['sizes']), batch['sizes'], **options)
    found = [to_original(part, size, original) for part, size, original in zip(found, batch['sizes'], originals)]
    paste = lambda part, size: [paste_mask(mask, box, size) >= .5 for mask, box in zip(part['masks'], part['boxes'])]
    return [dict(part, pasted=paste(part, original)) for part, original in zip(found, originals)]


def result_rows(found, image, categories):
    """Detections as rows of COCO's results."""
    return [dict(image_id=image, category_id=categories[label]['id'], score=score, mask_score=score * sure,
                 bbox=[x1, y1, x2 - x1, y2 - y1], segmentation=dict(counts=coco.encode_mask(mask.cpu())))
            for (x1, y1, x2, y2), score, label, mask, sure in zip(
                found['boxes'].tolist(), found['scores'].tolist(), found['classes'].tolist(), found['pasted'],
                maskness(found['masks']).tolist())]


def evaluate(model, dataset, cfg, device, num, rank=0, world=1):
    """AP of boxes and masks of the first num validation images, in per cent. Each process looks at its part of them."""
    seen, options = {}, ways_of_testing(cfg, dataset.lvis)
    batches = data.eval_batches(dataset, math.ceil(cfg.batch_size / world / 2), cfg.image_size, num, device,
                                cfg.workers, rank=rank, world=world)
    with run.gathered(model):
        for batch in batches:
            truth = dataset.truth(batch)
            originals = [(image['height'], image['width']) for image, _ in truth]
            for n, found in enumerate(find(model, batch, originals, options, device)):
                if batch['position'][n] < num:          # later ones fill the last process's part
                    image, rows = truth[n]
                    seen[image['id']] = image, rows, result_rows(found, image['id'], dataset.categories)
    images, rows, results = zip(*dict(run.all_rows([*seen.items()])).values())
    flat = lambda lists: [row for part in lists for row in part]
    truth, results = dict(images=images, annotations=flat(rows), categories=dataset.categories), flat(results)
    most, metrics = (300,) if dataset.lvis else (1, 10, 100), {}
    by_mask = [dict(row, score=row['mask_score']) for row in results] if cfg.soft else results
    for kind, rows, name in (('bbox', results, 'box'), ('segm', by_mask, 'mask')):
        numbers = percent(coco.average_precision(truth, rows, kind, most))
        metrics |= {f'{name}_{key}': value for key, value in numbers.items()}
    return metrics | vocabulary_gap(truth, results, dataset.coarse, metrics['box_ap']) if dataset.coarse else metrics


def percent(numbers):
    """average_precision's numbers as they are printed; -1, of nothing, stays."""
    return {name.lower(): max(-1., 100 * value) for name, value in numbers.items() if name != 'per_category'}


def vocabulary_gap(truth, results, coarse, fine_ap):
    """What many classes cost: the AP of the same boxes once their classes count as coarse ones, and without classes;
    gap is 1 - fine / coarse. EVA, section 3.3, where LVIS is fine and COCO coarse. coarse: each class's coarse one."""
    metrics = {}
    for name, group in (('coarse', coarse), ('one_class', [0] * len(coarse))):
        again = lambda rows: [dict(row, category_id=group[row['category_id']]) for row in rows]
        categories = [dict(id=k) for k in sorted(set(group))]
        mapped = dict(truth, annotations=again(truth['annotations']), categories=categories)
        metrics[f'box_ap_{name}'] = percent(coco.average_precision(mapped, again(results)))['ap']
    return dict(metrics, gap=1 - fine_ap / metrics['box_ap_coarse'] if metrics['box_ap_coarse'] > 0 else -1.)


COLOURS = ((230, 60, 50), (40, 120, 220), (50, 170, 80), (240, 160, 30), (150, 80, 190), (30, 180, 190), (220, 90, 160))


def draw_objects(image, boxes, labels, masks, words, side):
    """A PIL image of uint8 [3, H, W] with masks (bool [H, W] each), boxes and words, at least `side` large."""
    pixels = image.permute(1, 2, 0).cpu().float()
    for label, mask in zip(labels, masks):
        colour = pixels.new_tensor(COLOURS[label % len(COLOURS)])
        pixels = torch.where(mask.cpu()[..., None], .55 * pixels + .45 * colour, pixels)
    picture = Image.fromarray(pixels.byte().numpy())
    scale = max(1., side / max(picture.size))
    picture = picture.resize([round(n * scale) for n in picture.size], Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for box, label, word in zip(boxes, labels, words):
        x1, y1, x2, y2 = [n * scale for n in box]
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=COLOURS[label % len(COLOURS)], width=2)
        draw.text((x1 + 3, y1 + 1), word, fill='white', font=font, stroke_width=2, stroke_fill='black')
    return picture


def draw_found(image, found, classes, side, threshold=.5):
    """draw_objects of what was found with at least this score."""
    rows = (found['scores'] >= threshold).nonzero()[:, 0].tolist()
    labels = found['classes'][rows].tolist()
    words = [f'{classes[label]} {score:.2f}' for label, score in zip(labels, found['scores'][rows].tolist())]
    return draw_objects(image, found['boxes'][rows].tolist(), labels, [found['pasted'][i] for i in rows], words, side)


def draw_sheet(path, model, dataset, cfg, device, num=6, tile=320):
    """A picture of validation images: the truth above what was found."""
    batch = next(iter(data.eval_batches(dataset, num, cfg.image_size, num, device)))
    found = find(model, batch, batch['sizes'], ways_of_testing(cfg, dataset.lvis), device)
    columns = []
    for n, (image, size, target) in enumerate(zip(batch['images'], batch['sizes'], batch['targets'])):
        image, labels = image[:, :size[0], :size[1]], target['labels'].tolist()
        filled = lambda mask: torch.from_numpy(coco.decode_mask(coco.fill_polygons(mask, size), size))
        masks = [filled(mask) if isinstance(mask, list) else mask for mask in target['masks']]
        truth = draw_objects(image, target['boxes'].tolist(), labels, masks, [dataset.classes[k] for k in labels], tile)
        columns.append((truth, draw_found(image, found[n], dataset.classes, tile)))
        for picture in columns[-1]:
            picture.thumbnail((tile, tile))
    height = max(picture.height for column in columns for picture in column)
    sheet = Image.new('RGB', (len(found) * (tile + 6) + 6, 2 * (height + 6) + 6), 'white')
    for n, column in enumerate(columns):
        for y, picture in enumerate(column):
            sheet.paste(picture, (6 + n * (tile + 6), 6 + y * (height + 6)))
    run.on_first(sheet.save, path)


# ---- the loop ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def init_heads(model, seed=0):
    """First values of all but the ViT, a function of the seed; returns the model. detectron2's: He's where a ReLU
    follows, small where something is predicted. Independent classes start improbable, at .01."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and not name.startswith('vit'):
            fan_in = len(layer.weight) if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
            std = (.01 if 'proposer' in name else .001 if name.endswith('deltas') or name == 'mask_head.classes' else
                   .01 if name.endswith('classes') else (2 / fan_in) ** .5)
            layer.weight.normal_(0, std, generator=generator)
            if layer.bias is not None:
                improbable = model.config['sigmoid'] and name.startswith('box') and name.endswith('classes')
                layer.bias.fill_(math.log(.01 / .99) if improbable else 0)
    return model


def build(cfg, dataset):
    """The detector that training starts from: its ViT is --init's, or new."""
    options = dict(pool='map', mask_token=False, head=0, window=cfg.window, drop_path=cfg.drop_path)
    patch_size = cfg.patch_size or M.SIZES[cfg.size]['patch_size']
    M.check_grid(cfg.image_size, cfg.image_size, patch_size)
    if cfg.window:
        options['rel_pos'] = cfg.image_size // patch_size
    start = cfg.init not in ('', 'scratch')
    if start:           # its position table stays, and is resized at every step
        vit = M.load(cfg.init, M.ViT, patch_size=patch_size, **options)
    else:
        vit = M.init_weights(M.ViT(**run.size_config(cfg, **options)), cfg.seed)
    model = Detector(vit.config, len(dataset.classes), cfg.channels, cfg.hidden, cfg.stages, dataset.lvis,
                     num_boxes=cfg.num_boxes, before=(2 * cfg.proposals, cfg.proposals), after=(cfg.proposals,) * 2)
    model.vit.load_state_dict(vit.state_dict())
    if start:           # EVA keeps the patch embedding as it was pre-trained
        model.vit.patch_embed.requires_grad_(False)
    return init_heads(model, cfg.seed)


def num_eval(dataset):
    return NUM_EVAL if isinstance(dataset, coco.Scenes) else len(dataset)


def lr_at(step, cfg):
    """Linear up in warmup_steps, then constant, then a tenth."""
    return cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps)) * (.1 if step >= cfg.drop_at * cfg.steps else 1)


def look(cfg, device, rank, world):
    """--eval: AP of any detector; --image: what it finds in a picture."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    model = M.load_as(Detector, load_detector, path).to(device)
    if cfg.image_size == RECIPES[cfg.size]['image_size']:       # no other was asked for
        cfg.image_size = model.extra.get('image_size', cfg.image_size)
    grid, learnt = cfg.image_size // model.vit.patch_size, model.config['vit'].get('rel_pos', 0)
    if learnt not in (0, grid):
        stretch_distances(model.vit, (grid, grid))
    if cfg.eval:
        dataset, K = open_instances(cfg, 'val'), model.config['num_classes']
        if len(dataset.classes) != K:
            raise ValueError(f'{path} knows {K} classes, --data {cfg.data} has {len(dataset.classes)}')
        return print0(run.table(evaluate(model, dataset, cfg, device, num_eval(dataset), rank, world)))
    image = data.read_image(cfg.image)
    original, S = (image.height, image.width), cfg.image_size
    size = tuple(max(1, round(n * S / max(original))) for n in original)
    pixels = torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))).permute(2, 0, 1)
    batch = dict(images=pad_to(pixels, S)[None].to(device), sizes=[size])
    found = find(model, batch, [original], ways_of_testing(cfg, model.config['sigmoid']), device)[0]
    classes = model.extra.get('classes') or [str(k) for k in range(model.config['num_classes'])]
    os.makedirs(cfg.out_dir, exist_ok=True)
    path = f'{cfg.out_dir}/{Path(cfg.image).stem}.objects.png'
    draw_found(torch.from_numpy(np.array(image)).permute(2, 0, 1), found, classes, 640).save(path)
    print0(path)


def train(cfg):
    """Trains a detector; leaves model.pt, objects.png, loss.png, log.jsonl and result.json. --eval and --image only
    look."""
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/detect_seg-{cfg.size}'
    if cfg.plan:
        vit = run.size_config(cfg, drop_path=cfg.drop_path, head=0, mask_token=False)
        with torch.device('meta'):
            heads = Detector(dict(vit, pool='map'), 80, cfg.channels, cfg.hidden, cfg.stages)
        heads = run.count_parameters(heads) - run.count_parameters(heads.vit)
        print0(f'the ViT alone, with global blocks; pyramid and heads of 80 classes add {heads:,} parameters')
        return run.costs('plan', cfg, vit, device)
    if cfg.bench:
        return runpy.run_path(Path(__file__).resolve().parent / 'assets' / 'bench_detect.py')['bench']()
    if cfg.eval or cfg.image:
        return look(cfg, device, rank, world)
    if cfg.micro_batch:
        raise ValueError('--micro_batch: losses are divided by numbers that are known once the whole batch has been '
                         'seen; use more processes or --checkpoint_activations')
    train_set, val_set = open_instances(cfg, 'train'), open_instances(cfg, 'val')
    if run.finished(cfg):
        return
    run.settle_steps(cfg, train_set)
    model = run.to_device(build(cfg, train_set), cfg, device, mesh)
    optimizer = run.make_optimizer(model, cfg, cfg.layer_decay)
    start, constants = run.resume(cfg.out_dir, model, optimizer, cfg)
    num = min(num_eval(val_set), max(8, cfg.steps * cfg.batch_size))
    weights, K = train_set.frequencies().sqrt().to(device), len(train_set.classes)
    print0(f'EVA {cfg.size}: {run.count_parameters(model) / 1e6:.2f}M parameters, {K} classes, {cfg.image_size} px; '
           f'{cfg.steps:,} steps of {cfg.batch_size} images on {device}')
    log = run.Log(cfg, start, device)
    batches = data.batches(train_set, cfg.batch_size, cfg.image_size, start, cfg.steps, cfg.seed, device, cfg.workers,
                           rank=rank, world=world)
    share = cfg.batch_size // world
    for step, batch in zip(range(start, cfg.steps), batches):
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, cfg) * group['lr_scale']
        position = step * cfg.batch_size + rank * share + torch.arange(share)
        draw = lambda stream, num: data.uniform(cfg.seed, stream, position.to(device), num)             # [B, num]
        asked = None
        if train_set.lvis:      # each process asks for its own labels' classes and the first of the same draw
            u = data.uniform(cfg.seed, 'classes', torch.tensor(step, device=device), K)
            asked = lambda labels, draw: federated_classes(labels, weights, NUM_ASKED, u)
        drop = draw('drop', 2 * len(model.vit.blocks)).unflatten(1, (-1, 2))
        targets = [{name: x.to(device) if torch.is_tensor(x) else x for name, x in target.items()}
                   for target in batch['targets']]
        with run.autocast(device):
            losses = model(prepare(model, batch['images'], batch['sizes']), batch['sizes'], targets, draw, drop, asked)
        sums = torch.stack([part.float() for part, _ in losses.values()])
        counts = torch.tensor([count for _, count in losses.values()], dtype=torch.float32, device=device)
        loss = (sums / run.total(counts).clamp(min=1)).sum()        # each a mean over the whole batch, all processes
        (loss * world).backward()
        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        if log.is_finite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if log.due(step):
            log.write(step, loss=run.total(loss), lr=lr_at(step, cfg), grad_norm=grad_norm)
        done, stopping = step + 1, log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg, constants)
            if stopping:
                log.leave(done)
            draw_sheet(f'{cfg.out_dir}/objects.png', model, val_set, cfg, device)
            metrics = evaluate(model, val_set, cfg, device, min(num, 100), rank, world)
            log.say(step, **{name: metrics[name] for name in ('box_ap', 'box_ap50', 'mask_ap', 'mask_ap50')})

    metrics = evaluate(model, val_set, cfg, device, num, rank, world)
    run.save_model(model, f'{cfg.out_dir}/model.pt', classes=train_set.classes, image_size=cfg.image_size)
    draw_sheet(f'{cfg.out_dir}/objects.png', model, val_set, cfg, device)
    log.finish(model, 'training loss', {}, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    if any(word.split('=')[0] == '--head' for word in sys.argv):        # linear or mask2former: semantic segmentation
        import segment
        run.main(segment.train, segment.Config, segment.RECIPES)
    else:
        run.main(train, Config, RECIPES)
