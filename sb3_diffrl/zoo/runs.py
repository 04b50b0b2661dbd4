"""Folders of runs: found, opened without running what they hold, and their agents loaded for evaluation."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import ALGOS, create_test_env, get_latest_run_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack

from sb3_diffrl.configs import KNOWN_PACKAGES, UnsafeConfigError, dump_yaml, load_settings, named, nearest, resolve, settings
from sb3_diffrl.offline.spaces import check_same_spaces
from sb3_diffrl.saving.model import SafeSaving
from sb3_diffrl.zoo.datasets import register_dataset
from sb3_diffrl.zoo.names import check_wrappers
from sb3_diffrl.zoo.statistics import load_statistics
from sb3_diffrl.zoo.wrappers import WrapperEntry, as_env_wrapper, joined

# Wrappers that need frames.
_RENDERING = ("RecordVideo", "RenderCollection", "HumanRendering", "AddRenderObservation")


@dataclass(frozen=True)
class Run:
    """A folder that RL Zoo or this package trained in.

    :param folder: ``logs/<algo>/<Env>_<n>``
    :param params: the folder in it that has the configuration
    :param algo: name of the algorithm in RL Zoo's table
    :param env_id: as Gymnasium takes it, with ``package:`` before it if that registers it
    :param hyperparams: settings of the run
    :param args: command line of the run
    """

    folder: Path
    params: Path
    algo: str
    env_id: str
    hyperparams: dict[str, Any]
    args: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Read a run's configuration as data, whoever wrote it.

        :raises FileNotFoundError: if the folder is not a run's
        :raises UnsafeConfigError: if the configuration holds code
        :raises ValueError: if it is damaged, or of an algorithm that there is none of
        """
        folder = Path(folder)
        found = sorted(folder.glob("*/args.yml"))
        if len(found) != 1:
            raise FileNotFoundError(f"{folder} is not the folder of a run: it has no <Env>/args.yml. Runs are in logs/<algo>.")
        args, hyperparams = load_settings(found[0]), load_settings(found[0].with_name("config.yml"))
        for name, values in (("algo", args), ("env", args), ("dataset", hyperparams)):
            if not isinstance(values.get(name), str) and not (name == "dataset" and values.get(name) is None):
                raise ValueError(f"{found[0].parent} is not the folder of a run: its configuration does not say what `{name}` is.")
        check_algo(args["algo"])
        return cls(folder, found[0].parent, args["algo"], args["env"], hyperparams, args)

    @property
    def dataset(self) -> str | None:
        """Id of the dataset of an offline agent."""
        return self.hyperparams.get("dataset")

    def register_env(self, trust: bool = False) -> str:
        """Make sure that Gymnasium knows the env, and return its id.

        :param trust: the run's configuration may name any package to import
        :raises ValueError: if it does not; the message names the nearest
        """
        if self.env_id not in gym.registry and self.dataset is not None:
            register_dataset(self.dataset)
        return import_env(self.env_id, trust)

    def model_path(self, best: bool = False, checkpoint: int | None = None) -> Path:
        """Where a model of the run is: the last, the best evaluated, or a checkpoint at a step.

        :raises FileNotFoundError: if there is none, with what there is
        """
        name = "best_model" if best else self.params.name if checkpoint is None else f"rl_model_{checkpoint}_steps"
        path = self.folder / f"{name}.zip"
        if not path.exists():
            others = ", ".join(sorted(other.name for other in self.folder.glob("*.zip"))) or "none"
            raise FileNotFoundError(f"There is no {path}. Models in the folder: {others}.")
        return path

    def load(self, path: Path, env: VecEnv, device: str = "auto", seed: int = 0, trust: bool = False) -> BaseAlgorithm:
        """Load an agent for evaluation.

        :param path: see ``model_path()``
        :param env: what it will see, for a check
        :param device: where to compute
        :param seed: seed of its random actions
        :param trust: load the agent as SB3 does, running what the file holds: for policies of your own, and for SB3's algorithms
        :raises UnsafeConfigError: if it is of an algorithm of SB3, and not trusted
        :raises ValueError: if its spaces are not the env's
        """
        check_trusted(self.algo, path, trust)
        # A buffer is not needed to act; off-policy algorithms alone have one.
        extra: dict[str, Any] = {"buffer_size": 1} if hasattr(ALGOS[self.algo], "load_replay_buffer") else {}
        if extra and self.hyperparams.get("optimize_memory_usage"):
            extra["optimize_memory_usage"] = False
        if "HerReplayBuffer" in str(self.hyperparams.get("replay_buffer_class", "")):
            extra = {"env": env}  # hindsight needs its rewards
        if trust and is_safe(self.algo):
            extra["trusted"] = True
        model: BaseAlgorithm = ALGOS[self.algo].load(path, device=device, **extra)
        try:
            check_same_spaces(
                "the agent", [model.observation_space, model.action_space], "the env", [env.observation_space, env.action_space]
            )
        except ValueError as error:
            hint = "Wrappers that change spaces belong in training, too: train --wrapper."
            if self.dataset is not None:
                hint = "An agent that learned from a dataset sees what the dataset holds: no wrapper may change spaces."
            raise ValueError(f"{error} {hint}") from None
        model.set_random_seed(seed)
        return model

    def make_env(
        self, wrappers: WrapperEntry = None, n_envs: int = 1, seed: int = 0, render_mode: str | None = None, trust: bool = False
    ) -> VecEnv:
        """The run's env, as it was in training: its arguments, wrappers and normalisation, frozen; then further wrappers.

        :param wrappers: RL Zoo's ``env_wrapper``, put around the run's own, inside ``Monitor``
        :param n_envs: envs in this process
        :param seed: of the first env, the others follow
        :param render_mode: Gymnasium's; ``"rgb_array"`` where a wrapper needs frames
        :param trust: the run's configuration may name code of any package, and its statistics may be a pickle
        :raises UnsafeConfigError: if they need it
        """
        hyperparams = resolve(self.hyperparams, trust)
        stack = joined(hyperparams.get("env_wrapper"), wrappers)
        check_wrappers(stack)
        if render_mode is None and any(name.rpartition(".")[2] in _RENDERING for name, _ in named(stack, "env_wrapper")):
            render_mode = "rgb_array"
        env_kwargs: dict[str, Any] = {}
        for where in (hyperparams, self.args):
            env_kwargs |= settings(where.get("env_kwargs") or {}, "`env_kwargs`")
        if render_mode is not None:
            env_kwargs["render_mode"] = render_mode
        wrapped: dict[str, Any] = {"env_wrapper": as_env_wrapper(stack)}
        if hyperparams.get("vec_env_wrapper"):
            wrapped["vec_env_wrapper"] = hyperparams["vec_env_wrapper"]
        env = create_test_env(
            self.register_env(trust),
            n_envs=n_envs,
            seed=seed,
            should_render=False,
            hyperparams=wrapped,
            env_kwargs=env_kwargs,
            vec_env_cls=DummyVecEnv,
        )
        if hyperparams.get("normalize"):
            env = load_statistics(self.params, env, trust)
            env.training = env.norm_reward = False
        return VecFrameStack(env, int(hyperparams["frame_stack"])) if hyperparams.get("frame_stack") else env


