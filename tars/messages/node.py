"""Results of `rpc.*`, `node.*`, `models.*` and `mesh.*`."""

from __future__ import annotations

from pydantic import Field

from tars.messages.base import MAX_NAME_LENGTH, Message
from tars.messages.files import TransferDescription


class PingResult(Message):
    """`node.ping`'s answer."""

    node: str
    version: str
    state: str = Field(description="`ready`, `loading`, `draining`.")


class DeviceDescription(Message):
    """One device as `node.describe` shows it; None is 'this device does not say'."""

    id: str
    kind: str
    name: str
    simulated: bool
    memory_total_bytes: int
    memory_free_bytes: int
    memory_held_bytes: int
    memory_capacity_bytes: int
    unified_memory: bool
    compute_capability: str | None
    precision: str
    temperature_celsius: int | None
    utilisation_percent: int | None
    power_watts: float | None
    driver: str | None
    notes: list[str]
    node_name: str = Field("", description="In a plan of several nodes: whose it is.")


class LoadProgress(Message):
    """How far a load is. Stages in order: `spawn`, `import`, `read`, `load`, `warm`, `ready`."""

    stage: str
    percent: float = Field(ge=0, le=100)


class MeasuredSpeeds(Message):
    """Measured on this replica after its load; None where it was not."""

    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = Field(None, description="One sequence alone.")
    decode_tokens_per_second_all_slots: float | None = Field(None, description="All slots busy, their sum.")
    texts_per_second: float | None = None


class TunedSettings(Message):
    """What a load measured and chose by itself; kept by the node per (device, model file, settings), so that the next load need not."""

    flash_attention: bool | None = None
    chunk: int | None = Field(None, description="Prompt tokens computed between two decode steps.")
    speeds: MeasuredSpeeds = Field(default_factory=MeasuredSpeeds)
    backend: str | None = Field(None, description="Embeddings: `torch-fp32`, `torch-bf16`, `onnx`, `openvino`...")
    batch_tokens: int | None = Field(None, description="Embeddings: the token budget of one forward pass.")


class EngineCounters(Message):
    """What an engine did since it was loaded, and how it stands now. All counts grow, but those called 'now'."""

    running: int = Field(0, description="Sequences, or texts, being computed now.")
    waiting: int = Field(0, description="Waiting for a slot, or for their batch, now.")
    kv_cells: int = Field(0, description="Tokens that the KV cache holds at most.")
    kv_used: int = Field(0, description="Tokens of running sequences in it now.")
    kv_cached: int = Field(0, description="Tokens of ended sequences kept in it now, for prompts that begin alike.")
    steps: int = Field(0, description="Calls of llama_decode, or forward passes.")
    prompt_tokens: int = Field(0, description="Prompt tokens of all calls, computed or reused.")
    prompt_tokens_cached: int = Field(0, description="How many of them were reused.")
    generated_tokens: int = 0
    preemptions: int = Field(0, description="Sequences that had to give up their KV cells and wait.")
    python_seconds: float = Field(
        0.0, description="Of the engine thread outside the native compute, while it had work."
    )
    native_seconds: float = Field(0.0, description="Inside it.")
    draft_tokens: int = Field(0, description="Tokens that a draft model proposed.")
    draft_accepted: int = 0
    texts: int = 0
    padding_tokens: int = Field(0, description="Embeddings: computed only to fill a batch's rectangle.")


class LoadedInfo(Message):
    """What a worker says of its loaded model."""

    model_kind: str
    memory_bytes: int = Field(
        description="Really taken by the worker: device memory on a GPU, resident growth on a CPU."
    )
    load_seconds: float
    context: int | None = None
    slots: int = 1
    dimensions: int | None = None
    max_input_tokens: int | None = None
    has_chat_template: bool = False
    architecture: str = ""
    backend: str = Field("", description="`llama.cpp`, `torch fp32 cpu`...")
    file_sha256: str | None = None
    speeds: MeasuredSpeeds = Field(default_factory=MeasuredSpeeds)
    tuned: TunedSettings = Field(default_factory=TunedSettings)
    adapters: list[str] = Field(default_factory=list, description="LoRA adapters that calls may name after a colon.")


