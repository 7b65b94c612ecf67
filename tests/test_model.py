"""One claim a test: sizes, the ViT's options, initial weights, files, probes."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import model as m
import run
from model import CLIP, CLIPConfig, SIZES, Refused, TextConfig, TextTower, ViT, ViTConfig, init_weights, load, save

TINY = dict(width=16, depth=3, heads=2, mlp_width=32, patch_size=4, image_size=16)      # N = 16
TEXT = dict(width=16, depth=2, heads=2, vocab=30, embed=8, context=12)


def tiny(seed=0, **options):
    """A small ViT whose every weight matters: biases, tokens and norms are random too."""
    model = ViT(ViTConfig(**{**TINY, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def images(count=2, size=16, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def plain(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def close(a, b):
    """Equal in float64, whatever the order in which sums were taken: see the fixture `double`."""
    assert a.dtype == b.dtype == torch.float64
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- sizes

def test_g_has_the_papers_parameters():
    """EVA-g with its 768 wide prediction head: the number in EVA's log."""
    with torch.device('meta'):
        assert run.count_parameters(ViT(ViTConfig(**SIZES['g'], head=768))) == 1_012_229_632


@pytest.mark.parametrize('size, gigaflops', [('l', 162), ('g', 534)])
def test_flops(size, gigaflops):
    assert abs(run.flops_per_image(ViTConfig(**SIZES[size])) / 1e9 - gigaflops) < 1


def test_flops_are_those_torch_counts():
    """Equal to torch's own counter, head included."""
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny(head=8)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(images(1))
    assert counter.get_total_flops() == run.flops_per_image(model.config)


# ---- the ViT

def test_block_is_the_plain_formula(double):
    """Attention and MLP written out, with the absent key bias as zeros."""
    model = tiny(layer_scale=0.5)
    block, x = model.blocks[0], torch.randn(2, 5, 16)
    y = F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (y @ block.attn.qkv.weight.T).split(16, dim=-1)
    q, v = q + block.attn.q_bias, v + block.attn.v_bias
    heads = []
    for q, k, v in zip(q.split(8, dim=-1), k.split(8, dim=-1), v.split(8, dim=-1)):      # two heads of 8
        heads.append((q @ k.transpose(1, 2) / 8 ** 0.5).softmax(-1) @ v)
    x1 = x + block.gamma_1 * block.attn.proj(torch.cat(heads, -1))
    y = F.layer_norm(x1, (16,), block.norm2.weight, block.norm2.bias, 1e-6)
    expected = x1 + block.gamma_2 * block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
    close(block(x), expected)


def test_patches_go_row_by_row(double):
    """Without blocks, token 1 + N is the patch at row N // grid, column N % grid."""
    model = tiny(depth=0)
    x, weight = images(1), model.patch_embed.weight.flatten(1)
    patch = x[0, :, 4:8, 8:12].flatten()                                  # row 1, column 2
    expected = weight @ patch + model.patch_embed.bias + model.pos_embed[0, 1 + 4 + 2]
    close(model.tokens(x)[0, 1 + 4 + 2], expected)


def test_keeping_all_tokens_is_keeping_nothing_back():
    """keep with every index equals no keep."""
    model, x = tiny(), images()
    assert torch.equal(model.tokens(x, keep=torch.arange(16).expand(2, 16)), model.tokens(x))


def test_keep_follows_the_order_of_its_indices(double):
    """Patches have their positions before they are gathered, so their order does not matter to each of them."""
    model, x = tiny(), images()
    a, b = model.tokens(x, keep=torch.tensor([[3, 7, 9]] * 2)), model.tokens(x, keep=torch.tensor([[9, 3, 7]] * 2))
    close(a[:, [0, 3, 1, 2]], b)


def test_hidden_pixels_are_not_seen():
    """A hidden patch's pixels change no token; a visible patch's do."""
    model, x = tiny(), images(1)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True                                                     # row 1, column 1
    before = model.tokens(x, mask)
    x[:, :, 4:8, 4:8] += 1
    assert torch.equal(model.tokens(x, mask), before)
    x[:, :, 4:8, 8:12] += 1
    assert not torch.equal(model.tokens(x, mask), before)


