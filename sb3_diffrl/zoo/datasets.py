"""A dataset as an environment: RL Zoo knows a task by the id of its environment."""

from typing import Any

import gymnasium as gym

from sb3_diffrl.offline.environments import check_env_spec
from sb3_diffrl.offline.reading import open_datasets


def register_dataset(dataset_id: str) -> str:
    """Register the evaluation env of a Minari dataset in Gymnasium.

    :param dataset_id: ``namespace/env/name-v0``, on disk
    :return: id of the env, see ``dataset_env_id()``
    :raises FileNotFoundError: if the dataset is not on disk, with the command that gets it
    """
    open_datasets(dataset_id)
    env_id = dataset_env_id(dataset_id)
    if env_id not in gym.registry:
        gym.register(
            env_id,
            entry_point=f"{__name__}:{make_dataset_env.__name__}",
            kwargs={"dataset_id": dataset_id},
            disable_env_checker=True,
            order_enforce=False,
        )
    return env_id


def dataset_env_id(dataset_id: str) -> str:
    """Id of a dataset's env in Gymnasium, whose ids have one slash at most: ``namespace/env-name-v0``."""
    namespace, _, name = dataset_id.partition("/")
    return f"{namespace}/{name.replace('/', '-')}"


def make_dataset_env(dataset_id: str, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Rebuild the environment to evaluate in of a dataset.

    :param render_mode: Gymnasium's
    :raises ValueError: if it cannot be rebuilt
    """
    dataset = open_datasets(dataset_id)[0]
    try:
        # What a file names is made only if it is an environment that is registered here.
        for spec in (dataset.env_spec, dataset._eval_env_spec):
            if spec is not None:
                check_env_spec(spec)
        env: gym.Env[Any, Any] = dataset.recover_environment(eval_env=True, render_mode=render_mode)
    except Exception as error:
        extra = 'pip install "sb3_diffrl[robotics]"' if "gymnasium_robotics" in str(error) else "Install the package it comes from"
        raise ValueError(
            f"The environment of dataset {dataset_id!r} cannot be rebuilt ({type(error).__name__}: {error}). {extra}, or name an "
            "environment to evaluate in: --env."
        ) from error
    return env
