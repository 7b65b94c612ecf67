"""One claim a test: released names both ways, file formats, hostile files, memory."""
import argparse
import json
import math
import os
import subprocess
import sys
import types
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model as m
from model import CLIP, FAMILIES, CLIPConfig, Refused, ViT, ViTConfig, family_of, load, save, translate_back
from test_model import TEXT, TINY, close, images, load_state, openai_state, plain, same, tiny

EVA02 = dict(act='swiglu', mlp_norm=True, rope='index')
TEXT_IDS = torch.tensor([[28, 3, 4, 29, 0, 0, 0, 0, 0, 0, 0, 0]])


def random_clip(text=(), **vision):
    """A small CLIP whose every weight matters."""
    model = CLIP(CLIPConfig(dict(TINY, head=8, pool='class', mask_token=False, **vision), dict(TEXT, **dict(text))))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def export(model, names):
    """Its tensors under the names of a family, or of the one that `save` takes for 'eva' and 'openai'."""
    if names in FAMILIES:
        return translate_back(plain(model), FAMILIES[names][1])
    return m.export(model, names)


def save_as(model, path, names):
    torch.save(export(model, names), path)


OPENAI = dict(vision=dict(pre_norm=True, patch_bias=False, head_bias=False, eps=1e-5, act='quick_gelu'),
              text=dict(act='quick_gelu'))


# ---- the options that EVA-02 brings

def test_rotary_scores_depend_on_the_distance_alone(double):
    """Moving query and key by as many rows and columns leaves their product; the class token is not turned."""
    x = torch.randn(2, 1, 1, 1, 8)
    cos, sin = m.rotary_positions((5, 5), 8, 'index')
    product = lambda i, j: (m.rotate(x[0], (cos[i], sin[i])) * m.rotate(x[1], (cos[j], sin[j]))).sum()
    at = lambda row, column: 1 + 5 * row + column
    close(product(at(0, 1), at(2, 0)), product(at(2, 4), at(4, 3)))
    assert abs(product(at(0, 1), at(2, 0)) - product(at(0, 1), at(0, 1))) > 1e-3
    close(m.rotate(x[0], (cos[0], sin[0])), x[0])


def test_rotary_grid():
    """'index' counts patches; a number stretches every grid to that many rows, and columns apart from rows."""
    angle = lambda grid, rope, place: torch.atan2(*m.rotary_positions(grid, 8, rope)[:, 1 + place].flip(0))
    assert angle((3, 4), 'index', 4 * 2 + 1).tolist() == pytest.approx([2, 2e-2, 1, 1e-2], rel=1e-4)
    assert angle((3, 4), 3, 4 * 2 + 1).tolist() == pytest.approx([2, 2e-2, 0.75, 0.75e-2], rel=1e-4)
    assert angle((32, 32), 16, 32 * 3 + 2).tolist() == pytest.approx([1.5, 1.5e-2, 1, 1e-2], rel=1e-4)


@pytest.mark.parametrize('rope', ['index', 16])
def test_keep_takes_rotary_angles_along(rope, double):
    """All patches kept in another order are the same tokens in that order, at other image sizes too."""
    model, x = tiny(**{**EVA02, 'rope': rope}), torch.randn(2, 3, 24, 16)                    # 6 x 4 patches
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    everything = model.tokens(x)
    kept = everything.gather(1, F.pad(order + 1, (1, 0))[:, :, None].expand(-1, -1, 16))
    close(model.tokens(x, keep=order), kept)
    assert not torch.allclose(model.tokens(x, keep=order[:, :5]), kept[:, :6], atol=1e-3)     # they miss the others


def test_post_norm_is_the_plain_formula(double):
    """x + norm(attention(x)), then x + norm(mlp(x))."""
    block, x = tiny(post_norm=True).blocks[0], torch.randn(2, 5, 16)
    middle = x + block.norm1(block.attn(x))
    close(block(x), middle + block.norm2(block.mlp(middle)))


def test_swiglu_is_the_plain_formula(double):
    """fc2(norm(silu(first half) * second half))."""
    mlp, x = tiny(**EVA02).blocks[0].mlp, torch.randn(2, 5, 16)
    gate, value = (x @ mlp.fc1.weight.T + mlp.fc1.bias).split(32, dim=-1)
    close(mlp(x), mlp.fc2(mlp.norm(gate * gate.sigmoid() * value)))


# ---- names, both ways