def test_mask_comes_before_positions():
    """Without blocks, a hidden patch's token is mask token plus position."""
    model = tiny(depth=0)
    tokens = model.tokens(images(1), mask=torch.ones(1, 16, dtype=torch.bool))
    assert torch.equal(tokens[:, 1:], model.mask_token + model.pos_embed[:, 1:])


def test_dropped_branches_are_skipped(double):
    """drop removes a branch below its layer's rate, 0 to drop_path, and multiplies the others by 1 / (1 - rate)."""
    model, x = tiny(drop_path=0.5), images(1)                             # rates 0, .25, .5
    drop = torch.tensor([[[0., 0.], [0.2, 0.3], [0.5, 0.4]]])
    expected = model.patch_embed(x).flatten(2).transpose(1, 2)
    expected = torch.cat((model.class_token, expected), 1) + model.pos_embed
    for block, (attn, mlp) in zip(model.blocks, ((1, 1), (0, 1 / 0.75), (2, 0))):
        expected = expected + attn * block.attn(block.norm1(expected))
        expected = expected + mlp * block.mlp(block.norm2(expected))
    close(model.tokens(x, drop=drop), expected)


def test_pooling(double):
    """None is every patch, 'class' the first token, 'mean' the patches' average, normed after it."""
    model, x = tiny(head=5), images()
    tokens = model.tokens(x)
    close(model(x), model.head(model.norm(tokens))[:, 1:])
    model.pool = 'class'
    close(model(x), model.head(model.norm(tokens))[:, 0])
    model.pool = 'mean'
    close(model(x), model.head(model.norm(tokens[:, 1:].mean(1))))
    close(model.patch_features(x), model.head(model.norm(tokens))[:, 1:])


def test_own_grid_keeps_positions():
    """Resizing to the same grid returns the same numbers."""
    positions = torch.randn(1, 17, 8)
    assert torch.equal(m.resize_positions(positions, (4, 4)), positions)


def test_resized_positions_keep_class_row_and_row_order(double):
    """A table that rises from row to row still does after resizing to a grid that is not square."""
    positions = torch.cat((torch.tensor([7.]), torch.arange(4.).repeat_interleave(4))).view(1, 17, 1)
    resized = m.resize_positions(positions, (8, 3))
    assert resized.shape == (1, 25, 1) and resized[0, 0, 0] == 7
    rows = resized[0, 1:, 0].view(8, 3)
    assert (rows.diff(dim=0)[1:-1] > 0).all() and torch.allclose(rows[:, :1].expand(-1, 3), rows, atol=1e-9)


def test_any_multiple_of_the_patch_is_an_image():
    """Other sizes run, also oblong ones; what the patch does not divide is refused with the nearest sizes."""
    model = tiny()
    assert model.features(torch.randn(1, 3, 24, 8)).shape == (1, 1 + 6 * 2, 16)
    with pytest.raises(Refused, match='image_size 18 is not a multiple of 4; use 16 or 20'):
        model.tokens(torch.randn(1, 3, 18, 16))


def test_what_does_not_divide_is_refused():
    """A width that its heads do not divide, and a head whose pairs rotary positions cannot share."""
    with pytest.raises(Refused, match='width 16 is not a multiple of heads 3'):
        tiny(heads=3)
    with pytest.raises(Refused, match='width 16 / heads 8 must divide by 4'):
        tiny(heads=8, rope='index')


def test_normalize(double):
    """Bytes become (x / 255 - mean) / std."""
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.tensor(m.CLIP_MEAN).view(3, 1, 1), torch.tensor(m.CLIP_STD).view(3, 1, 1)
    close(tiny().normalize(x), (x / 255 - mean) / std)


# ---- text and CLIP

