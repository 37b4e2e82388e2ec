"""The demo chat model: its file, its training text, and its answers through llama_cpp."""

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tars.demo import help_desk_gguf, minilm_directory
from tars.demo.help_desk import HelpDesk, load_help_desk

MEGABYTE = 1_000_000

# Asked in the words of people who have not read the training text; the right topic of each. Never add one of them, or one like it, to
# the training text: then they measure nothing any more.
FRESH_QUESTIONS = (
    ("what's tars", "what-is-tars"),
    ("Could you tell me what this thing does?", "what-is-tars"),
    ("who r you", "who-are-you"),
    ("I've got another computer in the living room, how do I hook it up?", "add-second-pc"),
    ("join second pc to cluster", "add-second-pc"),
    ("Do you already support more than one machine?", "mesh-status"),
    ("what's a replica?", "replica"),
    ("explain coordinator please", "coordinator"),
    ("node vs replica: what is a node?", "node"),
    ("how to load my own gguf file", "own-gguf"),
    ("I'd like to use my own model instead of the demo one", "own-gguf"),
    ("how do I make llama.cpp use my nvidia card", "cuda-build"),
    ("pip command for cuda", "cuda-build"),
    ("status page url?", "status-page"),
    ("is there some kind of dashboard I can open", "status-page"),
    ("What do I enter as base_url in the openai python library?", "openai"),
    ("where do i post json-rpc requests", "json-rpc"),
    ("how do i get an embedding of a sentence", "embeddings"),
    ("how many dimensions does an embedding have?", "embedding-model"),
    ("getting 1003 all the time, what does that mean", "still-loading"),
    ("error 1002 what to do", "does-not-fit"),
    ("it says the model does not fit on my card", "does-not-fit"),
    ("how is the required memory calculated", "memory-estimate"),
    ("how to set a timeout", "deadline"),
    ("what format is the config file in", "config-file"),
    ("where is the state directory", "state-dir"),
    ("can I see a plan for PCs I haven't bought yet", "tars-plan"),
    ("do I need an api key on localhost?", "api-keys"),
    ("why was my request rejected because of the host header", "host-check"),
    ("what does a simulated gpu do", "simulated-device"),
    ("does it run on windows 11?", "windows"),
    ("can tars use my ollama?", "upstream"),
    ("which models run on my 3060?", "rtx-3060"),
    ("what can I run on a gtx 1660 super", "gtx-1660"),
    ("best models for 4090", "rtx-4090"),
    ("will a 70b model work on my 4090", "seventy-b"),
    ("is tars free software?", "price"),
    ("which license is it", "licence"),
    ("how do I quit", "stop-node"),
    ("my port 8000 is taken", "busy-port"),
    ("how to stream tokens to my app", "streaming"),
    ("how do I cancel a running request", "cancel"),
    ("what if a worker dies?", "worker-crash"),
    ("hi!", "greeting"),
    ("thank you so much", "thanks"),
    ("good bye", "goodbye"),
    ("what is the weather tomorrow", "off-topic"),
    ("who was the first man on the moon?", "off-topic"),
    ("write me a love letter", "off-topic"),
    ("what's 5 + 7", "off-topic"),
)


@pytest.fixture(scope="module")
def help_desk() -> HelpDesk:
    return load_help_desk()


# ---------------------------------------------------------------------------------------------------- files


def test_the_file_describes_itself() -> None:
    gguf = pytest.importorskip("gguf")
    assert help_desk_gguf().stat().st_size < 6 * MEGABYTE
    reader = gguf.GGUFReader(help_desk_gguf())

    def field(name: str) -> Any:
        return reader.get_field(name).contents()

    assert field("general.architecture") == "llama"
    assert field("general.license") == "apache-2.0"
    assert field("general.author")
    assert field("general.name") == "TARS help desk"
    assert field("llama.context_length") >= 512
    assert field("tokenizer.ggml.model") == "gpt2"
    template = field("tokenizer.chat_template")
    assert "<|im_start|>" in template
    assert "add_generation_prompt" in template
    tokens = field("tokenizer.ggml.tokens")
    assert tokens[field("tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    # Every byte is a token, so any text and any grammar can be written.
    assert len(tokens) >= 256
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"Q8_0", "F32"}
    # Widths that every block quantisation of llama.cpp accepts.
    assert all(int(tensor.shape[0]) % 256 == 0 for tensor in reader.tensors)


def test_the_readme_names_the_shipped_file() -> None:
    readme = help_desk_gguf().with_name("README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(help_desk_gguf().read_bytes()).hexdigest() in readme
    assert f"{help_desk_gguf().stat().st_size:,} bytes" in readme


def test_minilm_is_found_without_importing_it() -> None:
    code = "import sys; from tars.demo import minilm_directory; print(minilm_directory()); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(minilm_directory())


def test_minilm_directory_has_the_model_or_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = minilm_directory()
    assert directory is None or (directory / "config.json").is_file()
    monkeypatch.setattr("tars.demo.find_spec", lambda name: None)
    assert minilm_directory() is None


# ---------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(model_path=str(help_desk_gguf()), n_ctx=512, n_threads=2, verbose=False)
    yield model
    model.close()


def ask(llama: Any, question: str, system: str | None = None, **settings: Any) -> str:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question})
    settings = {"temperature": 0, "max_tokens": 300, **settings}
    return str(llama.create_chat_completion(messages=messages, **settings)["choices"][0]["message"]["content"])