VITS = {
    'EVA-01 MIM': {}, 'EVA-01 layer scale': dict(layer_scale=0.1), 'EVA-01 features': dict(head=0),
    'EVA-01 mean': dict(pool='mean', mask_token=False), 'EVA-01 class': dict(pool='class', mask_token=False),
    'EVA-02': EVA02, 'EVA-02 small': dict(act='swiglu', rope='index'),
    'EVA-02 mean': dict(EVA02, rope=16, pool='mean', mask_token=False),
}


@pytest.mark.parametrize('options', VITS.values(), ids=VITS)
def test_vit_through_evas_names(tmp_path, options, double):
    """A ViT written under EVA's names and read again gives the same outputs; the heads have to be told."""
    model, path = tiny(**{'head': 5, **options}), str(tmp_path / 'x.pt')
    save(model, path, names='eva')
    again = load(path, heads=2)
    close(again(images()), model(images()))
    assert replace(again.config, layer_scale=None) == replace(model.config, layer_scale=None)


@pytest.mark.parametrize('names', ['eva', 'openai', 'OpenCLIP, custom text', 'Hugging Face CLIP', 'timm'])
def test_clip_through_released_names(tmp_path, names, double):
    """A CLIP written under released names and read again gives the same features and scale."""
    options = dict(eva={}, timm=dict(EVA02, rope=16, attn_norm=True)).get(names, OPENAI['vision'])
    model = random_clip(**options, text=OPENAI['text'] if 'pre_norm' in options else {})
    path, x = str(tmp_path / 'x.pt'), images()
    save_as(model, path, 'EVA-02 timm CLIP' if names == 'timm' else names)
    config = model.config
    again = load(path, CLIP, vision=dict(heads=2, act=config.vision.act), text=dict(heads=2, act=config.text.act))
    for ours, theirs in zip(again(x, TEXT_IDS), model(x, TEXT_IDS)):
        close(ours, theirs)


@pytest.mark.parametrize('family', ['OpenAI CLIP', 'Hugging Face CLIP', 'EVA-L classifier, class token'])
def test_zero_key_biases_are_written(family):
    """Where a format has key biases, it gets zeros."""
    if 'CLIP' in family:
        state = export(random_clip(**OPENAI['vision'], text=OPENAI['text']), family)
    else:
        state = export(tiny(pool='class', head=5), family)
    biases = [bias[16:32] for name, bias in state.items() if name.endswith(('in_proj_bias', 'qkv.bias'))]
    biases += [bias for name, bias in state.items() if name.endswith('k_proj.bias')]
    assert len(biases) in (3, 5) and not torch.stack(biases).any()         # 3 + 2 blocks, or the ViT's 3
    assert any(bias.any() for name, bias in state.items() if name.endswith(('in_proj_bias', 'qkv.bias', 'q_proj.bias')))


def test_names_that_do_not_fit_are_refused(tmp_path):
    """A tensor or a pooling that a format cannot hold, and unknown names: nothing is written."""
    path = str(tmp_path / 'x.pt')
    mean_clip = CLIP(CLIPConfig(dict(TINY, head=8, pool='mean', mask_token=False), TEXT))
    for model, names, words in ((random_clip(), 'openai', 'visual.patch_embed.bias'),
                                (mean_clip, 'eva', "pool='mean'"),
                                (tiny(), 'timm', "use 'ours', 'eva' or 'openai'")):
        with pytest.raises(Refused, match=words):
            save(model, path, names=names)
    assert not os.path.exists(path)


def test_wrappers_and_prefixes_are_peeled(tmp_path):
    """Trainers' dicts, data-parallel, compiled and tower prefixes, and the options beside the weights."""
    model, path = tiny(pool='class', head=5, mask_token=False), str(tmp_path / 'x.pt')
    state = export(model, 'eva')
    for held in ({'model': state, 'args': argparse.Namespace(lr=1.)}, {'module': {'state_dict': state}, 'epoch': 3},
                 {'model_ema': state}, {'module.' + name: tensor for name, tensor in state.items()},
                 {'visual.' + name: tensor for name, tensor in state.items()},
                 {name.replace('blocks.1.', 'blocks.1._orig_mod.'): tensor for name, tensor in state.items()}):
        torch.save(held, path)
        same(plain(load(path, heads=2)), plain(model))


def test_timm_tower_inside_openclip(tmp_path):
    """OpenCLIP holds timm's EVA under visual.trunk."""
    model, path = random_clip(**{**EVA02, 'rope': 16}, attn_norm=True), str(tmp_path / 'x.pt')
    state = export(model, 'EVA-02 timm CLIP')
    torch.save({name.replace('visual.', 'visual.trunk.'): tensor for name, tensor in state.items()}, path)
    same(plain(load(path, vision=dict(heads=2), text=dict(heads=2))), plain(model))


