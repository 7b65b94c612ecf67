"""Tests import the six files from the folder above, and share the cores with whoever else is there."""
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='also run tests that take many minutes')


def pytest_configure(config):
    config.addinivalue_line('markers', 'long: takes many minutes; runs with --long only')


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--long'):
        for item in items:
            if 'long' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='takes many minutes: --long'))
