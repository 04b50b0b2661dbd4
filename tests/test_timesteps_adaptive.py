"""The learned timestep sampler: what it learns from, what it keeps, in one process and in several."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch as th
import torch.distributed as dist
from sklearn.feature_selection import SelectKBest, f_regression
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from sb3_diffrl.diffusion import MlpDenoiser
from sb3_diffrl.timesteps import AdaptiveTimestepSampler, TimestepSampler, make_timestep_sampler
from sb3_diffrl.timesteps.adaptive import BetaPolicy, most_correlated

from .timestep_tools import process, rng


class Training:
    """A small diffusion model, and a loop that trains it."""

    def __init__(
        self, sampler: TimestepSampler | str, schedule: Any = "linear", learning_rate: float = 1e-3, seed: int = 0
    ) -> None:
        th.manual_seed(seed)
        self.process = process(schedule)
        self.network: nn.Module = MlpDenoiser(3, 0, (32,), nn.SiLU, 8)
        self.sampler = make_timestep_sampler(sampler, self.process, (3,))
        self.optimizer = th.optim.Adam(self.network.parameters(), learning_rate)
        self.generator = rng(seed)
        self.largest_call = 0

    def denoise(self, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        output: th.Tensor = self.network(x_t, self.process.schedule.network_time(t))
        return output

    def steps(self, n: int) -> None:
        for _ in range(n):
            x0 = th.randn(16, 3, generator=self.generator) * th.tensor([1.0, 0.1, 0.01])
            t, weight = self.sampler.sample(x0, self.generator)
            noise = th.randn(x0.shape, generator=self.generator)
            loss = self.process.denoising_loss(self.denoise, x0, t, noise)

            def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor, x0: th.Tensor = x0) -> th.Tensor:
                self.largest_call = max(self.largest_call, len(rows))
                return self.process.bound_terms(self.denoise, x0[rows], t, noise)

            with self.sampler.around_step(x0, loss, bound_terms, self.generator):
                self.optimizer.zero_grad()
                (weight * loss).mean().backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()


# ------------------------------------------------------------------ reward and selection


@pytest.mark.parametrize("common_noise", [True, False])
def test_a_frozen_model_gives_no_reward_under_common_noise(common_noise: bool) -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, common_noise=common_noise, ent_coef=0.0)
    training = Training(sampler, learning_rate=0.0)
    policy = copy.deepcopy(sampler.policy.state_dict())
    training.steps(5)
    assert bool((sampler.queue == 0).all()) is common_noise
    assert (float(sampler.info()["reward"]) == 0) is common_noise
    unchanged = all(th.equal(weight, policy[name]) for name, weight in sampler.policy.state_dict().items())
    assert unchanged is common_noise


def test_a_better_model_gives_a_positive_reward() -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=None)
    sampler.setup(process(), (3,))
    x0, error = th.randn(16, 3), th.ones(1)

    def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return sampler.process.bound_terms(lambda x_t, t: noise + error, x0[rows], t, noise)

    sampler.sample(x0, rng())
    with sampler.around_step(x0, th.ones(16), bound_terms, rng()):
        error.zero_()
    # Three selected times, each with an error of 1 in every entry before, none after
    weights = sampler.process.schedule.bound_coefficients(th.arange(100)).weight / th.tensor(2.0).log()
    assert float(sampler.info()["reward"]) == pytest.approx(float(weights[:3].sum()), rel=1e-4)
    th.testing.assert_close(sampler.queue[0], weights, rtol=1e-4, atol=1e-6)


def test_selection_finds_the_planted_times() -> None:
    drops = th.randn(20, 50, generator=rng()) * 0.01
    signal = th.randn(20, generator=rng(1))
    for time, scale in ((7, 3.0), (23, -2.0), (41, 1.0)):
        drops[:, time] += scale * signal
    assert set(most_correlated(drops, 3).tolist()) == {7, 23, 41}


def test_selection_is_scikit_learns_f_test() -> None:
    drops = th.randn(12, 30, generator=rng())
    drops[:, 4] = 1.0  # never changes: no information
    varying = [i for i in range(30) if i != 4]
    expected = SelectKBest(f_regression, k=5).fit(drops[:, varying].numpy(), drops.sum(1).numpy()).get_support()
    assert {varying.index(i) for i in most_correlated(drops, 5).tolist()} == set(expected.nonzero()[0].tolist())
    assert most_correlated(drops, 30)[-1] == 4


def test_the_swept_times_choose_the_next_rewards() -> None:
    training = Training(AdaptiveTimestepSampler(update_frequency=1, sweep_size=50, n_selected=2))
    sampler = training.sampler
    assert isinstance(sampler, AdaptiveTimestepSampler)
    training.steps(2)
    assert sampler.selected_timesteps.tolist() == [1, 3]  # the start: too few sweeps
    training.steps(4)
    assert th.equal(sampler.selected, most_correlated(sampler.queue[:6], 2))
    training.steps(30)  # the queue goes around
    assert (sampler.queue.abs().sum(1) > 0).all()
    assert th.equal(sampler.selected, most_correlated(sampler.queue, 2))


@pytest.mark.parametrize("baseline", ["moving_average", "batch", None])
def test_mass_moves_into_the_band_where_the_bound_falls(baseline: Any) -> None:
    """Each row has an error that only its own training at times 60 .. 89 lowers."""
    sampler = AdaptiveTimestepSampler(3e-3, update_frequency=1, baseline=baseline, base="uniform", ent_coef=0.1)
    th.manual_seed(0)
    sampler.setup(process(), (3,))
    generator = rng()
    x0 = th.randn(128, 3, generator=generator)

    def in_band(t: th.Tensor) -> th.Tensor:
        return (t >= 60) & (t < 90)

    assert float(in_band(sampler.sample(x0.repeat(20, 1), rng(1)).t).float().mean()) == pytest.approx(0.3, abs=0.05)
    for _ in range(100):
        error = th.ones(128)
        t, _weight = sampler.sample(x0, generator)

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor, error: th.Tensor = error) -> th.Tensor:
            return in_band(t) * error[rows] + 0.01 * noise[:, 0]

        with sampler.around_step(x0, error, bound_terms, generator):
            error[in_band(t)] *= 0.5
    assert in_band(sampler.selected_timesteps).all()
    assert float(in_band(sampler.sample(x0.repeat(20, 1), rng(1)).t).float().mean()) > 0.55


def test_density_depends_on_the_data() -> None:
    """Rows of two kinds: one is helped by early times, the other by late ones."""
    sampler = AdaptiveTimestepSampler(learning_rate=3e-3, update_frequency=1, base="uniform", ent_coef=0.1)
    th.manual_seed(0)
    sampler.setup(process(), (2,))
    generator = rng()
    kind = th.arange(128) % 2
    x0 = nn.functional.one_hot(kind).float()
    for _ in range(150):
        error = th.ones(128)
        t, _weight = sampler.sample(x0, generator)

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor, error: th.Tensor = error) -> th.Tensor:
            return error[rows]

        with sampler.around_step(x0, error, bound_terms, generator):
            error[(t >= 50) == (kind == 1)] *= 0.5
    t = sampler.sample(x0.repeat(20, 1), rng(1)).t.view(20, 128).float()
    assert float(t[:, kind == 0].mean()) < 35
    assert float(t[:, kind == 1].mean()) > 65


# ------------------------------------------------------------------ guards


@pytest.mark.parametrize(("concentration_range", "start"), [((0.2, 5.0), 1.0), ((0.5, 20.0), 1.0), (None, 0.9741)])
def test_the_policy_starts_near_uniform(concentration_range: Any, start: float) -> None:
    beta = BetaPolicy((4,), (16,), concentration_range)(th.randn(5, 4))
    for concentration in (beta.concentration0, beta.concentration1):
        th.testing.assert_close(concentration, th.full((5,), start), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(5,), (6, 3), (3, 32, 32), (1, 8, 8), (2, 5, 9)])
def test_data_of_any_shape(shape: tuple[int, ...]) -> None:
    sampler = make_timestep_sampler("adaptive", process(), shape)
    t, weight = sampler.sample(th.randn(4, *shape), rng())
    assert t.shape == weight.shape == (4,)


def test_a_step_that_failed_teaches_nothing() -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1)
    training = Training(sampler)
    training.steps(4)
    before = tensors(copy.deepcopy(sampler.state_dict()))
    x0 = th.randn(16, 3)
    for value in (float("nan"), float("inf")):
        sampler.sample(x0, rng())
        level = th.zeros(())

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor, level: th.Tensor = level) -> th.Tensor:
            return level.repeat(len(rows))

        with sampler.around_step(x0, th.ones(16), bound_terms, rng()):
            level.fill_(value)
    sampler.sample(x0, rng())
    with (
        pytest.raises(ZeroDivisionError),
        sampler.around_step(x0, th.ones(16), lambda rows, t, noise: th.zeros(len(rows)), rng()),
    ):
        raise ZeroDivisionError
    after = sampler.state_dict()
    assert all(th.equal(value, after[name]) for name, value in before.items())


def test_nothing_is_measured_when_it_is_not_the_samplers_turn() -> None:
    training = Training(AdaptiveTimestepSampler(update_frequency=10))
    training.steps(9)
    assert training.largest_call == 0
    training.steps(1)
    # A sweep of all 100 times, and 3 times for each of 16 rows
    assert training.largest_call == 100 + 3 * 16


def test_rewards_of_a_few_rows_cost_less() -> None:
    training = Training(AdaptiveTimestepSampler(update_frequency=1, sweep_size=20, reward_batch_size=4))
    training.steps(1)
    assert training.largest_call == 20 + 3 * 4


def test_a_reward_goes_to_the_row_that_earned_it() -> None:
    """The rewarded rows are a random few: each one's reward has to meet its own draw."""
    sampler = AdaptiveTimestepSampler(3e-3, update_frequency=1, reward_batch_size=16, base="uniform", ent_coef=0.1)
    th.manual_seed(0)
    sampler.setup(process(), (1,))
    generator = rng()
    x0 = th.randn(128, 1, generator=generator)
    for _ in range(100):
        t, _weight = sampler.sample(x0, generator)
        error = th.ones(128)

        def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor, error: th.Tensor = error) -> th.Tensor:
            return error[rows]

        with sampler.around_step(x0, error, bound_terms, generator):
            error[t >= 50] = 0.5
    assert float((sampler.sample(x0.repeat(20, 1), rng(1)).t >= 50).float().mean()) > 0.7


