"""Mutated inputs by the thousand: every one is read, or refused by an error that is documented. Run by ``benchmarks/faults.py``."""

import io
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gymnasium import spaces

from sb3_diffrl import NCLQL, OfflineDataset
from sb3_diffrl.configs import UnsafeConfigError, load_yaml, packaged_hyperparams, resolve
from sb3_diffrl.offline.writing import DatasetWriter
from sb3_diffrl.saving import ModelFileError

from .envs import box_env
from .mutations import MUTATIONS, flip_bits, truncate

# Inputs that one process reads: a crash of a library's C code ends one process, and is counted.
BATCH = 50


def models(count: int) -> dict[str, int]:
    """Zips of a model, mutated in every way that the tests know."""
    buffer = io.BytesIO()
    NCLQL("MlpPolicy", box_env(), buffer_size=10, policy_kwargs={"net_arch": [4]}, device="cpu").save(buffer)

    def read(rng: np.random.Generator, folder: Path) -> None:
        name = list(MUTATIONS)[rng.integers(len(MUTATIONS))]
        (folder / "model.zip").write_bytes(MUTATIONS[name](buffer.getvalue(), rng))
        NCLQL.load(folder / "model.zip", device="cpu")

    return run(read, count, (ModelFileError,))


def datasets(count: int) -> dict[str, int]:
    """Minari's folders, with bits flipped or bytes cut off in the data or the metadata, or another value in the metadata."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["MINARI_DATASETS_PATH"] = name
        with DatasetWriter("fuzz/good-v0", spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))) as writer:
            for _ in range(2):
                writer.add_episode(np.zeros((4, 2)), np.zeros((3, 1)), np.zeros(3), np.zeros(3, bool), np.arange(3) == 2)
            writer.publish()
        files = {path.name: path.read_bytes() for path in (Path(name) / "fuzz/good-v0/data").iterdir()}

    def read(rng: np.random.Generator, folder: Path) -> None:
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        data = folder / "fuzz/bad-v0/data"
        data.mkdir(parents=True, exist_ok=True)
        chosen = list(files)[rng.integers(len(files))]
        for file, content in files.items():
            changed = content if file != chosen else mutate(content, rng)
            (data / file).write_bytes(changed)
        try:
            OfflineDataset.load("fuzz/bad-v0")
        finally:
            shutil.rmtree(folder / "fuzz")

    return run(read, count, (ValueError,))


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits, a cut, or, in JSON, another value."""
    kind = rng.integers(3)
    if kind == 2 and content.startswith(b"{"):
        document = json.loads(content)
        values: list[Any] = [None, -1, 0, 10**15, "", "x", [], {}, 1e308]
        document[list(document)[rng.integers(len(document))]] = values[rng.integers(len(values))]
        return json.dumps(document).encode()
    return truncate(content, rng) if kind == 1 else flip_bits(content, rng)


def configurations(count: int) -> dict[str, int]:
    """The packaged hyperparameters, with characters changed, cut off or put in from a list that YAML and Python give a meaning."""
    texts = [packaged_hyperparams(name).read_text() for name in ("nclql", "lql", "diffusion_bc", "planner", "pg")]
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

    def read(rng: np.random.Generator, folder: Path) -> None:
        text = texts[rng.integers(len(texts))]
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(text) + 1))
            stop = start + int(rng.integers(0, 30)) if rng.integers(2) else start
            text = text[:start] + pieces[rng.integers(len(pieces))] + text[stop:]
        path = folder / "config.yml"
        path.write_text(text)
        content = load_yaml(path)
        if isinstance(content, dict):
            for entry in content.values():
                if isinstance(entry, dict):
                    resolve(entry)

    return run(read, count, (UnsafeConfigError, ValueError, yaml.YAMLError))


def run(read: Callable[[np.random.Generator, Path], Any], count: int, documented: tuple[type[Exception], ...]) -> dict[str, int]:
    """Read inputs, a batch in a process.

    :return: how many were read, refused, raised something else, ended the process, ran or wrote something
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
    for seed in seeds:
        counts["inputs"] += 1
        try:
            read(np.random.default_rng(seed), folder)
            counts["read"] += 1
        except documented:
            counts["refused"] += 1
        except BaseException as error:
            counts["other_errors"] += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    counts["ran_or_wrote"] = len({path.name for path in folder.iterdir()} - {"model.zip", "config.yml", "fuzz"})
    result.write_text(json.dumps(counts))
    os._exit(0)


TARGETS: dict[str, Callable[[int], dict[str, int]]] = {"configurations": configurations, "datasets": datasets, "models": models}
