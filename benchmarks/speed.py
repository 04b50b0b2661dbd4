"""Time of one full-size update, of `predict` and of the whole loop, for NC-LQL, SB3's SAC and (optionally) the authors' JAX code.

    python benchmarks/speed.py --reference-python VENV/bin/python --reference-dir CLONE

``nclql`` computes in float32, ``nclql-bf16`` has chains whose products are rounded (where the processor multiplies bfloat16).

HalfCheetah sizes (17 observations, 6 actions), batch 256, critics 3 x 256, two threads; quote the ratios. Run it while nothing
else runs. `loop` is a step of `learn()` with one env and one update a step. The reference's loop is made of its own parts, as
its trainer has them: an action, the env's step, a minibatch from a buffer and an update.

The reference needs a clone of https://github.com/ku-dmlab/NCLQL and an environment with gymnasium[mujoco], jax, dm-haiku, optax,
numpyro and dill. Writes ``results/speed.csv`` (a row a round, contestant and task) and ``speed.json``.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from contest import Task, measure, serve, write

OBS_DIM, ACTION_DIM, BATCH, WIDTHS, THREADS = 17, 6, 256, [256, 256, 256], 2
ENV_ID, LOOP_STEPS = "HalfCheetah-v5", 20
NAMES = ("nclql", "nclql-bf16", "sac", "reference")
# Name, calls a round, contestants
TASKS = [("update", 20, NAMES), ("predict 1", 100, NAMES), ("predict 256", 15, NAMES), ("loop", 3, NAMES)]


def sb3_tasks(name: str) -> dict[str, Task]:
    import gymnasium as gym
    import numpy as np
    import torch as th
    from stable_baselines3 import SAC
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

    from sb3_diffrl import NCLQL

    th.set_num_threads(THREADS)
    algorithm: Any = SAC if name == "sac" else NCLQL
    policy_kwargs: dict[str, Any] = {"net_arch": WIDTHS}
    if name == "nclql-bf16":
        policy_kwargs["chain_dtype"] = "bfloat16"
    kwargs = {"batch_size": BATCH, "policy_kwargs": policy_kwargs, "learning_starts": 1_000, "device": "cpu", "seed": 0}
    model: OffPolicyAlgorithm = algorithm("MlpPolicy", gym.make(ENV_ID), **kwargs)
    model.learn(1_001)
    obs = np.random.default_rng(0).normal(size=(BATCH, OBS_DIM)).astype(np.float32)
    return {
        "update": lambda: model.train(1, BATCH),
        "predict 1": lambda: model.predict(obs[0]),
        "predict 256": lambda: model.predict(obs),
        "loop": lambda: model.learn(LOOP_STEPS, reset_num_timesteps=False),
    }


def reference_tasks(folder: str) -> dict[str, Task]:
    sys.path.insert(0, folder)
    import gymnasium as gym
    import jax
    import jax.core
    import jax.extend.core
    import numpy as np

    if not hasattr(jax.core, "ClosedJaxpr"):  # moved by recent versions of jax
        jax.core.ClosedJaxpr = jax.extend.core.ClosedJaxpr
    from relax.algorithm.nclql import NCLQL
    from relax.network.nclql import create_NCLQL_net
    from relax.utils.experience import Experience

    agent, params = create_NCLQL_net(jax.random.key(0), OBS_DIM, ACTION_DIM, WIDTHS, jax.nn.mish)
    algorithm = NCLQL(agent, params)
    rng = np.random.default_rng(0)
    size = 2_000
    obs, next_obs = (rng.normal(size=(size, OBS_DIM)).astype(np.float32) for _ in range(2))
    action = rng.uniform(-1, 1, (size, ACTION_DIM)).astype(np.float32)
    reward, done = rng.normal(size=size).astype(np.float32), np.zeros(size, bool)
    keys: Iterator[Any] = iter(jax.random.split(jax.random.key(1), 100_000))

    def minibatch(rows: Any) -> Any:
        return Experience(obs=obs[rows], action=action[rows], reward=reward[rows], done=done[rows], next_obs=next_obs[rows])

    data = minibatch(slice(BATCH))
    env = gym.make(ENV_ID)
    current = [env.reset(seed=0)[0]]

    def loop() -> None:
        for _ in range(LOOP_STEPS):
            act = np.asarray(algorithm.get_action(next(keys), current[0].astype(np.float32)))
            current[0], _, terminated, truncated, _ = env.step(act.clip(-1, 1))
            if terminated or truncated:
                current[0] = env.reset()[0]
            algorithm.update(next(keys), minibatch(rng.integers(size, size=BATCH)))

    return {
        "update": lambda: algorithm.update(next(keys), data),
        "predict 1": lambda: algorithm.get_action(next(keys), obs[0]),
        "predict 256": lambda: algorithm.get_action(next(keys), obs[:BATCH]),
        "loop": loop,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reference-python", help="interpreter of the reference's environment")
    parser.add_argument("--reference-dir", default="", help="clone of the reference's repository")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(reference_tasks(args.reference_dir) if args.worker == "reference" else sb3_tasks(args.worker))
        return
    pythons = dict.fromkeys(("nclql", "nclql-bf16", "sac"), sys.executable)
    if args.reference_python:
        pythons["reference"] = args.reference_python
    commands = {
        name: [python, __file__, "--worker", name, "--reference-dir", args.reference_dir] for name, python in pythons.items()
    }
    rows = [
        (round_, name, task, ms / LOOP_STEPS if task == "loop" else ms)
        for round_, name, task, ms in measure(commands, TASKS, args.rounds, THREADS)
    ]
    versions = {}
    if args.reference_python:
        code = "import jax; print(jax.__version__)"
        done = subprocess.run([args.reference_python, "-c", code], capture_output=True, text=True, check=True)
        versions["jax (reference)"] = done.stdout.strip()
    command = "python benchmarks/speed.py" + (" --reference-python PYTHON --reference-dir CLONE" if args.reference_python else "")
    write("speed", rows, ("nclql", "nclql-bf16"), {"threads": THREADS, "rounds": args.rounds}, command, versions)


if __name__ == "__main__":
    main()
