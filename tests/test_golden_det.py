"""
Boxes, regions, masks and average precision as detectron2, torchvision, pycocotools and lvis-api compute them. Fixtures
lie in the folders named by GOLDEN, as for test_golden.py.
"""
import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch

import data
import detect_seg as D
import model as M
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
                          torch.stack(targets))
    close(torch.stack(losses) / (num * len(labels)),
          torch.tensor([case['losses']['loss_rpn_cls'], case['losses']['loss_rpn_loc']]))


# ---- masks

@pytest.mark.parametrize('path', fixtures('masks*.pt'))
def test_overlaps(path):
    """IoU of masks and of boxes, with crowds, exactly."""
    case = read(path)['iou']
    masks = [[data.string_to_runs(text) for text in case[name]] for name in ('dt', 'gt')]
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
def test_coco_ap(path, kind, monkeypatch):
    """The 12 numbers and those of every category, to 1e-12: crowds, ties, nothing to find, nothing found."""
    for name, truth, dets, case in coco_sets(read(path)):
        ours, expected = D.average_precision(truth, dets, kind), case[kind]
        for number, value in expected['stats'].items():
            assert abs(ours[number] - value) < 1e-12, (name, number)
        curves = D.precision_and_recall(truth, dets, kind, (1, 10, 100))
        ids = sorted(category['id'] for category in truth['categories'])
        for category, numbers in expected['per_category'].items():
            k = ids.index(int(category))
            with monkeypatch.context() as patch:
                patch.setattr(D, 'precision_and_recall', lambda *_: [curve[k:k + 1] for curve in curves])
                ours = D.average_precision(truth, dets, kind)
            for number, value in numbers.items():
                assert abs(ours[number] - value) < 1e-12, (name, category, number)


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
        precision, _ = D.precision_and_recall(fixture['gt'], fixture['dets'], kind, (int(limit),))
        ids = sorted(category['id'] for category in fixture['gt']['categories'])
        for category, value in expected['per_category_AP'].items():
            assert abs(D.known_mean(precision[ids.index(int(category)), 0]) - value) < 1e-12, (name, category)


# ---- the backbone and its pyramid

def vitdet_cases(path):
    """(name, state, image, expected) of a fixture with one model or several variants."""
    fixture = read(path)
    variants = fixture.get('variants', {'': fixture})
    for name, case in variants.items():
        state = case['state_dict']
        if state == 'same as relpos_resized':
            state = variants['relpos_resized']['state_dict']
        elif isinstance(state, str):
            state = {key: value for key, value in variants['no_relpos']['state_dict'].items()
                     if not key.endswith(('q_bias', 'v_bias'))} | case['extra_state']
        yield name, state, fixture['image'], case


def backbone(state, case):
    """Our ViT and Pyramid with the fixture's weights; a plain bias of q, k and v gives those of q and v."""
    config = case['config']
    every = next(i for i in range(config['depth']) if i not in config['window_block_indexes']) + 1
    width = config['embed_dim']
    rel_pos = config['img_size'] // config['patch_size'] if config['use_rel_pos'] else 0
    vit = M.ViT(M.ViTConfig(
        width, config['depth'], config['num_heads'], int(width * config['mlp_ratio']), config['patch_size'],
        config['pretrain_img_size'], pool='map', mask_token=False, global_every=every, window=config['window_size'],
        rel_pos=rel_pos))
    model = torch.nn.ModuleDict(dict(vit=vit, pyramid=D.Pyramid(config['embed_dim'], config['out_channels'])))
    plain = [('net.blocks.*.attn.qkv.bias', 'vit.blocks.*.attn.q_bias - vit.blocks.*.attn.v_bias', 'split')]
    names = [(theirs.removeprefix('backbone.'), ours, op) for theirs, ours, op in D.DETECTOR]
    model.load_state_dict(M.translate(state, plain + names)[0])
    return model, names


