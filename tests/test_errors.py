"""tars.errors: the tree, and what of it travels."""

import pytest

from tars import errors
from tars.errors import TarsError, from_json

TREE = errors._tree(TarsError)


LEAVES = [each for each in TREE if not each.__subclasses__()]
"""What is raised; a branch only groups them."""


def test_every_kind_is_one_class_only():
    kinds = [each.kind for each in LEAVES]
    assert len(kinds) == len(set(kinds))


def test_codes_lie_where_the_design_puts_them():
    for each in TREE:
        if issubclass(each, errors.ModelError):
            assert 1000 <= each.code < 2000
        elif each.code > -32600:
            assert -32099 <= each.code <= -32000  # the specification's range for a server's own errors
        else:
            assert -32700 <= each.code <= -32600


def test_a_callers_mistake_is_never_retryable():
    assert not [each.kind for each in TREE if issubclass(each, errors.CallerError) and each.retryable]


@pytest.mark.parametrize("each", LEAVES, ids=lambda each: each.kind)
def test_an_error_survives_the_wire_as_its_own_class(each):
    sent = each("what happened; what to do", retry_after_ms=250, details={"limit": 64})
    wire = sent.to_json(node="n1", trace_id="t1")
    assert wire["code"] == each.code
    assert wire["data"]["kind"] == each.kind
    assert (wire["data"]["node"], wire["data"]["trace_id"]) == ("n1", "t1")
    came = from_json(wire)
    assert type(came) is each
    assert (came.message, came.retry_after_ms, came.details) == (sent.message, 250, {"limit": 64})
    assert (came.trace_id, sent.trace_id) == ("t1", "")
    assert came.retryable is each.retryable


def test_an_unknown_kind_keeps_the_senders_code_and_kind():
    came = from_json({"code": -32050, "message": "new", "data": {"kind": "from_the_future", "hint": 1}})
    assert type(came) is TarsError
    assert (came.code, came.kind, came.details) == (-32050, "from_the_future", {"hint": 1})
    assert (TarsError.code, TarsError.kind) == (-32603, "internal")  # the class itself is as it was


@pytest.mark.parametrize("wire", [{}, {"data": None}, {"message": "x", "data": "text"}, {"code": "no number"}])
def test_a_malformed_error_is_still_an_error(wire):
    came = from_json(wire)
    assert isinstance(came, TarsError)
    assert came.kind == "internal"


def test_details_cannot_be_shared_between_errors_by_accident():
    first = errors.UnknownModel("one")
    first.details["known"] = ["a"]
    assert errors.UnknownModel("two").details == {}
