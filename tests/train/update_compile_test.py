"""What the compiler makes of a state on the host, for a TPU that is not there."""

import pytest

from helios_jax import config


def compiled(num_layers: int, **memory):
    from helios_jax.plan.compiler import compiled as compiling

    cfg = config.Config(
        model=config.Model(
            vocab_size=256, num_layers=num_layers, embed_dim=512, num_heads=4, num_kv_heads=2,
            head_dim=128, mlp_dim=2560,
        ),
        data=config.Data(row_length=256),
        train=config.Train(batch_rows=4),
        memory=config.Memory('none', **memory),
    )  # fmt: skip
    return compiling.trace(cfg, 'v5e:2x2').lower().compile().memory_analysis()


@pytest.mark.slow
def test_moments_on_the_host_are_arguments_there_and_never_all_on_the_device():
    pytest.importorskip('libtpu')
    near, far = compiled(12), compiled(12, optimizer='host')
    params = near.argument_size_in_bytes / 3  # and two moments of each
    assert far.host_argument_size_in_bytes == pytest.approx(2 * params, rel=0.02)
    assert far.host_alias_size_in_bytes == far.host_output_size_in_bytes  # updated where they lie
    assert far.host_temp_size_in_bytes == 0
    assert far.argument_size_in_bytes == pytest.approx(params, rel=0.02)
    # Two layers of the moments and parameters, of twelve, and what they are fetched into.
    grown = far.temp_size_in_bytes - near.temp_size_in_bytes
    assert grown < 3 * params * 3 / 12
