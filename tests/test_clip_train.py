"""The contrastive loss, zero-shot classification, and a real run of the teacher's stage."""
import gzip
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_train
import data
import model as M
import run
from clip_train import contrastive_loss
from test_commands import refusal
from test_golden import close, fixtures, read


@pytest.fixture(autouse=True)
def few_captions(monkeypatch):
    """A vocabulary is learnt from 200 captions of the world: from all of them it takes a second."""
    some_captions = data.World.some_captions
    monkeypatch.setattr(data.World, 'some_captions', lambda world, num: some_captions(world, min(num, 200)))


def tiny_clip(tokenizer, seed=0, text_width=16):
    """An untrained CLIP that knows a vocabulary."""
    vision = M.ViTConfig(**M.SIZES['pico'], head=16, pool='mean', mask_token=False)
    text = M.TextConfig(width=text_width, depth=1, heads=2, vocab=tokenizer.vocab_size, embed=16)
    return M.init_weights(M.CLIP(M.CLIPConfig(vision, text)), seed)


def test_loss_of_a_blind_model_is_ln_batch():
    features = F.normalize(torch.ones(16, 4), dim=-1)
    torch.testing.assert_close(contrastive_loss(features, features, 10.), torch.tensor(math.log(16.)))


def test_loss_is_symmetric_in_its_towers():
    image, text = (F.normalize(torch.randn(8, 4), dim=-1) for _ in range(2))
    torch.testing.assert_close(contrastive_loss(image, text, 5.), contrastive_loss(text, image, 5.))


def test_class_embeddings_average_the_templates():
    """Equal to a plain loop; underscores of folder names are read as spaces."""
    tokenizer = data.Tokenizer.learn(['a photo of a sea lion', 'a blue ring'])
    model = tiny_clip(tokenizer)
    classes = clip_train.class_embeddings(model, tokenizer, ['sea_lion', 'ring'])
    for row, name in zip(classes, ('sea lion', 'ring')):
        features = [model.encode_text(tokenizer(t.format(name)))[0] for t in clip_train.TEMPLATES]
        mean = sum(x / x.norm() for x in features)
        torch.testing.assert_close(row, mean / mean.norm())


def test_zero_shot_equals_a_plain_loop():
    """Top-1, top-5 and the mean of the classes' own accuracies, counted one image at a time."""
    generator = torch.Generator().manual_seed(0)
    features, classes = (torch.randn(n, 6, generator=generator) for n in (40, 9))
    labels = torch.randint(0, 8, (40,), generator=generator)                    # the ninth class has no image
    first, five, by_class = [], [], {}
    for x, label in zip(features, labels.tolist()):
        order = sorted(range(9), key=lambda k: -float(x @ classes[k]))
        first.append(order[0] == label)
        five.append(label in order[:5])
        by_class.setdefault(label, []).append(order[0] == label)
    metrics = clip_train.zero_shot(features, labels, classes)
    assert metrics['zero_shot_top1'] == pytest.approx(sum(first) / 40) and metrics['chance'] == 1 / 9
    assert metrics['zero_shot_top5'] == pytest.approx(sum(five) / 40)
    mean = sum(sum(right) / len(right) for right in by_class.values()) / len(by_class)
    assert metrics['zero_shot_by_class'] == pytest.approx(mean)


def test_retrieval_ranks_both_ways():
    """Of 12 images, image i finds its text at place i, and every text finds its image first."""
    similarity = torch.zeros(12, 12)
    for i in range(12):
        similarity[i, :i] = 30 - i          # i texts before its own; a column's first row is its largest
        similarity[i, i] = 30 - i - .5
    metrics = clip_train.retrieval(similarity, [f'text {i}' for i in range(12)])
    assert [metrics[f'image_to_text_{k}'] for k in (1, 5, 10)] == pytest.approx([1 / 12, 5 / 12, 10 / 12])
    assert [metrics[f'text_to_image_{k}'] for k in (1, 5, 10)] == pytest.approx([1, 1, 1])
    assert metrics['retrieval'] == pytest.approx((1 / 12 + 1) / 2)


def test_retrieval_counts_equal_captions_as_right():
    """Two images of one caption are not told apart by it."""
    similarity = torch.tensor([[.1, .9], [.2, .8]])
    assert clip_train.retrieval(similarity, ['a', 'a'])['retrieval'] == 1
    assert clip_train.retrieval(similarity, ['a', 'b'])['retrieval'] == .25


def test_a_text_that_many_images_share_is_one_candidate():
    """Six images of 'a' do not fill the five best texts of the image of 'b'."""
    similarity = torch.ones(7, 7)
    similarity[:, 6] = .5                                           # every image likes 'a' better
    metrics = clip_train.retrieval(similarity, ['a'] * 6 + ['b'])
    assert metrics['image_to_text_1'] == pytest.approx(6 / 7) and metrics['image_to_text_5'] == 1


