"""Files: written whole or not at all, read without running what they hold."""

from sb3_diffrl.saving.archive import ModelFileError
from sb3_diffrl.saving.atomic import atomic_file
from sb3_diffrl.saving.model import SafeSaving
from sb3_diffrl.saving.policy import SafePolicySaving
from sb3_diffrl.saving.replay_buffer import SafeReplayBuffers, load_replay_buffer, save_replay_buffer
from sb3_diffrl.saving.versions import versions

__all__ = [
    "ModelFileError",
    "SafePolicySaving",
    "SafeReplayBuffers",
    "SafeSaving",
    "atomic_file",
    "load_replay_buffer",
    "save_replay_buffer",
    "versions",
]
