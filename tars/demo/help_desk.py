"""The help desk's training text, read from help_desk.toml, and the conversations that are made from it.

Text in, text out: no tokenizer, no tensor and no engine may enter here. Every random choice comes from the `random.Random`
that the caller passes in, so the same seed gives the same conversations.
"""

import json
import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_FILE = Path(__file__).with_name("help_desk.toml")

# Small words that people leave out when they type keywords instead of a sentence.
_DROPPABLE = frozenset(
    ["a", "an", "the", "do", "does", "i", "is", "are", "to", "my", "of", "please", "it", "in", "on", "you", "me", "can", "for"]
)  # fmt: skip
_KEYBOARD_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_JSON_KEYS = (
    "answer", "text", "reply", "response", "content", "result", "summary", "message",
    "output", "value", "name", "title", "kind", "city", "count", "ok",
)  # fmt: skip
_JSON_WORDS = ("TARS", "help desk", "node", "device", "yes", "no", "none", "GPU")
_JSON_VALUES: tuple[Any, ...] = (*_JSON_WORDS, *range(10), True, False, None, ["TARS"], ["node", "device"], [], {})
_JSON_REQUESTS = (
    "Answer in JSON.",
    "Reply with a JSON object.",
    "Answer as a JSON object with the key {key}.",
    "Return JSON only.",
)


