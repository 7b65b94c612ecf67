"""
Does the teacher know what its patches show? Linear probes of the ground or kind that most of a patch shows, from its
patch features, from raw pixels, and from the features of a ViT that never learnt.

    python studies/teacher.py                               # assets/nano-teacher.pt
    python studies/teacher.py out/teacher/model.pt          # any CLIP
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                         # noqa: E402
import model as M                   # noqa: E402
import run                          # noqa: E402

NUM_IMAGES = 768                    # of validation; half of their patches fit the probe, half judge it


@torch.no_grad()
def patch_probes(teacher, num=NUM_IMAGES):
    """{what the probe sees: share of patches named right}."""
    patch_size, image_size = teacher.patch_size, teacher.visual.image_size
    world = data.World('val')
    pixels, labels = [], []
    for position in torch.arange(num).split(64):
        batch = world.batch(position, image_size, want=('images', 'semantic'))
        classes = F.one_hot(batch['semantic'], data.NUM_STUFF + data.NUM_KINDS).float()     # [B, H, W, K]
        shares = F.avg_pool2d(classes.permute(0, 3, 1, 2), patch_size)                      # [B, K, h, w]
        labels.append(shares.argmax(1).flatten(1))
        pixels.append(teacher.normalize(batch['images']))
    pixels = torch.cat(pixels)
    labels = torch.cat(labels).flatten()                                                    # [B * N]

    # each [B, N, C]
    untrained = M.init_weights(M.ViT(teacher.visual.config))
    patches = F.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2)
    features = {'teacher': teacher.patch_features(pixels), 'untrained': untrained.patch_features(pixels),
                'pixels': patches}

    # one half fits, the other judges
    half = len(labels) // 2
    found = {}
    for name, x in features.items():
        x = x.flatten(0, 1)
        found[name] = run.linear_probe(x[:half], labels[:half], x[half:], labels[half:])
    return found


if __name__ == '__main__':
    path = sys.argv[1] if sys.argv[1:] else 'assets/nano-teacher.pt'
    try:
        print(run.table(patch_probes(M.load(path, M.CLIP))))
    except M.Refused as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
