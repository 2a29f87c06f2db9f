"""Benchmarks measure what they say, and refuse what makes no sense. The bars themselves are not tests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infllm_agent.bench.tasks import TASKS, Sample, is_right, samples
from infllm_agent.errors import ConfigError


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", TASKS)
@given(tokens=st.integers(120, 5000), seed=st.integers(0, 100))
def test_samples_are_seeded_sized_and_answerable(task: str, tokens: int, seed: int) -> None:
    drawn = samples(task, tokens, 4, seed, words)
    assert drawn == samples(task, tokens, 4, seed, words)
    assert [sample.depth for sample in drawn] == [0.125, 0.375, 0.625, 0.875]
    for sample in drawn:
        assert sample.context.count(sample.answer) == 2
        assert sample.answer not in sample.question
        assert tokens - 25 <= words(sample.context + sample.question) <= tokens


def test_only_the_exact_answer_is_right() -> None:
    sample = Sample("", "", "48213", 0.5, 10)
    assert is_right(sample, " 48213. Remember it.")
    assert is_right(sample, "48213")
    for wrong in ("", "4821", "482130", "148213", "48 213"):
        assert not is_right(sample, wrong)


@pytest.mark.parametrize(
    ("task", "tokens", "count", "message"),
    [
        ("passkee", 1000, 1, 'task "passkee" is not known; there are passkey, number'),
        ("passkey", 1000, 0, "at least one"),
        ("passkey", 20, 1, "20 tokens are too few"),
    ],
)
def test_tasks_that_make_no_sense(task: str, tokens: int, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        samples(task, tokens, count, 0, words)