def test_chunks_bound_the_rows_of_a_call_and_change_nothing() -> None:
    whole = Training(AdaptiveTimestepSampler(update_frequency=2))
    chunked = Training(AdaptiveTimestepSampler(update_frequency=2, chunk_size=30))
    for training in (whole, chunked):
        training.steps(10)
    assert chunked.largest_call == 30
    for a, b in zip(whole.sampler.parameters(), chunked.sampler.parameters(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"update_frequency": 0}, "update_frequency"),
        ({"queue_size": 0}, "queue_size"),
        ({"n_selected": 0}, "n_selected"),
        ({"sweep_size": 0}, "sweep_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"reward_batch_size": 0}, "reward_batch_size"),
        ({"sweep_powers": (-0.5, 0.5)}, "sweep_powers"),
        ({"baseline": "mean"}, "baseline"),
        ({"entropy": "none"}, "entropy"),
        ({"base": "terms"}, "base"),
        ({"importance": 1.5}, "importance"),
        ({"ent_coef": -1.0}, "ent_coef"),
        ({"uniform_floor": 1.0}, "uniform_floor"),
        ({"concentration_range": (2.0, 1.0)}, "concentration_range"),
        ({"statistics_decay": 1.0}, "statistics_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveTimestepSampler(**arguments)


def test_continuous_time_cannot_be_swept_whole() -> None:
    with pytest.raises(ValueError, match="sweep_size"):
        AdaptiveTimestepSampler(sweep_size=None).setup(process("vp"), (3,))


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("schedule", ["linear", "vp"])
@pytest.mark.parametrize("name", ["adaptive", "loss_second_moment"])
def test_training_resumes_exactly(name: str, schedule: Any, tmp_path: Path) -> None:
    def make(seed: int) -> Training:
        sampler = AdaptiveTimestepSampler(update_frequency=2, sweep_size=20, weighting="p2") if name == "adaptive" else name
        return Training(sampler, schedule, seed=seed)

    whole, first, second = make(0), make(0), make(1)
    whole.steps(25)
    first.steps(11)
    parts = ("network", "optimizer", "sampler")
    th.save({part: getattr(first, part).state_dict() for part in parts}, tmp_path / "state.pt")
    for part, state in th.load(tmp_path / "state.pt", weights_only=True).items():
        getattr(second, part).load_state_dict(state)
    second.generator.set_state(first.generator.get_state())
    second.steps(14)
    for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert th.equal(a, b)
    a_state, b_state = whole.sampler.state_dict(), second.sampler.state_dict()
    assert all(th.equal(value, b_state[key]) for key, value in tensors(a_state).items())


def test_setup_starts_anew() -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1)
    Training(sampler).steps(5)
    used = copy.deepcopy(sampler)
    used.setup(process(n_times=7), (2,))
    assert used.sample(th.zeros(5, 2), rng()).t.max() < 7
    assert used.info() == {}
    assert used.queue.shape == (20, 7)


def test_logs() -> None:
    training = Training(AdaptiveTimestepSampler(update_frequency=2))
    assert training.sampler.info() == {}
    training.steps(8)
    info = training.sampler.info()
    assert {"reward", "reward_std", "entropy", "alpha", "beta", "overhead", "selected_0", "selected_1", "selected_2"} == set(info)
    assert all(value.ndim == 0 and th.isfinite(value) and not value.requires_grad for value in info.values())
    assert 0 < float(info["overhead"]) < 1
    assert float(info["entropy"]) <= 0


# ------------------------------------------------------------------ several processes


def _train_in_a_group(rank: int, folder: str) -> None:
    th.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for name in ("adaptive", "loss_second_moment"):
        sampler = AdaptiveTimestepSampler(update_frequency=2) if name == "adaptive" else name
        training = Training(sampler, seed=rank)  # other weights, data and draws in each process
        start = copy.deepcopy(training.sampler.state_dict())
        training.network = DistributedDataParallel(training.network)
        training.steps(20)
        weights = [parameter.detach() for parameter in training.network.parameters()]
        th.save(
            {"state": tensors(training.sampler.state_dict()), "start": tensors(start), "weights": weights},
            f"{folder}/{name}-{rank}.pt",
        )
    dist.destroy_process_group()


def tensors(state: dict[str, Any]) -> dict[str, th.Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, th.Tensor)}


def test_data_parallel_processes_keep_one_sampler(tmp_path: Path) -> None:
    spawn(_train_in_a_group, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for name in ("adaptive", "loss_second_moment"):
        first, second = (th.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        for key, value in first["state"].items():
            assert th.equal(value, second["state"][key]), key
        assert any(not th.equal(value, first["start"][key]) for key, value in first["state"].items())
        for a, b in zip(first["weights"], second["weights"], strict=True):
            th.testing.assert_close(a, b)
    assert float(first["state"]["count"].sum()) == 2 * 16 * 20  # the losses of both
