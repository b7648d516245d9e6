"""Keeps a model's answers in a file, so that an evaluation that was interrupted goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, PyTree, UInt32

from helios_jax import paths
from helios_jax.errors import require
from helios_jax.parallel import agreement
from helios_jax.restoring import Restored, mesh_of

FILE = 'responses.jsonl'


class Responses:
    """Answers by the digest of the question, a line of JSON each. Process 0 reads and writes.

    Args:
      path: the file to go on with; None keeps the answers in memory alone.
      model: `identity` of the model that answers.
    Raises:
      UserError: the file has another model's answers, or a line that holds none.
    """

    def __init__(self, path: epath.Path | None, model: str) -> None:
        self._path = path
        with agreement.together():
            found = _read(path, model) if path and jax.process_index() == 0 else {}
        self._answers: dict[str, Any] = agreement.from_first(found)
        self._writes = path is not None and jax.process_index() == 0
        if self._writes:
            self._start(model)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps more answers: all of them are in the file when this returns."""
        new = {key: answer for key, answer in answers.items() if key not in self}
        self._answers |= new
        if self._writes:
            assert self._path is not None
            with self._path.open('a') as file:
                file.write(''.join(_line(*item) for item in new.items()))

    def _start(self, model: str) -> None:
        """Writes what was read, without a torn last line."""
        assert self._path is not None
        lines = [json.dumps({'model': model}) + '\n']
        lines += [_line(*item) for item in self._answers.items()]
        paths.write_whole(self._path, ''.join(lines).encode())


def digest(*question: Any) -> str:
    """Digest of a question, whose parts JSON can hold."""
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:32]


def identity(restored: Restored) -> str:
    """Digest of all that an answer depends on: weights, architecture, rotary scaling, tokenizer.

    Weights are told apart by sums of their bits, which no mesh changes.
    """
    with jax.set_mesh(mesh_of(restored.variables)):
        sums = jax.device_get(_bit_sums(restored.variables))
    leaves = {
        jax.tree_util.keystr(path): int(value)
        for path, value in jax.tree_util.tree_leaves_with_path(sums)
    }
    model = dataclasses.asdict(restored.model.model)
    return digest(leaves, model, restored.tokenizer.fingerprint)


@jax.jit
def _bit_sums(variables: PyTree) -> PyTree[UInt32[Array, '']]:
    def of_leaf(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
        place = jnp.ones(x.shape, jnp.uint32)
        for axis in range(x.ndim):  # a product of odd numbers, so that no place weighs nothing
            place *= 2 * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + (2 * axis + 1)
        return jnp.sum(bits.astype(jnp.uint32) * place, dtype=jnp.uint32)

    return jax.tree.map(of_leaf, variables)


def _read(path: epath.Path, model: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    *lines, _ = path.read_text().split('\n')  # what follows the last newline is torn, or empty
    answers: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        expected = {'model'} if number == 1 else {'question', 'answer'}
        require(
            isinstance(value, dict) and value.keys() == expected,
            f'{path}, line {number} is no answer: {line[:60]!r}; move the file away.',
        )
        if number == 1:
            require(
                value['model'] == model,
                f'{path} has answers of another model, or of other settings; name another '
                '--output, or move the file away.',
            )
        else:
            answers[value['question']] = value['answer']
    return answers


def _line(question: str, answer: Any) -> str:
    return json.dumps({'question': question, 'answer': answer}) + '\n'
