import numpy as np
import pytest
import small_steps
from etils import epath

from helios_jax import checkpoint
from helios_jax.checkpoint import layout, write
from helios_jax.checkpoint.stream import LazyArray, StoredItem, write_step
from helios_jax.errors import UserError


def test_what_is_written_array_by_array_is_read_on_devices_and_on_the_host(tmp_path):
    arrays = {name: np.asarray(x) for name, x in layout.flatten(small_steps.params(3)).items()}
    made = []

    def lazy(name):
        return LazyArray(
            arrays[name].shape,
            arrays[name].dtype,
            lambda: [((), made.append(name) or arrays[name])],
        )

    items = {'params': {name: lazy(name) for name in arrays}, 'more': {'x.y': lazy('ids')}}
    write_step(tmp_path, 7, items, {'seed': 17})
    assert made == [*arrays, 'ids']
    opened = checkpoint.open_step(tmp_path)
    assert (opened.step, opened.metadata['seed'], opened.metadata['metrics']) == (7, 17, {})
    abstract = small_steps.abstract(small_steps.params())
    assert small_steps.same(opened.restore('params', abstract), small_steps.params(3))
    stored = StoredItem(opened, 'params')
    for name, array in arrays.items():
        assert stored.arrays[name] == (array.shape, array.dtype)
        assert stored.read(name).dtype == array.dtype
        np.testing.assert_array_equal(stored.read(name), array)
    assert [row['damage'] for row in checkpoint.list_steps(tmp_path)] == ['']


def test_an_array_is_written_part_by_part(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 7)).astype('bfloat16')
    made = []

    def parts():
        for index in np.ndindex(3, 2):
            made.append(index)
            yield index, x[index]

    write_step(tmp_path, 0, {'params': {'x': LazyArray(x.shape, x.dtype, parts, 2)}}, {})
    assert made == [*np.ndindex(3, 2)]
    stored = StoredItem(checkpoint.open_step(tmp_path), 'params')
    np.testing.assert_array_equal(stored.read('x'), x)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_a_part_may_be_a_turned_view(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(write, '_CHUNK_BYTES', 1024)  # of the 4 to 9 KB
    x = np.random.default_rng(0).standard_normal((7, 324)).astype(dtype)
    views = [x.T.reshape(18, 18, 7), x.T[::-1].reshape(18, 18, 7)]
    array = LazyArray((2, 18, 18, 7), x.dtype, lambda: zip([(0,), (1,)], views, strict=True), 1)
    write_step(tmp_path, 0, {'params': {'x': array}}, {})
    found = StoredItem(checkpoint.open_step(tmp_path), 'params').read('x')
    np.testing.assert_array_equal(found, np.stack(views))


def test_an_item_is_verified_before_any_of_it_is_read(tmp_path):
    small_steps.write(tmp_path, [3])
    with pytest.raises(UserError, match="has no 'router'"):
        StoredItem(checkpoint.open_step(tmp_path), 'router')
    name = small_steps.flip_bit(epath.Path(tmp_path) / '3')
    with pytest.raises(checkpoint.DamageError, match=f'{name} has changed'):
        StoredItem(checkpoint.open_step(tmp_path), 'params')


def test_an_array_that_is_not_what_metadata_says_is_damage(tmp_path):
    small_steps.write(tmp_path, [3])
    opened = checkpoint.open_step(tmp_path)
    opened.metadata['arrays']['params'] |= {'ids': 'int32[8, 4]', 'absent': 'float32[2]'}
    stored = StoredItem(opened, 'params')
    with pytest.raises(checkpoint.DamageError, match=r'params/ids is int32\[8, 3\]'):
        stored.read('ids')
    with pytest.raises(checkpoint.DamageError, match='params/absent cannot be read'):
        stored.read('absent')


@pytest.mark.parametrize('shape', [(), (5,), (3, 7)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool'])
def test_descriptions_are_read_back(shape, dtype):
    (text,) = layout.describe({'x': np.zeros(shape, dtype)}).values()
    assert layout.parse_description(text) == (shape, np.dtype(dtype))


@pytest.mark.parametrize('text', ['', 'float32', 'float33[2]', 'float32[2,,]', 'float32[x]'])
def test_what_describes_no_array_is_refused(text):
    with pytest.raises(UserError, match='which no array is'):
        layout.parse_description(text)
