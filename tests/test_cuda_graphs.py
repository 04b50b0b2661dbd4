"""Updates and chains as CUDA graphs. On a CPU all but the graph itself is tested: a stand-in runs the recorded function again."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_diffrl import LQL, NCLQL
from sb3_diffrl.common import NonFiniteError
from sb3_diffrl.lql import cuda_graphs
from sb3_diffrl.lql.cuda_graphs import N_EAGER, CudaGraphs, GraphedUpdate

from .envs import box_env

ALGORITHMS = pytest.mark.parametrize("algorithm", [LQL, NCLQL])
BATCH, OBS, ACTION = 8, 3, 2


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs on a CPU: a recorded function runs at each replay, on the inputs it was recorded with. Lists what was recorded."""
    found: list[Any] = []

    def capture(function: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Callable[[], None], Any]:
        found.append(function)
        outputs: dict[str, th.Tensor] = {}
        return lambda: outputs.update(function(*inputs)), outputs

    @contextmanager
    def side_stream() -> Iterator[None]:
        yield

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "side_stream", side_stream)
    return found


def make(algorithm: type[LQL], **kwargs: Any) -> LQL:
    policy_kwargs: dict[str, Any] = {"net_arch": [16, 16], "backend": "torch", **kwargs.pop("policy_kwargs", {})}
    if algorithm is NCLQL:
        kwargs["n_levels"] = 3
    options: dict[str, Any] = {"n_langevin_steps": 2, "buffer_size": 100, "device": "cpu", "seed": 0, **kwargs}
    return algorithm("MlpPolicy", box_env(OBS, ACTION), policy_kwargs=policy_kwargs, **options)


def batch(seed: int, device: str = "cpu") -> ReplayBufferSamples:
    generator = th.Generator().manual_seed(seed)
    shapes = [(BATCH, OBS), (BATCH, ACTION), (BATCH, OBS), (BATCH, 1), (BATCH, 1)]
    obs, actions, next_obs, dones, rewards = (th.rand(*shape, generator=generator).to(device) for shape in shapes)
    return ReplayBufferSamples(obs, 2 * actions - 1, next_obs, dones.round(), rewards)


def weights(model: LQL) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@ALGORITHMS
def test_replayed_updates_equal_plain_ones(algorithm: type[LQL], recorded: list[Any]) -> None:
    plain, graphed = make(algorithm), make(algorithm)
    update = GraphedUpdate(graphed)
    for i in range(N_EAGER + 4):
        draws = plain.draw(BATCH)
        expected, metrics = plain.update(batch(i), draws), update(batch(i), draws)
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            th.testing.assert_close(value, expected[name])
    th.testing.assert_close(weights(graphed), weights(plain))
    assert len(recorded) == 1


def test_a_new_learning_rate_holds_without_a_new_capture(recorded: list[Any]) -> None:
    model = make(NCLQL)
    update = GraphedUpdate(model)
    for i in range(N_EAGER + 1):
        update(batch(i), model.draw(BATCH))
    model.critic.optimizer.param_groups[0]["lr"] = 0.0
    before = th.nn.utils.parameters_to_vector(model.critic.parameters()).detach()
    update(batch(9), model.draw(BATCH))
    assert th.equal(th.nn.utils.parameters_to_vector(model.critic.parameters()), before)
    assert model.critic.optimizer.param_groups[0]["lr"] == 0.0
    assert len(recorded) == 1


@pytest.mark.parametrize("change", ["gamma", "tau", "reward_scale", "inverse_temperature", "weights", "shape", "optimizer"])
def test_captures_anew_when_what_it_depends_on_changes(change: str, recorded: list[Any]) -> None:
    model = make(NCLQL)
    update = GraphedUpdate(model)
    for i in range(N_EAGER + 2):
        update(batch(i), model.draw(BATCH))
    data = batch(0)
    if change == "weights":
        for parameter in model.critic.parameters():
            parameter.data = parameter.data.clone()
    elif change == "shape":
        data = ReplayBufferSamples(*(None if x is None else th.cat([x, x]) for x in data))  # type: ignore[arg-type]
    elif change == "optimizer":
        model.critic.optimizer.load_state_dict(model.critic.optimizer.state_dict())
    else:
        setattr(model, change, 0.5 * getattr(model, change))
        model._apply_settings()
    for _ in range(N_EAGER + 2):
        update(data, model.draw(len(data.actions)))
    assert len(recorded) == 2


