"""
Numbers that the original implementations gave. Fixtures lie in the folders named by GOLDEN (':' between them,
tests/golden if it is not set); a file that is not there skips its tests.
"""
import glob
import gzip
import json
import os

import pytest
import torch
import torch.nn.functional as F

import model as m
from model import FAMILIES, CLIPConfig, family_of, load, translate_back

FOLDERS = os.environ.get('GOLDEN', os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')).split(':')
TOLERANCE = dict(atol=2e-5, rtol=0)


def fixtures(*patterns, but='~'):
    paths = sorted(path for folder in FOLDERS for pattern in patterns
                   for path in glob.glob(os.path.join(folder, pattern)) if but not in os.path.basename(path))
    if not paths:
        reason = f'no {patterns} in {FOLDERS}'
        return [pytest.param(None, id=' '.join(patterns), marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=os.path.basename(path)) for path in paths]


def read(path):
    fixture = torch.load(path, weights_only=True)
    return fixture['config'], fixture['state_dict'], fixture['inputs'], fixture['outputs']


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def vit(path):
    """A fixture's ViT; its tensors do not show how many heads it has."""
    config, state, inputs, outputs = read(path)
    return load(path, heads=config['num_heads']), inputs, outputs


def check_gradients(path, model, norms):
    """Norms of the parameters' gradients, under the file's names: the table that reads weights names gradients too."""
    grads = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad
             for name, weight in model.named_parameters()}
    theirs = translate_back(grads, FAMILIES[family_of(read(path)[1])][1])
    assert theirs.keys() == norms.keys()
    for name, norm in norms.items():
        assert abs(theirs[name].norm().item() - norm) <= 1e-5 + 1e-4 * norm, name


# ---- masked image modelling: EVA-01 and EVA-02

MIM = fixtures('eva01_mim*.pt', 'eva02_mim*.pt')


def loss_of(model, inputs, variant):
    """The loss that mim_pretrain trains with; their targets hold the hidden patches only."""
    from mim_pretrain import mim_loss
    mask = inputs['mask_' + variant]
    predictions = model(inputs['image'], mask)
    targets = torch.zeros_like(predictions)
    targets[mask] = inputs['target_' + variant]
    return mim_loss(predictions, targets, mask, mask.sum())


@pytest.mark.parametrize('variant', ['equal', 'unequal'])
@pytest.mark.parametrize('path', MIM)
def test_tokens_and_predictions(path, variant):
    """Masked images become EVA's tokens and predictions, also when images hide unequal numbers of patches."""
    model, inputs, outputs = vit(path)
    mask = inputs['mask_' + variant]
    with torch.no_grad():
        close(model.features(inputs['image'], mask), outputs['tokens_' + variant])
        close(model(inputs['image'], mask)[mask], outputs['pred_' + variant])


@pytest.mark.parametrize('variant', ['equal', 'unequal'])
@pytest.mark.parametrize('path', MIM)
def test_loss(path, variant):
    """The loss is EVA's, an average over the hidden patches of the whole batch."""
    model, inputs, outputs = vit(path)
    with torch.no_grad():
        close(loss_of(model, inputs, variant), outputs['loss_' + variant])


@pytest.mark.parametrize('path', MIM)
def test_gradients(path):
    """Every parameter gets EVA's gradient."""
    model, inputs, outputs = vit(path)
    loss_of(model, inputs, 'equal').backward()
    check_gradients(path, model, outputs['grad_norms'])
    for name, ours in (('grad_mask_token', model.mask_token), ('grad_q_bias_0', model.blocks[0].attn.q_bias)):
        if name in outputs:
            close(ours.grad, outputs[name])


@pytest.mark.parametrize('path', fixtures('eva01_mim*.pt'))
def test_gradients_with_a_tenth_for_the_patch_embedding(path):
    """EVA's stop_grad_conv1 in pre-training: only the patch embedding's gradient shrinks, tenfold."""
    model, inputs, outputs = vit(path)
    model.patch_embed.register_forward_hook(lambda module, inputs, output: output.detach() * 0.9 + output * 0.1)
    loss_of(model, inputs, 'equal').backward()
    check_gradients(path, model, outputs['grad_norms_stop_grad_conv1'])


@pytest.mark.parametrize('path', fixtures('eva01_mae*.pt'))
def test_encoder_of_the_masked_autoencoder(path):
    """EVA-L's encoder of the kept patches, in the order of the noise; its positions are the sin-cos table."""
    config, state, inputs, outputs = read(path)
    model = load(path, heads=config['num_heads'])
    N = config['num_patches']
    assert m.sincos_positions(config['embed_dim'], model.grid).sub(model.pos_embed).abs().max() < 1e-6
    for suffix in [name[len('mask_ratio'):] for name in config if name.startswith('mask_ratio')]:
        keep = inputs['noise'].argsort(dim=1)[:, :int(N * (1 - config['mask_ratio' + suffix]))]
        assert torch.equal(keep, outputs['ids_keep' + suffix])
        with torch.no_grad():
            close(model.features(inputs['image'], keep=keep), outputs['latent' + suffix])


