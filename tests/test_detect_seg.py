"""Detection: against plain references, on any machine."""
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import detect_seg as D
import model as M

bench = runpy.run_path(Path(D.__file__).parent / 'assets' / 'bench_detect.py')


def random_masks(num, size=(7, 9), stream='masks'):
    u = data.uniform(0, stream, torch.arange(num), size[0] * size[1]).view(num, *size).numpy()
    return list(u < np.linspace(0, 1, num)[:, None, None])         # from empty to full


def test_masks_survive_run_lengths_and_strings():
    """bool to run lengths to COCO's string and back, from empty to full."""
    for mask in random_masks(8):
        runs = D.encode_mask(mask)
        assert runs.sum() == mask.size and (runs[1:] > 0).all()
        assert (D.string_to_runs(D.runs_to_string(runs)) == runs).all()
        assert (D.decode_mask(runs, mask.shape) == mask).all()


def test_mask_iou_is_that_of_pixels():
    """What run lengths give is what counting pixels gives, for crowds too."""
    a, b, crowd = random_masks(6), random_masks(5, stream='more'), np.array([False, True, False, True, False])
    ours = D.overlap_masks([D.encode_mask(x) for x in a], [D.encode_mask(x) for x in b], crowd)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            union = x.sum() if crowd[j] else (x | y).sum()
            assert ours[i, j] == pytest.approx((x & y).sum() / union if (x & y).any() else 0, abs=1e-15)


def test_merged_masks_are_those_of_pixels():
    """At least one, two or three of three masks."""
    masks = random_masks(5)[1:4]
    for at_least in (1, 2, 3):
        runs = D.merge_masks([D.encode_mask(mask) for mask in masks], at_least)
        assert (D.decode_mask(runs, masks[0].shape) == (sum(mask.astype(int) for mask in masks) >= at_least)).all()


def test_a_box_as_polygon_fills_its_pixels():
    """Of whole numbers, the polygon's pixels, area and box are the rectangle's."""
    runs = D.fill_polygon([2, 1, 6, 1, 6, 4, 2, 4], (5, 8))
    expected = np.zeros((5, 8), dtype=bool)
    expected[1:4, 2:6] = True
    assert (D.decode_mask(runs, (5, 8)) == expected).all()
    assert D.mask_area(runs) == 12 and D.mask_box(runs, 5).tolist() == [2, 1, 6, 4]


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
    boxes = bench['random_boxes'](300, 100, 10, 60, 'nms')
    scores = data.uniform(0, 'scores', torch.arange(300), 1)[:, 0]
    iou, kept = D.pairwise_iou(boxes, boxes), []
    for i in scores.argsort(descending=True).tolist():
        if not any(iou[i, j] > .4 for j in kept):
            kept.append(i)
    assert D.nms(boxes, scores, .4, block=16).tolist() == kept


def test_soft_nms_treats_classes_apart():
    """All classes at once, or one after the other."""
    boxes, scores = bench['random_boxes'](40, 50, 10, 40, 'soft'), data.uniform(0, 'soft scores', torch.arange(3), 40)
    together = D.soft_nms(boxes, scores)
    assert torch.equal(together, torch.cat([D.soft_nms(boxes, row[None]) for row in scores]))


def test_finding_everything_is_an_ap_of_one():
    """The objects themselves, as detections, are perfect; a wrong category is worth nothing."""
    truth, _ = bench['random_truth'](4, 3, 1, 5)
    mask = lambda row: dict(counts=D.runs_to_string(D.fill_polygons(row['segmentation'], (640, 640))))
    exact = [dict(row, score=.9, segmentation=mask(row)) for row in truth['annotations']]
    for kind in ('bbox', 'segm'):
        assert D.average_precision(truth, exact, kind)['AP'] == pytest.approx(1)
    wrong = [dict(row, category_id=(row['category_id'] + 1) % 5) for row in exact]
    assert D.average_precision(truth, wrong)['AP'] < .2


# ---- the detector

def tiny_detector(num_classes=3, stages=2, **options):
    """32 pixels, patches of 8, and few of everything."""
    vit = dict(width=16, depth=2, heads=2, mlp_width=32, patch_size=8, image_size=32, pool='map', mask_token=False)
    torch.manual_seed(0)
    return D.Detector(vit, num_classes, channels=8, hidden=16, stages=stages, num_anchors=32, before=(50, 20),
                      after=(20, 10), num_boxes=8, **options)


def targets_of(*boxes):
    """A target with these boxes, of classes 0, 1, ..., and rectangular masks."""
    masks = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
    return dict(boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4), labels=torch.arange(len(boxes)), masks=masks)


def losses_of(model, images, targets):
    draw = lambda stream, num: data.uniform(0, stream, torch.arange(len(images)), num)
    return model(images, [(32, 32)] * len(images), targets, draw)


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


def test_losses_are_sums_over_images():
    """Two images' losses and counts are those of each alone, added: what is divided by can be summed over processes."""
    model, images = tiny_detector(), torch.randn(2, 3, 32, 32)
    targets = [targets_of((2, 3, 20, 18), (10, 10, 30, 28)), targets_of((4, 4, 28, 28))]
    together = losses_of(model, images, targets)
    draw = lambda first: lambda stream, num: data.uniform(0, stream, torch.arange(first, first + 1), num)
    alone = [model(images[i:i + 1], [(32, 32)], targets[i:i + 1], draw(i)) for i in (0, 1)]
    for name, (loss, count) in together.items():
        assert count == alone[0][name][1] + alone[1][name][1]
        torch.testing.assert_close(loss, alone[0][name][0] + alone[1][name][0], atol=1e-4, rtol=1e-4)


def test_a_window_sees_itself_only():
    """Without global blocks, a pixel of one window changes no other window's features; with one it does."""
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 0, 0] += 5
    for global_every, others in ((9, False), (2, True)):
        config = tiny_detector().config['vit'] | dict(window=2, global_every=global_every, rel_pos=4)
        vit = M.init_weights(M.ViT(**config))
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
