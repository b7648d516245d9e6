"""Writes estimates as the cells of a report's tables have them."""

import math

from helios_jax.ablate.statistics import Estimate

NONE = '–'  # where nothing is known


def plus_minus(estimate: Estimate) -> str:
    """Formats a mean with half of its 95% interval, if it has one."""
    if math.isnan(estimate.mean):
        return NONE
    half = estimate.high - estimate.mean
    return f'{estimate.mean:.4f}' + ('' if math.isnan(half) else f' ± {half:.4f}')


def with_ends(estimate: Estimate) -> str:
    """Formats a difference with the ends of its 95% interval, if it has one."""
    if math.isnan(estimate.mean):
        return NONE
    return f'{estimate.mean:+.4f}' + ('' if math.isnan(estimate.low) else f' ({ends(estimate)})')


def ends(estimate: Estimate) -> str:
    """Formats the ends of a difference's 95% interval."""
    return f'{estimate.low:+.4f} to {estimate.high:+.4f}'


def digits(value: float) -> str:
    """Formats a number with four digits."""
    return NONE if math.isnan(value) else f'{value:.4g}'
