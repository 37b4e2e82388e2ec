"""Places, deadlines and trace ids, the same for every face."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from time import monotonic

import pytest

from tars.errors import DeadlineExceeded, Draining, Overloaded
from tars.rpc.admission import Admission, internal_error, trace_id_of
from tars.rpc.options import RpcOptions


async def test_a_full_node_refuses_inference_and_still_hears_its_operator():
    admission = Admission(RpcOptions(max_concurrent_calls=2))
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(admission.within_bounds(None))
        with pytest.raises(Overloaded) as refused:
            await stack.enter_async_context(admission.within_bounds(None))
        assert refused.value.details == {"limit": 2}
        assert refused.value.retry_after_ms
        await stack.enter_async_context(admission.within_bounds(None, inference=False))
        assert admission.active == 3
    assert admission.active == 0


async def test_one_caller_may_have_every_place_while_nobody_else_wants_one():
    admission = Admission(RpcOptions(max_concurrent_calls=16))
    async with AsyncExitStack() as stack:
        for _ in range(16):
            await stack.enter_async_context(admission.within_bounds(None, caller="greedy"))
        assert admission.active == 16


async def test_the_last_places_are_for_those_who_hold_few():
    admission = Admission(RpcOptions(max_concurrent_calls=16))
    async with AsyncExitStack() as stack, AsyncExitStack() as first:
        await first.enter_async_context(admission.within_bounds(None, caller="greedy"))
        for _ in range(15):
            await stack.enter_async_context(admission.within_bounds(None, caller="greedy"))
        with pytest.raises(Overloaded, match="already runs 16 calls"):
            await stack.enter_async_context(admission.within_bounds(None, caller="modest"))
        # A place is free, and who was refused a moment ago has more right to it.
        await first.aclose()
        with pytest.raises(Overloaded, match="15 calls of this caller") as refused:
            await stack.enter_async_context(admission.within_bounds(None, caller="greedy"))
        assert refused.value.retry_after_ms
        await stack.enter_async_context(admission.within_bounds(None, caller="modest"))
        # An operator's call is no inference: it is bound by nobody's share.
        await stack.enter_async_context(admission.within_bounds(None, inference=False, caller="greedy"))
    assert admission.active == 0
    assert not admission._held


async def test_a_place_is_free_again_after_a_failure():
    admission = Admission(RpcOptions(max_concurrent_calls=1))
    with pytest.raises(KeyError):
        async with admission.within_bounds(None):
            raise KeyError
    async with admission.within_bounds(None):
        assert admission.active == 1


async def test_work_over_its_deadline_is_stopped():
    admission = Admission(RpcOptions())
    with pytest.raises(DeadlineExceeded, match=r"0\.02 s"):
        async with admission.within_bounds(20):
            await asyncio.Event().wait()
    assert admission.active == 0


async def test_a_timeout_of_the_works_own_is_not_the_calls():
    with pytest.raises(TimeoutError) as own:
        async with Admission(RpcOptions()).within_bounds(60_000):
            raise TimeoutError("a lower layer's")
    assert not isinstance(own.value, DeadlineExceeded)


async def test_the_deadline_is_the_asked_one_or_the_nodes():
    admission = Admission(RpcOptions(default_timeout_ms=5_000))
    for asked, seconds in ((None, 5), (1_000, 1)):
        async with admission.within_bounds(asked) as deadline:
            assert seconds - 0.5 < deadline.remaining(monotonic()) <= seconds


def test_new_trace_ids_are_valid_and_differ():
    admission = Admission(RpcOptions())
    ids = [admission.new_trace_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(trace_id_of(f"00-{one}-00f067aa0ba902b7-01") == one for one in ids)
    assert Admission(RpcOptions()).new_trace_id() not in ids


@pytest.mark.parametrize(
    "traceparent",
    [
        None,
        "",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
    ],
)
def test_a_malformed_traceparent_starts_a_new_trace(traceparent):
    assert trace_id_of(traceparent) is None


def test_a_fault_of_ours_tells_nothing_but_how_to_report_it():
    assert internal_error().message.endswith("Report it with the trace id.")


async def test_a_node_that_stops_begins_no_inference_and_still_answers_its_operator_and_its_peers():
    admission = Admission(RpcOptions())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(admission.within_bounds(None))
        admission.close()
        with pytest.raises(Draining, match="nothing was run") as refused:
            await stack.enter_async_context(admission.within_bounds(None))
        assert refused.value.retryable
        assert refused.value.retry_after_ms
        await stack.enter_async_context(admission.within_bounds(None, inference=False))
        await stack.enter_async_context(admission.within_bounds(None, always=True))
        assert admission.active == 3, "what ran goes on"


@pytest.mark.slow
async def test_what_still_runs_when_the_grace_time_is_over_ends_as_retryable():
    admission = Admission(RpcOptions())
    began = asyncio.Event()

    async def work(inference):
        async with admission.within_bounds(1000 if not inference else None, inference=inference):
            began.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(work(True))
    looking = asyncio.create_task(work(False))
    await began.wait()
    admission.end()
    with pytest.raises(Draining, match="grace time is over") as ended:
        await running
    assert ended.value.retryable
    with pytest.raises(DeadlineExceeded):
        await looking
    with pytest.raises(Draining, match="nothing was run"):
        await work(True)
    admission.end()
    assert admission.active == 0


async def test_a_call_whose_own_time_was_over_first_is_late_and_not_stopped():
    admission = Admission(RpcOptions())

    async def work():
        async with admission.within_bounds(10):
            try:
                await asyncio.Event().wait()
            finally:
                admission.end()

    with pytest.raises(DeadlineExceeded):
        await work()
