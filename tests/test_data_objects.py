"""Readers of objects and label maps: masks as COCO keeps them, COCO's and LVIS's jsons, maps of classes. Masks are also
compared with what COCO's own tools give; these fixtures lie in the folders named by GOLDEN, as for test_golden.py."""
import json
import math
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from test_golden import fixtures


def uniform(*shape, stream='test'):
    return data.uniform(0, stream, torch.arange(1), int(np.prod(shape))).view(shape)


# ---- masks

def random_masks(num, size=(7, 9), stream='masks'):
    """From empty to full."""
    u = uniform(num, *size, stream=stream).numpy()
    return list(u < np.linspace(0, 1, num)[:, None, None])


def test_masks_survive_run_lengths():
    """bool to run lengths and back, from empty to full."""
    for mask in random_masks(8):
        runs = data.encode_mask(mask)
        assert runs.sum() == mask.size and (runs[1:] > 0).all()
        assert (data.decode_mask(runs, mask.shape) == mask).all()


def test_a_box_as_polygon_fills_its_pixels():
    """Of whole numbers, the polygon's pixels are the rectangle's."""
    mask = data.fill_polygon([2, 1, 6, 1, 6, 4, 2, 4], (5, 8))
    expected = np.zeros((5, 8), dtype=bool)
    expected[1:4, 2:6] = True
    assert (mask == expected).all() and data.mask_area(data.encode_mask(mask)) == 12


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_polygons(path):
    """Every part, their union and its area, to the pixel."""
    fixture = torch.load(path, weights_only=True)
    size = fixture['hw']
    for name, case in fixture['polygons'].items():
        for part, expected in zip(case['polygons'], case['part_masks']):
            assert (data.fill_polygon(part, size) == expected.numpy()).all(), name
        runs = data.fill_polygons(case['polygons'], size)
        assert (data.string_to_runs(case['rle']) == runs).all() and data.mask_area(runs) == case['area'], name


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_boxes_as_masks(path):
    """A box is the polygon of its corners."""
    fixture = torch.load(path, weights_only=True)
    for (x, y, w, h), expected in zip(fixture['boxes_to_masks']['boxes_xywh'], fixture['boxes_to_masks']['masks']):
        mask = data.fill_polygon([x, y, x, y + h, x + w, y + h, x + w, y], fixture['hw'])
        assert (mask == expected.numpy()).all()


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_run_lengths(path):
    """Masks to run lengths and back; strings to run lengths."""
    for name, case in torch.load(path, weights_only=True)['rle'].items():
        mask = case['mask'].numpy()
        runs = data.encode_mask(mask)
        assert runs.tolist() == case['counts_uncompressed'], name
        assert data.string_to_runs(case['counts_compressed']).tolist() == case['counts_uncompressed'], name
        assert (data.decode_mask(runs, case['size']) == mask).all(), name
        assert data.mask_area(runs) == case['area'], name


# ---- images with objects

def write_json(folder, annotations, num_images=4, size=(24, 32), **fields):
    """train.json, val.json and images 0.png, 1.png, ... of which image i is of one grey: 40 i."""
    for split in ('train', 'val'):
        os.makedirs(folder / split, exist_ok=True)
        for i in range(num_images):
            Image.new('RGB', size[::-1], (40 * i % 256,) * 3).save(folder / split / f'{i}.png')
        images = [dict(id=10 + i, file_name=f'{i}.png', height=size[0], width=size[1]) for i in range(num_images)]
        categories = [dict(id=3, name='cat'), dict(id=7, name='dog')]
        held = dict(images=images, annotations=annotations, categories=categories)
        (folder / f'{split}.json').write_text(json.dumps(held | fields))
    return str(folder)


def rename(folder, split, **fields):
    """Another json of this split: fields in the place of its own."""
    path = folder / f'{split}.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def row(image=0, box=(2, 3, 10, 8), category=3, **fields):
    return dict(image_id=10 + image, category_id=category, bbox=list(box), iscrowd=0, **fields)


def test_outlines_are_part_of_what_a_checkpoint_remembers(tmp_path):
    """Also where boxes are the same."""
    found = []
    for corner in (10, 9):
        write_json(tmp_path, [row(segmentation=[[2, 3, corner, 3, 2, 8]])])
        found.append(data.open_instances(str(tmp_path), 'train').identity())
    assert found[0] != found[1]


