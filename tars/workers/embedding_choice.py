"""Which back end computes a model on this device, and with how many tokens at once: measured at load, checked against float32.

Law of this file: it builds, checks and times back ends in the engine thread and keeps one; no calls, no queue. Seconds are bounded: a slow
device measures less, not longer; a back end that is clearly slower is timed once, and only one that would be taken is checked. On a CPU
every candidate stands beside float32; on a card the precision is the plan's, and float32 stands in where that is not faithful.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tars.errors import BadModelFile, InternalError, ReplicaFailed
from tars.messages.node import MeasuredSpeeds, TunedSettings
from tars.workers.embedding_backends import Backend, CannotBuild, TorchPacked, TorchPadded
from tars.workers.embedding_batches import best_budget, budgets_to_try
from tars.workers.embedding_exports import OnnxBackend, OpenVinoBackend, installed
from tars.workers.embedding_model import LoadedModel, is_out_of_memory
from tars.workers.embedding_tokenizer import Row, TextTokenizer
from tars.workers.engine import LoadSpec

FAITHFUL_COSINE = 0.999
"""Worst cosine to float32 over `CHECK_TEXTS`: int8 misses it (field notes: 0.88 to 0.987), bf16 reaches 0.9999."""

FAITHFUL_SCORE = 0.002
"""Largest difference of a reranker's score: its order of documents a hundredth apart stays."""

BACKEND_SECONDS = 0.6
"""For timing one back end; the fastest of its runs counts, for other programs only ever slow one down."""

CLEARLY_SLOWER = 1.5
"""A back end whose first timed run takes so many times the fastest one's is not run again."""

BUDGET_SECONDS = 1.5

FASTER = 1.05
"""A back end is preferred to an earlier one in the list only where it is so much faster: the earlier ones need less."""

TIMED_LENGTHS = (96, 104, 112, 121, 128, 131, 140, 148)
"""Tokens of the timed batch: neighbours in a sorted queue of texts of about 100 words."""

SPEED_LENGTH = 60
"""Tokens of the texts whose number per second is advertised: what full batches compute, divided by what such a text takes."""

