"""One model's form of tools and calls.

Both are found in the model's own chat template. What stands around names and arguments there is control text; the rest
comes from outside and is encoded as text, whatever it spells. A template that knows no tools, or has them in a form
other than JSON, gets the Hermes form, which most open models have seen, explained in plain words.
"""

from __future__ import annotations

from collections.abc import Sequence

from infllm_agent.chat.announcement import Frame, plain_announcement
from infllm_agent.chat.call_form import HERMES, Part
from infllm_agent.chat.encoder import TextEncoder
from infllm_agent.chat.tool_probe import Render, ToolProbe
from infllm_agent.tools import ToolCall, ToolSpec


class ToolFormat:
    """One model's form of tools and calls, from its chat template.

    Args:
        render: messages (and ``tools``) to text; None where the template refuses them.
        system, user, assistant: the control text around these roles' contents; ``system`` equals ``user`` where the
            template has no system message.
        prompt: what asks the model for its turn.
        stops: texts of the control tokens that end a turn.

    ``native``: whether the template knows tools.
    """

    def __init__(
        self,
        render: Render,
        encoder: TextEncoder,
        *,
        system: Frame,
        user: Frame,
        assistant: Frame,
        prompt: str,
        stops: Sequence[str],
    ) -> None:
        self.encoder = encoder
        probe = ToolProbe(render, encoder.control_texts, system, user, assistant, prompt, stops)
        announcement, form = probe.announcement(), probe.call_form()
        told = "".join(announcement.frame) if announcement else ""
        if form is None and HERMES.opener in told and '"arguments"' in told:
            form = HERMES  # SmolLM3's template tells of calls but cannot show one
        self.native = announcement is not None and form is not None
        self.form = form or HERMES
        if announcement is None or form is None:
            announcement = plain_announcement(system, self.form)
        self._announcement = announcement

    def open_system(self, tools: Sequence[ToolSpec], *, first: bool) -> list[Part]:
        """Give what stands before the content of a system message that announces tools."""
        frame = self._announcement.frame
        return list(self._announcement.parts(frame.first if first else frame.later, tools))

    def close_system(self, tools: Sequence[ToolSpec]) -> list[Part]:
        """Give what stands after the content of such a message."""
        return list(self._announcement.parts(self._announcement.frame.tail, tools))

    def encode_calls(self, calls: Sequence[ToolCall], *, after_text: bool) -> list[int]:
        """Encode calls that the model did not write itself, to follow the text of an assistant's message."""
        return [
            token
            for text, control in self.form.parts(calls, after_text=after_text)
            for token in (self.encoder.encode_control(text) if control else self.encoder.encode_text(text))
        ]
