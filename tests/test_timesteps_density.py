"""What the learned timestep sampler draws from: the swept density, the Beta over its mass, the uniform share."""

import math
from typing import Any

import pytest
import torch as th
from scipy import stats

from sb3_diffrl.native import library
from sb3_diffrl.timesteps import AdaptiveTimestepSampler, native

from .timestep_tools import process, rng

needs_compiler = pytest.mark.skipif(library.load() is None, reason="no C compiler")


@pytest.fixture(params=[pytest.param("compiled", marks=needs_compiler), "torch"], autouse=True)
def drawn_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "supports", lambda *_: False)


def with_errors(sampler: AdaptiveTimestepSampler, error: th.Tensor, n_updates: int) -> None:
    """Updates of the policy with a model that stays as it is, whose squared error at the swept times is the given one."""
    generator = rng()
    x0 = th.randn(16, 3, generator=generator)
    weight, offset = sampler.process.schedule.bound_coefficients(sampler.sweep_timesteps)
    planted = (weight * error + offset) / th.tensor(2.0).log()

    def bound_terms(rows: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        terms: th.Tensor = planted[th.searchsorted(sampler.sweep_timesteps, t).clamp(max=len(planted) - 1)]
        return terms

    for _ in range(n_updates):
        sampler.sample(x0, generator)
        with sampler.around_step(x0, th.ones(16), bound_terms, generator):
            pass


@pytest.mark.parametrize("powers", [(0.5, 0.5), (0.0, 1.0), (0.25, 0.75), (1.0, 1.0)])
@pytest.mark.parametrize("schedule", ["linear", "vp", "squaredcos_cap_v2"])
def test_without_a_reward_times_are_drawn_from_the_swept_density(schedule: Any, powers: tuple[float, float]) -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=50, sweep_powers=powers, uniform_floor=0.2)
    th.manual_seed(0)
    sampler.setup(process(schedule), (3,))
    error = (1 + th.arange(50.0)) ** -0.5
    with_errors(sampler, error, 100)
    every_time = sampler.process.schedule.timesteps_at((th.arange(5000) + 0.5) / 5000)
    weight = sampler.process.schedule.bound_coefficients(every_time).weight.view(50, 100).mean(1)
    density = weight ** powers[0] * error ** powers[1]
    expected = 0.8 * density / density.sum() + 0.2 / 50
    t = sampler.sample(th.zeros(50_000, 3), rng(1)).t
    edges = sampler.process.schedule.timesteps_at(th.arange(1, 50) / 50)
    drawn = th.bincount(th.searchsorted(edges, t, right=True), minlength=50) / 50_000
    assert (drawn - expected).abs().max() < 0.005


@pytest.mark.parametrize("schedule", ["linear", "vp"])
def test_an_untrained_model_is_trained_at_uniform_times(schedule: Any) -> None:
    """All its errors are 1, at the start and in every sweep."""
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=50)
    th.manual_seed(0)
    sampler.setup(process(schedule), (3,))
    for _ in range(3):
        th.testing.assert_close(sampler.cumulative, th.linspace(0, 1, 51), rtol=0, atol=1e-4)
        with_errors(sampler, th.ones(50), 1)


def test_the_swept_density_follows_the_errors_at_the_pace_of_the_sweeps() -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=4, statistics_decay=0.5)
    sampler.setup(process(), (3,))
    with_errors(sampler, th.tensor([1.0, 0.0, 0.0, 0.0]), 1)
    # Half of the running mean is still the errors of 1 that were there before.
    th.testing.assert_close(sampler.cumulative.diff(), th.tensor([1.5, 0.5, 0.5, 0.5]) / 3, rtol=1e-3, atol=1e-4)
    with_errors(sampler, th.tensor([1.0, 0.0, 0.0, 0.0]), 60)
    th.testing.assert_close(sampler.cumulative.diff(), th.tensor([1.0, 0.0, 0.0, 0.0]), rtol=0, atol=1e-4)
    t = sampler.sample(th.zeros(1000, 3), rng()).t
    assert ((t >= 0) & (t < 100)).all()