def test_categories_with_gaps_are_numbered_in_order(tmp_path):
    """Ids 3 and 7 are labels 0 and 1."""
    dataset = data.open_instances(write_json(tmp_path, [row(), row(category=7)]), 'val')
    batch = dataset.batch(torch.arange(4), 32, train=False)
    target = batch['targets'][batch['index'].index(0)]
    assert dataset.classes == ['cat', 'dog'] and target['labels'].tolist() == [0, 1]


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path):
    """Boxes outside the image or without area, masks of another size, unknown images and categories, absent images."""
    whole = dict(size=[24, 32], counts=[0, 768])
    folder = write_json(tmp_path, [row(), row(box=(40, 3, 5, 5)), row(box=(2, 3, 0, 5)), row(image=50),
                                   row(category=4), row(segmentation=dict(size=[9, 9], counts=[81])),
                                   row(box=(30, 20, 50, 50)), row(1, segmentation=whole, category=7)])
    os.remove(tmp_path / 'train' / '3.png')
    dataset = data.open_instances(folder, 'train')
    assert Counter(what.split(' ')[0] for what, _ in dataset.broken) == dict(boxes=2, masks=1, annotations=2, images=1)
    assert len(dataset) == 3 and [len(dataset.rows[10 + i]) for i in range(3)] == [2, 1, 0]
    assert dataset.rows[10][1]['box'] == [30, 20, 32, 24]                          # cut at the border


def test_boxes_in_shares_of_the_image_are_refused(tmp_path):
    """YOLO's numbers, 0 to 1, would pass for boxes of a pixel."""
    folder = write_json(tmp_path, [row(box=(.2, .1, .5, .6)), row(1, box=(0, 0, 1, 1))])
    with pytest.raises(data.Refused, match='not in shares of the image'):
        data.open_instances(folder, 'train')


def test_crowds_are_judged_and_not_learnt(tmp_path):
    """A crowd is no target, but among the rows that detections are judged by."""
    crowd = row(segmentation=dict(size=[24, 32], counts=[0, 768])) | dict(iscrowd=1)
    dataset = data.open_instances(write_json(tmp_path, [row(), crowd]), 'val')
    batch = dataset.batch(torch.arange(4), 32, train=False)
    n = batch['index'].index(0)
    assert len(batch['targets'][n]['boxes']) == 1 and len(dataset.truth(batch)[n][1]) == 2


def test_an_unreadable_image_is_replaced_and_named(tmp_path):
    folder = write_json(tmp_path, [row(i) for i in range(4)])
    (tmp_path / 'train' / '2.png').write_bytes(b'no image')
    dataset = data.open_instances(folder, 'train')
    batch, = data.batches(dataset, 4, 32, 0, 1, 0, 'cpu')
    assert sorted(batch['index']) == [0, 1, 3, 3]
    assert data.report_broken(dataset) == '1 of 4 images could not be read and were left out: 2.png'


@pytest.mark.parametrize('text, message', [
    ('{', 'is not JSON'), ('[]', 'no list of images'), ('7', 'no list of images'), ('[' * 100_000, 'is not JSON'),
    ('{"images": [], "categories": []}', 'no list of annotations'),
    ('{"images": [], "annotations": {}, "categories": []}', 'no list of annotations')])
def test_other_json_is_refused(tmp_path, text, message):
    """One line that names the file and what was expected."""
    (tmp_path / 'train.json').write_text(text)
    with pytest.raises(data.Refused, match=f'train.json.*{message}'):
        data.open_instances(str(tmp_path), 'train')


@pytest.mark.parametrize('fields, message', [
    (dict(images=[]), 'none of its 0 images'), (dict(categories=[]), 'has no categories'),
    (dict(categories=[7]), 'a category is 7'), (dict(categories=[dict(id=3)]), "a category is {'id': 3}"),
    (dict(categories=[dict(id=None, name='cat')]), "a category is {'id': None"),
    (dict(categories=[dict(id=True, name='cat')]), "a category is {'id': True"),
    (dict(categories=[dict(id=3, name='cat'), dict(id=3., name='dog')]), '2 categories have the id 3'),
    (dict(categories=[dict(id=3, name='cat'), dict(id=7, name='cat')]), "2 categories have the name 'cat'"),
    (dict(categories=[dict(id=3, name='cat', frequency='f'), dict(id=7, name='dog')]), "'dog' has no frequency"),
    (dict(categories=[dict(id=3, name='cat', frequency=['f'])]), "'cat' has no frequency"),
    (dict(images=[dict(id=10, file_name=f'{i}.png', height=24, width=32) for i in (0, 1)]), 'two images have the id 10'),
    (dict(annotations=[]), 'no object is left to learn from'),
    (dict(annotations=[row() | dict(iscrowd=1)] * 2), 'no object is left to learn from; 2 are crowds'),
    (dict(annotations=[row(box=(0, 0, 0, 0))]), 'learn from; 1 boxes have no area within their image')])
def test_a_json_that_means_nothing_is_refused(tmp_path, fields, message):
    """Images, categories and objects are looked at before any training."""
    folder = write_json(tmp_path, [row()])
    rename(tmp_path, 'train', **fields)
    with pytest.raises(data.Refused, match='train.json.*' + re.escape(message)):
        data.open_instances(folder, 'train')


