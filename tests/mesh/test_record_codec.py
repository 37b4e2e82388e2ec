"""Records and envelopes as JSON and back; and everything that is neither."""

from contextlib import suppress
from typing import get_args

import orjson
import pytest
from fleets import MODELS
from hypothesis import given
from hypothesis import strategies as st
from mesh_values import ENVELOPES, RECORDS

from tars.core.mesh_messages import Ack, Body, Envelope, MemberState, News, Record, Stamp, Update, Want
from tars.core.reconciliation import record_size
from tars.core.records import Member, NodeAdvert, Wish
from tars.core.types import (
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    KvType,
    ModelKind,
    NodeId,
    NodeSnapshot,
)
from tars.errors import InvalidParams
from tars.mesh.record_codec import (
    BODIES,
    MOST_ITEMS,
    MOST_TEXT,
    MOST_WISHED,
    checked,
    decode_envelope,
    decode_record,
    decode_stamp,
    encode_envelope,
    encode_record,
    encode_stamp,
)

A = NodeId("a")
STAMP = Stamp(1_700_000_000_000, 3, A)
WISH = Record("deployment/m", STAMP, Wish(Deployment("m", 2, kv_type=KvType.Q8_0, priority=-5)))
DEVICE = DeviceSnapshot(
    DeviceId("a/cpu"),
    A,
    DeviceKind.CPU,
    "CPU",
    Bytes.gib(8),
    Bytes.gib(4),
    compute_capability=(8, 6),
    cannot_run=((ModelKind.CHAT, "no engine"),),
)
ADVERT = Record("node/a", STAMP, NodeAdvert(NodeSnapshot(A, "pc", (DEVICE,))))
ENVELOPE = Envelope(
    A,
    3,
    Ack(7, (("m@cpu#0", 1, 0),)),
    2**60 - 1,
    (Update(NodeId("b"), 4, MemberState.SUSPECT, ("10.0.0.2:8001",)),),
    (WISH, ADVERT, Record("member/b", STAMP, None)),
    2**64 - 1,
)


def through_json(plain):
    return orjson.loads(orjson.dumps(plain))


# --- round trips --------------------------------------------------------------------------------------------------------


@given(RECORDS)
def test_every_record_comes_back_as_it_was(record):
    back = decode_record(through_json(encode_record(record)))
    assert back == record
    assert repr(back) == repr(record)  # the types within, too: Bytes, enumerations, tuples
    assert checked(record) is record


@given(ENVELOPES)
def test_every_envelope_comes_back_as_it_was(envelope):
    back = decode_envelope(through_json(encode_envelope(envelope)))
    assert back == envelope
    assert repr(back) == repr(envelope)


@given(
    st.builds(
        Stamp,
        st.integers(0, 2**60),
        st.integers(0, 2**60),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    )
)
def test_every_stamp_comes_back_as_it_was(stamp):
    assert decode_stamp(through_json(encode_stamp(stamp))) == stamp


def test_fields_at_their_default_are_not_written():
    assert encode_record(Record("deployment/m", STAMP, Wish(Deployment("m")))) == {
        "key": "deployment/m",
        "stamp": [1_700_000_000_000, 3, "a"],
        "value": {"deployment": {"model": "m"}},
    }


LARGE = Record("deployment/mistral-7b", STAMP, Wish(Deployment("mistral-7b"), MODELS["mistral-7b"]))


@pytest.mark.parametrize(
    "record", [WISH, ADVERT, LARGE, Record("deployment/m", STAMP, None)], ids=lambda record: record.key
)
def test_what_a_record_is_counted_with_is_what_it_takes(record):
    """`reconciliation` fills packets by it."""
    taken = len(orjson.dumps(encode_record(record)))
    assert taken <= record_size(record) <= 1.25 * taken + 160


# --- other versions -----------------------------------------------------------------------------------------------------


def test_a_kind_that_this_version_does_not_know_is_passed_over():
    unknown = {"key": "lease/m", "stamp": [5, 0, "a"], "value": {"whatever": [1, 2, {"x": None}]}}
    assert decode_record(unknown) is None
    plain = through_json(encode_envelope(ENVELOPE))
    plain["records"].insert(1, unknown)
    assert decode_envelope(plain) == ENVELOPE


