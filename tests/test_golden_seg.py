"""
Assignment, Mask2Former, ViT-Adapter and mean IoU as scipy, Hugging Face's transformers and EVA's segmentation code
compute them. Fixtures lie in the folders named by GOLDEN, as for test_golden.py.
"""
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import detect_seg as D
import model as M
from test_golden import fixtures
from test_golden_det import close, read


def fill(model, state, rules):
    """A model with a fixture's tensors, in eval mode."""
    M.fill(model, M.translate(state, rules)[0], rules)
    return model.eval()


def head_config(config, layers, groups):
    """Of Mask2Former's decoders, from a fixture's."""
    return D.SegmenterConfig(None, config['num_classes'], 'mask2former', channels=config['dim'],
                             queries=config['num_queries'], heads=config['heads'], mlp_width=config['ffn_dim'],
                             layers=layers, groups=groups)


# ---- which query for which mask

@pytest.mark.parametrize('path', fixtures('assignment*.pt'))
def test_assignment(path):
    """Square, wide, tall, empty, with ties, huge values, and values at the end of float32."""
    for case in read(path)['cases']:
        cost = case['cost'].numpy()
        rows, columns = D.assign(cost)
        assert cost[rows, columns].sum() == pytest.approx(case['total'], rel=1e-12), case['name']
        assert len(rows) == min(cost.shape) and (np.diff(rows) > 0).all() and len(set(columns)) == len(columns)
        if case['unique_optimum']:
            assert rows.tolist() == case['row'].tolist() and columns.tolist() == case['col'].tolist(), case['name']


# ---- Mask2Former's parts

HF_DEFORMABLE = [('sampling_offsets.*', 'offsets.*', 'same'), ('attention_weights.*', 'weights.*', 'same'),
                 ('value_proj.*', 'values.*', 'same'), ('output_proj.*', 'proj.*', 'same')]
HF_PIXELS = M.under('encoder.layers.*.self_attn.', 'layers.*.attn.', HF_DEFORMABLE) + [
    ('encoder.layers.*.self_attn_layer_norm.*', 'layers.*.norms.0.*', 'same'),
    ('encoder.layers.*.final_layer_norm.*', 'layers.*.norms.1.*', 'same'),
    ('encoder.layers.*.fc1.*', 'layers.*.fc1.*', 'same'), ('encoder.layers.*.fc2.*', 'layers.*.fc2.*', 'same'),
    ('input_projections.*.*.*', 'inputs.*.*.*', 'same'), ('adapter_1.*.*', 'lateral.*.*', 'same'),
    ('layer_1.*.*', 'output.*.*', 'same'), ('mask_projection.*', 'finest.*', 'same'),
    *M.same('level_embed')]
HF_DECODER = M.under('decoder.layers.*.', 'layers.*.', [
    ('cross_attn.in_proj_weight', 'cross.in_proj_weight', 'same'),
    ('cross_attn.in_proj_bias', 'cross.in_proj_bias', 'same'),
    ('cross_attn.out_proj.*', 'cross.out_proj.*', 'same'), ('self_attn.out_proj.*', 'attn.out_proj.*', 'same'),
    *[(' '.join(f'self_attn.{x}_proj.{kind}' for x in 'qkv'), f'attn.in_proj_{kind}', 'concat')
      for kind in ('weight', 'bias')],
    ('cross_attn_layer_norm.*', 'norms.0.*', 'same'), ('self_attn_layer_norm.*', 'norms.1.*', 'same'),
    ('final_layer_norm.*', 'norms.2.*', 'same'), *M.same('fc1.*', 'fc2.*')]) + [
    ('queries_embedder.weight', 'positions', 'same'), ('queries_features.weight', 'queries', 'same'),
    ('decoder.layernorm.*', 'norm.*', 'same'), ('level_embed.weight', 'level_embed', 'same'),
    *[(f'decoder.mask_predictor.mask_embedder.{i}.0.*', f'mask.{2 * i}.*', 'same') for i in range(3)]]


