"""The help desk's training text: right by itself, never leaking what it is examined on, true of the product."""

import json
import random

import pytest

from tars.demo.help_desk import ConversationMaker, HelpDesk, load_help_desk, normalised


@pytest.fixture(scope="module")
def help_desk() -> HelpDesk:
    return load_help_desk()


def test_topics_have_enough_questions_and_different_answers(help_desk: HelpDesk) -> None:
    assert len(help_desk.topics) >= 60
    assert len({topic.name for topic in help_desk.topics}) == len(help_desk.topics)
    answers = [topic.answer for topic in (*help_desk.topics, help_desk.off_topic)]
    assert len(set(answers)) == len(answers)
    assert all(len(topic.questions) >= 5 for topic in help_desk.topics)
    # The tokenizer's text and the JSON lessons take characters for bytes.
    assert all(answer.isascii() and answer == answer.strip() for answer in answers)


def test_no_question_stands_in_two_topics_or_twice(help_desk: HelpDesk) -> None:
    topic_of: dict[str, str] = {}
    for topic in (*help_desk.topics, help_desk.off_topic):
        for question in {normalised(text) for text in (*topic.questions, *topic.held_out)}:
            assert question not in topic_of, f"{question!r} is in {topic_of[question]} and in {topic.name}"
            topic_of[question] = topic.name


def test_training_conversations_never_show_a_held_out_question(help_desk: HelpDesk) -> None:
    held_out = {normalised(question) for question, _ in help_desk.examination()}
    maker = ConversationMaker(help_desk, random.Random(0))
    shown = {
        normalised(message.content) for _ in range(3_000) for message in maker.conversation() if message.role == "user"
    }
    assert len(shown) > 2_000
    assert not shown & held_out


def test_the_same_seed_makes_the_same_conversations(help_desk: HelpDesk) -> None:
    first, second = (ConversationMaker(help_desk, random.Random(5)) for _ in range(2))
    assert [first.conversation() for _ in range(50)] == [second.conversation() for _ in range(50)]


def test_json_lessons_are_valid_json_and_keep_the_answer(help_desk: HelpDesk) -> None:
    maker = ConversationMaker(help_desk, random.Random(2))
    answers = {topic.answer for topic in (*help_desk.topics, help_desk.off_topic)}
    replies = [m for _ in range(2_000) for m in maker.conversation() if m.role == "assistant"]
    lessons = [reply for reply in replies if reply.content.startswith(("{", "["))]
    assert len(lessons) > 50
    for lesson in lessons:
        document = json.loads(lesson.content)
        values = list(document.values()) if isinstance(document, dict) else document
        assert len([value for value in values if isinstance(value, str) and value in answers]) == 1
        # What a grammar would force gets no loss, and what follows it does.
        assert lesson.taught_from is not None
        assert lesson.taught_from < len(lesson.content) - 2


def test_answers_quote_only_commands_and_files_that_exist(help_desk: HelpDesk) -> None:
    assert "`tars-node --join TOKEN@HOST:PORT`" in help_desk.answer("add-second-pc")
    assert "tars-node --join" in help_desk.answer("add-second-pc")
    cuda = 'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir llama-cpp-python'
    assert cuda in help_desk.answer("cuda-build")
    assert "`tars-node --model /path/to/any.gguf`" in help_desk.answer("own-gguf")
