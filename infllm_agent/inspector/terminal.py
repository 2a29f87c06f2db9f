"""What an answer attended to, for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from infllm_agent.inspector.report import Answer, Report
from infllm_agent.messages import Message
from infllm_agent.platform.text import counted, local_time, printable

#: Characters of a question or an answer; and of an excerpt, on each side of what was attended to most.
SAID_CHARS, EXCERPT_CHARS = 400, 110
BAR = 20
#: In an excerpt is highlighted what got at least this part of the most attended token's focus.
HIGHLIGHTED = 0.25


def render(report: Report, answer: Answer, console: Console, top: int = 8) -> None:
    """Print the question, the answer, how its attention was divided, and the ``top`` messages that got most of it."""
    trace = answer.trace
    head = Text(f"{report.session}: answer {answer.message}", "bold")
    head.append(f"   {_one_line(report.model)}", "dim")
    console.print(head)
    if answer.question is not None:
        _said(console, report.messages[answer.question])
    _said(console, report.messages[answer.message])
    console.print()
    shares = Table.grid(padding=(0, 2))
    for what, share in (
        ("sinks: the session's first tokens", trace.sinks),
        ("memory: blocks looked up", trace.looked_up),
        ("window: the latest tokens", trace.window),
    ):
        shares.add_row(what, _bar(share, "cyan"), f"{share:6.1%}")
    console.print(shares)
    console.print(f"of it to the question and the answer themselves: {trace.own:.1%}")
    console.print()
    if not answer.attended:
        console.print("no attention to any message before the question is recorded")
    # Bars compare the messages with each other; the figures beside them are absolute.
    most_focus = max((one.focus for one in answer.attended), default=0.0) or 1.0
    most_share = max((one.share for one in answer.attended), default=0.0) or 1.0
    for one in answer.attended[:top]:
        message = report.messages[one.message]
        line = Text()
        line.append(f"[{message.index}] {_who(message)}", "bold")
        line.append(f"  {local_time(message.time)}\n", "dim")
        line.append("focus ").append(_bar(one.focus / most_focus, "yellow")).append(f" {one.focus:6.1%}   share ")
        line.append(_bar(one.share / most_share, "cyan")).append(f" {one.share:6.1%}")
        console.print(line)
        console.print(Padding(_excerpt(message, answer), (0, 0, 1, 4)))
    if (more := len(answer.attended) - top) > 0:
        console.print(f"and {counted(more, 'more message')}")
    if any(one.message in answer.approximate for one in answer.attended[:top]):
        console.print("The model's tokenizer is not at hand: highlighted words are approximate.", style="dim")


def _said(console: Console, message: Message) -> None:
    text = message.text
    if message.calls:
        text = f"{text} {' '.join(f'{call.name}({call.arguments})' for call in message.calls)}"
    more = " …" if len(text) > SAID_CHARS else ""
    line = Text(f"[{message.index}] {_who(message)}: ", "bold")
    console.print(line.append(Text(_one_line(text[:SAID_CHARS]) + more, "not bold")))


def _excerpt(message: Message, answer: Answer) -> Text:
    """What stands around the most attended token, with it and its like highlighted."""
    shades = answer.shades.get(message.index, ())
    text = message.text
    peak = max(shades, key=lambda one: one.focus, default=None)
    start = max(0, peak.start - EXCERPT_CHARS) if peak else 0
    end = min(len(text), (peak.end if peak else start) + EXCERPT_CHARS * (1 if peak else 2))
    # One character for one character, so that the shades' places hold.
    shown = Text(printable(text[start:end]).replace("\n", " ").replace("\t", " "))
    for one in shades:
        if peak and one.focus >= HIGHLIGHTED * peak.focus and start <= one.start and one.end <= end:
            shown.stylize("bold black on yellow", one.start - start, one.end - start)
    return Text("… " if start else "") + shown + Text(" …" if end < len(text) else "")


def _bar(share: float, style: str) -> Text:
    filled = round(min(max(share, 0.0), 1.0) * BAR)
    return Text("█" * filled, style) + Text("·" * (BAR - filled), "dim")


def _who(message: Message) -> str:
    return f"{message.role} {message.name}" if message.name else message.role


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())
