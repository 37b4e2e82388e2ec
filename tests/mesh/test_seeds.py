"""Addresses where a node may be are tried: at once, then ever more rarely, never given up, and left alone where a living member is."""

import asyncio
import logging
import random
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from tars.mesh import seeds as seeds_module
from tars.mesh.seeds import MOST_DISCOVERED, MOST_TRIES_AT_ONCE, Seeds, resolve_with_system


class Bench:
    """`suggested` in order with times; `reached` is who is a living member; `names` is what the name server says."""

    def __init__(self):
        self.suggested = []
        self.members = set()
        self.names = {}
        self.asked = []
        self.grew = asyncio.Event()

    def suggest(self, address):
        self.suggested.append((asyncio.get_running_loop().time(), address))
        self.grew.set()

    @property
    def addresses(self):
        return [address for _, address in self.suggested]

    async def resolve(self, host, port):
        self.asked.append(host)
        self.grew.set()
        found = self.names.get(host)
        if found is None:
            raise OSError("Name or service not known")
        return found

    async def until(self, condition, seconds=5):
        async with asyncio.timeout(seconds):
            while not condition():
                self.grew.clear()
                await self.grew.wait()

    @asynccontextmanager
    async def running(self, *configured, **options):
        options = {
            "first_wait": 0.01,
            "longest_wait": 0.04,
            "dice": random.Random(1),
            "resolve": self.resolve,
            **options,
        }
        seeds = Seeds(configured, self.suggest, self.members.__contains__, **options)
        task = asyncio.create_task(seeds.run())
        try:
            yield seeds
        finally:
            assert not task.done(), task
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The pace of tests; the real one is in `test_the_pace_is_bounded`."""
    monkeypatch.setattr(seeds_module, "TRIES_A_SECOND", 1000.0)
    monkeypatch.setattr(seeds_module, "CHECK_SECONDS", 0.02)


async def test_a_configured_seed_is_tried_for_ever_and_ever_more_rarely(bench):
    async with bench.running("10.0.0.5:8001"):
        await bench.until(lambda: len(bench.suggested) >= 6)
    assert set(bench.addresses) == {"10.0.0.5:8001"}
    times = [when for when, _ in bench.suggested]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[0] >= 0.008
    assert min(gaps[3:]) >= 0.03  # 0.04 with a fifth of jitter either way


async def test_where_a_living_member_is_nothing_is_tried_until_it_is_gone(bench):
    bench.members.add("10.0.0.5:8001")
    async with bench.running("10.0.0.5:8001", "10.0.0.6:8001"):
        await bench.until(lambda: bench.addresses.count("10.0.0.6:8001") >= 3)
        assert "10.0.0.5:8001" not in bench.addresses
        bench.members.clear()
        await bench.until(lambda: "10.0.0.5:8001" in bench.addresses)


async def test_a_name_is_resolved_each_time_and_all_its_addresses_are_tried(bench):
    bench.names["box.lan"] = ["10.0.0.5", "fd00::5"]
    async with bench.running("box.lan:8001"):
        await bench.until(lambda: len(bench.suggested) >= 2)
        bench.names["box.lan"] = ["10.0.0.77"]
        await bench.until(lambda: "10.0.0.77:8001" in bench.addresses)
        assert bench.addresses[:2] == ["10.0.0.5:8001", "[fd00::5]:8001"]
        # A round robin over all nodes: one living member behind it is enough.
        bench.names["box.lan"] = ["10.0.0.77", "10.0.0.78"]
        bench.members.add("10.0.0.77:8001")
        asked = len(bench.asked)
        await bench.until(lambda: len(bench.asked) >= asked + 2)
        assert "10.0.0.78:8001" not in bench.addresses


async def test_a_name_that_nobody_knows_is_one_line_in_the_log(bench, caplog):
    caplog.set_level(logging.WARNING)
    async with bench.running("gone.lan:8001"):
        await bench.until(lambda: len(bench.asked) >= 4)
        assert [record.getMessage() for record in caplog.records] == [
            "the seed gone.lan:8001 is not known to the name server (Name or service not known); it is tried again"
        ]
        bench.names["gone.lan"] = ["10.0.0.9"]
        await bench.until(lambda: "10.0.0.9:8001" in bench.addresses)
        del bench.names["gone.lan"]
        asked = len(bench.asked)
        await bench.until(lambda: len(bench.asked) >= asked + 3)
    assert len(caplog.records) == 2


async def test_a_name_server_that_hangs_or_talks_nonsense_holds_up_nobody(bench, monkeypatch, caplog):
    monkeypatch.setattr(seeds_module, "RESOLVE_SECONDS", 0.05)

    async def resolve(host, port):
        bench.asked.append(host)
        if host == "hangs.lan":
            await asyncio.sleep(3600)
        if host == "odd.lan":
            raise UnicodeError("label too long")
        return ["not an ip!", "10.0.0.5"] * 100

    async with bench.running("hangs.lan:1", "odd.lan:1", "many.lan:1", "10.0.0.9:1", resolve=resolve):
        await bench.until(lambda: bench.asked.count("hangs.lan") >= 2)
        await bench.until(lambda: {"10.0.0.5:1", "10.0.0.9:1"} <= set(bench.addresses))
    assert set(bench.addresses) == {"10.0.0.5:1", "10.0.0.9:1"}
    assert "no name server answered" in caplog.text
    assert "label too long" in caplog.text


async def test_what_is_discovered_is_tried_at_once_and_no_longer_when_withdrawn(bench):
    async with bench.running(first_wait=30) as seeds:
        seeds.discovered("a", ("10.0.0.5:8001", "[fd00::5]:8001"))
        await bench.until(lambda: len(bench.suggested) >= 2)
        assert bench.addresses == ["10.0.0.5:8001", "[fd00::5]:8001"]
        # The same again is no news; another address is.
        seeds.discovered("a", ("10.0.0.5:8001", "[fd00::5]:8001"))
        seeds.discovered("b", ("10.0.0.6:8001",))
        await bench.until(lambda: len(bench.suggested) >= 3)
        seeds.discovered("a", ("10.0.0.55:8001",))
        await bench.until(lambda: len(bench.suggested) >= 4)
        assert bench.addresses[2:] == ["10.0.0.6:8001", "10.0.0.55:8001"]
        seeds.withdrawn("a")
        seeds.withdrawn("never there")
        seeds.discovered("b", ())
        seeds.hurry()
        seeds.discovered("c", ("10.0.0.7:8001",))
        await bench.until(lambda: len(bench.suggested) >= 5)
        assert bench.addresses[4:] == ["10.0.0.7:8001"]


async def test_a_changed_network_makes_everything_due_at_once(bench):
    async with bench.running("10.0.0.5:8001", first_wait=30) as seeds:
        await bench.until(lambda: len(bench.suggested) == 1)
        seeds.hurry()
        await bench.until(lambda: len(bench.suggested) == 2)


@pytest.mark.slow
async def test_the_pace_is_bounded(bench, monkeypatch):
    monkeypatch.setattr(seeds_module, "TRIES_A_SECOND", 100.0)
    async with bench.running(first_wait=30) as seeds:
        began = asyncio.get_running_loop().time()
        for number in range(5000):
            seeds.discovered(str(number), (f"10.{number // 65536}.{number // 256 % 256}.{number % 256}:8001",))
        assert len(seeds._discovered) == MOST_DISCOVERED
        await bench.until(lambda: len(bench.suggested) >= MOST_TRIES_AT_ONCE + 20)
        took = asyncio.get_running_loop().time() - began
    assert took >= 0.19  # twenty more than the burst, at a hundred a second
    assert len(bench.suggested) <= MOST_TRIES_AT_ONCE + 100 * took + 1


async def test_a_flood_does_not_keep_a_newcomer_from_its_try(bench):
    async with bench.running(first_wait=30) as seeds:
        for number in range(200):
            seeds.discovered(str(number), (f"10.1.{number // 256}.{number % 256}:8001",))
        await bench.until(lambda: len(bench.suggested) >= MOST_TRIES_AT_ONCE)
        seeds.discovered("new", ("10.0.0.5:8001",))
        await bench.until(lambda: "10.0.0.5:8001" in bench.addresses)


def test_a_seed_that_is_no_address_is_refused():
    with pytest.raises(ValueError, match="is not host:port"):
        Seeds(["10.0.0.5"], print, bool)


async def test_the_systems_resolver_knows_localhost_and_says_what_it_does_not_know():
    assert "127.0.0.1" in await resolve_with_system("localhost", 8001)
    assert await resolve_with_system("10.0.0.5", 8001) == ["10.0.0.5"]
    with pytest.raises(OSError, match=r".+"):
        await resolve_with_system("no-such-name.invalid", 8001)
