"""The Triton kernel of Langevin chains: on a GPU where there is one, else interpreted on the CPU, where Triton is installed."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

pytest.importorskip("triton")

from sb3_diffrl import NCLQL
from sb3_diffrl.lql import critic as critic_module
from sb3_diffrl.lql import triton_chain
from sb3_diffrl.lql.critic import StackedLinear
from sb3_diffrl.lql.gradients import AutogradQGradient
from sb3_diffrl.lql.langevin import ChainDraws, LangevinSampler
from sb3_diffrl.lql.policies import Backend

from .test_cuda_graphs import make
from .test_gradients import make_critic

DEVICE = th.device("cuda" if th.cuda.is_available() else "cpu")
OBS = 5


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel on whatever device the tests have, and no compiled C."""
    monkeypatch.setattr(critic_module.LangevinCritic, "can_compile", False)
    monkeypatch.setattr(critic_module, "gpu_kernels", lambda _: triton_chain)


@pytest.mark.parametrize("activation_fn", [nn.Mish, nn.ReLU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize(
    ("net_arch", "n_critics", "n_levels", "action_dim", "batch"),
    [([32, 32], 2, 3, 2, 5), ([20], 1, 1, 1, 1), ([16, 40, 24], 3, 2, 17, 33), ([64, 64, 64], 2, 2, 6, 16)],
)
def test_chains_equal_plain_ones(
    activation_fn: type[nn.Module], net_arch: list[int], n_critics: int, n_levels: int, action_dim: int, batch: int
) -> None:
    critic = make_critic(OBS, action_dim, net_arch, n_critics, n_levels, activation_fn).to(DEVICE)
    features = th.randn(batch, OBS, device=DEVICE)
    for normalize_grad in (False, True):
        # Short steps: a chain must not turn a rounding difference into another mode.
        sampler = LangevinSampler(n_levels, n_steps=3, step_size=1e-5, sigma_max=0.003, normalize_grad=normalize_grad)
        draws = sampler.draw(batch, action_dim, DEVICE)
        expected = sampler.sample(AutogradQGradient(critic, features), draws)
        before = [draw.clone() for draw in draws]
        actions = critic.sample(sampler, features, draws)
        assert (expected - draws.start).abs().mean() > 1e-4  # it moved
        th.testing.assert_close(actions, expected, atol=2e-5, rtol=0)
        assert all(th.equal(*pair) for pair in zip(draws, before, strict=True))


@pytest.mark.skipif(not th.cuda.is_available(), reason="Triton's interpreter does not multiply bfloat16")
def test_rounded_products_move_a_chain_by_little() -> None:
    critic = make_critic(OBS, 3, [64, 64, 64], 2, 2, nn.Mish).to(DEVICE)
    features, sampler = th.randn(33, OBS, device=DEVICE), LangevinSampler(2, n_steps=1, step_size=1e-5, sigma_max=0.003)
    draws = sampler.draw(33, 3, DEVICE)
    exact, rounded = (critic.sample(sampler, features, draws, dtype) for dtype in (th.float32, th.bfloat16))
    moved = (exact - draws.start).abs().mean()
    assert 0 < (exact - rounded).abs().mean() < 0.05 * moved


def test_what_a_chain_does_does_not_depend_on_its_batch() -> None:
    critic, sampler = make_critic(OBS, 3, [64, 64], 2, 4, nn.Mish).to(DEVICE), LangevinSampler(4)
    features, (start, noise) = th.randn(40, OBS, device=DEVICE), sampler.draw(40, 3, DEVICE)
    together = critic.sample(sampler, features, ChainDraws(start, noise))
    for rows in (slice(0, 1), slice(7, 30)):
        apart = critic.sample(sampler, features[rows], ChainDraws(start[rows], noise[:, :, rows]))
        assert th.equal(apart, together[rows])


@pytest.mark.parametrize("activation_fn", [nn.Mish, nn.ReLU, nn.Tanh, nn.SiLU])
def test_numbers_that_are_not_finite_stay_so(activation_fn: type[nn.Module]) -> None:
    critic, sampler = make_critic(OBS, 2, [16, 16], 2, 1, activation_fn).to(DEVICE), LangevinSampler(1)
    features = th.randn(3, OBS, device=DEVICE)
    features[1, 2] = float("nan")
    actions = critic.sample(sampler, features, sampler.draw(3, 2, DEVICE))
    assert actions.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("net_arch", "action_dim", "fits"), [([256], 64, True), ([257], 2, False), ([16], 65, False), ([], 2, False)]
)
def test_networks_that_do_not_fit_have_no_kernel(net_arch: list[int], action_dim: int, fits: bool) -> None:
    critic = make_critic(OBS, action_dim, net_arch, 1, 2, nn.Mish).to(DEVICE)
    assert (critic.chain_kernel is not None) == fits
    assert critic.double().chain_kernel is None


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("n_particles", [1, 3])
def test_on_a_gpu_the_backends_agree(n_particles: int) -> None:
    obs = np.random.default_rng(0).normal(size=(37, 3)).astype(np.float32)
    actions: dict[Backend, list[np.ndarray]] = {}
    kwargs: dict[str, Any] = {"device": "cuda", "n_particles": n_particles, "step_size": 1e-7, "sigma_max": 0.003}
    backends: tuple[Backend, ...] = ("torch", "native", "cuda_graphs")
    for backend in backends:
        model = make(NCLQL, policy_kwargs={"backend": backend}, **kwargs)
        assert model.policy.chain_backend == backend
        model.set_random_seed(0)
        actions[backend] = [model.predict(obs, deterministic=i % 2 == 0)[0] for i in range(10)]
    for backend in backends[1:]:
        np.testing.assert_allclose(actions[backend], actions["torch"], atol=1e-4)


def test_inputs_that_do_not_fit_are_refused() -> None:
    critic, sampler = make_critic(OBS, 2, [16, 16], 2, 3, nn.Mish).to(DEVICE), LangevinSampler(3)
    features, draws = th.randn(4, OBS, device=DEVICE), sampler.draw(4, 2, DEVICE)
    wrong = [
        (features[:, :-1], draws),
        (features, ChainDraws(draws.start, draws.noise[:1])),
        (features, ChainDraws(draws.start, draws.noise[:, :, :3])),
        (features, ChainDraws(draws.start[:2], draws.noise)),
    ]
    for others in wrong:
        with pytest.raises(RuntimeError, match="the networks take"):
            critic.sample(sampler, *others)
    spread = ChainDraws(*(draw.double().flip(0).flip(0).transpose(-1, -2).contiguous().transpose(-1, -2) for draw in draws))
    th.testing.assert_close(critic.sample(sampler, features, spread), critic.sample(sampler, features, draws))


COMPILE = """
import sys
import torch as th
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sb3_diffrl.lql import triton_chain

kernel = triton_chain._chain_kernel
for n_hidden, width, action_block, dtype in [(1, 16, 16, "bf16"), (1, 64, 64, "fp32"), (3, 256, 16, "bf16"), (3, 256, 16, "fp32")]:
    products = dict.fromkeys(("hidden", "hidden_transposed", "values"), f"*{dtype}")
    numbers = dict.fromkeys(("batch", "n_levels", "n_steps", "n_critics", "action_dim"), "i32")
    constants = {"N_HIDDEN": n_hidden, "WIDTH": width, "ROWS": triton_chain.BLOCK_ROWS, "ACTION_BLOCK": action_block}
    constants |= {"INNER": min(width, 64 if dtype == "bf16" else 32), "FIRST_INNER": min(width, 32), "ACTIVATION": 3}
    constants |= {"NORMALIZE": True, "EPS": 1e-8, "PRECISION": "tf32x3"}
    types = {n: products.get(n) or numbers.get(n) or ("constexpr" if n in constants else "*fp32") for n in kernel.arg_names}
    source = ASTSource(kernel, types, {(kernel.arg_names.index(n),): value for n, value in constants.items()})
    options = {"num_warps": triton_chain.WARPS, "num_stages": triton_chain.STAGES}
    compiled = compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert compiled.metadata.shared < 99 * 1024, compiled.metadata.shared
print("compiled")
"""


def test_the_kernel_compiles_for_a_gpu() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


def test_of_one_layer_the_products_that_are_not_made_have_the_right_type() -> None:
    critic = make_critic(OBS, 2, [16], 2, 1, nn.Mish)
    layers = [layer for layer in critic.layers if isinstance(layer, StackedLinear)]
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers]
    arranged = triton_chain._arrange(weights, biases, None, th.randn(3, OBS), 2, th.bfloat16)
    assert [tensor.dtype for tensor in arranged[4:6]] == [th.bfloat16] * 2
