"""Results of studies that nobody ran, for tests of what is made of them."""

from helios_jax.ablate.records import Arm, Point, StudyResults, StudyRun

TOKENS, FLOPS, SECONDS = 7000, 3e12, 50.0  # of a whole run


def run(arm, seed=1, value=2.0, *, rate=1e-3, state='done', reason='', points=(), **fields):
    """A run that spent TOKENS, FLOPS and SECONDS, unless told otherwise."""
    given = {'tokens': TOKENS, 'flops': FLOPS, 'seconds': SECONDS, 'peak_bytes': 0, 'series': {}}
    given |= {'sublayers': (), 'longer': {}, 'unscored': ''}
    return StudyRun(
        arm, seed, rate, state, reason, value, points=tuple(points),
        **({**given, 'swept': False} | fields),
    )  # fmt: skip


def curve(*values):
    """Evaluations at even distances, the last one at the end."""
    shares = [(n + 1) / len(values) for n in range(len(values))]
    return tuple(
        Point(round(100 * s), round(TOKENS * s), FLOPS * s, SECONDS * s, value)
        for s, value in zip(shares, values, strict=True)
    )


def results(runs, *, baseline='residual', overrides=None, **fields):
    """A study of the arms that the runs name; `overrides`: arm → its settings."""
    names = dict.fromkeys([baseline, *(run.arm for run in runs)])
    overrides = overrides or {}
    given = {
        'study': 'made_up', 'question': 'Do gates help?', 'metric': 'eval/bits_per_byte',
        'config': {'model': {'num_layers': 3, 'gmu': {'kind': 'residual'}}},
        'environment': {'versions': {'jax': '0.10'}, 'hardware': {'device': 'cpu'}},
        'command': 'helios ablate --study=made_up --workdir=runs/made_up', 'notes': (),
    }  # fmt: skip
    arms = tuple(Arm(name, overrides.get(name, {}), 1234567, 7.4e6) for name in names)
    return StudyResults(baseline=baseline, arms=arms, runs=tuple(runs), **(given | fields))


def of_values(values, **fields):
    """A study of these values: arm → value of each seed, from 1; the first arm is the baseline."""
    runs = [run(arm, seed, v) for arm, own in values.items() for seed, v in enumerate(own, 1)]
    return results(runs, baseline=next(iter(values)), **fields)
