"""Places a config on a mesh of devices: the sizes of its arrays on one of them."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from helios_jax import config
from helios_jax.arch import attention, rules
from helios_jax.arch.buffers import CUDNN_SEGMENTS

DTYPE_BYTES = {'float32': 4, 'bfloat16': 2, 'int32': 4, 'uint8': 1, 'int8': 1, 'bool': 1}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A config on a mesh of so many devices, compiled for a platform."""

    config: config.Config
    shape: Mapping[str, int]  # mesh axis → size
    platform: str  # tpu | gpu | cpu

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape.values())

    @property
    def microbatch_rows(self) -> int:
        """Rows of one microbatch on all devices."""
        return self.config.train.batch_rows // self.config.train.microbatches

    @property
    def local_rows(self) -> int:
        """Rows of one microbatch on one device."""
        return self.microbatch_rows // rules.shards(self, 'batch')

    @property
    def local_length(self) -> int:
        return self.config.data.row_length // rules.shards(self, 'length')

    @property
    def local_tokens(self) -> int:
        return self.local_rows * self.local_length

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a value in the compute dtype."""
        return DTYPE_BYTES[self.config.model.compute_dtype]

    @property
    def attention_kernel(self) -> bool:
        """True if attention is one kernel that keeps its log-sum-exp, not the reference."""
        return self.attention != 'reference'

    @functools.cached_property
    def attention(self) -> str:
        """The implementation that the model's attention takes."""
        return attention.choose(self.config.model, self.platform, ring=self.shape['context'] > 1)

    @property
    def cudnn_sequences(self) -> int:
        """Sequences of each row that cuDNN's attention sizes its buffers for; 0 without cuDNN."""
        if self.attention != 'cudnn':
            return 0
        return CUDNN_SEGMENTS if self.config.data.documents_apart else 1

    @property
    def keeps_quantised(self) -> bool:
        """True if the attention kernel itself can keep q, k and v in a byte a value."""
        return attention.ROWS[self.attention].quantises and self.shape['context'] == 1

    def elements(self, shape: Sequence[int], axes: rules.Axes) -> int:
        """Number of elements on one device of an array of this shape."""
        total = 1
        for size, name in zip(shape, axes, strict=True):
            total *= size // rules.shards(self, name)
        return total


def place(cfg: config.Config, num_devices: int, platform: str) -> Placement:
    """Places the config on its mesh.

    Raises:
      UserError: the mesh does not fit the devices, or does not divide the batch; the attention
        that is named cannot be used.
    """
    sizes = rules.sizes(cfg.mesh, num_devices)
    made = Placement(cfg, dict(zip(rules.MESH_AXES, sizes, strict=True)), platform)
    rules.check_batch(cfg, made)
    attention.choose(cfg.model, platform, ring=made.shape['context'] > 1)
    return made
