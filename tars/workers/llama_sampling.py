"""The next token: llama.cpp's samplers over one sequence's logits, and log probabilities before any of them.

Law of this file: one `Sampler` per sequence, made and used in the engine thread. Order of the chain as in llama.cpp's own tools: bias,
penalties, top-k, top-p, min-p, temperature, draw. A grammar is asked about the drawn token first and only then, if it objects, about the
whole vocabulary, because that costs milliseconds.

llama.cpp's grammars do not check that bytes make UTF-8 (a stray first byte swallows the quote after it), so under a grammar tokens are also
held to that: otherwise "the text is JSON" would be true only of well-behaved models.

A token that a grammar forbids must never be "accepted": llama.cpp then throws through C and the process dies. So permitted tokens are
filtered in here, and a grammar that permits none ends the call with `BadGrammar`.
"""

from __future__ import annotations

import codecs
import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as api

from tars.errors import BadGrammar, InvalidParams, ReplicaFailed
from tars.messages.inference import GenerationParams, TokenLogprob
from tars.workers.json_schema_grammar import schema_grammar
from tars.workers.llama_model import Logits, Model
from tars.workers.token_draw import TokenDraw

CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
"""llama_token_data of llama.h."""

NESTING_MOST = 200
"""Brackets within brackets in a grammar: llama.cpp parses them by recursion."""

LOGPROB_LEAST = -9999.0
"""What stands for minus infinity, as in OpenAI's API: JSON has no infinities."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar that was checked; any number of samplers may use it."""

    text: str


def compile_grammar(model: Model, params: GenerationParams) -> CompiledGrammar | None:
    """The grammar that a call asks for, None where it asks for none; from any thread. Raises `BadGrammar`."""
    text = grammar_text(params)
    if text is None:
        return None
    api.llama_sampler_free(_grammar_sampler(model, text))
    return CompiledGrammar(text)


def _grammar_sampler(model: Model, text: str) -> Any:
    sampler = api.llama_sampler_init_grammar(model.vocabulary_pointer, text.encode("utf-8", "replace"), b"root")
    if not sampler:
        raise BadGrammar(
            "The grammar could not be compiled: check its syntax, that it has a rule `root`, that every rule it names exists, "
            "and that no rule begins with itself."
        )
    return sampler


class Sampler:
    """One sequence's choice of tokens. `close` frees it."""

    def __init__(
        self,
        model: Model,
        params: GenerationParams,
        prompt: Sequence[int],
        generated: Sequence[int],
        seed: int,
        grammar: CompiledGrammar | None,
    ) -> None:
        """`generated`: tokens that this sequence made before (it was preempted, continued or moved); the state is the one after them.

        Raises `BadGrammar` where they contradict the grammar, or `InvalidParams` for a bias on something that is not a token.
        """
        self._model = model
        self._grammar: Any = None
        self._position = len(generated)
        self._draw = TokenDraw(params, _biases(params.logit_bias, model.tokens), [*prompt, *generated], seed)
        self.plain_greedy = self._draw.plain and grammar is None
        """The token is the best of the raw logits: whoever has many rows may take `greedy_rows` instead of `sample`."""
        self._unfinished = b""
        """Under a grammar: bytes of a character that the tokens so far began."""
        if grammar is not None:
            self._candidates = np.zeros(model.tokens, dtype=CANDIDATE)
            self._ids = np.arange(model.tokens, dtype=np.int32)
            self._grammar = _grammar_sampler(model, grammar.text)
            for token in generated:
                if not self._permits(token):
                    self.close()
                    raise BadGrammar(
                        "The text that is to be continued does not follow the grammar. Begin a new answer."
                    )
                self._accept(token)

    def sample(self, logits: Logits) -> int:
        """The next token, already taken into account for the one after it. Raises `BadGrammar` at a grammar's dead end."""
        row = self._draw.adjusted(logits)
        token = self._draw.draw(row, self._position)
        if self._grammar is not None:
            if not self._permits(token):
                token = self._draw.draw(self._permitted(row), self._position, 1)
            self._accept(token)
        self._draw.accept(token)
        self._position += 1
        return token

    def close(self) -> None:
        """Free the native grammar."""
        if self._grammar is not None:
            api.llama_sampler_free(self._grammar)
        self._grammar = None

    def _accept(self, token: int) -> None:
        if token not in self._model.end_tokens:
            api.llama_sampler_accept(self._grammar, token)
            self._unfinished = unfinished(self._unfinished + self._model.pieces[token]) or b""

    def _fill(self, logits: Logits) -> np.ndarray[Any, Any]:
        self._candidates["id"] = self._ids
        self._candidates["logit"] = logits
        return self._candidates

    def _permits(self, token: int) -> bool:
        if not self._is_text(token):
            return False
        one = np.array([(token, 1.0, 0.0)], dtype=CANDIDATE)
        api.llama_sampler_apply(self._grammar, ctypes.byref(_native(one)))
        return bool(np.isfinite(one["logit"][0]))

    def _is_text(self, token: int) -> bool:
        """Whether the bytes so far and this token's may begin a text; the end may only stand between characters."""
        if token in self._model.end_tokens:
            return not self._unfinished
        return unfinished(self._unfinished + self._model.pieces[token]) is not None

    def _permitted(self, logits: Logits) -> Logits:
        """The row with everything that the grammar forbids at minus infinity."""
        candidates = self._fill(logits)
        if self._unfinished:
            # Only tokens that begin with a continuation byte can be right; there are a few hundred.
            candidates = candidates[[token for token in self._model.continuing_tokens if self._is_text(token)]]
        api.llama_sampler_apply(self._grammar, ctypes.byref(_native(candidates)))
        finite = candidates[np.isfinite(candidates["logit"])]
        permitted = finite[[self._is_text(int(token)) for token in finite["id"]]]
        if not len(permitted):
            raise BadGrammar(
                "The grammar came to a point where no token of this model may follow. Allow the characters that it asks for, "
                "or an earlier end."
            )
        row = np.full(self._model.tokens, -np.inf, dtype=np.float32)
        row[permitted["id"]] = permitted["logit"]
        return row


