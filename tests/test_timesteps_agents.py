"""The argument `timestep_sampler` of agents and policies."""

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_diffrl import DiffusionBC
from sb3_diffrl.timesteps import AdaptiveTimestepSampler, LossSecondMomentSampler, UniformTimestepSampler
from tests.test_diffusion_bc import make_model

pytestmark = pytest.mark.filterwarnings("ignore:Training goes on without an environment")


@pytest.mark.parametrize(
    "name", ["logit_normal", "lognormal", "loss_second_moment", "min_snr", "p2", "speed", "adaptive", "adaptive+min_snr"]
)
@pytest.mark.parametrize("schedule", ["linear", "vp"])
def test_every_sampler_trains_an_agent(name: str, schedule: Any) -> None:
    model = make_model(timestep_sampler=name, beta_schedule=schedule)
    before = [parameter.clone() for parameter in model.policy.model.denoiser.parameters()]
    losses = [float(model.update()["loss"]) for _ in range(3)]
    assert np.isfinite(losses).all()
    assert all(not th.equal(a, b) for a, b in zip(before, model.policy.model.denoiser.parameters(), strict=True))


def test_uniform_is_the_default() -> None:
    assert isinstance(make_model().policy.timestep_sampler, UniformTimestepSampler)


@pytest.mark.parametrize("which", ["adaptive", "loss_second_moment"])
def test_a_run_that_is_saved_and_loaded_goes_on_exactly(which: str, tmp_path: Any) -> None:
    def settings() -> Any:
        return AdaptiveTimestepSampler(update_frequency=3) if which == "adaptive" else LossSecondMomentSampler(history=2)

    whole, part = (make_model(timestep_sampler=settings(), num_train_timesteps=10) for _ in range(2))
    dataset = whole.dataset
    whole.learn(12)
    part.learn(7)
    part.save(tmp_path / "model")
    loaded = DiffusionBC.load(tmp_path / "model", device="cpu")
    loaded.set_dataset(dataset)
    loaded.learn(5, reset_num_timesteps=False)
    assert loaded.num_timesteps == 12
    whole_state, loaded_state = whole.policy.state_dict(), loaded.policy.state_dict()
    assert whole_state.keys() == loaded_state.keys()
    for key, value in whole_state.items():
        if isinstance(value, th.Tensor):
            assert th.equal(value, loaded_state[key]), key
    assert any("timestep_sampler" in key for key in whole_state)


def test_an_objects_settings_serve_several_agents(tmp_path: Any) -> None:
    settings = AdaptiveTimestepSampler(update_frequency=1, learning_rate=0.02)
    first, second = make_model(timestep_sampler=settings), make_model(timestep_sampler=settings)
    for _ in range(3):
        first.update()
    own = first.policy.timestep_sampler
    assert isinstance(own, AdaptiveTimestepSampler)
    assert own is not settings
    assert own.learning_rate == 0.02
    assert own.info()
    assert not second.policy.timestep_sampler.info()
    first.policy.save(tmp_path / "policy")
    loaded = type(first.policy).load(tmp_path / "policy")
    for a, b in zip(own.parameters(), loaded.timestep_sampler.parameters(), strict=True):
        assert th.equal(a, b)


def test_the_denoisers_optimiser_leaves_the_sampler_alone() -> None:
    model = make_model(timestep_sampler="adaptive")
    owned = {id(parameter) for group in model.policy.optimizer.param_groups for parameter in group["params"]}
    assert not owned & {id(parameter) for parameter in model.policy.timestep_sampler.parameters()}


def test_the_sampler_is_logged() -> None:
    model = make_model(timestep_sampler=AdaptiveTimestepSampler(update_frequency=2))
    assert "reward" not in model.update()
    assert {"loss", "grad_norm", "reward", "entropy", "overhead"} <= set(model.update())


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(ValueError, match="Unknown `timestep_sampler` 'adaptve'"):
        make_model(timestep_sampler="adaptve")
