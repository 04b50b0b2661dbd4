"""``train`` and ``tune``."""

import argparse
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sb3_diffrl.cli.arguments import Entries, Subparsers, add_compute, add_logs, add_wrappers
from sb3_diffrl.configs import load_settings, settings

if TYPE_CHECKING:
    from sb3_diffrl.zoo.experiment import Experiment

TRAIN_EXAMPLES = """examples:
  sb3-diffrl train --algo nclql --env Pendulum-v1
  sb3-diffrl train --algo nclql --env HalfCheetah-v5 --params learning_rate:1e-3 "policy_kwargs:dict(net_arch=[64, 64])"
  sb3-diffrl train --algo pg --dataset sb3-diffrl/pointmaze/umaze-v0 --params preset:pointmaze/paper
  sb3-diffrl train --algo nclql --env my-package:MyEnv-v0 --config my_settings.yml
  sb3-diffrl train --resume logs/nclql/Pendulum-v1_1      go on with a run that was stopped
  sb3-diffrl train --from logs/nclql/Pendulum-v1_1        repeat a run, in a new folder"""

#: Options that a run is repeated and gone on with, unless they are given anew.
RECALLED = ["eval_freq", "eval_episodes", "n_eval_envs", "vec_env", "save_freq", "save_replay_buffer", "log_interval"]
RECALLED += ["device", "num_threads"]

TUNE_EXAMPLES = """examples:
  sb3-diffrl tune --algo nclql --env Pendulum-v1 --n-trials 50 -n 5000
  sb3-diffrl tune --algo nclql --env Pendulum-v1 --storage shared/study.log --study-name pendulum     (on several machines)"""


def add_commands(commands: Subparsers) -> None:
    """Add the two commands."""
    form = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser(
        "train", help="train an agent", description="Train an agent, by RL Zoo.", epilog=TRAIN_EXAMPLES, formatter_class=form
    )
    _add_task(train)
    go_on = train.add_argument_group("earlier runs")
    go_on.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped, in its folder")
    go_on.add_argument("--from", dest="source", type=Path, metavar="RUN", help="repeat a run with its settings and seed")
    train.add_argument("--eval-freq", type=int, default=10_000, help="steps between evaluations, -1 for none (default: 10000)")
    train.add_argument("--save-freq", type=int, default=-1, help="steps between checkpoints (default: none)")
    train.add_argument("--save-replay-buffer", action="store_true", help="save the replay buffer at the end, too")
    train.add_argument("-tb", "--tensorboard-log", default="", metavar="FOLDER", help="log for TensorBoard there")
    train.add_argument("--log-interval", type=int, default=-1, help="episodes (offline: gradient steps) between logs")
    train.add_argument("--no-progress", action="store_true", help="no progress bar")
    train.set_defaults(run=run_train, default_of=train.get_default)

    tune = commands.add_parser(
        "tune",
        help="search for settings with Optuna",
        description="Search for settings with Optuna, by RL Zoo. The best are written as YAML that 'train --config' reads. A study "
        "goes on where it stopped if it is named again (--storage, --study-name).",
        epilog=TUNE_EXAMPLES,
        formatter_class=form,
    )
    _add_task(tune)
    tune.add_argument("--n-trials", type=int, default=50, help="trials of this process (default: 50)")
    tune.add_argument("--max-total-trials", type=int, help="trials of all processes on the study together")
    tune.add_argument("--n-jobs", type=int, default=1, help="trials at a time, in threads (default: 1)")
    tune.add_argument("--sampler", choices=["random", "tpe", "auto"], default="tpe", help="default: tpe")
    tune.add_argument("--pruner", choices=["halving", "median", "none"], default="median", help="default: median")
    tune.add_argument("--n-startup-trials", type=int, default=10, help="random trials before the sampler takes over")
    tune.add_argument("--n-evaluations", type=int, default=5, help="evaluations in a trial, at which it may be pruned (default: 5)")
    tune.add_argument("--storage", help="sqlite:///file.db, a database's address, or a file.log on a shared disk")
    tune.add_argument("--study-name", help="name in the storage (default: <algo>-<env>)")
    tune.set_defaults(run=run_tune)


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--algo", metavar="NAME", help="nclql, lql, pg, planner, diffusion_bc, or one of RL Zoo's (sac, ppo ...)")
    parser.add_argument(
        "--env",
        metavar="ID",
        help="id of a Gymnasium environment, package:Env-v0 if a package registers it; for offline agents, where to evaluate",
    )
    parser.add_argument("--dataset", metavar="ID", help="id of a Minari dataset on disk, for offline agents")
    parser.add_argument("-n", "--n-timesteps", type=int, default=-1, help="env steps; offline, gradient steps")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="your own YAML file of settings by task")
    parser.add_argument(
        "-p", "--params", nargs="+", action=Entries, metavar="NAME:VALUE", help="settings that go before the file's"
    )
    parser.add_argument("--env-kwargs", nargs="+", action=Entries, metavar="NAME:VALUE", help="arguments of the environment")
    parser.add_argument("--seed", type=int, default=-1, help="default: a random one, which is recorded")
    parser.add_argument("--eval-episodes", type=int, default=5, help="episodes of an evaluation (default: 5)")
    parser.add_argument("--n-eval-envs", type=int, default=1, help="envs of an evaluation (default: 1)")
    parser.add_argument("--vec-env", choices=["dummy", "subproc"], default="dummy", help="envs in this process or their own")
    parser.add_argument("-v", "--verbose", type=int, default=1, help="0 quiet, 1 information, 2 debugging (default: 1)")
    add_logs(parser)
    add_wrappers(parser)
    add_compute(parser)


