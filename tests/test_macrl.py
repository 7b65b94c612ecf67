"""MACRL: its views, its two losses, its queue, and runs of studies/macrl.py."""
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mim_pretrain
import model as M
import run
from conftest import cut_off

sys.path.insert(0, str(Path(__file__).parent.parent / 'studies'))
import macrl        # noqa: E402

VIT = M.ViTConfig(width=16, depth=1, heads=2, mlp_width=32, patch_size=4, image_size=16, mask_token=False)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(mim_pretrain, 'NUM_EVAL', 16)
    monkeypatch.setattr(mim_pretrain, 'BANK', 512)
    monkeypatch.setattr(run, 'NUM_PROBE', 32)
    monkeypatch.setattr(macrl, 'QUEUE', 20)


def config(folder, *flags):
    """A run of a second."""
    flags = ['--batch_size', '8', '--steps', '6', '--log_every', '1', '--device', 'cpu', '--out_dir', str(folder), *flags]
    return run.parse_config(macrl.Config, macrl.RECIPES, flags)


def column(folder, name='loss'):
    return [json.loads(line)[name] for line in open(folder / 'log.jsonl')]


def small_model():
    torch.manual_seed(0)
    return macrl.Macrl(VIT, seed=0)


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])), dim=1)


def test_info_nce_equals_a_loop():
    """-log of the own key's share of exp(cosine / temperature) among all keys and the queue."""
    queries, keys, queue = unit(3, 5), unit(4, 5)[:3], unit(7, 5)
    losses = []
    for n, query in enumerate(queries):
        others = [torch.exp(query @ key / macrl.TEMPERATURE) for key in [*keys, *queue]]
        losses.append(-torch.log(others[n] / sum(others)))
    torch.testing.assert_close(macrl.info_nce(queries, keys, queue), torch.stack(losses).mean())


def test_l1_is_of_the_hidden_patches():
    """The mean distance to their normalised pixels; what is drawn of a patch that was seen does not count."""
    model, predictions = small_model(), torch.randn(3, 16, 48)      # [B, N, 3 * 4 * 4]
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    keep = torch.tensor([[0, 3], [1, 2], [15, 4]])
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, keep, False)
    expected = (predictions - mim_pretrain.Pixels(4).of(images)).abs()[hidden].mean()
    predictions[~hidden] += 1
    model.draw.register_forward_hook(lambda layer, x, y: predictions)
    torch.testing.assert_close(model.reconstruct(torch.randn(3, 2, 16), images, keep), expected)


def test_the_strong_view_may_be_the_image_itself():
    """All of the area, gains of 1."""
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    u = torch.tensor([1., .3, .9, .5, .5, .5]).expand(2, -1)
    torch.testing.assert_close(macrl.strong_view(images, u), images.float(), atol=1e-3, rtol=0)


def test_the_strong_view_stays_within_the_image():
    """The smallest crop at a corner has the corner's pixels, and none from outside."""
    rows = torch.arange(0., 256., 4)[:, None].expand(64, 64)        # brightness is the row
    images = rows.expand(1, 3, 64, 64)
    u = torch.tensor([[0., 1., 1., .5, .5, .5]])
    view = macrl.strong_view(images, u)[0, 0, :, 0]
    assert view[-1] == pytest.approx(252, abs=1) and view[0] == pytest.approx(256 * (1 - .3 ** .5), abs=3)


def looked(model, images, keep):
    """(what is said of the patches, what the images are compared by)"""
    return model.look(model.encoder, model.projector, images, keep)


def test_hidden_patches_are_not_compared():
    """Whatever stands in them, the image's summary is the same, and another once a patch that is seen changes."""
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    model, keep = small_model(), torch.tensor([[5, 6], [6, 7]])     # of the second row of 4 x 4 patches
    before = looked(model, images, keep)[1]
    images[:, :, :4] = 0
    assert torch.equal(looked(model, images, keep)[1], before)
    images[0, :, 4:8] = 0
    assert not torch.allclose(looked(model, images, keep)[1], before)


def test_the_decoder_knows_which_patch_a_token_is_of():
    """Patches in another order are the same patches; the same tokens elsewhere are another image."""
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    model, keep = small_model(), torch.tensor([[5, 6, 0], [1, 9, 2]])
    torch.nn.init.normal_(model.decoder.attn.proj.weight)
    tokens = looked(model, images, keep)[0]
    loss = model.reconstruct(tokens, images, keep)
    torch.testing.assert_close(model.reconstruct(tokens.flip(1), images, keep.flip(1)), loss)
    assert abs(model.reconstruct(tokens.flip(1), images, keep) - loss) > 1e-6