def import_env(env_id: str, trust: bool = False) -> str:
    """Make sure that Gymnasium knows an env: ``Env-v0``, or ``package:Env-v0`` for one that a package registers.

    :param env_id: Gymnasium-Robotics' need no package before them
    :param trust: import whatever package it names
    :return: the id without package
    :raises UnsafeConfigError: if the package is not a known one, and not trusted
    :raises ValueError: if there is no such package or env; the message names the nearest
    """
    package, _, name = env_id.rpartition(":")
    if not trust and not _is_known(package):
        raise UnsafeConfigError(f"Importing the package of the env {env_id} can run any code. If you trust it: --trust.")
    hint = ""
    if package or name not in gym.registry:
        try:
            importlib.import_module(package or "gymnasium_robotics")
        except ImportError as error:
            if package and package != "gymnasium_robotics":
                raise ValueError(f"The package of {env_id} cannot be imported: {error}.") from error
            hint = ' Those of Gymnasium-Robotics need: pip install "sb3_diffrl[robotics]".'
    if name not in gym.registry:
        raise ValueError(f"Gymnasium knows no environment {name!r}.{nearest(name, gym.registry)}{hint}")
    return name


def check_algo(algo: str) -> None:
    """Make sure that there is an algorithm of this name.

    :raises ValueError: if there is not; the message names the nearest
    """
    if algo not in ALGOS:
        raise ValueError(f"There is no algorithm {algo!r}: they are {', '.join(ALGOS)}.{nearest(algo, ALGOS)}")


def is_safe(algo: str) -> bool:
    """Whether models of an algorithm are loaded without running what their files hold: this package's are."""
    return issubclass(ALGOS[algo], SafeSaving)


def trust_option(algo: str, env_id: str) -> str:
    """What a command about a run of an algorithm on an env has to say, `` --trust`` or nothing."""
    return "" if is_safe(algo) and _is_known(env_id.rpartition(":")[0]) else " --trust"


def _is_known(package: str) -> bool:
    return not package or package.split(".")[0] in KNOWN_PACKAGES


def check_trusted(algo: str, path: Path, trust: bool) -> None:
    """Make sure that a model may be loaded.

    :raises UnsafeConfigError: if loading it can run any code, and it is not trusted
    """
    if not trust and not is_safe(algo):
        raise UnsafeConfigError(
            f"{path} is a model of {algo}, which Stable-Baselines3 un-pickles: it can run any code. If you trust it: --trust."
        )


def find_run(logs: Path, algo: str, env_id: str, number: int = 0) -> Path:
    """Folder of a run.

    :param logs: folder of all runs
    :param algo: name of the algorithm
    :param env_id: id of the env or of the dataset
    :param number: of the run, 0 for the latest
    :raises FileNotFoundError: if there is none; the message names the nearest
    """
    check_algo(algo)
    name = EnvironmentName(env_id.rpartition(":")[2])  # slashes are dashes in it, which makes a dataset's id its env's
    latest = number or get_latest_run_id(str(logs / algo), name)
    folder = logs / algo / f"{name}_{latest}"
    if not folder.is_dir():
        there = sorted(path.name for path in (logs / algo).glob("*") if path.is_dir())
        raise FileNotFoundError(f"No run of {algo} on {env_id} in {logs}.{nearest(name, there)}")
    return folder


def write_entry(hyperparams: dict[str, Any], task: str, path: Path) -> None:
    """Write settings as a YAML file that ``train --config`` reads."""
    dump_yaml({task: hyperparams}, path)