def test_the_evaluation_view_is_clips(tmp_path):
    """Shorter side to the size, centre crop, as OpenAI's preprocessing, to 1 of 255."""
    noise = torch.randint(0, 256, (14, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy()).resize((400, 280), Image.BICUBIC)
    image.save(tmp_path / 'a.png')
    steps = torch.from_numpy(np.array(image.resize((80, 56), Image.BICUBIC).crop((12, 0, 68, 56)))).permute(2, 0, 1)
    view = data.load_view(tmp_path / 'a.png', 56, share=1.)
    assert (view.int() - steps.int()).abs().max() <= 1


# ---- words

def test_class_names_are_folders_or_lines_of_a_file(tmp_path):
    """A name a line, in the order of the data's classes."""
    folders, path = ['n01', 'n02', 'n05'], tmp_path / 'classes.txt'
    assert clip_train.read_words(config(), folders) == (folders, clip_train.TEMPLATES)
    path.write_text('tench\nshark\n\nowl\n')
    assert clip_train.read_words(config('--classes', path), folders)[0] == ['tench', 'shark', 'owl']


@pytest.mark.parametrize('text, names', [
    ('n05\towl\nn01\ttench\nn09\tcat\nn02\twhite shark\n', ['tench', 'white shark', 'owl']),
    ('\ufeffn01\ttench\r\n\r\nn02 \t shark\r\nn05\ta\tb\r\n', ['tench', 'shark', 'a\tb']),
    ('n05\nn01\nn02\n', ['n01', 'n02', 'n05'])])
def test_names_of_classes_are_matched_by_their_folders(tmp_path, capsys, text, names):
    """Lines 'folder<tab>name' in any order, or the folders' own names: nothing is said, for nothing is by place."""
    path = tmp_path / 'classes.txt'
    path.write_text(text, 'utf-8', newline='')
    assert clip_train.read_words(config('--classes', path), ['n01', 'n02', 'n05'])[0] == names
    assert capsys.readouterr().out == ''


def test_names_without_folders_are_said_to_be_by_place(tmp_path, capsys):
    path = tmp_path / 'classes.txt'
    path.write_text('tench\nshark\n')
    clip_train.read_words(config('--classes', path), ['n01', 'n02'])
    said = capsys.readouterr().out
    assert "n01 as 'tench', n02 as 'shark'" in said and said.count('\n') == 1


@pytest.mark.parametrize('lines', ['Dog\nA cat\n', 'dog,Dog\ncat,Cat\n', 'dog Dog\ncat Cat\n', 'DOG\nhorse\n'])
def test_lines_that_name_some_classes_are_not_taken_by_their_place(tmp_path, lines):
    """Other spellings, or other columns than folder, tab, name: refused, not paired by luck."""
    path = tmp_path / 'classes.txt'
    path.write_text(lines)
    with pytest.raises(run.Refused, match='names a class of the data'):
        clip_train.read_words(config('--classes', path), ['cat', 'dog'])
    path.write_text('Dog\nCAT\n')
    assert clip_train.read_words(config('--classes', path), ['cat', 'dog'])[0] == ['cat', 'dog']



@pytest.mark.parametrize('text, words', [
    ('n01\ttench\n', 'no name for n02'), ('n01\ttench\nn02\t\n', 'no name for n02'),
    ('n01\ttench\nn02\tshark\nowl\n', '3 lines for 2 folders'), ('n01\ta\nn02\tb\nn02\tc\n', '3 lines for 2 folders')])
def test_folders_without_one_name_are_refused(tmp_path, text, words):
    (tmp_path / 'classes.txt').write_text(text)
    with pytest.raises(run.Refused, match=f'classes.txt has {words}'):
        clip_train.read_words(config('--classes', tmp_path / 'classes.txt'), ['n01', 'n02'])


def test_wrong_class_and_template_files_are_one_line(tmp_path):
    path = tmp_path / 'lines.txt'
    path.write_text('tench\nshark\n')
    with pytest.raises(run.Refused, match='has 2 names for the 3 classes of the data'):
        clip_train.read_words(config('--classes', path), ['n01', 'n02', 'n05'])
    with pytest.raises(run.Refused, match="for the class, got .'tench', 'shark'"):
        clip_train.read_words(config('--templates', path), ['n01'])
    path.write_text('')
    with pytest.raises(run.Refused, match='expected sentences'):
        clip_train.read_words(config('--templates', path), ['n01'])
    with pytest.raises(run.Refused, match='missing.txt does not exist'):
        clip_train.read_words(config('--templates', tmp_path / 'missing.txt'), ['n01'])
    path.write_bytes('chauss\u00e9e\n'.encode('latin-1'))
    with pytest.raises(run.Refused, match='lines.txt is not a text in UTF-8'):
        clip_train.read_words(config('--classes', path), ['n01'])


# ---- towers

def config(*flags):
    flags = ['--size', 'pico', '--device', 'cpu', *map(str, flags)]
    return run.parse_config(clip_train.Config, clip_train.RECIPES, flags)


WORDS = SimpleNamespace(some_captions=lambda num: ['a photo of a red star on sand', 'two blue rings'])    # a data set


@pytest.fixture
def eva(tmp_path):
    """A pre-trained ViT's file, with mask token and a head as wide as the shared space, and the ViT."""
    vit = M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['pico'], head=64)), seed=5)
    torch.nn.init.ones_(vit.head.bias)
    M.save(vit, str(tmp_path / 'eva.pt'))
    return str(tmp_path / 'eva.pt'), vit


