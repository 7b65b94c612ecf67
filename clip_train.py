"""
Stage 0, the teacher: a ViT and a text transformer learn which caption belongs to which image.
What the ViT then says of each patch is what EVA regresses.
CLIP, arXiv:2103.00020; EVA-CLIP, arXiv:2211.07636, section 2.3.

    python clip_train.py --out_dir out/teacher             # the built-in teacher, minutes on a laptop
    python clip_train.py --data photos --out_dir out/mine  # any folder with classes or captions
    python clip_train.py --vision eva.pt                   # EVA-CLIP: EVA as the image tower
    python clip_train.py --eval --init clip.pt --data val  # zero-shot classification and retrieval
"""
import math
import re
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

import data
import model as M
import run
from run import Refused, option, print0


@dataclass
class Config(run.Run):
    vision: str = option('', "file of a ViT or a CLIP, whose image tower to start from but for its head")
    text: str = option('', 'file of a CLIP, whose text tower to start from but for its projection')
    text_act: str = option('', "activation of the text tower: gelu, EVA-CLIP's, if empty",
                           choices=('', 'gelu', 'quick_gelu'))
    words: list = option((), 'with --image: sentences to choose from')
    bpe: str = option('', "OpenAI's merges (bpe_simple_vocab_16e6.txt.gz); without it they are learnt")
    embed: int = option(64, 'width of the space that images and texts share', low=1, high=10 ** 5)
    drop_tokens: float = option(0., 'share of the patches that training hides (EVA-CLIP-g+: .5)', below=1)
    optimizer: str = option('adamw', 'lamb: for batches of 100,000 (EVA-CLIP-g+)', choices=('adamw', 'lamb'))
    text_lr: float = option(0., "highest learning rate of the text tower; 0: the image tower's, --lr", high=1000)
    layer_decay: float = option(1., "of the image tower's learning rate, once a layer down", high=1)
    classes: str = option('', "file of class names, a line each in the order of the data's classes")
    templates: str = option('', 'file of sentences with {} for the class, a line each')
    warmup_steps: int = option(100, 'steps of linear warm-up')

    # the recipe's constants
    text_layer_decay: float = 1.    # of the text tower's learning rate
    weight_decay: float = .05       # of matrices; vectors have none
    betas: tuple = (.9, .98)        # .98: EVA-CLIP's, for stability
    grad_clip: float = 5.           # largest global gradient norm


SMALL = dict(batch_size=128, steps=700, lr=1.5e-3, save_every=250)
LAMB = dict(batch_size=131_072, warmup_steps=2000, text_layer_decay=.75, optimizer='lamb')
RECIPES = {  # differences from the defaults. b, l, g are EVA-CLIP's, for --vision EVA and --text CLIP; the rest ours
    'pico':  SMALL, 'nano': SMALL, 'micro': SMALL,
    'mini':  dict(batch_size=256, steps=4000, lr=1e-3, embed=128),
    'ti':    dict(batch_size=512, steps=20_000, lr=1e-3, embed=192, warmup_steps=500),
    's':     dict(batch_size=1024, steps=50_000, lr=5e-4, embed=384, warmup_steps=2000),
    'b':     dict(LAMB, steps=61_000, lr=2e-4, text_lr=2e-5, layer_decay=.75, embed=512),     # EVA-02-CLIP-B, 8B pairs
    'l':     dict(LAMB, steps=30_500, lr=4e-4, text_lr=4e-5, layer_decay=.85, embed=768),     # EVA-02-CLIP-L, 4B pairs
    'g':     dict(batch_size=40_960, steps=268_000, lr=4e-4, text_lr=4e-5, layer_decay=.85, text_layer_decay=.75,
                  embed=1024, warmup_steps=2000, drop_path=.4),   # EVA-CLIP-g, 11B pairs
    # EVA-CLIP-g+ on Merged-2B; its file's name says 11B pairs, its script says 4B
    'g-plus': dict(LAMB, batch_size=114_688, steps=96_000, lr=4e-4, text_lr=4e-5, layer_decay=.85, embed=1024,
                   drop_tokens=.5),
}
SMALL_TEXT_TOWER = dict(width=64, depth=2, heads=4)
TEXT_TOWERS = {'b': dict(width=512, depth=12, heads=8), 'l': dict(width=768, depth=12, heads=12)}
TEXT_TOWERS['g'] = TEXT_TOWERS['l']     # the paper's g reads with CLIP-L's, g+ with OpenCLIP-H's
TEXT_TOWERS['g-plus'] = dict(width=1024, depth=24, heads=16)
TEMPLATES = ('a {}', 'a photo of a {}', 'one {}')       # zero-shot averages over these, or over --templates
VIEWS = data.Views(crop=(.9, 1), flip=False, share=1.)  # almost the whole image: its caption speaks of it
NUM_EVAL = 1024         # validation images; --eval takes all of a folder's
NUM_RETRIEVAL = 256     # validation pairs among which a pair is found again; with --eval 5,000
NUM_PAIRS = 512         # scenes that test the world's pairs of colour and kind, seen and held out


