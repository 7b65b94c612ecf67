"""
Stage 0, the teacher: a ViT and a text transformer learn to tell which caption belongs to which image. What the ViT
then says of each patch is what EVA regresses. CLIP, arXiv:2103.00020; EVA-CLIP, arXiv:2211.07636, section 3.4.

    python clip_train.py --out_dir out/teacher            # the built-in teacher: the world, minutes on a laptop
    python clip_train.py --data photos --out_dir out/mine # any folder with classes or captions
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import model as M
import run
from model import print0
from run import option


@dataclass
class Config(run.Run):
    bpe: str = option('', "OpenAI's merges (bpe_simple_vocab_16e6.txt.gz); without it the vocabulary is learnt")
    embed: int = option(64, 'width of the space that images and texts share')
    warmup_steps: int = option(100, 'steps of linear warm-up')
    min_lr: float = option(0., 'learning rate at the last step')
    weight_decay: float = option(.05, 'of matrices; vectors have none')
    betas: tuple = option((.9, .98), "AdamW's; EVA-CLIP uses .98 for stability")
    eps: float = option(1e-6, "AdamW's")
    grad_clip: float = option(5., 'largest global gradient norm')


RECIPES = {  # differences from the defaults; the small rows are ours, tuned on two cores
    'pico':  dict(batch_size=128, steps=700, lr=1.5e-3, save_every=250),
    'nano':  dict(batch_size=128, steps=700, lr=1.5e-3, save_every=250),
    'micro': dict(batch_size=128, steps=700, lr=1.5e-3, save_every=250),
    'mini':  dict(batch_size=256, steps=4000, lr=1e-3, embed=128),
    'ti':    dict(batch_size=512, steps=20_000, lr=1e-3, embed=192, warmup_steps=500),
    's':     dict(batch_size=1024, steps=50_000, lr=5e-4, embed=384, warmup_steps=2000),
    'b':     dict(batch_size=4096, steps=100_000, lr=5e-4, embed=512, warmup_steps=2000),
    'l':     dict(batch_size=16_384, steps=200_000, lr=4e-4, embed=768, warmup_steps=2000),
    'g':     dict(batch_size=40_960, steps=268_000, lr=4e-4, embed=1024, warmup_steps=2000,     # 11B pairs, LAION-400M
                  checkpoint_activations=True),
}
TEXT_TOWERS = {  # the paper's g reads with CLIP-L's text tower, 768 x 12
    'b': dict(width=512, depth=12, heads=8),
    'l': dict(width=768, depth=12, heads=12),
    'g': dict(width=768, depth=12, heads=12)}
SMALL_TEXT_TOWER = dict(width=64, depth=2, heads=4)
TEMPLATES = ('a {}', 'a photo of a {}', 'one {}')       # zero-shot averages over these
NUM_EVAL = 1024                                         # validation images


# ---- the idea ---------------------------------------------------------------------------------------------------

def contrastive_loss(image_features, text_features, scale):
    """Cross-entropy of finding each image's text among the whole batch's, and each text's image. Every process has its
    own rows in both directions; the mean over processes is the loss of the whole batch, and so are its gradients.
    image_features, text_features [B, D], L2-normalised; scale: exp of the learnt temperature."""
    image_features, text_features = image_features.float(), text_features.float()
    labels = M.get_rank() * len(image_features) + torch.arange(len(image_features), device=image_features.device)
    find_text = scale * image_features @ run.gather(text_features).T                # [B images, all texts]
    find_image = scale * text_features @ run.gather(image_features).T               # [B texts, all images]
    return (F.cross_entropy(find_text, labels) + F.cross_entropy(find_image, labels)) / 2


@torch.no_grad()
def class_embeddings(model, tokenizer, names, device):
    """One text feature per class, the mean over TEMPLATES: [K, D], L2-normalised."""
    texts = [template.format(name.replace('_', ' ')) for name in names for template in TEMPLATES]
    features = F.normalize(model.encode_text(tokenizer(texts).to(device)).float(), dim=-1)
    return F.normalize(features.view(len(names), len(TEMPLATES), -1).mean(1), dim=-1)


# ---- the loop ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, dataset, tokenizer, cfg, device, autocast, picture=None):
    """Zero-shot top-1 on the validation classes with its chance, and retrieval R@1 among 256 pairs each way."""
    image_size = model.config['vision']['image_size']
    batches = data.eval_batches(dataset, min(cfg.batch_size, 256), image_size, NUM_EVAL, device, cfg.workers)
    images, image_features, labels, texts = [], [], [], []
    for batch in batches:
        with autocast:
            image_features.append(F.normalize(model.encode_image(model.normalize(batch['images'])).float(), dim=-1))
        images.append(batch['images'].cpu())
        labels.append(batch['labels'].to(device) if 'labels' in batch else None)
        texts += batch['captions']
    images, image_features, metrics = torch.cat(images), torch.cat(image_features), {}
    if dataset.classes:
        logits = image_features @ class_embeddings(model, tokenizer, dataset.classes, device).T
        metrics['zero_shot_top1'] = (logits.argmax(1) == torch.cat(labels)).float().mean().item()
        metrics['chance'] = 1 / len(dataset.classes)
    text_features = F.normalize(model.encode_text(tokenizer(texts[:256]).to(device)).float(), dim=-1)
    similarity = image_features[:256] @ text_features.T                             # [256 images, 256 texts]
    metrics['retrieval'] = recall_at_1(similarity, texts[:256])
    if picture:
        draw_retrieval(picture, images, similarity, texts)
    return metrics


@torch.no_grad()
def patch_probes(model, dataset, seed):
    """Linear probes of what most of each patch shows (a ground or a kind), from the teacher's patch features, from raw
    pixels, and from the features of a ViT that never learnt: does the teacher know what its patches are?"""
    vision, device = model.config['vision'], model.logit_scale.device
    untrained = M.init_weights(M.ViT(**vision), seed).to(device)
    pixels, labels = [], []
    for position in torch.arange(768).split(64):
        batch = dataset.batch(position, vision['image_size'], device=device, want=('images', 'semantic'))
        classes = F.one_hot(batch['semantic']).permute(0, 3, 1, 2).float()          # [B, K, H, W]
        labels.append(F.avg_pool2d(classes, vision['patch_size']).argmax(1).flatten())          # [B * N]
        pixels.append(model.normalize(batch['images']))
    pixels, labels, size = torch.cat(pixels), torch.cat(labels), vision['patch_size']
    accuracy = {}
    for name, features in (('patch_probe', model.patch_features(pixels)),
                           ('patch_probe_pixels', F.unfold(pixels, size, stride=size).transpose(1, 2)),
                           ('patch_probe_untrained', untrained.patch_features(pixels))):
        x, half = features.flatten(0, 1), len(labels) // 2
        accuracy[name] = M.linear_probe(x[:half], labels[:half], x[half:], labels[half:])
    return accuracy


def recall_at_1(similarity, texts):
    """Share of queries whose best match reads as their own caption does, mean of both directions."""
    right = [texts[i] == texts[j] for i, j in enumerate(similarity.argmax(1).tolist())]
    right += [texts[i] == texts[j] for i, j in enumerate(similarity.argmax(0).tolist())]
    return sum(right) / len(right)


def draw_retrieval(path, images, similarity, texts, rows=8):
    """Twice `rows` validation images, each with its caption and the one that the model picks among all."""
    tile, font = 96, ImageFont.load_default(13)
    sheet = Image.new('RGB', (2 * 560, rows * (tile + 8) + 8), 'white')
    draw = ImageDraw.Draw(sheet)
    for n, best in enumerate(similarity[:2 * rows].argmax(1).tolist()):
        x, y = n // rows * 560 + 8, n % rows * (tile + 8) + 8
        picture = Image.fromarray(images[n].permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((tile, tile), Image.NEAREST), (x, y))
        right = texts[n] == texts[best]
        for line, (text, colour) in enumerate((('is:    ' + texts[n], 'black'),
                                               ('finds: ' + texts[best], '#00704a' if right else '#b04000'))):
            draw.text((x + tile + 8, y + 24 + 24 * line), text[:72], fill=colour, font=font)
    run.on_first(sheet.save, path)


def cut(text):
    """Ids [B, 77] without the columns that follow every caption's end, the largest id."""
    return text[:, :int(text.argmax(1).max()) + 1]


