"""EVA-CLIP's training on several processes does what one does."""
import pytest
import torch

import clip_train
import run
from conftest import computing_in_double
from test_distributed import finish, launch, losses, small


def work(folder, world):
    """Three steps with all that EVA-CLIP-g+ adds to CLIP: LAMB, dropped tokens and paths, rates by layer and tower."""
    flags = ['--size', 'pico', '--device', 'cpu', '--batch_size', '8', '--steps', '3', '--warmup_steps', '1',
             '--log_every', '1', '--optimizer', 'lamb', '--lr', '.05', '--text_lr', '.02', '--layer_decay', '.9',
             '--drop_tokens', '.5', '--drop_path', '.5', '--out_dir', str(folder / f'run-{world}')]
    cfg = run.parse_config(clip_train.Config, clip_train.RECIPES, flags)
    cfg.text_layer_decay = .8
    clip_train.train(cfg)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder of the same run on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp('processes')
    with computing_in_double(), pytest.MonkeyPatch.context() as patch:
        small(patch)
        work(folder, 1)
    for world in (2, 4):
        finish(launch(world, folder, work), folder)
    return folder


@pytest.mark.parametrize('world', [2, 4])
def test_losses_and_lambs_steps_are_those_of_one_process(runs, world):
    """Contrast across processes, samples' own patches and paths, lengths of sharded matrices."""
    torch.testing.assert_close(losses(runs / f'run-{world}'), losses(runs / 'run-1'), atol=1e-9, rtol=0)
    one, several = (torch.load(runs / f'run-{n}' / 'model.pt')['state_dict'] for n in (1, world))
    for name in one:
        torch.testing.assert_close(several[name], one[name], atol=1e-9, rtol=1e-9, msg=lambda text: f'{name}: {text}')
    assert len(losses(runs / 'run-1')) == 3