def test_half_precision_becomes_float32(tmp_path):
    path, model = str(tmp_path / 'x.pt'), tiny()
    torch.save({name: tensor.half() for name, tensor in export(model, 'eva').items()}, path)
    again = load(path, heads=2)
    assert {weight.dtype for weight in again.parameters()} == {torch.float32}
    assert torch.equal(again.pos_embed, model.pos_embed.half().float())


def test_new_patch_size_resizes_kernels(tmp_path):
    """EVA's 14 to 16: the kernel is resized, and the positions to the grid that the image then has."""
    path, model = str(tmp_path / 'x.pt'), tiny(image_size=32, patch_size=4)
    save(model, path)
    again = load(path, patch_size=8)
    assert again.grid == 4 and torch.equal(again.patch_embed.weight, m.resize_patches(model.patch_embed.weight, 8))
    assert torch.equal(again.pos_embed, m.resize_positions(model.pos_embed, (4, 4)))


def test_corners_can_be_aligned(double):
    """With align_corners the corner patches keep their positions at any grid, as one package's helper has it."""
    model, corners = tiny(align_corners=True), [1, 6, 31, 36]
    resized = m.resize_positions(model.pos_embed, (6, 6), align_corners=True)
    close(resized[:, corners], model.pos_embed[:, [1, 4, 13, 16]])
    model.blocks = torch.nn.ModuleList()
    tokens = model.tokens(torch.zeros(1, 3, 24, 24)) - model.patch_embed.bias
    close(tokens[:, corners], resized[:, corners])


def test_activation_that_names_do_not_show_is_said(tmp_path, capsys):
    """OpenAI's names are LAION's too: which activation was supposed is said, unless told or OpenAI's own."""
    state = openai_state()
    load_state(state, tmp_path)
    assert 'QuickGELU supposed' in capsys.readouterr().out
    load_state(state, tmp_path, vision=dict(act='gelu'), text=dict(act='gelu'))
    load_state({**state, 'input_resolution': torch.tensor(16)}, tmp_path)
    assert 'QuickGELU' not in capsys.readouterr().out


def test_key_bias_under_rotary_positions_is_refused(tmp_path):
    """There it matters: zeros load, others do not."""
    family = 'EVA-L classifier, class token'
    state = export(tiny(act='swiglu', rope=16, pool='class', head=5), family)
    assert family_of(state) == family and load_state(state, tmp_path).config.rope == 16
    state['blocks.1.attn.qkv.bias'][20] = 1
    with pytest.raises(Refused, match=r'blocks\.1\.attn\.qkv\.bias has key biases'):
        load_state(state, tmp_path)


# ---- safetensors

def write_safetensors(state, path, **changes):
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in state.items():
        dtype = {torch.float32: 'F32', torch.float16: 'F16', torch.int64: 'I64'}[tensor.dtype]
        size = tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=dtype, shape=list(tensor.shape), data_offsets=[offset, offset + size])
        offset += size
    header.update(changes)
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in state.values():
            file.write(tensor.contiguous().numpy().tobytes())


@pytest.mark.parametrize('kind', [None, ViT])
def test_config_json_beside_a_file_decides_its_activation(tmp_path, kind):
    """Of a CLIP in Hugging Face's names, whole or its image tower; what the caller says goes before."""
    path = str(tmp_path / 'x.pt')
    torch.save(export(random_clip(**OPENAI['vision'], text=OPENAI['text']), 'Hugging Face CLIP'), path)
    told = dict(vision_config=dict(hidden_act='gelu'), text_config=dict(hidden_act='gelu'))
    (tmp_path / 'config.json').write_text(json.dumps(told))
    heads = dict(heads=2)
    asked = heads if kind is ViT else dict(vision=heads, text=heads)
    found = load(path, kind, **asked)
    assert getattr(found, 'visual', found).config.act == 'gelu'
    asked = dict(heads, act='quick_gelu')
    found = load(path, kind, **(asked if kind is ViT else dict(vision=asked, text=heads)))
    assert getattr(found, 'visual', found).config.act == 'quick_gelu'


def test_safetensors(tmp_path):
    """The same model as from torch.save's file, half precision and a Hugging Face export's position ids included."""
    model, path = random_clip(**OPENAI['vision'], text=OPENAI['text']), str(tmp_path / 'x.safetensors')
    state = export(model, 'Hugging Face CLIP')
    state['text_model.embeddings.position_ids'] = torch.arange(12)[None]
    state['logit_scale'] = state['logit_scale'].half()
    write_safetensors(state, path)
    again = load(path, vision=dict(heads=2), text=dict(heads=2))
    for name, tensor in plain(model).items():
        assert torch.equal(again.state_dict()[name], tensor.half().float() if name == 'logit_scale' else tensor), name


