"""Which models, and which of their variants, can be planned in this mesh: where a file is, or can be had.

Law of this file: pure; it reads adverts and wishes and places nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tars.core.records import NodeAdvert, Wish
from tars.core.types import ModelEntry, NodeId, Variant


@dataclass(frozen=True, slots=True)
class Plannable:
    """What can be planned. A wanted model without any file is in `without_file`, with its whole entry."""

    models: dict[str, ModelEntry] = field(default_factory=dict)
    without_file: dict[str, ModelEntry] = field(default_factory=dict)
    holders: dict[str, frozenset[NodeId]] = field(default_factory=dict)
    """By model: nodes that have a file of it, or have it loaded."""


def known_models(
    catalogue: Mapping[str, ModelEntry], adverts: Iterable[NodeAdvert], wishes: Iterable[Wish]
) -> dict[str, ModelEntry]:
    """Every entry by name: the catalogue's, else a node's own, else that of a wish. Nodes' entries of one name count by node id."""
    found: dict[str, ModelEntry] = {}
    for advert in sorted(adverts, key=lambda advert: advert.node.id):
        for entry in advert.models:
            found.setdefault(entry.name, entry)
    for wish in wishes:
        if wish.entry is not None:
            found.setdefault(wish.entry.name, wish.entry)
    return {**catalogue, **found}


def plannable(
    catalogue: Mapping[str, ModelEntry], adverts: Sequence[NodeAdvert], wishes: Sequence[Wish], *, hub: bool
) -> Plannable:
    """The wanted models with the variants that some live node has, runs, or can fetch from the hub."""
    models = known_models(catalogue, adverts, wishes)
    names = {alias.casefold(): entry.name for entry in models.values() for alias in (*entry.aliases, entry.name)}
    there: dict[str, dict[str, set[NodeId]]] = {}
    for advert in adverts:
        node = advert.node.id
        for file in advert.files:
            there.setdefault(file.model, {}).setdefault(file.variant, set()).add(node)
        for report in advert.replicas:
            # A share that is away for a moment unloads nothing.
            assignment = report.assignment
            there.setdefault(assignment.model, {}).setdefault(assignment.variant, set()).add(node)
    found = Plannable()
    for wish in wishes:
        asked = wish.deployment.model
        entry = models.get(asked) or models.get(names.get(asked.casefold(), ""))
        if entry is None or entry.name in found.models:
            continue
        held = there.get(entry.name, {})
        variants = tuple(each for each in entry.variants if each.name in held or (hub and _on_hub(each)))
        if entry.variants and not variants:
            found.without_file[entry.name] = entry
            continue
        found.models[entry.name] = replace(entry, variants=variants)
        found.holders[entry.name] = frozenset(node for each in variants for node in held.get(each.name, ()))
    return found


def _on_hub(variant: Variant) -> bool:
    return variant.repo is not None and variant.file is not None
