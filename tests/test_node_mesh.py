"""Two real `tars-node` processes become one service: by one line, over mutual TLS, and each survives the other."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from pathlib import Path

import pytest
from mesh_processes import HELP_DESK, MINILM, Pc, stopping

pytestmark = [pytest.mark.model, pytest.mark.slow]

AS_A_PERSON = ("--log-format", "text")
"""A log that others keep gets no token."""


def pair(folder: Path) -> tuple[Pc, Pc]:
    """`one` coordinates while it lives; a chat model goes to the larger card, `two`'s, and an embedding model to the smaller one."""
    one = Pc(folder, "one", memory_mib=1900, priority=10)
    return one, Pc(folder, "two", memory_mib=3000)


async def help_desk_on_the_second(one: Pc, two: Pc) -> None:
    """Both are started as a mesh, and the chat model is deployed, for which the second one has most room."""
    await one.start(None, *AS_A_PERSON)
    await two.start(await one.printed_invitation())
    await one.sees(two, "ALIVE")
    await one.plans_with("one", "two")
    await one.client.deploy(HELP_DESK)
    await two.holds(HELP_DESK)


async def test_two_pcs_become_a_mesh_by_one_line_and_each_answers_for_the_others_models(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    async with stopping([one, two]):
        await one.start(None, *AS_A_PERSON)
        line = await one.printed_invitation()
        await two.start(line)
        assert f"peers reach this node at {two.mesh_address}; with one" in two.output
        await one.sees(two, "ALIVE")
        await two.sees(one, "ALIVE")
        for pc in (one, two):
            assert await pc.coordinator() == "one"
            listed = {each.name: each.state for each in (await pc.client.peers()).peers}
            assert listed == {"one": "ALIVE", "two": "ALIVE"}
            # As a person sees it, who needs no key on the PC itself.
            shown = await pc.cli("node", "list")
            assert re.search(r"one +\S+ +ALIVE", shown), shown
            assert re.search(r"two +\S+ +ALIVE", shown), shown

        await one.plans_with("one", "two")
        # Deployed at the one that does not coordinate; what it wants is done elsewhere, too.
        await two.client.deploy(MINILM)
        await two.client.deploy(HELP_DESK)
        await two.holds(HELP_DESK)
        await one.holds(MINILM)
        for pc in (one, two):
            answer = await pc.asks()
            assert answer.message.content
            assert answer.served_by.node == two.node_id()
            vectors = await pc.client.embed("a GPU that nobody uses")
            assert len(vectors.embeddings[0]) == 384
            assert vectors.served_by.node == one.node_id()
        assert [delta async for delta in one.client.chat_stream("What is TARS?", model=HELP_DESK, max_tokens=4)]

        # From here on it is about who belongs to the mesh: nothing has to be loaded for that again and again.
        for model in (MINILM, HELP_DESK):
            await two.client.remove(model)
        for pc in (one, two):
            await pc.holds()
        # A restart needs no token, and does not mind the old one on its command line.
        for join in (None, line):
            assert await two.stop() == 0
            await one.sees(two, "LEFT")
            await two.start(join)
            await one.sees(two, "ALIVE")
            await two.sees(one, "ALIVE")
        identity = one.node_id()
        assert await one.stop() == 0
        await two.sees(one, "LEFT")
        await one.start()
        assert one.node_id() == identity
        await two.sees(one, "ALIVE")
        await one.sees(two, "ALIVE")
        assert {each.name for each in (await two.client.peers()).peers} == {"one", "two"}


async def test_who_leaves_is_seen_at_once_and_who_is_killed_within_five_seconds_and_its_models_come_back(
    tmp_path: Path,
) -> None:
    one, two = pair(tmp_path)
    async with stopping([one, two]):
        await help_desk_on_the_second(one, two)
        await one.client.new_key("laptop")

        # SIGTERM: it says so itself, while its process still ends.
        two.send(signal.SIGTERM)
        assert await one.sees(two, "LEFT", seconds=5) < 3
        assert await two.stop() == 0
        await one.holds(HELP_DESK)
        assert (await one.asks()).served_by.node == one.node_id()

        # Back without a token, it gets nothing that runs elsewhere; then the coordinator loses its power.
        await two.start()
        await one.sees(two, "ALIVE")
        assert (await two.asks()).served_by.node == one.node_id()
        assert await two.ready_replicas() == []
        killed = time.monotonic()
        await one.stop(signal.SIGKILL)
        await two.sees(one, "DEAD", seconds=30)
        detected = time.monotonic() - killed
        await two.holds(HELP_DESK)
        assert (await two.asks()).served_by.node == two.node_id()
        assert await two.coordinator() == "two"
        print(f"DEAD after {detected:.2f} s")
        assert detected < 5

        # The wishes, the keys and the identity survive what was not even told to end.
        await one.start()
        await two.sees(one, "ALIVE")
        await one.sees(two, "ALIVE")
        assert await one.coordinator() == "one"
        assert [each.name for each in (await one.client.keys()).keys] == ["laptop"]
        assert (await one.asks()).served_by.node == two.node_id()


async def test_a_call_waits_for_the_only_pc_that_has_room_for_its_model_while_that_may_be_back(tmp_path: Path) -> None:
    one, two = Pc(tmp_path, "one", memory_mib=64, priority=10), Pc(tmp_path, "two", memory_mib=3000)
    async with stopping([one, two]):
        await help_desk_on_the_second(one, two)
        await two.stop(signal.SIGKILL)
        await one.sees(two, "DEAD", seconds=30)
        assert "fits nowhere" in await one.cli("explain", HELP_DESK)
        asked = asyncio.create_task(one.asks())
        await two.start()
        answer = await asked
        assert answer.served_by.node == two.node_id()
        assert answer.message.content
