"""Cases on which attention is verified: a product of factors, and small samples that cover it."""

import collections
import dataclasses
import itertools
import math
import zlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from helios_jax import config
from helios_jax.kernels.attention import Setting, Tokens
from helios_jax.model import rope

FACTORS: dict[str, tuple[Any, ...]] = {  # cheap levels first
    'T': (1, 100, 257, 1024, 1500),
    'H': (64, 96, 128, 256),
    'G': (1, 3, 4, 8),
    'keys': ('own', 'slice', 'ring'),
    'mask': ('causal', 'window', 'segments', 'segments_window'),
    'yarn': ('none', 'static', 'dynamic'),
    'dtype': ('bfloat16', 'float32'),
    'softcap': (0.0, 20.0),
}
# Where the documents of even and odd rows end, as fractions of the row; padding follows.
DOCUMENTS = ((0.13, 0.30, 0.62), (0.30, 0.36, 0.88))
STATIC_FACTOR = 4.7


@dataclasses.dataclass(frozen=True)
class Case:
    """Names one example of attention; its arrays follow from these levels alone."""

    dtype: str  # bfloat16 | float32
    H: int
    G: int  # N/K
    T: int
    # own: keys and queries are the same tokens. slice: the keys are a whole row, the queries a
    # stretch of it. ring: keys and queries are a device's zigzag shares, permuted alike; some
    # queries see nothing.
    keys: str
    mask: str  # causal | window | segments (with padding) | segments_window
    softcap: float
    yarn: str  # none | static | dynamic: one call for each of two buckets

    @property
    def name(self) -> str:
        cap = f'cap{self.softcap:.0f}'
        return (
            f'{self.dtype}-H{self.H}-G{self.G}-T{self.T}-{self.keys}-{self.mask}-{cap}-{self.yarn}'
        )

    @property
    def rows_and_heads(self) -> tuple[int, int]:
        """B and K: large enough for errors to be many numbers, above 1 where that stays cheap."""
        if self.T == 1:
            return 4, 4 if self.G == 1 else 2
        B = 1 + (self.T < 1000)
        return B, 1 + (B * self.T * self.G <= 1600)


def product() -> list[Case]:
    """Lists the whole product of the factors."""
    return [
        Case(**dict(zip(FACTORS, levels, strict=True)))
        for levels in itertools.product(*FACTORS.values())
    ]


def covering(strength: int = 2) -> list[Case]:
    """Chooses a few cases in which every combination of `strength` factors' levels occurs.

    The choice is the same in every process.
    """
    levels = {name: [(name, level) for level in values] for name, values in FACTORS.items()}
    missing = {  # set → sorted tuple: iterating a set would differ between processes
        frozenset(meeting): meeting
        for some in itertools.combinations(levels.values(), strength)
        for meeting in itertools.product(*some)
    }
    used: collections.Counter[tuple[str, Any]] = collections.Counter()
    chosen = []
    while missing:
        row = dict(next(iter(missing.values())))

        def gain(level: tuple[str, Any], row: dict[str, Any] = row) -> tuple[int, int]:
            others = itertools.combinations(row.items(), strength - 1)
            return sum(frozenset((level, *o)) in missing for o in others), -used[level]

        for name in FACTORS:
            if name not in row:
                row |= [max(levels[name], key=gain)]
        for meeting in itertools.combinations(row.items(), strength):
            missing.pop(frozenset(meeting), None)
        used.update(row.items())
        chosen.append(Case(**row))
    return chosen


class Call(NamedTuple):
    """Arguments of one call of attention beside q, k and v."""

    tokens: Tokens
    setting: Setting


class Example(NamedTuple):
    """Arrays of a case in its dtype, and the calls of attention whose sum is the result."""

    q: Float[np.ndarray, 'B T N H']
    k: Float[np.ndarray, 'B S K H']
    v: Float[np.ndarray, 'B S K H']
    cotangent: Float[np.ndarray, 'B T N H']
    calls: list[Call]


def example(case: Case) -> Example:
    """Draws the arrays of a case, the same ones each time."""
    B, K = case.rows_and_heads
    T, H, N = case.T, case.H, case.G * K
    tokens, window = tokens_of(case, B)
    S = tokens.positions_of_keys.shape[1]
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    q, k, v, cotangent = (rng.standard_normal(shape, np.float32) for shape in shapes)
    q *= 3 if case.softcap else 2  # a cap must have something to cap
    q, k, v, cotangent = (x.astype(jnp.dtype(case.dtype)) for x in (q, k, v, cotangent))
    return Example(q, k, v, cotangent, calls_of(case, tokens, window))


def tokens_of(case: Case, B: int) -> tuple[Tokens, int]:
    """Builds positions and segment ids of queries and keys, and the window."""
    T = case.T
    M = {'own': T, 'slice': T + 90, 'ring': T + T // 2 + 90}[case.keys]  # the row's tokens
    positions = np.tile(np.arange(M, dtype=np.int32), (B, 1))
    ids = np.ones_like(positions)
    if 'segments' in case.mask:
        for b in range(B):
            ends = [math.ceil(fraction * M) for fraction in DOCUMENTS[b % 2]]
            document = np.searchsorted(ends, positions[b], side='right')
            ids[b] = np.where(document < len(ends), document + 1, 0)
            positions[b] -= np.array([0, *ends], np.int32)[document]
    keys = np.arange(M)
    queries = keys[52 : 52 + T] if case.keys == 'slice' else keys
    if case.keys == 'ring':
        first, second, third, last = np.array_split(keys, 4)
        order = np.concatenate([first, last, second, third])
        start = len(first) - T // 4
        queries, keys = order[start : start + T], order[len(first) :]
    tokens = Tokens(positions[:, queries], key_positions=positions[:, keys])
    if 'segments' in case.mask:
        tokens = tokens._replace(segment_ids=ids[:, queries], key_segment_ids=ids[:, keys])
    if case.keys == 'own':
        tokens = tokens._replace(key_positions=None, key_segment_ids=None)
    return tokens, 2 + M // 5 if 'window' in case.mask else 0


def calls_of(case: Case, tokens: Tokens, window: int) -> list[Call]:
    """Lists the calls that model/attention.py would make, one a bucket of dynamic YaRN."""
    positions, segments = tokens.positions, tokens.segment_ids
    trained = math.ceil(0.6 * (positions.max() + 1))
    yarn = config.Rope(
        scaling=case.yarn,
        factor=STATIC_FACTOR if case.yarn == 'static' else 1.0,
        trained_length=trained,
    )
    settings = [
        Setting(frequencies, np.asarray(query_scale), 1 / math.sqrt(case.H), window, case.softcap)
        for frequencies, query_scale in zip(*rope.tables(yarn, case.H, 2 * trained), strict=True)
    ]
    if case.yarn != 'dynamic':
        return [Call(tokens, settings[0])]
    segments = np.ones_like(positions) if segments is None else segments
    if tokens.key_segment_ids is None:
        keys = segments if tokens.key_positions is None else np.ones_like(tokens.key_positions)
        tokens = tokens._replace(key_segment_ids=keys)
    # Queries of the other bucket are padding to a call.
    ids = (np.where((positions >= trained) == late, segments, 0) for late in range(len(settings)))
    return [
        Call(tokens._replace(segment_ids=own), setting)
        for own, setting in zip(ids, settings, strict=True)
    ]