SQUARE = [4, 4, 12, 4, 12, 12, 4, 12]
ZIGZAG = [x for n in range(300) for x in (n / 10, 24 * (n % 2))]
NO_OBJECTS = {  # what a json's annotation may hold that means nothing, by what is said of it
    'annotations name an unknown image or category': [dict(image_id=None), dict(image_id=[10]), dict(category_id=4),
                                                      dict(category_id=True), dict(category_id={})],
    'annotations have no box of four numbers': [
        dict(bbox=None), dict(bbox=[None] * 4), dict(bbox=[1, 2, 3]), dict(bbox='1 2 3 4'), dict(bbox=['1', 2, 3, 4]),
        dict(bbox=[1, 2, math.nan, 4]), dict(bbox=[1, 2, math.inf, 4]), dict(bbox=[1, 2, 10 ** 400, 4])],
    'boxes have no area within their image': [dict(bbox=[1, 2, -3, 4]), dict(bbox=[32, 2, 3, 4])],
    'annotations have an iscrowd that is neither 0 nor 1': [dict(iscrowd=2), dict(iscrowd='yes'), dict(iscrowd=[0])],
    'polygons have no three points': [dict(segmentation=[[1, 2, 3]]), dict(segmentation=[[2, 3, 10, 8]]),
                                      dict(segmentation=[SQUARE, []]), dict(segmentation=[SQUARE + [5]])],
    'polygons are no numbers or lie far outside of their image': [
        dict(segmentation=[['1'] * 6]), dict(segmentation=[[None] * 6]), dict(segmentation=[SQUARE + [5, math.nan]]),
        dict(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]]), dict(segmentation=[[[4, 4], [12, 4], [4, 12]] * 2])],
    'polygons have endless outlines': [dict(segmentation=[ZIGZAG]), dict(segmentation=[SQUARE] * 500)],
    'masks are neither polygons nor run lengths': [dict(segmentation='PPYo1'), dict(segmentation=7)],
    'masks are of another size than their image': [
        dict(segmentation=dict(size=24, counts=[0, 768])), dict(segmentation=dict(counts=[0, 768])),
        dict(segmentation=dict(size=[32, 24], counts=[0, 768]))],
    'run lengths are no whole numbers': [
        dict(segmentation=dict(size=[24, 32], counts=counts))
        for counts in (None, 768, [0., 768.], [None, 768], [-8, 776], [[0], 768], [], '', 'hello', 'PPo', 'é')],
    'run lengths do not add up to their image': [dict(segmentation=dict(size=[24, 32], counts=counts))
                                                 for counts in ([5, 5], [0, 10 ** 30], '0P1')],
    'masks are empty': [dict(segmentation=dict(size=[24, 32], counts=[768]))]}


@pytest.mark.parametrize('reason', NO_OBJECTS)
def test_an_object_that_means_nothing_is_left_out(tmp_path, reason):
    """Counted by reason and named; the others stay."""
    changes = NO_OBJECTS[reason]
    rows = [row(1) | dict(id=100 + n) | change for n, change in enumerate(changes)]
    dataset = data.open_instances(write_json(tmp_path, [row(), *rows, 'nonsense', row(2, id=100), row(2, id=7)]), 'train')
    there = {(reason + ' and were left out', f'annotation {100 + n}') for n in range(len(changes))}
    there.add(('annotations are no objects of the json and were left out', f'annotations[{len(rows) + 1}]'))
    assert dataset.broken == there
    assert [len(dataset.rows[10 + i]) for i in range(4)] == [1, 0, 2, 0]
    dataset.batch(torch.arange(8), 16)


def test_objects_of_one_id_count_once(tmp_path):
    dataset = data.open_instances(write_json(tmp_path, [row(id=5), row(1, id='5'), row(2), row(3)]), 'train')
    assert data.report_broken(dataset) == '1 annotations have the id of another and were left out: annotations[1]'


@pytest.mark.parametrize('change, reason', [
    (dict(id=None), 'images have no id'), (dict(id=[10]), 'images have no id'), (dict(width=0), 'images have no width'),
    (dict(height=None), 'images have no width or height'), (dict(width=31.5), 'images have no width or height'),
    (dict(file_name=7), 'images have no file_name'), (dict(file_name='/0.png'), 'images lie outside of their folder'),
    (dict(file_name='../train/0.png'), 'images lie outside of their folder'), (dict(id=11, file_name='1.png'), 'listed twice'),
    (dict(file_name='pipe.png'), 'images of the json are not there')])
def test_an_image_that_means_nothing_is_left_out_with_its_objects(tmp_path, change, reason):
    """Counted by reason; a pipe is no image, and nobody waits for it."""
    images = [dict(id=10 + i, file_name=f'{i}.png', height=24, width=32) for i in range(3)]
    folder = write_json(tmp_path, [row(1), row(2)], images=[images[1], images[2], images[0] | change])
    os.mkfifo(tmp_path / 'train' / 'pipe.png')
    dataset = data.open_instances(folder, 'train')
    (what, _), = dataset.broken
    assert reason in what and dataset.paths == ['1.png', '2.png']


