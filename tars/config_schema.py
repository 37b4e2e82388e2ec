"""The keys of a configuration: their types, bounds and defaults, each with its reason.

Law of this file: frozen, strict and closed models; no file and no environment is read here (`config.py` does), no device is probed.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from tars.core.addresses import parse as parse_address
from tars.core.tuning import SLOTS
from tars.core.types import Bytes, Deployment, DeviceKind, KvType, ModelKind
from tars.messages.base import MAX_TIMEOUT_MS

DEFAULT_PORT = 8000
"""vLLM's and most OpenAI-compatible servers' port, so that clients' examples work unchanged."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where a node listens. Port 0 lets the system choose a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """`127.0.0.1:8000`, `localhost:8000` or `[::1]:8000`; raises ValueError that says which form is right."""
        host, separator, port = text.rpartition(":")
        wrong = f'"{text}" is not host:port, such as "127.0.0.1:{DEFAULT_PORT}" or "[::1]:{DEFAULT_PORT}"'
        if not separator or not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
            raise ValueError(wrong)
        if host.startswith("[") and host.endswith("]"):
            try:
                ipaddress.IPv6Address(host[1:-1].partition("%")[0])
            except ValueError:
                raise ValueError(wrong) from None
            return cls(host[1:-1], int(port))
        if ":" in host:
            raise ValueError(f'"{text}": an IPv6 address needs brackets, such as "[::1]:{DEFAULT_PORT}"')
        if any(character.isspace() or character in "/@[]" for character in host):
            raise ValueError(wrong)
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """True only for addresses that no other machine can reach; a name other than localhost counts as reachable."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Section(BaseModel):
    """Frozen, strict and closed: an unknown key is an error with its line."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


def _host_label() -> str:
    """The host's name up to the first dot, without what `node.name` does not allow: an odd name must not stop a node from starting."""
    label = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().partition(".")[0]).lstrip("_-")
    return label[:63] or "node"


class NodeSection(Section):
    """[node]: this process."""

    name: str = Field(
        default_factory=_host_label,
        min_length=1,
        max_length=63,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="For people: shown in plans and on the status page. Default: the host's name. At most a DNS label's 63 characters.",
    )
    listen: str = Field(
        f"127.0.0.1:{DEFAULT_PORT}",
        description="host:port. Loopback by default: a GPU on the network without a key is everybody's GPU.",
    )
    state_dir: Path = Field(
        Path("~/.local/state/tars"),
        strict=False,
        description="Node id, deployments, measured memory. Default: $XDG_STATE_HOME/tars, else ~/.local/state/tars.",
    )
    grace_seconds: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="How long running calls may go on after SIGTERM. 10 s is what `docker stop` waits before it kills.",
    )
    log_format: Literal["text", "json"] = Field("text", description="json: one object a line, for a log collector.")
    priority: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="Highest priority coordinates; ties go to the smallest node id. Give it to the PC that stays on.",
    )

    load_on_demand: bool = Field(
        True,
        description="A call that names a model which nobody deployed, and whose file is in the mesh, deploys it where there is room and "
        "waits for it. It moves nothing that others run, and fetches nothing from outside; `tars remove` gives the memory back.",
    )

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        ListenAddress.parse(value)
        return value

    @field_validator("state_dir")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()

    @property
    def address(self) -> ListenAddress:
        """`listen`, parsed."""
        return ListenAddress.parse(self.listen)


