from __future__ import annotations

import pytest

from tars.errors import BadModelFile, InvalidParams
from tars.messages.inference import ChatMessage
from tars.workers.chat_template import CHATML, ChatTemplate

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""Mistral-7B-Instruct-v0.2's own."""


def message(role: str, content: str) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content})


def test_chatml_ends_where_the_assistants_turn_begins() -> None:
    prompt = ChatTemplate(CHATML).render([message("system", "be brief"), message("user", "hi")])
    assert prompt == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_come_from_the_model() -> None:
    prompt = ChatTemplate(MISTRAL, "<s>", "</s>").render(
        [message("user", "a"), message("assistant", "b"), message("user", "c")]
    )
    assert prompt == "<s>[INST] a [/INST]b</s>[INST] c [/INST]"


def test_a_template_that_refuses_system_messages_gets_it_with_the_first_question() -> None:
    prompt = ChatTemplate(MISTRAL, "<s>", "</s>").render([message("system", "be brief"), message("user", "hi")])
    assert prompt == "<s>[INST] be brief\n\nhi [/INST]"


def test_a_templates_refusal_reaches_the_caller_with_its_reason() -> None:
    with pytest.raises(InvalidParams, match="roles must alternate"):
        ChatTemplate(MISTRAL).render([message("user", "a"), message("user", "b")])


def test_a_refusal_is_cut_to_a_bound() -> None:
    with pytest.raises(InvalidParams) as caught:
        ChatTemplate("{{ raise_exception('x' * 100000) }}").render([message("user", "a")])
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("source", ["{% for %}", "{{ unclosed", "{% nosuchtag %}"])
def test_a_broken_template_is_a_bad_model_file(source: str) -> None:
    with pytest.raises(BadModelFile, match="chat template"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_strangers_program_cannot_get_out_and_its_failure_shows_nothing(source: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        ChatTemplate(source).render([message("user", "a")])
    assert "__" not in caught.value.message
    assert "Error" not in caught.value.message


def test_what_hugging_face_templates_use_is_there() -> None:
    source = (
        "{% generation %}{{ messages | tojson }}{% endgeneration %}"
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y')|length }}{{ tools is none }}"
    )
    assert ChatTemplate(source).render([message("user", "é")]) == '[{"role": "user", "content": "é"}]4True'
