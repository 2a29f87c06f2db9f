"""Tasks are seeded, keep their lengths, and each answer can be worked out from the text alone, in one way."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infllm_agent.bench.retrieval.haystack import Haystack, Question, is_right
from infllm_agent.bench.retrieval.tasks import TASKS, draw
from infllm_agent.errors import ConfigError

SINGLE = ["passkey", "number"]
GROWING = [task for task in TASKS if task not in SINGLE]


def quarters(text: str) -> int:
    """Rounded up, as by a tokenizer: parts never count less than the whole."""
    return -(-len(text) // 4)


def contexts_of(haystack: Haystack) -> list[str]:
    """What has been read at the end of each stretch."""
    contexts, text = [], ""
    for stretch in haystack.stretches:
        text += stretch.text
        contexts.append(text)
    return contexts


def asked_of(haystack: Haystack) -> list[tuple[str, Question]]:
    """Every question with the context it is asked about."""
    return [
        (context, question)
        for context, stretch in zip(contexts_of(haystack), haystack.stretches, strict=True)
        for round_ in stretch.rounds
        for question in round_
    ]


# -- an oracle for each task: the answer, worked out from the text by other means ------------------------------------


def _only(found: list[str]) -> str:
    assert len(set(found)) == 1, found
    return found[0]


def _hidden(context: str, asked: str, kind: str) -> str:
    return _only(re.findall(r"pass key is (\d+)\. Remember", context))


def _kv(context: str, asked: str, kind: str) -> str:
    (key,) = re.findall(r'"([0-9a-f-]{36})"', asked)
    return _only(re.findall(rf'^"{key}": "([0-9a-f-]{{36}})",$', context, re.MULTILINE))


def _lines(context: str, asked: str, kind: str) -> str:
    (name,) = re.findall(r"^line ([a-z-]+):", asked, re.MULTILINE)
    return _only(re.findall(rf"^line {name}: REGISTER_CONTENT is <(\d+)>$", context, re.MULTILINE))


def _multikey(context: str, asked: str, kind: str) -> str:
    name = re.findall(r"for ([a-z-]+)", asked)[0]
    return _only(re.findall(rf"numbers for {name} is: (\d+)\.$", context, re.MULTILINE))


def _vartrack(context: str, asked: str, kind: str) -> str:
    assigned = re.findall(r"^VAR (\S+) = (\S+)$", context, re.MULTILINE)
    variables = dict(assigned)
    assert len(variables) == len(assigned)
    value, hops = re.findall(r"VAR (\S+) =$", asked)[0], 0
    while not value.isdigit():
        value = variables[value]
        hops += 1
    assert hops == 2
    return value


def _agentlog(context: str, asked: str, kind: str) -> str:
    log = re.findall(r"^\[(.+?)\] \w+: (.+?)\.?$", context, re.MULTILINE)
    assert all(before < after for (before, _), (after, _) in pairwise(log))
    first = asked.strip().split("\n")[0].removeprefix("Question: ")

    def found(pattern: str) -> list[str]:
        return [match[1] for _, said in log if (match := re.fullmatch(pattern, said))]

    if match := re.fullmatch(r"Who deployed (.+)\?", first):
        return _only(found(rf"{re.escape(match[1])} was deployed by (\w+)"))
    if match := re.fullmatch(r"Which ticket was opened to (.+)\?", first):
        return _only(found(rf"The ticket to {match[1]} is (OPS-\d+)"))
    if match := re.fullmatch(r"What is (\S+) now, after all changes\?", first):
        return found(rf"{re.escape(match[1])}=(\d+)")[-1]
    if match := re.fullmatch(r"What was (\S+) set to at (.+)\?", first):
        known = [said for time, said in log if time <= match[2] and said.startswith(f"{match[1]}=")]
        assert known[-1] not in [said for time, said in log if time > match[2]]
        return known[-1].split("=")[-1]
    if match := re.fullmatch(r"How many times did the backup of (\S+) fail\?", first):
        return str(Counter(said for _, said in log)[f"The backup of {match[1]} failed"])
    raise AssertionError(first)


ORACLES = {
    "passkey": _hidden,
    "number": _hidden,
    "kv": _kv,
    "lines": _lines,
    "multikey": _multikey,
    "vartrack": _vartrack,
    "agentlog": _agentlog,
    "multiturn": _agentlog,
}


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_every_answer_is_what_the_text_says(task: str, seed: int) -> None:
    questions = 1 if task == "multiturn" else 10
    for haystack in draw(task, [3000, 8000], 1, questions, seed, quarters):
        for context, question in asked_of(haystack):
            assert ORACLES[task](context, question.text, question.kind) == question.answer
            assert question.answer not in question.text or question.kind == "how many"
            assert is_right(question, f" {question.answer}. And so on")
            assert quarters(question.answer) < question.answer_tokens


# -- lengths, depths, seeds -------------------------------------------------------------------------------------------


def test_lengths_between_which_nothing_fits() -> None:
    with pytest.raises(ConfigError, match="2500 and 2501 tokens are too close for lines"):
        draw("lines", [2500, 2501], 1, 4, 0, quarters)


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(10, 36).map(lambda n: 251 * n), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 100),
)
def test_contexts_keep_just_below_their_lengths(task: str, lengths: list[int], seed: int) -> None:
    for haystack in draw(task, lengths, 1, 4, seed, quarters):
        assert task in SINGLE or [stretch.tokens for stretch in haystack.stretches] == sorted(lengths)
        for stretch, context in zip(haystack.stretches, contexts_of(haystack), strict=True):
            assert stretch.text.endswith("\n")
            longest = max(
                sum(quarters(question.text) + question.answer_tokens for question in round_)
                for round_ in stretch.rounds
            )
            assert 0.85 * stretch.tokens < quarters(context) + longest <= stretch.tokens


@pytest.mark.parametrize("task", TASKS)
def test_draws_are_seeded(task: str) -> None:
    drawn = draw(task, [4000], 2, 5, 3, quarters)
    assert drawn == draw(task, [4000], 2, 5, 3, quarters)
    assert drawn != draw(task, [4000], 2, 5, 4, quarters)
    assert drawn[0].stretches[0].text != drawn[1].stretches[0].text
    assert [haystack.number for haystack in drawn] == [0, 1]
    assert {haystack.task for haystack in drawn} == {task}


@pytest.mark.parametrize("task", GROWING)
def test_a_text_does_not_depend_on_the_lengths_on_the_way(task: str) -> None:
    """Nor do the questions at a length."""
    (often,) = draw(task, [3000, 4000, 8000], 1, 5, 0, quarters)
    (once,) = draw(task, [8000], 1, 5, 0, quarters)
    assert contexts_of(often)[-1] == once.stretches[0].text
    assert often.stretches[-1].rounds == once.stretches[0].rounds


@pytest.mark.parametrize("task", SINGLE)
def test_single_needles_stand_at_every_depth_of_every_length(task: str) -> None:
    drawn = draw(task, [4000, 2000], 4, 1, 0, quarters)
    assert drawn == draw(task, [2000, 4000], 4, 9, 0, quarters)
    assert [haystack.stretches[0].tokens for haystack in drawn] == [2000] * 4 + [4000] * 4
    for i, haystack in enumerate(drawn):
        ((context, question),) = asked_of(haystack)
        assert question.depth == (i % 4 + 0.5) / 4
        assert context.index(question.answer) / len(context) == pytest.approx(question.depth, abs=0.05)
        assert context.count(question.answer) == 2
    assert len({haystack.stretches[0].rounds for haystack in drawn}) == 8


@pytest.mark.parametrize("task", [task for task in GROWING if task != "multiturn"])
def test_questions_are_spread_over_the_depths(task: str) -> None:
    (haystack,) = draw(task, [20_000, 80_000], 1, 10, 0, quarters)
    for stretch in haystack.stretches:
        assert all(len(round_) == 1 for round_ in stretch.rounds)
        depths = [round_[0].depth for round_ in stretch.rounds]
        assert len({round_[0].text for round_ in stretch.rounds}) == 10
        for part, depth in enumerate(depths):
            assert depth == pytest.approx((part + 0.5) / 10, abs=0.1)


@pytest.mark.parametrize("task", ["kv", "lines", "multikey"])
def test_depth_is_where_the_answer_stands(task: str) -> None:
    (haystack,) = draw(task, [8000], 1, 10, 0, quarters)
    for context, question in asked_of(haystack):
        assert context.index(question.answer) / len(context) == pytest.approx(question.depth, abs=0.02)


def test_agentlog_asks_every_kind_as_often_and_no_count_is_a_good_guess() -> None:
    drawn = draw("agentlog", [30_000], 10, 20, 0, quarters)
    asked = [question for haystack in drawn for _, question in asked_of(haystack)]
    kinds = Counter(question.kind for question in asked)
    assert kinds == dict.fromkeys(["who", "which id", "last value", "value as of a time", "how many"], 40)
    counts = Counter(question.answer for question in asked if question.kind == "how many")
    assert set(counts) == {"1", "2", "3", "4"}
    assert max(counts.values()) <= 18


# -- turns ------------------------------------------------------------------------------------------------------------


def test_multiturn_asks_each_question_once_at_each_turn() -> None:
    for haystack in draw("multiturn", [5000, 8000], 2, 10, 0, quarters):
        for stretch in haystack.stretches:
            assert len(stretch.rounds) == 10
            questions = set(stretch.rounds[0])
            assert len(questions) == 10
            assert all(set(round_) == questions for round_ in stretch.rounds)
            assert all(set(turn) == questions for turn in zip(*stretch.rounds, strict=True))


def test_multiturn_goes_on_with_the_rotation_in_the_next_context_and_with_new_questions_after_ten_rounds() -> None:
    one = draw("multiturn", [8000], 10, 1, 0, quarters)
    depths = [[question.depth for question in haystack.stretches[0].rounds[0]] for haystack in one]
    assert all(len({round(10 * depth) for depth in turn}) > 1 for turn in zip(*depths, strict=True))
    (many,) = draw("multiturn", [8000], 1, 20, 0, quarters)
    rounds = many.stretches[0].rounds
    assert set(rounds[0]) == set(rounds[9]) != set(rounds[10]) == set(rounds[19])


# -- bad input, scoring -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "lengths", "contexts", "questions", "message"),
    [
        ("passkee", [1000], 1, 1, 'task "passkee" is not known; there are passkey, number, kv, '),
        ("passkey", [1000], 0, 1, "contexts: 0 makes no sense; give at least one"),
        ("kv", [1000], 1, -1, "questions: -1 makes no sense"),
        ("kv", [], 1, 1, "lengths: 0 makes no sense"),
        ("kv", [2000], 1, 5000, "kv at 2000 tokens: 5000 questions wanted, but its text answers only"),
        ("multiturn", [700], 1, 1, "multiturn at 700 tokens: 10 questions wanted"),
        *((task, [20], 1, 1, f"20 tokens are too few for {task}: .* need") for task in TASKS),
    ],
)
def test_draws_that_make_no_sense(task: str, lengths: list[int], contexts: int, questions: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(task, lengths, contexts, questions, 0, quarters)


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("48213", " 48213. Remember it."),
        ("48213", "48213"),
        ("48213", "\n 48213>"),
        ("48213", "148213, no: 48213"),
        ("OPS-48213", " OPS-48213.\n"),
        ("3", "3, I think"),
        ("48213", " UAXE = VAR KQPR = 48213\nVAR"),
    ],
)
def test_right(answer: str, written: str) -> None:
    assert is_right(Question("", answer, 0.5, 10), written)


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("48213", ""),
        ("48213", "4821"),
        ("48213", "482130"),
        ("48213", "148213"),
        ("48213", "48 213"),
        ("48213", "I do not know\n48213"),
        ("3", "3.5"),
        ("3", "1,3"),
        ("3", "1,300"),
        ("OPS-48213", "OPS-482130"),
        ("4.2", "412"),
    ],
)
def test_wrong(answer: str, written: str) -> None:
    assert not is_right(Question("", answer, 0.5, 10), written)
