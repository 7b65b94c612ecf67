"""
What every run needs, written once: options, processes and sharding, optimizer and schedule, save and
resume, the log. The loops are in the stage files; they call these functions by name.
"""
import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.distributed.fsdp as fsdp
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

import data
import model as M
from model import Refused


# ---- options ----------------------------------------------------------------------------------------

def option(default, help, choices=None, low=0, high=1e12, below=None):
    """A field of a Config that is a flag too: --help, the check and the refusal are made of this. A string is one of
    choices; a number lies from low to high, or from low to just under `below`; of a pair the first is the less."""
    is_pair = type(default) is tuple and len(default) == 2
    takes = ''
    if choices:
        takes = 'one of ' + ', '.join(choice for choice in choices if choice)
    elif below is not None:
        takes = f'{low:g} to below {below:g}'
        high = math.nextafter(below, low)
    elif type(default) in (int, float, tuple) and default != ():
        takes = f'{low:g} to {high:g}' if high < 1e12 else f'{low:g} or more'
        takes = f'two numbers, least and most, each {takes}' if is_pair else takes

    def fits(value):
        if choices:
            return value in choices
        if is_pair and (len(value) != 2 or value[0] > value[1]):
            return False
        parts = value if type(value) is tuple else (value,)
        within = all(low <= part <= high for part in parts if isinstance(part, (int, float)))
        return within and (value != '' or default == '')

    brackets = '; '.join(str(part) for part in (default, takes) if part not in ('', None, ()))
    help += f' ({brackets})' if brackets else ''
    return dataclasses.field(default=default, metadata=dict(help=help, takes=takes, fits=fits))


@dataclasses.dataclass
class Run:
    """What every stage honours. Fields without option(...) are a recipe's constants, no flags."""
    size: str = option('nano', 'row of RECIPES: a row of SIZES in model.py, or one of its recipes, as g-560')
    arch: str = option('eva', 'blocks of a model that starts from random weights', choices=('eva', 'eva02'))
    data: str = option('shapes', 'the built-in world (shapes:unique=N,fine=N,objects=N), a folder or .tar')
    init: str = option('', 'file to start from instead of random weights')
    out_dir: str = option('', 'where results go; out/<stage>-<size> if empty')
    steps: int = option(1000, 'updates of the weights', low=1, high=10 ** 9)
    epochs: float = option(0., 'passes over finite data, instead of --steps', high=10 ** 6)
    batch_size: int = option(128, 'images in an update, over all processes', low=1, high=10 ** 6)
    lr: float = option(1e-3, 'highest learning rate', high=1000)
    image_size: int = option(0, "pixels along a side; 0: the size's own", high=M.LIMITS['image_size'][1])
    patch_size: int = option(0, "pixels along a patch; 0: the size's own", high=M.LIMITS['patch_size'][1])
    seed: int = option(0, 'of weights, order, crops and masks', high=127)   # each owns 2^33 of 2^40 scenes
    device: str = option('', 'cuda, mps or cpu; the best there is if empty')
    compile: bool = option(None, 'torch.compile the blocks; decided by the device if not given')
    checkpoint_activations: bool = option(None, 'compute activations again for the gradients, a third more '
                                          'work; decided by the memory there is if not given')
    save_every: int = option(500, 'steps between checkpoints', low=1)
    log_every: int = option(10, 'steps between lines of log.jsonl', low=1)
    workers: int = option(None, 'processes that read images, 0: this one; decided by the device if not given',
                          high=512)
    eval: bool = option(False, 'only evaluate --init')
    image: str = option('', 'only apply --init to this picture')
    drop_path: float = option(0., 'chance that the last block skips a branch; grows with depth', high=.999)

    warmup_steps: int = 100             # of linear warm-up
    schedule: str = 'cosine'            # of the learning rate after it: cosine, linear or steps
    min_lr: float = 0.                  # at the last step
    drop_at: float = 1.                 # of schedule steps: after this share of them the rate is a tenth
    cooldown: int = 0                   # instead of a schedule: constant, then linear in so many last steps
    branch: str = ''                    # folder of a like run, to start where its rate began to fall
    weight_decay: float = .05           # of matrices; vectors, positions and tokens have none
    betas: tuple = (.9, .98)            # AdamW's
    eps: float = 1e-6                   # AdamW's
    grad_clip: float = 1e9              # largest global gradient norm
    gather_once: bool = False           # sharded weights stay whole through a step, if there is room


cpu_group = None        # the processes' gloo group, for what may take long: a teacher, a checkpoint
locked = None           # descriptor of the folder that this process alone may write to

# options that change how a run is made, not what it computes
NEVER_DIFFER = {'out_dir', 'micro_batch', 'device', 'compile', 'checkpoint_activations', 'save_every',
                'log_every', 'workers', 'eval', 'image', 'words', 'templates', 'branch', 'gather_once'}
TORCHRUN = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'}
STOPPING = signal.SIGTERM, signal.SIGINT        # of a cluster's scheduler, of Ctrl-C
FAILED = 1000           # above every signal: what a process tells the others whose data cannot be read
FORMAT = 2              # of checkpoints; the earliest have no number
DRAWING = 190           # bytes a pixel that drawing scenes takes for a while (counted)
RESERVE = 1e9           # bytes of a GPU, for its libraries and for gaps between tensors (assumed)
SMALL = 5e7             # FLOPs of an image of pico and nano: too few for several threads
FEW = 16                # images at once keep a GPU busy: with room for fewer, activations are computed again
NUM_PROBE = 2048        # training images that fit the probes, and validation images that judge them
GONE = {  # flags of earlier versions, and what to do now
    'plan': 'use python studies/plan.py', 'devices': 'use python studies/plan.py',
    'bench': 'use python studies/speed.py', 'study': 'use python studies/scaling.py',
    'micro_batch': 'use --checkpoint_activations or more processes', 'erase': 'finetune.py has --mixup and --cutmix',
    'shard': 'torchrun always shards', 'jitter': 'detect_seg.py has --scale_jitter', 'whole': '--eval takes val/ or all data',
    'ignore': 'use --classes FILE, with - for such a value', 'zero_label': 'use --classes FILE, - for value 0',
}


def parse_config(Config, RECIPES, argv=None):
    """Defaults, then the size's recipe, then flags. Each choice of --head has its own table of recipes."""
    flags = read_flags(Config, argv)
    if getattr(Config, 'head', None) in RECIPES:
        RECIPES = RECIPES[flags.get('head', Config.head)]
    size = flags.get('size', Config.size)
    if size not in RECIPES:
        raise Refused(f'--size {size} is unknown; use one of {", ".join(RECIPES)}')
    if 'epochs' in flags and 'steps' in flags:
        raise Refused('--epochs and --steps both say how long to train; give one of them')
    for name in ('image_size', 'patch_size'):
        if flags.get(name) == 0:        # the size's own, or its recipe's
            del flags[name]
    return Config(**(RECIPES[size] | flags))


