"""The case that the tests of verification start from."""

import dataclasses

from helios_jax.verify import cases

CASE = cases.Case(
    dtype='bfloat16', H=64, G=3, T=60, keys='slice', mask='segments_window', softcap=20.0,
    yarn='static',
)  # fmt: skip


def change(**levels):
    return dataclasses.replace(CASE, **levels)
