"""Text embeddings by sentence-transformers, batched across concurrent calls.

Law of this file: the engine protocol outside, one torch model inside; torch and sentence_transformers are imported by `load`. Vectors are
those of `SentenceTransformer.encode(normalize_embeddings=True)` (a test holds cosine >= 0.9999), made by its own loop: all waiting calls'
texts go into one pool, and `embedding_batches` says which go through the model together.

No hub and no pickle: the folder is on this machine, weights are safetensors, remote code is refused.
"""

from __future__ import annotations

import base64
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil

from tars.errors import (
    BadModelFile,
    Cancelled,
    DeadlineExceeded,
    DoesNotFit,
    InternalError,
    PromptTooLong,
    ReplicaFailed,
    TarsError,
    WrongModelKind,
)
from tars.messages.inference import Embedded, EmbedParams, Timings, Tokenized, TokenizeParams
from tars.messages.node import EngineCounters, LoadedInfo, MeasuredSpeeds
from tars.workers.embedding_batches import next_batch, padded
from tars.workers.engine import Emit, LoadSpec, Progress, Submission
from tars.workers.inbox import Inbox

WINDOW = 512
"""Texts that are looked at for one batch: enough to fill it with like lengths, cheap to sort."""

CHARACTERS_PER_TOKEN = 64
"""A text is first cut to this many characters per allowed token: where the cut text is too long already, the rest need not be read."""

MAX_TOKENS_ASSUMED = 512
"""For a model that does not say: BERT's position table."""

WARM_SECONDS = 2.0
"""For measuring; cold shapes cost up to seconds once, which is why the buckets are run at load at all."""

WARM_LENGTHS = (16, 32, 64, 128, 256, 512)


WARM_BATCH_TOKENS = 2048
"""Tokens of the measured batch: half of the default budget already runs at full speed (field notes), and ends soon on a slow CPU."""


class _Call:
    """One embed call: which of its texts are done."""

    def __init__(self, submission: Submission, work: EmbedParams, received: float) -> None:
        self.number = submission.sequence
        self.deadline = submission.deadline
        self.received = received
        self.started: float | None = None
        self.texts = [work.input] if isinstance(work.input, str) else list(work.input)
        self.vectors: list[str | None] = [None] * len(self.texts)
        self.left = len(self.texts)
        self.truncated: list[int] = []
        self.tokens = 0


class _Text:
    """One text in the pool."""

    __slots__ = ("call", "ids", "index", "type_ids")

    def __init__(self, call: _Call, index: int, ids: list[int], type_ids: list[int]) -> None:
        self.call = call
        self.index = index
        self.ids = ids
        self.type_ids = type_ids


