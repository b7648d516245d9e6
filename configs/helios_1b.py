"""1.1 billion parameters, for one 80 GB accelerator: Llama's shape with GMUs.

helios data tokenizer --corpus=python_stdlib --vocab_size=32768 --output=tokenizer.json
helios train --config=helios_1b --workdir=runs/helios_1b --config.data.tokenizer=tokenizer.json

One H100: 58,600 packed tokens a second, MFU 0.42, 52 GiB (docs/results/ has the other variants).
"""

import ml_collections

from helios_jax.config import Config, Data, Memory, Model, Optimizer, Rope, Train, to_dict


def get_config() -> ml_collections.ConfigDict:
    return to_dict(
        Config(
            model=Model(
                vocab_size=32768,
                num_layers=16,
                embed_dim=2048,
                num_heads=16,
                num_kv_heads=4,
                head_dim=128,
                mlp_dim=8192,
                rope=Rope(base=500_000.0),
            ),
            data=Data(tokenizer='tokenizer.json', row_length=4096),
            optimizer=Optimizer(learning_rate=6e-4, warmup_steps=1000),
            train=Train(
                num_steps=60_000,
                batch_rows=8,
                eval_every=1000,
                eval_rows=512,
                checkpoint_every=1000,
            ),
            memory=Memory(policy='minimal'),
        )
    )