@ALGORITHMS
@pytest.mark.parametrize("calls", [1, N_EAGER + 2])
def test_a_non_finite_loss_is_left_out_and_told(algorithm: type[LQL], calls: int, recorded: list[Any]) -> None:
    model = make(algorithm)
    update = GraphedUpdate(model)
    for i in range(calls - 1):
        update(batch(i), model.draw(BATCH))
    assert update.take_faults() == []
    before = th.nn.utils.parameters_to_vector(model.critic.parameters()).detach()
    bad = batch(50)
    bad.rewards[3] = float("nan")
    update(bad, model.draw(BATCH))
    assert th.equal(th.nn.utils.parameters_to_vector(model.critic.parameters()), before)
    assert th.isfinite(weights(model)).all()
    assert [type(fault) for fault in update.take_faults()] == [NonFiniteError]
    assert update.take_faults() == []
    update(batch(51), model.draw(BATCH))
    assert not th.equal(th.nn.utils.parameters_to_vector(model.critic.parameters()), before)


class NoTransfer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses copies from one device to another, which cannot be in a graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            assert source.device == result.device, f"copied from {source.device} to {result.device}"
        return result


@ALGORITHMS
def test_the_host_neither_waits_nor_copies_in_an_update(algorithm: type[LQL], monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors of the meta device have no values: to wait for one is an error.
    model = make(algorithm)
    model.policy.to("meta")
    model.device = th.device("meta")
    monkeypatch.setattr(model.critic.optimizer, "step", lambda: None)  # which has no meta kernel
    update, data, draws = GraphedUpdate(model), batch(0, "meta"), model.draw(BATCH)
    with update._on_device():
        update._update(data, draws)  # constants are copied at the first
        with NoTransfer():  # type: ignore[no-untyped-call]
            update._update(data, draws)


def test_chains_are_captured_by_shape_and_few_shapes_keep_memory(recorded: list[Any]) -> None:
    graphs = CudaGraphs()

    def double(x: th.Tensor, y: dict[str, th.Tensor | None]) -> dict[str, th.Tensor]:
        assert y["a"] is not None
        return {"sum": 2 * x + y["a"]}

    for size in range(1, cuda_graphs.MAX_SHAPES + 3):
        for i in range(N_EAGER + 2):
            x = th.full((size,), float(i))
            assert th.equal(graphs(double, (x, {"a": x, "b": None}))["sum"], 3 * x)
    assert len(recorded) == cuda_graphs.MAX_SHAPES
    assert copy.deepcopy(graphs)._captured == {}


def test_results_are_the_callers_own(recorded: list[Any]) -> None:
    graphs = CudaGraphs()
    results = [graphs(lambda x: {"y": x + 1}, (th.tensor(float(i)),))["y"] for i in range(N_EAGER + 3)]
    assert [float(y) for y in results] == [i + 1 for i in range(N_EAGER + 3)]


def test_a_model_that_asks_for_graphs_runs_on_a_cpu_as_any_other() -> None:
    asks, auto = (make(NCLQL, policy_kwargs={"backend": backend}).learn(110) for backend in ("cuda_graphs", "auto"))
    assert asks.policy.chain_backend == auto.policy.chain_backend
    assert th.equal(weights(asks), weights(auto))


def test_a_critic_of_ones_own_has_no_graphs() -> None:
    model = make(NCLQL, policy_kwargs={"backend": "cuda_graphs", "activation_fn": th.nn.ELU})
    model.policy.to("meta")
    with pytest.raises(RuntimeError, match="cuda_graphs"):
        _ = model.policy.chain_backend


def test_other_optimisers_are_refused() -> None:
    with pytest.raises(ValueError, match="SGD"):
        GraphedUpdate(make(NCLQL, policy_kwargs={"optimizer_class": th.optim.SGD}))


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA GPU")
@ALGORITHMS
def test_on_a_gpu_graphs_learn_what_plain_updates_learn(algorithm: type[LQL]) -> None:
    models = {}
    for backend in ("torch", "cuda_graphs"):
        model = make(algorithm, device="cuda", learning_starts=20, batch_size=BATCH, policy_kwargs={"backend": backend})
        models[backend] = model.learn(40)
        assert np.isfinite(model.predict(np.zeros((5, OBS), np.float32), deterministic=True)[0]).all()
    th.testing.assert_close(weights(models["cuda_graphs"]), weights(models["torch"]), rtol=1e-3, atol=1e-4)
