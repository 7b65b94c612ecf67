"""Detection: against plain references, on any machine."""
import numpy as np
import pytest
import torch

import data
import detect_seg as D


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
    boxes, scores = D.random_boxes(300, 100, 10, 60, 'nms'), data.uniform(0, 'scores', torch.arange(300), 1)[:, 0]
    iou, kept = D.pairwise_iou(boxes, boxes), []
    for i in scores.argsort(descending=True).tolist():
        if not any(iou[i, j] > .4 for j in kept):
            kept.append(i)
    assert D.nms(boxes, scores, .4, block=16).tolist() == kept


def test_soft_nms_treats_classes_apart():
    """All classes at once, or one after the other."""
    boxes, scores = D.random_boxes(40, 50, 10, 40, 'soft'), data.uniform(0, 'soft scores', torch.arange(3), 40)
    together = D.soft_nms(boxes, scores)
    assert torch.equal(together, torch.cat([D.soft_nms(boxes, row[None]) for row in scores]))


def test_finding_everything_is_an_ap_of_one():
    """The objects themselves, as detections, are perfect; a wrong category is worth nothing."""
    truth, _ = D.random_truth(4, 3, 1, 5)
    mask = lambda row: dict(counts=D.runs_to_string(D.fill_polygons(row['segmentation'], (640, 640))))
    exact = [dict(row, score=.9, segmentation=mask(row)) for row in truth['annotations']]
    for kind in ('bbox', 'segm'):
        assert D.average_precision(truth, exact, kind)['AP'] == pytest.approx(1)
    wrong = [dict(row, category_id=(row['category_id'] + 1) % 5) for row in exact]
    assert D.average_precision(truth, wrong)['AP'] < .2
