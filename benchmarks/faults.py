"""Faults on purpose: processes killed at random moments, files mutated at random, very long runs.

``kill`` trains with a checkpoint in each step in a process that gets SIGKILL at a random moment after the first of them or, in
every second trial, while a file is being written. It loads what is there, which must be the last checkpoint that was complete, goes
on to the end, and compares with a run that was never stopped. ``fuzz`` and ``fuzz-datasets`` load what was mutated. ``long`` makes
a million updates and a hundred thousand predictions. Each writes a CSV line at a time, beside a JSON with command, versions and
hardware.
"""

import argparse
import csv
import gc
import hashlib
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minari
import numpy as np
import torch as th
from provenance import metadata
from stable_baselines3.common.callbacks import BaseCallback

from sb3_diffrl import NCLQL, DiffusionBC, OfflineDataset, record_dataset
from sb3_diffrl.pg import PG
from sb3_diffrl.planner import DiffusionPlanner

RESULTS = Path(__file__).parent / "results" / "faults"
DATASET, RECORDED = "faults/pendulum/random-v0", "faults/pendulum/recorded-v0"
SMALL = {"d_model": 16, "depth": 1, "critic_depth": 1, "head_dim": 8, "time_embedding_dim": 8, "net_arch": [8]}
OFFLINE: dict[str, tuple[Any, dict[str, Any]]] = {
    "DiffusionBC": (DiffusionBC, {"policy_kwargs": {"net_arch": [16]}}),
    "DiffusionPlanner": (DiffusionPlanner, {"policy_kwargs": SMALL}),
    "PG": (PG, {"policy_kwargs": SMALL}),
}
ALGORITHMS: dict[str, Any] = {"NCLQL": NCLQL, **{name: cls for name, (cls, _) in OFFLINE.items()}}
KINDS = (*ALGORITHMS, "recording")
STEPS, RECORDINGS = 24, 20


# ---------------------------------------------------------------------- killing


