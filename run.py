"""
What every run needs once: options, processes and devices, optimizer, schedule, save and resume, log, curves, costs.
The loops are in the stage files; they call these by name.

    python mim_pretrain.py                                 # one process: nothing here is distributed, tensors are plain
    torchrun --nproc_per_node=8 mim_pretrain.py --size g   # weights, gradients and AdamW's state are sharded over eight
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pickle
import re
import resource
import runpy
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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from model import SIZES, Block, ViT, first_line, get_rank, knn_accuracy, linear_probe, print0, save


def option(default, help):
    """A field of a Config; its flag and its line in --help are made from it."""
    return dataclasses.field(default=default, metadata=dict(help=help))


@dataclass
class Run:
    """What means the same in every stage."""
    size: str = option('nano', 'row of SIZES in model.py')
    data: str = option('shapes', 'the built-in world (shapes:unique=N,classes=N,objects=N), images in a folder or .tar')
    init: str = option('', 'file to start from instead of random weights')
    out_dir: str = option('', 'where results go; out/<stage>-<size> if empty')
    steps: int = option(1000, 'updates of the weights')
    epochs: float = option(0., 'passes over finite data, instead of --steps')
    batch_size: int = option(128, 'images in an update, over all processes')
    micro_batch: int = option(0, 'images at once on a device; 0: as many as belong to it')
    lr: float = option(1e-3, 'highest learning rate')
    image_size: int = option(0, "pixels along a side; 0: the size's own")
    patch_size: int = option(0, "pixels along a patch; 0: the size's own")
    seed: int = option(0, 'of weights, order, crops and masks')
    device: str = option('', 'cuda, mps or cpu; the best there is if empty')
    compile: bool = option(None, 'torch.compile the blocks; decided by the device if not given')
    shard: str = option('full', "full: weights, gradients and AdamW's state divided over the processes; none: copied")
    checkpoint_activations: bool = option(False, 'keep only the inputs of blocks, compute them again for the gradients')
    save_every: int = option(500, 'steps between checkpoints')
    log_every: int = option(10, 'steps between lines of log.jsonl')
    workers: int = option(0, 'processes that read images; 0: read in this one')
    eval: bool = option(False, 'only evaluate --init')
    plan: bool = option(False, 'only print parameters, FLOPs, memory and days')
    devices: int = option(1, 'of --plan: how many like this one')
    bench: bool = option(False, 'only measure speed, without data and teacher')
    image: str = option('', 'only apply --init to this picture')
    cooldown, branch = 0, ''        # options of mim_pretrain.py


# options that change how a run is made, not what it computes
NEVER_DIFFER = {'out_dir', 'micro_batch', 'device', 'compile', 'shard', 'checkpoint_activations', 'save_every',
                'log_every', 'workers', 'eval', 'plan', 'devices', 'bench', 'image', 'templates', 'whole', 'study',
                'branch'}


def parse_config(Config, RECIPES, argv=None):
    """Defaults, then the size's recipe, then flags."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, epilog=(
        "Defaults stand in brackets. What the size's row of RECIPES says goes before them, and a flag before both."))

    def one_line(message):
        raise ValueError(f'{message}; --help lists the options')
    parser.error = one_line
    for field in dataclasses.fields(Config):
        help = field.metadata.get('help', '').replace('%', '%%')
        if field.type is bool:
            parser.add_argument(f'--{field.name}', action=argparse.BooleanOptionalAction, help=help)
        elif field.type is list:
            parser.add_argument(f'--{field.name}', nargs='+', metavar='TEXT', help=help)
        elif field.type is tuple:
            parser.add_argument(f'--{field.name}', type=comma_separated, metavar='A,B',
                                help=f'{help} ({",".join(map(str, field.default))})')
        else:
            help += f' ({field.default})' if field.default != '' else ''
            parser.add_argument(f'--{field.name}', type=field.type, metavar=field.type.__name__.upper(), help=help)
    flags = vars(parser.parse_args(argv))
    size = flags.get('size', Config.size)
    if size not in RECIPES:
        raise ValueError(f'--size {size} is unknown; use one of {", ".join(RECIPES)}')
    if 'epochs' in flags and 'steps' in flags:
        raise ValueError('--epochs and --steps both say how long to train; give one of them')
    cfg = Config(**{**RECIPES[size], **flags})
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(f'--{name} {value} is not a number from 0 up')
        if name in ('steps', 'batch_size', 'save_every', 'log_every', 'devices') and value < 1:
            raise ValueError(f'--{name} {value} is too small; use 1 or more')
        if name == 'betas' and not (len(value) == 2 and all(0 <= beta < 1 for beta in value)):
            raise ValueError(f'--betas {value} are not two numbers from 0 to below 1')
    if cfg.seed > 127:      # each seed of the built-in world owns 2^33 of its 2^40 scenes
        raise ValueError(f'--seed {cfg.seed} is too large; use 0 to 127')
    if cfg.shard not in ('full', 'none'):
        raise ValueError(f'--shard {cfg.shard} is unknown; use full or none')
    if cfg.micro_batch and cfg.batch_size % cfg.micro_batch:
        raise ValueError(f'--batch_size {cfg.batch_size} is not a multiple of --micro_batch {cfg.micro_batch}')
    return cfg


