"""The planner against OR-Tools' CP-SAT, which finds the optimum and takes its time: the oracle, never a dependency of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fleets import MODELS, check_plan, random_fleet

from tars.core.placement import plan
from tars.core.placement_cost import cost_on
from tars.core.types import Deployment, NodeSnapshot

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

FLEETS = 100
FAST_FLEETS = 16
SHARE = 0.97
"""Issue 2: the planner places at least this share of what the optimum places."""
SECONDS_PER_FLEET = 1.0
"""Nearly all are proven optimal in milliseconds; where time runs out the oracle's upper bound counts, which is against the planner."""


def most_replicas(nodes: list[NodeSnapshot], wanted: list[Deployment]) -> int:
    """How many replicas fit, counted with each model's smallest variant: quality never costs a replica."""
    from ortools.sat.python import cp_model  # takes a second, which the collection of other tests need not wait for

    model = cp_model.CpModel()
    devices = [device for each in nodes for device in each.devices]
    placed = []
    used: dict[str, list[cp_model.LinearExpr]] = {device.id: [] for device in devices}
    for deployment in wanted:
        entry = MODELS[deployment.model]
        counts = []
        for device in devices:
            need = min(cost_on(device, entry, variant, deployment, {}).need for variant in entry.variants)
            count = model.new_int_var(0, min(deployment.replicas, device.capacity // need), "")
            used[device.id].append(count * int(need))
            counts.append(count)
        model.add(sum(counts) <= deployment.replicas)
        placed += counts
    for device in devices:
        model.add(sum(used[device.id]) <= int(device.capacity))
    model.maximize(sum(placed))
    solver = cp_model.CpSolver()
    # One worker, counted work instead of time where it can: the same answer on every machine.
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = SECONDS_PER_FLEET
    status = solver.solve(model)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return round(solver.objective_value if status == cp_model.OPTIMAL else solver.best_objective_bound)


@pytest.mark.parametrize("seeds", [range(FAST_FLEETS), pytest.param(range(FLEETS), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("fill", [0.8, 1.1])
def test_the_planner_places_nearly_what_the_optimum_places(fill: float, seeds: range) -> None:
    by_planner = by_oracle = 0
    for seed in seeds:
        nodes, wanted = random_fleet(seed, fill=fill)
        made = plan(nodes, MODELS, wanted)
        check_plan(made, nodes, wanted)
        best = most_replicas(nodes, wanted)
        assert len(made.assignments) <= best, f"fleet {seed}: more than the optimum means that bytes were miscounted"
        by_planner += len(made.assignments)
        by_oracle += best
    assert by_oracle > len(seeds)
    assert by_planner >= SHARE * by_oracle, f"{by_planner} of {by_oracle}"
