"""Messages to token ids, one message at a time.

A session has no end, so a conversation is never rendered as a whole. The control text around each role's content is
found once, by rendering small conversations with the model's own template, and from then on a message costs what it
is long, whatever came before it. Templates that render old turns anew (drop their thinking, say) do so in vain: what
the model has read stays as it was read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, cast, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from infllm_agent.chat.announcement import Frame
from infllm_agent.chat.call_form import ID_HOLE, Part, filled, written_id
from infllm_agent.chat.call_reader import CallReader
from infllm_agent.chat.encoder import TextEncoder, TextStream, clean_text
from infllm_agent.chat.tool_format import ToolFormat
from infllm_agent.chat.tool_probe import Render
from infllm_agent.errors import InvalidName, UnsupportedModel
from infllm_agent.tools import ToolCall, ToolSpec, check_name

__all__ = ["ROLES", "ChatFormat", "Role", "TextEncoder", "TextStream", "Wrapper", "check_name", "clean_text"]

Role = Literal["system", "user", "assistant", "observation", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)

# For tokenizers without a chat template, mostly those of base models.
PLAIN_TEMPLATE = """\
{%- set names = {'system': 'System', 'user': 'User', 'assistant': 'Assistant'} -%}
{%- if add_bos %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{%- if message.role not in names %}{{ raise_exception('unknown role ' + message.role) }}{% endif -%}
{{- names[message.role] + ': ' + message.content -}}
{%- if message.role == 'assistant' and eos_token %}{{ eos_token }}{% endif -%}
{{- '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""

# Shadows the function with which templates ask for today's date. What they get is a mark, filled in when a session
# begins, so that neither the digest nor a process that runs for weeks depends on the day it was started.
_DATE_MACRO = "{%- macro strftime_now(format) -%}\ue000{{ format }}\ue001{%- endmacro -%}"
_DATE_MARK = re.compile("\ue000(.*?)\ue001", re.DOTALL)

_LABELS = {"tool": "Tool result", "observation": "Observation"}

# Contents that no template holds or changes: plain words, each of its own.
_A, _B, _C, _D, _S = (f"{letter}probe6f1d{letter}" for letter in "abcds")
_CALL, _TOOL, _NO_ROLE = "callid6f1", "toolname6f1d", "norole6f1d"

TemplateMessage = dict[str, str]


@dataclass(frozen=True)
class Wrapper:
    """The control text around one role's content: before it as first message, before it later on, and after it."""

    first: str
    later: str
    tail: str
    label: str = ""  # the first words of a content whose role the template does not know


class ChatFormat:
    """One model's chat format, rendered incrementally: ids of a message depend on nothing but the message.

    A message is ``open`` + the content's text ids + ``close``; ``render`` does all three. A system message that the
    template refuses, or merges into the user's, becomes a user message. Tool results take the template's own form
    where it has one; otherwise they, and observations always, are user messages that begin with a label line.

    ``eos_ids``: further ids that end a turn, from the model's generation config. ``template_options`` go to the
    template (``enable_thinking=False``). ``clock`` dates sessions for templates that ask for the date.

    Raises UnsupportedModel where the template cannot be used so.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_ids: int | Iterable[int] | None = None,
        template_options: Mapping[str, Any] | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.encoder = TextEncoder(tokenizer)
        self._tokenizer = tokenizer
        self._clock = clock
        self._template = _template_of(tokenizer)
        render = _renderer(tokenizer, self._template, template_options or {})
        probe = _Probe(render, self.encoder, tokenizer.bos_token)
        self.wrappers: dict[Role, Wrapper] = probe.wrappers()
        self._preamble, self._prompt = probe.preamble, probe.prompt
        self._assistant_tail = self.close("assistant")
        more = [] if eos_ids is None else [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
        self.stop_ids: frozenset[int] = frozenset(
            [*self._ending_ids(), *more, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        )
        system, user, assistant = (self.wrappers[role] for role in ("system", "user", "assistant"))
        self.tools = ToolFormat(
            render,
            self.encoder,
            system=Frame(system.first, system.later, system.tail),
            user=Frame(user.first, user.later, user.tail),
            assistant=Frame(assistant.first, assistant.later, assistant.tail),
            prompt=probe.prompt,
            stops=[assistant.tail, *(self.encoder.backend.id_to_token(token) or "" for token in self.stop_ids)],
        )
        self.reader = CallReader(self.tools.form, self.encoder)
        self.default_system = _enclosed(probe.preamble, system)

    def render(
        self,
        role: str,
        content: str,
        *,
        name: str | None = None,
        call_id: str | None = None,
        calls: Sequence[ToolCall] = (),
        tools: Sequence[ToolSpec] = (),
        first: bool = False,
    ) -> list[int]:
        """Encode a whole message. ``first``: it begins a session. Content is never altered, not even trimmed."""
        before = self.open(role, name=name, first=first, tools=tools, call_id=call_id)
        after = self.close(role, name=name, tools=tools, calls=calls, after_text=bool(content))
        return before + self.encoder.encode_text(content) + after

    def open(
        self,
        role: str,
        *,
        name: str | None = None,
        first: bool = False,
        tools: Sequence[ToolSpec] = (),
        call_id: str | None = None,
    ) -> list[int]:
        """Encode what stands before a message's content, its label included. ``name`` shows only in labels, ``call_id``
        only where the template has a place for it. ``tools`` are those that a system message announces.

        Raises InvalidName for a role that is not among ``ROLES`` or a name that is not allowed.
        """
        wrapper = self._wrapper(role)
        if name is not None:
            check_name(name, f"{role} name")
        if tools and role == "system":
            return self._encode_parts(self.tools.open_system(tools, first=first))
        head = wrapper.first if first else wrapper.later
        ids = self._encode_parts(filled(head, written_id(call_id or name or "")))
        if wrapper.label:
            ids += self.encoder.encode_text(f"{wrapper.label} from {name}:\n" if name else f"{wrapper.label}:\n")
        return ids

    def close(
        self,
        role: str,
        *,
        name: str | None = None,
        tools: Sequence[ToolSpec] = (),
        call_id: str | None = None,
        calls: Sequence[ToolCall] = (),
        after_text: bool = True,
    ) -> list[int]:
        """Encode what stands after a message's content. Name, tools and call_id are those that ``open`` was given;
        ``calls`` are those of an assistant's message (``after_text``: its content is not empty)."""
        if tools and role == "system":
            return self._encode_parts(self.tools.close_system(tools))
        if calls and role == "assistant":
            return self.tools.encode_calls(calls, after_text=after_text) + self.close(role)
        tail = self._wrapper(role).tail
        return self._encode_parts(filled(tail, written_id(call_id or name or "")))

    def generation_prompt(self, first: bool = False) -> list[int]:
        """Encode what asks the model for its turn (nothing where the end of the user's turn does). It may open a think
        block, according to ``template_options``."""
        return self._encode_head(self._preamble + self._prompt if first else self._prompt)

    def after_stop(self, stop_id: int) -> list[int]:
        """Give the ids that must still be fed after the model ended its turn with ``stop_id``: the rest of the
        assistant's tail, or all of it if that id is not part of it. A turn cut off by a length limit takes
        ``close("assistant")``."""
        tail = self._assistant_tail
        return tail[tail.index(stop_id) + 1 :] if stop_id in tail else list(tail)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, special tokens left out, spaces as they are. Other added tokens are shown."""
        return cast(
            str, self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def digest(self) -> str:
        """Compute SHA-256 over what gives ids their meaning: template, wrappers, vocabulary, merges, added tokens."""
        parts = {
            "template": self._template,
            "wrappers": {role: asdict(wrapper) for role, wrapper in self.wrappers.items()},
            "vocabulary": self.encoder.digest,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _wrapper(self, role: str) -> Wrapper:
        if role not in self.wrappers:
            raise InvalidName(f"role {role!r} is not known; use one of {', '.join(ROLES)}")
        return self.wrappers[role]

    def _encode_head(self, text: str) -> list[int]:
        return self.encoder.encode_control(_DATE_MARK.sub(lambda mark: self._clock().strftime(mark[1]), text))

    def _encode_parts(self, parts: Iterable[Part]) -> list[int]:
        encode = self.encoder.encode_text
        return [token for text, control in parts for token in (self._encode_head(text) if control else encode(text))]

    def _ending_ids(self) -> list[int]:
        """Find the first run of control ids in the assistant's tail: each of them says that the turn is over."""
        run: list[int] = []
        for token in self._assistant_tail:
            if token in self.encoder.control_ids:
                run.append(token)
            elif run:
                break
        return run


class _Probe:
    """Finds the wrappers by rendering conversations of contents that are easy to find again."""

    def __init__(self, render: Render, encoder: TextEncoder, bos_token: str | None) -> None:
        self._render = render
        self._unit = re.compile("|".join([*map(re.escape, encoder.control_texts), "."]), re.DOTALL)
        user, reply = _message("user", _A), _message("assistant", _B)
        _, after_user = self._around([user], _A)
        before, after_prompted = self._around([user], _A, add_generation_prompt=True)
        _, after_reply = self._around([user, reply], _B)
        # The reply in the middle stands for all replies: the last one may be rendered with an empty think block.
        dialogue = self._required([user, reply, _message("user", _C)])
        to_reply, to_user = _between(dialogue, _A, _B), _between(dialogue, _B, _C)
        if to_reply is None or to_user is None:
            raise UnsupportedModel("the model's chat template does not show a dialogue's contents in order")
        self.user_tail = self._common(after_user, after_prompted, to_reply)
        self.assistant_tail = self._common(after_reply, to_user)
        self.assistant_head = to_reply[len(self.user_tail) :]
        self.user_head = to_user[len(self.assistant_tail) :]
        self.prompt = after_prompted[len(self.user_tail) :]
        self._user_first = before
        self._bos = bos_token if bos_token and not self.user_head.startswith(bos_token) else ""
        if before.endswith(self.user_head):
            self.preamble = before[: len(before) - len(self.user_head)]
        else:
            self.preamble = self._bos if before.startswith(self._bos) else ""

    def wrappers(self) -> dict[Role, Wrapper]:
        user = Wrapper(self._user_first, self.user_head, self.user_tail)
        return {
            "system": self._system() or user,
            "user": user,
            "assistant": Wrapper(self.preamble + self.assistant_head, self.assistant_head, self.assistant_tail),
            "observation": Wrapper(user.first, user.later, user.tail, _LABELS["observation"]),
            "tool": self._tool() or Wrapper(user.first, user.later, user.tail, _LABELS["tool"]),
        }

    def _system(self) -> Wrapper | None:
        """Find the system message's wrapper; None where the template has none that stands by itself before a user's
        message."""
        system = _message("system", _S)
        text = self._render([system, _message("user", _A)])
        to_user = _between(text, _S, _A)
        if text is None or to_user is None or not to_user.endswith(self.user_head):
            return None
        first, tail = text[: text.index(_S)], to_user.removesuffix(self.user_head)
        text = self._render([_message("user", _A), _message("assistant", _B), system, _message("user", _C)])
        to_system, to_user = _between(text, _B, _S), _between(text, _S, _C)
        if to_system is None or not to_system.startswith(self.assistant_tail) or to_user != tail + self.user_head:
            return Wrapper(first, first.removeprefix(self._bos), tail)  # allowed at the beginning only
        return Wrapper(first, to_system.removeprefix(self.assistant_tail), tail)

    def _tool(self) -> Wrapper | None:
        """Find the wrapper of tool results; None where the template refuses them, repeats any role's name, or wants the
        tool's name."""

        def dialogue(role: str) -> str | None:
            result = {"role": role, "content": _S, "name": _TOOL, "tool_call_id": _CALL}
            before = [_message("user", _A), _message("assistant", _B)]
            return self._render([*before, result, _message("assistant", _C), _message("user", _D)])

        text = dialogue("tool")
        before, after = _between(text, _B, _S), _between(text, _S, _C)
        if before is None or after is None:
            return None
        if not before.startswith(self.assistant_tail) or not after.endswith(self.assistant_head):
            return None
        head, tail = before.removeprefix(self.assistant_tail), after.removesuffix(self.assistant_head)
        echo = dialogue(_NO_ROLE)
        if _TOOL in head + tail or (echo and echo.replace(_NO_ROLE, "tool") == text):
            return None
        if head.endswith('"') and tail.startswith('"'):  # Llama 3.1 renders the string as JSON; a content is just text
            head, tail = head[:-1], tail[1:]
        head, tail = head.replace(_CALL, ID_HOLE), tail.replace(_CALL, ID_HOLE)
        return Wrapper(self.preamble + head, head, tail)

    def _required(self, messages: list[TemplateMessage], **options: Any) -> str:
        text = self._render(messages, **options)
        if text is None:
            raise UnsupportedModel(
                f"the model's chat template refuses the dialogue {' > '.join(m['role'] for m in messages)}"
            )
        return text

    def _around(self, messages: list[TemplateMessage], content: str, **options: Any) -> tuple[str, str]:
        """Find the text before and after a content."""
        text = self._required(messages, **options)
        if text.count(content) != 1:
            raise UnsupportedModel("the model's chat template does not show each message's content exactly once")
        before, _, after = text.partition(content)
        return before, after

    def _common(self, *texts: str) -> str:
        """Find what the texts have in common at the beginning, with no control token's spelling cut in two."""
        shared = ""
        for units in zip(*(self._unit.findall(text) for text in texts), strict=False):
            if len(set(units)) > 1:
                break
            shared += units[0]
        return shared


def _enclosed(preamble: str, system: Wrapper) -> str:
    """Find the content of the system message that a template begins with by itself, or ""."""
    if not (preamble.startswith(system.first) and preamble.endswith(system.tail)):
        return ""
    content = preamble[len(system.first) : len(preamble) - len(system.tail)]
    return "" if _DATE_MARK.search(content) else content


def _message(role: str, content: str) -> TemplateMessage:
    return {"role": role, "content": content}


def _between(text: str | None, left: str, right: str) -> str | None:
    """Cut out the text between two contents; None unless both are there exactly once and in this order."""
    if text is None or text.count(left) != 1 or text.count(right) != 1:
        return None
    start, end = text.index(left) + len(left), text.index(right)
    return text[start:end] if start <= end else None


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return PLAIN_TEMPLATE
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UnsupportedModel(f"the model's chat template cannot be used: {error}") from None


def _renderer(tokenizer: PreTrainedTokenizerBase, template: str, options: Mapping[str, Any]) -> Render:
    """Make a function that renders messages, or returns None if the template refuses them."""
    begins = bool(tokenizer.bos_token) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    fixed = {"add_bos": begins, **options, "chat_template": _DATE_MACRO + template, "tokenize": False}

    def render(messages: list[TemplateMessage], **more: Any) -> str | None:
        try:
            return cast(str, tokenizer.apply_chat_template(messages, **fixed, **more))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return None  # a template refuses with raise_exception, or by stumbling over what it did not expect

    return render
