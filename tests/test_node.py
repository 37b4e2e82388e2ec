"""The whole node as a user runs it: a real process, real models, real signals."""

import asyncio
import base64
import json
import math
import os
import signal
import socket
import struct
import subprocess
from contextlib import suppress

import aiohttp
import psutil
import pytest
from click.testing import CliRunner
from model_stores import store_in
from running_node import node_command, running_node

from tars.client import Client
from tars.errors import Draining, TarsError, Unauthorized
from tars.mesh.operator_key import operator_key_for
from tars.node import main


def run_here(*arguments):
    """`tars-node` in this process, for what it refuses or says before anything is started: a process costs over a second."""
    return CliRunner().invoke(main, [*map(str, arguments)])


def run_node(*arguments, environment=None):
    """A node that is expected to end by itself."""
    return subprocess.run(
        node_command(*arguments),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environment or {})},
    )


def only_chats(folder, grace_seconds=30, more=""):
    """A configuration without the embedding model, whose libraries are most of a node's start."""
    file = folder / "chats.toml"
    file.write_text(f'[node]\ngrace_seconds = {grace_seconds}\n[[deploy]]\nmodel = "tars-help-desk"\n{more}')
    return file


async def call_that_lasts(node, client):
    """One that is under way, and whose engine stands still: it outlasts whatever happens to the node."""
    for worker in node.workers():
        worker.send_signal(signal.SIGSTOP)
    talking = asyncio.create_task(client.complete("the", max_tokens=5))
    async with asyncio.timeout(20):
        while not any(replica.active_calls for replica in (await client.describe()).replicas):
            pass
    return talking


# --- what needs no model -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_version_and_help_say_what_they_should():
    assert run_node("--version").stdout.startswith("tars-node, version ")
    assert "--state-dir" in run_here("--help").stdout


def test_check_says_that_a_configuration_is_right_and_starts_nothing(tmp_path):
    (tmp_path / "c.toml").write_text('[node]\nname = "box"\nlisten = "127.0.0.1:9123"\n')
    done = run_here("--check", "--config", tmp_path / "c.toml", "--state-dir", tmp_path / "state")
    assert done.exit_code == 0
    assert "box would listen on 127.0.0.1:9123" in done.stdout
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
def test_a_typo_in_the_configuration_is_refused_with_line_and_nearest_key(tmp_path):
    (tmp_path / "c.toml").write_text('[node]\nlisen = "127.0.0.1:9123"\n')
    done = run_node("--check", "--config", tmp_path / "c.toml")
    assert done.returncode == 2
    assert "line 2" in done.stderr
    assert "listen" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_tells_a_configured_model_whose_file_is_not_one(tmp_path):
    (tmp_path / "model.gguf").write_text("no model")
    (tmp_path / "c.toml").write_text('[[model]]\nname = "mine"\npath = "model.gguf"\n')
    done = run_here("--check", "--config", tmp_path / "c.toml")
    assert done.exit_code == 2
    assert "GGUF" in done.stderr


def test_check_takes_a_file_under_an_alias_of_the_catalogue(tmp_path):
    (tmp_path / "c.toml").write_text('[[model]]\nname = "mistral-7b"\npath = "missing.gguf"\n')
    done = run_here("--check", "--config", tmp_path / "c.toml")
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
    assert "tars-node: The model's file is not where it was said to be" in done.stderr


def test_check_takes_a_model_that_was_fetched_before(tmp_path, tiny_gguf):
    (tmp_path / "c.toml").write_text('[[deploy]]\nmodel = "mine"\n')
    arguments = ("--check", "--config", tmp_path / "c.toml", "--state-dir", tmp_path / "state")
    assert run_here(*arguments).exit_code == 2
    asyncio.run(store_in(tmp_path / "state").add_file("mine", tiny_gguf))
    done = run_here(*arguments)
    assert (done.exit_code, "models: mine" in done.stdout) == (0, True)


def test_an_unknown_model_in_the_configuration_is_refused(tmp_path):
    (tmp_path / "c.toml").write_text('[[deploy]]\nmodel = "mistral-7c"\n')
    done = run_here("--check", "--config", tmp_path / "c.toml")
    assert done.exit_code == 2
    assert "mistral-7" in done.stderr


@pytest.mark.slow
async def test_beyond_loopback_a_key_is_asked_for_also_where_none_was_configured(tmp_path):
    async with running_node(tmp_path, "--listen", "0.0.0.0:0", environment={"TARS_DEMO_MODELS": "false"}) as node:
        # What it prints can be used on this PC as it stands: with the operator key, which goes to this PC's own addresses only.
        assert node.url.startswith("http://127.0.0.1:")
        async with Client(node.url) as client:
            with pytest.raises(Unauthorized):
                await client.ping()
        async with Client(node.url, operator_key_for(node.url, tmp_path)) as client:
            assert (await client.ping()).node


