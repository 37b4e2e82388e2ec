"""The 15 exchanges of the example section of https://www.jsonrpc.org/specification, through the real dispatcher and HTTP server."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from tars.messages.base import Message, NoParams
from tars.rpc.access import Access
from tars.rpc.dispatcher import Dispatcher
from tars.rpc.http_server import add_dispatcher
from tars.rpc.listener import listen
from tars.rpc.method_table import MethodSpec
from tars.rpc.options import RpcOptions


class Subtract(Message):
    minuend: int
    subtrahend: int


class Numbers(Message):
    numbers: list[int]


METHODS = {
    spec.name: spec
    for spec in (
        MethodSpec("subtract", "", Subtract, positional=("minuend", "subtrahend")),
        MethodSpec("sum", "", Numbers, positional=("*numbers",)),
        MethodSpec("update", "", Numbers, positional=("*numbers",)),
        MethodSpec("notify_sum", "", Numbers, positional=("*numbers",)),
        MethodSpec("notify_hello", "", Numbers, positional=("*numbers",)),
        MethodSpec("get_data", "", NoParams),
    )
}


class Log:
    """Remembers what was run."""

    node_id = "node-1"

    def __init__(self) -> None:
        self.started: list[str] = []

    def call_started(self, method: str) -> None:
        self.started.append(method)

    def call_ended(self, method: str, error: object, trace_id: str) -> None:
        assert error is None


def error(code: int, request_id: object = None) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "error": code, "id": request_id}


def result(value: object, request_id: object) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "result": value, "id": request_id}


# name, what is sent, what comes back (None: nothing), what was run
EXCHANGES: list[tuple[str, str, object, list[str]]] = [
    (
        "positional parameters",
        '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
        result(19, 1),
        ["subtract"],
    ),
    (
        "positional parameters, the other way round",
        '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
        result(-19, 2),
        ["subtract"],
    ),
    (
        "named parameters",
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
        result(19, 3),
        ["subtract"],
    ),
    (
        "named parameters in another order",
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
        result(19, 4),
        ["subtract"],
    ),
    ("a notification", '{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None, ["update"]),
    ("a notification of an unknown method", '{"jsonrpc": "2.0", "method": "foobar"}', None, []),
    (
        "an unknown method",
        '{"jsonrpc": "2.0", "method": "foobar", "id": "1"}',
        error(-32601, "1"),
        [],
    ),
    ("invalid JSON", '{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', error(-32700), []),
    ("an invalid request", '{"jsonrpc": "2.0", "method": 1, "params": "bar"}', error(-32600), []),
    (
        "a batch of invalid JSON",
        '[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"}, {"jsonrpc": "2.0", "method"]',
        error(-32700),
        [],
    ),
    ("an empty batch", "[]", error(-32600), []),
    ("a batch of one invalid request", "[1]", [error(-32600)], []),
    ("a batch of invalid requests", "[1,2,3]", [error(-32600), error(-32600), error(-32600)], []),
    (
        "a batch of all kinds",
        """[
            {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
            {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
            {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
            {"foo": "boo"},
            {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
            {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
        ]""",
        [result(7, "1"), result(19, "2"), error(-32600), error(-32601, "5"), result(["hello", 5], "9")],
        ["sum", "notify_hello", "subtract", "get_data"],
    ),
    (
        "a batch of notifications",
        """[
            {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
            {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
        ]""",
        None,
        ["notify_sum", "notify_hello"],
    ),
]

STANDARD_MESSAGES = {-32700: "Parse error", -32600: "Invalid Request", -32601: "Method not found"}


def in_the_specifications_words(answer: Any) -> Any:
    """Error objects become their code, once their message is seen to begin as the specification's does."""
    if isinstance(answer, list):
        return [in_the_specifications_words(one) for one in answer]
    if "error" in answer:
        said = answer["error"]
        assert said["message"].startswith(STANDARD_MESSAGES[said["code"]])
        return {**answer, "error": said["code"]}
    return answer


def test_there_are_fifteen() -> None:
    assert len(EXCHANGES) == 15


@pytest.mark.parametrize(("sent", "expected", "run"), [one[1:] for one in EXCHANGES], ids=[one[0] for one in EXCHANGES])
async def test_the_exchange_is_the_specifications(sent: str, expected: object, run: list[str]) -> None:
    log = Log()
    options = RpcOptions()
    handlers = {
        "subtract": lambda params: params.minuend - params.subtrahend,
        "sum": lambda params: sum(params.numbers),
        "update": lambda params: None,
        "notify_sum": lambda params: None,
        "notify_hello": lambda params: None,
        "get_data": lambda params: ["hello", 5],
    }
    app = web.Application()
    add_dispatcher(app, Dispatcher(handlers, log, options, METHODS), options)
    listener = await listen(app, "127.0.0.1", 0, Access(options.access))
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(listener.url + "/rpc", data=sent, headers={"Content-Type": "application/json"}) as response,
        ):
            body = await response.read()
    finally:
        await listener.close()
    if expected is None:
        assert (response.status, body) == (204, b"")
    else:
        assert in_the_specifications_words(orjson.loads(body)) == expected
    assert log.started == run
