"""The main job on the packaged model: a long operations log, questions about it, a restart, questions again.

Next to the session, the same model answers the same questions in the ordinary way: with its own attention over the
latest messages that fit its window, the front dropped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from infllm_agent.bench.machine import peak_rss_mb
from infllm_agent.bench.oplog import Event, Fact, generate, matches
from infllm_agent.bench.retrieval.readers import FullContext
from infllm_agent.chat.format import ChatFormat
from infllm_agent.errors import InfLLMError
from infllm_agent.messages import Message
from infllm_agent.model.local_model import LocalModel
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session

SESSION = "demo"
TOKENS = 26_000
SEED = 7
#: Both methods stop an answer here or at the end of its first line.
MAX_TOKENS = 32
#: Messages of the log that the display names for each answer.
TOP_MESSAGES = 3


@dataclass(frozen=True)
class Asked:
    """One question to the session, and what came of it.

    Attributes:
        attended: the messages of the log by the attention the answer paid them (``Trace.by_message``), most first.
        truncated: what the model answered with an ordinarily truncated history; None where it was not asked.
    """

    question: str
    expected: str
    said_in: list[int]
    text: str
    correct: bool
    attended: list[dict[str, Any]]
    first_token_s: float
    seconds: float
    prefilled_tokens: int
    reused_tokens: int
    output_tokens: int
    truncated: str | None = None
    truncated_correct: bool | None = None


def run(
    root: Path,
    *,
    model: str = "smollm2",
    tokens: int = TOKENS,
    seed: int = SEED,
    console: Console,
) -> dict[str, Any]:
    """Run the demo in ``root``, an empty folder, showing on ``console`` how it goes.

    Returns:
        What ``infllm-agent demo --json`` prints.

    Raises:
        InfLLMError: the model cannot be loaded, ``root`` holds a demo already, or the restarted process failed.
    """
    began = time.perf_counter()
    with AgentRuntime.open(root, model, progress=console.print) as runtime:
        session = runtime.session(SESSION)
        if session.message_count:
            raise InfLLMError(f"{root} holds a session called {SESSION} already: give the demo an empty folder")
        chat = runtime.chat
        log = generate(seed, tokens, lambda event: len(_render(chat, event, first=event.role == "system")))
        console.rule(f"{log.tokens:,} tokens of operations log into a window of {runtime.model.window:,}")
        ingest_tok_s = ingest(session, log.events, console)
        session_tokens = session.token_count
        session.commit()

        facts = log.asked("before_restart")
        plain = ask_truncated(runtime.model, chat, log.events, facts, console)
        answers = []
        for fact, text in zip(facts, plain, strict=True):
            answer = ask(session, fact, len(log.events), truncated=text)
            show_answer(console, answer)
            answers.append(answer)
        session.commit()
        window = runtime.model.window
        attended_keys = session.config.attended_keys

    console.rule("restart: a new process opens the session")
    after = _restart(root, model, tokens, seed)
    later = [Asked(**answer) for answer in after["answers"]]
    result = {
        "tokens": session_tokens,
        "window": window,
        "memory": {"asked": len(answers), "correct": sum(answer.correct for answer in answers)},
        "truncated": {"asked": len(answers), "correct": sum(bool(answer.truncated_correct) for answer in answers)},
        "restart": {
            "asked": len(later),
            "correct": sum(answer.correct for answer in later),
            "first_token_s": after["first_token_s"],
            "prefilled_tokens": later[0].prefilled_tokens,
            "reused_tokens": later[0].reused_tokens,
            "open_s": after["open_s"],
            "model_load_s": after["model_load_s"],
            "peak_rss_mb": after["peak_rss_mb"],
        },
        # Of how many answers the message with the fact is among the first ``TOP_MESSAGES`` attended.
        "attended": {"asked": len(answers) + len(later), "found": sum(map(_found, [*answers, *later]))},
        "ingest_tok_s": round(ingest_tok_s, 1),
        "peak_rss_mb": peak_rss_mb(),
        "seconds": round(time.perf_counter() - began, 1),
        "attended_keys": attended_keys,
        "model": model,
        "seed": seed,
        "questions": [asdict(answer) for answer in answers],
        "questions_after_restart": [asdict(answer) for answer in later],
    }
    for answer in later:
        show_answer(console, answer)
    show_summary(console, result)
    return result


def ingest(session: Session, events: Sequence[Event], console: Console) -> float:
    """Stream the log into the session; returns tokens per second."""
    total = sum(len(_render(session.chat, event)) for event in events)
    columns = [TextColumn("reading"), BarColumn(), TextColumn("{task.completed:,.0f} tokens"), TimeElapsedColumn()]
    start, began = session.memory.length, time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=total)
        for event in events:
            with session.stream(event.role, name=event.name) as stream:
                stream.write(event.text)
            progress.update(task, completed=session.memory.length - start)
    seconds = time.perf_counter() - began
    tok_s = (session.memory.length - start) / seconds
    console.print(f"read {session.token_count:,} tokens in {seconds:.0f} s, {tok_s:.0f} tok/s, {peak_rss_mb():,} MB")
    return tok_s


def ask(session: Session, fact: Fact, log_length: int, truncated: str | None = None) -> Asked:
    """Ask the live session about a fact. ``log_length``: the messages that are the log; questions come after."""
    session.append_user(fact.question)
    reply = session.reply(prefix=fact.prefix, max_tokens=MAX_TOKENS, stop=("\n",))
    messages = session.messages(0, log_length)
    top = reply.trace.by_message(messages, TOP_MESSAGES)
    return Asked(
        question=fact.question,
        expected=fact.answer,
        said_in=list(fact.messages),
        text=reply.text,
        correct=matches(reply.text, fact.answer),
        attended=[
            {
                "message": one.message,
                "share": round(one.share, 3),
                "focus": round(one.focus, 3),
                "text": _snippet(messages[one.message]),
            }
            for one in top
        ],
        first_token_s=round(reply.first_token_s, 3),
        seconds=round(reply.seconds, 3),
        prefilled_tokens=reply.usage.prefilled_tokens,
        reused_tokens=reply.usage.reused_tokens,
        output_tokens=reply.usage.output_tokens,
        truncated=truncated,
        truncated_correct=None if truncated is None else matches(truncated, fact.answer),
    )


def ask_truncated(
    model: LocalModel, chat: ChatFormat, events: Sequence[Event], facts: Sequence[Fact], console: Console
) -> list[str]:
    """The same model's answers with its own attention over the latest messages that fit its window.

    The system prompt is kept, and an answer begins with the same words as the session's. Every question is asked
    right after the log, as if it were the only one; what the questions have in common is computed once.
    """
    questions = [
        chat.render("user", fact.question) + chat.generation_prompt() + chat.encoder.encode_text(fact.prefix)
        for fact in facts
    ]
    room = max(map(len, questions)) + MAX_TOKENS
    history = latest_messages(chat, events, model.window - room)
    console.print(f"the ordinary way: the latest {len(history):,} tokens of the log, in the model's own attention")
    answers = []
    context = FullContext(model)
    context.feed(history)
    for fact, question in zip(facts, questions, strict=True):
        with context.branch() as branch:
            logits = branch.feed(question)
            generated: list[int] = []
            while len(generated) < MAX_TOKENS:
                token = int(logits.argmax())
                generated.append(token)
                if token in chat.stop_ids or "\n" in chat.decode([token]):
                    break
                logits = branch.feed([token])
            answers.append(fact.prefix + chat.decode(generated).partition("\n")[0])
    return answers


def latest_messages(chat: ChatFormat, events: Sequence[Event], room: int) -> list[int]:
    """The token ids of the system prompt and of as many of the latest whole messages as fit into ``room``."""
    system = _render(chat, events[0], first=True)
    kept: list[list[int]] = []
    room -= len(system)
    for event in reversed(events[1:]):
        ids = _render(chat, event)
        room -= len(ids)
        if room < 0:
            break
        kept.append(ids)
    return system + [token for ids in reversed(kept) for token in ids]


def _render(chat: ChatFormat, event: Event, *, first: bool = False) -> list[int]:
    return chat.render(event.role, event.text, name=event.name, first=first)


# -- the restart ---------------------------------------------------------------------------------------------------


def _restart(root: Path, model: str, tokens: int, seed: int) -> dict[str, Any]:
    """Ask the rest of the questions from a new process."""
    command = [sys.executable, "-m", "infllm_agent.cli.demo", "--after-restart", str(root)]
    command += ["--model", model, "--tokens", str(tokens), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise InfLLMError(f"the process after the restart failed: {last[0]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def after_restart(root: Path, model: str, tokens: int, seed: int) -> dict[str, Any]:
    """What the new process does: open the session as it was left, and ask."""
    began = time.perf_counter()
    with AgentRuntime.open(root, model) as runtime:
        loaded = time.perf_counter()
        session = runtime.session(SESSION)
        opened = time.perf_counter()
        # The log is made again for its questions only: none of its text is shown to the model.
        log = generate(seed, tokens, lambda event: len(_render(runtime.chat, event, first=event.role == "system")))
        made = time.perf_counter()
        answers = [ask(session, fact, len(log.events)) for fact in log.asked("after_restart")]
    return {
        "model_load_s": round(loaded - began, 3),
        "open_s": round(opened - loaded, 3),
        "first_token_s": round(opened - loaded + answers[0].first_token_s, 3),
        "log_made_s": round(made - opened, 3),
        "peak_rss_mb": peak_rss_mb(),
        "answers": [asdict(answer) for answer in answers],
    }


# -- what the reader sees ------------------------------------------------------------------------------------------


def show_answer(console: Console, answer: Asked) -> None:
    """One question with its answers and what the memory's answer attended to."""
    console.print(Text(f"\n{answer.question}", style="bold"), Text(f"(expected: {answer.expected})", style="dim"))
    console.print(Text("  memory    "), _mark(answer.correct), Text(answer.text))
    if answer.truncated is not None:
        console.print(Text("  truncated "), _mark(bool(answer.truncated_correct)), Text(answer.truncated))
    for one in answer.attended:
        where = " ← said here" if one["message"] in answer.said_in else ""
        console.print(Text(f"    {one['focus']:4.0%} message {one['message']:>4} {one['text']}{where}", style="dim"))
    rate = answer.output_tokens / max(answer.seconds - answer.first_token_s, 1e-9)
    console.print(
        Text(
            f"    {answer.prefilled_tokens} tokens read, {answer.reused_tokens:,} re-used, first token after "
            f"{answer.first_token_s:.1f} s, {rate:.1f} tok/s",
            style="dim",
        )
    )


