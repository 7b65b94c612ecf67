"""What processes of the tests begin with: the server that forks them imports this once."""
import conftest             # noqa: F401    puts the folder above on the path
import fsspec.mapping       # noqa: F401    this and the next: what torch imports at the first step and checkpoint
import torch
import torch._dynamo        # noqa: F401

import data
import test_distributed     # noqa: F401

data.world_tables(torch.device('cpu'))
