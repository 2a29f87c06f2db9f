"""Benchmarks measure what they say, go on after a kill, and refuse what makes no sense. The bars are not tests."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infllm_agent.bench import plots
from infllm_agent.bench.retrieval import rag
from infllm_agent.bench.retrieval.answers import MEMORY_CODE, READER_CODE, meaning
from infllm_agent.bench.retrieval.haystack import Haystack, Question, Stretch
from infllm_agent.bench.retrieval.methods import METHODS, Method, Needs, prepare
from infllm_agent.bench.retrieval.rag import CHUNK, RagReader
from infllm_agent.bench.retrieval.readers import FullContext, Reader, TruncatedReader, WholeReader
from infllm_agent.bench.retrieval.run import RetrievalPlan, measure, run
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError, StorageError
from infllm_agent.model.local_model import LocalModel

SMALL = MemoryConfig(n_init=8, n_local=64, block_size=16, topk=8, candidates=16, chunk_size=32, max_cached_block=16)
SMALL_OPTIONS = ["--n-init", "8", "--n-local", "64", "--block-size", "16", "--topk", "8", "--chunk-size", "32"]
WORDS = ["the", "agent", "tool", "log", "error", "line", "printed", "at", "retry", "what", "means", "red", "green"]
TIMES = ("prefill_tok_s", "decode_tok_s", "peak_rss_mb")


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> LocalModel:
    return LocalModel.load(str(tiny_model_folder), device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def text(seed: int, sentences: int) -> str:
    generator = random.Random(seed)
    return "".join(" ".join(generator.choices(WORDS, k=7)).capitalize() + ". " for _ in range(sentences))


def question(number: int, kind: str = "") -> Question:
    return Question(f"\nWhat of {number}? It is", str(number), number / 10, answer_tokens=5, kind=kind)


HAYSTACKS = [
    Haystack(
        "own",
        number,
        (
            Stretch(400, text(number, 16), ((question(1, "a"),), (question(2, "b"),))),
            Stretch(800, text(9 + number, 16), ((question(3), question(4)), (question(5),))),
        ),
    )
    for number in range(2)
]


def prepared(model: LocalModel, *names: str, config: MemoryConfig = SMALL) -> list[Method]:
    return [prepare(name, model, config, Needs(longest=900, round_tokens=64)) for name in names]


def generated(model: LocalModel, ids: list[int], limit: int) -> list[int]:
    """transformers' own greedy answer, to the end of its first line."""
    with model.detached("sdpa") as plain, torch.inference_mode():
        out = plain.generate(torch.tensor([ids]), max_new_tokens=limit, do_sample=False)[0, len(ids) :].tolist()
    kept: list[int] = []
    for token in out:
        if token in model.eos_ids:
            break
        kept.append(token)
        if "\n" in model.tokenizer.decode(kept).lstrip():
            break
    return kept


# -- readers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_asking_leaves_a_reader_as_it_was(model: LocalModel, name: str) -> None:
    [method] = prepared(model, name)
    first, second = (stretch.text for stretch in HAYSTACKS[0].stretches)
    rounds = [(question(1),), (question(2), question(3)), (question(4),)]

    def fresh(*texts: str) -> Reader:
        reader = method.new_reader()
        for one in texts:
            reader.read(one)
        return reader

    reader = fresh(first)
    asked = [reader.ask(one) for one in rounds]
    assert [reader.ask(one) for one in rounds] == asked
    assert [fresh(first).ask(one) for one in rounds] == asked
    reader.read(second)
    assert [reader.ask(one) for one in rounds] == [fresh(first, second).ask(one) for one in rounds]


def test_full_is_what_transformers_generates(model: LocalModel) -> None:
    reader = WholeReader(model, FullContext(model))
    context, one, two = text(1, 6), question(1), question(2)
    reader.read(context)
    ids = reader.encode(context) + reader.encode(one.text)
    written = generated(model, ids, 5)
    more = generated(model, ids + written + reader.encode(two.text), 5)
    assert reader.ask((one, two)) == [model.tokenizer.decode(written), model.tokenizer.decode(more)]


