"""
Stage 0, the teacher: a ViT and a text transformer learn to tell which caption belongs to which image. What the ViT
then says of each patch is what EVA regresses. CLIP, arXiv:2103.00020; EVA-CLIP, arXiv:2211.07636, section 2.3.

    python clip_train.py --out_dir out/teacher             # the built-in teacher: the world, minutes on a laptop
    python clip_train.py --data photos --out_dir out/mine  # any folder with classes or captions
    python clip_train.py --vision eva.pt                   # EVA-CLIP: EVA as the image tower
    python clip_train.py --eval --init clip.pt --data val  # zero-shot classification and retrieval
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
    vision: str = option('', "file whose image tower to start from: EVA's, a CLIP's; its head is not used")
    text: list = option((), "file of a CLIP whose text tower to start from; with --image: sentences to choose from")
    bpe: str = option('', "OpenAI's merges (bpe_simple_vocab_16e6.txt.gz); without it the vocabulary is learnt")
    embed: int = option(64, 'width of the space that images and texts share')
    drop_tokens: float = option(0., 'share of the patches that training hides from the image tower (EVA-CLIP-g+: .5)')
    drop_path: float = option(0., 'chance of skipping a residual branch in the last block, growing linearly with depth')
    optimizer: str = option('adamw', 'adamw, or lamb for batches of 100,000 (EVA-CLIP-g+)')
    text_lr: float = option(0., "highest learning rate of the text tower; 0: the image tower's, --lr")
    layer_decay: tuple = option((1., 1.), 'of the learning rate, once a layer down, in the image and the text tower')
    warmup_steps: int = option(100, 'steps of linear warm-up')
    weight_decay: float = option(.05, 'of matrices; vectors have none')
    betas: tuple = option((.9, .98), "AdamW's; EVA-CLIP uses .98 for stability")
    grad_clip: float = option(5., 'largest global gradient norm')
    classes: str = option('', "file of class names, a line each: 'name' in the data's order, or 'folder<TAB>name'")
    templates: str = option('', 'file of sentences with {} for the class, a line each')
    whole: bool = option(False, 'with --eval: all images of a set without train/ and val/, not its validation 5%')
    eps, min_lr = 1e-6, 0.      # the optimizer's; the learning rate at the last step. No flags: nobody sets them twice


RECIPES = {  # differences from the defaults. b, l, g: EVA-CLIP's, from --vision EVA and --text CLIP; the rest ours
    'pico':  dict(batch_size=128, steps=700, lr=1.5e-3, save_every=250),
    'nano':  dict(batch_size=128, steps=700, lr=1.5e-3, save_every=250),
    'micro': dict(batch_size=128, steps=700, lr=1.5e-3, save_every=250),
    'mini':  dict(batch_size=256, steps=4000, lr=1e-3, embed=128),
    'ti':    dict(batch_size=512, steps=20_000, lr=1e-3, embed=192, warmup_steps=500),
    's':     dict(batch_size=1024, steps=50_000, lr=5e-4, embed=384, warmup_steps=2000),
    'b':     dict(batch_size=131_072, steps=61_000, lr=2e-4, text_lr=2e-5, layer_decay=(.75, .75), optimizer='lamb',
                  embed=512, warmup_steps=2000),                                    # EVA-02-CLIP-B, 8B pairs
    'l':     dict(batch_size=131_072, steps=30_500, lr=4e-4, text_lr=4e-5, layer_decay=(.85, .75), optimizer='lamb',
                  embed=768, warmup_steps=2000),                                    # EVA-02-CLIP-L, 4B pairs
    'g':     dict(batch_size=40_960, steps=268_000, lr=4e-4, text_lr=4e-5, layer_decay=(.85, .75), drop_path=.4,
                  embed=1024, warmup_steps=2000, checkpoint_activations=True),      # EVA-CLIP-g, 11B of LAION-400M
}
TEXT_TOWERS = {  # the paper's g reads with CLIP-L's text tower, 768 x 12
    'b': dict(width=512, depth=12, heads=8),
    'l': dict(width=768, depth=12, heads=12),
    'g': dict(width=768, depth=12, heads=12)}
SMALL_TEXT_TOWER = dict(width=64, depth=2, heads=4)
TEMPLATES = ('a {}', 'a photo of a {}', 'one {}')       # zero-shot averages over these, or over --templates
NUM_EVAL = 1024         # validation images; --eval takes all of a folder's
NUM_RETRIEVAL = 256     # validation pairs among which a pair is found again; with --eval 5,000
NUM_PAIRS = 512         # scenes that test the world's pairs of colour and kind, seen and held out


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


def kept_patches(seed, position, num_patches, drop_tokens):
    """Which patches the image tower sees of each sample: [B, n], n = (1 - drop_tokens) * num_patches of them at random,
    a function of (seed, position). arXiv:2212.00794: at half of the patches a batch may be almost twice as large."""
    num = max(1, round(num_patches * (1 - drop_tokens)))
    return data.uniform(seed, 'keep', position, num_patches).argsort(1)[:, :num]


# ---- measuring --------------------------------------------------------------------------------------------------

def encode_texts(model, tokenizer, texts, device):
    """Unit features of sentences: [n, D]."""
    parts = [tokenizer(texts[i:i + 256]).to(device) for i in range(0, len(texts), 256)]
    return F.normalize(torch.cat([model.encode_text(part).float() for part in parts]), dim=-1)


def class_embeddings(model, tokenizer, names, device, templates=TEMPLATES):
    """One text feature per class, the mean over the templates: [K, D], L2-normalised."""
    texts = [template.replace('{}', name.replace('_', ' ')) for name in names for template in templates]
    features = encode_texts(model, tokenizer, texts, device)
    return F.normalize(features.view(len(names), len(templates), -1).mean(1), dim=-1)


def encode_images(model, batches, autocast):
    """Unit features of the batches' images [n, D], and what else each batch holds: {name: tensor [n, ...] or list}."""
    features, others = [], {}
    for batch in batches:
        with autocast:
            features.append(F.normalize(model.encode_image(model.normalize(batch['images'])).float(), dim=-1))
        batch['images'] = batch['images'][:0 if len(features) > 1 else 16].cpu()      # enough for a picture
        for name, values in batch.items():
            others.setdefault(name, []).append(values)
    join = lambda parts: torch.cat(parts) if torch.is_tensor(parts[0]) else sum(parts, [])
    return torch.cat(features), {name: join(parts) for name, parts in others.items()}


