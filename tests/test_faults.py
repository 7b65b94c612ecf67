"""Every stage runs to its end on a set in which each kind of fault hits a few of 200 samples, and counts all of them by
reason. What only reading shows lies where every sample is read; the faults are those of tests/mutate.py."""
import importlib
import json
import os
import re
import sys
from collections import Counter

import pytest

import mutate
import run

NUM = 200
UNREADABLE = 'could not be read and were left out'
DAMAGED = ['of 60,000 x 60,000', 'an EPS', 'an SVG']        # of mutate.PICTURES


def faulty_boxes():
    """A detection set, and how often each reason must be counted."""
    files = mutate.coco_set(NUM) | {'val.json': mutate.coco_set(20)['val.json']}        # all of which are judged
    held = files['train.json']
    expected = Counter()
    number = iter(range(1, NUM))        # of the image that a fault hits; the next one the next

    # one annotation of an image
    for reason, faults in mutate.ROWS.items():
        for fields in faults.values():
            held['annotations'][5 * next(number)].update(fields)
            expected[f'{reason} and were left out'] += 1

    # what the json says of an image
    for reason, fields in [('no width or height', dict(width=None)), ('no width or height', dict(height=-1)),
                           ('no file_name', dict(file_name=7))]:
        held['images'][next(number)].update(fields)
        expected[f'images have {reason} and were left out'] += 1
    held['images'][next(number)].update(file_name='../../x.png')
    expected['images lie outside of their folder and were left out'] += 1

    # its picture
    del files[f'train/{next(number)}.png']
    expected['images of the json are not there'] += 1
    number = iter(range(1, 20))
    for what in DAMAGED:
        files[f'val/{next(number)}.png'] = mutate.PICTURES[what]
        expected[UNREADABLE] += 1
    for what in ('smaller', 'a line'):
        files[f'val/{next(number)}.png'] = mutate.PICTURES[what]
        expected['are of another size than their json says and were left out'] += 1
    return files, expected


def faulty_maps():
    """A segmentation set, and how often each reason must be counted."""
    files = mutate.map_set(NUM)
    for i in range(8, NUM):             # enough to judge by
        del files[f'images/val/{i}.png'], files[f'annotations/val/{i}.png']
    expected = Counter()
    number = iter(range(1, NUM))
    reasons = {
        'have a label map with a value that is no class': ['of 200', 'of -1', 'of NaN', 'of 65535'],
        'have a label map in colours': ['in RGB', 'grey and alpha'],
        'are of another size than their label map': ['lying down', 'of a pixel'],
        'have a label map that cannot be read': ['an EPS', 'of 60,000 x 60,000', 'of text']}
    for reason, faults in reasons.items():
        for what in faults:
            files[f'annotations/train/{next(number)}.png'] = mutate.MAPS[what]
            expected[f'{reason} and were left out'] += 1
    for what in DAMAGED:
        files[f'images/train/{next(number)}.png'] = mutate.PICTURES[what]
        expected[UNREADABLE] += 1
    del files[f'annotations/train/{next(number)}.png']
    expected['images have no label map and were left out'] += 1
    return files, expected


def faulty_folders():
    """Class folders, and how often each reason must be counted."""
    files = {}
    for i in range(NUM):
        files[f'train/{i % 10}/{i}.jpg'] = mutate.photo(i, 'JPEG')
        files[f'val/{i % 10}/{i // 10}.jpg'] = mutate.photo(i, 'JPEG')
    expected = Counter()
    number = iter(range(1, NUM))
    whole = files['train/0/0.jpg']
    for content in [b'', whole[:len(whole) // 2], os.mkfifo, *map(mutate.PICTURES.get, DAMAGED)]:
        n = next(number)
        files[f'train/{n % 10}/{n}.jpg'] = content
        expected[UNREADABLE] += 1
    for name in ('train/stray.jpg', 'train/stray.png', 'val/stray.jpg'):
        files[name] = mutate.photo(0)
        expected['images have no class and were left out'] += 1
    return files, expected


def faulty_shards():
    """Shards with captions, and how often each reason must be counted."""
    shards = mutate.shard_set(NUM)
    members = shards['00000.tar'] + shards['00001.tar']         # of each sample a jpg, a txt, a cls and a json
    expected = Counter()
    number = iter(range(1, NUM))
    for caption in (None, '', ' ', 7, [], [None], {}):
        n = next(number)
        members[4 * n + 1][1] = b''
        members[4 * n + 3][1] = json.dumps(dict(caption=caption)).encode()
        expected['images have no caption and were left out'] += 1
    for content in (b'', b'\xff'):
        members[4 * next(number) + 2][1] = content
        expected['images have no class and were left out'] += 1
    for what in DAMAGED:
        members[4 * next(number)][1] = mutate.PICTURES[what]
        expected[UNREADABLE] += 1
    members[4 * next(number) + 1][1] = b'caf\xe9'
    expected['captions are not UTF-8'] += 1
    members.append(members[4 * next(number)])
    expected['members are there again, of which the last counts'] += 1
    expected['shards are cut short or damaged'] += 1
    return {'00000.tar': members, '00001.tar': b'<html>404</html>' * 99}, expected


def counts(said):
    """{reason: its count} of what a run reports, over its training and validation sets."""
    lines = {line for line in said.splitlines() if re.match('[0-9,]+ .*: ', line)}      # said at the start, too
    found = Counter()
    for line in lines:
        number, reason = line.partition(': ')[0].split(' ', 1)
        found[re.sub('^of [0-9,]+ [a-z]+ ', '', reason)] += int(number.replace(',', ''))
    return found


@pytest.mark.parametrize('make, command', [
    (faulty_boxes, 'detect_seg.py --batch_size 10 --image_size 32 --patch_size 8'),
    (faulty_maps, 'detect_seg.py --head linear --batch_size 100 --image_size 32 --patch_size 8'),
    (faulty_folders, 'finetune.py --init scratch --batch_size 100'),
    (faulty_shards, 'clip_train.py --batch_size 100')])
def test_a_run_ends_and_counts_every_fault(make, command, tmp_path, monkeypatch, capsys):
    """No error, a model, numbers, and each reason as often as it was given."""
    files, expected = make()
    mutate.write(tmp_path, files)
    command = f'{command} --size pico --device cpu --steps 2 --data {tmp_path} --out_dir {tmp_path}/out'
    monkeypatch.setattr(sys, 'argv', command.split())
    stage = importlib.import_module(sys.argv[0].removesuffix('.py'))
    run.main(stage.train, stage.Config, stage.RECIPES)
    said = capsys.readouterr()
    assert 'Traceback' not in said.err and counts(said.out) == expected
    assert (tmp_path / 'out' / 'model.pt').exists() and json.loads((tmp_path / 'out' / 'result.json').read_text())