def comma_separated(text):
    return tuple(float(part) for part in text.split(','))


def main(train, Config, RECIPES):
    """Runs a stage. What we refuse is one line and exit code 2; what we did not foresee keeps its traceback."""
    try:
        train(parse_config(Config, RECIPES))
    except (ValueError, OSError) as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        raised_in = os.path.dirname(os.path.abspath(frame.tb_frame.f_code.co_filename))
        if raised_in != os.path.dirname(os.path.abspath(__file__)):
            raise
        if get_rank() == 0:
            print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:       # before or after the loop, which has a handler of its own
        print0('\nstopped; the same command goes on from the last checkpoint, if there is one')
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def setup(cfg):
    """(rank, number of processes, device, mesh), from torchrun's variables; the mesh is None with one process. FSDP2
    divides over a mesh's last dimension and copies over the one before: --shard is only its shape."""
    global patient
    rank, local_rank, local_world, world = (int(os.environ.get(name, default)) for name, default in (
        ('RANK', 0), ('LOCAL_RANK', 0), ('LOCAL_WORLD_SIZE', 1), ('WORLD_SIZE', 1)))
    device = find_device(cfg.device, local_rank, local_world)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')      # TF32 where autocast keeps float32
    if world == 1:
        return rank, world, device, None
    share = cfg.batch_size // world
    if cfg.batch_size % world or share % (cfg.micro_batch or share):
        raise ValueError(f'--batch_size {cfg.batch_size} does not divide over {world} processes'
                         + f' into parts of --micro_batch {cfg.micro_batch}' * bool(cfg.micro_batch)
                         + f'; use a multiple of {world * max(1, cfg.micro_batch)}, or fewer processes')
    if not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        patient = dist.new_group(backend='gloo', timeout=timedelta(days=30))
    shape, names = ((world,), ('shard',)) if cfg.shard == 'full' else ((world, 1), ('copy', 'shard'))
    return rank, world, device, init_device_mesh(device.type, shape, mesh_dim_names=names)


def find_device(name, local_rank, local_world):
    """The torch.device that --device means; each process of a machine has a GPU of its own."""
    gpus = torch.cuda.device_count()
    there = ['cuda'] * (gpus > 0) + ['mps'] * torch.backends.mps.is_available() + ['cpu']
    name = name or there[0]
    if name not in there + [f'cuda:{i}' for i in range(gpus)]:
        raise ValueError(f'--device {name} is not on this machine; use {" or ".join(there)}')
    if local_world > 1 and name not in ('cuda', 'cpu'):
        raise ValueError(f'--device {name} is one device, and there are {local_world} processes; use cuda or cpu')
    if name == 'cuda' and local_world > gpus:
        raise ValueError(f'{local_world} processes on a machine with {gpus} GPUs; use --nproc_per_node={gpus}')
    return torch.device(name, local_rank) if name == 'cuda' else torch.device(name)


patient = None      # the processes' gloo group on CPUs for what may take long: training a teacher, writing a checkpoint


def on_first(function, *args, **options):
    """Calls it on the first process while the others wait, however long; all return or raise what it does."""
    answer = [None, None]
    if get_rank() == 0:
        try:
            answer[0] = function(*args, **options)
        except (ValueError, OSError, RuntimeError, SystemExit) as error:
            answer[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(answer, group=patient)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def total(x):
    """Sum of a tensor over the processes, on its device; with one process a copy."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def largest(number):
    """The largest of the processes' numbers, agreed on by their CPUs: no device has to wait."""
    if not dist.is_initialized():
        return number
    dist.all_reduce(x := torch.tensor(number, dtype=torch.float64), dist.ReduceOp.MAX, patient)
    return x.item()


def gather(x):
    """Every process's [B, ...] as one [processes * B, ...], by rank, with gradients to where each came from."""
    return torch.cat(all_gather(x)) if dist.is_initialized() else x


def all_rows(rows):
    """Every process's list as one, by rank."""
    if not dist.is_initialized():
        return rows
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, rows, group=patient)
    return [row for part in lists for row in part]