def run_train(args: argparse.Namespace) -> int:
    """``train``."""
    _recall(args)
    experiment = _experiment(args, optimize=False)
    from sb3_diffrl.zoo.runs import trust_option

    trust = trust_option(args.algo, args.env)
    setup = experiment.setup_experiment()
    assert setup is not None
    model = setup[0]
    try:
        experiment.learn(model)
        experiment.save_trained_model(model)
    except Exception:
        print(experiment.rescue(model), file=sys.stderr)
        raise
    folder = experiment.save_path
    if experiment.interrupted:
        print(f"Stopped at step {model.num_timesteps} of {experiment.n_timesteps}; saved in {folder}")
        print(f"Go on with: sb3-diffrl train --resume {folder}{trust}")
        return 128 + experiment.interrupted
    print(f"Trained for {model.num_timesteps} steps. Evaluate with: sb3-diffrl evaluate {folder}{trust}")
    return 0


def run_tune(args: argparse.Namespace) -> int:
    """``tune``."""
    from sb3_diffrl.zoo.runs import write_entry
    from sb3_diffrl.zoo.spaces import CONVERTERS

    experiment = _experiment(args, optimize=True)
    experiment.setup_experiment()
    experiment._save_config(experiment.saved_hyperparams)
    folder = Path(experiment.save_path)
    experiment.storage = args.storage or str(folder / "study.log")
    experiment.study_name = args.study_name or f"{args.algo}-{experiment.env_name}"
    again = f"sb3-diffrl tune --algo {args.algo} ... --storage {experiment.storage} --study-name {experiment.study_name}"
    with _NotedInterrupt() as interrupt:
        try:
            experiment.hyperparameters_optimization()
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            print(f"No trial was completed. Go on with: {again}", file=sys.stderr)
            return 128 + interrupt.noted if interrupt.noted else 1
    study = experiment.load_trial(experiment.storage, experiment.study_name, convert=False)
    best = CONVERTERS[args.algo](study) if args.algo in CONVERTERS else study
    task = args.dataset or experiment.env_name.gym_id
    entry = {**experiment.saved_hyperparams, **best, "n_timesteps": experiment.n_timesteps}
    write_entry(entry, task, folder / "best.yml")
    print(
        f"Best settings: {folder / 'best.yml'}. Train with: sb3-diffrl train --algo {args.algo} ... --config {folder / 'best.yml'}"
    )
    print(f"Search on with: {again}")
    return 128 + interrupt.noted if interrupt.noted else 0


class _Interrupt(KeyboardInterrupt):
    # A plain one that crosses an `exec`, as those within `dataclass`, lets `python -m` end by SIGINT whatever the exit code.
    pass


class _NotedInterrupt:
    """Notes a Ctrl-C, which RL Zoo keeps to itself, and takes SIGTERM for one."""

    #: Number of the signal that came, 0 if none
    noted = 0

    def __enter__(self) -> "_NotedInterrupt":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.noted = number
        raise _Interrupt


def _recall(args: argparse.Namespace) -> None:
    """Fill in the arguments from the run that ``--resume`` or ``--from`` names."""
    args.entry = None
    source = args.resume or args.source
    if source is None:
        return
    from sb3_diffrl.zoo.datasets import dataset_env_id
    from sb3_diffrl.zoo.runs import Run

    if args.algo or args.env or args.dataset or args.config:
        raise ValueError("--resume and --from take everything from the run: leave --algo, --env, --dataset and --config out.")
    run = Run.open(source)
    args.algo, args.entry, args.dataset = run.algo, run.params / "config.yml", run.dataset
    args.env = None if run.dataset is not None and run.env_id == dataset_env_id(run.dataset) else run.env_id
    recorded = load_settings(run.params / "run.yml")
    if args.seed < 0:
        args.seed = _recorded(recorded, "seed", int)
    if args.n_timesteps <= 0:
        args.n_timesteps = _recorded(recorded, "n_timesteps", int)
    for name in RECALLED:
        # What was typed comes first.
        if name in run.args and getattr(args, name) == args.default_of(name):
            setattr(args, name, _recorded(run.args, name, type(getattr(args, name))))
    args.env_kwargs = {**settings(run.args.get("env_kwargs") or {}, "`env_kwargs`"), **(args.env_kwargs or {})} or None
    if args.resume is not None:
        args.logs = run.folder.parent.parent
        if args.params or args.wrapper:
            raise ValueError("--resume goes on with the run as it is: leave --params and --wrapper out, or start from it: --from.")


