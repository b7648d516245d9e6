import dataclasses
import importlib
import importlib.resources
import math
import re
import shlex

import flax.linen as nn
import jax
import pytest

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.errors import UserError
from helios_jax.model.transformer import Transformer, abstract_variables

SHIPPED = sorted(
    path.name.removesuffix('.py')
    for path in importlib.resources.files('helios_jax.configs').iterdir()
    if path.name.endswith('.py') and path.name != '__init__.py'
)
# Of the published models of these shapes; vocabularies are padded to a multiple of 256.
RESIDUAL_PARAMETERS = {
    'helios_1b': 1_107_363_840,
    'helios_8b': 8_030_261_248,
    'hydra_8x7b': 46_702_792_704,
    'hydra_30b_a3b': 30_532_122_624 + 2 * (152_064 - 151_936) * 2048,
}


def module(name: str):
    return importlib.import_module(f'helios_jax.configs.{name}')


def shipped(name: str) -> config.Config:
    return config.from_dict(module(name).get_config())


def sections(cls=config.Config):
    """Every dataclass of the schema."""
    yield cls
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from sections(field.type)


def test_the_expected_configs_ship():
    assert {'tiny', 'tiny_hydra', *RESIDUAL_PARAMETERS} <= set(SHIPPED)


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_config_resolves_and_builds(name):
    cfg = shipped(name)
    cfg = cfg.resolve(cfg.model.vocab_size or 256)
    assert cfg.model.rope.trained_length == cfg.data.row_length
    shapes = nn.unbox(abstract_variables(Transformer(cfg.model)))
    made = sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))
    assert made == weights.count(cfg.model)


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_config_opens_with_its_command(name):
    summary, _, rest = module(name).__doc__.partition('\n\n')
    assert len(summary) > 20
    action = 'helios bench' if name.startswith('bench_') else 'helios train'
    commands = [line for line in rest.replace('\\\n', '').splitlines() if action in line]
    arguments = shlex.split(commands[0])
    assert arguments[:2] == action.split()
    assert f'--config={name}' in arguments
    assert action == 'helios bench' or any(a.startswith('--workdir=') for a in arguments)


@pytest.mark.parametrize(('name', 'expected'), RESIDUAL_PARAMETERS.items())
def test_shapes_are_those_of_the_models_they_name(name, expected):
    model = shipped(name).model
    plain = config.replace(model, {'gmu': config.GMU(kind='residual')})
    assert weights.count(plain) == expected
    # What the gates cost.
    assert weights.count(model) <= 1.03 * expected


def test_the_default_is_a_round_trip():
    cfg = config.Config()
    values = config.to_dict(cfg)
    assert config.from_dict(values) == cfg
    assert config.from_dict(values.to_dict()) == cfg
    assert config.from_dict(dataclasses.asdict(cfg)) == cfg
    assert config.from_dict({}) == cfg


def test_overrides_survive_the_round_trip():
    values = config.to_dict(config.Config())
    values.model.num_layers = 12
    values.memory.actions.q = 'offload'
    values.optimizer.weight_decay = 0  # an int where a float is meant
    cfg = config.from_dict(values)
    assert (cfg.model.num_layers, cfg.memory.actions.q) == (12, 'offload')
    assert type(cfg.optimizer.weight_decay) is float
    assert config.from_dict(dataclasses.asdict(cfg)) == cfg


def test_every_field_can_be_set_on_the_command_line():
    # A None default cannot: it has no type.
    for section in sections():
        for field in dataclasses.fields(section):
            if not dataclasses.is_dataclass(field.type):
                assert type(field.default) is field.type in (int, float, bool, str), field
    with pytest.raises(AttributeError, match='num_layers'):
        config.to_dict(config.Config()).model.layers = 3


def test_every_field_is_explained_in_one_line_and_there_are_few():
    described = config.describe()
    count = sum(
        not dataclasses.is_dataclass(f.type) for s in sections() for f in dataclasses.fields(s)
    )
    assert len(described) == count < 120
    for name, (_, comment) in described.items():
        assert comment.strip() and '\n' not in comment, name
    assert dict(defaults()).keys() == described.keys()
    for name, value in defaults():
        assert described[name][0] == repr(value), name


def test_a_comment_is_that_of_its_fields_last_line_whatever_the_field_holds():
    @dataclasses.dataclass(frozen=True)
    class Section:
        plain: int = 1  # one
        text: str = '  # no comment'  # two
        long: tuple[int, ...] = (
            1,  # not this
        )  # three, with a # in it

    assert config.describe(Section) == {
        'plain': ('1', 'one'),
        'text': ("'  # no comment'", 'two'),
        'long': ('(1,)', 'three, with a # in it'),
    }


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'modle': {}}, r"config\.modle: no such setting\. Did you mean 'model'\?"),
        ({'model': {'num_layer': 3}}, r"config\.model\.num_layer: .* 'num_layers'\?"),
        ({'model': {'gmu': {'kin': ''}}}, r"config\.model\.gmu\.kin: .* 'kind'\?"),
        ({'model': {'num_layers': 'four'}}, r"config\.model\.num_layers='four' .* int"),
        ({'model': {'num_layers': 4.0}}, r'config\.model\.num_layers=4\.0 .* int'),
        ({'train': {'tensorboard': 1}}, r'config\.train\.tensorboard=1 .* bool'),
        ({'model': 3}, r'config\.model must be a mapping'),
        ({'train': {'num_steps': True}}, r'config\.train\.num_steps=True .* int'),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_schema_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        config.from_dict(values)