def test_training_does_not_reach_the_file(tmp_path):
    """Mapped weights can be trained; the file stays as it was, and can be replaced meanwhile."""
    model = tiny()
    for name in ('x.pt', 'x.safetensors'):
        path = str(tmp_path / name)
        save(model, path, names='eva') if name == 'x.pt' else write_safetensors(export(model, 'eva'), path)
        before = open(path, 'rb').read()
        again = load(path, heads=2)
        with torch.no_grad():
            for weight in again.parameters():
                weight.add_(1)
        assert open(path, 'rb').read() == before
        save(again, str(tmp_path / 'x.pt'))
        same(plain(load(str(tmp_path / 'x.pt'))), plain(again))


# ---- files that are not what they should be

class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def refused(path, words=''):
    with pytest.raises(Refused, match=words) as error:
        load(path)
    assert path in str(error.value) and '\n' not in str(error.value)


def test_pickles_that_run_code_are_refused(tmp_path):
    """Zipped or not, alone or between good tensors: one line that names the code, which is not run."""
    marker, path = tmp_path / 'ran', str(tmp_path / 'x.pt')
    for new in (True, False):
        for held in (Attack(marker), {**export(tiny(), 'eva'), 'spare': Attack(marker)}):
            torch.save(held, path, _use_new_zipfile_serialization=new)
            refused(path, r'asks for \w+\.system, which is code')
    assert not marker.exists()
    torch.load(path, weights_only=False)                                  # the attack would have worked
    assert marker.exists()


