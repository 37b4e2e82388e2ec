"""Messages in, rich renderables out: everything that the command line shows.

Law of this file: no node, no network, no clock, no printing. A function takes a message and returns what a console draws, so a test
compares text. Text that came over the wire goes through `plain` and never through rich's markup or the terminal's control codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tars.core.types import Bytes
from tars.messages.files import TransferDescription
from tars.messages.inference import ChatResult, EmbedResult, RerankResult
from tars.messages.mesh_state import MeshReplica
from tars.messages.node import DeviceDescription, ModelDescription, ModelsResult, ReplicaDescription

BAR_CELLS = 24
"""Cells of a memory bar: 1/24 is about 4 %, and the table still fits 100 columns."""

SHOWN_VALUES = 6
"""Values of a vector that are shown: enough to see that it is one, on one line."""

SHOWN_PAIRS = 12
"""Texts in the similarity table at most; a 13th column no longer fits 100 columns."""

STATE_STYLES = {
    "ready": "green",
    "loading": "yellow",
    "starting": "yellow",
    "restarting": "yellow",
    "stopping": "yellow",
    "draining": "yellow",
    "refused": "red",
    "failed": "red",
    "stopped": "red",
    "available": "dim",
}


def plain(text: str) -> str:
    """`text` without control characters but newline and tab: a model's answer must not drive the reader's terminal."""
    return "".join(
        character
        for character in text
        if character in "\n\t" or not (ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0)
    )


def cell(text: object, style: str = "") -> Text:
    """Text of a table's cell: no markup, no control characters, folded rather than cut."""
    return Text(plain(str(text)), style=style, overflow="fold")


def state_cell(state: str) -> Text:
    """A state in its colour."""
    return cell(state, STATE_STYLES.get(state, ""))


def table_of(*columns: str, right: Iterable[str] = ()) -> Table:
    """A borderless table; the columns named in `right` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    return table


def device_label(name: str, simulated: bool = False) -> str:
    """A device's name for a narrow column; a simulated one is always labelled so."""
    # Every NVIDIA card begins with the maker's name: six columns that tell nothing apart.
    short = name.removeprefix("NVIDIA ")
    return f"{short} (simulated)" if simulated else short


def duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 5 min`, `4 d 1 h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def memory_bar(device: DeviceDescription) -> Text:
    """Held by TARS, used by others, free, as one bar of `BAR_CELLS` cells."""
    total = max(1, device.memory_total_bytes)
    used = min(total, max(0, total - device.memory_free_bytes))
    held_cells = round(BAR_CELLS * min(device.memory_held_bytes, total) / total)
    other_cells = round(BAR_CELLS * max(0, used - device.memory_held_bytes) / total)
    other_cells = min(other_cells, BAR_CELLS - held_cells)
    bar = Text()
    bar.append("█" * held_cells, style="cyan")
    bar.append("▒" * other_cells, style="yellow")
    bar.append("░" * (BAR_CELLS - held_cells - other_cells), style="dim")
    return bar


def replica_progress(replica: ReplicaDescription | MeshReplica) -> str:
    """`ready`, or `loading: read 40 %`."""
    if replica.progress is None or replica.state in {"ready", "failed", "stopped"}:
        return replica.state
    return f"{replica.state}: {replica.progress.stage} {replica.progress.percent:.0f} %"


def transfer_progress(transfer: TransferDescription) -> str:
    """How a transfer stands, in words."""
    if transfer.note and transfer.stage == "look":
        return plain(transfer.note)
    if transfer.stage == "verify":
        return "verifying"
    if transfer.stage != "fetch":
        return "looking for it"
    text = f"{Bytes(transfer.bytes_done)} of {Bytes(transfer.bytes_total)}, {Bytes(int(transfer.bytes_per_second))}/s"
    if transfer.sources:
        text += f" from {', '.join(plain(source) for source in transfer.sources)}"
    return text + (f" ({plain(transfer.note)})" if transfer.note else "")


def not_served(models: ModelsResult) -> list[str]:
    """Deployed models that are refused or have failed: a node's description shows replicas, and these may have none."""
    return [model.name for model in models.models if model.deployed and model.state in {"refused", "failed"}]


def not_served_view(names: Sequence[str]) -> Group:
    """One line for each of `not_served`."""
    return Group(
        *(
            Text.assemble(("not served ", "bold red"), plain(name), f": `tars explain {plain(name)}` says why")
            for name in names
        )
    )


def devices_table(devices: Sequence[DeviceDescription]) -> Table:
    """One line a device, with its memory as a bar."""
    table = table_of("device", "memory", "TARS", "free", "total", "precision", "state", right=("TARS", "free", "total"))
    for device in devices:
        state = []
        if device.utilisation_percent is not None:
            state.append(f"{device.utilisation_percent} % busy")
        if device.temperature_celsius is not None:
            state.append(f"{device.temperature_celsius} °C")
        if device.compute_capability is not None:
            state.append(f"cc {device.compute_capability}")
        table.add_row(
            cell(device_label(device.name, device.simulated)),
            memory_bar(device),
            cell(Bytes(device.memory_held_bytes)),
            cell(Bytes(device.memory_free_bytes)),
            cell(Bytes(device.memory_total_bytes)),
            cell(device.precision),
            cell(", ".join(state) or "-"),
        )
    return table