@dataclass(frozen=True)
class Topic:
    """One subject: its right answer, the questions trained on, and the paraphrase kept for the examination."""

    name: str
    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `taught_from` is the first character with a loss; None: the whole message has none."""

    role: str
    content: str
    taught_from: int | None = None


@dataclass(frozen=True)
class HelpDesk:
    """The whole training text."""

    topics: tuple[Topic, ...]
    off_topic: Topic
    off_topic_templates: tuple[str, ...]
    off_topic_words: dict[str, tuple[str, ...]]
    openings: tuple[tuple[str, ...], ...]
    synonyms: tuple[tuple[str, ...], ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    system_messages: tuple[str, ...]

    def answer(self, name: str) -> str:
        """The right answer of the topic called `name`. Raises KeyError for a topic that does not exist."""
        return {topic.name: topic.answer for topic in (*self.topics, self.off_topic)}[name]

    def examination(self) -> list[tuple[str, str]]:
        """(question, right answer) for every paraphrase that training never shows."""
        return [(question, topic.answer) for topic in (*self.topics, self.off_topic) for question in topic.held_out]

    def lessons(self) -> list[tuple[str, str]]:
        """(question, right answer) for every question that training shows, in its plain wording."""
        return [(question, topic.answer) for topic in (*self.topics, self.off_topic) for question in topic.questions]


def load_help_desk(path: Path = TEXT_FILE) -> HelpDesk:
    """Read the training text. Raises KeyError or tomllib.TOMLDecodeError where the file is not as described in its head."""
    document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    topics = tuple(
        Topic(entry["name"], entry["answer"], tuple(entry["questions"]), (entry["held_out"],))
        for entry in document["topic"]
    )
    off_topic = document["off_topic"]
    wording = document["wording"]
    return HelpDesk(
        topics=topics,
        off_topic=Topic("off-topic", off_topic["answer"], tuple(off_topic["questions"]), tuple(off_topic["held_out"])),
        off_topic_templates=tuple(off_topic["templates"]),
        off_topic_words={name: tuple(words) for name, words in off_topic["words"].items()},
        openings=tuple(tuple(group) for group in wording["openings"]),
        synonyms=tuple(tuple(group) for group in wording["synonyms"]),
        before=tuple(wording["before"]),
        after=tuple(wording["after"]),
        system_messages=tuple(entry["text"] for entry in document["system"]),
    )


def normalised(question: str) -> str:
    """A question without case, punctuation and double spaces: equal results are the same question."""
    return " ".join(re.findall(r"[a-z0-9]+", question.lower()))


class ConversationMaker:
    """Makes training conversations without end: questions reworded, mistyped, with and without system message and history."""

    def __init__(self, help_desk: HelpDesk, rng: random.Random) -> None:
        self._help_desk = help_desk
        self._rng = rng
        self._lessons: list[tuple[str, str]] = []
        self._forbidden = {normalised(question) for question, _ in help_desk.examination()}
        self._openings_of: dict[str, list[tuple[str, ...]]] = {}
        for group in help_desk.openings:
            for opening in group:
                self._openings_of.setdefault(opening, []).append(group)
        self._openings_by_length = sorted(self._openings_of, key=lambda opening: (-len(opening), opening))
        self._synonyms_of: dict[str, list[tuple[str, ...]]] = {}
        for group in help_desk.synonyms:
            for word in group:
                self._synonyms_of.setdefault(word, []).append(group)
        words = sorted(self._synonyms_of, key=lambda word: (-len(word), word))
        self._synonym_pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)

    def conversation(self, *, extras: bool = True) -> list[Message]:
        """The next conversation, ending with the assistant's message; `extras` allows history and JSON answers."""
        rng = self._rng
        messages: list[Message] = []
        form = rng.random()
        if form < 0.2:
            messages.append(Message("system", self._system_message()))
        elif form < 0.25:
            messages.append(Message("system", ""))
        turns = rng.choices((1, 2, 3), (80, 15, 5))[0] if extras else 1
        for _ in range(turns):
            question, answer = self._lesson()
            question = self._reworded(question)
            if extras and rng.random() < 0.08:
                question, answer, taught_from = self._as_json(question, answer)
            else:
                taught_from = 0
            messages.append(Message("user", question))
            messages.append(Message("assistant", answer, taught_from))
        return messages

    def plain_text(self) -> str:
        """Text without any template, so that a raw completion goes on in whole sentences."""
        return self._rng.choice(self._help_desk.topics).answer

    def _lesson(self) -> tuple[str, str]:
        """A question and its answer: off-topic one time in eight, otherwise each topic equally often."""
        rng, help_desk = self._rng, self._help_desk
        if rng.random() < 0.125:
            return self._off_topic_question(), help_desk.off_topic.answer
        if not self._lessons:
            self._lessons = [(rng.choice(topic.questions), topic.answer) for topic in help_desk.topics]
            rng.shuffle(self._lessons)
        return self._lessons.pop()

    def _off_topic_question(self) -> str:
        rng, help_desk = self._rng, self._help_desk
        if rng.random() < 0.4:
            return rng.choice(help_desk.off_topic.questions)
        words = help_desk.off_topic_words
        template = rng.choice(help_desk.off_topic_templates)
        return re.sub(r"\{(\w+)\}", lambda match: rng.choice(words[match[1]]), template)

    def _system_message(self) -> str:
        return " ".join(self._rng.sample(self._help_desk.system_messages, self._rng.choice((1, 1, 1, 2))))

    def _as_json(self, question: str, answer: str) -> tuple[str, str, int]:
        """The same lesson with a JSON answer: the answer's text under one key, among others that hold short values.

        The short values mean nothing; they teach that a value ends and another follows, so that constrained output ends. Half of
        the lessons do not ask for JSON: there no loss falls on the opening, which only a grammar would force.
        """
        rng = self._rng
        keys = rng.sample(_JSON_KEYS, rng.choice((1, 1, 1, 2, 2, 3)))
        key = rng.choice(keys)
        document: Any = {each: answer if each == key else rng.choice(_JSON_VALUES) for each in keys}
        if rng.random() < 0.1:
            document = [answer, *rng.sample(_JSON_WORDS, rng.randrange(3))]
        text = json.dumps(document)
        if rng.random() < 0.5:
            return f"{question} {rng.choice(_JSON_REQUESTS).format(key=key)}", text, 0
        first = text.index('": ') + 3 if isinstance(document, dict) else 1
        return question, text, first + 1 if text[first] == '"' else first

    def _reworded(self, question: str) -> str:
        """Another wording of the question; never one that is kept for the examination."""
        for _ in range(10):
            text = self._another_wording(question)
            if normalised(text) not in self._forbidden:
                return text
        return question

    def _another_wording(self, question: str) -> str:
        rng, text = self._rng, question
        if rng.random() < 0.5:
            text = self._other_opening(text)
        if rng.random() < 0.5:
            text = self._synonym_pattern.sub(self._maybe_synonym, text)
        if rng.random() < 0.15:
            text = self._keywords(text)
        bare = text.rstrip(" ?!.")
        if rng.random() < 0.2 and len(bare) > 8:
            text = rng.choice(self._help_desk.before) + text
        if rng.random() < 0.2 and len(bare) > 8:
            text = text.rstrip(" ?!.") + rng.choice(self._help_desk.after) + "?"
        if rng.random() < 0.2:
            for _ in range(rng.choice((1, 1, 2))):
                text = self._mistyped(text)
        return self._other_punctuation(self._other_case(text)).strip() or question

    def _other_opening(self, text: str) -> str:
        lowered = text.lower()
        for opening in self._openings_by_length:
            if lowered.startswith(opening):
                group = self._rng.choice(self._openings_of[opening])
                replacement = self._rng.choice(group) + text[len(opening) :]
                return replacement[0].upper() + replacement[1:]
        return text

    def _maybe_synonym(self, match: re.Match[str]) -> str:
        if self._rng.random() < 0.5:
            return match[0]
        return self._rng.choice(self._rng.choice(self._synonyms_of[match[0].lower()]))

    def _keywords(self, text: str) -> str:
        words = text.split()
        kept = [word for word in words if word.lower() not in _DROPPABLE or self._rng.random() < 0.3]
        return " ".join(kept) if len(kept) >= 2 else text

    def _mistyped(self, text: str) -> str:
        """One slip of the fingers inside a word: swapped, missing, doubled or neighbouring letter."""
        rng = self._rng
        places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
        if len(places) < 6:
            return text
        i = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0:
            return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
        if kind == 1:
            return text[:i] + text[i + 1 :]
        if kind == 2:
            return text[:i] + text[i] + text[i:]
        for row in _KEYBOARD_ROWS:
            column = row.find(text[i].lower())
            if column >= 0:
                return text[:i] + row[max(0, min(len(row) - 1, column + rng.choice((-1, 1))))] + text[i + 1 :]
        return text

    def _other_case(self, text: str) -> str:
        choice = self._rng.random()
        if choice < 0.35:
            return text.lower()
        return text.upper() if choice < 0.38 else text

    def _other_punctuation(self, text: str) -> str:
        choice = self._rng.random()
        if choice < 0.3:
            return text.rstrip(" ?!.")
        if choice < 0.36:
            return text.rstrip(" ?!.") + self._rng.choice(("??", "!", ".", " ?", "..."))
        return text