def write_archive(state, path):
    """A TorchScript archive of these tensors, as OpenAI's are."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        module, parts = root, name.split('.')
        for part in parts[:-1]:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(parts[-1], torch.nn.Parameter(tensor.clone(), requires_grad=False))
    torch.jit.save(torch.jit.script(root), path)


def replace_pickle(path, change):
    """Changes the pickle inside of an archive."""
    import zipfile
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, record in records.items():
            archive.writestr(name, change(record) if name.endswith('data.pkl') else record)


@pytest.mark.filterwarnings('ignore')
def test_torchscript_archives_are_read_without_torch_jit(tmp_path, monkeypatch):
    """The tensors of a scripted module tree, to the bit; torch.jit is not called."""
    model, path = random_clip(**OPENAI['vision'], text=OPENAI['text']), str(tmp_path / 'x.pt')
    write_archive(export(model, 'openai'), path)
    monkeypatch.setattr(torch.jit, 'load', None)
    same(plain(load(path, vision=dict(heads=2), text=dict(heads=2))), plain(model))


@pytest.mark.filterwarnings('ignore')
def test_archives_that_run_code_are_refused(tmp_path):
    """An archive whose pickle calls os.system before its tensors: one line, nothing run."""
    marker, path = tmp_path / 'ran', str(tmp_path / 'x.pt')
    write_archive(export(random_clip(**OPENAI['vision'], text=OPENAI['text']), 'openai'), path)
    command = f'touch {marker}'.encode()
    attack = b'cposix\nsystem\n(X' + len(command).to_bytes(4, 'little') + command + b'tR0'
    replace_pickle(path, lambda record: record[:2] + attack + record[2:])
    refused(path, r'asks for posix\.system, which is code')
    assert not marker.exists()
    import pickle
    with pytest.raises(Exception):                       # a plain unpickler runs it, then misses torch's storages
        pickle.loads(b'\x80\x02' + attack + b'cnone\nnone\n.')
    assert marker.exists()


@pytest.mark.filterwarnings('ignore')
def test_archive_tensors_stay_in_their_storage(tmp_path):
    """A tensor that claims more than its storage holds is refused."""
    path = str(tmp_path / 'x.pt')
    write_archive({'class_embedding': torch.ones(7), 'ln_post.weight': torch.ones(3)}, path)
    replace_pickle(path, lambda record: record.replace(b'(K\x07t', b'(K\x7ft'))
    refused(path, 'not a checkpoint of tensors')


def torch_reads_safetensors(monkeypatch):
    """torch.load passes what ends in .safetensors to this package, if it is there, with errors of its own kind."""
    class SafetensorError(Exception):
        pass

    def load_file(path, device):
        raise SafetensorError('invalid header')

    package = types.ModuleType('safetensors')
    package.torch = types.ModuleType('safetensors.torch')
    package.torch.load_file = load_file
    monkeypatch.setitem(sys.modules, 'safetensors', package)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', package.torch)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('installed', [False, True])
def test_truncated_files_are_refused(tmp_path, monkeypatch, installed):
    """Whatever the format and wherever it ends; with the package safetensors and without."""
    if installed:
        torch_reads_safetensors(monkeypatch)
    model = random_clip(**OPENAI['vision'], text=OPENAI['text'])
    paths = [str(tmp_path / name) for name in ('ours.pt', 'openai.pt', 'old.pt', 'jit.pt', 'x.safetensors')]
    save(model, paths[0])
    save(model, paths[1], names='openai')
    torch.save(export(model, 'openai'), paths[2], _use_new_zipfile_serialization=False)
    write_archive(export(model, 'openai'), paths[3])
    write_safetensors(export(model, 'Hugging Face CLIP'), paths[4])
    for path in paths:
        whole = open(path, 'rb').read()
        for length in (1, 9, 100, len(whole) // 2, len(whole) - 9):
            with open(path, 'wb') as file:
                file.write(whole[:length])
            refused(path)


def test_wrong_headers_are_refused(tmp_path):
    """A safetensors header that points outside, disagrees with itself, or is not one."""
    path, state = str(tmp_path / 'x.safetensors'), {'a': torch.ones(4)}
    good = dict(dtype='F32', shape=[4], data_offsets=[0, 16])
    for change in (dict(data_offsets=[8, 24]), dict(data_offsets=[-16, 0]), dict(shape=[5]), dict(dtype='F3'),
                   dict(shape=3), dict(data_offsets=None)):
        write_safetensors(state, path, a={**good, **change})
        refused(path, 'not a checkpoint of tensors')


@pytest.mark.parametrize('change, words', [
    (lambda state: state.pop('blocks.1.attn.k_proj.weight'), r'missing blocks\.1\.attn\.k_proj\.weight'),
    (lambda state: state.pop('blocks.2.mlp.w3.bias'), r'missing blocks\.2\.mlp\.w3\.bias'),
    (lambda state: state.pop('pos_embed'), 'miss pos_embed'),
    (lambda state: state.update({'blocks.0.attn.k_proj.bias': torch.ones(16)}), 'unexpected blocks.0.attn.k_proj.bias'),
    (lambda state: state.update({'norm.bias': torch.ones(3)}), r'norm\.bias of shape \[3\] instead of \[16\]'),
    (lambda state: state.update({'blocks.0.mlp.w1.bias': torch.ones(3)}), r'mlp\.w1\.bias, .*w2\.bias differ in shape'),
    (lambda state: state.update({'pos_embed': torch.ones(3)}), 'EVA-02 MIM'),
    (lambda state: state.update({'pos_embed': torch.ones(1, 8, 16)}), r'pos_embed of shape \[1, 8, 16\]'),
    (lambda state: state.clear(), 'no known model'),
])
def test_wrong_tensors_are_named_in_the_files_words(tmp_path, change, words):
    path, state = str(tmp_path / 'x.pt'), export(tiny(**EVA02, head=5), 'eva')
    change(state)
    torch.save(state, path)
    refused(path, words)


def test_options_of_nobody_are_refused(tmp_path):
    """A misspelt option, and a tower's option without its tower."""
    path = str(tmp_path / 'x.pt')
    save(tiny(), path)
    with pytest.raises(Refused, match="a ViT has no head_dim"):
        load(path, head_dim=3)
    save(random_clip(), path)
    with pytest.raises(Refused, match=r"a CLIP has no heads; .* vision=dict\(heads=\.\.\.\)"):
        load(path, heads=3)


# ---- files of ours whose values cannot be

def change_tensor(change):
    """Puts another tensor in the place of a weight, or what is none."""
    def apply(held):
        held['state_dict']['norm.weight'] = change(held['state_dict']['norm.weight'])
    return apply


def options(**changes):
    return lambda held: held['config'].update(changes)


def extras(**changes):
    return lambda held: held['extra'].update(changes)


def without(part):
    return lambda held: held.pop(part)


def two_names(held):
    held['state_dict'][5] = held['state_dict'].pop('norm.weight')


