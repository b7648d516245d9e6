"""Bits per byte of a restored checkpoint on its held-out split, or on any text."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from helios_jax import config
from helios_jax.arch import attention, rules
from helios_jax.data import pipeline
from helios_jax.data.rows import Mixture, changes
from helios_jax.data.tokenizer import Tokenizer
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
    allow_lossy_tokenizer: bool = False,
    trained_on: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Scores a checkpoint on `text` (a corpus such as a glob) or on its validation split.

    Args:
      row_length: tokens a row; 0 takes the run's.
      num_rows: rows to read; 0 takes all.
      batch_rows: rows at a time, rounded up to what the devices divide; no more than there are.
      allow_lossy_tokenizer: scores a text of which the tokenizer loses something, even where the
        run itself did not allow it.
      trained_on: the `data` of the checkpoint's metadata, for the validation split to be compared
        with; without it (an older checkpoint's) nothing is compared.
    Returns:
      The figures of `perplexity.evaluate`.
    Raises:
      UserError: a number out of range; a validation split other than the run's; as `prepare` says.
    """
    require(batch_rows > 0, f'batch_rows={batch_rows} must be above 0.')
    require(num_rows >= 0, f'rows={num_rows} must be 0 (all) or more.')
    model, variables, tokenizer, cfg = restored
    mesh = mesh_of(variables)
    attention.choose(cfg.model, jax.default_backend(), ring=mesh.shape['context'] > 1)
    data = dataclasses.replace(
        cfg.data,
        row_length=row_length or cfg.data.row_length,
        allow_lossy_tokenizer=allow_lossy_tokenizer or cfg.data.allow_lossy_tokenizer,
    )
    halves = 2 * mesh.shape['context']
    require(
        halves == 2 or data.row_length % halves == 0,
        f'row_length={data.row_length} must be a multiple of {halves}, twice the devices that '
        'share a row; change it or --context.',
    )
    if text:
        mixture = pipeline.from_text(text, data, tokenizer)
    else:
        mixture = split(data, tokenizer, trained_on)
    shards = rules.shards(mesh, 'batch')
    where = sharding.sharding(mesh, ('batch', 'length'))
    batch_rows = min(batch_rows, num_rows or len(mixture), len(mixture))
    batches = pipeline.eval_batches(
        mixture, batch_rows=-(-batch_rows // shards) * shards, num_rows=num_rows
    )
    with jax.set_mesh(mesh):
        return evaluate(
            model,
            variables,
            (pipeline.to_global(batch, where) for batch in batches),
            eos_id=tokenizer.eos_id,
            documents_apart=data.documents_apart,
            lost_fraction=mixture.lost_fraction,
        )


def split(
    data: config.Data, tokenizer: Tokenizer, trained_on: Mapping[str, Any] | None = None
) -> Mixture:
    """Prepares a run's validation split, or finds it in its cache.

    Args:
      trained_on: as `held_out`.
    Raises:
      UserError: it is not the split that the run held out; as `prepare` says.
    """
    mixture = pipeline.prepare(data, tokenizer).validation
    changed = changes(trained_on['validation'], mixture.contents) if trained_on else ''
    require(
        not changed,
        f'the held-out split of data.corpus={data.corpus!r} is not the one that the run held out '
        f'({changed}), and may hold what it was trained on; restore the files, or name what to '
        'read with --text.',
    )
    return mixture