def speed_of(replica: ReplicaDescription) -> str:
    """As the replica measured itself after its load."""
    if replica.info is None:
        return "-"
    speeds = replica.info.speeds
    if speeds.decode_tokens_per_second is not None:
        return f"{speeds.decode_tokens_per_second:.0f} tokens/s"
    if speeds.texts_per_second is not None:
        return f"{speeds.texts_per_second:.0f} texts/s"
    return "-"


def models_view(models: ModelsResult) -> RenderableType:
    """`tars models`: deployed ones first, as the node orders them."""
    if not models.models:
        return Text("this node knows no model")
    table = table_of("model", "kind", "state", "replicas", "on", "variants", "file here", "description")
    for model in models.models:
        replicas = f"{model.replicas_ready}/{model.replicas_wanted}" if model.deployed else "-"
        table.add_row(
            cell(model.name),
            cell(model.model_kind),
            state_cell(model.state),
            cell(replicas),
            cell(places_of(model)),
            cell(", ".join(model.variants)),
            cell("yes" if model.local else "no"),
            cell(model.description),
        )
    return table


def places_of(model: ModelDescription) -> str:
    """`pc1, pc2 (loading)`: the nodes that have it, or will."""
    found: dict[str, list[str]] = {}
    for place in model.places:
        found.setdefault(place.node_name, []).append(place.state)
    words = []
    for name, states in sorted(found.items()):
        others = [state for state in states if state != "ready"]
        times = f" x{len(states)}" if len(states) > 1 else ""
        words.append(f"{name}{times}" + (f" ({', '.join(dict.fromkeys(others))})" if others else ""))
    return ", ".join(words) or "-"


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Cosine of the angle between two vectors of the same length; 0 where one of them is null."""
    norms = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(y * y for y in other))
    return sum(x * y for x, y in zip(one, other, strict=True)) / norms if norms else 0.0


def embeddings_view(result: EmbedResult, texts: Sequence[str]) -> Group:
    """`tars embed`: dimensions, the first values of each vector, the cosine of each pair where there are several.

    `result` must hold floats (`encoding_format="float"`), one vector for each of `texts`.
    """
    vectors = [[float(value) for value in vector] for vector in result.embeddings]
    head = Text(
        f"{plain(result.model)}: {len(vectors)} x {result.dimensions} dimensions, {result.usage.prompt_tokens} tokens"
    )
    rows = table_of("#", "text", "first values")
    for place, (text, vector) in enumerate(zip(texts, vectors, strict=True), start=1):
        shown = " ".join(f"{value:+.3f}" for value in vector[:SHOWN_VALUES])
        cut = " (cut at the model's limit)" if place - 1 in result.truncated else ""
        rows.add_row(cell(place), cell(_short(text) + cut), cell(f"{shown} ..."))
    parts: list[RenderableType] = [head, rows]
    if 1 < len(vectors) <= SHOWN_PAIRS:
        columns = [str(place + 1) for place in range(len(vectors))]
        pairs = table_of("cosine", *columns, right=columns)
        for place, one in enumerate(vectors):
            pairs.add_row(cell(place + 1), *(cell(f"{cosine(one, other):.2f}") for other in vectors))
        parts += [Text(), pairs]
    elif len(vectors) > SHOWN_PAIRS:
        parts.append(Text(f"similarities are shown for up to {SHOWN_PAIRS} texts; `--json` gives all vectors"))
    return Group(*parts)


def rerank_view(result: RerankResult, documents: Sequence[str]) -> Group:
    """`tars rerank`: score and text of each document, best first; `documents` are those that were asked about."""
    head = Text(f"{plain(result.model)}: {len(documents)} documents, {result.usage.prompt_tokens} tokens")
    rows = table_of("#", "score", "document", right=("score",))
    for scored in result.results:
        cut = " (cut at the model's limit)" if scored.index in result.truncated else ""
        rows.add_row(
            cell(scored.index + 1), cell(f"{scored.score:.4f}"), cell(_short(documents[scored.index], 80) + cut)
        )
    return Group(head, rows)


def _short(text: str, width: int = 48) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def chat_footer(result: ChatResult) -> Text:
    """Who answered, how long it was and how fast; drawn dim under an answer on a terminal."""
    served = result.served_by
    parts = [
        plain(result.model),
        f"on {plain(device_label(served.device, served.simulated))}",
        f"{result.usage.completion_tokens} tokens",
    ]
    if result.timings.first_token_ms is not None:
        parts.append(f"first after {result.timings.first_token_ms:.0f} ms")
    if result.timings.tokens_per_second is not None:
        parts.append(f"{result.timings.tokens_per_second:.0f} tokens/s")
    if result.finish_reason == "length":
        parts.append("cut at max tokens")
    return Text(f"[{', '.join(parts)}]", style="dim")
