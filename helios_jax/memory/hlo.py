"""Reads a compiled program's text: its arrays by dtype, size and memory space."""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax

from helios_jax.errors import UserError

HOST_SPACE = 'S(5)'  # in a layout of XLA's
DTYPES = {
    'bfloat16': 'bf16', 'float32': 'f32', 'float16': 'f16', 'uint8': 'u8', 'int8': 's8',
    'int32': 's32', 'uint32': 'u32', 'bool': 'pred', 'float64': 'f64',
}  # fmt: skip
ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?')
LOOP = re.compile(r'= \((.*)\) while\(')


class HloArray(NamedTuple):
    """Arrays that are alike to the program's eye."""

    dtype: str  # XLA's name of it
    dims: tuple[int, ...]
    host: bool

    @property
    def size(self) -> 'HloArray':
        """The same with one dimension: XLA may have reshaped what it stores."""
        return self._replace(dims=(math.prod(self.dims),))


def text(compiled: jax.stages.Compiled) -> str:
    """Text of the compiled program, as the compiler left it.

    Raises:
      UserError: libtpu is newer than the jaxlib that reads what it made.
    """
    try:
        return compiled.as_text() or ''
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f'jaxlib {jax.lib.__version__} cannot read the program that its plugin compiled '
            f'({str(error).splitlines()[0]}); install the libtpu that this jax names: '
            "pip install 'helios_jax[tpu]'."
        ) from error


def arrays(program: str) -> Counter[HloArray]:
    """The arrays that a program, or a piece of one, mentions, and how often."""
    found: Counter[HloArray] = Counter()
    for (dtype, dims, layout), number in Counter(ARRAY.findall(program)).items():
        sizes = tuple(int(d) for d in dims.split(',') if d)
        found[HloArray(dtype, sizes, HOST_SPACE in layout)] += number
    return found


def loops(program: str) -> list[Counter[HloArray]]:
    """Counts the arrays that each loop carries."""
    return [arrays(carried) for carried in LOOP.findall(program)]
