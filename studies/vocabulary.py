"""
Does a large vocabulary cost EVA less? Frozen features of the built-in world's true boxes and a linear classifier, for
the 16 kinds and for the 119 kinds with textures, which captions name (`--vocabulary fine`: 240 kinds with parts, which
captions do not name). A minute or two a model.

    python studies/vocabulary.py out/claims/pretrained-shapes/*-*/model.pt     # EVA-0, EVA-1, ...: seeds of one arm
    python studies/vocabulary.py --csv studies/vocabulary.csv                  # the tables of runs that are kept

More images to learn from make every model better at both, so arms are compared where they are equally good at kinds:
fine at the same coarse accuracy, by straight lines between numbers of images. The claim is wrong if fine is not higher
there for EVA than for pixels, or does not grow with EVA's size. f, c, r: the frequent, common and rare thirds.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import grid

sys.path.insert(0, str(grid.ROOT))
import data                         # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

NUM_TRAIN, NUM_VAL = (30, 60, 125, 250, 500, 1000, 2000, 4000), 2000    # images, of about 2.6 objects each
SAMPLES = 6                         # points along a box's side at which its features are looked up


@torch.no_grad()
def box_features(vit, split, num, image_size, vocabulary):
    """The mean feature of every true box [n, D], its class [n], and its image's place in the order [n]."""
    dataset = data.open_instances('shapes', split, vocabulary=vocabulary)
    features, labels, places = [], [], []
    for batch in data.eval_batches(dataset, 50, image_size, num, torch.device('cpu')):
        maps = vit(vit.normalize(batch['images']))                              # [B, D, h, w]
        for one, target, place in zip(maps, batch['targets'], batch['position']):
            features.append(mean_in_boxes(one, target['boxes'] / image_size))
            labels.append(target['labels'])
            places.append(place.expand(len(target['labels'])))
    return torch.cat(features), torch.cat(labels), torch.cat(places)


def mean_in_boxes(features, boxes):
    """features [D, h, w], boxes [n, 4] as shares of the image -> [n, D], bilinear at SAMPLES x SAMPLES points."""
    steps = (torch.arange(SAMPLES) + .5) / SAMPLES
    y, x = torch.meshgrid(steps, steps, indexing='ij')
    inside = torch.stack((x, y), -1).view(1, -1, 2)                             # [1, points, (x, y)] of a box
    corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    points = corner + inside * size                                             # [n, points, 2] of the image

    # grid_sample counts from -1 to 1
    found = F.grid_sample(features[None], 2 * points[None] - 1, padding_mode='border', align_corners=False)
    return found[0].mean(2).T                                                   # [D, n, points] -> [n, D]


def rows_of(arm, seed, vit, vocabulary):
    """A row for each number of images to learn from: the share of boxes that is named right. The ViT sees twice as
    many patches along a side as it learnt with."""
    image_size = 2 * vit.image_size
    x, labels, places = box_features(vit, 'train', max(NUM_TRAIN), image_size, vocabulary)
    val_x, val_labels, _ = box_features(vit, 'val', NUM_VAL, image_size, vocabulary)
    kinds = torch.tensor(data.open_instances('shapes', 'val', vocabulary=vocabulary).coarse)    # [K]: of 16
    third = 3 * val_labels // len(kinds)                    # classes stand in order of their frequency
    rows = []
    for num in NUM_TRAIN:
        seen = places < num
        own, own_labels = x[seen], labels[seen]
        row = dict(name=f'{arm}-{seed}-{num}', arm=arm, seed=seed, images=num, vocabulary=vocabulary)
        row['coarse'] = run.linear_probe(own, kinds[own_labels], val_x, kinds[val_labels])
        row['fine'] = run.linear_probe(own, own_labels, val_x, val_labels)
        for i, letter in enumerate('fcr'):
            of = third == i
            row[letter] = run.linear_probe(own, own_labels, val_x[of], val_labels[of])
        rows.append(row)
    return rows


def curves_of(rows):
    """{arm: {seed: its rows, few images first}}."""
    found = {}
    for row in sorted(rows, key=lambda row: row['images']):
        found.setdefault(row['arm'], {}).setdefault(row['seed'], []).append(row)
    return found


def report(rows):
    curves = curves_of(rows)
    most = max(row['images'] for row in rows)
    measures = 'coarse', 'fine', 'f', 'c', 'r'
    table = []
    for arm, seeds in curves.items():
        last = [own[-1] for own in seeds.values()]
        table.append([arm, len(last), *[grid.percent([row[measure] for row in last]) for measure in measures]])
    grid.print_table([f'{most:,} images, percent', 'seeds', *measures], table)

    # against the first arm, seed by seed
    first, *others = curves
    table = []
    for arm in others:
        both = [(own, curves[first][seed]) for seed, own in curves[arm].items() if seed in curves[first]]
        values = [[at_equal_coarse(*pair, measure) for pair in both] for measure in ('fine', 'r')]
        table.append([f'{arm} - {first}', *map(grid.percent, values)])
    grid.print_table(['at the same coarse accuracy, paired, 95%', 'fine', 'r'], table)


def at_equal_coarse(ours, theirs, measure):
    """By how much ours has more where both have the coarse accuracy of the weaker one; None if the stronger one has
    more of it from the start."""
    coarse = min(ours[-1]['coarse'], theirs[-1]['coarse'])
    if coarse < max(ours[0]['coarse'], theirs[0]['coarse']):
        return None
    a, b = [np.interp(coarse, [row['coarse'] for row in own], [row[measure] for row in own]) for own in (ours, theirs)]
    return float(a - b)


def main():
    parser = grid.make_parser(__doc__)
    parser.add_argument('files', nargs='*', help='of ViTs or CLIPs')
    parser.add_argument('--vocabulary', default='textured', choices=('textured', 'fine'))
    parser.add_argument('--csv', default='out/vocabulary.csv', help='where rows are kept (out/vocabulary.csv)')
    args = parser.parse_args()
    rows = [row for row in grid.read_csv(args.csv) if row['vocabulary'] == args.vocabulary]
    for path in args.files:
        try:
            vit = M.load(path, M.ViT, pool='map', mask_token=False, head=0)
        except M.Refused as error:
            grid.refuse(error)
        folder = Path(path).parent.name if Path(path).stem == 'model' else Path(path).stem
        arm, seed = re.fullmatch(r'(.*?)(?:-(\d+))?', folder).groups()
        seed = int(seed or 0)
        untrained = M.init_weights(M.ViT(vit.config), seed, gain=1.9).eval()
        for name, one in ((arm, vit), (f'{vit.width} x {vit.config.depth}, untrained', untrained)):
            if any((row['arm'], row['seed']) == (name, seed) for row in rows):
                continue
            rows += rows_of(name, seed, one, args.vocabulary)
            Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
            grid.write_csv(args.csv, rows)
            print(f"{name}, seed {seed}: coarse {rows[-1]['coarse']:.3f}, fine {rows[-1]['fine']:.3f}", flush=True)
    if not rows:
        grid.refuse('no rows; give files of models')
    report(rows)


if __name__ == '__main__':
    main()
