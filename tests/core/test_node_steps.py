"""What a node does next: tables of orders against what is here."""

from __future__ import annotations

from dataclasses import replace

from fleets import MODELS, gpu, node

from tars.core.node_steps import Steps, next_steps
from tars.core.placement import plan
from tars.core.types import Deployment

PC = node("a", gpu("a", "RTX 4090"), gpu("a", "RTX 4090", number=1))
ALL = plan([PC], MODELS, [Deployment("phi-2", replicas=3), Deployment("mistral-7b")]).assignments
ON_0 = [each for each in ALL if each.device == "a/gpu-0"]
ON_1 = [each for each in ALL if each.device == "a/gpu-1"]
NOTHING = Steps((), (), ())


def held(*assignments: object) -> dict:
    return {each.replica: each for each in assignments}  # type: ignore[attr-defined]


def test_one_load_begins_on_each_device() -> None:
    steps = next_steps(ALL, {}, ())
    assert [each.device for each in steps.start] == sorted({each.device for each in ALL})
    assert (steps.stop, steps.fetch) == ((), ())


def test_nothing_begins_on_a_device_in_motion() -> None:
    assert {each.device for each in next_steps(ALL, {}, {ON_0[0].device}).start} == {ON_1[0].device}


def test_what_was_not_ordered_ends_and_its_device_waits_for_that() -> None:
    steps = next_steps(ON_0[1:], held(ON_0[0]), ())
    assert steps == Steps((ON_0[0].replica,), (), ())


def test_another_load_under_the_same_name_is_a_new_one() -> None:
    changed = replace(ON_0[0], settings=replace(ON_0[0].settings, context=128))
    assert next_steps([changed], held(ON_0[0]), ()) == Steps((ON_0[0].replica,), (), ())
    assert next_steps([changed], {}, ()).start == (changed,)


def test_other_words_change_nothing() -> None:
    assert next_steps([replace(ON_0[0], reason="other words")], held(ON_0[0]), ()) == NOTHING


def test_a_failed_one_is_started_again_when_it_is_due_and_its_device_is_quiet() -> None:
    (first, *_) = ON_0
    due = {first.replica}
    assert next_steps([first], held(first), (), retry_due=due).start == (first,)
    assert next_steps([first], held(first), {first.device}, retry_due=due) == NOTHING
    assert next_steps([first], held(first), ()) == NOTHING


def test_a_file_is_fetched_whatever_the_device_does_and_nothing_waits_for_it() -> None:
    (first, second, *_) = ON_0
    lacking = {first.replica}
    assert next_steps([first], {}, {first.device}, without_file=lacking) == Steps((), (first,), ())
    assert next_steps([first, second], {}, (), without_file=lacking) == Steps((), (first,), (second,))