class LimitsSection(Section):
    """[limits]: the bounds of one call and of all calls; each has a clear error when it is met."""

    max_body_bytes: int = Field(
        8 * 2**20,
        ge=1024,
        le=2**30,
        description="8 MiB holds 2,048 texts of 4,000 characters; more in one call only delays everybody's first byte.",
    )
    max_batch: int = Field(
        64,
        ge=1,
        le=10_000,
        description="JSON-RPC batch length. 100,000 junk elements blocked the loop for 4.9 s (measured).",
    )
    max_depth: int = Field(
        64,
        ge=8,
        le=250,
        description="JSON nesting. orjson writes about 253 levels, no method needs more than a JSON schema's dozen or two.",
    )
    max_string_bytes: int = Field(
        4 * 2**20,
        ge=1024,
        le=2**30,
        description="One string. A million tokens of English are about 4 MiB; no context here is longer.",
    )
    max_concurrent_calls: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Calls in progress on this node, queued ones included; the next is told to come back later.",
    )
    queue_per_replica: int = Field(
        64,
        ge=0,
        le=100_000,
        description="Calls waiting for one replica. More than 64 behind one GPU is minutes: better to answer 'overloaded' at once.",
    )
    default_timeout_ms: int = Field(
        300_000,
        ge=1,
        le=MAX_TIMEOUT_MS,
        description="For calls that name no budget: 5 minutes, a long answer on a CPU.",
    )