def add_text(batches, tokenizer):
    """Adds the captions' ids [B, T], on the CPU: a length read back from the device would make us wait for it."""
    for batch in batches:
        batch['text'] = cut(tokenizer(batch['captions']))
        yield batch


def flops_per_pair(model, length):
    """Of both towers, forward, with captions of `length` tokens."""
    text = model.config['text']
    return run.flops_per_image(model.config['vision']) + run.transformer_flops(
        text['width'], text['depth'], 4 * text['width'], length)


def build(cfg, tokenizer):
    """The two towers. Small teachers pool their patches: with a class token's training alone, patch features of a
    minutes-long run mean little, and they are what EVA regresses (OpenAI's CLIP pools a class token)."""
    vision = run.size_config(cfg, head=cfg.embed, pool='class' if cfg.size in TEXT_TOWERS else 'mean', mask_token=False)
    text = dict(TEXT_TOWERS.get(cfg.size, SMALL_TEXT_TOWER), vocab=tokenizer.vocab_size, embed=cfg.embed)
    return M.CLIP(vision, text)


def tokenizer_of(model, cfg):
    """The vocabulary that a CLIP was trained with: its own, stored beside its weights, or OpenAI's."""
    tokenizer = data.Tokenizer(model.extra['merges']) if 'merges' in model.extra else data.Tokenizer.openai(cfg.bpe)
    if tokenizer.vocab_size != model.config['text']['vocab']:
        raise ValueError(f'{cfg.init} knows {model.config["text"]["vocab"]} tokens, the vocabulary has '
                         f'{tokenizer.vocab_size}; pass its merges with --bpe FILE')
    return tokenizer