# ---- the idea ---------------------------------------------------------------------------------

def contrastive_loss(image_features, text_features, scale):
    """Cross-entropy of finding each image's text among the whole batch's, and each text's image.
    Every process has its own rows in both directions; the mean over processes is the loss of the
    whole batch, and so are its gradients.
    image_features, text_features [B, D], of length 1; scale [1]: exp of the learnt temperature."""
    image_features = image_features.float()
    text_features = text_features.float()
    find_text = scale * image_features @ run.gather(text_features).T    # [B, all texts]
    find_image = scale * text_features @ run.gather(image_features).T   # [B, all images]

    # pair i of this process is pair rank * B + i of all
    num = len(image_features)
    labels = torch.arange(num, device=find_text.device)
    labels += run.get_rank() * num
    loss = F.cross_entropy(find_text, labels)
    loss = loss + F.cross_entropy(find_image, labels)
    return loss / 2


def kept_patches(seed, position, num_patches, drop_tokens):
    """Which patches the image tower sees of each sample: [B, (1 - drop_tokens) * num_patches].
    arXiv:2212.00794: at half of the patches a batch may be almost twice as large."""
    num = round(num_patches * (1 - drop_tokens))
    num = max(1, num)
    # at random, as a function of the sample's position in the run
    u = data.uniform(seed, 'keep', position, num_patches)
    return u.argsort(1)[:, :num]


# ---- measuring --------------------------------------------------------------------------------

def encode_images(model, batches):
    """Unit features [n, D] of the batches' images [B, 3, H, W], and the batches without these."""
    features = []
    others = []
    for batch in batches:
        images = batch.pop('images')
        features.append(model.encode_image(model.normalize(images)).float())
        others.append(batch)
    return F.normalize(torch.cat(features), dim=-1), others


def encode_texts(model, tokenizer, texts):
    """Unit features [n, D] of n sentences."""
    ids = tokenizer(texts).to(model.logit_scale.device)                     # [n, 77]
    features = torch.cat([model.encode_text(part) for part in ids.split(256)])
    return F.normalize(features.float(), dim=-1)


def class_embeddings(model, tokenizer, names, templates=TEMPLATES):
    """A text feature for each class, the mean over the templates: [K, D], L2-normalised."""
    names = [name.replace('_', ' ') for name in names]
    texts = [template.replace('{}', name) for name in names for template in templates]
    features = encode_texts(model, tokenizer, texts)
    return F.normalize(features.view(len(names), len(templates), -1).mean(1), dim=-1)


def zero_shot(features, labels, classes):
    """Accuracy of taking the class whose text is nearest: top-1, top-5, the mean of the classes'
    own top-1. features [n, D]; labels [n]; classes [K, D]."""
    nearest = (features @ classes.T).topk(min(5, len(classes))).indices
    right = nearest == labels[:, None]                                      # [n, 5]
    num_images = labels.bincount(minlength=len(classes))
    num_right = labels[right[:, 0]].bincount(minlength=len(classes))
    by_class = (num_right / num_images)[num_images > 0]
    return dict(zero_shot_top1=right[:, 0].float().mean().item(),
                zero_shot_top5=right.any(1).float().mean().item(),
                zero_shot_by_class=by_class.mean().item(), chance=1 / len(classes))


