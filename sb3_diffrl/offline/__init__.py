"""Offline data and training: Minari in, Minari out."""

from sb3_diffrl.offline.datasets import OfflineDataset, Windows
from sb3_diffrl.offline.evaluation import normalized_score, reference_scores
from sb3_diffrl.offline.makers import make_dataset
from sb3_diffrl.offline.offline_algorithm import OfflineAlgorithm
from sb3_diffrl.offline.policies import OfflinePolicy
from sb3_diffrl.offline.recording import record_dataset
from sb3_diffrl.offline.replay import fill_replay_buffer
from sb3_diffrl.offline.spaces import Normalizer, ObservationFlattener

__all__ = [
    "Normalizer",
    "ObservationFlattener",
    "OfflineAlgorithm",
    "OfflineDataset",
    "OfflinePolicy",
    "Windows",
    "fill_replay_buffer",
    "make_dataset",
    "normalized_score",
    "record_dataset",
    "reference_scores",
]