WRONG = [
    (without('name'), 'has no name'), (without('config'), 'has no config'), (without('extra'), 'has no extra'),
    (without('state_dict'), 'has no state_dict'), (lambda held: held.update(extra=[1]), 'extra is a list'),
    (lambda held: held.update(name='\x1b[31m\n'), r'this is a \[31m'), (two_names, 'name in it is a int'),

    (change_tensor(lambda x: None), 'norm.weight is a NoneType'),
    (change_tensor(lambda x: 'ones'), 'norm.weight is a str'),
    (change_tensor(lambda x: x.to_sparse()), 'norm.weight is a torch.sparse_coo'),
    (change_tensor(lambda x: x.to('meta')), 'norm.weight .* on meta'),
    (change_tensor(lambda x: x.to(torch.complex64)), 'norm.weight .* of torch.complex64'),
    (change_tensor(lambda x: torch.quantize_per_tensor(x, .1, 0, torch.qint8)), 'norm.weight .* of torch.qint8'),
    (change_tensor(lambda x: x.to(torch.float8_e4m3fn)), 'norm.weight .* of torch.float8'),
    (change_tensor(lambda x: x.long()), 'norm.weight of torch.int64 instead of floats'),
    (change_tensor(lambda x: x[:0]), r'norm.weight of shape \[0\]'),
    (change_tensor(lambda x: torch.ones(1).expand(10 ** 6, 10 ** 6)), 'norm.weight .* is larger than the file'),
    (change_tensor(lambda x: x * math.nan), '16 of 16 values of norm.weight are NaN'),
    (change_tensor(lambda x: F.pad(x[1:], (1, 0), value=-math.inf)), '1 of 16 values of norm.weight'),
    (change_tensor(lambda x: x.double().abs() * 1e300), '16 of 16 values of norm.weight'),

    (options(depth='3'), 'depth is a str, expected int'), (options(depth=10 ** 6), 'depth 1000000 does not fit'),
    (options(depth=10 ** 600), 'depth 1e.18 does not fit'), (options(heads=0), 'heads 0 does not fit'),
    (options(width=10 ** 9), 'width 1000000000'), (options(width=-16), 'width -16'), (options(width=None), 'NoneType'),
    (options(patch_size=0), 'patch_size 0'), (options(image_size=math.nan), 'image_size is a float'),
    (options(image_size=8192, patch_size=1), 'tokens 67108864 does not fit'), (options(frames=0), 'frames 0'),
    (options(mean=(0, 0)), 'mean has 2 numbers'), (options(std=[1, 1, 0]), 'std 0 does not fit'),
    (options(mean=('a', 0, 0)), 'mean holds a str'), (options(drop_path=math.nan), 'drop_path nan'),
    (options(pool='max'), "pool is 'max'"), (options(act=[[]]), 'act is a tuple'), (options(window=2), "pool='map'"),

    (extras(merges=5), 'merges are no list'), (extras(merges=['a b', None]), 'merges are no list'),
    (extras(classes='abcde'), 'classes are no list'), (extras(classes=['a']), 'names 1 classes, its head has 5'),
    (extras(target=7), 'target is a int'), (extras(target='tokens'), 'codebook is a NoneType'),
    (extras(codebook=torch.ones(4, 3)), 'no finite table of 5 rows'), (extras(image_size=0), 'image_size 0'),
    (extras(codebook=torch.full((5, 3), math.nan)), 'no finite table'), (extras(image_size='64'), 'holds a str'),
]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('change, words', WRONG, ids=[words for _, words in WRONG])
def test_what_no_file_of_ours_holds_is_refused(tmp_path, change, words):
    """A part, a tensor, an option or an extra that cannot be: a line that names the file and the thing."""
    path = str(tmp_path / 'x.pt')
    save(tiny(head=5), path)
    held = torch.load(path)
    change(held)
    torch.save(held, path)
    refused(path, f'^{path}: .*{words}')


def test_large_finite_weights_load(tmp_path):
    """Their sum is infinite, they are not."""
    path, model = str(tmp_path / 'x.pt'), tiny()
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    save(model, path)
    same(plain(load(path)), plain(model))


def test_what_two_names_share_becomes_two_weights(tmp_path):
    """One memory under two names would be trained as one."""
    path = str(tmp_path / 'x.pt')
    save(tiny(), path)
    held = torch.load(path)
    held['state_dict']['blocks.1.norm1.weight'] = held['state_dict']['blocks.0.norm1.weight']
    torch.save(held, path)
    blocks = load(path).blocks
    with torch.no_grad():
        blocks[0].norm1.weight.add_(1)
    assert torch.equal(blocks[0].norm1.weight, blocks[1].norm1.weight + 1)


def test_lists_in_a_config_are_tuples(tmp_path):
    """As JSON has them; a whole number is a float too."""
    path = str(tmp_path / 'x.pt')
    save(tiny(), path)
    held = torch.load(path)
    held['config'].update(mean=[0, .5, .5], std=[1, 1, 1], drop_path=0)
    torch.save(held, path)
    assert load(path).normalize(torch.full((1, 3, 2, 2), 255))[0, :, 0, 0].tolist() == [1, .5, .5]


