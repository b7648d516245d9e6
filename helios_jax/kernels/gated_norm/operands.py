"""Operands, results and gradients of the gated mix."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Mix(NamedTuple):
    """Way in which a sublayer's output enters the stream."""

    interpolates: bool  # y = x + g (û − x), else x + g û
    sigmoid: bool  # g = σ(hidden · out + vector), else g is the vector
    eps: float  # of the output norm


class MixOperands(NamedTuple):
    """Arrays that go in; None where a form of the gate, or a layer's end, lacks one.

    x, update, hidden and out have the compute dtype, the others are float32.
    """

    x: Float[Array, '*N D']  # the stream
    update: Float[Array, '*N D']  # u, the sublayer's output
    hidden: Float[Array, '*N W'] | None = None  # of the gate; its logits (W = D) without `out`
    out: Float[Array, 'W D'] | None = None
    vector: Float[Array, 'D'] | None = None  # bias of the gate, or the factor in its place
    scale: Float[Array, 'D'] | None = None  # of the output norm
    next_scale: Float[Array, 'D'] | None = None  # of the norm that reads the new stream
    next_eps: Float[Array, ''] | None = None

    def arrays(self) -> dict[str, Any]:
        """Returns the arrays that there are, by name."""
        return {name: array for name, array in self._asdict().items() if array is not None}

    def flat(self) -> 'MixOperands':
        """Returns the operands with one axis of tokens."""
        rows: Any = lambda a: None if a is None else a.reshape(-1, a.shape[-1])
        return self._replace(x=rows(self.x), update=rows(self.update), hidden=rows(self.hidden))


class Factors(NamedTuple):
    """Numbers of a row that a forward kernel may hand on, to save the backward one their sums."""

    update: Float[Array, 'N'] | None = None  # 1 / rms(u)
    stream: Float[Array, 'N'] | None = None  # 1 / rms(y)


class Mixed(NamedTuple):
    """Results of N tokens."""

    stream: Float[Array, 'N D']  # y
    normalized: Float[Array, 'N D'] | None = None  # y behind the next norm
    factors: Factors = Factors()


class Gradients(NamedTuple):
    """Gradients of the operands; those of `out` and of vectors are float32."""

    x: Float[Array, 'N D']
    update: Float[Array, 'N D']
    hidden: Float[Array, 'N W'] | None = None
    out: Float[Array, 'W D'] | None = None
    vector: Float[Array, 'D'] | None = None
    scale: Float[Array, 'D'] | None = None
    next_scale: Float[Array, 'D'] | None = None
