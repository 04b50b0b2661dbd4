"""RL Zoo's experiment manager, with safe configurations, datasets, folders of their own, and runs that stop and go on."""

import itertools
import os
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from pprint import pprint
from typing import Any

import numpy as np
import rl_zoo3
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_latest_run_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback, ProgressBarCallback
from stable_baselines3.common.utils import LinearSchedule, get_system_info
from stable_baselines3.common.vec_env import VecEnv

from sb3_diffrl.callbacks import StopOnSignal
from sb3_diffrl.common import CosineSchedule
from sb3_diffrl.configs import dump_yaml, load_settings, nearest, packaged_hyperparams, resolve, settings
from sb3_diffrl.offline.recording import versions
from sb3_diffrl.planner.presets import PRESETS
from sb3_diffrl.zoo.names import check_names
from sb3_diffrl.zoo.runs import check_trusted, is_safe, trust_option
from sb3_diffrl.zoo.statistics import JsonNormalize, has_statistics, load_statistics
from sb3_diffrl.zoo.wrappers import as_env_wrapper, joined


class Experiment(ExperimentManager):
    """RL Zoo's ``ExperimentManager``, see the module. Arguments are RL Zoo's; further ones are read from ``args``:

    ``dataset`` (id of a Minari dataset), ``entry`` (file with the settings of one task, in place of one with many), ``wrapper``
    (RL Zoo's ``env_wrapper`` entries, outermost last), ``resume`` (folder of the run to go on with), ``trust`` (the configuration
    may name code of any package, and what the run's folder holds may be un-pickled). All may be missing.
    """

    #: Number of the signal that stopped training before its end, 0 if none did
    interrupted = 0
    #: Settings as the run's folder keeps them, once they are read
    saved_hyperparams: dict[str, Any]

    def _argument(self, name: str) -> Any:
        return getattr(self.args, name, None)

    # ------------------------------------------------------------------ settings

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of the task, as RL Zoo's method of this name, but read as data.

        :return: what the algorithm gets, and what the run's folder keeps
        :raises ValueError: if there are none for the task; the message names the nearest
        """
        ours = packaged_hyperparams(self.algo)
        if not Path(self.config).exists() and ours.exists():
            self.config = str(ours)
        if self._argument("entry") is None and not self.config.endswith((".yml", ".yaml")):
            return super().read_hyperparameters()
        hyperparams = self._entry()
        # RL Zoo's own files are as much installed code as RL Zoo itself.
        is_zoos = self._argument("entry") is None and Path(self.config).is_relative_to(Path(rl_zoo3.__file__).parent)
        resolve(hyperparams, bool(self._argument("trust")) or is_zoos)  # refuses code
        if self.storage and self.study_name and self.trial_id is not None:
            hyperparams.update(self.load_trial(self.storage, self.study_name, self.trial_id))
        hyperparams.update(self.custom_hyperparams or {})
        hyperparams = _with_preset(hyperparams)
        _check_complete(hyperparams, self.env_name.gym_id)
        if self._argument("dataset"):
            hyperparams["dataset"] = self.args.dataset
        wrappers = joined(hyperparams.get("env_wrapper"), self._argument("wrapper"))
        if wrappers:
            hyperparams["env_wrapper"] = wrappers
        if self.env_kwargs:
            hyperparams["env_kwargs"] = self.env_kwargs
        elif "env_kwargs" in hyperparams and self._eval_env_kwargs_args is None:
            self.eval_env_kwargs = hyperparams["env_kwargs"]
        check_names(self.algo, hyperparams)
        saved = self.saved_hyperparams = dict(sorted(hyperparams.items()))
        if self.verbose > 0:
            print("Settings:")
            pprint(saved)
        # What was typed on the command line is the user's own word.
        resolved = resolve(hyperparams, trust=True)
        if wrappers:
            resolved["env_wrapper"] = as_env_wrapper(wrappers)
        return resolved, saved

    def _entry(self) -> dict[str, Any]:
        if self._argument("entry") is not None:
            return load_settings(self.args.entry)
        tasks = load_settings(self.config)
        names = [name for name in (self._argument("dataset"), self.env_name.gym_id, "default") if name is not None]
        for name in names:
            if name in tasks:
                if self.verbose > 0:
                    print(f"Settings for {name}, from {self.config}")
                return settings(tasks[name], f"`{name}` in {self.config}")
        raise ValueError(f"{self.config} has no settings for {names[0]}, and no `default`.{nearest(names[0], tasks)}")

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        """Write settings, command, seed and versions to the run's folder, as plain YAML where RL Zoo writes Python objects."""
        folder = Path(self.params_path)
        with (folder / "command.txt").open("a") as file:
            file.write(" ".join(sys.orig_argv) + "\n")
        if self._argument("resume"):
            return
        dump_yaml({**saved_hyperparams, "n_timesteps": self.n_timesteps}, folder / "config.yml")
        dump_yaml({name: value for name, value in vars(self.args).items() if not callable(value)}, folder / "args.yml")
        described = {
            "algo": self.algo,
            "env": self.env_name.gym_id,
            "dataset": saved_hyperparams.get("dataset"),
            "seed": self.seed,
            "n_timesteps": self.n_timesteps,
            "versions": versions(),
            "system": get_system_info(print_info=False)[0],
        }
        dump_yaml(described, folder / "run.yml")
        print(f"Log path: {self.save_path}")

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        # RL Zoo's own linear schedule is not among what a saved model is loaded with unless it is trusted.
        value = hyperparams.get("learning_rate")
        if isinstance(value, str):
            kind, _, start = value.partition("_")
            if kind not in ("lin", "cos"):
                raise ValueError(f"The learning rate {value!r} is neither a number nor lin_<start> nor cos_<start>.")
            schedule = LinearSchedule(float(start), 0.0, 1.0) if kind == "lin" else CosineSchedule(float(start))
            others = {name: entry for name, entry in hyperparams.items() if name != "learning_rate"}
            return {**ExperimentManager._preprocess_schedules(others), "learning_rate": schedule}
        return ExperimentManager._preprocess_schedules(hyperparams)

    # ------------------------------------------------------------------ folders

    def create_log_folder(self) -> None:
        """Take a folder that nobody has: the next number, also where several runs start at once."""
        if self._argument("resume"):
            self.save_path = str(self.args.resume)
        elif not self._argument("uuid"):
            name = f"tune-{self.env_name}" if self.optimize_hyperparameters else str(self.env_name)
            for number in itertools.count(get_latest_run_id(self.log_path, name) + 1):
                self.save_path = os.path.join(self.log_path, f"{name}_{number}")
                try:
                    os.makedirs(self.save_path)
                except FileExistsError:
                    continue
                break
        self.params_path = os.path.join(self.save_path, str(self.env_name))
        os.makedirs(self.params_path, exist_ok=True)
        if self._argument("resume"):
            self._keep_monitor_files()

    def _keep_monitor_files(self) -> None:
        # Monitor starts its files anew; SB3's load_results() reads all that end in monitor.csv.
        for path in sorted(Path(self.save_path).glob("[0-9]*.monitor.csv")):
            part = next(n for n in itertools.count(1) if not path.with_name(f"part{n}-{path.name}").exists())
            path.rename(path.with_name(f"part{part}-{path.name}"))

    def create_callbacks(self) -> None:
        """RL Zoo's callbacks; in a resumed run, evaluations go on where they were."""
        super().create_callbacks()  # type: ignore[no-untyped-call]
        path = Path(self.save_path) / "evaluations.npz"
        if not (self._argument("resume") and path.exists()):
            return  # a run that starts
        for callback in self.callbacks:
            if isinstance(callback, EvalCallback):
                try:
                    with np.load(path) as data:
                        callback.evaluations_timesteps = data["timesteps"].tolist()
                        callback.evaluations_results = [list(row) for row in data["results"]]
                        callback.evaluations_length = [list(row) for row in data["ep_lengths"]]
                except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                    # Stable-Baselines3 writes it in place: a process that was killed leaves half of it.
                    warnings.warn(f"{path} is damaged ({error}): the evaluations begin anew.", stacklevel=2)
                    continue
                callback.best_mean_reward = float(max(np.mean(row) for row in callback.evaluations_results))

    # ------------------------------------------------------------------ training

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """As RL Zoo's method of this name.

        :raises ValueError: if the env does not take the arguments that it was given
        """
        try:
            return super().create_envs(n_envs, eval_env, no_log)
        except TypeError as error:
            if not self.env_kwargs:
                raise
            raise ValueError(f"{self.env_name.gym_id} cannot be made with {self.env_kwargs}: {error}") from error

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        # RL Zoo un-pickles the statistics, also those of a folder that only happens to be in the current one.
        folder = Path(self.trained_agent).parent / self.env_name
        if self.trained_agent and has_statistics(folder):
            # A model that RL Zoo's own command was given is read as RL Zoo does.
            env = load_statistics(folder, env, bool(self._argument("trust")) or not self._argument("resume"))
        elif self.normalize:
            env = JsonNormalize(env, **self.normalize_kwargs)
        else:
            return env
        if eval_env:
            env.training = env.norm_reward = False
        return env

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if not self._argument("resume"):
            return super()._load_pretrained_agent(hyperparams, env)
        trust = bool(self._argument("trust"))
        check_trusted(self.algo, Path(self.trained_agent), trust)
        trusted: dict[str, Any] = {"trusted": trust} if is_safe(self.algo) else {}
        # The model has its settings; what RL Zoo would set again starts the generators anew.
        model: BaseAlgorithm = ALGOS[self.algo].load(
            self.trained_agent, env=env, device=self.device, tensorboard_log=self.tensorboard_log, verbose=self.verbose, **trusted
        )
        replay_buffer = Path(self.save_path) / "replay_buffer.pkl"
        if hasattr(model, "load_replay_buffer"):
            if replay_buffer.exists():
                model.load_replay_buffer(replay_buffer, **trusted)
            else:
                print("There is no replay buffer in the folder: it starts empty.")
        return model

    def learn(self, model: BaseAlgorithm) -> None:
        """Train, as RL Zoo's method of this name. ``interrupted`` tells afterwards whether it was stopped by a signal.

        :param model: new, or the one to go on with
        """
        resumed = bool(self._argument("resume"))
        remaining = self.n_timesteps - (model.num_timesteps if resumed else 0)
        log: dict[str, Any] = {}
        if self.log_interval != -1:
            log["log_interval"] = self.log_interval if self.log_interval > -1 else None
        stop = StopOnSignal()
        try:
            with stop:
                try:
                    if remaining > 0:
                        model.learn(remaining, callback=[*self.callbacks, stop], reset_num_timesteps=not resumed, **log)
                except KeyboardInterrupt:
                    stop.signal = stop.signal or signal.SIGINT
                    self._end_progress()
                except (EOFError, ConnectionError) as error:
                    # A terminal's Ctrl-C ends the processes of the envs as well, maybe a moment before it is seen here.
                    time.sleep(0.2)
                    if not stop.signal:
                        raise ChildProcessError(
                            "The process of an environment has ended. Was it killed, or out of memory?"
                        ) from error
                    self._end_progress()
        finally:
            if model.env is not None:
                with suppress(EOFError, ConnectionError):
                    model.env.close()
        self.interrupted = stop.signal if model.num_timesteps < self.n_timesteps else 0

    def _end_progress(self) -> None:
        for callback in self.callbacks:
            if isinstance(callback, ProgressBarCallback):
                callback.on_training_end()

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """Save the model, and what going on needs if it was interrupted."""
        self.save_replay_buffer = self.save_replay_buffer or bool(self.interrupted)
        super().save_trained_model(model)

    def rescue(self, model: BaseAlgorithm) -> str:
        """Save a model whose training an error has ended: in the run's folder, or, where nothing can be written, elsewhere.

        :return: where it is, and how to go on
        """
        if model.num_timesteps == 0:
            return "Training had not begun."
        resume = f"sb3-diffrl train --resume {self.save_path}{trust_option(self.algo, self.args.env)}"
        try:
            self.save_replay_buffer = True
            super().save_trained_model(model)
        except Exception:
            try:
                path = Path(tempfile.mkdtemp(prefix="sb3-diffrl-")) / f"{self.env_name}.zip"
                model.save(path)
            except Exception as error:
                return f"The model of step {model.num_timesteps} could not be saved anywhere ({error})."
            return f"The model of step {model.num_timesteps} is in {path}; move it to {self.save_path} and go on with: {resume}"
        return f"The model of step {model.num_timesteps} is saved in {self.save_path}. Go on with: {resume}"


def _check_complete(hyperparams: dict[str, Any], task: str) -> None:
    missing = [name for name in ("n_timesteps", "policy") if name not in hyperparams]
    if missing:
        raise ValueError(f"The settings of {task} lack {', '.join(missing)}.")
    settings(hyperparams.get("env_kwargs") or {}, "`env_kwargs`")


def _with_preset(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of ``preset: domain/size`` beneath the others.

    :raises ValueError: if there is none of this name
    """
    if "preset" not in hyperparams:
        return hyperparams
    name = str(hyperparams["preset"])
    known = {f"{domain}/{size}": settings for domain, sizes in PRESETS.items() for size, settings in sizes.items()}
    if name not in known:
        raise ValueError(f"There is no preset {name!r}: they are {', '.join(known)}.{nearest(name, known)}")
    others = {key: value for key, value in hyperparams.items() if key != "preset"}
    return {**known[name], **others}