def test_wrappers_of_any_depth_are_peeled(tmp_path):
    """In any order; one that holds itself holds no model."""
    model, path = tiny(head=5), str(tmp_path / 'x.pt')
    held = export(model, 'eva')
    for wrapper in ('state_dict', 'model', 'module', 'model', 'model_ema', 'state_dict'):
        held = {wrapper: held, 'epoch': 3}
    torch.save(held, path)
    same(plain(load(path, heads=2)), plain(model))
    held = {'epoch': 3}
    held['model'] = held
    torch.save(held, path)
    refused(path, 'no known model')


@pytest.mark.parametrize('family, name, tensor, words', [
    ('EVA-01 MIM', 'blocks.1.attn.proj.bias', torch.full((16,), math.nan), '16 of 16 values of blocks.1.attn.proj.bias'),
    ('EVA-01 MIM', 'blocks.99999999.norm1.bias', torch.ones(16), 'depth 100000000 does not fit'),
    ('EVA-01 MIM', 'patch_embed.proj.weight', torch.ones(16, 3, 0, 0), 'patch_size 0 does not fit'),
    ('EVA-01 MIM', 'cls_token', torch.ones(1, 1, 1).expand(1, 1, 10 ** 9), 'larger than the file'),
    ('EVA-02 MIM', 'blocks.0.attn.q_proj.weight', torch.ones(16, 16).to_sparse(), 'sparse_coo'),
    ('EVA-L classifier, class token', 'blocks.0.attn.qkv.bias', torch.tensor(1.), 'qkv.bias has 0 dimensions'),
    ('OpenAI CLIP', 'visual.proj', torch.ones(16), 'visual.proj has 1 dimensions'),
    ('OpenAI CLIP', 'text_projection', torch.ones(2, 3, 4), 'text_projection has 3 dimensions'),
    ('Hugging Face CLIP', 'text_projection.weight', torch.tensor(1.), 'lack a dimension'),
])
def test_what_no_released_file_holds_is_refused(tmp_path, family, name, tensor, words):
    """Values, shapes and counts that no model has, before one is built."""
    if 'CLIP' in family:
        state = export(random_clip(**OPENAI['vision'], text=OPENAI['text']), family)
    else:
        vits = {'EVA-02 MIM': dict(EVA02, head=5), 'EVA-01 MIM': dict(head=5)}
        state = export(tiny(**vits.get(family, dict(pool='class', head=5))), family)
    path = str(tmp_path / 'x.pt')
    torch.save({**state, name: tensor}, path)
    refused(path, words)


def test_what_is_no_file_is_refused(tmp_path):
    """A folder, a pipe that nobody writes to, a device without an end, nothing."""
    os.mkfifo(tmp_path / 'pipe')
    for path in (str(tmp_path), str(tmp_path / 'pipe'), '/dev/zero'):
        refused(path, 'is not a file')
    refused(str(tmp_path / 'nothing.pt'), 'does not exist')


@pytest.mark.filterwarnings('ignore')
def test_archives_hold_no_more_than_they_weigh(tmp_path):
    """Neither what unpacks to more than four times the file, nor a pickle too long for a list of tensors."""
    path = str(tmp_path / 'x.pt')
    write_archive(export(random_clip(**OPENAI['vision'], text=OPENAI['text']), 'openai'), path)
    whole = open(path, 'rb').read()
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x/data/999', bytes(10 ** 7))
    refused(path, 'not a checkpoint of tensors')
    open(path, 'wb').write(whole)
    replace_pickle(path, lambda record: record + bytes(m.LONGEST_INDEX))       # nothing reads behind the end
    refused(path, 'not a checkpoint of tensors')


def test_modules_that_double_are_refused(tmp_path):
    """In 1,400 bytes a module that holds one twice, which holds one twice: 2^40 tensors."""
    tensor = b'ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0000'
    tensor += b'X\x03\0\0\0cpuK\x01tQK\0K\x01\x85K\x01\x85\x89NtR'
    module = b'c__torch__\nModule\n)\x81}'
    pickled = b'\x80\x02' + module + b'X\x01\0\0\0t' + tensor + b'sb'
    for i in range(40):
        held = b'h' + bytes([i]) + b's'
        pickled += b'q' + bytes([i]) + module + b'X\x01\0\0\0a' + held + b'X\x01\0\0\0b' + held + b'b'
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as archive:
        for name, record in dict(constants=b'', data=pickled + b'.').items():
            archive.writestr(f'x/{name}.pkl', record)
        archive.writestr('x/data/0', b'\0\0\0\0')
    refused(str(tmp_path / 'x.pt'), 'not a checkpoint of tensors')


