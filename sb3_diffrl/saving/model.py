"""Models that save whole files and load without running what a file holds."""

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file, open_path, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.common.utils import check_for_correct_spaces, get_device, get_system_info
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_diffrl.saving.archive import ENTRY, Archive, ModelFileError, document, read_archive, weights_alone
from sb3_diffrl.saving.atomic import atomic_file, target_of
from sb3_diffrl.saving.building import bounded
from sb3_diffrl.saving.encoding import NotAllowedError, Refused, decode_all, encode_all
from sb3_diffrl.saving.limits import UnfitError, check_attributes
from sb3_diffrl.saving.parameters import checked
from sb3_diffrl.saving.versions import note_differences

SelfSafeSaving = TypeVar("SelfSafeSaving", bound="SafeSaving")

# Attributes that are never in a file of ours: an env would be made, a policy or a buffer be taken as it is.
NEVER_LOADED = frozenset(
    {"env", "device", "policy", "replay_buffer", "rollout_buffer", "_vec_normalize_env", "_episode_storage", "_logger"}
)


class SafeSaving(BaseAlgorithm):
    """Saving and loading of Stable-Baselines3, made safe: a file is written whole or not at all, and loading one runs none of it.

    The zip is Stable-Baselines3's with one more entry, ``sb3_diffrl.json``, which holds the attributes in JSON, as far as their
    types are on a list: numbers, texts, arrays, spaces, schedules, activations, optimisers and this package's own classes. It is
    all that ``load()`` reads besides tensors.
    """

    # Where and at which step this model was last saved to a file, or loaded from one
    _last_save: tuple[str, int] | None = None

    @property
    def last_save(self) -> str:
        """Which file there is to go back to, a sentence."""
        if self._last_save is None:
            return "No model was saved before."
        return f"The last model that was saved is {self._last_save[0]}, of step {self._last_save[1]}."

    def save(
        self, path: str | Path | io.BufferedIOBase, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """Save the model. A file that is there is replaced once the new one is whole.

        :param path: file to write
        :param exclude: names of attributes to leave out besides the usual
        :param include: names of attributes to save although they usually are not
        :raises OSError: if it cannot be written, with the reason; a former file is as it was
        """
        if not isinstance(path, (str, Path)):
            open_path(path, "w")  # raises if it cannot be
            path.write(self._file_content(exclude, include))
            return
        content = self._file_content(exclude, include)
        with atomic_file(path, "zip") as file:
            file.write(content)
        self._last_save = (str(target_of(path, "zip")), self.num_timesteps)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_save"]

    def _file_content(self, exclude: Iterable[str] | None, include: Iterable[str] | None) -> bytes:
        buffer = io.BytesIO()
        super().save(buffer, exclude, include)
        with zipfile.ZipFile(buffer, "a") as archive:
            names = json.loads(archive.read("data"))
            archive.writestr(ENTRY, document(encode_all({name: self.__dict__[name] for name in names}), type(self).__name__))
        return buffer.getvalue()

    @classmethod
    def load(
        cls: type[SelfSafeSaving],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trusted: bool = False,
        **kwargs: Any,
    ) -> SelfSafeSaving:
        """Load a model. Nothing that the file holds is run, unless it is trusted.

        :param path: file to read
        :param env: environment to go on with; ``None`` to predict alone
        :param device: where to compute
        :param custom_objects: attributes to take from here instead of the file, by name
        :param print_system_info: print what the model was saved on
        :param force_reset: reset the environment before training goes on
        :param trusted: un-pickle what the file holds, as Stable-Baselines3 does: who wrote the file can run any code. Needed for
            models with functions or classes of your own, and for files of other packages.
        :param kwargs: attributes to change
        :raises ModelFileError: if the file is damaged, or holds what is not loaded unless it is trusted; the message says which
        :raises ValueError: if what is given here does not fit: spaces of ``env``, ``custom_objects``, ``kwargs``
        :raises FileNotFoundError: if there is none
        """
        if trusted:
            model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
            return cls._noted(model, path)
        if custom_objects is not None and not isinstance(custom_objects, dict):
            raise ValueError("custom_objects argument must be a dict or None")
        file = open_path(path, "r", suffix="zip")
        what = f"The file {path}" if isinstance(path, (str, Path)) else "The file"
        try:
            archive = read_archive(file, what)
        finally:
            if isinstance(path, (str, Path)):
                file.close()
        device = get_device(device)  # raises if there is none
        given = {**(custom_objects or {}), **kwargs}
        attributes = cls._attributes(archive, custom_objects or {}, what)
        try:
            check_attributes(cls, {**attributes, **kwargs})
        except UnfitError as error:
            if error.name in given:
                raise ValueError(f"What `load()` was given does not fit: {error}.") from error
            raise ModelFileError(
                f"{what} is damaged: {error}. If you know where the file comes from, `trusted=True` takes it as it is."
            ) from error
        if env is not None:
            env = cls._wrap_env(env, attributes.get("verbose", 0))
            check_for_correct_spaces(env, attributes["observation_space"], attributes["action_space"])
        if "policy_kwargs" in kwargs and kwargs["policy_kwargs"] != attributes.get("policy_kwargs"):
            raise ValueError(
                f"The specified policy kwargs do not equal the stored policy kwargs. Stored kwargs: "
                f"{attributes.get('policy_kwargs')}, specified kwargs: {kwargs['policy_kwargs']}"
            )
        if print_system_info:
            print("== CURRENT SYSTEM INFO ==")
            get_system_info()
        note_differences(archive.versions, stacklevel=2)
        model = cls._build(archive, attributes, what, env, device, print_system_info, force_reset, kwargs, [*given])
        return cls._noted(model, path)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """Put weights and states of optimisers in place, as every SB3 algorithm does.

        :param load_path_or_dict: file of a saved model, or what ``get_parameters()`` gives
        :param exact_match: raise if some are missing
        :param device: where to read tensors to
        :raises RuntimeError: if a tensor is of another shape or type than its place, or not finite; nothing is changed then
        :raises ValueError: if there are other parts than the model has
        """
        parameters = load_path_or_dict
        if not isinstance(parameters, dict):
            _, parameters, _ = load_from_zip_file(parameters, device=device, load_data=False)
            assert parameters is not None
        names = self._get_torch_save_params()[0]
        unknown = [name for name in parameters if name not in names]
        if unknown:
            raise ValueError(f"Key {unknown[0][:100]} is an invalid object name: a {type(self).__name__} has {', '.join(names)}.")
        fitting = {name: checked(recursive_getattr(self, name), state, name) for name, state in parameters.items()}
        super().set_parameters(fitting, exact_match, device)

    @staticmethod
    def _noted(model: SelfSafeSaving, path: str | Path | io.BufferedIOBase) -> SelfSafeSaving:
        if isinstance(path, (str, Path)):
            model._last_save = (str(path if Path(path).is_file() else target_of(path, "zip")), model.num_timesteps)
        return model

    @classmethod
    def _attributes(cls, archive: Archive, custom_objects: dict[str, Any], what: str) -> dict[str, Any]:
        # The schedule is made anew from the learning rate.
        skipped = frozenset({*custom_objects, "lr_schedule"})
        try:
            with bounded(0):
                attributes = decode_all(archive.attributes, skipped)
        except NotAllowedError as error:
            raise ModelFileError(f"{what} is damaged: {error}.") from error
        attributes |= {name: value for name, value in custom_objects.items() if name in archive.attributes}
        attributes["lr_schedule"] = None
        for name, value in attributes.items():
            if isinstance(value, Refused):
                raise ModelFileError(
                    f"{what} holds {value.reason} in {name!r}, which could run any code. If you know where the file comes from, "
                    f"load it with `trusted=True`; or give what belongs there by `custom_objects={{{name!r}: ...}}`."
                )
            if name in NEVER_LOADED or callable(getattr(cls, name, None)) or name.startswith("__"):
                raise ModelFileError(f"{what} is damaged: it holds {name[:100]!r}, which no saved model does.")
        missing = [name for name in ("policy_class", "observation_space", "action_space") if name not in attributes]
        if missing:
            raise ModelFileError(f"{what} is damaged: it lacks {', '.join(missing)}.")
        return attributes

    @classmethod
    def _build(
        cls: type[SelfSafeSaving],
        archive: Archive,
        attributes: dict[str, Any],
        what: str,
        env: GymEnv | None,
        device: th.device | str,
        print_system_info: bool,
        force_reset: bool,
        kwargs: dict[str, Any],
        given: list[str],
    ) -> SelfSafeSaving:
        needs_env = attributes.get("replay_buffer_class") is HerReplayBuffer and env is None
        try:
            with bounded(sum(map(len, archive.weights.values()))):
                # Every attribute is given, and the zip holds tensors alone: there is nothing left that could be un-pickled.
                return super().load(
                    weights_alone(archive),
                    env,
                    device,
                    attributes,
                    print_system_info,
                    force_reset,
                    **kwargs,
                )
        except Exception as error:
            if needs_env and isinstance(error, AssertionError):
                raise
            # Stable-Baselines3 looks for a remedy of its own, where it fails again.
            cause = error.__context__ if isinstance(error, KeyError) and error.__context__ else error
            reason = f"({type(cause).__name__}: {str(cause)[:500]})"
            if archive.made_by not in ("", cls.__name__):
                raise ModelFileError(
                    f"{what} was saved by {archive.made_by[:100]} and does not make a {cls.__name__}: load it by "
                    f"`{archive.made_by[:100]}.load()` {reason}."
                ) from error
            if given:
                raise ValueError(
                    f"{what} and what `load()` was given ({', '.join(given)}) do not make a {cls.__name__} together {reason}."
                ) from error
            raise ModelFileError(f"{what} is damaged: what it holds does not make a {cls.__name__} {reason}.") from error
