"""One of transformers' tests on a bare model and on an attached one, and what to make of the two."""

from __future__ import annotations

import signal
import unittest
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from types import ModuleType
from typing import Any

from tests.upstream import idle, tester

SECONDS = 120  # a test may take; the longest takes one

# Tests that say nothing about a model which prompts are attached to.
EXCLUDED = {
    "test_generation_tester_mixin_inheritance": "it asks for a mixin that the source distribution leaves out",
    "test_model_is_small": "it asks how small transformers' own tiny models are, and ours are others",
    "test_num_layers_is_small": "it asks how small transformers' own tiny models are, and ours are others",
}


@dataclass(frozen=True)
class Expectation:
    """What must fail on an attached model, by what its error says.

    Attributes:
        tests: their names, with * for anything.
        says: a part of the error.
        reason: why.
        types: of models; none named: any.
    """

    tests: tuple[str, ...]
    says: str
    reason: str
    types: tuple[str, ...] = ()

    def covers(self, model_type: str, name: str, error: str) -> bool:
        """Whether it is about this failure."""
        is_named = any(fnmatch(name, pattern) for pattern in self.tests)
        return is_named and self.says in error and (not self.types or model_type in self.types)


EXPECTED = (
    Expectation(
        ("test_eager_matches_sdpa_inference_*_pad_left*",),
        "pass 0 gives something else",
        "rows behind pads are what they are alone: their positions count from the first token, and bare ones the pads",
    ),
    Expectation(
        ("test_model_outputs_equivalence",),
        "pass 2 gives something else: output[0]: Scalars are not close!",
        "pads are not scored, whatever labels they have, as in a batch with prompts; bare models score them",
    ),
    Expectation(
        ("test_model_weights_reload_no_missing_tied_weights",),
        "soft_prompts.prompt:",
        "prompts are parameters of the model which no file of the base has, and they are not missed in one",
    ),
    Expectation(
        ("test_correct_missing_keys",),
        "0 not greater than 0",
        "it takes prompts for a head with weights of its own, and expects that a file without them misses some",
    ),
    Expectation(
        ("test_training", "test_retain_grad_hidden_states_attentions"),
        "modified by an inplace operation",
        "attached models stay in eval mode, and in eval mode the bare model has no gradients",
        ("rwkv",),
    ),
)


@dataclass(frozen=True)
class Run:
    """What one run of a test gave.

    Attributes:
        skipped: the test did not run.
        error: in one line; empty where it passed.
        passes: what the forward passes in it gave.
    """

    skipped: bool
    error: str
    passes: list[tuple[bool, Any]]


@dataclass
class Outcome:
    """What was found for one type.

    Attributes:
        model_type: as in transformers' configs.
        counts: of tests, by kind: "run", "bare", "attached", "with passes", "expected".
        failures: by test and error, for which masks: what passes bare and must not fail attached.
        bare_failures: the same of what fails bare, and counts for nothing.
    """

    model_type: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    bare_failures: dict[tuple[str, str], list[str]] = field(default_factory=dict)


def examine(model_type: str, common: ModuleType) -> Outcome:
    """Run every test of the type, with every mask."""
    outcome = Outcome(model_type)
    for mask in tester.MASKS:
        case = tester.case_of(model_type, mask, common)
        for name in unittest.TestLoader().getTestCaseNames(case):
            if name not in EXCLUDED:
                _compare(outcome, case, name, mask)
    return outcome


def _compare(outcome: Outcome, case: type[unittest.TestCase], name: str, mask: str) -> None:
    """Count the test where it runs on the bare model; where it passes there, run it on attached ones."""
    model_class = tester.model_class_of(outcome.model_type)
    bare = _run(case(name), idle.each_model(model_class, idle.watch))
    outcome.counts["run"] += not bare.skipped
    if bare.error:
        outcome.bare_failures.setdefault((name, bare.error), []).append(mask)
    if bare.skipped or bare.error:
        return
    outcome.counts["bare"] += 1
    attached = _run(case(name), idle.each_model(model_class, idle.attach_and_watch))
    error = attached.error or ("it is skipped" if attached.skipped else idle.difference(bare.passes, attached.passes))
    error = in_one_line(error)
    if not error:
        outcome.counts["attached"] += 1
        outcome.counts["with passes"] += len(attached.passes) > 0
    elif any(expectation.covers(outcome.model_type, name, error) for expectation in EXPECTED):
        outcome.counts["expected"] += 1
    else:
        outcome.failures.setdefault((name, error), []).append(mask)


def _run(test: unittest.TestCase, around: AbstractContextManager[None]) -> Run:
    result = _FirstError()
    idle.PASSES.clear()
    with around, _at_most(SECONDS):
        test.run(result)
    return Run(bool(result.skipped) and not result.first, result.first, idle.PASSES.copy())


def in_one_line(text: str) -> str:
    """The beginning of it."""
    return " ".join(text.split())[:200]


class _FirstError(unittest.TestResult):
    """Keeps the first error of a test and its parts, in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ""

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self._keep(err)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self._keep(err)

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._keep(err)

    def _keep(self, err: Any) -> None:
        self.first = self.first or in_one_line(f"{err[0].__name__}: {err[1]}")


class TookTooLong(BaseException):
    """Nothing but the test runner catches it."""


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
