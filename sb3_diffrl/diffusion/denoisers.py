"""Networks that denoise: a perceptron for vectors, a transformer for trajectories."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch as th
from torch import nn

from sb3_diffrl.diffusion.embeddings import FourierEmbedding, SinusoidalEmbedding, TimeEmbedding
from sb3_diffrl.diffusion.process import DenoiseSteps
from sb3_diffrl.diffusion.transformer import Transformer1d


class MlpDenoiser(nn.Module):
    """Perceptron over the noisy vector, the time's embedding and a condition.

    Hidden weights start He-normal (1502.01852), the first layer's such that vector, time and condition weigh alike whatever their
    sizes. From torch's own start, where a short vector is drowned by its time, a mixture of two modes takes five times as many
    gradient steps.

    :param x_dim: size of the vector
    :param cond_dim: size of the condition, 0 for none
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function
    :param time_embedding_dim: size of the time embedding, even
    """

    def __init__(
        self,
        x_dim: int,
        cond_dim: int,
        net_arch: Sequence[int] = (256, 256, 256),
        activation_fn: type[nn.Module] = nn.Mish,
        time_embedding_dim: int = 64,
    ) -> None:
        super().__init__()
        dim = self.time_dim = time_embedding_dim
        self.cond_dim = cond_dim
        self.time_embedding = TimeEmbedding(SinusoidalEmbedding(dim), dim, 2 * dim, dim, activation_fn)
        sizes = (x_dim + dim + cond_dim, *net_arch)
        layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), activation_fn())]
        self.net = nn.Sequential(*layers)
        self.output = nn.Linear(sizes[-1], x_dim)
        self._initialise([size for size in (x_dim, dim, cond_dim) if size])

    def _initialise(self, input_sizes: list[int]) -> None:
        hidden = [layer for part in (self.time_embedding, self.net) for layer in part if isinstance(layer, nn.Linear)]
        for layer in hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        first = next(layer for layer in (*self.net, self.output) if isinstance(layer, nn.Linear))
        for columns in th.split(first.weight.detach(), input_sizes, dim=1):
            nn.init.normal_(columns, std=math.sqrt(2 / (len(input_sizes) * columns.shape[1])))

    def forward(self, x_t: th.Tensor, time: th.Tensor, cond: th.Tensor | None = None) -> th.Tensor:
        """Denoise.

        :param x_t: noisy vectors, ``(batch, x_dim)``
        :param time: network times in (0, 1], ``(batch,)``
        :param cond: condition, ``(batch, cond_dim)``, ``None`` if ``cond_dim`` is 0
        :return: ``(batch, x_dim)``
        """
        embedding = self.time_embedding(time).expand(len(x_t), -1)
        # (batch, x_dim + time_embedding_dim + cond_dim)
        inputs = [x_t, embedding] if cond is None else [x_t, embedding, cond]
        output: th.Tensor = self.output(self.net(th.cat(inputs, dim=1)))
        return output

    def at_times(self, times: th.Tensor, cond: th.Tensor | None = None) -> DenoiseSteps:
        """The network at each of the times of a chain; the parts of its first layer that see time and condition are computed once.

        :param times: network times in (0, 1], ``(n,)``
        :param cond: condition, ``(batch, cond_dim)``, ``None`` if ``cond_dim`` is 0
        :return: n functions of ``x_t``
        """
        first, *others = (*self.net, self.output)
        assert isinstance(first, nn.Linear)
        condition_terms, time_terms = self.condition_terms(cond), self.time_terms(times)
        x_weight = first.weight[:, : self.output.out_features]

        def at(time_term: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
            def denoise(x_t: th.Tensor) -> th.Tensor:
                hidden = th.addmm(condition_terms + time_term, x_t, x_weight.T)
                for layer in others:
                    hidden = layer(hidden)
                return hidden

            return denoise

        return [at(time_term) for time_term in time_terms.unbind()]

    def condition_terms(self, cond: th.Tensor | None) -> th.Tensor:
        """What the condition adds to the first layer, with its bias.

        :param cond: condition, ``(batch, cond_dim)``, ``None`` if ``cond_dim`` is 0
        :return: ``(batch, width)``, ``(width,)`` without a condition
        """
        first = self._first()
        # The last columns; time comes before, the vector first
        weight = first.weight[:, first.in_features - self.cond_dim :]
        return first.bias if cond is None else nn.functional.linear(cond, weight, first.bias)

    def time_terms(self, times: th.Tensor) -> th.Tensor:
        """What the times add to the first layer, ``(n,)`` network times ``-> (n, width)``."""
        x_dim = self.output.out_features
        return nn.functional.linear(self.time_embedding(times), self._first().weight[:, x_dim : x_dim + self.time_dim])

    def _first(self) -> nn.Linear:
        first = next(iter((*self.net, self.output)))
        assert isinstance(first, nn.Linear)
        return first


class DiT1d(nn.Module):
    """Diffusion transformer over the steps of a trajectory (DiT, 2212.09748; for planning: Diffusion Veteran, 2503.00535).

    The time, and a condition if there is one, set the adaptive layer norms of every block.

    :param x_dim: size of one step
    :param max_length: largest number of steps
    :param cond_dim: size of the condition, 0 for none
    :param d_model: width
    :param depth: number of blocks
    :param head_dim: size of an attention head
    :param time_embedding_dim: size of the time's Fourier encoding, even
    :param n_given: leading steps that are known (the present state): what comes out for them is zero, and is not computed
    :raises ValueError: if ``head_dim`` does not divide ``d_model``, or ``n_given`` is negative
    """

    def __init__(
        self,
        x_dim: int,
        max_length: int,
        cond_dim: int = 0,
        d_model: int = 256,
        depth: int = 2,
        head_dim: int = 64,
        time_embedding_dim: int = 128,
        n_given: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(n_given, int) or n_given < 0:
            raise ValueError(f"`n_given` must be an integer of at least 0, got {n_given!r}.")
        dim = time_embedding_dim
        self.n_given = n_given
        self.time_embedding = TimeEmbedding(FourierEmbedding(dim), dim, d_model, d_model, nn.SiLU)
        self.cond_embedding = (
            nn.Sequential(nn.Linear(cond_dim, d_model), nn.SiLU(), nn.Linear(d_model, d_model)) if cond_dim else None
        )
        self.transformer = Transformer1d(
            x_dim, x_dim, max_length, condition_dim=d_model, d_model=d_model, depth=depth, head_dim=head_dim
        )

    def forward(
        self, x_t: th.Tensor, time: th.Tensor, cond: th.Tensor | None = None, cond_mask: th.Tensor | None = None
    ) -> th.Tensor:
        """Denoise.

        :param x_t: noisy trajectories, ``(batch, length, x_dim)``
        :param time: network times in (0, 1], ``(batch,)``
        :param cond: condition, ``(batch, cond_dim)``; ``None`` leaves it out of every row
        :param cond_mask: ``(batch,)``, false in the rows that leave the condition out (classifier-free guidance)
        :return: ``(batch, length, x_dim)``
        :raises ValueError: if a condition is given and ``cond_dim`` is 0
        """
        return self._with_given(x_t, self.transformer(x_t, self._embed(time, cond, cond_mask), self._computed))

    @property
    def _computed(self) -> slice:
        return slice(self.n_given, None)

    def _with_given(self, x_t: th.Tensor, computed: th.Tensor) -> th.Tensor:
        n_given = x_t.shape[1] - computed.shape[1]
        # (batch, length - n_given, x_dim) -> (batch, length, x_dim)
        return nn.functional.pad(computed, (0, 0, n_given, 0)) if n_given else computed

    def _embed(self, time: th.Tensor, cond: th.Tensor | None, cond_mask: th.Tensor | None = None) -> th.Tensor:
        embedding: th.Tensor = self.time_embedding(time)
        if cond is None:
            return embedding
        if self.cond_embedding is None:
            raise ValueError("This network was made without a condition: give it `cond_dim`, or leave `cond` out.")
        condition: th.Tensor = self.cond_embedding(cond)
        return embedding + (condition if cond_mask is None else condition * cond_mask[:, None])

    def at_times(self, times: th.Tensor, cond: th.Tensor | None = None) -> DenoiseSteps:
        """The network at each of the times of a chain; what sets the layer norms is computed once, if no condition differs by row.

        :param times: network times in (0, 1], ``(n,)``
        :param cond: condition, ``(batch, cond_dim)``, or ``(1, cond_dim)`` for all rows; ``None`` leaves it out of every row
        :return: n functions of ``x_t``
        """
        if cond is not None and len(cond) > 1:

            def at(time: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
                return lambda x_t: self(x_t, time.expand(len(x_t)), cond)

            return [at(time) for time in times.unbind()]

        def at_vectors(vectors: tuple[th.Tensor, ...]) -> Callable[[th.Tensor], th.Tensor]:
            return lambda x_t: self._with_given(x_t, self.transformer.modulated(x_t, vectors, self._computed))

        # (n, n_vectors, d_model) -> n x n_vectors x (1, 1, d_model)
        return [at_vectors(step[:, None, None].unbind()) for step in self.vectors_at(times, cond).unbind()]

    def vectors_at(self, times: th.Tensor, cond: th.Tensor | None = None) -> th.Tensor:
        """What sets the transformer's layer norms and gates at each of the times of a chain.

        :param times: network times in (0, 1], ``(n,)``
        :param cond: condition of all rows, ``(1, cond_dim)``
        :return: ``(n, n_vectors, d_model)``
        """
        # n_vectors x (n, 1, d_model) -> (n, n_vectors, d_model)
        return th.cat(self.transformer.modulation(self._embed(times, cond)), dim=1)
