"""Time and memory to load a million transitions (1000 episodes x 1000 steps, 17 observations, 6 actions, float64 on disk).

    python benchmarks/loading.py [--formats hdf5 arrow] [--rounds 5]

Contestants, each in a process of its own, in turn, with the files in the page cache: `OfflineDataset.load`; and `minari`, which
reads the same episodes by `iterate_episodes` and keeps nothing: what any loader on top of Minari takes at least. Seconds are the
processor's, which depend less on what else runs. The dataset is made first, in a temporary folder (arrow takes minutes: Minari
looks at every file of a dataset for each episode that it writes).

Writes `results/loading.csv` (a row a round and contestant) and `loading.json` (command, versions, hardware, medians). Memory is
the peak of the process, and what of it was there before loading, when everything was imported.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

EPISODES, STEPS, OBS_DIM, ACTION_DIM = 1000, 1000, 17, 6
RESULTS = Path(__file__).parent / "results"
CONTESTANTS = ("sb3_diffrl", "minari")


def dataset_id(data_format: str) -> str:
    return f"benchmark/million-{data_format}-v0"


def make(data_format: Any) -> None:
    from sb3_diffrl.offline.writing import DatasetWriter

    rng = np.random.default_rng(0)
    space = spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float64)
    with DatasetWriter(dataset_id(data_format), space, spaces.Box(-1, 1, (ACTION_DIM,)), data_format=data_format) as writer:
        for _ in range(EPISODES):
            writer.add_episode(
                rng.normal(size=(STEPS + 1, OBS_DIM)),
                rng.uniform(-1, 1, (STEPS, ACTION_DIM)),
                rng.normal(size=STEPS),
                np.zeros(STEPS, bool),
                np.arange(STEPS) == STEPS - 1,
            )
        writer.publish()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(contestant: str, data_format: str) -> None:
    """One contestant's load: prints seconds, and the peak of memory before and after."""
    import minari

    from sb3_diffrl.offline import OfflineDataset

    before = peak_mib()
    begin = time.process_time()
    if contestant == "minari":
        n_steps = sum(len(episode) for episode in minari.load_dataset(dataset_id(data_format)).iterate_episodes())
    else:
        n_steps = OfflineDataset.load(dataset_id(data_format)).n_steps
    seconds = time.process_time() - begin
    assert n_steps == EPISODES * STEPS
    print(json.dumps([seconds, before, peak_mib()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["hdf5", "arrow"], choices=["hdf5", "arrow"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return

    from provenance import cpu_name

    from sb3_diffrl.offline.recording import versions

    rows: list[tuple[int, str, str, list[float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        for data_format in args.formats:
            make(data_format)
        for round_ in range(args.rounds):
            for data_format in args.formats:
                for contestant in CONTESTANTS:
                    command = [sys.executable, __file__, "--worker", contestant, data_format]
                    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    rows.append((round_, data_format, contestant, json.loads(printed)))
                    print(*rows[-1], flush=True)

    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "loading.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "format", "contestant", "seconds", "mib_before", "mib_peak"])
        writer.writerows([*row[:3], *row[3]] for row in rows)
    medians = {
        f"{data_format} {contestant}": {
            name: round(statistics.median(row[3][i] for row in rows if row[1:3] == (data_format, contestant)), 2)
            for i, name in enumerate(("seconds", "mib_before", "mib_peak"))
        }
        for data_format in args.formats
        for contestant in CONTESTANTS
    }
    described = {
        "command": f"python benchmarks/loading.py --formats {' '.join(args.formats)} --rounds {args.rounds}",
        "versions": versions(),
        "hardware": {"processor": cpu_name(), "cores": os.cpu_count()},
        "results": medians,
    }
    (RESULTS / "loading.json").write_text(json.dumps(described, indent=2) + "\n")
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
