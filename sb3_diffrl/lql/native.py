"""Langevin chains in compiled C: the whole chain in one call, for the package's own critics on a CPU.

``langevin.c`` is compiled on first use, in about two seconds, by the C compiler of the machine (``CC``, or ``cc``) and kept in the
user's cache folder. Where there is none, or it fails, ``load()`` gives ``None`` and the chains run in torch.
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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch as th
from torch import nn

from sb3_diffrl.lql.activations import Mish
from sb3_diffrl.lql.critic import LangevinCritic, StackedLinear
from sb3_diffrl.lql.langevin import ChainDraws, LangevinSampler

SOURCE = Path(__file__).with_name("langevin.c")
# No fast-math: NaN must stay NaN. Products and sums may be fused.
FLAGS = ["-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC"]
MAX_HIDDEN = 16
ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 0, nn.Tanh: 1, nn.SiLU: 2, nn.Mish: 3, Mish: 3}
# Chains below which a second thread costs more than it brings
MIN_CHAINS_PER_THREAD = 8

_of_thread = threading.local()
logger = logging.getLogger(__name__)


class _Chain(ctypes.Structure):
    # struct chain of langevin.c
    _fields_ = (
        *((name, ctypes.c_long) for name in ("n_critics", "features_dim", "action_dim", "first_rows", "n_hidden", "n_levels")),
        *((name, ctypes.c_long) for name in ("n_steps", "batch")),
        *((name, ctypes.c_int) for name in ("activation", "normalize")),
        *((name, ctypes.c_void_p) for name in ("widths", "weights", "biases", "level_terms", "drift_scales", "noise_scales")),
        *((name, ctypes.c_void_p) for name in ("features", "noise", "actions")),
    )


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
    """Compile ``langevin.c`` unless the cache has it.

    :return: path of the shared library
    :raises OSError: if there is no compiler, or it fails
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler `{compiler[0]}`")
    build = [*compiler, *FLAGS]
    key = hashlib.sha256("\0".join([SOURCE.read_text(), *build, _processor()]).encode()).hexdigest()[:20]
    library = _cache_folder() / f"langevin-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            done = subprocess.run([*build, "-o", str(built), str(SOURCE), "-lm"], capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"`{compiler[0]}` failed: {done.stderr.strip()[-500:]}")
            built.replace(library)  # in one step: another process may be looking
    return library


@cache
def load() -> ctypes.CDLL | None:
    """The compiled library, ``None`` where it cannot be had (the reason is logged at level INFO)."""
    try:
        library = ctypes.CDLL(str(compile_library()))
    except (OSError, RuntimeError) as error:
        logger.info("Langevin chains run in torch: %s", error)
        return None
    library.langevin_packed_floats.restype = ctypes.c_long
    library.langevin_packed_floats.argtypes = [ctypes.c_void_p]
    library.langevin_pack.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.langevin_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    return library


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    # Threads of Python's, which C releases from the lock: a second OpenMP runtime beside torch's would fight it for the cores.
    return ThreadPoolExecutor(n_threads, thread_name_prefix="langevin")


os.register_at_fork(after_in_child=_pool.cache_clear)


@cache
def _scales(sampler: LangevinSampler) -> th.Tensor:
    # (2, n_levels): factors of the drift and of the noise
    step_sizes = th.tensor(sampler.step_sizes, dtype=th.float64)
    return th.stack([0.5 * sampler.inverse_temperature * step_sizes, step_sizes.sqrt()]).float()


def _memory(n_floats: int) -> th.Tensor:
    # Kept for the next call: megabytes fresh from the system cost as much as filling them.
    memory: th.Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or len(memory) < n_floats:
        memory = _of_thread.memory = th.empty(n_floats)
    return memory


def supports(critic: nn.Module) -> bool:
    """Whether the compiled chain computes this critic: the package's own (a subclass may compute something else), on a CPU."""
    return (
        type(critic) is LangevinCritic
        and type(critic.activation) in ACTIVATIONS
        and 1 < len(critic.layers) <= MAX_HIDDEN + 1
        and critic.layers[0].weight.device.type == "cpu"
        and critic.layers[0].weight.dtype == th.float32
    )


def sample(sampler: LangevinSampler, critic: LangevinCritic, features: th.Tensor, draws: ChainDraws) -> th.Tensor:
    """``sampler.sample()`` on the gradient of the critics' sum, in compiled C.

    What a chain does depends on its own features, start and noise alone, to the last bit.

    :param critic: a critic that ``supports()`` accepts
    :param features: features of the observations, ``(batch, features_dim)``
    :param draws: start and noise of ``batch`` chains
    :return: actions in the scaled box [-1, 1], ``(batch, action_dim)``
    """
    library = load()
    assert library is not None, "no compiled library: see `load()`"
    layers = [layer for layer in critic.layers if isinstance(layer, StackedLinear)]
    weights, biases = (
        [part.detach().contiguous() for part in parts] for parts in zip(*((x.weight, x.bias) for x in layers), strict=True)
    )
    level_terms = None
    if critic.level_embedding is not None:
        embedding = critic.level_embedding(th.arange(critic.n_levels)).detach()
        # (n_critics, n_levels, 16) x (n_critics, 16, width)
        level_terms = th.bmm(embedding, weights[0][:, critic.features_dim + critic.action_dim :])
    scales = _scales(sampler)
    features, noise, actions = features.float().contiguous(), draws.noise.float().contiguous(), draws.start.float().clone()
    widths = [weight.shape[2] for weight in weights[:-1]]
    arrays = (
        (ctypes.c_long * len(widths))(*widths),
        (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights)),
        (ctypes.c_void_p * len(biases))(*(bias.data_ptr() for bias in biases)),
    )
    chain = _Chain(
        critic.n_critics,
        critic.features_dim,
        critic.action_dim,
        weights[0].shape[1],
        len(widths),
        sampler.n_levels,
        sampler.n_steps,
        len(features),
        ACTIVATIONS[type(critic.activation)],
        sampler.normalize_grad,
        *(ctypes.addressof(array) for array in arrays),
        None if level_terms is None else level_terms.data_ptr(),
        scales[0].data_ptr(),
        scales[1].data_ptr(),
        features.data_ptr(),
        noise.data_ptr(),
        actions.data_ptr(),
    )
    packed = _memory(library.langevin_packed_floats(ctypes.byref(chain)))
    library.langevin_pack(ctypes.byref(chain), packed.data_ptr())
    _run(library, chain, packed)
    return actions


def _run(library: ctypes.CDLL, chain: _Chain, packed: th.Tensor) -> None:
    n_threads = max(1, min(th.get_num_threads(), chain.batch // MIN_CHAINS_PER_THREAD))
    bounds = [chain.batch * i // n_threads for i in range(n_threads + 1)]
    arguments = [(ctypes.byref(chain), packed.data_ptr(), *bounds[i : i + 2]) for i in range(n_threads)]
    others = [_pool(n_threads - 1).submit(library.langevin_run, *of_thread) for of_thread in arguments[1:]]
    failed = library.langevin_run(*arguments[0])
    # All must end before the memory they work on goes
    failures = [failed, *(other.result() for other in others)]
    if any(failures):
        raise MemoryError(f"no memory for {chain.batch} Langevin chains")