def test_vision_takes_all_but_the_head(eva):
    """Of EVA's file the trunk is used; head, text tower and temperature are those of a run from scratch."""
    path, vit = eva
    model, tokenizer = clip_train.build(config('--vision', path, '--seed', 3), WORDS)
    scratch, _ = clip_train.build(config('--seed', 3), WORDS)
    trained = vit.state_dict()
    same = {f'visual.{name}' for name in trained if name in model.visual.state_dict()
            and torch.equal(trained[name], model.visual.state_dict()[name])}
    own = model.state_dict().keys() - same
    assert own == {name for name in model.state_dict() if name.startswith(('visual.head.', 'text.', 'logit_scale'))}
    for name in own:
        assert torch.equal(model.state_dict()[name], scratch.state_dict()[name]), name
    assert model.visual.mask_token is None and model.text.config.vocab == tokenizer.vocab_size


def test_text_takes_all_but_the_projection(tmp_path):
    """The text tower comes with the vocabulary it was trained with."""
    tokenizer = data.Tokenizer.learn(['a red star on sand', 'two blue rings'])
    reader = tiny_clip(tokenizer, seed=5, text_width=32)
    M.save(reader, str(tmp_path / 'clip.pt'), merges=tokenizer.merges)
    model, own = clip_train.build(config('--text', tmp_path / 'clip.pt', '--seed', 3), WORDS)
    state = model.text.state_dict()
    same = [name for name, weight in reader.text.state_dict().items()
            if weight.shape == state[name].shape and torch.equal(weight, state[name])]
    assert own.merges == tokenizer.merges and model.text.head.weight.shape == (64, 32)
    assert set(same) == {name for name in reader.text.state_dict() if name != 'head.weight'}
    assert not torch.equal(model.visual.class_token, reader.visual.class_token)


def test_a_tower_for_larger_images_gets_larger_positions(eva):
    model, _ = clip_train.build(config('--vision', eva[0], '--image_size', 48), WORDS)
    assert model.visual.pos_embed.shape == (1, 1 + 12 ** 2, 32) and model.config.vision.image_size == 48
    torch.testing.assert_close(model.visual.pos_embed, M.resize_positions(eva[1].pos_embed, (12, 12)))


def test_init_takes_the_image_size_asked_for(tmp_path):
    """As --vision does: the whole model of a file, with larger positions."""
    tokenizer = data.Tokenizer.learn(['a red star on sand', 'two blue rings'])
    clip = tiny_clip(tokenizer)
    M.save(clip, str(tmp_path / 'clip.pt'), merges=tokenizer.merges)
    model, _ = clip_train.build(config('--init', tmp_path / 'clip.pt', '--image_size', 48), WORDS)
    assert model.visual.image_size == 48 and torch.equal(model.visual.head.weight, clip.visual.head.weight)


# ---- EVA-02 in CLIP

def pretrained_eva02(path, **options):
    """A file of EVA-02 after pre-training, with a norm in its MLP, and its ViT."""
    sizes = dict(width=48, depth=1, heads=3, mlp_width=8, patch_size=14, image_size=56)
    options = sizes | dict(act='swiglu', rope='index', mlp_norm=True, head=8) | options
    vit = M.init_weights(M.ViT(M.ViTConfig(**options)), seed=5)
    M.save(vit, str(path))
    return vit


@pytest.mark.parametrize('path', fixtures('eva_clip_rei_eva02*.pt'))
def test_eva02_clip_from_a_pretrained_file_is_the_packages(path, tmp_path):
    """With the tensors of EVA02-CLIP the tower that --vision builds of a MIM file gives the package's features."""
    told, state, inputs, outputs = read(path)
    heads = told['vision_cfg']['width'] // told['vision_cfg']['head_width']
    theirs = M.load(path, M.ViT, heads=heads)
    sizes = {name: getattr(theirs.config, name) for name in ('width', 'depth', 'heads', 'mlp_width')}
    pretrained_eva02(tmp_path / 'eva02.pt', **sizes)
    flags = ['--vision', tmp_path / 'eva02.pt', '--embed', told['embed_dim']]
    tower = clip_train.build(config(*flags), WORDS)[0].visual
    tower.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        close(tower(inputs['image']), outputs['image_features'])


def test_eva02_starts_clip_with_a_fresh_norm_inside_attention(tmp_path):
    """Everything else in the blocks is the file's."""
    vit = pretrained_eva02(tmp_path / 'eva02.pt')
    block = clip_train.build(config('--vision', tmp_path / 'eva02.pt'), WORDS)[0].visual.blocks[0]
    state = block.state_dict()
    assert (state.pop('attn.norm.weight') == 1).all() and not state.pop('attn.norm.bias').any()
    assert state.keys() == vit.blocks[0].state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in vit.blocks[0].state_dict().items())