@pytest.mark.parametrize('path', fixtures('vitdet_re*.pt'))
def test_vitdet(path):
    """Every block, the last map and the five levels: windows, padding, relative positions at other grids."""
    for name, state, image, case in vitdet_cases(path):
        model, _ = backbone(state, case)
        vit, maps = model['vit'], []
        if case['config']['interp_type'] == 'beit':
            D.stretch_distances(vit, [side // vit.patch_size for side in image.shape[2:]])
        for block in vit.blocks:
            block.register_forward_hook(lambda module, inputs, output: maps.append(output))
        with torch.no_grad():
            last = vit(image)
            levels = model['pyramid'](last)
        kept = case['block_outputs']
        for ours, theirs in zip(maps if len(kept) == len(maps) else (maps[0], maps[-1]), kept):
            close(ours.view(theirs.shape), theirs, 1e-4)
        close(last, case['last_feat'], 1e-4)
        for ours, theirs in zip(levels, case['pyramid'].values()):
            close(ours, theirs, 1e-4)


@pytest.mark.parametrize('path', fixtures('vitdet_re*.pt'))
def test_vitdet_gradients(path):
    """Of weights of every kind."""
    for name, state, image, case in vitdet_cases(path):
        if 'grad_probe' not in case:
            continue
        model, names = backbone(state, case)
        probe, levels = case['grad_probe'], model['pyramid'](model['vit'](image))
        sum((x * weights).sum() for x, weights in zip(levels, probe['channel_weights'].values())).backward()
        ours = M.translate_back({name: weight.grad for name, weight in model.named_parameters()}, names)
        for name, theirs in probe['grads'].items():
            close(ours[name].view(theirs.shape), theirs, 1e-4, 1e-3)


@pytest.mark.parametrize('path', fixtures('vitdet_primitives*.pt'))
def test_windows(path):
    """Zeros fill up the right and the bottom; joining undoes it."""
    case = read(path)['window']
    x, side = case['x'], case['window_size']
    grid = tuple(x.shape[1:3])
    windows = M.split_windows(x.flatten(1, 2), grid, side)
    close(windows.view(case['windows'].shape), case['windows'], 0, 0)
    close(M.join_windows(windows, grid, side).view(x.shape), case['unpartitioned'], 0, 0)


@pytest.mark.parametrize('path', fixtures('vitdet_primitives*.pt'))
def test_relative_positions(path):
    """What a query adds to its logits is its product with the table of the distance, resized in both ways. Queries and
    keys are of one grid, as they are everywhere in the model."""
    cases = [case for case in read(path)['rel_pos'] if case['q_size'] == case['k_size']]
    assert cases
    for case in cases:
        size, width = case['q_size'], case['table'].shape[1]
        rel_pos = (len(case['table']) + 1) // 2
        vit = M.ViT(M.ViTConfig(width, 1, 1, 1, 1, size, pool='map', mask_token=False, rel_pos=rel_pos))
        attention = vit.blocks[0].attn
        attention.rel_pos_h.data, attention.rel_pos_w.data = case['table'], torch.zeros_like(case['table'])
        if case['interp_type'] == 'beit':
            D.stretch_distances(vit, (size, size))
        unit = torch.eye(width)[:, None, None].expand(-1, 1, size, -1)         # one query for each channel of the table
        with torch.no_grad():
            logits = M.distance_logits(unit, (size, 1), attention.rel_pos_h, torch.zeros(1, width))
        close(logits[:, 0].permute(1, 2, 0), case['out'], 1e-4)


@pytest.mark.parametrize('path', fixtures('vitdet_primitives*.pt'))
def test_position_tables(path):
    """Resized to any grid, the class token's row left out."""
    for case in read(path)['abs_pos']:
        ours = M.resize_positions(case['table'], tuple(case['hw']))[:, 1:]
        close(ours.view(case['out'].shape), case['out'])


# ---- heads and the whole detector

def box_head(fixture):
    """Our BoxHead with the fixture's weights, whose names lack the stage's number."""
    channels, hidden = fixture['box_pooled'].shape[1], len(fixture['box_head_state']['fc1.bias'])
    head = D.BoxHead(channels, hidden, fixture['num_classes'])
    state = {f'roi_heads.box_head.0.{name}': x for name, x in fixture['box_head_state'].items()}
    state |= {f'roi_heads.box_predictor.0.{name}': x for name, x in fixture['predictor_state'].items()}
    ours = M.translate(state, D.DETECTOR)[0]
    head.load_state_dict({name.removeprefix('box_heads.0.'): x for name, x in ours.items()})
    return head


@pytest.mark.parametrize('path', fixtures('cascade_heads*.pt'))
def test_box_head(path):
    """Class logits and deltas of pooled features."""
    fixture = read(path)
    with torch.no_grad():
        logits, deltas = box_head(fixture)(fixture['box_pooled'])
    close(logits, fixture['cls_logits'])
    close(deltas, fixture['box_deltas'])


@pytest.mark.parametrize('path', fixtures('cascade_heads*.pt'))
def test_mask_head_and_its_loss(path):
    """Mask logits of every class, and the loss of the true ones."""
    fixture = read(path)
    head = D.MaskHead(fixture['mask_pooled'].shape[1], fixture['num_classes'])
    state = {f'roi_heads.mask_head.{name}': x for name, x in fixture['mask_head_state'].items()}
    head.load_state_dict({name.removeprefix('mask_head.'): x for name, x in M.translate(state, D.DETECTOR)[0].items()})
    with torch.no_grad():
        logits = head(fixture['mask_pooled'])
    close(logits, fixture['mask_logits'])
    case = fixture['mask_loss']
    polygons = [list(map(list, parts)) for parts in case['polygons']]
    goals = D.mask_targets(polygons, case['proposal_boxes'], 28)
    assert torch.equal(goals, case['targets'].bool())
    loss = D.class_mask_loss(logits, case['gt_classes'], goals) / goals.numel()
    close(loss, torch.tensor(case['loss']))


@pytest.mark.parametrize('path', fixtures('cascade_heads*.pt'))
def test_box_losses(path):
    """Softmax, sigmoid and federated classes, boxes at every stage's weights, and what is predicted."""
    fixture = read(path)
    boxes, logits, deltas = fixture['proposal_boxes'], fixture['cls_logits'], fixture['box_deltas']
    K = fixture['num_classes']
    for name, case in fixture['outputs'].items():
        labels, asked = case['gt_classes'], None
        if len(case['fed_sampling_prob']):
            u = torch.zeros(K)
            u[case['fed_sampled_negatives']] = .5           # their draw, in place of ours
            weights = fixture['fed_loss_cls_weights']
            there = len(labels.unique()) + len(case['fed_sampled_negatives'])
            close(torch.where(D.federated_classes(labels, weights, 0, u), 0., weights), case['fed_sampling_prob'][:-1])
            asked = D.federated_classes(labels, weights, there, u.clamp(min=1e-9))
        loss = D.class_loss(logits, labels, 'sigmoid' in name, asked) / len(labels)
        close(loss, torch.tensor(case['losses']['loss_cls']))
        foreground = torch.where(labels < K, labels, -1)
        loss = D.box_loss(boxes, deltas, foreground, fixture['gt_boxes'], case['weights']) / len(labels)
        close(loss, torch.tensor(case['losses']['loss_box_reg']))
        close(D.decode_boxes(boxes, deltas, case['weights']), case['pred_boxes'])
        close(logits.sigmoid() if 'sigmoid' in name else logits.softmax(1), case['probs'])


def detector(path):
    """Our Detector with the weights and the numbers of a whole-detector fixture, and its images."""
    fixture = read(path)
    if isinstance(fixture['state_dict'], str):              # 'same as FILE'
        other = read(os.path.join(os.path.dirname(path), fixture['state_dict'].split()[-1]))
        fixture |= {name: other[name] for name in ('state_dict', 'images', 'image_sizes')}
    config = fixture['config']
    rpn, roi = config['rpn'], config['roi']
    model = D.Detector.from_released(fixture['state_dict'])
    model.config = dataclasses.replace(
        model.config, anchor_sizes=config['anchor_sizes'], num_anchors=rpn['batch_size_per_image'],
        before=(rpn['pre_nms_topk_train'], rpn['pre_nms_topk_test']), num_boxes=roi['batch_size_per_image'],
        after=(rpn['post_nms_topk_train'], rpn['post_nms_topk_test']), positive_share=roi['positive_fraction'])
    images = [data.pad_to(model.normalize(image[None])[0], config['square_pad']) for image in fixture['images']]
    return model, dict(images=torch.stack(images), sizes=fixture['image_sizes']), fixture


def options_of(settings, config):
    """choose_detections's options of a fixture's."""
    if settings.get('use_soft_nms'):
        soft = dict(method=settings['method'], threshold=settings['iou_threshold'])
        return dict(threshold=settings['override_score_thresh'], soft=soft)
    roi = config['roi']
    return dict(threshold=roi['test_score_thresh'], iou=roi['test_nms_thresh'], most=roi['topk'])


def compare(found, expected, scores):
    assert torch.equal(found['classes'], expected['classes'])
    close(found['boxes'], expected['boxes'], 5e-3)
    close(scores, expected['scores'], 2e-4)


@pytest.mark.parametrize('path', fixtures('cascade_e2e_inference*.pt'))
def test_detector(path):
    """From images to boxes, scores, classes and masks, and to masks on the original image."""
    model, batch, fixture = detector(path)
    with torch.no_grad():
        found = model(batch, choose=options_of({}, fixture['config']))
    for i, (ours, expected) in enumerate(zip(found, fixture['detections'])):
        compare(ours, expected, ours['scores'])
        close(ours['masks'], expected['masks'][:, 0], 1e-3)
        original, expected = fixture['original_sizes'][i], fixture['postprocessed'][i]
        ours = D.to_original(ours, fixture['image_sizes'][i], original)
        compare(ours, expected, ours['scores'])
        masks = torch.stack([D.paste_mask(m, box, original) >= .5 for m, box in zip(ours['masks'], ours['boxes'])])
        some = expected['masks_first3']
        assert (masks[:len(some)] != some).float().mean() < .005
        close(masks.flatten(1).sum(1).float(), expected['mask_areas'].float(), 20, .005)


@pytest.mark.parametrize('path', fixtures('cascade_e2e_inference*.pt'))
def test_ways_of_testing(path):
    """Soft-NMS as in EVA's COCO numbers, and scores times maskness."""
    model, batch, fixture = detector(path)
    for name, case in fixture['test_time_variants'].items():
        settings = case['settings']
        with torch.no_grad():
            found = model(batch, choose=options_of(settings, fixture['config']))
        for ours, expected in zip(found, case['detections']):
            sure = D.maskness(ours['masks'], settings['maskness_thresh']) if 'maskness_thresh' in settings else 1
            compare(ours, expected, ours['scores'] * sure)


@pytest.mark.parametrize('path', fixtures('cascade_e2e_train*.pt'))
def test_detector_training(path):
    """Every loss, and the gradient of every weight, with the first boxes in place of random ones."""
    model, batch, fixture = detector(path)
    targets = [dict(boxes=truth['boxes'], labels=truth['classes'],
                    masks=[list(map(list, x)) for x in truth['polygons']])
               for truth in fixture['gt']]
    first = lambda stream, num: torch.arange(num, dtype=torch.float32).expand(len(targets), -1)
    losses = model(dict(batch, targets=targets), first)
    losses = {name: loss / count for name, (loss, count) in losses.items()}
    names = {'loss_rpn_cls': 'proposal_objectness', 'loss_rpn_loc': 'proposal_boxes', 'loss_mask': 'masks'}
    for theirs, value in fixture['losses'].items():
        ours = names.get(theirs, theirs.replace('loss_cls_stage', 'classes_').replace('loss_box_reg_stage', 'boxes_'))
        assert losses[ours].item() == pytest.approx(value, rel=1e-4), theirs
    total = sum(losses.values())
    assert total.item() == pytest.approx(fixture['total'], rel=1e-4)
    total.backward()
    grads = M.translate_back({name: weight.grad for name, weight in model.named_parameters()}, D.DETECTOR)
    frozen = {name for name in grads if 'patch_embed' in name}
    assert grads.keys() - fixture['grad_norms'].keys() == frozen
    for name, norm in fixture['grad_norms'].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    for name, gradient in fixture['grads'].items():
        close(grads[name].view(gradient.shape), gradient, 1e-3 * gradient.abs().max().item() + 1e-7, 1e-3)


@pytest.mark.parametrize('model', ['coco_1280', 'coco_1536', 'lvis_1280'])
@pytest.mark.parametrize('path', fixtures('keys_eva_det_seg*.json'))
def test_released_detectors(path, model):
    """The released files' names and shapes, all of them, fit our detector and no more."""
    listing = read(path)['detection']
    shapes = dict(listing['coco_1280']['keys'])
    for name, groups in listing['coco_1280']['blocks'].items():
        shapes |= {name.replace('.N.', f'.{i}.'): group['shape'] for group in groups for i in group['N']}
    for name, change in listing[model].get('differs_from_coco_1280', {}).items():
        shapes[name] = json.loads(change['here'])
    assert len(shapes) == listing[model]['num_keys']
    loaded = D.Detector.from_released({name: torch.empty(shape, device='meta') for name, shape in shapes.items()})
    num = sum(weight.numel() for weight in loaded.parameters())
    federated = sum(math.prod(shape) for name, shape in shapes.items() if 'fed_loss' in name)
    assert num == sum(math.prod(shape) for shape in shapes.values()) - federated
    assert listing[model]['num_parameters'] in (num, num + federated)
    assert loaded.config.vit.global_every == 4 and loaded.config.vit.window == 16
