"""The update of NC-LQL, number by number, against vectors recorded from the authors' implementation (see golden/README.md)."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_diffrl import NCLQL
from sb3_diffrl.lql.critic import LangevinCritic, StackedLinear
from sb3_diffrl.lql.gradients import AutogradQGradient, StackedMlpQGradient
from sb3_diffrl.lql.langevin import ChainDraws, QGradient, UpdateDraws

from .envs import box_env

FOLDER = Path(os.environ.get("SB3_DIFFRL_GOLDEN", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))

Golden = dict[str, th.Tensor]

golden_files = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_are_golden_files() -> None:
    assert FILES, f"no *.npz in {FOLDER}"


@cache
def load(path: Path) -> Golden:
    with np.load(path) as data:
        return {key: th.as_tensor(data[key]) for key in data.files}


def n_critics(golden: Golden) -> int:
    return len({key.split("/")[1] for key in golden if key.startswith("init/q")})


def layers(critic: LangevinCritic) -> list[StackedLinear]:
    """In the order of the reference's names: the level embedding, then the network."""
    assert critic.level_embedding is not None
    return [critic.level_embedding.hidden, critic.level_embedding.output, *critic.layers]


def name(index: int) -> str:
    return "linear" if index == 0 else f"linear_{index}"


def weights(golden: Golden, prefix: str) -> list[tuple[th.Tensor, th.Tensor]]:
    """Weights ``(n_critics, in, out)`` and biases ``(n_critics, 1, out)`` of each layer under ``prefix``."""
    n_layers = len([key for key in golden if key.startswith(f"{prefix}1/linear") and key.endswith("/w")])
    critics = range(1, n_critics(golden) + 1)

    def stack(layer: int, part: str) -> th.Tensor:
        return th.stack([golden[f"{prefix}{i}/{name(layer)}/{part}"] for i in critics])

    return [(stack(layer, "w"), stack(layer, "b").unsqueeze(1)) for layer in range(n_layers)]


def make_model(golden: Golden) -> NCLQL:
    initial = weights(golden, "init/q")
    env = box_env(golden["data/obs"].shape[1], golden["data/action"].shape[1])
    sigmas = golden["sigmas"]
    model = NCLQL(
        "MlpPolicy",
        env,
        learning_rate=1e-4,
        gamma=0.99,
        tau=0.005,
        reward_scale=0.2,
        n_levels=len(sigmas),
        sigma_max=float(sigmas[0]),
        sigma_min=float(sigmas[-1]),
        n_langevin_steps=golden["act/eps"].shape[1],
        step_size=1e-4,
        inverse_temperature=500.0,
        policy_kwargs={"net_arch": [weight.shape[2] for weight, _ in initial[2:-1]], "n_critics": n_critics(golden)},
        device="cpu",
    )
    for layer, (weight, bias) in zip(layers(model.critic), initial, strict=True):
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
    model.critic_target.load_state_dict(model.critic.state_dict())
    return model


@golden_files
def test_noise_levels(path: Path) -> None:
    golden = load(path)
    np.testing.assert_allclose(make_model(golden).policy.sampler.sigmas, golden["sigmas"], rtol=1e-6)


@golden_files
def test_q_values(path: Path) -> None:
    golden = load(path)
    critic = make_model(golden).critic
    q_values = critic.q_values(golden["data/obs"], golden["data/action"], golden["q/level"].long())
    for i, q_value in enumerate(q_values, start=1):
        np.testing.assert_allclose(q_value.detach(), golden[f"q/q{i}_at_level"], atol=1e-5)


@golden_files
@pytest.mark.parametrize("make_gradient", [AutogradQGradient, StackedMlpQGradient])
def test_action_gradient(path: Path, make_gradient: Callable[[LangevinCritic, th.Tensor], QGradient]) -> None:
    golden = load(path)
    gradient = make_gradient(make_model(golden).critic, golden["data/obs"])
    # The file has one level for each row; a gradient takes one for the batch.
    by_level = th.stack([gradient(golden["data/action"], level) for level in range(len(golden["sigmas"]))])
    rows = by_level[golden["q/level"].long(), th.arange(len(golden["data/obs"]))]
    np.testing.assert_allclose(rows, golden["q/grad_sum_at_level"], atol=1e-5)


@golden_files
def test_sampled_actions(path: Path) -> None:
    golden = load(path)
    draws = ChainDraws(golden["act/x0"], golden["act/eps"])
    actions = make_model(golden).policy.sample_actions(golden["data/obs"], draws)
    np.testing.assert_allclose(actions, golden["act/action"], atol=1e-3)


@golden_files
def test_five_updates(path: Path) -> None:
    golden = load(path)
    model = make_model(golden)
    batch = ReplayBufferSamples(
        observations=golden["data/obs"],
        actions=golden["data/action"],
        next_observations=golden["data/next_obs"],
        dones=golden["data/done"].float().unsqueeze(1),
        rewards=golden["data/reward"].float().unsqueeze(1),
    )
    compared = []
    updates = sorted({int(key.split("/")[0][3:]) for key in golden if key.startswith("upd")})
    for k in updates:
        at = f"upd{k}"
        draws = UpdateDraws(ChainDraws(golden[f"{at}/x0"], golden[f"{at}/eps"]), golden[f"{at}/l"].long(), golden[f"{at}/noise"])
        next_actions = model.policy.sample_actions(batch.next_observations, draws.chain)
        np.testing.assert_allclose(next_actions, golden[f"{at}/next_action"], atol=1e-3)

        metrics = model.update(batch, draws)

        critics = range(1, n_critics(golden) + 1)
        unit = model.reward_scale  # of the reference's Q: scaled rewards
        for metric, key, scale in (("q_mean", "q{}", unit), ("td_loss", "td_q{}_loss", 1), ("smoothing_loss", "qt{}_loss", 1)):
            expected = np.mean([float(golden[f"{at}/info_" + key.format(i)]) for i in critics]) / scale
            np.testing.assert_allclose(float(metrics[metric]), expected, rtol=1e-4, atol=1e-6)
        for prefix, critic in (("q", model.critic), ("target_q", model.critic_target)):
            if f"{at}/{prefix}1/linear/w" not in golden:
                continue
            compared.append((k, prefix))
            for layer, (weight, bias) in zip(layers(critic), weights(golden, f"{at}/{prefix}"), strict=True):
                np.testing.assert_allclose(layer.weight.detach(), weight, atol=1e-6)
                np.testing.assert_allclose(layer.bias.detach(), bias, atol=1e-6)
    assert {(1, "q"), (1, "target_q"), (5, "q"), (5, "target_q")} <= set(compared)