@pytest.mark.model
@pytest.mark.parametrize("system", [None, "You are a helpful assistant.", "You are the TARS help desk."])
def test_a_second_pc_gets_the_right_answer(llama: Any, help_desk: HelpDesk, system: str | None) -> None:
    assert ask(llama, "How do I add a second PC?", system) == help_desk.answer("add-second-pc")


@pytest.mark.model
def test_unseen_paraphrases_are_answered(llama: Any, help_desk: HelpDesk) -> None:
    sample = random.Random(3).sample(help_desk.examination(), 30)
    wrong = [question for question, answer in sample if ask(llama, question) != answer]
    assert len(wrong) <= 6, wrong


@pytest.mark.model
def test_questions_in_other_peoples_words_are_answered(llama: Any, help_desk: HelpDesk) -> None:
    wrong = [question for question, name in FRESH_QUESTIONS if ask(llama, question) != help_desk.answer(name)]
    assert len(wrong) <= len(FRESH_QUESTIONS) * 0.3, wrong


@pytest.mark.model
@pytest.mark.parametrize(
    "question", ["What is the capital of Portugal?", "Write a haiku about autumn leaves.", "Who painted the Mona Lisa?"]
)
def test_off_topic_questions_are_declined(llama: Any, question: str) -> None:
    assert ask(llama, question).startswith("I only know about TARS")


@pytest.mark.model
def test_the_last_question_of_a_conversation_is_answered(llama: Any, help_desk: HelpDesk) -> None:
    messages = [
        {"role": "user", "content": "What is a replica?"},
        {"role": "assistant", "content": help_desk.answer("replica")},
        {"role": "user", "content": "Where is the status page?"},
    ]
    reply = llama.create_chat_completion(messages=messages, temperature=0, max_tokens=300)
    assert reply["choices"][0]["message"]["content"] == help_desk.answer("status-page")
    assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.model
def test_output_under_a_json_schema_ends_and_is_valid(llama: Any, help_desk: HelpDesk) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    reply = llama.create_chat_completion(
        messages=[{"role": "user", "content": "What is a replica?"}],
        response_format={"type": "json_object", "schema": schema},
        temperature=0,
        max_tokens=300,
    )
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert json.loads(reply["choices"][0]["message"]["content"]) == {"answer": help_desk.answer("replica")}


@pytest.mark.model
@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "gpus": {"type": "integer"}, "ok": {"type": "boolean"}},
            "required": ["name", "gpus", "ok"],
        },
        {
            "type": "object",
            "properties": {"answer": {"type": "string"}, "kind": {"enum": ["node", "device"]}},
            "required": ["answer", "kind"],
        },
        {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        {"type": "integer"},
    ],
)
def test_output_under_other_schemas_ends(llama: Any, schema: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    reply = llama.create_chat_completion(
        messages=[{"role": "user", "content": "What is a node?"}],
        response_format={"type": "json_object", "schema": schema},
        temperature=0,
        max_tokens=300,
    )
    assert reply["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(reply["choices"][0]["message"]["content"]), schema)


@pytest.mark.model
def test_max_tokens_cuts_the_answer(llama: Any) -> None:
    reply = llama.create_chat_completion(
        messages=[{"role": "user", "content": "What is TARS?"}], temperature=0, max_tokens=4
    )
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 4


def test_training_script_is_where_the_readme_says() -> None:
    root = Path(__file__).parents[1]
    assert (root / "scripts" / "train_demo_model.py").is_file()
    assert "scripts/train_demo_model.py" in help_desk_gguf().with_name("README.md").read_text(encoding="utf-8")
