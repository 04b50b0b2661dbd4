"""The norm of a gradient that is spread over several tensors."""

from collections.abc import Sequence

import torch as th

from sb3_diffrl.native.library import is_plain, load, long_array, pointer_array

# Numbers from which another thread brings more than it costs
MIN_PER_THREAD = 2**19


def total_norm(tensors: Sequence[th.Tensor]) -> th.Tensor:
    """L2 norm of several tensors as of one vector, as ``torch.nn.utils.get_total_norm()``; compiled where it can be.

    :return: scalar; not finite if one of the numbers is not
    """
    library = load()
    if library is None or not all(map(is_plain, tensors)):
        return th.nn.utils.get_total_norm(tensors)
    sizes = [x.numel() for x in tensors]
    sums = th.empty(len(tensors), dtype=th.float64, device="cpu")
    n_threads = max(1, min(th.get_num_threads(), sum(sizes) // MIN_PER_THREAD))
    norm = library.total_norm(pointer_array(tensors), long_array(sizes), sums.data_ptr(), len(tensors), n_threads)
    return th.tensor(norm, dtype=th.float32, device="cpu")