def read_flags(Config, argv):
    """{name: value} of the flags that are given; a flag that is gone says where it went."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.epilog = "Defaults stand in brackets; the size's row of RECIPES overrides them, and a flag both."

    def comma_separated(text):
        return tuple(float(part) for part in text.split(','))

    def refuse(message):
        raise Refused(f'{message}; --help lists the options')
    parser.error = refuse

    # a flag for each field that is an option
    options = {field.name: field for field in dataclasses.fields(Config) if field.metadata}
    special = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(nargs='+', metavar='TEXT'),
               tuple: dict(type=comma_separated, metavar='A,B')}
    for name, field in options.items():
        kind = special.get(field.type) or dict(type=field.type, metavar=field.type.__name__.upper())
        parser.add_argument(f'--{name}', help=field.metadata['help'].replace('%', '%%'), **kind)

    flags, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.lstrip('-').partition('=')[0].removeprefix('no-')
        if name in GONE:
            raise Refused(f'--{name} is gone: {GONE[name]}')
        if name in Config.__dataclass_fields__:
            raise Refused(f'--{name} is no flag: it is a constant, in Config and RECIPES of the stage')
        refuse(f'{word} is not an option')
    for name, value in vars(flags).items():
        if not options[name].metadata['fits'](value):
            takes = options[name].metadata['takes'] or 'a name'
            raise Refused(f'--{name} {value} does not fit; use {takes}')
    return vars(flags)


def main(train, Config, RECIPES):
    """Runs a stage. What we refuse is one line and exit code 2; everything else keeps its traceback."""
    sys.stdout.reconfigure(errors='replace')        # names of files may hold any bytes
    try:
        train(parse_config(Config, RECIPES))
    except Refused as error:
        if get_rank() == 0:         # above the bar, in one line whatever is named in it
            line = ' '.join(['error:', *str(error).splitlines()])
            tqdm.write(data.printable(line), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:       # before or after the loop, which has a handler of its own
        print0('\nstopped; the same command goes on from the last checkpoint, if there is one')
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def writing(path):
    """A disk that is full, or a folder that may not be written, is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise Refused(f'{path} cannot be written ({error.strerror or M.first_line(error)})') from None


@contextlib.contextmanager
def optional(path):
    """A picture, or a line of a log, that cannot be made costs a warning and never the run."""
    try:
        yield
    except Exception as error:
        if get_rank() == 0:         # above the bar
            tqdm.write(f'warning: {path} was not written ({type(error).__name__}: {M.first_line(error)})')


# ---- processes and devices ---------------------------------------------------------------------------

def get_rank():
    return int(os.environ.get('RANK', 0))


def print0(*values, file=None):
    if get_rank() == 0:
        print(*values, file=file, flush=True)


def setup(cfg):
    """(rank, number of processes, device, mesh) by torchrun's variables; no mesh without them.
    Decides what cfg leaves to the device."""
    global cpu_group
    world = int(os.environ.get('WORLD_SIZE', 1))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    device = find_device(cfg.device, local_rank, int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    if device.type == 'cuda':
        torch.cuda.set_device(device)

    # each process has an equal part of every batch, in equal parts again
    multiple = world * (getattr(cfg, 'micro_batch', 0) or 1)
    if cfg.batch_size % multiple:
        raise Refused(f'--batch_size {cfg.batch_size} is no multiple of {multiple}: processes x --micro_batch')
    settle_device(cfg, device)
    if 'RANK' not in os.environ:
        return 0, 1, device, None
    if not dist.is_initialized():
        on_gpu = device.type == 'cuda'
        dist.init_process_group('nccl' if on_gpu else 'gloo', device_id=device if on_gpu else None)
        cpu_group = dist.new_group(backend='gloo', timeout=timedelta(days=30))
    return get_rank(), world, device, make_mesh(device, world)


def make_mesh(device, world):
    """Over which processes weights are sharded: those of a machine, and each machine has all of them, so
    that only gradients travel between machines. One machine, or machines of one process: over all."""
    shards = num_shards(world)
    if shards < world:
        names = 'machines', 'processes'
        return dist.init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=names)
    return dist.init_device_mesh(device.type, (world,))


def num_shards(world):
    """Into how many parts weights are divided: see make_mesh."""
    local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return local if local > 1 and world % local == 0 else world


def settle_device(cfg, device):
    """What the device decides where no flag did: compiled blocks, processes that read images."""
    on_gpu = device.type == 'cuda'
    compilers = ('gcc', 'clang', 'cc') if on_gpu else ('g++', 'clang++', 'c++')
    named = os.environ.get('CC' if on_gpu else 'CXX')
    compiler = any(shutil.which(name) for name in ([named] if named else compilers))
    if cfg.compile and not compiler:
        raise Refused(f'--compile needs a C compiler; install {compilers[0]}, or leave it out')
    if cfg.compile is None:
        cfg.compile = on_gpu and not (cfg.eval or cfg.image)
    if cfg.compile and not compiler:
        print0(f'no C compiler is here: blocks are not compiled; install {compilers[0]} for more speed')
        cfg.compile = False

    if cfg.workers is None:
        cores = os.cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        cfg.workers = min(8, cores) if on_gpu and not data.is_world(cfg.data) else 0
    if device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        settle_threads(cfg)


def settle_threads(cfg):
    """A small model's operations are too short to be shared by threads, which would wait for each other at
    each, and for whatever else the machine does: one computes, another makes the next batches."""
    try:
        flops = flops_per_image(vit_config(cfg))
    except Refused:
        return              # a file may have other sizes; else it is said where the model is built
    if flops < SMALL and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        print0('threads: one computes, one makes the next batches; OMP_NUM_THREADS=N decides otherwise')


def find_device(name, local_rank, local_world):
    """The torch.device that --device means; each process of a machine has a GPU of its own."""
    gpus = torch.cuda.device_count()
    num = dict(cuda=gpus, mps=int(torch.backends.mps.is_available()), cpu=local_world)
    num |= {f'cuda:{i}': 1 for i in range(gpus)}
    there = [kind for kind in num if num[kind]]
    name = name or there[0]
    if name not in there:
        raise Refused(f'--device {name} is not on this machine; use {" or ".join(there)}')
    if local_world > num[name]:
        raise Refused(f'--device {name} suits --nproc_per_node={num[name]}, not {local_world}')
    return torch.device(name, local_rank) if name == 'cuda' else torch.device(name)


def autocast(device):
    """bf16 matrix products on cuda, float32 elsewhere."""
    return torch.autocast('cuda', torch.bfloat16) if device.type == 'cuda' else contextlib.nullcontext()


