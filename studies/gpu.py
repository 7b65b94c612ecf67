"""
What this project does on a GPU, in one command that loses nothing wherever it is cut off.

    python studies/gpu.py --minutes 12              # the same command again does what is missing or failed
    python studies/gpu.py --device cpu --size nano  # tries the program itself, in small

Every item is a process of its own with its share of the minutes. Rows go to out/gpu/gpu.json and gpu.md as they come.
"""
import argparse
import contextlib
import importlib.util
import json
import operator
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'studies')]
import grid                         # noqa: E402
import mim_pretrain                 # noqa: E402
import model as M                   # noqa: E402
import plan                         # noqa: E402
import run                          # noqa: E402
import speed                        # noqa: E402

TEACHER = ['--teacher', str(ROOT / 'assets' / 'nano-teacher.pt')]
SMALL = ['--size', 'pico', '--steps', '2', '--batch_size', '4', '--save_every', '1', '--log_every', '1', '--no-compile']
MOST = 512              # images at once: more take long, and are no faster
MIM_APART = .005        # losses in bf16 may be from those in float32, in 60 steps: ten times what they are on a CPU
CLIP_APART = .02        # the same; on a CPU .0044


# ---- the machine ------------------------------------------------------------------------------------------------

def machine(args):
    """Versions, and what the card can do at most."""
    driver = ''
    if shutil.which('nvidia-smi'):
        words = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        driver = subprocess.run(words, capture_output=True, text=True).stdout.strip()

    yield dict(what='torch', value=torch.__version__)
    yield dict(what='CUDA, driver', value=f'{torch.version.cuda}, {driver}')
    yield dict(what='free memory, GB', value=run.free_memory(args.device) / 1e9)
    yield dict(what='C compiler', value=shutil.which('gcc') or shutil.which('cc') or 'none: no --compile')
    yield dict(what='large product, TFLOP/s', value=plan.matmul_speed(args.device) / 1e12)


def attention(args):
    """Which kernels serve L's heads of 64 and g's of 88 in bf16, forward and backward, and which one torch chooses."""
    num = 1 if args.small else 32
    for head_dim in (64, 88):
        shape = 3, num, 16, 257, head_dim                               # q, k, v [B, heads, 1+N, head_dim]
        qkv = torch.randn(shape, device=args.device, dtype=torch.bfloat16, requires_grad=True)
        chosen = SDPBackend(torch._fused_sdp_choice(*qkv))

        def attend():
            torch.nn.functional.scaled_dot_product_attention(*qkv).sum().backward()

        # each kernel alone
        for name in ('FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH'):
            kernel = getattr(SDPBackend, name)
            row = dict(head_dim=head_dim, kernel=name, chosen='yes' if kernel == chosen else '')
            try:
                with sdpa_kernel(kernel):
                    attend()
                    seconds = [plan.seconds_of(attend, args.device) for _ in range(5)]
                row['milliseconds'] = 1e3 * statistics.median(seconds)
            except RuntimeError as error:
                row['error'] = M.first_line(error)
            yield row


# ---- commands of the stages -------------------------------------------------------------------------------------

