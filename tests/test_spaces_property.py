"""On spaces of every kind: construct, learn, save, load, predict; the action is in the space, of its type."""

import io
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_diffrl import NCLQL, DiffusionBC, OfflineDataset
from sb3_diffrl.lql.env_guard import check_observable
from sb3_diffrl.lql.policies import CnnPolicy
from sb3_diffrl.offline.spaces import ObservationFlattener

from .envs import RandomEnv

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FLOATS = st.sampled_from([np.float32, np.float64])
SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


@st.composite
def action_spaces(draw: st.DrawFn) -> spaces.Box:
    """Bounded boxes of one to three dimensions, with bounds that are asymmetric, tiny or huge."""
    shape, dtype = draw(SHAPES), draw(FLOATS)
    width = 10.0 ** draw(st.integers(-6, 20))
    # An offset much larger than the width would leave no room between the bounds in the space's type.
    offset = width * draw(st.sampled_from([-0.5, 0.0, 3.0, -100.0]))
    widths = width * np.array(draw(st.lists(st.floats(0.1, 1.0), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))))
    return spaces.Box((offset - widths.reshape(shape)).astype(dtype), (offset + widths.reshape(shape)).astype(dtype), dtype=dtype)  # type: ignore[arg-type]


@st.composite
def box_observations(draw: st.DrawFn) -> spaces.Box:
    """Boxes that may be bounded, unbounded, of integers, or without room."""
    shape = draw(SHAPES)
    low, high, dtype = draw(
        st.sampled_from(
            [
                *[(-1.0, 1.0, np.float32), (-np.inf, np.inf, np.float64), (0.0, 1e-9, np.float64), (-1e9, 1e6, np.float32)],
                *[(0, 255, np.uint8), (-7, 100, np.int64), (2.5, 2.5, np.float32), (-1, 1, np.float16)],
            ]
        )
    )
    return spaces.Box(low, high, shape, dtype)  # type: ignore[arg-type]


IMAGES = st.just(spaces.Box(0, 255, (36, 36, 3), np.uint8))
PARTS = st.one_of(
    box_observations(), st.builds(spaces.Discrete, st.integers(1, 5)), st.builds(spaces.MultiBinary, st.integers(1, 3))
)
DICTS = st.dictionaries(st.sampled_from(["b", "a", "last"]), PARTS, min_size=1).map(spaces.Dict)


def holds_images(space: spaces.Space[Any]) -> bool:
    if isinstance(space, spaces.Dict):
        return any(holds_images(part) for part in space.values())
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1


def policy_for(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if space.shape == (36, 36, 3) else "MlpPolicy"


def check_actions(model: Any, observations: Any, action_space: spaces.Box, n: int) -> None:
    for deterministic in (True, False):
        actions, _ = model.predict(observations, deterministic=deterministic)
        assert actions.dtype == action_space.dtype
        assert actions.shape == (n, *action_space.shape)
        assert all(action_space.contains(action) for action in actions)


@SETTINGS
@given(st.one_of(box_observations(), DICTS, IMAGES), action_spaces(), st.integers(1, 4))
@example(spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Box(-1, 1, (1,)), 2)
def test_online(observation_space: spaces.Space[Any], action_space: spaces.Box, n_envs: int) -> None:
    env = DummyVecEnv([lambda: RandomEnv(observation_space, action_space) for _ in range(n_envs)])
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "n_levels": 2, "n_langevin_steps": 1, "buffer_size": 60}
    model = NCLQL(policy_for(observation_space), env, learning_starts=20, batch_size=4, device="cpu", seed=0, **kwargs)
    model.learn(50)
    for each in env.envs:
        assert all(action_space.contains(action) for action in each.unwrapped.actions)  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    loaded = NCLQL.load(buffer, env=env, device="cpu")
    assert loaded.action_space == action_space
    assert env.observation_space == observation_space
    check_actions(loaded, env.reset(), action_space, n_envs)


@SETTINGS
@given(st.one_of(box_observations(), DICTS), action_spaces())
def test_offline(observation_space: spaces.Space[Any], action_space: spaces.Box) -> None:
    assume(not holds_images(observation_space))  # the offline agents refuse them
    observation_space.seed(0)
    action_space.seed(0)
    flatten, n = ObservationFlattener(observation_space), 20
    rows = np.concatenate([flatten(observation_space.sample(), batched=False) for _ in range(n + 2)])
    actions = np.stack([action_space.sample().reshape(-1) for _ in range(n)]).astype(np.float32)
    ends = np.arange(1, n + 1) % 10 == 0
    data = OfflineDataset(
        *(rows, actions, np.zeros(n, np.float32), np.zeros(n, bool), ends, np.arange(0, n + 1, 10), observation_space, action_space)
    )
    model = DiffusionBC("MlpPolicy", dataset=data, policy_kwargs={"net_arch": [4]}, batch_size=4, device="cpu", seed=0)
    model.env = DummyVecEnv([lambda: RandomEnv(spaces.Box(-1, 1, (1,)), action_space)])
    model.learn(50)
    buffer = io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    loaded = DiffusionBC.load(buffer, device="cpu")
    for deterministic in (True, False):
        action, _ = loaded.predict(observation_space.sample(), deterministic=deterministic)
        assert action.dtype == action_space.dtype
        assert action_space.contains(action)


