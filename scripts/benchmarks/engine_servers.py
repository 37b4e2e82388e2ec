"""The servers that the engine benchmarks start: a real tars-node with a configuration file, llama-server, llama-cpp-python's own server.

Law of this file: how each is started and asked about itself; no load is made here. Settings that cost nothing and help are always given.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_build import LlamaPrograms
from server_process import Server, gets_200, served

LOAD_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Deployed:
    """One `[[deploy]]` table, with its `[[model]]` where it is a file."""

    model: str
    path: Path | None = None
    slots: int | None = None
    context: int | None = None
    device: str | None = None

    def toml(self) -> str:
        lines = [f'[[model]]\nname = "{self.model}"\npath = "{self.path}"'] if self.path is not None else []
        lines.append(f'[[deploy]]\nmodel = "{self.model}"')
        lines += [
            f"{key} = {json.dumps(value)}" for key in ("slots", "context", "device") if (value := getattr(self, key))
        ]
        return "\n".join(lines)


def node_config(deployed: Sequence[Deployed], more: str = "") -> str:
    """A configuration that leaves everything else as it comes, but for `more`: bounds that a benchmark meets and a user does not."""
    tables = ['[node]\nname = "bench"', "[demo]\nmodels = false", *(each.toml() for each in deployed), more]
    return "\n\n".join(filter(None, tables)) + "\n"


def rpc(
    url: str,
    method: str,
    params: Mapping[str, Any] | None = None,
    timeout: float = 60.0,
    api_key: str | None = None,
) -> Any:
    """One JSON-RPC call's result; RuntimeError for an error answer, OSError where nobody answers."""
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, **({"params": params} if params else {})}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(url + "/rpc", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        answer = json.loads(response.read())
    if "error" in answer:
        raise RuntimeError(f"{method}: {answer['error']['message']}")
    return answer["result"]


def replicas(url: str, api_key: str | None = None) -> list[dict[str, Any]]:
    """What `node.describe` says of the replicas."""
    found: list[dict[str, Any]] = rpc(url, "node.describe", api_key=api_key)["replicas"]
    return found


def _all_ready(count: int, url: str, api_key: str | None) -> bool:
    found = replicas(url, api_key)
    states = [replica["state"] for replica in found]
    if "failed" in states:
        raise SystemExit(f"bench: a model failed to load: {[each['last_error'] for each in found]}")
    refused = rpc(url, "mesh.plan", api_key=api_key)["refusals"]
    if refused:
        raise SystemExit(f"bench: nothing fits here: {refused[0]['model']}: {refused[0]['remedy']}")
    return states.count("ready") == count


@contextmanager
def tars_node(
    deployed: Sequence[Deployed],
    name: str = "tars-node",
    environment: Mapping[str, str] | None = None,
    *,
    more: str = "",
    api_key: str | None = None,
) -> Iterator[Server]:
    """A node of its own state folder, once all its models are ready. `more`: of its configuration; `api_key`: one of the keys in it."""
    with tempfile.TemporaryDirectory() as state:
        config = Path(state) / "bench.toml"
        config.write_text(node_config(deployed, more), encoding="utf-8")

        def command(port: int) -> list[str]:
            listen = f"127.0.0.1:{port}"
            return [
                sys.executable, "-m", "tars.node", "--config", str(config), "--listen", listen, "--state-dir", f"{state}/state",
            ]  # fmt: skip

        def ready(url: str) -> bool:
            return _all_ready(len(deployed), url, api_key)

        with served(name, command, ready=ready, seconds=LOAD_SECONDS, environment=environment) as server:
            yield server


@dataclass(frozen=True, slots=True)
class LlamaSetting:
    """One way to run llama-server."""

    name: str
    arguments: tuple[str, ...] = ()
    cache_prompt: bool = True


@contextmanager
def llama_server(
    programs: LlamaPrograms, model: Path, setting: LlamaSetting, *, slots: int, context: int
) -> Iterator[Server]:
    """llama-server with `slots` slots of `context` tokens each."""

    def command(port: int) -> list[str]:
        return [
            str(programs.server), "--host", "127.0.0.1", "--port", str(port), "-m", str(model), "--no-ui",
            "-np", str(slots), "-c", str(slots * context), *(("-ngl", "999") if programs.cuda else ()),
            *setting.arguments,
        ]  # fmt: skip

    with served(f"llama-server {setting.name}", command, ready=gets_200("/health"), seconds=LOAD_SECONDS) as server:
        yield server


@contextmanager
def llama_cpp_python_server(
    python: Path, model: Path, *, context: int, threads: int, on_card: bool
) -> Iterator[Server]:
    """`python -m llama_cpp.server`, which computes one sequence at a time; calls wait instead of breaking each other off."""

    def command(port: int) -> list[str]:
        return [
            str(python), "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(port), "--model", str(model),
            "--n_ctx", str(context), "--n_threads", str(threads), "--n_threads_batch", str(threads),
            "--n_gpu_layers", "-1" if on_card else "0", "--interrupt_requests", "false", "--verbose", "false",
        ]  # fmt: skip

    with served("llama-cpp-python's server", command, ready=gets_200("/v1/models"), seconds=LOAD_SECONDS) as server:
        yield server


def processors() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
