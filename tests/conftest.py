"""Eight simulated devices, checked annotations, and no silent broadcasting, in every test."""

from jaxtyping import install_import_hook

install_import_hook('helios_jax', 'beartype.beartype')

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
