"""
Boxes, regions, masks and average precision as detectron2, torchvision, pycocotools and lvis-api compute them. Fixtures
lie in the folders named by GOLDEN, as for test_golden.py.
"""
import json

import numpy as np
import pytest
import torch

import detect_seg as D
from test_golden import fixtures


def read(path):
    if path.endswith('.json'):
        with open(path) as file:
            return json.load(file)
    return torch.load(path, weights_only=True)


def close(ours, theirs, atol=1e-5, rtol=1e-4):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


# ---- nms

@pytest.mark.parametrize('path', fixtures('nms*.pt'))
def test_nms(path):
    """The boxes that stay, in order: ties, duplicates, zero areas, an IoU of exactly the threshold."""
    for name, case in read(path)['nms'].items():
        for threshold, keep in zip(case['thresholds'], case['keep']):
            assert torch.equal(D.nms(case['boxes'], case['scores'], threshold), keep), (name, threshold)


@pytest.mark.parametrize('path', fixtures('nms*.pt'))
def test_nms_by_class(path):
    """Boxes of different classes leave each other alone."""
    for name, case in read(path)['batched_nms'].items():
        for threshold, keep in zip(case['thresholds'], case['keep']):
            assert torch.equal(D.nms(case['boxes'], case['scores'], threshold, case['idxs']), keep), (name, threshold)


@pytest.mark.parametrize('path', fixtures('nms*.pt'))
def test_soft_nms(path):
    """The new scores of the boxes taken. Among equals the original takes one by its way of swapping; boxes that are
    handed over in the order of its picks fall the same way. Its NaN of two boxes without area is our 'no overlap'."""
    for case in read(path)['soft_nms']:
        num, keep = len(case['keep']), case['keep'].tolist()
        order = torch.tensor(keep + [i for i in range(len(case['boxes'])) if i not in keep], dtype=torch.long)
        scores = D.soft_nms(case['boxes'][order], case['scores'][None, order], case['iou_threshold'],
                            case['min_score'], case['method'], case['sigma'])[0]
        known = ~case['dets'][:, 4].isnan()
        close(scores[:num][known], case['dets'][known, 4], 1e-6, 0)
        assert (scores[:num] > 0).all() and not scores[num:].any()


@pytest.mark.parametrize('path', fixtures('nms*.pt'))
def test_detections_of_an_image(path):
    """From all boxes and scores to what is reported, with hard and soft NMS: values that are not finite, borders."""
    for case in read(path)['postprocess']:
        options = case['kwargs']
        soft, threshold = None, options['score_thresh']
        if options.get('use_soft_nms'):
            soft = dict(threshold=options['iou_threshold'], method=options['method'], sigma=options.get('sigma', .5))
            threshold = options.get('override_score_thresh', threshold)
        boxes, scores, classes, rows = D.choose_detections(
            case['boxes_in'], case['scores_in'][:, :-1], case['image_shape'], threshold, options['nms_thresh'],
            options['topk_per_image'], soft)
        assert torch.equal(rows, case['row_index']) and torch.equal(classes, case['classes'])
        close(boxes, case['boxes'])
        close(scores, case['scores'], 1e-6, 0)


# ---- regions

@pytest.mark.parametrize('path', fixtures('roi_align*.pt'))
def test_roi_align(path):
    """Adaptive and fixed sampling, aligned or not, with boxes outside the map and of no size."""
    fixture = read(path)
    for case in fixture['cases']:
        ours = D.roi_align(fixture['input'], case['rois'][:, 1:], case['rois'][:, 0].long(), case['output_size'],
                           case['spatial_scale'], case['sampling_ratio'], case['aligned'])
        close(ours, case['output'])


@pytest.mark.parametrize('path', fixtures('roi_align*.pt'))
def test_roi_align_gradient(path):
    """The gradient of the map, where boxes overlap too."""
    fixture = read(path)
    for case in fixture['grad_cases']:
        features = fixture['input'].clone().requires_grad_()
        ours = D.roi_align(features, case['rois'][:, 1:], case['rois'][:, 0].long(), case['output_size'],
                           case['spatial_scale'], case['sampling_ratio'], case['aligned'])
        ours.backward(case['grad_output'])
        close(features.grad, case['grad_input'])