def on_first(function, *args, **options):
    """Calls it on the first process; the others wait, however long, and return or raise what it does."""
    answer = [None, None]
    if get_rank() == 0:
        try:
            answer[0] = function(*args, **options)
        except (Exception, SystemExit) as error:        # whatever it is, the others must not wait for ever
            answer[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(answer, group=cpu_group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def sum_over_processes(x):
    """Of a tensor of any shape, on its device; with one process a copy."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def max_over_processes(number):
    """The largest of the processes' numbers, agreed on by their CPUs: no device has to wait."""
    x = torch.tensor(number, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX, cpu_group)
    return x.item()


def gather(x):
    """Every process's [B, ...] as one [world * B, ...], by rank, with gradients to where each came from."""
    return torch.cat(all_gather(x)) if dist.is_initialized() else x


def gather_lists(rows):
    """Every process's list as one, by rank."""
    if not dist.is_initialized():
        return rows
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, rows, group=cpu_group)
    return sum(lists, [])


def to_device(model, cfg, device, mesh=None):
    """Moves a model; in place, its blocks are compiled, made to compute activations again, and sharded. From
    then on it computes in bf16 on cuda, wherever it is called: in training, evaluation, pictures and probes."""
    model.to(device)
    if cfg.compile:         # training, evaluation, teacher: the same code in more ways than torch expects
        torch._dynamo.config.recompile_limit = 64

    # bf16 halves what is gathered; gradients are summed, and the residual stream stays, in float32
    half = torch.bfloat16 if device.type == 'cuda' else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.get_default_dtype(), cast_forward_inputs=False)
    again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in [module for module in model.modules() if isinstance(module, M.Block)]:
        if cfg.compile:
            block.forward = torch.compile(block.forward)
        if cfg.checkpoint_activations and any(weight.requires_grad for weight in block.parameters()):
            block.forward = functools.partial(again, block.forward)
        if mesh:
            fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)

    if mesh:
        fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for name in ('forward', 'features', 'patch_features', 'encode_image', 'encode_text'):
        if hasattr(model, name):
            if mesh and name != 'forward':          # they gather weights as forward does
                fsdp.register_fsdp_forward_method(model, name)
            setattr(model, name, with_autocast(getattr(model, name), device))
    return model


def accumulate(model, cfg, is_last):
    """Before each of a step's micro-batches: gradients are summed over the processes at the last, and
    weights stay gathered until then, where there is memory for both."""
    if isinstance(model, fsdp.FSDPModule):
        at_once = is_last or not cfg.gather_once
        model.set_requires_gradient_sync(at_once)
        model.set_reshard_after_backward(at_once)
        model.set_reshard_after_forward(not cfg.gather_once)


def with_autocast(function, device):
    """The same function, under autocast."""
    def called(*args, **options):
        with autocast(device):
            return function(*args, **options)
    return called


@contextlib.contextmanager
def gathered(model):
    """All weights whole on every process meanwhile: each runs the model as often as it has images."""
    units = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def send(tensor, device):
    """A CPU's tensor on the device. From pinned memory nothing waits for what the device is doing."""
    pinned = tensor.pin_memory() if device.type == 'cuda' else tensor
    return pinned.to(device, non_blocking=True)


def ahead(batches, device, prepare=lambda batch: batch):
    """The same batches after prepare(batch). A thread makes the next two meanwhile: on cuda on a stream of
    its own, but the loop's prepares them, as a GPU has no time to spare; on CPUs where one computes."""
    if device.type == 'cuda':
        return map(prepare, in_thread(batches, torch.cuda.Stream(device)))
    batches = map(prepare, batches)
    return in_thread(batches) if torch.get_num_threads() == 1 and os.cpu_count() > 1 else batches


def in_thread(items, stream=None, depth=2):
    """The same dicts of tensors; a thread makes them, `depth` ahead. Its exceptions are raised here."""
    items = iter(items)

    def make():
        if stream:
            torch.cuda.set_device(stream.device)        # a thread begins on the first GPU
        with torch.cuda.stream(stream):
            return next(items, None), stream and stream.record_event()

    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(make) for _ in range(depth)]
        while True:
            item, made = waiting.pop(0).result()
            if item is None:
                return
            waiting.append(thread.submit(make))
            if stream:
                now = torch.cuda.current_stream()
                now.wait_event(made)                # first the transfer, then what is computed from it
                for x in torch.utils._pytree.tree_leaves(item):
                    if torch.is_tensor(x) and x.is_cuda:
                        x.record_stream(now)        # the thread's stream gets it back when we are done
            yield item


def run_stage(script, out_dir, *flags):
    """Another stage's command, unless out_dir has its result. Signals to us end it; its failure ends us."""
    if read_result(out_dir):
        return
    print0(f'first {script}, once ({out_dir}):')
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    command = [sys.executable, Path(__file__).resolve().parent / script, '--out_dir', out_dir, *flags]
    child = subprocess.Popen(command, env=environment)

    def pass_on(number, frame):
        child.send_signal(number)
    before = {number: signal.signal(number, pass_on) for number in STOPPING}
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)      # below 0: the signal that ended it


# ---- optimizer and schedule --------------------------------------------------------------------------

def param_groups(model, weight_decay, layer_decay=1.):
    """Matrices decay; vectors, positions and tokens do not. lr_scale: layer_decay once a layer above (BEiT)."""
    groups = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            bare = weight.ndim < 2 or name.split('.')[-1] in M.TOKENS
            scale = layer_decay ** layers_above(name, model)
            new = dict(params=[], weight_decay=0. if bare else weight_decay, lr_scale=scale)
            groups.setdefault((bare, -scale), new)['params'].append(weight)
    return [groups[key] for key in sorted(groups)]


def layers_above(name, model):
    """How many layers of its tower follow a weight's: head and norm 0, the last block 1, the input most."""
    tower, in_block, rest = name.rpartition('blocks.')
    if in_block:
        return len(model.get_submodule(tower + 'blocks')) - int(rest.split('.')[0])

    # the tower's inputs come before all of its blocks
    inputs = '|'.join((*M.TOKENS, 'patch_embed', 'pre_norm', 'token_embed'))
    is_input = re.match(f'(.*)({inputs})', name)
    return 1 + len(model.get_submodule(is_input[1] + 'blocks')) if is_input else 0


