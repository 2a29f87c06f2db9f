"""``infllm-agent ask``: an answer from a session."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infllm_agent.cli.options import AsJson, Memory, RuntimeOptions, Sampling, SessionName, Tracing
from infllm_agent.cli.options import takes_options as options
from infllm_agent.cli.output import print_json, write_piece
from infllm_agent.cli.work import open_session
from infllm_agent.config import SamplingConfig
from infllm_agent.errors import Cancelled

if TYPE_CHECKING:
    from infllm_agent.reply import Reply

#: How many messages ``ask`` names as those that its answer attended to.
ATTENDED = 5


@options
def ask(
    session: SessionName,
    question: Annotated[str, typer.Argument(metavar="QUESTION", show_default=False)],
    prefix: Annotated[str, typer.Option(help="Words that the answer begins with.", show_default=False)] = "",
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer with JSON, valid under this JSON schema.")
    ] = None,
    as_json: AsJson = False,
    trace: Tracing = "sampled",
    *,
    where: RuntimeOptions,
    memory: Memory,
    sampling: Sampling,
) -> None:
    """Answer a question from a session."""
    if not question.strip():
        raise typer.BadParameter("it is empty", param_hint="QUESTION")
    SamplingConfig(**sampling)  # a mistake is told before the model is loaded
    form = {} if schema is None else {"schema": _read_schema(schema)}
    with open_session(session, where, memory, create=False, trace=trace) as work:
        target = work.session
        if schema is not None:
            target.grammars.schema(form["schema"])  # refused before the question is taken in
        asked = target.append_user(question)
        # Closed whatever happens, so that an answer nobody reads to its end is kept as far as it came.
        with closing(target.stream_reply(prefix=prefix, **form, **sampling)) as pieces:
            for piece in pieces:
                if not as_json:
                    write_piece(piece)
        reply = target.last_reply
        assert reply is not None
        target.commit()
        if as_json:
            attended = reply.trace.by_message(target.messages(0, asked.index), ATTENDED)
            print_json(
                _reply_fields(reply)
                | {"attended": [{"message": a.message, "share": a.share, "focus": a.focus} for a in attended]}
            )
        else:
            print(flush=True)
        if reply.finish_reason == "cancelled":
            raise Cancelled("the answer was stopped")


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(path.expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"{path} holds no JSON: {reason}", param_hint="--schema") from None


def _reply_fields(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "text": reply.text,
        "tool_calls": [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in reply.tool_calls],
        "usage": {
            "input_tokens": usage.input_tokens,
            "prefilled_tokens": usage.prefilled_tokens,
            "reused_tokens": usage.reused_tokens,
            "output_tokens": usage.output_tokens,
        },
        "finish_reason": reply.finish_reason,
        "first_token_s": reply.first_token_s,
        "seconds": reply.seconds,
    }
