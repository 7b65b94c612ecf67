"""Detection: against plain references, on any machine."""
import dataclasses
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import detect_seg as D
import model as M
import run
from test_data_objects import rename, row, write_json
from test_distributed import config as quick
from test_distributed import finish, gradients, launch, small


def random_boxes(num, side, low, high, stream):
    """Boxes within a square image, their sides from low to high: [num, 4]."""
    u = data.uniform(0, stream, torch.arange(num), 4)
    size = low + (high - low) * u[:, :2]
    corner = u[:, 2:] * (side - size)
    return torch.cat((corner, corner + size), 1)


def random_truth(num_images, num_objects, num_classes, side=640):
    """A COCO json of triangles in random boxes."""
    boxes = random_boxes(num_images * num_objects, side, 40, 400, 'objects')
    rows = []
    for n, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        rows.append(dict(id=n + 1, image_id=n // num_objects, category_id=n * 7 % num_classes, iscrowd=0,
                         bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1) / 2,
                         segmentation=[[x1, y1, x2, y1, x1, y2]]))
    return dict(images=[dict(id=i, height=side, width=side) for i in range(num_images)], annotations=rows,
                categories=[dict(id=k) for k in range(num_classes)])


def random_masks(num, size=(7, 9), stream='masks'):
    u = data.uniform(0, stream, torch.arange(num), size[0] * size[1]).view(num, *size).numpy()
    return list(u < np.linspace(0, 1, num)[:, None, None])         # from empty to full


def test_mask_iou_is_that_of_pixels():
    """What run lengths give is what counting pixels gives, for crowds too."""
    a, b, crowd = random_masks(6), random_masks(5, stream='more'), np.array([False, True, False, True, False])
    ours = D.overlap_masks([data.encode_mask(x) for x in a], [data.encode_mask(x) for x in b], crowd)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            union = x.sum() if crowd[j] else (x | y).sum()
            assert ours[i, j] == pytest.approx((x & y).sum() / union if (x & y).any() else 0, abs=1e-15)


def test_pasting_undoes_cutting_out():
    """A mask's targets in its own box, pasted back into that box, are the mask."""
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:16, 6:26] = True
    box = torch.tensor([[6., 4., 26., 16.]])
    target = D.mask_targets([mask], box, 28).float()
    assert (D.paste_mask(target[0], box[0], mask.shape).numpy()[4:16, 6:26] >= .5).all()
    assert D.paste_mask(target[0], box[0], mask.shape).sum() == pytest.approx(mask.sum(), rel=.1)


def test_nms_is_greedy():
    """Box by box, best first, as one would write it down."""
    boxes = random_boxes(300, 100, 10, 60, 'nms')
    scores = data.uniform(0, 'scores', torch.arange(300), 1)[:, 0]
    iou, kept = D.pairwise_iou(boxes, boxes), []
    for i in scores.argsort(descending=True).tolist():
        if not any(iou[i, j] > .4 for j in kept):
            kept.append(i)
    assert D.nms(boxes, scores, .4, block=16).tolist() == kept


@pytest.mark.parametrize('rounds', [1, 16])
def test_nms_of_all_images_at_once_is_greedy(rounds):
    """In each image and level what nms keeps of the boxes that are there, also in a chain where every box but the
    first overlaps the one before."""
    chain = torch.arange(100.)[:, None] * torch.tensor([4., 0., 4., 0.]) + torch.tensor([0., 0., 10., 10.])
    boxes = torch.stack((chain, random_boxes(100, 100, 10, 60, 'at once')))
    there = data.uniform(0, 'there', torch.arange(2), 100) < torch.tensor([[2.], [.8]])
    best_first = torch.arange(100, 0, -1)
    for kept, part, rows in zip(D.nms_at_once([boxes], [there], .3, rounds)[0], boxes, there):
        rows = rows.nonzero()[:, 0]
        expected = rows[D.nms(part[rows], best_first[rows], .3)]
        assert torch.equal(kept.nonzero()[:, 0], expected)