def test_whole_numbers_are_accepted_in_any_type(tmp_path):
    """Sizes and ids as '24' or 24.0, as spreadsheets leave them; a polygon without the outer list; odd areas."""
    images = [dict(id=str(10 + i), file_name=f'{i}.png', height='24', width=32.) for i in range(4)]
    rows = [row(segmentation=SQUARE, area=None), row(1) | dict(category_id='7', image_id=11., iscrowd=False)]
    rows += [row(2) | dict(iscrowd=None, area=math.nan), row(3, area='80')]
    dataset = data.open_instances(write_json(tmp_path, rows, images=images), 'train')
    found = [part for parts in dataset.rows.values() for part in parts]
    assert not dataset.broken and [part['category_id'] for part in found] == [0, 1, 0, 0]
    assert [part['area'] for part in found] == [80] * 4


def test_compressed_run_lengths_are_read_and_checked(tmp_path):
    """A string of the right sum is an object: of 24 x 32 pixels the first 100 are none, 20 are, 648 are none."""
    assert data.string_to_runs('T3d0Xd0').tolist() == [100, 20, 648]
    text = dict(size=[24, 32], counts='T3d0Xd0')
    dataset = data.open_instances(write_json(tmp_path, [row(segmentation=text)]), 'train')
    assert not dataset.broken and len(dataset.rows[10]) == 1


# ---- classes by name

def test_labels_are_numbers_of_the_training_sets_classes(tmp_path):
    """Whatever ids and order the validation json gives them, and if it lacks some."""
    folder = write_json(tmp_path, [row(), row(1, category=7)])
    train = data.open_instances(folder, 'train')
    for categories, labels in (([dict(id=1, name='dog'), dict(id=2, name='cat')], [0, 1]), ([dict(id=1, name='dog')], [1])):
        rows = [row(n, category={'dog': 1, 'cat': 2}[train.classes[k]]) for n, k in enumerate(labels)]
        rename(tmp_path, 'val', categories=categories, annotations=rows)
        val = data.open_instances(folder, 'val', classes=train.classes)
        assert val.classes == ['cat', 'dog'] and [row['name'] for row in val.categories] == ['cat', 'dog']
        assert [val.rows[10 + n][0]['category_id'] for n in range(len(labels))] == labels


def test_a_class_that_only_validation_has_is_refused(tmp_path):
    folder = write_json(tmp_path, [row()])
    rename(tmp_path, 'val', categories=[dict(id=3, name='cat'), dict(id=4, name='eel')])
    with pytest.raises(data.Refused, match="val.json has the class 'eel'"):
        data.open_instances(folder, 'val', classes=['cat', 'dog'])


@pytest.mark.parametrize('names, message', [
    (list(data.KINDS)[:-1], "has the class 'bar'"), (list(data.KINDS)[::-1], 'in another order'),
    ([*data.KINDS, 'eel'], 'expected 17')])
def test_the_worlds_classes_are_as_they_are(names, message):
    """A model of others is not judged on it."""
    with pytest.raises(data.Refused, match=message):
        data.open_instances('shapes', 'val', classes=names)
    assert data.open_instances('shapes', 'val', classes=list(data.KINDS)).classes == list(data.KINDS)


def test_what_lvis_images_lack_is_numbered_as_labels(tmp_path):
    """An image that does not say is counted; a json of which none says is refused, but not to train on."""
    categories = [dict(id=5, name='dog', frequency='f'), dict(id=9, name='cat', frequency='r')]
    images = [dict(id=10 + i, file_name=f'{i}.png', height=24, width=32) for i in range(4)]
    for image in images[:3]:
        image.update(neg_category_ids=[9, 77], not_exhaustive_category_ids=['5'])
    folder = write_json(tmp_path, [row(category=5)], categories=categories, images=images)
    val = data.open_instances(folder, 'val', classes=['cat', 'dog'])
    assert val.images[0]['neg_category_ids'] == [0] and val.images[0]['not_exhaustive_category_ids'] == [1]
    assert val.broken == {('images do not say what they lack: other classes are not judged', '3.png')}
    assert [category['frequency'] for category in val.categories] == ['r', 'f']
    rename(tmp_path, 'val', images=[dict(image, neg_category_ids=None) for image in images])
    with pytest.raises(data.Refused, match='no image has neg_category_ids'):
        data.open_instances(folder, 'val')
    rename(tmp_path, 'train', images=[dict(image, neg_category_ids=None) for image in images])
    assert not data.open_instances(folder, 'train').broken


# ---- what is shown is what is described

