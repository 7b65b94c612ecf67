"""A stage's command with the types that GPUs meet: weights in bf16 while they are gathered, autocast to bf16, and a
LayerNorm that takes no two types, as CUDA's. Evaluations are short. It is run again from its last checkpoint; what
the first run measured is then in first.json.

    torchrun --nproc_per_node 2 tests/as_on_gpus.py mim_pretrain.py --device cpu ...
"""
import importlib
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import run      # noqa: E402

layer_norm = F.layer_norm
policy = run.MixedPrecisionPolicy


def strict_layer_norm(x, shape, weight, bias, eps):
    if torch.is_autocast_enabled('cpu'):
        return layer_norm(x.float(), shape, weight.float(), bias.float(), eps)
    if x.dtype != weight.dtype:
        raise TypeError(f'LayerNorm of {x.dtype} with weights of {weight.dtype}')
    return layer_norm(x, shape, weight, bias, eps)


def bf16_policy(param_dtype, **options):
    return policy(param_dtype=torch.bfloat16, **options)


F.layer_norm = strict_layer_norm
run.MixedPrecisionPolicy = bf16_policy
run.autocast = lambda device: torch.autocast('cpu', torch.bfloat16)

stage = importlib.import_module(sys.argv[1].removesuffix('.py'))
sys.argv = sys.argv[1:]
for name, few in dict(NUM_EVAL=16, NUM_PAIRS=16, NUM_RETRIEVAL=16, NUM_PROBE=16, BANK=1024).items():
    for module in (run, stage):
        if hasattr(module, name):
            setattr(module, name, few)


def train_twice(cfg):
    stage.train(cfg)
    if run.get_rank() == 0:         # without a result it is not finished
        os.rename(f'{cfg.out_dir}/result.json', f'{cfg.out_dir}/first.json')
    stage.train(run.parse_config(stage.Config, stage.RECIPES, sys.argv[1:]))


run.main(train_twice, stage.Config, stage.RECIPES)