def _native(candidates: np.ndarray[Any, Any]) -> Any:
    """A llama_token_data_array over the numpy array, which must outlive it."""
    return api.llama_token_data_array(
        data=candidates.ctypes.data_as(api.llama_token_data_p), size=len(candidates), selected=-1, sorted=False
    )


def _biases(given: dict[str, float], tokens: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < tokens) or abs(value) > 100:
            raise InvalidParams(
                f"logit_bias maps token ids (0 to {tokens - 1}, see inference.tokenize) to numbers from -100 to 100."
            )
        biases[int(key)] = value
    return biases


def unfinished(data: bytes) -> bytes | None:
    """The bytes of a character that `data` ends inside of (none: b""), or None where `data` cannot begin UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    rest = decoder.getstate()[0]
    # Python waits for the third byte of what can only become a surrogate, and refuses it then.
    return None if len(rest) > 1 and rest[0] == 0xED and rest[1] >= 0xA0 else rest


def grammar_text(params: GenerationParams) -> str | None:
    """The GBNF grammar that a call asks for, from its schema where it has one; None without. Raises `BadGrammar`."""
    if params.json_schema is not None:
        text = schema_grammar(params.json_schema)
    elif params.grammar is not None:
        text = params.grammar
    else:
        return None
    if not text.strip() or "\0" in text:
        raise BadGrammar("The grammar is empty, or holds a NUL character.")
    if nesting(text) > NESTING_MOST:
        raise BadGrammar(
            f"The grammar nests brackets more than {NESTING_MOST} deep. Give the inner parts rules of their own."
        )
    return text


def nesting(grammar: str) -> int:
    """How deep round brackets stand in each other, literals ("..."), character classes ([...]) and comments left out."""
    depth = deepest = 0
    closing = ""
    escaped = False
    for character in grammar:
        if closing:
            if escaped:
                escaped = False
            elif character == "\\" and closing != "\n":
                escaped = True
            elif character == closing:
                closing = ""
        elif character in '"[#':
            closing = {'"': '"', "[": "]", "#": "\n"}[character]
        elif character == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif character == ")":
            depth -= 1
    return deepest


def token_logprob(model: Model, logits: Logits, token: int, alternatives: int) -> TokenLogprob:
    """log softmax of the raw logits (before bias, penalties, temperature and grammar): of `token` and of the best `alternatives`."""
    most = float(logits.max())
    # In float64: summing 128,000 small float32 terms loses digits that callers compare.
    normaliser = most + math.log(float(np.exp(logits.astype(np.float64) - most).sum()))

    def text_and_logprob(index: int) -> tuple[str, float]:
        text = model.pieces[index].decode("utf-8", "replace") or model.special_text(index)
        return text, max(LOGPROB_LEAST, float(logits[index]) - normaliser)

    best: list[int] = []
    if alternatives:
        count = min(alternatives, len(logits))
        unsorted = np.argpartition(logits, len(logits) - count)[-count:]
        best = [int(index) for index in unsorted[np.argsort(-logits[unsorted], kind="stable")]]
    text, logprob = text_and_logprob(token)
    return TokenLogprob(token=text, token_id=token, logprob=logprob, top=[text_and_logprob(index) for index in best])


def check_finite(logits: Logits) -> None:
    """Raise `ReplicaFailed` where the model computed NaN: sampling from it would be noise."""
    if not math.isfinite(float(logits.max())):
        raise ReplicaFailed(
            "The model computed something that is not a number: the file is damaged, or this device cannot compute it in this precision."
        )
