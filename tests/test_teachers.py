"""
One claim a test: EVA-02's first values, and teachers of other families under all names that they come with.
Their numbers are of the original implementations, in the folders that test_golden.py reads.
"""
import gzip
import json
import math
import os
import re

import pytest
import torch

import model as m
from model import Refused, ViT, ViTConfig, config_of, family_of, init_weights, load, save
from test_golden import FOLDERS, close, fixtures, read
from test_model import images, plain, same, tiny

EVA02 = dict(act='swiglu', rope='index', head=5)


# ---- EVA-02

def eva02_variants():
    paths = [param.values[0] for param in fixtures('eva02_init*.json') if param.values[0]]
    variants = [(path, name) for path in paths for name in json.load(open(path))['variants']]
    return variants or [pytest.param(None, None, marks=pytest.mark.skip(reason=f'no eva02_init.json in {FOLDERS}'))]


@pytest.mark.parametrize('path, name', eva02_variants())
def test_eva02_starts_with_its_own_values(path, name):
    """Every tensor has the deviation, the mean and the bound that the original's have, with sub-LN and without."""
    variant = json.load(open(path))['variants'][name]
    told = variant['config']
    model = init_weights(ViT(ViTConfig(
        told['embed_dim'], told['depth'], told['num_heads'], told['mlp_hidden'], told['patch_size'], told['img_size'],
        head=told['predict_feature_dim'], act='swiglu', rope='index', mlp_norm=told.get('subln', False))),
        seed=3)
    rules = m.FAMILIES['EVA-02 MIM' if told.get('subln') else 'EVA-02 small MIM'][1]

    # blocks are pooled, as there
    pooled = {}
    for key, tensor in m.translate_back(plain(model), rules).items():
        pooled.setdefault(re.sub(r'\.\d+\.', '.*.', key), []).append(tensor.flatten())
    assert pooled.keys() == variant['groups'].keys()
    for key, group in variant['groups'].items():
        values = torch.cat(pooled[key])
        assert len(values) == group['values'], key
        if 'constant' in group:
            assert (values == group['constant']).all(), key
            continue
        assert abs(values.std().item() - group['std_avg']) < 5 * group['std_avg'] / (2 * len(values)) ** .5, key
        assert abs(values.mean().item()) < 5 * group['std_avg'] / len(values) ** .5, key
        assert values.abs().max() <= group['theory'].get('bound', math.inf), key


@pytest.mark.parametrize('size, name', dict(ti='tiny', s='small', b='base', l='large').items())
@pytest.mark.parametrize('path', fixtures('keys.json.gz'))
def test_eva02_sizes_are_the_released_ones(path, size, name):
    """A row of EVA02_SIZES makes the model that a released file of this size makes."""
    listing = json.load(gzip.open(path))[f'eva02_{name}_patch14_mim']
    released = m.build({key: torch.empty(shape, device='meta') for key, shape in listing['keys'].items()}, None, {})
    head = listing['keys']['lm_head.weight'][0]
    assert ViTConfig(**config_of(size, 'eva02'), head=head) == released.config


def test_our_eva02_sizes_cost_what_ours_do():
    """nano and micro have SwiGLU and rotary positions at the width, depth and grid of EVA's, and its parameters."""
    for size in ('nano', 'micro'):
        ours, eva = ViTConfig(**config_of(size, 'eva02')), ViTConfig(**config_of(size))
        assert (ours.act, ours.rope, ours.mlp_norm) == ('swiglu', 'index', False)
        parameters = [sum(weight.numel() for weight in ViT(config).parameters()) for config in (ours, eva)]
        assert abs(parameters[0] / parameters[1] - 1) < .005
        assert (ours.width, ours.depth, ours.patch_size) == (eva.width, eva.depth, eva.patch_size)


@pytest.mark.parametrize('size, arch', [('g', 'eva02'), ('pico', 'eva02'), ('huge', 'eva'), ('b', 'eva03')])
def test_unknown_sizes_are_refused(size, arch):
    """In one line that lists what there is."""
    with pytest.raises(Refused, match='nano, micro, ti|pico, 48x4, nano|eva or eva02'):
        config_of(size, arch)


