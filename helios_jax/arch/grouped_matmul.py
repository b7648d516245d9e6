"""Every implementation of the grouped matmul once: where it runs, and what it can take.

kernels/grouped_matmul has the functions of each row and refuses what the row refuses; the planner
reads the same rows.
"""

from typing import NamedTuple

from helios_jax.arch.attention import DTYPES


class Support(NamedTuple):
    platform: str = ''  # the only one that it runs on; '': any
    dtypes: tuple[str, ...] = DTYPES
    multiple: int = 1  # D and F must be multiples of it
    capability: str = ''  # the only compute capability of a GPU that it runs on; '': any
    dense: bool = False  # computes every expert for every row

    def refusal(
        self, platform: str, dtype: str, widths: tuple[int, ...], capability: str = ''
    ) -> str:
        """Reason why it cannot be used so; '' if it can.

        Args:
          widths: D and F.
          capability: compute capability of the GPU, '' where there is none.
        """
        if self.platform not in ('', platform):
            return f'needs platform {self.platform!r}, not {platform!r}.'
        if self.capability and capability != self.capability:
            return f'needs compute capability {self.capability}, not {capability or "none"}.'
        if dtype not in self.dtypes:
            return f'cannot take {dtype}: only {", ".join(self.dtypes)}.'
        if odd := [width for width in widths if width % self.multiple]:
            return f'cannot take a width of {odd[0]}: it must be a multiple of {self.multiple}.'
        return ''


# In the order in which `auto` tries those of a platform.
ROWS = {
    'tpu': Support('tpu', ('bfloat16', 'float32')),
    'hopper': Support('gpu', ('bfloat16',), multiple=128, capability='9.0'),
    'reference': Support(dense=True),
}


def choose(platform: str, dtype: str, widths: tuple[int, ...], capability: str = '') -> str:
    """The implementation that is taken; arguments are `Support.refusal`'s."""
    fits = lambda row: not row.refusal(platform, dtype, widths, capability)
    return next(name for name, row in ROWS.items() if fits(row))
