"""A running answer moves from one real engine to another, with its state over HTTP: the caller reads what an unbroken call gives."""

import asyncio
import os
import time
from contextlib import suppress

import pytest
from aiohttp import web

from tars.core.types import Deadline, NodeId, ReplicaId
from tars.errors import Draining
from tars.messages.base import CallContext, SavedState
from tars.messages.inference import CompleteParams, Delta, Generated
from tars.rpc.http_client import RpcConnection
from tars.rpc.peer_states import HttpPeerStates
from tars.rpc.state_routes import add_state_routes
from tars.serving.kept_states import KeptStates
from tars.serving.running_answers import RunningAnswers
from tars.workers.engine import LoadSpec, Resume
from tars.workers.options import WorkerOptions
from tars.workers.supervisor import ReplicaWorker

pytestmark = pytest.mark.model

REPLICA = ReplicaId("tiny@a#0")
TOKENS = 300


def context():
    return CallContext(Deadline(time.monotonic() + 120), "trace", peer="gateway")


class Side:
    """A node's part in it: a worker, and what it keeps for others."""

    def __init__(self, name, folder, path, connection=None, tuned=None):
        self.folder = folder / name
        spec = LoadSpec(
            replica=f"tiny@{name}#0", model="tiny", engine="llama", path=str(path), context=512, tuned=tuned
        )
        self.worker = ReplicaWorker(spec, WorkerOptions(saved_folder=self.folder), lambda worker: None)
        self.kept = KeptStates(NodeId(name))
        self.fetched = []
        peers = None
        if connection is not None:
            peers = HttpPeerStates(connection, self.folder)
            fetch = peers.fetch

            async def noted(saved, seconds):
                self.fetched.append(await fetch(saved, 30.0))
                return self.fetched[-1]

            peers.fetch = noted
        self.answers = RunningAnswers(self.kept, peers)

    def run(self, work, resume=None, state=None):
        def start(resume, handle):
            return self.worker.run(work, context().deadline, resume=resume, handle=handle)

        return self.answers.run(REPLICA, self.worker, work, context(), resume, state, start=start)


@pytest.fixture
async def pair(tmp_path, tiny_gguf, aiohttp_server):
    """The one that is left, and the one that goes on."""
    old = Side("old", tmp_path, tiny_gguf)
    application = web.Application()
    add_state_routes(application, old.kept)
    server = await aiohttp_server(application)
    connection = RpcConnection(str(server.make_url("/")).rstrip("/"))
    await old.worker.start()
    await old.worker.wait_ready(60)
    # A model this small decodes in microseconds: measured twice on a busy machine, flash attention may be on in one and off in the other,
    # and a state moves between like layouts only.
    new = Side("new", tmp_path, tiny_gguf, lambda node: connection, tuned=old.worker.info.tuned)
    await new.worker.start()
    await new.worker.wait_ready(60)
    yield old, new
    for side in (old, new):
        await side.answers.close()
        await side.worker.stop(0)
        with suppress(FileNotFoundError):
            assert os.listdir(side.folder) == []
    await connection.close()


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.0},
        {"temperature": 1.5, "seed": 11},
        # Held back wherever the text may become one of these.
        {"temperature": 1.5, "seed": 12, "stop": [" no such text", "aaaaaaaaaa", "e never"]},
    ],
    ids=["greedy", "seeded", "stop strings"],
)
async def test_a_moved_answer_is_an_unbroken_one(pair, more):
    old, new = pair
    work = CompleteParams(prompt="hello world", max_tokens=TOKENS, logit_bias={"2": -100.0, "4": -100.0}, **more)
    whole = [event async for event in new.run(work)][-1]
    assert isinstance(whole, Generated)
    text, tokens = "", []

    async def read_until_it_leaves():
        nonlocal text
        async for event in old.run(work):
            assert isinstance(event, Delta), "it ended before it could be moved: give it more tokens"
            text += event.text
            tokens.extend(event.token_ids)
            if len(tokens) >= 20:
                old.answers.hand_over_soon(lambda answer: answer.leaving is None)

    with pytest.raises(Draining) as left:
        await read_until_it_leaves()
    details = left.value.details
    (generated,) = details["tokens"]
    assert generated[: len(tokens)] == tokens
    resume = Resume(generated=[generated], handed_out=[len(tokens)], seed=work.seed or 0)
    end = None
    async for event in new.run(work, resume, SavedState.model_validate(details["saved"])):
        if isinstance(event, Delta):
            text += event.text
            tokens += event.token_ids
        else:
            end = event
    assert len(new.fetched) == 1
    assert text == end.text == whole.text
    assert end.usage.completion_tokens == len(tokens) == whole.usage.completion_tokens
    await asyncio.wait_for(old.kept.collected(), 5)
