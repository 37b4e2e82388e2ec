"""One body in, its calls out; each for itself, and nothing over a bound."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.errors import InternalError, InvalidRequest, LimitExceeded, ParseError
from tars.messages.base import Message
from tars.messages.inference import Delta, EmbedResult, ServedBy, Timings, Usage
from tars.rpc.envelope import (
    NO_META,
    BadElement,
    Call,
    decode,
    encode_error,
    encode_notification,
    encode_result,
)
from tars.rpc.options import EnvelopeLimits

LIMITS = EnvelopeLimits()


def one(body: bytes | dict[str, Any]) -> Call | BadElement:
    element = decode(body if isinstance(body, bytes) else orjson.dumps(body), LIMITS)
    assert not isinstance(element, list)
    return element


def test_a_call_is_read_with_its_parts() -> None:
    call = one(b'{"jsonrpc":"2.0","method":"m","params":{"a":1},"id":"x"}')
    assert call == Call("m", {"a": 1}, "x", False, NO_META)


def test_a_call_without_an_id_is_a_notification_and_one_with_the_id_null_is_not() -> None:
    assert one(b'{"jsonrpc":"2.0","method":"m"}').notification
    assert not one(b'{"jsonrpc":"2.0","method":"m","id":null}').notification


@pytest.mark.parametrize("request_id", [None, 0, -1, 2**63 - 1, "", "a", 1.5, -0.25])
def test_an_id_may_be_null_a_string_or_a_number(request_id: object) -> None:
    call = one({"jsonrpc": "2.0", "method": "m", "id": request_id})
    assert isinstance(call, Call)
    assert call.id == request_id


@pytest.mark.parametrize(
    "request_id", [b"true", b"false", b"[]", b"{}", b"1e300", b"36893488147419103232", b'"%b"' % (b"x" * 2000)]
)
def test_any_other_id_is_refused_under_the_id_null(request_id: bytes) -> None:
    element = one(b'{"jsonrpc":"2.0","method":"m","id":%b}' % request_id)
    assert isinstance(element, BadElement)
    assert element.id is None
    assert isinstance(element.error, InvalidRequest)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"method": "m", "id": 1}, "jsonrpc"),
        ({"jsonrpc": "1.0", "method": "m", "id": 1}, "jsonrpc"),
        ({"jsonrpc": 2.0, "method": "m", "id": 1}, "jsonrpc"),
        ({"jsonrpc": "2.0", "id": 1}, "method"),
        ({"jsonrpc": "2.0", "method": 1, "id": 1}, "method"),
        ({"jsonrpc": "2.0", "method": "m", "params": "bar", "id": 1}, "params"),
        ({"jsonrpc": "2.0", "method": "m", "params": None, "id": 1}, "params"),
        ({"jsonrpc": "2.0", "method": "m", "parms": {}, "id": 1}, "'parms'"),
    ],
)
def test_a_broken_envelope_is_refused_under_its_own_id_and_says_what_is_wrong(body: dict[str, Any], word: str) -> None:
    element = one(body)
    assert isinstance(element, BadElement)
    assert element.id == 1
    assert word in element.error.message


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"nope", b"[1,", b"NaN", b"[1e400]", b'["\\ud800"]', b'["\xff"]', b"\xef\xbb\xbf{}", b"\x00"],
)
def test_what_is_not_json_is_a_parse_error(body: bytes) -> None:
    with pytest.raises(ParseError):
        decode(body, LIMITS)


def test_an_empty_batch_is_one_invalid_request() -> None:
    with pytest.raises(InvalidRequest):
        decode(b"[]", LIMITS)


def test_each_element_of_a_batch_is_read_for_itself() -> None:
    elements = decode(b'[1,{"jsonrpc":"2.0","method":"m","id":1},[],{"foo":"boo"}]', LIMITS)
    assert isinstance(elements, list)
    assert [type(element) for element in elements] == [BadElement, Call, BadElement, BadElement]


def test_a_hundred_thousand_junk_elements_are_refused_within_milliseconds() -> None:
    body = b"[" + b",".join([b"1"] * 100_000) + b"]"
    began = time.process_time()
    with pytest.raises(LimitExceeded) as refused:
        decode(body, LIMITS)
    # About 2 ms; the bound leaves room for a busy machine and none for looking at each element (100 ms).
    assert time.process_time() - began < 0.05
    assert refused.value.details == {"limit": LIMITS.max_batch, "actual": 100_000, "bound": "batch_length"}


@pytest.mark.parametrize("deep", [65, 500, 1023, 1024, 5000, 200_000])
@pytest.mark.parametrize(("opened", "closed"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_deep_nesting_is_refused(deep: int, opened: bytes, closed: bytes) -> None:
    body = b'{"jsonrpc":"2.0","method":"m","params":{"a":' + opened * deep + b"1" + closed * deep + b"}}"
    with pytest.raises(LimitExceeded) as refused:
        decode(body, LIMITS)
    assert refused.value.details["bound"] == "depth"


def test_nesting_up_to_the_bound_is_taken() -> None:
    levels = LIMITS.max_depth - 2  # the call and its params are the first two
    body = b'{"jsonrpc":"2.0","method":"m","params":{"a":' + b"[" * levels + b"]" * levels + b"}}"
    assert isinstance(decode(body, LIMITS), Call)
    with pytest.raises(LimitExceeded):
        decode(body.replace(b"[]", b"[[]]"), LIMITS)


def test_many_shallow_containers_are_not_deep() -> None:
    body = orjson.dumps({"jsonrpc": "2.0", "method": "m", "params": {"a": [[] for _ in range(1000)]}})
    assert isinstance(decode(body, LIMITS), Call)


@pytest.mark.parametrize("letter", ["x", "ü", "𝄞"])
@pytest.mark.parametrize("as_key", [False, True])
def test_a_string_over_its_bound_is_refused_and_one_at_it_is_taken(letter: str, as_key: bool) -> None:
    limits = EnvelopeLimits(max_string_bytes=1200)
    most = 1200 // len(letter.encode())
    for count, fits in ((most, True), (most + 1, False)):
        text = letter * count
        params: dict[str, Any] = {text: 1} if as_key else {"deep": [{"text": text}]}
        body = orjson.dumps({"jsonrpc": "2.0", "method": "m", "params": {**params, "more": "y" * 100}})
        if fits:
            assert isinstance(decode(body, limits), Call)
        else:
            with pytest.raises(LimitExceeded) as refused:
                decode(body, limits)
            assert refused.value.details["bound"] == "string_bytes"


def test_a_body_over_its_bound_is_refused_unread() -> None:
    with pytest.raises(LimitExceeded) as refused:
        decode(b"not even JSON" * 100, EnvelopeLimits(max_body_bytes=1000))
    assert refused.value.details == {"limit": 1000, "actual": 1300, "bound": "body_bytes"}


def test_meta_is_taken_out_of_the_params_and_checked() -> None:
    call = one({"jsonrpc": "2.0", "method": "m", "id": 1, "params": {"a": 1, "_meta": {"timeout_ms": 50, "hops": 1}}})
    assert isinstance(call, Call)
    assert call.params == {"a": 1}
    assert (call.meta.timeout_ms, call.meta.hops) == (50, 1)


@pytest.mark.parametrize(
    "meta", [1, None, [], {"timeout_ms": 0}, {"timeout_ms": "5"}, {"timeout": 5}, {"hops": 9}, {"hops": True}]
)
def test_a_wrong_meta_is_an_invalid_param_and_runs_nothing(meta: object) -> None:
    element = one({"jsonrpc": "2.0", "method": "m", "id": 1, "params": {"_meta": meta}})
    assert isinstance(element, BadElement)
    assert (element.id, element.error.code) == (1, -32602)
    assert "_meta" in element.error.message
    silent = one({"jsonrpc": "2.0", "method": "m", "params": {"_meta": meta}})
    assert isinstance(silent, BadElement)
    assert silent.notification


def embed_result(vector: list[float]) -> EmbedResult:
    return EmbedResult.model_construct(
        model="m",
        embeddings=[[0.0, 1.0], vector],
        dimensions=2,
        truncated=[],
        usage=Usage(prompt_tokens=1, total_tokens=1),
        timings=Timings(),
        served_by=ServedBy(node="n", replica="r", device="d"),
    )


def test_a_result_is_written_with_its_nested_messages() -> None:
    answer = orjson.loads(encode_result(7, embed_result([0.5, 0.5])))
    assert answer["id"] == 7
    assert answer["result"]["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 0,
        "total_tokens": 1,
        "cached_tokens": 0,
    }
    assert EmbedResult.model_validate(answer["result"]).embeddings == [[0.0, 1.0], [0.5, 0.5]]


@pytest.mark.parametrize(
    "result",
    [
        "\ud800",
        2**64,
        {"a": float("nan")},
        [1.0, "text", float("inf")],
        [float("inf"), float("-inf")],
        {"a": [{"b": (0.0, float("-inf"))}]},
        embed_result([float("nan"), 0.0]),
        embed_result([float("inf"), float("-inf")]),
        object(),
    ],
)
def test_a_result_that_json_cannot_say_is_an_internal_error_and_never_a_null(result: object) -> None:
    with pytest.raises(InternalError):
        encode_result(1, result)


def test_large_finite_numbers_are_not_taken_for_infinite_ones() -> None:
    assert orjson.loads(encode_result(1, [1e308, 1e308, 1e308]))["result"] == [1e308, 1e308, 1e308]


def test_an_error_whose_details_json_cannot_say_is_sent_without_them() -> None:
    error = {"code": 1, "message": "text \ud800", "data": {"kind": "k", "retryable": False, "bad": 2**70}}
    answer = orjson.loads(encode_error("x", error))
    assert (answer["id"], answer["error"]["data"]) == ("x", {"kind": "k", "retryable": False})


def test_a_delta_travels_with_its_calls_id() -> None:
    assert orjson.loads(encode_notification("inference.delta", 3, Delta(text="ü", token_ids=[5]))) == {
        "jsonrpc": "2.0",
        "method": "inference.delta",
        "params": {"id": 3, "text": "ü", "token_ids": [5]},
    }


def test_a_delta_that_json_cannot_say_is_an_internal_error() -> None:
    with pytest.raises(InternalError):
        encode_notification("inference.delta", 3, Delta.model_construct(text="\ud800"))


def test_what_is_no_number_is_found_in_messages_inside_messages() -> None:
    class Speed(Message):
        value: float

    class Nested(Message):
        speeds: list[Speed]

    with pytest.raises(InternalError):
        encode_result(1, Nested.model_construct(speeds=[Speed.model_construct(value=float("nan"))]))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)
ENVELOPES = st.fixed_dictionaries(
    {},
    optional={"jsonrpc": st.just("2.0") | JSON, "method": st.text() | JSON, "params": JSON, "id": JSON, "extra": JSON},
)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_call_or_one_of_the_three_errors(body: bytes) -> None:
    try:
        decoded = decode(body, LIMITS)
    except (ParseError, InvalidRequest, LimitExceeded):
        return
    for element in decoded if isinstance(decoded, list) else [decoded]:
        assert isinstance(element, Call | BadElement)


@given(st.lists(ENVELOPES | JSON, min_size=1, max_size=8))
def test_every_element_of_any_batch_is_judged_as_it_is_alone(batch: list[Any]) -> None:
    try:
        body = orjson.dumps(batch)
    except TypeError:
        return  # hypothesis made a lone surrogate
    try:
        elements = decode(body, LIMITS)
    except LimitExceeded:
        return
    assert isinstance(elements, list)
    assert len(elements) == len(batch)
    for element, sent in zip(elements, batch, strict=True):
        alone = None if isinstance(sent, list) else decode(orjson.dumps(sent), LIMITS)
        if isinstance(element, Call):
            assert element == alone
        else:
            assert alone is None or isinstance(alone, BadElement)
            assert element.error.code in (-32600, -32602)


@pytest.mark.parametrize(
    "params",
    [
        b'{"input":[' + b",".join([b"1"] * 70_000) + b"]}",
        b'{"input":[' + b",".join([b"[1]"] * 40_000) + b"]}",
        b"{" + b",".join(b'"%d":1' % number for number in range(70_000)) + b"}",
    ],
    ids=["elements", "nested", "members"],
)
def test_more_values_than_are_taken_are_refused_before_they_are_checked_one_by_one(params: bytes) -> None:
    with pytest.raises(LimitExceeded) as error:
        decode(b'{"jsonrpc":"2.0","method":"m","id":1,"params":%b}' % params, LIMITS)
    assert error.value.details == {"limit": LIMITS.max_values, "actual": None, "bound": "values"}


def test_commas_and_brackets_in_a_text_are_no_values() -> None:
    assert isinstance(one({"jsonrpc": "2.0", "method": "m", "id": 1, "params": {"text": "[{,}]" * 50_000}}), Call)
