"""[[model]], [[deploy]] and [demo]: the model files of this PC, and what should run in the fleet.

Law of this file: declarations; no file is opened, and whether a model fits anywhere is the planner's to say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tars.config_schema.section import Section
from tars.core.tuning import SLOTS
from tars.core.types import Deployment, KvType, ModelKind


class AdapterSource(Section):
    """[[model.adapters]]: a LoRA adapter of the model, a GGUF file; calls name it as `<model>:<name>`."""

    name: str = Field(min_length=1, max_length=100)
    path: Path = Field(strict=False, description="Its GGUF file; relative to the configuration file.")
    scale: float = Field(1.0, ge=-100, le=100, description="Multiplies what it changes.")

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                "an adapter's name has letters, digits, '.', '_' and '-' only: a colon ends the model's name"
            )
        return value

    @field_validator("path")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()


class ModelSource(Section):
    """[[model]]: a model file of this PC, added to the catalogue."""

    name: str = Field(min_length=1, max_length=200)
    kind: ModelKind = Field(ModelKind.CHAT, strict=False, description="chat, embedding or rerank.")
    path: Path = Field(
        strict=False, description="A GGUF file, or a sentence-transformers folder; relative to the configuration file."
    )
    aliases: tuple[str, ...] = Field((), strict=False, description="Other names that calls may use.")
    description: str = ""
    adapters: tuple[AdapterSource, ...] = Field((), strict=False, description="LoRA adapters that calls may choose.")
    draft: Path | None = Field(
        None,
        strict=False,
        description="A small GGUF model of the same vocabulary that proposes tokens; used only where that is measured to be faster.",
    )

    @field_validator("path", "draft")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @field_validator("adapters")
    @classmethod
    def _one_name_each(cls, value: tuple[AdapterSource, ...]) -> tuple[AdapterSource, ...]:
        names = [adapter.name for adapter in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two adapters are called {twice[0]}")
        return value

    @model_validator(mode="after")
    def _only_chat(self) -> ModelSource:
        if self.kind is not ModelKind.CHAT and (self.adapters or self.draft is not None):
            raise ValueError("adapters and draft are for chat models")
        return self


class DeploySection(Section):
    """[[deploy]]: a model that should run. A wish of the whole fleet: the planner chooses the PC, unless `device` pins one."""

    model: str = Field(min_length=1, description="A name or alias of the catalogue, or of a [[model]] here.")
    replicas: int = Field(1, ge=1, le=64)
    context: int | None = Field(
        None, ge=64, le=1_048_576, description="Tokens a sequence; default the trained context, at most 4,096."
    )
    slots: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Sequences computed at once by one replica, each with its whole context; far cheaper than more replicas. "
        "Default: 4 that share the KV cache of one context.",
    )
    kv_tokens: int | None = Field(
        None,
        ge=64,
        le=268_435_456,
        description="Tokens in the KV cache in all, shared by the slots: from context to slots x context. When they are used up, the "
        "youngest sequence waits.",
    )
    kv_type: Literal["f16", "q8_0", "q4_0"] = Field(
        "f16", description="q8_0 halves the KV cache for a hardly measurable loss."
    )
    gpu_layers: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Only so many layers on the card, counted as llama.cpp does, the output layer first; the rest on the processor, "
        "slower. Default: all.",
    )
    variant: str | None = Field(None, description="Pins the quantisation; default the best that fits.")
    device: str | None = Field(None, description="Pins the device: an id, a name, or `cpu`.")
    priority: int = Field(0, ge=-1000, le=1000, description="Higher ones are placed first where not everything fits.")

    @model_validator(mode="after")
    def _enough_for_a_context(self) -> DeploySection:
        if self.kv_tokens is not None and self.context is not None:
            slots = SLOTS if self.slots is None else self.slots
            if not self.context <= self.kv_tokens <= slots * self.context:
                raise ValueError(
                    f"kv_tokens = {self.kv_tokens} must be from {self.context} (the context) to {slots * self.context} "
                    f"({slots} slots x context)"
                )
        return self

    def to_deployment(self) -> Deployment:
        """The planner's form."""
        return Deployment(
            model=self.model,
            replicas=self.replicas,
            context=self.context,
            slots=self.slots,
            kv_tokens=self.kv_tokens,
            kv_type=KvType(self.kv_type),
            gpu_layers=self.gpu_layers,
            variant=self.variant,
            device=self.device,
            priority=self.priority,
        )


class DemoSection(Section):
    """[demo]: the two small models that come with TARS."""

    models: bool | None = Field(None, description="Deploy them. Default: only where there is no [[deploy]].")
