"""The next token of one sequence of a model: what a call asks for, joined from `token_draw` and `token_grammar`; and log probabilities.

Law of this file: one `Sampler` per sequence, used in the engine thread; `compile_grammar` may be called from any. Order of the stages as in
llama.cpp's own tools: bias, penalties, top-k, top-p, min-p, temperature, draw. A grammar is asked about the drawn token first and only
then, if it objects, about others, because that costs more.

Nothing here calls llama.cpp: its grammar engine keeps every reading of an ambiguous text as a stack of its own (2**n after n characters,
uninterruptible), lets bytes through that are no UTF-8, and ends the process when a forbidden token reaches it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from tars.errors import BadGrammar, InvalidParams, ReplicaFailed
from tars.messages.inference import GenerationParams, TokenLogprob
from tars.workers.json_schema_grammar import schema_grammar
from tars.workers.llama_model import Logits, Model
from tars.workers.token_draw import TokenDraw, best, greedy_rows
from tars.workers.token_grammar import ALLOWANCE_GROWTH, ALLOWANCE_MOST, Place, TokenGrammar, TokenTexts

__all__ = ["CompiledGrammar", "Sampler", "check_finite", "compile_grammar", "greedy_rows", "token_logprob"]

LOGPROB_LEAST = -9999.0
"""What stands for minus infinity, as in OpenAI's API: JSON has no infinities."""

TRIED_FIRST = 256
"""Best tokens that a grammar is asked about one by one (a microsecond each) before it is asked about the whole vocabulary."""

GRAMMARS_KEPT = 16
"""Of each model: services ask with the same few schemas again and again, and a known grammar's states are known too."""

CompiledGrammar = TokenGrammar


class _Grammars:
    """One model's vocabulary for grammars, and the grammars that were compiled for it last."""

    def __init__(self, model: Model) -> None:
        self._tokens = TokenTexts(model.pieces, model.end_tokens)
        self._kept: OrderedDict[str, TokenGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, text: str) -> TokenGrammar:
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
        # Outside the lock: a large grammar must not hold up the small ones.
        grammar = TokenGrammar(text, self._tokens)
        with self._lock:
            grammar = self._kept.setdefault(text, grammar)
            if len(self._kept) > GRAMMARS_KEPT:
                self._kept.popitem(last=False)
        return grammar


_grammars: WeakKeyDictionary[Model, _Grammars] = WeakKeyDictionary()
_grammars_lock = threading.Lock()


def compile_grammar(model: Model, params: GenerationParams) -> CompiledGrammar | None:
    """The grammar that a call asks for, None where it asks for none. From any thread; no native code. Raises `BadGrammar`.

    What it returns is used in one thread, the engine's, by any number of samplers.
    """
    if params.json_schema is not None:
        text = schema_grammar(params.json_schema)
    elif params.grammar is not None:
        text = params.grammar
    else:
        return None
    with _grammars_lock:
        grammars = _grammars.get(model)
        if grammars is None:
            grammars = _grammars[model] = _Grammars(model)
    return grammars.compiled(text)


class Sampler:
    """One sequence's choice of tokens."""

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
        self._position = len(generated)
        self._draw = TokenDraw(params, _biases(params.logit_bias, model.tokens), [*prompt, *generated], seed)
        self.plain_greedy = self._draw.plain and grammar is None
        """The token is the best of the raw logits: whoever has many rows may take `greedy_rows` instead of `sample`."""
        self._needed = 1 if self._draw.greedy else params.top_k
        """Permitted tokens that the draw looks at; 0: at all."""
        self._grammar = grammar
        if grammar is not None:
            self._place = grammar.start
            self._allowance = ALLOWANCE_MOST
            for token in generated:
                grammar.allow(self._allowance)
                place = grammar.after(self._place, token)
                if place is None:
                    raise BadGrammar(
                        "The text that is to be continued does not follow the grammar. Begin a new answer."
                    )
                self._went_on(grammar, place)

    def sample(self, logits: Logits) -> int:
        """The next token, already taken into account for the one after it.

        Raises `BadGrammar` at a grammar's dead end or beyond its bound of work, `ReplicaFailed` where the logits are not numbers.
        """
        check_finite(logits)
        row = self._draw.adjusted(logits)
        token = self._draw.draw(row, self._position)
        if self._grammar is not None:
            self._grammar.allow(self._allowance)
            place = self._grammar.after(self._place, token)
            if place is None:
                token, place = self._draw_permitted(self._grammar, row)
            self._went_on(self._grammar, place)
        self._draw.accept(token)
        self._position += 1
        return token

    def close(self) -> None:
        """Forget the grammar; nothing native is held."""
        self._grammar = None

    def _went_on(self, grammar: CompiledGrammar, place: Place) -> None:
        self._place = place
        self._allowance = min(ALLOWANCE_MOST, self._allowance - grammar.spent() + ALLOWANCE_GROWTH)

    def _draw_permitted(self, grammar: CompiledGrammar, row: Logits) -> tuple[int, Place]:
        permitted: list[int] = []
        if self._needed:
            # The draw sees only the best permitted tokens; mostly they are among the best of all.
            for token in best(row, max(TRIED_FIRST, 2 * self._needed)).tolist():
                if grammar.after(self._place, token) is not None:
                    permitted.append(token)
                    if len(permitted) == self._needed:
                        break
        if permitted and len(permitted) == self._needed:
            filtered = np.full(len(row), -np.inf, dtype=np.float32)
            filtered[permitted] = row[permitted]
        else:
            filtered = np.where(grammar.mask(self._place), row, np.float32(-np.inf))
        if math.isfinite(float(filtered.max())):
            token = self._draw.draw(filtered, self._position, attempt=1)
            place = grammar.after(self._place, token)
            if place is not None:
                return token, place
        raise BadGrammar(
            "The grammar came to a point where no token of this model may follow. Allow the characters that it asks for, "
            "or an earlier end."
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


def token_logprob(model: Model, logits: Logits, token: int, alternatives: int) -> TokenLogprob:
    """log softmax of the raw logits (before bias, penalties, temperature and grammar): of `token` and of the best `alternatives`."""
    most = float(logits.max())
    # Summed in float64: 128,000 small float32 terms lose digits that callers compare.
    normaliser = most + math.log(float(np.exp(logits - np.float32(most)).sum(dtype=np.float64)))

    def text_and_logprob(index: int) -> tuple[str, float]:
        text = model.pieces[index].decode("utf-8", "replace") or model.special_text(index)
        return text, max(LOGPROB_LEAST, float(logits[index]) - normaliser)

    others = best(logits, alternatives).tolist() if alternatives else []
    text, logprob = text_and_logprob(token)
    return TokenLogprob(token=text, token_id=token, logprob=logprob, top=[text_and_logprob(index) for index in others])


def check_finite(logits: Logits) -> None:
    """Raise `ReplicaFailed` where the model computed NaN: sampling from it would be noise."""
    if not math.isfinite(float(logits.max())):
        raise ReplicaFailed(
            "The model computed something that is not a number: the file is damaged, or this device cannot compute it in this precision. "
            "Copy or download it again, or deploy the model on another device."
        )