@pytest.mark.parametrize('path', fixtures('roi_align*.pt'))
def test_boxes_find_their_level_of_the_pyramid(path):
    """On both sides of every border, and for boxes without area."""
    case = read(path)['level_assignment']
    strides = [2 ** level for level in range(case['min_level'], case['max_level'] + 1)]
    assert torch.equal(D.box_levels(case['boxes'], strides), case['level_index'])


@pytest.mark.parametrize('path', fixtures('roi_align*.pt'))
def test_boxes_are_pooled_from_their_levels(path):
    """Box by box, image by image."""
    case = read(path)['pooler']
    for name in [name for name in case if name.startswith('output_')]:
        close(D.pool_boxes(case['features'], case['strides'], case['boxes'], int(name.split('_')[1])), case[name])


# ---- boxes

@pytest.mark.parametrize('path', fixtures('boxes*.pt'))
def test_anchors(path):
    """Sides of 8 strides, three ratios, centred on the cells' corners, in the order y, x, ratio."""
    case = read(path)['anchors']
    assert case['sizes'] == [8 * stride for stride in case['strides']] and case['offset'] == 0
    for ours, theirs in zip(D.make_anchors(case['grid_shapes'], case['strides'], case['ratios']), case['anchors']):
        close(ours, theirs)


@pytest.mark.parametrize('path', fixtures('boxes*.pt'))
def test_box_coding(path):
    """Both ways, for every set of weights; huge growths are cut."""
    fixture = read(path)['box_coder']
    assert D.LARGEST_GROWTH == pytest.approx(fixture['scale_clamp'], abs=1e-12)
    source = fixture['src']
    for case in fixture['cases']:
        weights = case['weights']
        close(D.encode_boxes(source, fixture['dst'], weights), case['deltas'])
        close(D.decode_boxes(source, case['deltas'], weights), case['decoded_from_deltas'])
        close(D.decode_boxes(source, fixture['raw_deltas'], weights), case['decoded_from_raw'])
        several = [D.decode_boxes(source, deltas, weights) for deltas in fixture['raw_deltas_k3'].split(4, 1)]
        close(torch.cat(several, 1), case['decoded_from_raw_k3'])


@pytest.mark.parametrize('path', fixtures('boxes*.pt'))
def test_pairwise_iou(path):
    """Zero, not NaN, where nothing is shared."""
    case = read(path)['pairwise_iou']
    close(D.pairwise_iou(case['boxes1'], case['boxes2']), case['iou'])


@pytest.mark.parametrize('path', fixtures('boxes*.pt'))
def test_matching(path):
    """Best target and label of every anchor; a target's best anchors count whatever their IoU, even 0."""
    fixture = read(path)
    iou = D.pairwise_iou(fixture['matcher']['gt'], torch.cat(fixture['anchors']['anchors']))
    for case in fixture['matcher']['cases']:
        quality = case['quality'] if 'quality' in case else torch.zeros(0, case['n']) if 'n' in case else iou
        index, label = D.match(quality, case.get('thresholds', [.5]), case.get('labels', [0, 1]),
                               case.get('allow_low_quality', False))
        assert torch.equal(index, case['matched_idx'].long()), case['name']
        assert torch.equal(label, case['match_label'].long()), case['name']