def to_device(model, cfg, device, mesh=None):
    """Moves a model to its device. In place, its blocks compute their activations again if asked to, are compiled (on
    cuda, or where asked) and sharded, each a unit that is gathered when needed; what is left is the root's unit."""
    model.to(device)
    # bf16 halves what is gathered, float32 sums gradients; inputs stay as they are: the residual stream is float32
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if device.type == 'cuda' else None,
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if cfg.compile or cfg.compile is None and device.type == 'cuda':
            block.forward = torch.compile(block.forward)
        if cfg.checkpoint_activations and any(weight.requires_grad for weight in block.parameters()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if mesh:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    if mesh:
        warnings.filterwarnings('ignore', message='FSDP2-wrapped module')      # of outputs that none changes in place
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        for name in ('features', 'patch_features', 'encode_image', 'encode_text'):      # gather weights as forward does
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
    return model


@contextlib.contextmanager
def gathered(model):
    """All weights whole on every process meanwhile, so that each runs the model as often as it has something to see."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def clip_gradients(model, largest_norm):
    """Scales the gradients down to a global norm; returns what it was, the same on every process."""
    norm = torch.nn.utils.clip_grad_norm_(list(model.parameters()), largest_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def save_model(model, path, **extra):
    """model.save of a model that may be sharded: gathered on the first process, which writes."""
    if not dist.is_initialized():
        return save(model, path, **extra)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write():
        with torch.device('meta'):
            whole = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith('FSDP'))(**model.config)
        whole.load_state_dict(state, assign=True)
        save(whole, path, **extra)
    on_first(write)


def ahead(batches, device):
    """The same batches. On cuda a thread makes the next two on a stream of its own while the device computes: reading,
    rendering, masks and transfers from pinned memory cost the training no time."""
    return in_thread(batches, torch.cuda.Stream(device)) if device.type == 'cuda' else batches


def in_thread(items, stream=None, depth=2):
    """Yields the same dicts of tensors; a thread makes them, up to `depth` ahead. Its exceptions are raised here."""
    items, end = iter(items), object()

    def make():
        with torch.cuda.stream(stream):
            return next(items, end), stream and stream.record_event()
    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(make) for _ in range(depth)]
        while (got := waiting.pop(0).result())[0] is not end:
            waiting.append(thread.submit(make))
            if stream:
                now = torch.cuda.current_stream()
                now.wait_event(got[1])              # first the transfer, then what is computed from it
                for x in got[0].values():
                    if torch.is_tensor(x) and x.is_cuda:
                        x.record_stream(now)        # not given to the thread's stream again before we are done
            yield got[0]


def send(tensor, device):
    """A CPU's tensor on the device; from pinned memory the transfer does not wait for what the device is doing."""
    return (tensor.pin_memory() if device.type == 'cuda' else tensor).to(device, non_blocking=True)


def run_stage(script, out_dir, *flags):
    """Another stage's command, unless out_dir has its result, as a process of its own without torchrun's variables. It
    gets our signals, saves and leaves, and we after it; whatever else ends it early ends us too, since it said why."""
    if os.path.exists(os.path.join(out_dir, 'result.json')):
        return
    print0(f'first {script}, once ({out_dir}):')
    environment = {name: value for name, value in os.environ.items() if name not in (
        'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
    child = subprocess.Popen([sys.executable, path, '--out_dir', out_dir, *flags], env=environment)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in STOPPING}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def autocast(device):
    """bf16 matrix products on cuda, float32 elsewhere; enter it as often as needed."""
    return torch.autocast('cuda', torch.bfloat16) if device.type == 'cuda' else contextlib.nullcontext()


def param_groups(model, weight_decay, layer_decay=1.):
    """Weights with decay, and norms, biases, positions and tokens without. A loop multiplies lr by lr_scale, which is
    layer_decay once for each layer above (BEiT's rule; EVA fine-tunes so): the last norm and head have 1."""
    groups = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            bare = weight.ndim < 2 or name.split('.')[-1] in ('pos_embed', 'class_token', 'mask_token')
            decay, scale = 0. if bare else weight_decay, layer_decay ** layers_above(name, model)
            group = groups.setdefault((bare, -scale), dict(params=[], weight_decay=decay, lr_scale=scale))
            group['params'].append(weight)
    return [groups[key] for key in sorted(groups)]


def layers_above(name, model):
    """How many layers of its tower come after a weight's: head and norm 0, the last block 1, the input most."""
    tower, found, rest = name.rpartition('blocks.')
    if found:
        return len(model.get_submodule(tower + 'blocks')) - int(rest.split('.')[0])
    tower, _, own = name.rpartition('.')
    first = ('patch_embed', 'class_token', 'mask_token', 'pos_embed', 'pre_norm', 'token_embed')
    part = next((i for i, part in enumerate(name.split('.')) if part in first), None)
    return 0 if part is None else 1 + len(model.get_submodule('.'.join([*name.split('.')[:part], 'blocks'])))


def make_optimizer(model, cfg, layer_decay=1.):
    """Fused AdamW, 2 to 5 times faster than the default on a CPU; cfg has lr, betas, eps and weight_decay."""
    groups = param_groups(model, cfg.weight_decay, layer_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


class Lamb(torch.optim.Optimizer):
    """AdamW, whose step of each matrix is made lr times as long as the matrix (arXiv:1904.00962): batches of 100,000
    ask for large steps, and no layer may outrun the others. What has no weight decay takes AdamW's step as it is, as
    usual: a bias that starts at 0 would stay there. Weights may be sharded; lengths are those of the whole."""

    def __init__(self, groups, lr, betas, eps):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group['betas']
            for weight in [weight for weight in group['params'] if weight.grad is not None]:
                state = self.state[weight]
                if not state:
                    state.update(step=torch.zeros(()), mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
                state['step'] += 1
                state['mean'].lerp_(weight.grad, 1 - beta1)
                state['square'].lerp_(weight.grad.square(), 1 - beta2)
                mean, square = (state[name] / (1 - beta ** state['step'].item())        # both started at 0
                                for name, beta in (('mean', beta1), ('square', beta2)))
                change = mean / (square.sqrt() + group['eps']) + group['weight_decay'] * weight
                if group['weight_decay']:
                    change *= trust_ratio(weight, change)
                weight -= group['lr'] * change


def trust_ratio(weight, change):
    """How many times longer the weight is than its change, a number; 1 where either is zero."""
    weight, change = (norm.full_tensor() if isinstance(norm, DTensor) else norm
                      for norm in (torch.linalg.vector_norm(x) for x in (weight, change)))
    return torch.where((weight > 0) & (change > 0), weight / change, 1.)


class EMA:
    """Slowly following weights: after each step they move 1 - decay of the way to the model's. Clones of the shards, so
    nothing is gathered; save_checkpoint and resume take it along."""

    def __init__(self, model, decay):
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        weights = [weight.detach() for weight in model.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), weights, 1 - self.decay)

    @contextlib.contextmanager
    def in_place_of(self, model):
        """Within it the model has these weights, to evaluate or save them."""
        self.swap(model)
        try:
            yield model
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model):
        for name, weight in model.named_parameters():
            mine = self.weights[name].clone()
            self.weights[name].copy_(weight)
            weight.copy_(mine)


def lr_at(step, cfg):
    """Linear up to lr in warmup_steps, then half a cosine down to min_lr at steps. With a cool-down: constant, and over
    the last `cooldown` steps linear down to min_lr. What comes before it does not depend on steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.cooldown:
        return cfg.min_lr + (cfg.lr - cfg.min_lr) * min(1, (cfg.steps - step) / cfg.cooldown)
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2


@contextlib.contextmanager
def single_process_is_fine():
    """torch.distributed.checkpoint warns that there is one process; without torchrun that is what we want."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed is (disabled, )?unavailable or uninitialized')
        yield


def run_state(model, optimizer, ema=None):
    """What training changes, each process's shards: written as it is, and read into it on any number of processes."""
    state = dict(model=get_model_state_dict(model), optim=get_optimizer_state_dict(model, optimizer))
    return {**state, 'ema': ema.weights} if ema else state


def save_checkpoint(out_dir, step, model, optimizer, cfg, constants={}, ema=None):
    """Everything a run needs to go on after `step` updates, each process its shards, under a temporary name until it is
    whole; the last two stay, and for branches the one where a cool-down begins. `constants` is what the run measured
    once (plain data or tensors)."""
    final = os.path.join(out_dir, 'checkpoint', f'step_{step:07d}')
    beside = final + '.tmp'

    def publish():
        run = dict(step=step, config=dataclasses.asdict(cfg), constants=constants)
        torch.save(run, os.path.join(beside, 'run.pt'))
        remove(final)
        os.rename(beside, final)
        for old in list_checkpoints(out_dir)[:-2]:
            if not (cfg.cooldown and old.endswith(f'step_{cfg.steps - cfg.cooldown:07d}')):
                remove(old)
    try:
        on_first(lambda: (remove(beside), os.makedirs(beside)))
        with single_process_is_fine():
            dcp.save(run_state(model, optimizer, ema), checkpoint_id=beside, process_group=patient)
        on_first(publish)
    except (OSError, RuntimeError, CheckpointException) as error:
        on_first(remove, beside)
        last = latest_checkpoint(out_dir)
        raise ValueError(f'checkpoint {final} cannot be written ({first_line(error)}); '
                         + (f'{last} is intact, run the same command to go on' if last else 'none was written before')
                         ) from None


def remove(folder):
    """Deletes a folder, if there is one; killed half-way, it leaves nothing that looks whole."""
    if not folder.endswith('.tmp') and os.path.exists(folder):
        shutil.rmtree(folder + '.tmp', ignore_errors=True)
        os.rename(folder, folder := folder + '.tmp')
    shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(out_dir):
    folder = os.path.join(out_dir, 'checkpoint')
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names) if re.fullmatch(r'step_\d+', name)]


