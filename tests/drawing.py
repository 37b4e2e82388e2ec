"""What a rich renderable looks like, as text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def drawn(renderable: RenderableType, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(renderable)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def row(text: str, word: str) -> str:
    found = [line for line in text.splitlines() if word in line]
    assert found, f"no line with {word!r} in\n{text}"
    return found[0]
