"""Networks built from a file's word: bounded by the weights that the file has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Networks, their copies and what initialises them, in units of the file's size; and what the smallest file may take
FACTOR, ROOM = 8, 64 * 2**20
# What a tensor costs however small it is
OVERHEAD = 16384

# Operations that take a size from their arguments, and where it is
SIZES = {"empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint", "new_empty", "new_zeros", "new_full"}
STEPS = {"linspace", "logspace", "arange", "eye", "randperm"}


class TooLargeError(ValueError):
    """The networks that a file asks for are larger than the weights it holds."""


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors as they are asked for, and refuses those beyond a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SIZES or name in STEPS:
            self.left -= OVERHEAD + 4 * _count(args)
            if self.left < 0:
                raise TooLargeError("the networks that it describes are much larger than the weights it holds")
        return func(*args, **(kwargs or {}))


def _count(args: tuple[Any, ...]) -> int:
    # The product of the sizes, or the largest number of steps
    for arg in args:
        if isinstance(arg, (list, tuple)):
            count = 1
            for side in arg:
                count *= int(side)
            return count
    return max((int(abs(arg)) for arg in args if isinstance(arg, (int, float)) and abs(arg) < float("inf")), default=0)


@contextmanager
def bounded(n_bytes: int) -> Iterator[None]:
    """While the block runs, tensors larger together than a file's weights allow are refused before they are made.

    :param n_bytes: size of the weights in the file
    :raises TooLargeError: in the block
    """
    with _Bounded(FACTOR * n_bytes + ROOM):
        yield
