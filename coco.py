"""
Images with objects in the form of COCO and LVIS: jsons, run-length masks, and both benchmarks' average precision.

Boxes are [x1, y1, x2, y2] in pixels, a json's [x, y, width, height]; pixel i covers i to i + 1, so a width is x2 - x1
and no 1 is ever added. Masks, polygons and averages equal those of COCO's and LVIS's own tools.
"""
import glob
import json
import os
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import model as M

REPEAT = .001               # LVIS: images of classes in fewer of them than this share are shown more often
COCO_IOUS = np.linspace(.5, .95, 10)        # an average precision is the mean over these
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS = {'': (0, 1e10), 's': (0, 32 ** 2), 'm': (32 ** 2, 96 ** 2), 'l': (96 ** 2, 1e10)}     # ends included


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


# ---- images with objects ----------------------------------------------------------------------------------------

def clip_boxes(boxes, image_size):
    """boxes [..., 4] cut at the borders of an image of (height, width)."""
    height, width = image_size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor((width, height, width, height)))


def has_area(boxes):
    """boxes [n, 4] -> [n] bool."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def pad_to(images, side):
    """images [..., H, W] with zeros, the mean once normalised, at the right and the bottom: [..., side, side]."""
    return F.pad(images, (0, side - images.shape[-1], 0, side - images.shape[-2]))


def find_json(spec, split):
    """--data -> (path of a COCO or LVIS json, whether it holds both splits)."""
    if spec.endswith('.json'):
        return spec, True
    names = f'{split}.json', f'annotations/instances_{split}*.json', f'annotations/lvis*_{split}.json'
    found = [path for name in names for path in sorted(glob.glob(os.path.join(glob.escape(spec), name)))]
    if not found:
        raise ValueError(f'--data {spec}: no boxes; looked for {", ".join(names)} in it. Give a .json, a folder with '
                         "train.json and val.json, COCO's own folder, or 'shapes', the built-in world")
    return found[0], False


def read_json(path):
    """A COCO or LVIS json, checked for what we use."""
    try:
        with open(path) as file:
            held = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as json ({M.first_line(error)})') from None
    for name, keys in (('images', ('id', 'width', 'height')), ('annotations', ('image_id', 'category_id', 'bbox')),
                       ('categories', ('id', 'name'))):
        rows = held.get(name) if isinstance(held, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= set(keys) for row in rows):
            raise ValueError(f"{path} is not a COCO json: expected a list '{name}' of dicts with {', '.join(keys)}")
    return held


def find_images(path, split, names):
    """The folder of a json's images: the first of the usual places that has one of the first twenty."""
    root = os.path.dirname(path)
    beside = f'../{split}2017', f'../images/{split}', f'images/{split}', '..', '.'
    places = [os.path.splitext(path)[0], *(os.path.join(root, place) for place in beside)]
    there = lambda place: any(os.path.exists(os.path.join(place, name)) for name in names[:20])
    return next(filter(there, places), places[0])