def test_text_stops_at_the_longest_caption(double):
    """What follows the end token does not matter, and neither does how long the other texts of the batch are."""
    model = init_weights(CLIP(CLIPConfig(dict(**TINY, head=8, pool='class'), TEXT))).text
    text = torch.tensor([[28, 3, 4, 29, 0, 0, 0, 0, 0, 0, 0, 0], [28, 5, 6, 7, 8, 9, 3, 29, 0, 0, 0, 0]])
    together = model(text)
    full = model(F.pad(text[:, :11], (0, 1), value=0))
    assert torch.equal(together, full)
    close(torch.cat([model(row[None]) for row in text]), together)
    x = model.token_embed(text) + model.pos_embed                        # nothing cut off
    for block in model.blocks:
        x = block(x)
    close(together, model.head(model.norm(x))[[0, 1], [3, 7]])


def test_text_is_causal():
    """A token changes only what follows it."""
    block, x = TextTower(TextConfig(**TEXT)).blocks[0], torch.randn(1, 6, 16)
    before = block(x)
    x[:, 3] *= -1               # a norm would take away what is added to all channels
    assert torch.equal(block(x)[:, :3], before[:, :3]) and not torch.equal(block(x)[:, 4], before[:, 4])


# ---- initial weights

def test_initial_std_is_the_truncated_one():
    """EVA truncates its normal of .015 at one standard deviation: .0081 comes out; narrower models start from .02, and
    ours of up to 192 from .56 / sqrt(width)."""
    small = init_weights(ViT(ViTConfig(**SIZES['nano'])))
    assert abs(small.blocks[1].mlp.fc1.weight.std().item() / (.56 / 8 * .5396) - 1) < 0.02
    for width, realised in ((1408, 0.0081), (384, 0.0108)):
        model = init_weights(ViT(ViTConfig(**{**SIZES['g'], 'width': width, 'depth': 2})))
        assert abs(model.blocks[1].mlp.fc1.weight.std().item() - realised) < 1e-4
        assert abs(model.blocks[1].mlp.fc2.weight.std().item() - realised / 2) < 1e-4           # sqrt(2 * layer 2)
        assert abs(model.blocks[0].attn.proj.weight.std().item() - realised / math.sqrt(2)) < 1e-4
        assert model.blocks[0].attn.q_bias.abs().max() == 0 and (model.norm.weight == 1).all()


def test_initial_gain_is_over_the_root_of_the_width():
    """At any width; what is added to the residual is divided by depth as before."""
    for width in (64, 384):
        model = init_weights(ViT(ViTConfig(**{**SIZES['nano'], 'width': width})), gain=1.9)
        assert abs(model.blocks[1].mlp.fc1.weight.std().item() * width ** .5 / (1.9 * .5396) - 1) < 0.02
        assert abs(model.blocks[1].mlp.fc2.weight.std().item() * (4 * width) ** .5 / (1.9 * .5396) - 1) < 0.02


def test_initial_weights_are_a_function_of_the_seed():
    build = lambda: CLIP(CLIPConfig(dict(**TINY, head=8, pool='class'), TEXT))
    torch.manual_seed(1)
    a, b, c = plain(init_weights(build(), 5)), plain(init_weights(build(), 5)), plain(init_weights(build(), 6))
    same(a, b)
    assert not torch.equal(a['text.head.weight'], c['text.head.weight'])


def test_small_models_start_from_sincos():
    """Neighbouring patches start with nearby positions; the class token's row is zero."""
    table = init_weights(ViT(ViTConfig(**TINY))).pos_embed[0]
    assert table[0].abs().max() == 0 and len(table.unique(dim=0)) == 17
    near, far = (table[1] - table[2]).norm(), (table[1] - table[4]).norm()
    assert near < far


# ---- files

def test_round_trip_is_exact(tmp_path):
    """save and load keep class, config, extras and every bit."""
    path = str(tmp_path / 'x.pt')
    clip = init_weights(CLIP(CLIPConfig(dict(**TINY, head=8, pool='class'), TEXT)))
    for model in (tiny(head=3, layer_scale=0.1), clip):
        save(model, path, merges=['a b'])
        loaded = load(path)
        same(plain(model), plain(loaded))
        assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
        assert loaded.extra == dict(merges=['a b'])


def test_other_image_size_resizes_positions(tmp_path):
    path, model = str(tmp_path / 'x.pt'), tiny()
    save(model, path)
    loaded = load(path, image_size=24)
    assert loaded.grid == 6 and torch.equal(loaded.pos_embed, m.resize_positions(model.pos_embed, (6, 6)))