def test_the_branches_see_unlike_shares(monkeypatch):
    """A quarter and half of 16 patches, and none in both; keys are of what the weak branch sees."""
    seen, look = [], macrl.Macrl.look

    def spy(model, encoder, projector, images, keep):
        seen.append(keep)
        return look(model, encoder, projector, images, keep)
    monkeypatch.setattr(macrl.Macrl, 'look', spy)
    small_model()(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8), torch.arange(3), seed=0)
    strong, weak, keys = [keep.tolist() for keep in seen]
    assert [len(rows[0]) for rows in (strong, weak)] == [4, 8] and keys == weak
    assert all(len({*a, *b}) == 12 for a, b in zip(strong, weak))


def test_the_queue_holds_the_newest_keys_of_the_slow_copy():
    """First in, first out: after three batches of 8 keys in a queue of 20, the last 20, newest batch first."""
    model, keys = small_model(), []
    model.slow[1].register_forward_hook(lambda layer, x, y: keys.append(F.normalize(y, dim=1)))
    for n in range(3):
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
        model(images, torch.arange(8) + 8 * n, seed=0)
    assert torch.equal(model.queue, torch.cat(keys[::-1])[:20])


def test_the_slow_copy_follows_by_a_hundredth():
    """It starts as the encoder does; each step it goes that part of the way to where the encoder is."""
    model = small_model()
    before = model.encoder.patch_embed.weight.detach().clone()
    assert torch.equal(model.slow[0].patch_embed.weight, before)
    model.encoder.patch_embed.weight.data += 1
    model(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.arange(2), seed=0)
    torch.testing.assert_close(model.slow[0].patch_embed.weight, before + .01)


def test_both_branches_draw_and_learn():
    """The L1 loss is the mean of theirs; the slow copy has no gradient."""
    model, parts = small_model(), []
    reconstruct = model.reconstruct
    model.reconstruct = lambda *arguments: parts.append(reconstruct(*arguments)) or parts[-1]
    contrast, l1 = model(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.arange(2), seed=0)
    torch.testing.assert_close(l1, sum(parts) / 2)
    (contrast + l1).backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert len(parts) == 2 and learning == {name for name, _ in model.named_parameters() if not name.startswith('slow')}
    assert not any(weight.requires_grad for weight in model.slow.parameters())


@pytest.mark.parametrize('flags, parts', [([], ['contrast', 'l1']), (['--contrast', '0'], ['l1']),
                                          (['--reconstruct', '0'], ['contrast'])])
def test_arms(tmp_path, flags, parts):
    """What is trained on is the sum of the losses that were asked for."""
    macrl.train(config(tmp_path, '--steps', '2', *flags))
    total = [sum(values) for values in zip(*[column(tmp_path, part) for part in parts])]
    assert column(tmp_path) == pytest.approx(total, rel=1e-5)


def test_stopped_and_resumed_run_has_the_same_losses(tmp_path):
    """A run that ends after step 4 of 6, its last checkpoint at 3, goes on as if it had not: the queue too."""
    macrl.train(config(tmp_path / 'straight'))
    cut = config(tmp_path / 'cut', '--save_every', '3')
    cut_off(macrl.train, cut)
    macrl.train(cut)
    assert column(tmp_path / 'cut') == column(tmp_path / 'straight')


def test_what_it_leaves_is_evaluated_teaches_and_starts(tmp_path, capsys):
    """Of a folder of pictures: mim_pretrain.py takes model.pt as --init of --eval, as --teacher, and as --init."""
    pictures = tmp_path / 'pictures'
    for n in range(24):
        folder = pictures / ('train' if n < 16 else 'val') / 'ab'[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 36), (9 * n, 255 - 9 * n, 90)).save(folder / f'{n}.png')
    macrl.train(config(tmp_path / 'run', '--steps', '2', '--data', str(pictures)))
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert {'loss', 'linear_top1', 'knn_top1'} <= result.keys()

    file = str(tmp_path / 'run' / 'model.pt')
    flags = ['--data', str(pictures), '--device', 'cpu', '--init', file, '--out_dir', str(tmp_path / 'mim')]
    capsys.readouterr()
    mim_pretrain.train(run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, [*flags, '--eval']))
    assert f"linear_top1          {result['linear_top1']:.4g}" in capsys.readouterr().out
    flags += ['--teacher', file, '--steps', '1', '--batch_size', '8']
    mim_pretrain.train(run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, flags))
    assert M.load(str(tmp_path / 'mim' / 'model.pt')).config.head == 64


@pytest.mark.parametrize('flags', [['--contrast', '0', '--reconstruct', '0'], ['--patch_size', '32'],
                                   ['--batch_size', '1']])
def test_what_cannot_learn_is_refused(tmp_path, flags):
    """Neither loss, one patch, or one image."""
    with pytest.raises(run.Refused, match='^needs one process'):
        macrl.train(config(tmp_path, *flags))


def test_its_constants_are_no_flags(tmp_path):
    """mim_pretrain.py evaluates, and goes on from other weights."""
    with pytest.raises(run.Refused, match='--init is no flag'):
        config(tmp_path, '--init', 'x.pt')
