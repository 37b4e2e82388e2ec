"""README's Python example, run as it stands against a node that is none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tars.messages.inference import EmbedResult, Timings, Usage

README = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_client_s_example_works_as_printed(node: Any, make: SimpleNamespace) -> None:
    node.answers["inference.embed"] = EmbedResult(
        model="minilm", embeddings=[[1.0, 0.0], [0.0, 1.0]], dimensions=2, truncated=[],
        usage=Usage(prompt_tokens=4, total_tokens=4), timings=Timings(), served_by=make.served_by,
    )  # fmt: skip
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "tars.client" in code)
    assert "http://127.0.0.1:8000" in example
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", example.replace("http://127.0.0.1:8000", node.url)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "Start `tars-node --join`.\n7 tokens from CPU\n2 vectors of 2\n"