def test_eva02_b_has_patches_of_16_in_clip(tmp_path):
    """Its file's have 14 pixels, and --patch_size 14 leaves them."""
    path = tmp_path / 'eva02.pt'
    vit = pretrained_eva02(path, width=768, heads=12, image_size=112)
    tower = clip_train.build(config('--vision', path), WORDS)[0].visual
    assert torch.equal(tower.patch_embed.weight, M.resize_patches(vit.patch_embed.weight, 16))
    assert (tower.grid, tower.config.rope) == (7, 16)
    flags = ['--image_size', 112, '--patch_size', 14]
    tower = clip_train.build(config('--vision', path, *flags), WORDS)[0].visual
    assert torch.equal(tower.patch_embed.weight, vit.patch_embed.weight)


@pytest.mark.parametrize('size, name', dict(b='EVA02-CLIP-B-16', l='EVA02-CLIP-L-14').items())
@pytest.mark.parametrize('path', fixtures('keys.json.gz'))
def test_eva02_clips_towers_are_the_released_ones(path, size, name):
    """The towers and the space of a size are those of the released file's tensors."""
    listing = json.load(gzip.open(path))[name]['keys']
    state = {key: torch.empty(shape, device='meta') for key, shape in listing.items()}
    released = M.build(state, None, {}).config
    pretrained = M.ViTConfig(**M.config_of(size, 'eva02'), mask_token=False)
    embed = clip_train.RECIPES[size]['embed']
    changes = clip_train.eva02_clip(pretrained)
    assert replace(pretrained, head=embed, **changes) == released.vision
    tower = clip_train.TEXT_TOWERS[size]
    assert M.TextConfig(**tower, vocab=49_408, embed=embed) == released.text


@pytest.mark.parametrize('options', [
    dict(mlp_norm=False), dict(pool='class', rope=4), dict(pool='class', rope=16, attn_norm=True)])
def test_other_eva02_towers_stay_as_they_are(tmp_path, options):
    """The small ones, of which no CLIP is published, and what is a classifier or a CLIP already."""
    path = tmp_path / 'eva02.pt'
    vit = pretrained_eva02(path, **options)
    tower = clip_train.build(config('--vision', path), WORDS)[0].visual
    assert tower.config.attn_norm == vit.config.attn_norm
    assert tower.config.rope == options.get('rope', 4)


def at_real_size(size, monkeypatch):
    """A recipe and its CLIP, without values."""
    cfg = run.parse_config(clip_train.Config, clip_train.RECIPES, ['--size', size])
    monkeypatch.setattr(M, 'init_weights', lambda model, seed: model)
    with torch.device('meta'):
        model, _ = clip_train.build(cfg, WORDS)
    return cfg, model


def test_g_plus_is_evas(monkeypatch):
    """OpenCLIP-H's text tower, half of the patches, no dropped paths, LAMB; the image tower is g's."""
    cfg, model = at_real_size('g-plus', monkeypatch)
    vision, text = model.config.vision, model.config.text
    assert (vision.width, vision.depth, vision.pool, vision.drop_path) == (1408, 40, 'class', 0)
    assert (text.width, text.depth, text.heads, text.embed, text.act) == (1024, 24, 16, 1024, 'gelu')
    assert (cfg.batch_size, cfg.drop_tokens, cfg.optimizer) == (112 * 1024, .5, 'lamb')
    assert (cfg.lr, cfg.text_lr, cfg.layer_decay, cfg.text_layer_decay) == (4e-4, 4e-5, .85, .75)


# ---- activations

@pytest.fixture
def built(monkeypatch):
    """A function of a CLIP's file and flags: the config of what is built, as if OpenAI's merges had as many tokens."""
    def build(path, *flags):
        tokenizer = SimpleNamespace(vocab_size=M.load(path).text.config.vocab)
        monkeypatch.setattr(data.Tokenizer, 'openai', lambda bpe: tokenizer)
        return clip_train.build(config(*flags), WORDS)[0].config
    return build


def hugging_face(tmp_path, fixture, **acts):
    """The file of a CLIP in Hugging Face's names; with acts its config.json beside it."""
    shutil.copy(fixture, tmp_path / 'hf.pt')
    if acts:
        about = {f'{tower}_config': dict(hidden_act=act) for tower, act in acts.items()}
        (tmp_path / 'config.json').write_text(json.dumps(about))
    return tmp_path / 'hf.pt'


@pytest.mark.parametrize('flags, act', [([], 'gelu'), (['--text_act', 'quick_gelu'], 'quick_gelu')])
@pytest.mark.parametrize('path', fixtures('openai_clip_tiny.pt'))
def test_openais_text_tower_has_evas_gelu(path, built, flags, act):
    """Unless another activation is asked for."""
    assert M.load(path).text.config.act == 'quick_gelu'
    assert built(path, '--text', path, *flags).text.act == act


@pytest.mark.parametrize('flags, act', [([], 'gelu'), (['--text_act', 'quick_gelu'], 'quick_gelu')])
def test_a_new_text_tower_has_the_activation_asked_for(flags, act):
    assert clip_train.build(config(*flags), WORDS)[0].text.config.act == act


