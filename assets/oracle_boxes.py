"""
What a vocabulary costs when boxes are given: frozen features of the true boxes of the built-in world and a linear
classifier, for the 16 coarse and the 240 fine classes; seconds a model.

    python assets/oracle_boxes.py assets/nano-eva.pt out/mim_pretrain-micro/model.pt ...

gap is 1 - fine / coarse; r, c, f are the rare, common and frequent thirds of the fine classes. Untrained is the same
model before it learnt.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data                                             # noqa: E402
import model as M                                       # noqa: E402
from coco import Scenes                                 # noqa: E402
from detect_seg import prepare, roi_align               # noqa: E402

NUM_TRAIN, NUM_VAL = 3000, 1500         # images, of about 2.6 objects each


@torch.no_grad()
def box_features(vit, split, num, image_size):
    """The mean of 3 x 3 RoIAligned features of every true box, [n, D], and fine classes [n]."""
    dataset = Scenes(data.open_data('shapes', split), 'fine')
    features, labels = [], []
    for batch in data.eval_batches(dataset, 50, image_size, num, 'cpu'):
        boxes = [target['boxes'] for target in batch['targets']]
        image = torch.cat([torch.full((len(part),), i) for i, part in enumerate(boxes)])
        maps = vit(prepare(vit, batch['images'], batch['sizes']))
        features.append(roi_align(maps, torch.cat(boxes), image, 3, 1 / vit.patch_size).flatten(2).mean(2))
        labels += [target['labels'] for target in batch['targets']]
    return torch.cat(features), torch.cat(labels)


def classify(train_x, train_y, val_x, num, ridge=1e-3):
    """Labels of val_x by the best linear map to one-hot labels, as in model.linear_probe."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    standard = lambda x: torch.cat(((x - mean) / std, torch.ones(len(x), 1)), 1).double()
    x, y = standard(train_x), torch.nn.functional.one_hot(train_y, num).double()
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1]), x.T @ y)
    return (standard(val_x) @ weights).argmax(1)


def study(name, vit, image_size):
    (x, y), (val_x, val_y) = (box_features(vit, split, num, image_size)
                              for split, num in (('train', NUM_TRAIN), ('val', NUM_VAL)))
    kind = torch.tensor(Scenes(data.open_data('shapes'), 'fine').coarse)
    coarse = (classify(x, kind[y], val_x, 16) == kind[val_y]).float().mean()
    right = classify(x, y, val_x, len(kind)) == val_y
    third = 3 * val_y // len(kind)
    fine = right.float().mean()
    by_third = ' '.join(f'{letter} {right[third == i].float().mean():.3f}' for i, letter in enumerate('fcr'))
    print(f'{name:<40} {sum(w.numel() for w in vit.parameters()):>11,}  coarse {coarse:.3f}  fine {fine:.3f} '
          f'({by_third})  gap {1 - fine / coarse:.3f}', flush=True)


if __name__ == '__main__':
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        vit = M.load(path, M.ViT, pool='map', mask_token=False, head=0)
        for name, model in ((path, vit), (f'{path}, untrained', M.init_weights(M.ViT(**vit.config)))):
            study(name, model, 2 * vit.image_size)          # twice as many patches along a side as it learnt with