def _recorded(values: dict[str, Any], name: str, kind: type) -> Any:
    if type(values.get(name)) is not kind:
        raise ValueError(f"The run's folder does not say what `{name}` is, {kind.__name__} (args.yml, run.yml).")
    return values[name]


def _experiment(args: argparse.Namespace, optimize: bool) -> "Experiment":
    import numpy as np
    import torch as th
    from stable_baselines3.common.utils import set_random_seed

    if args.algo is None or (args.env is None and args.dataset is None):
        raise ValueError("Name an algorithm and a task: --algo with --env or --dataset. 'sb3-diffrl list' shows them.")
    from sb3_diffrl.zoo import Experiment
    from sb3_diffrl.zoo.datasets import register_dataset
    from sb3_diffrl.zoo.runs import check_algo, import_env

    check_algo(args.algo)
    _check_kind(args)
    if args.env is None:
        args.env = register_dataset(args.dataset)
    # What was typed on the command line is the user's own word, what a run's folder says is not.
    env_id = import_env(args.env, args.trust or getattr(args, "entry", None) is None)
    if getattr(args, "tensorboard_log", ""):
        _check_tensorboard()
    if args.config is not None and not args.config.is_file():
        raise FileNotFoundError(f"There is no file {args.config}.")
    if args.seed < 0:
        args.seed = int(np.random.default_rng().integers(2**31))
    set_random_seed(args.seed)
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)
    resumed = getattr(args, "resume", None)
    shared: dict[str, Any] = {
        "tensorboard_log": "" if optimize else args.tensorboard_log,
        "n_timesteps": args.n_timesteps,
        "n_eval_episodes": args.eval_episodes,
        "hyperparams": args.params,
        "env_kwargs": args.env_kwargs,
        "seed": args.seed,
        "verbose": args.verbose,
        "vec_env_type": args.vec_env,
        "n_eval_envs": args.n_eval_envs,
        "device": args.device,
        "config": None if args.config is None else str(args.config),
    }
    if optimize:
        return Experiment(
            args,
            args.algo,
            env_id,
            str(args.logs),
            optimize_hyperparameters=True,
            n_trials=args.n_trials,
            max_total_trials=args.max_total_trials,
            n_jobs=args.n_jobs,
            sampler=args.sampler,
            pruner=args.pruner,
            n_startup_trials=args.n_startup_trials,
            n_evaluations=args.n_evaluations,
            no_optim_plots=True,
            **shared,
        )
    return Experiment(
        args,
        args.algo,
        env_id,
        str(args.logs),
        eval_freq=args.eval_freq,
        save_freq=args.save_freq,
        save_replay_buffer=args.save_replay_buffer,
        log_interval=args.log_interval,
        trained_agent="" if resumed is None else str(_resumable(resumed)),
        show_progress=not args.no_progress and sys.stderr.isatty(),
        **shared,
    )


def _check_tensorboard() -> None:
    if find_spec("tensorboard") is None:
        raise ImportError('TensorBoard is not installed: pip install "sb3_diffrl[tensorboard]"')


def _check_kind(args: argparse.Namespace) -> None:
    from rl_zoo3.utils import ALGOS

    from sb3_diffrl.offline import OfflineAlgorithm

    offline = issubclass(ALGOS[args.algo], OfflineAlgorithm)
    in_config = args.config is not None or getattr(args, "entry", None) is not None
    if offline and args.dataset is None and "dataset" not in (args.params or {}) and not in_config:
        raise ValueError(f"{args.algo} learns from a dataset: name it, --dataset. 'sb3-diffrl dataset list' shows those on disk.")
    if not offline and args.dataset is not None:
        raise ValueError(f"{args.algo} learns online: --env, not --dataset.")


def _resumable(folder: Path) -> Path:
    """The newest model of a stopped run: as it was saved then, or its last checkpoint."""
    from sb3_diffrl.zoo.runs import Run

    run = Run.open(folder)
    final = folder / f"{run.params.name}.zip"
    checkpoints = sorted(folder.glob("rl_model_*_steps.zip"), key=lambda path: int(path.stem.split("_")[2]))
    if final.exists():
        return final
    if checkpoints:
        return checkpoints[-1]
    raise FileNotFoundError(f"{folder} has no model to go on with. Start anew with its settings: sb3-diffrl train --from {folder}")
