"""Each row of the method table reaches the service's method of its own name."""

import inspect

import pytest

from tars.core.types import Deadline
from tars.messages.base import CallContext
from tars.rpc.method_table import METHODS
from tars.rpc.methods import handlers_of

PARAMS = {
    "mesh.explain": {"model": "m"},
    "mesh.join": {
        "secret": "s" * 22,
        "node": "00000000-0000-4000-8000-000000000000",
        "name": "box",
        "certificate_request": "pem",
        "addresses": [],
        "clock_ms": 0,
    },
    "mesh.gossip": {"envelope": {}},
    "mesh.token_revoke": {"id": "0a1b2c3d"},
    "mesh.key_new": {"name": "laptop"},
    "mesh.key_revoke": {"name": "laptop"},
    "mesh.remove": {"node": "box"},
    "models.deploy": {"model": "m"},
    "models.pull": {"model": "m"},
    "models.add_file": {"model": "m", "path": "/f"},
    "models.remove": {"model": "m"},
    "calls.explain": {"id": "0a" * 16},
    "mesh.claim": {"key": "0a" * 32, "body": "0b" * 32, "claim": {"owner": "node-2", "token": "t"}},
    "mesh.settle": {"key": "0a" * 32, "body": "0b" * 32, "claim": {"owner": "node-2", "token": "t"}},
    "mesh.await_answer": {"key": "0a" * 32, "body": "0b" * 32, "wait_ms": 1},
    "inference.chat": {"messages": [{"role": "user", "content": "x"}]},
    "inference.complete": {"prompt": "x"},
    "inference.embed": {"input": "x"},
    "inference.rerank": {"query": "x", "documents": ["a"]},
    "inference.tokenize": {"text": "x"},
}
CALLED = {
    "models.list": "models",
    "mesh.describe": "describe_mesh",
    "mesh.token_new": "new_token",
    "mesh.token_list": "tokens",
    "mesh.token_revoke": "revoke_token",
    "mesh.key_new": "new_key",
    "mesh.key_list": "keys",
    "mesh.key_revoke": "revoke_key",
    "mesh.remove": "remove_node",
    "calls.explain": "explain_call",
    "mesh.claim": "asked",
    "mesh.settle": "asked",
    "mesh.await_answer": "asked",
}
"""Where the service's method is not called as the second part of the row's name."""


class RecordingService:
    """Answers every method with its name and what it was given."""

    def __init__(self, waits=True):
        self._waits = waits

    @property
    def mesh(self):
        return RecordingService(waits=False)

    @property
    def keys(self):
        # On the mesh's part it lists API keys; on the node's it is the part for idempotency keys.
        return RecordingService() if self._waits else self.__getattr__("keys")

    def __getattr__(self, name):
        def method(*arguments):
            return (name, arguments)

        async def later(*arguments):
            return method(*arguments)

        immediate = {"ping", "peers", "models", "describe_mesh", "chat", "complete"}
        return later if name == "gossip" or (self._waits and name not in immediate) else method


def test_every_row_of_the_table_has_a_handler_and_no_other_exists():
    assert handlers_of(RecordingService()).keys() == METHODS.keys()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"rpc.discover"}))
async def test_a_handler_calls_its_own_method_with_what_it_needs(name):
    handler = handlers_of(RecordingService())[name]
    params = METHODS[name].params.model_validate(PARAMS.get(name, {}))
    context = CallContext(Deadline(1.0), "trace", peer="node-2", source="192.0.2.7")
    takes_context = METHODS[name].streams or "context" in inspect.signature(handler).parameters
    arguments = (params, context) if takes_context else (params,)
    answer = handler(*arguments)
    if inspect.isawaitable(answer):
        answer = await answer
    called, given = answer
    assert called == CALLED.get(name, name.partition(".")[2])
    if name in ("mesh.explain", "models.remove"):
        assert given == ("m",)
    elif name in ("mesh.join", "mesh.gossip", "mesh.claim", "mesh.settle", "mesh.await_answer"):
        assert given == (params, "192.0.2.7" if name == "mesh.join" else "node-2")
    elif name.startswith(("inference.", "calls.")):
        assert given == (params, context)


def test_discover_answers_with_the_document_of_the_whole_table():
    discover = handlers_of(RecordingService())["rpc.discover"]
    document = discover(METHODS["rpc.discover"].params())
    assert {method["name"] for method in document["methods"]} == METHODS.keys()
