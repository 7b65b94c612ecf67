"""
What a large vocabulary costs: frozen features of the built-in world's true boxes and a linear classifier, for the 16
kinds (coarse) and the 119 kinds with textures, which captions name (fine; `--vocabulary fine`: 240 kinds with textures
and parts, which captions do not name). Some seconds to two minutes a model.

    python studies/vocabulary.py out/scaling/*-[012]-6400/model.pt out/claims/pretrained-shapes/pixels-*/model.pt
    python studies/vocabulary.py --csv studies/vocabulary.csv                  # the tables of models that are kept

A model that is better at kinds is better at fine classes too. So EVA's sizes make a line, fine over coarse, and of every
other model it is asked how far above that line it lies, at the same coarse.
The claim that EVA narrows the gap is wrong if others do not lie below the line, or if fine / coarse does not grow with
EVA's size. Classes count alike, as in AP; f, c, r: the frequent, common and rare thirds.
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

NUM_TRAIN, NUM_VAL = 4000, 2000     # images, of about 2.6 objects each
SAMPLES = 6                         # points along a box's side at which its features are looked up
RIDGE = 1e-3


@torch.no_grad()
def box_features(vit, split, num, vocabulary):
    """The mean feature of every true box [n, D], and its class [n]. The ViT sees twice as many patches along a side
    as it learnt with."""
    image_size = 2 * vit.image_size
    dataset = data.open_instances('shapes', split, vocabulary=vocabulary)
    features, labels = [], []
    for batch in data.eval_batches(dataset, 50, image_size, num, torch.device('cpu')):
        maps = vit(vit.normalize(batch['images']))                              # [B, D, h, w]
        for one, target in zip(maps, batch['targets']):
            features.append(mean_in_boxes(one, target['boxes'] / image_size))
            labels.append(target['labels'])
    return torch.cat(features), torch.cat(labels)


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


def right_by_class(train_x, train_y, val_x, val_y, num_classes):
    """The share of each class's boxes that are named right [K], NaN where there are none, by ridge regression from
    standardised features to one-hot labels in which every class has the same weight. x [n, D], y [n]."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6

    def standard(x):                                                            # [n, D + 1], the last a bias
        return F.pad((x - mean) / std, (0, 1), value=1.).double()
    x = standard(train_x)
    y = F.one_hot(train_y, num_classes).double()
    weighted = x / y.sum(0)[train_y, None]                                      # each class sums to 1
    scale = RIDGE * len(train_y.unique())
    weights = torch.linalg.solve(weighted.T @ x + scale * torch.eye(x.shape[1]), weighted.T @ y)
    right = (standard(val_x) @ weights).argmax(1) == val_y
    counts = torch.bincount(val_y, minlength=num_classes)
    return torch.bincount(val_y[right], minlength=num_classes) / counts         # 0 / 0 is NaN


def row_of(arm, seed, vit, vocabulary):
    """A model's row: the share of boxes that is named right, mean over classes."""
    x, labels = box_features(vit, 'train', NUM_TRAIN, vocabulary)
    val_x, val_labels = box_features(vit, 'val', NUM_VAL, vocabulary)
    kinds = torch.tensor(data.open_instances('shapes', 'val', vocabulary=vocabulary).coarse)    # [K]: of 16
    coarse = right_by_class(x, kinds[labels], val_x, kinds[val_labels], data.NUM_KINDS)
    fine = right_by_class(x, labels, val_x, val_labels, len(kinds))             # classes stand by falling frequency
    row = dict(name=f'{arm}-{seed}', arm=arm, seed=seed, vocabulary=vocabulary,
               coarse=coarse.nanmean().item(), fine=fine.nanmean().item())
    for letter, third in zip('fcr', fine.tensor_split(3)):
        row[letter] = third.nanmean().item()
    return row


def report(rows):
    arms = {}                                       # arm: {seed: its row}
    for row in rows:
        arms.setdefault(row['arm'], {})[row['seed']] = dict(row, kept=row['fine'] / row['coarse'])
    line = [arm for arm in M.SIZES if arm in arms]  # EVA's sizes are called by their names alone
    arms = {arm: arms[arm] for arm in (*line, *(arm for arm in arms if arm not in line))}

    measures = 'coarse', 'fine', 'f', 'c', 'r', 'kept'
    table = []
    for arm, seeds in arms.items():
        above = [above_line(row, [arms[size].get(seed) for size in line]) for seed, row in seeds.items()]
        values = [grid.percent([row[measure] for row in seeds.values()]) for measure in measures]
        table.append([arm, len(seeds), *values, '' if arm in line or None in above else grid.percent(above)])
    grid.print_table(['percent', 'seeds', *measures[:-1], 'fine / coarse', "fine above EVA's of the same coarse"], table)

    table = []
    for small, large in zip(line, line[1:]):
        table.append([f'{large} - {small}', *[grid.percent(grid.differences(arms[large], arms[small], measure))
                                              for measure in ('coarse', 'fine', 'kept')]])
    grid.print_table(['paired, 95%', 'coarse', 'fine', 'fine / coarse'], table)


def above_line(row, line):
    """How much more fine a row has than the line through EVA's sizes at its coarse; None beyond the line's ends, or
    where a size lacks this seed."""
    if not line or None in line:
        return None
    line = sorted((own['coarse'], own['fine']) for own in line)
    if not line[0][0] <= row['coarse'] <= line[-1][0]:
        return None
    return float(row['fine'] - np.interp(row['coarse'], *zip(*line)))


def main():
    parser = grid.make_parser(__doc__)
    parser.add_argument('files', nargs='*', help='of ViTs or CLIPs, in folders called ARM-SEED or SIZE-SEED-STEPS')
    parser.add_argument('--vocabulary', default='textured', choices=('textured', 'fine'))
    parser.add_argument('--csv', default='out/vocabulary.csv', help='where rows are kept (out/vocabulary.csv)')
    args = parser.parse_args()
    rows = []                                       # of both vocabularies
    if Path(args.csv).exists():
        rows = grid.read_kept(args.csv, 'arm', 'seed', 'vocabulary', 'coarse', 'fine')
    Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    for path in args.files:
        try:
            vit = M.load(path, M.ViT, pool='map', mask_token=False, head=0)
        except M.Refused as error:
            grid.refuse(error)
        folder = Path(path).parent.name if Path(path).stem == 'model' else Path(path).stem
        arm, seed = re.fullmatch(r'(.*?)(?:-(\d+)(?:-\d+)?)?', folder).groups()
        seed = int(seed or 0)
        untrained = M.init_weights(M.ViT(vit.config), seed, gain=1.9).eval()
        for name, one in ((arm, vit), (f'{vit.width} x {vit.config.depth}, untrained', untrained)):
            if any((row['arm'], row['seed'], row['vocabulary']) == (name, seed, args.vocabulary) for row in rows):
                print(f'{name}, seed {seed}: {args.csv} has it')
                continue
            rows.append(row_of(name, seed, one, args.vocabulary))
            grid.write_csv(args.csv, rows)
            print(f"{name}, seed {seed}: coarse {rows[-1]['coarse']:.3f}, fine {rows[-1]['fine']:.3f}", flush=True)
    rows = [row for row in rows if row['vocabulary'] == args.vocabulary]
    if not rows:
        grid.refuse(f'{args.csv} has no rows of --vocabulary {args.vocabulary}; give files of models')
    report(rows)


if __name__ == '__main__':
    main()