def test_eva02_file_goes_on_with_its_own_architecture(tmp_path):
    """A MIM file under EVA-02's names, with another head and a larger image, hides patches and trains every weight."""
    model, path = tiny(**EVA02, mlp_norm=True), str(tmp_path / 'x.pt')
    save(model, path, names='eva')
    again = load(path, ViT, heads=2, head=7, image_size=24, drop_path=.1)
    assert (again.config.act, again.config.mlp_norm, again.config.rope) == ('swiglu', True, 'index')
    assert torch.equal(again.pos_embed, m.resize_positions(model.pos_embed, (6, 6)))
    mask = torch.arange(36).expand(2, -1) % 2 == 0
    again(images(size=24), mask).pow(2).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in again.named_parameters() if 'qkv' not in name)


def test_eva02_stretches_its_rows_after_pretraining(tmp_path):
    """At another grid a classifier or a detector turns by angles of the pre-training grid; MIM goes on counting."""
    path = str(tmp_path / 'x.pt')
    save(tiny(**EVA02), path)
    assert load(path, image_size=24).config.rope == 'index'
    for pool in ('mean', 'map'):
        assert load(path, pool=pool, head=0, image_size=24).config.rope == 4
    assert load(path, pool='class', rope=16).config.rope == 16


@pytest.mark.parametrize('path', fixtures('eva_clip_rei_eva02*.pt'))
def test_eva02_clip_from_a_mim_file(path, tmp_path):
    """A MIM file with a fresh norm in attention and rows stretched to 16 is the package's tower, given its tensors."""
    config, state, inputs, outputs = read(path)
    heads = config['vision_cfg']['width'] // config['vision_cfg']['head_width']
    theirs = load(path, ViT, heads=heads)
    mim = init_weights(ViT(ViTConfig(**{**vars(theirs.config), 'attn_norm': False, 'rope': 'index', 'pool': None,
                                        'mask_token': True, 'head': 1024})))
    save(mim, str(tmp_path / 'mim.pt'), names='eva')
    tower = load(str(tmp_path / 'mim.pt'), ViT, heads=heads, head=config['embed_dim'], pool='class',
                 mask_token=False, attn_norm=True, rope=16)
    assert (tower.blocks[0].attn.norm.weight == 1).all() and not tower.blocks[0].attn.norm.bias.any()
    assert torch.equal(tower.blocks[0].attn.qkv.weight, mim.blocks[0].attn.qkv.weight)
    tower.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        close(tower(inputs['image']), outputs['image_features'])
        close(tower.tokens(inputs['image']), outputs['tokens_before_norm'])


# ---- teachers: the names of Hugging Face and timm, written out

def thirds(state, name, *names):
    """state with the rows of `name` cut for names; None: left out."""
    state = dict(state)
    pieces = state.pop(name).chunk(3)
    return state | {new: piece.clone() for new, piece in zip(names, pieces) if new}


def renamed(state, pairs):
    """state with regular expressions replaced in its names; what becomes '' is left out."""
    for pattern, new in pairs.items():
        state = {re.sub(pattern, new, name): tensor for name, tensor in state.items()}
    state.pop('', None)
    return state


def dino_in_hugging_face(state):
    is_v3 = 'rope_embed.periods' in state
    stem = 'attention.{}_proj.' if is_v3 else 'attention.attention.{}.'
    q, k, v = (stem.format(word) for word in ('qkv' if is_v3 else ('query', 'key', 'value')))
    for name in list(state):
        block, _, part = name.partition('attn.qkv.')
        if part == 'weight' or part == 'bias':
            no_bias = is_v3 and part == 'bias'
            state = thirds(state, name, block + q + part, None if no_bias else block + k + part, block + v + part)
    common = {r'^(cls_token|mask_token)$': r'embeddings.\1',
              r'^(storage|register)_tokens': 'embeddings.register_tokens',
              r'^pos_embed': 'embeddings.position_embeddings', r'ls(\d).gamma': r'layer_scale\1.lambda1'}
    if is_v3:
        gated = 'mlp.w2' if 'blocks.0.mlp.w2.bias' in state else 'mlp.fc1'
        return renamed(state, common | {
            r'^(rope|local).*|.*bias_mask': '', r'^patch_embed.proj': 'embeddings.patch_embeddings', r'^blocks': 'layer',
            'attn.proj': 'attention.o_proj', gated: 'mlp.up_proj', 'mlp.w1': 'mlp.gate_proj',
            'mlp.(w3|fc2)': 'mlp.down_proj'})
    return renamed(state, common | {
        r'^patch_embed.proj': 'embeddings.patch_embeddings.projection', r'^blocks': 'encoder.layer',
        r'^norm': 'layernorm', 'attn.proj': 'attention.output.dense', 'mlp.w12': 'mlp.weights_in',
        'mlp.w3': 'mlp.weights_out'})