def start(args, script, flags, device='', launcher=()):
    """A stage's command -> its process and its out_dir; what it says goes to a .log beside that."""
    runs = args.out_dir / 'runs'
    device = device or args.device.type
    flags = [*flags, '--device', device]
    if args.small:
        flags += SMALL
    one = grid.make_run(runs, script, flags, dict(name=f'{args.item}-{device}'.replace(' ', '-')))
    one['words'] = [*launcher, *one['words']]

    at_once = max(1, os.cpu_count() // 4)       # more than four cores for a small model wait for each other
    return grid.start(one, runs, at_once), runs / one['name']


def wait(process, out_dir):
    """The lines of its log.jsonl, or the first error of what it said."""
    code = process.wait()
    if code:
        said = Path(f'{out_dir}.log').read_text(errors='replace').strip()
        errors = re.findall(r'^(?:\[rank\d+\]: )?[\w.]*(?:error|Error|Exception)\b.*:.*', said, re.M)
        raise RuntimeError(errors[0].strip() if errors else f'exit code {code}: {said[-200:]}')
    return run.read_log(out_dir)


def clear(args):
    """Deletes what runs left but what they said: models are large."""
    for path in (args.out_dir / 'runs').iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def typical(log):
    """Images/s once it runs: compiling falls into the first steps."""
    return statistics.median(line['images_per_second'] for line in log[len(log) // 2:])


def differences(ours, theirs):
    """Of the losses of two logs, step by step."""
    return [abs(a['loss'] - b['loss']) for a, b in zip(ours, theirs)]


def beside_cpu(args, tolerance, script, *flags):
    """The first losses of a nano here and, at the same time, on this machine's CPU; same seed."""
    flags = [*flags, '--steps', '60', '--log_every', '1']
    here = start(args, script, flags)
    there = start(args, script, flags, 'cpu') if not args.small else here
    ours = wait(*here)
    theirs = wait(*there)

    apart = differences(ours, theirs)
    yield {
        'steps': len(apart), 'first loss': ours[0]['loss'], 'last loss': ours[-1]['loss'],
        'last loss on the CPU': theirs[-1]['loss'], 'largest difference': max(apart),
        'mean difference': statistics.mean(apart), 'tolerance': tolerance,
        'within': 'yes' if max(apart) <= tolerance else 'NO', 'images/s': typical(ours)}


def torchrun(args):
    """One process under torchrun with what large runs use, and its second half again from the checkpoint."""
    flags = [*TEACHER, '--steps', '20', '--save_every', '10', '--log_every', '1', '--micro_batch', '4',
             '--checkpoint_activations', '--compile']
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '1']
    process, out_dir = start(args, 'mim_pretrain.py', flags, launcher=launcher)
    first = wait(process, out_dir)

    # without its result it is not finished: it goes on from the last checkpoint
    (out_dir / 'result.json').unlink()
    process, out_dir = start(args, 'mim_pretrain.py', flags, launcher=launcher)
    again = wait(process, out_dir)
    resumed = re.search(r'continuing .* at step (\d+)', Path(f'{out_dir}.log').read_text())

    yield {
        'steps': len(again), 'resumed at': int(resumed[1]) if resumed else 'NOT RESUMED',
        'largest difference': max(differences(first, again)), 'images/s': typical(first),
        'memory, GB': first[-1]['memory_gb']}


def rehearsal(args):
    """What a cluster is asked for, on one GPU: torchrun, all options by the recipe, a save on the way."""
    flags = ['--size', args.size, '--steps', '4', '--batch_size', '256', '--save_every', '2', '--log_every', '1']
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '1']
    process, out_dir = start(args, 'mim_pretrain.py', flags, launcher=launcher)
    log = wait(process, out_dir)
    said = Path(f'{out_dir}.log').read_text()
    planned = re.search(r'^memory by plan.*', said, re.M)
    yield {
        'steps': len(log), 'first loss': log[0]['loss'], 'last loss': log[-1]['loss'], 'images/s': typical(log),
        'memory, GB': log[-1]['memory_gb'], 'said': planned[0] if planned else ''}


def stage(args, script, *flags):
    """Twenty steps of a stage."""
    flags = [*flags, '--size', 's', '--steps', '20', '--log_every', '4']
    log = wait(*start(args, script, flags))
    yield {
        'command': ' '.join([script, *flags]), 'images/s': typical(log), 'first loss': log[0]['loss'],
        'last loss': log[-1]['loss'], 'memory, GB': log[-1]['memory_gb']}


# ---- steps of the large model -----------------------------------------------------------------------------------

def make_step(args, compiled, checkpointed, Student=M.ViT):
    """The recipe's step on random weights, and the images at once for which the plan sees room."""
    flags = ['--size', args.size, '--device', args.device.type]
    flags.append('--compile' if compiled and not args.small else '--no-compile')
    flags.append('--checkpoint_activations' if checkpointed else '--no-checkpoint_activations')
    cfg = run.parse_config(mim_pretrain.Config, mim_pretrain.RECIPES, flags)
    run.setup(cfg)

    config = run.vit_config(cfg, drop_path=cfg.drop_path)
    teacher = plan.default_teacher(cfg.size, config.image_size // config.patch_size)
    config.head = teacher.head

    num = 8
    if not args.small:
        memory = run.Memory(plan.on_meta(config), args.device, teacher=plan.on_meta(teacher))
        room = plan.images_that_fit(run.free_memory(args.device), memory, checkpointed)
        num = max(8, min(MOST, room // 8 * 8))
    return speed.Step(cfg, config, teacher, 1, args.device, Student), num


def train(args, compiled, checkpointed):
    """Our steps; the share is of a large product measured at the same time."""
    if compiled and args.small:
        yield dict(note='compiled on a GPU only')
        return
    product = plan.matmul_speed(args.device)
    step, num = make_step(args, compiled, checkpointed)
    for row in speed.time_sizes(step, num, larger=num < MOST):
        if 'images/s' in row:
            reached = row['images/s'] * run.training_flops(step.vit.config, step.target.teacher.config)
            row |= {'TFLOP/s': reached / 1e12, 'share of the product': reached / product}
            row['memory by plan, GB'] = planned_memory(step, row['images at once'], checkpointed) / 1e9
        yield row


def planned_memory(step, num, checkpointed):
    """Without what a step does without: batches ahead, drawing."""
    teacher = plan.on_meta(step.target.teacher.config)
    memory = run.Memory(plan.on_meta(step.vit.config), step.device, teacher=teacher)
    return memory.total(num, checkpointed) - memory.parts(num)['reserve']


def ran_before(args, num):
    """As many images as our first compiled steps had; num if there were none."""
    rows = read(args).get('g, compiled', {}).get('rows', [])
    return next((row['images at once'] for row in rows if 'images/s' in row), num)


class Peer(torch.nn.Module):
    """timm's EVA-g in the place of ours. It has no mask, and drops no paths: its blocks, which would each have
    another rate, would be compiled forty times."""
    normalize = M.ViT.normalize

    def __init__(self, config):
        super().__init__()
        import timm
        self.config = config
        self.image_size = config.image_size
        self.grid = config.image_size // config.patch_size
        self.body = timm.create_model('eva_giant_patch14_224', num_classes=0)
        self.blocks = self.body.blocks
        self.head = torch.nn.Linear(config.width, config.head)

    def forward(self, images, mask, drop):
        return self.head(self.body.forward_features(images)[:, 1:])     # [B, N, head]


def train_peer(args):
    """timm's model in the same compiled step: our teacher, loss, fused AdamW, autocast, number of images."""
    if args.size != 'g' or importlib.util.find_spec('timm') is None:
        yield dict(note='timm is not installed' if args.size == 'g' else 'timm has only g')
        return

    # our way compiles our blocks only
    step, num = make_step(args, True, False, Peer)
    if step.cfg.compile:
        for block in step.vit.blocks:
            block.forward = torch.compile(block.forward)
    yield from speed.time_sizes(step, ran_before(args, num), larger=False)


def profile(args):
    """The twenty kernels that take most of a step."""
    step, num = make_step(args, True, False)
    step.take(ran_before(args, num))
    for _ in range(3):
        step.whole()

    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU if args.small else activity.CUDA]
    microseconds = operator.attrgetter('self_cpu_time_total' if args.small else 'self_device_time_total')
    with torch.profiler.profile(activities=kinds) as found:
        plan.seconds_of(step.whole, args.device)

    kernels = sorted(found.key_averages(), key=microseconds, reverse=True)
    total = sum(map(microseconds, kernels))
    for kernel in kernels[:20]:
        yield {
            'kernel': kernel.key[:100], 'calls': kernel.count, 'milliseconds': microseconds(kernel) / 1e3,
            'share': microseconds(kernel) / total}


# ---- the items, their minutes, and what is kept of them ---------------------------------------------------------

ITEMS = {  # name: (share of the minutes, what runs, its arguments)
    'machine':                   (.03, machine),
    'attention':                 (.03, attention),
    'nano teacher':              (.06, beside_cpu, CLIP_APART, 'clip_train.py'),
    'nano EVA':                  (.07, beside_cpu, MIM_APART, 'mim_pretrain.py', *TEACHER),
    'torchrun':                  (.10, torchrun),
    'g, compiled':               (.10, train, True, False),
    'g':                         (.05, train, False, False),
    'g, compiled, checkpointed': (.09, train, True, True),
    'g, checkpointed':           (.05, train, False, True),
    'timm':                      (.06, train_peer),
    'kernels':                   (.05, profile),
    'windows':                   (.07, stage, 'detect_seg.py', '--window', '8', '--batch_size', '4'),
    'mask2former':               (.07, stage, 'detect_seg.py', '--head', 'mask2former', '--batch_size', '4'),
    'clip':                      (.04, stage, 'clip_train.py'),
    'finetune':                  (.04, stage, 'finetune.py', '--init', 'scratch'),
    'rehearsal':                 (.09, rehearsal),
}


def read(args):
    """{item: dict(card, rows, error, seconds)}; what has no error is done."""
    path = args.out_dir / 'gpu.json'
    return json.loads(path.read_text()) if path.exists() else {}


def write(args, name, record):
    records = read(args) | {name: record}
    run.replace(str(args.out_dir / 'gpu.json'), json.dumps(records, indent=1))
    with open(args.out_dir / 'gpu.md', 'w') as file, contextlib.redirect_stdout(file):
        for name in [name for name in ITEMS if name in records]:
            say(name, **records[name])


def say(name, rows, error, seconds=0, card=''):
    """An item as a table."""
    print(f'\n{name} ({card}, {seconds:.0f} s) {error}', flush=True)
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[short(row.get(key, '')) for key in head] for row in rows]
    if head:
        grid.print_table(head, cells)


def short(value):
    return f'{value:.4g}' if isinstance(value, float) else value


def run_item(args):
    """One item, in this process; its record is written after each row."""
    _, function, *options = ITEMS[args.item]
    card = torch.cuda.get_device_name(args.device) if args.device.type == 'cuda' else 'CPU'
    record = dict(card=card, error='cut off', rows=[])
    began = time.time()
    clear(args)

    try:
        for row in function(args, *options):
            record['rows'].append(row)
            write(args, args.item, record)
        record['error'] = ''
    except Exception as error:          # whatever it is, it is a result
        record['error'] = f'{type(error).__name__}: {M.first_line(error)}'

    clear(args)
    record['seconds'] = time.time() - began
    write(args, args.item, record)
    say(args.item, **record)


def run_within(words, seconds):
    """Runs a command for so long at most -> its exit code, or that there was no time."""
    process = subprocess.Popen(words, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 'out of time'
    finally:
        # whatever it started ends too; torchrun needs a moment to end its own processes
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            for _ in range(50):
                time.sleep(.1)
                process.poll()
                os.killpg(process.pid, 0)       # raises once nobody is left
            os.killpg(process.pid, signal.SIGKILL)


def run_all(args):
    deadline = time.time() + 60 * args.minutes
    signal.signal(signal.SIGTERM, grid.leave)
    for name, (share, *_) in ITEMS.items():
        record = read(args).get(name, dict(rows=[], error='not run: out of time'))
        planned = 60 * args.minutes * share
        left = deadline - time.time()

        if not record['error']:
            print(f'{name}: done before', flush=True)
        elif left < planned / 2:
            write(args, name, record)
            say(name, **record)
        else:
            # twice its share where others left some
            words = [sys.executable, __file__, '--item', name, '--size', args.size]
            words += ['--device', args.device.type, '--out_dir', str(args.out_dir)]
            code = run_within(words, min(2 * planned, left))
            if code:
                record = read(args).get(name, record)
                record['error'] = f'ended: {code}'
                write(args, name, record)
                say(name, **record)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = grid.refuse
    parser.add_argument('--minutes', type=float, default=12, help='for all of it (12)')
    parser.add_argument('--device', default='', help='cuda or cpu; a GPU if there is one')
    parser.add_argument('--size', choices=mim_pretrain.RECIPES, help='of the model that is timed; g, nano on a CPU')
    parser.add_argument('--out_dir', type=Path, default=ROOT / 'out' / 'gpu', help='where results go (out/gpu)')
    parser.add_argument('--item', choices=ITEMS, help='only this, without a limit')
    args = parser.parse_args(argv)

    try:
        args.device = run.find_device(args.device, 0, 1)
    except run.Refused as error:
        grid.refuse(error)

    args.small = args.device.type != 'cuda'
    args.size = args.size or ('nano' if args.small else 'g')
    args.out_dir = args.out_dir.resolve()
    (args.out_dir / 'runs').mkdir(parents=True, exist_ok=True)
    return run_item(args) if args.item else run_all(args)


if __name__ == '__main__':
    main()