@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
@pytest.mark.parametrize('flag', ['--init', '--text'])
@pytest.mark.parametrize('fixture', fixtures('hf_clip.pt'))
def test_config_json_decides_the_activation(fixture, tmp_path, built, flag, act):
    """Of a CLIP in Hugging Face's names, as a whole or its text tower."""
    path = hugging_face(tmp_path, fixture, vision=act, text=act)
    model = built(path, flag, path)
    assert model.text.act == act
    assert flag == '--text' or model.vision.act == act


@pytest.mark.parametrize('fixture', fixtures('hf_clip.pt'))
def test_text_act_goes_before_config_json(fixture, tmp_path):
    """For the text tower; the image tower keeps what it was trained with."""
    path = hugging_face(tmp_path, fixture, vision='quick_gelu', text='quick_gelu')
    assert clip_train.activations(path, 'gelu') == dict(vision='quick_gelu', text='gelu')


@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
@pytest.mark.parametrize('fixture', fixtures('hf_clip.pt'))
def test_config_json_decides_the_image_towers_activation(fixture, tmp_path, act):
    """Whatever that of the text tower is."""
    path = hugging_face(tmp_path, fixture, vision=act, text='gelu')
    assert clip_train.build(config('--vision', path), WORDS)[0].config.vision.act == act


@pytest.mark.parametrize('fixture', fixtures('hf_clip.pt'))
def test_an_activation_that_a_config_json_leaves_out_is_clips_default(fixture, tmp_path):
    """Newer ones hold only what differs from the default, which is OpenAI's."""
    path = hugging_face(tmp_path, fixture)
    (tmp_path / 'config.json').write_text('{"text_config": {}, "vision_config": {}}')
    assert clip_train.activations(path) == dict(vision='quick_gelu', text='quick_gelu')


@pytest.mark.parametrize('flag', ['--init', '--text', '--vision'])
@pytest.mark.parametrize('fixture', fixtures('hf_clip.pt'))
def test_an_unknown_activation_is_asked_for(fixture, tmp_path, monkeypatch, capsys, flag):
    """In one line, which offers --text_act where it helps."""
    path = hugging_face(tmp_path, fixture)
    flags = [flag, str(path), '--steps', '1', '--size', 'pico', '--out_dir', str(tmp_path / 'out')]
    line = refusal(monkeypatch, capsys, clip_train, *flags)
    assert f'{path} does not say its activation: put its config.json beside it' in line
    assert ('--text_act gelu' in line) == (flag != '--vision')


@pytest.mark.parametrize('path', fixtures('openai_clip_tiny.pt', 'hf_clip.pt'))
def test_the_answer_holds_for_both_towers(path, built):
    """--text_act with --init of a file whose names leave the activation open: LAION's have GELU in both."""
    clip = built(path, '--init', path, '--text_act', 'gelu')
    assert (clip.vision.act, clip.text.act) == ('gelu', 'gelu')


@pytest.mark.parametrize('text, words', [
    ('[]', 'has no vision_config'), ('{"vision_config": 1}', 'has no vision_config'), ('{', 'is not JSON'),
    ('{"vision_config": {}}', 'has no text_config'),
    ('{"vision_config": {}, "text_config": {"hidden_act": "relu"}}', "has hidden_act 'relu' in text_config"),
    ('{"vision_config": {"hidden_act": [1]}}', r"has hidden_act '\[1\]' in vision_config")])
@pytest.mark.parametrize('fixture', fixtures('hf_clip.pt'))
def test_a_wrong_config_json_is_one_line(fixture, tmp_path, text, words):
    path = hugging_face(tmp_path, fixture)
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(run.Refused, match=f'config.json {words}'):
        clip_train.build(config('--text', path), WORDS)


def test_size_g_is_the_papers(monkeypatch):
    """EVA's ViT with a projection to 1024, CLIP-L's text tower; image and text tower learn at different rates."""
    cfg, model = at_real_size('g', monkeypatch)
    vision, text = model.config.vision, model.config.text
    pretraining = 1_012_229_632                     # with a mask token and a head to CLIP-L's 768
    assert run.count_parameters(model.visual) == pretraining - 1408 + (1408 + 1) * (1024 - 768)
    assert (text.width, text.depth, text.embed) == (768, 12, 1024)
    assert (vision.drop_path, vision.pool) == (.4, 'class')
    assert (cfg.lr, cfg.text_lr, cfg.batch_size) == (4e-4, 4e-5, 40_960)
    assert (cfg.layer_decay, cfg.text_layer_decay) == (.85, .75)


def test_each_tower_has_its_rate_and_decay():
    """A block's matrices move at lr_scale of their tower's rate, once more decayed for every layer below the last."""
    cfg = config('--lr', '1e-3', '--text_lr', '1e-4', '--layer_decay', '.5')
    cfg.text_layer_decay = .1
    model, _ = clip_train.build(cfg, WORDS)
    scale = {}
    for group in clip_train.make_optimizer(model, cfg).param_groups:
        scale |= {weight: group['lr_scale'] for weight in group['params']}
    assert len(scale) == len(list(model.parameters())) and scale[model.logit_scale] == 1
    for tower, depth, top, decay in ((model.visual, 4, 1, .5), (model.text, 2, .1, .1)):
        assert scale[tower.head.weight] == pytest.approx(top)
        assert scale[tower.blocks[-1].mlp.fc1.weight] == pytest.approx(top * decay)
        assert scale[tower.blocks[0].mlp.fc1.bias] == pytest.approx(top * decay ** depth)
        assert scale[tower.pos_embed] == pytest.approx(top * decay ** (depth + 1))


