"""The compiled C files of this folder, for CPUs.

They are compiled on first use, in a few seconds, by the machine's C compiler (``CC``, or ``cc``), and kept in the user's cache
folder. Where there is none, or it fails, ``load()`` gives ``None`` and everything runs in torch.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch as th

_FILES = ("langevin.c", "stacked_mlp.c", "attention.c", "transformer.c", "perceptron.c", "beta_policy.c", "vectors.c")
SOURCES = [Path(__file__).with_name(name) for name in _FILES]
HEADERS = [Path(__file__).with_name(name) for name in ("kernels.h", "attention.h")]
# No fast-math: NaN must stay NaN. Products and sums may be fused.
# Tuned for none: GCC's tuning for some processors fuses them in one tile and not in another, and a row's result would depend on
# its batch.
FLAGS = ["-std=gnu11", "-O3", "-march=native", "-mtune=generic", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC"]
# The OpenMP that torch has loaded: a pool of threads beside torch's would fight it for the cores. Without it: one thread.
OPENMP = "-fopenmp"

_of_thread = threading.local()
logger = logging.getLogger(__name__)


def longs(*names: str) -> list[tuple[str, Any]]:
    """Fields of a ``ctypes.Structure``."""
    return [(name, ctypes.c_long) for name in names]


def ints(*names: str) -> list[tuple[str, Any]]:
    """Fields of a ``ctypes.Structure``."""
    return [(name, ctypes.c_int) for name in names]


def pointers(*names: str) -> list[tuple[str, Any]]:
    """Fields of a ``ctypes.Structure``."""
    return [(name, ctypes.c_void_p) for name in names]


def _processor() -> str:
    # What -march=native depends on: a cache folder may be shared by machines.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(line for line in lines[:40] if line.startswith(("model name", "flags", "Features", "CPU part")))
    except OSError:
        return platform.machine() + platform.processor()


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sb3_diffrl"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def compile_library() -> Path:
    """Compile the C files unless the cache has them.

    :return: path of the shared library
    :raises OSError: if there is no compiler, or it fails
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler `{compiler[0]}`")
    texts = [path.read_text() for path in (*HEADERS, *SOURCES)]
    key = hashlib.sha256("\0".join([*texts, *compiler, *FLAGS, OPENMP, _processor()]).encode()).hexdigest()[:20]
    library = _cache_folder() / f"native-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            for flags in ([*FLAGS, OPENMP], FLAGS):
                command = [*compiler, *flags, "-o", str(built), *map(str, SOURCES), "-lm"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    break
            else:
                raise OSError(f"`{compiler[0]}` failed: {done.stderr.strip()[-500:]}")
            built.replace(library)  # in one step: another process may be looking
    return library


@cache
def load() -> ctypes.CDLL | None:
    """The compiled library, ``None`` where it cannot be had (the reason is logged at level INFO)."""
    try:
        library = ctypes.CDLL(str(compile_library()))
    except (OSError, RuntimeError) as error:
        logger.info("No compiled code, torch computes instead: %s", error)
        return None
    sizes = ("mlp_saved_floats", "mlp_memory_floats", "transformer_packed_floats", "perceptron_packed_floats")
    for name in (*sizes, "beta_policy_memory_floats", "attention_weights_floats"):
        _declare(getattr(library, name), [ctypes.c_void_p], ctypes.c_long)
    for kind in ("langevin", "attention", "transformer", "perceptron"):
        _declare(getattr(library, f"{kind}_memory_floats"), [ctypes.c_void_p, ctypes.c_long], ctypes.c_long)
    runs = ("langevin_run", "transformer_run", "perceptron_run")
    for name in (*runs, "mlp_forward", "mlp_backward", "attention_forward", "attention_backward"):
        _declare(getattr(library, name), [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long], None)
    _declare(library.beta_policy_run, [ctypes.c_void_p] * 2, None)
    _declare(library.total_norm, [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2, ctypes.c_float)
    _declare(library.gelu, [ctypes.c_void_p] * 2 + [ctypes.c_long] * 2, None)
    _declare(library.gelu_backward, [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2, None)
    _declare(library.has_bf16_products, [], ctypes.c_int)
    for name in ("transformer_pack", "perceptron_pack"):
        _declare(getattr(library, name), [ctypes.c_void_p] * 4, None)
    return library


def multiplies_bfloat16() -> bool:
    """Whether compiled code multiplies bfloat16: the processor must (AVX512-BF16)."""
    library = load()
    return library is not None and bool(library.has_bf16_products())


def _declare(function: Any, argtypes: list[Any], restype: Any) -> None:
    function.argtypes, function.restype = argtypes, restype


def floats(*shape: int) -> th.Tensor:
    """Floats for the C code, whatever torch's default type and device are, with any contents."""
    return th.empty(shape, dtype=th.float32, device="cpu")


def is_plain(x: th.Tensor) -> bool:
    """Whether C may read these: floats in a row in a CPU's memory, whose operations no transform (``torch.func``) has to see."""
    return (
        type(x) is th.Tensor
        and x.dtype == th.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and not x.is_neg()
        and not x._is_zerotensor()
        and not th._C._functorch.is_functorch_wrapped_tensor(x)
        and not th._C._functorch.is_legacy_batchedtensor(x)
    )


def work_memory(n_floats: int) -> th.Tensor:
    """Floats to work in, of this thread, with any contents."""
    # Kept for the next call: megabytes fresh from the system cost as much as filling them.
    memory: th.Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or len(memory) < n_floats:
        memory = _of_thread.memory = floats(n_floats)
    return memory


def pointer_array(tensors: Sequence[th.Tensor]) -> Any:
    """C array of the tensors' addresses; the tensors must outlive it."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def long_array(numbers: Sequence[int]) -> Any:
    """C array of ``long``."""
    return (ctypes.c_long * len(numbers))(*numbers)