class EmbeddingEngine:
    """See the module's law."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._pool: deque[_Text] = deque()
        self._calls: dict[int, _Call] = {}
        self._mark = 0
        self._loaded = False
        self._resident_before = 0
        self._device = "cpu"
        self._device_memory = 0
        self._emit: Emit
        self._spec: LoadSpec
        self._torch: Any = None
        self._model: Any = None
        self._tokenizer: Any = None

    # --- load ---

    def load(self, spec: LoadSpec, progress: Progress, emit: Emit) -> LoadedInfo:
        """See the protocol. Percent is of the whole load: the imports take most of it."""
        started = time.monotonic()
        self._spec, self._emit = spec, emit
        self._resident_before = psutil.Process().memory_info().rss
        if not (Path(spec.path) / "config.json").is_file() or not (Path(spec.path) / "modules.json").is_file():
            raise BadModelFile(
                "The folder is not a sentence-transformers model: it needs config.json and modules.json. "
                "Download the whole repository of the model."
            )
        progress("import", 1.0)
        sentence_transformers = self._import(progress)
        torch = self._torch
        torch.set_num_threads(max(1, spec.threads))
        self._choose_device()
        free_before = torch.cuda.mem_get_info()[0] if self._device != "cpu" else 0
        progress("load", 70.0)
        self._model = self._load_model(sentence_transformers)
        if self._device != "cpu":
            self._device_memory = max(0, free_before - torch.cuda.mem_get_info()[0])
        self._prepare_tokenizer()
        progress("warm", 85.0)
        speed = self._warm_up(progress)
        if self._device != "cpu":
            self._device_memory = max(0, free_before - torch.cuda.mem_get_info()[0])
        self._loaded = True
        return LoadedInfo(
            model_kind="embedding",
            memory_bytes=self.memory_bytes(),
            load_seconds=round(time.monotonic() - started, 3),
            context=self._most,
            slots=spec.slots,
            dimensions=self._dimensions,
            max_input_tokens=self._most,
            architecture=str(getattr(self._model[0], "architecture", "") or ""),
            backend=f"torch {spec.precision} {self._device}",
            file_sha256=spec.sha256,
            speeds=MeasuredSpeeds(texts_per_second=round(speed, 1)),
        )

    def _import(self, progress: Progress) -> Any:
        try:
            import torch

            progress("import", 30.0)
            import sentence_transformers
        except ImportError:
            raise ReplicaFailed(
                "sentence-transformers or torch is not installed, so embedding models cannot run. "
                "Install them with `pip install 'tars-node[embeddings]'` and restart the node."
            ) from None
        self._torch = torch
        progress("read", 65.0)
        return sentence_transformers

    def _choose_device(self) -> None:
        if self._spec.cuda_device is None:
            return
        if not self._torch.cuda.is_available():
            raise ReplicaFailed(
                "The model was placed on a GPU, but the installed torch sees none: it is a CPU build, or the driver is too old. "
                "Install torch's CUDA build (README, 'Using a real GPU'), or deploy the model with device cpu."
            )
        self._device = "cuda"

    def _load_model(self, sentence_transformers: Any) -> Any:
        torch = self._torch
        try:
            model = sentence_transformers.SentenceTransformer(
                self._spec.path,
                device=self._device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
            model.eval()
            if self._spec.precision in ("bf16", "fp16"):
                # Only the transformer: pooling sums hundreds of tokens and keeps float32.
                model[0].to(torch.bfloat16 if self._spec.precision == "bf16" else torch.float16)
        except torch.OutOfMemoryError:
            raise DoesNotFit(
                "The device ran out of memory while the model was loaded. Free some, or use another."
            ) from None
        except MemoryError:
            raise DoesNotFit("The machine ran out of memory while the model was loaded.") from None
        except Exception as error:  # noqa: BLE001  # a damaged folder fails in as many ways as there are file formats in it
            # The text goes to the node's log, which the operator reads; the caller gets the meaning.
            print(f"embedding model refused: {type(error).__name__}: {error}", flush=True)
            raise BadModelFile(
                "sentence-transformers refused the model folder: a file in it is missing or damaged (weights must be safetensors). "
                "The worker's lines in the node's log say which. Download it again."
            ) from None
        return model

    def _prepare_tokenizer(self) -> None:
        backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BadModelFile(
                "The model has no tokenizer.json; TARS needs the fast tokenizer. Convert it with transformers."
            )
        self._tokenizer = backend
        backend.no_padding()
        self._most = int(self._model.max_seq_length or MAX_TOKENS_ASSUMED)
        self._pad_id = int(self._model.tokenizer.pad_token_id or 0)
        self._prompt = (self._model.prompts or {}).get(self._model.default_prompt_name or "", "")
        self._wants_type_ids = "token_type_ids" in self._model.tokenizer.model_input_names

    def _warm_up(self, progress: Progress) -> float:
        """Run one text of each length bucket, then measure texts of about 60 tokens; texts per second."""
        token = next(iter(self._tokenizer.encode("model", add_special_tokens=False).ids), 0)
        started = time.monotonic()
        lengths = [length for length in WARM_LENGTHS if length <= self._most] or [self._most]
        for done, length in enumerate(lengths, 1):
            self._dimensions = len(self._forward([[token] * length], None)[0])
            progress("warm", 85.0 + 10.0 * done / len(lengths))
            if time.monotonic() - started > WARM_SECONDS:
                break
        length = min(60, self._most)
        count = max(1, min(WARM_BATCH_TOKENS, self._spec.batch_tokens) // padded(length, self._most))
        started = time.monotonic()
        self._forward([[token] * length] * count, None)
        progress("warm", 99.0)
        return count / max(1e-9, time.monotonic() - started)

    # --- the protocol, from any thread ---

    def submit(self, submission: Submission) -> None:
        """See the protocol."""
        self._inbox.put(submission)

    def cancel(self, sequence: int) -> None:
        """See the protocol."""
        self._inbox.cancel(sequence)

    def memory_bytes(self) -> int:
        """On a GPU what the load took, on a CPU the resident growth as of now."""
        if self._device != "cpu":
            return self._device_memory
        return max(0, psutil.Process().memory_info().rss - self._resident_before)

    def counters(self) -> EngineCounters:
        """See the protocol."""
        return EngineCounters()

    def progress_mark(self) -> int:
        """See the protocol: batches and tokenized calls."""
        return self._mark

    def unload(self) -> None:
        """See the protocol."""
        self._inbox.close()

    # --- the engine thread ---

    def run(self) -> None:
        """See the protocol."""
        while True:
            taken = self._inbox.take(wait=not self._pool)
            if taken.closed:
                break
            now = time.monotonic()
            for submission in taken.submissions:
                self._mark += 1
                try:
                    self._admit(submission, now)
                except TarsError as error:
                    self._end(submission.sequence, error)
            self._drop_ended(taken.cancelled, time.monotonic())
            if self._pool:
                self._compute_batch()
                self._mark += 1
        self._model = None

    def _admit(self, submission: Submission, now: float) -> None:
        work = submission.work
        if isinstance(work, TokenizeParams):
            self._tokenizer.no_truncation()
            encoding = self._tokenizer.encode(_clean(work.text), add_special_tokens=work.add_special)
            self._emit([(submission.sequence, Tokenized(tokens=list(encoding.ids)))])
            return
        if not isinstance(work, EmbedParams):
            raise WrongModelKind("This is an embedding model; it does not chat. Ask a chat model.")
        call = _Call(submission, work, now)
        texts = [self._tokenized(call, index, text) for index, text in enumerate(call.texts)]
        if call.truncated and not work.truncate:
            raise PromptTooLong(
                f"{len(call.truncated)} of the texts have more than this model's {self._most} tokens (the first is number "
                f"{call.truncated[0]}). Split them, or send truncate: true.",
                details={"context": self._most, "prompt_tokens": self._most + 1, "texts": call.truncated},
            )
        self._calls[call.number] = call
        self._pool.extend(texts)

    def _tokenized(self, call: _Call, index: int, text: str) -> _Text:
        text = _clean(self._prompt + text).strip()
        self._tokenizer.enable_truncation(max_length=self._most)
        few = text[: self._most * CHARACTERS_PER_TOKEN]
        encoding = self._tokenizer.encode(few)
        if not encoding.overflowing and len(few) < len(text):
            encoding = self._tokenizer.encode(text)
        if encoding.overflowing:
            call.truncated.append(index)
        call.tokens += len(encoding.ids)
        return _Text(call, index, list(encoding.ids), list(encoding.type_ids))

    def _drop_ended(self, cancelled: set[int], now: float) -> None:
        for call in list(self._calls.values()):
            if call.number in cancelled:
                self._end(call.number, Cancelled("The call was cancelled."))
            elif call.deadline is not None and now >= call.deadline:
                self._end(call.number, DeadlineExceeded("The call's time budget is used up; the work was stopped."))

    def _end(self, number: int, error: TarsError) -> None:
        if self._calls.pop(number, None) is not None:
            self._pool = deque(text for text in self._pool if text.call.number != number)
        self._emit([(number, error)])

    def _end_all(self, batch: list[_Text], error: TarsError) -> None:
        for number in {text.call.number for text in batch}:
            self._end(number, error)

    def _compute_batch(self) -> None:
        window = [self._pool[index] for index in range(min(WINDOW, len(self._pool)))]
        chosen = next_batch([len(text.ids) for text in window], self._spec.batch_tokens, self._most)
        batch = [window[index] for index in chosen]
        gone = set(map(id, batch))
        self._pool = deque(text for text in self._pool if id(text) not in gone)
        now = time.monotonic()
        for text in batch:
            text.call.started = text.call.started or now
        try:
            vectors = self._forward([text.ids for text in batch], [text.type_ids for text in batch])
        except TarsError as error:
            self._end_all(batch, error)
            return
        except self._torch.OutOfMemoryError:
            self._torch.cuda.empty_cache()
            advice = "Send fewer or shorter texts, or lower batch_tokens."
            self._end_all(batch, DoesNotFit(f"The device ran out of memory on this batch. {advice}"))
            return
        for text, vector in zip(batch, vectors, strict=True):
            call = text.call
            call.vectors[text.index] = base64.b64encode(vector.tobytes()).decode("ascii")
            call.left -= 1
            if not call.left:
                self._answer(call)

    def _answer(self, call: _Call) -> None:
        del self._calls[call.number]
        now = time.monotonic()
        self._emit(
            [
                (
                    call.number,
                    Embedded(
                        vectors=[vector for vector in call.vectors if vector is not None],
                        dimensions=self._dimensions,
                        truncated=call.truncated,
                        prompt_tokens=call.tokens,
                        timings=Timings(
                            queue_ms=round(((call.started or now) - call.received) * 1000, 3),
                            total_ms=round((now - call.received) * 1000, 3),
                        ),
                    ),
                )
            ]
        )

    def _forward(self, ids: list[list[int]], type_ids: list[list[int]] | None) -> Any:
        """One forward pass; float32 array [texts, dimensions] of unit length, little-endian. Raises `InternalError` on NaN."""
        torch = self._torch
        width = padded(max(map(len, ids)), self._most)
        tokens = torch.full((len(ids), width), self._pad_id, dtype=torch.long)
        mask = torch.zeros((len(ids), width), dtype=torch.long)
        kinds = torch.zeros((len(ids), width), dtype=torch.long)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one, dtype=torch.long)
            mask[row, : len(one)] = 1
            if type_ids is not None:
                kinds[row, : len(one)] = torch.tensor(type_ids[row], dtype=torch.long)
        features = {"input_ids": tokens.to(self._device), "attention_mask": mask.to(self._device)}
        if self._wants_type_ids:
            features["token_type_ids"] = kinds.to(self._device)
        with torch.inference_mode():
            for index, module in enumerate(self._model):
                features = module(features)
                if index == 0 and "token_embeddings" in features:
                    features["token_embeddings"] = features["token_embeddings"].float()
            vectors = torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1).cpu()
        if not bool(torch.isfinite(vectors).all()):
            raise InternalError(
                "The model computed something that is not a number; in half precision some devices do. Deploy it with precision fp32."
            )
        return vectors.numpy().astype("<f4", copy=False)


def _clean(text: str) -> str:
    """Half of a surrogate pair becomes a question mark: the tokenizer takes UTF-8 only."""
    return text.encode("utf-8", "replace").decode("utf-8")