def latest_checkpoint(out_dir):
    """The newest whole checkpoint's folder, or None."""
    return (list_checkpoints(out_dir) or [None])[-1]


def resume(out_dir, model, optimizer, cfg, ema=None):
    """Loads the latest checkpoint, if any, whatever number of processes wrote it: (updates already made, the run's
    constants). Only from the run's own folder, or that of the run it branches off: its metadata is a pickle, which
    could do anything."""
    path, may_differ, which = on_first(latest_checkpoint, out_dir), NEVER_DIFFER, f'{out_dir} holds an unfinished run'
    if path is None and not cfg.branch:
        return 0, {}
    if path is None:
        path, which = on_first(branch_point, cfg), f'--branch {cfg.branch} is a run'
        may_differ = NEVER_DIFFER | {'steps', 'cooldown'}
    damaged = f'{path} is damaged; delete that folder, and the run goes on from the one before'
    try:
        run = on_first(torch.load, os.path.join(path, 'run.pt'), map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f'{damaged} ({first_line(error)})') from None
    since = {field.name: field.default for field in dataclasses.fields(cfg)}        # options that came later
    now, then = dataclasses.asdict(cfg), since | run['config']
    changed = [f'--{name} {now.get(name)} (was {then.get(name)})' for name in sorted(now.keys() | then.keys())
               if now.get(name) != then.get(name) and name not in may_differ]
    if changed:
        raise ValueError(f'{which} with other options: {", ".join(changed)}; '
                         'repeat its options, or start another with --out_dir NAME')
    state = run_state(model, optimizer, ema)
    try:
        with single_process_is_fine():
            dcp.load(state, checkpoint_id=path, process_group=patient)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        raise ValueError(f'{damaged} ({first_line(error)})') from None
    set_model_state_dict(model, state['model'])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state['optim'])
    print0(f'continuing {out_dir} at step {run["step"]}')
    return run['step'], run['constants']