# ---- token dropping and LAMB

def test_kept_patches_depend_on_the_position_alone():
    """Half of the patches, each once, whatever batch a sample comes in."""
    keep = clip_train.kept_patches(7, torch.arange(100, 108), 64, .5)
    assert keep.shape == (8, 32) and all(len(row.unique()) == 32 and row.max() < 64 for row in keep)
    assert torch.equal(keep[3:5], clip_train.kept_patches(7, torch.arange(103, 105), 64, .5))
    assert not torch.equal(keep, clip_train.kept_patches(8, torch.arange(100, 108), 64, .5))


def test_dropping_tokens_leaves_evaluation_untouched(monkeypatch, tmp_path):
    """The same model is measured alike with and without; in training its image tower sees half of the patches."""
    monkeypatch.setattr(clip_train, 'NUM_EVAL', 32)
    monkeypatch.setattr(clip_train, 'NUM_PAIRS', 16)
    world, cpu, metrics, seen = data.World('val'), torch.device('cpu'), [], []
    for flags in ((), ('--drop_tokens', .5)):
        cfg = config('--batch_size', 8, '--out_dir', tmp_path, *flags)
        model, tokenizer = clip_train.build(cfg, WORDS)
        words = clip_train.read_words(cfg, world.label_names)
        metrics.append(clip_train.evaluate(model, world, tokenizer, cfg, cpu, words))
        batches = data.batches(data.World(), 8, 32, 5, 6, cfg.seed, 'cpu')
        batch = next(clip_train.add_text(batches, tokenizer, cfg, model.visual, cpu))
        model.visual.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(output.shape[1]))
        model(model.normalize(batch['images']), batch['text'], batch.get('keep'), batch.get('drop'))
    assert metrics[0] == metrics[1] and seen == [1 + 64, 1 + 32]


def plain_lamb(weights, gradients, lr, beta1, beta2, eps, weight_decay):
    """One matrix through some steps, in plain loops over numbers."""
    w, m, v = list(weights), [0.] * len(weights), [0.] * len(weights)
    length = lambda x: math.sqrt(sum(y * y for y in x))
    for t, gradient in enumerate(gradients, 1):
        clipped = min(1, 1 / (length(gradient) + 1e-6))
        gradient = [clipped * g for g in gradient]
        change = []
        for i, g in enumerate(gradient):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            change.append(m[i] / (1 - beta1 ** t) / (math.sqrt(v[i] / (1 - beta2 ** t)) + eps) + weight_decay * w[i])
        ratio = length(w) / length(change) if weight_decay and length(w) and length(change) else 1
        w = [x - lr * ratio * c for x, c in zip(w, change)]
    return w


@pytest.mark.parametrize('weight_decay, start', [(.05, 1.), (.05, 0.), (0., 1.)])
def test_lambs_step_equals_a_plain_reference(double, weight_decay, start):
    """A matrix with decay, one that starts at zero, and a tensor without decay, which takes AdamW's step."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(start * torch.randn(3, 4, generator=generator))
    gradients = [torch.randn(3, 4, generator=generator) for _ in range(4)]
    expected = plain_lamb(weight.flatten().tolist(), [gradient.flatten().tolist() for gradient in gradients],
                          .1, .9, .98, 1e-6, weight_decay)
    options = dict(lr=.1, betas=(.9, .98), eps=1e-6)
    optimizer = clip_train.Lamb([dict(params=[weight], weight_decay=weight_decay)], options)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.detach().flatten(), torch.tensor(expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('norm, left', [(5., 1.), (.5, .5)])
def test_lamb_clips_all_gradients_together(norm, left):
    """Besides the clip of the loop: at most a global norm of 1 reaches the moments."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [dict(params=[weight], weight_decay=0.) for weight in weights]
    optimizer = clip_train.Lamb(groups, dict(lr=.1, betas=(.9, .98), eps=1e-6))
    for weight in weights:
        weight.grad = torch.full((2,), norm / 2)        # of four values in all
    optimizer.step()
    means = torch.cat([optimizer.state[weight]['mean'] for weight in weights])
    torch.testing.assert_close(means.norm().item(), .1 * left, atol=1e-6, rtol=0)


def test_lamb_resumes(tmp_path):
    """Stopped and continued from a checkpoint it goes on as if nothing had happened."""
    cfg, runs = config('--optimizer', 'lamb'), []
    for stop in (None, 2):
        weight_of = lambda model: model.visual.blocks[0].mlp.fc1.weight.detach().clone()
        for start, end in ([(0, 4)] if stop is None else [(0, stop), (stop, 4)]):
            model, _ = clip_train.build(cfg, WORDS)
            optimizer = clip_train.make_optimizer(model, cfg)
            assert run.resume(str(tmp_path / str(stop)), model, optimizer, cfg)[0] == start
            for step in range(start, end):
                for n, parameter in enumerate(model.parameters()):
                    parameter.grad = torch.full_like(parameter, math.sin(step + n))
                optimizer.step()
            run.save_checkpoint(str(tmp_path / str(stop)), end, model, optimizer, cfg)
        runs.append(weight_of(model))
    assert torch.equal(*runs)


