"""Seeded prompts and texts of English words: the same for every server, no two alike unless asked.

Law of this file: pure; what a prompt is made of depends on its seed and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

COMMON_WORDS = 5000
"""So many of the commonest words are used; in the random model's vocabulary each of them is one token."""


def text_of(words: Sequence[str], count: int, seed: str) -> str:
    """`count` words, drawn by the seed, without punctuation: the number of tokens follows from the number of words."""
    draw = random.Random(seed)
    return " ".join(draw.choice(words) for _ in range(count))


def prompts(words: Sequence[str], count: int, length: int, seed: str) -> list[str]:
    """`count` prompts of `length` words that share no beginning."""
    return [text_of(words, length, f"{seed}/{number}") for number in range(count)]


def prompts_with_common_beginning(
    words: Sequence[str], count: int, length: int, common: int, seed: str, common_seed: str = "system"
) -> list[str]:
    """`count` prompts of `length` words, the first `common` of them the same in all."""
    beginning = text_of(words, common, common_seed)
    return [f"{beginning} {text_of(words, length - common, f'{seed}/{number}')}" for number in range(count)]


def embedding_texts(words: Sequence[str], count: int, seed: str, shortest: int = 8, longest: int = 200) -> list[str]:
    """`count` texts of `shortest` to `longest` words, every length as likely."""
    draw = random.Random(seed)
    return [text_of(words, draw.randint(shortest, longest), f"{seed}/{number}") for number in range(count)]


def words_for_tokens(tokens: int, tokens_per_word: float) -> int:
    """How many words make about so many tokens; at least one."""
    return max(1, round(tokens / tokens_per_word))
