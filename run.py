"""
What every run needs and no stage should write again: options, processes and sharding, optimizer and
schedule, save and resume, the log. The loops are in the stage files; they call these functions by name.

    python mim_pretrain.py                                 # one process, plain tensors, nothing distributed
    torchrun --nproc_per_node=8 mim_pretrain.py --size g   # weights and AdamW's state over eight GPUs
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import model as M
from model import Refused


# ---- options ----------------------------------------------------------------------------------------

def option(default, help, choices=None, low=0, high=1e12, below=None):
    """A field of a Config that is a flag too: --help, the check and the refusal are made of this.
    A string is one of choices; a number lies from low to high, or from low to just under `below`."""
    # what it takes, in words
    takes = ''
    if choices:
        takes = 'one of ' + ', '.join(choice for choice in choices if choice)
    elif below is not None:
        takes = f'{low:g} to below {below:g}'
        high = math.nextafter(below, low)
    elif type(default) in (int, float) or type(default) is tuple and default:
        takes = f'{low:g} to {high:g}' if high < 1e12 else f'{low:g} or more'

    def fits(value):
        if choices:
            return value in choices
        parts = value if type(value) is tuple else (value,)
        return all(low <= part <= high for part in parts if isinstance(part, (int, float)))

    # its line in --help
    brackets = '; '.join(str(part) for part in (default, takes) if part not in ('', None, ()))
    help = f'{help} ({brackets})'.removesuffix(' ()')
    return dataclasses.field(default=default, metadata=dict(help=help, takes=takes, fits=fits))


@dataclass
class Run:
    """What every stage honours. Fields without option(...) are a recipe's constants, no flags."""
    size: str = option('nano', 'row of RECIPES: a row of SIZES in model.py, or one of its recipes, as g-560')
    data: str = option('shapes', 'the built-in world (shapes:unique=N,fine=N,objects=N), a folder or .tar')
    init: str = option('', 'file to start from instead of random weights')
    out_dir: str = option('', 'where results go; out/<stage>-<size> if empty')
    steps: int = option(1000, 'updates of the weights', low=1)
    epochs: float = option(0., 'passes over finite data, instead of --steps')
    batch_size: int = option(128, 'images in an update, over all processes', low=1)
    lr: float = option(1e-3, 'highest learning rate')
    image_size: int = option(0, "pixels along a side; 0: the size's own")
    patch_size: int = option(0, "pixels along a patch; 0: the size's own")
    seed: int = option(0, 'of weights, order, crops and masks', high=127)   # each owns 2^33 of 2^40 scenes
    device: str = option('', 'cuda, mps or cpu; the best there is if empty')
    compile: bool = option(None, 'torch.compile the blocks; decided by the device if not given')
    checkpoint_activations: bool = option(False, 'compute activations again for the gradients: less memory')
    save_every: int = option(500, 'steps between checkpoints', low=1)
    log_every: int = option(10, 'steps between lines of log.jsonl', low=1)
    workers: int = option(0, 'processes that read images; 0: read in this one')
    eval: bool = option(False, 'only evaluate --init')
    image: str = option('', 'only apply --init to this picture')
    drop_path: float = option(0., 'chance that the last block skips a branch; grows with depth', below=1)

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


# options that change how a run is made, not what it computes
NEVER_DIFFER = {'out_dir', 'micro_batch', 'device', 'compile', 'checkpoint_activations', 'save_every',
                'log_every', 'workers', 'eval', 'image', 'words', 'templates', 'branch'}