def show_summary(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"{result['tokens']:,} tokens, window {result['window']:,}, seed {result['seed']}")
    for column in ("", "right", "asked"):
        table.add_column(column)
    rows = {"memory": "memory", "truncated": "truncated history", "restart": "memory, after the restart"}
    for key, label in rows.items():
        table.add_row(label, str(result[key]["correct"]), str(result[key]["asked"]))
    console.print(table)
    restart = result["restart"]
    console.print(
        f"restart: first token {restart['first_token_s']:.1f} s after opening the session (model load "
        f"{restart['model_load_s']:.1f} s before that), {restart['prefilled_tokens']} tokens read, "
        f"{restart['reused_tokens']:,} re-used"
    )
    console.print(
        f"read at {result['ingest_tok_s']:.0f} tok/s; at most {result['attended_keys']:,} keys attended; "
        f"peak {result['peak_rss_mb']:,} MB; {result['seconds']:.0f} s in all\n"
        f"of {result['attended']['asked']} answers {result['attended']['found']} attended to the message with the fact "
        f"among the first {TOP_MESSAGES}"
    )


def _found(answer: Asked) -> bool:
    return any(one["message"] in answer.said_in for one in answer.attended)


def _mark(right: bool) -> Text:
    return Text("✓", style="green") if right else Text("✗", style="red")


def _snippet(message: Message) -> str:
    text = " ".join(message.text.split())
    return f"{message.role}: {text[:60]}{'…' if len(text) > 60 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infllm_agent.cli.demo")
    parser.add_argument("--after-restart", type=Path, required=True, metavar="ROOT")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    try:
        print(json.dumps(after_restart(options.after_restart, options.model, options.tokens, options.seed)))
    except InfLLMError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