def branch_point(cfg):
    """The last checkpoint in --branch from before its learning rate fell, and before ours does."""
    ours = cfg.steps - cfg.cooldown
    for path in reversed(list_checkpoints(cfg.branch)):
        run = torch.load(os.path.join(path, 'run.pt'), map_location='cpu', weights_only=True)
        cooldown = run['config'].get('cooldown', 0)
        if cfg.cooldown and cooldown and run['step'] <= min(ours, run['config']['steps'] - cooldown):
            return path
    raise ValueError(f'--branch {cfg.branch} has no checkpoint up to step {ours} at which both learning rates are '
                     'constant; give both runs --cooldown, and that one --save_every of its steps before it')


def finished(cfg):
    """Whether this run is done, which it says in one line. If not, makes sure that its folder can be written."""
    result = os.path.join(cfg.out_dir, 'result.json')
    if os.path.exists(result):
        print0(f'this run is finished: {result} holds its result; use --out_dir NAME for another')
        return True
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.out_dir).close()
    except OSError as error:
        raise ValueError(f'--out_dir {cfg.out_dir} cannot be written ({error.strerror}); use another') from None
    return False


def read_log(out_dir, name='log.jsonl'):
    """A file of JSON lines as a list of dicts; a last line cut short by a kill is left out."""
    path = os.path.join(out_dir, name)
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith('}\n')]


STOPPING = signal.SIGTERM, signal.SIGINT    # of a cluster's scheduler, of Ctrl-C


