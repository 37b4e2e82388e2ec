from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from tars.errors import DoesNotFit, InternalError, PeerUnreachable, Unauthorized, UnknownModel
from tars.messages.calls import ExplainCallResult
from tars.messages.inference import EmbedResult, RerankResult, Scored, Timings, Usage
from tars.messages.node import (
    DeployResult,
    ExplainResult,
    LoadProgress,
    ModelDescription,
    ModelsResult,
    NodeDescription,
    PingResult,
    PlanResult,
    RemoveResult,
)

IN_A_PROCESS = [sys.executable, "-c", "from tars.cli import main; main()"]


@pytest.fixture
def answering(node: Any, make: SimpleNamespace) -> Any:
    """The fake node with an answer for every method."""

    def embed(params: dict[str, Any]) -> EmbedResult:
        texts = params["input"]
        return EmbedResult(
            model="minilm", embeddings=[[1.0, 0.0]] * len(texts), dimensions=2, truncated=[],
            usage=Usage(prompt_tokens=4, total_tokens=4), timings=Timings(), served_by=make.served_by,
        )  # fmt: skip

    def rerank(params: dict[str, Any]) -> RerankResult:
        count = len(params["documents"])
        results = [Scored(index=index, score=(index + 1) / count) for index in reversed(range(count))]
        return RerankResult(
            model="reranker", results=results[: params.get("top_n")], truncated=[0],
            usage=Usage(prompt_tokens=4, total_tokens=4), timings=Timings(), served_by=make.served_by,
        )  # fmt: skip

    model = ModelDescription(
        name="phi-2", aliases=[], model_kind="chat", variants=["Q8_0"], description="small", licence="MIT",
        deployed=True, replicas_wanted=1, replicas_ready=1, state="ready", local=True,
    )  # fmt: skip
    node.answers |= {
        "node.describe": make.description(make.replica()),
        "node.ping": PingResult(node="n1", version="0.1.0", state="ready"),
        "mesh.plan": PlanResult(assignments=[], refusals=[], devices=[make.device()]),
        "mesh.explain": ExplainResult(
            model="phi-2", deployed=True, assignments=[], verdicts=[], remedy=None, replicas=[], text="Because."
        ),
        "calls.explain": ExplainCallResult(calls=[], text="Call 0a: answered\x1b[31m."),
        "models.list": ModelsResult(models=[model]),
        "models.deploy": DeployResult(model="phi-2", accepted=True, assignments=[]),
        "models.remove": RemoveResult(model="phi-2", removed=True),
        "inference.embed": embed,
        "inference.rerank": rerank,
    }
    return node


COMMANDS = [
    (("status",), "node.describe", "pc1"),
    (("models",), "models.list", "phi-2"),
    (("plan",), "mesh.plan", "nothing is placed"),
    (("plan", "--explain", "phi-2"), "mesh.explain", "Because."),
    (("explain", "phi-2"), "mesh.explain", "Because."),
    (("explain", "call", "0a"), "calls.explain", "Call 0a: answered[31m."),
    (("deploy", "phi-2"), "models.deploy", "phi-2: accepted"),
    (("undeploy", "phi-2"), "models.remove", "no longer deployed"),
    (("ping",), "node.ping", "ready"),
    (("embed", "a text"), "inference.embed", "2 dimensions"),
    (("rerank", "question", "a text"), "inference.rerank", "1.0000"),
    (("chat", "hello"), "inference.chat", "Start"),
]


@pytest.mark.parametrize(("command", "method", "words"), COMMANDS)
def test_a_command_calls_its_method_and_shows_the_answer(
    answering: Any, tars: Callable[..., Any], command: tuple[str, ...], method: str, words: str
) -> None:
    ran = tars(*command)
    assert ran.code == 0, ran.err
    assert answering.calls[0][0] == method
    assert words in ran.out


@pytest.mark.parametrize(("command", "method", "words"), COMMANDS)
def test_json_gives_the_message_itself(
    answering: Any, tars: Callable[..., Any], command: tuple[str, ...], method: str, words: str
) -> None:
    ran = tars(*command, "--json")
    assert ran.code == 0
    answer = answering.answers.get(method)
    if callable(answer):
        answer = answer(answering.params(method))
    if answer is not None:  # the chat answer is made by the fake; its own test looks inside
        assert orjson.loads(ran.out) == answer.model_dump(mode="json")
    assert ran.out.endswith("}\n")
    assert ran.err == ""