def test_new_head_starts_afresh(tmp_path):
    """A classifier from a pre-trained file: new head and norm, no mask token, everything else from the file."""
    path, model = str(tmp_path / 'x.pt'), tiny(head=8)
    save(model, path)
    loaded = load(path, head=5, pool='mean', mask_token=False)
    assert loaded.head.weight.shape == (5, 16) and (loaded.norm.weight == 1).all() and loaded.mask_token is None
    kept, before = plain(loaded), plain(model)
    for name in kept:
        assert name.startswith(('head', 'norm')) or torch.equal(kept[name], before[name]), name


def test_a_head_stays_where_it_fits(tmp_path):
    """The same width keeps it; another width or pooling starts afresh; 0 drops it; not told is as in the file."""
    path, model = str(tmp_path / 'x.pt'), tiny(head=8)
    save(model, path)
    for changes in ({}, dict(head=8), dict(image_size=24)):
        assert torch.equal(load(path, **changes).head.weight, model.head.weight)
    assert isinstance(load(path, head=0).head, torch.nn.Identity)
    for changes in (dict(head=5), dict(pool='class')):
        head = load(path, **changes).head
        assert head.weight.std() < 0.1 and not head.bias.any()                # tiny's has .3


def test_a_clips_file_has_an_image_tower(tmp_path):
    """It loads as a ViT, with what was saved beside the CLIP, and changes like any other."""
    path, model = str(tmp_path / 'x.pt'), init_weights(CLIP(CLIPConfig(dict(**TINY, head=8, pool='class'), TEXT)))
    save(model, path, merges=['a b'])
    tower = load(path, ViT)
    same(plain(tower), plain(model.visual))
    assert tower.extra == dict(merges=['a b']) and tower.config == model.config.vision
    assert load(path, ViT, head=0, pool=None, drop_path=0.2).width == 16


def test_clip_changes_by_tower(tmp_path):
    """Its image tower's positions and patches are resized too, and its heads stay."""
    path, model = str(tmp_path / 'x.pt'), init_weights(CLIP(CLIPConfig(dict(**TINY, head=8, pool='class'), TEXT)))
    save(model, path)
    other = load(path, CLIP, vision=dict(patch_size=8, drop_path=0.1), text=dict(heads=4))
    assert other.visual.grid == 2 and other.visual.config.drop_path == 0.1 and other.text.blocks[0].attn.heads == 4
    assert torch.equal(other.visual.pos_embed, m.resize_positions(model.visual.pos_embed, (2, 2)))
    assert torch.equal(other.visual.head.weight, model.visual.head.weight)


class Stage(torch.nn.Module):
    """A stage's own model, such as a detector."""

    @dataclasses.dataclass
    class Config:
        vit: dict
        num_classes: int

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vit = ViT(ViTConfig(**config.vit))
        self.classes = torch.nn.Linear(config.vit['width'], config.num_classes)

    @staticmethod
    def from_released(state):
        if 'theirs' not in state:
            raise Refused('no tensor `theirs`')
        return Stage(Stage.Config(TINY, len(state['theirs'])))


def test_a_stages_model_loads_by_its_class(tmp_path):
    """Files of ours by the name of the class; others by from_released, whose refusal names the file."""
    path, model = str(tmp_path / 'x.pt'), Stage(Stage.Config(TINY, 3))
    save(model, path, classes=['a', 'b', 'c'])
    loaded = load(path, Stage)
    same(plain(loaded), plain(model))
    assert loaded.extra == dict(classes=['a', 'b', 'c']) and loaded.config == model.config and not loaded.training
    torch.save({'theirs': torch.zeros(7)}, path)
    assert load(path, Stage).config.num_classes == 7 and load(path, Stage).extra == {}
    torch.save({'other': torch.zeros(7)}, path)
    with pytest.raises(Refused, match=f'^{path}: no tensor `theirs`'):
        load(path, Stage)