# ---- classifiers: EVA-01 and timm

@pytest.mark.parametrize('path', fixtures('eva01_cls*.pt', 'timm_eva*.pt'))
def test_classifier(path):
    """Tokens, pooled features and logits, by the average patch or the class token, whichever the file has."""
    model, inputs, outputs = vit(path)
    mean, image = model.pool == 'mean', inputs['image']
    with torch.no_grad():
        tokens = model.tokens(image)
        pooled = model.norm(tokens[:, 1:].mean(1) if mean else tokens[:, 0])
        close(model(image), outputs['logits'])
        close(pooled, outputs['features' if 'features' in outputs else 'pre_logits'])
        if 'tokens' in outputs:
            close(tokens if mean else model.norm(tokens), outputs['tokens'])     # no norm before timm's average
        if 'patch_features' in outputs:
            close(model.norm(tokens)[:, 1:], outputs['patch_features'])


@pytest.mark.parametrize('stopped', [False, True])
@pytest.mark.parametrize('path', fixtures('eva01_cls*.pt'))
def test_classifier_gradients(path, stopped):
    """Cross-entropy and its gradients; stopped, as EVA fine-tunes, the patch embedding gets none."""
    model, inputs, outputs = vit(path)
    if stopped:
        model.patch_embed.register_forward_hook(lambda module, inputs, output: output.detach())
    loss = F.cross_entropy(model(inputs['image']), inputs['labels'])
    close(loss.detach(), outputs['loss_ce'])
    loss.backward()
    check_gradients(path, model, outputs['grad_norms_stop_grad_conv1' if stopped else 'grad_norms'])


@pytest.mark.parametrize('path', fixtures('eva01_pretrain_to_cls*.pt'))
def test_classifier_from_pretraining(path):
    """Fine-tuning takes what EVA takes from a pre-trained file, at a larger image: the rest starts afresh."""
    config, state, inputs, outputs = read(path)
    model = load(path, heads=config['num_heads'], image_size=config['finetune_img_size'], pool='mean',
                 head=config['num_classes'], mask_token=False)
    close(model.pos_embed.detach(), outputs['pos_embed'])
    fresh = {name[len('fresh.'):]: tensor for name, tensor in inputs.items() if name.startswith('fresh.')}
    assert fresh.keys() == outputs['missing_keys'].keys()
    for name, ours in (('fc_norm.weight', model.norm.weight), ('fc_norm.bias', model.norm.bias),
                       ('head.weight', model.head.weight), ('head.bias', model.head.bias)):
        assert not torch.equal(ours, fresh[name])
        ours.data.copy_(fresh[name])
    with torch.no_grad():
        close(model(inputs['image']), outputs['logits'])


# ---- resizing

@pytest.mark.parametrize('path', fixtures('eva01_resize*.pt'))
def test_resizing(path):
    """Position tables and patch kernels resize as EVA's scripts do it, half precision too."""
    _, _, inputs, outputs = read(path)
    for name, theirs in outputs.items():                         # x_to_6x6 comes from x, the others from x_OTHERSIZE
        stem, _, size = name.replace('_to_', '_').rpartition('_')
        source = stem if '_to_' in name else next(given for given in inputs if given.rpartition('_')[0] == stem
                                                  and given[-1].isdigit())
        resize = m.resize_patches if 'kernel' in name else m.resize_positions
        ours = resize(inputs[source], int(size) if 'kernel' in name else [int(side) for side in size.split('x')])
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


# ---- CLIPs

CLIPS = fixtures('openai_clip*.pt', 'hf_clip*.pt', 'eva_clip*.pt', but='jit')