def test_a_body_and_fields_that_this_version_does_not_know_are_passed_over():
    plain = through_json(encode_envelope(ENVELOPE))
    plain["body"] = {"is": "handshake", "colour": "red"}
    plain["later"] = 5
    plain["updates"][0]["later"] = {"x": 1}
    plain["records"][0]["later"] = True
    plain["records"][0]["value"]["deployment"]["later"] = "x"
    back = decode_envelope(plain)
    assert back.body == News()
    assert (back.updates, back.records) == (ENVELOPE.updates, ENVELOPE.records)


def test_one_record_that_cannot_be_read_does_not_cut_its_sender_off():
    plain = through_json(encode_envelope(ENVELOPE))
    plain["records"][1]["value"]["node"]["devices"][0]["kind"] = "quantum"
    problems = []
    back = decode_envelope(plain, problems)
    assert back.records == (ENVELOPE.records[0], ENVELOPE.records[2])
    assert back.updates == ENVELOPE.updates
    assert [each.details["errors"][0]["at"] for each in problems] == ["records[1].value.node.devices[0].kind"]
    with pytest.raises(InvalidParams, match=r"devices\[0\]\.kind"):
        decode_envelope(plain)


# --- what is neither ----------------------------------------------------------------------------------------------------


def changed(record, path, value):
    """The record as JSON with one place changed (or taken out, by ...)."""
    plain = through_json(encode_record(record))
    place = plain
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return plain


DEVICES = ["value", "node", "devices"]


