"""tars.core.types: units, capacity, estimates and deadlines."""

from dataclasses import replace
from fractions import Fraction

import pytest
from fleets import cpu, gpu
from hypothesis import given
from hypothesis import strategies as st

from tars.core.types import Bytes, Deadline, DeviceId, DeviceKind, DeviceSnapshot, MemoryEstimate, NodeId


@pytest.mark.parametrize(
    ("mebibytes", "expected"),
    [(0, 0), (1, 2**20), (0.5, 2**19), (1 / 3, 349_526), (374.25, 392_429_568)],
)
def test_mebibytes_become_bytes_rounded_up(mebibytes, expected):
    assert Bytes.mib(mebibytes) == expected


def test_a_gibibyte_is_1024_mebibytes():
    assert Bytes.gib(1.5) == Bytes.mib(1536) == 1_610_612_736
    assert isinstance(Bytes.gib(1.5), Bytes)


@given(st.floats(0, 2**20, allow_nan=False))
def test_rounding_up_never_loses_a_byte_and_never_adds_a_whole_one(mebibytes):
    # Exact: a fraction of a byte may be far below what a float's difference can show.
    assert 0 <= Bytes.mib(mebibytes) - Fraction(mebibytes) * 2**20 < 1


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 KiB"), (12_288, "12 KiB"), (392_429_568, "374 MiB"), (5_476_083_302, "5.1 GiB"), (-(2**30), "-1.0 GiB")],
)
def test_sizes_are_written_for_people(size, words):
    assert str(Bytes(size)) == words


def test_in_mib_is_the_inverse_of_mib():
    assert Bytes.mib(374.5).in_mib == 374.5


def device(**fields):
    return DeviceSnapshot(
        id=DeviceId("n/gpu-a"),
        node=NodeId("n"),
        kind=DeviceKind.CUDA,
        name="RTX 3060",
        memory_total=Bytes.gib(12),
        **fields,
    )


@pytest.mark.parametrize(
    ("fields", "capacity"),
    [
        ({"memory_free": Bytes.gib(11)}, Bytes.gib(11)),
        ({"memory_free": Bytes.gib(12), "reserve": Bytes.gib(1)}, Bytes.gib(11)),
        # What TARS holds counts as its own, but no more than there is.
        ({"memory_free": Bytes.gib(6), "memory_held": Bytes.gib(5)}, Bytes.gib(11)),
        ({"memory_free": Bytes.gib(12), "memory_held": Bytes.gib(5), "reserve": Bytes.gib(1)}, Bytes.gib(11)),
        ({"memory_free": Bytes.gib(11), "cap": Bytes.gib(4)}, Bytes.gib(4)),
        ({"memory_free": Bytes.gib(11), "cap": Bytes(0)}, 0),
        ({"memory_free": Bytes(0), "reserve": Bytes.gib(13)}, 0),
    ],
)
def test_capacity_is_the_least_of_free_with_held_total_less_reserve_and_cap(fields, capacity):
    assert device(**fields).capacity == capacity


def test_an_estimate_adds_its_parts_until_a_load_was_measured():
    parts = [Bytes(1), Bytes(20), Bytes(300), Bytes(4000)]
    assert MemoryEstimate(*parts).total == 4321
    assert MemoryEstimate(*parts, measured=Bytes(0)).total == 0


def test_a_deadline_counts_down_to_zero_and_no_further():
    deadline = Deadline(at=100.0)
    assert deadline.remaining(97.5) == 2.5
    assert not deadline.passed(97.5)
    assert deadline.remaining(101.0) == 0.0
    assert deadline.passed(100.0)


@pytest.mark.parametrize(
    ("pin", "meant"),
    [
        ("pc1/gpu-0", True),
        ("gpu-0", True),
        ("NVIDIA GeForce RTX 3060", True),
        ("geforce rtx 3060", True),
        (" RTX 3060 ", True),
        ("3060", False),
        ("cpu", False),
        ("", False),
    ],
)
def test_a_pin_means_a_device_by_its_whole_id_or_name(pin: str, meant: bool) -> None:
    device = replace(gpu("pc1"), name="NVIDIA GeForce RTX 3060")
    assert device.is_called(pin) is meant


def test_cpu_means_the_processor() -> None:
    assert cpu("a").is_called("cpu")
    assert not gpu("a").is_called("cpu")
