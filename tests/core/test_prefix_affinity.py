"""Where a prompt's beginning was computed lately."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.prefix_affinity import (
    BLOCK_CHARACTERS,
    CHARACTERS_PER_TOKEN,
    LEAST_KEPT,
    MOST_BLOCKS,
    MOST_REPLICAS,
    PrefixAffinity,
    blocks_of,
    tokens_in,
)
from tars.core.types import ReplicaId

A, B = ReplicaId("a"), ReplicaId("b")
TOKENS_A_BLOCK = BLOCK_CHARACTERS / CHARACTERS_PER_TOKEN


def text(blocks, mark="x"):
    return "".join(f"{mark}{number:06d}".ljust(BLOCK_CHARACTERS, ".") for number in range(blocks))


def test_two_prompts_share_the_blocks_before_their_first_difference():
    system = text(4)
    first, second = blocks_of(system + text(2, "one")), blocks_of(system + text(3, "two"))
    assert (len(first), len(second)) == (6, 7)
    assert first[:4] == second[:4]
    assert not set(first[4:]) & set(second[4:])


def test_the_same_block_after_another_beginning_is_another_block():
    assert blocks_of(text(1, "a") + text(1))[1] != blocks_of(text(1, "b") + text(1))[1]


def test_a_rest_shorter_than_a_block_has_no_hash_and_very_long_prompts_are_cut():
    assert blocks_of("x" * (BLOCK_CHARACTERS - 1)) == ()
    assert len(blocks_of("x" * BLOCK_CHARACTERS * (MOST_BLOCKS + 3))) == MOST_BLOCKS
    assert len(blocks_of("\ud800" * BLOCK_CHARACTERS)) == 1


def test_only_the_replica_that_was_given_the_prompt_has_it():
    affinity = PrefixAffinity()
    affinity.computed(A, blocks_of(text(4)))
    asked = blocks_of(text(4) + text(2, "more"))
    assert affinity.shared_tokens(A, asked) == 4 * TOKENS_A_BLOCK
    assert affinity.shared_tokens(B, asked) == 0
    assert tokens_in(text(4)) == 4 * TOKENS_A_BLOCK


def test_what_the_cache_cannot_hold_is_not_expected_there_and_the_ends_go_first():
    affinity = PrefixAffinity()
    room = int(8 * TOKENS_A_BLOCK)
    affinity.computed(A, blocks_of(text(6, "old")), room)
    affinity.computed(A, blocks_of(text(4, "new")), room)
    assert affinity.shared_tokens(A, blocks_of(text(4, "new"))) == 4 * TOKENS_A_BLOCK
    assert affinity.shared_tokens(A, blocks_of(text(6, "old"))) == 4 * TOKENS_A_BLOCK


def test_a_beginning_that_is_used_again_and_again_stays():
    affinity = PrefixAffinity()
    room = int(10 * TOKENS_A_BLOCK)
    for number in range(50):
        affinity.computed(A, blocks_of(text(4) + text(4, f"turn-{number}")), room)
    assert affinity.shared_tokens(A, blocks_of(text(4))) == 4 * TOKENS_A_BLOCK


def test_a_replica_of_unknown_size_is_given_the_default_contexts_worth():
    affinity = PrefixAffinity()
    affinity.computed(A, blocks_of(text(LEAST_KEPT + 20)))
    assert affinity.shared_tokens(A, blocks_of(text(LEAST_KEPT + 20))) == pytest.approx(LEAST_KEPT * TOKENS_A_BLOCK)


def test_a_forgotten_replica_has_nothing_and_the_number_of_replicas_is_bounded():
    affinity = PrefixAffinity()
    affinity.computed(A, blocks_of(text(2)))
    affinity.forget(A)
    assert affinity.shared_tokens(A, blocks_of(text(2))) == 0
    affinity.computed(A, blocks_of(text(2)))
    for number in range(MOST_REPLICAS):
        affinity.computed(ReplicaId(str(number)), blocks_of(text(1)))
    assert affinity.shared_tokens(A, blocks_of(text(2))) == 0
    assert affinity.shared_tokens(ReplicaId("5"), blocks_of(text(1))) == TOKENS_A_BLOCK


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from("pqr")), max_size=30), st.integers(1, 12))
def test_it_never_expects_more_than_the_cache_holds_or_the_prompt_has(prompts, room_blocks):
    affinity = PrefixAffinity()
    for blocks, mark in prompts:
        affinity.computed(A, blocks_of(text(blocks, mark)), int(room_blocks * TOKENS_A_BLOCK))
        shared = affinity.shared_tokens(A, blocks_of(text(blocks, mark)))
        assert shared == min(blocks, room_blocks) * TOKENS_A_BLOCK
