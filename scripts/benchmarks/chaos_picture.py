"""The page of `scripts/bench chaos`: what happened as a table, and a picture of latency over time with the faults marked.

Law of this file: pure; the benchmark's JSON in, one HTML file out that needs no other file and no script, readable on a light and a dark
screen. Colours tell kinds of faults apart, and so does the letter in each mark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, LEFT, RIGHT = 1160, 64, 12
LANE, LATENCY_HEIGHT, GAP_HEIGHT = 22, 220, 150
BINS = 232
"""Five pixels each."""
MARKS: Mapping[str, tuple[str, str]] = {
    "node killed": ("K", "red"),
    "coordinator killed": ("C", "red"),
    "worker killed": ("W", "orange"),
    "PC frozen": ("F", "blue"),
    "worker frozen": ("f", "blue"),
    "cable pulled": ("L", "violet"),
    "packets swallowed": ("S", "violet"),
    "rolling restart": ("R", "green"),
    "5x overload": ("O", "grey"),
}
STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #16202a; --muted: #55616e; --line: #d9dfe5;
  --p50: #0a746e; --most: #b4540a; --dot: #b4540a; --aim: #a8201a;
  --red: #c4302b; --orange: #b8650a; --blue: #2563b0; --violet: #7a3fb0; --green: #23794a; --grey: #5d6874; --bad: #a8201a;
  --good: #146c3f; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1318; --card: #161d24; --text: #e5ebf1; --muted: #98a6b4; --line: #2b3641;
  --p50: #45c4b6; --most: #f0a35a; --dot: #f0a35a; --aim: #ff8f86;
  --red: #ff837b; --orange: #f0a35a; --blue: #7db4ff; --violet: #c79bff; --green: #66cf95; --grey: #a3b0bd; --bad: #ff8f86;
  --good: #66cf95; } }
body { margin: 0 auto; max-width: 1220px; padding: 24px 18px 60px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.45rem; margin: 0 0 4px; } h2 { font-size: 1.05rem; margin: 28px 0 8px; } p { margin: 4px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; overflow-x: auto; }
.muted, figcaption { color: var(--muted); } figure { margin: 0; } figcaption { margin-top: 6px; font-size: .87rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 10px; margin: 14px 0; }
.numbers b { display: block; font-size: 1.5rem; line-height: 1.2; } .numbers span { color: var(--muted); font-size: .84rem; }
.bad { color: var(--bad); } .good { color: var(--good); } .key { display: inline-block; margin-right: 16px; white-space: nowrap; }
.key i { display: inline-block; width: 18px; height: 18px; border-radius: 4px; margin-right: 5px; text-align: center;
  font: 600 12px/18px system-ui, sans-serif; color: var(--card); }
svg { display: block; min-width: 760px; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--muted); }
svg .mark { font-weight: 700; fill: var(--card); } svg .grid { stroke: var(--line); }
svg .title { fill: var(--text); font-weight: 600; font-size: 12px; }
"""


def page(result: Mapping[str, Any]) -> str:
    """The whole HTML file, of what `scripts/bench chaos --json` writes."""
    summary = result.get("summary")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>TARS: chaos, seed {result['seed']}, {html.escape(result['mode'])}</title><style>{STYLE}</style></head><body>",
        "<h1>Three nodes, and everything that can happen to them</h1>",
    ]
    if summary is not None:
        links = "with cables pulled" if result["links"] else "on loopback: no cable could be pulled here"
        short = "; it was ended by its time bound" if result["cut_short"] else ""
        rates = result["rates"]
        parts += [
            f'<p class="muted">scripts/bench chaos --mode {html.escape(result["mode"])} --seed {result["seed"]}: '
            f"{len(result['faults'])} faults, "
            f"{links}{short}. Steady load {rates['steady']:.1f} calls/s of the {rates['capacity']:.1f} that the mesh answers.</p>",
            _numbers(summary),
            f'<figure class="card">{picture(result["calls"], result["faults"])}'
            f"<figcaption>{_legend(result['faults'])}</figcaption></figure>",
            "<h2>Faults</h2>",
            _fault_table(summary["faults"]),
        ]
    if result.get("batch"):
        parts += ["<h2>A batch with one of two nodes frozen midway</h2>", _batch(result["batch"])]
    if summary is not None:
        parts += ["<h2>What went wrong</h2>", _problems(summary["problems"])]
    return "\n".join([*parts, "</body></html>", ""])