@pytest.mark.parametrize('path', fixtures('mask2former_pixel*.pt'))
def test_deformable_attention(path):
    """The sampling of several maps, and the whole module with places inside and outside the image."""
    fixture, config = read(path)['ms_deform_attn'], read(path)['config']
    sizes, core = [tuple(size) for size in fixture['spatial_shapes']], fixture['core']
    close(D.sample_levels(core['value'], sizes, core['sampling_locations'], core['attention_weights']), core['output'])
    attention = fill(D.DeformableAttention(config['dim'], config['heads'], config['n_levels'], config['n_points']),
                     fixture['state_dict'], HF_DEFORMABLE)
    # positions are the caller's to add; to the values they are not
    close(attention(fixture['query'] + fixture['query_pos'], fixture['reference_points'], fixture['memory'], sizes),
          fixture['output'])


@pytest.mark.parametrize('path', fixtures('mask2former_pixel*.pt'))
def test_pixel_decoder(path):
    """Four maps to three, coarsest first, and the finest; its sine positions."""
    fixture, config = read(path)['pixel_decoder'], read(path)['config']
    for name, theirs in read(path)['sine_position']['embeddings'].items():
        size = tuple(map(int, name.split('x')))
        close(D.sine_positions(size, theirs.shape[1]), theirs[0].flatten(1).T)
    config = head_config(config, (config['encoder_layers'], 0), config['groupnorm_groups'])
    decoder = fill(D.PixelDecoder(fixture['feature_channels'], config), fixture['state_dict'], HF_PIXELS)
    levels, finest = decoder(fixture['features'])
    close(finest, fixture['mask_features'], 1e-4)
    for ours, theirs in zip(levels, fixture['multi_scale_features']):
        close(ours, theirs, 1e-4)


@pytest.mark.parametrize('path', fixtures('mask2former_decoder*.pt'))
def test_mask_decoder(path):
    """Every layer's classes and masks; a query whose mask hides everything; the scores of pixels."""
    fixture, config = read(path)['decoder'], read(path)['config']
    state = {**fixture['state_dict'], **{f'classes.{name}': x for name, x in fixture['class_head'].items()}}
    groups = math.gcd(config['dim'], config['groupnorm_groups'])       # of its pixel decoder, which is not tested here
    head = D.Mask2FormerHead([config['dim']] * 4, head_config(config, (0, config['decoder_layers']), groups))
    fill(head.decoder, state, HF_DECODER + M.same('classes.*'))
    predictions = head.decoder(fixture['multi_scale_features'], fixture['mask_features'])
    assert len(predictions) == len(fixture['class_logits'])
    for (logits, masks), their_logits, their_masks in zip(predictions, fixture['class_logits'], fixture['mask_logits']):
        close(logits, their_logits, 1e-4)
        close(masks, their_masks, 1e-4)
    head.pixels = torch.nn.Identity()
    finest = fixture['mask_features']
    scores = head.scores((fixture['multi_scale_features'], finest), finest.shape[2:])
    close(scores, fixture['semantic_scores'], 1e-4)


def replay(draws, counts):
    """`draw` from one prediction's recorded numbers: a tensor for each image's matching, then candidates, others. An
    image's numbers stand at the beginning of its row."""
    matching, (candidates, others) = draws[:-2], draws[-2:]
    recorded = {'match': matching, 'candidates': candidates.split(counts), 'others': others.split(counts)}

    def draw(stream, num):
        rows = [x.flatten() for x in recorded[stream.split()[0]]]
        assert max(len(row) for row in rows) == num
        return torch.stack([F.pad(row, (0, num - len(row)), value=torch.nan) for row in rows])
    return draw


def losses_of(predictions, labels, masks, draws, num_points):
    """Means of the three losses of each prediction, from draws in the predictions' order."""
    targets = [(label, mask.float()) for label, mask in zip(labels, masks)]
    counts, each = [len(label) for label in labels], len(labels) + 2
    for n, (logits, mask_logits) in enumerate(predictions):
        draw = replay(draws[n * each:][:each], counts)
        sums = D.mask_losses(logits, mask_logits, targets, draw, n, num_points)
        queries = len(labels) * logits.shape[1]
        yield sums / torch.tensor([sum(counts) + D.NO_OBJECT * (queries - sum(counts)), sum(counts), sum(counts)])