def test_proposals_of_all_images_at_once_are_those_of_each():
    """The same boxes, in the same order, whatever an image's size."""
    grids, sizes = [(16, 16), (8, 8)], [(64, 64), (40, 64), (64, 3)]
    anchors = D.make_anchors(grids, [4, 8])
    logits = [data.uniform(0, 'logits', torch.arange(3), len(level)) for level in anchors]
    deltas = [data.uniform(0, 'deltas', torch.arange(3), 4 * len(level)).view(3, -1, 4) - .5 for level in anchors]
    found = D.choose_all_proposals(logits, deltas, anchors, sizes, 200, 100)
    for i, boxes in enumerate(found):
        alone, _ = D.choose_proposals([x[i] for x in logits], [x[i] for x in deltas], anchors, sizes[i], 200, 100)
        assert torch.equal(boxes, alone)


def gathered(features, boxes, image, out, ratio):
    """roi_align's numbers, aligned, by the way for GPUs, on any device."""
    H, W = features.shape[2:]
    cells = features.permute(0, 2, 3, 1).flatten(0, 2)
    size = torch.tensor((H, W)).expand(len(boxes), 2)
    return D.gather_boxes(cells, image * H * W, size, boxes - .5, out, ratio)


@pytest.mark.parametrize('out, ratio', [(7, 0), (7, 2), (14, 0)])
def test_gathering_cells_is_roi_align(out, ratio):
    """Values and gradients of boxes of all sizes, tiny, without area, huge, outside, or turned round."""
    special = torch.tensor([[5, 5, 5, 5], [-90, -90, 200, 190], [50, 60, 70, 80], [0, 0, .01, 20], [9, 9, 7, 4],
                            [0, 0, 33, 20], [2, 2, 2 + out, 2 + 2 * out]], dtype=torch.float32)
    boxes = torch.cat((special, random_boxes(30, 20, .1, 20, 'roi')))
    image = torch.arange(len(boxes)) % 2
    features = data.uniform(0, 'map', torch.arange(2), 3 * 20 * 33).view(2, 3, 20, 33).requires_grad_()
    ours = gathered(features, boxes, image, out, ratio)
    theirs = D.roi_align(features, boxes, image, out, ratio=ratio)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = data.uniform(0, 'weights', torch.arange(len(boxes)), theirs[0].numel()).view_as(theirs)
    gradients = [torch.autograd.grad(x, features, weights)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)


def test_boxes_are_pooled_from_all_levels_at_once():
    """As one level after another, on the CPU, does it: from maps whose sides are not each other's half, too."""
    strides = [1, 2, 4, 8]
    pyramid = [data.uniform(0, f'level {n}', torch.arange(2), 3 * n * (n + 1)).view(2, 3, n, n + 1)
               for n in (80, 40, 20, 10)]
    boxes = torch.cat([random_boxes(20, 80, 1, side, f'pool {side}') for side in (8, 30, 80)])
    image = torch.arange(60) // 30
    level = D.box_levels(boxes, strides)
    assert level.unique().tolist() == [0, 1, 2]
    ours = D.pool_on_gpu(pyramid, strides, boxes, image, level, 7)
    torch.testing.assert_close(ours, D.pool_boxes(pyramid, strides, list(boxes.split(30)), 7), atol=1e-5, rtol=1e-5)


def test_soft_nms_treats_classes_apart():
    """All classes at once, or one after the other."""
    boxes, scores = random_boxes(40, 50, 10, 40, 'soft'), data.uniform(0, 'soft scores', torch.arange(3), 40)
    together = D.soft_nms(boxes, scores)
    assert torch.equal(together, torch.cat([D.soft_nms(boxes, row[None]) for row in scores]))