def retrieval(similarity, texts):
    """Share of images whose text is among the 1, 5 and 10 best different ones, and of texts whose
    image is. Images of the same words are not told apart by them: each is right for both.
    similarity [n images, n texts]; texts: list of n."""
    column_of = {text: i for i, text in enumerate(texts)}       # one for all that are the same
    own = torch.tensor([column_of[text] for text in texts], device=similarity.device)
    different = own.unique()

    best_texts = similarity[:, different].topk(min(10, len(different))).indices
    best_images = similarity.T.topk(min(10, len(own))).indices
    text_found = different[best_texts] == own[:, None]                      # [n images, 10]
    image_found = own[best_images] == own[:, None]                          # [n texts, 10]
    metrics = {}
    for k in (1, 5, 10):
        metrics[f'image_to_text_{k}'] = text_found[:, :k].any(1).float().mean().item()
        metrics[f'text_to_image_{k}'] = image_found[:, :k].any(1).float().mean().item()
    metrics['retrieval'] = (metrics['image_to_text_1'] + metrics['text_to_image_1']) / 2
    return metrics


def world_pairs(model, tokenizer, device):
    """Zero-shot over all 160 pairs of colour and kind ('red star'): of the pairs that training
    shows, and of the 24 that it never does; `heldout_among_24` offers only those 24."""
    names = [f'{colour} {kind}' for kind in data.KINDS for colour in data.COLOURS]
    classes = class_embeddings(model, tokenizer, names)                     # [160, D]
    metrics = dict(pairs_chance=1 / len(names))
    for name, split in dict(seen_pairs='val', heldout_pairs='heldout').items():
        world = data.World(split, objects=1)
        batches = data.eval_batches(world, 256, model.visual.image_size, NUM_PAIRS, device)
        features, scenes = encode_images(model, batches)
        labels = torch.cat([s['kind'][:, 0] * data.NUM_COLOURS + s['colour'][:, 0] for s in scenes])
        metrics[name] = zero_shot(features, labels, classes)['zero_shot_top1']
    # the last features and labels are those of the held-out pairs
    few, labels = labels.unique(return_inverse=True)
    metrics['heldout_among_24'] = zero_shot(features, labels, classes[few])['zero_shot_top1']
    return metrics


def read_lines(path):
    """The lines of a text file that are not empty."""
    lines = data.read_text(path).splitlines()
    return [line.strip() for line in lines if line.strip()]


def plain(name):
    """A name without what spellings differ in."""
    return name.strip().casefold().replace('_', ' ')


def read_classes(path, folders):
    """A name for each class of the data: of its line 'folder<tab>name', or of the line at its place."""
    lines = read_lines(path)
    pairs = [line.partition('\t') for line in lines]
    name_of = {folder.strip(): name.strip() for folder, tab, name in pairs if tab}
    if name_of and folders:
        lacking = [folder for folder in folders if not name_of.get(folder)]
        if lacking:
            raise Refused(f'{path} has no name for {", ".join(lacking[:3])}; give each class a line: '
                          'folder, tab, name')
        if len(name_of) < len(lines):
            raise Refused(f'{path} has {len(lines)} lines for {len(name_of)} folders; give each one line: '
                          'folder, tab, name')
        return [name_of[folder] for folder in folders]

    # the data's own names in another order, or some of them: then the place means nothing
    plain_folders = {plain(folder) for folder in folders}
    if {plain(line) for line in lines} == plain_folders:
        return folders
    for line in lines:
        if plain(line) in plain_folders or plain(re.split('[,; ]', line)[0]) in plain_folders:
            raise Refused(f'{path}: {line!r} names a class of the data, other lines do not; give each class a line: '
                          'folder, tab, name')
    if len(lines) != len(folders):
        raise Refused(f'{path} has {len(lines)} names for the {len(folders)} classes of the '
                      f'data ({", ".join(folders[:3])}, ...); give one a line, or folder, tab, name')
    print0(f'{path} has no folders: its lines are taken in the order of the classes, '
           f'{folders[0]} as {lines[0]!r}, {folders[-1]} as {lines[-1]!r}')
    return lines