def test_overlaps_and_gaps_are_refused(tmp_path):
    """In a .safetensors file each tensor begins where the one before ends; a header of 2^60 bytes is none."""
    path, state = str(tmp_path / 'x.safetensors'), {'a': torch.ones(4), 'b': torch.ones(4)}
    for offsets in ([0, 16], [12, 28], [12, 32], [20, 36], [32, 16]):
        write_safetensors(state, path, b=dict(dtype='F32', shape=[4], data_offsets=offsets))
        refused(path, 'not a checkpoint of tensors')
    write_safetensors(state, path)
    whole = open(path, 'rb').read()
    start = 8 + int.from_bytes(whole[:8], 'little')
    for length in (2 ** 60, 2 ** 25, 1, start - 8 + m.LONGEST_INDEX):           # the last is true: of spaces
        header = whole[8:start] + b' ' * m.LONGEST_INDEX
        open(path, 'wb').write(length.to_bytes(8, 'little') + header + whole[start:])
        refused(path, 'not a checkpoint of tensors')


# ---- memory, and the command

MEASURE = """
import os, sys, model
def private():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon'))
model.load(sys.argv[1])
kept = []
for path in sys.argv[2:]:
    before = private()
    kept.append(model.load(path))
    total = sum(weight.sum() for weight in kept[-1].parameters())           # every page is touched
    print('copied', (private() - before) * 1024 / os.path.getsize(path))
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc')
def test_private_memory_after_loading(tmp_path):
    """Where tensors map one to one they stay in the file: less than a tenth of it is copied, and 1.2 is allowed."""
    small, ours, eva, tensors = (str(tmp_path / name) for name in ('small.pt', 'ours.pt', 'eva.pt', 'x.safetensors'))
    model = ViT(ViTConfig(width=640, depth=5, heads=10, mlp_width=2560, patch_size=14, image_size=56))
    save(tiny(), small)
    save(model, ours)
    save(model, eva, names='eva')
    write_safetensors(export(model, 'eva'), tensors)
    assert min(os.path.getsize(path) for path in (ours, eva, tensors)) > 95e6
    run = subprocess.run([sys.executable, '-c', MEASURE, small, ours, eva, tensors], capture_output=True, text=True,
                         cwd=os.path.dirname(os.path.abspath(m.__file__)), env={**os.environ, 'OMP_NUM_THREADS': '1'})
    copied = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith('copied')]
    assert len(copied) == 3 and max(copied) < 0.1, run.stdout + run.stderr


@pytest.mark.parametrize('names', ['ours', 'eva'])
def test_description(tmp_path, names):
    """python model.py FILE: the family of its names, the model's options and shapes."""
    path, model = str(tmp_path / 'x.pt'), tiny(**EVA02, head=5, heads=4, width=64, mlp_width=170)
    save(model, path, names=names)
    run = subprocess.run([sys.executable, os.path.abspath(m.__file__), path], capture_output=True, text=True)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert run.returncode == 0 and ('EVA-02 MIM' in run.stdout) == (names == 'eva')
    for word in (f'{parameters:,} parameters', 'patch_size=4, image_size=16', "rope='index'", 'pos_embed: [1, 17, 64]'):
        assert word in run.stdout, run.stdout


def test_command_on_no_model(tmp_path):
    """python model.py FILE: a line and exit code 2."""
    path = str(tmp_path / 'x.pt')
    open(path, 'w').write('hello')
    run = subprocess.run([sys.executable, os.path.abspath(m.__file__), path], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count('\n') == 1 and path in run.stderr


@pytest.mark.parametrize('statistics, said', [
    ('x', 'expected a list'), ([1.], 'statistics 0'), ([torch.zeros(3, 4)], '2 rows'),
    ([torch.full((2, 4), math.nan)], 'finite')])
def test_statistics_of_targets_are_checked(tmp_path, statistics, said):
    """A file may say anything; what is no table of means and deviations is one line."""
    path = str(tmp_path / 'x.pt')
    save(tiny(), path, statistics=statistics)
    with pytest.raises(Refused, match=said):
        load(path)


def test_a_position_that_fits_nowhere_is_no_full_disk():
    """torch says 'unexpected pos 64 vs 0' where a disk is full, and we 'unexpected pos_embed' of a tensor."""
    assert m.first_line(RuntimeError('weights do not fit: unexpected pos_embed')).endswith('pos_embed')
    assert m.first_line(RuntimeError('unexpected pos 64 vs 0')) == 'No space left on device'
