"""Time of the planner's updates and of one env step, for this package and (optionally) CleanDiffuser's Diffusion Veteran.

    python benchmarks/planning_speed.py --cleandiffuser-python VENV/bin/python --cleandiffuser-dir CLONE

Same sizes, those of the papers: width 256, depth 2, batch 128, 20 denoising steps a plan and 10 an action. ``mujoco``: 17
observations, 6 actions, horizon 4; ``maze``: 4 observations, 2 actions, horizon 32. Two threads; random data. ``plan`` is one
plan and its action, ``mcss`` the same with 50 candidates, ``update`` a gradient step of planner, critic and inverse dynamics.
``plan of 16`` is a plan and an action for each of 16 envs at once, ``pg`` (the package's alone) an action of Prior Guidance.
``products`` multiplies what the chain of a plan multiplies, for all its denoising steps at once: the arithmetic alone, in torch.
``cpu`` is the `cpu` preset of the mazes on one thread, ``cpu2`` on two. Run it while nothing else runs; quote the ratios.

CleanDiffuser is https://github.com/CleanDiffuserTeam/CleanDiffuser; its environment needs torch, einops and torchvision. Writes
``results/planning_speed.csv`` (a row a round, contestant and task) and ``planning_speed.json``.
"""

import argparse
import sys
from typing import Any

from contest import Task, measure, serve, write

SIZES = {"mujoco": (17, 6, 4, 32), "maze": (4, 2, 32, 64)}  # observations, actions, horizon, size of a head
WIDTH, BATCH, CANDIDATES, ENVS, THREADS = 256, 128, 50, 16, 2
PLAN_STEPS, ACTION_STEPS = 20, 10


def own_model(obs_dim: int, action_dim: int, horizon: int, **settings: Any) -> Any:
    from synthetic import random_dataset

    from sb3_diffrl.pg import PG

    dataset = random_dataset(50, 200, obs_dim, action_dim)
    return PG("MlpPolicy", dataset=dataset, seed=0, device="cpu", horizon=horizon, **settings)


def own_tasks(preset: str) -> dict[str, Task]:
    import numpy as np
    import torch as th

    from sb3_diffrl.planner import PRESETS

    th.set_num_threads(1 if preset == "cpu" else THREADS)
    if preset not in SIZES:
        obs_dim, settings = 4, dict(PRESETS["pointmaze"]["cpu"])
        model = own_model(obs_dim, 2, settings.pop("horizon"), **settings)
    else:
        obs_dim, action_dim, horizon, head_dim = SIZES[preset]
        policy_kwargs = {"d_model": WIDTH, "head_dim": head_dim}
        model = own_model(obs_dim, action_dim, horizon, policy_kwargs=policy_kwargs, batch_size=BATCH)
    obs = np.random.default_rng(1).normal(size=(ENVS, obs_dim)).astype(np.float32)

    def predict(guidance: str, n: int) -> Task:
        def task() -> None:
            model.guidance = guidance
            model.predict(obs[:n])

        return task

    tasks = {"plan": predict("none", 1), "mcss": predict("mcss", 1), "pg": predict("pg", 1), "update": model.update}
    tasks[f"plan of {ENVS}"] = predict("none", ENVS)
    return {f"{preset} {name}": task for name, task in tasks.items()}


def product_tasks(preset: str) -> dict[str, Task]:
    """The products that the planner's chains are made of, those of all denoising steps at once, as no chain can."""
    import torch as th

    from sb3_diffrl.planner import PRESETS

    th.set_num_threads(1 if preset == "cpu" else THREADS)
    if preset in SIZES:
        obs_dim, _, length, _ = SIZES[preset]
        d = WIDTH
    else:
        settings = PRESETS["pointmaze"]["cpu"]
        obs_dim, length, d = 4, settings["horizon"], settings["policy_kwargs"]["d_model"]

    def multiply(n_plans: int) -> Task:
        block, last = length, length - 1  # in the last block and the output, all steps of a plan but the present state
        shapes = [(block, obs_dim, d), (last, d, obs_dim)]
        for kept in (block, last):
            shapes += [(block, d, 2 * d), (kept, d, d), (kept, d, d), (kept, d, 4 * d), (kept, 4 * d, d)]
        layers = [(th.randn(PLAN_STEPS * n_plans * rows, n_in), th.randn(n_out, n_in)) for rows, n_in, n_out in shapes]

        def task() -> None:
            for x, weight in layers:
                th.nn.functional.linear(x, weight)

        return task

    return {f"{preset} plan": multiply(1), f"{preset} plan of {ENVS}": multiply(ENVS)}