BOX, ACTION = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))
UNSUPPORTED: dict[str, tuple[spaces.Space[Any], spaces.Space[Any], str]] = {
    "discrete actions": (BOX, spaces.Discrete(3), r"Discrete\(3\)"),
    "integer actions": (BOX, spaces.Box(-3, 3, (1,), np.int32), "holds integers: only floating-point"),
    "unbounded actions": (BOX, spaces.Box(-np.inf, np.inf, (1,)), "bound"),
    "no room": (BOX, spaces.Box(1, 1, (1,)), "has coordinates whose low is not below their high"),
    "no action": (BOX, spaces.Box(-1, 1, (0,)), "is empty: there is nothing to decide"),
    "an action longer than torch's": (BOX, spaces.Box(-1, 1, (2,), np.longdouble), r"Box\(.* holds \w+, which torch has not"),
    "text": (spaces.Text(3), ACTION, "Text"),
    "graph": (spaces.Graph(spaces.Box(0, 1), None), ACTION, "Graph"),
    "longer than torch's": (spaces.Box(-1, 1, (2,), np.longdouble), ACTION, r"Box\(.* not supported: torch has no .*DtypeObs"),
    "empty": (spaces.Box(-1, 1, (3, 0)), ACTION, r"Box\(.* is empty: leave it out"),
    "an empty part": (spaces.Dict(a=BOX, b=spaces.Box(-1, 1, (0,))), ACTION, r"Dict\(.* is empty: leave it out"),
    "no part": (spaces.Dict({}), ACTION, r"Dict\(\) is not supported: it has no part"),
}
# `FlattenObservation` makes vectors of them.
TO_FLATTEN: dict[str, tuple[spaces.Space[Any], str]] = {
    "counted from another number": (spaces.Discrete(3, start=5), "does not count from 0"),
    "many, counted from another number": (spaces.MultiDiscrete([2, 3], start=[0, -2]), "does not count from 0"),
    "a part counted from a negative number": (spaces.Dict(a=BOX, d=spaces.Discrete(3, start=-1)), "does not count from 0"),
    "two axes": (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), "has 2 axes"),
    "a part without axes": (spaces.Dict(a=BOX, n=spaces.Box(-1, 1, ())), "has 0 axes"),
    "no axes": (spaces.Box(-1, 1, ()), "has 0 axes"),
    "a point in a name": (spaces.Dict({"arm.angle": BOX}), "named like its part 'arm.angle'"),
    "no name": (spaces.Dict({"": BOX}), "named like its part ''"),
    "a name that torch's modules have": (spaces.Dict({"keys": BOX}), "named like its part 'keys'"),
    "a tuple": (spaces.Tuple((BOX, BOX)), "none of the spaces"),
    "a dictionary in a dictionary": (spaces.Dict(a=spaces.Dict(b=BOX)), "none of the spaces"),
}


def tiny(observation_space: spaces.Space[Any], env: gym.Env[Any, Any]) -> NCLQL:
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    return NCLQL(policy, env, buffer_size=50, learning_starts=5, batch_size=4, policy_kwargs={"net_arch": [4]}, device="cpu")


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_spaces_are_named(kind: str) -> None:
    observation_space, action_space, named = UNSUPPORTED[kind]
    with pytest.raises((ValueError, AssertionError, NotImplementedError), match=named):
        tiny(observation_space, RandomEnv(observation_space, action_space))


@pytest.mark.parametrize("kind", TO_FLATTEN)
def test_spaces_that_are_refused_can_be_flattened_as_the_message_says(kind: str) -> None:
    observation_space, named = TO_FLATTEN[kind]
    env = RandomEnv(observation_space, ACTION)
    with pytest.raises(ValueError, match="(?s)not supported: .*" + named) as caught:
        tiny(observation_space, env)
    assert str(observation_space) in str(caught.value)
    assert "gymnasium.wrappers.FlattenObservation" in str(caught.value)
    flat = FlattenObservation(env)
    model = tiny(flat.observation_space, flat).learn(20)
    assert model.action_space.contains(model.predict(flat.reset()[0])[0])


@pytest.mark.parametrize("policy", ["CnnPolicy", CnnPolicy, "MultiInputPolicy"])
def test_images_too_small_for_the_convolutions_are_named(policy: str | type[CnnPolicy]) -> None:
    def space(side: int) -> spaces.Space[Any]:
        image = spaces.Box(0, 255, (side, 40, 3), np.uint8)
        return spaces.Dict(image=image) if policy == "MultiInputPolicy" else image

    with pytest.raises(ValueError, match=r"Box\(0, 255, \(35, 40, 3\), uint8\).* fewer than 36 pixels.*ResizeObservation"):
        check_observable(space(35), policy)
    check_observable(space(36), policy)
    check_observable(space(35), policy, {"features_extractor_class": FlattenExtractor})
    check_observable(space(35), "MlpPolicy")
    # The limit is that of the network.
    env = RandomEnv(space(36), ACTION)
    NCLQL(policy, env, buffer_size=5, policy_kwargs={"net_arch": [4]}, device="cpu")
