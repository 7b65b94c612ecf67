"""
Numbers that the original implementations gave. Fixtures lie in the folders named by GOLDEN (':' between them,
tests/golden if it is not set); a file that is not there skips its tests.
"""
import glob
import os

import pytest
import torch

from model import load_state

FOLDERS = os.environ.get('GOLDEN', os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')).split(':')
TOLERANCE = dict(atol=2e-5, rtol=0)


def fixtures(pattern):
    paths = sorted(path for folder in FOLDERS for path in glob.glob(os.path.join(folder, pattern)))
    if not paths:
        return [pytest.param(None, id=pattern, marks=pytest.mark.skip(reason=f'no {pattern} in {FOLDERS}'))]
    return [pytest.param(path, id=os.path.basename(path)) for path in paths]


def read(path):
    fixture = torch.load(path, weights_only=True)
    return fixture['config'], fixture['state_dict'], fixture['inputs'], fixture['outputs']


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


# ---- EVA-01, masked image modelling

def eva(path):
    config, state, inputs, outputs = read(path)
    return load_state(state, heads=config['num_heads'], eps=config['ln_eps']), inputs, outputs


def loss_of(model, inputs, variant):
    """The loss that mim_pretrain trains with; their targets hold the hidden patches only."""
    from mim_pretrain import mim_loss
    mask = inputs['mask_' + variant]
    predictions = model(inputs['image'], mask)
    targets = torch.zeros_like(predictions)
    targets[mask] = inputs['target_' + variant]
    return mim_loss(predictions, targets, mask)


@pytest.mark.parametrize('variant', ['equal', 'unequal'])
@pytest.mark.parametrize('path', fixtures('eva01_mim*.pt'))
def test_tokens_and_predictions(path, variant):
    """Masked images become EVA's tokens and predictions, also when images hide unequal numbers of patches."""
    model, inputs, outputs = eva(path)
    mask = inputs['mask_' + variant]
    with torch.no_grad():
        close(model.features(inputs['image'], mask), outputs['tokens_' + variant])
        close(model(inputs['image'], mask)[mask], outputs['pred_' + variant])


@pytest.mark.parametrize('variant', ['equal', 'unequal'])
@pytest.mark.parametrize('path', fixtures('eva01_mim*.pt'))
def test_loss(path, variant):
    """The loss is EVA's, an average over the hidden patches of the whole batch."""
    model, inputs, outputs = eva(path)
    with torch.no_grad():
        close(loss_of(model, inputs, variant), outputs['loss_' + variant])


@pytest.mark.parametrize('path', fixtures('eva01_mim*.pt'))
def test_gradients(path):
    """Every parameter gets EVA's gradient."""
    model, inputs, outputs = eva(path)
    loss_of(model, inputs, 'equal').backward()
    names = {'cls_token': 'class_token', 'patch_embed.proj.': 'patch_embed.', 'lm_head.': 'head.'}
    ours = {name: weight.grad for name, weight in model.named_parameters()}
    expected = {}
    for name, norm in outputs['grad_norms'].items():
        expected[next((new + name[len(old):] for old, new in names.items() if name.startswith(old)), name)] = norm
    assert ours.keys() == expected.keys()
    for name, norm in expected.items():
        assert abs(ours[name].norm().item() - norm) <= 1e-5 + 1e-4 * norm, name
    close(ours['mask_token'], outputs['grad_mask_token'])
    close(ours['blocks.0.attn.q_bias'], outputs['grad_q_bias_0'])


# ---- OpenAI CLIP

def clip(path):
    config, state, inputs, outputs = read(path)
    model = load_state(state, vision=dict(heads=config['vision_heads']), text=dict(heads=config['transformer_heads']))
    return model, inputs, outputs


@pytest.mark.parametrize('path', fixtures('openai_clip_*tiny*.pt'))
def test_clip_features(path):
    """Both towers give OpenAI's features, not normalised."""
    model, inputs, outputs = clip(path)
    with torch.no_grad():
        close(model.encode_image(inputs['image']), outputs['image_features'])
        close(model.encode_text(inputs['text']), outputs['text_features'])


@pytest.mark.parametrize('path', fixtures('openai_clip_*tiny*.pt'))
def test_clip_logits(path):
    """forward returns what makes OpenAI's logits, both ways."""
    model, inputs, outputs = clip(path)
    with torch.no_grad():
        image_features, text_features, scale = model(inputs['image'], inputs['text'])
    close(image_features.norm(dim=1), torch.ones(len(image_features)))
    close(scale * image_features @ text_features.T, outputs['logits_per_image'])
    close(scale * text_features @ image_features.T, outputs['logits_per_text'])


@pytest.mark.parametrize('path', fixtures('openai_clip_*tiny*.pt'))
def test_clip_patch_tokens(path):
    """The MIM targets are EVA's, at the training resolution and at others."""
    model, inputs, outputs = clip(path)
    sizes = [name[len('patch_tokens'):] for name in outputs if name.startswith('patch_tokens')]
    assert sizes
    with torch.no_grad():
        for size in sizes:
            close(model.patch_features(inputs['image' + size]), outputs['patch_tokens' + size])
