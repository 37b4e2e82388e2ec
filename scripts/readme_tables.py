"""Writes README's generated blocks again: methods, errors, limits, the engines' settings and the sample plan.

    python scripts/readme_tables.py           write them
    python scripts/readme_tables.py --check   exit 1 where README says something else (a test does the same)

Law of this file: what can be derived from the tree is never typed into README by hand.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tars.cli import run
from tars.config import EnginesSection, LimitsSection
from tars.errors import CallerError, ConfigError, ModelError, ServerStateError, TarsError
from tars.rpc.method_table import method_list_markdown

ROOT = Path(__file__).resolve().parent.parent
PLAN = ("plan", "--node", "node_configs/pc1-rtx3060.toml", "--node", "node_configs/pc2-gtx1660s.toml")


def methods() -> str:
    """The JSON-RPC methods, from the method table."""
    return method_list_markdown().strip()


def errors() -> str:
    """Every error that can travel, from the tree in `tars.errors`."""
    lines = ["| code | kind | HTTP | retryable | meaning |", "|---|---|---|---|---|"]
    for error in sorted(_travelling(TarsError), key=lambda error: (error.code > 0, abs(error.code))):
        meaning = (error.__doc__ or "").strip().split("\n")[0]
        retryable = "yes" if error.retryable else "no"
        lines.append(f"| {error.code} | `{error.kind}` | {error.http_status} | {retryable} | {meaning} |")
    return "\n".join(lines)


def _travelling(error: type[TarsError]) -> Iterator[type[TarsError]]:
    # The branches themselves are never raised, ConfigError ends a node before it serves, and a client's own errors never travel.
    if error not in (TarsError, CallerError, ServerStateError, ModelError, ConfigError):
        yield error
    for below in error.__subclasses__():
        if below.__module__ == TarsError.__module__:
            yield from _travelling(below)


def limits() -> str:
    """The bounds under [limits], with their defaults and reasons."""
    lines = ["| key | default | why |", "|---|---|---|"]
    for name, field in LimitsSection.model_fields.items():
        lines.append(f"| `{name}` | {field.default:,} | {field.description} |")
    return "\n".join(lines)


def engines() -> str:
    """The keys under [engines], with their defaults and meanings."""
    lines = ["| key | default | what it does |", "|---|---|---|"]
    for name, field in EnginesSection.model_fields.items():
        match field.default:
            case None:
                default = "measured"
            case str() as word:
                default = f"`{word}`"
            case number:
                default = f"{number:g}"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def plan() -> str:
    """The seed fleet's plan, as the command prints it."""
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        code = run(PLAN)
    if code:
        raise SystemExit(f"tars {' '.join(PLAN)} ended with exit code {code}")
    lines = "\n".join(line.rstrip() for line in printed.getvalue().rstrip().splitlines())
    return f"```console\n$ tars {' '.join(PLAN)}\n{lines}\n```"


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "errors": errors,
    "limits": limits,
    "engines": engines,
    "plan": plan,
}


def rewritten(readme: str) -> str:
    """`readme` with every generated block as the tree has it now."""
    for name, make in BLOCKS.items():
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->".replace("\\", r"\\")
        readme, count = re.subn(rf"<!-- {name} -->\n.*?<!-- /{name} -->", block, readme, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md needs exactly one <!-- {name} --> ... <!-- /{name} --> block, it has {count}")
    return readme


def main() -> int:
    """Write or check README.md."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = rewritten(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("README.md is out of date: python scripts/readme_tables.py", file=sys.stderr)
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