class Log:
    """A bar with the time left on stderr, and out_dir/log.jsonl. Starting at `start` drops the lines of steps that will
    be done again. `seconds` and `skipped` run on over interruptions. Only the first process writes. While it lasts,
    SIGTERM and Ctrl-C are noted, and obeyed where the loop asks. flops: of an image, for the share of the device's
    speed (MFU): student three times, teacher once, what checkpointing computes again not counted."""

    def __init__(self, cfg, start, device=torch.device('cpu'), flops=0):
        self.cfg, self.step, self.device, self.flops, self.in_a_row = cfg, start, device, flops, 0
        kept = {name: [line for line in read_log(cfg.out_dir, name) if line['step'] < start]
                for name in ('log.jsonl', 'evals.jsonl')}
        last = kept['log.jsonl'][-1] if kept['log.jsonl'] else {}
        self.began, self.skipped = time.time() - last.get('seconds', 0), int(last.get('skipped', 0))
        self.speed = flops and matmul_speed(device) * int(os.environ.get('WORLD_SIZE', 1))
        self.last_write = time.time()
        self.file = None
        if get_rank() == 0:
            for name in kept:
                path = os.path.join(cfg.out_dir, name)
                with open(path + '.tmp', 'w') as file:
                    file.writelines(json.dumps(line) + '\n' for line in kept[name])
                os.replace(path + '.tmp', path)
            self.file = open(os.path.join(cfg.out_dir, 'log.jsonl'), 'a', buffering=1)
        self.bar = tqdm(total=cfg.steps, initial=start, desc=cfg.size, dynamic_ncols=True, disable=get_rank() > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 15)
        self.signal, self.process, self.handlers = 0, os.getpid(), {}
        for number in STOPPING:
            self.handlers[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        """The signals' handler. A second one, a second or more later, ends the process at once."""
        if os.getpid() != self.process:
            return      # a reader of images, forked from here: it ends when we do
        if self.signal and time.time() - self.noted > 1:
            os._exit(128 + number)
        self.signal, self.noted = number, time.time()

    def stopping(self):
        """The signal that any of the processes was sent, or 0; asked after each step: all leave after the same one."""
        self.signal = int(largest(self.signal))
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
        """False for a gradient that must not be applied; ten in a row end the run, its last checkpoint whole."""
        finite = math.isfinite(grad_norm)
        self.in_a_row, self.skipped = (0, self.skipped) if finite else (self.in_a_row + 1, self.skipped + 1)
        if self.in_a_row == 10:
            raise ValueError(f'gradients were not finite ten times in a row, near step {self.step}; lower --lr. '
                             f'The last checkpoint is {latest_checkpoint(self.cfg.out_dir)}')
        return finite

    def write(self, step, **values):
        """A line of log.jsonl; values are numbers. The bar shows them, and step + 1 of its steps done."""
        now = time.time()
        values['images_per_second'] = (step + 1 - self.step) * self.cfg.batch_size / (now - self.last_write)
        if self.flops:
            values['mfu'] = values['images_per_second'] * self.flops / self.speed
        values |= dict(skipped=self.skipped, memory_gb=peak_memory(self.device) / 1e9, seconds=now - self.began)
        self.step, self.last_write = step + 1, now
        values = {name: float(f'{float(value):.6g}') for name, value in values.items()}
        if self.file:
            self.file.write(json.dumps(dict(step=step, **values)) + '\n')
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", img_s=f"{values['images_per_second']:.0f}", refresh=False)
        self.bar.update(step + 1 - self.bar.n)

    def say(self, step, **metrics):
        """Metrics measured during the run: a line above the bar and in evals.jsonl."""
        if self.file:
            with open(os.path.join(self.cfg.out_dir, 'evals.jsonl'), 'a') as file:
                file.write(json.dumps(dict(step=step, **metrics)) + '\n')
            self.bar.write(f'step {step + 1}: ' + ', '.join(f'{name} {value:.3f}' for name, value in metrics.items()))
        self.last_write = time.time()

    def finish(self, model, ylabel, lines, **metrics):
        """loss.png, with lines {name: loss} to compare with, and result.json, which says that a run is done."""
        self.close()
        if self.file:
            curve = [(line['step'], line['loss']) for line in read_log(self.cfg.out_dir)]
            draw_curves(os.path.join(self.cfg.out_dir, 'loss.png'), {'loss': curve}, lines, ylabel=ylabel)
            result = dict(metrics, skipped=self.skipped, seconds=round(time.time() - self.began, 1),
                          parameters=count_parameters(model), command=command_line())
            path = os.path.join(self.cfg.out_dir, 'result.json')
            with open(path + '.tmp', 'w') as file:
                json.dump(result, file, indent=2)
            os.replace(path + '.tmp', path)
            print0(table(result), f'\n{self.cfg.out_dir}/: {", ".join(sorted(os.listdir(self.cfg.out_dir)))}')


def report_broken(*datasets):
    """What could not be read, by whichever process."""
    for dataset in datasets:
        dataset.broken.update(all_rows([*dataset.broken]))
        if dataset.broken:
            print0(data.report_broken(dataset))


def table(values):
    """A dict as aligned lines."""
    forms = {float: '.4g', int: ','}
    return '\n'.join(f'{name:<20} {format(value, forms.get(type(value), ""))}' for name, value in values.items())


def command_line():
    """The command as typed, without this machine's absolute paths."""
    return shlex.join(['python', *(re.sub(r'^(--\w+=)?/.*/', r'\1', word) for word in sys.argv)])


COLOURS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'      # Okabe and Ito's


def draw_curves(path, curves, lines={}, xlabel='step', ylabel='', log='', points={}, size=(960, 600)):
    """A picture of {name: [(x, y), ...]}, with dashed horizontal lines {name: y} and points {name: [(x, low, y, high),
    ...]} with their intervals; one name has one colour. log: the axes that are logarithmic, 'x', 'y' or 'xy'."""
    (W, H), left, right, top, bottom = size, 90, 30, 50, 70
    font, picture = ImageFont.load_default(18), Image.new('RGB', (W, H), 'white')
    draw = ImageDraw.Draw(picture)
    seen = [(x, y) for curve in curves.values() for x, y in curve if math.isfinite(y)]
    seen += [(x, y) for group in points.values() for x, *interval in group for y in interval]
    scale = {axis: math.log10 if axis in log else float for axis in 'xy'}
    xs = [scale['x'](x) for x, _ in seen] or [0, 1]
    ys = [scale['y'](y) for y in [y for _, y in seen] + list(lines.values())] or [0, 1]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, margin = (x1 if x1 > x0 else x0 + 1), 0.05 * (y1 - y0) or 0.5
    x0, x1 = (x0 - .03 * (x1 - x0), x1 + .03 * (x1 - x0)) if points else (x0, x1)
    y0, y1 = y0 - margin, y1 + margin

    def place(x, y):
        x, y = (scale['x'](x) - x0) / (x1 - x0), (scale['y'](y) - y0) / (y1 - y0)
        return left + x * (W - left - right), H - bottom - y * (H - top - bottom)
    some_x, some_y = (10 ** low if axis in log else low for axis, low in (('x', x0), ('y', y0)))
    for y in (log_ticks if 'y' in log else ticks)(y0, y1):
        height = place(some_x, y)[1]
        draw.line((left, height, W - right, height), fill='#dddddd')
        draw.text((left - 8, height), short(y), fill='black', font=font, anchor='rm')
    for x in (log_ticks if 'x' in log else ticks)(x0, x1):
        across = place(x, some_y)[0]
        draw.line((across, H - bottom, across, H - bottom + 6), fill='black')
        draw.text((across, H - bottom + 10), short(x), fill='black', font=font, anchor='mt')
    draw.rectangle((left, top, W - right, H - bottom), outline='black')
    draw.text(((left + W - right) / 2, H - 22), xlabel, fill='black', font=font, anchor='mm')
    draw.text((8, top / 2), ylabel, fill='black', font=font, anchor='lm')
    def dash(start, end, y, colour):
        for x in range(start, end, 14):
            draw.line((x, y, min(x + 8, end), y), fill=colour, width=2)
    names = list(dict.fromkeys([*curves, *lines, *points]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for name, colour in colours.items():
        if name in curves:
            draw.line([place(x, y) for x, y in curves[name] if math.isfinite(y)], fill=colour, width=3)
        if name in lines:
            dash(left, W - right, place(some_x, lines[name])[1], colour)
        for x, *interval in points.get(name, ()):
            across, (low, y, high) = place(x, interval[1])[0], (place(x, y)[1] for y in interval)
            draw.line((across, low, across, high), fill=colour, width=2)
            draw.circle((across, y), 5, fill=colour)
    wide, tall = 76 + round(max(map(font.getlength, names), default=0)), 24 * len(names) + 6
    places = [(x, y) for x in (W - right - wide - 4, left + 4) for y in range(top + 4, H - bottom - tall - 4, 12)]
    places = places or [(left, top)]
    ink = lambda x, y: sum(picture.crop((x, y, x + wide, y + tall)).convert('L').histogram()[:200])     # 221: the grid
    x, y = min(places, key=lambda corner: ink(*corner))                     # the key goes where least is drawn
    draw.rectangle((x, y, x + wide, y + tall), outline='#aaaaaa')
    for key, (name, colour) in enumerate(colours.items()):
        end, height = x + wide - 8, y + 15 + 24 * key
        draw.text((end - 46, height), name, fill='black', font=font, anchor='rm')
        if name in curves:
            draw.line((end - 36, height, end, height), fill=colour, width=3)
        if name in lines:
            dash(end - 36, end, height, colour)
        if name in points:
            draw.circle((end - 18, height), 5, fill=colour)
    if path:
        picture.save(path)
    return picture


def draw_matrix(path, shares, names, cell=24, left=150):
    """A picture of a square matrix [n, n] of numbers from 0 to 1, with a name for each row; darker is more, blue the
    diagonal."""
    sheet = Image.new('RGB', (left + cell * len(names), cell * len(names)), 'white')
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (name, row) in enumerate(zip(names, shares.tolist())):
        draw.text((left - 6, cell * i + cell // 2), name[:18], fill='black', font=font, anchor='rm')
        for j, share in enumerate(row):
            x, y, shade = left + cell * j, cell * i, round(255 * (1 - share) ** 2)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=(shade, shade, 255 if i == j else shade))
    on_first(sheet.save, path)


def draw_sheet(path, columns, tile=128):
    """A picture of titled columns of images, {title: [n, 3, H, W] with values 0 to 255}, each drawn `tile` wide."""
    step, font = tile + 6, ImageFont.load_default(14)
    sheet = Image.new('RGB', (len(columns) * step + 6, len(next(iter(columns.values()))) * step + 30), 'white')
    for x, (title, column) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((6 + x * step, 6), title, fill='black', font=font)
        for y, picture in enumerate(column.clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()):
            resample = Image.BICUBIC if picture.shape[0] > tile else Image.NEAREST
            sheet.paste(Image.fromarray(picture).resize((tile, tile), resample), (6 + x * step, 28 + y * step))
    on_first(sheet.save, path)


def ticks(low, high):
    """Five or so round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low, high):
    """Round numbers from 10^low to 10^high: powers of ten, with 2 and 5 between them where there is room."""
    factors = (1,) if high - low > 3 else (1, 2, 5) if high - low > .7 else range(1, 10) if high - low > .3 else None
    if factors is None:
        return ticks(10 ** low, 10 ** high)
    found = [factor * 10. ** power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    return [x for x in found if low <= math.log10(x) <= high]


def short(x):
    """A tick's number: 0.25, 800, 20k, 1.6M."""
    units = (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'), (1, '')
    unit, name = next((pair for pair in units if abs(x) >= pair[0]), units[-1])
    return f'{float(f"{x / unit:.6g}"):g}{name}'


def count_parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def transformer_flops(width, depth, mlp_width, tokens):
    """Of one sequence through the blocks, forward, a multiply-add as two."""
    linear = 2 * tokens * (4 * width ** 2 + 2 * width * mlp_width)      # qkv, proj, fc1, fc2
    return depth * (linear + 4 * tokens ** 2 * width)                   # and scores, and the sum of values


def flops_per_image(config):
    """Of a ViT's forward pass at its image_size, a multiply-add as two."""
    N, D = config.get('frames', 1) * (config['image_size'] // config['patch_size']) ** 2, config['width']
    head = 2 * (1 if config.get('pool') else N) * D * config.get('head', 0)
    patches = 2 * N * D * 3 * config['patch_size'] ** 2
    return patches + transformer_flops(D, config['depth'], config['mlp_width'], 1 + N) + head


def training_flops(config, teacher=None):
    """Of an image: the student's forward pass, its backward as two, and the forward pass of a teacher, if any."""
    return 3 * flops_per_image(config) + (flops_per_image(teacher) if teacher else 0)


@functools.cache
def matmul_speed(device):
    """FLOP/s of a large matrix product: 8192^3 in bf16 on cuda, 768^3 in float32 elsewhere; the best of ten, in a tenth
    of a second."""
    n, dtype = (8192, torch.bfloat16) if device.type == 'cuda' else (768, torch.float32)
    x = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(seconds(lambda: x @ x, device) for _ in range(10))


def seconds(function, device):
    """How long it takes, until the device is done."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device):
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def peak_memory(device):
    """The most bytes this process has held: on its GPU, else in all."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def activation_bytes(config, element=4, checkpointed=False):
    """What a ViT keeps of one image for the backward pass; a matrix product's input has `element` bytes (bf16: 2)."""
    tokens = 1 + config.get('frames', 1) * (config['image_size'] // config['patch_size']) ** 2
    D, mlp_width = config['width'], config['mlp_width']
    # float32: the inputs of two norms; else: their outputs, q, k, v, attention's output, before and after GELU
    block = tokens * (2 * D * 4 + element * (6 * D + 2 * mlp_width))
    return config['depth'] * tokens * D * 4 + block if checkpointed else config['depth'] * block


def training_memory(config, batch_size, device, shards=1, checkpointed=False):
    """Bytes that training a ViT with AdamW takes on each of `shards` devices, batch_size images at once: {what: bytes}.
    Sharded, two blocks are whole at a time."""
    with torch.device('meta'):
        parameters = count_parameters(ViT(**config))
    element = 2 if device.type == 'cuda' else 4         # bf16 under autocast
    gathered = 2 * element * parameters / config['depth'] if shards > 1 else 0
    return dict(weights=4 * parameters / shards + gathered, gradients=4 * parameters / shards + gathered,
                AdamW=8 * parameters / shards,
                activations=batch_size * activation_bytes(config, element, checkpointed))


def in_assets(name):
    """The functions of a script in assets/, which no training needs."""
    return runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'assets', name))


def costs(what, *args):
    """--plan and --bench."""
    return in_assets('costs.py')[what](*args)


def study(cfg):
    """--study: a grid of runs, its fits and its pictures."""
    scaling = in_assets('scaling.py')
    if cfg.study not in scaling['STUDIES']:
        raise ValueError(f'--study {cfg.study} is unknown; use one of {", ".join(scaling["STUDIES"])}')
    scaling['study'](cfg.study, cfg.out_dir or 'out/study', cfg.device)


def available_memory(device):
    """Free bytes of a device; infinite where the system does not say."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists('/proc/meminfo'):
        return math.inf
    with open('/proc/meminfo') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith('MemAvailable'))


def check_memory(cfg, config, device, world=1):
    """Refuses before any work a training that would not fit; the processes agree on the least memory that is free."""
    batch_size = cfg.micro_batch or cfg.batch_size // world
    needed = sum(training_memory(config, batch_size, device, world if cfg.shard == 'full' else 1,
                                 cfg.checkpoint_activations).values())
    there = -largest(-available_memory(device))
    if needed > there:
        raise ValueError(f'training needs {needed / 1e9:.1f} GB with {batch_size} images at once, {there / 1e9:.1f} GB '
                         f'are free on {device.type}; use a smaller --micro_batch, --checkpoint_activations, more '
                         'processes or a smaller --size')


def settle_steps(cfg, dataset):
    """Turns --epochs into steps, and keeps the warm-up within a quarter of a short run."""
    if cfg.epochs and len(dataset) >= 2 ** 40:
        raise ValueError('--epochs needs data that ends, a folder or shapes:unique=N; use --steps')
    if cfg.epochs:
        cfg.steps = max(1, round(cfg.epochs * len(dataset) / cfg.batch_size))
    cfg.warmup_steps = min(cfg.warmup_steps, cfg.steps // 4)
    if cfg.cooldown > cfg.steps - cfg.warmup_steps:
        raise ValueError(f'--cooldown {cfg.cooldown} is longer than the {cfg.steps - cfg.warmup_steps} steps after the '
                         'warm-up')


def size_config(cfg, **options):
    """The ViT's options of a run: its size's row with the image and patch size asked for."""
    asked = {name: getattr(cfg, name) for name in ('image_size', 'patch_size') if getattr(cfg, name)}
    return {**SIZES[cfg.size], **asked, **options}


NUM_PROBE = 2048        # training images that fit the probes, and validation images that judge them


def pooled_features(model):
    """What the probes see of a model: images uint8 [B, 3, H, W] -> the mean of its final patch tokens [B, D]. EVA's
    class token has no loss in pre-training, so it says nothing."""
    return lambda images: model.features(model.normalize(images))[:, 1:].mean(1)


@torch.no_grad()
def probe(encode, train_set, val_set, image_size, num, cfg, device):
    """Top-1 of frozen features on the data's labels, by k-NN and by a closed-form linear map; {} without labels.
    The world has two: the largest object's kind, which captions name, and its part pattern, which they never do
    (`unnamed`). encode: images uint8 [B, 3, H, W] -> [B, D]."""
    features, labels = [], []
    for dataset in (train_set, val_set):
        x, y = [], []
        for batch in data.eval_batches(dataset, 64, image_size, num, device, cfg.workers):
            if 'labels' not in batch:
                return {}
            y.append({name: batch[key] for name, key in (('top1', 'labels'), ('unnamed', 'unnamed')) if key in batch})
            x.append(encode(batch['images']).float())
        features.append(torch.cat(x))
        labels.append({name: torch.cat([rows[name] for rows in y]).to(device) for name in y[0]})
    return {f'{how}_{name}': measure(features[0], labels[0][name], features[1], labels[1][name])
            for name in labels[0] for how, measure in (('knn', knn_accuracy), ('linear', linear_probe))}
