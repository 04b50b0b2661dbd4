"""Folders of runs: found, opened without running what they hold, and their agents loaded for evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import ALGOS, create_test_env, get_latest_run_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_diffrl.configs import dump_yaml, imported_names, load_yaml, nearest, resolve
from sb3_diffrl.offline.spaces import check_same_spaces
from sb3_diffrl.saving.model import SafeSaving
from sb3_diffrl.zoo.datasets import register_dataset
from sb3_diffrl.zoo.wrappers import WrapperEntry, as_env_wrapper, joined

# Wrappers that need frames.
_RENDERING = ("RecordVideo", "RenderCollection", "HumanRendering", "AddRenderObservation")


@dataclass(frozen=True)
class Run:
    """A folder that RL Zoo or this package trained in.

    :param folder: ``logs/<algo>/<Env>_<n>``
    :param params: the folder in it that has the configuration
    :param algo: name of the algorithm in RL Zoo's table
    :param env_id: as Gymnasium knows it
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
        """
        folder = Path(folder)
        found = sorted(folder.glob("*/args.yml"))
        if len(found) != 1:
            raise FileNotFoundError(f"{folder} is not the folder of a run: it has no <Env>/args.yml. Runs are in logs/<algo>.")
        args, hyperparams = load_yaml(found[0]), load_yaml(found[0].with_name("config.yml"))
        return cls(folder, found[0].parent, args["algo"], str(args["env"]), dict(hyperparams), dict(args))

    @property
    def dataset(self) -> str | None:
        """Id of the dataset of an offline agent."""
        return self.hyperparams.get("dataset")

    def register_env(self) -> str:
        """Make sure that Gymnasium knows the env, and return its id.

        :raises ValueError: if it does not; the message names the nearest
        """
        if self.env_id not in gym.registry and self.dataset is not None:
            register_dataset(self.dataset)
        check_env(self.env_id)
        return self.env_id

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
        :param trust: load the package's agents as SB3 does, running what the file holds: for policies of your own
        :raises ValueError: if its spaces are not the env's
        """
        # A buffer is not needed to act; off-policy algorithms alone have one.
        extra: dict[str, Any] = {"buffer_size": 1} if hasattr(ALGOS[self.algo], "load_replay_buffer") else {}
        if extra and self.hyperparams.get("optimize_memory_usage"):
            extra["optimize_memory_usage"] = False
        if "HerReplayBuffer" in str(self.hyperparams.get("replay_buffer_class", "")):
            extra = {"env": env}  # hindsight needs its rewards
        if trust and issubclass(ALGOS[self.algo], SafeSaving):
            extra["trusted"] = True
        model: BaseAlgorithm = ALGOS[self.algo].load(path, device=device, **extra)
        try:
            check_same_spaces(
                "the agent", [model.observation_space, model.action_space], "the env", [env.observation_space, env.action_space]
            )
        except ValueError as error:
            raise ValueError(f"{error} Wrappers that change spaces belong in training, too: train --wrapper.") from None
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
        :param trust: the run's configuration may name code of any package
        """
        hyperparams = resolve(self.hyperparams, trust)
        stack = joined(hyperparams.get("env_wrapper"), wrappers)
        if render_mode is None and any(name.rpartition(".")[2] in _RENDERING for name in imported_names(stack)):
            render_mode = "rgb_array"
        env_kwargs = {**(hyperparams.get("env_kwargs") or {}), **(self.args.get("env_kwargs") or {})}
        if render_mode is not None:
            env_kwargs["render_mode"] = render_mode
        normalize = hyperparams.get("normalize", False)
        kept: dict[str, Any] = {key: hyperparams[key] for key in ("frame_stack", "vec_env_wrapper") if key in hyperparams}
        return create_test_env(
            self.register_env(),
            n_envs=n_envs,
            stats_path=str(self.params),
            seed=seed,
            should_render=False,
            hyperparams={
                **kept,
                "env_wrapper": as_env_wrapper(stack),
                "normalize": bool(normalize),
                "normalize_kwargs": normalize if isinstance(normalize, dict) else {},
            },
            env_kwargs=env_kwargs,
            vec_env_cls=DummyVecEnv,
        )


def check_env(env_id: str) -> None:
    """Make sure that Gymnasium knows an env.

    :raises ValueError: if it does not; the message names the nearest
    """
    if env_id not in gym.registry:
        raise ValueError(f"Gymnasium knows no environment {env_id!r}.{nearest(env_id, gym.registry)}")


def check_algo(algo: str) -> None:
    """Make sure that there is an algorithm of this name.

    :raises ValueError: if there is not; the message names the nearest
    """
    if algo not in ALGOS:
        raise ValueError(f"There is no algorithm {algo!r}: they are {', '.join(ALGOS)}.{nearest(algo, ALGOS)}")


def find_run(logs: Path, algo: str, env_id: str, number: int = 0) -> Path:
    """Folder of a run.

    :param logs: folder of all runs
    :param algo: name of the algorithm
    :param env_id: id of the env or of the dataset
    :param number: of the run, 0 for the latest
    :raises FileNotFoundError: if there is none; the message names the nearest
    """
    check_algo(algo)
    name = EnvironmentName(env_id)  # slashes are dashes in it, which makes a dataset's id its env's
    latest = number or get_latest_run_id(str(logs / algo), name)
    folder = logs / algo / f"{name}_{latest}"
    if not folder.is_dir():
        there = sorted(path.name for path in (logs / algo).glob("*") if path.is_dir())
        raise FileNotFoundError(f"No run of {algo} on {env_id} in {logs}.{nearest(name, there)}")
    return folder


def write_entry(hyperparams: dict[str, Any], task: str, path: Path) -> None:
    """Write settings as a YAML file that ``train --config`` reads."""
    dump_yaml({task: hyperparams}, path)
