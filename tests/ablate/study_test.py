"""What a study and its command line refuse, in one line and before anything runs; what ships."""

import re

import made_up_study
import pytest
from folders import files
from refusals import refused

from helios_jax import config, options
from helios_jax.ablate import design as designs
from helios_jax.ablate import study as studies

BY_NONE = {'methods': ('none',)}

REFUSED = {
    'no question': ({'question': ''}, [], 'question is empty; say'),
    'no plain name': ({'arms': {'a': {}, '../b': {}}}, [], r"arm '\.\./b' names a directory; use"),
    'baseline': ({'baseline': 'aa'}, [], "baseline='aa' is no arm. Did you mean 'a'.*a, b"),
    'one arm': ({'arms': {'a': {}}}, [], "the only arm is 'a'; name one"),
    'unknown field': (
        {'arms': {'a': {}, 'b': {'model.gmu.knd': 'residual'}}},
        [],
        "arm 'b': model.gmu.knd: no such setting.*'model.gmu.kind'",
    ),
    'unknown field of all': (
        {'overrides': {'modle.num_layers': 3}},
        [],
        "modle.num_layers: no such setting.*'model.num_layers'",
    ),
    'type': (
        {'arms': {'a': {}, 'b': {'model.num_layers': '3'}}},
        [],
        "arm 'b': config.model.num_layers='3' must be of type int",
    ),
    'value': (
        {'arms': {'a': {}, 'b': {'model.num_kv_heads': 3}}},
        [],
        "arm 'b': model.num_heads=4 must be a multiple of model.num_kv_heads=3",
    ),
    'equal to the baseline': (
        {'arms': {'a': {}, 'b': {'model.gmu.kind': 'convex'}}},
        [],
        "arms 'a' and 'b' are the same config; change",
    ),
    'equal by an override': (
        {},
        ['--config.model.num_layers=3'],
        "arms 'a' and 'b' are the same config; change",
    ),
    'seed of an arm': (
        {'arms': {'a': {}, 'b': {'train.seed': 7}}},
        [],
        "arm 'b' sets train.seed, by which the study pairs",
    ),
    'metric': ({'metric': 'eval/bits_per_bite'}, [], "metric='eval/bits_per_bite'.*bits_per_byte"),
    'grid of one': ({'learning_rates': (1e-3,)}, [], r'learning_rates=\(0.001,\) has nothing'),
    'grid with a twin': ({'learning_rates': (1e-3, 1e-3)}, [], 'must differ'),
    'grid with no rate': ({'learning_rates': (1e-3, 0.0)}, [], 'must be numbers above 0'),
    'rate that is searched': (
        {
            'arms': {'a': {}, 'b': {'optimizer.learning_rate': 2e-3}},
            'learning_rates': (1e-3, 2e-3),
        },
        [],
        "arm 'b' sets optimizer.learning_rate, which learning_rates searches; drop one",
    ),
    'search': ({'search': 'all'}, [], "search='all' is not one of 'each', 'baseline'"),
    'what is equal': ({'equal': ('param',)}, [], "equal='param'.*'parameters'"),
    'lengths alone': ({'lengths': (512,)}, [], r'lengths=\(512,\) means nothing without methods'),
    'methods alone': ({'methods': ('none',)}, [], r"methods=\('none',\) means .* without lengths"),
    'unknown method': (
        {'lengths': (512,), 'methods': ('none', 'yarm')},
        [],
        "methods='yarm' is not one of .*Did you mean 'yarn'",
    ),
    'nothing to compare': (
        {'lengths': (512,), 'methods': ('yarn',)},
        [],
        r"methods=\('yarn',\) lacks 'none', which the others are compared with; add it",
    ),
    'length twice': (
        {'lengths': (512, 512), **BY_NONE},
        [],
        r'lengths=\(512, 512\) names one twice',
    ),
    'length of training': (
        {'lengths': (512, 300), **BY_NONE},
        ['--config.data.row_length=300'],
        "arm 'a': lengths has 300, which must exceed data.row_length=300, the rows of training",
    ),
    'stretched in training': (
        {'lengths': (512,), 'arms': {'a': {}, 'b': {'model.rope.scaling': 'static'}}, **BY_NONE},
        [],
        "arm 'b': model.rope.scaling='static', which the methods .* would replace; set",
    ),
    'more tokens': (
        {'arms': {'a': {}, 'b': {'train.num_steps': 601}}},
        [],
        "arm 'b' has 1.23085e\\+06 tokens where the baseline has 1.2288e\\+06.*leave tokens out",
    ),
    'more parameters': (
        {'equal': ('parameters',)},
        [],
        "arm 'b' has \\S+ parameters where the baseline has .*holds parameters equal",
    ),
    'one seed': ({}, ['--seeds=1'], '--seeds=1 gives no interval; take 2 or more.*--nointerval'),
    'one seed of its own': ({'seeds': 1}, [], 'gives no interval'),
    'seeds': ({}, ['--seeds=-2'], '--seeds=-2 must be 0 or more'),
    'workers': ({}, ['--workers=0'], '--workers=0 must be above 0'),
    'budget': ({}, ['--budget_minutes=-1'], '--budget_minutes=-1.0 must be 0 or more'),
    'bucket': ({}, ['--workdir=gs://b/x'], 'gs://b/x: a study is kept on a local disk'),
    'no workdir': ({}, ['--workdir='], '--workdir is missing'),
    'unknown arm': ({}, ['--arms=c'], "--arms='c' is not one of 'a', 'b'"),
    'baseline alone': ({}, ['--arms=a'], "the only arm is 'a'; name one"),
    'no such config': ({'config': 'tinny'}, [], "--config=tinny: no such file.*'tiny'"),
    'unknown override': ({}, ['--config.model.num_layer=3'], 'num_layer=3.*model.num_layers'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_study_is_refused_in_one_line_before_anything_is_written(case, capsys, tmp_path):
    changes, arguments, line = REFUSED[case]
    path = made_up_study.write_study(tmp_path / 'mine.py', **changes)
    before = files(tmp_path)
    flags = [f'--study={path}', f'--workdir={tmp_path}/new', *arguments]
    printed = refused(capsys, 'ablate', *flags, alone=True)
    assert re.search(line, printed), printed
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ('source', 'line'),
    [
        ('x = 1\n', r'does not define get_study\(\), which returns the study'),
        ('def get_study():\n    return {}\n', r'get_study\(\) must return a Study, not dict'),
        ('def get_study():\n    return 1 / 0\n', r'mine.py:2: ZeroDivisionError'),
    ],
)
def test_an_error_in_a_study_file_is_one_line_with_its_place(source, line, capsys, tmp_path):
    (tmp_path / 'mine.py').write_text(source)
    printed = refused(capsys, 'ablate', f'--study={tmp_path}/mine.py', '--workdir=w', alone=True)
    assert re.search(line, printed), printed


def test_a_study_that_is_not_there_is_refused_with_the_nearest(capsys):
    assert "'smoke'" in refused(capsys, 'ablate', '--study=smok', '--workdir=w', alone=True)
    assert 'name one: ' in refused(capsys, 'ablate', '--workdir=w', alone=True)


@pytest.mark.parametrize('name', studies.shipped_studies())
def test_a_shipped_study_holds_equal_what_it_says(name):
    study = studies.load_study(name)
    base = designs.changed(options.load_config(study.config), study.overrides)
    made = designs.design(name, study, base, study.seeds)
    arms = designs.sized_arms(made, dict.fromkeys(study.arms, 256))
    assert [arm.name for arm in arms] == list(study.arms)
    assert study.seeds > 1
    source = studies.shipped_studies()[name].read_text()
    assert f'helios ablate --study={name} --workdir=runs/{name}' in source


def test_sizes_are_those_of_each_arms_own_model():
    made = made_up_study.make()
    plain, gated, deep = designs.sized_arms(made, {'plain': 256, 'gated': 256, 'deep': 259})
    assert plain.overrides == {'model.gmu.kind': 'residual'}
    assert plain.parameters < gated.parameters < deep.parameters
    assert plain.flops_per_token < gated.flops_per_token < deep.flops_per_token


def test_arms_stand_over_the_base_and_settings_over_the_config():
    made = made_up_study.make(config.replace(config.Config(), {'model.num_layers': 3}))
    layers = {name: cfg.model.num_layers for name, cfg in made.configs.items()}
    assert layers == {'plain': 3, 'gated': 3, 'deep': 5}