def cleandiffuser_tasks(preset: str, folder: str) -> dict[str, Task]:
    sys.path.insert(0, folder)
    import torch as th
    from cleandiffuser.diffusion import ContinuousDiffusionSDE, DiscreteDiffusionSDE
    from cleandiffuser.nn_condition import IdentityCondition
    from cleandiffuser.nn_diffusion import DiT1d, DVInvMlp
    from cleandiffuser.utils import DVHorizonCritic

    th.set_num_threads(THREADS)
    obs_dim, action_dim, horizon, head_dim = SIZES[preset]
    heads = WIDTH // head_dim
    fixed = th.zeros(horizon, obs_dim)
    fixed[0] = 1
    network = DiT1d(obs_dim, emb_dim=128, d_model=WIDTH, n_heads=heads, depth=2, timestep_emb_type="fourier")
    planner = ContinuousDiffusionSDE(network, None, fix_mask=fixed, ema_rate=0.9999, device="cpu", noise_schedule="linear")
    critic = DVHorizonCritic(obs_dim, emb_dim=128, d_model=WIDTH, n_heads=heads, depth=2, norm_type="pre")
    optimizer = th.optim.Adam(critic.parameters(), lr=3e-4)
    limits = {"x_max": th.ones(1, action_dim), "x_min": -th.ones(1, action_dim)}
    policy = DiscreteDiffusionSDE(
        DVInvMlp(obs_dim, action_dim, emb_dim=64, hidden_dim=256, timestep_emb_type="positional"),
        IdentityCondition(dropout=0.0),
        optim_params={"lr": 3e-4},
        diffusion_steps=ACTION_STEPS,
        ema_rate=0.995,
        device="cpu",
        **limits,
    )
    windows, values = th.randn(BATCH, horizon, obs_dim), th.randn(BATCH, 1)
    actions, pairs = th.rand(BATCH, action_dim) * 2 - 1, th.randn(BATCH, 2 * obs_dim)

    def update() -> None:
        planner.update(windows)
        loss = th.nn.functional.mse_loss(critic(windows), values)
        loss.item()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        policy.update(actions, pairs)

    def act(n_envs: int, n_candidates: int) -> Task:
        obs = th.randn(n_envs, obs_dim)
        prior, start = th.zeros(n_envs * n_candidates, horizon, obs_dim), th.zeros(n_envs, action_dim)
        prior[:, 0] = obs.repeat_interleave(n_candidates, dim=0)

        def task() -> None:
            plans, _ = planner.sample(prior, solver="ddim", n_samples=len(prior), sample_steps=PLAN_STEPS, w_cfg=1.0)
            with th.no_grad():
                plans = plans[critic(plans)[:, 0].argmax()][None] if n_candidates > 1 else plans
            pairs = th.cat([obs, plans[:, 1]], dim=1)
            policy.sample(
                start, solver="ddpm", n_samples=n_envs, sample_steps=ACTION_STEPS, condition_cfg=pairs, w_cfg=1.0, temperature=0.5
            )

        return task

    tasks = {"plan": act(1, 1), "mcss": act(1, CANDIDATES), f"plan of {ENVS}": act(ENVS, 1), "update": update}
    return {f"{preset} {name}": task for name, task in tasks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cleandiffuser-python", help="interpreter of CleanDiffuser's environment")
    parser.add_argument("--cleandiffuser-dir", default="", help="clone of CleanDiffuser's repository")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, preset = args.worker
        makers = {"sb3_diffrl": own_tasks, "products": product_tasks}
        serve(makers[name](preset) if name in makers else cleandiffuser_tasks(preset, args.cleandiffuser_dir))
        return
    pythons = {"sb3_diffrl": sys.executable, "products": sys.executable}
    if args.cleandiffuser_python:
        pythons["cleandiffuser"] = args.cleandiffuser_python
    rows = []
    for preset in (*SIZES, "cpu", "cpu2"):
        commands = {
            name: [python, __file__, "--worker", name, preset, "--cleandiffuser-dir", args.cleandiffuser_dir]
            for name, python in pythons.items()
            if name != "cleandiffuser" or preset in SIZES
        }
        everyone, both, updates = tuple(commands), ("sb3_diffrl", "cleandiffuser"), 5 if preset == "maze" else 15
        tasks = [("plan", 10, everyone), (f"plan of {ENVS}", 5, everyone), ("mcss", 2, both), ("update", updates, both)]
        tasks += [("pg", 10, both[:1])]
        rows += measure(commands, [(f"{preset} {task}", count, names) for task, count, names in tasks], args.rounds, THREADS)
    command = "python benchmarks/planning_speed.py"
    if args.cleandiffuser_python:
        command += " --cleandiffuser-python PYTHON --cleandiffuser-dir CLONE"
    arguments = {"threads": THREADS, "rounds": args.rounds, "batch": BATCH, "width": WIDTH}
    write("planning_speed", rows, ["sb3_diffrl"], arguments, command, {})


if __name__ == "__main__":
    main()