class Checkpoint(BaseCallback):
    """Saves the model to the same file over and over."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _on_step(self) -> bool:
        assert self.model is not None
        self.model.save(self.folder / "checkpoint")
        if isinstance(self.model, NCLQL):
            self.model.save_replay_buffer(self.folder / "buffer")
        log(self.folder, self.num_timesteps)
        return True


def log(folder: Path, step: int) -> None:
    """Note that what was saved at a step is complete."""
    with (folder / "completed").open("ab", buffering=0) as file:
        file.write(f"{step} {time.monotonic()}\n".encode())


def completed(folder: Path) -> list[tuple[int, float]]:
    """The steps at which all was saved, and when."""
    path = folder / "completed"
    # A line without its end was being written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines]


def make(kind: str) -> Any:
    """A tiny model, or ``None`` for a recording."""
    if kind == "NCLQL":
        kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 10, "buffer_size": 500, "batch_size": 8}
        return NCLQL("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **kwargs)
    cls, kwargs = OFFLINE[kind]
    return cls("MlpPolicy", dataset=DATASET, batch_size=8, seed=0, device="cpu", **kwargs)


def work(kind: str, folder: Path) -> None:
    """What is killed."""
    if kind == "recording":
        for number in range(1, RECORDINGS + 1):
            record_dataset(None, "Pendulum-v1", RECORDED, n_steps=300, seed=number, overwrite=True)
            log(folder, number)
    else:
        make(kind).learn(STEPS, Checkpoint(folder))


def digest(model: Any) -> str:
    """Of the weights and the optimiser, to the bit."""
    names, _ = model._get_torch_save_params()
    found = hashlib.sha256()
    for name in names:
        state = model.get_parameters()[name]
        for value in state.values() if name == "policy" else (v for s in state["state"].values() for v in s.values()):
            found.update(th.as_tensor(value).numpy().tobytes())
    return found.hexdigest()


def finish(kind: str, folder: Path, last: int) -> dict[str, Any]:
    """Load what a killed process left, and go on to the end.

    :param last: step of the last checkpoint that was complete, or number of the last recording; 0 begins anew
    :return: the step that was loaded, or the length of the dataset, the same at the end, the digest there
    """
    if kind == "recording":
        steps = OfflineDataset.load(RECORDED).n_steps
        number = minari.load_dataset(RECORDED).storage.metadata["provenance"]["seed"]
        record_dataset(None, "Pendulum-v1", RECORDED, n_steps=300, seed=0, overwrite=True)
        whole = steps == 300 and last <= number <= last + 1
        return {"loaded": steps, "finished": OfflineDataset.load(RECORDED).n_steps, "digest": "", "whole": whole}
    has_buffer = True
    if last == 0:
        model = make(kind)
    elif kind == "NCLQL":
        model = NCLQL.load(folder / "checkpoint", env=make(kind).get_env(), device="cpu")
        model.load_replay_buffer(folder / "buffer")
        # Without the transition of the step in which it was saved
        assert model.replay_buffer is not None
        has_buffer = last - 1 <= model.replay_buffer.size() <= last
    else:
        model = ALGORITHMS[kind].load(folder / "checkpoint", device="cpu")
    loaded = model.num_timesteps
    model.learn(STEPS - loaded, Checkpoint(folder), reset_num_timesteps=False)
    is_finite = all(bool(th.isfinite(value).all()) for value in model.policy.state_dict().values())
    # The process may have died before it noted that the next one is complete.
    whole = last <= loaded <= last + 1 and has_buffer and is_finite
    return {"loaded": loaded, "finished": model.num_timesteps, "digest": digest(model), "whole": whole}


def dataset_folder() -> Path:
    """Where the datasets are."""
    return Path(os.environ["MINARI_DATASETS_PATH"])


def forked(task: Callable[[], Any], result: Path) -> int:
    """Run a task in a forked process, which writes what it returns, or the error, to a file of JSON.

    :return: its process id
    """
    child = os.fork()
    if child:
        return child
    try:
        warnings.simplefilter("ignore")
        result.write_text(json.dumps(task()))
    except BaseException as error:
        result.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        os._exit(1)
    os._exit(0)


def outcome(task: Callable[[], Any], result: Path) -> dict[str, Any]:
    """What a task returns when it is run in a forked process."""
    os.waitpid(forked(task, result), 0)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def trial(kind: str, seed: int, expected: dict[str, Any]) -> dict[str, Any]:
    """Kill one process, after its first checkpoint and before its last, and see what is left.

    :param expected: of the run that was never stopped: its ``digest`` and how many ``seconds`` a step with its checkpoint took
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    # On a busy machine the process may be some steps further before it is killed.
    awaited = int(rng.integers(1, (RECORDINGS if kind == "recording" else STEPS) * 3 // 4))
    delay = float(rng.uniform(0, expected["seconds"]))
    file = str(rng.choice(["checkpoint", "buffer"] if kind == "NCLQL" else ["checkpoint"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = forked(lambda: work(kind, folder), folder / "work.json")
        while len(completed(folder)) < awaited and not has_ended(child):
            time.sleep(0.001)
        if seed % 2:
            while not unfinished(folder, file) and not has_ended(child):
                pass
        else:
            time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        last = max((step for step, _ in completed(folder)), default=0)
        was_saving = bool(unfinished(folder))
        found = outcome(lambda: finish(kind, folder, max(1, last)), folder / "finish.json")
        for path in dataset_folder().glob(".recording-*"):
            shutil.rmtree(path)
    equal = found.get("digest") == expected["digest"]
    ok = last > 0 and "error" not in found and found["whole"] and (equal or kind in ("NCLQL", "recording"))
    return {
        "kind": kind,
        "seed": seed,
        "was_killed": was_killed,
        "was_saving": was_saving,
        "last_complete": last,
        "loaded_step": found.get("loaded"),
        "final_step": found.get("finished"),
        "equal_to_the_bit": equal if kind in OFFLINE else "",
        "ok": ok,
        "error": found.get("error", ""),
    }


def unfinished(folder: Path, file: str = "*") -> list[Path]:
    """Files that are being written, or were when the process died, and datasets that are being put in their place."""
    root = dataset_folder()
    recordings = [path for path in root.glob(".recording-*") if not (path / "data").exists()]
    return [*folder.glob(f".{file}.*.saving"), *recordings, *(root / RECORDED).parent.glob(".*.former")]


def has_ended(child: int) -> bool:
    """Whether a process has ended, which can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reference(kind: str) -> dict[str, Any]:
    """A run that is not stopped."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = work if kind == "recording" else lambda kind, folder: finish(kind, folder, 0)
        found = outcome(lambda: run(kind, folder), folder / "work.json")
        moments = [moment for _, moment in completed(folder)]
    return {"digest": (found or {}).get("digest", ""), "seconds": (moments[-1] - moments[0]) / (len(moments) - 1)}


def kill(trials: int, out: Path) -> None:
    """All trials, a CSV line each."""
    # torch imports it with the first step of an optimiser: each process would.
    importlib.import_module("torch._dynamo")
    with tempfile.TemporaryDirectory() as name:
        os.environ["MINARI_DATASETS_PATH"] = name
        made = outcome(
            lambda: {"id": record_dataset(None, "Pendulum-v1", DATASET, n_steps=400, seed=0).id}, Path(name) / "made.json"
        )
        assert made == {"id": DATASET}, made
        rows = []
        for kind in KINDS:
            expected = reference(kind)
            rows += [write_row(out, trial(kind, seed, expected)) for seed in range(trials)]
    for what in ("ok", "was_killed", "was_saving"):
        print(f"{what}: {sum(bool(row[what]) for row in rows)} of {len(rows)} trials")


# ---------------------------------------------------------------------- fuzzing


def fuzz(what: str, count: int, out: Path) -> None:
    """Mutated configurations and models, or datasets: each is loaded, or refused by an error that is documented."""
    from tests import fuzzing

    for name, run in fuzzing.TARGETS.items():
        if name.startswith("datasets") == (what == "fuzz-datasets"):
            # These take longer.
            counts = run({"models": count // 5, "datasets, crafted": count // 2}.get(name, count))
            write_row(out, {"target": name, **counts})


# ---------------------------------------------------------------------- long runs


def long(only: str, updates: int, offline_updates: int, predictions: int, out: Path) -> None:
    """Memory, time and open files along very many updates and predictions."""
    from tests.envs import box_env
    from tests.test_saving import tiny_dataset

    offline: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "num_inference_steps": 1, "seed": 0, "device": "cpu"}
    online: dict[str, Any] = {"policy_kwargs": {"net_arch": [4], "n_critics": 1}, "n_levels": 1, "n_langevin_steps": 1}
    online |= {"learning_starts": 50, "batch_size": 2, "buffer_size": 1000, "seed": 0, "device": "cpu"}

    def make_offline() -> Any:
        return DiffusionBC("MlpPolicy", dataset=tiny_dataset(), batch_size=2, **offline)

    def make_online() -> Any:
        return NCLQL("MlpPolicy", box_env(3, 2), **online).learn(60)

    def update(model: Any, count: int) -> None:
        if isinstance(model, DiffusionBC):
            model.learn(count, reset_num_timesteps=False)
        else:
            for _ in range(count // 100):
                model.train(100, batch_size=2)

    def predict(model: Any, count: int) -> None:
        for _ in range(count):
            model.predict(np.zeros(3, np.float32))

    warnings.simplefilter("ignore")  # there is no environment to evaluate in
    runs: dict[str, tuple[Callable[[], Any], Callable[[Any, int], None], int]] = {
        "NCLQL predictions": (make_online, predict, predictions),
        "NCLQL updates": (make_online, update, updates),
        "DiffusionBC updates": (make_offline, update, offline_updates),
        "DiffusionBC predictions": (make_offline, predict, predictions),
    }
    for name, run in runs.items():
        if only in ("", name):
            along(name, *run, out)


def along(name: str, make: Callable[[], Any], act: Callable[[Any, int], None], count: int, out: Path) -> None:
    """Act very often with one model, and at each of fifty halts for a moment with a new one: it tells a slow-down from a busy
    machine.
    """
    parts, few = 50, 100
    model = make()
    for part in range(parts):
        milliseconds = []
        for used, times in ((model, count // parts), (make(), few)):
            start = time.process_time()
            act(used, times)
            milliseconds.append(round(1000 * (time.process_time() - start) / times, 3))
        del used
        gc.collect()
        row = {"agent": name.split()[0], "what": name.split()[1], "done": (part + 1) * (count // parts), "ms_each": milliseconds[0]}
        write_row(out, {**row, "ms_each_of_a_new_model": milliseconds[1], **usage(), "objects": len(gc.get_objects())})


def usage() -> dict[str, float]:
    """Resident memory and open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    files = len(list(Path("/proc/self/fd").iterdir()))
    return {"memory_mib": round(memory, 1), "open_files": files}


# ---------------------------------------------------------------------- results


def write_row(out: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Append a line to the CSV."""
    is_new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kill", "fuzz", "fuzz-datasets", "long"])
    parser.add_argument("--trials", type=int, default=12, help="processes killed of each kind")
    parser.add_argument(
        "--count",
        type=int,
        default=5000,
        help="inputs of each fuzzing: of models a fifth, of crafted datasets half as many",
    )
    parser.add_argument("--only", default="", help="one of the long runs, e.g. 'NCLQL updates', in a file of its own")
    parser.add_argument("--updates", type=int, default=1_000_000)
    parser.add_argument("--offline_updates", type=int, default=20_000, help="of the offline agent, which is slower")
    parser.add_argument("--predictions", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    th.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' environments and mutations
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{'-'.join([args.what, *args.only.split()])}.csv"
    path.unlink(missing_ok=True)
    used = {
        "kill": ["trials"],
        "fuzz": ["count"],
        "fuzz-datasets": ["count"],
        "long": ["only", "updates", "offline_updates", "predictions"],
    }[args.what]
    arguments = {name: getattr(args, name) for name in used}
    command = ["python", "benchmarks/faults.py", args.what, *(f"--{name}={value}" for name, value in arguments.items())]
    path.with_suffix(".json").write_text(json.dumps(metadata(arguments, shlex.join(command)), indent=1) + "\n")
    if args.what == "kill":
        kill(args.trials, path)
    elif args.what.startswith("fuzz"):
        fuzz(args.what, args.count, path)
    else:
        long(args.only, args.updates, args.offline_updates, args.predictions, path)


if __name__ == "__main__":
    main()