@pytest.mark.slow
def test_a_busy_port_is_refused_with_another_one(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_node("--listen", f"127.0.0.1:{port}", "--state-dir", tmp_path)
    assert done.returncode == 2
    assert f"--listen 127.0.0.1:{port + 1}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"This is no model.\n" * 50, "GGUF"), (b"GGUF\x03\x00\x00\x00" + b"\xff" * 200, "")],
)
def test_a_file_that_is_no_model_is_refused_before_anything_starts(tmp_path, content, said):
    (tmp_path / "model.gguf").write_bytes(content)
    done = run_here("--model", tmp_path / "model.gguf", "--listen", "127.0.0.1:0", "--state-dir", tmp_path / "s")
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_model_file_is_refused(tmp_path):
    done = run_here("--model", tmp_path / "nothing.gguf", "--state-dir", tmp_path / "s")
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr


# --- a served node -----------------------------------------------------------------------------------------------


@pytest.mark.model
async def test_a_node_without_arguments_serves_both_demo_models(tmp_path):
    async with running_node(tmp_path / "state") as node, Client(node.url) as client:
        waited = await client.chat(messages=[{"role": "user", "content": "hello"}], max_tokens=5)
        assert [each.outcome for each in waited.served_by.attempts] == ["answered"], "a load is waited for"
        await node.ready()
        answer = await client.chat(messages=[{"role": "user", "content": "How do I add a second PC?"}], temperature=0.0)
        assert "--join" in answer.message.content
        vectors = (await client.embed(input=["a cat", "a kitten", "a tax return"])).embeddings
        assert all(math.isclose(sum(x * x for x in vector), 1, abs_tol=1e-5) for vector in vectors)
        near, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
        assert near > far + 0.3
        packed = (await client.embed(input="a cat", encoding_format="base64")).embeddings[0]
        assert struct.unpack("<384f", base64.b64decode(packed)) == pytest.approx(vectors[0], abs=1e-5)
        described = await client.describe()
        assert {replica.state for replica in described.replicas} == {"ready"}
        assert all(replica.info.memory_bytes > 0 for replica in described.replicas)
        assert {each.model for each in (await client.plan()).assignments} == {"tars-help-desk", "all-minilm-l6-v2"}
        node.send(signal.SIGTERM)
        assert await node.ended() == 0
        assert node.output.rstrip().endswith("stopped")


@pytest.mark.model
async def test_a_killed_worker_comes_back_and_its_call_is_answered_then(tmp_path):
    chats = only_chats(tmp_path)
    async with running_node(tmp_path / "state", "--config", chats) as node, Client(node.url) as client:
        await node.ready()
        described = await client.describe()
        restarts = sum(replica.restarts for replica in described.replicas)
        assert restarts == 0

        workers = node.workers()
        running = await call_that_lasts(node, client)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        answered = await asyncio.wait_for(running, 60)
        assert answered.text
        assert [each.outcome for each in answered.served_by.attempts] == ["worker_crashed", "answered"]
        assert "after worker_crashed" in answered.served_by.attempts[1].reason
        assert sum(replica.restarts for replica in (await client.describe()).replicas) >= 1


@pytest.mark.model
async def test_a_node_killed_outright_leaves_no_worker_behind(tmp_path, tiny_gguf):
    chats = only_chats(tmp_path, more=f'[[deploy]]\nmodel = "tiny"\n[[model]]\nname = "tiny"\npath = "{tiny_gguf}"\n')
    async with running_node(tmp_path / "state", "--config", chats) as node:
        await node.ready()
        workers = node.workers()
        assert len(workers) >= 2
        node.send(signal.SIGKILL)
        await node.ended()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive


@pytest.mark.model
async def test_ctrl_c_during_loading_ends_the_node_cleanly(tmp_path):
    async with running_node(tmp_path / "state") as node:
        await node.printed("loading", 60)
        node.send(signal.SIGINT)
        assert await node.ended() == 0


@pytest.mark.model
async def test_sigterm_lets_a_running_answer_end(tmp_path):
    chats = only_chats(tmp_path, grace_seconds=60)  # two engine threads on a busy two-core machine may crawl
    async with running_node(tmp_path / "state", "--config", chats) as node, Client(node.url) as client:
        await node.ready()
        first = asyncio.Event()

        async def talk():
            stream = client.complete_stream("TARS", temperature=5.0, max_tokens=200, seed=7)
            async with stream:
                async for _ in stream:
                    first.set()
            return stream.result

        talking = asyncio.create_task(talk())
        await asyncio.wait_for(first.wait(), 20)
        node.send(signal.SIGTERM)
        result = await asyncio.wait_for(talking, 60)
        assert result.usage.completion_tokens > 0
        assert await node.ended() == 0


