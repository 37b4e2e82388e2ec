"""Chat messages to one prompt, by the Jinja template that a GGUF carries.

Law of this file: text in, text out; no model and no tokenizer. A template is a stranger's program: it runs in jinja2's immutable sandbox,
and whatever it throws becomes an error of this tree. The globals are those that Hugging Face's templates expect
(transformers, `utils/chat_template_utils.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tars.errors import BadModelFile, InvalidParams
from tars.messages.inference import ChatMessage

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a GGUF without a template: what llama.cpp falls back to. https://github.com/openai/openai-python/blob/v0.28.1/chatml.md"""

REASON_MOST = 200
"""Characters of a template's own refusal that a caller sees."""


class _Refused(Exception):
    """The template called `raise_exception`: its text is meant for the caller."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks training data in Hugging Face's templates; here it is what it holds."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Drop the tag, keep its content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Raises `BadModelFile` where it is not one."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError:
            raise BadModelFile(
                "The model's chat template is not a valid Jinja template. Get the file again, or another conversion of the model."
            ) from None

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt, ending where the assistant's turn begins.

        Templates that refuse a system message (Mistral 7B v0.2, Gemma) get it at the head of the first user message instead.
        Raises `InvalidParams` with the template's reason where it refuses the messages, such as two user turns in a row.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._render(turns)
        except _Refused as refusal:
            merged = _system_into_user(turns)
            if merged is None:
                raise _invalid(refusal) from None
        try:
            return self._render(merged)
        except _Refused as refusal:
            raise _invalid(refusal) from None

    def _render(self, turns: list[dict[str, str]]) -> str:
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, documents=None, **self._tokens
            )
        except _Refused:
            raise
        except Exception:  # noqa: BLE001  # a stranger's program may throw anything; its text stays in here
            raise InvalidParams(
                "The model's chat template cannot render these messages. Try them without system or tool turns, "
                "user and assistant taking turns."
            ) from None


def _invalid(refusal: _Refused) -> InvalidParams:
    return InvalidParams(f"The model's chat template refuses these messages: {str(refusal)[:REASON_MOST]}")


def _system_into_user(turns: list[dict[str, str]]) -> list[dict[str, str]] | None:
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return None
    return [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]


def _refuse(text: object) -> NoReturn:
    raise _Refused(str(text))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)