@pytest.mark.parametrize('path', fixtures('mask2former_decoder*.pt'))
def test_losses(path):
    """Which query finds which mask, and the losses, from recorded random points."""
    fixture, decoder, config = read(path)['losses'], read(path)['decoder'], read(path)['config']
    logits, masks = decoder['class_logits'], decoder['mask_logits']
    predictions = [(logits[-1], masks[-1]), (logits[0], masks[0])]
    for n, match in enumerate(fixture['matches'][:2]):
        points = fixture['random_draws'][n].view(1, -1, 2)
        labels, goals = fixture['gt_labels'][n], fixture['gt_masks'][n].float()
        cost = D.match_cost(logits[-1][n], masks[-1][n], labels, goals, points)
        close(cost, match['cost'])
        rows, columns = D.assign(cost.numpy())
        assert rows.tolist() == match['row'].tolist() and columns.tolist() == match['col'].tolist()
    found = losses_of(predictions, fixture['gt_labels'], fixture['gt_masks'], fixture['random_draws'],
                      config['num_points'])
    theirs = fixture['losses_unweighted']
    for ours, suffix in zip(found, ('', '_0')):
        for x, name in zip(ours, ('cross_entropy', 'mask', 'dice')):
            close(x, theirs[f'loss_{name}{suffix}'])


# ---- EVA's own segmentor

def beside(path, name):
    """Another fixture of the same folder."""
    return read(os.path.join(os.path.dirname(path), name))


def segmenter(backbone, config, head):
    """EVA's segmentor of two fixtures' tensors."""
    state = {**{'backbone.' + name: x for name, x in backbone.items()},
             **{'decode_head.' + name: x for name, x in head.items()}}
    return D.Segmenter.from_released(state, **small(config))