class ApiKey(Section):
    """[[security.api_key]]: who may call. In the environment: `TARS_SECURITY_API_KEY=name:key,name:key`."""

    name: str = Field(min_length=1, max_length=63, description="Who holds it: appears in logs, the key never does.")
    key: SecretStr = Field(
        strict=False,
        description="At least 16 characters: 16 random ones of base64 hold 96 bits, beyond guessing over a network.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_and_key(cls, value: object) -> object:
        if isinstance(value, str):
            name, separator, key = value.partition(":")
            return {"name": name, "key": key} if separator else {"name": name}
        return value

    @field_validator("key")
    @classmethod
    def _long_enough(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < 16:
            raise ValueError("a key needs at least 16 characters")
        if not value.get_secret_value().isascii() or not value.get_secret_value().isprintable():
            raise ValueError("a key may hold only printable ASCII: it travels in an HTTP header")
        return value


class SecuritySection(Section):
    """[security]: who may call this node, and under which names."""

    api_key: tuple[ApiKey, ...] = Field(
        (),
        strict=False,
        description="Keys of this node alone, each an admin's. Keys that work on every node of the mesh: `tars key new`. A node that "
        "listens beyond loopback and has none makes an admin key on its first start and prints it once.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Host headers to accept beside the address that the node listens on (DNS rebinding).",
    )
    allowed_origins: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Web pages that may call from a browser, such as https://chat.example.org; never *.",
    )

    @field_validator("api_key")
    @classmethod
    def _one_key_each(cls, value: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        if len({key.name for key in value}) < len(value):
            raise ValueError("two API keys have the same name")
        return value

    @field_validator("allowed_hosts", "allowed_origins")
    @classmethod
    def _exact(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("*" in entry or not entry for entry in value):
            raise ValueError("entries are compared exactly: no * and no empty ones")
        return value


class DeclaredDevice(Section):
    """What [[devices.simulated]] and [[devices.expected]] share."""

    name: str = Field(min_length=1, max_length=100)
    memory_mib: int = Field(
        ge=64, le=2**24, description="What CUDA shows, not what the box says: a 12 GB 3060 shows 11,909."
    )
    compute_capability: str = Field(
        "8.6",
        pattern=r"^\d{1,2}\.\d$",
        description="Decides the precision: bf16 from 8.0, fp16 from 7.0. 8.6 is the RTX 30 series.",
    )

    @property
    def capability(self) -> tuple[int, int]:
        """`compute_capability` as (major, minor)."""
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)

    @property
    def memory(self) -> Bytes:
        """`memory_mib` in bytes."""
        return Bytes.mib(self.memory_mib)


class SimulatedDevice(DeclaredDevice):
    """[[devices.simulated]]: a declared memory that computes on the CPU; labelled simulated wherever it is shown."""


class ExpectedDevice(DeclaredDevice):
    """[[devices.expected]]: what this PC has. `tars plan --node FILE` plans with it; at start a missing one is warned about."""

    kind: DeviceKind = Field(DeviceKind.CUDA, strict=False, description="cuda, or cpu for a box's processor and RAM.")
    memory_free_mib: int | None = Field(
        None, ge=0, le=2**24, description="What is usually free there beside the desktop; default: all of it."
    )
    cpu_threads: int | None = Field(None, ge=1, le=4096, description="For kind = cpu.")

    @model_validator(mode="after")
    def _free_within_total(self) -> ExpectedDevice:
        if self.memory_free_mib is not None and self.memory_free_mib > self.memory_mib:
            raise ValueError("memory_free_mib is more than memory_mib")
        return self

    @property
    def memory_free(self) -> Bytes:
        """Free bytes, all of them where the file does not say."""
        return self.memory if self.memory_free_mib is None else Bytes.mib(self.memory_free_mib)


class DeviceCap(Section):
    """[[devices.cap]]: TARS holds at most so much there, whatever is free."""

    device: str = Field(min_length=1, description="A device id, a device's name, or `cpu`.")
    memory_mib: int = Field(ge=0, le=2**24, description="0: leave this device alone.")

    @property
    def memory(self) -> Bytes:
        """`memory_mib` in bytes."""
        return Bytes.mib(self.memory_mib)


class DevicesSection(Section):
    """[devices]: what may be used, and what is left for others."""

    nvml: bool = Field(True, description="Look for NVIDIA GPUs.")
    cpu: bool = Field(True, description="Offer this PC's processor and RAM.")
    reserve_mib: int = Field(
        512,
        ge=0,
        le=2**20,
        description="Kept free on every GPU for the desktop and fragmentation. Half of what llama.cpp's --fit keeps (1,024): "
        "the planner counts buffers and the CUDA context itself.",
    )
    host_memory_reserve_mib: int = Field(
        2048, ge=0, le=2**24, description="RAM kept for the system and the file cache: a PC that swaps answers nobody."
    )
    simulated: tuple[SimulatedDevice, ...] = Field((), strict=False)
    expected: tuple[ExpectedDevice, ...] = Field((), strict=False)
    cap: tuple[DeviceCap, ...] = Field((), strict=False)

    @property
    def reserve(self) -> Bytes:
        """`reserve_mib` in bytes."""
        return Bytes.mib(self.reserve_mib)

    @property
    def host_memory_reserve(self) -> Bytes:
        """`host_memory_reserve_mib` in bytes."""
        return Bytes.mib(self.host_memory_reserve_mib)


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
        "itself, half as long again as that. More makes prompts wait less and answers less smooth. Never less than 16 tokens are computed.",
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


class MeshSection(Section):
    """[mesh]: how this node and its peers find each other."""

    listen: str | None = Field(
        None,
        description="host:port for peers (mutual TLS). Default: node.listen's host and the port after it, unless that is loopback.",
    )
    advertise: tuple[str, ...] = Field(
        (),
        strict=False,
        description="host:port under which peers reach this node, best first, where it cannot know them itself (WSL2, a router).",
    )
    seeds: tuple[str, ...] = Field(
        (),
        strict=False,
        description="host:port of peers to try always: other subnets, tailnets and WSL2 carry no multicast.",
    )
    mdns: bool = Field(True, description="Announce this node on the LAN and look for others (multicast DNS).")
    probe_seconds: float = Field(
        0.5,
        gt=0,
        le=60,
        description="How often a peer is asked whether it lives; a dead one is known within ten of them.",
    )

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            ListenAddress.parse(value)
        return value

    @field_validator("advertise", "seeds")
    @classmethod
    def _hosts_and_ports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(parse_address(address)) for address in value)


class FilesSection(Section):
    """[files]: where model files are kept, and how they travel."""

    folder: Path | None = Field(
        None,
        strict=False,
        description="Where model files that are fetched are kept. Default: models in the state folder.",
    )
    most_mib_per_second: float | None = Field(
        None, gt=0, description="Bandwidth cap of copying model files, each way; default: none."
    )
    hub: bool = Field(True, description="Ask Hugging Face for a model's file where no peer has it.")

    @field_validator("folder")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()


class DemoSection(Section):
    """[demo]: the two small models that come with TARS."""

    models: bool | None = Field(None, description="Deploy them. Default: only where there is no [[deploy]].")


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
