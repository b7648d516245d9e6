"""Compares attention with float64, and bounds how large its error may be.

    helios bench attention --verify [--cases=N] [--jobs=N]

A result is right if its error is at most twice that of a plain computation in the same dtype, plus
1e-5, by its largest value and by its root mean square. A query that sees no key must give exactly
zero, and so must the gradient of a key that no query sees.
"""

import functools
import math
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Shaped

from helios_jax.errors import require
from helios_jax.kernels.attention import Tokens, tpu
from helios_jax.kernels.attention.tpu.work import Blocks
from helios_jax.verify.cases import Call, Case, Example, example, product
from helios_jax.verify.oracle import Results, oracle, rounded_to, visible

SLACK = 1e-5
# How many plain computations, which differ only in how they round, set the bound: the worst counts,
# because a largest error is a matter of luck where numbers are few or one of them stands out.
PLAIN_RUNS = 6
# Small enough for a row to have several blocks: the kernels' own are larger than most cases.
SMALL = Blocks(q=256, k=768, strip=256, run=2, width=256)


class Check(NamedTuple):
    case: Case
    faults: list[str]  # none: it passed
    worst: float  # the largest error, as a fraction of what is allowed
    seconds: float  # time that the attention took, compilation included


def check(attention: Callable[..., jax.Array], chosen: Iterable[Case]) -> Iterator[Check]:
    """Checks output and gradients of each chosen case.

    Args:
      attention: takes q, k, v, tokens and setting, as `kernels.attention.attention` does.
    """
    for case in chosen:
        given = example(case)
        start = time.monotonic()
        actual = run(attention, given)
        seconds = time.monotonic() - start
        yield Check(case, *judge(given, case.dtype, actual), seconds)


def kernels(case: Case, **options: Any) -> Callable[..., jax.Array]:
    """Sets up our TPU kernels, interpreted off TPU; about half of all cases get small blocks."""
    if zlib.crc32(case.name.encode()) % 2:
        options['blocks'] = SMALL, SMALL
    if jax.default_backend() != 'tpu':
        options['interpret'] = pltpu.InterpretParams(detect_races=True)
    return functools.partial(tpu.attention, **options)


def check_cases(number: int, jobs: int) -> None:
    """Checks cases of the product in an order that makes the first ones a sample of all.

    A TPU runs the compiled kernels; elsewhere they are interpreted, which takes seconds a case.

    Args:
      number: how many cases; 0: all.
      jobs: processes at a time.
    Raises:
      UserError: a case failed.
    """
    order = sorted(product(), key=lambda case: zlib.crc32(case.name.encode()))
    order = order[: number or None]
    failed, worst, start = 0, 0.0, time.monotonic()
    with multiprocessing.get_context('spawn').Pool(jobs) as pool:
        for done, checked in enumerate(pool.imap_unordered(check_kernels, order), start=1):
            worst = max(worst, checked.worst)
            failed += bool(checked.faults)
            for fault in checked.faults:
                print(f'{checked.case.name}: {fault}', flush=True)
            if done % 20 == 0 or done == len(order):
                minutes = (time.monotonic() - start) / 60
                print(
                    f'{done} of {len(order)} cases, {failed} failed, the largest error '
                    f'{worst:.0%} of what is allowed, {minutes:.1f} minutes', flush=True,
                )  # fmt: skip
    require(not failed, f'{failed} of {len(order)} cases failed.')


def check_kernels(case: Case) -> Check:
    """Checks our TPU kernels on one case; a name that a worker process can import."""
    [checked] = check(kernels(case), [case])
    return checked


def run(attention: Callable[..., jax.Array], given: Example) -> list[np.ndarray]:
    """Computes out, dq, dk, dv of all calls together by `attention` and its vjp."""

    def results(q: Any, k: Any, v: Any, cotangent: Any, calls: list[Call]) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            outs = [attention(q, k, v, *call) for call in calls]
            return sum(outs[1:], outs[0])

        out, vjp = jax.vjp(total, q, k, v)
        return out, *vjp(cotangent)

    return jitted(results, *given)


