"""Policies that save whole files and load without running what a file holds."""

import io
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import get_device

from sb3_diffrl.saving.archive import ModelFileError, check_weights, document, read_document
from sb3_diffrl.saving.atomic import atomic_file
from sb3_diffrl.saving.building import bounded
from sb3_diffrl.saving.encoding import NotAllowedError, Refused, decode_all, encode_all
from sb3_diffrl.saving.limits import check_arguments
from sb3_diffrl.saving.parameters import checked
from sb3_diffrl.saving.versions import note_differences

SelfSafePolicySaving = TypeVar("SelfSafePolicySaving", bound="SafePolicySaving")


class SafePolicySaving(BasePolicy):
    """Saving and loading of a policy by itself, see ``SafeSaving``: tensors, and the constructor's arguments as JSON."""

    def save(self, path: str | Path) -> None:
        """Save the policy. A file that is there is replaced once the new one is whole.

        :param path: file to write
        :raises OSError: if it cannot be written, with the reason; a former file is as it was
        """
        arguments = self._get_constructor_parameters()
        arguments.pop("lr_schedule", None)  # not needed to predict
        encoded = encode_all(arguments)
        content: dict[str, Any] = {"state_dict": self.state_dict(), "arguments": document(encoded)}
        pickled = {name: arguments[name] for name, node in encoded.items() if isinstance(node, dict) and node.get("$") == "refused"}
        if pickled:
            content["pickled"] = th.as_tensor(np.frombuffer(cloudpickle.dumps(pickled), np.uint8).copy())
        buffer = io.BytesIO()
        th.save(content, buffer)
        with atomic_file(path, "") as file:
            file.write(buffer.getvalue())

    @classmethod
    def load(
        cls: type[SelfSafePolicySaving], path: str | Path, device: th.device | str = "auto", trusted: bool = False
    ) -> SelfSafePolicySaving:
        """Load a policy. Nothing that the file holds is run, unless it is trusted.

        :param path: file to read
        :param device: where to compute
        :param trusted: un-pickle what the file holds: whoever wrote the file can run any code. Needed for policies with functions
            or classes of your own.
        :raises ModelFileError: if the file is damaged, or holds what is not loaded unless it is trusted; the message says which
        :raises FileNotFoundError: if there is none
        """
        what, device = f"The file {path}", get_device(device)
        with open(path, "rb") as file:
            content = file.read()
        check_weights(content, what)
        try:
            saved = th.load(io.BytesIO(content), map_location=device, weights_only=True)
            text, state, pickled = saved["arguments"], saved["state_dict"], saved.get("pickled")
        except Exception as error:
            raise ModelFileError(f"{what} is damaged, or no saved policy: {str(error)[:300] or type(error).__name__}.") from error
        encoded, versions, _ = read_document(text, what)
        try:
            with bounded(len(content)):
                arguments = decode_all(encoded)
        except NotAllowedError as error:
            raise ModelFileError(f"{what} is damaged: {error}.") from error
        if trusted and pickled is not None:
            arguments |= cloudpickle.loads(pickled.cpu().numpy().tobytes())
        for name, value in arguments.items():
            if isinstance(value, Refused):
                raise ModelFileError(
                    f"{what} holds {value.reason} in {name!r}, which could run any code. If you know where the file comes from, "
                    "load it with `trusted=True`."
                )
        note_differences(versions, stacklevel=2)
        try:
            if not trusted:
                check_arguments(cls, arguments)
            with bounded(len(content)):
                policy = cls(**arguments, lr_schedule=cls._dummy_schedule)
                policy.load_state_dict(checked(policy, state, "its state_dict"))
        except Exception as error:
            raise ModelFileError(
                f"{what} is damaged: what it holds does not make a {cls.__name__} ({type(error).__name__}: {str(error)[:500]})."
            ) from error
        return policy.to(device)