def test_a_perfect_model_leaves_the_density_uniform() -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=10, statistics_decay=0.0)
    sampler.setup(process(), (3,))
    with_errors(sampler, th.zeros(10), 3)
    th.testing.assert_close(sampler.cumulative, th.linspace(0, 1, 11), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["sweep", "uniform"])
def test_full_importance_weights_leave_the_expected_loss_as_under_uniform_times(base: Any) -> None:
    sampler = AdaptiveTimestepSampler(update_frequency=1, sweep_size=20, base=base, importance=1.0, concentration_range=(0.5, 2.0))
    th.manual_seed(0)
    sampler.setup(process(n_times=20), (3,))
    with_errors(sampler, th.linspace(1, 0.1, 20), 10)
    with th.no_grad():
        *_, last = sampler.policy.parameters()
        last.copy_(th.tensor([0.5, -0.7]))  # a Beta that is not the uniform one
    loss = th.linspace(3, 1, 20).square()
    t, weight = sampler.sample(th.zeros(200_000, 3), rng(1))
    assert float(loss[t].mean()) > 1.03 * float(loss.mean()) or float(loss[t].mean()) < 0.97 * float(loss.mean())
    assert float((weight * loss[t]).mean()) == pytest.approx(float(loss.mean()), rel=0.01)


def test_importance_is_a_power_of_the_density() -> None:
    draws = []
    for importance in (0.0, 0.5, 1.0):
        sampler = AdaptiveTimestepSampler(importance=importance)
        th.manual_seed(0)
        sampler.setup(process(), (3,))
        sampler.cumulative.copy_(th.linspace(0, 1, 101).sqrt())
        draws.append(sampler.sample(th.zeros(100, 3), rng()))
    none, half, full = draws
    assert th.equal(none.t, full.t)
    assert th.equal(none.weight, th.ones(100))
    th.testing.assert_close(half.weight.square(), full.weight)
    assert full.weight.std() > 0.1


def test_no_time_is_ever_left_out() -> None:
    sampler = AdaptiveTimestepSampler(concentration_range=(0.5, 4.0), uniform_floor=0.2)
    sampler.setup(process(n_times=10), (2,))
    with th.no_grad():
        *_, last = sampler.policy.parameters()
        last.copy_(th.tensor([50.0, -50.0]))  # as far as it goes
        beta = sampler.policy(th.zeros(1, 2))
    assert float(beta.concentration1) == pytest.approx(4.0)
    assert float(beta.concentration0) == pytest.approx(0.5)
    t = sampler.sample(th.zeros(20_000, 2), rng()).t
    # A fifth of the draws is uniform.
    assert (th.bincount(t, minlength=10) / 20_000).min() >= 0.2 / 10 - 5 * (0.02 / 20_000) ** 0.5


@pytest.mark.parametrize("base", ["sweep", "uniform"])
def test_log_density_is_that_of_the_mixture(base: Any) -> None:
    sampler = AdaptiveTimestepSampler(uniform_floor=0.3, base=base)
    sampler.setup(process(), (2,))
    grid = (th.arange(1000) + 0.5) / 1000
    mass, slope = grid, th.ones(1000)
    if base == "sweep":
        # Mass x^2 below x, in 100 straight pieces
        sampler.cumulative.copy_(th.linspace(0, 1, 101).square())
        cell = (grid * 100).floor() / 100
        slope = 2 * cell + 0.01
        mass = cell**2 + (grid - cell) * slope
    concentrations = th.tensor([[2.0, 3.0]]).expand(1000, 2)
    density = sampler._log_density(concentrations, 100 * grid).exp()
    th.testing.assert_close(density, 0.3 + 0.7 * 12 * mass * (1 - mass) ** 2 * slope, rtol=1e-3, atol=1e-3)
    assert float(density.mean()) == pytest.approx(1, abs=1e-3)


