"""
What a vocabulary costs when boxes are given: frozen features of the world's true boxes and a linear classifier, for
the 16 coarse and the 240 fine classes; seconds a model.

    python studies/oracle_boxes.py assets/nano-eva.pt out/mim_pretrain-micro/model.pt ...

gap is 1 - fine / coarse; f, c, r are the frequent, common and rare thirds of the fine classes. Untrained is the same
model before it learnt.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                         # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

NUM_TRAIN, NUM_VAL = 3000, 1500     # images, of about 2.6 objects each
SAMPLES = 6                         # points along a box's side at which its features are looked up


@torch.no_grad()
def box_features(vit, split, num, image_size):
    """The mean feature of every true box [n, D], and its fine class [n]."""
    dataset = data.open_instances('shapes', split, vocabulary='fine')
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


def study(name, vit):
    """Prints a line for one ViT, which sees twice as many patches along a side as it learnt with."""
    image_size = 2 * vit.image_size
    x, labels = box_features(vit, 'train', NUM_TRAIN, image_size)
    val_x, val_labels = box_features(vit, 'val', NUM_VAL, image_size)
    kinds = torch.tensor(data.open_instances('shapes', 'val', vocabulary='fine').coarse)        # [240]: of 16

    coarse = run.linear_probe(x, kinds[labels], val_x, kinds[val_labels])
    fine = run.linear_probe(x, labels, val_x, val_labels)
    third = 3 * val_labels // len(kinds)                    # fine classes stand in order of their frequency
    words = []
    for i, letter in enumerate('fcr'):
        own = third == i
        share = run.linear_probe(x, labels, val_x[own], val_labels[own])
        words.append(f'{letter} {share:.3f}')
    print(f'{name:<40} {run.count_parameters(vit):>11,}  coarse {coarse:.3f}  fine {fine:.3f} '
          f'({" ".join(words)})  gap {1 - fine / coarse:.3f}', flush=True)


def main(paths):
    if not paths:
        sys.exit(__doc__)
    for path in paths:
        try:
            vit = M.load(path, M.ViT, pool='map', mask_token=False, head=0)
        except M.Refused as error:
            print(f'error: {error}', file=sys.stderr)
            sys.exit(2)
        study(path, vit)
        study(f'{path}, untrained', M.init_weights(M.ViT(vit.config)))


if __name__ == '__main__':
    main(sys.argv[1:])