def test_full_in_pieces_is_full_in_one(model: LocalModel) -> None:
    ids = list(range(5, 205))
    whole = FullContext(model).feed(ids)
    context = FullContext(model, piece=32)
    torch.testing.assert_close(context.feed(ids), whole, atol=1e-3, rtol=1e-3)
    assert context.attended_keys == 200


def test_memory_is_full_while_all_fits_and_keeps_its_bound_after(model: LocalModel) -> None:
    roomy, tight = prepared(model, "infllm", config=MemoryConfig(n_local=1024)) + prepared(model, "infllm")
    full = prepared(model, "full")[0].new_reader()
    fits, bounded = roomy.new_reader(), tight.new_reader()
    for reader in (full, fits, bounded):
        reader.read(HAYSTACKS[0].stretches[0].text)
        reader.read(HAYSTACKS[0].stretches[1].text)
    rounds = [(question(1),), (question(2), question(3))]
    assert [fits.ask(one) for one in rounds] == [full.ask(one) for one in rounds]
    assert fits.attended_keys == full.attended_keys > 300
    bounded.ask(rounds[0])
    assert SMALL.n_local < bounded.attended_keys <= SMALL.attended_keys


def test_truncate_is_full_over_the_latest_tokens(model: LocalModel) -> None:
    reader = TruncatedReader(model, 400)
    ids = reader.encode(text(1, 40))
    reader.read(text(1, 40))
    asked = reader.encode(question(1).text)
    kept = ids[-(400 - 128) :]  # room is made in steps of 128
    assert len(ids) > 400
    assert reader.ask((question(1),)) == [model.tokenizer.decode(generated(model, kept + asked, 5))]
    assert reader.attended_keys <= 400


def test_rag_picks_the_chunk_with_the_fact_and_keeps_its_budget(model: LocalModel) -> None:
    reader = RagReader(model, 500)
    for seed in range(4):
        reader.read(text(seed, 10) + ("The zebra eats 4821 melons. " if seed == 2 else ""))
    assert max(map(len, reader.chunks)) <= CHUNK
    assert model.tokenizer.decode([token for chunk in reader.chunks for token in chunk]).startswith(text(0, 10))
    found = reader.retrieve("How many melons does the zebra eat?", 300)
    shown = model.tokenizer.decode(found)
    assert len(found) <= 300
    assert "The zebra eats 4821 melons." in shown
    assert shown.startswith(text(0, 1))  # the head
    reader.ask((question(1), question(2), question(3)))
    assert 300 < reader.attended_keys <= 500
    assert len(reader.retrieve("Is it?", 10**6)) == sum(map(len, reader.chunks))
    assert len(reader.retrieve("?!", 50)) <= 50


# -- measuring -----------------------------------------------------------------------------------------------------


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_rows_count_every_question_once(model: LocalModel) -> None:
    rows = measure(model, prepared(model, "infllm", "truncate"), HAYSTACKS)
    assert [(row["tokens"], row["method"]) for row in rows] == [
        (400, "infllm"),
        (400, "truncate"),
        (800, "infllm"),
        (800, "truncate"),
    ]
    for row in rows:
        assert row["contexts"] == 2
        assert row["samples"] == (4 if row["tokens"] == 400 else 6)
        assert row["accuracy"] == row["correct"] / row["samples"]
        assert sum(asked for _, _, asked in row["by_depth"]) == row["samples"]
        assert [kind for kind, _, _ in row["by_kind"]] == (["a", "b"] if row["tokens"] == 400 else [])
        assert [turn for turn, _, _ in row["by_turn"]] == ([] if row["tokens"] == 400 else [1, 2])
        assert row["prefill_tok_s"] > 0
        assert not row["beyond_window"]
    assert rows[0]["settings"]["n_local"] == 64
    assert rows[1]["settings"] == {"truncate_to": SMALL.attended_keys}


