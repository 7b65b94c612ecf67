"""
Boxes and instance masks: what detection is computed with, and how it is measured. The conventions are those of the
detector that EVA trained (arXiv:2211.07636, section 3.3): ViTDet (arXiv:2203.16527) with a Cascade Mask R-CNN.

    python detect_seg.py --bench                           # seconds that its slow parts take on this machine

Boxes are [x1, y1, x2, y2] in pixels; pixel i covers i to i + 1, so a width is x2 - x1 and no 1 is ever added.
"""
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
from model import print0

LARGEST_GROWTH = math.log(1000 / 16)        # of a box's side in one step: a wild prediction must not overflow
COCO_IOUS = np.linspace(.5, .95, 10)        # an average precision is the mean over these
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS = {'': (0, 1e10), 's': (0, 32 ** 2), 'm': (32 ** 2, 96 ** 2), 'l': (96 ** 2, 1e10)}     # ends included


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


def clip_boxes(boxes, image_size):
    """boxes [..., 4] cut at the borders of an image of (height, width)."""
    height, width = image_size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor((width, height, width, height)))


def has_area(boxes):
    """boxes [n, 4] -> [n] bool."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def make_anchors(grids, strides, ratios=(.5, 1., 2.)):
    """The boxes that the region proposals start from, a tensor [h * w * 3, 4] for each level: 8 strides wide, of these
    ratios of height to width, centred on the top left corner of every cell. grids: (h, w) of each level."""
    levels = []
    for (h, w), stride in zip(grids, strides):
        width = torch.tensor([math.sqrt((8 * stride) ** 2 / ratio) for ratio in ratios])
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


def rpn_losses(logits, deltas, anchors, labels, targets, num=256):
    """Cross-entropy of what is an object, L1 of how the positive anchors should move; both are divided by the number of
    anchors that may be asked. logits [B, n], deltas [B, n, 4], anchors [n, 4], labels [B, n], targets [B, n, 4]."""
    asked, positive = labels >= 0, labels == 1
    objectness = F.binary_cross_entropy_with_logits(logits[asked], labels[asked].to(logits), reduction='sum')
    goal = encode_boxes(anchors.expand_as(targets)[positive], targets[positive], (1., 1., 1., 1.))
    move = F.l1_loss(deltas[positive], goal, reduction='sum')
    return objectness / (num * len(labels)), move / (num * len(labels))


# ---- regions of feature maps ------------------------------------------------------------------------------------

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
    return PoolBoxes.apply(features.float(), image, y, x)


def box_levels(boxes, strides):
    """Which level of the pyramid each box is pooled from: the third (stride 16) from 14 of its strides (224 pixels)
    on, the next for each doubling of the side. boxes [n, 4] -> [n]. arXiv:1612.03144."""
    level = torch.floor(2 + torch.log2(box_area(boxes).sqrt() / (14 * strides[2]) + 1e-8))
    return level.clamp(0, len(strides) - 1).long()


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


# ---- masks ------------------------------------------------------------------------------------------------------
# A mask is kept as COCO does: the lengths of its runs down the columns, starting with one, perhaps empty, of zeros.

def encode_mask(mask):
    """mask bool [H, W] -> run lengths."""
    flat = np.asarray(mask, dtype=bool).T.ravel()
    return edges_to_runs(np.flatnonzero(np.diff(flat, prepend=False)), flat.size)


def decode_mask(runs, size):
    """Run lengths -> bool [H, W]."""
    height, width = size
    return (np.repeat(np.arange(len(runs)) % 2 == 1, runs)).reshape(width, height).T


def edges_to_runs(edges, total):
    """Places where a mask of `total` pixels changes, in order -> run lengths; only the first may be empty."""
    return np.diff(edges[edges < total], prepend=0, append=total)


def runs_to_string(runs):
    """COCO's compressed form: from the fourth on, a run's difference to the one two earlier; each number in groups of
    5 bits, lowest first, with a sixth bit where more follow, plus 48 as ASCII."""
    text, runs = [], np.asarray(runs).tolist()
    for i, value in enumerate(runs):
        value -= runs[i - 2] if i > 2 else 0
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)        # the highest group's bit 16 is the sign
            text.append(chr(48 + bits + 32 * more))
    return ''.join(text)


def string_to_runs(text):
    """The inverse of runs_to_string."""
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes < 32)                               # of each number
    first = np.concatenate(([0], last[:-1] + 1))
    place = 5 * (np.arange(len(codes)) - np.repeat(first, last - first + 1))
    numbers = np.add.reduceat((codes & 31) << place, first)
    numbers -= np.where(codes[last] & 16, 1 << (place[last] + 5), 0)
    numbers[1::2], numbers[2::2] = numbers[1::2].cumsum(), numbers[2::2].cumsum()
    return numbers


def merge_masks(masks, at_least=1):
    """Where at least so many of these masks are set: 1 gives the union, len(masks) the intersection."""
    ends = np.concatenate([np.cumsum(runs) for runs in masks])
    change = np.concatenate([1 - 2 * (np.arange(len(runs)) % 2) for runs in masks])     # after a run of zeros it rises
    order = np.argsort(ends, kind='stable')
    ends, depth = ends[order], np.cumsum(change[order])
    last = np.append(ends[1:] != ends[:-1], True)                   # of those at the same place
    ends, inside = ends[last], depth[last] >= at_least
    return edges_to_runs(ends[np.diff(inside, prepend=False)], int(masks[0].sum()))


def mask_area(runs):
    return int(runs[1::2].sum())


def mask_box(runs, height):
    """The box around a mask, [x1, y1, x2, y2]; zeros if it is empty."""
    ends = np.cumsum(runs)
    start, stop = ends[:-1:2], ends[1::2]                           # of the runs of ones
    start, stop = start[stop > start], stop[stop > start] - 1       # both inside
    if not len(start):
        return np.zeros(4)
    split = start // height != stop // height                       # such a run passes the bottom and the top
    return np.array([start[0] // height, np.where(split, 0, start % height).min(),
                     stop[-1] // height + 1, np.where(split, height - 1, stop % height).max() + 1], dtype=np.float64)


def fill_polygon(points, size):
    """Run lengths of a polygon, bit for bit as COCO's tools fill it. points [n, 2] (x, y); size (height, width). The
    outline is walked in fifths of a pixel; where it passes the middle of a column of pixels, the fill below changes."""
    height, width = size
    here = (5 * np.asarray(points, dtype=np.float64).reshape(-1, 2) + .5).astype(np.int64)      # truncates, as C does
    there = np.roll(here, -1, axis=0)
    span = abs(there - here)                                        # [n, 2]
    flip = np.where(span[:, 0] >= span[:, 1], here[:, 0] > there[:, 0], here[:, 1] > there[:, 1])
    low, high = np.where(flip[:, None], there, here), np.where(flip[:, None], here, there)
    steps = span.max(1)                                             # one place a fifth along the longer side
    slope = (high - low) / np.maximum(steps, 1)[:, None]
    edge = np.repeat(np.arange(len(here)), steps + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    step = np.where(flip[edge], steps[edge] - step, step)
    x, y = (low[edge] + slope[edge] * step[:, None] + .5).astype(np.int64).T
    turn = np.flatnonzero(x[1:] != x[:-1])
    x, y = np.minimum(x[turn], x[turn + 1]), np.minimum(y[turn], y[turn + 1])
    middle = (x % 5 == 2) & (x >= 0) & (x < 5 * width)
    x, y = x[middle] // 5, np.clip(-((2 - y[middle]) // 5), 0, height)      # y: the first pixel whose middle is below
    places, times = np.unique(x * height + y, return_counts=True)
    return edges_to_runs(places[times % 2 == 1], height * width)    # twice is not at all


def fill_polygons(polygons, size):
    """The union of an object's parts, each [x, y, x, y, ...]."""
    return merge_masks([fill_polygon(part, size) for part in polygons])