def _numbers(summary: Mapping[str, Any]) -> str:
    outcomes = summary["by_outcome"]

    def one(value: str, what: str, bad: bool | None = None) -> str:
        shade = "" if bad is None else ' class="bad"' if bad else ' class="good"'
        return f'<div class="card"><b{shade}>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'

    zeros = [
        one(str(number), what, bool(number))
        for what, number in (
            ("lost", outcomes.get("lost", 0)),
            ("wrong", outcomes.get("wrong", 0)),
            ("computed twice", summary["duplicated"]),
        )
    ]
    gap = summary["longest_gap"]
    return '<div class="numbers">' + "".join(
        [
            one(f"{summary['sent']:,}", "calls sent"),
            *zeros,
            one(str(outcomes.get("refused", 0)), "refused to the end (overloaded)"),
            one(str(outcomes.get("late", 0)), "late: refused, let in, and then their 90 s were over"),
            one(str(summary["sent_again"]), "sent again: the gateway was gone"),
            one(f"{summary['added_p50'] * 1000:.0f} ms", "added latency, p50"),
            one(f"{summary['added_p99'] * 1000:.0f} ms", "added latency, p99"),
            one(f"{gap:.2f} s", "longest gap in a stream", gap > 3.0),
        ]
    ) + "</div>"  # fmt: skip


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(calls: Sequence[Mapping[str, Any]], faults: Sequence[Mapping[str, Any]]) -> str:
    """SVG: above a lane a node with its faults, then latency (each bin's median and slowest), then the longest gap in streams."""
    ended = [call for call in calls if call["ended"] is not None and call["phase"] != "warm" and call["sent"] >= 0]
    most = max([call["ended"] for call in ended] + [fault["mended"] or fault["struck"] for fault in faults] + [1.0])
    nodes = [*sorted({fault["node"] for fault in faults if fault["node"] != "all"} | {"a", "b", "c"}), "all"]

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max(seconds, 0.0), most) / most

    top = 10 + LANE * len(nodes)
    latency_top, gap_top = top + 34, top + 34 + LATENCY_HEIGHT + 44
    height = gap_top + GAP_HEIGHT + 34
    latencies = [(call["sent"], call["ended"] - call["sent"]) for call in ended if call["outcome"] == "right"]
    gaps = [(call["sent"], call["gap"]) for call in ended if call["gap"] is not None]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="Faults by node, latency of calls and gaps in streams over time">',
        *_lanes(nodes, faults, x, height - 34),
        *_panel(
            "seconds from sending a call until its answer is whole",
            latencies,
            x,
            most,
            latency_top,
            LATENCY_HEIGHT,
            None,
        ),
        *_panel("longest gap inside a stream, seconds", gaps, x, most, gap_top, GAP_HEIGHT, 3.0),
        *_bad_calls(ended, x, latency_top + LATENCY_HEIGHT),
        *_clock(most, x, height - 16),
        "</svg>",
    ]
    return "".join(parts)


def _lanes(nodes: Sequence[str], faults: Sequence[Mapping[str, Any]], x: Any, bottom: float) -> list[str]:
    parts = []
    for row, node in enumerate(nodes):
        y = 6 + LANE * row
        label = "all" if node == "all" else f"node {node}"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{html.escape(label)}</text>')
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y + LANE - 1}" y2="{y + LANE - 1}"/>')
    for fault in faults:
        letter, colour = MARKS.get(fault["kind"], ("?", "grey"))
        y = 6 + LANE * nodes.index(fault["node"]) + 2
        left = x(fault["struck"])
        over = x(fault["over"] if fault["over"] is not None else fault["struck"])
        mended = max(over, x(fault["mended"] if fault["mended"] is not None else fault["struck"]))
        said = f"{fault['kind']}, {fault['node']}{' ' + fault['model'] if fault['model'] else ''}, at {fault['struck']:.0f} s"
        parts += [
            f"<g><title>{html.escape(said)}</title>",
            f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{y}" y2="{bottom:.1f}" stroke="var(--{colour})" stroke-opacity=".22"/>',
            f'<rect x="{left:.1f}" y="{y + 6}" width="{max(mended - left, 1):.1f}" height="6" fill="var(--{colour})" fill-opacity=".3"/>',
            f'<rect x="{left:.1f}" y="{y + 3}" width="{max(over - left, 1):.1f}" height="12" fill="var(--{colour})" fill-opacity=".65"/>',
            f'<rect x="{left - 6:.1f}" y="{y + 1}" width="13" height="16" rx="3" fill="var(--{colour})"/>',
            f'<text class="mark" x="{left + 0.5:.1f}" y="{y + 13}" text-anchor="middle">{letter}</text></g>',
        ]
    return parts


