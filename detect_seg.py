"""
Stage 3, what is where: boxes with masks, or a class for every pixel.
EVA was judged by both: arXiv:2211.07636, sections 3.3 and 3.4.

    python detect_seg.py --size micro --init eva.pt                     # the built-in world: boxes, masks
    python detect_seg.py --head linear --size micro --init eva.pt       # classes: what frozen patches know
    python detect_seg.py --head mask2former --size micro --init eva.pt  # classes, by queries
    python detect_seg.py --data bccd --init eva.pt                      # train.json, val.json and images
    python detect_seg.py --init out/detect_seg-micro/model.pt --image a.jpg
    torchrun --nproc_per_node=8 detect_seg.py --size g --data coco --init eva.pt

boxes:        ViTDet (arXiv:2203.16527) with Cascade Mask R-CNN; average precision.
linear:       a classifier of patches, the first thing to read; mean IoU.
mask2former:  Mask2Former on ViTDet's pyramid or, with --adapter, on ViT-Adapter, which is EVA's.

Boxes are [x1, y1, x2, y2] in pixels; pixel i covers i to i + 1.
Places are (x, y) from 0 to 1 over an image; cell i of n covers i/n to (i+1)/n.
"""
import colorsys
import math
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
    vocabulary: str = option('coarse', 'boxes of the world: 16 kinds; as LVIS 119 with textures, 240 with parts',
                             ('coarse', 'textured', 'fine'))
    classes: str = option('', "maps: file of a name for each value of the label maps, '-' for none; or the data's")
    adapter: bool = option(False, 'mask2former: ViT-Adapter, instead of the pyramid of the last map')
    stages: int = option(1, 'boxes: heads of the cascade; 1 is Mask R-CNN', low=1, high=5)
    window: int = option(0, 'boxes: patches along the side of an attention window; 0: all blocks are global', high=256)
    soft: bool = option(False, "boxes: test as for EVA's published numbers, by soft-NMS and maskness")
    freeze: bool = option(None, 'the ViT stays as it is; if not given: so does that of --init under linear')
    scale_jitter: tuple = option((.1, 2.), 'train on images at so much of the size at which they fit', low=.01, high=100)
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
LARGE_BOXES = dict(image_size=1024, patch_size=16, batch_size=64, steps=45_000, lr=1e-4, stages=3, window=16)
EVA_BOXES = dict(LARGE_BOXES, image_size=1280, lr=2.5e-5, drop_path=.6, warmup_steps=500)
BOXES = {  # differences from the defaults; g is EVA on COCO, g-lvis EVA on LVIS; s, b, l: ours
    'pico': SMALL_BOXES, 'nano': SMALL_BOXES, 'micro': SMALL_BOXES, 'mini': SMALL_BOXES, 'ti': SMALL_BOXES,
    's': dict(image_size=512, batch_size=16, steps=45_000, lr=1e-4, stages=3, drop_path=.1),
    'b': dict(LARGE_BOXES, drop_path=.1), 'l': dict(LARGE_BOXES, drop_path=.4),
    'g': EVA_BOXES, 'g-lvis': dict(EVA_BOXES, lr=2e-4, steps=75_000, drop_at=.9333),
}

MAP = dict(schedule='linear', weight_decay=.05, scale_jitter=(.5, 2.), patch_size=16)
SMALL_MAP = dict(MAP, image_size=128, patch_size=8, batch_size=8, steps=1500, lr=2e-3, channels=64,
                 queries=30, layers=(1, 3), points=512)
EVA_MAP = dict(MAP, image_size=896, channels=1024, queries=200, layers=(6, 8), layer_decay=.95, drop_path=.5)
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
LINEAR_RATE = 10.           # times --lr, of a linear head: it starts from nothing, on features that are there
SAID = 'box_ap', 'box_ap50', 'mask_ap', 'mask_ap50', 'miou', 'pixel_accuracy'       # during a run
IMAGENET_MEAN = .485, .456, .406        # the released models'
IMAGENET_STD = .229, .224, .225
HEAD_BYTES = {'boxes': 80, 'linear': 0, 'mask2former': 35}      # a number of the pyramid, as measured on a GPU
LARGEST_GROWTH = math.log(1000 / 16)    # of a box's side in one step: a wild prediction must not overflow
STRIDE = 512 / 896          # of the windows that an image is tested in, as a share of their side
NO_OBJECT = .1              # weight of a query that should find nothing, beside one that should find a mask
CLASS_WEIGHT = 2.           # of Mask2Former's three losses
PIXEL_WEIGHT = 5.
DICE_WEIGHT = 5.


# ---- boxes: coding, matching, suppression, proposals --------------------------------------------

def sides(boxes):
    """Width and height of boxes [n, 4]: [n, 2]."""
    return boxes[:, 2:] - boxes[:, :2]


def pairwise_iou(a, b):
    """Intersection over union of boxes a [n, 4] and b [m, 4]: [n, m]. In place: two thirds of the time."""
    width = torch.minimum(a[:, 2, None], b[:, 2]) - torch.maximum(a[:, 0, None], b[:, 0])
    height = torch.minimum(a[:, 3, None], b[:, 3]) - torch.maximum(a[:, 1, None], b[:, 1])
    shared = width.clamp_(min=0).mul_(height.clamp_(min=0))             # [n, m]
    union = (sides(a).prod(1)[:, None] + sides(b).prod(1)).sub_(shared)
    return shared.div_(union.clamp_(min=1e-30))                         # never 0 / 0


def encode_boxes(boxes, targets, weights):
    """The way from boxes to targets [n, 4], arXiv:1311.2524: the centre's shift in sides, log growth; weighted."""
    size = sides(boxes)
    goal = sides(targets)
    shift = (targets[:, :2] + .5 * goal - boxes[:, :2] - .5 * size) / size
    weights = M.constant(tuple(weights), boxes.device).to(boxes)
    return torch.cat((shift, (goal / size).log()), 1) * weights


def decode_boxes(boxes, deltas, weights):
    """The inverse of encode_boxes. boxes [n, 4], deltas [n, 4] -> [n, 4]."""
    size = sides(boxes)
    weights = M.constant(tuple(weights), boxes.device).to(boxes)
    shift, growth = (deltas / weights).split(2, dim=1)
    centre = boxes[:, :2] + .5 * size + shift * size
    half = .5 * size * growth.clamp(max=LARGEST_GROWTH).exp()
    return torch.cat((centre - half, centre + half), 1)


def make_anchors(grids, strides, ratios=(.5, 1., 2.), sizes=None):
    """The boxes that region proposals start from, around every cell's top left corner: [h * w * 3, 4] a level,
    in the order y, x, ratio of height to width. grids: each level's (h, w). sizes: if None 8 strides."""
    levels = []
    for i, (h, w) in enumerate(grids):
        size = sizes[i] if sizes else 8 * strides[i]
        width = torch.tensor([math.sqrt(size ** 2 / ratio) for ratio in ratios])
        half = torch.stack((width, width * torch.tensor(ratios)), 1) / 2                # [3, 2]
        corner = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1)[:, None] * strides[i]
        levels.append(torch.cat((corner - half, corner + half), 2).flatten(0, 1))
    return levels


def match(iou, thresholds, labels, low_quality=False):
    """Of each box its best target and labels[i] if thresholds[i - 1] <= IoU < thresholds[i]: [boxes] each.
    iou [targets, boxes]; low_quality: every target's best boxes get label 1, whatever their IoU."""
    if len(iou) == 0:
        index = torch.zeros(iou.shape[1], dtype=torch.long, device=iou.device)
        return index, torch.full_like(index, labels[0])
    best, index = iou.max(0)
    label = torch.full_like(index, labels[0])
    for threshold, value in zip(thresholds, labels[1:]):
        label = torch.where(best >= threshold, value, label)
    if low_quality:
        label = torch.where((iou == iou.max(1, keepdim=True).values).any(0), 1, label)
    return index, label


def sample(labels, num, positive_share, u):
    """Asks num boxes with the lowest u [n], of label 1 at most num * positive_share, and of label 0:
    their labels, -1 of all others [n]; then the indices of all [n], those of 1, of 0 and of -1."""
    order = u.argsort(stable=True)
    positive = labels[order] == 1
    positive &= positive.cumsum(0) <= int(num * positive_share)
    negative = labels[order] == 0
    negative &= negative.cumsum(0) <= num - positive.sum()

    # counted, not cut: nothing has to wait for a GPU
    taken = positive.long() - (~positive & ~negative).long()                # [n], by u
    asked = torch.empty_like(taken).scatter_(0, order, taken)
    return asked, order[taken.argsort(descending=True, stable=True)]


def float32_below(threshold):
    """The largest float32 that is not above it: in float32 3 / 10 is above the double .3, as .3 is."""
    limit = np.float32(threshold)
    return float(np.nextafter(limit, np.float32(-1)) if float(limit) > threshold else limit)


def nms(boxes, scores, threshold, classes=None, block=128):
    """Greedy non-maximum suppression. boxes [n, 4], scores [n], classes [n] -> indices, best first.
    A box stays if no better one that stays, of the same class, overlaps it by an IoU above threshold."""
    limit = float32_below(threshold)

    def suppresses(i, j):
        over = pairwise_iou(boxes[i], boxes[j]) > limit
        return over if classes is None else over & (classes[i, None] == classes[j])

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
        kept.append(first[torch.from_numpy(keep).to(first.device)])
        left = left[block:]
        left = left[~suppresses(kept[-1], left).any(0)]
    return torch.cat(kept)


def nms_at_once(levels, there, threshold, rounds=16):
    """What nms keeps of each level and image of boxes [B, n, 4], best first, that are `there` [B, n].
    All boxes are judged anew, by those that stayed in the round before. Greedy's choice, and no other,
    then stays as it is; round k settles those that wait for k others. A GPU is asked every few rounds."""
    over = []                               # of each level [B, i, j]: i suppresses j
    for boxes in levels:
        suppresses = [pairwise_iou(part, part) > float32_below(threshold) for part in boxes]
        number = torch.bfloat16 if boxes.is_cuda else torch.float32
        over.append(torch.stack(suppresses).triu_(1).to(number))

    keep = there
    while True:
        for _ in range(rounds):
            before = keep
            hits = [stay[:, None].to(x) @ x for stay, x in zip(before, over)]       # [B, 1, n]
            keep = [here & (x[:, 0] == 0) for here, x in zip(there, hits)]
        if torch.equal(torch.cat(keep, 1), torch.cat(before, 1)):
            return keep


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
        block = 1024 if boxes.is_cuda else 128      # a GPU is waited for at each
        order = nms(boxes[rows], scores, iou, classes, block)[:most]
        scores = scores[order]
    else:
        scores = torch.where(scores > threshold, scores, -torch.inf)
        taken = soft_nms(boxes, scores.T, **soft)                   # [K, R]
        classes, rows = (taken > 0).nonzero(as_tuple=True)
        scores, order = taken[classes, rows].sort(descending=True, stable=True)
    rows = rows[order]
    return boxes[rows], scores, classes[order], rows


@torch.no_grad()
def choose_proposals(logits, deltas, anchors, image_size, before, after, threshold=.7):
    """One image's region proposals: boxes [m, 4] and logits [m], best first. By level the `before` best
    anchors [n, 4] by logits [n] are moved by deltas [n, 4] and clipped; NMS leaves `after` in all."""
    boxes, scores, levels = [], [], []
    for level, anchor in enumerate(anchors):
        score, index = logits[level].topk(min(before, len(anchor)))
        boxes.append(decode_boxes(anchor[index], deltas[level][index], (1., 1., 1., 1.)))
        scores.append(score)
        levels.append(torch.full_like(index, level))
    boxes = clip_boxes(torch.cat(boxes), image_size)
    scores = torch.cat(scores)
    index = has_area(boxes).nonzero()[:, 0]
    index = index[nms(boxes[index], scores[index], threshold, torch.cat(levels)[index])[:after]]
    return boxes[index], scores[index]