@pytest.mark.model
async def test_a_node_that_stops_refuses_new_calls_and_tells_those_whose_time_is_over(tmp_path):
    chats = only_chats(tmp_path, grace_seconds=15)
    async with running_node(tmp_path / "state", "--config", chats) as node, Client(node.url) as client:
        await node.ready()
        talking = await call_that_lasts(node, client)
        node.send(signal.SIGTERM)
        await node.printed("1 running call", 20)
        body = {"model": "tars-help-desk", "prompt": "the", "max_tokens": 5}
        async with aiohttp.ClientSession() as session, session.post(node.url + "/v1/completions", json=body) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "draining")
            assert (answer.headers["Connection"], answer.headers["Retry-After"]) == ("close", "5")
        with pytest.raises(Draining, match="grace time is over") as ended:
            await talking
        assert ended.value.retryable
        assert await node.ended(60) == 0


@pytest.mark.model
async def test_a_second_ctrl_c_ends_the_node_before_its_grace_time_is_over(tmp_path):
    chats = only_chats(tmp_path, grace_seconds=300)
    async with running_node(tmp_path / "state", "--config", chats) as node, Client(node.url) as client:
        await node.ready()
        talking = await call_that_lasts(node, client)
        node.send(signal.SIGINT)
        await node.printed("1 running call", 20)
        node.send(signal.SIGINT)
        assert await node.ended(60) == 0
        with pytest.raises(TarsError):
            await talking


@pytest.mark.slow
async def test_signals_that_go_on_until_the_last_moment_do_not_change_how_it_ended(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("[demo]\nmodels = false\n")
    for number in (signal.SIGTERM, signal.SIGINT):
        async with running_node(tmp_path / "state", "--config", config) as node:
            while node.process.returncode is None:
                # Not `node.send`: Popen looks for the end before it sends, and takes it from asyncio.
                with suppress(ProcessLookupError):
                    os.kill(node.process.pid, number)
                await asyncio.sleep(0.001)
            assert await node.ended() == 0, node.output


@pytest.mark.model
async def test_any_gguf_is_served_by_its_path_and_what_does_not_fit_is_refused_with_numbers(tmp_path, tiny_gguf):
    config = tmp_path / "c.toml"
    config.write_text('[devices]\ncpu = false\nnvml = false\n[[devices.simulated]]\nname = "Tiny"\nmemory_mib = 900\n')
    async with (
        running_node(tmp_path / "s", "--model", tiny_gguf, "--config", config) as node,
        Client(node.url) as client,
    ):
        await node.ready()
        described = await client.describe()
        (device,) = described.devices
        assert device.simulated
        (replica,) = described.replicas
        assert replica.simulated
        with pytest.raises(TarsError) as refused:
            await client.deploy(model=replica.model, context=100_000, slots=64)
        assert refused.value.kind == "does_not_fit"
        (verdict,) = refused.value.details["devices"]
        assert verdict["needed_bytes"] > verdict["free_bytes"] > 0
        assert (await client.describe()).replicas[0].state == "ready"


@pytest.mark.model
async def test_json_logs_are_one_object_a_line(tmp_path):
    chats = only_chats(tmp_path)
    async with running_node(tmp_path / "state", "--config", chats, "--log-format", "json") as node:
        await node.ready()
        node.send(signal.SIGTERM)
        assert await node.ended() == 0
        assert all(json.loads(line)["level"] for line in node.output.splitlines())


@pytest.mark.slow
async def test_the_state_folder_is_one_nodes_at_a_time(tmp_path):
    async with running_node(tmp_path / "state", environment={"TARS_DEMO_MODELS": "false"}):
        second = await asyncio.to_thread(run_node, "--listen", "127.0.0.1:0", "--state-dir", tmp_path / "state")
    assert second.returncode == 2
    assert "--state-dir" in second.stderr


@pytest.mark.model
async def test_every_face_of_a_node_answers(tmp_path):
    chats = only_chats(tmp_path)
    async with (
        running_node(tmp_path / "state", "--config", chats) as node,
        aiohttp.ClientSession(node.url) as session,
    ):
        await node.ready()
        for path in ("/", "/health", "/status", "/models", "/config", "/metrics", "/v1/models"):
            async with session.get(path) as response:
                assert response.status == 200, path
        async with session.get("/status", headers={"Host": "evil.example"}) as response:
            assert response.status == 403
        async with session.get("/status", headers={"Origin": "https://evil.example"}) as response:
            assert response.status == 403


@pytest.mark.model
async def test_a_card_that_the_installed_engines_cannot_use_is_left_out_with_the_line_that_fixes_it(
    tmp_path, pretend_nvml
):
    environment = pretend_nvml.environment("rtx3060")
    async with running_node(tmp_path / "state", environment=environment) as node, Client(node.url) as client:
        await node.ready()
        described = await client.describe()
        card = next(device for device in described.devices if device.kind == "cuda")
        assert "3060" in card.name
        assert card.memory_total_bytes > 11 * 2**30
        if any("-DGGML_CUDA=on" in note for note in card.notes):
            assert all(replica.device != card.id for replica in described.replicas)
            explained = await client.explain(model="tars-help-desk")
            (verdict,) = [each for each in explained.verdicts if each.device == card.id]
            assert "-DGGML_CUDA=on" in verdict.reason
        assert {replica.state for replica in described.replicas} == {"ready"}