def test_detections_take_the_best_object_left():
    """As one would write it down, for every area and IoU, where objects tie, are ignored, or crowds."""
    u = data.uniform(0, 'matching', torch.arange(60), 12).numpy()
    iou = np.round(8 * u[:, :10]) / 8           # many are equal
    crowd = np.arange(10) % 5 == 0
    ignored = (data.uniform(0, 'ignored', torch.arange(4), 10).numpy() < .4) | crowd
    found, void = D.match_detections(iou, ignored, crowd)
    for a, passed in enumerate(ignored):
        for t, threshold in enumerate(D.COCO_IOUS):
            free = set(range(10))
            for i, row in enumerate(iou):
                fits = [j for j in free if row[j] >= min(threshold, 1 - 1e-10)]
                best = max(fits, key=lambda j: (not passed[j], row[j], j), default=None)
                assert found[i, a, t] == (best is not None)
                assert void[i, a, t] == (best is not None and passed[best])
                if best is not None and not crowd[best]:
                    free.remove(best)


def test_finding_everything_is_an_ap_of_one():
    """The objects themselves, as detections, are perfect; a wrong category is worth nothing."""
    truth = random_truth(4, 3, 5)
    mask = lambda row: dict(counts=data.fill_polygons(row['segmentation'], (640, 640)))
    exact = [dict(row, score=.9, segmentation=mask(row)) for row in truth['annotations']]
    for kind in ('bbox', 'segm'):
        assert D.average_precision(truth, exact, kind)['AP'] == pytest.approx(1)
    wrong = [dict(row, category_id=(row['category_id'] + 1) % 5) for row in exact]
    assert D.average_precision(truth, wrong)['AP'] < .2


# ---- the detector

def tiny_detector(num_classes=3, stages=2, **options):
    """32 pixels, patches of 8, and few of everything."""
    vit = M.ViTConfig(16, 2, 2, 32, patch_size=8, image_size=32, pool='map', mask_token=False)
    torch.manual_seed(0)
    return D.Detector(D.DetectorConfig(vit, num_classes, channels=8, hidden=16, stages=stages, num_anchors=32,
                                       before=(50, 20), after=(20, 10), num_boxes=8, **options))


def targets_of(*boxes):
    """A target with these boxes, of classes 0, 1, ..., and rectangular masks."""
    masks = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return dict(boxes=boxes, labels=torch.arange(len(boxes)), masks=masks)


def losses_of(model, images, targets, first=0):
    """Of images, the first of which is at this place in its run."""
    position = first + torch.arange(len(images))
    batch = dict(images=images, sizes=[(32, 32)] * len(images), targets=targets)
    return model(batch, lambda stream, num: data.uniform(0, stream, position, num))


@pytest.mark.parametrize('stages', [1, 3])
def test_every_weight_gets_a_gradient_without_any_box(stages):
    """Images in which there is nothing teach the proposals and the classes; the other weights' gradients are 0, not
    missing, as sharding needs."""
    model = tiny_detector(stages=stages)
    losses = losses_of(model, torch.randn(2, 3, 32, 32), [targets_of(), targets_of()])
    sum(loss / max(1, count) for loss, count in losses.values()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert model.proposer.objectness.weight.grad.any() and model.box_heads[0].classes.weight.grad.any()
    assert not model.mask_head.classes.weight.grad.any()


def test_bfloat16_products_give_nearly_the_same():
    """Under autocast, as on a GPU, losses are within some per cent and detection works."""
    model, images, targets = tiny_detector(), torch.randn(2, 3, 32, 32), [targets_of((2, 3, 20, 18)), targets_of()]
    exact = losses_of(model, images, targets)
    with torch.autocast('cpu', torch.bfloat16):
        rough = losses_of(model, images, targets)
        found = model(dict(images=images, sizes=[(32, 32)] * 2), choose=dict(threshold=0.))
    for name in ('proposal_objectness', 'classes_0', 'masks'):
        torch.testing.assert_close(rough[name][0].float(), exact[name][0], atol=.1, rtol=.1)
    assert all(part['boxes'].dtype == torch.float32 for part in found)


def test_finding_nothing_is_an_empty_result():
    """No score reaches 2: boxes, scores, classes and masks of none, in every image."""
    batch = dict(images=torch.randn(2, 3, 32, 32), sizes=[(32, 32), (20, 30)])
    found = tiny_detector()(batch, choose=dict(threshold=2.))
    assert [part['masks'].shape for part in found] == [(0, 28, 28)] * 2 and not len(found[0]['boxes'])
    assert D.to_original(found[0], (32, 32), (64, 60))['scores'].shape == (0,)


def test_losses_are_sums_over_images(double):
    """Two images' losses and counts are those of each alone, added: what is divided by can be summed over processes."""
    model, images = tiny_detector(), torch.randn(2, 3, 32, 32)
    targets = [targets_of((2, 3, 20, 18), (10, 10, 30, 28)), targets_of((4, 4, 28, 28))]
    together = losses_of(model, images, targets)
    alone = [losses_of(model, images[i:i + 1], targets[i:i + 1], i) for i in (0, 1)]
    for name, (loss, count) in together.items():
        assert count == alone[0][name][1] + alone[1][name][1]
        torch.testing.assert_close(loss, alone[0][name][0] + alone[1][name][0], atol=1e-9, rtol=1e-9)


def test_a_window_sees_itself_only():
    """Without global blocks, a pixel of one window changes no other window's features; with one it does."""
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 0, 0] += 5
    for global_every, others in ((9, False), (2, True)):
        config = dataclasses.replace(tiny_detector().config.vit, window=2, global_every=global_every, rel_pos=4)
        vit = M.init_weights(M.ViT(config))
        difference = (vit(changed) - vit(images)).abs().amax(1)[0]                          # [4, 4]
        assert difference[:2, :2].any() and bool(difference[2:].any()) is others