@pytest.mark.parametrize(
    ('values', 'named'),
    [
        ({'model': {'num_heads': 6, 'num_kv_heads': 4}}, 'num_heads=6.*num_kv_heads=4'),
        ({'model': {'head_dim': 5}}, 'head_dim=5.*even'),
        ({'model': {'embed_dim': 0}}, 'embed_dim=0'),
        ({'model': {'compute_dtype': 'float16'}}, "'float16'.*'bfloat16'"),
        ({'model': {'period': 'dens'}}, "'dens'.*Did you mean 'dense'"),
        ({'model': {'period': ''}}, 'period is empty'),
        ({'model': {'period': 'moe'}}, r'num_experts=0'),
        ({'model': {'period': 'dense_window'}}, r'window=0'),
        ({'model': {'period': 'dense,dense,dense'}}, 'num_layers=4.*multiple of the period, 3'),
        ({'model': {'prefix': 'dense,dense,dense,dense,dense'}}, 'num_layers=4.*5 prefix'),
        ({'model': {'gmu': {'kind': 'konvex'}}}, "'konvex'.*Did you mean 'convex'"),
        ({'model': {'gmu': {'bias': 'deep'}}}, "bias='deep'.*-3"),
        ({'model': {'gmu': {'gate': 'per_head'}, 'head_dim': 48}}, 'head_dim=48.*embed_dim=256'),
        ({'model': {'rope': {'factor': 0.5}}}, r'factor=0\.5.*1 or more'),
        ({'model': {'rope': {'beta_slow': 40.0}}}, r'beta_fast=32\.0.*beta_slow=40\.0'),
        ({'model': {'moe': {'num_experts': 2, 'num_experts_per_token': 3}}}, 'token=3.*experts=2'),
        ({'data': {'row_length': 3}}, 'row_length=3.*4 or more'),
        ({'data': {'packing': 'pad'}}, "'pad'.*'best_fit'"),
        ({'data': {'corpus': ''}}, 'corpus is empty'),
        ({'data': {'validation_fraction': 1.0}}, r'validation_fraction=1\.0.*between 0 and 1'),
        ({'optimizer': {'name': 'sgd'}}, "'sgd'.*'adamw'"),
        ({'optimizer': {'learning_rate': -1.0}}, r'learning_rate=-1\.0.*greater than 0'),
        ({'optimizer': {'beta2': 1.5}}, r'beta2=1\.5.*between 0 and 1'),
        ({'optimizer': {'beta1': 1.0}}, r'optimizer\.beta1=1\.0 must be below 1'),
        ({'optimizer': {'beta2': 1.0}}, r'optimizer\.beta2=1\.0 must be below 1'),
        ({'model': {'num_layers': 10_001}}, 'num_layers=10001 must be at most 10000'),
        ({'model': {'gmu': {'bias': 'inf'}}}, "bias='inf'.*number"),
        ({'model': {'gmu': {'bias': 'nan'}}}, "bias='nan'.*number"),
        ({'model': {'rope': {'base': 1.0}}}, r'base=1\.0 must be greater than 1'),
        ({'model': {'rope': {'trained_length': -1}}}, 'trained_length=-1.*0 or more'),
        ({'train': {'ema': 1.0}}, r'train\.ema=1\.0 must be 0 \(off\) or a decay below 1'),
        ({'train': {'ema': -0.1}}, r'train\.ema=-0\.1 must'),
        ({'train': {'seed': 2**31}}, 'train.seed=2147483648 must lie between -2147483648 and'),
        ({'train': {'seed': -(2**31) - 1}}, 'train.seed=-2147483649 must lie between'),
        ({'model': {'embed_dim': 10**20}}, f'model.embed_dim={10**20} must lie between'),
        ({'train': {'batch_rows': 10, 'microbatches': 4}}, 'batch_rows=10.*microbatches=4'),
        ({'train': {'checkpoint_every': -1}}, 'checkpoint_every=-1.*0 or more'),
        ({'mesh': {'data': -1}}, 'only one axis may be -1'),
        ({'memory': {'policy': 'ful'}}, "'ful'.*Did you mean 'full'"),
        ({'memory': {'actions': {'q': 'disk'}}}, "actions.q='disk'.*'offload'"),
        (
            {'model': {'rope': {'scaling': 'dynamic', 'trained_length': 64}}},
            'rows of 256 .*trained_length=64.*static',
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_with_value_and_constraint(values, named):
    with pytest.raises(UserError, match=named) as caught:
        config.from_dict(values)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('value', [math.inf, -math.inf, math.nan])
def test_no_setting_is_infinite_or_no_number(value):
    names = [name for name, default in defaults() if isinstance(default, float)]
    assert len(names) > 20
    for name in names:
        with pytest.raises(UserError, match=f'{name.rpartition(".")[2]}={value}'):
            config.replace(config.Config(), {name: value})


def defaults():
    for name in config.describe():
        value = config.Config()
        for part in name.split('.'):
            value = getattr(value, part)
        yield name, value


def test_settings_are_replaced_by_their_names():
    cfg = config.Config()
    changed = config.replace(
        cfg, {'train.num_steps': 3, 'model.num_layers': 6, 'model.gmu.kind': 'rezero'}
    )
    assert (changed.train.num_steps, changed.model.num_layers) == (3, 6)
    assert changed.model.gmu == config.GMU(kind='rezero')
    back = {'train.num_steps': 1000, 'model.num_layers': 4, 'model.gmu.kind': 'convex'}
    assert config.replace(changed, back) == cfg and config.replace(cfg, {}) == cfg
    # Any section, and a whole one.
    assert config.replace(cfg.model, {'rope.base': 5e5}).rope.base == 5e5
    moved = config.replace(cfg, {'mesh.tensor': 2, 'mesh': config.Mesh(data=3)})
    assert moved.mesh == config.Mesh(data=3, tensor=2)
    # Values that fit only together.
    assert config.replace(cfg, {'model.num_kv_heads': 3, 'model.num_heads': 9}).model.num_heads == 9


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train.num_step': 3}, r"train\.num_step: no such setting\. Did you mean 'num_steps'"),
        ({'modle.num_layers': 3}, r"modle\.num_layers: no such setting\. Did you mean 'model'"),
        ({'model.gmu.kin': ''}, r"model\.gmu\.kin: no such setting\. Did you mean 'kind'"),
        ({'model.num_layers.x': 3}, r'model\.num_layers\.x: no such setting'),
        ({'train.num_steps': -3}, r'train\.num_steps=-3 must be greater'),
    ],
    ids=str,
)
def test_a_setting_that_does_not_exist_is_not_replaced(changes, message):
    with pytest.raises(UserError, match=message):
        config.replace(config.Config(), changes)


def test_resolving_fills_what_depends_on_the_tokenizer_and_the_rows():
    cfg = config.Config().resolve(300)
    assert cfg.model.vocab_size == 300 and cfg.model.padded_vocab_size == 512
    assert cfg.model.rope.trained_length == 256
    assert cfg.resolve(300) == cfg
    with pytest.raises(UserError, match='vocab_size=300 differs from the 256 tokens'):
        cfg.resolve(256)
    spare = config.replace(cfg, {'model.spare_vocab': 44})
    assert spare.resolve(256) == spare
    assert config.replace(spare, {'model.vocab_size': 0}).resolve(7).model.vocab_size == 51
    with pytest.raises(UserError, match=r'300 differs from the 255 tokens.*spare_vocab=44.*299'):
        spare.resolve(255)
    rope = config.Rope(trained_length=64)
    model = config.Model(rope=rope)
    assert config.Config(model=model).resolve(9).model.rope.trained_length == 64


def test_the_layer_pattern_is_a_prefix_and_whole_periods():
    model = config.Model(
        num_layers=7, prefix='dense', period='moe, moe_window, dense', window=4,
        moe=config.MoE(num_experts=3),
    )  # fmt: skip
    assert model.num_periods == 2
    assert model.layer_kinds == ('dense', *('moe', 'moe_window', 'dense') * 2)
    assert model.kind_counts == {'dense': 3, 'moe': 2, 'moe_window': 2}
    without_a_period = dataclasses.replace(model, num_layers=1)
    assert without_a_period.kind_counts == {'dense': 1}


def test_configs_are_frozen_and_hashable():
    cfg = config.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.model.num_layers = 3
    assert hash(cfg) == hash(config.Config())  # a static argument of jit


def test_every_choice_that_a_comment_lists_is_accepted():
    taken = 0
    for name, (default, comment) in config.describe().items():
        listed = re.search(r'(?:^|: )(\w+(?: \([^)]*\))?(?: \| \w+(?: \([^)]*\))?)+)', comment)
        choices = re.sub(r' \([^)]*\)', '', listed[1]).split(' | ') if listed else []
        if default.strip("'") not in choices:
            continue
        for choice in choices:
            values: dict = {name.split('.')[-1]: choice}
            for part in reversed(name.split('.')[:-1]):
                values = {part: values}
            config.from_dict(values)
            taken += 1
    assert taken > 30
