"""Makes this process compute in float64. The fixture `double` puts this folder on the PYTHONPATH of child processes,
where Python imports it before anything else."""
import torch

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