@torch.no_grad()
def choose_all_proposals(logits, deltas, anchors, sizes, before, after, threshold=.7):
    """choose_proposals of all images at once, for GPUs, only the boxes [m, 4] of each.
    By level logits [B, n], deltas [B, n, 4], anchors [n, 4]; sizes [(height, width)]."""
    most = torch.tensor([(width, height) * 2 for height, width in sizes])
    most = run.send(most, logits[0].device)                                 # [B, 4]
    boxes, scores = [], []
    for score, delta, anchor in zip(logits, deltas, anchors):
        score, index = score.topk(min(before, len(anchor)))                 # [B, k]
        moves = delta.gather(1, index[..., None].expand(-1, -1, 4))
        found = decode_boxes(anchor[index].flatten(0, 1), moves.flatten(0, 1), (1., 1., 1., 1.))
        boxes.append(found.view_as(moves).clamp(min=0).minimum(most[:, None]))
        scores.append(score)
    keep = nms_at_once(boxes, [has_area(found) for found in boxes], threshold)
    scores = [torch.where(*pair, -torch.inf) for pair in zip(keep, scores)]
    scores, order = torch.cat(scores, 1).sort(descending=True, stable=True)
    nums = (scores[:, :after] > -torch.inf).sum(1).tolist()
    return [part[index[:num]] for part, index, num in zip(torch.cat(boxes, 1), order, nums)]


def rpn_targets(anchors, targets, u, num=256, positive_share=.5):
    """What one image's proposals learn: labels [n], 1 an object, 0 none, -1 not asked, and the box that
    each anchor should become [n, 4]. anchors [n, 4], targets [m, 4], u [n] uniform numbers."""
    index, label = match(pairwise_iou(targets, anchors), (.3, .7), (0, -1, 1), low_quality=True)
    asked, _ = sample(label, num, positive_share, u)
    return asked, targets[index] if len(targets) else torch.zeros_like(anchors)


def rpn_losses(logits, deltas, anchors, labels, goals):
    """Two sums: cross-entropy of the anchors asked, is there an object? L1 of the positive ones' moves.
    logits and labels [B, n]; deltas and goals [B, n, 4]; anchors [n, 4]."""
    # is there an object?
    losses = F.binary_cross_entropy_with_logits(
        logits, labels.clamp(min=0).to(logits), reduction='none')
    objectness = (losses * (labels >= 0)).sum()

    # how should the anchor move?
    labels = torch.where(labels == 1, 1, -1).flatten()
    anchors = anchors.repeat(len(goals), 1)
    move = box_loss(anchors, deltas.flatten(0, 1), labels, goals.flatten(0, 1), (1., 1., 1., 1.))
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


def box_windows(image, y, x):
    """[(image, rows, columns) of the map] for every box. image [R]; y and x: as of bin_weights."""
    tall = [slice(top, bottom) for top, bottom in zip(y[0].tolist(), y[1].tolist())]
    wide = [slice(left, right) for left, right in zip(x[0].tolist(), x[1].tolist())]
    return list(zip(image.tolist(), tall, wide))


class PoolBoxes(torch.autograd.Function):
    """weights of y @ window of the map @ weights of x, for each box [R, C, out, out].
    Bilinear interpolation is separable, and so is its mean over a bin. Two small products a box
    take half the time of visiting every point (a third on channels-last maps).
    features [B, C, H, W]; image [R]; y and x as of bin_weights."""

    @staticmethod
    def forward(ctx, features, image, y, x):
        ctx.windows = box_windows(image, y, x)
        ctx.weights = y[2], x[2]
        ctx.shape = features.shape
        rows, columns = ctx.weights                             # each [R, out, cells]
        R, out, _ = rows.shape

        # channels last, as matrix products want them
        cells = features.permute(0, 2, 3, 1).contiguous()       # [B, H, W, C]
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
    if features.is_cuda:
        size = M.constant((H, W), features.device).expand(len(boxes), 2)
        cells = features.float().permute(0, 2, 3, 1).flatten(0, 2)
        boxes = torch.stack((x1, y1, x2, y2), 1)
        return gather_boxes(cells, image * H * W, size, boxes, out, ratio)
    y = bin_weights(y1, y2, out, H, ratio)
    x = bin_weights(x1, x2, out, W, ratio)

    # bfloat16 would misplace what is interpolated
    with torch.autocast(features.device.type, enabled=False):
        return PoolBoxes.apply(features.float(), image, y, x)


def gather_boxes(cells, first, size, boxes, out, ratio=0):
    """RoIAlign without a loop over boxes, for GPUs: a bin is a weighted sum of cells, a `bag`.
    cells [N, C]: those of all maps, row by row. Of each box: its map's first cell [R] and
    (height, width) [R, 2]; the box itself [R, 4], in cells that have their centres at 0, 1, ...
    -> [R, C, out, out]."""
    R = len(boxes)
    device = boxes.device
    if R == 0:
        return cells[:0, :, None, None].expand(-1, -1, out, out)

    # axes y and x: how many points a bin has, how many cells these can lie between
    corners = boxes.view(R, 2, 2).flip(2)                               # [R, 2 corners, 2 axes]
    start = corners[:, 0]
    step = (corners[:, 1] - start) / out                                # [R, 2], a bin's sides
    num = torch.full_like(step, ratio) if ratio else step.ceil().clamp(min=0)
    share = num.clamp(min=1)
    reach = ((step - step / share).abs().ceil() + 2).minimum(size)      # [R, 2]
    area = reach.prod(1)
    total = out ** 2 * area.double().sum()
    numbers = torch.stack((num.max().double(), reach.max().double(), total))
    num_points, num_cells, total = map(int, numbers.tolist())           # the only wait

    # the points, as in bin_weights, and what they give to the cells
    last = size[:, :, None, None] - 1
    points = torch.arange(num_points, device=device)
    bins = start[..., None] + torch.arange(out, device=device) * step[..., None]        # [R, 2, out]
    offsets = (points + .5) * step[..., None] / share[..., None]        # [R, 2, points]
    at = bins[..., None] + offsets[:, :, None]                          # [R, 2, out, points]
    used = (points < num[..., None])[:, :, None] & (at >= -1) & (at <= last + 1)
    at = at.clamp(min=0).minimum(last)
    begin = torch.where(used, at, last).amin(3).floor()                 # [R, 2, out]
    place = begin[..., None] + torch.arange(num_cells, device=device)   # [R, 2, out, cells]
    distance = (at[..., None] - place[..., None, :]).abs()              # [R, 2, out, points, cells]
    weights = (1 - distance).clamp_(min=0).mul_(used[..., None]).sum(3) / share[..., None, None]
    place = place.minimum(last).long()

    # all bags' cells in a row, box by box: which box, which of its bins, which cell under that
    area = area.long()
    num = out ** 2 * area                                               # [R], a box's
    first_of_box = num.cumsum(0) - num
    n = torch.arange(total, device=device)
    box = torch.searchsorted(num.cumsum(0), n, right=True)              # [total]
    n = n - first_of_box[box]
    bag = n // area[box]
    n = n % area[box]
    across = reach[:, 1].long()[box]
    y = box, 0, bag // out, n // across
    x = box, 1, bag % out, n % across

    index = first[box] + place[y] * size[:, 1].long()[box] + place[x]
    weights = weights[y] * weights[x]
    first_of_bag = first_of_box[:, None] + area[:, None] * torch.arange(out ** 2, device=device)
    pooled = F.embedding_bag(
        index, cells, first_of_bag.flatten(), mode='sum', per_sample_weights=weights.to(cells))
    return pooled.view(R, out, out, -1).permute(0, 3, 1, 2)


def box_levels(boxes, strides):
    """Which level of the pyramid each of boxes [n, 4] is pooled from: [n]. arXiv:1612.03144.
    With a side of 14 strides of the third level (224 pixels) it is that one; a doubling is one level on."""
    # counted from 2 as in the paper: near 4 a side that is a last digit short of a border rounds up to it
    level = torch.floor(4 + torch.log2(sides(boxes).prod(1).sqrt() / (14 * strides[2]) + 1e-8)) - 2
    return level.clamp(0, len(strides) - 1).long()


def pool_boxes(pyramid, strides, boxes, out):
    """Features of each image's boxes [n, 4], from their levels of the pyramid: [sum of n, C, out, out]."""
    image = torch.cat([torch.full((len(part),), i, device=part.device) for i, part in enumerate(boxes)])
    boxes = torch.cat(boxes)
    level = box_levels(boxes, strides)
    if boxes.is_cuda:
        return pool_on_gpu(pyramid, strides, boxes, image, level, out)
    order, pooled = [], []
    for i, features in enumerate(pyramid):
        here = (level == i).nonzero()[:, 0]
        order.append(here)
        pooled.append(roi_align(features, boxes[here], image[here], out, 1 / strides[i]))
    return torch.cat(pooled)[torch.cat(order).argsort()]


def pool_on_gpu(pyramid, strides, boxes, image, level, out):
    """As pool_boxes, all levels at once. boxes [R, 4]; image and level [R]: of which map each is a part."""
    cells = torch.cat([x.float().permute(0, 2, 3, 1).flatten(0, 2) for x in pyramid])      # [N, C]
    sizes = M.constant(tuple(tuple(x.shape[2:]) for x in pyramid), boxes.device)
    areas = sizes.prod(1)
    num = len(pyramid[0]) * areas
    first = (num.cumsum(0) - num)[level] + image * areas[level]
    scales = M.constant(tuple(1 / stride for stride in strides), boxes.device).float()
    boxes = boxes.detach().float() * scales[level, None] - .5
    with torch.autocast(boxes.device.type, enabled=False):
        return gather_boxes(cells, first, sizes[level], boxes, out)


def paste_mask(mask, box, size):
    """A probability map [m, m] in its box [4] as part of an image of (height, width): [height, width].
    It fades to 0 from half a cell inside its border to half a cell outside."""
    side = box[2:] - box[:2]
    left, top = (box[:2] - .5 * side / len(mask)).floor().clamp(min=0).int().tolist()
    right, bottom = (box[2:] + .5 * side / len(mask)).ceil().int().tolist()
    canvas = mask.new_zeros(size)
    part = canvas[top:max(top, bottom), left:max(left, right)]                          # a view
    y, x = torch.meshgrid(torch.arange(part.shape[0]), torch.arange(part.shape[1]), indexing='ij')
    centres = torch.stack((x + left, y + top), 2).to(mask.device) + .5                  # [h, w, 2]
    places = (centres - box[:2]) / side * 2 - 1
    part.copy_(F.grid_sample(mask[None, None], places[None], align_corners=False)[0, 0])
    return canvas


def mask_targets(masks, boxes, size):
    """Each mask, polygons [[x, y, ...], ...] or bool [H, W], within its box [4] on the CPU:
    bool [n, size, size]."""
    targets = [torch.zeros(0, size, size, dtype=torch.bool)]
    for mask, box in zip(masks, boxes):
        if isinstance(mask, list):
            scale = size / (box[2:] - box[:2]).clamp(min=.1).numpy()
            parts = [(np.reshape(part, (-1, 2)) - box[:2].numpy()) * scale for part in mask]
            runs = data.fill_polygons(parts, (size, size))
            targets.append(torch.from_numpy(data.decode_mask(runs, (size, size)))[None])
        else:
            mask = torch.as_tensor(mask, dtype=torch.float32).cpu()[None, None]
            cells = roi_align(mask, box[None], torch.zeros(1, dtype=torch.long), size)
            targets.append(cells[0] >= .5)
    return torch.cat(targets)