def make_optimizer(model, cfg, layer_decay=1.):
    """Fused AdamW, 2 to 5 times faster than the default on a CPU."""
    groups = param_groups(model, cfg.weight_decay, layer_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def clip_gradients(model, grad_clip):
    """Scales the gradients down to a global norm; returns what it was, the same on every process."""
    norm = torch.nn.utils.clip_grad_norm_(list(model.parameters()), grad_clip)
    return norm.full_tensor() if hasattr(norm, 'full_tensor') else norm


def lr_at(step, cfg):
    """The learning rate: up linearly in warmup_steps, then what lies above min_lr falls by the schedule.
    With a cool-down it falls in the last `cooldown` steps only: what is before does not depend on steps."""
    if cfg.cooldown:
        share = min(1, (cfg.steps - step) / cfg.cooldown)
    elif cfg.schedule == 'linear':
        share = 1 - step / cfg.steps
    elif cfg.schedule == 'steps':
        share = .1 if step >= cfg.drop_at * cfg.steps else 1
    else:
        done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
        share = (1 + math.cos(math.pi * min(1, max(0, done)))) / 2
    warmup = min(1, (step + 1) / max(1, cfg.warmup_steps))
    return warmup * (cfg.min_lr + (cfg.lr - cfg.min_lr) * share)


def settle_steps(cfg, dataset):
    """Turns --epochs into steps, and keeps the warm-up within a quarter of a short run."""
    if cfg.epochs and len(dataset) >= 2 ** 40:
        raise Refused('--epochs needs data that ends, a folder or shapes:unique=N; use --steps')
    if cfg.epochs:
        cfg.steps = max(1, round(cfg.epochs * len(dataset) / cfg.batch_size))
    cfg.warmup_steps = min(cfg.warmup_steps, cfg.steps // 4)
    if cfg.warmup_steps + cfg.cooldown > cfg.steps:
        raise Refused(f'--cooldown {cfg.cooldown} is longer than --steps {cfg.steps} without the warm-up')


# ---- save and resume ---------------------------------------------------------------------------------

def finished(cfg):
    """Whether the run is done, which it says in one line; one with other options is refused. Before any work its
    folder has to be writable, and no other run's while this process lives."""
    with writing(f'--out_dir {cfg.out_dir}'):
        os.makedirs(cfg.out_dir, exist_ok=True)
        on_first(lock, cfg.out_dir)
        tempfile.TemporaryFile(dir=cfg.out_dir).close()

    path = f'{cfg.out_dir}/result.json'
    result = on_first(read_result, cfg.out_dir)
    if not result:
        if os.path.exists(path):
            print0(f'{path} or its model.pt is not whole: the run goes on from its last checkpoint')
        return False

    stage = stage_of(type(cfg)).name
    if result.get('stage', stage) != stage:
        raise Refused(f'{path} is of {result["stage"]}, not of {stage}; use another --out_dir')
    now = options_of(cfg)
    changed = differences(now, now | result.get('options', {}))
    if changed:
        raise Refused(f'{path} is of a run with other options: {changed}; use --out_dir NAME for another')
    print0(f'this run is finished: {path} holds its result; use --out_dir NAME for another')
    unlock()
    return True


def read_result(out_dir):
    """What result.json says of a run, if it is whole and the model is there; else {}."""
    with contextlib.suppress(Refused):
        result = data.read_json(f'{out_dir}/result.json')
        if isinstance(result, dict) and is_whole_zip(f'{out_dir}/model.pt'):
            return result
    return {}


def is_whole_zip(path):
    """Whether every part of a file of weights has the checksum that it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error):
        return False


def options_of(cfg):
    """The options that decide what is computed, as result.json has them: text, without our folders."""
    asked = {name: value for name, value in vars(cfg).items() if name not in NEVER_DIFFER}
    return {name: re.sub('(^|,)/[^,]*/', r'\1', str(value)) for name, value in asked.items()}


def differences(now, then):
    """Of two dicts of options in words: --lr 0.02 (was 0.01), --seed 1 (was 0)."""
    names = [name for name in sorted(now.keys() | then.keys()) if now.get(name) != then.get(name)]
    return ', '.join(f'--{name} {now.get(name)} (was {then.get(name)})' for name in names)


def lock(folder):
    """Refuses a folder that another process trains in. The system unlocks it when this one ends, however."""
    global locked
    unlock()
    locked = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f'another run is writing to {folder}; wait for its end or use --out_dir NAME') from None
    except OSError:
        pass                # a file system that knows no locks


def unlock():
    global locked
    if locked is not None:
        os.close(locked)
    locked = None


os.register_at_fork(after_in_child=unlock)      # or readers would keep the folder when we are killed


def save_model(model, path, **extra):
    """model.save of a model that may be sharded: gathered on the first process, which writes."""
    if not dist.is_initialized():
        return M.save(model, path, **extra)
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=whole)
    with torch.device('meta'):
        copy = type(model).__mro__[2](model.config)     # FSDP2 put two classes of its own in front
    if get_rank() == 0:
        copy.load_state_dict(state, assign=True)
    on_first(M.save, copy, path, **extra)


def stage_of(Config):
    """The path of the stage's file."""
    return Path(sys.modules[Config.__module__].__file__)


@functools.cache
def code_of(Config):
    """{file: hash} of the stage's and the model's source, as they were when the run began."""
    paths = stage_of(Config), Path(M.__file__)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def run_state(model, optimizer, ema=None):
    """What training changes, each process's shards. Any number of processes can read it again."""
    weights, moments = dcp_state.get_state_dict(model, optimizer)
    state = dict(model=weights, optim=moments)
    return state | dict(ema=ema.weights) if ema else state


def save_checkpoint(out_dir, step, model, optimizer, cfg, constants={}, ema=None, about={}):
    """What a run needs to go on after `step` updates; constants are what it measured once, about what it
    learns from. The last two checkpoints stay, and for branches the one where a cool-down begins."""
    final = f'{out_dir}/checkpoint/step_{step:07d}'
    beside = final + '.tmp'
    facts = dict(format=FORMAT, code=code_of(type(cfg)), step=step, config=vars(cfg),
                 constants=constants, about=about)

    def publish():
        torch.save(facts, f'{beside}/run.pt')
        os.rename(beside, final)        # only now it is whole
        for old in list_checkpoints(out_dir)[:-2]:
            if not (cfg.cooldown and old.endswith(f'step_{cfg.steps - cfg.cooldown:07d}')):
                os.rename(old, old + '.tmp')
                shutil.rmtree(old + '.tmp', ignore_errors=True)

    try:
        on_first(shutil.rmtree, beside, ignore_errors=True)
        dcp.save(run_state(model, optimizer, ema), checkpoint_id=beside, process_group=cpu_group)
        on_first(publish)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        on_first(shutil.rmtree, beside, ignore_errors=True)
        raise Refused(f'{final} cannot be written ({M.first_line(error)}); earlier ones are whole') from None


def list_checkpoints(out_dir):
    """The folders of whole checkpoints, oldest first."""
    return sorted(str(path) for path in Path(out_dir, 'checkpoint').glob('step_*[0-9]'))


def resume(out_dir, model, optimizer, cfg, ema=None, about={}):
    """Loads the latest checkpoint, whatever number of processes wrote it -> (updates made, constants).
    Only from the run's own folder or --branch: its metadata is a pickle, which could do anything.
    about: what the run learns from now, of which it says what changed since."""
    # one process does without torch.distributed; nothing changes an output of FSDP2 in place
    warnings.filterwarnings('ignore', message='torch.distributed is|FSDP2-wrapped module')
    found = on_first(list_checkpoints, out_dir)
    may_differ = NEVER_DIFFER
    if cfg.branch and not found:
        found = [on_first(branch_point, cfg)]
        may_differ = NEVER_DIFFER | {'steps', 'cooldown'}
    if not found:
        return 0, {}

    path = found[-1]
    with reading(path):
        facts = on_first(read_facts, path)
    stage = stage_of(type(cfg)).name
    if stage not in facts['code']:
        raise Refused(f'{path} is not of {stage}; use another --out_dir')
    if cfg.epochs:
        may_differ = may_differ | {'steps', 'warmup_steps'}     # they follow the number of images
    refuse_other_options(facts, cfg, path, may_differ)
    compare_data(about, facts['about'], path)

    state = run_state(model, optimizer, ema)
    with reading(path):
        refuse_other_model(state['model'], path)
        dcp.load(state, checkpoint_id=path, process_group=cpu_group)
    dcp_state.set_state_dict(model, optimizer, model_state_dict=state['model'], optim_state_dict=state['optim'])

    print0(f'continuing {out_dir} at step {facts["step"]}')
    changed = [name for name, code in code_of(type(cfg)).items() if code != facts['code'].get(name)]
    if changed:
        print0(f'with other code: {" and ".join(changed)} changed since')
    return facts['step'], facts['constants']


@contextlib.contextmanager
def reading(path):
    """A damaged checkpoint may raise anything, and torch logs a traceback besides: here it is one line."""
    logging.disable(logging.WARNING)
    try:
        yield
    except Refused:
        raise
    except (Exception, dcp.api.CheckpointException) as error:
        raise Refused(f'{path} is damaged; delete that folder, try again ({M.first_line(error)})') from None
    finally:
        logging.disable(logging.NOTSET)


def read_facts(path):
    facts = torch.load(f'{path}/run.pt', map_location='cpu', weights_only=True)
    if facts.get('format') != FORMAT:
        raise Refused(f'{path} is of another version; go on with the code of then, or use --out_dir NAME')
    facts = dict(about={}) | facts              # the first ones did not know their data
    return {name: facts[name] for name in ('code', 'step', 'config', 'constants', 'about')}


def refuse_other_options(facts, cfg, path, may_differ):
    """A run goes on with the options it began with; those that came later had their defaults."""
    then = {field.name: field.default for field in dataclasses.fields(cfg)} | facts['config']
    then |= {name: value for name, value in vars(cfg).items() if name in may_differ}
    changed = differences(vars(cfg), then)
    if changed:
        raise Refused(f'{path} has other options: {changed}; repeat them or use another --out_dir')


def describe(train_set, val_set, **more):
    """What a run learns from, as its checkpoints remember it. more: classes, whose order its head has;
    hashes of what else may change: vocabulary, teacher."""
    return {**more, 'training data': train_set.identity(), 'validation data': val_set.identity()}


def hash_of(tensors):
    """Of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def compare_data(now, then, path):
    """Refuses to go on where classes or vocabulary gave the weights another meaning; says what else
    changed. now and then as `describe` made them; of an earlier version then is empty."""
    changed = [what for what in now if what in then and now[what] != then[what]]
    if 'classes' in changed:
        added = [name for name in now['classes'] if name not in then['classes']]
        gone = [name for name in then['classes'] if name not in now['classes']]
        words = [f'added {name}' for name in added] + [f'removed {name}' for name in gone]
        words = ', '.join(words[:6]) or 'they have another order'
        raise Refused(f'{path} is of other classes, which changed since: {words}; use another --out_dir')
    if 'vocabulary' in changed:
        raise Refused(f'{path} is of another vocabulary, which changed since; use another --out_dir')

    for what in changed:
        count = ''
        if what.endswith('data') and 'samples' in now[what]:        # the world has no end
            count = f', of which there are {now[what]["samples"]:,} (were {then[what]["samples"]:,})'
        print0(f'since {path} the {what} changed{count}')


def refuse_other_model(weights, path):
    """Refuses a checkpoint that is whole, but of weights of other names or shapes."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    then = {name: list(kept.size) for name, kept in saved.items() if name.startswith('model.')}
    now = {f'model.{name}': list(weight.shape) for name, weight in weights.items()}
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise Refused(f'{path} is of another model: its {name.removeprefix("model.")} is {then.get(name)}, '
                          f'here {now.get(name)}; use another --out_dir')


def branch_point(cfg):
    """The last checkpoint in --branch from before its learning rate fell, and before ours does."""
    ours = cfg.steps - cfg.cooldown
    for path in reversed(list_checkpoints(cfg.branch)):
        facts = read_facts(path)
        theirs = facts['config']['steps'] - facts['config']['cooldown']
        if cfg.cooldown and facts['config']['cooldown'] and facts['step'] <= min(ours, theirs):
            return path
    raise Refused(f'--branch {cfg.branch} has no checkpoint up to step {ours} at which both learning rates '
                  'are constant; give both runs --cooldown, and that one --save_every of the steps before')


# ---- log and pictures --------------------------------------------------------------------------------

def read_log(out_dir, name='log.jsonl'):
    """A file of JSON lines as a list of dicts, without those that a kill cut short or that are no log's."""
    path = Path(out_dir, name)
    text = path.read_text(errors='replace') if path.exists() else ''
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get('step'), int)]


