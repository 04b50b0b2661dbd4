"""Replay buffers as whole files that are read without running what they hold."""

import inspect
import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.save_util import open_path
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_diffrl.saving.archive import ModelFileError, document, read_document, read_zip
from sb3_diffrl.saving.atomic import atomic_file
from sb3_diffrl.saving.encoding import DTYPE, Refused, decode_all, encode_all
from sb3_diffrl.saving.limits import check_arguments

BUFFERS: dict[str, type[ReplayBuffer]] = {
    buffer.__name__: buffer for buffer in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
}
ENTRY = "replay_buffer.json"
# Arrays of a buffer with hindsight that hold rows of the buffer, or their number
POSITIONS = {"ep_start", "ep_length", "_current_ep_start"}

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
        :raises ValueError: if it is of other spaces or another number of envs than the model; the model keeps its buffer
        """
        buffer = load_replay_buffer(path, trusted)
        for name in ("observation_space", "action_space", "n_envs"):
            theirs, ours = getattr(buffer, name, None), getattr(self, name)
            if theirs != ours:
                raise ValueError(
                    f"The replay buffer does not belong to this model: its `{name}` is {theirs}, the model's {ours}. Load the "
                    "buffer that was saved with this model, or the model with an env like that of the buffer."
                )
        if isinstance(buffer, HerReplayBuffer):
            assert self.env is not None, "You must pass an environment at load time when using `HerReplayBuffer`"
            buffer.set_env(self.env)
            if truncate_last_traj:
                buffer.truncate_last_trajectory()
        buffer.device = self.device
        self.replay_buffer = buffer


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
        header = read_document(archive.read(ENTRY), what).attributes
        cls, state = BUFFERS[header["class"]], decode_all(header["state"])
        for i, (name, key) in enumerate(header["arrays"]):
            array = _read_array(archive, f"{i}.npy")
            if key:
                state.setdefault(name, {})[key] = array
            else:
                state[name] = array
        _check(cls, state)
        if cls is HerReplayBuffer:
            rows, n_envs = state["buffer_size"], state["n_envs"]
            infos = np.array(state.get("infos") or [[{} for _ in range(n_envs)] for _ in range(rows)])
            if infos.shape != (rows, n_envs) or not all(isinstance(info, dict) for info in infos.flat):
                raise ValueError("its parts do not belong together: infos")
            state |= {"infos": infos, "env": None}
    except ModelFileError:
        raise
    except Exception as error:
        raise ModelFileError(f"{what} is damaged ({type(error).__name__}: {str(error)[:300]}).") from error
    buffer = cls.__new__(cls)
    buffer.__dict__.update(state)
    return buffer


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as entry:
        if np.lib.format.read_magic(entry) != (1, 0):
            raise ValueError("its arrays are of another format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(entry)
        # Room is made by the header's word.
        if math.prod(shape) * dtype.itemsize != archive.getinfo(name).file_size - entry.tell():
            raise ValueError("an array is not as large as it says")
    with archive.open(name) as entry:
        array: np.ndarray = np.lib.format.read_array(entry, allow_pickle=False)
    return array


def _check(cls: type[ReplayBuffer], state: dict[str, Any]) -> None:
    # That a buffer of these settings would have these arrays: what does not would show long after loading, in compiled code even as
    # a crash.
    refused = [name for name, value in state.items() if isinstance(value, Refused)]
    if refused:
        raise ValueError(f"{', '.join(refused)} could not be saved")
    rows, n_envs, rewards = state["buffer_size"], state["n_envs"], state["rewards"]
    if type(rows) is not int or type(n_envs) is not int or min(rows, n_envs) < 1:
        raise ValueError("its counters are impossible")
    # An array of its own size for each row, before anything is made by the number of rows or envs
    if not isinstance(rewards, np.ndarray) or rewards.shape != (rows, n_envs):
        raise ValueError("its parts do not belong together: rewards")
    _check_observations(state)
    like = _one_row(cls, state)
    names = like.keys() - {"infos"}
    wrong = sorted((names ^ state.keys()) - {"infos", "env", "device"})
    wrong += [name for name in sorted(names & state.keys()) if not _belongs(like[name], state[name], name, rows)]
    if type(state.get("pos")) is not int or not 0 <= state["pos"] < rows:
        wrong.append("pos")
    if wrong:
        raise ValueError(f"its parts do not belong together: {', '.join(map(str, wrong))}")


def _check_observations(state: dict[str, Any]) -> None:
    # By the space's word alone, a row might be made that is larger than the file.
    space, stored = state["observation_space"], state["observations"]
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    arrays = stored if isinstance(stored, dict) else {"": stored}
    shape = (state["buffer_size"], state["n_envs"])
    for key, part in parts.items():
        if not isinstance(arrays.get(key), np.ndarray) or arrays[key].shape != (*shape, *get_obs_shape(part)):
            raise ValueError(f"its parts do not belong together: observations {key}")


def _one_row(cls: type[ReplayBuffer], state: dict[str, Any]) -> dict[str, Any]:
    # Attributes of a new buffer of the same settings, with one row
    known = {name for made in (ReplayBuffer, cls) for name in inspect.signature(made.__init__).parameters}
    arguments = {name: state[name] for name in known & state.keys() - {"buffer_size"}}
    check_arguments(cls, arguments)
    if cls is HerReplayBuffer:
        arguments["env"] = None
    return vars(cls(buffer_size=state["n_envs"], device="cpu", **arguments))


def _belongs(expected: Any, value: Any, name: str, rows: int) -> bool:
    if isinstance(expected, dict) and expected and all(isinstance(part, np.ndarray) for part in expected.values()):
        same = isinstance(value, dict) and value.keys() == expected.keys()
        return same and all(_belongs(expected[key], value[key], name, rows) for key in expected)
    if isinstance(expected, np.ndarray):
        shape = expected.shape if name == "_current_ep_start" else (rows, *expected.shape[1:])
        if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != expected.dtype:
            return False
        # Places in the buffer, and their number
        return name not in POSITIONS or bool(((value >= 0) & (value <= rows)).all())
    if name in ("pos", "buffer_size"):  # looked at by themselves
        return True
    return type(value) is type(expected) and (name == "full" or bool(value == expected))