def turned(path, size, orientation):
    """A JPEG stored with this (width, height), its left half black, and a note of how the camera was held."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image = Image.new('RGB', size, 'white')
    image.paste('black', (0, 0, size[0] // 2, size[1]))
    image.save(path, exif=exif, quality=95)


@pytest.mark.parametrize('size, orientation, dark', [
    ((32, 24), 1, 'left'), ((32, 24), 6, 'left'), ((24, 32), 6, 'top'), ((24, 32), 8, 'bottom')])
def test_a_json_describes_a_picture_as_it_is_stored_or_upright(tmp_path, size, orientation, dark):
    """Of 32 x 24: the turned one as it is stored if only that has this size."""
    folder = write_json(tmp_path, [row()])
    turned(tmp_path / 'train' / '0.png', size, orientation)
    image = data.open_instances(folder, 'train').sample(0, 32, None)['images'][0].float()
    places = dict(left=image[:24, :12], top=image[:10], bottom=image[14:24])
    assert places[dark].mean() < 60 and image[:24].mean() > 90


def test_a_picture_of_another_size_than_its_json_is_replaced(tmp_path):
    folder = write_json(tmp_path, [row(i) for i in range(4)])
    Image.new('RGB', (33, 24)).save(tmp_path / 'train' / '2.png')
    dataset = data.open_instances(folder, 'train')
    batch, = data.batches(dataset, 4, 32, 0, 1, 0, 'cpu')
    assert 2 not in batch['index']
    reason = '1 of 4 images are of another size than their json says and were left out: 2.png'
    assert data.report_broken(dataset) == reason


@pytest.mark.parametrize('form', ['polygon', 'runs'])
def test_boxes_are_drawn_anew_around_what_a_crop_leaves(tmp_path, form):
    """Of a thin L in the corner of its box: where the crop cut, the box is its pixels', and none is without any."""
    corner = [8, 6, 24, 6, 24, 8, 10, 8, 10, 20, 8, 20]
    mask = data.fill_polygon(corner, (24, 32))
    runs = dict(size=[24, 32], counts=data.encode_mask(mask).tolist())
    shape = [corner] if form == 'polygon' else runs
    folder = write_json(tmp_path, [row(i, box=(8, 6, 16, 14), segmentation=shape) for i in range(4)])
    dataset = data.open_instances(folder, 'train', scale_jitter=(1., 3.))
    num = num_cut = 0
    for size, target in zip(*map(dataset.batch(torch.arange(80), 32).get, ('sizes', 'targets'))):
        for box, mask in zip(target['boxes'], target['masks'], strict=True):
            if form == 'polygon':
                mask = torch.from_numpy(data.decode_mask(data.fill_polygons(mask, size), size))
            y, x = mask.nonzero().T
            tight = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()
            num += 1
            num_cut += torch.equal(box, tight)
            assert torch.equal(box, tight) or (box - tight).abs().max() < 2
    assert num < 80 and 10 < num_cut < num


def test_a_folder_without_boxes_says_what_was_looked_for(tmp_path):
    """Not images alone."""
    with pytest.raises(data.Refused, match='train.json, annotations/train.json, annotations/instances_train'):
        data.open_instances(str(tmp_path), 'train')


@pytest.mark.parametrize('jitter', [(1.,), (2., 1.), (0., 1.)])
def test_a_jitter_that_is_no_range_is_refused(jitter):
    for open_them in (data.open_instances, data.open_maps):
        with pytest.raises(data.Refused, match='--scale_jitter'):
            open_them('shapes', 'train', scale_jitter=jitter)


@pytest.mark.parametrize('form', ['polygon', 'runs'])
def test_boxes_and_masks_go_where_the_image_goes(tmp_path, form):
    """After jitter and mirroring, a white rectangle's pixels, its mask and its box are still the same place."""
    folder = write_json(tmp_path, [row(i, box=(8, 6, 12, 10)) for i in range(4)])
    mask = np.zeros((24, 32), dtype=bool)
    mask[6:16, 8:20] = True
    for i in range(4):
        Image.fromarray((255 * mask).astype(np.uint8)).convert('RGB').save(tmp_path / 'train' / f'{i}.png')
    if form == 'runs':
        held = json.loads((tmp_path / 'train.json').read_text())
        for part in held['annotations']:
            part['segmentation'] = dict(size=[24, 32], counts=data.encode_mask(mask).tolist())
        (tmp_path / 'train.json').write_text(json.dumps(held))
    dataset = data.open_instances(folder, 'train', scale_jitter=(.6, 2.))
    batch = dataset.batch(torch.arange(24), 64, seed=1)
    sides = set()
    for image, size, target in zip(batch['images'], batch['sizes'], batch['targets']):
        if not len(target['boxes']):
            continue
        x1, y1, x2, y2 = target['boxes'][0].round().int().tolist()
        seen = image[0] > 127
        mask, = target['masks']
        if form == 'polygon':
            mask = torch.from_numpy(data.decode_mask(data.fill_polygons(mask, size), size))
        mask = F.pad(mask, (0, 64 - size[1], 0, 64 - size[0]))
        box = torch.zeros(64, 64, dtype=torch.bool)
        box[y1:y2, x1:x2] = True
        for place in (mask, box):
            assert (seen & place).sum() > .8 * (seen | place).sum()
        sides.add(size)
    assert len(sides) > 5