@pytest.mark.parametrize(
    ("record", "path", "value", "at", "problem"),
    [
        (WISH, ["key"], 5, "key", "text"),
        (WISH, ["key"], "", "key", "text"),
        (WISH, ["key"], "k" * 600, "key", "512"),
        (WISH, ["stamp"], ..., "", "key, stamp and value"),
        (WISH, ["value"], ..., "", "key, stamp and value"),
        (WISH, ["stamp"], [1, 2], "stamp", "[milliseconds, counter, node]"),
        (WISH, ["stamp"], [True, 2, "a"], "stamp", "[milliseconds, counter, node]"),
        (WISH, ["stamp"], [1.5, 2, "a"], "stamp", "[milliseconds, counter, node]"),
        (WISH, ["stamp", 0], -1, "stamp[0]", "below 0"),
        (WISH, ["stamp", 1], 2**61, "stamp[1]", "out of bounds"),
        (WISH, ["value"], [], "value", "object"),
        (WISH, ["value", "deployment", "model"], ..., "value.deployment.model", "required"),
        (WISH, ["value", "deployment", "model"], 5, "value.deployment.model", "valid string"),
        (WISH, ["value", "deployment", "replicas"], "2", "value.deployment.replicas", "valid integer"),
        (WISH, ["value", "deployment", "replicas"], True, "value.deployment.replicas", "valid integer"),
        (WISH, ["value", "deployment", "replicas"], 2.5, "value.deployment.replicas", "valid integer"),
        (WISH, ["value", "deployment", "replicas"], -1, "value.deployment.replicas", "below 0"),
        (WISH, ["value", "deployment", "replicas"], 65, "value.deployment.replicas", "0 to 64"),
        (WISH, ["value", "deployment", "gpu_layers"], -1, "value.deployment.gpu_layers", "0 to 100000"),
        (WISH, ["value", "deployment", "kv_type"], "f8", "value.deployment.kv_type", "'f16'"),
        (WISH, ["value", "deployment", "device"], "x" * (MOST_TEXT + 1), "value.deployment.device", str(MOST_TEXT)),
        (WISH, ["value", "deployment", "device"], "\ud800", "value.deployment.device", "surrogate"),
        (ADVERT, [*DEVICES, 0, "memory_total"], 2**60 + 1, "value.node.devices[0].memory_total", "out of bounds"),
        (ADVERT, [*DEVICES, 0, "memory_total"], 10**400, "value.node.devices[0].memory_total", "out of bounds"),
        (ADVERT, [*DEVICES, 0, "memory_free"], -1, "value.node.devices[0].memory_free", "below 0"),
        (ADVERT, [*DEVICES, 0, "power_watts"], float("nan"), "value.node.devices[0].power_watts", "out of bounds"),
        (ADVERT, [*DEVICES, 0, "power_watts"], float("inf"), "value.node.devices[0].power_watts", "out of bounds"),
        (ADVERT, [*DEVICES, 0, "compute_capability"], [8], "value.node.devices[0].compute_capability[1]", "required"),
        (ADVERT, DEVICES, {}, "value.node.devices", "valid array"),
        (ADVERT, DEVICES, [1] * (MOST_ITEMS + 1), "value.node.devices", "at most"),
        (ADVERT, ["value", "node"], {str(number): 1 for number in range(300)}, "value.node", "300 fields"),
        (ADVERT, ["value", "node", "name"], b"bytes", "value.node.name", "no JSON value"),
        (ADVERT, ["value", "node"], {"\ud800": [-1]}, "value.node", "surrogate"),
        (ADVERT, ["value", "node"], {5: 5}, "value.node", "name should be a text"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(record, path, value, at, problem):
    with pytest.raises(InvalidParams) as refused:
        decode_record(changed(record, path, value))
    (error,) = refused.value.details["errors"]
    assert error["at"] == at
    assert problem in error["problem"]
    assert at in refused.value.message
    refused.value.message.encode()  # it can be answered


def test_temperatures_and_priorities_may_be_below_zero():
    plain = changed(ADVERT, [*DEVICES, 0, "temperature_celsius"], -5)
    plain["value"]["node"]["priority"] = -1000
    record = decode_record(plain)
    assert record is not None
    assert isinstance(record.value, NodeAdvert)
    assert (record.value.node.priority, record.value.node.devices[0].temperature_celsius) == (-1000, -5)


@pytest.mark.parametrize(
    ("path", "value", "at"),
    [
        (["sender"], "", "sender"),
        (["sender"], ..., "sender"),
        (["incarnation"], "1", "incarnation"),
        (["incarnation"], -1, "incarnation"),
        (["root"], 2**64, "root"),
        (["gone"], -1, "gone"),
        (["root"], True, "root"),
        (["body"], ..., "body"),
        (["body"], {"number": 1}, "body.is"),
        (["body"], {"is": 5}, "body.is"),
        (["body"], {"is": "ping"}, "body.number"),
        (["body"], {"is": "ping", "number": "1"}, "body.number"),
        (["body"], {"is": "want", "ranges": [1], "have": [["k", 5]]}, "body.have[0][1]"),
        (["updates"], 5, "updates"),
        (["updates", 0, "state"], "ILL", "updates[0].state"),
        (["updates", 0, "addresses"], "10.0.0.2", "updates[0].addresses"),
        (["records"], {}, "records"),
        (["records", 0], 5, "records[0]"),
        (["records", 0, "value", "deployment"], None, "records[0].value.deployment"),
    ],
)
def test_a_bad_envelope_is_refused_with_its_place(path, value, at):
    plain = through_json(encode_envelope(ENVELOPE))
    place = plain
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(InvalidParams) as refused:
        decode_envelope(plain)
    assert refused.value.details["errors"][0]["at"] == at


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["sender", "body", "is", "records", "key", "stamp", "value", "updates", "root", "node", "x"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.one_of(JSON, st.fixed_dictionaries({"sender": st.just("a"), "body": JSON, "records": JSON, "updates": JSON})))
def test_garbage_raises_nothing_but_invalid_params(plain):
    for decode in (decode_envelope, decode_record, decode_stamp):
        with suppress(InvalidParams):
            decode(plain)


@given(ENVELOPES, st.data())
def test_a_changed_byte_raises_nothing_but_invalid_params(envelope, data):
    text = bytearray(orjson.dumps(encode_envelope(envelope)))
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        plain = orjson.loads(bytes(text))
    except orjson.JSONDecodeError:
        return
    with suppress(InvalidParams):
        decode_envelope(plain, [])


@pytest.mark.parametrize("depth", [20, 900])
def test_a_deep_nesting_is_refused_not_followed(depth):
    for decode in (decode_envelope, decode_record, decode_stamp):
        with pytest.raises(InvalidParams):
            decode(
                {
                    "sender": "a",
                    "body": {"is": "news", "x": nested(depth)},
                    "key": "node/a",
                    "stamp": nested(depth),
                    "value": None,
                }
            )


def test_what_no_peer_would_take_does_not_pass_the_check_of_a_local_write():
    with pytest.raises(InvalidParams, match="8192"):
        checked(Record("member/b", STAMP, Member(NodeId("b"), "x" * 9_000, "f")))
    for name, most in MOST_WISHED.items():
        checked(Record("deployment/m", STAMP, Wish(Deployment(**{"model": "m", name: most}))))
        with pytest.raises(InvalidParams, match=name):
            checked(Record("deployment/m", STAMP, Wish(Deployment(**{"model": "m", name: most + 1}))))


def test_every_body_has_a_name():
    assert set(BODIES.values()) == set(get_args(Body))
    assert encode_envelope(Envelope(A, 0, Want((1,))))["body"] == {"is": "want", "ranges": [1]}