CLASSES = 'name the classes with --classes FILE, a line for each value, - where it is none'
GONE = {  # flags and values of earlier versions, and what to do now
    'plan': 'use python studies/plan.py', 'devices': 'use python studies/plan.py',
    'bench': 'use python studies/speed.py', 'study': 'use python studies/scaling.py',
    'shard': 'torchrun always divides weights, gradients and optimizer over the processes',
    'micro_batch': 'use --checkpoint_activations or more processes',
    'whole': 'clip_train.py --eval takes val/, or all of data without it; maps are tested in windows',
    'erase': 'use --mixup or --cutmix', 'jitter': 'use --scale_jitter',
    'probe knn': 'use python mim_pretrain.py --eval', 'augment jitter': 'use --augment colour',
    'ignore': CLASSES, 'zero_label': CLASSES,
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

    cfg = Config(**{**RECIPES[size], **flags})
    micro_batch = getattr(cfg, 'micro_batch', 0)
    if micro_batch and cfg.batch_size % micro_batch:
        raise Refused(f'--batch_size {cfg.batch_size} is not a multiple of --micro_batch {micro_batch}')
    return cfg


def read_flags(Config, argv):
    """{name: value} of the flags that are given; a flag that is gone says where it went."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, epilog=(
        "Defaults stand in brackets; the size's row of RECIPES goes before them, and a flag before both."))

    def refuse(message):
        raise Refused(f'{message}; --help lists the options')
    parser.error = refuse

    # a flag for each field that is an option
    options = {field.name: field for field in dataclasses.fields(Config) if field.metadata}
    for name, field in options.items():
        kind = dict(type=field.type, metavar=field.type.__name__.upper())
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        if field.type is list:
            kind = dict(nargs='+', metavar='TEXT')
        if field.type is tuple:
            kind = dict(type=comma_separated, metavar='A,B')
        parser.add_argument(f'--{name}', help=field.metadata['help'].replace('%', '%%'), **kind)

    # what is given
    flags, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.lstrip('-').partition('=')[0].removeprefix('no-')
        if name in GONE:
            raise Refused(f'--{name} is gone: {GONE[name]}')
        if name in Config.__dataclass_fields__:
            raise Refused(f'--{name} is no flag: it is a constant, in Config and RECIPES of the stage')
        refuse(f'{word} is not an option')
    for name, value in vars(flags).items():
        if f'{name} {value}' in GONE:
            raise Refused(f'--{name} {value} is gone: {GONE[f"{name} {value}"]}')
        if not options[name].metadata['fits'](value):
            raise Refused(f'--{name} {value} does not fit; use {options[name].metadata["takes"]}')
    return vars(flags)


def comma_separated(text):
    return tuple(float(part) for part in text.split(','))


def main(train, Config, RECIPES):
    """Runs a stage. What we refuse is one line and exit code 2; everything else keeps its traceback."""
    try:
        train(parse_config(Config, RECIPES))
    except Refused as error:
        if get_rank() == 0:
            print(f'error: {error}', file=sys.stderr)
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


# ---- processes and devices ---------------------------------------------------------------------------

cpu_group = None        # the processes' gloo group, for what may take long: a teacher, a checkpoint


def get_rank():
    return int(os.environ.get('RANK', 0))


def print0(*values):
    """Prints on the first process only."""
    if get_rank() == 0:
        print(*values, flush=True)


def setup(cfg):
    """(rank, number of processes, device, mesh) by torchrun's variables; no mesh with one process."""
    global cpu_group
    rank = get_rank()
    world = int(os.environ.get('WORLD_SIZE', 1))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    local_world = int(os.environ.get('LOCAL_WORLD_SIZE', 1))

    device = find_device(cfg.device, local_rank, local_world)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')      # TF32 where autocast keeps float32
    if world == 1:
        return rank, world, device, None

    # several processes: each has an equal part of every batch
    multiple = world * (getattr(cfg, 'micro_batch', 0) or 1)
    if cfg.batch_size % multiple:
        raise Refused(f'--batch_size {cfg.batch_size} does not divide over {world} processes; '
                      f'use a multiple of {multiple}, or fewer processes')
    if not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        cpu_group = dist.new_group(backend='gloo', timeout=timedelta(days=30))
    return rank, world, device, init_device_mesh(device.type, (world,), mesh_dim_names=('shard',))


def find_device(name, local_rank, local_world):
    """The torch.device that --device means; each process of a machine has a GPU of its own."""
    gpus = torch.cuda.device_count()
    there = dict(cuda=gpus > 0, mps=torch.backends.mps.is_available(), cpu=True)
    kinds = [kind for kind in there if there[kind]]

    name = name or kinds[0]
    if name not in kinds + [f'cuda:{i}' for i in range(gpus)]:
        raise Refused(f'--device {name} is not on this machine; use {" or ".join(kinds)}')
    if local_world > 1 and name not in ('cuda', 'cpu'):
        raise Refused(f'--device {name} is one device for {local_world} processes; use cuda or cpu')
    if name == 'cuda' and local_world > gpus:
        raise Refused(f'{local_world} processes on a machine with {gpus} GPUs; use --nproc_per_node={gpus}')
    return torch.device(name, local_rank) if name == 'cuda' else torch.device(name)


def autocast(device):
    """bf16 matrix products on cuda, float32 elsewhere; enter it as often as needed."""
    return torch.autocast('cuda', torch.bfloat16) if device.type == 'cuda' else contextlib.nullcontext()


def on_first(function, *args, **options):
    """Calls it on the first process while the others wait, however long.
    All of them return or raise what it does."""
    answer = [None, None]
    if get_rank() == 0:
        try:
            answer[0] = function(*args, **options)
        except (ValueError, OSError, RuntimeError, SystemExit) as error:
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
    if not dist.is_initialized():
        return number
    x = torch.tensor(number, dtype=torch.float64)
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
    """Moves a model to its device and prepares its blocks, in place: they compute activations again if asked
    to, are compiled (on cuda, or where asked), and are sharded. The rest of the weights is one more shard."""
    model.to(device)
    compiled = device.type == 'cuda' if cfg.compile is None else cfg.compile

    # bf16 halves what is gathered; gradients are summed, and the residual stream stays, in float32
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if device.type == 'cuda' else None,
                                  reduce_dtype=torch.get_default_dtype(), cast_forward_inputs=False)

    for block in [module for module in model.modules() if isinstance(module, M.Block)]:
        if compiled:
            block.forward = torch.compile(block.forward)
        if cfg.checkpoint_activations and any(weight.requires_grad for weight in block.parameters()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)
        if mesh:
            fully_shard(block, mesh=mesh, mp_policy=policy)

    if mesh:
        warnings.filterwarnings('ignore', message='FSDP2-wrapped module')      # we change no output in place
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        for name in ('features', 'patch_features', 'encode_image', 'encode_text'):
            if hasattr(model, name):        # they gather weights as forward does
                register_fsdp_forward_method(model, name)
    return model