# ---- boxes: the detector ------------------------------------------------------------------------

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map [B, C, H, W]; it comes out channels last."""
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormConv(nn.Conv2d):
    """A convolution without bias, then ChannelNorm. [B, inputs, H, W] -> [B, outputs, H, W]."""
    def __init__(self, inputs, outputs, kernel=3):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(outputs, 1e-6)

    def forward(self, x):
        return self.norm(super().forward(x))


class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: maps at 4, 2, 1, 1/2 and 1/4 of the scale of the ViT's last map,
    made of that map alone. [B, D, h, w] -> a list of five [B, channels, ...], the finest first."""
    def __init__(self, width, channels):
        super().__init__()
        half = width // 2
        enlarge = [nn.ConvTranspose2d(width, half, 2, 2), ChannelNorm(half, 1e-6), nn.GELU(),
                   nn.ConvTranspose2d(half, half // 2, 2, 2)]
        levels = [enlarge, [nn.ConvTranspose2d(width, half, 2, 2)], [], [nn.MaxPool2d(2)]]
        inputs = half // 2, half, width, width
        self.levels = nn.ModuleList(
            nn.Sequential(*level, NormConv(n, channels, 1), NormConv(channels, channels))
            for level, n in zip(levels, inputs))

    def forward(self, x):
        levels = [level(x) for level in self.levels]
        return levels + [levels[-1][:, :, ::2, ::2]]


class Proposer(nn.Module):
    """Region proposals (arXiv:1506.01497): is there an object at each anchor, and how should it move?
    -> logits [B, n] and deltas [B, n, 4] of each level, in the order of make_anchors."""
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.objectness = nn.Conv2d(channels, 3, 1)
        self.deltas = nn.Conv2d(channels, 3 * 4, 1)

    def forward(self, pyramid):
        logits, deltas = [], []
        for x in pyramid:
            for conv in self.convs:
                x = conv(x).relu()
            moves = self.deltas(x).permute(0, 2, 3, 1)                      # [B, h, w, 3 * 4]
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(moves.reshape(len(x), -1, 4).float())
        return logits, deltas


class BoxHead(nn.Module):
    """A head of the cascade: pooled [n, C, 7, 7] -> logits [n, K + 1], the background's last, deltas [n, 4]."""
    def __init__(self, channels, mlp_width, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(NormConv(channels, channels) for _ in range(4))
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
        self.convs = nn.ModuleList(NormConv(channels, channels) for _ in range(4))
        self.up = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.classes = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x).relu()
        return self.classes(self.up(x).relu()).float()


def label_boxes(boxes, target, iou, num_classes):
    """What each of boxes [n, 4] shows, by an IoU of at least `iou`. target: dict(boxes [m, 4], labels [m]).
    -> the object's class [n], num_classes where there is none; its box [n, 4]; its index [n]."""
    index, label = match(pairwise_iou(target['boxes'], boxes), (iou,), (0, 1))
    if len(target['boxes']) == 0:
        return torch.full_like(index, num_classes), torch.zeros_like(boxes), index
    return torch.where(label == 1, target['labels'][index], num_classes), target['boxes'][index], index


def federated_classes(labels, weights, num, u):
    """LVIS: which classes a batch is asked for, bool [K]: its labels [n], the background too, and up to
    `num` in all others drawn by their weights [K] (frequency^.5 in EVA). u [K] uniform numbers."""
    there = torch.zeros(len(weights) + 1, dtype=torch.bool, device=weights.device)
    there[labels] = True
    # the classes with the largest u^(1/w) are such a draw: compare log(u) / w
    key = torch.where(there[:-1] | (weights <= 0), -torch.inf, u.double().log() / weights)
    num_more = min(num - int(there.sum()), int((key > -torch.inf).sum()))
    there[key.topk(max(0, num_more)).indices] = True
    return there[:-1]


def send_targets(targets, device):
    """Images' targets with all boxes and labels on the device, which masks need not be."""
    if targets[0]['boxes'].device == device:
        return targets
    nums = [len(target['boxes']) for target in targets]
    boxes = run.send(torch.cat([target['boxes'] for target in targets]), device).split(nums)
    labels = run.send(torch.cat([target['labels'] for target in targets]), device).split(nums)
    return [dict(target, boxes=boxes[i], labels=labels[i]) for i, target in enumerate(targets)]


def with_area(boxes):
    """Of each image's boxes [n, 4] those that have an area."""
    together = torch.cat(boxes)
    kept = has_area(together).cpu()
    nums = [int(part.sum()) for part in kept.split([len(part) for part in boxes])]
    return together[run.send(kept.nonzero()[:, 0], together.device)].split(nums)


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
    # the background has nowhere to go; chosen by `where`, as an index would wait for a GPU
    positive = labels[:, None] >= 0
    wanted = encode_boxes(boxes, torch.where(positive, goals, boxes), weights)
    return torch.where(positive, (deltas - wanted).abs(), 0.).sum()


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
        self.normalize = self.vit.normalize    # uint8 [B, 3, H, W] -> float
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

    def forward(self, batch, draw=None, drop=None, choose={}):
        """batch: images [B, 3, H, W] normalised and padded, sizes [(height, width)] of what is no padding,
        targets [dict(boxes [n, 4], labels [n], masks)]. With draw(stream, num) -> uniform numbers [B, num]:
        {loss: (sum, what to divide it by)}; without: what `detect` finds, by choose_detections(**choose)."""
        config = self.config
        sizes = batch['sizes']
        device = batch['images'].device

        # what is at each place, and which anchors show an object
        pyramid = self.pyramid(self.vit(batch['images'], drop=drop))    # five [B, C, h, w]
        logits, deltas = self.proposer(pyramid)    # [B, n], [B, n, 4] each
        grids = [x.shape[2:] for x in pyramid]
        anchors = make_anchors(grids, self.strides, sizes=config.anchor_sizes)
        anchors = [run.send(level, device) for level in anchors]    # [n, 4] each

        # region proposals: a tensor [n, 4] for each image
        which = 0 if draw else 1
        limits = config.before[which], config.after[which]
        if device.type == 'cuda':
            boxes = choose_all_proposals(logits, deltas, anchors, sizes, *limits)
        else:
            boxes = []
            for i, size in enumerate(sizes):
                found, _ = choose_proposals(
                    [x[i] for x in logits], [x[i] for x in deltas], anchors, size, *limits)
                boxes.append(found)
        pyramid = pyramid[:4]
        if draw is None:
            return self.detect(pyramid, boxes, sizes, choose)

        # what the proposals and what the heads learn; masks stay where they are
        targets = send_targets(batch['targets'], device)
        losses = self.proposal_losses(
            torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), targets, draw)
        boxes = self.sample_boxes(boxes, targets, draw)
        class_draw = batch.get('class_draw')
        regions = self.region_losses(pyramid, boxes, sizes, targets, class_draw)
        return {**losses, **regions}

    def proposal_losses(self, logits, deltas, anchors, targets, draw):
        """logits [B, n], deltas [B, n, 4], anchors [n, 4] -> the two losses of the region proposals."""
        num = self.config.num_anchors
        u = draw('anchors', len(anchors))    # [B, n]
        both = [rpn_targets(anchors, target['boxes'], u[i], num) for i, target in enumerate(targets)]
        labels = torch.stack([label for label, _ in both])
        goals = torch.stack([goal for _, goal in both])
        objectness, move = rpn_losses(logits, deltas, anchors, labels, goals)
        count = num * len(targets)
        return {'proposal_objectness': (objectness, count), 'proposal_boxes': (move, count)}

    def sample_boxes(self, boxes, targets, draw):
        """What the heads learn from: num_boxes of each image's proposals [n, 4] and its objects themselves."""
        config = self.config
        both = [torch.cat((boxes[i], target['boxes'])) for i, target in enumerate(targets)]
        u = draw('boxes', max(len(part) for part in both))
        sampled, nums = [], []
        for i, part in enumerate(both):
            _, label = match(pairwise_iou(targets[i]['boxes'], part), (.5,), (0, 1))
            asked, order = sample(label, config.num_boxes, config.positive_share, u[i, :len(part)])
            sampled.append(part[order])
            nums.append((asked >= 0).sum())
        return [part[:num] for part, num in zip(sampled, torch.stack(nums).tolist())]

    def cascade_head(self, number, pyramid, boxes, sizes):
        """One box head on each image's boxes [n, 4]: logits [sum of n, K + 1], deltas [sum of n, 4],
        their weights [4], and each image's boxes, moved by them and clipped."""
        pooled = pool_boxes(pyramid, self.strides, boxes, 7)
        if pooled.requires_grad:    # every head pulls at the same pyramid: their average does
            pooled.register_hook(lambda gradient: gradient / len(self.box_heads))
        logits, deltas = self.box_heads[number](pooled)

        # each head moves boxes less far than the one before
        weights = [weight * (1 + number) for weight in (10., 10., 5., 5.)]
        moved = decode_boxes(torch.cat(boxes), deltas.detach(), weights)
        nums = [len(part) for part in boxes]
        most = [[(width, height) * 2] * num for (height, width), num in zip(sizes, nums)]
        most = run.send(torch.tensor(sum(most, [])).view(-1, 4), moved.device)      # [sum of n, 4]
        return logits, deltas, weights, moved.clamp(min=0).minimum(most).split(nums)

    def region_losses(self, pyramid, boxes, sizes, targets, class_draw):
        """The losses of all heads. The first box head sees `boxes` [n, 4] of each image, the next what the one
        before made of them; they ask for an IoU of .5, .6, .7. class_draw [K]: uniform numbers."""
        K = self.config.num_classes
        losses = {}
        for number in range(len(self.box_heads)):
            # which object each box shows
            labelled = [label_boxes(part, target, .5 + .1 * number, K)
                        for part, target in zip(boxes, targets)]
            labels = torch.cat([classes for classes, _, _ in labelled])
            goals = torch.cat([goal for _, goal, _ in labelled])
            if number == 0:
                losses['masks'] = self.mask_loss(pyramid, boxes, labelled, targets)

            # the head's classes
            logits, deltas, weights, moved = self.cascade_head(number, pyramid, boxes, sizes)
            asked = None
            if self.class_weights is not None:
                asked = federated_classes(labels, self.class_weights, NUM_ASKED, class_draw)
            loss = class_loss(logits, labels, self.config.sigmoid, asked)
            losses[f'classes_{number}'] = loss, len(labels)

            # and its boxes, which are the next one's
            foreground = torch.where(labels < K, labels, -1)
            loss = box_loss(torch.cat(boxes), deltas, foreground, goals, weights)
            losses[f'boxes_{number}'] = loss, len(labels)
            if number + 1 < len(self.box_heads):
                boxes = with_area(moved)
        return losses

    def mask_loss(self, pyramid, boxes, labelled, targets):
        """Cross-entropy of the masks of each image's boxes [n, 4] that show an object; labelled: which."""
        # which boxes show an object, and which of all images': the CPU is told all at once
        masks, told = [], []
        for (classes, _, index), target in zip(labelled, targets):
            told.append(torch.stack((classes, index + len(masks)), 1))
            masks += target['masks']
        labels, index = torch.cat(told).unbind(1)
        together = torch.cat(boxes)
        told = torch.cat((torch.cat(told).double(), together.double()), 1).cpu()    # [sum of n, 6]
        shows = told[:, 0] < self.config.num_classes
        nums = [int(part.sum()) for part in shows.split([len(part) for part in boxes])]
        rows = run.send(shows.nonzero()[:, 0], together.device)
        labels = labels[rows]
        shown = list(together[rows].split(nums))

        # the object's mask in the box; the built-in world's are on the GPU, those of files are not
        if masks and torch.is_tensor(masks[0]) and masks[0].is_cuda:
            masks = torch.stack(masks)[:, None]
            goals = roi_align(masks, together[rows], index[rows], 28)[:, 0] >= .5
        else:
            told = told[shows]
            masks = [masks[i] for i in told[:, 1].int().tolist()]
            goals = mask_targets(masks, told[:, 2:].to(together.dtype), 28)
            goals = run.send(goals, together.device)

        # every weight needs a gradient in every process: without an object one box that is asked nothing
        if len(labels) == 0:
            shown[0] = boxes[0][:1]
        logits = self.mask_head(pool_boxes(pyramid, self.strides, shown, 14))
        return class_mask_loss(logits, labels, goals), goals.numel()

    def detect(self, pyramid, boxes, sizes, choose):
        """What is found in each image, of its proposals [n, 4]: dict(boxes [n, 4], scores [n], classes [n],
        masks [n, 28, 28], probabilities), best first. Scores are the heads' mean, boxes the last one's."""
        scores = 0.
        for number in range(len(self.box_heads)):
            logits, _, _, boxes = self.cascade_head(number, pyramid, boxes, sizes)
            share = logits.sigmoid() if self.config.sigmoid else logits.softmax(1)
            scores = scores + share / len(self.box_heads)    # [sum of n, K + 1]

        # what is reported, without the background
        scores = scores[:, :-1].split([len(part) for part in boxes])
        found = [choose_detections(*one, **choose) for one in zip(boxes, scores, sizes)]

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
        lvis = any('fed_loss' in name for name in state)
        return read_released(Detector, state, DETECTOR, detector_config, sigmoid=lvis)


def read_released(Class, state, rules, config_of, **options):
    """A model in eval mode of released tensors. config_of(state): what they show, as a dict; options: the rest."""
    state, _, _ = M.translate(state, rules)
    try:
        config = config_of(state)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise Refused(f'weights of a {Class.__name__} miss a tensor or a dimension: {error}') from None
    vit = {**config['vit'], **options.get('vit', {})}
    model = M.on_meta(Class, {**config, **options, 'vit': vit})
    M.fill(model, state, rules)
    return model.eval()


@torch.no_grad()
def init_detector(model, seed=0):
    """Starts all but the ViT as detectron2 does: He's where a ReLU follows, small for what is predicted."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) or name.startswith('vit'):
            continue
        transposed = isinstance(layer, nn.ConvTranspose2d)
        std = (2 / (len(layer.weight) if transposed else layer.weight[0].numel())) ** .5
        if name.startswith('proposer') or name.endswith('classes'):
            std = .01
        if name == 'mask_head.classes' or name.startswith('box') and name.endswith('deltas'):
            std = .001
        layer.weight.normal_(0, std, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    if model.config.sigmoid:                # independent classes start at .01
        for head in model.box_heads:
            head.classes.bias.fill_(math.log(.01 / .99))
    return model


def maskness(masks, threshold=.5):
    """The mean of masks [n, m, m] where above threshold: [n]. EVA judges masks by their scores times it."""
    inside = masks > threshold
    return (masks * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)


def to_original(found, size, original):
    """Detections on an image's original (height, width): scaled, clipped, dropped if nothing is left."""
    scale = original[1] / size[1], original[0] / size[0]
    boxes = clip_boxes(found['boxes'] * found['boxes'].new_tensor(scale * 2), original)
    kept = has_area(boxes)
    return {name: x[kept] for name, x in dict(found, boxes=boxes).items()}


def spline(places, at):
    """The 'not a knot' cubic spline through values at n places, at m others: the values' weights [m, n]."""
    def basis(x):
        x = x[:, None] / scale
        bends = (x - places[2:-2] / scale).clip(0) ** 3     # another third derivative from a knot on
        return np.concatenate((x ** np.arange(4), bends), 1)

    scale = abs(places).max()
    return np.linalg.solve(basis(places).T, basis(at).T).T


@torch.no_grad()
def stretch_distances(vit, grid):
    """The global blocks' tables of relative positions for another grid (h, w): a spline through places ever
    further apart, as BEiT and EVA do."""
    for block in vit.blocks:
        for name, side in zip(('rel_pos_h', 'rel_pos_w'), grid):
            table = getattr(block.attn, name)
            if block.attn.window or len(table) == 2 * side - 1:
                continue
            far = np.cumsum(1.0903078 ** np.arange(len(table) // 2))        # 1, 1 + q, 1 + q + q^2, ...
            places = np.concatenate((-far[::-1], [0], far))
            weights = torch.from_numpy(spline(places, np.arange(1. - side, side))).to(table.device)
            setattr(block.attn, name, nn.Parameter((weights @ table.double()).float()))


# What the released detectors call our tensors: rules as in model.py, whose EVA blocks are used.
DETECTOR = M.under('backbone.net.', 'vit.', M.EVA + M.EVA_QKV + M.GELU_MLP + M.same(
    'blocks.*.attn.rel_pos_h', 'blocks.*.attn.rel_pos_w'))
NORM_CONV = M.same('weight', 'norm.*')
for _i in range(4):
    DETECTOR += M.under(f'backbone.simfp_{_i + 2}.', f'pyramid.levels.{_i}.', M.same('*.*', '*.norm.*'))
    DETECTOR += M.under(f'roi_heads.box_head.*.conv{_i + 1}.', f'box_heads.*.convs.{_i}.', NORM_CONV)
    DETECTOR += M.under(f'roi_heads.mask_head.mask_fcn{_i + 1}.', f'mask_head.convs.{_i}.', NORM_CONV)
    DETECTOR += M.under(f'proposal_generator.rpn_head.conv.conv{_i}.', f'proposer.convs.{_i}.', M.same('*'))
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
    shape = {name: tensor.shape for name, tensor in state.items()}
    depth = M.count_layers(state, 'vit.')
    # a side of the grid that each block's relative positions are for; the largest is a global block's
    tables = [(shape[f'vit.blocks.{i}.attn.rel_pos_h'][0] + 1) // 2 for i in range(depth)]
    width, _, _, patch = shape['vit.patch_embed.weight']
    vit = dict(
        width=width, depth=depth, heads=width // shape['vit.blocks.0.attn.rel_pos_h'][1],
        mlp_width=shape['vit.blocks.0.mlp.fc1.weight'][0], patch_size=patch,
        image_size=patch * math.isqrt(shape['vit.pos_embed'][1] - 1), pool='map', mask_token=False,
        window=tables[0], rel_pos=max(tables), global_every=1 + tables.index(max(tables)),
        mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return dict(
        vit=vit, num_classes=shape['mask_head.classes.bias'][0], channels=shape['proposer.convs.0.bias'][0],
        hidden=shape['box_heads.0.fc.weight'][0], stages=sum(name.endswith('fc.bias') for name in state))


# ---- boxes: average precision -------------------------------------------------------------------
# In numpy. Boxes here are a json's (x, y, width, height), masks run lengths as of data.encode_mask.

COCO_IOUS = np.linspace(.5, .95, 10)        # an average precision is the mean over these
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS = '', 's', 'm', 'l'              # all, small, medium, large: from MIN_AREA to MAX_AREA, both included
MIN_AREA = np.array([[0], [0], [32 ** 2], [96 ** 2]])
MAX_AREA = np.array([[1e10], [32 ** 2], [96 ** 2], [1e10]])


def overlap_boxes(a, b, crowd):
    """IoU of detections a [n, 4] and objects b [m, 4]: [n, m]. Of a crowd (bool [m]) the union is the
    detection alone, as it need not cover the whole crowd."""
    low = np.maximum(a[:, None, :2], b[:, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[:, :2] + b[:, 2:])
    return divide((high - low).clip(0).prod(2), a[:, 2] * a[:, 3], b[:, 2] * b[:, 3], crowd)


def divide(shared, area_a, area_b, crowd):
    """IoU [n, m] of what is shared [n, m] by areas [n] and [m]; 0 where nothing is."""
    union = np.where(crowd, area_a[:, None], area_a[:, None] + area_b - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def runs_of_ones(masks):
    """Of a list of masks as run lengths: where each run of ones begins and ends, [R, 2], and whose it is, [R]."""
    edges = [runs[:len(runs) // 2 * 2].cumsum() for runs in masks]      # begins, ends, begins, ends, ...
    owner = np.repeat(np.arange(len(masks)), [len(places) // 2 for places in edges])
    return np.concatenate(edges).reshape(-1, 2), owner


def overlap_masks(a, b, crowd):
    """As overlap_boxes, of lists of run lengths. An object's pixels before a place are a polygon through the
    ends of its runs: what a detection's run shares with it is the difference of two interpolations."""
    shared = np.zeros((len(a), len(b)))
    if shared.size == 0:
        return shared
    places, owner = runs_of_ones(a)
    for j, theirs in enumerate(b):
        ends = np.cumsum(theirs)
        before = np.cumsum(theirs * (np.arange(len(theirs)) % 2))
        inside = np.interp(places, ends, before)                        # [R, 2]
        shared[:, j] = np.bincount(owner, inside[:, 1] - inside[:, 0], len(a))
    area_a = np.bincount(owner, places[:, 1] - places[:, 0], len(a))
    return divide(shared, area_a, np.array([data.mask_area(runs) for runs in b]), crowd)


def match_detections(iou, ignored, crowd):
    """Which detections, best first, find an object, and one that is ignored: bool [n, A areas, T IoUs] each.
    Each takes the best that is left, the last of equals, an ignored one if no other fits; crowds are not used up.
    iou [n, m], ignored bool [A, m], crowd bool [m]."""
    # bit t of a number is about the t-th IoU: is the overlap enough, is the object free, ...
    thresholds = np.minimum(COCO_IOUS, 1 - 1e-10)
    every = (1 << len(thresholds)) - 1
    enough = (1 << thresholds.searchsorted(iou, side='right')) - 1      # [n, m]
    order = iou.argsort(1, kind='stable')[:, ::-1]                      # best first, of equals the last
    free = np.full(ignored.shape, every).tolist()
    found = np.zeros((len(iou), len(ignored)), dtype=int)
    void = np.zeros_like(found)

    ignored = ignored.tolist()
    crowd = crowd.tolist()
    for i in np.flatnonzero(enough.any(1)):
        fits = enough[i].tolist()
        objects = [j for j in order[i].tolist() if fits[j]]
        for a in range(len(ignored)):
            left = every                                                # IoUs at which nothing is found yet
            for j in sorted(objects, key=ignored[a].__getitem__):
                taken = left & free[a][j] & fits[j]
                left -= taken
                if not crowd[j]:
                    free[a][j] -= taken
                if ignored[a][j]:
                    void[i, a] |= taken
            found[i, a] = every - left

    bits = np.arange(len(thresholds))
    found = found[..., None] >> bits & 1                                # [n, A, T]
    void = void[..., None] >> bits & 1
    return found.astype(bool), void.astype(bool)


def group(rows, *fields):
    """{the fields' values: the rows that have them}."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return groups


def judge_pair(image, objects, found, kind):
    """What an image's detections of one category are worth. objects, found: json rows, found best first.
    -> scores and places [n]; whether each finds an object, and counts, [n, A, T]; which objects count [A, m]."""
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
    sizes = np.array([row['area'] for row in objects], dtype=np.float64)
    ignored = (sizes < MIN_AREA) | (sizes > MAX_AREA) | crowd           # [A, m]
    hits, void = match_detections(iou, ignored, crowd)
    # nor is one wrong that finds nothing, if it is of another size, or LVIS does not know of all objects
    pardoned = (areas < MIN_AREA) | (areas > MAX_AREA)                  # [A, n]
    if found and found[0]['category_id'] in image.get('not_exhaustive_category_ids', ()):
        pardoned[:] = True
    void |= ~hits & pardoned.T[:, :, None]
    scores = np.array([row['score'] for row in found], dtype=np.float64)
    return scores, np.arange(len(found)), hits, ~void, ~ignored


def precision_and_recall(truth, results, kind, most):
    """Of the categories by id, -1 where there is no object: precision [K, areas, IoUs, 101 recalls] and
    recall [K, areas, most, IoUs]. See average_precision."""
    images = {image['id']: image for image in truth['images']}
    objects = group(truth['annotations'], 'image_id', 'category_id')
    results = sorted(results, key=lambda row: -row['score'])            # best first, of equals the first
    if data.is_lvis(truth):
        # its limit is an image's, and counts are the categories that are known to be there, or not to be
        known = []
        for (image,), rows in group(results, 'image_id').items():
            for row in rows[:most[-1]]:
                category = row['category_id']
                if (image, category) in objects or category in images[image]['neg_category_ids']:
                    known.append(row)
        results = known
    results = group(results, 'image_id', 'category_id')
    pairs = {category: [] for category in sorted(row['id'] for row in truth['categories'])}
    def place(pair):
        return data.id_order(pair[0]), pair[1]

    for pair in sorted(objects.keys() | results.keys(), key=place):
        pairs[pair[1]].append(pair)
    precision = np.full((len(pairs), len(COCO_AREAS), len(COCO_IOUS), len(COCO_RECALLS)), -1.)
    recall = np.full((len(pairs), len(COCO_AREAS), len(most), len(COCO_IOUS)), -1.)
    for k, of_category in enumerate(pairs.values()):
        # all images' detections, best first, and how good they are among those of their image
        judged = []
        for pair in of_category:
            found = results.get(pair, [])[:most[-1]]
            judged.append(judge_pair(images[pair[0]], objects.get(pair, []), found, kind))
        if not judged:
            continue
        scores, places, hits, counts, wanted = zip(*judged)
        order = np.argsort(-np.concatenate(scores), kind='stable')
        place = np.concatenate(places)[order]
        hits = np.concatenate(hits)[order]
        counts = np.concatenate(counts)[order]
        nums = np.concatenate(wanted, 1).sum(1)                         # objects in each range of areas
        for a in np.flatnonzero(nums):
            right = hits[:, a] & counts[:, a]                           # [n, T]
            for m, limit in enumerate(most):
                recall[k, a, m] = right[place < limit].sum(0) / nums[a]

            # the best precision that this or a lower threshold of the score reaches; 0 for a recall not reached
            right = right.cumsum(0)
            curve = right / (counts[:, a].cumsum(0) + np.spacing(1))
            curve = np.maximum.accumulate(np.pad(curve, ((0, 1), (0, 0)))[::-1])[::-1]
            for t in range(len(COCO_IOUS)):
                precision[k, a, t] = curve[(right[:, t] / nums[a]).searchsorted(COCO_RECALLS), t]
    return precision, recall


def known_mean(x):
    """Mean of what is no -1; -1 of nothing."""
    known = x[x > -1]
    return float(known.mean()) if known.size else -1.


def average_precision(truth, results, kind='bbox', most=(1, 10, 100)):
    """COCO's 12 numbers, -1 of nothing; LVIS's (arXiv:1908.03195), if categories have frequencies, with APr ...
    truth: a json's dict. results: dicts of image_id, category_id, score, and bbox or segmentation, as kind
    says. most: how many count of an image and, in COCO, a category; LVIS takes one number, (300,)."""
    precision, recall = precision_and_recall(truth, results, kind, most)
    result = dict(AP=known_mean(precision[:, 0]), AP50=known_mean(precision[:, 0, 0]))
    result['AP75'] = known_mean(precision[:, 0, 5])
    for a in (1, 2, 3):
        result['AP' + COCO_AREAS[a]] = known_mean(precision[:, a])
    for m, limit in enumerate(most):
        result[f'AR{limit}'] = known_mean(recall[:, 0, m])
    for a in (1, 2, 3):
        result['AR' + COCO_AREAS[a]] = known_mean(recall[:, a, -1])
    if data.is_lvis(truth):
        categories = sorted(truth['categories'], key=lambda row: row['id'])
        for letter in 'rcf':
            rows = [category.get('frequency') == letter for category in categories]
            result['AP' + letter] = known_mean(precision[rows, 0])
    return result


# ---- boxes: start, test, show -------------------------------------------------------------------

def new_detector(cfg, dataset):
    """A Detector on a new ViT or that of --init."""
    config = run.vit_config(cfg)
    grid = config.image_size // config.patch_size
    if cfg.window > grid:
        raise Refused(f'--window {cfg.window} is wider than the {grid} x {grid} patches of an image')

    # distances are learnt where there are windows; the table of positions is resized at every step
    rel_pos = grid if cfg.window else 0
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
def find(model, batch, originals, choose):
    """As Detector.detect, on images of their original (height, width), with `pasted`, masks of that size."""
    found = model(normalize(model, batch), choose=choose)
    results = []
    for part, size, original in zip(found, batch['sizes'], originals):
        part = {name: x.cpu() for name, x in part.items()}      # else a GPU is waited for at each mask
        part = to_original(part, size, original)
        masks = zip(part['masks'], part['boxes'])
        results.append(dict(part, pasted=[paste_mask(mask, box, original) >= .5 for mask, box in masks]))
    return results


def result_rows(found, image):
    """Detections as rows of COCO's results, of labels as categories; mask_score is EVA's for masks."""
    scores = found['scores'], found['scores'] * maskness(found['masks'])
    columns = [column.tolist() for column in (found['boxes'], found['classes'], *scores)]
    rows = []
    for (x1, y1, x2, y2), k, score, mask_score, mask in zip(*columns, found['pasted']):
        rows.append(dict(
            image_id=image, category_id=k, bbox=[x1, y1, x2 - x1, y2 - y1], score=score,
            segmentation=dict(counts=data.encode_mask(mask)), mask_score=mask_score))
    return rows


def judge_boxes(model, dataset, cfg, device, num, rank, world):
    """AP of boxes and masks of the first num images; each process looks at its part of them."""
    choose = ways_to_choose(cfg, dataset.lvis)
    batch_size = math.ceil(cfg.batch_size / world / 2)
    seen = {}                   # {image id: (image, its objects, what was found)}, rows of COCO's jsons
    batches = data.eval_batches(
        dataset, batch_size, cfg.image_size, num, device, cfg.workers, rank=rank, world=world)
    for batch in batches:
        truth = dataset.truth(batch)
        found = find(model, batch, [(image['height'], image['width']) for image, _ in truth], choose)
        for n, (image, objects) in enumerate(truth):
            # others fill the last process's part, or stand for unreadable ones
            if batch['position'][n] < num:
                seen[image['id']] = image, objects, result_rows(found[n], image['id'])

    # all processes' images as one json
    seen = dict(run.gather_lists(list(seen.items()))).values()
    images = [image for image, _, _ in seen]
    objects = [row for _, rows, _ in seen for row in rows]
    truth = dict(images=images, annotations=objects, categories=dataset.categories)
    results = [row for _, _, rows in seen for row in rows]
    most = (300,) if dataset.lvis else (1, 10, 100)
    boxes = percent(average_precision(truth, results, 'bbox', most))
    of_masks = [dict(row, score=row['mask_score']) for row in results] if cfg.soft else results
    masks = percent(average_precision(truth, of_masks, 'segm', most))
    metrics = {f'box_{name}': value for name, value in boxes.items()}
    metrics.update({f'mask_{name}': value for name, value in masks.items()})
    if dataset.coarse:
        metrics.update(vocabulary_gap(truth, results, dataset.coarse, metrics['box_ap']))
    return metrics


def percent(numbers):
    """average_precision's numbers as they are printed; -1, of nothing, stays."""
    return {name.lower(): max(-1., 100 * value) for name, value in numbers.items()}


def vocabulary_gap(truth, results, coarse, fine_ap):
    """What many classes cost (EVA, section 3.3: LVIS beside COCO): AP by each class's coarse one, and the gap."""
    objects = [dict(row, category_id=coarse[row['category_id']]) for row in truth['annotations']]
    found = [dict(row, category_id=coarse[row['category_id']]) for row in results]
    truth = dict(truth, annotations=objects, categories=[dict(id=k) for k in set(coarse)])
    coarse_ap = percent(average_precision(truth, found))['ap']
    return dict(box_ap_coarse=coarse_ap, gap=1 - fine_ap / coarse_ap if coarse_ap > 0 else -1.)


def draw_objects(image, found, names, side=320):
    """A PIL image of uint8 [3, H, W], `side` long, with what was found, or is there, of a score of .5 or more."""
    rows = (found['scores'] >= .5).nonzero()[:, 0].tolist()
    labels = found['classes'].tolist()
    pixels = image.permute(1, 2, 0).cpu().float()
    for row in rows:
        colour = pixels.new_tensor(class_colour(labels[row]))
        pixels = torch.where(found['pasted'][row].cpu()[..., None], .55 * pixels + .45 * colour, pixels)
    picture = Image.fromarray(pixels.byte().numpy())
    scale = side / max(picture.size)
    picture = picture.resize([max(1, round(n * scale)) for n in picture.size], Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    for row in rows:
        x1, y1, x2, y2 = (scale * found['boxes'][row].cpu().double()).tolist()
        corners = x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)
        draw.rectangle(corners, outline=class_colour(labels[row]), width=2)
        score = found['scores'][row]
        word = names[labels[row]] + (f' {score:.2f}' if score < 1 else '')      # the truth has no score
        draw.text((x1 + 3, y1 + 1), word, fill='white', font=font, stroke_width=2, stroke_fill='black')
    return picture


def show_boxes(model, dataset, cfg, device, num=6):
    """The sheet's columns and legend: validation images with the truth, and with what was found."""
    batch = next(iter(data.eval_batches(dataset, num, cfg.image_size, num, device)))
    found = find(model, batch, batch['sizes'], ways_to_choose(cfg, dataset.lvis))
    columns = {'truth': [], 'found': []}
    for n, target in enumerate(batch['targets']):
        size = batch['sizes'][n]
        image = batch['images'][n, :, :size[0], :size[1]]
        masks = []
        for mask in target['masks']:
            if isinstance(mask, list):
                mask = torch.from_numpy(data.decode_mask(data.fill_polygons(mask, size), size))
            masks.append(mask)
        truth = dict(target, classes=target['labels'], scores=torch.ones(len(masks)), pasted=masks)
        columns['truth'].append(draw_objects(image, truth, dataset.classes))
        columns['found'].append(draw_objects(image, found[n], dataset.classes))
    return columns, {}


def boxes_in(model, image, names, cfg, device):
    """What is found in a PIL image, and no legend."""
    original = image.height, image.width
    size = tuple(max(1, round(n * cfg.image_size / max(original))) for n in original)
    pixels = data.to_tensor(image.resize(size[::-1], Image.Resampling.BILINEAR))
    batch = dict(images=data.pad_to(pixels, cfg.image_size)[None].to(device), sizes=[size])
    found = find(model, batch, [original], ways_to_choose(cfg, model.config.sigmoid))[0]
    return draw_objects(data.to_tensor(image), found, names, 640), {}


# ---- maps: mean IoU; a linear classifier of patches ---------------------------------------------

def confusion(predictions, labels, num_classes):
    """How many pixels of each class are taken for each: [K, K], rows are the truth; no class, no count."""
    known = (labels >= 0) & (labels < num_classes)
    pairs = labels[known].long() * num_classes + predictions[known].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def mean_iou(counts):
    """The numbers of all images' confusion matrix [K, K], and the classes' IoU [K], nan if nowhere."""
    counts = counts.double()
    right = counts.diagonal()
    there = counts.sum(1)
    iou = right / (there + counts.sum(0) - right)
    return dict(miou=iou.nanmean().item(), pixel_accuracy=(right.sum() / there.sum()).item(),
                class_accuracy=(right / there).nanmean().item()), iou


class LinearHead(nn.Conv2d):
    """LinearHead(width, K, 1) classifies patches; its logits are interpolated to pixels."""

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
    """The cheapest way to give every row of cost (numpy [n, m]) a column of its own, or every column a row.
    The Hungarian algorithm: prices u and v, u[i] + v[j] <= cost[i, j]; rows enter by the shortest path."""
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
            reduced = cost[i] - u[i] - v
            way[~used & (reduced < distance)] = column
            distance = np.where(used, np.inf, np.minimum(distance, reduced))
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
    """labels [B, H, W] -> of each image the classes that are there [n], and their masks, float [n, H, W].
    The CPU must know n: it is told all images' at once."""
    none = (labels < 0) | (labels >= num_classes)
    there = labels.new_zeros(len(labels), num_classes + 1)
    there.scatter_(1, labels.masked_fill(none, num_classes).flatten(1), 1)
    image, classes = there[:, :-1].cpu().nonzero(as_tuple=True)
    nums = image.bincount(minlength=len(labels)).tolist()
    classes = run.send(classes, labels.device).split(nums)
    return [(own, (one == own[:, None, None]).float()) for one, own in zip(labels, classes)]


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
    """Points to learn from [n, P, 2]: others, and candidates [n, 3P, 2] where masks are least sure."""
    num = candidates.shape[1] // 3 - others.shape[1]
    doubt = -sample_points(masks, candidates).abs()     # [n, 3P]
    rows = doubt.topk(num, dim=1).indices
    chosen = candidates.gather(1, rows[..., None].expand(-1, -1, 2))
    return torch.cat((chosen, others), 1)


@torch.no_grad()
def match_costs(logits, masks, targets, draw, layer, P):
    """match_cost of each image, at P random points. logits [B, Q, K + 1], masks [B, Q, h, w];
    targets: split_labels of each image; draw(stream, num) gives [B, num] random numbers."""
    points = draw(f'match {layer}', P * 2).view(len(logits), P, 2)
    costs = []
    for i, (classes, goals) in enumerate(targets):
        costs.append(match_cost(logits[i], masks[i], classes, goals, points[i:i + 1]))
    return costs


def match_all(costs):
    """Which query is to find which mask, of all layers and images: costs[layer][image] [Q, n].
    -> for each layer [4, pairs]: image, query, mask counted over all images, and place within the image.
    Only a CPU can `assign`: all costs go there at once, and the pairs back."""
    device = costs[0][0].device
    flat = torch.cat([cost.flatten() for layer in costs for cost in layer])
    flat = flat.nan_to_num(1e9, 1e9, -1e9).double().cpu().numpy()
    layers = []
    begin = 0
    for layer in costs:
        pairs = []
        first = 0
        for image, cost in enumerate(layer):
            queries, columns = assign(flat[begin:begin + cost.numel()].reshape(cost.shape))
            num = len(queries)
            pairs.append(np.stack((np.full(num, image), queries, first + columns, np.arange(num))))
            begin += cost.numel()
            first += cost.shape[1]
        layers.append(np.concatenate(pairs, 1))
    return run.send(torch.from_numpy(np.stack(layers)), device)         # [layers, 4, pairs]


def mask_losses(logits, masks, targets, draw, layer, P):
    """The losses of a layer by itself: pair_losses of the pairs that cost least."""
    pairs = match_all([match_costs(logits, masks, targets, draw, layer, P)])[0]
    return pair_losses(logits, masks, targets, pairs, draw, layer, P)


def pair_losses(logits, masks, targets, pairs, draw, layer, P):
    """Sums of a layer's losses, [3]: of queries' classes, of P pixels of masks, of masks' overlap.
    Arguments as of match_costs; pairs [4, n] as of match_all. Images without labels do not count."""
    B, Q, num_logits = logits.shape
    K = num_logits - 1
    image, query, wanted, place = pairs

    # random points for each mask to learn from
    most = max(len(classes) for classes, _ in targets)
    num = P - int(.75 * P)
    candidates = draw(f'candidates {layer}', most * 3 * P * 2)
    candidates = candidates.view(B, most, 3 * P, 2)[image, place]
    others = draw(f'others {layer}', most * num * 2)
    others = others.view(B, most, num, 2)[image, place]

    # the pixels of these queries, and of the masks they are to find
    found = masks[image, query]                         # [n, h, w]
    points = uncertain_points(found, candidates, others)
    chosen = sample_points(found, points)               # [n, P]
    goals = torch.cat([goals for _, goals in targets])[wanted]
    goals = sample_points(goals, points)

    # what queries should say: the others nothing; in an image without labels they are not asked
    labels = torch.full((B, Q), K, device=logits.device)
    labels[image, query] = torch.cat([classes for classes, _ in targets])[wanted]
    for i, (classes, _) in enumerate(targets):
        if len(classes) == 0:
            labels[i] = IGNORED
    weight = torch.ones(K + 1, device=logits.device)
    weight[K] = NO_OBJECT
    said = logits.flatten(0, 1).float()
    class_loss = F.cross_entropy(said, labels.flatten(), weight, ignore_index=IGNORED, reduction='sum')

    # pixels and overlap of the queries with a mask
    pixels = F.binary_cross_entropy_with_logits(chosen, goals, reduction='none')
    inside = chosen.sigmoid()
    both = (inside * goals).sum(1)
    sizes = inside.sum(1) + goals.sum(1)
    dice = 1 - (2 * both + 1) / (sizes + 1)
    return torch.stack((class_loss, pixels.mean(1).sum(), dice.sum()))


# ---- maps: Mask2Former (arXiv:2112.01527) -------------------------------------------------------

def to_maps(x, sizes):
    """Tokens [B, N, C] of several maps, one after another -> [B, C, h, w] each."""
    parts = x.transpose(1, 2).split([h * w for h, w in sizes], 2)
    return [part.unflatten(2, size) for part, size in zip(parts, sizes)]


def to_tokens(maps):
    """The inverse of to_maps."""
    return torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)


def cell_centres(sizes, device=None):
    """(x, y) from 0 to 1 of the cells of maps of these (h, w), one map after another: [N, 2]."""
    def centres(n):
        return (torch.arange(n, device=device) + .5) / n
    return torch.cat([torch.cartesian_prod(centres(h), centres(w)) for h, w in sizes]).flip(1)


def sine_positions(size, channels, device=None):
    """Waves of a map's rows, then columns, its cells' positions (arXiv:2005.12872): [h * w, channels]."""
    half = channels // 2
    frequencies = 10000 ** -(torch.arange(0, half, 2, device=device) / half)

    def waves(n):
        angles = 2 * math.pi * torch.arange(1, n + 1, device=device)[:, None] / (n + 1e-6) * frequencies
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)     # [n, channels/2]

    h, w = size
    rows = waves(h)[:, None].expand(-1, w, -1)
    return torch.cat((rows, waves(w).expand(h, -1, -1)), -1).flatten(0, 1)


def sample_levels(values, sizes, places, weights):
    """Each query's weighted sum of samples of maps of these sizes: [B, Q, heads * head_dim].
    values [B, N, heads, head_dim]; places [B, Q, heads, levels, P, 2]; weights without the 2."""
    B, Q, heads, _, _ = weights.shape
    places = (2 * places.float() - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [levels, B * heads, Q, P, 2]
    weights = weights.float().permute(3, 0, 2, 1, 4).flatten(1, 2)             # [levels, B * heads, Q, P]
    total = 0
    for i, level in enumerate(values.split([h * w for h, w in sizes], 1)):
        level = level.float().permute(0, 2, 3, 1).reshape(B * heads, -1, *sizes[i])
        samples = F.grid_sample(level, places[i], align_corners=False)      # [B * heads, head_dim, Q, P]
        total = total + (samples * weights[i, :, None]).sum(-1)
    return total.view(B, -1, Q).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Attention to a few points of several maps, around each query's place; offsets are in cells
    (arXiv:2010.04159). ratio: the values' width as a share of the width."""

    def __init__(self, width, heads, levels, points=4, ratio=1.):
        super().__init__()
        self.shape = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.values = nn.Linear(width, int(width * ratio))
        self.proj = nn.Linear(int(width * ratio), width)

    def forward(self, queries, places, memory, sizes):
        """[B, Q, D] to the same. places [Q, 2] or [B, Q, levels, 2]; memory [B, N, D]: maps of sizes."""
        shape = *queries.shape[:2], *self.shape
        offsets = self.offsets(queries).view(*shape, 2)
        cells = M.constant(tuple((w, h) for h, w in sizes), offsets.device)     # [levels, 2]
        offsets = offsets / cells.to(offsets)[:, None]
        if places.ndim == 2:
            places = places[:, None]                                    # the same for all levels
        places = places[..., None, :, None, :] + offsets
        weights = self.weights(queries).unflatten(2, (shape[2], -1)).softmax(-1).view(shape)
        values = self.values(memory).unflatten(2, (shape[2], -1))
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
    """Three of four maps, of `inputs` channels, exchange what they know and tell it to the finest."""

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
        """[B, C_i, h, w], finest first -> [B, C, h, w] of the three, coarsest first, and of the finest."""
        levels = [project(x) for project, x in zip(self.inputs, maps[:0:-1])]
        sizes = [tuple(level.shape[2:]) for level in levels]
        x = to_tokens(levels)                                           # [B, N, C]
        positions = [sine_positions(size, x.shape[2], x.device) for size in sizes]
        positions = torch.cat([p + embed for p, embed in zip(positions, self.level_embed)])     # [N, C]
        centres = cell_centres(sizes, x.device)
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
        x = self.norms[1](x + self.attn(x + positions, x + positions, x, need_weights=False)[0])
        return self.norms[2](x + self.fc2(self.fc1(x).relu()))


class MaskDecoder(nn.Module):
    """Queries that become a class, or none, and a mask; a layer sees only where the mask before it is."""

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
        with torch.autocast(masks.device.type, enabled=False):      # a sum over queries
            scores = torch.einsum('bqk,bqhw->bkhw', classes, masks.sigmoid())
        return F.interpolate(scores, size=size, mode='bilinear')

    def losses(self, maps, labels, draw):
        """Sums of the losses of all layers' predictions, and what to divide them by: the weights of all
        queries, the number of masks. labels [B, H, W]; draw as in mask_losses."""
        targets = split_labels(labels, self.config.num_classes)
        P = self.config.points

        # products in bfloat16, as when it is judged: the original has float16, and float32 in its pixel
        # decoder. Here samples, their places, costs and losses are float32, as they need its digits
        predictions = self.decoder(*self.pixels(maps))
        with torch.autocast(labels.device.type, enabled=False):
            costs = [match_costs(*pair, targets, draw, i, P) for i, pair in enumerate(predictions)]
            sums = 0
            for i, pairs in enumerate(match_all(costs)):
                sums = sums + pair_losses(*predictions[i], targets, pairs, draw, i, P)

        # a query without a mask weighs NO_OBJECT, in an image without labels nothing
        Q = self.config.queries
        num = [min(Q, len(classes)) for classes, _ in targets]
        num = torch.tensor(num, dtype=sums.dtype)       # masks, [B], the CPU's
        weights = torch.where(num > 0, num + NO_OBJECT * (Q - num), 0)

        classes, pixels, dice = sums
        return {'classes': (CLASS_WEIGHT * classes, weights.sum()),
                'pixels': (PIXEL_WEIGHT * pixels, num.sum()),
                'dice': (DICE_WEIGHT * dice, num.sum())}


# ---- maps: ViT-Adapter (arXiv:2205.08534) -------------------------------------------------------

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
        if self.training:           # means of the processes' means: they have as many images each
            mean = run.gather(x.float().mean((0, 2, 3))[None]).mean(0)
            squares = (x.float() - mean[:, None, None]).square()
            variance = run.gather(squares.mean((0, 2, 3))[None]).mean(0)
            self.mean.lerp_(mean.detach(), .1)
            self.variance.lerp_(variance.detach(), .1)
        scale = self.weight.float() * (variance + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class SpatialPrior(nn.Module):
    """A small convolutional network: images [B, 3, H, W] -> maps [B, D, ...] at 1/4, 1/8, 1/16, 1/32."""

    def __init__(self, width, inner):
        super().__init__()
        channels = [inner, 2 * inner, 4 * inner, 4 * inner]

        def normed(inputs, outputs, stride):
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(conv, BatchNorm(outputs), nn.ReLU())
        self.stem = nn.Sequential(normed(3, inner, 2), normed(inner, inner, 1), normed(inner, inner, 1),
                                  nn.MaxPool2d(3, 2, padding=1))
        self.convs = nn.ModuleList(normed(channels[i], channels[i + 1], 2) for i in range(3))
        self.projections = nn.ModuleList(nn.Conv2d(n, width, 1) for n in channels)

    def forward(self, images):
        maps = [self.stem(images)]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        return [project(x) for project, x in zip(self.projections, maps)]


class Injector(nn.Module):
    """The ViT's patches [B, h * w, D] look at the spatial maps [B, N, D]; their gain starts at 0."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)
        self.memory_norm = nn.LayerNorm(width, 1e-6)
        self.attn = DeformableAttention(width, heads, levels=3, ratio=.5)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x, places, memory, sizes):
        return x + self.gamma * self.attn(self.norm(x), places, self.memory_norm(memory), sizes)


class Extractor(nn.Module):
    """The spatial maps [B, N, D] look at the patches [B, h * w, D]; then an MLP with a convolution."""

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
        x = x + self.attn(self.norm(x), places, self.memory_norm(memory), [grid])
        maps = [self.conv(level) for level in to_maps(self.fc1(self.mlp_norm(x)), sizes)]
        return x + self.fc2(F.gelu(to_tokens(maps)))


class Adapter(nn.Module):
    """ViT-Adapter: maps beside a plain ViT, with 4, 2, 1 and 1/2 cells a patch along a side.
    Before each quarter of the blocks the patches take from the maps, after it they give to them."""

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
        centres = cell_centres(sizes[1:2], images.device)

        # the convolutions see the image as if patches were 16 pixels wide
        finest, *maps = self.prior(F.interpolate(images, size=(16 * h, 16 * w), mode='bilinear'))
        beside = to_tokens([x + embed[:, None, None] for x, embed in zip(maps, self.level_embed)])
        after = []                                          # the patches after each quarter of the blocks
        begins = [len(vit.blocks) * i // 4 for i in range(5)]

        def between(layer, x):
            """At a quarter's end the maps look at the patches; at its beginning these at the maps."""
            nonlocal beside
            if layer not in begins:
                return x
            quarter = begins.index(layer)
            patches = x[:, vit.num_before:]
            if quarter > 0:
                after.append(patches)
                last = 6 if quarter == 4 else quarter
                for extract in self.extractors[quarter - 1:last]:
                    beside = extract(beside, cells, patches, (h, w), sizes)
            if quarter < 4:
                patches = self.injectors[quarter](patches, centres, beside, sizes)
            return torch.cat((x[:, :vit.num_before], patches), 1)

        vit.tokens(images, drop=drop, between=between)
        finer, *maps = to_maps(beside, sizes)
        found = []
        for norm, level, patches in zip(self.norms, (self.up(finer) + finest, finer, *maps), after):
            patches = F.interpolate(to_maps(patches, [(h, w)])[0], size=level.shape[2:], mode='bilinear')
            found.append(norm(patches + level))
        return found


class PlaceBias(nn.Module):
    """BEiT's relative positions (arXiv:2106.08254), [heads, 1 + N, 1 + N]: a logit by how far away a patch
    is, and one each for class token to patch, patch to class token, class token to itself."""

    def __init__(self, heads, grid):
        super().__init__()
        self.grid = tuple(grid)
        self.table = nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))

    def forward(self):
        h, w = self.grid
        num = len(self.table) - 3           # of distances, (2h - 1) * (2w - 1) in rows; the middle one is 0
        y = torch.arange(h, device=self.table.device)
        x = torch.arange(w, device=self.table.device)
        places = (y[:, None] * (2 * w - 1) + x).flatten()
        rows = F.pad(places[:, None] - places + num // 2, (1, 0, 1, 0), value=num)
        rows[1:, 0] = num + 1
        rows[0, 0] = num + 2
        return self.table[rows].permute(2, 0, 1)


# ---- maps: the model ----------------------------------------------------------------------------

@dataclass
class SegmenterConfig:
    vit: M.ViTConfig                # or the dict of one
    num_classes: int
    head: str = 'linear'            # or mask2former
    adapter: dict = None            # heads and inner width of an Adapter; else maps are the pyramid's
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

        # the head, and the four maps that Mask2Former sees
        if config.head == 'linear':
            self.head = LinearHead(width, config.num_classes, 1)
        elif config.adapter:
            self.adapter = Adapter(width, **config.adapter)
            self.vit.norm = nn.Identity()
            self.head = Mask2FormerHead([width] * 4, config)
        else:
            self.pyramid = Pyramid(width, config.channels)
            self.head = Mask2FormerHead([config.channels] * 4, config)

        # the released ones: BEiT's relative positions
        if config.bias:
            for block in self.vit.blocks:
                block.attn.rel_bias = PlaceBias(config.vit.heads, config.bias)

    def maps(self, images, drop=None):
        """What the head sees: maps [B, C, h, w], finest first."""
        if self.adapter:
            return self.adapter(self.vit, images, drop)

        tokens = self.vit.features(images, drop=drop)
        grid = [n // self.vit.patch_size for n in images.shape[2:]]
        last = to_maps(tokens[:, self.vit.num_before:], [grid])[0]        # [B, D, h, w]
        return self.pyramid(last)[:4] if self.pyramid else [last]

    def forward(self, batch, draw=None, drop=None):
        """batch: images [B, 3, H, W] normalised -> scores [B, K, H, W]. With draw, and labels [B, H, W],
        losses {name: (sum, what to divide it by)}. draw(stream, num) gives [B, num] random numbers."""
        images = batch['images']
        maps = self.maps(images, drop)

        # what the head makes of them
        if draw is None:
            return self.head.scores(maps, images.shape[2:])
        return self.head.losses(maps, batch['labels'], draw)

    @staticmethod
    def from_released(state, **options):
        """A Segmenter in eval mode of a released one's tensors; options: what they do not show."""
        name = 'backbone.pos_embed'
        if name in state and state[name].ndim == 3:         # EVA's adapter gives the class token none
            state = {**state, name: F.pad(state[name][:, 1:], (0, 0, 1, 0))}
        return read_released(Segmenter, state, SEGMENTER, segmenter_config, **options)


# What EVA's released segmentors call our tensors: rules as in model.py, whose EVA blocks are used.
DEFORMABLE = [('sampling_offsets.*', 'offsets.*', 'same'), ('attention_weights.*', 'weights.*', 'same'),
              ('value_proj.*', 'values.*', 'same'), ('output_proj.*', 'proj.*', 'same')]
INTERACTION = M.under('attn.', 'attn.', DEFORMABLE) + M.under('ffn.', '', M.same('fc1.*', 'fc2.*')) + [
    *M.same('gamma'), ('query_norm.*', 'norm.*', 'same'), ('feat_norm.*', 'memory_norm.*', 'same'),
    ('ffn_norm.*', 'mlp_norm.*', 'same'), ('ffn.dwconv.dwconv.*', 'conv.*', 'same')]
BATCH_NORM = [*M.same('weight', 'bias'), ('running_mean', 'mean', 'same'),
              ('running_var', 'variance', 'same'), ('num_batches_tracked', '-', 'drop')]
ADAPTER = M.same('level_embed', 'up.*')
ADAPTER += M.under('interactions.*.injector.', 'injectors.*.', INTERACTION)
ADAPTER += M.under('interactions.*.extractor.', 'extractors.*.', INTERACTION)
ADAPTER += M.under('interactions.3.extra_extractors.0.', 'extractors.4.', INTERACTION)
ADAPTER += M.under('interactions.3.extra_extractors.1.', 'extractors.5.', INTERACTION)
for i in range(4):
    ADAPTER += M.under(f'norm{i + 1}.', f'norms.{i}.', BATCH_NORM)
    ADAPTER += M.under(f'spm.fc{i + 1}.', f'prior.projections.{i}.', M.same('*'))
for i in range(3):
    ADAPTER += M.under(f'spm.stem.{3 * i}.', f'prior.stem.{i}.0.', M.same('weight'))
    ADAPTER += M.under(f'spm.stem.{3 * i + 1}.', f'prior.stem.{i}.1.', BATCH_NORM)
    ADAPTER += M.under(f'spm.conv{i + 2}.0.', f'prior.convs.{i}.0.', M.same('weight'))
    ADAPTER += M.under(f'spm.conv{i + 2}.1.', f'prior.convs.{i}.1.', BATCH_NORM)
LAYER = [('ffns.0.layers.0.0.*', 'fc1.*', 'same'), ('ffns.0.layers.1.*', 'fc2.*', 'same'),
         ('norms.*.*', 'norms.*.*', 'same')]
CONV = [('conv.*', '0.*', 'same'), ('gn.*', '1.*', 'same')]
PIXEL_DECODER = M.under('encoder.layers.*.', 'layers.*.', LAYER)
PIXEL_DECODER += M.under('encoder.layers.*.attentions.0.', 'layers.*.attn.', DEFORMABLE)
PIXEL_DECODER += M.under('lateral_convs.0.', 'lateral.', CONV) + M.under('output_convs.0.', 'output.', CONV)
PIXEL_DECODER += M.under('input_convs.*.', 'inputs.*.', CONV) + [
    ('level_encoding.weight', 'level_embed', 'same'), ('mask_feature.*', 'finest.*', 'same')]
ATTENTION = M.same('in_proj_weight', 'in_proj_bias', 'out_proj.*')
LAYER += M.under('attentions.0.attn.', 'cross.', ATTENTION)
LAYER += M.under('attentions.1.attn.', 'attn.', ATTENTION)
MASK_DECODER = M.under('transformer_decoder.layers.*.', 'layers.*.', LAYER) + [
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
    vit = M.vit_config(state, 'vit.', pool=None)
    vit.update(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    bias = None
    if 'vit.blocks.0.attn.rel_bias.table' in state:
        bias = (vit['image_size'] // vit['patch_size'],) * 2
        vit['heads'] = state['vit.blocks.0.attn.rel_bias.table'].shape[1]

    # sampling has an offset for each head, level (3), point (4) and axis (2)
    adapter = dict(heads=len(state['adapter.injectors.0.attn.offsets.bias']) // 24,
                   inner=len(state['adapter.prior.stem.0.0.weight']))
    heads = len(state['head.pixels.layers.0.attn.offsets.bias']) // 24
    queries, channels = state['head.decoder.queries'].shape
    layers = [sum(name.startswith(f'head.{part}.layers.') and name.endswith('.fc1.bias') for name in state)
              for part in ('pixels', 'decoder')]
    return dict(vit=vit, num_classes=len(state['head.decoder.classes.bias']) - 1, head='mask2former',
                adapter=adapter, bias=bias, channels=channels, queries=queries, heads=heads, layers=layers,
                mlp_width=len(state['head.pixels.layers.0.fc1.bias']))


# ---- maps: start, test, show --------------------------------------------------------------------

@torch.no_grad()
def init_segmenter(model, seed=0):
    """First values of all but the ViT: Xavier's matrices, normal embeddings. Returns the model.
    Deformable attention looks evenly at points 1 to 4 cells away, each head in another direction."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.startswith('vit.'):
            continue
        if name.endswith(('level_embed', 'decoder.queries', 'decoder.positions')):
            weight.normal_(generator=generator)
        elif weight.ndim > 1:
            bound = (6 / (weight[0, 0].numel() * (weight.shape[0] + weight.shape[1]))) ** .5
            weight.uniform_(-bound, bound, generator=generator)
        elif name.endswith('bias'):
            weight.zero_()
    for attention in [module for module in model.modules() if isinstance(module, DeformableAttention)]:
        heads, levels, points = attention.shape
        angle = 2 * math.pi * torch.arange(heads) / heads
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(1, keepdim=True)           # on a square's border
        offsets = direction[:, None, None] * torch.arange(1, points + 1)[:, None]   # [heads, 1, points, 2]
        attention.offsets.bias.copy_(offsets.expand(-1, levels, -1, -1).flatten())
        attention.offsets.weight.zero_()
        attention.weights.weight.zero_()
    return model


def new_segmenter(cfg, num_classes):
    """New heads on a new ViT or that of --init."""
    size = run.vit_config(cfg)
    vit = start_vit(cfg, image_size=size.image_size, patch_size=size.patch_size, pool=None)
    if cfg.adapter and (len(vit.blocks) < 4 or vit.grid % 2):
        raise Refused('--adapter needs 4 blocks or more and an even number of patches a side, '
                      f'not {len(vit.blocks)} and {vit.grid} x {vit.grid} patches')
    adapter = dict(heads=vit.config.heads, inner=min(64, vit.config.width // 4)) if cfg.adapter else None
    C = cfg.channels
    model = Segmenter(SegmenterConfig(
        vit.config, num_classes, cfg.head, adapter, channels=C, queries=cfg.queries, heads=C // 32,
        mlp_width=4 * C, layers=cfg.layers, points=cfg.points, groups=min(32, C // 8)))
    model.vit.load_state_dict(vit.state_dict(), strict=not adapter)             # whose ViT has no last norm
    return init_segmenter(model, cfg.seed)


def next_segmenter(cfg, classes):
    """From another segmentor everything is taken; of its head's classes those of the same names, and others
    start afresh. Of one that has no names all are taken if there are as many, or none."""
    before = M.load(cfg.init, Segmenter)
    if cfg.head != before.config.head:
        raise Refused(f'{cfg.init} has a head {before.config.head}; give it as --head')
    if cfg.image_size != before.vit.image_size:
        raise Refused(f'{cfg.init} is of {before.vit.image_size} pixels; give them as --image_size')
    vit = replace(before.config.vit, drop_path=0. if cfg.freeze else cfg.drop_path)
    config = replace(before.config, vit=vit, num_classes=len(classes), points=cfg.points)
    model = init_segmenter(Segmenter(config), cfg.seed)

    # which rows of the old head are which of the new one; a Mask2Former's last is no object
    names = before.extra.get('classes')
    if names is None:
        names = range(before.config.num_classes)
        if len(names) == len(classes):
            run.say_order(cfg.init, classes)
            names = classes
    old = [k for k, name in enumerate(names) if name in classes]
    new = [classes.index(names[k]) for k in old]
    if cfg.head == 'mask2former':
        old.append(len(names))
        new.append(len(classes))

    taken = before.state_dict()
    for name, own in model.state_dict().items():
        if name.startswith(('head.weight', 'head.bias', 'head.decoder.classes.')):
            own[new] = taken[name][old]
            taken[name] = own
    model.load_state_dict(taken)
    return model


def windows(size, crop, stride):
    """Corners (y, x) of the windows over an image of (height, width); the last are moved back into it."""
    corners = []
    for n, side, step in zip(size, crop, stride):
        last = max(0, n - side)
        corners.append([*range(0, last, step), last])
    return [(y, x) for y in corners[0] for x in corners[1]]


def slide(model, images, crop, stride):
    """Mean scores [B, K, H, W] of windows of crop (height, width), a stride apart, of images [B, 3, H, W],
    normalised; 0, the mean, fills those that are smaller than a window."""
    H, W = images.shape[2:]
    images = F.pad(images, (0, max(0, crop[1] - W), 0, max(0, crop[0] - H)))
    times = torch.zeros_like(images[:1, :1])
    total = None
    for y, x in windows((H, W), crop, stride):
        window = ..., slice(y, y + crop[0]), slice(x, x + crop[1])
        scores = model(dict(images=images[window]))             # [B, K, height, width]
        if total is None:
            total = scores.new_zeros(*scores.shape[:2], *images.shape[2:])
        total[window] += scores
        times[window] += 1
    return (total / times)[:, :, :H, :W]


@torch.no_grad()
def predict(model, images, cfg):
    """uint8 [B, 3, H, W] -> each pixel's class [B, H, W]. Windows move over the image, its shorter side
    --image_size times each of --scales, with --flip mirrored too; their softmax adds up, as EVA's does."""
    S = cfg.image_size
    size = images.shape[2:]
    total = 0
    for mirrored in ([], [3]) if cfg.flip else ([],):           # axes that are turned round
        for scale in cfg.scales:
            scaled = [max(1, round(n * scale * S / min(size))) for n in size]
            view = F.interpolate(images.float(), size=scaled, mode='bilinear').flip(mirrored)
            scores = slide(model, model.vit.normalize(view), (S, S), [max(1, round(STRIDE * S))] * 2)
            total = total + F.interpolate(scores.flip(mirrored), size=size, mode='bilinear').softmax(1)
    return total.argmax(1)


def judge_maps(model, dataset, cfg, device, num, rank, world):
    """Mean IoU and accuracies of the first num images, of which each process looks at its share."""
    K = len(dataset.classes)
    counts = torch.zeros(K, K, dtype=torch.long, device=device)
    for images, labels in dataset.truth(range(rank, num, world), device):
        counts += confusion(predict(model, images, cfg), labels, K)
    counts = run.sum_over_processes(counts)
    numbers, _ = mean_iou(counts)

    # as where masks of 0 and 255 name two classes, of which 255 is none
    absent = [name for name, pixels in zip(dataset.classes, counts.sum(1).tolist()) if not pixels]
    dataset.broken |= {('classes have no pixel to judge by', name) for name in absent}
    return {name: 100 * number for name, number in numbers.items()}


def draw_classes(image, classes, names):
    """uint8 [3, H, W] under the colours of its classes [H, W], PIL, and {name: colour} of those there."""
    colours = torch.tensor([class_colour(k) for k in range(len(names))] + [(0, 0, 0)]).float()
    pixels = .4 * image.permute(1, 2, 0).cpu().float() + .6 * colours[classes.cpu()]
    legend = {names[k]: class_colour(k) for k in classes.unique().tolist() if k != IGNORED}
    return Image.fromarray(pixels.byte().numpy()), legend


def show_maps(model, dataset, cfg, device, num=4):
    """The sheet's columns and legend: validation images, what is predicted, the truth."""
    columns = {'image': [], 'found': [], 'truth': []}
    legend = {}
    for images, labels in dataset.truth(range(num), device):
        columns['image'] += list(images)
        for title, maps in (('found', predict(model, images, cfg)), ('truth', labels)):
            for image, classes in zip(images, maps):
                picture, there = draw_classes(image, classes, dataset.classes)
                columns[title].append(picture)
                legend.update(there)
    return columns, {name: legend[name] for name in dataset.classes if name in legend}


def classes_in(model, image, names, cfg, device):
    """A PIL image under what is predicted, and the legend."""
    pixels = data.to_tensor(image)
    return draw_classes(pixels, predict(model, pixels[None].to(device), cfg)[0], names)


# ---- what all heads share -----------------------------------------------------------------------

def settle(cfg):
    """Refuses options of other heads; settles what was not given."""
    kind = '' if cfg.head == 'boxes' else f'-{cfg.head}'
    others = 'images vocabulary stages window soft' if kind else 'classes scales flip'
    for name in others.split():
        if getattr(cfg, name) != getattr(Config, name):
            raise Refused(f'--{name} is not an option of --head {cfg.head}')
    others = 'classes images' if data.is_world(cfg.data) else 'vocabulary'
    for name in others.split():
        if getattr(cfg, name) != getattr(Config, name):
            raise Refused(f'--{name} is not an option of --data {cfg.data}')
    if cfg.adapter and cfg.head != 'mask2former':
        raise Refused('--adapter goes with --head mask2former')
    if cfg.init == 'scratch':       # as finetune.py says it
        cfg.init = ''
    if cfg.freeze is None:
        cfg.freeze = cfg.head == 'linear' and bool(cfg.init)
    cfg.out_dir = cfg.out_dir or f'out/detect_seg-{cfg.size}{kind}'


def open_dataset(cfg, split, names=None):
    """--data, for the head. names: of the classes that labels are numbers of; if None the data's own."""
    if cfg.head == 'boxes':
        return data.open_instances(cfg.data, split, cfg.images, cfg.scale_jitter, cfg.vocabulary, names)
    return data.open_maps(cfg.data, split, cfg.classes, cfg.scale_jitter, cfg.image_size, names)


def start_vit(cfg, **options):
    """The ViT that training starts from: that of --init, which may be a CLIP's, or a new one."""
    options.update(head=0, mask_token=False, drop_path=0. if cfg.freeze else cfg.drop_path)
    if cfg.init:
        return M.load(cfg.init, M.ViT, **options)
    return M.init_weights(M.ViT(run.vit_config(cfg, **options)), cfg.seed)


def build(cfg, dataset):
    """The model that training starts from; --init may hold a segmentor, ours or a released one."""
    held = M.read(cfg.init) if cfg.init else {}
    if cfg.head == 'boxes':
        model = new_detector(cfg, dataset)
    elif held.get('name') == 'Segmenter' or any(name.startswith('decode_head.') for name in M.unwrap(held)):
        model = next_segmenter(cfg, dataset.classes)
    else:
        model = new_segmenter(cfg, len(dataset.classes))
    side = cfg.image_size // model.vit.patch_size
    if cfg.head != 'linear' and side < 2:
        raise Refused(f'--image_size {cfg.image_size} is one patch; the pyramid of --head {cfg.head} needs 2 x 2')
    if cfg.freeze:
        model.vit.requires_grad_(False)
    return model


def normalize(model, batch):
    """The batch with images as the model sees them, float; padding is 0, the mean."""
    images = model.vit.normalize(batch['images'])
    for image, (height, width) in zip(images, batch.get('sizes', [])):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return dict(batch, images=images)


def evaluate(model, dataset, cfg, device, most, rank=0, world=1):
    """Numbers in per cent of at most so many validation images, of which each process looks at its part."""
    judge = judge_boxes if cfg.head == 'boxes' else judge_maps
    num = min(most, NUM_EVAL if data.is_world(cfg.data) else len(dataset))
    model.eval()
    with torch.no_grad(), run.gathered(model):
        metrics = judge(model, dataset, cfg, device, num, rank, world)
    model.train()
    return metrics


def draw_sheet(model, dataset, cfg, device):
    """objects.png or classes.png: validation images, what was found, the truth."""
    show = show_boxes if cfg.head == 'boxes' else show_maps
    what = 'objects' if cfg.head == 'boxes' else 'classes'
    path = f'{cfg.out_dir}/{what}.png'
    model.eval()
    with run.optional(path):
        columns, names = show(model, dataset, cfg, device)
        run.draw_sheet(path, columns, 320, names)
    model.train()


def class_colour(k):
    """A colour for each class, next to each other's unlike."""
    rgb = colorsys.hsv_to_rgb(k * .618034 % 1, (.9, .55, .75)[k % 3], (.9, 1., .6)[k // 3 % 3])
    return tuple(round(255 * x) for x in rgb)


def apply_model(cfg, device, rank, world):
    """--eval: the numbers of any model, ours or released; --image: what it finds in a picture."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    model = run.to_device(M.load(path, Detector if cfg.head == 'boxes' else Segmenter), cfg, device)
    if cfg.image_size == RECIPES[cfg.head][cfg.size]['image_size']:         # no other was asked for
        default = cfg.image_size if cfg.head == 'boxes' else model.vit.image_size
        cfg.image_size = model.extra.get('image_size', default)
    if model.config.vit.rel_pos:
        stretch_distances(model.vit, [cfg.image_size // model.vit.patch_size] * 2)
    K = model.config.num_classes
    names = model.extra.get('classes')
    if cfg.eval:
        dataset = open_dataset(cfg, 'val', names)
        if len(dataset.classes) != K:
            raise Refused(f'{path} knows {K} classes, --data {cfg.data} has {len(dataset.classes)}')
        if names is None:
            run.say_order(path, dataset.classes)
        run.say_judged(dataset)
        print0(run.table(evaluate(model, dataset, cfg, device, math.inf, rank, world)))
        run.report_broken(dataset)
        return

    image = data.read_image(cfg.image)
    names = names or [str(k) for k in range(K)]
    apply = boxes_in if cfg.head == 'boxes' else classes_in
    picture, legend = apply(model, image, names, cfg, device)
    path = f'{cfg.out_dir}/{Path(cfg.image).stem}.found.png'
    run.draw_sheet(path, {'image': [image], 'found': [picture]}, 640, legend)
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
    val_set = open_dataset(cfg, 'val', train_set.classes)
    run.settle_steps(cfg, train_set)
    if run.finished(cfg):
        return
    run.introduce(train_set, val_set)
    model = build(cfg, train_set)
    if not cfg.freeze:
        cells = 21.3 * model.vit.grid ** 2          # of the pyramid: 16 + 4 + 1 + 1/4 + 1/16 times the patches
        heads = HEAD_BYTES[cfg.head] * cells * cfg.channels
        run.settle_memory(cfg, model, device, world, beside=heads)
    model = run.to_device(model, cfg, device, mesh)
    optimizer = run.make_optimizer(model, cfg, cfg.layer_decay)
    for group in optimizer.param_groups:
        if cfg.head == 'linear' and group['lr_scale'] == 1:
            group['lr_scale'] = LINEAR_RATE
    about = run.describe(train_set, val_set, classes=train_set.classes)
    start, constants = run.resume(cfg.out_dir, model, optimizer, cfg, about=about)

    K = len(train_set.classes)
    most = max(8, cfg.steps * cfg.batch_size)       # images to test on: a short run has a short test
    print0(f'{cfg.head} on {cfg.size} from {cfg.init or "scratch"}: '
           f'{run.count_parameters(model) / 1e6:.2f}M parameters, {K} classes, '
           f'{cfg.image_size} px; {cfg.steps:,} steps of {cfg.batch_size} images on {device}')
    log = run.Log(cfg, start, device)
    batches = data.batches(train_set, cfg.batch_size, cfg.image_size, start, cfg.steps, cfg.seed,
                           device, cfg.workers, rank=rank, world=world)
    batches = run.ahead(batches, device)
    share = cfg.batch_size // world

    for step, batch in zip(range(start, cfg.steps), log.watch(batches)):
        lr = run.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale']

        # random numbers are functions of an image's place in the run
        position = run.send(step * cfg.batch_size + rank * share + torch.arange(share), device)

        def draw(stream, num):
            return data.uniform(cfg.seed, stream, position, num)        # [B, num]

        drop = draw('drop', 2 * len(model.vit.blocks)).unflatten(1, (-1, 2))
        whole_batch = torch.full((), step, device=device)
        batch['class_draw'] = data.uniform(cfg.seed, 'classes', whole_batch, K)     # LVIS, [K]

        # each loss is a mean over what counts in the global batch; FSDP takes the processes' mean
        losses = model(normalize(model, batch), draw, drop)             # {name: (sum, count)}
        sums = torch.stack([part.float() for part, _ in losses.values()])
        counts = [torch.zeros((), device=device) + count for _, count in losses.values()]
        counts = run.sum_over_processes(torch.stack(counts))
        loss = (sums / counts.clamp(min=1)).sum()
        (loss * world).backward()

        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        log.update(optimizer, grad_norm)
        optimizer.zero_grad(set_to_none=True)

        # log, save, evaluate
        if log.due(step):
            log.write(step, loss=run.sum_over_processes(loss), lr=lr, grad_norm=grad_norm)
        done = step + 1
        stopping = log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg, constants, about=about)
            if stopping:
                log.leave(done)
            draw_sheet(model, val_set, cfg, device)
            metrics = evaluate(model, val_set, cfg, device, min(most, 100), rank, world)
            log.say(step, **{name: metrics[name] for name in SAID if name in metrics})

    # what the run leaves behind, the weights first
    run.save_model(model, f'{cfg.out_dir}/model.pt', classes=train_set.classes, image_size=cfg.image_size)
    metrics = evaluate(model, val_set, cfg, device, most, rank, world)
    draw_sheet(model, val_set, cfg, device)
    log.finish(model, 'training loss', {}, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
