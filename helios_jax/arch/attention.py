"""Every implementation of attention once: where it runs, and what it can take.

kernels/attention has the functions of each row and refuses what the row refuses; the planner reads
the same rows.
"""

from typing import NamedTuple

from helios_jax.config import Model
from helios_jax.errors import UserError

DTYPES = ('bfloat16', 'float16', 'float32', 'float64')


class Row(NamedTuple):
    platform: str = ''  # the only one that it runs on; '': any
    dtypes: tuple[str, ...] = DTYPES  # q's, k's and v's
    head_multiple: int = 2  # H must be a multiple of it
    softcap: bool = True  # takes one
    blockwise: bool = True  # can attend to some of the keys at a time, as a ring of devices does
    quantises: bool = False  # can keep q, k and v in a byte a value

    def refusal(
        self, platform: str, dtype: str, head_dim: int, *, softcap: bool, blockwise: bool
    ) -> str:
        """Reason why it cannot be used so; '' if it can."""
        if self.platform not in ('', platform):
            return f'needs platform {self.platform!r}, not {platform!r}.'
        if dtype not in self.dtypes:
            return f'cannot take {dtype}: only {", ".join(self.dtypes)}.'
        if head_dim % self.head_multiple:
            return f'cannot take H={head_dim}: it must be a multiple of {self.head_multiple}.'
        if softcap and not self.softcap:
            return 'has no soft cap.'
        if blockwise and not self.blockwise:
            return 'cannot attend to some of the keys at a time.'
        return ''


# In the order in which `auto` tries those of a platform. config/model.py lists their names.
ROWS = {
    'tpu': Row('tpu', ('bfloat16', 'float32'), head_multiple=32, quantises=True),
    'cudnn': Row('gpu', ('bfloat16', 'float16'), softcap=False, blockwise=False),
    'reference': Row(),
}


def choose(model: Model, platform: str, *, ring: bool) -> str:
    """The implementation that a model's attention takes, as far as the config tells.

    Args:
      ring: keys go round a ring of devices, mesh.context of them.
    Raises:
      UserError: the one that is named cannot be used.
    """
    names = ROWS if model.attention == 'auto' else (model.attention,)
    for name in names:
        reason = ROWS[name].refusal(
            platform,
            model.compute_dtype,
            model.head_dim,
            softcap=model.attention_softcap > 0,
            blockwise=ring,
        )
        if not reason:
            return name
    raise UserError(refused(model.attention, reason))


def refused(name: str, reason: str) -> str:
    return f'model.attention={name} cannot be used: it {reason.rstrip(".")}; set it to auto.'