@contextlib.contextmanager
def gathered(model):
    """All weights whole on every process meanwhile: each runs the model as often as it has images."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()

    yield

    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def send(tensor, device):
    """A CPU's tensor on the device. From pinned memory nothing waits for what the device is doing."""
    if device.type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def ahead(batches, device):
    """The same batches. On cuda a thread makes the next two on a stream of its own while the device
    computes: reading, rendering, masks and transfers cost the training no time."""
    return in_thread(batches, torch.cuda.Stream(device)) if device.type == 'cuda' else batches


def in_thread(items, stream=None, depth=2):
    """The same dicts of tensors; a thread makes them, `depth` ahead. Its exceptions are raised here."""
    items = iter(items)

    def make():
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
                for x in item.values():
                    if torch.is_tensor(x) and x.is_cuda:
                        x.record_stream(now)        # the thread's stream gets it back when we are done
            yield item


STOPPING = signal.SIGTERM, signal.SIGINT        # of a cluster's scheduler, of Ctrl-C
TORCHRUN = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR', 'MASTER_PORT'}


def run_stage(script, out_dir, *flags):
    """Another stage's command, unless out_dir has its result, as a process of its own.
    Our signals are passed on to it: it saves and leaves, and we after it. Whatever else ends it early ends
    us too, since it said why."""
    if os.path.exists(f'{out_dir}/result.json'):
        return
    print0(f'first {script}, once ({out_dir}):')
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    command = [sys.executable, Path(__file__).resolve().parent / script, '--out_dir', out_dir, *flags]
    child = subprocess.Popen(command, env=environment)

    def pass_on(number, frame):
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOPPING}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)      # below 0: the signal that ended it


# ---- optimizer and schedule --------------------------------------------------------------------------

def param_groups(model, weight_decay, layer_decay=1.):
    """Matrices with weight decay; norms, biases, positions and tokens without.
    A loop multiplies lr by a group's lr_scale: layer_decay once for each layer above (BEiT's rule; EVA
    fine-tunes so). The last norm and the head have 1."""
    groups = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue

        bare = weight.ndim < 2 or name.split('.')[-1] in ('pos_embed', 'class_token', 'mask_token')
        scale = layer_decay ** layers_above(name, model)
        new = dict(params=[], weight_decay=0. if bare else weight_decay, lr_scale=scale)
        groups.setdefault((bare, -scale), new)['params'].append(weight)
    return [groups[key] for key in sorted(groups)]


def layers_above(name, model):
    """How many layers of its tower follow a weight's: head and norm 0, the last block 1, the input most."""
    tower, in_block, rest = name.rpartition('blocks.')
    if in_block:
        return len(model.get_submodule(tower + 'blocks')) - int(rest.split('.')[0])
    for layer in ('patch_embed', 'class_token', 'mask_token', 'pos_embed', 'pre_norm', 'token_embed'):
        tower, is_input, _ = name.rpartition(layer)
        if is_input:
            return 1 + len(model.get_submodule(tower + 'blocks'))
    return 0


