from __future__ import annotations

import pytest

from tars.errors import BadModelFile, InvalidParams
from tars.messages.inference import ChatMessage, ChatParams, Tool, ToolCall
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


# --- tools and thoughts ---------------------------------------------------------------------------------------------

WEATHER = Tool(
    name="get_weather", description="Weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}}
)
NOW = Tool(name="now")

HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    'Write <tool_call>{"name": <name>, "arguments": <arguments>}</tool_call>\n{% endif %}'
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments ARGUMENTS }}}</tool_call>'
    "{% endfor %}{% endif %}{% endfor %}"
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)

NINE = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for message in messages %}"
    "{% if message.tool_calls is defined %}{% for call in message.tool_calls %}"
    "{% if call.id|length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "[TOOL_CALLS]{{ call.function.name }}[CALL_ID]{{ call.id }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.tool_call_id }}{{ message.content }}[/TOOL_RESULTS]"
    "{% else %}[INST]{{ message.content }}[/INST]{% endif %}{% endfor %}"
)

PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"

CALLED = [
    ChatMessage(role="user", content="Weather?"),
    ChatMessage(
        role="assistant",
        content="",
        reasoning="I ask.",
        tool_calls=[ToolCall(id="call_0_123456", name="get_weather", arguments='{"city": "Köln"}')],
    ),
    ChatMessage(role="tool", content="sunny", tool_call_id="call_0_123456"),
]


def hermes(arguments: str = "| tojson") -> ChatTemplate:
    return ChatTemplate(HERMES.replace("ARGUMENTS", arguments))


def test_tools_calls_and_results_are_handed_to_a_template_that_knows_them() -> None:
    template = hermes()
    assert not template.own_tools
    prompt = template.render(CALLED, tools=[WEATHER])
    assert (
        '<tools>{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters":'
        in prompt
    )
    assert (
        '<think>I ask.</think><tool_call>{"name": "get_weather", "arguments": {"city": "Köln"}}</tool_call><|tool|>sunny'
        in prompt
    )


def test_a_template_that_wants_arguments_as_text_gets_them_so() -> None:
    template = hermes("")
    assert not template.own_tools
    assert '"arguments": {"city": "Köln"}}' in template.render(CALLED, tools=[WEATHER])


@pytest.mark.parametrize(
    ("choice", "told"), [("auto", True), ("required", True), ("get_weather", True), ("none", False), ("now", False)]
)
def test_only_tools_that_may_be_called_are_told(choice: str, told: bool) -> None:
    for template in (hermes(), ChatTemplate(PLAIN)):
        prompt = template.render(CALLED[:1], tools=[WEATHER, NOW], tool_choice=choice)
        assert ("get_weather" in prompt) == told
        assert ('"now"' in prompt) == (choice in ("auto", "required", "now"))


def test_mistrals_ids_have_nine_characters_the_same_for_call_and_result() -> None:
    prompt = ChatTemplate(NINE).render(CALLED, tools=[WEATHER])
    given = prompt.partition("[CALL_ID]")[2][:9]
    assert given.isalnum()
    assert f"[TOOL_RESULTS]{given}sunny" in prompt


def test_a_template_without_a_place_for_tools_tells_them_in_a_system_text() -> None:
    template = ChatTemplate(PLAIN)
    assert template.own_tools
    prompt = template.render([ChatMessage(role="system", content="Be brief."), *CALLED], tools=[WEATHER])
    assert prompt.startswith("<system>Be brief.\n\nYou may call functions")
    assert '"name": "get_weather", "description": "Weather"' in prompt
    assert '<assistant><tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>' in prompt
    assert prompt.endswith("<user><tool_response>\nsunny\n</tool_response><assistant>")
    assert "You may call" not in template.render(CALLED)


def test_results_of_several_calls_are_one_turn_for_templates_that_want_turns_to_alternate() -> None:
    calls = [ToolCall(id=f"c{number}", name="now", arguments="") for number in range(2)]
    results = [ChatMessage(role="tool", content=str(number), tool_call_id=f"c{number}") for number in range(2)]
    prompt = ChatTemplate(MISTRAL, "<s>", "</s>").render(
        [ChatMessage(role="user", content="q"), ChatMessage(role="assistant", content="", tool_calls=calls), *results],
        tools=[NOW],
    )
    assert prompt.startswith("<s>[INST] You may call functions")
    assert prompt.endswith("[INST] <tool_response>\n0\n</tool_response>\n<tool_response>\n1\n</tool_response> [/INST]")


@pytest.mark.parametrize("arguments", ["no json", "[1]", "1", "[" * 100_000])
def test_arguments_that_are_no_object_are_a_clear_error(arguments: str) -> None:
    turns = [
        CALLED[0],
        ChatMessage(role="assistant", content="", tool_calls=[ToolCall(id="c", name="now", arguments=arguments)]),
    ]
    for template in (hermes(), ChatTemplate(PLAIN)):
        with pytest.raises(InvalidParams, match="not the JSON text of an object"):
            template.render(turns)


@pytest.mark.parametrize(
    ("reasoning", "end"), [(None, "<|assistant|>"), (True, "<|assistant|>"), (False, "<think></think>")]
)
def test_thinking_is_switched_by_the_template(reasoning: bool | None, end: str) -> None:
    prompt = hermes().prompt(ChatParams(messages=CALLED[:1], reasoning=reasoning))
    assert prompt.endswith(end)


def test_a_prompt_that_opens_thoughts_closes_them_where_none_are_wanted() -> None:
    template = ChatTemplate(PLAIN + "{% if messages[0].content == '</think>' %}{% endif %}{{ '<think>\\n' }}")
    assert template.prompt(ChatParams(messages=CALLED[:1])).endswith("<assistant><think>\n")
    assert template.prompt(ChatParams(messages=CALLED[:1], reasoning=False)).endswith("<think>\n\n</think>\n\n")


def test_a_template_that_goes_through_tools_without_asking_gets_an_empty_list() -> None:
    source = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ messages[0].content }}"
    assert ChatTemplate(source).render([message("user", "q")]) == "q"


def test_the_filter_takes_json_dumps_own_options() -> None:
    source = "{{ messages[0].content | tojson(ensure_ascii=True) }}{{ messages[0].content | tojson(indent=2, ensure_ascii=False) }}"
    assert ChatTemplate(source).render([message("user", "é")]) == '"\\u00e9""é"'
