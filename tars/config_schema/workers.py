"""[worker] and [engines]: how the child processes are watched, and how they compute.

Law of this file: declarations; no engine is imported, so a back end is known by its name alone.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tars.config_schema.section import Section


class WorkerSection(Section):
    """[worker]: how the child processes are watched."""

    start_timeout_seconds: float = Field(
        600.0,
        gt=0,
        le=86_400,
        description="Since the load last got on. A 20 GB file from a hard disk at 100 MB/s takes 200 s; three times that.",
    )
    ping_interval_seconds: float = Field(
        2.0, gt=0, le=3600, description="Between two signs of life. Cheap: one frame over a pipe."
    )
    hang_seconds: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="Without progress while it has work: a worker is hung. A prefill chunk of a 33B on a CPU takes seconds.",
    )
    abort_seconds: float = Field(
        20.0,
        gt=0,
        le=86_400,
        description="A step of the engine that stands still for so long is broken off and tried once more; at most a third of "
        "hang_seconds.",
    )
    backoff_initial_seconds: float = Field(
        0.5, gt=0, le=3600, description="Before the first restart; doubles with each."
    )
    backoff_most_seconds: float = Field(
        60.0, gt=0, le=86_400, description="The longest wait: a PC that had a bad minute is back within the next."
    )
    stop_seconds: float = Field(
        5.0,
        gt=0,
        le=3600,
        description="Between asking a worker to end and killing it; freeing a full 4090 takes about a second.",
    )
    nice: int = Field(
        5,
        ge=0,
        le=19,
        description="How far loaded engines stand behind the node itself for the processor (nice(2)): a node that computes with all of it "
        "answers its peers all the same. On Linux with autogroups or systemd's slices, other programs are not affected.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> WorkerSection:
        if self.backoff_most_seconds < self.backoff_initial_seconds:
            raise ValueError("backoff_most_seconds is less than backoff_initial_seconds")
        return self


EMBEDDING_BACKENDS = (
    "torch-fp32",
    "torch-fp32-packed",
    "torch-bf16",
    "torch-bf16-packed",
    "torch-fp16",
    "openvino",
    "openvino-bf16",
    "onnx",
)
"""What the embedding engine can compute with; not every PC has each, and the engine says so."""


class EnginesSection(Section):
    """[engines]: how the engines of this PC compute."""

    inter_token_ms: float = Field(
        50.0,
        gt=0,
        le=60_000,
        description="How long a prompt that comes in may hold up the next token of running answers; where a step of these takes long "
        "itself, twice as long as that. More makes prompts wait less and answers less smooth. Never less than 16 tokens are computed.",
    )
    continuation: Literal["fast", "exact"] = Field(
        "fast",
        description="How an answer goes on whose replica broke. `fast`: what it has is computed again as a prompt is, so where two next "
        "words nearly tie the rest may take the other one. `exact`: the text is that of an unbroken call, and depends on nothing else that "
        "runs: every answer is computed in fixed shapes, which is slower, and without `slots` a model has one, for slots that share a KV "
        "cache cannot be exact.",
    )
    embedding_backend: str | None = Field(
        None,
        description="Take this back end for embeddings. Default: the fastest faithful one, measured when the model is loaded.",
    )

    @property
    def exact(self) -> bool:
        """Whether answers are computed in fixed shapes."""
        return self.continuation == "exact"

    @field_validator("embedding_backend")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in EMBEDDING_BACKENDS:
            raise ValueError(f"{value[:50]!r} is no back end; known are {', '.join(EMBEDDING_BACKENDS)}")
        return value