def read_words(cfg, folders):
    """-> (a name for each of the data's classes, the templates of sentences about one)."""
    names = read_classes(cfg.classes, folders) if cfg.classes else folders
    templates = read_lines(cfg.templates) if cfg.templates else TEMPLATES
    wrong = [line for line in templates if '{}' not in line]
    if wrong or not templates:
        raise Refused(f'{cfg.templates}: expected sentences with {{}} for the class, got {wrong[:3]}')
    return names, templates


@torch.no_grad()
def evaluate(model, dataset, tokenizer, cfg, device, words):
    """Zero-shot accuracy on the data's classes, retrieval with its picture, the world's pairs.
    words: of read_words."""
    image_size = model.visual.image_size
    num = len(dataset) if cfg.eval and dataset.reads_files else NUM_EVAL
    at_once = min(cfg.batch_size, 256)
    batches = data.eval_batches(dataset, at_once, image_size, num, device, cfg.workers)
    features, batches = encode_images(model, batches)                       # [n, D]

    # what stands for an unreadable image would count twice
    position = torch.cat([batch['position'] for batch in batches])
    kept = (position < num).nonzero()[:, 0]
    features = features[kept]

    metrics = {}
    if cfg.classes or dataset.classes:
        names, templates = words
        classes = class_embeddings(model, tokenizer, names, templates)
        labels = torch.cat([batch['labels'] for batch in batches])
        metrics |= zero_shot(features, labels[kept], classes)
    if dataset.has_captions:
        texts = [text for batch in batches for text in batch['captions']]
        texts = [texts[row] for row in kept.tolist()]
        texts = texts[:5000 if cfg.eval else NUM_RETRIEVAL]
        similarity = features[:len(texts)] @ encode_texts(model, tokenizer, texts).T
        metrics |= retrieval(similarity, texts)
        path = f'{cfg.out_dir}/retrieval.png'
        if not cfg.eval:
            with run.optional(path):
                draw_retrieval(path, dataset, position[kept], image_size, similarity, texts)
    if isinstance(dataset, data.World):
        metrics |= world_pairs(model, tokenizer, device)
    return metrics


def draw_retrieval(path, dataset, position, image_size, similarity, texts, columns=6, rows=4):
    """For the first captions the images that fit best, the best first. position [n]: of the images."""
    best = similarity.T[:columns].topk(min(rows, len(texts))).indices       # [columns, rows]
    found = {}
    for text, row in zip(texts, best):
        batch = dataset.batch(position[row].cpu(), image_size, train=False)
        found[text[:36]] = batch['images']                                  # as much as fits above
    run.draw_sheet(path, found, tile=256)


# ---- the loop ---------------------------------------------------------------------------------

class Lamb(torch.optim.Optimizer):
    """AdamW, but the step of each matrix is lr times as long as the matrix (arXiv:1904.00962).
    Batches of 100,000 ask for large steps, and no layer may outrun the others.
    What has no weight decay takes AdamW's step: a bias that starts at 0 would stay there."""

    @torch.no_grad()
    def step(self, closure=None):
        # EVA's LAMB clips too, whatever the loop has left of the gradients
        weights = [weight for group in self.param_groups for weight in group['params']]
        torch.nn.utils.clip_grad_norm_(weights, 1.)

        for group in self.param_groups:
            beta1, beta2 = group['betas']
            for weight in group['params']:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    zeros = torch.zeros_like(weight)
                    state.update(step=torch.zeros(()), mean=zeros, square=zeros.clone())
                state['step'] += 1
                state['mean'].lerp_(weight.grad, 1 - beta1)
                state['square'].lerp_(weight.grad.square(), 1 - beta2)

                # both started at 0, which made them too small
                mean = state['mean'] / (1 - beta1 ** state['step'].item())
                square = state['square'] / (1 - beta2 ** state['step'].item())
                change = mean / (square.sqrt() + group['eps']) + group['weight_decay'] * weight
                if group['weight_decay']:
                    change *= trust_ratio(weight, change)
                weight -= group['lr'] * change