def test_federated_classes_are_those_there_and_some_more():
    """The labels' classes always; the others as often as their weights say."""
    weights, counts = torch.tensor([1., 1., 3., 0., 1.]), torch.zeros(5)
    for u in data.uniform(0, 'federated', torch.arange(300), 5):
        asked = D.federated_classes(torch.tensor([0, 5, 0]), weights, 3, u)         # 0 and the background are there
        assert asked[0] and asked.sum() == 2
        counts += asked
    assert counts[3] == 0 and counts[2] / 300 == pytest.approx(3 / 5, abs=.1)
    assert D.federated_classes(torch.tensor([0, 1, 2]), weights, 2, u).sum() == 3


def test_maskness_is_the_mean_of_what_is_inside():
    """0 where nothing is above the threshold."""
    masks = torch.tensor([[[.9, .7], [.1, .5]], [[.2, .1], [.5, .3]]])
    torch.testing.assert_close(D.maskness(masks), torch.tensor([.8, 0.]))


# ---- data

def test_a_target_nobody_overlaps_takes_all_anchors():
    """The original's quirk: every anchor has that target's best IoU, 0, so every one becomes positive."""
    index, label = D.match(torch.zeros(1, 3), (.3, .7), (0, -1, 1), low_quality=True)
    assert label.tolist() == [1, 1, 1]


def test_of_equal_objects_the_last_is_found():
    """COCO's way with ties: the first detection takes the second object, which is all that the other one overlaps."""
    iou = np.array([[.8, .8], [.1, .9]])
    found, _ = D.match_detections(iou, np.zeros((4, 2), dtype=bool), np.zeros(2, dtype=bool))
    assert found[0, 0, 0] and not found[1, 0, 0]


def test_categories_with_gaps_are_numbered_in_order(tmp_path):
    """Ids 3 and 7 are labels 0 and 1, by which they are judged."""
    dataset = data.Instances(write_json(tmp_path, [row(), row(category=7)]), 'val')
    batch = dataset.batch(torch.arange(4), 32, train=False)
    n = batch['index'].index(0)
    assert dataset.classes == ['cat', 'dog'] and batch['targets'][n]['labels'].tolist() == [0, 1]
    assert [part['category_id'] for part in dataset.truth(batch)[n][1]] == [0, 1]
    found = dict(boxes=torch.ones(1, 4), scores=torch.ones(1), classes=torch.tensor([1]), masks=torch.ones(1, 2, 2),
                 pasted=[torch.ones(2, 2, dtype=torch.bool)])
    assert D.result_rows(found, 10)[0]['category_id'] == 1