def number_in(row, name):
    """A number of a log's line; None where it is none."""
    value = row.get(name)
    return value if isinstance(value, (int, float)) else None


def to_json(values, indent=None):
    """As text. JSON has no NaN and no infinity: null stands for them."""
    values = json.loads(json.dumps(values), parse_constant=lambda name: None)
    return json.dumps(values, indent=indent, allow_nan=False)


def replace(path, text):
    """Writes a file that is whole or as it was before, whenever we are killed."""
    with whole_file(path) as new:
        Path(new).write_text(text)


@contextlib.contextmanager
def whole_file(path):
    """A name to write to, of what then becomes path; a disk that fills up meanwhile gets its room back."""
    new = path + '.tmp'
    with writing(path):
        try:
            yield new
            os.replace(new, path)
        finally:
            Path(new).unlink(missing_ok=True)


class Log:
    """A bar with the time left, and out_dir/log.jsonl, without the steps from `start` on that are done again.
    While it lasts, SIGTERM and Ctrl-C are noted, and obeyed where the loop asks."""

    def __init__(self, cfg, start, device=torch.device('cpu'), flops=0):
        self.cfg = cfg
        self.step = start
        self.device = device
        self.flops = flops              # of an image
        self.in_a_row = 0               # gradients that were not finite
        self.longest = torch.zeros((), device=device)       # of such rows

        # what an interrupted run left
        for name in ('log.jsonl', 'evals.jsonl'):
            lines = [to_json(line) + '\n' for line in read_log(cfg.out_dir, name) if line['step'] < start]
            on_first(replace, f'{cfg.out_dir}/{name}', ''.join(lines))
        last = (read_log(cfg.out_dir) or [{}])[-1]
        self.skipped = int(number_in(last, 'skipped') or 0)
        self.last_write = time.time()
        self.began = self.last_write - (number_in(last, 'seconds') or 0)
        self.bar = tqdm(total=cfg.steps, initial=start, desc=cfg.size, dynamic_ncols=True,
                        disable=get_rank() > 0, mininterval=0.5 if sys.stderr.isatty() else 15)
        self.failure = None             # of reading the next batch
        self.noted = math.inf           # when a signal came
        self.signal = 0                 # noted from now on
        self.handlers = {number: signal.signal(number, self.note) for number in STOPPING}

    def note(self, number, frame):
        """The signals' handler. A second one, a second or more later, ends the process at once."""
        if self.signal and time.time() - self.noted > 1:
            os._exit(128 + number)
        self.signal = number
        self.noted = time.time()

    def watch(self, batches):
        """The same batches. The next is read before one is trained on: where that fails, the step ends,
        `stopping` says so to all, and what is trained is saved."""
        batches = iter(batches)
        batch = self.read(batches)
        self.raise_failure()            # of the first: there is nothing to save
        while batch is not None:
            following = self.read(batches)
            yield batch
            batch = following

    def read(self, batches):
        """The next batch, or None at the end or where reading fails."""
        try:
            return next(batches, None)
        except Exception as error:
            self.failure = error

    def raise_failure(self):
        """On all processes what reading raised on any: what is refused, else an exit beside the traceback."""
        own = [(str(self.failure), isinstance(self.failure, Refused))] if self.failure else []
        for line, is_refused in gather_lists(own):
            if is_refused:
                raise Refused(line)
            raise self.failure or SystemExit(1)

    def stopping(self):
        """The signal that any process was sent, FAILED where one cannot read on, or 0. All ask after each
        step, and leave after the same."""
        self.signal = int(max_over_processes(FAILED if self.failure else self.signal))
        return self.signal

    def leave(self, done):
        """Ends the process as the signal asked, or by what failed, after `done` steps and a checkpoint."""
        self.close()
        unlock()
        print0(f'\nstopped after step {done}, which is saved; the same command goes on from there')
        self.raise_failure()
        sys.exit(128 + self.signal)

    def close(self):
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def due(self, step):
        """Whether this step is logged: reading numbers back from a device costs time."""
        return (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps

    def update(self, optimizer, grad_norm):
        """optimizer.step(), but for gradients that are not finite: fused AdamW passes these over on the
        device, so that nothing waits for their norm. Their counts come back with the log's next line."""
        skipped = (~torch.isfinite(grad_norm)).to(torch.float32)
        if optimizer.defaults.get('fused'):
            optimizer.found_inf = skipped
            optimizer.step()
        elif not skipped:
            optimizer.step()
        self.skipped += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.longest = torch.maximum(self.longest, self.in_a_row)

    def append(self, name, **row):
        path = f'{self.cfg.out_dir}/{name}'
        if get_rank() == 0:
            with optional(path), open(path, 'a') as file:
                file.write(to_json(row) + '\n')

    def write(self, step, **values):
        """A line of log.jsonl; values are numbers. The bar shows them, and step + 1 of its steps done."""
        if self.longest >= 10:
            raise Refused(f'gradients were not finite ten times in a row, near step {self.step}; lower --lr')
        now = time.time()
        speed = (step + 1 - self.step) * self.cfg.batch_size / (now - self.last_write)
        if self.flops:
            values['tflops'] = speed * self.flops / 1e12
        values |= dict(images_per_second=speed, skipped=self.skipped, seconds=now - self.began)
        values['memory_gb'] = peak_memory(self.device) / 1e9
        values = {name: float(f'{float(value):.6g}') for name, value in values.items()}
        self.append('log.jsonl', step=step, **values)
        self.bar.set_postfix(loss=f'{values["loss"]:.4f}', img_s=f'{speed:.0f}', refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        self.step = step + 1
        self.last_write = now

    def say(self, step, **metrics):
        """Metrics measured during the run: a line above the bar and in evals.jsonl."""
        self.append('evals.jsonl', step=step, **metrics)
        if get_rank() == 0:
            words = ', '.join(f'{name} {value:.3f}' for name, value in metrics.items())
            self.bar.write(f'step {step + 1}: {words}')
        self.last_write = time.time()

    def finish(self, model, ylabel, lines, **metrics):
        """loss.png, with lines {name: loss} to compare with; result.json, which says that a run is done."""
        self.close()
        self.append('evals.jsonl', step=self.cfg.steps - 1, **metrics)
        if get_rank() > 0:
            return
        out_dir = self.cfg.out_dir
        curve = [(line['step'], number_in(line, 'loss')) for line in read_log(out_dir)]
        curve = [(step, loss) for step, loss in curve if loss is not None]

        words = [re.sub(r'^(--\w+=)?/.*/', r'\1', word) for word in sys.argv]     # without our folders
        result = dict(metrics, skipped=int(self.skipped), seconds=round(time.time() - self.began, 1),
                      parameters=count_parameters(model), command=shlex.join(['python'] + words))
        asked = dict(stage=stage_of(type(self.cfg)).name, options=options_of(self.cfg))
        with whole_file(f'{out_dir}/result.json') as new:
            Path(new).write_text(to_json(result | asked, indent=2))     # it has its room before the picture
            with optional(f'{out_dir}/loss.png'):
                draw_loss(f'{out_dir}/loss.png', curve, lines, ylabel)
        unlock()
        print0(table(result), f'\n{out_dir}/: {", ".join(sorted(os.listdir(out_dir)))}')


def table(values):
    forms = {float: '.4g', int: ','}
    return '\n'.join(f'{name:<20} {value:{forms.get(type(value), "")}}' for name, value in values.items())


def introduce(train_set, val_set):
    """What a run learns from and is judged on: how much there is, and what was left out so far."""
    if train_set.reads_files:
        what = train_set.what
        classes = train_set.classes
        of_classes = f', of {len(classes):,} classes ({data.first_three(classes):.80})' if classes else ''
        print0(f'{len(train_set):,} {what} to learn from, {len(val_set):,} for validation{of_classes}')
    report_broken(train_set, val_set)


def say_judged(dataset):
    """What --eval is about to look at."""
    if dataset.reads_files:
        print0(f'{len(dataset):,} {dataset.what} in {dataset.root}')


def say_order(path, classes):
    """How the classes of a model without names, as released ones are, are matched with the data's."""
    print0(f'{path} has no names for its {len(classes)} classes: they are taken in the order of the '
           f'data\'s, {classes[0]!r} to {classes[-1]!r}')


def report_broken(*datasets):
    """What could not be read, by whichever process."""
    for dataset in datasets:
        dataset.broken.update(gather_lists([*dataset.broken]))
        if dataset.broken:
            print0(data.report_broken(dataset))


def draw_loss(path, curve, lines, ylabel):
    """A picture of [(step, loss), ...], with horizontal lines {name: loss}."""
    curve = [(step, loss) for step, loss in curve if math.isfinite(loss)] or [(0, 0.)]
    losses = [loss for _, loss in curve] + list(lines.values())
    low = min(losses)
    width = 800 / (curve[-1][0] or 1)                   # pixels a step
    height = 440 / (max(losses) - low or 1)             # and of loss 1

    picture = Image.new('RGB', (960, 600), 'white')
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(18)
    draw.text((80, 40), f'{ylabel}, {low:.3g} to {max(losses):.3g}, up to step {curve[-1][0]:,}', 'black', font)
    for name, loss in lines.items():
        y = 520 - (loss - low) * height
        draw.line((80, y, 880, y), '#D55E00', 2)
        draw.text((880, y - 4), f'{name} {loss:.3g}', '#D55E00', font, anchor='rs')
    draw.line([(80 + step * width, 520 - (loss - low) * height) for step, loss in curve], '#0072B2', 3)
    with whole_file(path) as new:
        picture.save(new, 'png')


def draw_sheet(path, columns, tile=128, names={}):
    """A picture of titled columns of images, each at most `tile` wide and high, beside a legend of colours.
    columns {title: [n, 3, H, W] with values 0 to 255, or a list of PIL images}; names {text: colour}."""
    def fit(image):
        if torch.is_tensor(image):
            image = Image.fromarray(image.clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
        scale = tile / max(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        return image.resize(size, Image.BICUBIC if scale < 1 else Image.NEAREST)

    columns = {title: [fit(image) for image in images] for title, images in columns.items()}
    height = 6 + max(picture.height for column in columns.values() for picture in column)
    bottom = 28 + max(height * max(map(len, columns.values())), 18 * len(names))
    right = 6 + len(columns) * (tile + 6)
    sheet = Image.new('RGB', (right + 130 if names else right, bottom), 'white')
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for n, (title, column) in enumerate(columns.items()):
        x = 6 + n * (tile + 6)
        draw.text((x, 6), title, 'black', font)
        for row, picture in enumerate(column):
            sheet.paste(picture, (x, 28 + row * height))
    for n, (text, colour) in enumerate(names.items()):
        y = 28 + n * 18
        draw.rectangle((right, y, right + 12, y + 12), colour)
        draw.text((right + 17, y - 2), text[:16], 'black', font)

    def save():
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with whole_file(path) as new:
            sheet.save(new, 'png')

    on_first(save)


# ---- costs of a model, worth of its frozen features --------------------------------------------------

def size_of(cfg):
    """The row of SIZES of a run: a recipe's name may add to it behind a dash, as g-560."""
    return cfg.size if cfg.size in M.SIZES else cfg.size.partition('-')[0]


def vit_config(cfg, **options):
    """The ViT of a run: its row of SIZES with the image and patch size asked for."""
    asked = {name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
    row = M.config_of(size_of(cfg), cfg.arch)
    return M.ViTConfig(**{**row, **asked, **options})


def refuse_clips(vit, path):
    """A ViT of clips, from file path, takes no single images."""
    if vit.config.frames > 1:
        raise Refused(f'{path} is a model of clips of {vit.config.frames} frames; use one of single images')


def count_parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def flops_per_image(config):
    """Of a ViT's forward pass at its image_size, a multiply-add as two."""
    D = config.width
    tokens = num_tokens(config)
    N = config.frames * (config.image_size // config.patch_size) ** 2
    patches = 2 * N * D * 3 * config.patch_size ** 2
    mlp = (3 if config.act == 'swiglu' else 2) * D * config.mlp_width   # fc1 and fc2, SwiGLU's gate
    linear = 2 * tokens * (4 * D ** 2 + mlp)                            # with qkv and proj
    attention = 4 * tokens ** 2 * D                                     # scores, and the sum of values
    head = 2 * (1 if config.pool else N) * D * config.head
    return patches + config.depth * (linear + attention) + head


def training_flops(config, teacher=None):
    """Of an image: the student's forward pass, its backward as two, and a teacher's forward pass, if any."""
    return 3 * flops_per_image(config) + (flops_per_image(teacher) if teacher else 0)


def peak_memory(device):
    """The most bytes this process has held: on its GPU, else in all."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


@dataclasses.dataclass
class Memory:
    """What training takes on each device. Models and device need not be here: sizes and type count."""
    model: torch.nn.Module
    device: torch.device
    shards: int = 1                     # devices over which weights are divided
    teacher: torch.nn.Module = None     # frozen
    share: int = 0                      # images of a device's part of a batch
    drawn: bool = False                 # whether the built-in world draws them
    seen: float = 1.                    # share of the patches that a tower sees
    beside: float = 0.                  # bytes an image of what is no tower

    def parts(self, num, again=False, once=False):
        """{what: bytes} with num images at once. again: activations are computed again; once: see
        gather_once."""
        half = self.device.type == 'cuda'       # autocast computes in bf16
        element = 2 if half else 4
        towers = towers_of(self.model)
        weights = count_parameters(self.model)
        learning = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

        # sharded weights are gathered in bf16 already, two blocks at a time; else autocast keeps bf16
        # copies of all. Gradients are summed in float32
        copies = 2 * weights if half and self.shards == 1 else 0
        gathered = 0
        if self.shards > 1:
            depth = sum(len(tower.blocks) for tower in towers)
            gathered = (element + 4) * weights * (1 if once else 2 / depth)

        # kept for the gradients, and passing: the teacher is done before the student begins
        learns = any(weight.requires_grad for tower in towers for weight in tower.blocks.parameters())
        kept = sum(activation_memory(tower.config, self.device, again, self.seen) for tower in towers)
        passing = [passing_memory(tower.config, self.device) for tower in towers]
        teacher = 0
        if self.teacher is not None:
            passing += [passing_memory(tower.config, self.device) for tower in towers_of(self.teacher)]
            on_gpu = any(weight.is_cuda for weight in self.teacher.parameters())
            teacher = 0 if on_gpu else 4 * count_parameters(self.teacher)       # there already

        # on a GPU three batches, one of them being drawn beside the training
        pixels = self.share * towers[0].config.image_size ** 2 if half else 0
        drawing = DRAWING * min(pixels, data.AT_ONCE) if self.drawn else 0
        return {
            'weights': 4 * weights / self.shards, 'gradients': 4 * learning / self.shards,
            'AdamW': 8 * learning / self.shards, 'bf16 copies': copies, 'gathered': gathered,
            'teacher': teacher, 'activations': num * (kept * learns + self.beside + max(passing)),
            'batches': 3 * 3 * pixels, 'drawing': drawing, 'reserve': RESERVE * half}

    def total(self, num, again=False, once=False):
        return sum(self.parts(num, again, once).values())


def towers_of(model):
    return [module for module in model.modules() if isinstance(module, (M.ViT, M.TextTower))]


def num_tokens(config):
    """Of a tower's sequence."""
    if isinstance(config, M.TextConfig):
        return config.context
    before = config.class_token + config.registers
    return before + config.frames * (config.image_size // config.patch_size) ** 2


def activation_memory(config, device, checkpointed=False, seen=1.):
    """Bytes of a tower's forward pass that the gradients of one image, or text, need."""
    D = config.width
    tokens = seen * num_tokens(config)
    inner = 8 * D                   # GELU's both sides
    if not isinstance(config, M.TextConfig):
        inner = (4 if config.act == 'swiglu' else 2) * config.mlp_width

    # float32: the inputs of two norms; else their outputs, q, k, v, attention's output, the MLP's
    block = tokens * (8 * D + (2 if device.type == 'cuda' else 4) * (6 * D + inner))
    return config.depth * tokens * 4 * D + block if checkpointed else config.depth * block


def passing_memory(config, device):
    """Bytes an image that are not kept for the gradients: what a ViT is made of, the block that is at
    work, predictions and targets on their way through the loss. Of a text tower the block alone."""
    D = config.width
    element = 2 if device.type == 'cuda' else 4
    if isinstance(config, M.TextConfig):
        return config.context * D * (8 + 11 * element)
    N = num_tokens(config)
    pixels = 3 * config.frames * config.image_size ** 2
    pixels *= 1 + 4 + element               # uint8, normalised, for the convolution
    block = N * (8 * D + element * (3 * D + 2 * config.mlp_width))
    outputs = 0 if config.pool else N * config.head * 2 * (element + 4)         # and in float32
    return pixels + block + outputs


def free_memory(device):
    """Bytes of a GPU that nobody has yet; of a CPU all that the machine has."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def ways_to_train(cfg, share):
    """[(images at once, activations computed again, gather_once)] that flags allow, the fastest first: all
    at once, parts of FEW and more; the same with activations computed again; smaller parts."""
    agains = [False, True]
    if cfg.checkpoint_activations is not None:
        agains = [cfg.checkpoint_activations]
    nums = [share]
    if hasattr(cfg, 'micro_batch'):
        nums = [share // n for n in range(1, share + 1) if share % n == 0]
        nums = [cfg.micro_batch] if cfg.micro_batch else nums

    ways = [(num, again) for again in agains for num in nums if num >= FEW or num == nums[0]]
    ways += [(num, agains[-1]) for num in nums if num < FEW]
    return [(num, again, once) for num, again in ways for once in (num < share, False)]


def settle_memory(cfg, model, device, world, **more):
    """Decides how to train in the memory that the processes have at least, and says so; refuses what
    cannot fit. model: the one to train, on any device or meta; more: fields of Memory."""
    share = cfg.batch_size // world
    memory = Memory(model, device, num_shards(world), share=share, drawn=data.is_world(cfg.data), **more)
    there = -max_over_processes(-free_memory(device))

    ways = ways_to_train(cfg, share)
    fitting = [way for way in ways if memory.total(*way) <= there]
    way = fitting[0] if fitting else min(ways, key=lambda way: memory.total(*way))
    num, again, once = way
    words = f'{memory.total(*way) / 1e9:.1f} of {there / 1e9:.1f} GB with {num} images at once'
    if again:
        words += ', activations computed again'
    if not fitting:
        hint = '' if again else '--checkpoint_activations, '
        raise Refused(f'training needs {words}; use {hint}a smaller --batch_size or --micro_batch, more processes')
    if device.type == 'cuda' or again or num < share:
        print0(f'memory by plan: {words}')

    cfg.checkpoint_activations = again
    cfg.gather_once = once
    if hasattr(cfg, 'micro_batch'):
        cfg.micro_batch = num


@torch.no_grad()
def knn_accuracy(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Accuracy of votes by the k nearest, exp(cosine / temperature) each: arXiv:2104.14294; x [n, D], y [n]."""
    train_x = F.normalize(train_x.float(), dim=1)
    test_x = F.normalize(test_x.float(), dim=1)
    cosine, nearest = (test_x @ train_x.T).topk(min(k, len(train_x)), dim=1)            # each [m, k]
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1, device=test_x.device)
    votes.scatter_add_(1, train_y[nearest], ((cosine - 1) / temperature).exp())
    return (votes.argmax(dim=1) == test_y).sum().item() / len(test_x)


@torch.no_grad()
def linear_probe(train_x, train_y, test_x, test_y, ridge=1e-3):
    """Accuracy of ridge regression from standardised features to one-hot labels. x [n, D], y [n]."""
    mean = train_x.float().mean(0)
    std = train_x.float().std(0) + 1e-6

    def standard(x):        # [n, D + 1], the last a bias
        return F.pad((x.float() - mean) / std, (0, 1), value=1.).cpu().double()

    x = standard(train_x)
    y = F.one_hot(train_y).cpu().double()
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1]), x.T @ y)
    return ((standard(test_x) @ weights).argmax(1) == test_y.cpu()).float().mean().item()


def pooled_features(model):
    """images uint8 [B, 3, H, W] -> mean of the last patch tokens [B, D]; no loss trains the class token."""
    return lambda images: model.features(model.normalize(images))[:, model.num_before:].mean(1)


@torch.no_grad()
def probe(encode, train_set, val_set, image_size, num, cfg, device):
    """Top-1 by k-NN and by a linear map of frozen features, on the data's labels, if any, and on the world's
    `unnamed`: part patterns, which captions never name. encode: images uint8 [B, 3, H, W] -> [B, D]."""
    wanted = {'features', 'labels', 'unnamed'}

    def collect(dataset):
        rows = []
        for batch in data.eval_batches(dataset, 64, image_size, num, device, cfg.workers):
            batch['features'] = encode(batch['images']).float()
            counted = batch['position'] < num
            rows.append({name: batch[name][counted] for name in wanted & batch.keys()})
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    train = collect(train_set)
    val = collect(val_set)
    metrics = {}
    for labels, name in (('labels', 'top1'), ('unnamed', 'unnamed')):
        if labels in train:
            examples = train['features'], train[labels], val['features'], val[labels]
            metrics[f'knn_{name}'] = knn_accuracy(*examples)
            metrics[f'linear_{name}'] = linear_probe(*examples)
    return metrics