@pytest.mark.parametrize("stopped_after", [1, 5, 10, 15])
def test_a_stopped_measurement_goes_on_as_if_it_had_not_been(
    model: LocalModel, tmp_path: Path, stopped_after: int
) -> None:
    methods = prepared(model, "infllm", "rag")
    whole = measure(model, methods, HAYSTACKS)
    file = tmp_path / "out.answers.jsonl"

    def stop(done: int, total: int, line: str) -> None:
        if done == stopped_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, methods, HAYSTACKS, file, stop)
    assert file.read_bytes().count(b"\n") == stopped_after
    file.write_bytes(file.read_bytes()[:-9])  # as a kill in the middle of a line leaves it
    seen: list[int] = []
    again = measure(model, methods, HAYSTACKS, file, lambda done, total, line: seen.append(done))
    assert without_times(again) == without_times(whole)
    assert seen[-1] == file.read_bytes().count(b"\n") == 16
    if stopped_after > 1:
        assert seen[0] == stopped_after - 1

    never = [replace(method, new_reader=pytest.fail) for method in methods]
    assert measure(model, never, HAYSTACKS, file) == again


def test_another_plan_never_uses_the_answers_of_this_one(model: LocalModel, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    measure(model, prepared(model, "infllm"), HAYSTACKS[:1], file)
    lines = file.read_bytes().count(b"\n")
    measure(model, prepared(model, "infllm"), HAYSTACKS, file)  # one context more: the first is not asked again
    assert file.read_bytes().count(b"\n") == 2 * lines
    measure(model, prepared(model, "infllm", config=SMALL.changed(topk=4)), HAYSTACKS[:1], file)
    assert file.read_bytes().count(b"\n") == 3 * lines
    measure(model, prepared(model, "truncate"), HAYSTACKS[:1], file)
    assert file.read_bytes().count(b"\n") == 4 * lines


def test_the_digest_covers_all_code_that_answers_come_from() -> None:
    program = (
        "import sys, infllm_agent.bench.retrieval.rag;"
        "print(*(name for name in sys.modules if name.startswith('infllm_agent.')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("infllm_agent.").replace(".", "/") for name in done.stdout.split()}
    covered = {*MEMORY_CODE, *READER_CODE}
    others = {name for name in loaded if name not in covered and name.split("/")[0] not in covered}
    beside = {"bench", "bench/retrieval", "bench/retrieval/haystack", "errors"}
    assert {name for name in others - beside if not name.startswith("platform")} == set()


def test_the_digest_sees_what_code_does_and_not_how_it_is_worded() -> None:
    source = 'def f(x: int) -> int:\n    """Twice."""\n    return 2 * x\n'
    reworded = '"""A module."""\n\ndef f(x: int) -> int:\n    """The double."""\n    # so\n    return (2 * x)\n'
    assert meaning(source) == meaning(reworded)
    assert meaning(source) != meaning(source.replace("2 * x", "3 * x"))


def test_a_file_that_holds_something_else_is_left_alone(model: LocalModel, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a diary": true}\n')
    with pytest.raises(StorageError, match="line 1 is no answer"):
        measure(model, prepared(model, "infllm"), HAYSTACKS, file)
    assert file.read_text() == '{"a diary": true}\n'


def test_two_measurements_do_not_write_to_one_file(model: LocalModel, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"

    def second(done: int, total: int, line: str) -> None:
        with pytest.raises(StorageError, match="another measurement"):
            measure(model, prepared(model, "infllm"), HAYSTACKS[:1], file)

    measure(model, prepared(model, "truncate"), HAYSTACKS[:1], file, second)


@pytest.mark.model
@pytest.mark.slow
def test_every_method_on_the_packaged_model(smollm2_path: str) -> None:
    """A pass key outside the window: found by the memory, by full attention and by words; not by who cannot see it."""
    model = LocalModel.load(smollm2_path, device="cpu")
    config = MemoryConfig(n_init=32, n_local=128, block_size=32, topk=4, chunk_size=128)
    rows = run(model, config, RetrievalPlan(("passkey",), (1000,), tuple(METHODS), contexts=1))
    correct = {row["method"]: row["correct"] for row in rows}
    assert correct["infllm"] == correct["full"] == correct["rag"] == 1
    assert correct["streaming"] == correct["truncate"] == 0
    for row in rows:
        assert row["attended_keys"] <= (1000 if row["method"] == "full" else config.attended_keys)


# -- pictures and the command line ---------------------------------------------------------------------------------


def test_pictures_are_drawn(model: LocalModel, tmp_path: Path) -> None:
    rows = measure(model, prepared(model, "infllm", "truncate"), HAYSTACKS)
    folder = tmp_path / "new" / "pictures"
    plots.check(folder)
    written = plots.draw(rows, folder)
    assert [path.name for path in written] == ["own.png", "own-infllm.png", "own-truncate.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_the_command(cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["bench", "retrieval", "--task", "passkey,number", "--tokens", "900,1100", "--samples", "1"]
    command += ["--method", "infllm,truncate", "--model", str(cli.model), *SMALL_OPTIONS]
    done = cli(*command, "--json", str(out), "--plot", str(tmp_path / "plots"))
    assert done.code == 0, done.err
    assert done.err.count("round") == 8
    assert "exact match" in done.out
    rows = json.loads(out.read_text())
    assert [(row["task"], row["tokens"], row["method"]) for row in rows] == [
        (task, tokens, method)
        for task in ("passkey", "number")
        for tokens in (900, 1100)
        for method in ("infllm", "truncate")
    ]
    assert len(list((tmp_path / "plots").iterdir())) == 6
    assert (tmp_path / "out.answers.jsonl").read_bytes().count(b"\n") == 8
    again = cli(*command, "--json", str(out))
    assert json.loads(out.read_text()) == rows
    assert "8 of 8 rounds of questions are answered already" in again.err
    assert without_times(cli(*command, "--json", "-").json) == without_times(rows)


def test_an_interrupted_command_says_how_to_go_on(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("infllm_agent.bench.retrieval.run.run", interrupted)
    out = tmp_path / "out.json"
    done = cli("bench", "retrieval", "--tokens", "900", "--model", str(cli.model), "--json", str(out))
    assert done.error == f"interrupted: the same command goes on from {tmp_path / 'out.answers.jsonl'}"
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "passkee"], 'task "passkee" is not known; there are passkey, number'),
        (["--task", "passkey,passkey"], "named twice"),
        (["--method", "magic"], 'method "magic" is not known; there are infllm'),
        (["--tokens", "many"], '--tokens "many": expected numbers'),
        (["--tokens", "0"], "a context of 0 tokens"),
        (["--tokens", "20"], "20 tokens are too few"),
        (["--questions", "0"], "0"),
        (["--json", "/proc/no/such.json"], "cannot be written"),
        (["--plot", "/proc/no/such"], "/proc/no/such"),
        (["--method", "truncate", "--truncate-to", "5000"], "more than the window"),
        (["--method", "truncate", "--truncate-to", "50"], "sees 50 tokens at once"),
        (["--method", "infllm", "--n-local", "5000"], "window"),
    ],
)
def test_what_makes_no_sense_is_refused_before_measuring(cli: Any, options: list[str], message: str) -> None:
    base = ["bench", "retrieval", "--model", str(cli.model), "--tokens", "900", "--samples", "1", *SMALL_OPTIONS]
    assert message in cli(*base, *options).error


def test_full_attention_that_does_not_fit_is_refused(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infllm_agent.bench.retrieval.methods.available_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match="full attention over 900 tokens needs"):
        prepared(model, "full")


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("bm25s", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r'pip install "infllm-agent\[bench\]"'):
        rag.bm25()
    with pytest.raises(ConfigError, match=r'pip install "infllm-agent\[bench\]"'):
        plots.check(tmp_path)
