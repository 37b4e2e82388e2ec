"""The whole configuration: its tables, the rules between them, and what of it may be shown.

Law of this file: a rule that one table can check by itself stands with that table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from tars.config_schema.devices import DevicesSection
from tars.config_schema.mesh import FilesSection, MeshSection
from tars.config_schema.models import DemoSection, DeploySection, ModelSource
from tars.config_schema.node import LimitsSection, NodeSection
from tars.config_schema.section import Section
from tars.config_schema.security import SecuritySection
from tars.config_schema.workers import EnginesSection, WorkerSection
from tars.core.types import Deployment


class Config(Section):
    """The whole configuration in force. Make one with `load_config`."""

    node: NodeSection = Field(default_factory=NodeSection)
    limits: LimitsSection = Field(default_factory=LimitsSection)
    security: SecuritySection = Field(default_factory=SecuritySection)
    devices: DevicesSection = Field(default_factory=DevicesSection)
    mesh: MeshSection = Field(default_factory=MeshSection)
    files: FilesSection = Field(default_factory=FilesSection)
    worker: WorkerSection = Field(default_factory=WorkerSection)
    engines: EnginesSection = Field(default_factory=EnginesSection)
    demo: DemoSection = Field(default_factory=DemoSection)
    model: tuple[ModelSource, ...] = Field((), strict=False)
    deploy: tuple[DeploySection, ...] = Field((), strict=False)

    @field_validator("model")
    @classmethod
    def _one_name_each(cls, value: tuple[ModelSource, ...]) -> tuple[ModelSource, ...]:
        names = [name for model in value for name in (model.name, *model.aliases)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two [[model]] tables claim the name {twice[0]}")
        return value

    @field_validator("deploy")
    @classmethod
    def _one_deploy_each(cls, value: tuple[DeploySection, ...]) -> tuple[DeploySection, ...]:
        names = [deploy.model for deploy in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two [[deploy]] tables name {twice[0]}; write one with replicas = {names.count(twice[0])}"
            )
        return value

    @property
    def demo_models(self) -> bool:
        """Whether the two demo models are deployed."""
        return not self.deploy if self.demo.models is None else self.demo.models

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """What [[deploy]] wants, in the planner's form."""
        return tuple(deploy.to_deployment() for deploy in self.deploy)

    def redacted(self) -> dict[str, Any]:
        """Plain JSON values for callers: every secret is `***`, and of a path only its last part is shown."""
        plain = self.model_dump(mode="json")
        for key in plain["security"]["api_key"]:
            key["key"] = "***"
        adapters = [adapter for model in plain["model"] for adapter in model["adapters"]]
        drafted = [model for model in plain["model"] if model["draft"] is not None]
        for place, path in [
            (plain["node"], "state_dir"),
            *([(plain["files"], "folder")] if plain["files"]["folder"] is not None else []),
            *((each, "path") for each in (*plain["model"], *adapters)),
            *((model, "draft") for model in drafted),
        ]:
            place[path] = f".../{Path(place[path]).name}"
        return plain

    @property
    def exposed(self) -> bool:
        """Whether other machines can reach this node's port for clients; then a key is asked for, also while there is none yet."""
        return not self.node.address.is_loopback