def test_the_worlds_masks_are_in_their_boxes():
    """Visible pixels, tightly; every object once; fine classes are of the coarse ones' kinds."""
    coarse, fine = (data.WorldInstances(vocabulary=name) for name in ('coarse', 'fine'))
    batch, other = (dataset.batch(torch.arange(6), 64) for dataset in (coarse, fine))
    for target, again in zip(batch['targets'], other['targets']):
        assert torch.equal(target['labels'], torch.tensor(fine.coarse)[again['labels']])
        for (x1, y1, x2, y2), mask in zip(target['boxes'].int().tolist(), target['masks']):
            assert mask.sum() >= 8 and mask[y1:y2, x1:x2].sum() == mask.sum()
            assert mask[y1].any() and mask[:, x1].any() and mask[y2 - 1].any() and mask[:, x2 - 1].any()


def test_the_vocabulary_gap_of_perfect_boxes_is_zero():
    """And it is one where every fine class is wrong but every coarse one right."""
    dataset = data.WorldInstances('val', vocabulary='fine')
    images, rows = zip(*dataset.truth(dataset.batch(torch.arange(4), 64)))
    rows = sum(rows, [])
    truth = dict(images=images, annotations=rows, categories=dataset.categories)
    right = [dict(row, score=.9) for row in rows]
    ap = lambda results: D.percent(D.average_precision(truth, results, most=(300,)))['ap']
    gap = D.vocabulary_gap(truth, right, dataset.coarse, ap(right))
    assert gap['gap'] == pytest.approx(0) and gap['box_ap_coarse'] == pytest.approx(100)
    twin = [next(k for k, kind in enumerate(dataset.coarse) if kind == dataset.coarse[row['category_id']]
                 and k not in {row['category_id'] for row in rows}) for row in rows]
    wrong = [dict(row, category_id=k) for row, k in zip(right, twin)]
    assert D.vocabulary_gap(truth, wrong, dataset.coarse, ap(wrong))['gap'] == pytest.approx(1)


# ---- commands

TINY = dict(image_size=32, patch_size=8, batch_size=2, steps=2, channels=8, hidden=16, proposals=20, num_boxes=8)


@pytest.fixture(autouse=True)
def tiny_recipe(monkeypatch):
    """Runs of the size pico take a second, and look at a few validation images."""
    monkeypatch.setitem(D.BOXES, 'pico', TINY)
    monkeypatch.setattr(D, 'NUM_EVAL', 8)


def detect(*flags):
    flags = ['--size', 'pico', '--device', 'cpu', *map(str, flags)]
    D.train(run.parse_config(D.Config, D.RECIPES, flags))


def test_training_evaluating_and_drawing(tmp_path, capsys):
    """A run leaves its files; --eval repeats its AP; --image draws any picture."""
    out = tmp_path / 'run'
    detect('--out_dir', out)
    result = json.loads((out / 'result.json').read_text())
    assert {'model.pt', 'objects.png', 'loss.png', 'log.jsonl'} <= set(os.listdir(out)) and 'mask_ap' in result
    Image.new('RGB', (50, 30)).save(tmp_path / 'a.png')
    detect('--init', out / 'model.pt', '--image', tmp_path / 'a.png', '--out_dir', tmp_path)
    assert Image.open(tmp_path / 'a.found.png').width > 1280
    detect('--init', out / 'model.pt', '--eval', '--soft')
    assert 'box_ap50' in capsys.readouterr().out