def trust_ratio(weight, change):
    """How many times longer a weight is than its change, a number; 1 where either is zero."""
    old = torch.linalg.vector_norm(weight)
    new = torch.linalg.vector_norm(change)
    if isinstance(old, DTensor):        # of weights that are sharded
        old = old.full_tensor()
        new = new.full_tensor()
    return torch.where((old > 0) & (new > 0), old / new, 1.)


def make_optimizer(model, cfg):
    """AdamW or LAMB, with a learning rate and a layer decay for each tower: what EVA has learnt
    moves less at its first layers, and CLIP's text tower less altogether (EVA-CLIP: a tenth)."""
    image_groups = run.param_groups(model.visual, cfg.weight_decay, cfg.layer_decay)
    text_groups = run.param_groups(model.text, cfg.weight_decay, cfg.text_layer_decay)
    if cfg.text_lr:
        for group in text_groups:
            group['lr_scale'] *= cfg.text_lr / cfg.lr

    temperature = dict(params=[model.logit_scale], weight_decay=0., lr_scale=1.)
    groups = [temperature, *image_groups, *text_groups]
    options = dict(lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    if cfg.optimizer == 'lamb':
        return Lamb(groups, options)
    return torch.optim.AdamW(groups, **options, fused=True)


def activations(path, text_act=None, usual=''):
    """{tower: activation} where a CLIP's is not the one that M.load finds: OpenAI's and LAION's
    look alike. text_act: the one asked for, None if none may be; usual: of a text tower without."""
    names = M.unwrap(M.read(path)).keys()
    if names >= set(M.FAMILIES['Hugging Face CLIP'][0]):
        found = M.told_activations(path)
        if not found and text_act:
            found = dict(vision=text_act, text=text_act)
        if not found:
            ask = ", or say --text_act gelu if it is LAION's, quick_gelu if OpenAI's"
            if text_act is None:
                ask = ''
            raise Refused(f'{path} does not say its activation: put its config.json beside it{ask}')
        return dict(found, text=text_act or found['text'])

    act = text_act or usual
    is_openais = 'input_resolution' in names        # which only OpenAI's own files have
    if act and not is_openais and names >= set(M.FAMILIES['OpenAI CLIP'][0]):
        return dict(vision=act, text=act)
    return dict(text=act) if act else {}


def load_clip(path, bpe, acts, **vision):
    """-> (CLIP, its tokenizer: from its file, or OpenAI's). acts: of `activations`;
    vision: other changes of its image tower."""
    changes = {tower: dict(act=act) for tower, act in acts.items()}
    changes['vision'] = {**vision, **changes.get('vision', {})}
    clip = M.load(path, M.CLIP, **changes)
    merges = clip.extra.get('merges')
    tokenizer = data.Tokenizer(merges) if merges else data.Tokenizer.openai(bpe)
    if tokenizer.vocab_size != clip.text.config.vocab:
        raise Refused(f'{path} knows {clip.text.config.vocab} tokens, the vocabulary has '
                      f'{tokenizer.vocab_size}; pass its merges with --bpe FILE')
    return clip, tokenizer


def eva02_clip(config):
    """What EVA-02-CLIP changes of EVA-02's B and L after pre-training: a fresh norm inside
    attention, the class token pooled, rows stretched to 16 on any grid; B's patches have 16 pixels."""
    changes = dict(attn_norm=True, pool='class', rope=16)
    if config.width == M.EVA02_SIZES['b']['width']:
        changes['patch_size'] = 16
    return changes


def build(cfg, train_set):
    """-> (CLIP, tokenizer): from --init as a whole; or towers from random weights, or from --vision
    and --text, whose sizes they then have. Such towers' heads and the temperature are new."""
    sizes = dict(image_size=cfg.image_size, patch_size=cfg.patch_size)
    asked = {name: pixels for name, pixels in sizes.items() if pixels} | dict(drop_path=cfg.drop_path)
    if cfg.init and (cfg.vision or cfg.text):
        raise Refused('--init is the whole model; it goes without --vision and --text, its towers')
    if cfg.text_lr and not cfg.lr:
        raise Refused(f'--text_lr {cfg.text_lr} follows the schedule of --lr, which is 0')
    if cfg.init:
        return load_clip(cfg.init, cfg.bpe, activations(cfg.init, cfg.text_act), **asked)

    # small towers pool patches: a class token's loss teaches these little in minutes
    pool = 'class' if cfg.size in TEXT_TOWERS else 'mean'
    vision = run.vit_config(cfg, pool=pool, mask_token=False, **asked)
    if cfg.vision:
        changes = {}
        acts = activations(cfg.vision)
        if acts:
            changes['act'] = acts['vision']
        eva = M.load(cfg.vision, M.ViT, **changes)
        run.refuse_clips(eva, cfg.vision)
        changes |= dict(head=0, pool=eva.pool or pool, mask_token=False)
        is_pretrained = eva.pool is None and eva.config.rope == 'index'
        if is_pretrained and eva.config.mlp_norm:
            changes |= eva02_clip(eva.config)
        image_tower = M.load(cfg.vision, M.ViT, **(changes | asked))
        vision = image_tower.config

    text = dict(TEXT_TOWERS.get(cfg.size, SMALL_TEXT_TOWER), act=cfg.text_act or 'gelu')
    if cfg.text:
        # EVA-CLIP's text towers have GELU even when they start from OpenAI's
        clip, tokenizer = load_clip(cfg.text, cfg.bpe, activations(cfg.text, cfg.text_act, usual='gelu'))
        text = asdict(clip.text.config)
    elif cfg.bpe:
        tokenizer = data.Tokenizer.openai(cfg.bpe)
    else:
        tokenizer = data.Tokenizer.learn(train_set.some_captions(20_000))

    text = dict(text, vocab=tokenizer.vocab_size, embed=cfg.embed)
    model = M.CLIP(M.CLIPConfig(replace(vision, head=cfg.embed), text))
    model = M.init_weights(model, cfg.seed)
    if cfg.vision:
        model.visual.load_state_dict(image_tower.state_dict(), strict=False)      # it has no head
    if cfg.text:
        state = dict(clip.text.state_dict(), **{'head.weight': model.text.head.weight})
        model.text.load_state_dict(state)
    return model, tokenizer


@torch.no_grad()
def apply_model(cfg, device):
    """--eval: zero-shot accuracy and retrieval of a trained model. --image: which --words fit."""
    path = cfg.init or f'{cfg.out_dir}/model.pt'
    model, tokenizer = load_clip(path, cfg.bpe, activations(path, cfg.text_act))
    model = run.to_device(model, cfg, device)
    if cfg.eval:
        # names of classes are asked for alone, or there have to be captions
        dataset = data.open_data(cfg.data, 'test', views=VIEWS, captions=not cfg.classes)
        run.say_judged(dataset)
        words = read_words(cfg, dataset.label_names)
        print0(run.table(evaluate(model, dataset, tokenizer, cfg, device, words)))
        return run.report_broken(dataset)

    if not cfg.words:
        raise Refused('--image needs sentences to choose from: --words "a dog" "a cat"')
    image = data.load_view(cfg.image, model.visual.image_size, share=1.)[None].to(device)
    features, _ = encode_images(model, [dict(images=image)])
    texts = encode_texts(model, tokenizer, cfg.words)
    shares = (model.logit_scale.exp() * features @ texts.T)[0].softmax(0)          # [K]
    for n in shares.argsort(descending=True).tolist():
        print0(f'{shares[n]:6.1%}  {cfg.words[n]}')


def add_text(batches, tokenizer, cfg, vision, device):
    """Adds what the loop needs beside images, functions of a sample's position in the run: its
    caption's ids [B, T], the patches kept [B, n], what drop path decides by [B, depth, 2]."""
    for batch in batches:
        text = tokenizer(batch['captions'])                 # [B, 77], the end has the largest id
        longest = int(text.argmax(1).max()) + 1
        batch['text'] = run.send(text[:, :longest], device)
        position = batch['position']
        if cfg.drop_tokens:
            batch['keep'] = kept_patches(cfg.seed, position, vision.grid ** 2, cfg.drop_tokens)
        if cfg.drop_path:
            u = data.uniform(cfg.seed, 'drop', position, 2 * len(vision.blocks))
            batch['drop'] = u.unflatten(1, (-1, 2))
        yield batch


def train(cfg):
    """Trains two towers; leaves model.pt (with its tokenizer), log.jsonl, result.json, pictures."""
    rank, world, device, mesh = run.setup(cfg)
    cfg.out_dir = cfg.out_dir or f'out/clip_train-{cfg.size}'
    if cfg.eval or cfg.image:
        return apply_model(cfg, device)

    # what it learns from; refused where it does not fit
    if cfg.words:
        raise Refused('--words are what --image FILE is compared with; without it they mean nothing')
    train_set = data.open_data(cfg.data, 'train', views=VIEWS, captions=True)
    val_set = data.open_data(cfg.data, 'val', views=VIEWS, captions=True)
    if cfg.batch_size < 2:
        raise Refused('--batch_size 1 leaves nothing to contrast')
    run.settle_steps(cfg, train_set)
    if run.finished(cfg):
        return
    run.introduce(train_set, val_set)
    words = read_words(cfg, val_set.label_names)

    # what learns
    model, tokenizer = build(cfg, train_set)
    about = run.describe(train_set, val_set, vocabulary=tokenizer.merges)
    run.settle_memory(cfg, model, device, world, seen=1 - cfg.drop_tokens)
    model = run.to_device(model, cfg, device, mesh)
    optimizer = make_optimizer(model, cfg)
    start, _ = run.resume(cfg.out_dir, model, optimizer, cfg, about=about)
    blind = math.log(cfg.batch_size)
    print0(f'CLIP {cfg.size}: {run.count_parameters(model) / 1e6:.2f}M parameters, vocabulary of '
           f'{tokenizer.vocab_size:,}, {cfg.steps:,} steps of {cfg.batch_size} pairs on {device}; '
           f'a blind model has loss ln({cfg.batch_size}) = {blind:.2f}')

    batches = data.batches(train_set, cfg.batch_size, model.visual.image_size, start,
                           cfg.steps, cfg.seed, device, cfg.workers, rank, world)
    batches = run.ahead(add_text(batches, tokenizer, cfg, model.visual, device), device)
    log = run.Log(cfg, start, device, run.training_flops(model.visual.config))

    for step, batch in zip(range(start, cfg.steps), log.watch(batches)):
        # learning rate
        for group in optimizer.param_groups:
            group['lr'] = run.lr_at(step, cfg) * group['lr_scale']

        # forward and loss
        images = model.normalize(batch['images'])
        keep, drop = batch.get('keep'), batch.get('drop')
        image_features, text_features, scale = model(images, batch['text'], keep, drop)
        loss = contrastive_loss(image_features, text_features, scale)

        # backward, clip, step
        loss.backward()
        grad_norm = run.clip_gradients(model, cfg.grad_clip)
        log.update(optimizer, grad_norm)
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))     # CLIP, section 2.5

        # log
        if log.due(step):
            loss = run.sum_over_processes(loss) / world
            log.write(step, loss=loss, lr=run.lr_at(step, cfg), grad_norm=grad_norm)

        # save, evaluate
        done = step + 1
        stopping = log.stopping()
        if done < cfg.steps and (stopping or done % cfg.save_every == 0):
            run.save_checkpoint(cfg.out_dir, done, model, optimizer, cfg, about=about)
            if stopping:
                log.leave(done)
            log.say(step, **evaluate(model, val_set, tokenizer, cfg, device, words))

    run.save_model(model, f'{cfg.out_dir}/model.pt', merges=tokenizer.merges)
    metrics = evaluate(model, val_set, tokenizer, cfg, device, words)
    log.finish(model, 'contrastive loss', {f'blind: ln {cfg.batch_size}': blind}, **metrics)
    run.report_broken(train_set, val_set)


if __name__ == '__main__':
    run.main(train, Config, RECIPES)
