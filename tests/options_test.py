"""Commands' help, config files and flags: what is said, run and overridden, and what refused."""

import inspect
import json
import re
from pathlib import Path

import pytest
from absl import flags

from helios_jax import cli, config, options
from helios_jax.errors import UserError

HEADER = 'from helios_jax.config import *\n'
BROKEN = {
    'syntax': ('\ndef get_config(:\n    pass\n', r'{path}:2: SyntaxError: '),
    'unknown name': (
        '\n\ndef get_config():\n    return CONFIG\n',
        r'{path}:4: NameError: .*CONFIG',
    ),
    'unknown module': (
        'import no_such_module\n',
        r'{path}:1: ModuleNotFoundError: .*no_such_module',
    ),
    'error of its own': (
        'def get_config():\n    raise RuntimeError("first line\\n and second")\n',
        r'{path}:2: RuntimeError: first line',
    ),
    'exit': ('import sys\nsys.exit("bye")\n', r'{path}:2: SystemExit: bye'),
    'refused value': (
        f'{HEADER}\ndef get_config():\n    return to_dict(Config(\n'
        '        model=Model(),\n        train=Train(num_steps=-1),\n    ))\n',
        r'{path}:6: train\.num_steps=-1 must be greater than 0\.$',
    ),
    'unknown keyword': (
        f'{HEADER}train = Train(num_stepz=1)\n',
        r"{path}:2: TypeError: .*'num_stepz'.*Did you mean 'num_steps'",
    ),
    'refused beside another': (
        'from helper import fails\n\ndef get_config():\n    return fails()\n',
        r'{path}:4: ZeroDivisionError',
    ),
    'no function': ('x = 1\n', r'{path}: it does not define get_config\(\)'),
    'function that asks for more': (
        'def get_config(size):\n    return {}\n',
        r"{path}: TypeError: .*'size'",
    ),
    'no mapping': (
        f'{HEADER}def get_config():\n    return Config()\n',
        r'{path}: get_config\(\) must return to_dict\(Config\(…\)\), not a Config\.',
    ),
    'unknown setting': (
        'def get_config():\n    return {"model": {"num_layer": 3}}\n',
        r"{path}: config\.model\.num_layer: no such setting\. Did you mean 'num_layers'",
    ),
    'no text': ('x = "\0"\n', '{path}(:1)?: (Value|Syntax)Error: '),
}


@pytest.mark.parametrize('case', BROKEN)
def test_an_error_inside_a_config_file_is_one_line_with_its_place(case, tmp_path):
    source, message = BROKEN[case]
    (tmp_path / 'helper.py').write_text('\n\ndef fails():\n    return 1 / 0\n')
    path = tmp_path / 'x.py'
    path.write_text(source)
    with pytest.raises(UserError) as caught:
        options.load_config(str(path))
    line = ' '.join(str(caught.value).split())
    assert re.search(message.replace('{path}', re.escape(str(path))), line), line
    assert 'Traceback' not in line


def test_an_interrupt_inside_a_config_file_stays_one(tmp_path):
    path = tmp_path / 'x.py'
    path.write_text('raise KeyboardInterrupt\n')
    with pytest.raises(KeyboardInterrupt):
        options.load_config(str(path))


def write_config(path: Path, **settings) -> Path:
    path.write_text(
        f'{HEADER}\ndef get_config():\n    return to_dict(Config(train=Train(**{settings})))\n'
    )
    return path


def test_a_config_may_be_imported_from_one_beside_it(tmp_path):
    write_config(tmp_path / 'base_of_a_test.py', num_steps=77)
    (tmp_path / 'derived.py').write_text('from base_of_a_test import get_config\n')
    assert options.load_config(str(tmp_path / 'derived.py')).train.num_steps == 77


@pytest.mark.parametrize('name', ['with:colon.py', 'with space.py', 'no_suffix', 'ü.py'])
def test_a_config_file_may_have_any_name(name, tmp_path):
    path = write_config(tmp_path / name, num_steps=31)
    for arguments in ([f'--config={path}'], ['--config', str(path)], [f'-config={path}']):
        assert parsed(arguments)[0].train.num_steps == 31


def test_loading_a_config_leaves_no_file_behind(tmp_path):
    path = write_config(tmp_path / 'x.py', num_steps=31)
    options.load_config(str(path))
    assert list(tmp_path.iterdir()) == [path]


def parsed(arguments) -> tuple[config.Config, flags.FlagValues]:
    values = flags.FlagValues()
    flags.DEFINE_integer('size', 5, 'A number.', flag_values=values)
    return options.parse_config(values, arguments), values


def test_settings_are_replaced_wherever_they_stand(tmp_path):
    path = write_config(tmp_path / 'x.py', num_steps=31)
    cfg, values = parsed([
        '--config.train.batch_rows=9', '--size=7', f'--config={path}',
        '--config.data.corpus', 'a b', '--noconfig.train.tensorboard', '-config.model.qk_norm',
        '--config.optimizer.eps=1',
    ])  # fmt: skip
    assert (cfg.train.num_steps, cfg.train.batch_rows, values.size) == (31, 9, 7)
    assert (cfg.data.corpus, cfg.train.tensorboard, cfg.model.qk_norm) == ('a b', False, True)
    assert cfg.optimizer.eps == 1.0
    assert parsed([])[0] == options.load_config('tiny')


def test_the_last_config_and_the_last_value_count(tmp_path):
    paths = [write_config(tmp_path / f'{steps}.py', num_steps=steps) for steps in (31, 32)]
    flag = '--config.train.seed={}'.format
    cfg, _ = parsed([f'--config={paths[0]}', flag(1), f'--config={paths[1]}', flag(2)])
    assert (cfg.train.num_steps, cfg.train.seed) == (32, 2)