def rpn_outputs(fixture):
    """(logits [B, n], deltas [B, n, 4], anchors [n, 4]) of each level, from raw maps of channels anchor by anchor."""
    rows = lambda x, n: x.unflatten(1, (-1, n)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    logits = [rows(x, 1)[..., 0] for x in fixture['rpn']['pred_objectness_logits']]
    deltas = [rows(x, 4) for x in fixture['rpn']['pred_anchor_deltas']]
    grids = [x.shape[2:] for x in fixture['rpn']['pred_objectness_logits']]
    return logits, deltas, D.make_anchors(grids, fixture['anchors']['strides'], fixture['anchors']['ratios'])


@pytest.mark.parametrize('path', fixtures('boxes*.pt'))
def test_proposals(path):
    """Boxes and logits, with the numbers of training and of testing."""
    fixture = read(path)
    logits, deltas, anchors = rpn_outputs(fixture)
    case, config = fixture['rpn'], fixture['rpn']['config']
    for name, before, after in zip(('train', 'test'), config['pre_nms_topk'], config['post_nms_topk']):
        for i, expected in enumerate(case[f'{name}_proposals']):
            boxes, scores = D.choose_proposals([x[i] for x in logits], [x[i] for x in deltas], anchors,
                                               case['image_sizes'][i], before, after, config['nms_thresh'])
            close(boxes, expected['boxes'])
            close(scores, expected['logits'])


@pytest.mark.parametrize('path', fixtures('boxes*.pt'))
def test_rpn_losses(path):
    """Which anchors are asked (the first ones, in place of random ones), and both losses."""
    fixture = read(path)
    logits, deltas, anchors = rpn_outputs(fixture)
    anchors, case = torch.cat(anchors), fixture['rpn']
    num, share = case['config']['batch_size_per_image'], case['config']['positive_fraction']
    first = torch.arange(len(anchors), dtype=torch.float32)
    labels, targets = zip(*(D.rpn_targets(anchors, boxes, first, num, share) for boxes in case['gt_boxes']))
    for ours, theirs in zip(labels, case['sampled_labels']):
        assert torch.equal(ours, theirs.long())
    losses = D.rpn_losses(torch.cat(logits, 1), torch.cat(deltas, 1), anchors, torch.stack(labels),
                          torch.stack(targets), num)
    close(torch.stack(losses), torch.tensor([case['losses']['loss_rpn_cls'], case['losses']['loss_rpn_loc']]))


# ---- masks

def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_polygons(path):
    """Every part, their union, its area and its box, to the pixel."""
    fixture = read(path)
    for name, case in fixture['polygons'].items():
        for part, expected in zip(case['polygons'], case['part_masks']):
            ours = D.decode_mask(D.fill_polygon(part, fixture['hw']), fixture['hw'])
            assert (ours == expected.numpy()).all(), name
        runs = D.fill_polygons(case['polygons'], fixture['hw'])
        assert D.runs_to_string(runs) == case['rle'], name
        assert D.mask_area(runs) == case['area'] and xywh(D.mask_box(runs, fixture['hw'][0])) == case['bbox'], name


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_boxes_as_masks(path):
    """A box is the polygon of its corners."""
    fixture = read(path)
    for (x, y, w, h), expected in zip(fixture['boxes_to_masks']['boxes_xywh'], fixture['boxes_to_masks']['masks']):
        runs = D.fill_polygon([x, y, x, y + h, x + w, y + h, x + w, y], fixture['hw'])
        assert (D.decode_mask(runs, fixture['hw']) == expected.numpy()).all()


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_run_lengths(path):
    """Masks to run lengths, to strings, and back."""
    for name, case in read(path)['rle'].items():
        mask = case['mask'].numpy()
        runs = D.encode_mask(mask)
        assert runs.tolist() == case['counts_uncompressed'], name
        assert D.runs_to_string(runs) == case['counts_compressed'], name
        assert D.string_to_runs(case['counts_compressed']).tolist() == case['counts_uncompressed'], name
        assert (D.decode_mask(runs, case['size']) == mask).all(), name
        assert D.mask_area(runs) == case['area'] and xywh(D.mask_box(runs, case['size'][0])) == case['bbox'], name


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_merging_masks(path):
    """Union and intersection."""
    case = read(path)['merge']
    masks = [D.string_to_runs(text) for text in case['inputs']]
    assert D.runs_to_string(D.merge_masks(masks)) == case['union']
    assert D.runs_to_string(D.merge_masks(masks, len(masks))) == case['intersect']


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_overlaps(path):
    """IoU of masks and of boxes, with crowds, exactly."""
    case = read(path)['iou']
    masks = [[D.string_to_runs(text) for text in case[name]] for name in ('dt', 'gt')]
    for crowd, expected in zip(case['crowd'], case['iou']):
        np.testing.assert_allclose(D.overlap_masks(*masks, np.array(crowd, dtype=bool)), expected, rtol=0, atol=1e-12)
    boxes = case['box_dt_xywh'].numpy(), case['box_gt_xywh'].numpy()
    for crowd, expected in zip(case['box_crowd'], case['box_iou']):
        np.testing.assert_allclose(D.overlap_boxes(*boxes, np.array(crowd, dtype=bool)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_pasting(path):
    """Values on the whole canvas, and every pixel of the masks."""
    case = read(path)['paste']
    ours = torch.stack([D.paste_mask(mask, box, case['image_hw']) for mask, box in zip(case['probs'], case['boxes'])])
    close(ours[:len(case['soft_full'])], case['soft_full'])
    assert torch.equal(ours >= case['threshold'], case['masks'])


@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_mask_targets(path):
    """Polygons and bitmaps within boxes, to the pixel."""
    fixture = read(path)
    case = fixture['mask_targets']
    for name in [name for name in case if '_targets_' in name]:
        source = 'polygons' if name.startswith('polygon') else 'mask'
        masks = [fixture['polygons'][polygon][source] for polygon in case['polygon_names']]
        assert torch.equal(D.mask_targets(masks, case['boxes'], int(name.split('_')[-1])), case[name]), name


# ---- average precision

def coco_sets(fixture):
    """(name, truth, detections, expected by kind) of each set; some are described in words."""
    tricky = fixture['tricky']
    for name, case in fixture.items():
        truth, dets = case['gt'], case['dets']
        if isinstance(truth, str):
            kept = {'same as tricky': lambda row: True, 'tricky with no annotations': lambda row: False,
                    'tricky, keeping only annotations with iscrowd=1': lambda row: row['iscrowd']}[truth]
            truth = dict(tricky['gt'], annotations=[row for row in tricky['gt']['annotations'] if kept(row)])
        yield name, truth, tricky['dets'] if isinstance(dets, str) else dets, case


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
@pytest.mark.parametrize('path', fixtures('coco_ap*.json'))
def test_coco_ap(path, kind):
    """The 12 numbers and those of every category, to 1e-12: crowds, ties, nothing to find, nothing found."""
    for name, truth, dets, case in coco_sets(read(path)):
        ours, expected = D.average_precision(truth, dets, kind), case[kind]
        for number, value in expected['stats'].items():
            assert abs(ours[number] - value) < 1e-12, (name, number)
        for category, numbers in expected['per_category'].items():
            for number, value in numbers.items():
                assert abs(ours['per_category'][int(category)][number] - value) < 1e-12, (name, category, number)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
@pytest.mark.parametrize('path', fixtures('coco_ap*.json'))
def test_coco_curves(path, kind):
    """Precision at 101 recalls, IoU .5, for every category."""
    for name, truth, dets, case in coco_sets(read(path)):
        precision, _ = D.precision_and_recall(truth, dets, kind, (1, 10, 100))
        np.testing.assert_allclose(precision[:, 0, 0], case[kind]['precision_iou50_area_all_maxdet100'],
                                   rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize('path', fixtures('lvis_ap*.json'))
def test_lvis_ap(path):
    """LVIS's numbers, by frequency and by category, to 1e-12, at two limits of detections an image."""
    fixture = read(path)
    for name, expected in fixture['expected'].items():
        kind, limit = name.split('_max')
        ours = D.average_precision(fixture['gt'], fixture['dets'], kind, (int(limit),))
        for number, value in expected['results'].items():
            number = {f'AR@{limit}': f'AR{limit}'}.get(number, number.split('@')[0])
            assert abs(ours[number] - value) < 1e-12, (name, number)
        for category, value in expected['per_category_AP'].items():
            assert abs(ours['per_category'][int(category)]['AP'] - value) < 1e-12, (name, category)
