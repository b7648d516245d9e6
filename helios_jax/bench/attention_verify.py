"""Attention against float64: the oracle, the cases, and how large an error may be.

    helios bench attention --verify

A result is right if its error is at most twice that of a plain computation in the same dtype, plus
1e-5, by its largest value and by its root mean square; what sees nothing must be exactly zero.
"""

import collections
import dataclasses
import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from helios_jax import config
from helios_jax.bench.attention_oracle import Results, oracle, rounded_to, visible
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
# Where the documents of a row end, as fractions of it; padding follows. Row b takes entry b.
DOCUMENTS = ((0.13, 0.30, 0.62), (0.30, 0.36, 0.88))
STATIC_FACTOR = 4.7
SLACK = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; its arrays follow from these names alone."""

    dtype: str  # bfloat16 | float32
    H: int
    G: int  # N/K
    T: int
    # own: the queries' tokens. slice: the whole row, of which the queries are a stretch. ring: a
    # device's zigzag share, permuted as the queries are; some of them see nothing.
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
        """B and K: more than one where that stays cheap."""
        return 1 + (self.T < 1000), 1 + (self.T * self.G <= 1500)


def cases() -> list[Case]:
    """The whole product of the factors."""
    return [
        Case(**dict(zip(FACTORS, levels, strict=True)))
        for levels in itertools.product(*FACTORS.values())
    ]


def covering(strength: int = 2) -> list[Case]:
    """A few cases in which any levels of any `strength` factors meet; always the same ones."""
    levels = {name: [(name, level) for level in values] for name, values in FACTORS.items()}
    missing = {  # set → in order, as the order of a set differs between processes
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


class Problem(NamedTuple):
    """Inputs in the case's dtype, and the calls of attention that together are the result."""

    q: Float[np.ndarray, 'B T N H']
    k: Float[np.ndarray, 'B S K H']
    v: Float[np.ndarray, 'B S K H']
    cotangent: Float[np.ndarray, 'B T N H']
    calls: list[dict[str, Any]]


def problem(case: Case) -> Problem:
    B, K = case.rows_and_heads
    T, H, N = case.T, case.H, case.G * K
    arguments, window = tokens(case, B)
    S = arguments.get('key_positions', arguments['positions']).shape[1]
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    q, k, v, cotangent = (rng.standard_normal(shape, np.float32) for shape in shapes)
    q *= 6 if case.softcap else 2  # a cap must have something to cap
    q, k, v, cotangent = (x.astype(jnp.dtype(case.dtype)) for x in (q, k, v, cotangent))
    arguments |= {'scale': 1 / math.sqrt(H), 'window': window, 'softcap': case.softcap}
    return Problem(q, k, v, cotangent, calls_of(case, arguments))


