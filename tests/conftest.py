"""Tests import the files from the folder above, and share the cores with whoever else is there."""
import contextlib
import os
import sys

import pytest
import torch

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(TESTS))
torch.set_num_threads(1)


@contextlib.contextmanager
def computing_in_double():
    """Everything is float64, here and in child processes: the default dtype, and what Tensor.float returns."""
    path = os.path.join(TESTS, 'double')
    if os.environ.get('PYTHONPATH'):
        path += os.pathsep + os.environ['PYTHONPATH']
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', path)
        patch.setattr(torch.Tensor, 'float', torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        forget_tensors()
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            forget_tensors()


def forget_tensors():
    """Empties the caches of our functions: what they hold is of the other dtype. But for world_tables: it is float32
    whatever the default, and takes half a second."""
    for name in {'model', 'data', 'detect_seg'} & sys.modules.keys():
        for key, value in vars(sys.modules[name]).items():
            if hasattr(value, 'cache_clear') and key != 'world_tables':
                value.cache_clear()


def cut_off(train, cfg):
    """Runs train(cfg) until it has logged step 4."""
    import run
    write = run.Log.write

    def write_and_stop(log, step, **values):
        write(log, step, **values)
        if step == 4:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Log, 'write', write_and_stop)
        train(cfg)


@pytest.fixture
def double():
    """For tests that compare sums taken in another order: in float64 they differ by rounding alone, and 1e-9 tells that
    from a mistake on every processor."""
    with computing_in_double():
        yield


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='also run tests that take many minutes')


def pytest_configure(config):
    config.addinivalue_line('markers', 'long: takes many minutes; runs with --long only')


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--long'):
        for item in items:
            if 'long' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='takes many minutes: --long'))