# ---- runs

@pytest.mark.parametrize('source', ['shapes', 'folder'])
def test_a_real_run_learns_and_leaves_a_teacher(tmp_path, monkeypatch, source):
    """30 steps on the world or on a folder of two classes: the loss falls, the file loads with its vocabulary."""
    monkeypatch.setattr(clip_train, 'NUM_EVAL', 64)
    monkeypatch.setattr(clip_train, 'NUM_PAIRS', 32)
    spec = 'shapes'
    if source == 'folder':
        spec = folder_of_classes(tmp_path / 'photos', num=8)
    flags = ['--size', 'pico', '--data', spec, '--steps', '30', '--batch_size', '16', '--warmup_steps', '5',
             '--log_every', '1', '--out_dir', str(tmp_path / 'out'), '--device', 'cpu', '--save_every', '20']
    cfg = run.parse_config(clip_train.Config, clip_train.RECIPES, flags)
    clip_train.train(cfg)
    losses = [json.loads(line)['loss'] for line in open(tmp_path / 'out' / 'log.jsonl')]
    assert sum(losses[-5:]) < sum(losses[:5])
    teacher = M.load(str(tmp_path / 'out' / 'model.pt'))
    assert data.Tokenizer(teacher.extra['merges']).vocab_size == teacher.config.text.vocab
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert result['chance'] == (1 / 16 if source == 'shapes' else 1 / 2) and 'zero_shot_top1' in result


@pytest.mark.parametrize('batch_size', [2, 8])
def test_a_small_batch_trains_to_its_end(tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(clip_train, 'NUM_EVAL', 20)
    monkeypatch.setattr(clip_train, 'NUM_PAIRS', 8)
    clip_train.train(config('--steps', 1, '--batch_size', batch_size, '--out_dir', tmp_path))
    assert {'model.pt', 'retrieval.png', 'result.json'} <= set(os.listdir(tmp_path))


def test_a_picture_that_fails_costs_no_training(tmp_path, monkeypatch, capsys):
    """It is drawn after the metrics, and only a warning."""
    def fails(*args, **options):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(clip_train, 'NUM_EVAL', 8)
    monkeypatch.setattr(clip_train, 'NUM_PAIRS', 8)
    monkeypatch.setattr(run, 'draw_sheet', fails)
    clip_train.train(config('--steps', 1, '--batch_size', 2, '--out_dir', tmp_path))
    assert 'retrieval.png was not written (OSError' in capsys.readouterr().out
    assert (tmp_path / 'result.json').exists()


def test_other_captions_give_another_vocabulary(tmp_path, monkeypatch):
    """The words that a run learnt to read are its own: with others its checkpoint is refused, and not as damaged."""
    photos = folder_of_classes(tmp_path / 'photos', num=8)
    flags = ['--data', photos, '--steps', 2, '--save_every', 1, '--batch_size', 2, '--out_dir', tmp_path / 'run']

    def stop(self, step, **metrics):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, 'say', stop)
        clip_train.train(config(*flags))
    for n in range(8):
        (tmp_path / 'photos' / 'red' / f'{n}.txt').write_text('several unheard words')
    with pytest.raises(run.Refused, match='is of another vocabulary'):
        clip_train.train(config(*flags))


def test_a_model_of_clips_is_no_image_tower(tmp_path):
    vit = M.init_weights(M.ViT(M.ViTConfig(**M.SIZES['pico'], head=4, frames=2)))
    M.save(vit, str(tmp_path / 'clips.pt'))
    with pytest.raises(run.Refused, match='clips.pt is a model of clips of 2 frames'):
        clip_train.build(config('--vision', tmp_path / 'clips.pt'), None)


def test_what_stands_for_a_broken_image_is_not_judged(tmp_path):
    """Its caption and label would count twice."""
    photos = folder_of_classes(tmp_path / 'photos')
    (tmp_path / 'photos' / 'red' / '1.png').write_bytes(b'no picture')
    dataset = data.open_data(photos, 'test', captions=True)
    tokenizer = data.Tokenizer.learn(['a photo of a red star', 'two blue rings'])
    cfg = config('--eval', '--batch_size', 4)
    seen = []

    def similarity(similarity, texts):
        seen.append((similarity.shape, len(texts)))
        return {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_train, 'retrieval', similarity)
        patch.setattr(clip_train, 'zero_shot', lambda features, labels, classes: seen.append((len(features), len(labels))) or {})
        clip_train.evaluate(tiny_clip(tokenizer), dataset, tokenizer, cfg, torch.device('cpu'),
                            clip_train.read_words(cfg, dataset.label_names))
    assert seen == [(7, 7), ((7, 7), 7)]


