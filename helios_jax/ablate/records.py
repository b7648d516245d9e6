"""Records that a study leaves behind, for statistics, pictures and reports to read."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation of a run."""

    step: int  # updates so far
    tokens: int  # of text, so far; padding left out
    flops: float  # so far
    seconds: float  # of training steps so far
    value: float  # the study's metric there


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One run of a study: finished, failed or missing."""

    arm: str
    seed: int
    learning_rate: float  # the peak
    state: str  # done | failed | missing
    reason: str  # one line; '' if done
    value: float  # the study's metric at the end; NaN unless done
    seconds: float  # of training steps, without compilation, evaluation and checkpoints
    tokens: int  # of text that it trained on; padding left out
    flops: float  # of its training
    peak_bytes: int  # the most that a device held; 0 where the device does not tell
    points: tuple[Point, ...]
    series: Mapping[str, tuple[tuple[float, float], ...]]  # figure → (step, value) of its lines
    sublayers: tuple[Mapping[str, Any], ...]  # figures of each (train.layers); () if not known
    swept: bool  # part of the learning-rate search, not of the comparison
    longer: Mapping[tuple[str, int], float]  # (method, tokens of a row) → bits per byte
    unscored: str  # why it lacks the longer rows that the study asks for, one line; else ''


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant of a study's config."""

    name: str
    overrides: Mapping[str, Any]  # dotted name of a setting → value
    parameters: int
    flops_per_token: float  # of training; a row is one document


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """Everything that a report of a study is made of."""

    study: str
    question: str
    metric: str  # name of a figure in metrics.jsonl
    baseline: str  # name of an arm
    arms: tuple[Arm, ...]
    runs: tuple[StudyRun, ...]
    config: Mapping[str, Any]  # of the baseline's base, nested
    environment: Mapping[str, Mapping[str, Any]]  # as train.report.environment() gives it
    command: str  # that makes these results again
    notes: tuple[str, ...]  # such as what a budget dropped