def test_real_data_from_an_eva(tmp_path):
    """--init takes over a pre-trained ViT; the patch embedding stays as it was; a json's classes are learnt, LVIS's way
    if it has frequencies."""
    eva = M.ViT(M.ViTConfig(**M.SIZES['pico'] | dict(patch_size=8, image_size=16, head=5)))
    M.save(M.init_weights(eva, 3), str(tmp_path / 'eva.pt'))
    categories = [dict(id=k, name=str(k), frequency='rcf'[k % 3]) for k in range(4)]
    rows = [row(i, category=k) for i in range(4) for k in range(i)]
    lists = [dict(id=10 + i, file_name=f'{i}.png', height=24, width=32, neg_category_ids=[3],
                  not_exhaustive_category_ids=[]) for i in range(4)]
    folder = write_json(tmp_path / 'data', rows, categories=categories, images=lists)
    detect('--data', folder, '--init', tmp_path / 'eva.pt', '--stages', 2, '--window', 2, '--out_dir', tmp_path / 'run')
    model = M.load(str(tmp_path / 'run' / 'model.pt'), D.Detector)
    assert model.config.sigmoid and model.extra['classes'] == list('0123') and len(model.box_heads) == 2
    assert torch.equal(model.vit.patch_embed.weight, eva.patch_embed.weight)
    assert not torch.equal(model.vit.blocks[0].mlp.fc1.weight, eva.blocks[0].mlp.fc1.weight)
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert {'box_apr', 'box_apc', 'box_apf', 'mask_ap'} <= result.keys()


def test_a_frozen_vit_stays_as_it_is(tmp_path):
    """--freeze: only the pyramid and the heads learn."""
    eva = M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['pico'] | dict(patch_size=8, image_size=16))), 3)
    M.save(eva, str(tmp_path / 'eva.pt'))
    detect('--init', tmp_path / 'eva.pt', '--freeze', '--out_dir', tmp_path / 'run')
    model = M.load(str(tmp_path / 'run' / 'model.pt'), D.Detector)
    assert torch.equal(model.vit.blocks[0].mlp.fc1.weight, eva.blocks[0].mlp.fc1.weight)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """Two steps, or one, a checkpoint and another: the same weights."""
    detect('--out_dir', tmp_path / 'straight')
    detect('--out_dir', tmp_path / 'parts', '--save_every', 1)
    os.remove(tmp_path / 'parts' / 'result.json')
    detect('--out_dir', tmp_path / 'parts', '--save_every', 1)
    first, second = (M.load(str(tmp_path / name / 'model.pt'), D.Detector).state_dict()
                     for name in ('straight', 'parts'))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_picture_that_cannot_be_drawn_costs_a_warning(tmp_path, monkeypatch, capsys):
    """In the middle of a run and at its end, whose weights and numbers are there."""
    def fail(*given):
        raise OSError('no space left')
    monkeypatch.setattr(run, 'draw_sheet', fail)
    detect('--save_every', 1, '--out_dir', tmp_path)
    assert {'model.pt', 'result.json'} <= set(os.listdir(tmp_path))
    assert capsys.readouterr().out.count('objects.png was not written') == 2


def test_what_is_left_out_is_said_before_training_and_by_eval(tmp_path, capsys):
    """By reason and name; of a picture that cannot be read, when it is met."""
    folder = write_json(tmp_path / 'data', [*(row(i) for i in range(4)), row(id=50) | dict(bbox=None)])
    for split in ('train', 'val'):
        (tmp_path / 'data' / split / '3.png').write_bytes(b'no image')
    detect('--data', folder, '--out_dir', tmp_path / 'run')
    before, after = capsys.readouterr().out.split('parameters, 2 classes')
    left_out = '1 annotations have no box of four numbers and were left out: annotation 50'
    assert '4 images to learn from, 4 for validation' in before and before.count(left_out) == 2
    assert '1 of 4 images could not be read and were left out: 3.png' in after
    detect('--data', folder, '--init', tmp_path / 'run' / 'model.pt', '--eval')
    said = capsys.readouterr().out
    assert left_out in said and '1 of 4 images could not be read and were left out: 3.png' in said