def test_weights_are_written_before_the_last_evaluation(tmp_path, monkeypatch):
    """Whatever happens to metrics and pictures, what was trained is there."""
    def fails(*args):
        raise RuntimeError('no evaluation')
    monkeypatch.setattr(clip_train, 'evaluate', fails)
    with pytest.raises(RuntimeError, match='no evaluation'):
        clip_train.train(config('--steps', 1, '--batch_size', 2, '--out_dir', tmp_path))
    assert isinstance(M.load(str(tmp_path / 'model.pt')), M.CLIP)


def folder_of_classes(path, num=4):
    """num pictures of one colour in each of two class folders, without splits."""
    for colour in ('blue', 'red'):
        (path / colour).mkdir(parents=True)
        for n in range(num):
            Image.new('RGB', (40, 30 + n), colour).save(path / colour / f'{n}.png')
    return str(path)


@pytest.fixture
def clip(tmp_path):
    """A CLIP's file, untrained, with its vocabulary."""
    tokenizer = data.Tokenizer.learn(['a photo of a red star', 'two blue rings'])
    model = tiny_clip(tokenizer)
    M.save(model, str(tmp_path / 'clip.pt'), merges=tokenizer.merges)
    return str(tmp_path / 'clip.pt')


def command(monkeypatch, capsys, *flags):
    """What the command prints."""
    monkeypatch.setattr(sys, 'argv', ['clip_train.py', *flags])
    run.main(clip_train.train, clip_train.Config, clip_train.RECIPES)
    return capsys.readouterr().out.splitlines()


def test_image_and_words_print_probabilities(clip, tmp_path, monkeypatch, capsys):
    """A line a sentence, the likeliest first, in all 100%."""
    Image.new('RGB', (50, 40), 'red').save(tmp_path / 'a.png')
    lines = command(monkeypatch, capsys, '--init', clip, '--image', str(tmp_path / 'a.png'), '--words', 'a red star',
                    'blue rings', 'a ring')
    shares = [float(line.split('%')[0]) for line in lines]
    assert sorted(line.split('%  ')[1] for line in lines) == ['a red star', 'a ring', 'blue rings']
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=.3)


def test_eval_of_class_folders(clip, tmp_path, monkeypatch, capsys):
    """Every picture where there is no val/; those that could not be read are said."""
    photos = folder_of_classes(tmp_path / 'photos')
    (tmp_path / 'photos' / 'red' / 'broken.png').write_bytes(b'no picture')
    lines = command(monkeypatch, capsys, '--eval', '--init', clip, '--data', photos)
    assert any(line.split() == ['chance', '0.5'] for line in lines) and 'zero_shot_top5' in '\n'.join(lines)
    assert '1 of 9 images could not be read' in lines[-1]


def test_eval_takes_names_and_sentences_from_files(clip, tmp_path, monkeypatch, capsys):
    """What the model reads are the sentences of the file about the names of the file."""
    photos, seen = folder_of_classes(tmp_path / 'photos'), []
    original = clip_train.encode_texts
    monkeypatch.setattr(clip_train, 'encode_texts', lambda model, tokenizer, texts: (
        seen.append(texts), original(model, tokenizer, texts))[1])
    (tmp_path / 'names.txt').write_text('deep_sea star\ncrimson star\n')
    (tmp_path / 'sentences.txt').write_text('two {} rings\n')
    command(monkeypatch, capsys, '--eval', '--init', clip, '--data', photos, '--classes', str(tmp_path / 'names.txt'),
            '--templates', str(tmp_path / 'sentences.txt'))
    assert seen[0] == ['two deep sea star rings', 'two crimson star rings']


def test_what_does_not_fit_is_refused(clip, tmp_path, monkeypatch, capsys):
    """One line and exit code 2, before any training."""
    monkeypatch.chdir(tmp_path)
    photos = folder_of_classes(tmp_path / 'photos')
    (tmp_path / 'three.txt').write_text('one\ntwo\nthree\n')
    for flags, words in (
            (['--init', clip, '--vision', clip], '--init is the whole model'),
            (['--init', clip, '--text', clip], '--init is the whole model'),
            (['--image', 'a.png', '--init', clip], '--words'),
            (['--data', photos, '--classes', 'three.txt'], 'three.txt has 3 names for the 2 classes'),
            (['--data', photos, '--templates', 'three.txt'], 'expected sentences with {}'),
            (['--batch_size', '1'], 'nothing to contrast'),
            (['--text_lr', '1', '--lr', '0'], '--lr, which is 0'),
            (['--micro_batch', '2'], '--micro_batch is gone'), (['--whole'], '--whole is gone'),
            (['--text_act', 'relu'], 'gelu, quick_gelu'), (['--optimizer', 'sgd'], 'adamw, lamb'), (['--layer_decay', '2'], 'does not fit; use 0 to 1'),
            (['--drop_tokens', '1'], 'below 1'), (['--vision', 'missing.pt'], 'missing.pt'),
            (['--text', 'missing.pt'], 'missing.pt'),
            (['--eval', '--init', clip, '--data', photos, '--classes', 'three.txt'], 'has 3 names for the 2 classes')):
        assert words in refusal(monkeypatch, capsys, clip_train, *flags), flags
