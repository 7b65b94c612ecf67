"""What a GPU would refuse, seen on a CPU: tensors of two types, where weights are bf16 or a model runs outside of autocast."""
import json
import os
import subprocess
import sys

import pytest

TESTS = os.path.dirname(os.path.abspath(__file__))


@pytest.mark.parametrize('processes, command', [
    (2, 'mim_pretrain.py --teacher assets/nano-teacher.pt --checkpoint_activations --micro_batch 4'),
    pytest.param(1, 'clip_train.py', marks=pytest.mark.long),
    pytest.param(1, 'finetune.py --init assets/nano-eva.pt --ema .9', marks=pytest.mark.long),
    pytest.param(1, 'detect_seg.py --image_size 64', marks=pytest.mark.long),
    pytest.param(1, 'detect_seg.py --head mask2former --image_size 64', marks=pytest.mark.long)])
def test_a_run_in_bf16_saves_evaluates_and_goes_on(tmp_path, processes, command):
    """Under torchrun, from its checkpoint after step 1: nothing calls a model outside of autocast."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    flags = f'--size pico --device cpu --batch_size 8 --steps 2 --save_every 1 --log_every 1 --out_dir {tmp_path}'
    words = [*torchrun, os.path.join(TESTS, 'as_on_gpus.py'), *command.split(), *flags.split()]
    done = subprocess.run(words, cwd=os.path.dirname(TESTS), text=True, capture_output=True, check=False,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'at step 1' in done.stdout
    for name in ('first.json', 'result.json'):
        assert json.loads((tmp_path / name).read_text())['skipped'] == 0
