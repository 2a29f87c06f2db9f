"""Small chat templates, one for each family of forms, and a vocabulary that has all their control tokens."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infllm_agent.chat.format import ChatFormat

SPECIAL = ["<s>", "</s>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"]
PLAIN_ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def byte_level(
    chat_template: str | None = None, *, bos: str | None = None, eos: str | None = None, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that knows the control tokens of every family below, some of them not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the agent said that the tool user system <|im_end|> think"] * 20, trainer)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken(text, normalized=False) for text in PLAIN_ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=chat_template)


CONTROL_TEXTS = [*SPECIAL, *PLAIN_ADDED, "<|im_", "end|>", "<tool", "<repo_name>", "<file_sep>"]


CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif -%}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
  {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
  {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
  {%- if message.role == "tool" or message.role == "ipython" %}
    {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + (message.content | tojson) + "<|eot_id|>" }}
  {%- else %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{- bos_token -}}
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
  {%- if m.role == 'user' -%}{{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' -}}
  {%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}
  {%- else -%}{{- raise_exception('only user and assistant') -}}{%- endif -%}
{%- endfor -%}"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (m.content | trim) -}}
  {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

QWEN3 = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set answer = m.content.split('</think>')[-1].lstrip('\\n') -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > ns.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
    {{- answer + '<|im_end|>\\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""

PHI3 = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif -%}"""

# Per family: template, bos, eos, then for each role the text of its first and its later message "x" (tools are named
# "grep"), and the generation prompt.
LLAMA3_DATED = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 05 Mar 2031\n\n"
LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
HELPFUL = "<|im_start|>system\nBe helpful.<|im_end|>\n"
FAMILIES: dict[str, tuple[Any, ...]] = {
    "chatml": (
        (CHATML, None, "<|im_end|>"),
        {
            "system": ("<|im_start|>system\nx<|im_end|>\n",) * 2,
            "user": (HELPFUL + "<|im_start|>user\nx<|im_end|>\n", "<|im_start|>user\nx<|im_end|>\n"),
            "assistant": (HELPFUL + "<|im_start|>assistant\nx<|im_end|>\n", "<|im_start|>assistant\nx<|im_end|>\n"),
            "tool": (
                HELPFUL + "<|im_start|>user\nTool result from grep:\nx<|im_end|>\n",
                "<|im_start|>user\nTool result from grep:\nx<|im_end|>\n",
            ),
            "observation": (
                HELPFUL + "<|im_start|>user\nObservation from grep:\nx<|im_end|>\n",
                "<|im_start|>user\nObservation from grep:\nx<|im_end|>\n",
            ),
        },
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
        {
            "system": (
                LLAMA3_DATED + "x<|eot_id|>",
                "<|start_header_id|>system<|end_header_id|>\n\nx<|eot_id|>",
            ),
            "user": (LLAMA3_DATED + "<|eot_id|>" + LLAMA3_USER + "x<|eot_id|>", LLAMA3_USER + "x<|eot_id|>"),
            "assistant": (
                LLAMA3_DATED + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nx<|eot_id|>",
                "<|start_header_id|>assistant<|end_header_id|>\n\nx<|eot_id|>",
            ),
            "tool": (
                LLAMA3_DATED + "<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\nx<|eot_id|>",
                "<|start_header_id|>ipython<|end_header_id|>\n\nx<|eot_id|>",
            ),
        },
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        (MISTRAL, "<s>", "</s>"),
        {
            "system": ("<s>[INST] x [/INST]", "[INST] x [/INST]"),
            "user": ("<s>[INST] x [/INST]", "[INST] x [/INST]"),
            "assistant": ("<s> x</s>", " x</s>"),
            "tool": ("<s>[INST] Tool result from grep:\nx [/INST]", "[INST] Tool result from grep:\nx [/INST]"),
        },
        "",
    ),
    "gemma": (
        (GEMMA, "<bos>", "<eos>"),
        {
            "system": ("<bos><start_of_turn>user\nx<end_of_turn>\n", "<start_of_turn>user\nx<end_of_turn>\n"),
            "user": ("<bos><start_of_turn>user\nx<end_of_turn>\n", "<start_of_turn>user\nx<end_of_turn>\n"),
            "assistant": ("<bos><start_of_turn>model\nx<end_of_turn>\n", "<start_of_turn>model\nx<end_of_turn>\n"),
            "observation": (
                "<bos><start_of_turn>user\nObservation from grep:\nx<end_of_turn>\n",
                "<start_of_turn>user\nObservation from grep:\nx<end_of_turn>\n",
            ),
        },
        "<start_of_turn>model\n",
    ),
    "qwen3": (
        (QWEN3, None, "<|im_end|>"),
        {
            "system": ("<|im_start|>system\nx<|im_end|>\n",) * 2,
            "user": ("<|im_start|>user\nx<|im_end|>\n",) * 2,
            "assistant": ("<|im_start|>assistant\nx<|im_end|>\n",) * 2,
            "tool": ("<|im_start|>user\n<tool_response>\nx\n</tool_response><|im_end|>\n",) * 2,
        },
        "<|im_start|>assistant\n",
    ),
    "phi3": (
        (PHI3, None, "<|endoftext|>"),
        {
            "user": ("<|user|>\nx<|end|>\n",) * 2,
            "assistant": ("<|assistant|>\nx<|end|>\n",) * 2,
        },
        "<|assistant|>\n",
    ),
    "none": (
        (None, None, "<|endoftext|>"),
        {
            "system": ("System: x\n\n",) * 2,
            "user": ("User: x\n\n",) * 2,
            "assistant": ("Assistant: x<|endoftext|>\n\n",) * 2,
            "tool": ("User: Tool result from grep:\nx\n\n",) * 2,
        },
        "Assistant:",
    ),
}
FAMILY_NAMES = sorted(FAMILIES)


def family(name: str) -> tuple[PreTrainedTokenizerFast, ChatFormat]:
    template, bos, eos = FAMILIES[name][0]
    tokenizer = byte_level(template, bos=bos, eos=eos)
    return tokenizer, ChatFormat(tokenizer, clock=lambda: datetime(2031, 3, 5))