def test_rare_classes_are_shown_more_often(tmp_path, monkeypatch):
    """LVIS's repeat factor: every image at least once an epoch, one with a rare class as often as its factor says."""
    folder = write_json(tmp_path, [row(i) for i in range(39)] + [row(39, category=7)], 40)
    held = json.loads((tmp_path / 'train.json').read_text())
    for category in held['categories']:
        category['frequency'] = 'f'
    (tmp_path / 'train.json').write_text(json.dumps(held))
    monkeypatch.setattr(data, 'REPEAT', .1)         # dogs are in 1 of 40 images: sqrt(.1 / .025) = twice
    dataset = data.open_instances(folder, 'train')
    assert len(dataset) == 41
    for epoch in range(3):
        counts = Counter(dataset.index(41 * epoch + torch.arange(41), seed=0))
        assert counts[39] == 2 and all(counts[i] == 1 for i in range(39))


@pytest.mark.parametrize('vocabulary, num', [('coarse', data.NUM_KINDS), ('textured', 119), ('fine', data.NUM_FINE)])
def test_the_world_as_a_json(vocabulary, num):
    """Every object is among the truth with its class, its box around its mask."""
    dataset = data.open_instances('shapes', 'val', vocabulary=vocabulary)
    batch, = data.eval_batches(dataset, 6, 48, 6, 'cpu')
    assert len(dataset.classes) == len(dataset.categories) == len(dataset.frequencies()) == num
    assert dataset.lvis == data.is_lvis(dict(categories=dataset.categories)) == (vocabulary != 'coarse')
    for (image, parts), target in zip(dataset.truth(batch), batch['targets']):
        assert [part['category_id'] for part in parts] == target['labels'].tolist()
        for part in parts:
            runs = data.read_segmentation(part['segmentation'], (image['height'], image['width']))
            rows, columns = np.nonzero(data.decode_mask(runs, (image['height'], image['width'])))
            x, y, w, h = part['bbox']
            assert [x, y, x + w, y + h] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert part['area'] >= data.SMALLEST


# ---- images with a class for every pixel

def write_maps(folder, num=4, size=(24, 20), K=3, mode='L'):
    """Images whose colour tells the class of each pixel, with label maps, and the names of their classes."""
    for split in ('train', 'val'):
        for base in ('images', 'annotations'):
            os.makedirs(folder / base / split, exist_ok=True)
        for i in range(num):
            classes = (uniform(*size, stream=f'{split}{i}').numpy() * K).astype(np.uint8)
            classes = np.kron(classes[::4, ::4], np.ones((4, 4), np.uint8))[:size[0], :size[1]]
            Image.fromarray(np.stack([classes * 80] * 3, -1)).save(folder / 'images' / split / f'{i}.png')
            label = Image.fromarray(classes.astype(np.uint16) if mode == 'I;16' else classes)
            if mode == 'P':
                label.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
            label.save(folder / 'annotations' / split / f'{i}.png')
    (folder / 'classes.txt').write_text(''.join(f'class {k}\n' for k in range(K)))
    return str(folder)