class Instances:
    """Images with boxes and masks from a COCO or LVIS json. What cannot be used is left out and counted in `broken`:
    images that are not there, annotations of unknown images or categories, boxes without area in their image, masks of
    another size. Crowds are not learnt from, and judged as COCO does."""
    reads_files, coarse = True, None

    def __init__(self, spec, split='train', images='', jitter=(1., 1.)):
        path, both = find_json(spec, split)
        held, self.jitter, self.broken = read_json(path), jitter, set()
        self.categories = sorted(held['categories'], key=lambda row: row['id'])         # their ids may have gaps
        self.label_of = {row['id']: k for k, row in enumerate(self.categories)}
        self.classes, self.lvis = [row['name'] for row in self.categories], is_lvis(held)
        for row in held['images']:              # LVIS gives addresses, whose last two parts are COCO's path
            row.setdefault('file_name', '/'.join(str(row.get('coco_url', '')).split('/')[-2:]))
        names = sorted(row['file_name'] for row in held['images'])
        names = data.split_by_hash(names)[split] if both and names else names
        self.folder = images or find_images(path, split, names)
        there = {name for name in names if os.path.exists(os.path.join(self.folder, name))}
        self.broken |= {('images of the json are not there', name) for name in names if name not in there}
        self.images = [row for row in held['images'] if row['file_name'] in there]
        if not self.images:
            raise ValueError(f'{path}: none of its {len(names):,} images is in {self.folder}; use --images DIR')
        self.rows = self.usable_rows(held)
        self.shares = np.cumsum(self.repeats() if split == 'train' else np.ones(len(self.images)))

    def usable_rows(self, held):
        """{image id: its annotations that can be used}, each with its box cut at the borders."""
        images = {row['id']: (row['height'], row['width']) for row in held['images']}
        rows = {row['id']: [] for row in self.images}
        for n, row in enumerate(held['annotations']):
            image, trouble = row['image_id'], None
            if image not in images or row['category_id'] not in self.label_of:
                trouble = 'annotations name an unknown image or category'
            elif image in rows:
                x, y, w, h = row['bbox'] if len(row['bbox']) == 4 else (0, 0, 0, 0)
                box = clip_boxes(torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32), images[image])
                mask = row.get('segmentation') or [[x, y, x + w, y, x + w, y + h, x, y + h]]
                if not has_area(box).all():
                    trouble = 'boxes have no area within their image'
                elif isinstance(mask, dict) and tuple(mask.get('size', ())) != images[image]:
                    trouble = 'masks are of another size than their image'
                else:
                    rows[image].append(dict(row, segmentation=mask, area=row.get('area', w * h), box=box[0]))
            if trouble:
                self.broken.add((trouble + ' and were left out', f"annotation {row.get('id', n)}"))
        return rows

    def frequencies(self):
        """In how many images each class is [K]."""
        counts = Counter(name for rows in self.rows.values() for name in {row['category_id'] for row in rows})
        return torch.tensor([float(counts[row['id']]) for row in self.categories])

    def repeats(self):
        """How often an epoch shows each image [images]: once, but LVIS sqrt(REPEAT / share of the images) times for the
        rarest of its classes (arXiv:1908.03195)."""
        share = self.frequencies().numpy() / len(self.images)
        factor = np.sqrt(REPEAT / share.clip(1e-9)).clip(1) if self.lvis else np.ones(len(share))
        return np.array([max([factor[self.label_of[row['category_id']]] for row in self.rows[image['id']]], default=1.)
                         for image in self.images])

    def __len__(self):
        return round(self.shares[-1])

    def index(self, position, seed):
        """Which images stand at these positions [B]: each epoch in its own order, each image as often as it should be,
        rounded up or down."""
        u = data.uniform(seed, 'repeat', position // len(self), 1)[:, 0]
        place = (data.sample_index(position, len(self), seed) + u.double()).numpy() * self.shares[-1] / len(self)
        return self.shares.searchsorted(place, 'right').clip(max=len(self.images) - 1).tolist()

    def batch(self, position, image_size, seed=0, device='cpu', scale=(1, 1), flip=True, augment=''):
        """dict of images uint8 [B, 3, S, S] (zeros at the right and the bottom), sizes (height, width of what is no
        padding), targets (boxes [n, 4], labels [n], masks), index, position. scale: a pair to train, else whole images,
        as large as fits; augment is for classifiers."""
        batch = dict(images=[], sizes=[], targets=[], index=[], broken=[])
        for first, u in zip(self.index(position, seed), data.uniform(seed, 'crop', position, 4).tolist()):
            for i in (*range(first, len(self.images)), *range(first)):      # this one, or the next that can be read
                try:
                    path = os.path.join(self.folder, self.images[i]['file_name'])
                    image = data.read_image(path)
                    break
                except OSError:
                    batch['broken'].append(('images could not be read and were replaced', self.images[i]['file_name']))
            else:
                raise ValueError(f'{self.folder}: none of its {len(self.images):,} images can be decoded')
            parts = self.cut(image, self.images[i], image_size, u if isinstance(scale, tuple) else None, flip)
            for name, x in zip(('images', 'sizes', 'targets', 'index'), (*parts, i)):
                batch[name].append(x)
        return dict(batch, images=torch.stack(batch['images']), position=position.tolist())

    def cut(self, image, about, S, u, flip):
        """Large-scale jitter (arXiv:2012.07177): a PIL image -> uint8 [3, S, S], its (height, width) there, target. u:
        uniform numbers for scale, left, top and mirror; None to test."""
        scale, left, top = (self.jitter[0] + (self.jitter[1] - self.jitter[0]) * u[0], *u[1:3]) if u else (1., 0., 0.)
        mirror = bool(u) and flip and u[3] < .5
        original = np.array([about['width'], about['height']])
        whole = (original * scale * S / original.max()).round().clip(1)             # (width, height)
        size = np.minimum(whole, S)
        corner = np.floor((whole - size) * (left, top))
        fraction = np.array(image.size) / whole
        part = image.resize(size.astype(int).tolist(), Image.Resampling.BILINEAR,
                            box=(*(corner * fraction), *((corner + size) * fraction)))
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)
        width, height = size.astype(int).tolist()
        rows = [row for row in self.rows[about['id']] if not row.get('iscrowd')]
        boxes = torch.stack([row['box'] for row in rows]) if rows else torch.zeros(0, 4)
        boxes = boxes * boxes.new_tensor(whole / original).repeat(2) - boxes.new_tensor(corner).repeat(2)
        boxes = clip_boxes(boxes, (height, width))
        kept = has_area(boxes)
        labels = torch.tensor([self.label_of[row['category_id']] for row in rows], dtype=torch.long)[kept]
        masks = [move_mask(row['segmentation'], original, whole, corner, size, mirror)
                 for row, keep in zip(rows, kept.tolist()) if keep]
        if mirror:
            x1, y1, x2, y2 = boxes.unbind(1)
            pixels, boxes = pixels.flip(-1), torch.stack((width - x2, y1, width - x1, y2), 1)
        return pad_to(pixels, S), (height, width), dict(boxes=boxes[kept], labels=labels, masks=masks)

    def truth(self, batch):
        """A COCO json's images of a batch, each with the list of its annotations, crowds too."""
        return [(self.images[i], self.rows[self.images[i]['id']]) for i in batch['index']]


