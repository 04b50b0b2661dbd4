"""Mutated inputs by the thousand: every one is read, or refused by an error that is documented. Run by ``benchmarks/faults.py``."""

import io
import json
import os
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sb3_diffrl import NCLQL, OfflineDataset
from sb3_diffrl.common import NonFiniteError
from sb3_diffrl.configs import IMPORTED, dump_yaml, load_yaml, packaged_hyperparams, resolve
from sb3_diffrl.saving import ModelFileError

from .envs import box_env
from .hostile_datasets import ARROW, HARMLESS, HDF5, good_dataset
from .mutations import MUTATIONS, flip_bits, truncate

# Inputs that one process reads: a crash of a library's C code ends one process, and is counted.
BATCH = 50
# An input may take so many seconds, and a batch so many bytes beyond what the process has.
SECONDS, BYTES = 60, 3 * 2**30


def models(count: int) -> dict[str, int]:
    """Zips of a model, mutated in every way that the tests know; what loads acts and learns."""
    buffer = io.BytesIO()
    settings: dict[str, Any] = {"buffer_size": 10, "batch_size": 4, "learning_starts": 2}
    NCLQL("MlpPolicy", box_env(), policy_kwargs={"net_arch": [4]}, device="cpu", **settings).learn(5).save(buffer)

    def read(rng: np.random.Generator, folder: Path) -> None:
        name = list(MUTATIONS)[rng.integers(len(MUTATIONS))]
        (folder / "model.zip").write_bytes(MUTATIONS[name](buffer.getvalue(), rng))
        model = NCLQL.load(folder / "model.zip", env=box_env(), device="cpu")
        model.predict(np.zeros(5, np.float32))
        with suppress(NonFiniteError):  # of a learning rate or reward scale that is large
            model.learn(2, reset_num_timesteps=False)

    return run(read, count, (ModelFileError,))


def mutated_datasets(data_format: str) -> Callable[[int], dict[str, int]]:
    """Minari's folders, with bits flipped or bytes cut off in the data or the metadata, or another value in the metadata."""

    def target(count: int) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as name:
            data = good_dataset(Path(name), data_format)
            files = {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}

        def read(rng: np.random.Generator, folder: Path) -> None:
            chosen = list(files)[rng.integers(len(files))]
            for file, content in files.items():
                path = folder / "fuzz/good-v0/data" / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(mutate(content, rng) if file == chosen else content)
            load(folder)

        return run(read, count, (ValueError,))

    return target


def crafted_datasets(count: int) -> dict[str, int]:
    """Minari's folders as an attacker would make them, see ``hostile_datasets``."""

    def read(rng: np.random.Generator, folder: Path) -> None:
        data_format = "hdf5" if rng.integers(4) else "arrow"
        tampers = HDF5 if data_format == "hdf5" else ARROW
        name = list(tampers)[rng.integers(len(tampers))]
        # The secret lies beside the root.
        tampers[name](good_dataset(folder / "fuzz/root", data_format), rng)
        load(folder / "fuzz/root")
        assert name in HARMLESS, f"{name} was read"

    return run(read, count, (ValueError,))


