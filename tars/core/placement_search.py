"""Search for the best placement of missing replicas on free memory: numbers in, numbers out.

Law of this file: pure and deterministic; devices, nodes and wishes are indices, reasons are made elsewhere. Every order of replicas is
filled greedily; the best result by `Score` wins. Field notes, Placement: 200 hash-seeded orders place as much as CP-SAT does, in
milliseconds; best-fit-decreasing alone places everything in 27 of 60 fleets instead of 40.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Score = tuple[tuple[int, ...], int, int, int, float, int, int]
"""Compared in this order, larger is better: replicas placed by priority (highest first); replicas of a model that do not share a
node; chat replicas on GPUs; other replicas on GPUs; quality; embeddings on small cards; load in proportion to the cards."""


STEPS_MOST = 500_000
"""Looks at one device for one replica, about 0.7 us each: 10 devices and 20 replicas get all of 200 orders, 100 and 200 get 25, so that
a fleet a hundred times larger than TARS is for, 1,000 devices and 300 replicas, is planned in about a second."""
IMPROVE_STEPS_MOST = 300_000
"""The same for single moves after the best order: 1,000 devices and 300 replicas get one round of four."""


@dataclass(frozen=True, slots=True)
class Option:
    """One variant on one device: bytes needed, and its quality. `variant` is the caller's index."""

    need: int
    quality: float
    variant: int


@dataclass(frozen=True, slots=True)
class Ground:
    """The devices, by index. `free` and `load` are bytes, `strength` is how much load each should carry beside the others."""

    free: tuple[int, ...]
    load: tuple[int, ...]
    node: tuple[int, ...]
    gpu: tuple[bool, ...]
    strength: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wish:
    """`missing` replicas of one model. `options` by device: the variants that fit the empty device, smallest need first.

    `rank` by device is the order for ties, smaller first; `beside` counts by node the replicas that it has already.
    """

    name: str
    chat: bool
    priority: int
    missing: int
    options: tuple[tuple[Option, ...], ...]
    rank: Sequence[int]
    beside: tuple[int, ...]


@dataclass(slots=True)
class Placed:
    """One replica of wish number `wish` on one device."""

    wish: int
    device: int
    option: Option


@dataclass(slots=True)
class _Filling:
    """Memory while an order is filled."""

    free: list[int]
    load: list[int]

    @classmethod
    def empty(cls, ground: Ground) -> _Filling:
        return cls(list(ground.free), list(ground.load))

    def take(self, device: int, need: int) -> None:
        self.free[device] -= need
        self.load[device] += need