def dino_in_timm(state):
    if 'rope_embed.periods' in state:
        for name in [name for name in state if name.endswith('qkv.bias')]:
            attn = name.removesuffix('qkv.bias')
            state = thirds(state, name, attn + 'q_bias', None, attn + 'v_bias')
        return renamed(state, {r'^(rope|mask).*|.*bias_mask': '', r'ls(\d).gamma': r'gamma_\1', 'w1': 'fc1_g',
                               'w2': 'fc1_x', 'w3': 'fc2', 'storage_tokens': 'reg_token'})
    if 'register_tokens' in state:
        table = state['pos_embed']
        state = state | dict(cls_token=state['cls_token'] + table[:, :1], pos_embed=table[:, 1:].clone())
    return renamed(state, {'^mask_token': '', 'w12': 'fc1', 'w3': 'fc2', 'register_tokens': 'reg_token'})


def siglip_in_timm(state):
    """SigLIP's image tower, of either file, as timm has it."""
    state = renamed({name.removeprefix('vision_model.'): tensor for name, tensor in state.items()}, {
        r'^(text|logit).*': '', '^embeddings.patch_embedding': 'patch_embed.proj', '^post_layernorm': 'norm',
        '^embeddings.position_embedding.weight': 'pos_embed', r'^encoder.layers': 'blocks', r'layer_norm': 'norm',
        'self_attn.out_proj': 'attn.proj', '^head.attention.out_proj': 'attn_pool.proj',
        '^head.probe': 'attn_pool.latent', '^head.layernorm': 'attn_pool.norm', '^head.mlp': 'attn_pool.mlp'})
    state['pos_embed'] = state['pos_embed'][None]
    for name in [name for name in state if 'self_attn.q_proj' in name]:
        parts = [state.pop(name.replace('q_proj', f'{part}_proj')) for part in 'qkv']
        state[name.replace('self_attn.q_proj', 'attn.qkv')] = torch.cat(parts)
    for end in ('weight', 'bias'):
        rows = state.pop('head.attention.in_proj_' + end)
        state[f'attn_pool.q.{end}'], state[f'attn_pool.kv.{end}'] = rows.split([len(rows) // 3, len(rows) // 3 * 2])
    return state


def pe_in_timm(state):
    state = renamed({name.removeprefix('visual.'): tensor for name, tensor in state.items()
                     if name.startswith('visual.')}, {
        '^conv1': 'patch_embed.proj', '^positional_embedding': 'pos_embed', r'^transformer.resblocks': 'blocks',
        'ln_pre': 'norm_pre', 'ln_post': 'norm', 'ln_': 'norm', 'in_proj_': 'qkv.', 'out_proj': 'proj',
        'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2', 'attn_pool.attn': 'attn_pool',
        'attn_pool.layernorm': 'attn_pool.norm', 'attn_pool.probe': 'attn_pool.latent',
        '^class_embedding': 'cls_token'})
    state['pos_embed'] = state['pos_embed'][None]
    state['head.weight'] = state.pop('proj').T.contiguous()
    state['head.bias'] = torch.zeros(len(state['head.weight']))
    if 'cls_token' in state:
        state['cls_token'] = state['cls_token'][None, None]
    for end in ('weight', 'bias'):
        rows = state.pop('attn_pool.qkv.' + end)
        state[f'attn_pool.q.{end}'], state[f'attn_pool.kv.{end}'] = rows.split([len(rows) // 3, len(rows) // 3 * 2])
    return state


def original(state):
    return state


def vision_alone(state):
    """The image tower without the prefix that it has beside a text tower."""
    prefix = 'visual.' if 'visual.conv1.weight' in state else 'vision_model.'
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def in_open_clip(state):
    """timm's tower beside a text tower."""
    tower = pe_in_timm(state) if 'visual.conv1.weight' in state else siglip_in_timm(state)
    return {f'visual.trunk.{name}': tensor for name, tensor in tower.items()} | {
        'text.transformer.resblocks.0.ln_1.bias': torch.zeros(3), 'logit_scale': torch.zeros(()),
        'logit_bias': torch.zeros(())}


FORMS = {
    'dinov*.pt': (original, dino_in_hugging_face, dino_in_timm),
    'siglip_vision*.pt': (original, siglip_in_timm),
    'siglip*.pt': (original, vision_alone, siglip_in_timm, in_open_clip),
    'pe_core*.pt': (original, vision_alone, pe_in_timm, in_open_clip),
}


def teacher_cases():
    """(path, form) of every fixture and every kind of names that its family has."""
    cases = []
    for pattern, forms in FORMS.items():
        paths = [param.values[0] for param in fixtures(pattern) if param.values[0]]
        if pattern == 'siglip*.pt':
            paths = [path for path in paths if 'siglip_vision' not in path]
        cases += [(path, form) for path in paths for form in forms]
    return cases or [pytest.param(None, None, marks=pytest.mark.skip(reason=f'no teachers in {FOLDERS}'))]


CASES = teacher_cases()


def teacher(path, form, tmp_path):
    """-> (a fixture's ViT, read from a file under other names, inputs, outputs)."""
    config, state, inputs, outputs = read(path)
    heads = config.get('num_heads') or config.get('vision_heads') or config['heads']
    file = str(tmp_path / 'teacher.pt')
    torch.save(form(state), file)
    return load(file, heads=heads), inputs, outputs


@pytest.mark.parametrize('path, form', CASES)
def test_teacher_features(path, form, tmp_path):
    """Tokens of patches, classes and registers at every image size and with a mask, by whatever names they came."""
    model, inputs, outputs = teacher(path, form, tmp_path)
    exact = 'patch_tokens_periods_recomputed' in outputs and form is not original
    compared = 0
    with torch.no_grad():
        for name, expected in outputs.items():
            kind, _, size = name.partition('_tokens') if '_tokens' in name else name.partition('_token')
            if kind not in ('patch', 'cls', 'register', 'storage') or exact != ('recomputed' in name):
                continue
            if size == '_masked' and model.mask_token is None:      # timm leaves it out
                continue
            mask = inputs['mask'] if size == '_masked' else None
            image = inputs['image' + size] if 'image' + size in inputs else inputs['image']
            tokens = model.features(image, mask)
            place = dict(patch=slice(model.num_before, None), cls=0).get(kind, slice(1, model.num_before))
            close(tokens[:, place], expected)
            if kind == 'patch' and mask is None:
                close(model.patch_features(image), expected)
            compared += 1
    assert compared


@pytest.mark.parametrize('path', fixtures('pe_core*.pt'))
def test_pe_tokens(path, tmp_path):
    """Before and after the last norm, class token and all, at every image size."""
    model, inputs, outputs = teacher(path, original, tmp_path)
    with torch.no_grad():
        for size in ('', '_wide', '_large'):
            close(model.tokens(inputs['image' + size]), outputs['tokens_before_ln_post' + size])
            close(model.features(inputs['image' + size]), outputs['tokens' + size])


@pytest.mark.parametrize('path', fixtures('dinov2*.pt'))
def test_dinov2_resizes_its_positions_as_the_original(path, tmp_path):
    """On the fly and, to a square, when the file is read."""
    model, inputs, outputs = teacher(path, original, tmp_path)
    for name in [name for name in outputs if name.startswith('pos_embed_')]:
        height, width = inputs[name.replace('pos_embed', 'image')].shape[2:]
        grid = height // model.patch_size, width // model.patch_size
        close(m.resize_positions(model.pos_embed, grid, resize=model.config.resize), outputs[name])
        if height == width:
            again = load(str(tmp_path / 'teacher.pt'), heads=model.config.heads, image_size=height)
            close(again.pos_embed.detach(), outputs[name])


@pytest.mark.parametrize('path, form', CASES)
def test_teacher_through_our_file(path, form, tmp_path):
    """Saved as ours and read again a teacher gives the same features, of images that it has normalised itself."""
    model, inputs, _ = teacher(path, form, tmp_path)
    save(model, str(tmp_path / 'ours.pt'))
    again = load(str(tmp_path / 'ours.pt'))
    same(plain(again), plain(model))
    pixels = torch.randint(0, 256, inputs['image'].shape, dtype=torch.uint8)
    assert again.config.mean in ((.5, .5, .5), (.485, .456, .406))
    assert torch.equal(again.patch_features(again.normalize(pixels)), model.patch_features(model.normalize(pixels)))


def teacher_listings():
    """The real sizes whose rows are teachers'; the CLIPs there are test_golden.py's."""
    paths = [param.values[0] for param in fixtures('keys_teachers*.json.gz') if param.values[0]]
    listings = [pytest.param(path, name, id=name) for path in paths for name in json.load(gzip.open(path))
                if name.startswith(('dinov', 'transformers.', 'PE-'))]
    return listings or [pytest.param(None, None, marks=pytest.mark.skip(reason=f'no keys_teachers in {FOLDERS}'))]


@pytest.mark.parametrize('path, name', teacher_listings())
def test_teacher_names(path, name):
    """On the meta device every name of a real file is taken or left out by its family: text towers, pooling, masks.
    Every parameter of ours is filled, and heads and sizes follow from the shapes."""
    listing = json.load(gzip.open(path))[name]
    state = {key: torch.empty(shape, device='meta') for key, shape in listing['keys'].items()}
    model = m.build(state, None, {})
    _, key_biases, dropped = m.translate(state, m.FAMILIES[family_of(state)][1])
    needed = re.compile(r'(vision_model|visual)\.(?!head\.|attn_pool\.|proj$)|(blocks|layer|norm|embeddings)\b')
    assert not [key for key in dropped if needed.match(key) and not key.endswith('bias_mask')]
    lost = sum(bias.numel() for bias in key_biases.values())
    lost += sum(state[key].numel() for key in dropped if key not in listing['buffers'])
    without_class = 0 if model.config.class_token else model.config.width           # a row of the table
    assert sum(weight.numel() for weight in model.parameters()) == listing['parameters'] - lost + without_class

    told = listing['config'].get('vision_cfg') or listing['config'].get('vision_config') or listing['config']
    heads = told.get('heads') or told.get('num_heads') or told['num_attention_heads']
    size = told.get('img_size') or told['image_size']
    patch = model.config.patch_size
    assert (model.config.heads, model.grid) == (heads, size // patch)


@pytest.mark.parametrize('path', fixtures('keys_teachers*.json.gz'))
def test_largest_dinov3_in_hugging_face(path):
    """The 7B has 32 heads, which its own file's periods show and Hugging Face's names do not."""
    listing = json.load(gzip.open(path))['dinov3_vit7b16']
    state = {key: torch.empty(shape, device='meta') for key, shape in listing['keys'].items()}
    assert m.build(dino_in_hugging_face(state), None, {}).config == m.build(state, None, {}).config


def test_teacher_kinds_know_their_pixels():
    """The mean and deviation of images, which no tensor shows, are the family's; DINOv3 has satellite images too."""
    expected = {'DINOv3 of': .43, 'DINO': .485, 'Hugging Face DINO': .485, 'SigLIP': .5, 'PE': .5}
    for family, (_, _, options) in m.FAMILIES.items():
        for start, mean in expected.items():
            if family.startswith(start):
                assert options['mean'][0] == mean, family
                break


# ---- options that they bring

def test_registers_have_no_place(double):
    """They stand between the class token and the patches, are not turned, and patch_features leaves them out."""
    model = tiny(registers=3, rope='unit', pos_embed=False)
    tokens = model.embed(images().double(), (4, 4), None, None)
    assert model.num_before == 4 and tokens.shape == (2, 20, 16)
    assert torch.equal(tokens[0, 1:4], model.registers[0]) and torch.equal(tokens[0, :1], model.class_token[0])
    assert not m.rotary_positions((4, 4), 8, 'unit', num_before=4)[1, :4].any()
    assert model.patch_features(images().double()).shape == (2, 16, 16)


@pytest.mark.parametrize('options', [dict(registers=3), dict(class_token=False), dict(class_token=False, registers=2)])
@pytest.mark.parametrize('rope', ['unit', 'columns', 'index'])
def test_keep_takes_angles_along_with_registers(options, rope, double):
    """All patches kept in another order are the same tokens in that order."""
    model, x = tiny(**options, rope=rope), torch.randn(2, 3, 24, 16)                          # 6 x 4 patches
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    before = model.num_before
    everything = model.tokens(x)[:, before:].gather(1, order[:, :, None].expand(-1, -1, 16))
    torch.testing.assert_close(model.tokens(x, keep=order)[:, before:], everything, atol=1e-9, rtol=0)


def test_unit_positions_do_not_depend_on_the_image_size():
    """The corners of every grid come nearer to +-1 as it grows, and turn by periods from 1 to 100, or a file's own."""
    angle = lambda grid, **options: torch.atan2(*m.rotary_positions(grid, 8, 'unit', **options)[:, 1].flip(0))
    first = 2 * math.pi * (1 / 2 - 1)                  # of a 2 x 2 grid's first patch, at period 1
    turned = [first, first / 10, first, first / 10]
    expected = [math.atan2(math.sin(x), math.cos(x)) for x in turned]
    torch.testing.assert_close(angle((2, 2)).abs(), torch.tensor(expected).abs(), atol=1e-5, rtol=0)
    own = angle((2, 2), periods=(4., 10.))
    torch.testing.assert_close(own, torch.tensor([first / 4, first / 10] * 2), atol=1e-5, rtol=0)


def test_key_bias_matters_under_rotary_positions(double):
    """With them an option adds it; without them no output changes."""
    for rope, matters in (('columns', True), (None, False)):
        model = tiny(biases='qkv', rope=rope)
        before = model(images().double())
        model.blocks[0].attn.k_bias.data.add_(1)
        assert (model(images().double()) - before).abs().max().gt(1e-6) == matters


def test_registers_can_be_added(tmp_path):
    """A file without them is read with fresh ones, the rest as it was."""
    path, model = str(tmp_path / 'x.pt'), tiny()
    save(model, path)
    again = load(path, registers=2)
    assert again.registers.std() > 0 and torch.equal(again.pos_embed, model.pos_embed)
    assert again.patch_features(images()).shape == (2, 16, 16)


@pytest.mark.parametrize('options', [
    dict(pool='mean', head=5), dict(pool='class', head=5), dict(pool='map'), dict(head=9)])
def test_teachers_start_other_models(tmp_path, options):
    """A ViT with registers and without a table of positions becomes a classifier, a map, a student at another size."""
    path = str(tmp_path / 'x.pt')
    save(tiny(registers=3, rope='unit', pos_embed=False), path)
    model = load(path, **options, mask_token=False, image_size=24)
    shape = dict(mean=(2, 5), map=(2, 16, 6, 6), **{'class': (2, 5)}).get(options.get('pool'), (2, 36, 9))
    assert model(images(size=24)).shape == shape


# ---- what is refused

@pytest.mark.parametrize('options, words', [
    (dict(class_token=False, pool='class'), "pool='mean'"), (dict(pos_embed=False, frames=2), 'clips'),
    (dict(rope='unit', periods=(1.,)), '1 periods do not fit heads of 8 channels'),
    (dict(registers=-1), 'registers -1'), (dict(biases='k'), 'biases'), (dict(resize='nearest'), 'resize'),
    (dict(rope='unit', periods=(0., 1.)), 'periods')])
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(Refused, match=words):
        ViTConfig(16, 2, 2, 32, 4, 16, **options)


@pytest.mark.parametrize('name', [
    'text_model.embeddings.token_embedding.weight', 'token_embedding.weight', 'embeddings.word_embeddings.weight'])
def test_text_tower_is_no_teacher(tmp_path, name):
    """CLIP's, SigLIP's or BERT's text tower alone is refused for what it is."""
    path = str(tmp_path / 'x.pt')
    torch.save({name: torch.zeros(9, 4), 'encoder.layers.0.layer_norm1.bias': torch.zeros(4)}, path)
    with pytest.raises(Refused, match='a text tower .*; give the file of an image tower'):
        load(path)


def test_unknown_family_is_told_the_known(tmp_path):
    """In one line."""
    path = str(tmp_path / 'x.pt')
    torch.save({'stages.0.conv.weight': torch.zeros(4)}, path)
    with pytest.raises(Refused, match='known are nanoEVA.*DINOv2, DINOv3, SigLIP, SigLIP 2, PE') as error:
        load(path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('path', fixtures('dinov3_mlp*.pt'))
def test_key_biases_without_a_mask_are_refused(path, tmp_path):
    """DINOv3's mask takes its key biases away; one trained without it needs them."""
    state = {name: tensor for name, tensor in read(path)[1].items() if not name.endswith('bias_mask')}
    torch.save(state, str(tmp_path / 'x.pt'))
    with pytest.raises(Refused, match='key biases'):
        load(str(tmp_path / 'x.pt'))


@pytest.mark.parametrize('path, form', CASES)
def test_family_is_named(path, form, tmp_path, capsys):
    """Reading a file, as python model.py FILE does, says whose it is."""
    teacher(path, form, tmp_path)
    kinds = dict(dinov3='DINOv3', dinov2='DINOv2', siglip='SigLIP', pe_core='PE-Core')
    kind = next(kind for start, kind in kinds.items() if os.path.basename(path).startswith(start))
    assert kind in capsys.readouterr().out.partition(' weights')[0]
