"""Why a healthy replica would move, and since when: programs crowd its device, a model is refused that would fit in its place, or its node
has its model more than once while another one has room.

Law of this file: pure; the time is told. It finds the one move that is due and begins none. A reason must have lasted, so that a PC that is
switched on and a program that starts and ends again move nothing; and nothing is due while anything loads, ends or is ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from tars.core.coordination_view import CoordinationSettings, Scene
from tars.core.crowded_devices import CrowdedDevices
from tars.core.making_room import Ground, Relocation, Room
from tars.core.placement_wants import Circumstances, Load
from tars.core.types import Assignment, DeviceId, NodeId, Plan, ReplicaState

_Key = TypeVar("_Key")


class DueMove(NamedTuple):
    """A replica with the device that takes it, and what that is good for, as part of a sentence."""

    home: Relocation
    gain: str


class ReasonsToMove:
    """See the module's law. `note` at every decision, `due` where no other move is under way."""

    def __init__(self, settings: CoordinationSettings):
        self._settings = settings
        self._crowded = CrowdedDevices(settings.crowd_free, settings.crowd_growth)
        self._refused_since: dict[str, float] = {}
        self._huddled_since: dict[str, float] = {}

    def note(self, scene: Scene) -> None:
        """Take in what the nodes report."""
        self._crowded.note(scene)

    def due(
        self,
        scene: Scene,
        found: Plan,
        circumstances: Circumstances,
        failed_lately: Mapping[Load, str],
        worth: Callable[[Assignment], float],
    ) -> DueMove | None:
        """The move that weighs most of those whose reason has lasted; None where there is none, or something is in motion.

        `found` is the plan as it is. Of two replicas of a model that are together the one of the smaller `worth` moves, and not to where
        a load of it is among `failed_lately`: it need not move.
        """
        settings, now = self._settings, scene.now
        healthy = [each for each in found.assignments if scene.state(each) is ReplicaState.READY]
        wanted = [refusal.model for refusal in found.refusals if refusal.model in scene.wanted]
        self._refused_since = {model: self._refused_since.get(model, now) for model in wanted}
        refused = _lasting(self._refused_since, settings.move_hold, now)
        crowded = _lasting(self._crowded.since, settings.crowd_hold, now)
        huddled: dict[str, Relocation] = {}
        if together := _together(healthy):
            untried = _ground(scene, found, replace(circumstances, bars=failed_lately))
            for model, replicas in together.items():
                if home := untried.apart(min(replicas, key=lambda each: (worth(each), each.replica))):
                    huddled[model] = home
        self._huddled_since = {model: self._huddled_since.get(model, now) for model in huddled}
        apart = _lasting(self._huddled_since, settings.spread_hold, now)
        if not (refused or crowded or apart) or not _at_rest(scene, found):
            return None
        ground = _ground(scene, found, circumstances)
        return (
            self._makes_way(crowded, healthy, scene, ground)
            or self._makes_room(refused, healthy, scene, ground)
            or self._parts({model: huddled[model] for model in apart}, scene)
        )

    def ends(self) -> Iterator[float]:
        """When each reason will have lasted."""
        settings = self._settings
        yield from (since + settings.crowd_hold for since in self._crowded.since.values())
        yield from (since + settings.move_hold for since in self._refused_since.values())
        yield from (since + settings.spread_hold for since in self._huddled_since.values())

    # --- the three reasons -------------------------------------------------------------------------------------------

    def _makes_way(
        self, crowded: Iterable[DeviceId], healthy: Iterable[Assignment], scene: Scene, ground: Ground
    ) -> DueMove | None:
        """For a program that needs more of a device."""
        for device in sorted(crowded):
            here = [each for each in healthy if each.device == device]
            for each in sorted(here, key=lambda each: (scene.wanted[each.model][0].priority, each.replica)):
                if (home := ground.elsewhere(each)) is not None:
                    gain = f"gives {each.memory.total} of {scene.place(device)} to a program that needs more there"
                    return DueMove(home, gain)
        return None

    def _makes_room(
        self, refused: Iterable[str], healthy: Iterable[Assignment], scene: Scene, ground: Ground
    ) -> DueMove | None:
        """For a model that fits nowhere else."""
        movable = {each.replica: each for each in healthy}
        for model in _most_urgent_first(refused, scene):
            room = ground.for_model(model, movable, self._settings.move_margin)
            if room is not None:
                return DueMove(room.moves[0], _gain_of(model, room, scene))
        return None

    @staticmethod
    def _parts(apart: Mapping[str, Relocation], scene: Scene) -> DueMove | None:
        """So that a model outlives its node."""
        if not apart:
            return None
        model = _most_urgent_first(apart, scene)[0]
        home = apart[model]
        source = scene.home[home.assignment.node].name
        gain = f"{model} is on {source} more than once, and {home.node.name} goes on with it when {source} dies"
        return DueMove(home, gain)


def _ground(scene: Scene, found: Plan, circumstances: Circumstances) -> Ground:
    return Ground(scene.nodes, found.assignments, scene.wanted, scene.view.measured, circumstances)


def _at_rest(scene: Scene, found: Plan) -> bool:
    """Everything that is planned runs, everything that is ordered is planned, and no device's memory is in motion."""
    return (
        all(scene.state(each) is not None for each in found.assignments)
        and scene.ordered.keys() <= {each.replica for each in found.assignments}
        and not scene.in_motion()
    )


def _together(replicas: Iterable[Assignment]) -> dict[str, list[Assignment]]:
    """By model: its replicas on the first node that has more than one of them."""
    places: dict[tuple[str, NodeId], list[Assignment]] = {}
    for each in sorted(replicas, key=lambda each: each.replica):
        places.setdefault((each.model, each.node), []).append(each)
    found: dict[str, list[Assignment]] = {}
    for (model, _), here in places.items():
        if len(here) > 1:
            found.setdefault(model, here)
    return found


def _lasting(since: Mapping[_Key, float], hold: float, now: float) -> list[_Key]:
    # In the same arithmetic as `ends`, so that whoever wakes then finds it so.
    return [key for key, began in since.items() if now >= began + hold]


def _most_urgent_first(models: Iterable[str], scene: Scene) -> list[str]:
    return sorted(models, key=lambda model: (-scene.wanted[model][0].priority, model))


def _gain_of(model: str, room: Room, scene: Scene) -> str:
    return f"makes room for {model}, which fits nowhere else and needs {room.need} of {scene.place(room.device.id)}"