def load(root: Path) -> None:
    """Load the dataset; what was made is deleted."""
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        OfflineDataset.load("fuzz/good-v0")
    finally:
        shutil.rmtree("fuzz")


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits, a cut, or, in JSON, another value."""
    kind = rng.integers(3)
    if kind == 2 and content.startswith(b"{"):
        document = json.loads(content)
        values: list[Any] = [None, -1, 0, 10**15, "", "x", [], {}, 1e308]
        document[list(document)[rng.integers(len(document))]] = values[rng.integers(len(values))]
        return json.dumps(document).encode()
    return truncate(content, rng) if kind == 1 else flip_bits(content, rng)


#: Entries of ``env_wrapper`` and the like: code, files, and what is of another form.
NAMES = [
    "gymnasium.wrappers.TimeLimit",
    "[gymnasium.make: {id: Pendulum-v1}]",
    "[os.system: {command: touch mark}]",
    "[stable_baselines3.common.monitor.Monitor: {filename: mark}]",
    "[sb3_diffrl.zoo.wrappers.inside_monitor: {wrappers: [os.system: {command: touch mark}]}]",
    "[stable_baselines3.common.callbacks.CheckpointCallback: {save_freq: 1, save_path: mark}]",
    "[{a.b: 3}, 4, [c]]",
]


def configurations(count: int) -> dict[str, int]:
    """The packaged hyperparameters, with characters changed, cut off or put in from a list that YAML and Python give a meaning."""
    texts = [packaged_hyperparams(name).read_text() for name in ("nclql", "lql", "diffusion_bc", "planner", "pg")]
    bomb = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 9))
    pieces = [
        "!!python/object/apply:os.system ['touch mark']",
        "&a [*a]",
        "*b",
        "{",
        "]",
        ": ",
        "\t",
        "\x00",
        "- " * 50,
        "!!binary x",
    ]
    pieces += [
        "__import__('os').system('touch mark')",
        "1e999",
        "0x",
        "<<: *default",
        "'",
        '"',
        "dict(a=dict(",
        "nn.Module",
        "\ufeff",
    ]
    # What conversions, stacks and memories do not take.
    pieces += ['!!bool "abc"', '!!timestamp "abc"', '!!int ""', '!!float "x"', "2001-99-99", "!!set [1]", "=", "0x" + "f" * 40]
    pieces += ["[" * 5000, "{a: " * 500, "9" * 5000, '"{[]: 1}"', "'" + "-" * 9000 + "1'", "'" + "a." * 3000 + "b'", "[1]: 2"]
    pieces += ["!!python/object/apply:collections.OrderedDict [[[[1], 2]]]", f"\nx: &x0 [1, 1]\n{bomb[:-1]}"]
    pieces += [f"\n  {key}: {entry}" for key in IMPORTED for entry in NAMES]

    def read(rng: np.random.Generator, folder: Path) -> None:
        text = texts[rng.integers(len(texts))]
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(text) + 1))
            stop = start + int(rng.integers(0, 30)) if rng.integers(2) else start
            piece = pieces[rng.integers(len(pieces))]
            if piece.startswith("\n"):  # whole lines
                start = stop = (text + "\n").index("\n", start)
            text = text[:start] + piece + text[stop:]
        path = folder / "config.yml"
        path.write_text(text)
        content = load_yaml(path)
        dump_yaml(content, path)  # what was read can be written out
        if isinstance(content, dict):
            for entry in content.values():
                if isinstance(entry, dict):
                    use(resolve(entry))

    return run(read, count, (ValueError,))


def use(hyperparams: dict[str, Any]) -> None:
    """Call what the settings name, as RL Zoo does; whatever it raises is its own affair, if it only runs nothing else."""
    from rl_zoo3.utils import get_callback_list, get_wrapper_class

    with suppress(Exception):
        get_callback_list(hyperparams)
    with suppress(Exception):
        wrap = get_wrapper_class(hyperparams)
        if wrap is not None:
            wrap(box_env())


def run(read: Callable[[np.random.Generator, Path], Any], count: int, documented: tuple[type[Exception], ...]) -> dict[str, int]:
    """Read inputs, a batch in a process.

    :return: how many were read, refused, raised something else (running out of memory, too), ended the process (by a crash or for
        the time they took), ran or wrote something
    """
    totals: Counter[str] = Counter()
    for batch in range(0, count, BATCH):
        with tempfile.TemporaryDirectory() as name:
            result, folder = Path(name) / "result.json", Path(name) / "work"
            folder.mkdir()
            child = os.fork()
            if child == 0:
                _read_batch(read, range(batch, min(count, batch + BATCH)), documented, folder, result)
            os.waitpid(child, 0)
            found = json.loads(result.read_text()) if result.exists() else {"inputs": BATCH, "crashed": 1}
            totals.update(found)
    names = ("inputs", "read", "refused", "other_errors", "crashed", "ran_or_wrote")
    return {name: totals[name] for name in names}


def _read_batch(
    read: Callable[[np.random.Generator, Path], Any],
    seeds: range,
    documented: tuple[type[Exception], ...],
    folder: Path,
    result: Path,
) -> None:
    os.chdir(folder)
    os.environ["SB3_DIFFRL_MARK"] = str(folder / "mark")
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    for seed in seeds:
        counts["inputs"] += 1
        signal.alarm(SECONDS)  # ends the process
        try:
            read(np.random.default_rng(seed), folder)
            counts["read"] += 1
        except documented as error:
            out_of_memory = any(isinstance(cause, MemoryError) for cause in causes(error))
            counts["other_errors" if out_of_memory else "refused"] += 1
            if out_of_memory:
                print(f"seed {seed}: {str(error)[:300]}", flush=True)
        except BaseException as error:
            counts["other_errors"] += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    signal.alarm(0)
    counts["ran_or_wrote"] = len({path.name for path in folder.iterdir()} - {"model.zip", "config.yml", "fuzz"})
    result.write_text(json.dumps(counts))
    os._exit(0)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


TARGETS: dict[str, Callable[[int], dict[str, int]]] = {
    "configurations": configurations,
    "models": models,
    "datasets, crafted": crafted_datasets,
    "datasets, hdf5": mutated_datasets("hdf5"),
    "datasets, arrow": mutated_datasets("arrow"),
}
