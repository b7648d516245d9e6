"""Bits per byte of a restored checkpoint on its held-out split, or on any text."""

import dataclasses

import jax

from helios_jax.data import pipeline
from helios_jax.errors import require
from helios_jax.evaluate.perplexity import evaluate
from helios_jax.parallel import sharding
from helios_jax.restoring import Restored, mesh_of


def held_out(
    restored: Restored,
    *,
    text: str = '',
    row_length: int = 0,
    num_rows: int = 0,
    batch_rows: int = 16,
) -> dict[str, float]:
    """As `perplexity.evaluate`, on `text` (a corpus such as a glob) or on the validation split.

    Args:
      row_length: tokens a row; 0 takes the run's.
      num_rows: rows to read; 0 takes all.
      batch_rows: rows at a time, rounded up to what the devices divide.
    Raises:
      UserError: a number out of range; as `prepare` says.
    """
    require(batch_rows > 0, f'batch_rows={batch_rows} must be above 0.')
    require(num_rows >= 0, f'rows={num_rows} must be 0 (all) or more.')
    model, variables, tokenizer, cfg = restored
    data = dataclasses.replace(cfg.data, row_length=row_length or cfg.data.row_length)
    if text:
        source = pipeline.from_text(text, data, tokenizer)
    else:
        source = pipeline.prepare(data, tokenizer).validation
    mesh = mesh_of(variables)
    shards = sharding.shards(mesh, 'batch')
    where = sharding.sharding(mesh, ('batch', 'length'))
    batches = pipeline.eval_batches(
        source, batch_rows=-(-batch_rows // shards) * shards, num_rows=num_rows
    )
    with jax.set_mesh(mesh):
        return evaluate(
            model,
            variables,
            (pipeline.to_global(batch, where) for batch in batches),
            eos_id=tokenizer.eos_id,
            packed=data.packing == 'best_fit',
        )