class WaitingDescription(Message):
    """Calls that wait in front of a replica, and what became of those before them since the node saw it first."""

    interactive: int = Field(description="Waiting now.")
    batch: int = Field(description="Waiting now.")
    callers: int = Field(description="Whose they are.")
    longest_ms: float = Field(description="How long the one has waited that came first.")
    expected_ms: float = Field(description="What an interactive call of a caller who has none here would wait now.")
    passed: int = Field(description="Calls that were let in.")
    refused: dict[str, int] = Field(
        description="By reason: `late` (it would have begun too late for its deadline), `full`, `dropped` (from a full queue, for a "
        "caller who had less in it)."
    )


class ReplicaDescription(Message):
    """One replica: where, in what state, how much it really takes."""

    id: str
    model: str
    model_kind: str
    variant: str
    device: str
    device_name: str
    simulated: bool
    state: str
    progress: LoadProgress | None
    estimated_bytes: int
    info: LoadedInfo | None
    restarts: int
    active_calls: int
    queued_calls: int
    calls_total: int
    counters: EngineCounters | None = None
    waiting: WaitingDescription | None = None
    last_error: str | None
    reason: str = Field(description="Why it was placed here.")


class RecentError(Message):
    """One error that a caller got, for the status page; no content of the call."""

    at: float = Field(description="Unix time, seconds.")
    method: str
    error_kind: str
    message: str
    trace_id: str


class CallCounters(Message):
    """Since the node started."""

    total: int = 0
    failed: int = 0
    active: int = 0
    by_method: dict[str, int] = Field(default_factory=dict)
    with_key: dict[str, int] = Field(
        default_factory=dict,
        description="Calls with an idempotency key: `run` here, `repeated` (an earlier answer was given), `refused` (another body).",
    )


class PeerCalls(Message):
    """Calls that this node sent to one peer."""

    peer: str
    outcome: str = Field(description="`answered`, or the kind of the error.")
    calls: int


class AttemptCounts(Message):
    """Replicas that this node asked for its callers' calls, since it started."""

    why: str = Field(
        description="`first`, `retry`, `hedge` (a second one beside a slow one) or `continuation` (of a broken answer)."
    )
    outcome: str = Field(description="`answered`, the kind of the error, `late`, `hedge_lost` or `cancelled`.")
    attempts: int


class NodeDescription(Message):
    """`node.describe`'s answer: everything that a peer or a status page needs."""

    node: str
    name: str
    version: str
    state: str
    started_at: float = Field(description="Unix time, seconds.")
    uptime_seconds: float
    platform: str
    wsl2: bool
    devices: list[DeviceDescription]
    replicas: list[ReplicaDescription]
    calls: CallCounters
    recent_errors: list[RecentError]
    sent_to_peers: list[PeerCalls] = Field(default_factory=list, description="Since the node started.")
    calls_from_peers: int = Field(0, description="Calls that peers sent here, since the node started.")
    attempts: list[AttemptCounts] = Field(default_factory=list, description="Since the node started.")
    retries_refused: int = Field(0, description="Further attempts that the node's retry budget did not allow.")
    hedged_units: float = Field(0.0, description="Texts that were given to a second replica beside the first.")
    peers_silent: int = Field(0, description="How often a peer with calls of this node gave no sign of life any more.")
    transfers: list[TransferDescription] = Field(
        default_factory=list, description="Model files on their way to this node."
    )
    file_bytes_received: int = Field(0, description="Of model files, from peers and the hub, since the node started.")
    file_bytes_sent: int = Field(0, description="Of model files, to peers, since the node started.")


class PeerDescription(Message):
    """One node as this node sees it; a single node sees itself."""

    node: str
    name: str
    state: str = Field(description="`ALIVE`, `SUSPECT`, `DEAD`, `DRAINING`, `LEFT`.")
    addresses: list[str] = Field(description="Of its mesh listener; of a node alone, where clients reach it.")
    coordinator: bool
    version: str = ""
    client_url: str | None = Field(None, description="Where its clients reach it.")
    since: float | None = Field(
        None, description="Unix time, seconds: when this node began to see it in this state; None of itself."
    )


class PeersResult(Message):
    """`mesh.peers`."""

    peers: list[PeerDescription]
    isolated: bool = Field(False, description="No peer answers this node: look first at its own network.")


class ModelParams(Message):
    """A method about one model."""

    model: str = Field(max_length=MAX_NAME_LENGTH)