def test_wrong_kinds_are_refused(tmp_path):
    """A file of another class: one line with what it is and what was expected."""
    vit, clip, stage = (str(tmp_path / name) for name in ('vit.pt', 'clip.pt', 'stage.pt'))
    save(tiny(), vit)
    save(CLIP(CLIPConfig(dict(**TINY, head=8, pool='class'), TEXT)), clip)
    save(Stage(Stage.Config(TINY, 3)), stage)
    for path, kind, words in ((vit, CLIP, 'a ViT, expected a CLIP'), (vit, Stage, 'a ViT, expected a Stage'),
                              (clip, Stage, 'a CLIP, expected a Stage'), (stage, CLIP, 'a Stage, expected a CLIP'),
                              (stage, None, 'a Stage, expected a ViT or a CLIP'),
                              (stage, ViT, 'a Stage, expected a ViT or a CLIP')):
        with pytest.raises(Refused, match=f'^{path}: this is {words}$'):
            load(path, kind)


def test_earlier_files_load(tmp_path):
    """A file whose config lacks the options that came later."""
    path, model = str(tmp_path / 'x.pt'), tiny(head=3)
    save(model, path)
    held = torch.load(path)
    held['config'] = {name: held['config'][name] for name in (*TINY, 'head', 'pool', 'drop_path', 'mean', 'std')}
    torch.save(held, path)
    loaded = load(path)
    assert loaded.config == model.config and torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize('change', [
    dict(config=None), dict(config=[1]), dict(config={}), dict(config={**TINY, 'heads': 0}), dict(name=None),
    dict(config={**TINY, 'width': 'wide'}), dict(config={**TINY, 'act': 'relu'}),
    dict(config={**TINY, 'spare': 1}), dict(state_dict=None), dict(state_dict={'a': 1}), dict(state_dict=[1]),
], ids=str)
def test_damaged_files_of_ours_are_one_line(tmp_path, change):
    """Whatever stands in their places, it is refused by one line that begins with the path."""
    path = str(tmp_path / 'x.pt')
    save(tiny(), path)
    torch.save({**torch.load(path), **change}, path)
    with pytest.raises(Refused, match=f'^{path}: [^\\n]*$'):
        load(path)


def test_wrong_tensors_are_named(tmp_path):
    """Missing, extra and misshapen tensors are errors with their names, in the file's words for a foreign one."""
    path = str(tmp_path / 'x.pt')
    save(tiny(), path)
    held = torch.load(path)
    for change, words in ((lambda s: s.pop('blocks.1.attn.q_bias'), 'missing blocks.1.attn.q_bias'),
                          (lambda s: s.update(spare=torch.zeros(2)), 'unexpected spare'),
                          (lambda s: s.update({'norm.bias': torch.zeros(3)}), 'norm.bias')):
        broken = dict(held['state_dict'])
        change(broken)
        torch.save({**held, 'state_dict': broken}, path)
        for changes in ({}, dict(pool='mean', head=5)):         # where this norm would start afresh, too
            with pytest.raises(Refused, match=words):
                load(path, **changes)


def load_state(state, tmp_path, kind=None, **changes):
    """The model of a file that holds these tensors."""
    path = str(tmp_path / 'state.pt')
    torch.save(state, path)
    return load(path, kind, **changes)


def openai_state():
    """A tiny OpenAI CLIP under its own names."""
    r, width = torch.randn, 64
    state = {'visual.class_embedding': r(width), 'visual.positional_embedding': r(17, width),
             'visual.proj': r(width, 8), 'visual.conv1.weight': r(width, 3, 4, 4), 'logit_scale': r(()),
             'token_embedding.weight': r(30, width), 'positional_embedding': r(12, width),
             'text_projection': r(width, 8)}
    for norm in ('visual.ln_pre', 'visual.ln_post', 'ln_final'):
        state.update({norm + '.weight': r(width), norm + '.bias': r(width)})
    for block in ('visual.transformer.resblocks.0.', 'transformer.resblocks.0.'):
        shapes = {'attn.in_proj_': (3 * width, width), 'attn.out_proj.': (width, width), 'ln_1.': (width,),
                  'ln_2.': (width,), 'mlp.c_fc.': (4 * width, width), 'mlp.c_proj.': (width, 4 * width)}
        for name, shape in shapes.items():
            state.update({block + name + 'weight': r(shape), block + name + 'bias': r(shape[0])})
    return state


