"""Rotary settings of config.json (`rope_parameters`, `rope_scaling`, `rope_theta`), and ours."""

import math
from typing import Any

from helios_jax import config
from helios_jax.convert.values import Values, flag, number, require_absent, whole
from helios_jax.errors import one_of, require

TYPES = {  # theirs → ours
    'default': 'none', 'yarn': 'static', 'linear': 'linear', 'llama3': 'llama3', 'dynamic': 'ntk',
}  # fmt: skip


def read(values: Values, base: float) -> config.Rope:
    """Reads the rotary settings of a config.json.

    DeepSeek's `mscale` and `mscale_all_dim` become the factor m that they stand for.

    Args:
      base: θ where it says nothing.
    Raises:
      UserError: a scaling that we lack, or a value of another type.
    """
    said = values.get('rope_parameters') or values.get('rope_scaling') or {}
    require(isinstance(said, dict), f'config.json: rope_scaling={said!r:.80} must be an object.')
    kind = said.get('rope_type', said.get('type', 'default'))
    one_of('config.json: rope_type', kind if isinstance(kind, str) else repr(kind), TYPES)
    require_absent(said, 'partial_rotary_factor', 1.0)
    base = number(said, 'rope_theta', number(values, 'rope_theta', base))
    longest = whole(values, 'max_position_embeddings', 2048)
    require(longest > 0, 'config.json: max_position_embeddings=0 must be above 0.')
    rope = config.Rope(base=base, scaling=TYPES[kind], trained_length=longest)
    if kind == 'default':
        return rope
    original = whole(said, 'original_max_position_embeddings', longest)
    require(original > 0, 'config.json: original_max_position_embeddings=0 must be above 0.')
    factor = number(said, 'factor', longest / original if kind == 'yarn' else None)
    require(factor >= 1, f'config.json: factor={factor} of rope_scaling must be 1 or more.')
    changes: dict[str, Any] = {'factor': factor}
    if kind == 'linear':
        changes['trained_length'] = max(1, round(longest / factor))
    elif kind == 'llama3':
        low, high = number(said, 'low_freq_factor'), number(said, 'high_freq_factor')
        changes |= {'trained_length': original, 'beta_slow': low, 'beta_fast': high}
    elif kind == 'yarn':
        changes |= {
            'trained_length': original,
            'attention_factor': number(said, 'attention_factor', _mscale(said, factor)),
            'truncate': flag(said, 'truncate', True),
            'beta_fast': number(said, 'beta_fast', 32) or 32.0,
            'beta_slow': number(said, 'beta_slow', 1) or 1.0,
        }
    return config.replace(rope, changes, 'model.rope.')


def _mscale(said: Values, factor: float) -> float:
    """Computes m from DeepSeek's two factors; 0, which is YaRN's own m, where one is missing."""
    scales = number(said, 'mscale', 0), number(said, 'mscale_all_dim', 0)
    if not all(scales) or factor <= 1:
        return 0.0
    m, of_all = (0.1 * scale * math.log(factor) + 1 for scale in scales)
    require(of_all > 0 < m, f'config.json: mscale={scales[0]} and mscale_all_dim={scales[1]} '
            'must give a factor above 0.')  # fmt: skip
    return m / of_all


def expressible(rope: config.Rope) -> bool:
    """True if transformers has the scaling, within the trained length at least."""
    if rope.scaling == 'static':
        return rope.ramp == 'linear_in_dimension'
    return rope.scaling != 'dynamic'


def write(rope: config.Rope) -> dict[str, Any]:
    """Returns the settings of config.json that stand for ours."""
    kind = next(theirs for theirs, ours in TYPES.items() if ours == rope.scaling)
    said: dict[str, Any] = {'rope_type': kind, 'rope_theta': rope.base}
    if kind != 'default':
        said['factor'] = rope.factor
    if kind in ('yarn', 'llama3'):
        said['original_max_position_embeddings'] = rope.trained_length
    if kind == 'llama3':
        said |= {'low_freq_factor': rope.beta_slow, 'high_freq_factor': rope.beta_fast}
    if kind == 'yarn':
        said |= {
            'beta_fast': rope.beta_fast, 'beta_slow': rope.beta_slow, 'truncate': rope.truncate,
        }  # fmt: skip
        if rope.attention_factor:
            said['attention_factor'] = rope.attention_factor
    return {'rope_parameters': said, 'max_position_embeddings': longest(rope)}


def longest(rope: config.Rope) -> int:
    """Positions that the model is good for without a scale that grows."""
    return rope.trained_length if rope.grows else round(rope.reach)
