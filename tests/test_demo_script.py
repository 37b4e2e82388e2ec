"""`scripts/demo`, for real: both calls are answered, and no node is left behind however it ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 240.0
"""Two real models from a cold disk on two busy cores; in the usual case a tenth of it."""


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "scripts" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TARS_")}
    return {**kept, "TARS_STATE_DIR": str(tmp_path / "state"), "TARS_VENV": sys.prefix}


def processes_of(state: str) -> list[psutil.Process]:
    """Everything that runs with this test's state folder on its command line, and what such a process started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if state in " ".join(process.cmdline()) and process.pid != os.getpid():
                for each in (process, *process.children(recursive=True)):
                    found[each.pid] = each
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return list(found.values())


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def no_orphan(environment: dict[str, str]) -> Iterator[None]:
    """Whatever a test does: at its end nothing of it runs."""
    yield
    left = processes_of(environment["TARS_STATE_DIR"])
    words = [" ".join(process.cmdline()) for process in left if process.is_running()]
    for process in left:
        process.kill()
    assert not words


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [ROOT / "scripts" / "demo", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What it printed, up to the line with `words`; a demo that ends before fails the test with all of it."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if words in line:
            return text
    pytest.fail(f"the demo ended before it said {words!r}:\n{text}")


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.model
@pytest.mark.usefixtures("no_orphan")
def test_the_demo_answers_both_calls_and_leaves_nothing_behind(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        wanted = busy.getsockname()[1]
        ran = subprocess.run(
            [ROOT / "scripts" / "demo", "--once", "--port", str(wanted)],
            capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=environment, check=False,
            cwd=environment["HOME"],
        )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"port {wanted} is busy" in ran.stdout
    assert "How do I add a second PC?" in ran.stdout
    answer = ran.stdout.split("inference.chat")[1].split("inference.embed")[0]
    assert "--join" in answer, answer
    assert "384 dimensions" in ran.stdout
    same, other = (float(line.split()[0]) for line in ran.stdout.splitlines() if "” and “" in line)
    assert same > other + 0.2, "the two sentences that mean the same should be closer than the third"
    assert "both calls answered; the node has ended" in ran.stdout


@pytest.mark.model
@pytest.mark.usefixtures("no_orphan")
def test_ctrl_c_after_the_calls_ends_the_node_and_is_a_success(environment: dict[str, str]) -> None:
    process = start(environment)
    try:
        text = read_until(process, "Ctrl-C ends the node")
        assert "Status page: http://127.0.0.1:" in text
        node = processes_of(environment["TARS_STATE_DIR"])
        assert node
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 0, out
    assert gone(node, 0.1), "the demo ended before its node did"


@pytest.mark.model
@pytest.mark.usefixtures("no_orphan")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_demo_that_is_killed_in_the_middle_leaves_no_node(
    environment: dict[str, str], number: signal.Signals
) -> None:
    if number is signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a child that its parent was killed hard")
    process = start(environment, "--once")
    try:
        read_until(process, "loading: ")  # the node is up, and so is its first worker
        node = processes_of(environment["TARS_STATE_DIR"])
        assert len(node) >= 2, "the node and its worker"
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == (-number if number is signal.SIGKILL else 128 + number)
    assert gone(node, 30)


# --- the parts that need no node ----------------------------------------------------------------------------------------


def test_a_busy_port_is_replaced_and_a_free_one_kept(demo: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        other = demo.free_port(port)
        assert other != port
    assert demo.free_port(port) == port


def test_the_readers_own_tars_variables_do_not_reach_the_demo_node(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARS_NODE_LISTEN", "0.0.0.0:1")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    environment = demo.node_environment()
    assert "TARS_NODE_LISTEN" not in environment
    assert environment["SOMETHING_ELSE"] == "kept"


def test_the_state_folder_is_the_demos_own(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TARS_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert demo.state_folder() == tmp_path / "tars-demo"
    monkeypatch.setenv("TARS_STATE_DIR", str(tmp_path / "given"))
    assert demo.state_folder() == tmp_path / "given"


def test_the_printed_commands_name_the_port_that_is_used(demo: ModuleType) -> None:
    assert "--url" not in demo.next_steps("http://127.0.0.1:8000")
    other = demo.next_steps("http://127.0.0.1:8123")
    assert "chat --url http://127.0.0.1:8123" in other
    assert "curl http://127.0.0.1:8123/rpc" in other


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_whose_parent_is_already_gone_does_not_start(demo: ModuleType) -> None:
    assert subprocess.run(demo.dying_with(1, ["/bin/true"]), check=False).returncode == 1
    assert subprocess.run(demo.dying_with(os.getpid(), ["/bin/true"]), check=False).returncode == 0


async def test_a_node_that_dies_ends_the_demo_with_its_log(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    node = demo.DemoNode(1, tmp_path)
    node._command = [sys.executable, "-c", "print('no device'); raise SystemExit(7)"]
    async with node:
        with pytest.raises(demo.NodeEnded, match="exit code 7"):
            await demo.while_up(node, asyncio.create_task(asyncio.sleep(60)))
        assert node.last_lines() == "no device"


async def test_a_node_that_ignores_sigterm_is_killed(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "GRACE_SECONDS", 0.2)
    node = demo.DemoNode(1, tmp_path)
    node._command = [
        sys.executable, "-uc",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)",
    ]  # fmt: skip
    async with node:
        deadline = time.monotonic() + 10
        while node.last_lines() != "deaf":
            assert time.monotonic() < deadline
            time.sleep(0.02)  # noqa: ASYNC251  # nothing else runs in this loop
    assert await node.ended() == -signal.SIGKILL