def zero_shot(features, labels, classes):
    """Accuracy of taking the class whose text is nearest: top-1, top-5, and the mean of the classes' own top-1.
    features [n, D]; labels [n]; classes [K, D]."""
    right = (features @ classes.T).topk(min(5, len(classes))).indices == labels[:, None]            # [n, 5]
    count = labels.bincount(minlength=len(classes))
    by_class = labels[right[:, 0]].bincount(minlength=len(classes))[count > 0] / count[count > 0]
    return dict(zero_shot_top1=right[:, 0].float().mean().item(), zero_shot_top5=right.any(1).float().mean().item(),
                zero_shot_by_class=by_class.mean().item(), chance=1 / len(classes))


def retrieval(similarity, texts):
    """Share of images whose text is among the 1, 5 and 10 best different ones, and of texts whose image is. Two images
    of the same words are not told apart by them: each is right. similarity [n images, n texts]; texts: list of n."""
    last, metrics = {text: i for i, text in enumerate(texts)}, {}           # where each of the different texts stands
    which = torch.tensor([last[text] for text in texts], device=similarity.device)
    different = which.unique()
    for name, scores, answers in (('image_to_text', similarity[:, different], different),
                                  ('text_to_image', similarity.T, which)):
        found = answers[scores.topk(min(10, len(answers))).indices] == which[:, None]               # [n, 10]
        metrics |= {f'{name}_{k}': found[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
    return dict(metrics, retrieval=(metrics['image_to_text_1'] + metrics['text_to_image_1']) / 2)


def world_pairs(model, tokenizer, device, autocast):
    """Zero-shot over all 160 pairs of colour and kind ('red star') on scenes of one object: of the pairs that training
    shows, and of the 24 that it never does; `among_24` offers only those 24."""
    names = [f'{colour} {kind}' for kind in data.KINDS for colour in data.COLOURS]
    classes, metrics = class_embeddings(model, tokenizer, names, device), {}
    for split, name in (('val', 'seen_pairs'), ('heldout', 'heldout_pairs')):
        batches = data.eval_batches(data.World(split, objects=1), 256, model.visual.image_size, NUM_PAIRS, device)
        features, batch = encode_images(model, batches, autocast)
        labels = batch['kind'][:, 0] * data.NUM_COLOURS + batch['colour'][:, 0]                     # [num]
        metrics[name] = ((features @ classes.T).argmax(1) == labels).float().mean().item()
    few = labels.unique()
    metrics['heldout_among_24'] = (few[(features @ classes[few].T).argmax(1)] == labels).float().mean().item()
    return dict(metrics, pairs_chance=1 / len(names))


def read_lines(path):
    """The lines of a text file that are not empty."""
    try:
        with open(path, encoding='utf-8') as file:
            lines = [line.rstrip('\n') for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} cannot be read as text ({M.first_line(error)})') from None
    if not lines:
        raise ValueError(f'{path} is empty; expected class names or sentences, a line each')
    return lines


def read_templates(path):
    lines = read_lines(path) if path else TEMPLATES
    for line in lines:
        if '{}' not in line:
            raise ValueError(f'{path}: {line!r} has no {{}} where the class goes; write like "a photo of a {{}}"')
    return lines


def read_classes(path, folders):
    """Names of the classes, and the row of each of the data's classes among them, -1 for those left out. The lines of
    the file are names, as many as there are classes and in their order; or 'folder<TAB>name', of which those count
    whose folder is there: one file of ImageNet's 1,000 serves its variants of 200."""
    names, chosen = read_lines(path) if path else folders, folders
    if path and all('\t' in name for name in names):
        name_of = dict(name.split('\t', 1) for name in names)
        chosen = [folder for folder in folders if folder in name_of]
        print0(f"{len(chosen)} of the data's {len(folders)} classes are among the {len(names)} of {path}")
        names = [name_of[folder] for folder in chosen]
    if len(names) != len(chosen) or path and not names:
        raise ValueError(f'{path} has {len(names)} names for the {len(folders)} classes of the data ('
                         f'{", ".join(folders[:3])}, ...); give one a line in this order, or "folder<TAB>name" lines')
    row = {folder: i for i, folder in enumerate(chosen)}
    return names, [row.get(folder, -1) for folder in folders]


@torch.no_grad()
def evaluate(model, dataset, tokenizer, cfg, device, autocast, picture=None):
    """Zero-shot accuracy on the validation classes with its chance, retrieval, and the world's held-out pairs."""
    image_size, num = model.visual.image_size, len(dataset) if cfg.eval and dataset.reads_files else NUM_EVAL
    batches = data.eval_batches(dataset, min(cfg.batch_size, 256), image_size, num, device, cfg.workers, share=1.)
    features, batch = encode_images(model, batches, autocast)
    metrics, texts = {}, batch.get('captions', [])[:5000 if cfg.eval else NUM_RETRIEVAL]
    if cfg.classes or dataset.classes:
        names, rows = read_classes(cfg.classes, dataset.label_names)
        labels = torch.tensor(rows, device=device)[batch['labels']]
        classes = class_embeddings(model, tokenizer, names, device, read_templates(cfg.templates))
        metrics |= zero_shot(features[labels >= 0], labels[labels >= 0], classes)
    if texts:
        similarity = features[:len(texts)] @ encode_texts(model, tokenizer, texts, device).T    # [n images, n texts]
        metrics |= retrieval(similarity, texts)
        if picture:
            draw_retrieval(picture, batch['images'], similarity, texts)
    if isinstance(dataset, data.World):
        metrics |= world_pairs(model, tokenizer, device, autocast)
    return metrics


@torch.no_grad()
def patch_probes(model, dataset, seed):
    """Linear probes of what most of each patch shows (a ground or a kind), from the teacher's patch features, from raw
    pixels, and from the features of a ViT that never learnt: does the teacher know what its patches are?"""
    vision, device, size = model.config['vision'], model.logit_scale.device, model.visual.patch_size
    untrained = M.init_weights(M.ViT(**vision), seed).to(device)
    pixels, labels = [], []
    for position in torch.arange(768).split(64):
        batch = dataset.batch(position, vision['image_size'], device=device, want=('images', 'semantic'))
        classes = F.one_hot(batch['semantic']).permute(0, 3, 1, 2).float()          # [B, K, H, W]
        labels.append(F.avg_pool2d(classes, size).argmax(1).flatten())                          # [B * N]
        pixels.append(model.normalize(batch['images']))
    pixels, labels = torch.cat(pixels), torch.cat(labels)
    features = dict(patch_probe=model.patch_features(pixels), patch_probe_untrained=untrained.patch_features(pixels),
                    patch_probe_pixels=F.unfold(pixels, size, stride=size).transpose(1, 2))
    half = len(labels) // 2
    return {name: M.linear_probe(x.flatten(0, 1)[:half], labels[:half], x.flatten(0, 1)[half:], labels[half:])
            for name, x in features.items()}


def draw_retrieval(path, images, similarity, texts, rows=8):
    """Twice `rows` validation images, each with its caption and the one that the model picks among all."""
    tile, font = 96, ImageFont.load_default(13)
    sheet = Image.new('RGB', (2 * 560, rows * (tile + 8) + 8), 'white')
    draw = ImageDraw.Draw(sheet)
    for n, best in enumerate(similarity[:2 * rows].argmax(1).tolist()):
        x, y = n // rows * 560 + 8, n % rows * (tile + 8) + 8
        sheet.paste(Image.fromarray(images[n].permute(1, 2, 0).numpy()).resize((tile, tile), Image.NEAREST), (x, y))
        colour = '#00704a' if texts[n] == texts[best] else '#b04000'
        draw.text((x + tile + 8, y + 24), f'is:    {texts[n]}'[:72], fill='black', font=font)
        draw.text((x + tile + 8, y + 48), f'finds: {texts[best]}'[:72], fill=colour, font=font)
    run.on_first(sheet.save, path)


def cut(text):
    """Ids [B, 77] without the columns that follow every caption's end, the largest id."""
    return text[:, :int(text.argmax(1).max()) + 1]


def prepare(batches, tokenizer, cfg, vision, start, rank, world):
    """Adds what the loop needs, on the CPU, so that nothing waits for the device: the captions' ids [B, T], the patches
    kept [B, n], what drop path decides by [B, depth, 2]. All are functions of the sample's position in the run."""
    for step, batch in enumerate(batches, start):
        num = len(batch['captions'])
        position = step * cfg.batch_size + rank * num + torch.arange(num)
        batch['text'] = cut(tokenizer(batch['captions']))
        if cfg.drop_tokens:
            batch['keep'] = kept_patches(cfg.seed, position, vision.grid ** 2, cfg.drop_tokens)
        if cfg.drop_path:
            batch['drop'] = data.uniform(cfg.seed, 'drop', position, 2 * len(vision.blocks)).unflatten(1, (-1, 2))
        yield batch


def flops_per_pair(model, length):
    """Of both towers, forward, with captions of `length` tokens."""
    text = model.config['text']
    return run.flops_per_image(model.config['vision']) + run.transformer_flops(
        text['width'], text['depth'], 4 * text['width'], length)


def make_optimizer(model, cfg):
    """AdamW or LAMB, with a learning rate and a layer decay for each tower: what EVA has learnt moves less at its first
    layers, and CLIP's text tower less altogether (EVA-CLIP: a tenth)."""
    groups = [dict(params=[model.logit_scale], weight_decay=0., lr_scale=1.)]
    for tower, decay, scale in ((model.visual, cfg.layer_decay[0], 1.),
                                (model.text, cfg.layer_decay[1], cfg.text_lr / cfg.lr if cfg.text_lr else 1.)):
        groups += [{**group, 'lr_scale': scale * group['lr_scale']}
                   for group in run.param_groups(tower, cfg.weight_decay, decay)]
    if cfg.optimizer == 'lamb':
        return run.Lamb(groups, cfg.lr, cfg.betas, cfg.eps)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


# ---- the loop ---------------------------------------------------------------------------------------------------

def towers(cfg):
    """The two towers' options, the text tower's without its vocabulary. Small image towers pool their patches: with a
    class token's training alone, patch features of a minutes-long run mean little, and they are what EVA regresses."""
    vision = run.size_config(cfg, head=cfg.embed, drop_path=cfg.drop_path, mask_token=False,
                             pool='class' if cfg.size in TEXT_TOWERS else 'mean')
    return vision, dict(TEXT_TOWERS.get(cfg.size, SMALL_TEXT_TOWER), embed=cfg.embed)


def build(cfg, train_set):
    """-> (CLIP, tokenizer). Towers start from random weights, or from --vision and --text, whose sizes they then have,
    without what another task had taught them: prediction head or projection, mask token, temperature."""
    (vision, text), eva, reader = towers(cfg), None, None
    if cfg.vision:
        eva = M.load(cfg.vision)
        eva = eva.visual if isinstance(eva, M.CLIP) else eva
        asked = {name: vision[name] for name in ('head', 'drop_path', 'mask_token')} | {
            name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
        eva = M.load_state(eva.state_dict(), 'ViT', eva.config, **asked, pool=eva.pool or vision['pool'])
        vision = eva.config
    if cfg.text:
        clip = M.load(cfg.text[0], M.CLIP)
        tokenizer, reader = tokenizer_of(clip, cfg.text[0], cfg.bpe), clip.text
        text = {**clip.config['text'], 'embed': cfg.embed}
    else:
        tokenizer = data.Tokenizer.openai(cfg.bpe) if cfg.bpe else data.Tokenizer.learn(train_set.some_captions(20_000))
    model = M.init_weights(M.CLIP(vision, {**text, 'vocab': tokenizer.vocab_size}), cfg.seed)
    for tower, trained in ((model.visual, eva), (model.text, reader)):
        if trained:
            own = {name: weight for name, weight in tower.state_dict().items() if name.startswith('head.')}
            tower.load_state_dict({**trained.state_dict(), **own})
    return model, tokenizer


def tokenizer_of(model, path, bpe):
    """The vocabulary that a CLIP was trained with: its own, stored beside its weights, or OpenAI's."""
    tokenizer = data.Tokenizer(model.extra['merges']) if 'merges' in model.extra else data.Tokenizer.openai(bpe)
    if tokenizer.vocab_size != model.config['text']['vocab']:
        raise ValueError(f'{path} knows {model.config["text"]["vocab"]} tokens, the vocabulary has '
                         f'{tokenizer.vocab_size}; pass its merges with --bpe FILE')
    return tokenizer


@torch.no_grad()
def look(cfg, device):
    """--eval: zero-shot accuracy and retrieval of a trained model; --image: which sentences of --text, or else which
    five classes, are nearest to a picture."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    model = M.load(path, M.CLIP).to(device)
    tokenizer = tokenizer_of(model, path, cfg.bpe)
    if cfg.eval:
        dataset = data.open_data(cfg.data, 'test' if cfg.whole else 'val')
        metrics = evaluate(model, dataset, tokenizer, cfg, device, run.autocast(device))
        if not metrics:
            raise ValueError(f'{cfg.data} has neither classes with names nor captions; give --classes FILE')
        print0(run.table(metrics))
        return run.report_broken(dataset)
    if cfg.text:
        names, texts = cfg.text, encode_texts(model, tokenizer, cfg.text, device)
    else:
        names, _ = read_classes(cfg.classes, data.open_data(cfg.data, 'val').label_names)
        if not names:
            raise ValueError('--image needs words to choose from: --text "a dog" "a cat", or --data with class folders')
        texts = class_embeddings(model, tokenizer, names, device, read_templates(cfg.templates))
    image = data.load_crop(cfg.image, model.visual.image_size, share=1.)[None].to(device)
    features = F.normalize(model.encode_image(model.normalize(image)), dim=-1)
    probabilities = (model.logit_scale.exp() * features @ texts.T)[0].softmax(0)
    for probability, n in zip(*(x.tolist() for x in probabilities.topk(len(cfg.text) or min(5, len(names))))):
        print0(f'{probability:6.1%}  {names[n]}')


def check(cfg):
    """One line about options that do not fit together."""
    if cfg.init and (cfg.vision or cfg.text and not cfg.image):
        raise ValueError('--init is the whole model, --vision and --text are one tower each; give one or the other')
    if cfg.batch_size < 2 or cfg.micro_batch:
        raise ValueError('the contrastive loss compares all pairs of a batch at once: --batch_size is at least 2, and '
                         '--micro_batch does not apply')
    if cfg.optimizer not in ('adamw', 'lamb'):
        raise ValueError(f'--optimizer {cfg.optimizer} is unknown; use adamw or lamb')
    if len(cfg.layer_decay) != 2 or not all(0 < decay <= 1 for decay in cfg.layer_decay):
        raise ValueError(f"--layer_decay {cfg.layer_decay} are not two numbers up to 1, the image tower's and the text "
                         "tower's: .85,.75 is EVA-CLIP's")
    if max(cfg.drop_tokens, cfg.drop_path) >= 1 or cfg.text_lr and not cfg.lr:
        raise ValueError(f'--drop_tokens {cfg.drop_tokens} and --drop_path {cfg.drop_path} are below 1, and --lr '
                         f'{cfg.lr} above 0 where --text_lr is given, whose schedule follows it')
    read_templates(cfg.templates)


def train(cfg):
    """Trains two towers; leaves model.pt (with its tokenizer), log.jsonl, result.json and pictures."""
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/clip_train-{cfg.size}'
    if cfg.bench:
        raise ValueError('--bench measures pre-training: python mim_pretrain.py --bench')
    if cfg.plan:
        print0('the image tower alone:')
        return run.costs('plan', cfg, towers(cfg)[0], device)
    check(cfg)
    if cfg.eval or cfg.image:
        return look(cfg, device)
    train_set, val_set = data.open_data(cfg.data, 'train'), data.open_data(cfg.data, 'val')
    if not (train_set.has_captions and val_set.has_captions):
        raise ValueError(f'{cfg.data} lacks captions or class folders, in training or in validation; CLIP needs a .txt '
                         'beside each image, or one folder per class')
    read_classes(cfg.classes, val_set.label_names)
    if run.finished(cfg):
        return
    run.settle_steps(cfg, train_set)
    if cfg.init:
        model = M.load(cfg.init, M.CLIP, vision=dict(drop_path=cfg.drop_path))     # --size is then the recipe's alone
        tokenizer = tokenizer_of(model, cfg.init, cfg.bpe)
    else:
        model, tokenizer = build(cfg, train_set)
        if cfg.text_lr and not (cfg.vision and cfg.text):
            print0("the recipe is EVA-CLIP's, whose towers start from EVA (--vision) and from CLIP's text (--text)")
    model = run.to_device(model, cfg, device, mesh)
    optimizer = make_optimizer(model, cfg)
    start, _ = run.resume(cfg.out_dir, model, optimizer, cfg)
    print0(f'CLIP {cfg.size}: {run.count_parameters(model) / 1e6:.2f}M parameters, {model.visual.image_size} px, '
           f'vocabulary of {tokenizer.vocab_size:,}, {cfg.steps:,} steps of {cfg.batch_size} pairs on {device}; '
           f'a blind model has loss ln({cfg.batch_size}) = {math.log(cfg.batch_size):.2f}')
    length = cut(tokenizer(train_set.some_captions(256))).shape[1]
    autocast, log = run.autocast(device), run.Log(cfg, start, device, 3 * flops_per_pair(model, length))
    batches = data.batches(train_set, cfg.batch_size, model.visual.image_size, start, cfg.steps, cfg.seed, device,
                           cfg.workers, scale=(.9, 1), flip=False,      # almost the whole image: captions speak of it
                           rank=rank, world=world)
    batches = run.ahead(prepare(batches, tokenizer, cfg, model.visual, start, rank, world), device)
    for step, batch in zip(range(start, cfg.steps), batches):
        for group in optimizer.param_groups:
            group['lr'] = run.lr_at(step, cfg) * group['lr_scale']
        images, text = model.normalize(batch['images']), run.send(batch['text'], device)            # [B, T]
        keep, drop = (run.send(batch[name], device) if name in batch else None for name in ('keep', 'drop'))
        with autocast:
            image_features, text_features, scale = model(images, text, keep, drop)  # [B, D], [B, D]
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