def hash_fraction(*parts: object) -> int:
    """64 bits of SHA-256 over the parts: the same on every node and in every run, unlike `hash`."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def search(ground: Ground, wishes: Sequence[Wish], *, orders: int) -> list[Placed]:
    """The best placement found. What is missing from the result fits nowhere beside the rest."""
    # What even the emptiest device has no room for (most refusals) costs no step.
    items = [
        (index, copy)
        for index, wish in enumerate(wishes)
        if wish.missing > 0
        and any(options and options[0].need <= free for options, free in zip(wish.options, ground.free, strict=True))
        for copy in range(wish.missing)
    ]
    if not items:
        return []
    sizes = {
        index: min(options[0].need for options in wishes[index].options if options)
        for index in {index for index, _ in items}
    }
    if len(sizes) == 1:
        orders = 2  # of replicas of one model there is one order
    best: list[Placed] = []
    best_score: Score | None = None
    for number in range(max(2, min(orders, STEPS_MOST // (len(items) * len(ground.free))))):
        # Two rules a seed: packing tightest places most, the preferences choose well where memory is plenty.
        order = _order(wishes, items, sizes, number // 2)
        placed, filling = _fill(ground, wishes, order, tightest=number % 2 == 1)
        if best_score is not None and _counts(wishes, placed) < best_score[0]:
            continue
        _upgrade(wishes, placed, filling)
        score = _score(ground, wishes, placed)
        if best_score is None or score > best_score:
            best, best_score = placed, score
    return _improve(ground, wishes, best)


def _order(wishes: Sequence[Wish], items: list[tuple[int, int]], sizes: Mapping[int, int], seed: int) -> list[int]:
    """Wish indices in the order to place: priority first; then seed 0 by size, even seeds about by size, odd ones by hash alone."""

    def key(item: tuple[int, int]) -> tuple[int, int, int]:
        index, copy = item
        wish = wishes[index]
        size = sizes[index]
        noise = hash_fraction(seed, wish.name, copy)
        if seed == 0:
            return (-wish.priority, -size, noise)
        if seed % 2 == 0:
            return (-wish.priority, -size * (2**32 + (noise >> 32)), noise)
        return (-wish.priority, 0, noise)

    return [index for index, _ in sorted(items, key=key)]


def _fill(ground: Ground, wishes: Sequence[Wish], order: list[int], *, tightest: bool) -> tuple[list[Placed], _Filling]:
    """Place each replica by its smallest variant: what is left over is for better variants afterwards (`_upgrade`)."""
    filling = _Filling.empty(ground)
    beside = [list(wish.beside) for wish in wishes]
    placed: list[Placed] = []
    for index in order:
        find = _tightest if tightest else _preferred
        device = find(ground, wishes[index], filling, beside[index])
        if device >= 0:
            option = wishes[index].options[device][0]
            filling.take(device, option.need)
            beside[index][ground.node[device]] += 1
            placed.append(Placed(index, device, option))
    return placed, filling


def _tightest(ground: Ground, wish: Wish, filling: _Filling, beside: list[int]) -> int:
    """The device with the least left over, ties by rank; -1: none has room."""
    best, least = -1, 0
    free = filling.free
    for device, options in enumerate(wish.options):
        if not options:
            continue
        left = free[device] - options[0].need
        if left < 0:
            continue
        if best < 0 or left < least or (left == least and wish.rank[device] < wish.rank[best]):
            best, least = device, left
    return best


def _preferred(ground: Ground, wish: Wish, filling: _Filling, beside: list[int]) -> int:
    """The device that the preferences choose: fewest neighbours, a GPU, a small card for embeddings, the lightest load; -1: none has room.

    Written out with the dearest comparison last: this is the inner loop of every plan.
    """
    best = -1
    best_key: tuple[int, ...] = ()
    free, load, node, gpu, strength = filling.free, filling.load, ground.node, ground.gpu, ground.strength
    for device, options in enumerate(wish.options):
        if not options:
            continue
        need = options[0].need
        if free[device] < need:
            continue
        first = (beside[node[device]], 0 if gpu[device] else 1, 0 if wish.chat else strength[device])
        if best >= 0 and first > best_key[:3]:
            continue
        key = (*first, (2 * load[device] + need) * need // strength[device])
        if best < 0 or key < best_key or (key == best_key and wish.rank[device] < wish.rank[best]):
            best, best_key = device, key
    return best


def _upgrade(wishes: Sequence[Wish], placed: list[Placed], filling: _Filling) -> None:
    """Give each replica the best variant that the memory left over allows, in the order of placing (priority first)."""
    for one in placed:
        for option in wishes[one.wish].options[one.device]:
            more = option.need - one.option.need
            if option.quality > one.option.quality and more <= filling.free[one.device]:
                filling.take(one.device, more)
                one.option = option


def _counts(wishes: Sequence[Wish], placed: list[Placed]) -> tuple[int, ...]:
    priorities = sorted({wish.priority for wish in wishes}, reverse=True)
    counts = dict.fromkeys(priorities, 0)
    for one in placed:
        counts[wishes[one.wish].priority] += 1
    return tuple(counts.values())


def _score(ground: Ground, wishes: Sequence[Wish], placed: list[Placed]) -> Score:
    load = list(ground.load)
    beside = [list(wish.beside) for wish in wishes]
    shared = chat_gpu = other_gpu = small = 0
    quality = 0.0
    for one in placed:
        wish = wishes[one.wish]
        node = ground.node[one.device]
        shared += beside[one.wish][node]
        beside[one.wish][node] += 1
        load[one.device] += one.option.need
        quality += one.option.quality
        if wish.chat:
            chat_gpu += ground.gpu[one.device]
        else:
            other_gpu += ground.gpu[one.device]
            small += ground.strength[one.device]
    # The square makes a second model on a card dearer than a first one on the next; division lets larger cards carry more.
    balance = sum(bytes_there * bytes_there // ground.strength[device] for device, bytes_there in enumerate(load))
    return (_counts(wishes, placed), -shared, chat_gpu, other_gpu, round(quality, 6), -small, -balance)


def _improve(ground: Ground, wishes: Sequence[Wish], placed: list[Placed]) -> list[Placed]:
    """Move single replicas while that raises the score. Each move raises it, so this ends; four rounds bound the time.

    A candidate's score is the present one and the differences at its two devices: the same numbers as `_score` of the whole.
    """
    devices = len(ground.free)
    steps = 0
    for _ in range(4):
        steps += len(placed) * devices
        if steps > IMPROVE_STEPS_MOST and steps > len(placed) * devices:
            break
        if not _improve_once(ground, wishes, placed):
            break
    return placed


def _improve_once(ground: Ground, wishes: Sequence[Wish], placed: list[Placed]) -> bool:
    """One round over all replicas; whether any moved."""
    free, load = list(ground.free), list(ground.load)
    beside = [list(wish.beside) for wish in wishes]
    quality = 0.0
    for one in placed:
        free[one.device] -= one.option.need
        load[one.device] += one.option.need
        beside[one.wish][ground.node[one.device]] += 1
        quality += one.option.quality
    strength, gpu, node = ground.strength, ground.gpu, ground.node
    moved = False
    for one in placed:
        wish, home, kept = wishes[one.wish], one.device, one.option
        near = beside[one.wish]
        free[home] += kept.need
        load[home] -= kept.need
        near[node[home]] -= 1
        others = quality - kept.quality

        best: tuple[int, int, float, int, int] | None = None
        choice = (home, kept)
        for device, option in _candidates(wish, free, home, kept):
            there, neighbours = load[device], near[node[device]]
            if best is not None and -neighbours < best[0]:
                continue
            # What of the score depends on this one replica's place.
            found = (
                -neighbours,
                int(gpu[device]),
                round(others + option.quality, 6),
                0 if wish.chat else -strength[device],
                there**2 // strength[device] - (there + option.need) ** 2 // strength[device],
            )
            if best is None or found > best:
                best, choice = found, (device, option)
        device, option = choice
        moved = moved or choice != (home, kept)
        one.device, one.option = device, option
        quality = others + option.quality
        free[device] -= option.need
        load[device] += option.need
        near[node[device]] += 1
    return moved


def _candidates(wish: Wish, free: list[int], home: int, kept: Option) -> Iterator[tuple[int, Option]]:
    """Where a replica may be, its present place first: another one must be better, not as good."""
    yield home, kept
    for device, options in enumerate(wish.options):
        room = free[device]
        for option in options:
            if option.need > room:
                break
            yield device, option
