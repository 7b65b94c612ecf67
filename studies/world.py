"""
What a reader should know of the built-in world before trusting a curve, measured; and a contact sheet, out/world.png.

    python studies/world.py
"""
import hashlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                         # noqa: E402


def check_world(num=20_000):
    """Rows (what, measured, wanted, whether it is so)."""
    world = data.World()
    scenes = world.scenes(torch.arange(num))
    rows = []

    def note(what, measured, wanted, passed):
        rows.append((what, measured, wanted, passed))

    # do objects repeat? layouts from 2 on are rows, rings, grids and mirrors
    repeated = share(scenes['layout'] >= 2)
    note('scenes in which objects repeat', f'{repeated:.0%}', '50% or more', repeated >= .5)

    # are held-out pairs of kind and colour held out?
    seen = pairs(scenes)
    tables = data.grammar('cpu')
    held_out = set(tables['held_out'].flatten().nonzero()[:, 0].tolist())
    there = pairs(data.World('heldout').scenes(torch.arange(500)))
    note('kinds x colours seen in training, of 160', len(seen), 136, len(seen) == 136)
    note('held-out pairs seen in training, of 24', len(held_out & seen), 0, not held_out & seen)
    note('other pairs in the held-out split', len(there - held_out), 0, there <= held_out)

    # how long is the tail of the fine classes, and can they be told apart?
    counts = scenes['fine'][scenes['valid']].bincount(minlength=data.NUM_FINE)
    counts = sorted(counts.tolist(), reverse=True)
    num_seen = data.NUM_FINE - counts.count(0)
    ratio = counts[0] // counts[120]
    same = identical_classes()
    note('fine classes seen, of 240', num_seen, 240, num_seen == 240)
    note('commonest / median fine class', ratio, '8 or more', ratio >= 8)
    note('fine classes that look the same', same, 0, same == 0)

    # what pixels and captions say
    semantic = world.batch(torch.arange(512), 32, want=('semantic',))['semantic']
    things = share(semantic >= data.NUM_STUFF)
    knn = pixel_knn(world)
    words = set(' '.join(world.some_captions(5000)).split())
    note('pixels on things', f'{things:.0%}', '20% to 50%', .2 <= things <= .5)
    note("raw pixels' k-NN on 16 kinds (chance 6%)", f'{knn:.1%}', 'under 15%', knn < .15)
    note('words in captions', len(words), '100 or more', len(words) >= 100)

    digest = world_hash()
    note(f'hash of 64 scenes, version {data.WORLD_VERSION}', digest, data.WORLD_HASH, digest == data.WORLD_HASH)
    return rows


def share(these):
    return these.float().mean().item()


def pairs(scenes):
    """The numbers kind * 10 + colour of all objects."""
    numbers = scenes['kind'] * data.NUM_COLOURS + scenes['colour']
    return set(numbers[scenes['valid']].tolist())


def pixel_knn(world, num=2000, num_test=500, k=5):
    """Accuracy of telling the largest object's kind by the nearest images in raw pixels: it should be near chance."""
    batch = world.batch(torch.arange(num), 32, want=('images',))
    images = batch['images'].flatten(1).float()
    labels = batch['labels']
    distance = torch.cdist(images[:num_test], images[num_test:])
    nearest = distance.topk(k, largest=False).indices                           # [num_test, k]

    # the majority says
    votes = F.one_hot(labels[num_test:][nearest], data.NUM_KINDS).sum(1)        # [num_test, 16]
    return share(votes.argmax(1) == labels[:num_test])


def identical_classes():
    """Pairs of fine classes whose shapes, drawn alike at 32 px, give the same image: there should be none."""
    singles = data.World(objects=1).scenes(torch.arange(1000))
    largest = singles['radius'][:, 0].argmax()
    place = torch.full((data.NUM_FINE,), int(largest))
    scenes = {name: value[place] for name, value in singles.items()}            # the same one 240 times
    scenes['x'][:] = 512
    scenes['y'][:] = 512

    # with the kind, texture and part of each class
    fine = data.grammar('cpu')['fine']                    # [240, (kind, texture, part)]
    for column, name in enumerate(('kind', 'texture', 'part')):
        scenes[name][:, 0] = fine[:, column]
    images, _ = data.draw_scenes(scenes, 32)
    images = images.flatten(1)
    return data.NUM_FINE - len(images.unique(dim=0))


def world_hash():
    """Of 64 scenes' integers, semantic maps and captions: what must not change while WORLD_VERSION stays."""
    batch = data.World().batch(torch.arange(64), 32, want=('semantic', 'captions'))
    found = hashlib.sha256()
    for name in sorted(batch):
        if name not in ('images', 'captions', 'unnamed'):       # the last repeats a part
            found.update(batch[name].long().numpy().tobytes())
    captions = '\n'.join(batch['captions'])
    found.update(captions.encode())
    return found.hexdigest()[:12]


def contact_sheet(path, rows=5, columns=12, tile=64):
    """Scenes of the world as a picture."""
    batch = data.World().batch(torch.arange(rows * columns), tile, want=('images',))
    images = batch['images'].view(rows, columns, 3, tile, tile)
    sheet = images.permute(0, 3, 1, 4, 2)                       # [rows, tile, columns, tile, 3]
    sheet = sheet.reshape(rows * tile, columns * tile, 3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.numpy()).save(path)


if __name__ == '__main__':
    for what, measured, wanted, passed in check_world():
        print(f'{"ok  " if passed else "FAIL"} {what:<52} {measured!s:>12}   (wanted: {wanted})')
    contact_sheet('out/world.png')
    print('out/world.png: 60 scenes')
