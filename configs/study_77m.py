"""77 million parameters in 24 layers of D 512, which learn English text in minutes: for studies.

helios train --config=study_77m --workdir=runs/study_77m \
    --config.data.corpus='linux/Documentation/**/*.rst'

The corpus of that command is 20 MB of technical English: git clone --depth=1
https://github.com/torvalds/linux. A step reads 32,768 bytes, and 700 steps all of it once. Three
runs at a time took four minutes each on one H200, start and end included.
"""

import ml_collections

from helios_jax.config import Config, Data, Memory, Model, Optimizer, Train, to_dict


def get_config() -> ml_collections.ConfigDict:
    return to_dict(
        Config(
            model=Model(
                num_layers=24,
                embed_dim=512,
                num_heads=8,
                num_kv_heads=8,
                head_dim=64,
                mlp_dim=1408,
            ),
            data=Data(row_length=512),
            optimizer=Optimizer(learning_rate=1e-3, warmup_steps=70),
            train=Train(
                num_steps=700,
                batch_rows=64,
                eval_every=100,
                eval_rows=512,
                checkpoint_every=0,
                keep_checkpoints=1,
                tensorboard=False,
            ),
            memory=Memory(policy='minimal', layers='scan'),  # compiles in seconds
        )
    )