def test_openai_names_are_understood(tmp_path, capsys):
    """Query and value biases are taken from the packed one; the key bias is dropped, and that is said."""
    state = openai_state()
    model = load_state(state, tmp_path)
    bias = state['transformer.resblocks.0.attn.in_proj_bias']
    assert torch.equal(model.text.blocks[0].attn.q_bias, bias[:64])
    assert torch.equal(model.text.blocks[0].attn.v_bias, bias[128:])
    assert torch.equal(model.visual.head.weight, state['visual.proj'].T)
    assert '2 key biases dropped' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['visual.ln_post.bias', 'text_projection', 'transformer.resblocks.0.attn.in_proj_bias',
                                  'visual.positional_embedding', 'visual.transformer.resblocks.0.mlp.c_fc.weight'])
def test_missing_openai_tensor_is_named(tmp_path, name):
    state = openai_state()
    del state[name]
    with pytest.raises(Refused, match=name.replace('.', r'\.')):
        load_state(state, tmp_path)


def test_unreadable_files_are_one_line(tmp_path):
    """Absent, empty, text, or something else that torch saved: one line that names the file."""
    empty, text, other = (str(tmp_path / name) for name in ('empty.pt', 'text.pt', 'other.pt'))
    open(empty, 'w').close()
    with open(text, 'w') as file:
        file.write('hello\n' * 100)
    torch.save([1, 2], other)
    for path in (str(tmp_path / 'absent.pt'), str(tmp_path), empty, text, other):
        with pytest.raises(Refused) as error:
            load(path)
        assert path in str(error.value) and '\n' not in str(error.value)


# ---- probes

def test_linear_probe_is_ridge_regression():
    """Linearly separable classes are told apart; labels without relation to the features are not."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(400, 8, generator=generator), torch.arange(400) % 4
    apart = x + 3 * F.one_hot(labels, 8)
    assert run.linear_probe(apart[:300], labels[:300], apart[300:], labels[300:]) > 0.9
    assert run.linear_probe(x[:300], labels[:300], x[300:], labels[300:]) < 0.4


def test_knn_is_the_plain_loop():
    """Equal to votes counted one by one."""
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = torch.randn(40, 6, generator=generator), torch.randn(15, 6, generator=generator)
    train_y, test_y = torch.arange(40) % 4, torch.arange(15) % 4
    right = 0
    for x, y in zip(test_x, test_y):
        cosines = F.cosine_similarity(x[None], train_x)
        votes = [0.] * 4
        for i in sorted(range(40), key=lambda i: -cosines[i])[:5]:
            votes[train_y[i]] += math.exp(cosines[i] / 0.07)
        right += votes.index(max(votes)) == y
    assert run.knn_accuracy(train_x, train_y, test_x, test_y, k=5) == pytest.approx(right / 15)


def test_a_width_without_sincos_positions_is_initialised():
    """Sin-cos takes widths of a multiple of 4; another narrow ViT starts from random positions."""
    narrow = dict(SIZES['pico'], width=66, heads=2)
    assert init_weights(ViT(ViTConfig(**narrow))).pos_embed.std() > 0


def test_rotary_positions_go_with_a_map_and_not_with_windows():
    """ViTDet's backbone has no class token, whose row of angles is left out; angles know nothing of windows."""
    config = ViTConfig(**SIZES['pico'], pool='map', mask_token=False, rope='index')
    vit = init_weights(ViT(config))
    images = torch.randn(2, 3, 32, 32)
    assert vit(images).shape == (2, 32, 8, 8)
    with pytest.raises(Refused, match='--window'):
        dataclasses.replace(config, window=4)


def test_normalize_leaves_its_input_alone():
    images = torch.randint(0, 256, (1, 3, 32, 32)).float()
    before = images.clone()
    ViT(ViTConfig(**SIZES['pico'])).normalize(images)
    assert torch.equal(images, before)
