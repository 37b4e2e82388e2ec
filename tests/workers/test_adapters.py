"""LoRA adapters on a real (random) model: they change the text of the calls that name them and of nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_thread import EngineThread, EventLog
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

from tars.errors import BadModelFile, Draining, TarsError, UnknownModel
from tars.messages.inference import CompleteParams, Generated
from tars.workers.adapters import adapter_of
from tars.workers.engine import LoadSpec, Resume, Saved, Submission
from tars.workers.llama_engine import LlamaEngine

HELLO = "hello world, the user and the assistant say hello to the world. " * 3


class Adapted(EventLog):
    """An engine whose model has adapters, and what came for each call."""

    def __init__(self, path: Path, adapters: dict[str, Path], scale: float = 1.0, **changes: object) -> None:
        spec = {
            "replica": "r",
            "model": "m",
            "engine": "llama",
            "path": str(path),
            "context": 512,
            "slots": 4,
            "adapters": [
                {"name": name, "path": str(file), "scale": scale if name != "none" else 0.0}
                for name, file in adapters.items()
            ],
            **changes,
        }
        self.engine = LlamaEngine()
        self.thread = EngineThread(self.engine, LoadSpec.model_validate(spec))
        super().__init__()

    def submit(self, model: str | None, prompt: str = HELLO, resume: Resume | None = None, **params: object) -> int:
        settings = {"max_tokens": 24, "temperature": 0.0, "logit_bias": {"4": -100.0, "2": -100.0}}
        work = CompleteParams.model_validate({"model": model, "prompt": prompt, **settings, **params})
        number = next(self.thread.numbers)
        self.engine.submit(Submission(number, work, None, resume))
        return number

    def ask(self, model: str | None, prompt: str = HELLO, **params: object) -> Generated:
        return self.end(self.submit(model, prompt, **params))

    def saved(self, running: int, file: Path) -> Saved:
        """The same, once it has ten tokens."""
        while len(self.deltas.get(running, [])) < 10:
            self.take()
        saved = super().saved(running, file)
        with pytest.raises(Draining):
            self.end(running)
        return saved


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "blue": write_tiny_adapter(folder / "blue.gguf", seed=1),
        "red": write_tiny_adapter(
            folder / "red.gguf", seed=2, tensor="blk.1.ffn_up.weight", output=128, precision=np.float16
        ),
        "none": write_tiny_adapter(folder / "none.gguf", seed=3),
    }


@pytest.fixture(scope="module")
def exact(tiny_gguf: Path, files: dict[str, Path]) -> Iterator[Adapted]:
    adapted = Adapted(tiny_gguf, files, exact=True)
    yield adapted
    assert adapted.engine.counters().running == 0
    adapted.thread.close()


@pytest.mark.model
def test_a_load_says_which_adapters_there_are(exact: Adapted) -> None:
    assert exact.thread.info.adapters == ["blue", "red", "none"]


@pytest.mark.model
def test_the_adapter_that_a_call_names_changes_its_text(tiny_gguf: Path, exact: Adapted) -> None:
    plain = Adapted(tiny_gguf, {}, exact=True)
    wanted = plain.ask("m").text
    plain.thread.close()
    assert exact.ask("m").text == exact.ask(None).text == exact.ask("alias").text == wanted
    assert exact.ask("m:none").text == wanted, "at scale 0 an adapter changes nothing"
    assert len({wanted, exact.ask("m:blue").text, exact.ask("alias:red").text}) == 3
    assert exact.ask("m:blue").text == exact.ask("m:blue").text


@pytest.mark.model
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_calls_of_several_adapters_at_once_get_what_each_gets_alone(exact: Adapted, temperature: float) -> None:
    asked = [(model, f"{model} {HELLO} {number}") for number in range(2) for model in ("m", "m:blue", "m:red")]
    params: dict[str, object] = {"temperature": temperature, "seed": 5, "max_tokens": 60}
    alone = [exact.ask(model, prompt, **params).text for model, prompt in asked]
    numbers = [exact.submit(model, prompt, **params) for model, prompt in asked]
    together = [exact.end(number).text for number in numbers]
    assert together == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.model
def test_calls_of_several_adapters_share_a_full_cache(tiny_gguf: Path, files: dict[str, Path]) -> None:
    shared = Adapted(tiny_gguf, files, kv_tokens=512)
    models = ["m", "m:blue", "m:red", "m:blue"]
    params: dict[str, object] = {"max_tokens": 300}
    alone = [shared.ask(model, f"{number} hello", **params).text for number, model in enumerate(models)]
    numbers = [shared.submit(model, f"{number} hello", **params) for number, model in enumerate(models)]
    together = [shared.end(number) for number in numbers]
    # In shared cells the last digits depend on what else runs, so a long text may part from itself somewhere; its beginning does not.
    assert [one.text[:20] for one in together] == [text[:20] for text in alone]
    assert [one.usage.completion_tokens for one in together] == [300] * 4
    assert shared.engine.counters().preemptions > 0
    shared.thread.close()


@pytest.mark.model
def test_what_one_adapter_computed_of_a_prompt_is_not_taken_over_by_another(exact: Adapted) -> None:
    prompt = "7 " + HELLO * 2
    exact.ask("m:blue", prompt)
    assert exact.ask("m:red", prompt).usage.cached_tokens == 0
    assert exact.ask("m", prompt).usage.cached_tokens == 0
    assert exact.ask("m:blue", prompt).usage.cached_tokens > 0


@pytest.mark.model
def test_a_saved_answer_goes_on_elsewhere_with_its_adapter(
    tiny_gguf: Path, files: dict[str, Path], exact: Adapted, tmp_path: Path
) -> None:
    params: dict[str, object] = {"max_tokens": 120, "temperature": 0.8, "seed": 5}
    whole = exact.ask("m:blue", **params)
    started = exact.submit("m:blue", **params)
    file = tmp_path / "state"
    saved = exact.saved(started, file)
    other = Adapted(tiny_gguf, files, exact=True)
    resume = Resume(generated=[saved.generated], handed_out=[0], seed=saved.seed, path=str(file))
    assert other.end(other.submit("m:blue", resume=resume, **params)).text == whole.text
    assert other.engine.counters().steps < 120, "the prompt and the first tokens were computed again"
    other.thread.close()


@pytest.mark.model
def test_cells_of_another_adapter_are_computed_again(exact: Adapted, tmp_path: Path) -> None:
    params: dict[str, object] = {"max_tokens": 40}
    started = exact.submit("m:blue", **params)
    file = tmp_path / "state"
    saved = exact.saved(started, file)
    computed_again = Resume(generated=[saved.generated], handed_out=[0], seed=saved.seed)
    wanted = exact.end(exact.submit("m:red", resume=computed_again, **params)).text
    resume = computed_again.model_copy(update={"path": str(file)})
    assert exact.end(exact.submit("m:red", resume=resume, **params)).text == wanted


@pytest.mark.model
def test_an_unknown_adapter_is_the_callers_error(exact: Adapted) -> None:
    with pytest.raises(UnknownModel, match=r"no adapter 'green'.* it has blue, red, none"):
        exact.ask("m:green")
    assert exact.ask("m").text


@pytest.mark.model
@pytest.mark.parametrize(
    "damage",
    ["another size", "another architecture", "another tensor", "no adapter", "missing", "cut", "half a pair", "NaN"],
)
def test_a_file_that_is_no_adapter_of_this_model_is_one_clear_error(
    tiny_gguf: Path, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "secret-folder-name.gguf"
    if damage == "another size":
        write_tiny_adapter(file, embedding=96)
    elif damage == "another architecture":
        write_tiny_adapter(file, architecture="qwen2")
    elif damage == "another tensor":
        write_tiny_adapter(file, tensor="blk.9.attn_q.weight")
    elif damage == "no adapter":
        write_tiny_gguf(file)
    elif damage == "cut":
        write_tiny_adapter(file)
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "half a pair":
        write_tiny_adapter(file, halves=("lora_a",))
    elif damage == "NaN":
        write_tiny_adapter(file, strength=float("nan"))
    with pytest.raises(TarsError) as refused:
        Adapted(tiny_gguf, {"legal": file})
    assert isinstance(refused.value, BadModelFile)
    assert "adapter legal" in refused.value.message
    assert "secret-folder-name" not in refused.value.message
    assert ("not a number" in refused.value.message) == (damage == "NaN")


@pytest.mark.parametrize(
    ("asked", "adapter"),
    [
        (None, ""),
        ("m", ""),
        ("m:blue", "blue"),
        ("an alias:blue", "blue"),
        ("llama3:8b", ""),
        ("a:b:blue", "blue"),
    ],
)
def test_the_adapter_is_what_stands_after_the_last_colon(asked: str | None, adapter: str) -> None:
    assert adapter_of(asked, "m", ["blue", "red"]) == adapter


def test_a_model_whose_own_name_ends_like_an_adapter_is_itself() -> None:
    assert adapter_of("m:blue", "m:blue", ["blue"]) == ""


def test_a_model_without_adapters_refuses_no_name() -> None:
    assert adapter_of("m:latest", "m", []) == ""
    with pytest.raises(UnknownModel, match="no adapter 'latest'"):
        adapter_of("m:latest", "m", ["blue"])
