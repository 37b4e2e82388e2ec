"""What `scripts/bench chaos` asks: a deck of different calls, drawn from a seed, each of which has one right answer.

Law of this file: pure; the same seed gives the same deck. Every call names its sampling and its seed, so that an undisturbed run of it says
what the answer is. Long answers are those in which the end of the text is forbidden: they run to `max_tokens` and are there to be broken.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

CHAT_MODEL, EMBEDDING_MODEL = "tars-help-desk", "all-minilm-l6-v2"
MODELS = (CHAT_MODEL, EMBEDDING_MODEL)
END_TOKENS = (0, 1, 2)
"""The demo model's special tokens: its end of text, and the borders of turns."""
LONG_SHARE, SEEDED_SHARE, STOP_SHARE, SEVERAL_SHARE, SCHEMA_SHARE = 0.6, 0.4, 0.15, 0.08, 0.06
LONG_TOKENS, SHORT_TOKENS = (150, 500), (8, 60)
TOP_K = 12
"""Fewer than the alternatives that an undisturbed run tells of each token: whatever was drawn instead is among them."""
STOPS = ("node", "TARS", "model", ". ", "the ")
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
BEGINNINGS = (
    "The coordinator decides",
    "A replica is",
    "To add a second PC",
    "When a node dies",
    "TARS turns",
    "The plan",
)


class Kind(StrEnum):
    """What is asked for, and how it comes."""

    CHAT_STREAM = "chat stream"
    CHAT = "chat"
    COMPLETION_STREAM = "completion stream"
    COMPLETION = "completion"
    EMBEDDING = "embedding"

    @property
    def streams(self) -> bool:
        """Whether the answer comes piece by piece."""
        return self in (Kind.CHAT_STREAM, Kind.COMPLETION_STREAM)


MIX: Mapping[Kind, float] = {
    Kind.CHAT_STREAM: 0.45,
    Kind.COMPLETION_STREAM: 0.15,
    Kind.CHAT: 0.10,
    Kind.COMPLETION: 0.10,
    Kind.EMBEDDING: 0.20,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the params of its JSON-RPC method, whose names the OpenAI API shares. `only_rpc`: its params are not OpenAI's."""

    number: int
    kind: Kind
    params: Mapping[str, Any]
    only_rpc: bool = False

    @property
    def method(self) -> str:
        """`inference.*`."""
        if self.kind is Kind.EMBEDDING:
            return "inference.embed"
        return "inference.chat" if self.kind in (Kind.CHAT, Kind.CHAT_STREAM) else "inference.complete"

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        return self.params.get("temperature") == 0.0


def deck(seed: int, size: int, questions: Sequence[str]) -> list[Call]:
    """`size` different calls in `MIX`'s shares (at least one of each kind); `questions` are what the chats ask."""
    draw = random.Random(f"deck {seed}")
    kinds = list(MIX)
    kinds += draw.choices(list(MIX), list(MIX.values()), k=max(0, size - len(kinds)))
    return [_call(number, kind, draw, questions) for number, kind in enumerate(kinds)]


def _call(number: int, kind: Kind, draw: random.Random, questions: Sequence[str]) -> Call:
    if kind is Kind.EMBEDDING:
        texts = [f"{draw.choice(questions)} ({draw.randrange(10_000)})" for _ in range(draw.randint(1, 6))]
        return Call(number, kind, {"model": EMBEDDING_MODEL, "input": texts})
    params: dict[str, Any] = {"model": CHAT_MODEL}
    long = draw.random() < LONG_SHARE
    params["max_tokens"] = draw.randint(*(LONG_TOKENS if long else SHORT_TOKENS))
    if long:
        params["logit_bias"] = {str(token): -100.0 for token in END_TOKENS}
    if draw.random() < SEEDED_SHARE:
        params |= {"temperature": 0.8, "top_k": TOP_K, "seed": draw.randrange(2**31)}
    else:
        params |= {"temperature": 0.0, "seed": 1}
    if draw.random() < STOP_SHARE:
        params["stop"] = [draw.choice(STOPS)]
    only_rpc = False
    if kind in (Kind.CHAT, Kind.CHAT_STREAM):
        params["messages"] = [{"role": "user", "content": draw.choice(questions)}]
        if draw.random() < SCHEMA_SHARE:
            params |= {"json_schema": SCHEMA, "stop": []}
            params.pop("logit_bias", None)
            only_rpc = True
    else:
        params["prompt"] = f"{draw.choice(BEGINNINGS)} {draw.choice(questions).split()[-1]}"
    if draw.random() < SEVERAL_SHARE:
        params["n"] = 2
    return Call(number, kind, params, only_rpc)