def tokens(case: Case, B: int) -> tuple[dict[str, Any], int]:
    """Positions and segments of queries and keys, and the window."""
    T = case.T
    M = {'own': T, 'slice': T + 90, 'ring': T + T // 2 + 3}[case.keys]  # the row's tokens
    positions = np.tile(np.arange(M, dtype=np.int32), (B, 1))
    ids = np.ones_like(positions)
    if 'segments' in case.mask:
        for b, fractions in enumerate(DOCUMENTS[:B]):
            ends = [math.ceil(f * M) for f in fractions]
            document = np.searchsorted(ends, positions[b], side='right')
            ids[b] = np.where(document < len(ends), document + 1, 0)
            positions[b] -= np.array([0, *ends], np.int32)[document]
    keys = np.arange(M)
    queries = keys[52 : 52 + T] if case.keys == 'slice' else keys
    if case.keys == 'ring':
        first, second, third, last = np.array_split(keys, 4)
        order = np.concatenate([first, last, second, third])
        queries, keys = order[1 : T + 1], order[M // 4 :]
    arguments = {'positions': positions[:, queries], 'key_positions': positions[:, keys]}
    if 'segments' in case.mask:
        arguments |= {'segment_ids': ids[:, queries], 'key_segment_ids': ids[:, keys]}
    if case.keys == 'own':
        arguments = {n: x for n, x in arguments.items() if 'key' not in n}
    return arguments, 2 + M // 5 if 'window' in case.mask else 0


def calls_of(case: Case, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls that model/attention.py makes."""
    arguments = {n: None for n in ('segment_ids', 'key_positions', 'key_segment_ids')} | arguments
    positions, segments = arguments['positions'], arguments['segment_ids']
    trained = math.ceil(0.6 * (positions.max() + 1))
    setting = config.Rope(
        scaling=case.yarn,
        factor=STATIC_FACTOR if case.yarn == 'static' else 1.0,
        trained_length=trained,
    )
    tables = [
        {'frequencies': frequencies, 'query_scale': np.asarray(query_scale)}
        for frequencies, query_scale in zip(*rope.tables(setting, case.H, 2 * trained), strict=True)
    ]
    if case.yarn != 'dynamic':
        return [arguments | tables[0]]
    segments = np.ones_like(positions) if segments is None else segments
    if case.keys == 'own':
        arguments['key_segment_ids'] = segments
    elif arguments['key_segment_ids'] is None:
        arguments['key_segment_ids'] = np.ones_like(arguments['key_positions'])
    # Queries of the other bucket are padding to a call.
    return [
        arguments | table | {'segment_ids': np.where((positions >= trained) == late, segments, 0)}
        for late, table in enumerate(tables)
    ]


class Check(NamedTuple):
    case: Case
    faults: list[str]  # none: it passed
    worst: float  # the largest error, as a fraction of what is allowed
    seconds: float  # of the attention, compilation included


def verify(attention: Callable[..., jax.Array], cases: Iterable[Case]) -> Iterator[Check]:
    """Checks output and gradients of each case.

    Args:
      attention: takes what `kernels.attention.attention` takes, all of it given by name.
    """
    for case in cases:
        given = problem(case)
        start = time.monotonic()
        actual = run(attention, given)
        seconds = time.monotonic() - start
        yield Check(case, *compare(given, case.dtype, actual), seconds)


def run(attention: Callable[..., jax.Array], given: Problem) -> list[np.ndarray]:
    """out, dq, dk, dv of all calls together."""
    static = [{n: x for n, x in c.items() if not isinstance(x, np.ndarray)} for c in given.calls]
    arrays = [{n: x for n, x in c.items() if isinstance(x, np.ndarray)} for c in given.calls]

    @jax.jit
    def results(q: Any, k: Any, v: Any, cotangent: Any, arrays: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            outs = [attention(q, k, v, **a, **s) for a, s in zip(arrays, static, strict=True)]
            return sum(outs[1:], outs[0])

        out, vjp = jax.vjp(total, q, k, v)
        return out, *vjp(cotangent)

    return [np.asarray(x) for x in results(*jax.tree.map(jnp.asarray, (*given[:4], arrays)))]


def compare(
    given: Problem, dtype: str, actual: list[Shaped[np.ndarray, '...']]
) -> tuple[list[str], float]:
    """What is wrong with out, dq, dk, dv, and the largest error as a fraction of its bound."""
    exact = [oracle(*given[:4], **call) for call in given.calls]
    plain = [oracle(*given[:4], **call, operand=dtype) for call in given.calls]
    unseen = _unseen(given.calls)
    faults, worst = [], 0.0
    for i, (name, got) in enumerate(zip(Results._fields[:4], actual, strict=True)):
        want = np.sum([results[i] for results in exact], axis=0)
        rough = rounded_to(np.sum([results[i] for results in plain], axis=0), dtype)
        got = got.astype(np.float64)
        if not np.isfinite(got).all():
            faults.append(f'{name} is not finite')
            continue
        if got[unseen[name in ('dk', 'dv')]].any():
            faults.append(f'{name} is not zero where nothing is seen')
        for measure, size in (('largest', _largest), ('mean', _rms)):
            # Relative, except where a result is but noise: dq and dk of a single visible key.
            whole = max(size(want), 1.0)
            error, allowed = size(got - want) / whole, 2 * size(rough - want) / whole + SLACK
            worst = max(worst, error / allowed)
            if error > allowed:
                faults.append(f'{name} has a {measure} error of {error:.2e}, {allowed:.2e} allowed')
    return faults, worst


def _unseen(
    calls: list[dict[str, Any]],
) -> tuple[Bool[np.ndarray, 'B T'], Bool[np.ndarray, 'B S']]:
    """The queries that see no key, and the keys that no query sees."""
    masks = []
    for c in calls:
        keys = c['positions'] if c['key_positions'] is None else c['key_positions']
        ids = c['segment_ids'], c['key_segment_ids']
        masks.append(visible(c['positions'], keys, *ids, c['window']))
    seen = np.any(masks, axis=0)
    return ~seen.any(2), ~seen.any(1)


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _rms(x: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(x)))