def an_uneven_sampler(n_features: int, **settings: Any) -> AdaptiveTimestepSampler:
    """One whose policy looks at the data, over a density that is far from uniform."""
    sampler = AdaptiveTimestepSampler(**settings).setup(process(), (n_features,))
    generator = rng()
    with th.no_grad():
        for parameter in sampler.policy.parameters():
            parameter.copy_(0.3 * th.randn(parameter.shape, generator=generator))
    n = len(sampler.cumulative)
    sampler.cumulative.copy_(th.linspace(0, 1, n).square())
    return sampler


@needs_compiler
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"uniform_floor": 0.0, "importance": 1.0},
        {"importance": 0.0, "uniform_floor": 0.3, "sweep_size": 7},
        {"net_arch": (17, 40, 3), "concentration_range": (0.01, 30.0)},
        {"net_arch": (), "sweep_size": 1},
    ],
)
@pytest.mark.parametrize("n_features", [1, 33])
def test_compiled_draws_are_distributed_and_weighed_as_those_of_torch(settings: dict[str, Any], n_features: int) -> None:
    sampler = an_uneven_sampler(n_features, **settings)
    layers = sampler._linears
    assert layers is not None
    low, high = (math.log(bound) for bound in sampler.concentration_range or ())
    for row in th.randn(3, n_features, generator=rng(1)):
        x0 = row.expand(20_000, -1)
        with th.no_grad():
            drawn = native.draw(layers, (low, high), x0, sampler.cumulative, sampler.uniform_floor, sampler.importance, rng(2))
            position, _ = sampler._draw_in_torch(x0, rng(3))
            concentrations = sampler.policy.concentrations(x0)
            weight = th.exp(-sampler.importance * sampler._log_density(concentrations, drawn.position))
        th.testing.assert_close(drawn.concentrations, concentrations, rtol=1e-4, atol=1e-5)
        th.testing.assert_close(drawn.weight, weight, rtol=1e-3, atol=1e-4)
        assert stats.ks_2samp(drawn.position, position).pvalue > 1e-3
        assert ((drawn.position >= 0) & (drawn.position < len(sampler.sweep_timesteps))).all()


@pytest.mark.parametrize("batch", [1, 47, 48, 100])
def test_draws_follow_the_generator_and_each_row_has_its_own(batch: int) -> None:
    sampler = an_uneven_sampler(5)
    x0 = th.randn(batch, 5, generator=rng())
    first, again, other = (sampler.sample(x0, rng(seed)) for seed in (0, 0, 1))
    assert th.equal(first.t, again.t)
    assert th.equal(first.weight, again.weight)
    assert not th.equal(first.weight, other.weight)
    assert len(set(first.weight.tolist())) == batch


@needs_compiler
def test_compiled_draws_end_where_the_data_is_not_a_number() -> None:
    sampler = an_uneven_sampler(2)
    assert sampler._linears is not None
    drawn = native.draw(sampler._linears, (-1.0, 1.0), th.full((3, 2), th.nan), sampler.cumulative, 0.0, 0.5, rng())
    assert drawn.position.isnan().all()
    assert drawn.weight.isnan().all()


def test_data_of_another_width_is_refused() -> None:
    sampler = an_uneven_sampler(8)
    with pytest.raises(RuntimeError):
        sampler.sample(th.randn(4, 3))


@needs_compiler
def test_compiled_code_is_left_out_on_request_and_for_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws_compiled(x0: th.Tensor, **settings: Any) -> bool:
        sampler = AdaptiveTimestepSampler(**settings).setup(process(), tuple(x0.shape[1:]))
        return sampler._draw_compiled(x0, None) is not None

    monkeypatch.undo()
    assert draws_compiled(th.zeros(4, 3))
    assert draws_compiled(th.zeros(4, 3, 2))
    assert not draws_compiled(th.zeros(4, 1, 8, 8))
    assert not draws_compiled(th.zeros(4, 3), concentration_range=None)
    sampler = AdaptiveTimestepSampler().setup(process(), (3,))
    sampler.use_native = False
    assert sampler._draw_compiled(th.zeros(4, 3), None) is None
    assert AdaptiveTimestepSampler().setup(process(), (3,)).double()._draw_compiled(th.zeros(4, 3), None) is None