def test_a_detector_is_judged_by_the_names_of_its_classes(tmp_path, capsys):
    """Other names than its own are refused; of one without names it is said that order counts."""
    folder = write_json(tmp_path / 'data', [row(), row(1, category=7)])
    model = tiny_detector()
    path = str(tmp_path / 'model.pt')
    evaluate = ['--data', folder, '--init', path, '--eval']
    M.save(model, path, classes=['eel', 'dog', 'cat'])
    detect(*evaluate)
    M.save(model, path, classes=['eel', 'dog', 'cow'])
    with pytest.raises(run.Refused, match="val.json has the class 'cat', which is none of the 3 known"):
        detect(*evaluate)
    M.save(model, path)
    with pytest.raises(run.Refused, match='knows 3 classes, --data .* has 2'):
        detect(*evaluate)
    rename(tmp_path / 'data', 'val', categories=[dict(id=k, name=name) for k, name in ((3, 'a'), (5, 'b'), (7, 'c'))])
    capsys.readouterr()
    detect(*evaluate)
    assert "has no names for its 3 classes: they are taken in the order of the data's, 'a' to 'c'" in capsys.readouterr().out


def find_all(model, batch, originals, choose):
    """A detector that finds every object, as the data number its class."""
    found = []
    for target, (height, width) in zip(batch['targets'], originals):
        masks = [data.decode_mask(data.fill_polygons(mask, (height, width)), (height, width)) for mask in target['masks']]
        num = len(masks)
        found.append(dict(boxes=target['boxes'], scores=torch.ones(num), classes=target['labels'],
                          masks=torch.ones(num, 4, 4), pasted=[torch.from_numpy(mask.copy()) for mask in masks]))
    return found


@pytest.mark.parametrize('names', [('cat', 'dog'), ('dog', 'cat'), ('dog',)])
@pytest.mark.parametrize('ids', [(10, 11, 12, 13), ('10', 11., '12', 13), ('a', 11, 'b', 13)])
def test_a_perfect_detector_is_perfect_however_things_are_numbered(tmp_path, monkeypatch, names, ids):
    """Ids in another order or type, or some of the classes: AP is of those that have objects."""
    monkeypatch.setattr(D, 'find', find_all)
    folder = write_json(tmp_path, [], size=(32, 32))
    rows = [row(category=k) | dict(image_id=name) for name in ids for k in range(len(names))]
    images = [dict(id=name, file_name=f'{i}.png', height=32, width=32) for i, name in enumerate(ids)]
    images[0]['id'] = str(ids[0])
    categories = [dict(id=k, name=name) for k, name in enumerate(names)]
    rename(tmp_path, 'val', categories=categories, annotations=rows, images=images)
    val = data.open_instances(folder, 'val', classes=['cat', 'dog'])
    cfg = run.parse_config(D.Config, D.RECIPES, ['--size', 'pico', '--device', 'cpu', '--data', folder])
    numbers = D.evaluate(torch.nn.Module(), val, cfg, torch.device('cpu'), 4)
    assert numbers['box_ap'] == numbers['mask_ap'] == pytest.approx(100)


@pytest.mark.parametrize('flags, message', [
    (['--patch_size', '6', '--image_size', '36'], 'patch_size 6 is not a multiple of 4'),
    (['--image_size', '36'], 'image_size 36'), (['--micro_batch', '1'], '--micro_batch is gone'),
    (['--data', 'nowhere'], 'no boxes'), (['--init', 'nowhere.pt'], 'nowhere.pt does not exist'),
    (['--vocabulary', 'medium'], 'medium'), (['--scale_jitter', '2'], 'scale_jitter'),
    (['--vocabulary', 'fine', '--data', 'nowhere'], '--vocabulary is not an option of --data nowhere'),
    (['--images', 'nowhere'], '--images is not an option of --data shapes'),
    (['--window', '5'], '--window 5 is wider than the 4 x 4 patches'),
    (['--eval', '--init', 'nowhere.pt'], 'nowhere.pt does not exist'), (['--stages', '0'], 'stages'),
    (['--adapter'], '--adapter goes with --head mask2former'), (['--flip'], '--flip is not an option of'),
    (['--head', 'linear', '--soft'], '--soft is not an option of'), (['--channels', '8'], 'no flag')])