@pytest.mark.parametrize(("command", "method", "words"), COMMANDS)
def test_no_node_is_exit_code_3_and_says_how_to_start_one(
    tars: Callable[..., Any], free_port: int, command: tuple[str, ...], method: str, words: str
) -> None:
    ran = tars(*command, "--url", f"127.0.0.1:{free_port}")
    assert ran.code == 3
    assert ran.out == ""
    assert f"No node answers at http://127.0.0.1:{free_port}" in ran.err
    assert "`tars-node`" in ran.err
    assert "Traceback" not in ran.err


def test_a_peer_that_is_unreachable_is_not_the_node_being_away(answering: Any, tars: Callable[..., Any]) -> None:
    answering.answers["models.list"] = PeerUnreachable("pc2 does not answer")
    ran = tars("models")
    assert ran.code == 1
    assert "pc2 does not answer" in ran.err


def test_a_call_that_failed_at_several_replicas_says_how_it_is_explained(
    answering: Any, tars: Callable[..., Any]
) -> None:
    tried = [{"replica": "m@a#0", "node": "a", "outcome": "overloaded"}] * 2
    answering.answers["inference.embed"] = PeerUnreachable("nobody could", details={"attempts": tried})
    assert "`tars explain call t1` says what was tried" in tars("embed", "x").err
    said = orjson.loads(tars("embed", "x", "--json").out)
    assert said["error"]["data"]["trace_id"] == "t1"
    answering.answers["inference.embed"] = PeerUnreachable("nobody could")
    assert "tars explain" not in tars("embed", "x").err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UnknownModel("no model of that name"), "`tars models`"),
        (Unauthorized("an API key is needed"), "TARS_API_KEY"),
        (InternalError("something broke"), "something broke"),
        (
            DoesNotFit("fits nowhere", details={"devices": [
                {"device_name": "RTX 3060", "needed_bytes": 41 * 2**30, "free_bytes": 11 * 2**30}
            ]}),
            "RTX 3060: needs 41.0 GiB, 11.0 GiB free",
        ),
    ],
)  # fmt: skip
def test_an_error_of_the_node_is_exit_code_1(
    answering: Any, tars: Callable[..., Any], error: Exception, words: str
) -> None:
    answering.answers["models.deploy"] = error
    ran = tars("deploy", "m")
    assert ran.code == 1
    assert str(error) in ran.err
    assert words in ran.err
    assert ran.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("status", "--no-such-option"),
        ("status", "--watch", "--wait"),
        ("status", "--url", "ftp://127.0.0.1"),
        ("status", "--url", "http://"),
        ("status", "--url", "http://127.0.0.1:99999"),
        ("status", "--timeout", "0"),
        ("status", "--timeout", "nan"),
        ("chat", "--temperature", "9", "hello"),
        ("chat", "  "),
        ("chat", "--json-schema", "/no/such/file", "hello"),
        ("embed",),
        ("embed", "--file", "/no/such/file"),
        ("embed", "text", "--file", __file__),
        ("embed", *["text"] * 2049),
        ("embed", "text", "--dimensions", "0"),
        ("embed", "text", "--input-type", "poem"),
        ("rerank",),
        ("rerank", "question"),
        ("rerank", "question", "text", "--top", "0"),
        ("rerank", "question", "text", "--file", __file__),
        ("rerank", "question", *["text"] * 2049),
        ("plan", "--context", "2048"),
        ("plan", "--node", "/no/such/file.toml"),
        ("deploy",),
        ("deploy", "m", "--kv-type", "f64"),
        ("chat", "bytes that are no UTF-8: \udcff"),
        ("embed", "\udcff"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_calls_nothing(
    answering: Any, tars: Callable[..., Any], arguments: tuple[str, ...]
) -> None:
    ran = tars(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert ran.err
    assert not answering.calls


def test_options_stand_before_or_after_the_command_and_after_wins(
    answering: Any, tars: Callable[..., Any], free_port: int
) -> None:
    assert tars("--json", "ping").out.startswith("{")
    away = f"http://127.0.0.1:{free_port}"
    assert tars("--url", away, "ping").code == 3  # the variable TARS_URL does not override it
    assert tars("--url", away, "ping", "--url", answering.url).code == 0


def test_the_api_key_travels_in_the_header(
    answering: Any, tars: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARS_API_KEY", "key-from-environment")
    tars("ping")
    assert answering.calls[-1][2]["Authorization"] == "Bearer key-from-environment"
    tars("ping", "--api-key", "key-from-line")
    assert answering.calls[-1][2]["Authorization"] == "Bearer key-from-line"


def test_without_a_command_the_help_is_shown(tars: Callable[..., Any]) -> None:
    ran = tars()
    assert ran.code == 2
    assert "Usage: tars" in ran.err
    assert "Traceback" not in ran.err


def test_help_names_every_command_and_the_exit_codes(tars: Callable[..., Any]) -> None:
    ran = tars("--help")
    assert ran.code == 0
    for command, _, _ in COMMANDS:
        assert f"\n  {command[0]} " in ran.out
    assert "3 no node answers" in " ".join(ran.out.split())
    assert tars("--version").out.startswith("tars, version ")


# --- embed, deploy, undeploy ------------------------------------------------------------------------------------------


def test_embed_reads_a_text_a_line_from_a_file_or_a_pipe(
    answering: Any, tars: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\n\ntwo words\n", encoding="utf-8")
    assert tars("embed", "--file", str(file)).code == 0
    assert answering.params("inference.embed")["input"] == ["one", "two words"]
    monkeypatch.setattr("sys.stdin", io.StringIO("three\n"))
    assert tars("embed", "-", "--no-truncate").code == 0
    assert answering.params("inference.embed")["input"] == ["three"]
    assert answering.params("inference.embed")["truncate"] is False


@pytest.mark.parametrize(("content", "words"), [(b"\xff\xfe\x00", "not UTF-8"), (b"\n \n", "no texts")])
def test_embed_refuses_a_file_without_text(
    answering: Any, tars: Callable[..., Any], tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    ran = tars("embed", "--file", str(file))
    assert ran.code == 2
    assert words in ran.err


def test_embed_sends_the_choices_that_were_made(answering: Any, tars: Callable[..., Any]) -> None:
    tars("embed", "one", "--dimensions", "64", "--input-type", "query")
    assert answering.params("inference.embed")["dimensions"] == 64
    assert answering.params("inference.embed")["input_type"] == "query"
    tars("embed", "one")
    assert not {"dimensions", "input_type"} & answering.params("inference.embed").keys()


def test_rerank_shows_the_best_document_first(answering: Any, tars: Callable[..., Any]) -> None:
    ran = tars("rerank", "which?", "first text", "second text")
    assert ran.out.index("second text") < ran.out.index("first text (cut at the model's limit)")
    assert "0.5000" in ran.out
    assert answering.params("inference.rerank")["query"] == "which?"


def test_rerank_reads_a_document_a_line_and_keeps_the_best(
    answering: Any, tars: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\n\ntwo words\n", encoding="utf-8")
    ran = tars("rerank", "which?", "--file", str(file), "--top", "1", "--no-truncate")
    assert "two words" in ran.out
    assert "one" not in ran.out
    params = answering.params("inference.rerank")
    assert (params["documents"], params["top_n"], params["truncate"]) == (["one", "two words"], 1, False)
    monkeypatch.setattr("sys.stdin", io.StringIO("three\n"))
    assert tars("rerank", "which?", "-").code == 0
    assert answering.params("inference.rerank")["documents"] == ["three"]


def test_embed_compares_several_texts(answering: Any, tars: Callable[..., Any]) -> None:
    assert "1.00" in tars("embed", "one", "two").out


def test_deploy_sends_every_choice(answering: Any, tars: Callable[..., Any]) -> None:
    tars("deploy", "phi-2", "--replicas", "2", "--context", "2048", "--slots", "4", "--kv-type", "q8_0",
         "--variant", "Q8_0", "--device", "cpu")  # fmt: skip
    assert answering.params("models.deploy") == {
        "model": "phi-2", "replicas": 2, "context": 2048, "slots": 4, "kv_type": "q8_0", "variant": "Q8_0", "device": "cpu",
    }  # fmt: skip


def test_a_deployment_that_is_not_accepted_fails(answering: Any, tars: Callable[..., Any]) -> None:
    answering.answers["models.deploy"] = DeployResult(model="phi-2", accepted=False, assignments=[])
    assert tars("deploy", "phi-2").code == 1


def test_deploy_can_wait_for_the_replica(answering: Any, tars: Callable[..., Any], make: SimpleNamespace) -> None:
    states = iter([
        make.description(),
        make.description(make.replica("loading", LoadProgress(stage="read", percent=10), model="phi-2")),
        make.description(make.replica("ready", model="phi-2")),
    ])  # fmt: skip
    answering.answers["node.describe"] = lambda _params: next(states)
    ran = tars("deploy", "phi-2", "--wait")
    assert ran.code == 0
    assert "loading: read 10 %" in ran.err
    assert "phi-2: ready" in ran.err
    answering.answers["node.describe"] = make.description(make.replica("failed", None, model="phi-2"))
    assert tars("deploy", "phi-2", "--wait").code == 1


def test_undeploying_what_is_not_deployed_says_so(answering: Any, tars: Callable[..., Any]) -> None:
    answering.answers["models.remove"] = RemoveResult(model="phi-2", removed=False)
    assert "was not deployed" in tars("undeploy", "phi-2").out


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_waits_and_fails_where_a_model_cannot_be_served(
    answering: Any, tars: Callable[..., Any], make: SimpleNamespace
) -> None:
    assert tars("status", "--wait").code == 0
    model = answering.answers["models.list"].models[0]
    answering.answers["models.list"] = ModelsResult(models=[model.model_copy(update={"state": "refused"})])
    ran = tars("status", "--wait")
    assert ran.code == 1
    assert "not served phi-2: `tars explain phi-2` says why" in ran.out
    assert tars("status").code == 0  # asking alone does not judge


def test_watching_shows_each_state_until_ctrl_c(
    answering: Any, tars: Callable[..., Any], make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = iter(range(3))

    def describe(_params: dict[str, Any]) -> NodeDescription:
        return make.description(make.replica(calls_total=next(rounds)))

    def ctrl_c_after_two(_seconds: float) -> None:
        if [name for name, _, _ in answering.calls].count("node.describe") == 2:
            raise KeyboardInterrupt

    answering.answers["node.describe"] = describe
    monkeypatch.setattr("tars.cli.status.time.sleep", ctrl_c_after_two)
    ran = tars("status", "--watch", "--json")
    assert ran.code == 130
    counts = [orjson.loads(line)["replicas"][0]["calls_total"] for line in ran.out.splitlines()]
    assert counts == [0, 1]


def test_watching_outlasts_a_node_that_goes_away_and_comes_back(
    answering: Any, tars: Callable[..., Any], make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([make.description(name="before"), PeerUnreachable("gone"), make.description(name="after")])
    answering.answers["node.describe"] = lambda _params: next(states)

    def ctrl_c_after_three(_seconds: float) -> None:
        if [name for name, _, _ in answering.calls].count("node.describe") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("tars.cli.status.time.sleep", ctrl_c_after_three)
    ran = tars("status", "--watch")
    assert ran.code == 130
    assert [word for word in ("before", "gone Still watching", "after") if word in ran.out] == [
        "before", "gone Still watching", "after",
    ]  # fmt: skip


# --- endings ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_that_leaves_early_causes_no_traceback(answering: Any) -> None:
    process = subprocess.Popen(
        [*IN_A_PROCESS, "status", "--url", answering.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # `tars status | true`
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(30) == 1
    assert err == ""


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii_gets_an_answer(answering: Any) -> None:
    ran = subprocess.run(
        [*IN_A_PROCESS, "status", "--url", answering.url],
        capture_output=True, timeout=30, env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert b"pc1" in ran.stdout


def test_a_bug_is_named_as_one_without_a_traceback(
    answering: Any, tars: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_message: object) -> object:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("tars.cli.commands.models_view", broken)
    ran = tars("models")
    assert ran.code == 1
    assert "bug in TARS (ZeroDivisionError)" in ran.err
    assert "secret detail" not in ran.err
    assert "Traceback" not in ran.err


def test_deploy_sends_what_was_chosen_and_leaves_the_rest_to_the_planner(
    answering: Any, tars: Callable[..., Any]
) -> None:
    tars("deploy", "phi-2")
    assert [answering.params("models.deploy").get(key) for key in ("slots", "kv_tokens", "gpu_layers")] == [
        None,
        None,
        None,
    ]
    tars("deploy", "phi-2", "--slots", "8", "--kv-tokens", "8192", "--gpu-layers", "20")
    assert [answering.params("models.deploy")[key] for key in ("slots", "kv_tokens", "gpu_layers")] == [8, 8192, 20]
    assert tars("deploy", "phi-2", "--slots", "0").code == 2
    assert tars("deploy", "phi-2", "--gpu-layers", "0").code == 2


def test_two_models_are_not_explained_at_once(answering: Any, tars: Callable[..., Any]) -> None:
    ran = tars("explain", "phi-2", "mistral")
    assert ran.code == 2
    assert "tars explain call ID" in ran.err
    assert not answering.calls
