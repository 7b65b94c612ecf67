"""
How fast it is, on random weights: where a step's time goes, and what is slow besides.

    python studies/speed.py --size s             # stage 1; takes the flags of mim_pretrain.py
    python studies/speed.py --stage detect       # RoIAlign, NMS, average precision, training steps
    python studies/speed.py --stage segment      # matching, training steps
    python studies/speed.py --stage peers        # beside timm, OpenCLIP, torchvision, COCO's tools, SciPy: what there is

On a CPU: one core, in that core's own seconds, because others use the machine too. A GPU has its own: gpu.py.
"""
import contextlib
import dataclasses
import gc
import importlib.metadata
import io
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'studies')]
import clip_train                   # noqa: E402
import data                         # noqa: E402
import detect_seg                   # noqa: E402
import mim_pretrain                 # noqa: E402
import model as M                   # noqa: E402
import plan                         # noqa: E402
import run                          # noqa: E402


@dataclass
class Config(mim_pretrain.Config):
    stage: str = run.option('pretrain', 'what is timed', choices=('pretrain', 'detect', 'segment', 'peers'))


def main(cfg):
    if cfg.stage == 'pretrain':
        return time_pretraining(cfg)
    torch.set_num_threads(1)        # what is repeated a thousand times is too small to share
    if cfg.stage == 'detect':
        return time_detection()
    if cfg.stage == 'peers':
        return time_peers()
    time_segmentation()


def core_seconds(function):
    """What one call takes of the core."""
    began = time.process_time()
    function()
    return time.process_time() - began


def best_of(function, times=3):
    return min(core_seconds(function) for _ in range(times))


def median(values):
    return sorted(values)[len(values) // 2]


def step_seconds(*flags):
    """Median of a few steps of a real run of detect_seg.py, from its log."""
    script = ROOT / 'detect_seg.py'
    with tempfile.TemporaryDirectory() as folder:
        words = ['--steps', '4', '--log_every', '1', '--device', 'cpu', '--out_dir', folder, *flags]
        done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'{" ".join(flags)}: {done.stderr[-500:]}')
        seconds = [line['seconds'] for line in run.read_log(folder)]
    return median([after - before for before, after in zip(seconds, seconds[1:])])


# ---- stage 1 ----------------------------------------------------------------------------------------------------

class Step:
    """A training step in its five parts."""
    PARTS = 'data', 'masks', 'teacher', 'model', 'optimizer'

    def __init__(self, cfg, config, teacher, num, device, Student=M.ViT):
        self.cfg = cfg
        self.device = device
        with torch.device(device):              # a GPU makes a billion random weights at once
            student = Student(config)
            frozen = M.ViT(teacher).requires_grad_(False)       # as fast as one that learnt
        self.vit = run.to_device(student, cfg, device)
        self.target = mim_pretrain.Features(run.to_device(frozen, cfg, device), self.vit.grid)
        self.adamw = run.make_optimizer(self.vit, cfg)
        self.take(num)

    def take(self, num):
        """From now on steps are of so many images."""
        self.num = num
        self.position = torch.arange(num)
        self.targets = None
        self.data()
        self.masks()

    def data(self):
        self.position += self.num
        size = self.vit.image_size
        batch = data.World().batch(self.position, size, device=self.device, want=('images',))
        self.images = batch['images']

    def masks(self):
        mask = mim_pretrain.make_mask('block', self.position, self.vit.grid, 105 / 256)
        drop = data.uniform(0, 'drop', self.position, 2 * len(self.vit.blocks))
        self.mask = mask.to(self.device)
        self.drop = drop.unflatten(1, (-1, 2)).to(self.device)

    def teacher(self):
        with torch.no_grad():
            self.targets = self.target.of(self.images)

    def model(self):
        predictions = self.vit(self.vit.normalize(self.images), self.mask, drop=self.drop)
        loss = mim_pretrain.mim_loss(predictions, self.targets, self.mask, self.mask.sum())
        loss.backward()

    def optimizer(self):
        run.clip_gradients(self.vit, self.cfg.grad_clip)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def whole(self):
        self.teacher()
        self.model()
        self.optimizer()

    def forget(self):
        """Gives back all memory but the model's. Compiled and checkpointed blocks are cycles: only gc frees them."""
        self.images = self.mask = self.drop = self.targets = None
        self.adamw.zero_grad(set_to_none=True)
        torch.compiler.reset()
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()