BASE_TEXT = (
    "The node answers every call, by running it or by sending it to the peer that can. Größe, naïve, 日本語, 🙂; "
    "a price of 1,299.00 euros, an e-mail to nobody@example.org, and a path like C:\\Windows. "
)
CHECK_TEXTS = ("GPU", BASE_TEXT[:40], BASE_TEXT, BASE_TEXT * 3, BASE_TEXT[::-1], "word " * 60, BASE_TEXT * 30)
"""One word to longer than most models take; a text that means nothing too."""


Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found."""

    backend: Backend
    dimensions: int
    tuned: TunedSettings


class Chooser:
    """One load's measurement. `say` gets a line for the log of each back end that was considered."""

    def __init__(
        self, model: LoadedModel, tokenizer: TextTokenizer, spec: LoadSpec, say: Callable[[str], None]
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._spec = spec
        self._say = say
        self._most = tokenizer.most
        self._check_rows = [row for row, _ in self._rows_of(CHECK_TEXTS)]
        self._reference: NDArray[np.float32] | None = None
        self._precision_now = "fp32"
        self._device_now = "cpu"

    def choose(self) -> Choice:
        """Measure, or take what an earlier load measured. Raises `ReplicaFailed` for a forced back end that is not to be had, and
        `BadModelFile` where the model computes no numbers."""
        remembered = self._remembered()
        if remembered is not None:
            return remembered
        backend, dimensions = self._choose_backend()
        budget, speed = self._choose_budget(backend)
        # The batches that found the budget are full: another run, of short texts, would say the same.
        texts = speed / backend.cost([min(SPEED_LENGTH, self._most)])
        speeds = MeasuredSpeeds(texts_per_second=round(texts, 1))
        return Choice(backend, dimensions, TunedSettings(backend=backend.name, batch_tokens=budget, speeds=speeds))

    def _remembered(self) -> Choice | None:
        """What an earlier load of the very same chose, where it still can be had."""
        tuned = self._spec.tuned
        if tuned is None or tuned.backend is None or tuned.batch_tokens is None:
            return None
        if self._spec.backend not in (None, tuned.backend):
            return None
        try:
            backend = self._build(tuned.backend)
            values = self._values(backend)
        except (CannotBuild, InternalError) as error:
            self._say(f"{tuned.backend}, measured before, is not to be had now: {error}")
            return None
        self._free(backend)
        return Choice(backend, int(values.shape[1]), tuned)

    # --- which ---

    def names(self) -> list[str]:
        """Back ends that can be asked for by `LoadSpec.backend` here, best guess first."""
        half = self._spec.precision
        if self._on_card:
            return ["torch-fp32", *([f"torch-{half}"] if half != "fp32" else [])]
        names = ["torch-fp32-packed", "torch-fp32"]
        names += [name for name in ("openvino", "onnx") if installed(name)]
        if half == "bf16":
            names += ["openvino-bf16"] if installed("openvino") else []
            # Last: they take the float32 weights away.
            names += ["torch-bf16-packed", "torch-bf16"]
        return names

    @property
    def _on_card(self) -> bool:
        return self._spec.cuda_device is not None

    def _choose_backend(self) -> tuple[Backend, int]:
        forced = self._spec.backend
        reference = self._reference_values()
        if forced is not None:
            return self._forced(forced, reference)
        if self._on_card:
            return self._on_the_card(reference)
        best: tuple[float, str] | None = None
        last: Backend | None = None
        for name in self.names():
            backend, speed = self._timed(name, best)
            if backend is None:
                continue
            last = backend
            if best is not None and speed <= best[0] * FASTER:
                self._say(f"{name}: {speed:.0f} tokens/s")
            elif self._is_faithful(backend, reference):
                self._say(f"{name}: {speed:.0f} tokens/s")
                best = (speed, name)
        if best is None:
            raise BadModelFile("No back end computes this model; the worker's lines in the node's log say why.")
        if last is None or last.name != best[1]:
            last = self._build(best[1])
        self._free(last)
        return last, int(reference.shape[1])

    def _on_the_card(self, reference: NDArray[np.float32]) -> tuple[Backend, int]:
        name = f"torch-{self._spec.precision}"
        backend = self._faithful(name, reference)
        if backend is None and name != "torch-fp32":
            self._say(f"{name} is not faithful on this card; computing in fp32")
            backend = self._faithful("torch-fp32", reference)
        if backend is None:
            raise BadModelFile("This card computes the model wrongly in every precision. Deploy it with device cpu.")
        return backend, int(reference.shape[1])

    def _forced(self, name: str, reference: NDArray[np.float32]) -> tuple[Backend, int]:
        try:
            backend = self._build(name)
            values = self._values(backend)
        except CannotBuild as error:
            raise ReplicaFailed(
                f"The back end {name!r} cannot compute this model here: {error}. Take another ({', '.join(self.names())}), or none: "
                "then the fastest faithful one is found."
            ) from None
        wrong = self._unfaithful(values, reference)
        if wrong:
            self._say(f"{name} was asked for, and is used although {wrong}")
        self._free(backend)
        return backend, int(reference.shape[1])

    def _timed(self, name: str, best: tuple[float, str] | None) -> tuple[Backend | None, float]:
        """The back end and its tokens/s, no back end where it cannot be had; `best` is the fastest faithful one so far."""
        backend = self._said(name, lambda: self._build(name))
        speed = None if backend is None else self._said(name, lambda: self._speed(backend, best[0] if best else None))
        return (None, 0.0) if speed is None else (backend, speed)

    def _is_faithful(self, backend: Backend, reference: NDArray[np.float32]) -> bool:
        values = self._said(backend.name, lambda: self._values(backend))
        wrong = None if values is None else self._unfaithful(values, reference)
        if wrong:
            self._say(f"{backend.name}: {wrong}")
        return values is not None and not wrong

    def _faithful(self, name: str, reference: NDArray[np.float32]) -> Backend | None:
        backend = self._said(name, lambda: self._build(name))
        return backend if backend is not None and self._is_faithful(backend, reference) else None

    def _said(self, name: str, step: Callable[[], Found]) -> Found | None:
        """What `step` gives; None, with a line for the log, where this back end cannot do it here."""
        try:
            return step()
        except (CannotBuild, InternalError) as error:
            self._say(f"{name}: {error}")
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._say(f"{name}: out of memory")
        return None

    def _build(self, name: str) -> Backend:
        """The back end of that name, with the model in the precision and on the device that it needs. Raises `CannotBuild`."""
        family, _, rest = name.partition("-")
        precision, _, form = rest.partition("-")
        precision = precision or "fp32"
        if precision not in ("fp32", "bf16", "fp16") or form not in ("", "packed"):
            raise CannotBuild("there is no back end of that name")
        if family == "torch" and (not form or not self._on_card):
            self._set(precision, "cuda" if self._on_card else "cpu")
            return TorchPacked(self._model, name) if form else TorchPadded(self._model, self._most, name)
        if family in ("onnx", "openvino") and not form and not self._on_card:
            if not installed(family):
                raise CannotBuild(f"its packages are not installed: pip install 'tars-node[{family}]'")
            self._set("fp32", "cpu")
            if family == "openvino":
                return OpenVinoBackend(self._model, self._most, self._spec.threads, precision)
            if precision == "fp32":
                return OnnxBackend(self._model, self._most, self._spec.threads)
        raise CannotBuild("there is no back end of that name on this device")

    def _set(self, precision: str, device: str) -> None:
        if self._precision_now != "fp32" and precision != self._precision_now:
            self._model.load()  # rounded weights do not come back
            self._precision_now, self._device_now = "fp32", "cpu"
        if (precision, device) != (self._precision_now, self._device_now):
            self._model.to(device, precision)
            self._precision_now, self._device_now = precision, device

    def _free(self, backend: Backend) -> None:
        if not backend.name.startswith("torch"):
            self._model.drop_network()

    # --- faithful ---

    def _rows_of(self, texts: Sequence[str]) -> list[tuple[Row, bool]]:
        if self._model.kind == "embedding":
            return self._tokenizer.texts("", texts)
        return self._tokenizer.pairs(BASE_TEXT[:60], texts)

    def _values(self, backend: Backend) -> NDArray[np.float32]:
        # Some alone, some together: a fault of padding or packing shows in company only.
        alone = [backend.forward([row]) for row in self._check_rows[:2]]
        return np.concatenate([*alone, backend.forward(self._check_rows[2:])])

    def _reference_values(self) -> NDArray[np.float32]:
        try:
            return np.concatenate(
                [TorchPadded(self._model, self._most, "torch-fp32").forward([row]) for row in self._check_rows]
            )
        except InternalError:
            raise BadModelFile(
                "The model computes something that is not a number even in float32: its weights are damaged. Download it again."
            ) from None

    def _unfaithful(self, values: NDArray[np.float32], reference: NDArray[np.float32]) -> str | None:
        if self._model.kind == "rerank":
            difference = float(np.abs(values - reference).max())
            return f"a score differs from float32's by {difference:.4f}" if difference > FAITHFUL_SCORE else None
        worst = float((values * reference).sum(axis=1).min())
        return f"worst cosine to float32 is {worst:.4f}" if worst < FAITHFUL_COSINE else None

    # --- fast ---

    def _row(self, length: int) -> Row:
        length = min(length, self._most)
        source = self._check_rows[-1]
        ids = np.resize(source.ids, length)
        return Row(ids, np.zeros_like(ids))

    def _speed(self, backend: Backend, best: float | None) -> float:
        """Tokens of texts per second (padding is not counted) in a batch of `TIMED_LENGTHS`; `best` is what it has to beat."""
        rows = [self._row(length) for length in TIMED_LENGTHS]
        tokens = sum(map(len, rows))
        backend.forward(rows)  # a new shape is prepared once, in some libraries for long
        hopeless = CLEARLY_SLOWER * tokens / best if best else None
        return tokens / _fastest(lambda: backend.forward(rows), BACKEND_SECONDS, hopeless)

    def _choose_budget(self, backend: Backend) -> tuple[int, float]:
        """The budget, and tokens/s with it."""
        measured: list[tuple[int, float]] = []
        started = time.monotonic()
        for budget in budgets_to_try(self._spec.batch_tokens, on_card=self._on_card):
            length = min(128, self._most, budget)
            rows = [self._row(length)] * max(1, budget // length)
            try:
                left = BUDGET_SECONDS - (time.monotonic() - started)
                fastest = _fastest(partial(backend.forward, rows), left / 4)
                measured.append((budget, len(rows) * length / fastest))
            except Exception as error:
                if not measured or not is_out_of_memory(error):
                    raise
                break
            spent = time.monotonic() - started
            # The next budget takes about twice as long as this one did.
            if spent + 2 * budget / measured[-1][1] > BUDGET_SECONDS:
                break
        self._say("token budgets: " + ", ".join(f"{budget}: {speed:.0f} tokens/s" for budget, speed in measured))
        budget = best_budget(measured)
        return budget, dict(measured)[budget]


def _fastest(run: Callable[[], object], seconds: float, hopeless: float | None = None) -> float:
    """Seconds of the fastest of two runs or more, as many as begin within `seconds`; of one where that takes longer, or `hopeless`."""
    fastest = float("inf")
    started = time.monotonic()
    for _ in range(8):
        at = time.monotonic()
        run()
        now = time.monotonic()
        fastest = min(fastest, now - at)
        if now - started > seconds or (hopeless is not None and now - at > hopeless):
            break
    return max(fastest, 1e-9)
