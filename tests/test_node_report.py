"""What a person reads at the terminal."""

import json
import logging

import pytest
from aiohttp.http_exceptions import BadHttpMessage
from coordinator_bench import card, make_bench

from tars.core.types import Deployment, ModelKind, NodeSnapshot
from tars.errors import BadModelFile
from tars.node_report import CallersNoise, JsonLines, NodeReport, describe_device_line


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


async def test_says_what_it_found_what_it_loads_and_what_it_took_each_once(bench, capsys):
    report = NodeReport("text")
    snapshot = await bench.coordinator.snapshot()
    report.started("http://127.0.0.1:8000", "pc", snapshot.id, snapshot, ["no NVIDIA driver"])
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()
    report.progress(bench.coordinator)
    report.progress(bench.coordinator)
    bench.workers[0].loaded(512 * 2**20)
    report.progress(bench.coordinator)
    report.ready("http://127.0.0.1:8000", bench.coordinator)
    report.ready("http://127.0.0.1:9000", bench.coordinator)
    report.stopping(1, 10)
    report.stopped()
    said = capsys.readouterr().out
    assert said.count("loading  tiny on Card gpu-a") == 1
    assert "ready    tiny Q8_0 on Card gpu-a: 512 MiB" in said
    assert "note     no NVIDIA driver" in said
    assert "1 model ready" in said
    assert '    tars chat "' in said
    assert '    tars --url http://127.0.0.1:9000 chat "' in said
    assert "tars embed" not in said
    assert "up to 10 s for 1 running call" in said


@pytest.mark.parametrize("kind", list(ModelKind))
async def test_says_how_to_try_the_kind_of_model_that_is_ready(bench, capsys, kind):
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    (live,) = bench.coordinator.replicas.values()
    live.kind = kind
    NodeReport("text").ready("http://127.0.0.1:8000", bench.coordinator)
    said = capsys.readouterr().out
    commands = {ModelKind.CHAT: "tars chat", ModelKind.EMBEDDING: "tars embed", ModelKind.RERANK: "tars rerank"}
    assert [each for each, command in commands.items() if command in said] == [kind]


async def test_says_why_a_model_is_refused_or_failed(bench, capsys):
    report = NodeReport("text")
    bench.deployments.deploy(Deployment("mistral-7b-instruct-v0.2"))
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].failed(BadModelFile("the file is cut off"))
    report.progress(bench.coordinator)
    report.ready("http://127.0.0.1:8000", bench.coordinator)
    said = capsys.readouterr().out
    assert "no model is ready" in said
    assert "Try" not in said
    assert "refused  mistral-7b-instruct-v0.2" in said
    assert "FAILED   tiny: the file is cut off" in said


def test_a_simulated_device_is_labelled():
    assert "(simulated)" in describe_device_line(card(simulated=True))
    assert "cc 8.6" in describe_device_line(card())


def test_json_logs_are_one_object_with_the_traceback_inside():
    try:
        raise ValueError("boom\nsecond line")
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "f", 1, "it %s", ("broke",), (type(error), error, error.__traceback__)
        )
    line = JsonLines().format(record)
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["message"] == "it broke"
    assert "boom" in parsed["traceback"]


def test_with_json_logs_the_report_is_log_records(caplog, capsys):
    with caplog.at_level(logging.INFO):
        NodeReport("json").started("http://x", "pc", "id", NodeSnapshot("id", "pc"), [])
    assert capsys.readouterr().out == ""
    assert "node pc" in caplog.text


def test_strangers_cannot_fill_the_log():
    now = [0.0]
    noise = CallersNoise(lambda: now[0])

    def logged(name, text, error=None):
        exc_info = (type(error), error, None) if error else None
        record = logging.LogRecord(name, logging.ERROR, "", 0, text, (), exc_info)
        return record if noise.filter(record) else None

    assert logged("asyncio", "socket.accept() out of system resource\nsocket: 7", OSError(24, "Too many open files"))
    assert not any(
        logged("asyncio", f"socket.accept() out of system resource\nsocket: {n}", OSError()) for n in range(99)
    )
    broken = logged("aiohttp.server", "Error handling request from %s", BadHttpMessage("FOO"))
    assert broken
    assert not broken.exc_info
    now[0] = 1.5
    assert logged("asyncio", "socket.accept() out of system resource\nsocket: 8", OSError()).exc_info
    assert all(logged("tars.node", "our own words are never left out") for _ in range(3))


async def test_says_what_was_unloaded_and_when_it_comes_back(bench, capsys):
    report = NodeReport("text")
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()
    bench.workers[0].loaded()
    report.progress(bench.coordinator)
    bench.deployments.remove("tiny")
    await bench.coordinator.reconcile()
    report.progress(bench.coordinator)
    report.progress(bench.coordinator)
    assert capsys.readouterr().out.count("unloaded tiny from Card gpu-a") == 1


async def test_a_node_that_nobody_wants_a_model_of_says_so_and_no_fault(bench, capsys):
    await bench.coordinator.reconcile()
    NodeReport("text").ready("http://127.0.0.1:8000", bench.coordinator)
    said = capsys.readouterr().out
    assert "no model is to be loaded here now" in said
    assert "lines above" not in said


def test_says_where_peers_reach_it_how_the_next_pc_comes_in_and_the_first_key(capsys):
    report = NodeReport("text")
    report.elsewhere("http://192.168.1.10:8000")
    report.first_key("tars-secret")
    report.in_mesh(["192.168.1.10:8001", "10.0.0.1:8001"], [], "TOKEN@192.168.1.10:8001")
    report.in_mesh([], ["pc1", "pc3"], None)
    said = capsys.readouterr().out
    assert "on other PCs: http://192.168.1.10:8000\n" in said
    assert "tars-secret" in said
    assert "peers reach this node at 192.168.1.10:8001\n" in said
    assert "tars-node --join TOKEN@192.168.1.10:8001\n" in said
    assert "nowhere: this PC has no network; with pc1, pc3\n" in said
    assert said.count("--join") == 1


def test_no_secret_goes_into_a_collected_log(caplog):
    caplog.set_level(logging.INFO)
    report = NodeReport("json")
    assert report.is_collected
    report.first_key(None)
    report.in_mesh(["192.168.1.10:8001"], [], None)
    assert "`tars key new NAME` on this PC makes one" in caplog.text
    assert "--join" not in caplog.text
