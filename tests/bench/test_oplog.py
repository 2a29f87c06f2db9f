"""The generated operations log: deterministic, as long as asked, varied, and its facts where it says they are."""

from __future__ import annotations

import pytest

from infllm_agent.bench.oplog import SYSTEM, Event, OperationsLog, generate, matches


def count_words(event: Event) -> int:
    return len(event.text) // 3 + 6


@pytest.fixture(scope="module", params=[0, 7, 11])
def log(request: pytest.FixtureRequest) -> OperationsLog:
    return generate(request.param, 26_000, count_words)


def test_the_same_seed_gives_the_same_log_and_another_seed_another():
    one, same, other = (generate(seed, 4000, count_words) for seed in (3, 3, 4))
    assert (one.events, one.facts) == (same.events, same.facts)
    assert one.events[1:] != other.events[1:]
    assert {fact.answer for fact in one.facts} != {fact.answer for fact in other.facts}


@pytest.mark.parametrize("tokens", [1, 2000, 9000])
def test_it_grows_to_the_size_asked_and_little_further(tokens):
    log = generate(5, tokens, count_words)
    size = sum(map(count_words, log.events))
    assert log.tokens == size >= tokens
    assert size < tokens + 1500
    assert len(log.facts) == 8


def test_eight_facts_two_from_each_third_before_the_restart_and_two_after(log):
    starts, total = [0], 0
    for event in log.events:
        total += count_words(event)
        starts.append(total)
    thirds = [int(3 * starts[fact.messages[0]] / total) for fact in log.asked("before_restart")]
    assert thirds == [0, 0, 1, 1, 2, 2]
    assert [int(3 * starts[fact.messages[0]] / total) for fact in log.asked("after_restart")] == [0, 1]


def test_a_fact_is_in_the_messages_that_state_it_and_nowhere_else(log):
    for fact in log.facts:
        holding = [index for index, event in enumerate(log.events) if fact.answer.lower() in event.text.lower()]
        assert holding == list(fact.messages)
        assert all(matches(log.events[index].text, fact.answer) for index in holding)


def test_questions_and_prefixes_do_not_leak_answers(log):
    answers = [fact.answer for fact in log.facts]
    assert len(set(answers)) == len(answers)
    for fact in log.facts:
        assert not any(matches(fact.question + " " + fact.prefix + " " + SYSTEM, answer) for answer in answers)


def test_it_is_varied(log):
    lines = [line for event in log.events for line in event.text.splitlines() if len(line) > 20]
    assert len(set(lines)) > 0.85 * len(lines)
    assert {event.role for event in log.events} == {"system", "user", "assistant", "tool", "observation"}
    assert {event.name for event in log.events} >= {"shell", "kubectl", "http", "psql", "alerts", "metrics", "logs"}
    assert any("Traceback" in event.text for event in log.events)
    assert any(".java:" in event.text for event in log.events)


def test_days_pass_and_the_clock_never_goes_back(log):
    times = [event.time for event in log.events]
    assert times == sorted(times)
    assert (times[-1] - times[0]).days >= 2


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("The rollback code is 48213.", "48213", True),
        ("It is 48,213.", "48213", True),
        ("It is 48214.", "48213", False),
        ("It is 4821.", "48213", False),
        ("It is 148213.", "48213", False),
        ("It is 482130.", "48213", False),
        ("It is web48213.", "48213", False),
        ("the engineer is MARTIN today", "Martin", True),
        ("The engineer is Martina.", "Martin", False),
        ("", "Martin", False),
    ],
)
def test_the_matching_rule(reply, answer, right):
    assert matches(reply, answer) is right
