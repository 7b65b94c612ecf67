"""The contrastive loss, zero-shot classification, and a real run of the teacher's stage."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import clip_train
import data
import model as M
import run
from clip_train import contrastive_loss


def test_loss_of_a_blind_model_is_ln_batch():
    features = F.normalize(torch.ones(16, 4), dim=-1)
    torch.testing.assert_close(contrastive_loss(features, features, 10.), torch.tensor(math.log(16.)))


def test_loss_is_symmetric_in_its_towers():
    image, text = (F.normalize(torch.randn(8, 4), dim=-1) for _ in range(2))
    torch.testing.assert_close(contrastive_loss(image, text, 5.), contrastive_loss(text, image, 5.))


def test_class_embeddings_average_the_templates():
    """Equal to a plain loop; underscores of folder names are read as spaces."""
    tokenizer = data.Tokenizer.learn(['a photo of a sea lion', 'a blue ring'])
    model = M.init_weights(M.CLIP(dict(M.SIZES['pico'], head=16, pool='mean'),
                                  dict(width=16, depth=1, heads=2, vocab=tokenizer.vocab_size, embed=16)))
    classes = clip_train.class_embeddings(model, tokenizer, ['sea_lion', 'ring'], 'cpu')
    for row, name in zip(classes, ('sea lion', 'ring')):
        features = [model.encode_text(tokenizer(t.format(name)))[0] for t in clip_train.TEMPLATES]
        mean = sum(x / x.norm() for x in features)
        torch.testing.assert_close(row, mean / mean.norm())


def test_recall_counts_equal_captions_as_right():
    """Two images of one caption are not told apart by it."""
    similarity = torch.tensor([[.1, .9], [.2, .8]])
    assert clip_train.recall_at_1(similarity, ['a', 'a']) == 1 and clip_train.recall_at_1(similarity, ['a', 'b']) == .25


@pytest.mark.parametrize('source', ['shapes', 'folder'])
def test_a_real_run_learns_and_leaves_a_teacher(tmp_path, monkeypatch, source):
    """30 steps on the world or on a folder of two classes: the loss falls, the file loads with its vocabulary."""
    from PIL import Image
    monkeypatch.setattr(clip_train, 'NUM_EVAL', 64)
    spec = 'shapes'
    if source == 'folder':
        spec = str(tmp_path / 'photos')
        for colour in ('red', 'blue'):
            (tmp_path / 'photos' / colour).mkdir(parents=True)
            for n in range(8):
                Image.new('RGB', (40, 30 + n), colour).save(tmp_path / 'photos' / colour / f'{n}.png')
    flags = ['--size', 'pico', '--data', spec, '--steps', '30', '--batch_size', '16', '--warmup_steps', '5', '--log_every',
             '1', '--out_dir', str(tmp_path / 'out'), '--device', 'cpu', '--save_every', '20']
    cfg = run.parse_config(clip_train.Config, clip_train.RECIPES, flags)
    clip_train.train(cfg)
    losses = [json.loads(line)['loss'] for line in open(tmp_path / 'out' / 'log.jsonl')]
    assert sum(losses[-5:]) < sum(losses[:5])
    teacher = M.load(str(tmp_path / 'out' / 'model.pt'))
    assert data.Tokenizer(teacher.extra['merges']).vocab_size == teacher.config['text']['vocab']
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert result['chance'] == (1 / 16 if source == 'shapes' else 1 / 2) and 'zero_shot_top1' in result
