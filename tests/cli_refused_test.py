"""What the command line refuses: in one line, with code 2, and with nothing written."""

import re

import pytest
from folders import files
from refusals import refused

pytestmark = pytest.mark.usefixtures('quick_runs')

TRAIN = ['train', '--config={root}/small.py', '--workdir={root}/new']
REFUSED = {
    'unknown command': (['trian'], 'trian.*train'),
    'unknown flag': (['train', '--workdri=x'], 'workdri.*workdir'),
    'no flag at all': ([*TRAIN, 'config=tiny'], 'config=tiny.*--name=value'),
    'unknown setting': (
        [*TRAIN, '--config.model.num_layer=3'],
        'model.num_layer=3.*model.num_layers',
    ),
    'unknown section': (
        [*TRAIN, '--config.modle.num_layers=3'],
        'modle.num_layers.*model.num_layers',
    ),
    'attention of another machine': (
        [*TRAIN, '--config.model.attention=cudnn'],
        "model.attention=cudnn .*needs platform 'gpu', not 'cpu'; set it to auto",
    ),
    'attention that the planned machine lacks': (
        ['plan', '--config=tiny', '--topology=v5e:2x2', '--config.model.attention=cudnn'],
        "model.attention=cudnn .*needs platform 'gpu', not 'tpu'; set it to auto",
    ),
    'text for a number': ([*TRAIN, '--config.model.num_layers=four'], 'num_layers=four.*int'),
    'number for a switch': ([*TRAIN, '--config.train.tensorboard=7'], 'tensorboard=7.*oolean'),
    'unknown choice': ([*TRAIN, '--config.optimizer.name=adam'], "'adam'.*'adamw'.*'muon'"),
    'heads': ([*TRAIN, '--config.model.num_kv_heads=3'], 'num_heads=2.*multiple.*num_kv_heads=3'),
    'mesh against devices': ([*TRAIN, '--config.mesh.tensor=3'], 'tensor=3.*8 devices.*-1'),
    'mesh against batch': (
        [*TRAIN, '--config.train.batch_rows=12'],
        'batch_rows=12.*8 pieces.*change',
    ),
    'mesh against weights': (
        [*TRAIN, '--config.model.embed_dim=18'],
        'embed/w.*embed=18.*8 pieces.*change',
    ),
    'no workdir': (['train'], '--workdir is missing.*name'),
    'setting beyond what JAX counts': (
        [*TRAIN, '--config.train.seed=99999999999999999999'],
        'train.seed=99999999999999999999.*between -2147483648 and 2147483647',
    ),
    'infinite setting': ([*TRAIN, '--config.optimizer.learning_rate=inf'], 'rate=inf.*finite'),
    'setting that is no number': ([*TRAIN, '--config.train.z_loss=nan'], 'z_loss=nan.*0 or more'),
    'moment that never changes': ([*TRAIN, '--config.optimizer.beta2=1.0'], 'beta2=1.0.*below 1'),
    'more layers than anyone has': (
        ['train', '--config=tiny', '--dry_run', '--config.model.num_layers=1000000000'],
        'num_layers=1000000000 must be at most 10000',
    ),
    'dry run of no device': (['train', '--dry_run', '--num_devices=0'], 'num_devices=0.*above 0'),
    'dry run of fewer': (['train', '--dry_run', '--num_devices=-4'], 'num_devices=-4.*above 0'),
    'dry run with another vocabulary': (
        ['train', '--dry_run', '--config.model.vocab_size=300'],
        'vocab_size=300.*256.*set it',
    ),
    'dry run without its tokenizer': (
        ['train', '--config=helios_8b', '--dry_run', '--config.data.tokenizer={root}/none.json'],
        'none.json',
    ),
    'flat topology in three dimensions': (
        ['plan', '--topology=v5e:2x2x2'],
        "v5e:2x2x2: '2x2x2' must have 2 dimensions",
    ),
    'deep topology in two dimensions': (
        ['plan', '--topology=v5p:2x2'],
        "v5p:2x2: '2x2' must have 3 dimensions",
    ),
    'flag file that is none': ([*TRAIN, '--flagfile={root}/none'], '{root}/none.*name a file'),
    'flag file that is none, without a config': (
        ['eval', '--flagfile={root}/none'],
        '{root}/none.*name a file',
    ),
    'colon in the name of a config': (
        ['train', '--config={root}/with:colon.py'],
        '--workdir is missing',
    ),
    'error inside a config file': (
        ['train', '--config={root}/broken.py'],
        'broken.py:4: NameError',
    ),
    'argument that is not UTF-8': (
        ['generate', '--checkpoint={root}/run', '--prompt=a\udcff'],
        r'--prompt=a\\xff is not UTF-8',
    ),
    'seed beyond what JAX takes': (
        ['generate', '--checkpoint={root}/run', '--seed=99999999999999999999'],
        'seed=99999999999999999999.*between -2147483648 and 2147483647',
    ),
    'directory in the place of a file': (
        ['data', 'tokenizer', '--corpus={root}/text/*.txt', '--vocab_size=280',
         '--output={root}/a_directory.json'],
        'a_directory.json.*irectory.*name a file',
    ),
    'directory in the place of the config that a run writes': (
        ['train', '--config={root}/small.py', '--workdir={root}/a_directory_for_config.json'],
        'config.json/config.json is a directory.*move it away',
    ),
    'directory in the place of the metrics that a run writes': (
        ['train', '--config={root}/small.py', '--workdir={root}/a_directory_for_metrics.jsonl'],
        'metrics.jsonl/metrics.jsonl is a directory.*move it away',
    ),
    'full disk': (
        ['data', 'tokenizer', '--corpus={root}/text/*.txt', '--vocab_size=280',
         '--output={root}/full.json'],
        'No space left on device; free some space',
    ),
    'name that is too long': (
        ['train', '--config={root}/small.py', '--workdir={root}/' + 300 * 'x'],
        'xxx: File name too long; choose a shorter name',
    ),
    'loop of links': (
        ['train', '--config={root}/small.py', '--workdir={root}/loop'],
        'loop: File exists; choose another directory',
    ),
    'no such config': (['train', '--config=tniy'], "tniy.*Did you mean 'tiny'"),
    'config file that is none': (
        ['train', '--config={root}/not_a_config.py', '--workdir={root}/new'],
        'not_a_config.py.*get_config',
    ),
    'missing corpus': ([*TRAIN, '--config.data.corpus={root}/none/*.txt'], r'none/\*.txt.*no file'),
    'empty corpus': (
        [*TRAIN, '--config.data.corpus={root}/empty/*.txt'],
        r'empty/\*.txt.*document',
    ),
    'directory as a corpus': ([*TRAIN, '--config.data.corpus={root}/text'], r'text.*directory.*\*'),
    'corpus that is no text': (
        [*TRAIN, '--config.data.corpus={root}/binary.txt'],
        'binary.txt.*UTF-8.*0xff',
    ),
    'broken records': (
        [*TRAIN, '--config.data.corpus={root}/broken.jsonl'],
        'broken.jsonl:2.*"text"',
    ),
    'unknown data set': ([*TRAIN, '--config.data.corpus=tfds:no_such_set'], 'no_such_set.*prepare'),
    'missing tokenizer': ([*TRAIN, '--config.data.tokenizer={root}/none.json'], 'none.json'),
    'tokenizer that is none': (
        [*TRAIN, '--config.data.tokenizer={root}/tokenizer.json'],
        'tokenizer.json.*not a tokenizer',
    ),
    'vocabulary that differs': (
        [*TRAIN, '--config.model.vocab_size=300'],
        'vocab_size=300.*256.*set it',
    ),
    'run with other settings': (
        ['train', '--config={root}/small.py', '--workdir={root}/run', '--config.model.mlp_dim=32',
         '--config.train.num_steps=12'],
        'mlp_dim=32.*24.*another workdir',
    ),
    'workdir that is a file': (
        ['train', '--config={root}/small.py', '--workdir={root}/a_file'], 'a_file.*director'
    ),
    'parent that is no run': (
        [*TRAIN, '--config.train.init_from={root}/text'],
        'text.*not a checkpoint',
    ),
    'no checkpoint named': (['eval'], '--checkpoint is missing'),
    'no such checkpoint': (['eval', '--checkpoint={root}/none'], 'none.*does not exist'),
    'directory without checkpoints': (
        ['generate', '--checkpoint={root}/text'],
        'text.*not a checkpoint',
    ),
    'listing what is no run': (['ckpt', 'ls', '{root}/text'], 'text.*not a checkpoint'),
    'unknown scheme': (['eval', '--checkpoint=s3://x/y'], 'checkpoint=.s3://x/y.*not supported'),
    'step that is no decimal': (['eval', '--checkpoint={root}/run', '--step=²'], 'step=².*latest'),
    'infinite scale': (['eval', '--checkpoint={root}/run', '--yarn=inf'], 'factor=inf.*finite'),
    'no such step': (['eval', '--checkpoint={root}/run', '--step=4'], 'step=4.*5, 10'),
    'step that is no number': (
        ['eval', '--checkpoint={root}/run', '--step=last'],
        'step=last.*latest',
    ),
    'nothing to evaluate': (
        ['eval', '--checkpoint={root}/run', '--text={root}/none*'],
        r'none\*.*no file',
    ),
    'no rows at a time': (
        ['eval', '--checkpoint={root}/run', '--batch_rows=0'],
        'batch_rows=0.*above 0',
    ),
    'scale that is none': (
        ['eval', '--checkpoint={root}/run', '--yarn=big'],
        "--yarn=big.*'dynamic'",
    ),
    'negative temperature': (
        ['generate', '--checkpoint={root}/run', '--temperature=-1'],
        'temperature=-1',
    ),
    'no mass': (['generate', '--checkpoint={root}/run', '--top_p=0'], 'top_p=0'),
    'no tokens': (['generate', '--checkpoint={root}/run', '--max_tokens=0'], 'max_tokens=0'),
    'stop at nothing': (['generate', '--checkpoint={root}/run', '--stop='], 'stop is empty'),
    'data without action': (['data'], 'prepare, tokenizer'),
    'data with an unknown action': (['data', 'prepair'], "Did you mean 'prepare'"),
    'checkpoints with an unknown action': (['ckpt', 'list'], "ckpt list.*Did you mean 'ls'"),
    'tokenizer of another name': (
        ['data', 'tokenizer', '--corpus={root}/text/*.txt', '--output={root}/a_file'],
        'a_file.*json',
    ),
    'checkpoints without action': (['ckpt'], 'name what to do.*ls'),
    'checkpoints of two runs': (['ckpt', 'ls', '{root}/run', 'x'], 'helios ckpt ls DIR'),
    'explaining nothing': (['explain', 'model.num_layer'], "Did you mean 'model.num_layers'"),
    'benchmark of nothing': (['bench', 'trian'], "Did you mean 'train'"),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_bad_input_is_one_line_code_2_and_leaves_everything_as_it_was(case, root, capsys):
    arguments, message = REFUSED[case]
    cache = root / 'cache'
    kept = {path: c for path, c in files(root).items() if not path.startswith(str(cache))}
    line = refused(capsys, *(argument.format(root=root) for argument in arguments))
    assert re.search(message.replace('{root}', str(root)), line), line
    left = {path: c for path, c in files(root).items() if not path.startswith(str(cache))}
    assert left == kept
