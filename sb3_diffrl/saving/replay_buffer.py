"""Replay buffers as whole files that are read without running what they hold."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_diffrl.saving.archive import ModelFileError, document, read_document, read_zip
from sb3_diffrl.saving.atomic import atomic_file
from sb3_diffrl.saving.encoding import DTYPE, Refused, decode_all, encode_all

BUFFERS: dict[str, type[ReplayBuffer]] = {
    buffer.__name__: buffer for buffer in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
}
ENTRY = "replay_buffer.json"

BufferPath = str | Path | io.BufferedIOBase


def save_replay_buffer(buffer: ReplayBuffer, path: BufferPath) -> None:
    """Save a replay buffer: its settings as JSON, its arrays as they are.

    A buffer of a class of your own, or with infos that JSON does not hold, is pickled.

    :param path: file to write, ``.pkl`` as in Stable-Baselines3
    :raises OSError: if it cannot be written, with the reason; a former file is as it was
    """
    if isinstance(path, (str, Path)):
        with atomic_file(path, "pkl") as file:
            _write(buffer, file)
    else:
        _write(buffer, open_path(path, "w"))


def load_replay_buffer(path: BufferPath, trusted: bool) -> ReplayBuffer:
    """Load a replay buffer; its ``device`` and, for hindsight, its env are to be set.

    :param path: file to read
    :param trusted: un-pickle what was pickled: whoever wrote the file can run any code
    :raises ModelFileError: if the file is damaged, or is pickled and not trusted
    :raises FileNotFoundError: if there is none
    """
    file, what = open_path(path, "r", suffix="pkl"), f"The file {path}" if isinstance(path, (str, Path)) else "The file"
    try:
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            return _read(file, what)
        if not trusted:
            raise ModelFileError(
                f"{what} is no replay buffer, or a pickled one, which could run any code. If you know where it comes from, load it "
                "with `trusted=True`."
            )
        buffer: ReplayBuffer = pickle.load(file)
        return buffer
    finally:
        if isinstance(path, (str, Path)):
            file.close()


class SafeReplayBuffers(OffPolicyAlgorithm):
    """An off-policy algorithm whose replay buffer is saved whole and loaded without running what the file holds."""

    def save_replay_buffer(self, path: BufferPath) -> None:
        """Save the replay buffer; a file that is there is replaced once the new one is whole.

        :param path: file to write
        :raises OSError: if it cannot be written, with the reason; a former file is as it was
        """
        assert self.replay_buffer is not None, "The replay buffer is not defined"
        save_replay_buffer(self.replay_buffer, path)

    def load_replay_buffer(self, path: BufferPath, truncate_last_traj: bool = True, trusted: bool = False) -> None:
        """Load a replay buffer. Nothing that the file holds is run, unless it is trusted.

        :param path: file to read
        :param truncate_last_traj: with a ``HerReplayBuffer``, take the last trajectory as finished
        :param trusted: un-pickle files of Stable-Baselines3, or of buffers of your own: who wrote the file can run any code
        :raises ModelFileError: if the file is damaged, or pickled and not trusted
        """
        self.replay_buffer = load_replay_buffer(path, trusted)
        if isinstance(self.replay_buffer, HerReplayBuffer):
            assert self.env is not None, "You must pass an environment at load time when using `HerReplayBuffer`"
            self.replay_buffer.set_env(self.env)
            if truncate_last_traj:
                self.replay_buffer.truncate_last_trajectory()
        self.replay_buffer.device = self.device


def _write(buffer: ReplayBuffer, file: Any) -> None:
    state = {name: value for name, value in buffer.__dict__.items() if name not in ("env", "device")}
    if isinstance(buffer, HerReplayBuffer) and not buffer.copy_info_dict:
        del state["infos"]
    elif isinstance(buffer, HerReplayBuffer):
        state["infos"] = buffer.infos.tolist()
    arrays: dict[str, np.ndarray] = {}
    for name, value in state.items():
        parts = value if isinstance(value, dict) else {"": value}
        if parts and all(isinstance(part, np.ndarray) and DTYPE.fullmatch(part.dtype.str) for part in parts.values()):
            arrays |= {json.dumps([name, key]): part for key, part in parts.items()}
    stored_names = {json.loads(key)[0] for key in arrays}
    encoded = encode_all({name: value for name, value in state.items() if name not in stored_names})
    refused = any(isinstance(node, dict) and node.get("$") == "refused" for node in encoded.values())
    if refused or BUFFERS.get(type(buffer).__name__) is not type(buffer):
        pickle.dump(buffer, file, protocol=pickle.HIGHEST_PROTOCOL)
        return
    with zipfile.ZipFile(file, "w") as archive:
        header = {"class": type(buffer).__name__, "arrays": list(map(json.loads, arrays)), "state": encoded}
        archive.writestr(ENTRY, document(header))
        for i, array in enumerate(arrays.values()):
            with archive.open(f"{i}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _read(file: Any, what: str) -> ReplayBuffer:
    archive = read_zip(file, what)
    try:
        header, _ = read_document(archive.read(ENTRY), what)
        cls, state = BUFFERS[header["class"]], decode_all(header["state"])
        for i, (name, key) in enumerate(header["arrays"]):
            with archive.open(f"{i}.npy") as entry:
                array = np.lib.format.read_array(entry, allow_pickle=False)
            if key:
                state.setdefault(name, {})[key] = array
            else:
                state[name] = array
        _check(cls, state)
        if cls is HerReplayBuffer:
            rows, n_envs = state["buffer_size"], state["n_envs"]
            infos = state.get("infos") or [[{} for _ in range(n_envs)] for _ in range(rows)]
            state |= {"infos": np.array(infos), "env": None}
    except ModelFileError:
        raise
    except Exception as error:
        raise ModelFileError(f"{what} is damaged ({type(error).__name__}: {str(error)[:300]}).") from error
    buffer = cls.__new__(cls)
    buffer.__dict__.update(state)
    return buffer


def _check(cls: type[ReplayBuffer], state: dict[str, Any]) -> None:
    # That the parts belong together: what does not would show long after loading.
    rows, n_envs = state["buffer_size"], state["n_envs"]
    if type(rows) is not int or type(n_envs) is not int or not (0 <= state["pos"] < rows and type(state["full"]) is bool):
        raise ValueError("its counters are impossible")
    wrong = [name for name, value in state.items() if callable(getattr(cls, name, None)) or isinstance(value, Refused)]
    shapes = {name: value.shape[:2] for name, value in state.items() if isinstance(value, np.ndarray)}
    for name in ("observations", "next_observations"):
        if isinstance(state.get(name), dict):
            shapes |= {f"{name} {key}": value.shape[:2] for key, value in state[name].items()}
    shapes.pop("_current_ep_start", None)
    wrong += [name for name, shape in shapes.items() if shape != (rows, n_envs)]
    if wrong or not {"observations", "actions", "rewards", "dones"} <= state.keys():
        raise ValueError(f"its parts do not belong together: {', '.join(map(str, wrong)) or 'some are missing'}")