def test_a_flag_file_may_hold_all_of_them(tmp_path):
    path = write_config(tmp_path / 'x.py', num_steps=31)
    (tmp_path / 'flags').write_text(f'--config={path}\n--config.train.seed=4\n--size=8\n')
    cfg, values = parsed([f'--flagfile={tmp_path}/flags'])
    assert (cfg.train.num_steps, cfg.train.seed, values.size) == (31, 4, 8)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--config.model=3', r'--config\.model=3: no such setting'),
        ('-config.model.num_layer=3', "num_layer=3.*Did you mean 'model.num_layers'"),
        ('--noconfig.train.tensorbord', "Did you mean 'train.tensorboard'"),
        ('--config=tniy', "--config=tniy: no such file.*Did you mean 'tiny'.*helios_8b"),
        ('--config', '--config=: no such file'),
        ('--config=/', '--config=/: no such file'),
        ('--config.model.num_heads=3', r'num_heads=3.*num_kv_heads=2'),
        ('--config.model.num_layers=4.5', r'num_layers=4\.5'),
        ('--sise=3', "Unknown command line flag 'sise'. Did you mean: size"),
        ('size=3', 'size=3: flags are --name=value'),
        ('--flagfile=/nope', '--flagfile: .*/nope.*; name a file that can be read'),
    ],
)
def test_flags_that_cannot_be_used_are_refused(argument, message):
    with pytest.raises(UserError, match=message):
        parsed([argument])


def leaves(name: str, group: options.Group):
    """The words and the function of each command."""
    for word, command in group.commands.items():
        if isinstance(command, options.Group):
            yield from leaves(f'{name} {word}'.strip(), command)
        else:
            yield f'{name} {word}'.strip(), command


LEAVES = dict(leaves('', cli.commands()))
GROUPS = ['', *(w for w, c in cli.commands().commands.items() if isinstance(c, options.Group))]


@pytest.mark.parametrize('words', GROUPS)
@pytest.mark.parametrize('asked', ['--help', '-h', 'help'])
def test_help_says_a_sentence_of_each_command(words, asked, capsys):
    cli.main([*words.split(), asked])
    printed = capsys.readouterr().out
    group = cli.commands()
    for word in words.split():
        group = group.commands[word]
    assert group.summary in printed
    for word in group.commands:
        (line,) = re.findall(rf'^  {word} +(.*)$', printed, re.M)
        assert re.fullmatch(r'[A-Z][^\n]{10,80}\.', line), line


def test_helios_alone_helps(capsys):
    cli.main([])
    assert all(f'  {word} ' in capsys.readouterr().out for word in ['train'])


@pytest.mark.parametrize('words', LEAVES)
@pytest.mark.parametrize('others', [[], ['--config=no_such_config'], ['--nonsense']])
def test_every_command_helps_whatever_else_is_said(words, others, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*words.split(), *others, '--help'])
    assert not caught.value.code
    printed = capsys.readouterr().out
    sentence, _, example = inspect.getdoc(LEAVES[words]).partition('\n')
    assert f'helios {words}: {sentence}' in printed
    if words != 'bench torch_peer':
        assert f'helios {words} ' in example
    if words not in ('explain', 'bench torch_peer'):
        assert len(re.findall(r'^  --\w+.*\n      \S', printed, re.M)) > 0


def test_help_lists_flags_with_defaults_and_says_how_to_change_a_setting(capsys):
    with pytest.raises(SystemExit):
        cli.main(['train', '--help'])
    printed = capsys.readouterr().out
    for line in (
        r'--config=NAME\|FILE.py \(default: tiny\)\n.*helios_8b.*tiny_hydra',
        r'--config\.SECTION\.FIELD=VALUE\n.*--config\.model\.num_layers=12.*`helios explain`',
        r'--workdir=STRING\n      \w+',
        r'--dry_run.*\n      \w+',
        r'--num_devices=INT \(default: 1\)\n      \w+',
    ):
        assert re.search(f'^  {line}', printed, re.M), line


def test_overrides_written_as_flags_are_read_back():
    before = config.replace(config.Config(), {'model.prefix': 'dense', 'model.period': 'dense'})
    changes = {
        'model.prefix': '', 'model.period': 'moe,dense', 'model.moe.num_experts': 3,
        'model.gmu.bias': '-3', 'model.tied_embeddings': True, 'train.tensorboard': False,
        'data.corpus': "a b/*.txt=0.7,'c'=0.3", 'optimizer.learning_rate': 1e-5, 'train.seed': -7,
    }  # fmt: skip
    after = config.replace(before, changes)
    written = options.overrides(before, after)
    assert len(written) == len(changes)
    assert options.parse_overrides(flags.FlagValues(), written, before) == after


def test_json_has_no_number_that_is_none():
    row = {'mfu': float('nan'), 'losses': [2.5, float('inf')], 'peak': {'gib': -float('inf')}}
    text = options.to_json(row | {'name': 'NaN', 'pair': (3, 4.25), 'on': True})
    assert json.loads(text, parse_constant=pytest.fail) == {
        'mfu': None, 'losses': [2.5, None], 'peak': {'gib': None}, 'name': 'NaN', 'pair': [3, 4.25],
        'on': True,
    }  # fmt: skip


def test_whatever_prints_json_prints_what_others_can_read():
    for path in Path(options.__file__).parent.rglob('*.py'):
        # process.py prints for the Python process that started it.
        if path.name != 'process.py':
            assert 'print(json.dumps' not in path.read_text(), path