def test_wrong_options_are_one_line(flags, message, tmp_path):
    """Before any training."""
    with pytest.raises(run.Refused, match=re.escape(message)):
        detect(*flags, '--out_dir', tmp_path / 'run')


def test_a_picture_that_is_none_is_one_line(tmp_path):
    """--image of a file that holds no image."""
    M.save(tiny_detector(), str(tmp_path / 'model.pt'))
    (tmp_path / 'a.png').write_text('no image')
    with pytest.raises(run.Refused, match='a.png'):
        detect('--init', tmp_path / 'model.pt', '--image', tmp_path / 'a.png', '--out_dir', tmp_path)


def test_an_eva_is_no_detector(tmp_path):
    """--eval of a file that holds something else says what it is."""
    M.save(M.ViT(M.ViTConfig(**M.SIZES['pico'])), str(tmp_path / 'eva.pt'))
    with pytest.raises(run.Refused, match='this is a ViT, expected a Detector'):
        M.load(str(tmp_path / 'eva.pt'), D.Detector)


def test_a_detector_of_the_earlier_format_loads(tmp_path):
    """Its config was a dict of today's keys, the ViT's in it."""
    model = tiny_detector()
    M.save(model, str(tmp_path / 'model.pt'), classes=['a', 'b', 'c'])
    held = torch.load(tmp_path / 'model.pt', weights_only=True)
    assert isinstance(held['config']['vit'], dict) and held['config']['hidden'] == 16
    again = M.load(str(tmp_path / 'model.pt'), D.Detector)
    assert again.config == model.config and again.extra['classes'] == ['a', 'b', 'c']


def first_gradients(folder, world):
    """Of the first step, on images of which every second has no boxes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(D.BOXES, 'pico', TINY)
        return gradients(D, quick(D, folder / f'run-{world}', '--batch_size', '2', '--data', str(folder / 'data'),
                                  '--scale_jitter', '1,1', '--steps', '1'))


def test_two_processes_of_which_one_sees_no_boxes(tmp_path, double):
    """Each weight's gradient is that of one process with the whole batch."""
    write_json(tmp_path / 'data', [row(), row(box=(10, 5, 15, 12), category=7)], 2)
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        one = first_gradients(tmp_path, 1)
    finish(launch(2, tmp_path, first_gradients), tmp_path)
    for rank in (0, 1):
        two = torch.load(tmp_path / f'found-2-{rank}.pt')
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


def find_the_first(model, batch, originals, choose):
    """A detector that finds the first box of each image, and takes every second image's for another class."""
    found = []
    for i, target, (height, width) in zip(batch['index'], batch['targets'], originals):
        boxes, labels = target['boxes'][:1], target['labels'][:1] ^ i % 2
        found.append(dict(boxes=boxes, scores=torch.full((len(boxes),), .9 - .1 * i), classes=labels,
                          masks=torch.ones(len(boxes), 4, 4), pasted=torch.ones(len(boxes), height, width).bool()))
    return found


def judged(folder, world):
    """The numbers of that detector on the first three of five images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(D.BOXES, 'pico', TINY)
        patch.setattr(D, 'find', find_the_first)
        cfg = run.parse_config(D.Config, D.RECIPES, ['--size', 'pico', '--device', 'cpu', '--data', str(folder)])
        rank, world, device, _ = run.setup(cfg)
        return D.evaluate(torch.nn.Module(), data.Instances(str(folder), 'val'), cfg, device, 3, rank, world)


def test_two_processes_judge_each_image_once(tmp_path):
    """The same numbers as one; three images do not divide by two."""
    write_json(tmp_path, [row(i, category=c) for i in range(5) for c in (3, 7)], 5, size=(32, 32))
    one = judged(tmp_path, 1)
    assert 10 < one['box_ap'] < 90
    finish(launch(2, tmp_path, judged), tmp_path)
    for rank in (0, 1):
        assert torch.load(tmp_path / f'found-2-{rank}.pt') == one