def make_optimizer(model, cfg, layer_decay=1.):
    """Fused AdamW, 2 to 5 times faster than the default on a CPU."""
    groups = param_groups(model, cfg.weight_decay, layer_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def clip_gradients(model, grad_clip):
    """Scales the gradients down to a global norm; returns what it was, the same on every process."""
    norm = torch.nn.utils.clip_grad_norm_(list(model.parameters()), grad_clip)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def lr_at(step, cfg):
    """The learning rate: up linearly in warmup_steps, then what lies above min_lr falls by the schedule.
    cosine: half a wave; linear: from the first step to the last; steps: to a tenth at drop_at of them.
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
    after = cfg.steps - cfg.warmup_steps
    if cfg.cooldown > after:
        raise Refused(f'--cooldown {cfg.cooldown} is longer than the {after} steps after the warm-up')


# ---- save and resume ---------------------------------------------------------------------------------

FORMAT = 2              # of checkpoints; the earliest have no number
UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, dcp.api.CheckpointException)


def finished(cfg):
    """Whether this run is done, which it says in one line. If not, makes sure its folder can be written."""
    result = f'{cfg.out_dir}/result.json'
    if os.path.exists(result):
        print0(f'this run is finished: {result} holds its result; use --out_dir NAME for another')
        return True
    with writing(f'--out_dir {cfg.out_dir}'):
        os.makedirs(cfg.out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.out_dir).close()
    return False


def save_model(model, path, **extra):
    """model.save of a model that may be sharded: gathered on the first process, which writes."""
    if not dist.is_initialized():
        return M.save(model, path, **extra)
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=whole)

    def write():
        Class = type(model).__mro__[2]      # FSDP2 put two of its own in front
        with torch.device('meta'):
            copy = Class(model.config)
        copy.load_state_dict(state, assign=True)
        M.save(copy, path, **extra)

    on_first(write)


@functools.cache
def code_of(Config):
    """{file: hash} of the stage's and the model's source, as they were when the run began."""
    paths = Path(sys.modules[Config.__module__].__file__), Path(M.__file__)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def run_state(model, optimizer, ema=None):
    """What training changes, each process's shards. Any number of processes can read it again."""
    state = dict(model=dcp_state.get_model_state_dict(model),
                 optim=dcp_state.get_optimizer_state_dict(model, optimizer))
    return {**state, 'ema': ema.weights} if ema else state


def save_checkpoint(out_dir, step, model, optimizer, cfg, constants={}, ema=None):
    """What a run needs to go on after `step` updates, under a temporary name until it is whole.
    The last two stay, and for branches the one where a cool-down begins.
    constants: what the run measured once, plain data or tensors."""
    final = f'{out_dir}/checkpoint/step_{step:07d}'
    beside = final + '.tmp'
    facts = dict(format=FORMAT, code=code_of(type(cfg)), step=step, config=vars(cfg), constants=constants)

    def publish():
        torch.save(facts, f'{beside}/run.pt')
        remove(final)
        os.rename(beside, final)
        for old in list_checkpoints(out_dir)[:-2]:
            if not (cfg.cooldown and old.endswith(f'step_{cfg.steps - cfg.cooldown:07d}')):
                remove(old)

    try:
        on_first(remove, beside)
        on_first(os.makedirs, beside)
        dcp.save(run_state(model, optimizer, ema), checkpoint_id=beside, process_group=cpu_group)
        on_first(publish)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        on_first(remove, beside)
        last = latest_checkpoint(out_dir)
        rest = f'{last} is intact, run the same command to go on' if last else 'none was written before'
        raise Refused(f'checkpoint {final} cannot be written ({M.first_line(error)}); {rest}') from None


def remove(folder):
    """Deletes a folder, if there is one. Killed half-way, it leaves nothing that looks whole."""
    if os.path.exists(folder) and not folder.endswith('.tmp'):
        doomed = folder + '.tmp'
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        folder = doomed
    shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(out_dir):
    """The folders of whole checkpoints, oldest first."""
    found = sorted(Path(out_dir, 'checkpoint').glob('step_*'))
    return [str(path) for path in found if path.suffix != '.tmp']


def latest_checkpoint(out_dir):
    """The newest whole checkpoint's folder, or None."""
    return (list_checkpoints(out_dir) or [None])[-1]


def resume(out_dir, model, optimizer, cfg, ema=None):
    """Loads the latest checkpoint, if any, whatever number of processes wrote it.
    Returns the number of updates already made and the run's constants.
    Only from the run's own folder or --branch: its metadata is a pickle, which could do anything."""
    warnings.filterwarnings('ignore', message='torch.distributed is')       # unused with one process: we know
    code = code_of(type(cfg))
    path = on_first(latest_checkpoint, out_dir)
    branches = cfg.branch and path is None
    if branches:
        path = on_first(branch_point, cfg)
    if path is None:
        return 0, {}

    try:
        facts = on_first(read_facts, path)
        refuse_other_options(facts, cfg, cfg.branch if branches else out_dir, branches)
        state = run_state(model, optimizer, ema)
        dcp.load(state, checkpoint_id=path, process_group=cpu_group)
    except UNREADABLE as error:
        raise Refused(f'{path} is damaged; delete that folder, and the run goes on from the one before '
                      f'({M.first_line(error)})') from None

    dcp_state.set_model_state_dict(model, state['model'])
    dcp_state.set_optimizer_state_dict(model, optimizer, optim_state_dict=state['optim'])

    # what the reader should know
    print0(f'continuing {out_dir} at step {facts["step"]}')
    changed = [name for name in code if code[name] != facts['code'].get(name)]
    if changed:
        print0(f'with other code: {" and ".join(changed)} changed since')
    return facts['step'], facts['constants']


def read_facts(path):
    """What a checkpoint says of its run."""
    facts = torch.load(f'{path}/run.pt', map_location='cpu', weights_only=True)
    if facts.get('format') != FORMAT:
        raise Refused(f'{path} is of another version of nanoEVA; finish that run with the code that began '
                      'it, or start another with --out_dir NAME')
    return facts


def refuse_other_options(facts, cfg, where, branches):
    """A run goes on with the options it began with; those that came later had their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    then = {**defaults, **facts['config']}
    now = vars(cfg)
    may_differ = NEVER_DIFFER | {'steps', 'cooldown'} if branches else NEVER_DIFFER

    changed = []
    for name in sorted((now.keys() | then.keys()) - may_differ):
        if now.get(name) != then.get(name):
            changed.append(f'--{name} {now.get(name)} (was {then.get(name)})')
    if changed:
        raise Refused(f'{where} holds an unfinished run with other options: {", ".join(changed)}; '
                      'repeat its options, or start another with --out_dir NAME')


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


# ---- log ---------------------------------------------------------------------------------------------

def read_log(out_dir, name='log.jsonl'):
    """A file of JSON lines as a list of dicts, without a last line that a kill cut short."""
    path = Path(out_dir, name)
    if not path.exists():
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith('}\n')]


def replace(path, text):
    """Writes a file that is whole or as it was before, whenever we are killed."""
    with writing(path):
        with open(path + '.tmp', 'w') as file:
            file.write(text)
        os.replace(path + '.tmp', path)


class Log:
    """A bar with the time left, and out_dir/log.jsonl, which the first process writes.
    Lines of steps from `start` on are dropped: they will be done again. `seconds` and `skipped` run on.
    While it lasts, SIGTERM and Ctrl-C are noted, and obeyed where the loop asks.
    flops: of an image, for the share of the device's speed (MFU)."""

    def __init__(self, cfg, start, device=torch.device('cpu'), flops=0):
        self.cfg, self.step, self.device, self.flops = cfg, start, device, flops
        self.speed = flops and matmul_speed(device) * int(os.environ.get('WORLD_SIZE', 1))
        self.in_a_row = 0               # gradients that were not finite

        # what an interrupted run left
        kept = {name: [line for line in read_log(cfg.out_dir, name) if line['step'] < start]
                for name in ('log.jsonl', 'evals.jsonl')}
        last = kept['log.jsonl'][-1] if kept['log.jsonl'] else {}
        self.skipped = int(last.get('skipped', 0))
        self.began = time.time() - last.get('seconds', 0)
        self.last_write = time.time()

        self.file = None
        if get_rank() == 0:
            for name, lines in kept.items():
                replace(f'{cfg.out_dir}/{name}', ''.join(json.dumps(line) + '\n' for line in lines))
            self.file = open(f'{cfg.out_dir}/log.jsonl', 'a', buffering=1)
        self.bar = tqdm(total=cfg.steps, initial=start, desc=cfg.size, dynamic_ncols=True,
                        disable=get_rank() > 0, mininterval=0.5 if sys.stderr.isatty() else 15)

        # signals are noted from now on
        self.signal = 0
        self.process = os.getpid()
        self.handlers = {number: signal.signal(number, self.note) for number in STOPPING}

    def note(self, number, frame):
        """The signals' handler. A second one, a second or more later, ends the process at once."""
        if os.getpid() != self.process:
            return      # a reader of images, forked from here: it ends when we do
        if self.signal and time.time() - self.noted > 1:
            os._exit(128 + number)
        self.signal = number
        self.noted = time.time()

    def stopping(self):
        """The signal that any process was sent, or 0. All ask after each step, and leave after the same."""
        self.signal = int(max_over_processes(self.signal))
        return self.signal

    def leave(self, done):
        """Ends the process as the signal asked, after `done` steps and a checkpoint."""
        self.close()
        print0(f'\nstopped after step {done}, which is saved; the same command goes on from there')
        sys.exit(128 + self.signal)

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def due(self, step):
        """Whether this step is logged: reading numbers back from a device costs time."""
        return (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps

    def is_finite(self, grad_norm):
        """False for a gradient that must not be applied; ten in a row end the run."""
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row == 10:
            raise Refused(f'gradients were not finite ten times in a row, near step {self.step}; lower '
                          f'--lr. The last checkpoint is {latest_checkpoint(self.cfg.out_dir)}')
        return False

    def write(self, step, **values):
        """A line of log.jsonl; values are numbers. The bar shows them, and step + 1 of its steps done."""
        now = time.time()
        speed = (step + 1 - self.step) * self.cfg.batch_size / (now - self.last_write)
        values['images_per_second'] = speed
        if self.flops:
            values['mfu'] = speed * self.flops / self.speed
        memory = peak_memory(self.device) / 1e9
        values |= dict(skipped=self.skipped, memory_gb=memory, seconds=now - self.began)
        values = {name: float(f'{float(value):.6g}') for name, value in values.items()}
        if self.file:
            with writing(self.file.name):
                self.file.write(json.dumps(dict(step=step, **values)) + '\n')

        self.bar.set_postfix(loss=f'{values["loss"]:.4f}', img_s=f'{speed:.0f}', refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        self.step = step + 1
        self.last_write = now

    def say(self, step, **metrics):
        """Metrics measured during the run: a line above the bar and in evals.jsonl."""
        if self.file:
            path = f'{self.cfg.out_dir}/evals.jsonl'
            with writing(path), open(path, 'a') as file:
                file.write(json.dumps(dict(step=step, **metrics)) + '\n')
            words = ', '.join(f'{name} {value:.3f}' for name, value in metrics.items())
            self.bar.write(f'step {step + 1}: {words}')
        self.last_write = time.time()

    def finish(self, model, ylabel, lines, **metrics):
        """loss.png, with lines {name: loss} to compare with; result.json, which says that a run is done."""
        self.close()
        if not self.file:
            return
        out_dir = self.cfg.out_dir
        curve = [(line['step'], line['loss']) for line in read_log(out_dir)]
        draw_loss(f'{out_dir}/loss.png', curve, lines, ylabel)

        words = [re.sub(r'^(--\w+=)?/.*/', r'\1', word) for word in sys.argv]     # without our folders
        result = dict(metrics, skipped=self.skipped, seconds=round(time.time() - self.began, 1),
                      parameters=count_parameters(model), command=shlex.join(['python'] + words))
        replace(f'{out_dir}/result.json', json.dumps(result, indent=2))
        print0(table(result), f'\n{out_dir}/: {", ".join(sorted(os.listdir(out_dir)))}')


def table(values):
    """A dict as aligned lines."""
    forms = {float: '.4g', int: ','}
    return '\n'.join(f'{name:<20} {value:{forms.get(type(value), "")}}' for name, value in values.items())


def report_broken(*datasets):
    """What could not be read, by whichever process."""
    for dataset in datasets:
        dataset.broken.update(gather_lists([*dataset.broken]))
        if dataset.broken:
            print0(data.report_broken(dataset))


# ---- pictures ----------------------------------------------------------------------------------------

def draw_loss(path, curve, lines, ylabel, size=(960, 600), border=80):
    """A picture of [(step, loss), ...], with dashed horizontal lines {name: loss}."""
    curve = [(step, loss) for step, loss in curve if math.isfinite(loss)] or [(0, 0.)]
    losses = [loss for _, loss in curve] + list(lines.values())
    low, high, last = min(losses), max(losses), curve[-1][0]
    right, bottom = size[0] - border, size[1] - border

    def place(step, loss):
        x = border + step / (last or 1) * (right - border)
        y = bottom - (loss - low) / (high - low or 1) * (bottom - border)
        return x, y

    picture = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(18)
    draw.text((border, border / 2), f'{ylabel}, {low:.3g} to {high:.3g}', fill='black', font=font)
    draw.text((right, bottom + border / 2), f'step {last:,}', fill='black', font=font, anchor='rm')
    for name, loss in lines.items():
        y = place(0, loss)[1]
        for x in range(border, right, 14):
            draw.line((x, y, x + 8, y), fill='#D55E00', width=2)
        draw.text((right, y - 4), f'{name} {loss:.3g}', fill='#D55E00', font=font, anchor='rs')

    draw.line([place(step, loss) for step, loss in curve], fill='#0072B2', width=3)
    with writing(path):
        picture.save(path)


def draw_sheet(path, columns, tile=128, names={}):
    """A picture of titled columns of images, each at most `tile` wide and high, above a legend of colours.
    columns {title: [n, 3, H, W] with values 0 to 255, or a list of PIL images}; names {text: colour}."""
    columns = {title: list(tiles(images, tile)) for title, images in columns.items()}
    height = 6 + max(picture.height for column in columns.values() for picture in column)
    legend = 28 + height * max(len(column) for column in columns.values())
    width = 6 + len(columns) * (tile + 6)
    per_row = max(1, width // 120)              # names in a row of the legend

    sheet = Image.new('RGB', (width, legend + 18 * math.ceil(len(names) / per_row)), 'white')
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)

    for n, (title, column) in enumerate(columns.items()):
        x = 6 + n * (tile + 6)
        draw.text((x, 6), title, fill='black', font=font)
        for row, picture in enumerate(column):
            sheet.paste(picture, (x, 28 + row * height))
    for n, (text, colour) in enumerate(names.items()):
        x, y = 6 + n % per_row * 120, legend + n // per_row * 18
        draw.rectangle((x, y, x + 12, y + 12), fill=colour)
        draw.text((x + 17, y - 2), text[:16], fill='black', font=font)
    with writing(path):
        on_first(sheet.save, path)


def tiles(images, tile):
    """[n, 3, H, W] with values 0 to 255, or PIL images -> PIL images whose longer side is `tile`."""
    if torch.is_tensor(images):
        images = images.clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        images = [Image.fromarray(pixels) for pixels in images]
    for image in images:
        scale = tile / max(image.size)
        size = [max(1, round(n * scale)) for n in image.size]
        yield image.resize(size, Image.BICUBIC if scale < 1 else Image.NEAREST)


# ---- costs -------------------------------------------------------------------------------------------

def vit_config(cfg, **options):
    """The ViT of a run: its size's row with the image and patch size asked for."""
    asked = {name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
    return M.ViTConfig(**{**M.SIZES[cfg.size.partition('-')[0]], **asked, **options})


def count_parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def transformer_flops(width, depth, mlp_width, tokens):
    """Of one sequence through the blocks, forward, a multiply-add as two."""
    linear = 2 * tokens * (4 * width ** 2 + 2 * width * mlp_width)      # qkv, proj, fc1, fc2
    return depth * (linear + 4 * tokens ** 2 * width)                   # and scores, and the sum of values


def flops_per_image(config):
    """Of a ViT's forward pass at its image_size, a multiply-add as two."""
    N = config.frames * (config.image_size // config.patch_size) ** 2
    patches = 2 * N * config.width * 3 * config.patch_size ** 2
    head = 2 * (1 if config.pool else N) * config.width * config.head
    return patches + transformer_flops(config.width, config.depth, config.mlp_width, 1 + N) + head


def training_flops(config, teacher=None):
    """Of an image: the student's forward pass, its backward as two, and a teacher's forward pass, if any."""
    flops = 3 * flops_per_image(config)
    return flops + flops_per_image(teacher) if teacher else flops


@functools.cache
def matmul_speed(device):
    """FLOP/s of a large matrix product, the best of ten: on cuda in bf16, elsewhere in float32."""
    n, dtype = (8192, torch.bfloat16) if device.type == 'cuda' else (768, torch.float32)
    x = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(seconds(lambda: x @ x, device) for _ in range(10))


def seconds(function, device):
    """How long it takes, until the device is done."""
    synchronize = getattr(torch, device.type).synchronize       # torch.cpu's does nothing
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def peak_memory(device):
    """The most bytes this process has held: on its GPU, else in all."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def available_memory(device):
    """Free bytes of a GPU; of a CPU all that the machine has."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def training_memory(config, batch_size, device, shards=1, checkpointed=False):
    """{what: bytes} that a ViT's training with AdamW takes on each of `shards` devices, batch_size images at
    once. Sharded, two blocks are whole at a time."""
    with torch.device('meta'):
        parameters = count_parameters(M.ViT(config))
    element = 2 if device.type == 'cuda' else 4         # of what autocast makes bf16
    whole = 2 * element * parameters / config.depth if shards > 1 else 0

    # float32: the inputs of two norms; else their outputs, q, k, v, attention's output, and GELU's both sides
    tokens = 1 + config.frames * (config.image_size // config.patch_size) ** 2
    block = tokens * (8 * config.width + element * (6 * config.width + 2 * config.mlp_width))
    image = config.depth * block
    if checkpointed:
        image = config.depth * tokens * 4 * config.width + block
    return dict(weights=4 * parameters / shards + whole, gradients=4 * parameters / shards + whole,
                AdamW=8 * parameters / shards, activations=batch_size * image)


def check_memory(cfg, config, device, world=1):
    """Refuses before any work a training that would not fit, on the processes' least memory."""
    batch_size = getattr(cfg, 'micro_batch', 0) or cfg.batch_size // world
    needed = sum(training_memory(config, batch_size, device, world, cfg.checkpoint_activations).values())
    there = -max_over_processes(-available_memory(device))
    if needed > there:
        raise Refused(f'training needs {needed / 1e9:.1f} GB with {batch_size} images at once, this '
                      f'{device.type} has {there / 1e9:.1f} GB; use a smaller --batch_size or --micro_batch, '
                      '--checkpoint_activations, more processes or a smaller --size')


# ---- frozen features ---------------------------------------------------------------------------------

NUM_PROBE = 2048        # training images that fit the probes, and validation images that judge them


@torch.no_grad()
def knn_accuracy(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Accuracy of the k nearest training features' votes, each exp(cosine / temperature): arXiv:2104.14294.
    train_x [n, D], train_y [n] labels, test_x [m, D], test_y [m]."""
    train_x = F.normalize(train_x.float(), dim=1)
    test_x = F.normalize(test_x.float(), dim=1)
    num_labels = int(train_y.max()) + 1
    right = 0
    for x, y in zip(test_x.split(1024), test_y.split(1024)):
        cosine, nearest = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)         # each [1024, k]
        votes = torch.zeros(len(x), num_labels, device=x.device)
        votes.scatter_add_(1, train_y[nearest], ((cosine - 1) / temperature).exp())
        right += (votes.argmax(dim=1) == y).sum().item()
    return right / len(test_x)


@torch.no_grad()
def linear_probe(train_x, train_y, test_x, test_y, ridge=1e-3):
    """Accuracy of the best linear map to one-hot labels: ridge regression on standardised features.
    Shapes as in knn_accuracy."""
    mean = train_x.float().mean(0)
    std = train_x.float().std(0) + 1e-6

    def standard(x):
        x = F.pad((x.float() - mean) / std, (0, 1), value=1.)           # [n, D + 1], the last a bias
        return x.cpu().double()

    x = standard(train_x)
    y = F.one_hot(train_y).cpu().double()
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1]), x.T @ y)
    return ((standard(test_x) @ weights).argmax(1) == test_y.cpu()).float().mean().item()


def pooled_features(model):
    """What the probes see of a model: images uint8 [B, 3, H, W] -> the mean of its last patch tokens [B, D].
    EVA's class token has no loss in pre-training, so it says nothing."""
    return lambda images: model.features(model.normalize(images))[:, 1:].mean(1)


@torch.no_grad()
def probe(encode, train_set, val_set, image_size, num, cfg, device):
    """Top-1 of frozen features on the data's labels, by k-NN and by a linear map; {} without labels.
    The world has two: the largest object's kind, which captions name, and its part pattern, which they never
    do (`unnamed`). encode: images uint8 [B, 3, H, W] -> [B, D]."""
    sets = []
    for dataset in (train_set, val_set):
        found = dict(features=[], labels=[], unnamed=[])
        for batch in data.eval_batches(dataset, 64, image_size, num, device, cfg.workers):
            batch['features'] = encode(batch['images']).float()
            for name in found.keys() & batch.keys():
                found[name].append(batch[name].to(device))
        sets.append({name: torch.cat(parts) for name, parts in found.items() if parts})

    train, val = sets
    metrics = {}
    for labels, name in (('labels', 'top1'), ('unnamed', 'unnamed')):
        if labels in train:
            examples = train['features'], train[labels], val['features'], val[labels]
            metrics[f'knn_{name}'] = knn_accuracy(*examples)
            metrics[f'linear_{name}'] = linear_probe(*examples)
    return metrics
