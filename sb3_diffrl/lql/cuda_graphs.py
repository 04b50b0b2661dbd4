"""Langevin chains and whole updates as CUDA graphs: one launch in the place of one for each kernel.

A chain is hundreds of small kernels. A graph of them is launched as one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch as th
from torch.utils import _pytree as pytree

from sb3_diffrl.common import NonFiniteError

if TYPE_CHECKING:
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    from sb3_diffrl.lql.langevin import UpdateDraws
    from sb3_diffrl.lql.lql import LQL, Metrics

# Calls before the capture: libraries that choose an algorithm or take memory at their first calls do it in these.
N_EAGER = 3
# Shapes that are captured, of which each keeps memory of its own; others run kernel by kernel.
MAX_SHAPES = 8

Function = Callable[..., Any]


def capture(function: Function, inputs: tuple[Any, ...]) -> tuple[Callable[[], None], Any]:
    """Record a function's kernels, which are not run.

    :param inputs: whose tensors are read again at each replay
    :return: what runs the kernels, and the function's result, whose tensors each replay fills anew
    """
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        outputs = function(*inputs)
    return graph.replay, outputs


@contextmanager
def side_stream() -> Iterator[None]:
    """Run what is in the block off the default stream, as the calls before a capture must be."""
    stream = th.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(th.cuda.current_stream())
    with th.cuda.stream(stream):
        yield
    th.cuda.current_stream().wait_stream(stream)


class CudaGraphs:
    """A function of tensors on a GPU, replayed as a CUDA graph from the fourth call with the same shapes on.

    Its arguments and result are tensors, or tuples and dictionaries of tensors and other values. Tensors that it reads besides
    (weights) are written in place; when they are others, ``forget()`` or another ``setting`` has to say so.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Capture anew at the next calls."""
        self._captured: dict[Any, tuple[Any, Callable[[], None], Any]] = {}
        self._calls: dict[Any, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or a model read from a file, captures its own.
        return (CudaGraphs, ())

    def __call__(self, function: Function, inputs: tuple[Any, ...], setting: Any = None) -> Any:
        """What ``function(*inputs)`` returns, in tensors of the caller's own.

        :param setting: whatever else the kernels depend on, hashable
        """
        leaves, structure = pytree.tree_flatten(inputs)
        key = (setting, str(structure), *((x.shape, x.dtype) if isinstance(x, th.Tensor) else x for x in leaves))
        if key not in self._captured:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= N_EAGER or len(self._captured) >= MAX_SHAPES:
                with side_stream():
                    return function(*inputs)
            kept = pytree.tree_map_only(th.Tensor, th.clone, inputs)
            self._captured[key] = (kept, *capture(function, kept))
        kept, replay, outputs = self._captured[key]
        for target, source in zip(pytree.tree_leaves(kept), leaves, strict=True):
            if isinstance(target, th.Tensor):
                target.copy_(source)
        replay()
        return pytree.tree_map_only(th.Tensor, th.clone, outputs)


class GraphedUpdate:
    """``LQL.update()`` as a CUDA graph. The host waits for nothing in it.

    A loss or gradient that is not finite is found on the device: the optimiser leaves that step out, and ``take_faults()`` tells.

    :param model: agent with an Adam optimiser, on a GPU
    :raises ValueError: if its optimiser cannot be captured
    """

    def __init__(self, model: "LQL") -> None:
        self.model = model
        self.optimizer = model.critic.optimizer
        if not isinstance(self.optimizer, (th.optim.Adam, th.optim.AdamW)) or not self.optimizer.defaults["fused"]:
            raise ValueError(
                f"A {type(self.optimizer).__name__} with these `optimizer_kwargs` cannot be in a CUDA graph: use Adam or AdamW, "
                'without `foreach` and `differentiable`, or `backend="torch"`.'
            )
        self.graphs = CudaGraphs()
        self.state = self.optimizer.state
        self.learning_rate = th.zeros((), device=model.device)
        self.found, self.faults = (th.zeros((), device=model.device) for _ in range(2))

    def __call__(self, replay_data: "ReplayBufferSamples", draws: "UpdateDraws") -> "Metrics":
        """See ``LQL.update()``."""
        if self.optimizer.state is not self.state:  # it was loaded
            self.graphs.forget()
            self.state = self.optimizer.state
        model = self.model
        place = next(model.critic.layers.parameters()).data_ptr()
        setting = (model.policy.sampler, model.reward_scale, model.gamma, model.tau, place)
        with self._on_device(), model.policy.plain_chains():
            metrics: Metrics = self.graphs(self._update, (replay_data, draws), setting)
        return metrics

    def _update(self, replay_data: "ReplayBufferSamples", draws: "UpdateDraws") -> "Metrics":
        self.found.zero_()
        metrics = self.model.update(replay_data, draws)
        self.faults += self.found
        return metrics

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        # Numbers that the optimiser reads on the host become tensors on the device while it is captured
        optimizer: Any = self.optimizer
        before = [(group, group["lr"], group["capturable"]) for group in optimizer.param_groups]
        self.learning_rate.fill_(before[0][1])
        for group in optimizer.param_groups:
            group.update(lr=self.learning_rate, capturable=True)
        optimizer.found_inf = self.found
        self.model._check_gradient = self.check  # type: ignore[method-assign]
        try:
            yield
        finally:
            for group, lr, capturable in before:
                group.update(lr=lr, capturable=capturable)
            del optimizer.found_inf, self.model._check_gradient

    def check(self, loss: th.Tensor, name: str) -> th.Tensor:
        """Note, on the device, whether a loss or its gradient is not finite; the optimiser looks at it.

        :return: norm of the gradient
        """
        del name
        norm = th.nn.utils.get_total_norm([p.grad for p in self.model.critic.parameters() if p.grad is not None])
        self.found.copy_(th.maximum(self.found, (~th.isfinite(loss.detach() + norm)).float()))
        return norm

    def take_faults(self) -> list[NonFiniteError]:
        """An error for each update left out since the last call. The host waits for the device here."""
        faults = int(self.faults)
        self.faults.zero_()
        message = (
            f"The loss or its gradient is not finite at env step {self.model.num_timesteps}; the critics' weights are as before "
            'that update, and can be saved. With `backend="torch"` the error says what it was.'
        )
        return [NonFiniteError(message)] * faults