class DeployParams(Message):
    """`models.deploy`: see `core.types.Deployment`."""

    model: str = Field(max_length=MAX_NAME_LENGTH)
    replicas: int = Field(1, ge=1, le=64)
    context: int | None = Field(None, ge=64, le=1_048_576)
    slots: int | None = Field(
        None, ge=1, le=256, description="Sequences computed at once; default: 4 that share the KV cache of one context."
    )
    kv_tokens: int | None = Field(
        None,
        ge=64,
        le=268_435_456,
        description="Tokens in the KV cache in all, shared by the slots; default: each of the named slots has a whole context.",
    )
    kv_type: str = Field("f16", pattern="^(f16|q8_0|q4_0)$")
    gpu_layers: int | None = Field(
        None, ge=1, le=100_000, description="Only so many layers on the card, the output layer first; default: all."
    )
    variant: str | None = Field(None, max_length=MAX_NAME_LENGTH)
    device: str | None = Field(None, max_length=MAX_NAME_LENGTH)


class VerdictDescription(Message):
    """Why a model went, or did not go, to one device."""

    device: str
    device_name: str
    variant: str
    accepted: bool
    needed_bytes: int
    free_bytes: int
    reason: str
    node_name: str = ""


class AssignmentDescription(Message):
    """One planned replica."""

    replica: str
    model: str
    variant: str
    node: str
    node_name: str = ""
    device: str
    device_name: str
    needed_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    compute_bytes: int
    overhead_bytes: int
    measured: bool
    context: int
    slots: int
    kv_tokens: int = Field(0, description="In the KV cache in all; fewer than slots x context are shared.")
    gpu_layers: int
    reason: str


class DrainResult(Message):
    """`node.drain` and `node.resume`."""

    state: str
    active_calls: int
    moved: list[AssignmentDescription] = Field(
        default_factory=list, description="Where replicas of this node go; those here stay until these are ready."
    )
    unloaded: list[str] = Field(
        default_factory=list,
        description="Models whose replicas fit nowhere else: they answer again after `node.resume`.",
    )
    freed_bytes: int = Field(0, description="What this node's replicas hold, all of which comes back.")
    message: str = Field("", description="The same for people.")


class RefusalDescription(Message):
    """A model that fits nowhere, with bytes needed against bytes free per device."""

    model: str
    replicas_missing: int
    remedy: str
    verdicts: list[VerdictDescription]


class MoveDescription(Message):
    """A healthy replica on its way to another device; it answers here until its successor is ready there."""

    replica: str
    successor: str
    model: str
    source: str = Field(description="`RTX 3060 of pc1`.")
    target: str
    gain: str = Field(description="What the move is good for.")


class PlanResult(Message):
    """`mesh.plan`: the whole plan, also what `tars plan` prints."""

    assignments: list[AssignmentDescription]
    refusals: list[RefusalDescription]
    devices: list[DeviceDescription]
    moves: list[MoveDescription] = Field(default_factory=list)


class ExplainResult(Message):
    """`mesh.explain`: one model: where it is and why; why not elsewhere; what would make it fit."""

    model: str
    deployed: bool
    assignments: list[AssignmentDescription]
    verdicts: list[VerdictDescription]
    remedy: str | None
    replicas: list[ReplicaDescription]
    text: str = Field(description="The same for people, a few lines.")


class ModelPlace(Message):
    """A replica of a model on a node that may get calls."""

    replica: str
    node: str
    node_name: str
    device_name: str
    state: str


class ModelDescription(Message):
    """One model of the catalogue, or one that is served."""

    name: str
    aliases: list[str]
    model_kind: str
    variants: list[str]
    description: str
    licence: str
    adapters: list[str] = Field(default_factory=list, description="LoRA adapters: call the model as `name:adapter`.")
    deployed: bool
    replicas_wanted: int
    replicas_ready: int
    state: str = Field(description="`ready`, `loading`, `refused`, `failed`, `available`.")
    local: bool = Field(description="True where this node has a file of it.")
    places: list[ModelPlace] = Field(default_factory=list, description="Its replicas on all nodes.")


class ModelsResult(Message):
    """`models.list`: deployed ones first."""

    models: list[ModelDescription]


class DeployResult(Message):
    """`models.deploy`: what the plan makes of it; loading goes on after the answer."""

    model: str
    accepted: bool
    assignments: list[AssignmentDescription]
    message: str = Field(
        "", description="What it waits for, where no device has room before another replica has moved."
    )


class RemoveResult(Message):
    """`models.remove`."""

    model: str
    removed: bool
