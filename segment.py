"""
Semantic segmentation, a class for every pixel, as EVA was judged by it (arXiv:2211.07636, section 3.4): a linear
classifier of patches, the first thing to read; Mask2Former (arXiv:2112.01527) on ViTDet's pyramid or, with --adapter,
on ViT-Adapter (arXiv:2205.08534), which is EVA's; mean IoU.

    python detect_seg.py --head linear --size micro --init eva.pt          # laptop: what frozen patches know
    python detect_seg.py --head mask2former --size micro --init eva.pt     # the built-in world at 128 pixels
    python detect_seg.py --head linear --data camvid --classes 11 --ignore 11 --init eva.pt
    python detect_seg.py --head linear --init out/segment-micro/model.pt --image a.jpg
    torchrun --nproc_per_node=8 detect_seg.py --head mask2former --size g --data ADEChallengeData2016 --init stuff.pt

Places are (x, y) from 0 to 1 over an image; a map's cell i of n covers i/n to (i+1)/n.
"""
import colorsys
import functools
import math
import os
import runpy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import model as M
import run
from detect_seg import IMAGENET_MEAN, IMAGENET_STD, Pyramid
from model import print0
from run import option


@dataclass
class Config(run.Run):
    size: str = option('nano', 'row of RECIPES here: a row of SIZES in model.py, or g-stuff')
    init: str = option('', 'file to start from: an EVA, a CLIP, a segmentor, ours or released; scratch or empty: none')
    head: str = option('linear', 'linear or mask2former')
    adapter: bool = option(False, 'under mask2former: ViT-Adapter, instead of the pyramid of the last map')
    freeze: bool = option(None, 'the ViT stays as it is; if not given: the one of --init does under the linear head')
    classes: str = option('', "their number, or a file with a line for each, '-' where a value is none; if empty the "
                              "data's classes.txt, or what its layout tells (ADE20K, COCO-Stuff)")
    ignore: int = option(255, 'value of pixels that are neither learnt nor judged')
    zero_label: bool = option(None, 'label 0 is ignored and classes count from 1; if not given: so it is in ADE20K')
    jitter: tuple = option((.5, 2.), 'the image at so much of the size at which its shorter side fits')
    channels: int = option(256, 'of the pyramid and of Mask2Former')
    queries: int = option(100, 'masks that Mask2Former proposes')
    layers: tuple = option((6, 9), "of Mask2Former's encoder and decoder")
    points: int = option(12544, 'of a mask, from which it is learnt')
    whole: bool = option(False, 'test the whole image at once, instead of windows of --image_size')
    scales: tuple = option((1.,), 'test at these sizes and take the mean, 1: the shorter side is --image_size')
    flip: bool = option(False, 'test the mirror image too')
    drop_path: float = option(0., 'chance of skipping a residual branch in the last block, growing linearly with depth')
    warmup_steps: int = option(50, 'steps of linear warm-up')
    weight_decay: float = option(.05, 'of matrices; vectors and positions have none')
    layer_decay: float = option(.9, "each layer of the ViT learns at so much of the next one's rate")
    betas: tuple = option((.9, .999), "AdamW's")
    eps: float = option(1e-8, "AdamW's")
    grad_clip: float = option(1., 'largest global gradient norm')


SMALL = dict(image_size=128, patch_size=8, batch_size=8, steps=1500, lr=2e-3, channels=64, queries=30, layers=(1., 3.),
             points=512)
EVA = dict(image_size=896, patch_size=16, adapter=True, channels=1024, queries=200, layers=(6., 8.), layer_decay=.95,
           drop_path=.5)
RECIPES = {  # differences from the defaults. g: EVA on ADE20K, from g-stuff, EVA on COCO-Stuff; s, b, l: not tried
    'pico': SMALL, 'nano': SMALL, 'micro': SMALL, 'mini': SMALL, 'ti': SMALL,
    's': dict(image_size=512, patch_size=16, batch_size=16, steps=40_000, lr=1e-4, drop_path=.1),
    'b': dict(image_size=512, patch_size=16, batch_size=16, steps=80_000, lr=6e-5, drop_path=.1),
    'l': dict(image_size=640, patch_size=16, batch_size=16, steps=80_000, lr=2e-5, drop_path=.3),
    'g': dict(EVA, batch_size=64, steps=20_000, warmup_steps=500, lr=2.5e-5),
    'g-stuff': dict(EVA, batch_size=32, steps=60_000, warmup_steps=1500, lr=1.5e-5),
}
IGNORED = -1            # a pixel's class where there is none to learn
NUM_EVAL = 500          # validation images of the built-in world; of others all
STRIDE = 512 / 896      # of the windows that an image is tested in, as a share of their side
LARGEST_SHARE = .75     # of a crop that one class may have, if ten tries find another
LINEAR_RATE = 10.       # times --lr, of a linear head: it starts from nothing, on features that are there
NO_OBJECT = .1          # weight of a query that should find nothing, beside one that should find a mask
LOSS_WEIGHTS = 2., 5., 5.       # of classes, of pixels, of overlap (dice)


# ---- the linear head --------------------------------------------------------------------------------------------

class LinearHead(nn.Conv2d):
    """A linear classifier of patches, whose logits are interpolated to pixels: what features know as they are."""
    loss_weights = 1.,

    def __init__(self, width, num_classes):
        super().__init__(width, num_classes, 1)

    def scores(self, maps, size):
        """maps: a list of [B, D, h, w], of which it sees the first -> logits [B, K, H, W]."""
        return F.interpolate(self(maps[0]).float(), size=size, mode='bilinear')

    def counts(self, labels):
        """What the losses are divided by: the pixels that have a class. labels [B, H, W] -> [1]."""
        return (labels != IGNORED).sum().float()[None]

    def losses(self, maps, labels, draw):
        """Sum of the cross-entropies of all pixels, [1]. labels [B, H, W]; draw: nothing is random."""
        scores = self.scores(maps, labels.shape[1:])
        return F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction='sum')[None]


def confusion(predictions, labels, num_classes):
    """How many pixels of each class are taken for each, [K, K]: rows are the truth. Both of one shape; what is no class
    in labels does not count."""
    known = (labels >= 0) & (labels < num_classes)
    pairs = labels[known].long() * num_classes + predictions[known].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def mean_iou(counts):
    """A confusion matrix [K, K] of all images -> their numbers, and IoU [K], nan where a class is neither there nor
    predicted. A class that is predicted but never there counts as an IoU of 0, and in no accuracy."""
    counts = counts.double()
    right, there, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = right / (there + predicted - right), right / there
    mean = lambda x: float(x[~x.isnan()].mean())
    return dict(miou=mean(iou), pixel_accuracy=float(right.sum() / there.sum()), class_accuracy=mean(accuracy)), iou


# ---- which query for which mask ---------------------------------------------------------------------------------