def heads_of(config):
    """The heads of both towers and the order of the norms, which tensors do not show, in each fixture's words."""
    vision, text = config.get('vision_cfg', config), config.get('text_cfg', config)
    if 'head_width' in vision:
        vision = dict(heads=vision['width'] // vision['head_width'], post_norm=vision.get('postnorm', False))
    else:
        vision = dict(heads=vision['vision_heads'])
    return dict(vision=vision, text=dict(heads=next(text[name] for name in ('heads', 'text_heads', 'transformer_heads')
                                                    if name in text)))


def clip(path):
    config, state, inputs, outputs = read(path)
    return load(path, **heads_of(config)), inputs, outputs


def check_clip(model, inputs, outputs):
    with torch.no_grad():
        close(model.encode_image(inputs['image']), outputs['image_features'])
        close(model.encode_text(inputs['text']), outputs['text_features'])
        image_features, text_features, scale = model(inputs['image'], inputs['text'])
    close(image_features.norm(dim=1), torch.ones(len(image_features)))
    close(scale * image_features @ text_features.T, outputs['logits_per_image'])
    pairs = {'logits_per_text': scale * text_features @ image_features.T, 'logit_scale_exp': scale[0],
             'image_features_normalized': image_features, 'image_embeds_normalized': image_features,
             'text_features_normalized': text_features, 'text_embeds_normalized': text_features}
    for name in outputs.keys() & pairs.keys():
        close(pairs[name].detach(), outputs[name])


@pytest.mark.parametrize('path', CLIPS)
def test_clip(path):
    """Both towers' features, not normalised and normalised, the scale and the logits both ways."""
    check_clip(*clip(path))


@pytest.mark.parametrize('path', fixtures('open_clip*.pt'))
@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
def test_clip_with_either_activation(path, act):
    """OpenCLIP's names serve two activations; the caller says which."""
    config, state, inputs, outputs = read(path)
    told = heads_of(config)
    model = load(path, vision=dict(act=act, **told['vision']), text=dict(act=act, **told['text']))
    check_clip(model, inputs, outputs['gelu_erf' if act == 'gelu' else act])


@pytest.mark.parametrize('path', CLIPS)
def test_clip_tokens(path):
    """The MIM targets, at the training resolution and at others, and the tokens before the last norm."""
    model, inputs, outputs = clip(path)
    with torch.no_grad():
        for name in outputs:
            if name.startswith('patch_tokens'):
                close(model.patch_features(inputs['image' + name[len('patch_tokens'):]]), outputs[name])
            elif name in ('vision_last_hidden_state', 'tokens_before_norm'):
                close(model.visual.tokens(inputs['image']), outputs[name])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('path', fixtures('openai_clip*jit*.pt'))
def test_torchscript_archive(path):
    """OpenAI's container holds what torch.jit finds in it, to the bit."""
    archive = load(path)
    other = m.build(torch.jit.load(path, map_location='cpu').state_dict(), None, {})
    assert archive.config == other.config
    for name, tensor in other.state_dict().items():
        assert torch.equal(archive.state_dict()[name], tensor), name


# ---- the released sizes

TEACHERS = ('dinov', 'transformers.', 'PE-')      # of the teachers' listing, which test_teachers.py reads


def listing_tests():
    paths = [param.values[0] for param in fixtures('keys*.json.gz') if param.values[0]]
    listings = [(path, name) for path in paths for name in json.load(gzip.open(path))]
    listings = [(path, name) for path, name in listings if not name.startswith(TEACHERS) or 'teachers' not in path]
    if not listings:
        return [pytest.param(None, None, id='keys.json.gz', marks=pytest.mark.skip(reason=f'not in {FOLDERS}'))]
    return [pytest.param(path, name, id=f'{os.path.basename(path)}-{name}') for path, name in listings]


@pytest.mark.parametrize('path, name', listing_tests())
def test_released_names(path, name):
    """On the meta device, every name of a released model is taken or listed as dropped, every parameter of ours filled,
    none lost but key biases and a decoder, and the tables read backwards give the listing again. Heads and the order of
    the norms follow from the sizes."""
    listing = json.load(gzip.open(path))[name]
    state = {key: torch.empty(shape, device='meta') for key, shape in listing['keys'].items()}
    family = family_of(state)
    _, key_biases, _ = m.translate(state, FAMILIES[family][1])
    model = m.build(state, None, {})
    dropped = [key for key in state if 'decoder' in key or 'mae_pretrain' in name and key == 'mask_token']
    lost = sum(bias.numel() for bias in key_biases.values()) + sum(state[key].numel() for key in dropped)
    assert sum(weight.numel() for weight in model.parameters()) == listing['parameters'] - lost
    if name.endswith('ViT-L/14'):
        assert lost == 33_792

    # backwards, by name; and by what `save` means with 'eva' and 'openai'
    ways = [translate_back(model.state_dict(), FAMILIES[family][1])]
    if (family.startswith('EVA-01') or name.startswith('eva02')) and 'timm.eva02' not in name:
        ways.append(m.export(model, 'eva'))
    if family.startswith('OpenAI'):
        ways.append(m.export(model, 'openai'))
    expected = {key: shape for key, shape in listing['keys'].items() if key not in [*dropped, *listing['buffers']]}
    if 'text.logit_scale' in expected:                # the first package's place for it; ours writes the second's
        expected['logit_scale'] = expected.pop('text.logit_scale')
    for theirs in ways:
        assert {key: list(tensor.shape) for key, tensor in theirs.items()} == expected

    config = listing['config']
    towers = vars(model.config) if isinstance(model.config, CLIPConfig) else dict(vision=model.config)
    assert towers['vision'].width != 1408 or towers['vision'].heads == 16
    for tower, options in heads_of(config).items() if 'vision_cfg' in config else ():
        assert options.items() <= vars(towers[tower]).items()