def read_segmentation(segmentation, size):
    """Run lengths of what a COCO json holds: polygons, or RLE with its counts as a list or compressed to a string."""
    if isinstance(segmentation, list):
        return fill_polygons(segmentation, size)
    counts = segmentation['counts']
    return string_to_runs(counts) if isinstance(counts, str) else np.array(counts)


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
            targets.append(torch.from_numpy(decode_mask(fill_polygons(parts, (size, size)), (size, size))))
        else:
            cells = torch.as_tensor(mask, dtype=torch.float32)[None, None]
            targets.append(roi_align(cells, box[None], torch.zeros(1, dtype=torch.long), size)[0, 0] >= .5)
    return torch.stack(targets) if targets else torch.zeros(0, size, size, dtype=torch.bool)


# ---- average precision ------------------------------------------------------------------------------------------

def overlap_boxes(a, b, crowd):
    """IoU of detections a [n, 4] and objects b [m, 4], both (x, y, width, height): [n, m]. A crowd's union is the
    detection alone, as it need not cover the whole crowd. crowd bool [m]."""
    shared = np.minimum(a[:, None, :2] + a[:, None, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    shared = shared.clip(0).prod(2)
    area = (a[:, 2] * a[:, 3])[:, None]
    union = np.where(crowd, area, area + b[:, 2] * b[:, 3] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def overlap_masks(a, b, crowd):
    """The same of masks, lists of run lengths. An object's pixels up to a place are a polygon through its runs' ends,
    so what lies between two places, a detection's run, is the difference of two interpolations."""
    ends = [np.cumsum(runs[:len(runs) // 2 * 2]) for runs in a]         # where a run of ones begins, ends, begins, ...
    places = np.concatenate([*ends, [0]])                               # the 0 keeps reduceat's last start inside
    starts = np.cumsum([0] + [len(part) for part in ends])[:-1]
    sign = np.where(np.arange(len(places)) % 2, 1., -1.)                # every part has an even length
    shared = np.zeros((len(a), len(b)))
    for j, runs in enumerate(b):
        so_far = np.cumsum(runs * (np.arange(len(runs)) % 2))
        counts = np.interp(places, np.cumsum(runs), so_far) * sign
        shared[:, j] = np.add.reduceat(counts, starts)
    shared[[len(part) == 0 for part in ends]] = 0                       # an empty sum: reduceat gives one entry instead
    area = np.array([mask_area(runs) for runs in a])[:, None]
    union = np.where(crowd, area, area + np.array([mask_area(runs) for runs in b]) - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def match_detections(iou, ignored, crowd):
    """Which detections, best first, find an object: for every range of areas A and every threshold T the best object
    left goes, the last of equals, and one that does not count only where no other fits. Crowds are never used up.
    iou [n, m]; ignored bool [A, m]; crowd bool [m] -> bool [n, A, T]: found, and found one that does not count."""
    n, m = iou.shape
    found, void = np.zeros((2, n, len(ignored), len(COCO_IOUS)), dtype=bool)
    free = np.ones((len(ignored), len(COCO_IOUS), m), dtype=bool)
    thresholds, places = np.minimum(COCO_IOUS, 1 - 1e-10)[:, None], np.arange(m)
    for i in np.flatnonzero((iou >= COCO_IOUS[0]).any(1)):
        fits = free & (iou[i] >= thresholds)                                            # [A, T, m]
        counting = fits & ~ignored[:, None]
        counts = counting.any(2)
        fits = np.where(counts[..., None], counting, fits)
        best = m - 1 - np.where(fits, iou[i], -1)[..., ::-1].argmax(2)                  # [A, T]
        found[i] = fits.any(2)
        void[i] = found[i] & ~counts
        free &= ~found[i][..., None] | (places != best[..., None]) | crowd
    return found, void


def place_in_run(values):
    """Of each of values [n], its place among the equals next to it: [n]."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))


def precision_curve(found, counts, num):
    """Precision at the recalls of COCO_RECALLS: [T, 101]. found, counts bool [n, T]: detections, best first, that found
    one of the num objects, and that count at all."""
    right = (found & counts).cumsum(0)
    precision = right / (counts.cumsum(0) + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]        # what a lower threshold may still reach
    precision = np.concatenate((precision, np.zeros((1, precision.shape[1]))))      # never reached: 0
    return np.stack([column[recall.searchsorted(COCO_RECALLS)] for column, recall in zip(precision.T, right.T / num)])


def order_results(groups, score, K, most, asked=None):
    """Which detections count, by image, then category, then score (all sorts are stable), and their place among those
    of the same image and category. groups [n] = image * K + category. COCO keeps the best `most` of each group; LVIS
    the best of an image, where it was asked for their category (asked: such groups)."""
    order = np.lexsort((-score, groups // K))
    if asked is not None:
        order = order[place_in_run(groups[order] // K) < most]
        order = order[np.isin(groups[order], asked)]
    order = order[np.argsort(groups[order], kind='stable')]
    place = place_in_run(groups[order])
    return (order, place) if asked is not None else (order[place < most], place[place < most])


def match_groups(groups, shapes, object_groups, object_shapes, ignored, crowd):
    """match_detections for every image and category. groups [n] sorted; shapes: boxes [n, 4] or a list of masks."""
    found, void = np.zeros((2, len(groups), len(ignored), len(COCO_IOUS)), dtype=bool)
    members = {}
    for n, group in enumerate(object_groups.tolist()):
        members.setdefault(group, []).append(n)
    starts = np.flatnonzero(np.diff(groups, prepend=-1)).tolist()
    for start, stop in zip(starts, starts[1:] + [len(groups)]):
        there = members.get(int(groups[start]))
        if there and isinstance(shapes, list):
            iou = overlap_masks(shapes[start:stop], [object_shapes[n] for n in there], crowd[there])
        elif there:
            iou = overlap_boxes(shapes[start:stop], object_shapes[there], crowd[there])
        if there:
            found[start:stop], void[start:stop] = match_detections(iou, ignored[:, there], crowd[there])
    return found, void


def precision_and_recall(truth, results, kind, most):
    """See average_precision. -> precision [categories, areas, IoUs, 101 recalls] and recall [categories, areas, most,
    IoUs], categories by id; -1 where there is no object."""
    images = {image['id']: (i, image) for i, image in enumerate(sorted(truth['images'], key=lambda image: image['id']))}
    category_of = {name: k for k, name in enumerate(sorted(category['id'] for category in truth['categories']))}
    objects, K, lvis = truth['annotations'], len(category_of), is_lvis(truth)

    def group(rows):            # one number for each pair of an image and a category, in the order of their ids
        return np.array([images[row['image_id']][0] * K + category_of[row['category_id']] for row in rows], dtype=int)

    def listed(name):           # LVIS: the groups that images name
        return [i * K + category_of[category] for i, image in images.values() for category in image[name]]

    def shapes(rows):
        if kind == 'bbox':
            return np.array([row['bbox'] for row in rows], dtype=np.float64).reshape(-1, 4)
        size = lambda row: (images[row['image_id']][1]['height'], images[row['image_id']][1]['width'])
        return [read_segmentation(row['segmentation'], size(row)) for row in rows]

    groups, object_groups = group(results), group(objects)
    score = np.array([row['score'] for row in results], dtype=np.float64)
    asked = np.append(object_groups, listed('neg_category_ids')) if lvis else None
    order, place = order_results(groups, score, K, most[-1], asked)
    groups, score, found_shapes = groups[order], score[order], shapes([results[n] for n in order])
    area = found_shapes[:, 2] * found_shapes[:, 3] if kind == 'bbox' else np.array([mask_area(x) for x in found_shapes])
    limits = np.array(list(COCO_AREAS.values()))
    outside = lambda area: (area < limits[:, :1]) | (area > limits[:, 1:])                          # [A, n]
    crowd = np.array([bool(row.get('iscrowd')) for row in objects], dtype=bool)
    # objects of another size, and crowds, need not be found; nor are detections of another size wrong
    ignored = outside(np.array([row['area'] for row in objects], dtype=np.float64)) | crowd
    found, void = match_groups(groups, found_shapes, object_groups, shapes(objects), ignored, crowd)
    free = outside(area) | (np.isin(groups, listed('not_exhaustive_category_ids')) if lvis else False)
    void |= ~found & free.T[:, :, None]

    precision = np.full((K, len(limits), len(COCO_IOUS), len(COCO_RECALLS)), -1.)
    recall = np.full((K, len(limits), len(most), len(COCO_IOUS)), -1.)
    for k in range(K):
        rows = np.flatnonzero(groups % K == k)
        rows = rows[np.argsort(-score[rows], kind='stable')]
        for a, num in enumerate((~ignored[:, object_groups % K == k]).sum(1)):
            if num:
                hits, counts = found[rows, a], ~void[rows, a]
                precision[k, a] = precision_curve(hits, counts, num)
                for m, limit in enumerate(most):
                    recall[k, a, m] = (hits & counts)[lvis | (place[rows] < limit)].sum(0) / num
    return precision, recall


def is_lvis(truth):
    """Whether a json's categories have LVIS's frequencies."""
    return any('frequency' in category for category in truth['categories'])


def average_precision(truth, results, kind='bbox', most=(1, 10, 100)):
    """COCO's 12 numbers, and the same `per_category` {id: ...}, of detections. Where categories have frequencies the
    way is LVIS's (arXiv:1908.03195), with APr, APc and APf. -1 is a number of nothing. truth: a json's dict of images,
    annotations and categories; results: dicts of image_id, category_id, score and bbox or segmentation, as kind says.
    most: how many detections count of an image (and, in COCO, a category); LVIS takes one number, (300,)."""
    precision, recall = precision_and_recall(truth, results, kind, most)
    mean = lambda x: float(x[x > -1].mean()) if (x > -1).any() else -1.
    categories = sorted(truth['categories'], key=lambda category: category['id'])

    def numbers(precision, recall):
        result = {'AP': mean(precision[:, 0]), 'AP50': mean(precision[:, 0, 0]), 'AP75': mean(precision[:, 0, 5])}
        result |= {'AP' + name: mean(precision[:, a]) for a, name in enumerate(COCO_AREAS) if name}
        result |= {f'AR{limit}': mean(recall[:, 0, m]) for m, limit in enumerate(most)}
        return result | {'AR' + name: mean(recall[:, a, -1]) for a, name in enumerate(COCO_AREAS) if name}
    result = numbers(precision, recall)
    if is_lvis(truth):
        for letter in 'rcf':
            result['AP' + letter] = mean(precision[[category['frequency'] == letter for category in categories], 0])
    each = {row['id']: numbers(precision[k:k + 1], recall[k:k + 1]) for k, row in enumerate(categories)}
    return dict(result, per_category=each)


# ---- what it costs ----------------------------------------------------------------------------------------------

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


if __name__ == '__main__':
    if sys.argv[1:] != ['--bench']:
        sys.exit('error: what there is to run is python detect_seg.py --bench')
    bench()