def assign(cost):
    """The cheapest way to give every row a column of its own or, where columns are fewer, every column a row: rows in
    order and their columns. cost: numpy [n, m], finite. Shortest augmenting paths (Jonker and Volgenant): rows enter
    one after another, each by the cheapest chain of rows that move on, which reduced costs >= 0 make Dijkstra's."""
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assign(cost.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    (n, m), cost = cost.shape, np.array(cost, dtype=np.float64)
    price, own = np.zeros(m), np.zeros(n)               # a row looks at cost - price; own: what it has of that
    row_of, column_of, is_free = np.full(m, -1), np.full(n, -1), np.ones(m, dtype=bool)
    reach = np.empty((n, m))                            # how far away columns are by way of the rows so far
    for start in range(n):
        distance, here = np.full(m, np.inf), price.copy()
        rows, visited, base = [start], [], 0.
        while True:
            step = np.subtract(cost[rows[-1]], here, out=reach[len(visited)])
            if visited:
                step += base - own[rows[-1]]
            np.minimum(distance, step, out=distance)
            column = int(distance.argmin())
            base = distance[column]
            if not is_free[column]:                     # of equally near ones a free one, which ends the search
                free = int((is_free & (distance == base)).argmax())
                column = free if is_free[free] and distance[free] == base else column
            if is_free[column]:
                break
            visited.append((column, base))
            here[column], distance[column] = -np.inf, np.inf            # it is not reached again
            rows.append(row_of[column])
        for seen, far in visited:                       # all reduced costs stay >= 0
            price[seen] += far - base
        is_free[column] = False
        while column >= 0:                              # everyone on the path moves on
            row = rows[reach[:len(rows), column].argmin()]
            row_of[column] = row
            column, column_of[row] = column_of[row], column
        own[rows] = cost[rows, column_of[rows]] - price[column_of[rows]]
    return np.arange(n), column_of


def split_labels(labels, num_classes):
    """labels [H, W] -> the classes that are there [n] and the mask of each, float [n, H, W]."""
    classes = labels.unique()
    classes = classes[(classes >= 0) & (classes < num_classes)]
    return classes, (labels == classes[:, None, None]).float()


def sample_points(maps, points):
    """maps [n, H, W] at points [n, P, 2]: [n, P], bilinear."""
    return F.grid_sample(maps[:, None].float(), 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def match_cost(logits, masks, classes, goals, points):
    """What it would cost to make each query responsible for each mask, judged at the same points for all. logits
    [Q, K + 1], masks [Q, h, w], classes [n], goals [n, H, W], points [1, P, 2] -> [Q, n]."""
    masks, goals = (sample_points(x, points.expand(len(x), -1, -1)) for x in (masks, goals))       # [Q, P], [n, P]
    pixels = (F.softplus(-masks) @ goals.T + F.softplus(masks) @ (1 - goals).T) / points.shape[1]
    inside = masks.sigmoid()
    dice = 1 - (2 * inside @ goals.T + 1) / (inside.sum(1)[:, None] + goals.sum(1) + 1)
    parts = -logits.float().softmax(1)[:, classes], pixels, dice
    return sum(weight * part for weight, part in zip(LOSS_WEIGHTS, parts))


def uncertain_points(masks, candidates, others):
    """Points to learn from: of candidates [n, 3P, 2] those where masks [n, h, w] are least sure, and `others`, which
    are a quarter of the P: [n, P, 2]."""
    num = candidates.shape[1] // 3 - others.shape[1]
    rows = (-sample_points(masks, candidates).abs()).topk(num, dim=1).indices
    return torch.cat((candidates.gather(1, rows[..., None].expand(-1, -1, 2)), others), 1)


def mask_losses(logits, masks, targets, draw, num_points):
    """Sums of three losses of one prediction, [3]: of the queries' classes, of the masks' pixels, of their overlap
    (dice). logits [B, Q, K + 1], masks [B, Q, h, w]; targets: split_labels of each image; draw(stream, i, num) gives
    random numbers [num] of image i. An image without any label says nothing of its classes either."""
    K, num_random = logits.shape[2] - 1, num_points - int(.75 * num_points)
    labels, known = torch.full(logits.shape[:2], K, device=logits.device), []
    images, queries, goals, points = [], [], [], []
    with torch.no_grad():
        for i, (classes, wanted) in enumerate(targets):
            judged = draw('match', i, 2 * num_points).view(1, -1, 2)
            cost = match_cost(logits[i], masks[i], classes, wanted, judged).nan_to_num(1e9, 1e9, -1e9)
            rows, columns = (torch.from_numpy(x).to(logits.device) for x in assign(cost.double().cpu().numpy()))
            labels[i, rows] = classes[columns]
            candidates, others = (draw(name, i, 2 * num * len(rows)).view(len(rows), num, 2)
                                  for name, num in (('candidates', 3 * num_points), ('others', num_random)))
            points.append(uncertain_points(masks[i, rows], candidates, others))
            goals.append(sample_points(wanted[columns], points[-1]))
            known += [i] * min(1, len(rows))
            images += [i] * len(rows)
            queries.append(rows)
    chosen = sample_points(masks[images, torch.cat(queries)], torch.cat(points))                    # [N, P]
    goals = torch.cat(goals)
    weight = torch.ones(K + 1, device=logits.device)
    weight[K] = NO_OBJECT
    class_loss = F.cross_entropy(logits[known].flatten(0, 1).float(), labels[known].flatten(), weight, reduction='sum')
    pixel_loss = F.binary_cross_entropy_with_logits(chosen, goals, reduction='none').mean(1).sum()
    inside = chosen.sigmoid()
    dice = 1 - (2 * (inside * goals).sum(1) + 1) / (inside.sum(1) + goals.sum(1) + 1)
    return torch.stack((class_loss, pixel_loss, dice.sum()))


# ---- Mask2Former ------------------------------------------------------------------------------------------------

def cell_centres(sizes, device=None):
    """Places of the cells of maps of these (h, w), one map after another: [sum of h * w, 2]."""
    places = []
    for h, w in sizes:
        y, x = torch.meshgrid((torch.arange(h, device=device) + .5) / h, (torch.arange(w, device=device) + .5) / w,
                              indexing='ij')
        places.append(torch.stack((x, y), -1).flatten(0, 1))
    return torch.cat(places)


def sine_positions(size, channels, device=None):
    """Positions of a map's cells [h * w, channels], which are not learnt: half of the channels from the row, then half
    from the column, each as sines and cosines in turn of angles up to 2 pi. arXiv:2005.12872."""
    frequencies = 10000 ** -(torch.arange(0, channels // 2, 2, device=device) / (channels // 2))    # [channels/4]

    def waves(n):
        angles = (2 * math.pi * torch.arange(1, n + 1, device=device) / (n + 1e-6))[:, None] * frequencies
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)                             # [n, channels/2]
    h, w = size
    return torch.cat((waves(h)[:, None].expand(-1, w, -1), waves(w).expand(h, -1, -1)), -1).flatten(0, 1)


def sample_levels(values, sizes, places, weights):
    """Each query's weighted sum of samples of several maps. values [B, N, heads, head_dim]: the cells of maps of these
    sizes, one after another; places [B, Q, heads, levels, points, 2], weights without the 2 -> [B, Q, heads *
    head_dim]."""
    B, Q, heads, levels, points = weights.shape
    places = (2 * places.float() - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)               # [L, B * heads, Q, P, 2]
    weights, total = weights.float().permute(3, 0, 2, 1, 4).reshape(levels, B * heads, 1, Q, points), 0
    for level, size, place, weight in zip(values.split([h * w for h, w in sizes], 1), sizes, places, weights):
        level = level.float().permute(0, 2, 3, 1).reshape(B * heads, -1, *size)             # [B * heads, head_dim, ...]
        total = total + (F.grid_sample(level, place, align_corners=False) * weight).sum(-1)
    return total.view(B, -1, Q).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Attention to a few points of several maps, around a place that each query has (arXiv:2010.04159); offsets are in
    cells. ratio: the values' width as a share of the width."""

    def __init__(self, width, heads, levels, points=4, ratio=1.):
        super().__init__()
        self.shape = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.values = nn.Linear(width, int(width * ratio))
        self.proj = nn.Linear(int(width * ratio), width)

    def forward(self, queries, places, memory, sizes):
        """queries [B, Q, D]; places [Q, 2] or [B, Q, levels, 2]; memory [B, N, D], maps of these sizes -> [B, Q, D]."""
        B, Q, _ = queries.shape
        heads = self.shape[0]
        offsets = self.offsets(queries).view(B, Q, *self.shape, 2)
        offsets = offsets / offsets.new_tensor([(w, h) for h, w in sizes])[:, None]
        weights = self.weights(queries).view(B, Q, heads, -1).softmax(-1).view(B, Q, *self.shape)
        places = places[:, None] if places.ndim == 2 else places                            # [(B,) Q, levels, 2]
        places = places[..., None, :, None, :] + offsets
        values = self.values(memory).unflatten(2, (heads, -1))
        with torch.autocast(queries.device.type, enabled=False):        # bfloat16 would misplace what is interpolated
            samples = sample_levels(values, sizes, places, weights)
        return self.proj(samples.to(values.dtype))


class EncoderLayer(nn.Module):
    """Deformable self-attention of all cells of three maps, then an MLP, norms after each. [B, N, C] to the same."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.attn = DeformableAttention(width, heads, levels=3)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x, positions, places, sizes):
        x = self.norms[0](x + self.attn(x + positions, places, x, sizes))
        return self.norms[1](x + self.fc2(self.fc1(x).relu()))


class PixelDecoder(nn.Module):
    """Lets the three coarser of four maps exchange what they know, and adds it to the finest. inputs: their channels,
    finest first. Maps [B, C_i, h, w], finest first -> [B, C, h, w] of the three, coarsest first, and of the finest."""

    def __init__(self, inputs, channels, heads, mlp_width, layers, groups=32):
        super().__init__()
        norm = lambda: nn.GroupNorm(groups, channels)
        self.inputs = nn.ModuleList(nn.Sequential(nn.Conv2d(width, channels, 1), norm()) for width in inputs[:0:-1])
        self.level_embed = nn.Parameter(torch.zeros(3, channels))
        self.layers = nn.ModuleList(EncoderLayer(channels, heads, mlp_width) for _ in range(layers))
        self.lateral = nn.Sequential(nn.Conv2d(inputs[0], channels, 1, bias=False), norm())
        self.output = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(), nn.ReLU())
        self.finest = nn.Conv2d(channels, channels, 1)

    def forward(self, maps):
        levels = [project(x) for project, x in zip(self.inputs, maps[:0:-1])]                       # coarsest first
        sizes = [tuple(level.shape[2:]) for level in levels]
        places = cell_centres(sizes, levels[0].device)                                              # [N, 2]
        positions = torch.cat([sine_positions(size, level.shape[1], level.device) + embed
                               for size, level, embed in zip(sizes, levels, self.level_embed)])     # [N, C]
        x = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)                    # [B, N, C]
        for layer in self.layers:
            x = layer(x, positions, places, sizes)
        levels = [level.transpose(1, 2).unflatten(2, size)
                  for level, size in zip(x.split([h * w for h, w in sizes], 1), sizes)]
        finest = self.lateral(maps[0])
        finest = finest + F.interpolate(levels[-1], size=finest.shape[2:], mode='bilinear')
        return levels, self.finest(self.output(finest))


class DecoderLayer(nn.Module):
    """Queries look at a map within their own masks, then at each other, then an MLP, norms after each."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.cross, self.attn = (nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x, positions, memory, memory_positions, hidden):
        """x [B, Q, C]; memory [B, N, C]; hidden [B, Q, N] bool: cells that a query must not see."""
        hidden = hidden.repeat_interleave(self.cross.num_heads, 0)
        x = self.norms[0](x + self.cross(x + positions, memory + memory_positions, memory, attn_mask=hidden,
                                         need_weights=False)[0])
        x = self.norms[1](x + self.attn(x + positions, x + positions, x, need_weights=False)[0])
        return self.norms[2](x + self.fc2(self.fc1(x).relu()))


class MaskDecoder(nn.Module):
    """Queries that each become a class, or none, and a mask; before each layer, and after the last, they say what they
    think so far, and the next layer sees only that mask."""

    def __init__(self, channels, num_classes, queries, heads, mlp_width, layers):
        super().__init__()
        self.queries, self.positions, self.level_embed = (
            nn.Parameter(torch.zeros(num, channels)) for num in (queries, queries, 3))
        self.layers = nn.ModuleList(DecoderLayer(channels, heads, mlp_width) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.classes = nn.Linear(channels, num_classes + 1)
        self.mask = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(),
                                  nn.Linear(channels, channels))

    def predict(self, x, finest):
        """-> logits [B, Q, K + 1] and masks [B, Q, H, W] of queries [B, Q, C]."""
        x = self.norm(x)
        return self.classes(x).float(), torch.einsum('bqc,bchw->bqhw', self.mask(x), finest).float()

    def forward(self, levels, finest):
        """Maps as of PixelDecoder -> the predictions of all layers, the last one last."""
        x = self.queries.expand(len(finest), -1, -1)
        predictions = [self.predict(x, finest)]
        for i, layer in enumerate(self.layers):
            size, which = levels[i % 3].shape[2:], i % 3                            # coarsest first
            memory = levels[which].flatten(2).transpose(1, 2) + self.level_embed[which]
            hidden = F.interpolate(predictions[-1][1].detach(), size=size, mode='bilinear').flatten(2) < 0
            hidden &= ~hidden.all(2, keepdim=True)                                  # who would see nothing sees all
            x = layer(x, self.positions, memory, sine_positions(size, memory.shape[2], memory.device), hidden)
            predictions.append(self.predict(x, finest))
        return predictions


class MaskHead(nn.Module):
    """Mask2Former: pixel decoder, mask decoder, and what they learn from."""
    loss_weights = LOSS_WEIGHTS

    def __init__(self, inputs, num_classes, channels, queries, heads, mlp_width, layers, points, groups=32):
        super().__init__()
        self.num_classes, self.num_queries, self.num_points = num_classes, queries, points
        self.pixels = PixelDecoder(inputs, channels, heads, mlp_width, layers[0], groups)
        self.decoder = MaskDecoder(channels, num_classes, queries, heads, mlp_width, layers[1])

    def scores(self, maps, size):
        """For each pixel and class the sum over queries of their certainty of both: [B, K, H, W]."""
        logits, masks = self.decoder(*self.pixels(maps))[-1]
        scores = torch.einsum('bqk,bqhw->bkhw', logits.softmax(-1)[..., :-1], masks.sigmoid())
        return F.interpolate(scores, size=size, mode='bilinear')

    def counts(self, labels):
        """What the losses are divided by, [3]: the weights of all queries, then twice the number of masks."""
        nums = labels.new_tensor([min(self.num_queries, int((x.unique() >= 0).sum())) for x in labels]).float()   # [B]
        weights = torch.where(nums > 0, nums + NO_OBJECT * (self.num_queries - nums), 0)
        return torch.stack((weights.sum(), nums.sum(), nums.sum()))

    def losses(self, maps, labels, draw):
        """Sums of the three losses over all layers' predictions, [3]. labels [B, H, W]; draw as in mask_losses."""
        targets = [split_labels(x, self.num_classes) for x in labels]
        with torch.autocast(labels.device.type, enabled=False):
            return sum(mask_losses(*predicted, targets, lambda name, *args: draw(f'{name} {layer}', *args),
                                   self.num_points)
                       for layer, predicted in enumerate(self.decoder(*self.pixels(maps))))


# ---- ViT-Adapter ------------------------------------------------------------------------------------------------

class BatchNorm(nn.Module):
    """Batch normalisation of [B, C, h, w] over the images of all processes, on any device."""

    def __init__(self, channels, eps=1e-5, momentum=.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer('mean', torch.zeros(channels))
        self.register_buffer('variance', torch.ones(channels))

    def forward(self, x):
        mean, variance = self.mean, self.variance
        if self.training:
            average = lambda x: run.gather(x.mean((0, 2, 3))[None]).mean(0)         # all have as many pixels
            mean = average(x.float())
            variance = average((x.float() - mean[:, None, None]).square())
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        scale = self.weight.float() * (variance + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class SpatialPrior(nn.Module):
    """What a small convolutional network sees: images [B, 3, H, W] -> maps [B, D, ...] at 1/4, 1/8, 1/16 and 1/32."""

    def __init__(self, width, inner):
        super().__init__()
        conv = lambda inputs, outputs, stride: nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), BatchNorm(outputs), nn.ReLU())
        self.stem = nn.Sequential(conv(3, inner, 2), conv(inner, inner, 1), conv(inner, inner, 1),
                                  nn.MaxPool2d(3, 2, padding=1))
        self.convs = nn.ModuleList(conv(a * inner, b * inner, 2) for a, b in ((1, 2), (2, 4), (4, 4)))
        self.projections = nn.ModuleList(nn.Conv2d(times * inner, width, 1) for times in (1, 2, 4, 4))

    def forward(self, images):
        maps = [self.stem(images)]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        return [project(x) for project, x in zip(self.projections, maps)]


class Injector(nn.Module):
    """The ViT's patches look at the spatial maps. Its gain starts at 0: the ViT is at first what it was."""

    def __init__(self, width, heads, levels=3):
        super().__init__()
        self.norm, self.memory_norm = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = DeformableAttention(width, heads, levels, ratio=.5)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x, places, memory, sizes):
        return x + self.gamma * self.attn(self.norm(x), places, self.memory_norm(memory), sizes)


class Extractor(nn.Module):
    """The spatial maps look at the ViT's patches; then an MLP with a 3 x 3 convolution in it, one for all maps."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.memory_norm, self.mlp_norm = (nn.LayerNorm(width, 1e-6) for _ in range(3))
        self.attn = DeformableAttention(width, heads, levels=1, ratio=.5)
        self.fc1, self.fc2 = nn.Linear(width, width // 4), nn.Linear(width // 4, width)
        self.conv = nn.Conv2d(width // 4, width // 4, 3, padding=1, groups=width // 4)

    def forward(self, x, places, memory, grid, sizes):
        """x [B, N, D], maps of these sizes; memory [B, h * w, D], the patches of this grid."""
        x = x + self.attn(self.norm(x), places, self.memory_norm(memory), [grid])
        maps = to_maps(self.fc1(self.mlp_norm(x)), sizes)
        return x + self.fc2(F.gelu(to_tokens([self.conv(level) for level in maps])))


def to_maps(x, sizes):
    """Tokens [B, N, C] of several maps -> [B, C, h, w] each."""
    return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(x.split([h * w for h, w in sizes], 1), sizes)]


def to_tokens(maps):
    """The inverse of to_maps."""
    return torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)


class Adapter(nn.Module):
    """ViT-Adapter: a pyramid of maps that goes along beside a plain ViT. Before each quarter of the blocks the patches
    take from it, after it they give to it; [B, D, ...] at 1/4, 1/8, 1/16, 1/32 of an image whose patches are 16 wide.
    For other patches the convolutions see the image resized, so that its maps have 4, 2, 1 and 1/2 cells a patch."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.prior = SpatialPrior(width, inner)
        self.level_embed = nn.Parameter(torch.zeros(3, width))
        self.injectors = nn.ModuleList(Injector(width, heads) for _ in range(4))
        self.extractors = nn.ModuleList(Extractor(width, heads) for _ in range(6))      # two more at the end
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norms = nn.ModuleList(BatchNorm(width) for _ in range(4))

    def forward(self, vit, images, drop=None):
        """images [B, 3, H, W] -> four maps, finest first."""
        h, w = grid = [n // vit.patch_size for n in images.shape[2:]]
        if vit.patch_size != 16:
            images_16 = F.interpolate(images, size=(16 * h, 16 * w), mode='bilinear')
        finest, *maps = self.prior(images if vit.patch_size == 16 else images_16)
        sizes, depth = [(2 * h, 2 * w), (h, w), (h // 2, w // 2)], len(vit.blocks)
        around = cell_centres(sizes, images.device)
        patch_centres = cell_centres([grid], images.device)
        begins = {depth * i // 4: i for i in range(5)}      # blocks before which something happens: 0, 10, 20, 30, 40
        beside = to_tokens([x + embed[:, None, None] for x, embed in zip(maps, self.level_embed)])
        after = []                                          # the patches after each quarter

        def visit(layer, x):
            nonlocal beside
            i, patches = begins.get(layer), x[:, 1:]
            if i:
                after.append(patches)
                for extract in self.extractors[i - 1:i if i < 4 else 6]:
                    beside = extract(beside, around, patches, grid, sizes)
            if i is None or i == 4:
                return x
            return torch.cat((x[:, :1], self.injectors[i](patches, patch_centres, beside, sizes)), 1)
        vit.tokens(images, drop=drop, visit=visit)
        maps = to_maps(beside, sizes)
        maps = [self.up(maps[0]) + finest, *maps]
        after = [to_maps(x, [grid])[0] for x in after]
        after = [F.interpolate(x, size=level.shape[2:], mode='bilinear') for x, level in zip(after, maps)]
        return [norm(x + level) for norm, x, level in zip(self.norms, after, maps)]


@functools.lru_cache
def place_pairs(grid, device):
    """Which row of PlaceBias's table each pair of tokens takes, [1 + N, 1 + N]."""
    (h, w), num = grid, (2 * grid[0] - 1) * (2 * grid[1] - 1)
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing='ij')
    down, right = (n.flatten()[:, None] - n.flatten() for n in (y, x))
    index = F.pad((down + h - 1) * (2 * w - 1) + right + w - 1, (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = num, num + 1, num + 2
    return index


class PlaceBias(nn.Module):
    """BEiT's relative positions (arXiv:2106.08254): a logit for every head by how far away a patch is, and one each for
    class to patch, patch to class, class to class. -> [heads, 1 + N, 1 + N]."""

    def __init__(self, heads, grid):
        super().__init__()
        self.grid = tuple(grid)
        self.table = nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))

    def forward(self):
        return self.table[place_pairs(self.grid, self.table.device)].permute(2, 0, 1)


# ---- the segmentor ----------------------------------------------------------------------------------------------

class Segmenter(nn.Module):
    """A ViT with a head. vit: its config. adapter: dict(heads, inner), or nothing for the pyramid of the last map.
    bias: the grid (h, w) for which the ViT has a PlaceBias in every block, if it has. The others are Mask2Former's."""

    def __init__(self, vit, num_classes, head='linear', adapter=None, bias=None, channels=256, queries=100, heads=8,
                 mlp_width=1024, layers=(6, 9), points=12544, groups=32):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        self.vit, width = M.ViT(**vit), vit['width']
        self.adapter = Adapter(width, **adapter) if adapter else None
        self.pyramid = Pyramid(width, channels) if head == 'mask2former' and not adapter else None
        if adapter:
            self.vit.norm = nn.Identity()
        if bias:
            for block in self.vit.blocks:
                block.attn.rel_bias = PlaceBias(vit['heads'], bias)
        if head == 'linear':
            self.head = LinearHead(width, num_classes)
        else:
            inputs = [width if adapter else channels] * 4
            self.head = MaskHead(inputs, num_classes, channels, queries, heads, mlp_width, layers, points, groups)

    def normalize(self, images):
        return self.vit.normalize(images)

    def maps(self, images, drop=None):
        """What the head sees, maps [B, C, h, w], finest first."""
        if self.adapter:
            return self.adapter(self.vit, images, drop)
        x = self.vit.features(images, drop=drop)[:, 1:].transpose(1, 2)                     # [B, D, N]
        x = x.unflatten(2, (images.shape[2] // self.vit.patch_size, -1))
        return self.pyramid(x)[:4] if self.pyramid else [x]

    def forward(self, images, labels=None, draw=None, drop=None):
        """images [B, 3, H, W] normalised -> scores [B, K, H, W]; with labels [B, H, W] sums of the head's losses."""
        maps = self.maps(images, drop)
        return self.head.scores(maps, images.shape[2:]) if labels is None else self.head.losses(maps, labels, draw)


# What EVA's released segmentors call our tensors: rules as in model.py, whose EVA blocks are used.
DEFORMABLE = [('sampling_offsets.*', 'offsets.*', 'same'), ('attention_weights.*', 'weights.*', 'same'),
              ('value_proj.*', 'values.*', 'same'), ('output_proj.*', 'proj.*', 'same')]
INJECTOR = M.under('attn.', 'attn.', DEFORMABLE) + M.same('gamma') + [
    ('query_norm.*', 'norm.*', 'same'), ('feat_norm.*', 'memory_norm.*', 'same'), ('ffn_norm.*', 'mlp_norm.*', 'same'),
    ('ffn.fc1.*', 'fc1.*', 'same'), ('ffn.fc2.*', 'fc2.*', 'same'), ('ffn.dwconv.dwconv.*', 'conv.*', 'same')]


def batch_norm(theirs, ours):
    return [(f'{theirs}.weight', f'{ours}.weight', 'same'), (f'{theirs}.bias', f'{ours}.bias', 'same'),
            (f'{theirs}.running_mean', f'{ours}.mean', 'same'), (f'{theirs}.running_var', f'{ours}.variance', 'same'),
            (f'{theirs}.num_batches_tracked', '-', 'drop')]


SEGMENTER = M.under('backbone.', 'vit.', M.EVA + M.EVA_QKV + M.GELU_MLP + [
    ('blocks.*.attn.relative_position_bias_table', 'blocks.*.attn.rel_bias.table', 'same'),
    ('blocks.*.attn.relative_position_index', '-', 'drop')])
SEGMENTER += M.under('backbone.', 'adapter.', M.same('level_embed', 'up.*') + [
    *[(f'spm.stem.{3 * i}.weight', f'prior.stem.{i}.0.weight', 'same') for i in range(3)],
    *[rule for i in range(3) for rule in batch_norm(f'spm.stem.{3 * i + 1}', f'prior.stem.{i}.1')],
    *[(f'spm.conv{i + 2}.0.weight', f'prior.convs.{i}.0.weight', 'same') for i in range(3)],
    *[rule for i in range(3) for rule in batch_norm(f'spm.conv{i + 2}.1', f'prior.convs.{i}.1')],
    *[(f'spm.fc{i + 1}.*', f'prior.projections.{i}.*', 'same') for i in range(4)],
    *M.under('interactions.*.injector.', 'injectors.*.', INJECTOR),
    *M.under('interactions.*.extractor.', 'extractors.*.', INJECTOR),
    *M.under('interactions.3.extra_extractors.0.', 'extractors.4.', INJECTOR),
    *M.under('interactions.3.extra_extractors.1.', 'extractors.5.', INJECTOR),
    *[rule for i in range(4) for rule in batch_norm(f'norm{i + 1}', f'norms.{i}')]])
SEGMENTER += M.under('decode_head.pixel_decoder.', 'head.pixels.', [
    ('input_convs.*.conv.*', 'inputs.*.0.*', 'same'), ('input_convs.*.gn.*', 'inputs.*.1.*', 'same'),
    *M.under('encoder.layers.*.attentions.0.', 'layers.*.attn.', DEFORMABLE),
    ('encoder.layers.*.ffns.0.layers.0.0.*', 'layers.*.fc1.*', 'same'),
    ('encoder.layers.*.ffns.0.layers.1.*', 'layers.*.fc2.*', 'same'),
    ('encoder.layers.*.norms.*.*', 'layers.*.norms.*.*', 'same'), ('level_encoding.weight', 'level_embed', 'same'),
    ('lateral_convs.0.conv.*', 'lateral.0.*', 'same'), ('lateral_convs.0.gn.*', 'lateral.1.*', 'same'),
    ('output_convs.0.conv.*', 'output.0.*', 'same'), ('output_convs.0.gn.*', 'output.1.*', 'same'),
    ('mask_feature.*', 'finest.*', 'same')])
SEGMENTER += M.under('decode_head.', 'head.decoder.', [
    *[(f'transformer_decoder.layers.*.attentions.{i}.attn.{x}', f'layers.*.{ours}.{x}', 'same')
      for i, ours in enumerate(('cross', 'attn'))
      for x in ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias')],
    ('transformer_decoder.layers.*.ffns.0.layers.0.0.*', 'layers.*.fc1.*', 'same'),
    ('transformer_decoder.layers.*.ffns.0.layers.1.*', 'layers.*.fc2.*', 'same'),
    ('transformer_decoder.layers.*.norms.*.*', 'layers.*.norms.*.*', 'same'),
    ('transformer_decoder.post_norm.*', 'norm.*', 'same'), ('query_feat.weight', 'queries', 'same'),
    ('query_embed.weight', 'positions', 'same'), ('level_embed.weight', 'level_embed', 'same'),
    ('cls_embed.*', 'classes.*', 'same'), ('mask_embed.*.*', 'mask.*.*', 'same')])


def segmenter_config(state):
    """What the tensors of a released segmentor, under our names, show. A ViT's heads without PlaceBias are EVA-g's."""
    shape = lambda name: state[name].shape
    count = lambda pattern: len({name for name in state if M.rename(name, pattern, '') is not None})
    deform_heads = lambda name, levels: len(state[name + '.offsets.bias']) // (levels * 4 * 2)
    table = state.get('vit.blocks.0.attn.rel_bias.table')
    patch, grid = shape('vit.patch_embed.weight')[-1], math.isqrt(shape('vit.pos_embed')[1] - 1)
    vit = dict(width=shape('vit.patch_embed.weight')[0], depth=M.count_layers(state, 'vit.'),
               heads=16 if table is None else table.shape[1], mlp_width=shape('vit.blocks.0.mlp.fc1.weight')[0],
               patch_size=patch, mask_token=False, image_size=patch * grid, mean=IMAGENET_MEAN,
               std=IMAGENET_STD, layer_scale=1. if 'vit.blocks.0.gamma_1' in state else None)
    return dict(vit=vit, num_classes=len(state['head.decoder.classes.bias']) - 1, head='mask2former',
                adapter=dict(heads=deform_heads('adapter.injectors.0.attn', 3),
                             inner=len(state['adapter.prior.stem.0.0.weight'])),
                bias=None if table is None else (grid, grid), channels=shape('head.decoder.queries')[1],
                queries=shape('head.decoder.queries')[0], heads=deform_heads('head.pixels.layers.0.attn', 3),
                mlp_width=len(state['head.pixels.layers.0.fc1.bias']),
                layers=(count('head.pixels.layers.*.fc1.bias'), count('head.decoder.layers.*.fc1.bias')))


def load_segmenter(state, vit={}, **changes):
    """A Segmenter in eval mode of a released segmentor's tensors; changes to its config and the ViT's may be given."""
    state, _, _ = M.translate(state, SEGMENTER)
    try:
        config = segmenter_config(state) | changes
    except (KeyError, IndexError) as error:
        raise ValueError(f'weights of a segmentor miss {M.original_name(str(error.args[0]), SEGMENTER)}') from None
    # EVA's adapter gives the class token no position
    state['vit.pos_embed'] = F.pad(state['vit.pos_embed'][:, 1:], (0, 0, 1, 0))
    with torch.device('meta'):
        model = Segmenter(**{**config, 'vit': {**config['vit'], **vit}})
    M.fill(model, state, (), SEGMENTER, assign=True)
    return model.eval()


def windows(size, crop, stride):
    """Corners (y, x) of the windows in which an image of (height, width) is looked at; the last ones are moved back."""
    steps = [range(-(-max(0, n - side) // step) + 1) for n, side, step in zip(size, crop, stride)]
    rows, columns = ([min(i * step, max(0, n - side)) for i in each]
                     for each, n, side, step in zip(steps, size, crop, stride))
    return [(y, x) for y in rows for x in columns]


def slide(model, images, crop, stride):
    """Mean scores [B, K, H, W] of overlapping windows of images [B, 3, H, W], normalised; those smaller than a window
    are padded with the mean. Windows are added up one by one: memory is that of one map of scores."""
    H, W = images.shape[2:]
    images = F.pad(images, (0, max(0, crop[1] - W), 0, max(0, crop[0] - H)))
    total, times = 0, images.new_zeros(1, 1, *images.shape[2:])
    for y, x in windows((H, W), crop, stride):
        scores = model(images[:, :, y:y + crop[0], x:x + crop[1]])
        if not torch.is_tensor(total):
            total = scores.new_zeros(*scores.shape[:2], *images.shape[2:])
        total[:, :, y:y + crop[0], x:x + crop[1]] += scores
        times[:, :, y:y + crop[0], x:x + crop[1]] += 1
    return total.div_(times)[:, :, :H, :W]


def label_table(num_classes, ignore=255, zero_label=False):
    """What each value of a label map means, int16 [65536]: a class, IGNORED, or -2, no value at all. zero_label: 0 is
    ignored, and classes count from 1."""
    table = np.full(65536, -2, dtype=np.int16)
    table[int(zero_label):num_classes + int(zero_label)] = np.arange(num_classes)
    table[[ignore] + [0] * zero_label] = IGNORED
    return table


# ---- images with a class for every pixel ------------------------------------------------------------------------

PLACES = (  # where images and label maps of a split lie; {} is the split's name
    ('images/{}', 'annotations/{}'), ('{}', '{}annot'), ('{}/images', '{}/labels'), ('{}/images', '{}/annotations'),
    ('images/{}', 'labels/{}'))
SPLITS = {'train': ('train', 'training', 'train2017'), 'val': ('val', 'validation', 'val2017')}
SUFFIXES = '', '_labelTrainIds', '_L'       # of a label map, after its image's name: COCO-Stuff's, CamVid's
STUFF_GAPS = 11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90      # values of COCO-Stuff's maps that are no class


def find_places(root, split):
    """(folder of images, folder of label maps) of a split, by the names that data sets use."""
    for images, labels in PLACES:
        for name in SPLITS[split]:
            found = os.path.join(root, images.format(name)), os.path.join(root, labels.format(name))
            if all(map(os.path.isdir, found)):
                return found
    looked = ', '.join(f'{a.format("train")} + {b.format("train")}' for a, b in PLACES)
    raise ValueError(f"--data {root}: no label maps for {split}; looked for folders {looked}, and the same with val "
                     "(ADE20K's and COCO's names of splits too). Or use 'shapes', the built-in world")


def find_classes(cfg, folder, label):
    """(names, table) of the classes: what each value of a label map means; see --classes, --ignore, --zero_label. The
    name of a folder tells of ADE20K and COCO-Stuff, that of a label map which of COCO-Stuff's two numberings it is."""
    listed = os.path.join(cfg.data, 'classes.txt') if not cfg.classes else cfg.classes
    is_ade, is_stuff = (os.path.basename(folder) in (names[i] for names in SPLITS.values()) for i in (1, 2))
    zero_label = is_ade if cfg.zero_label is None else cfg.zero_label
    if cfg.classes.isdecimal():
        names = [str(k) for k in range(int(cfg.classes))]
    elif cfg.classes or os.path.exists(listed):
        with open(listed) as file:
            names = file.read().splitlines()
    elif is_ade or '_labelTrainIds' in label:
        names = [str(k) for k in range(150 if is_ade else 171)]
    elif is_stuff:
        names = ['-' if k in STUFF_GAPS else str(k) for k in range(182)]
    else:
        raise ValueError(f'--data {cfg.data}: how many classes are there? Give --classes N, or a file of their names')
    there = np.array([name != '-' for name in names])
    table = label_table(len(names), cfg.ignore, zero_label)
    known = table >= 0
    table[known] = np.where(there, there.cumsum() - 1, IGNORED)[table[known]]       # the others close up
    return [name for name in names if name != '-'], table


class Maps:
    """Images with label maps: PNGs of the same name with 8 or 16 bits a pixel, grey or with a palette. What cannot be
    used is left out and counted in `broken`: images without a label map, or with one of another size or that holds
    values that are no class."""
    reads_files = True

    def __init__(self, cfg, split='train'):
        folders = find_places(cfg.data, split)
        self.images, self.labels, self.jitter, self.broken = *folders, cfg.jitter, set()
        known = {}
        for name in data.list_files(self.labels)[0]:
            stem = os.path.splitext(name)[0]
            known |= {stem.removesuffix(suffix): name for suffix in SUFFIXES if stem.endswith(suffix)}
        names = data.list_files(self.images)[0]
        self.pairs = [(name, known[os.path.splitext(name)[0]]) for name in names if os.path.splitext(name)[0] in known]
        self.broken |= {('images have no label map and were left out', name)
                        for name in names if os.path.splitext(name)[0] not in known}
        if not self.pairs:
            raise ValueError(f'{self.labels}: none of the {len(names):,} images in {self.images} has a label map here, '
                             'a PNG of its name')
        self.classes, self.table = find_classes(cfg, self.images, self.pairs[0][1])
        if all(isinstance(self.look(i), str) for i in range(min(8, len(self)))):       # no accident
            raise ValueError(self.look(0))

    def __len__(self):
        return len(self.pairs)

    def look(self, i):
        """Image i, PIL, and its classes, int16 [H, W]; or what is wrong with them."""
        name, label = self.pairs[i]
        path = os.path.join(self.labels, label)
        try:
            image = data.read_image(os.path.join(self.images, name))
            with Image.open(path) as file:
                values = np.array(file)
        except (OSError, SyntaxError, ValueError) as error:
            return f'{M.first_line(error)}'
        if values.ndim != 2:
            return f'{path} has {values.shape[2]} channels; a label map has one, each pixel a class'
        if values.shape != (image.height, image.width):
            return (f'{path} is of {values.shape[1]} x {values.shape[0]} pixels, its image of {image.width} x '
                    f'{image.height}')
        classes = self.table[values.astype(np.int64).clip(0, len(self.table) - 1)]
        if (classes < IGNORED).any():
            return (f'{path} holds the value {values[classes < IGNORED].max()}, which is none of the '
                    f'{len(self.classes)} classes; see --classes, --ignore and --zero_label')
        return image, classes

    def read(self, first, broken):
        """Image `first` or the next that can be used, and its classes; others' troubles go to broken."""
        for i in (*range(first, len(self)), *range(first)):
            found = self.look(i)
            if not isinstance(found, str):
                return found
            broken.append(('images or label maps could not be used and were replaced', found))
        raise ValueError(f'{self.images}: none of its {len(self):,} images can be used; the last: {found}')

    def batch(self, position, image_size, seed=0, device='cpu', scale=(1, 1), flip=True, augment=''):
        """dict of images uint8 [B, 3, S, S] and labels int64 [B, S, S] to train on; the other options are for
        classifiers."""
        batch = dict(images=[], labels=[], broken=[])
        u = data.uniform(seed, 'crop', position, 32).tolist()
        for i, row in zip(data.sample_index(position, len(self), seed).tolist(), u):
            image, labels = cut(*self.read(i, batch['broken']), image_size, self.jitter, row)
            batch['images'].append(image)
            batch['labels'].append(labels)
        return dict(batch, images=torch.stack(batch['images']), labels=torch.stack(batch['labels']))

    def truth(self, positions, device):
        """Yields each image, uint8 [1, 3, H, W], with its classes [1, H, W]."""
        for i in positions:
            image, labels = self.read(i, broken := [])
            self.broken.update(broken)
            if not broken:
                image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
                yield image[None].to(device), torch.from_numpy(labels).long()[None].to(device)


def cut(image, labels, S, jitter, u):
    """To train on: a PIL image at a random scale, a random square of it, one that is not mostly of one class if ten
    tries find it, its colours changed, maybe mirrored. labels [H, W]; u: 32 uniform numbers -> uint8 [3, S, S] and
    int64 [S, S], filled up with the mean and with IGNORED."""
    scale = (jitter[0] + (jitter[1] - jitter[0]) * u[0]) * S / min(image.size)
    height, width = (max(1, round(n * scale)) for n in labels.shape)
    h, w = min(S, height), min(S, width)
    for top, left in zip(u[1:21:2], u[2:22:2]):
        y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
        rows, columns = (((np.arange(n) + at + .5) * whole / size).astype(int)
                         for n, at, whole, size in ((h, y, labels.shape[0], height), (w, x, labels.shape[1], width)))
        part = labels[rows][:, columns]
        counts = np.bincount(part[part != IGNORED])
        if (counts > 0).sum() > 1 and counts.max() < LARGEST_SHARE * counts.sum():
            break
    fraction = image.width / width, image.height / height
    box = x * fraction[0], y * fraction[1], (x + w) * fraction[0], (y + h) * fraction[1]
    image = distort(image.resize((w, h), Image.Resampling.BILINEAR, box=box), u[21:29])
    part = torch.from_numpy(part.astype(np.int64))
    if u[29] < .5:
        image, part = image.flip(-1), part.flip(-1)
    canvas = torch.tensor(data.FILL, dtype=torch.uint8)[:, None, None].repeat(1, S, S)
    canvas[:, :h, :w] = image
    return canvas, F.pad(part, (0, S - w, 0, S - h), value=IGNORED)


def distort(image, u):
    """Photometric distortion (arXiv:1512.02325), each with a chance of a half: brightness by up to 32, contrast and
    saturation by .5 to 1.5, hue by up to 36 degrees. PIL image, 8 uniform numbers -> uint8 [3, H, W]."""
    pixels = np.asarray(image).astype(np.float32)
    contrast = .5 + u[3] if u[2] < .5 else 1.
    if u[0] < .5:
        pixels = pixels + (64 * u[1] - 32)
    pixels = (pixels.clip(0, 255) * contrast if u[4] < .5 else pixels).clip(0, 255)
    if u[5] < .75:          # 1 - 1/2 * 1/2: one of the two or both
        hsv = np.array(Image.fromarray(pixels.astype(np.uint8)).convert('HSV')).astype(np.float32)
        if u[5] < .5:
            hsv[..., 1] = (hsv[..., 1] * (.5 + u[6])).clip(0, 255)
        if u[5] >= .25:
            hsv[..., 0] = (hsv[..., 0] + (2 * u[7] - 1) * 25.6) % 256
        pixels = np.asarray(Image.fromarray(hsv.astype(np.uint8), 'HSV').convert('RGB')).astype(np.float32)
    pixels = (pixels if u[4] < .5 else pixels * contrast).clip(0, 255)
    return torch.from_numpy(pixels.round().astype(np.uint8)).permute(2, 0, 1)


class Scenes:
    """The built-in world's semantic maps: 10 grounds and 16 kinds of objects."""
    reads_files = False

    def __init__(self, cfg, split='train'):
        self.world, self.image_size = data.open_data(cfg.data, split), cfg.image_size
        self.classes, self.broken = [*data.STUFF, *data.KINDS], self.world.broken

    def __len__(self):
        return len(self.world)

    def batch(self, position, image_size, seed=0, device='cpu', scale=None, flip=False, augment=''):
        """As Maps.batch."""
        drawn = self.world.batch(position, image_size, seed, device, want=('images', 'semantic'))
        return dict(images=drawn['images'], labels=drawn['semantic'])

    def truth(self, positions, device):
        """As Maps.truth, several at once."""
        for n in range(0, len(positions), 16):
            yield tuple(self.batch(torch.tensor(positions[n:n + 16]), self.image_size, 0, device).values())


def open_maps(cfg, split):
    """--data -> Scenes or Maps."""
    if len(cfg.jitter) != 2 or not 0 < cfg.jitter[0] <= cfg.jitter[1]:
        raise ValueError(f'--jitter {cfg.jitter} are not two shares of the size, the smaller first')
    return (Scenes if cfg.data.partition(':')[0] == 'shapes' else Maps)(cfg, split)


# ---- measuring and looking --------------------------------------------------------------------------------------

@torch.no_grad()
def predict(model, images, cfg):
    """The class of each pixel of images uint8 [B, 3, H, W], [B, H, W]: of windows over the image, or of it whole; over
    all scales and both mirror images the mean of the scores' softmax, which is EVA's way."""
    patch, size, total = 2 * model.vit.patch_size, images.shape[2:], 0
    views = [(scale, mirror) for scale in cfg.scales for mirror in (False, True)[:1 + cfg.flip]]
    for scale, mirror in views:
        scaled = [max(1, round(n * scale * cfg.image_size / min(size))) for n in size]
        x = images.float() if scaled == list(size) else F.interpolate(images.float(), size=scaled, mode='bilinear')
        x = model.normalize(x.flip(-1) if mirror else x)
        crop = tuple(-(-n // patch) * patch for n in scaled) if cfg.whole else (cfg.image_size,) * 2
        with run.autocast(images.device):
            scores = slide(model, x, crop, [max(1, round(STRIDE * n)) for n in crop])
        scores = scores.flip(-1) if mirror else scores
        if scaled != list(size):
            scores = F.interpolate(scores, size=size, mode='bilinear')
        if len(views) > 1:
            scores.sub_(scores.amax(1, keepdim=True)).exp_().div_(scores.sum(1, keepdim=True))      # softmax in place
        total = scores if scale == cfg.scales[0] and not mirror else total.add_(scores)
    return total.argmax(1)


def evaluate(model, dataset, cfg, device, num, rank=0, world=1):
    """Numbers in per cent of the first num validation images, of which each process looks at its share."""
    model.eval()
    K = len(dataset.classes)
    counts = torch.zeros(K, K, dtype=torch.long, device=device)
    with run.gathered(model):
        for images, labels in dataset.truth(range(rank, num, world), device):
            counts += confusion(predict(model, images, cfg), labels, K)
    model.train()
    return {name: 100 * value for name, value in mean_iou(run.total(counts))[0].items()}


def colour_of(k):
    """A colour for each class, next to each other's unlike."""
    rgb = colorsys.hsv_to_rgb(k * .618034 % 1, (.9, .55, .75)[k % 3], (.9, 1., .6)[k // 3 % 3])
    return tuple(round(255 * x) for x in rgb)


def draw_classes(image, classes, num):
    """A PIL image of uint8 [3, H, W] under the colours of its classes [H, W]."""
    colours = torch.tensor([colour_of(k) for k in range(num)] + [(0, 0, 0)]).float()        # the last: IGNORED
    pixels = .4 * image.permute(1, 2, 0).cpu().float() + .6 * colours[classes.cpu()]
    return Image.fromarray(pixels.byte().numpy())


def draw_sheet(path, columns, names, tile=256):
    """A picture of titled columns of PIL images, {title: images}, above a legend of colours, {class: name}."""
    font, wide, width = ImageFont.load_default(13), 120, len(columns) * (tile + 6) + 6
    fit = lambda image: image.resize([max(1, round(n * tile / max(image.size))) for n in image.size],
                                     Image.Resampling.BICUBIC)
    rows = [[fit(image) for image in row] for row in zip(*columns.values())]
    tops = np.cumsum([24] + [row[0].height + 6 for row in rows]).tolist()
    per_row = max(1, (width - 6) // wide)
    sheet = Image.new('RGB', (width, tops[-1] + 18 * -(-len(names) // per_row) + 6), 'white')
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(columns):
        draw.text((6 + x * (tile + 6), 4), title, fill='black', font=font)
        for row, top in zip(rows, tops):
            sheet.paste(row[x], (6 + x * (tile + 6), top))
    for n, (k, name) in enumerate(names.items()):
        x, y = 6 + n % per_row * wide, tops[-1] + n // per_row * 18
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=colour_of(k))
        draw.text((x + 17, y), name[:16], fill='black', font=font)
    run.on_first(sheet.save, path)


def draw_maps(path, model, dataset, cfg, device, num=4):
    """The picture of a run: images, what is predicted, the truth."""
    model.eval()
    columns, there, K = {'image': [], 'prediction': [], 'truth': []}, set(), len(dataset.classes)
    for images, labels in dataset.truth(range(num), device):
        for image, predicted, label in zip(images, predict(model, images, cfg), labels):
            there |= set(predicted.unique().tolist()) | set(label.unique().tolist())
            columns['image'].append(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()))
            columns['prediction'].append(draw_classes(image, predicted, K))
            columns['truth'].append(draw_classes(image, label, K))
    model.train()
    draw_sheet(path, columns, {k: dataset.classes[k] for k in sorted(there - {IGNORED})})


# ---- the loop ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def init_heads(model, seed=0):
    """First values of all but the ViT, a function of the seed; returns the model. Matrices are Xavier's, embeddings
    normal; deformable attention first looks evenly at points 1, 2, 3, 4 cells away, each head in a direction."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.startswith('vit.'):
            continue
        if name.endswith(('level_embed', 'decoder.queries', 'decoder.positions')):
            weight.normal_(generator=generator)
        elif weight.ndim > 1:
            receptive = weight[0, 0].numel()
            bound = (6 / (receptive * (weight.shape[0] + weight.shape[1]))) ** .5
            weight.uniform_(-bound, bound, generator=generator)
        elif name.endswith('bias'):
            weight.zero_()
    for attention in [module for module in model.modules() if isinstance(module, DeformableAttention)]:
        heads, levels, points = attention.shape
        angle = 2 * math.pi * torch.arange(heads) / heads
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(1, keepdim=True)                   # on a square's border
        offsets = direction[:, None, None] * torch.arange(1, points + 1)[:, None]       # [heads, 1, points, 2]
        attention.offsets.bias.copy_(offsets.expand(-1, levels, -1, -1).flatten())
        attention.offsets.weight.zero_()
        attention.weights.weight.zero_()
    return model


def is_segmenter(held):
    """Whether a file holds one, ours or a released one."""
    return isinstance(held, dict) and (held.get('name') == 'Segmenter' if held.get('format') == 'nanoEVA' else
                                       any(name.startswith('decode_head.') for name in M.unwrap(held)))


def vit_options(cfg):
    """What a run asks of its ViT, whatever it starts from."""
    sizes = {name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
    return dict(sizes, head=0, mask_token=False, drop_path=0. if cfg.freeze else cfg.drop_path)


def make_vit(cfg):
    """The ViT that training starts from: --init's, which may be a CLIP's image tower, or a new one."""
    options = dict(vit_options(cfg), pool=None)
    if not cfg.init:
        return M.init_weights(M.ViT(**{**M.SIZES[cfg.size.partition('-')[0]], **options}), cfg.seed)
    held = M.load(cfg.init)
    tower = held.visual if isinstance(held, M.CLIP) else held
    state = {name: x for name, x in tower.state_dict().items() if not name.startswith('head.')}
    return M.load_state(state, 'ViT', {**tower.config, 'head': 0}, **options)


def new_segmenter(cfg, vit, num_classes):
    """A Segmenter as the options say; vit: its ViT's config."""
    width, grid = vit['width'], vit['image_size'] // vit['patch_size']
    if cfg.adapter and (vit['depth'] < 4 or grid % 2):
        raise ValueError(f"a ViT of {vit['depth']} blocks and {grid} x {grid} patches is not for --adapter; it needs "
                         '4 blocks or more, and an even number of patches along a side')
    adapter = dict(heads=vit['heads'], inner=min(64, width // 4)) if cfg.adapter else None
    return Segmenter(vit, num_classes, cfg.head, adapter, None, cfg.channels, cfg.queries, cfg.channels // 32,
                     4 * cfg.channels, [int(n) for n in cfg.layers], cfg.points, min(32, cfg.channels // 8))


def build(cfg, num_classes):
    """The segmentor that training starts from. From another one everything is taken but what names its classes, unless
    there are as many."""
    held = M.read(cfg.init) if cfg.init else None
    if is_segmenter(held):
        before = M.load_as(Segmenter, load_segmenter, cfg.init, held)
        vit = {**before.config['vit'], 'drop_path': cfg.drop_path}
        model = Segmenter(**{**before.config, 'vit': vit, 'num_classes': num_classes, 'points': cfg.points})
        state, fresh = before.state_dict(), init_heads(model, cfg.seed).state_dict()
        model.load_state_dict({name: x if x.shape == fresh[name].shape else fresh[name] for name, x in state.items()})
        if cfg.image_size != model.vit.image_size:
            raise ValueError(f'{cfg.init} is of {model.vit.image_size} pixels; use --image_size {model.vit.image_size}')
    else:
        vit = make_vit(cfg)
        model = new_segmenter(cfg, vit.config, num_classes)
        model.vit.load_state_dict(vit.state_dict(), strict=not cfg.adapter)         # whose ViT has no last norm
        init_heads(model, cfg.seed)
    if cfg.freeze:
        model.vit.requires_grad_(False)
    return model


def check(cfg):
    """One line about what does not fit; settles what was not given."""
    if cfg.head not in ('linear', 'mask2former'):
        raise ValueError(f'--head {cfg.head} is unknown; use linear or mask2former')
    if cfg.adapter and cfg.head == 'linear' and 'adapter' not in RECIPES[cfg.size]:
        raise ValueError('--adapter goes with --head mask2former')
    cfg.adapter, cfg.init = cfg.adapter and cfg.head == 'mask2former', '' if cfg.init == 'scratch' else cfg.init
    if len(cfg.layers) != 2 or cfg.layers[1] < 1:
        raise ValueError(f'--layers {cfg.layers} are not two numbers, of the encoder and of the decoder')
    if cfg.channels % 32 or not cfg.channels:
        raise ValueError(f'--channels {cfg.channels} is not a multiple of 32')
    if not cfg.scales or min(cfg.scales) <= 0:
        raise ValueError(f'--scales {cfg.scales} are not sizes above 0')
    if cfg.freeze is None:
        cfg.freeze = bool(cfg.init) and cfg.head == 'linear'


def num_eval(dataset):
    return NUM_EVAL if isinstance(dataset, Scenes) else len(dataset)


def lr_at(step, cfg):
    """Linear up in warmup_steps, then linear down to 0 at the end."""
    return cfg.lr * min((step + 1) / max(1, cfg.warmup_steps), 1) * (1 - step / cfg.steps)


def look(cfg, device, rank, world):
    """--eval: the numbers of any segmentor; --image: what it says of a picture."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    model = M.load_as(Segmenter, load_segmenter, path).to(device)
    if cfg.image_size == RECIPES[cfg.size]['image_size']:       # no other was asked for
        cfg.image_size = model.extra.get('image_size', model.vit.image_size)
    K = model.config['num_classes']
    if cfg.whole and model.config['bias']:
        raise ValueError(f'{path} has relative positions of {model.vit.image_size} pixels only; leave out --whole')
    if cfg.eval:
        dataset = open_maps(cfg, 'val')
        if len(dataset.classes) != K:
            raise ValueError(f'{path} knows {K} classes, --data {cfg.data} has {len(dataset.classes)}')
        metrics = evaluate(model, dataset, cfg, device, num_eval(dataset), rank, world)
        run.report_broken(dataset)
        return print0(run.table(metrics))
    image = data.read_image(cfg.image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    classes, names = predict(model, pixels[None].to(device), cfg)[0], model.extra.get('classes') or range(K)
    os.makedirs(cfg.out_dir, exist_ok=True)
    path = f'{cfg.out_dir}/{Path(cfg.image).stem}.classes.png'
    there = {k: str(names[k]) for k in classes.unique().tolist()}
    draw_sheet(path, {'image': [image], 'prediction': [draw_classes(pixels, classes, K)]}, there, tile=512)
    print0(path)


def train(cfg):
    """Trains a segmentor; leaves model.pt, classes.png, loss.png, log.jsonl and result.json. --eval and --image only
    look."""
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/segment-{cfg.size}'
    check(cfg)
    if cfg.plan:
        vit = {**M.SIZES[cfg.size.partition('-')[0]], **vit_options(cfg)}
        with torch.device('meta'):
            whole = new_segmenter(cfg, vit, 150)
        heads = run.count_parameters(whole) - run.count_parameters(whole.vit)
        print0(f'the ViT alone; the head of 150 classes and what lies between add {heads:,} parameters')
        return run.costs('plan', cfg, vit, device)
    if cfg.bench:
        return runpy.run_path(Path(__file__).resolve().parent / 'assets' / 'bench_segment.py')['bench']()
    if cfg.eval or cfg.image:
        return look(cfg, device, rank, world)
    train_set, val_set = open_maps(cfg, 'train'), open_maps(cfg, 'val')
    if run.finished(cfg):
        return
    run.settle_steps(cfg, train_set)
    model = run.to_device(build(cfg, len(train_set.classes)), cfg, device, mesh)
    optimizer = run.make_optimizer(model, cfg, cfg.layer_decay)
    for group in optimizer.param_groups:
        group['lr_scale'] *= LINEAR_RATE if cfg.head == 'linear' and group['lr_scale'] == 1 else 1
    start, _ = run.resume(cfg.out_dir, model, optimizer, cfg)
    num = min(num_eval(val_set), max(8, cfg.steps * cfg.batch_size))
    print0(f'EVA {cfg.size}: {run.count_parameters(model) / 1e6:.2f}M parameters from {cfg.init or "scratch"}, '
           + 'the ViT as it is, ' * cfg.freeze + f'{len(train_set.classes)} classes, {cfg.image_size} px; '
           f'{cfg.steps:,} steps of {cfg.batch_size} images on {device}')
    log, share = run.Log(cfg, start, device), cfg.batch_size // world
    weights = torch.tensor(model.head.loss_weights, device=device)
    batches = data.batches(train_set, cfg.batch_size, cfg.image_size, start, cfg.steps, cfg.seed, device, cfg.workers,
                           rank=rank, world=world)
    for step, batch in zip(range(start, cfg.steps), batches):
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, cfg) * group['lr_scale']
        position = (step * cfg.batch_size + rank * share + torch.arange(share)).to(device)
        drop = data.uniform(cfg.seed, 'drop', position, 2 * len(model.vit.blocks)).unflatten(1, (-1, 2))
        counts = run.total(model.head.counts(batch['labels'])).clamp(min=1)         # of the whole batch, all processes
        parts = [x.split(cfg.micro_batch or share) for x in (batch['images'], batch['labels'], drop, position)]
        loss = 0
        for images, labels, drop, position in zip(*parts):
            draw = lambda stream, i, num: data.uniform(cfg.seed, stream, position[i], num)          # [num]
            with run.autocast(device):
                losses = model(model.normalize(images), labels, draw, drop)         # sums
            part = (weights * losses / counts).sum()
            (part * world).backward()                                               # FSDP takes the mean over processes
            loss += part.detach()
        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        if log.is_finite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if log.due(step):
            log.write(step, loss=run.total(loss), lr=lr_at(step, cfg), grad_norm=grad_norm)
        done, stopping = step + 1, log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg)
            if stopping:
                log.leave(done)
            log.say(step, **evaluate(model, val_set, cfg, device, min(num, 100), rank, world))

    metrics = evaluate(model, val_set, cfg, device, num, rank, world)
    run.save_model(model, f'{cfg.out_dir}/model.pt', classes=train_set.classes, image_size=cfg.image_size)
    draw_maps(f'{cfg.out_dir}/classes.png', model, val_set, cfg, device)
    log.finish(model, 'training loss', {}, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
