"""One state in all processes of data-parallel training."""

from collections.abc import Iterable

import torch as th
import torch.distributed as dist


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(x: th.Tensor) -> th.Tensor:
    """The sum of every process's tensor; the tensor itself where there is one process."""
    if _several():
        x = x.clone()
        dist.all_reduce(x)
    return x


def mean_over_processes(x: th.Tensor) -> th.Tensor:
    """The mean of every process's tensor; the tensor itself where there is one process."""
    return sum_over_processes(x) / dist.get_world_size() if _several() else x


def broadcast(tensors: Iterable[th.Tensor]) -> None:
    """Give every process the first one's tensors."""
    if _several():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
