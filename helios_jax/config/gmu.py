"""Settings of how a sublayer's output joins the stream."""

import dataclasses
import math
import re

from helios_jax.errors import at_least_zero, one_of, require

DILATION_X_PERIOD = r'[1-9]\d{0,4}x[1-9]\d{0,4}'  # of gmu.dwa
MOST_STREAMS = 64  # far above any model: what lies beyond is a typing error


@dataclasses.dataclass(frozen=True)
class GMU:
    kind: str = 'convex'  # convex | additive | residual | layerscale | rezero | highway | hyper
    gate: str = 'low_rank'  # what the gate depends on: low_rank | full | per_head | scalar | static
    gate_input: str = 'input'  # what the gate sees: input (x̂) | output (u) | both; highway: x̂
    rank: int = 0  # r of the low-rank gate; 0 takes max(16, D/64)
    bias: str = 'depth'  # the gate's initial bias: depth (−ln l), or a number such as -3
    normalize_output: str = 'auto'  # mix RMSNorm(u) instead of u: auto (convex alone) | on | off
    layerscale: float = 0.1  # initial λ of kind=layerscale
    embedding: str = 'off'  # add α x₀, what the embedding gave, α one scalar a sublayer: on | off
    stream_scale: str = 'off'  # multiply x by λ first, one scalar a sublayer, 1 at first: on | off
    dwa: str = 'off'  # depth-weighted averages (DenseFormer): dilation x period, as 4x5 | off
    hyper: str = 'dynamic'  # coefficients of kind=hyper: static | dynamic | constrained (mHC)
    streams: int = 4  # n, streams of kind=hyper that layers carry side by side, 2 to 64

    def __post_init__(self) -> None:
        one_of(
            'model.gmu.kind',
            self.kind,
            ('convex', 'additive', 'residual', 'layerscale', 'rezero', 'highway', 'hyper'),
        )
        one_of('model.gmu.gate', self.gate, ('low_rank', 'full', 'per_head', 'scalar', 'static'))
        one_of('model.gmu.gate_input', self.gate_input, ('input', 'output', 'both'))
        require(
            self.kind != 'highway' or self.gate_input != 'output',
            "model.gmu.gate_input='output', but the gate of kind='highway' sees its input alone; "
            'choose another kind, or input.',
        )
        one_of('model.gmu.normalize_output', self.normalize_output, ('auto', 'on', 'off'))
        one_of('model.gmu.embedding', self.embedding, ('on', 'off'))
        one_of('model.gmu.stream_scale', self.stream_scale, ('on', 'off'))
        at_least_zero('model.gmu', self, 'rank')
        require(
            self.dwa == 'off' or re.fullmatch(DILATION_X_PERIOD, self.dwa) is not None,
            f'model.gmu.dwa={self.dwa!r} must be a dilation and a period such as 1x1 or 4x5, '
            'or off.',
        )
        self._check_hyper()
        if self.bias != 'depth':
            try:
                number = float(self.bias)
            except ValueError:
                number = math.nan
            require(
                math.isfinite(number),
                f"model.gmu.bias={self.bias!r} must be 'depth' or a number such as -3.",
            )

    def _check_hyper(self) -> None:
        one_of('model.gmu.hyper', self.hyper, ('static', 'dynamic', 'constrained'))
        require(
            2 <= self.streams <= MOST_STREAMS,
            f'model.gmu.streams={self.streams} must lie between 2 and {MOST_STREAMS}; one stream '
            'is kind=residual.',
        )
        for name, value in (('embedding', self.embedding), ('stream_scale', self.stream_scale)):
            require(
                self.kind != 'hyper' or value == 'off',
                f"model.gmu.{name}={value!r}, but kind='hyper' weighs its streams itself, and they "
                'start with the embedding; choose another kind, or off.',
            )
        require(
            self.kind != 'hyper' or self.dwa == 'off',
            f"model.gmu.dwa={self.dwa!r}, but kind='hyper' weighs its streams itself; choose "
            'another kind, or off.',
        )

    @property
    def normalizes(self) -> bool:
        """True if the sublayer's output is normalised before it is mixed."""
        if self.normalize_output == 'auto':
            return self.kind == 'convex'
        return self.normalize_output == 'on'

    @property
    def adds_embedding(self) -> bool:
        return self.embedding == 'on'

    @property
    def scales_stream(self) -> bool:
        return self.stream_scale == 'on'

    @property
    def dwa_dilation(self) -> int:
        """k: a depth-weighted average takes every k-th output; 0: there is none."""
        return 0 if self.dwa == 'off' else int(self.dwa.partition('x')[0])

    @property
    def dwa_period(self) -> int:
        """p: there is an average behind every p-th layer; 0: there is none."""
        return 0 if self.dwa == 'off' else int(self.dwa.partition('x')[2])

    @property
    def num_streams(self) -> int:
        """n, the streams that a layer hands to the next; 1 unless kind is hyper."""
        return self.streams if self.kind == 'hyper' else 1

    @property
    def has_gate(self) -> bool:
        return self.kind in ('convex', 'additive', 'highway')

    @property
    def sees(self) -> tuple[str, ...]:
        """Names what the gate sees of a token: x̂, the sublayer's output, both, or nothing."""
        if not self.has_gate or self.gate == 'static':
            return ()
        if self.kind == 'highway':
            return ('input',)
        return ('input', 'output') if self.gate_input == 'both' else (self.gate_input,)