def time_pretraining(cfg):
    device = run.setup(cfg)[2]
    if device.type == 'cuda':
        raise run.Refused('a GPU is timed by python studies/gpu.py; here give --device cpu')
    config = run.vit_config(cfg)
    M.check_grid(config.image_size, config.image_size, config.patch_size)
    teacher = plan.default_teacher(cfg.size, config.image_size // config.patch_size)
    config.head = teacher.head

    torch.set_num_threads(1)        # others use the machine too
    beside_products(cfg, config, device)
    split(cfg, config, teacher, device)
    print(f'most memory held: {run.peak_memory(device) / 1e9:.2f} GB')


def beside_products(cfg, config, device, num=4, rounds=7):
    """A step beside its matrix products alone: medians over paired rounds, in turn because machines drift."""
    config = dataclasses.replace(config, image_size=224, patch_size=14)
    small = dataclasses.replace(config, depth=1)            # the teacher is not timed here
    step = Step(cfg, config, small, num, device)
    step.teacher()
    products = matrix_products(config, num)

    def learn():
        step.model()
        step.optimizer()
    learn()
    products()
    pairs = [(core_seconds(learn), core_seconds(products)) for _ in range(rounds)]
    seconds = median([whole for whole, _ in pairs])
    share = median([part / whole for whole, part in pairs])
    print(f'{cfg.size} at 224 px, patch 14, {num} images, one core: a step without its teacher takes {seconds:.3g} s, '
          f'its matrix products alone {share:.2f} of that')


def matrix_products(config, num):
    """A function that makes the matrix products of a ViT's training step on `num` images and nothing else: three for
    each of the forward pass's, its own and one for the gradient of either side. Each layer has weights of its own."""
    N = (config.image_size // config.patch_size) ** 2
    D, rows = config.width, num * (1 + N)
    shapes = [(rows, D, 3 * D), (rows, D, D), (rows, D, config.mlp_width), (rows, config.mlp_width, D)]
    shapes = shapes * config.depth
    shapes += [(num * N, 3 * config.patch_size ** 2, D), (num * N, D, config.head)]
    weights = [torch.randn(outputs, inputs) for _, inputs, outputs in shapes]
    noise = {shape: torch.randn(shape) for rows, inputs, outputs in shapes
             for shape in ((rows, inputs), (rows, outputs))}
    heads = torch.randn(num * config.heads, 1 + N, D // config.heads)

    def products():
        for (rows, inputs, outputs), weight in zip(shapes, weights):
            x, y = noise[rows, inputs], noise[rows, outputs]
            torch.mm(x, weight.T)
            torch.mm(y, weight)
            torch.mm(y.T, x)
        for _ in range(2 * config.depth):
            scores = torch.bmm(heads, heads.mT)             # queries with keys; the gradient of their softmax
            torch.bmm(scores, heads)                        # values; the gradients of queries, keys and values
            torch.bmm(scores, heads)
    return products


def split(cfg, config, teacher, device, steps=20):
    """Where the time of the recipe's own step goes."""
    at_once = max(1, int(5e10 / run.flops_per_image(config)))           # a second or two
    num = min(cfg.micro_batch or cfg.batch_size, at_once)
    step = Step(cfg, config, teacher, num, device)
    seconds = dict.fromkeys(Step.PARTS, 0.)
    for n in range(2 + steps):
        for name in Step.PARTS:
            taken = core_seconds(getattr(step, name))
            if n >= 2:                      # the first two warm up
                seconds[name] += taken

    total = sum(seconds.values())
    per_second = num * steps / total
    print(f'{cfg.size} at {config.image_size} px, patch {config.patch_size}, {num} images, one core: '
          f'{per_second:.4g} images/s, of which')
    for name, part in seconds.items():
        print(f'  {name:<12} {part / total:6.1%}   {part / steps * 1e3:.1f} ms')

    # masks of EVA's own grid
    taken = best_of(lambda: mim_pretrain.block_mask(torch.arange(512), 16, 105))
    print(f'{512 / taken:,.0f} masks/s on 16 x 16 patches, 512 at once')


# ---- stage 1 on a GPU, for gpu.py -------------------------------------------------------------------------------

def time_sizes(step, num, larger=True):
    """Rows for at most three numbers of images at once: num, fewer where that does not fit, or as many as memory
    turns out to have room for. The model is made once."""
    fitted = True
    for _ in range(3):
        row = time_size(step, num)
        yield row
        if 'note' in row:
            fitted = False
            num = max(1, num * 3 // 4)
            continue
        if not (fitted and larger and step.device.type == 'cuda'):
            return

        # what is held now is the model's; another size has to be worth the time
        held = torch.cuda.memory_allocated(step.device)
        free = .97 * (run.free_memory(step.device) + torch.cuda.memory_reserved(step.device))
        an_image = (1e9 * row['memory, GB'] - held) / num
        room = int((free - held) / an_image) // 8 * 8
        if room < 1.15 * num:
            return
        num = room


def time_size(step, num):
    """Speed and memory of steps of num images; without their data, which a real run draws meanwhile."""
    row = {'images at once': num}
    try:
        step.take(num)
        if step.device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(step.device)
        first = plan.seconds_of(step.whole, step.device)        # compiles
        step.whole()

        # seven steps, fewer where they are slow
        seconds = []
        while len(seconds) < 3 or (len(seconds) < 7 and sum(seconds) < 5):
            seconds.append(plan.seconds_of(step.whole, step.device))
        row |= {'images/s': num / median(seconds), 'memory, GB': run.peak_memory(step.device) / 1e9,
                'first step, s': first}
    except torch.OutOfMemoryError:
        row['note'] = 'out of memory'
    step.forget()
    return row


# ---- detection: inputs of the sizes that published comparisons use ----------------------------------------------

def random_boxes(num, side, low, high, stream):
    """Boxes within a square image, their sides log-uniform from low to high: [num, 4]."""
    u = data.uniform(0, stream, torch.arange(num), 4)
    size = low * (high / low) ** u[:, :2]
    corner = u[:, 2:] * (side - size)
    return torch.cat((corner, corner + size), 1)


def random_pyramid(channels=256, side=1024, strides=(4, 8, 16, 32)):
    """Maps of noise, as of a square image, each [1, channels, h, w] and channels last."""
    maps = []
    for stride in strides:
        cells = side // stride
        noise = data.uniform(0, f'level {stride}', torch.arange(cells ** 2), channels)
        noise = noise.view(1, cells, cells, channels)
        maps.append(noise.permute(0, 3, 1, 2))
    return maps


def world_truth(num=500, copies=20):
    """A COCO json of scenes, and `copies` detections of each of their objects."""
    dataset = data.open_instances('shapes', 'val')
    truth = dict(images=[], annotations=[], categories=dataset.categories)
    for batch in data.eval_batches(dataset, 50, 128, num, torch.device('cpu')):
        for image, rows in dataset.truth(batch):
            truth['images'].append(image)
            truth['annotations'] += rows

    rows = truth['annotations'] * copies
    truth['annotations'] = [dict(row, id=n + 1) for n, row in enumerate(truth['annotations'])]
    scores = data.uniform(0, 'results', torch.arange(len(rows)), 1)[:, 0].tolist()
    return truth, [dict(row, score=score) for row, score in zip(rows, scores)]


def time_detection():
    """The core's seconds, best of three."""
    pyramid, boxes = random_pyramid(), random_boxes(8000, 1024, 16, 800, 'boxes')
    scores = data.uniform(0, 'scores', torch.arange(8000), 1)[:, 0]
    by_class = data.uniform(0, 'soft', torch.arange(80), 1000)
    truth, results = world_truth()

    def say(what, function):
        print(f'{best_of(function):8.3f} s  {what}', flush=True)

    def pool(out):
        return detect_seg.pool_boxes(pyramid, (4, 8, 16, 32), [boxes[:512]], out)

    # parts of a detector, then whole steps
    say('RoIAlign 7 x 7, 512 boxes, 256 channels, 4 levels of 1,024 pixels', lambda: pool(7))
    say('RoIAlign 14 x 14', lambda: pool(14))
    say('NMS of 8,000 boxes', lambda: detect_seg.nms(boxes, scores, .5))
    say('soft-NMS of 1,000 boxes, 80 classes', lambda: detect_seg.soft_nms(boxes[:1000], by_class))
    say(f'COCO boxes, 500 scenes, {len(results):,} detections', lambda: detect_seg.average_precision(truth, results))
    say('COCO masks, the same', lambda: detect_seg.average_precision(truth, results, 'segm'))
    for size in ('nano', 'micro'):
        print(f'{step_seconds("--size", size):8.3f} s  training step of {size}, 8 images', flush=True)


# ---- segmentation -----------------------------------------------------------------------------------------------

def assignment_costs():
    u = data.uniform(0, 'assign', torch.arange(200), 101).double().numpy()
    costs = {'uniform costs': u[:, :100], 'full of ties': np.floor(9 * u[:, :100])}
    costs['the worst, where all rows want the same columns'] = u[:, :1] * u[0, 1:]
    return costs


def time_segmentation():
    """The assignment of 200 queries to 100 masks, and training steps of each head."""
    for name, cost in assignment_costs().items():
        taken = best_of(lambda: detect_seg.assign(cost), 5)
        print(f'{1e3 * taken:8.1f} ms  assignment of 200 x 100, {name}')

    for size in ('nano', 'micro'):
        for flags in ('linear --freeze', 'mask2former', 'mask2former --adapter'):
            taken = step_seconds('--size', size, '--head', *flags.split())
            print(f'{taken:8.2f} s   training step of {size}, 8 images, {flags}', flush=True)


# ---- peers ------------------------------------------------------------------------------------------------------
# A function per pair yields rows: what is done, a function of ours that does it, the peer, one of its own.

def compare_training():
    """Steps of a ViT that predicts features of each patch: masks, loss, gradients and AdamW as in stage 1."""
    from timm.models.vision_transformer import VisionTransformer
    device = torch.device('cpu')
    for size, num in dict(ti=4, s=4, b=2).items():
        cfg = mim_pretrain.Config(size=size, device='cpu')
        config = M.ViTConfig(**dict(M.SIZES[size], image_size=224, patch_size=14, head=64))
        step = Step(cfg, config, dataclasses.replace(config, depth=1), num, device)
        step.teacher()
        theirs = VisionTransformer(
            img_size=224, patch_size=14, embed_dim=config.width, depth=config.depth, num_heads=config.heads,
            mlp_ratio=config.mlp_width / config.width, num_classes=64, global_pool='')
        adamw = torch.optim.AdamW(theirs.parameters(), lr=cfg.lr, fused=True)

        def our_step():
            step.model()
            step.optimizer()

        def their_step():
            predictions = theirs(step.vit.normalize(step.images))[:, 1:]        # without the class token
            mim_pretrain.mim_loss(predictions, step.targets, step.mask, step.mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), cfg.grad_clip)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
        yield f'training step of {size}, 224 px, patch 14, {num} images', our_step, version('timm'), their_step


def sentences(num):
    """Of Python's own documentation."""
    from pydoc_data.topics import topics
    found = re.split(r'(?<=[.!?])\s+', ' '.join(topics.values()))
    found = [' '.join(text.split()) for text in found if 20 < len(text) < 200]
    return found[:num]


def compare_clip():
    """Training steps of OpenAI's kind of CLIP, with captions that fill all 77 tokens: ours would cut shorter ones."""
    import open_clip
    size = dict(width=192, heads=3)
    vision = M.ViTConfig(
        **size, depth=12, mlp_width=768, patch_size=14, image_size=112, head=128, head_bias=False, pool='class',
        mask_token=False, biases='qkv', patch_bias=False, pre_norm=True, eps=1e-5)
    clip = M.init_weights(M.CLIP(M.CLIPConfig(vision, dict(**size, depth=6, vocab=49_408, embed=128))))
    theirs = open_clip.CLIP(
        128, dict(layers=12, width=192, patch_size=14, image_size=112), dict(**size, layers=6))
    images = torch.randn(16, 3, 112, 112)
    text = open_clip.tokenize([9 * caption for caption in sentences(16)])

    def step(model, loss):
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def learn():
            loss(*model(images, text)).backward()
            adamw.step()
            adamw.zero_grad(set_to_none=True)
        return learn
    our_step = step(clip, clip_train.contrastive_loss)
    their_step = step(theirs, open_clip.ClipLoss())
    yield 'CLIP step, ti at 112 px, text of 6 layers, 16 pairs', our_step, version('open_clip_torch'), their_step


def compare_tokenizers(num=2000):
    import open_clip
    table = Path(open_clip.__file__).parent / 'bpe_simple_vocab_16e6.txt.gz'
    ours = data.Tokenizer.from_file(table)
    theirs = open_clip.SimpleTokenizer()
    empty = dict(theirs.cache)
    captions = sentences(num)

    def our_first():
        ours.encode.cache_clear()
        ours(captions)

    def their_first():
        theirs.cache = dict(empty)
        theirs(captions)
    peer = version('open_clip_torch')
    yield f'{num:,} captions to ids, words first seen', our_first, peer, their_first
    yield 'the same again', lambda: ours(captions), peer, lambda: theirs(captions)


def compare_reading(num=32):
    """JPEGs of smooth noise: decode, random crop to 224, flip, normalise."""
    from torchvision.transforms import v2
    seen = v2.Compose([
        v2.RandomResizedCrop(224, (.2, 1), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(M.CLIP_MEAN, M.CLIP_STD)])
    vit = M.ViT(M.ViTConfig(**M.SIZES['pico']))
    position = torch.arange(num)
    noise = data.uniform(0, 'pictures', position, 3 * 38 * 50).view(num, 3, 38, 50)
    pixels = torch.nn.functional.interpolate(255 * noise, (375, 500), mode='bicubic').clamp(0, 255).byte()
    with tempfile.TemporaryDirectory() as folder:
        paths = [f'{folder}/{n}.jpg' for n in range(num)]
        for image, path in zip(pixels, paths):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)
        dataset = data.Folder(folder)           # its training images, not all
        position = position[:len(dataset)]
        paths = [dataset.image(i) for i in dataset.index(position, 0)]

        def our_reading():
            vit.normalize(dataset.batch(position, 224)['images'])

        def their_reading():
            torch.stack([seen(Image.open(path).convert('RGB')) for path in paths])
        yield f'{len(paths)} JPEGs of 500 x 375 to crops of 224', our_reading, version('torchvision'), their_reading


def compare_pooling():
    """NMS and RoIAlign, which torchvision has compiled."""
    from torchvision import ops
    peer = version('torchvision')
    boxes = random_boxes(8000, 1024, 16, 800, 'boxes')
    scores = data.uniform(0, 'scores', torch.arange(8000), 1)[:, 0]
    features = random_pyramid(strides=(8,))[0]
    few = boxes[:512]
    image = torch.zeros(512, dtype=torch.long)
    yield ('NMS of 8,000 boxes', lambda: detect_seg.nms(boxes, scores, .5),
           peer, lambda: ops.nms(boxes, scores, .5))
    yield ('RoIAlign 7 x 7, 512 boxes, 256 channels', lambda: detect_seg.roi_align(features, few, image, 7, 1 / 8),
           peer, lambda: ops.roi_align(features, [few], 7, 1 / 8, aligned=True))


def compare_pycocotools():
    from pycocotools import coco, cocoeval, mask
    yield from compare_coco(coco.COCO, cocoeval.COCOeval, mask, version('pycocotools'))


def compare_faster_coco_eval():
    from faster_coco_eval import COCO, COCOeval_faster, mask
    yield from compare_coco(COCO, COCOeval_faster, mask, version('faster-coco-eval'))


def compare_coco(COCO, COCOeval, mask, peer):
    """Average precision; masks as run lengths, compressed for the peer; its index of the json counts."""
    truth, results = world_truth()
    size = truth['images'][0]['height'], truth['images'][0]['width']        # all scenes'

    def compress(row, **more):
        counts = dict(size=size, counts=[int(n) for n in row['segmentation']['counts']])
        return dict(row, segmentation=mask.frPyObjects(counts, *size), **more)
    annotations = [compress(row, iscrowd=0) for row in truth['annotations']]
    found = [compress(row) for row in results]

    for kind, what, other in (('bbox', 'boxes', 'segmentation'), ('segm', 'masks', 'bbox')):
        rows = [{name: value for name, value in row.items() if name != other} for row in found]

        def evaluate():
            with contextlib.redirect_stdout(io.StringIO()):
                known = COCO()
                known.dataset = dict(truth, annotations=annotations)
                known.createIndex()
                judge = COCOeval(known, known.loadRes([dict(row) for row in rows]), kind)
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
        yield (f'COCO {what}, 500 scenes, {len(rows):,} detections',
               lambda: detect_seg.average_precision(truth, results, kind), peer, evaluate)


def compare_assignment():
    from scipy.optimize import linear_sum_assignment
    peer = version('scipy')
    for name, cost in assignment_costs().items():
        yield (f'assignment of 200 x 100, {name}', lambda: detect_seg.assign(cost),
               peer, lambda: linear_sum_assignment(cost))


PEERS = (compare_training, compare_clip, compare_tokenizers, compare_reading, compare_pooling, compare_pycocotools,
         compare_faster_coco_eval, compare_assignment)


def version(package):
    return f'{package} {importlib.metadata.version(package)}'


def beside(ours, theirs, rounds=5):
    """Medians of the core's seconds, in turn because machines drift. The first of each warms up."""
    ours()
    theirs()
    pairs = [(core_seconds(ours), core_seconds(theirs)) for _ in range(rounds)]
    return median([first for first, _ in pairs]), median([second for _, second in pairs])


def time_peers(peers=PEERS):
    """A table, and a line with those that are not there."""
    print('| what | ours, s | peer | its, s | ours / its |\n|---|---|---|---|---|')
    left_out = []
    for compare in peers:
        try:
            for what, ours, peer, theirs in compare():
                first, second = beside(ours, theirs)
                print(f'| {what} | {first:.3g} | {peer} | {second:.3g} | {first / second:.2f} |', flush=True)
        except (ImportError, RuntimeError) as error:        # torchvision without its operators raises the second
            left_out.append(f'{compare.__name__} ({str(error).partition(". ")[0]})')
    if left_out:
        print(f'left out: {", ".join(left_out)}')


if __name__ == '__main__':
    run.main(main, Config, mim_pretrain.RECIPES)