def _panel(
    title: str, points: Sequence[tuple[float, float]], x: Any, most: float, top: float, height: float, aim: float | None
) -> list[str]:
    """A logarithmic scale, each bin's median as a line and its slowest as dots."""
    parts = [f'<text class="title" x="{LEFT}" y="{top - 8:.1f}">{html.escape(title)}</text>']
    values = [value for _, value in points if value > 0]
    low = 10 ** math.floor(math.log10(max(min(values, default=0.01), 1e-3)))
    high = 10 ** math.ceil(math.log10(max(max(values, default=1.0), aim or 0.0) * 1.02))

    def y(value: float) -> float:
        share = math.log10(max(value, low) / low) / math.log10(high / low)
        return top + height * (1 - share)

    tick = low
    while tick <= high * 1.001:
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
        tick *= 10
    bins: dict[int, list[float]] = {}
    for at, value in points:
        bins.setdefault(min(int(at / most * BINS), BINS - 1), []).append(value)
    line, dots = [], []
    for number in sorted(bins):
        found = sorted(bins[number])
        middle = x((number + 0.5) * most / BINS)
        line.append(f"{middle:.1f},{y(found[len(found) // 2]):.1f}")
        dots.append(f'<circle cx="{middle:.1f}" cy="{y(found[-1]):.1f}" r="2" fill="var(--dot)" fill-opacity=".8"/>')
    parts += dots
    parts.append(
        f'<polyline points="{" ".join(line)}" fill="none" stroke="var(--p50)" stroke-width="1.6" stroke-linejoin="round"/>'
    )
    if aim is not None:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(aim):.1f}" y2="{y(aim):.1f}" stroke="var(--aim)" stroke-dasharray="5 4"/>'
        )
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{y(aim) - 4:.1f}" text-anchor="end" style="fill: var(--aim)">aim: {aim:g} s</text>'
        )
    return parts


def _bad_calls(calls: Sequence[Mapping[str, Any]], x: Any, bottom: float) -> list[str]:
    return [
        f"<g><title>{html.escape(call['outcome'])}: {html.escape('; '.join(call['problems'])[:300])}</title>"
        f'<path d="M{x(call["sent"]):.1f} {bottom - 9:.1f}l5 9h-10z" fill="var(--bad)"/></g>'
        for call in calls
        if call["outcome"] in ("lost", "wrong", "late")
    ]


def _clock(most: float, x: Any, y: float) -> list[str]:
    step = next((each for each in (10, 30, 60, 120, 300, 600, 1200, 3600) if most / each <= 12), 7200)
    return [
        f'<text x="{x(at):.1f}" y="{y:.1f}" text-anchor="middle">{at // 60}:{at % 60:02}</text>'
        for at in range(0, int(most) + 1, step)
    ]


def _legend(faults: Sequence[Mapping[str, Any]]) -> str:
    kinds = [kind for kind in MARKS if any(fault["kind"] == kind for fault in faults)]
    keys = "".join(
        f'<span class="key"><i style="background: var(--{MARKS[kind][1]})">{MARKS[kind][0]}</i>{html.escape(kind)}</span>'
        for kind in kinds
    )
    return (
        f"{keys}<br>Bars: dark while the fault lasts, light until every replica is ready again. Line: the median of the calls sent at that "
        "moment; dots: "
        "the slowest one. A triangle is a lost or a wrong call. Minutes and seconds since the calm beginning."
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _fault_table(faults: Sequence[Mapping[str, Any]]) -> str:
    def cell(value: float | None) -> str:
        return "<td>-</td>" if value is None else f"<td>{value:.2f}</td>"

    rows = "".join(
        f"<tr><td>{html.escape(fault['kind'])}</td><td>{fault['count']}</td>"
        + "".join(
            cell(fault[name])
            for name in (
                "detected",
                "detected_most",
                "recovered",
                "recovered_most",
                "mended",
                "mended_most",
                "longest_gap",
            )
        )
        + "</tr>"
        for fault in faults
    )
    return (
        '<div class="card"><table><tr><th>seconds since it struck</th><th>times</th><th>others know</th><th>most</th>'
        "<th>streams go on</th><th>most</th>"
        f"<th>all replicas ready</th><th>most</th><th>longest gap</th></tr>{rows}</table></div>"
    )


def _batch(batch: Mapping[str, Any]) -> str:
    return (
        f'<div class="card"><table><tr><th>{batch["calls"]} chats</th><th>two nodes</th><th>one of them frozen midway</th>'
        "<th>one node alone</th></tr>"
        f"<tr><td>seconds</td><td>{batch['both']:.1f}</td><td>{batch['frozen']:.1f}</td><td>{batch['alone']:.1f}</td></tr></table></div>"
    )


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return '<p class="good">Nothing.</p>'
    return (
        '<ul class="card" style="padding-left: 30px">'
        + "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
        + "</ul>"
    )
