"""What a call asks of a replica and what its answer showed, in the units that `core.routing` reckons with.

Law of this file: messages in, numbers out; it keeps nothing.
"""

from __future__ import annotations

from tars.core.prefix_affinity import tokens_in
from tars.core.replica_ledger import Observation
from tars.core.routing import USUAL, Demand
from tars.messages.inference import (
    ChatParams,
    CompleteParams,
    Embedded,
    EmbedParams,
    Generated,
    GenerationParams,
    Reranked,
    RerankParams,
    TokenizeParams,
)
from tars.workers.engine import Finished, Work


def demand_of(work: Work) -> Demand:
    """Texts of an embedding or a reranking; tokens of a generation, which nobody knows before it ended: as many as usually, at most its
    `max_tokens`."""
    match work:
        case EmbedParams():
            return Demand(units=1.0 if isinstance(work.input, str) else float(len(work.input)))
        case RerankParams():
            return Demand(units=float(len(work.documents)))
        case TokenizeParams():
            # No forward pass: only the queue counts.
            return Demand(units=0.0)
        case GenerationParams():
            prompt_tokens = tokens_in(prompt_text(work))
            if work.max_tokens is None:
                return Demand(prompt_tokens=prompt_tokens)
            return Demand(most_units=float(work.max_tokens * work.n), prompt_tokens=prompt_tokens)
        case _:
            return USUAL


def prompt_text(work: Work) -> str:
    """The text whose beginning two calls may share, in the order in which chat templates write it: tools, then turns.

    Not the template's own text, which only the worker knows; equal beginnings here are equal beginnings there. An adapter's cache is its
    own, so the model's full name comes first. Empty for work that computes no prompt.
    """
    match work:
        case CompleteParams():
            return f"{work.model}\0{work.prompt}"
        case ChatParams():
            tools = [f"\0tool\0{tool.name}\0{tool.description}\0{tool.parameters!r}" for tool in work.tools]
            turns = [
                f"\0{turn.role}\0{turn.content}"
                + "".join(f"\0{made.name}\0{made.arguments}" for made in turn.tool_calls)
                for turn in work.messages
            ]
            return "".join([str(work.model), *tools, *turns])
        case _:
            return ""


def observed(event: Finished, seconds: float) -> Observation | None:
    """What an answer showed of its replica; None where nothing. `seconds`: what the call took, as seen from here.

    Of a generation the replica's own clock is taken where it tells: from here, a caller who reads slowly would look like a slow card.
    """
    match event:
        case Generated(usage=usage, timings=timings):
            tokens = float(usage.completion_tokens)
            if tokens <= 0:
                return None
            prefill_tokens = float(max(0, usage.prompt_tokens - usage.cached_tokens))
            prefill_seconds = 0.0
            if timings.first_token_ms is not None:
                prefill_seconds = max(0.0, timings.first_token_ms - timings.queue_ms) / 1000
            if timings.tokens_per_second and tokens > 1:
                decoded = tokens - 1  # the first token comes out of the prefill
                return Observation(
                    decoded, decoded / timings.tokens_per_second, tokens, False, prefill_tokens, prefill_seconds
                )
            return Observation(tokens, seconds, tokens, True, prefill_tokens, prefill_seconds)
        case Embedded(vectors=vectors):
            return Observation(float(len(vectors)), seconds)
        case Reranked(scores=scores):
            return Observation(float(len(scores)), seconds)
        case _:
            return None
