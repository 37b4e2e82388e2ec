"""Which replica computed the beginning of a prompt lately, so that chats that share a prefix go where it is.

Law of this file: pure bookkeeping over hashes of text; no prompt is kept. What it says is a guess about a cache that somebody else keeps:
a wrong one costs a prefill, never an answer.

A prompt's text is hashed in blocks, each hash covering everything before it too, so that two prompts share a block's hash only where they
share the whole beginning. For each replica the newest hashes are kept, as many as its KV cache can hold.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from tars.core.types import ReplicaId

BLOCK_CHARACTERS = 256
"""About 64 tokens: a shorter prefix is computed in less time than a hop takes on a card."""
CHARACTERS_PER_TOKEN = 4.0
"""English prose under common vocabularies has 3.5 to 4.5."""
MOST_BLOCKS = 1024
"""Of one prompt: 65,536 tokens, hashed in about a millisecond. What follows is not looked at."""
LEAST_KEPT = 64
"""Hashes kept for a replica whose cache size is not known: 4,096 tokens, the planner's default context."""
MOST_REPLICAS = 4096
"""Replicas for which hashes are kept; those that were asked the longest ago go first."""

Block = bytes


def blocks_of(text: str) -> tuple[Block, ...]:
    """The chained hashes of a prompt's whole blocks, the first one first. A rest shorter than a block has none."""
    whole = min(len(text) // BLOCK_CHARACTERS, MOST_BLOCKS)
    hashes: list[Block] = []
    before = b""
    for index in range(whole):
        piece = text[index * BLOCK_CHARACTERS : (index + 1) * BLOCK_CHARACTERS]
        # A lone surrogate is text too, as far as a hash is concerned.
        before = hashlib.blake2b(before + piece.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        hashes.append(before)
    return tuple(hashes)


def tokens_in(text: str) -> float:
    """About how many tokens a text has."""
    return len(text) / CHARACTERS_PER_TOKEN


class PrefixAffinity:
    """See the module's law."""

    def __init__(self) -> None:
        self._kept: OrderedDict[ReplicaId, OrderedDict[Block, None]] = OrderedDict()

    def shared_tokens(self, replica: ReplicaId, blocks: Sequence[Block]) -> float:
        """About how many tokens of the prompt's beginning this replica computed lately."""
        kept = self._kept.get(replica)
        if not kept:
            return 0.0
        shared = 0
        for block in blocks:
            if block not in kept:
                break
            shared += 1
        return shared * BLOCK_CHARACTERS / CHARACTERS_PER_TOKEN

    def computed(self, replica: ReplicaId, blocks: Sequence[Block], cache_tokens: int = 0) -> None:
        """The replica was given this prompt. `cache_tokens`: what its KV cache holds, 0 where that is not known."""
        if not blocks:
            return
        kept = self._kept.setdefault(replica, OrderedDict())
        self._kept.move_to_end(replica)
        # The last block first: what goes is then the end of the oldest prompt, as a cache gives up the ends of sequences.
        for block in reversed(blocks):
            kept[block] = None
            kept.move_to_end(block)
        most = max(1, int(cache_tokens * CHARACTERS_PER_TOKEN / BLOCK_CHARACTERS)) if cache_tokens else LEAST_KEPT
        while len(kept) > most:
            kept.popitem(last=False)
        while len(self._kept) > MOST_REPLICAS:
            self._kept.popitem(last=False)

    def forget(self, replica: ReplicaId) -> None:
        """Its cache is gone: it was unloaded, or its worker started anew."""
        self._kept.pop(replica, None)