def small(config):
    """What the tensors do not show where heads are narrow. Positions are of a rectangle; our table of several frames
    takes any number of them as they are."""
    h, w = (side // config['patch_size'] for side in config['img_size'])
    vit = dict(heads=config['num_heads'], image_size=config['patch_size'], frames=h * w)
    bias = (h, w) if config.get('use_rel_pos_bias') else None
    return dict(vit=vit, bias=bias, groups=config['head']['gn_groups'])


@pytest.mark.parametrize('path', fixtures('vit_adapter_*.pt'))
def test_adapter(path):
    """The convolutions' maps, and four maps of patches and convolutions together; with relative positions too."""
    fixture = read(path)
    state = {**beside(path, 'vit_adapter_plain.pt')['state_dict'], **fixture['state_dict']}
    model = segmenter(state, fixture['config'], beside(path, 'eva_seg_head.pt')['head_state_dict'])
    if fixture['spatial_prior'] is not None:
        embed = [torch.zeros(1), *model.adapter.level_embed]
        for ours, theirs, level in zip(model.adapter.prior(fixture['image']), fixture['spatial_prior'], embed):
            close(ours if theirs.ndim == 4 else ours.flatten(2).transpose(1, 2), theirs)
    for ours, theirs in zip(model.maps(fixture['image']), fixture['outputs'], strict=True):
        close(ours, theirs, 1e-4)


@pytest.mark.parametrize('path', fixtures('eva_seg_head*.pt'))
def test_eva_head(path):
    """Every layer's classes and masks, the scores of an image, and windows over a larger one."""
    fixture, plain = read(path), beside(path, 'vit_adapter_plain.pt')
    model = segmenter(plain['state_dict'], fixture['config'], fixture['head_state_dict'])
    levels, finest = model.head.pixels(plain['outputs'])
    close(finest, fixture['mask_feature'], 1e-4)
    for ours, theirs in zip(levels, fixture['multi_scale_features']):
        close(ours, theirs, 1e-4)
    for (logits, masks), their_logits, their_masks in zip(model.head.decoder(levels, finest), fixture['class_logits'],
                                                          fixture['mask_logits']):
        close(logits, their_logits, 1e-4)
        close(masks, their_masks, 1e-4)
    close(model(dict(images=plain['image'][:1])), fixture['encode_decode_first_image'], 1e-4)
    slide = fixture['slide']
    scores = D.slide(model, slide['image'], tuple(slide['crop']), tuple(slide['stride']))
    scores = F.interpolate(scores, size=tuple(slide['ori_shape']), mode='bilinear').softmax(1)
    close(scores, slide['softmax_scores'], 1e-4)
    assert (scores.argmax(1) != slide['prediction']).float().mean() <= .001


@pytest.mark.parametrize('path', fixtures('eva_seg_head*.pt'))
def test_eva_losses(path):
    """With their weights, of the last two predictions."""
    fixture = read(path)
    losses, config = fixture['losses'], fixture['config']['head']
    predictions = list(zip(fixture['class_logits'], fixture['mask_logits']))[-2:]
    found = losses_of(predictions, losses['gt_labels'], losses['gt_masks'], losses['random_draws'],
                      config['num_points_train'])
    for ours, prefix in zip(found, ('d0.', '')):
        for x, weight, name in zip(ours, (D.CLASS_WEIGHT, D.PIXEL_WEIGHT, D.DICE_WEIGHT), ('cls', 'mask', 'dice')):
            assert (weight * x).item() == pytest.approx(losses['losses'][f'{prefix}loss_{name}'], rel=1e-4)


# ---- mean IoU

@pytest.mark.parametrize('path', fixtures('miou*.json'))
def test_mean_iou(path):
    """Ignored pixels, absent classes, a class that is only predicted, label 0 left out."""
    for case in read(path)['cases']:
        K, counts = case['num_classes'], 0
        assert case['ignore_index'] == 255
        table = data.label_table([*['-'] * case['reduce_zero_label'], *map(str, range(K))])
        for predicted, labels in zip(case['preds'], case['labels']):
            labels = torch.from_numpy(table[np.array(labels)])
            counts = counts + D.confusion(torch.tensor(predicted), labels, K)
        metrics, iou = D.mean_iou(counts)
        theirs = torch.tensor([float('nan') if x is None else x for x in case['IoU']], dtype=torch.float64)
        torch.testing.assert_close(iou, theirs, atol=1e-9, rtol=0, equal_nan=True)
        assert metrics == pytest.approx(dict(miou=case['mIoU'], pixel_accuracy=case['aAcc'],
                                             class_accuracy=case['mAcc']), abs=1e-9)


@pytest.mark.parametrize('path', fixtures('miou*.json'))
def test_windows(path):
    """Where the windows of an image lie; the last are moved back into it."""
    for case in read(path)['slide_windows']:
        found = D.windows((case['h'], case['w']), (case['crop'],) * 2, (case['stride'],) * 2)
        assert [[y, x, min(y + case['crop'], case['h']), min(x + case['crop'], case['w'])] for y, x in found] == \
            case['windows_y1x1y2x2']


@pytest.mark.parametrize('path', fixtures('keys_eva_det_seg*.json'))
def test_released_segmentors(path):
    """All tensors of the released models find their place: 1,280,633,111 parameters."""
    known = read(path)['segmentation']
    base = known['ade20k_8dec']
    for name, about in known.items():
        keys, depth = dict(base['keys']), 40 if 'relpos' not in name else 4
        for block, forms in base['blocks'].items():
            keys |= {block.replace('.N.', f'.{i}.'): forms[0]['shape'] for i in range(depth)}
        for key, change in about.get('differs_from_ade20k_8dec', {}).items():
            here = change['here']
            if '.N.' in key:
                shape = json.loads(here.replace("'", '"'))[0]['shape']
                keys |= {key.replace('.N.', f'.{i}.'): shape for i in range(depth)}
            else:
                keys[key] = json.loads(here)
        assert len(keys) == about['num_keys']
        with torch.device('meta'):
            model = D.Segmenter.from_released({key: torch.empty(shape) for key, shape in keys.items()})
        assert sum(weight.numel() for weight in model.parameters()) == about['num_parameters']
        assert model.vit.image_size == 896 and model.config.heads == 32 and model.config.adapter['heads'] == 16