@torch.no_grad()
def look(cfg, val_set, device):
    """--eval: zero-shot accuracy and retrieval of a trained model; --image: the five classes nearest to a picture."""
    model = M.load(cfg.init or f'{cfg.out_dir}/model.pt', M.CLIP).to(device)
    tokenizer = tokenizer_of(model, cfg)
    if not val_set.classes and cfg.image:
        raise ValueError('--image needs names to choose from: --data with a folder per class')
    if cfg.eval:
        return print0(run.table(evaluate(model, val_set, tokenizer, cfg, device, run.autocast(device))))
    image = data.load_crop(cfg.image, model.visual.image_size)[None].to(device)
    features = F.normalize(model.encode_image(model.normalize(image)), dim=-1)
    logits = model.logit_scale.exp() * features @ class_embeddings(model, tokenizer, val_set.classes, device).T
    for probability, n in zip(*(x.tolist() for x in logits[0].softmax(0).topk(min(5, len(val_set.classes))))):
        print0(f'{probability:6.1%}  {val_set.classes[n]}')


def train(cfg):
    """Trains two towers; leaves model.pt (with its tokenizer), log.jsonl, result.json and pictures."""
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/clip_train-{cfg.size}'
    if cfg.bench:
        raise ValueError('--bench measures pre-training: python mim_pretrain.py --bench')
    if cfg.plan:
        print0('the image tower alone:')
        return run.costs('plan', cfg, run.size_config(cfg, head=cfg.embed), device)
    train_set, val_set = data.open_data(cfg.data, 'train'), data.open_data(cfg.data, 'val')
    if cfg.image:
        return look(cfg, val_set, device)
    if not (train_set.has_captions and val_set.has_captions):
        raise ValueError(f'{cfg.data} lacks captions or class folders, in training or in validation; CLIP needs a .txt '
                         'beside each image, or one folder per class')
    if cfg.eval:
        return look(cfg, val_set, device)
    if cfg.batch_size < 2 or cfg.micro_batch:
        raise ValueError('the contrastive loss compares all pairs of a batch at once: --batch_size is at least 2, and '
                         '--micro_batch does not apply')
    if run.finished(cfg):
        return
    run.settle_steps(cfg, train_set)
    if cfg.init:
        model = M.load(cfg.init, M.CLIP)     # whatever its sizes: --size is then the recipe's alone
        tokenizer = tokenizer_of(model, cfg)
    else:
        tokenizer = data.Tokenizer.openai(cfg.bpe) if cfg.bpe else data.Tokenizer.learn(train_set.some_captions(20_000))
        model = M.init_weights(build(cfg, tokenizer), cfg.seed)
    model = run.to_device(model, cfg, device, mesh)
    optimizer = run.make_optimizer(model, cfg)
    start, _ = run.resume(cfg.out_dir, model, optimizer, cfg)
    image_size = model.config['vision']['image_size']
    print0(f'CLIP {cfg.size}: {run.count_parameters(model) / 1e6:.2f}M parameters, {image_size} px, '
           f'vocabulary of {tokenizer.vocab_size:,}, {cfg.steps:,} steps of {cfg.batch_size} pairs on {device}; '
           f'a blind model has loss ln({cfg.batch_size}) = {math.log(cfg.batch_size):.2f}')
    length = cut(tokenizer(train_set.some_captions(256))).shape[1]
    autocast, log = run.autocast(device), run.Log(cfg, start, device, 3 * flops_per_pair(model, length))
    batches = data.batches(train_set, cfg.batch_size, image_size, start, cfg.steps, cfg.seed, device, cfg.workers,
                           scale=(.9, 1), flip=False,      # nearly the whole image: captions speak of all of it
                           rank=rank, world=world)
    batches = run.ahead(add_text(batches, tokenizer), device)
    for step, batch in zip(range(start, cfg.steps), batches):
        for group in optimizer.param_groups:
            group['lr'] = run.lr_at(step, cfg) * group['lr_scale']
        images, text = model.normalize(batch['images']), run.send(batch['text'], device)            # [B, T]
        with autocast:
            image_features, text_features, scale = model(images, text)              # [B, D], [B, D]
        loss = contrastive_loss(image_features, text_features, scale)
        loss.backward()
        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        if log.is_finite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))             # CLIP, section 2.5
        if log.due(step):
            log.write(step, loss=run.total(loss) / world, lr=optimizer.param_groups[0]['lr'], grad_norm=grad_norm)
        done, stopping = step + 1, log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg)
            if stopping:
                log.leave(done)
            log.say(step, **evaluate(model, val_set, tokenizer, cfg, device, autocast, f'{cfg.out_dir}/retrieval.png'))

    metrics = evaluate(model, val_set, tokenizer, cfg, device, autocast, f'{cfg.out_dir}/retrieval.png')
    run.save_model(model, f'{cfg.out_dir}/model.pt', merges=tokenizer.merges)
    if isinstance(val_set, data.World):
        metrics |= patch_probes(model, val_set, cfg.seed)
    log.finish(model, 'contrastive loss', {f'blind: ln {cfg.batch_size}': math.log(cfg.batch_size)}, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
