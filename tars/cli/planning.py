"""`tars plan` and `tars explain`: the running node's plan, or that of a fleet that is not there.

Law of this file: it reads files and asks the client; planning itself is `core.placement`'s, the words `core.explanation`'s, the
messages `mesh.plan_report`'s. A fleet from files answers with the same messages as a node, so that both are shown alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from tars.catalogue import Catalogue
from tars.cli.connection import Connection, Exit, ask, connection_options, pass_connection, print_answer
from tars.cli.output import plain
from tars.cli.plan_output import explain_view, plan_view
from tars.core.explanation import explain as explain_words
from tars.core.placement import plan as place
from tars.core.tuning import SLOTS
from tars.core.types import Deployment, ModelKind, NodeSnapshot
from tars.errors import ConfigError
from tars.mesh.plan_report import describe_assignment, describe_verdict, fleet_from_configs, plan_result
from tars.messages.node import ExplainResult, PlanResult


@dataclass(frozen=True, slots=True)
class Fleet:
    """PCs that exist only as configuration files, and what those want deployed."""

    nodes: tuple[NodeSnapshot, ...]
    deployments: tuple[Deployment, ...]
    catalogue: Catalogue
    context: int | None = None
    """Tokens for every chat model, instead of what the files say."""

    @classmethod
    def read(cls, paths: Sequence[Path], context: int | None) -> Fleet:
        """Raises `ConfigError` for a file that cannot be used."""
        nodes, deployments, catalogue = fleet_from_configs(paths)
        return cls(tuple(nodes), tuple(deployments), catalogue, context)

    def plan(self) -> PlanResult:
        """What `mesh.plan` would answer. Raises `ConfigError` where no file deploys anything."""
        if not self.deployments:
            raise ConfigError(
                "None of these files says which model should run, so there is nothing to plan. "
                'Add [[deploy]] with model = "..." to one of them, or ask about one model with --explain MODEL.'
            )
        wanted = [self._with_context(deployment) for deployment in self.deployments]
        return plan_result(place(self.nodes, self.catalogue.entries, wanted), self.nodes)

    def explain(self, model: str) -> ExplainResult:
        """What `mesh.explain` would answer; a model that no file deploys is explained as if one did. Raises `UnknownModel`."""
        entry = self.catalogue.resolve(model)
        deployed = any(self.catalogue.find(each.model) is entry for each in self.deployments)
        wanted = [*self.deployments, *([] if deployed else [Deployment(entry.name)])]
        plan = place(self.nodes, self.catalogue.entries, [self._with_context(each) for each in wanted])
        return ExplainResult(
            model=entry.name,
            deployed=deployed,
            assignments=[
                describe_assignment(each, self.nodes) for each in plan.assignments if each.model == entry.name
            ],
            verdicts=[describe_verdict(verdict, self.nodes) for verdict in plan.verdicts.get(entry.name, ())],
            remedy=next((each.remedy for each in plan.refusals if each.model == entry.name), None),
            replicas=[],
            text=explain_words(entry.name, plan, self.nodes),
        )

    def _with_context(self, deployment: Deployment) -> Deployment:
        entry = self.catalogue.find(deployment.model)
        if self.context is None or entry is None or entry.kind is not ModelKind.CHAT:
            return deployment
        # What the file says of the cache may not go with another context: at least one, at most one a slot.
        most = self.context * (deployment.slots or SLOTS)
        kv_tokens = deployment.kv_tokens and min(max(deployment.kv_tokens, self.context), most)
        return replace(deployment, context=self.context, kv_tokens=kv_tokens)


@click.command()
@click.option(
    "--node",
    "nodes",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Configuration of a PC of the fleet; once for each PC. No node needs to run.",
)
@click.option("--explain", "model", metavar="MODEL", help="Why MODEL goes there, and not elsewhere.")
@click.option(
    "--context",
    type=click.IntRange(64, 1_048_576),
    help="Plan every chat model with this context (tokens); needs --node.",
)
@connection_options
@pass_connection
def plan(connection: Connection, nodes: tuple[Path, ...], model: str | None, context: int | None) -> int:
    """Show which model goes on which device, and why.

    With --node, plan a fleet that is not there from its configuration files:

      tars plan --node node_configs/pc1-rtx3060.toml --node node_configs/pc2-gtx1660s.toml

    Without it, ask the running node for the plan in force.
    """
    if context is not None and not nodes:
        raise click.UsageError("--context needs --node: the running node's contexts are set when a model is deployed")
    if model is not None:
        explanation = (
            Fleet.read(nodes, context).explain(model)
            if nodes
            else ask(connection, lambda client: client.explain(model))
        )
        print_answer(connection, explanation, lambda: explain_view(explanation))
        return Exit.OK
    result = Fleet.read(nodes, context).plan() if nodes else ask(connection, lambda client: client.plan())
    print_answer(connection, result, lambda: plan_view(result))
    return Exit.OK


@click.command()
@click.argument("model")
@click.argument("id", required=False)
@connection_options
@pass_connection
def explain(connection: Connection, model: str, id: str | None) -> int:
    """Say where the running node placed MODEL, why there and why not elsewhere; or what became of a call:

      tars explain call ID

    The ID is the X-Request-Id of an answer, `served_by.call` of a result, or the trace id of an error. Any node of the mesh may be asked.
    """
    if id is not None:
        if model != "call":
            raise click.UsageError("one model at a time: tars explain MODEL; a call: tars explain call ID")
        found = ask(connection, lambda client: client.explain_call(id))
        print_answer(connection, found, lambda: plain(found.text))
        return Exit.OK
    explanation = ask(connection, lambda client: client.explain(model))
    print_answer(connection, explanation, lambda: explain_view(explanation))
    return Exit.OK
