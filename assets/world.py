"""
The built-in world's checks as a table, and a contact sheet in out/world.png; `python data.py` runs this.
What a reader should know before trusting a curve: that objects repeat, that held-out pairs are held out, that raw
pixels say little of classes.
"""
import hashlib
import os
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import (NUM_COLOURS, NUM_FINE, NUM_KINDS, NUM_STUFF, WORLD_HASH, WORLD_VERSION, World, grammar)  # noqa: E402


def pixel_knn(world, num=2000, num_test=500, k=5):
    """Accuracy of telling the largest object's kind by the nearest images in raw pixels: it should be near chance."""
    batch = world.batch(torch.arange(num), 32, want=('images',))
    images, labels = batch['images'].flatten(1).float(), batch['labels']
    nearest = torch.cdist(images[:num_test], images[num_test:]).topk(k, largest=False).indices      # [num_test, k]
    votes = torch.nn.functional.one_hot(labels[num_test:][nearest], NUM_KINDS).sum(1)
    return (votes.argmax(1) == labels[:num_test]).float().mean().item()


def identical_classes():
    """Pairs of fine classes whose shapes, drawn alike at 32 px, give the same image: there should be none."""
    g, singles = grammar('cpu', NUM_FINE, False), World(objects=1).scenes(torch.arange(1000))
    largest = singles['radius'][:, 0].argmax()
    s = {name: value[largest].expand(NUM_FINE, *value.shape[1:]).clone() for name, value in singles.items()}
    s['x'][:], s['y'][:] = 512, 512
    for column, name in enumerate(('kind', 'texture', 'part')):
        s[name][:, 0] = g['fine'][:, column]
    images = World().render(s, 32)['images'].flatten(1)
    return NUM_FINE - len(images.unique(dim=0))


def check_world(num=20_000):
    """(what, measured, wanted, passed) of the world by itself."""
    world = World()
    s = world.scenes(torch.arange(num))
    valid, twin = s['valid'], World('heldout').scenes(torch.arange(500))
    pair = lambda scenes: set((scenes['kind'] * NUM_COLOURS + scenes['colour'])[scenes['valid']].tolist())
    seen, held_out = pair(s), set(grammar('cpu', NUM_FINE, False)['held_out'].flatten().nonzero()[:, 0].tolist())
    counts = s['fine'][valid].bincount(minlength=NUM_FINE).sort(descending=True).values
    repeated = (s['layout'] >= 2).float().mean().item()
    things = (world.batch(torch.arange(512), 32, want=('semantic',))['semantic'] >= NUM_STUFF).float().mean().item()
    words = {word for caption in world.some_captions(5000) for word in caption.split()}
    same, knn, digest = identical_classes(), pixel_knn(world), world_hash()
    return [('scenes in which objects repeat', f'{repeated:.0%}', '50% or more', repeated >= .5),
            ('kinds x colours seen in training, of 160', len(seen), 136, len(seen) == 136),
            ('held-out pairs seen in training, of 24', len(held_out & seen), 0, not held_out & seen),
            ('other pairs in the held-out split', len(pair(twin) - held_out), 0, pair(twin) <= held_out),
            ('fine classes seen, of 240', int((counts > 0).sum()), 240, bool((counts > 0).all())),
            ('commonest / median fine class', int(counts[0] / counts[120]), '8 or more', counts[0] >= 8 * counts[120]),
            ('fine classes that look the same', same, 0, same == 0),
            ('pixels on things', f'{things:.0%}', '20% to 50%', .2 <= things <= .5),
            ("raw pixels' k-NN on 16 kinds (chance 6%)", f'{knn:.1%}', 'under 15%', knn < .15),
            ('words in captions', len(words), '100 or more', len(words) >= 100),
            (f'hash of 64 scenes, version {WORLD_VERSION}', digest, WORLD_HASH, digest == WORLD_HASH)]


def world_hash():
    """Of 64 scenes' integers, semantic maps and captions: what must not change while WORLD_VERSION stays."""
    batch = World().batch(torch.arange(64), 32, want=('semantic', 'captions'))
    left_out = 'images', 'captions', 'unnamed'      # the last repeats a part
    parts = [batch[name].long().numpy().tobytes() for name in sorted(batch) if name not in left_out]
    return hashlib.sha256(b''.join(parts) + '\n'.join(batch['captions']).encode()).hexdigest()[:12]


def contact_sheet(path, rows=5, columns=12, tile=64):
    """Scenes of the world as a picture."""
    images = World().batch(torch.arange(rows * columns), tile, want=('images',))['images']
    sheet = images.view(rows, columns, 3, tile, tile).permute(0, 3, 1, 4, 2).reshape(rows * tile, columns * tile, 3)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(sheet.numpy()).save(path)


if __name__ == '__main__':
    for what, measured, wanted, passed in check_world():
        print(f'{"ok  " if passed else "FAIL"} {what:<52} {measured!s:>12}   (wanted: {wanted})')
    contact_sheet('out/world.png')
    print('out/world.png: 60 scenes')