def move_mask(mask, original, whole, corner, size, mirror):
    """An object's polygons, or its run lengths as bool [h, w], after large-scale jitter: from an image of (width,
    height) original to whole, of which size is cut out at corner."""
    if isinstance(mask, list):
        parts = [np.reshape(part, (-1, 2)) * (whole / original) - corner for part in mask]
        return [(part * (-1, 1) + (size[0], 0) if mirror else part).ravel().tolist() for part in parts]
    width, height = original.tolist()
    x, y = [((np.arange(n) + c + .5) * m / w).astype(int).clip(max=m - 1)
            for n, c, m, w in zip(size, corner, original, whole)]
    held = decode_mask(read_segmentation(mask, (height, width)), (height, width))
    return torch.from_numpy(held[y][:, x[::-1] if mirror else x].copy())


class Scenes:
    """The built-in world as images with objects: coarse classes are its kinds, fine ones its 240 combinations of kind,
    texture and part, by falling frequency, of which a third each are called frequent, common and rare."""
    reads_files = False

    def __init__(self, world, vocabulary='coarse'):
        self.world, self.lvis, self.broken = world, vocabulary == 'fine', world.broken
        kinds, textures = list(data.KINDS), list(data.TEXTURES)
        fine = data.grammar('cpu', data.NUM_FINE, False)['fine'].tolist()
        self.classes = [f'{textures[t]} {kinds[k]} {data.PARTS[p]}' for k, t, p in fine] if self.lvis else kinds
        self.coarse = [k for k, _, _ in fine] if self.lvis else None
        self.categories = [dict(id=k, name=name) for k, name in enumerate(self.classes)]
        if self.lvis:
            self.categories = [dict(row, frequency='fcr'[3 * row['id'] // len(fine)]) for row in self.categories]

    def __len__(self):
        return len(self.world)

    def frequencies(self):
        """How often each class occurs, up to a factor [K]."""
        return 1000 / (torch.arange(len(self.classes)) + 5) if self.lvis else torch.ones(len(self.classes))

    def batch(self, position, image_size, seed=0, device='cpu', scale=None, flip=False, augment=''):
        """As Instances.batch. Objects of fewer than 8 visible pixels do not count."""
        drawn = self.world.batch(position, image_size, seed, device, want=('images', 'boxes', 'masks'))
        labels, seen = drawn['fine' if self.lvis else 'kind'], drawn['num_visible'] >= 8
        targets = [dict(boxes=boxes[rows].float(), labels=label[rows], masks=list(masks[rows]))
                   for boxes, label, masks, rows in zip(drawn['boxes'], labels, drawn['masks'], seen)]
        return dict(images=drawn['images'], sizes=[(image_size, image_size)] * len(targets), targets=targets,
                    index=drawn['index'].tolist(), position=position.tolist())

    def truth(self, batch):
        """As Instances.truth."""
        names, found = list(range(len(self.classes))), []
        for name, size, target in zip(batch['index'], batch['sizes'], batch['targets']):
            image = dict(id=name, height=size[0], width=size[1], neg_category_ids=names, not_exhaustive_category_ids=[])
            found.append((image, rows := []))
            for (x1, y1, x2, y2), label, mask in zip(target['boxes'].tolist(), target['labels'].tolist(),
                                                     target['masks']):
                runs = encode_mask(mask.cpu())
                rows.append(dict(image_id=name, category_id=label, area=mask_area(runs),
                                 bbox=[x1, y1, x2 - x1, y2 - y1], segmentation=dict(counts=runs)))
        return found