def jitted(function: Callable[..., Any], *arguments: Any) -> list[np.ndarray]:
    """Runs a function under jit, with arguments that are no arrays as constants."""
    leaves, tree = jax.tree.flatten(arguments)
    traced = {i: jnp.asarray(x) for i, x in enumerate(leaves) if isinstance(x, np.ndarray)}

    @jax.jit
    def call(traced: dict[int, jax.Array]) -> Any:
        given = [traced.get(i, x) for i, x in enumerate(leaves)]
        return function(*jax.tree.unflatten(tree, given))

    return [np.asarray(x) for x in jax.tree.leaves(call(traced))]


def judge(
    given: Example, dtype: str, actual: list[Shaped[np.ndarray, '...']]
) -> tuple[list[str], float]:
    """Lists what is wrong with out, dq, dk, dv; gives the largest error as a share of its bound."""
    exact, unseen = total_of(given, given.calls), _unseen(given.calls)
    plain: list[list[np.ndarray]] = []
    for by in range(PLAIN_RUNS):
        plain.append(total_of(given, shifted(given.calls, by), dtype))
        faults, worst = _faults_of(actual, exact, plain, unseen)
        if not faults or worst > 2:  # more than chance explains
            break
    return faults, worst


def _faults_of(
    actual: list[np.ndarray],
    exact: list[np.ndarray],
    plain: list[list[np.ndarray]],
    unseen: tuple[np.ndarray, np.ndarray],
) -> tuple[list[str], float]:
    faults, worst = [], 0.0
    for i, name in enumerate(Results._fields[:4]):
        want, got = exact[i], actual[i].astype(np.float64)
        if not np.isfinite(got).all():
            faults.append(f'{name} is not finite')
            continue
        if got[unseen[name in ('dk', 'dv')]].any():
            faults.append(f'{name} is not zero where nothing is seen')
        for measure, size in (('largest', _largest), ('mean', _rms)):
            # Relative, except where a result is but noise: dq and dk of a single visible key.
            whole = max(size(want), 1.0)
            error = size(got - want) / whole
            allowed = 2 * max(size(rough[i] - want) for rough in plain) / whole + SLACK
            worst = max(worst, error / allowed)
            if error > allowed:
                faults.append(f'{name} has a {measure} error of {error:.2e}, {allowed:.2e} allowed')
    return faults, worst


def total_of(given: Example, calls: list[Call], operand: str = '') -> list[np.ndarray]:
    """Computes out, dq, dk, dv of all calls together, in float64 or plainly in a dtype."""
    results = [oracle(*given[:4], *call, operand=operand)[:4] for call in calls]
    return [rounded_to(np.sum(terms, axis=0), operand) for terms in zip(*results, strict=True)]


def shifted(calls: list[Call], by: int) -> list[Call]:
    """Moves all positions by the same amount, which changes how the same attention rounds."""

    def later(positions: Any) -> Any:
        return None if positions is None else positions + positions.dtype.type(by)

    def moved(tokens: Tokens) -> Tokens:
        at = later(tokens.positions), later(tokens.key_positions)
        return tokens._replace(positions=at[0], key_positions=at[1])

    return [call._replace(tokens=moved(call.tokens)) for call in calls]


def _unseen(
    calls: list[Call],
) -> tuple[Bool[np.ndarray, 'B T'], Bool[np.ndarray, 'B S']]:
    """Finds the queries that see no key, and the keys that no query sees."""
    masks = []
    for tokens, setting in calls:
        ids = tokens.segment_ids, tokens.key_segment_ids
        at = tokens.positions, tokens.positions_of_keys
        masks.append(visible(*at, *ids, setting.window))
    seen = np.any(masks, axis=0)
    return ~seen.any(2), ~seen.any(1)


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _rms(x: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(x)))