@pytest.mark.parametrize('mode', ['L', 'P', 'I;16'])
def test_label_maps_of_all_kinds(mode, tmp_path):
    """Grey, palette and 16 bits hold the same classes."""
    image, classes = data.open_maps(write_maps(tmp_path, mode=mode), 'train').read(0)
    assert (np.array(image)[..., 0] // 80 == classes).all() and classes.max() == 2


def test_crops_show_the_same_part_of_image_and_labels(tmp_path, monkeypatch):
    """Scaled, cut, mirrored: the colour still tells the class; what is beyond the image is ignored."""
    monkeypatch.setattr(data, 'distort', lambda image, u: data.to_tensor(image))
    maps = data.open_maps(write_maps(tmp_path), 'train', scale_jitter=(1., 2.))
    batch = maps.batch(torch.arange(16), 20)
    known = batch['labels'] != data.IGNORED
    right = (batch['images'][:, 0].float() / 80).round() == batch['labels']
    assert known.float().mean() > .9 and right[known].float().mean() > .8       # bilinear edges
    again = maps.batch(torch.arange(8, 16), 20)
    assert torch.equal(again['labels'], batch['labels'][8:])


def test_crops_are_not_mostly_of_one_class_if_others_are_near(monkeypatch):
    """Of an image with a corner of another class, crops in which each has its quarter are twice as many."""
    labels = np.zeros((64, 64), np.int16)
    labels[:32, :32] = 1
    image = Image.new('RGB', (64, 64))
    counts = []
    for share in (.75, 1.):
        monkeypatch.setattr(data, 'LARGEST_SHARE', share)
        u = data.uniform(0, 'cut', torch.arange(60), 32).tolist()
        parts = [data.crop_maps(image, labels, 16, (4., 4.), row)[1] for row in u]
        counts.append(sum(.25 < (part == 1).float().mean().item() < .75 for part in parts))
    assert counts[0] >= 2 * counts[1] > 0


def test_colours_change_within_their_limits():
    """Half of the images or more change; a grey stays grey under hue and saturation."""
    image = Image.new('RGB', (4, 4), (120, 120, 120))
    found = torch.stack([data.distort(image, u) for u in data.uniform(0, 'distort', torch.arange(200), 8).tolist()])
    changed = (found != 120).flatten(1).any(1).float().mean()
    assert .5 < changed < .9 and (found.amax(1) - found.amin(1)).max() <= 2
    assert found.min() >= (120 - 32) // 2 - 1


def put_map(folder, images, labels, values):
    """An image and its label map, of these values, in folders of their own."""
    for base in (images, labels):
        os.makedirs(folder / base, exist_ok=True)
    Image.new('RGB', (2, 2)).save(folder / images / '0.png')
    Image.fromarray(np.uint8(values)).save(folder / labels / '0.png')


def test_layouts_that_tell_their_classes(tmp_path):
    """ADE20K's value 0 is none, COCO-Stuff's values have gaps; 255 is always ignored."""
    put_map(tmp_path / 'ade', 'images/validation', 'annotations/validation', [[0, 1], [2, 255]])
    maps = data.open_maps(str(tmp_path / 'ade'), 'val')
    assert len(maps.classes) == 150 and maps.read(0)[1].tolist() == [[-1, 0], [1, -1]]
    put_map(tmp_path / 'stuff', 'images/val2017', 'annotations/val2017', [[0, 10], [11, 181]])
    maps = data.open_maps(str(tmp_path / 'stuff'), 'val')
    assert len(maps.classes) == 171 and maps.read(0)[1].tolist() == [[0, 10], [-1, 170]]


@pytest.mark.parametrize('names, first', [([f'n{k}' for k in range(150)], 'n0'), (['-', 'wall', 'tree'], 'wall'),
                                          (['none', 'wall', 'tree'], 'none')])
def test_names_of_ade20ks_values(names, first, tmp_path):
    """Its own lists of 150 leave out the value 0; other files say every value."""
    put_map(tmp_path, 'images/training', 'annotations/training', [[0, 1], [2, 255]])
    (tmp_path / 'classes.txt').write_text('\n'.join(names))
    maps = data.open_maps(str(tmp_path), 'train')
    labels = maps.read(0)[1]
    assert maps.classes[0] == first and labels[0, 0] == (0 if first == 'none' else -1)
    assert maps.classes[labels[0, 1]] == names[0 if len(names) == 150 else 1]


def test_a_file_of_names_says_which_values_are_none(tmp_path):
    """The one that is given comes before the data's; the classes close up."""
    put_map(tmp_path, 'train', 'trainannot', [[0, 1], [2, 255]])
    (tmp_path / 'classes.txt').write_text('road\nsky\ncar\n')
    maps = data.open_maps(str(tmp_path), 'train')
    assert maps.classes == ['road', 'sky', 'car'] and maps.read(0)[1].tolist() == [[0, 1], [2, -1]]
    (tmp_path / 'names').write_text('road\n-\ncar\n')
    maps = data.open_maps(str(tmp_path), 'train', str(tmp_path / 'names'))
    assert maps.classes == ['road', 'car'] and maps.read(0)[1].tolist() == [[0, -1], [1, -1]]


def test_a_number_of_classes_is_refused(tmp_path):
    put_map(tmp_path, 'train', 'trainannot', [[0, 1], [2, 255]])
    with pytest.raises(data.Refused, match='--classes 11 .*a line for each value'):
        data.open_maps(str(tmp_path), 'train', '11')
    with pytest.raises(data.Refused, match='Give --classes FILE'):
        data.open_maps(str(tmp_path), 'train')


def spoil(folder, how, names):
    for name in names:
        path = folder / 'annotations' / 'train' / f'{name}.png'
        if how == 'value':
            Image.fromarray(np.full((24, 20), 7, np.uint8)).save(path)
        elif how == 'size':
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
        elif how == 'colours':
            Image.new('RGB', (20, 24)).save(path)
        elif how == 'jpeg':
            Image.new('L', (20, 24)).save(path, 'JPEG')
        elif how == 'negative':
            Image.fromarray(np.full((24, 20), -1, np.int32)).save(path, 'TIFF')
        elif how == 'fraction':
            Image.fromarray(np.full((24, 20), 1.5, np.float32)).save(path, 'TIFF')
        elif how == 'damaged':
            path.write_bytes(path.read_bytes()[:50])
        elif how == 'pipe':
            os.remove(path)
            os.mkfifo(path)
        elif how == 'missing':
            os.remove(path)


UNFIT = {  # label maps, what is said of one, and what refuses a set of them
    'value': ('have a label map with a value that is no class', 'holds the value 7, none of the 3 classes'),
    'negative': ('have a label map with a value that is no class', 'holds the value -1, none of the 3 classes'),
    'fraction': ('have a label map with a value that is no class', 'holds the value 1.5, none of the 3 classes'),
    'size': ('are of another size than their label map', 'has 8 x 8 pixels, its image 20 x 24'),
    'colours': ('have a label map in colours', 'has 3 numbers a pixel'),
    'jpeg': ('have a label map that is a JPEG', 'is a JPEG'),
    'damaged': ('have a label map that cannot be read', 'cannot be read'),
    'pipe': ('label map', 'annotations/train'),
    'missing': ('have no label map', 'none of the 4 images')}


@pytest.mark.parametrize('how', UNFIT)
def test_label_maps_that_do_not_fit(how, tmp_path):
    """All of them: one line. One of them: it is named once, with the reason, however often it is met."""
    reason, message = UNFIT[how]
    write_maps(tmp_path)
    spoil(tmp_path, how, [0])
    maps = data.open_maps(str(tmp_path), 'train')
    list(data.batches(maps, 4, 16, 0, 5, 0, 'cpu'))
    (what, name), = maps.broken
    assert reason in what and name.startswith('0.png')
    again = data.open_maps(str(tmp_path), 'train')
    for _ in range(2):
        assert len(list(again.truth(range(len(again)), 'cpu'))) == 3
    assert len(again.broken) == 1
    spoil(tmp_path, how, range(1, 4))
    with pytest.raises(data.Refused, match=re.escape(message)):
        data.open_maps(str(tmp_path), 'train')


def test_a_set_without_any_labelled_pixel_is_refused(tmp_path):
    """All 255, of training or of validation: nothing could be learnt, or judged."""
    write_maps(tmp_path)
    for i in range(4):
        Image.fromarray(np.full((24, 20), 255, np.uint8)).save(tmp_path / 'annotations' / 'val' / f'{i}.png')
    data.open_maps(str(tmp_path), 'train')
    with pytest.raises(data.Refused, match='not one pixel has a class; no value but 255'):
        data.open_maps(str(tmp_path), 'val')


@pytest.mark.parametrize('text, message', [
    (b'ciel\nchauss\xe9e\n', 'is not a text in UTF-8'), (b'', 'names no class'), (b'-\n-\n', 'names no class'),
    (b'sky\nroad\nsky', "lines 1 and 3 are both 'sky'"), (b'sky\n\nroad', 'line 2 is empty'),
    (b'sky\n' + b'-\n' * 2 ** 15, 'has 32,769 lines')])
def test_a_file_of_names_that_names_nothing_is_refused(tmp_path, text, message):
    """One line with the file."""
    write_maps(tmp_path)
    (tmp_path / 'classes.txt').write_bytes(text)
    with pytest.raises(data.Refused, match='classes.txt:? ' + re.escape(message)):
        data.open_maps(str(tmp_path), 'train')


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_names_with_a_byte_order_mark(tmp_path, encoding):
    write_maps(tmp_path)
    (tmp_path / 'classes.txt').write_text('ciel\r\nchaussée\r\narbre\r\n\r\n', encoding)
    assert data.open_maps(str(tmp_path), 'train').classes == ['ciel', 'chaussée', 'arbre']


def test_values_are_matched_with_classes_by_name(tmp_path):
    """In another order, and fewer of them; a name that is not among them is refused."""
    put_map(tmp_path, 'train', 'trainannot', [[0, 1], [2, 255]])
    (tmp_path / 'classes.txt').write_text('road\n-\ncar\n')
    maps = data.open_maps(str(tmp_path), 'train', names=['car', 'sky', 'road'])
    assert maps.classes == ['car', 'sky', 'road'] and maps.read(0)[1].tolist() == [[2, -1], [0, -1]]
    with pytest.raises(data.Refused, match="has the class 'car'"):
        data.open_maps(str(tmp_path), 'train', names=['road', 'sky'])


def test_a_label_map_is_of_the_picture_upright_or_as_it_is_stored(tmp_path):
    """A turned picture is shown the way that its label map fits."""
    for i, shape in enumerate([(24, 20), (20, 24)]):
        put_map(tmp_path, 'train', 'trainannot', np.zeros(shape))
        turned(tmp_path / 'train' / '0.png', (20, 24), 6)
        (tmp_path / 'classes.txt').write_text('road\n')
        image, classes = data.open_maps(str(tmp_path), 'train').read(0)
        assert image.size == shape[::-1] and classes.shape == shape
        assert np.asarray(image)[:12].mean() < 60 or i == 0         # upright, its dark half is above


def test_the_worlds_maps():
    """Grounds, then kinds; judged images are those of the positions asked for."""
    maps = data.open_maps('shapes', 'val', image_size=24)
    parts = list(maps.truth(range(20), 'cpu'))
    whole = maps.batch(torch.arange(20), 24)
    assert maps.classes == [*data.STUFF, *data.KINDS]
    assert torch.equal(torch.cat([labels for _, labels in parts]), whole['labels'])
    assert torch.equal(torch.cat([images for images, _ in parts]), whole['images'])
