"""What a node is to be, known before anything is opened or started: its configuration, its models, and both in the words of the parts.

Law of this file: it checks and translates; a configuration that is refused here has changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tars.catalogue import Catalogue
from tars.config import Config
from tars.core.types import Deployment, ModelEntry
from tars.mesh.advertising import builtin_names
from tars.mesh.hub import Hub
from tars.mesh.join_tokens import Invitation
from tars.mesh.model_store import FileStore
from tars.model_files import FileHashes
from tars.rpc.options import AccessOptions, EnvelopeLimits, RpcOptions
from tars.state_folder import SEQUENCES, StateFolder
from tars.workers.options import WorkerOptions

MODELS = "models"
"""The folder in the state folder where model files that are fetched are kept, unless [files] names another."""
DEMO_MODELS = ("tars-help-desk", "all-minilm-l6-v2")
"""What a node without any configuration serves: both come with the packages, so they need no network."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration whose models are all known, before anything is opened or started."""

    config: Config
    catalogue: Catalogue
    declared: tuple[Deployment, ...]
    unasked: tuple[Deployment, ...] = ()
    """Of `declared`, what nobody asked for: the demo models. A node that joins a mesh does not bring them along."""
    join: Invitation | None = None


def prepare(config: Config, model_files: tuple[Path, ...], join: str | None = None) -> Prepared:
    """Check what can be checked without starting anything. Raises `ConfigError`, `UnknownModel`, `BadModelFile` or `JoinRefused`."""
    catalogue = Catalogue.load(extra=list(config.model))
    # What was fetched before may be deployed by the configuration, too.
    file_store(config, catalogue, StateFolder(config.node.state_dir)).attach_fetched()
    declared = [replace(each, model=catalogue.resolve(each.model).name) for each in config.deployments]
    for file in model_files:
        declared.append(Deployment(catalogue.add_file(file).name))
    demo: list[Deployment] = []
    if config.demo.models or (config.demo_models and not model_files):
        demo = [Deployment(name) for name in DEMO_MODELS if name not in {each.model for each in declared}]
    invitation = None if join is None else Invitation.parse(join)
    unasked = () if config.demo.models else tuple(demo)
    return Prepared(config, catalogue, (*declared, *demo), unasked, invitation)


def check_files(prepared: Prepared) -> None:
    """Raise what is wrong with the first configured or deployed model whose file is missing or bad; a start only warns of it."""
    catalogue = prepared.catalogue
    for name in [*(each.model for each in prepared.declared), *(each.name for each in prepared.config.model)]:
        entry = catalogue.find(name)
        if entry is not None and (problem := catalogue.missing(entry)) is not None:
            raise problem


def rpc_options(config: Config) -> RpcOptions:
    """The configuration in the words of `rpc/`."""
    limits, security = config.limits, config.security
    return RpcOptions(
        envelope=EnvelopeLimits(
            max_body_bytes=limits.max_body_bytes,
            max_batch=limits.max_batch,
            max_depth=limits.max_depth,
            max_string_bytes=limits.max_string_bytes,
        ),
        access=AccessOptions(
            api_keys={key.name: key.key.get_secret_value() for key in security.api_key},
            allowed_hosts=security.allowed_hosts,
            allowed_origins=security.allowed_origins,
        ),
        max_concurrent_calls=limits.max_concurrent_calls,
        default_timeout_ms=limits.default_timeout_ms,
    )


def worker_options(config: Config) -> WorkerOptions:
    """The configuration in the words of `workers/`."""
    worker = config.worker
    return WorkerOptions(
        start_timeout_seconds=worker.start_timeout_seconds,
        ping_interval_seconds=worker.ping_interval_seconds,
        hang_seconds=worker.hang_seconds,
        abort_seconds=worker.abort_seconds,
        saved_folder=config.node.state_dir / SEQUENCES,
        backoff_initial_seconds=worker.backoff_initial_seconds,
        backoff_most_seconds=worker.backoff_most_seconds,
        stop_seconds=worker.stop_seconds,
        nice=worker.nice,
        queue_limit=config.limits.queue_per_replica,
    )


def file_store(config: Config, catalogue: Catalogue, folder: StateFolder) -> FileStore:
    """The node's model files, as [files] says; without peers."""
    files = config.files
    return FileStore(
        files.folder or folder.path / MODELS,
        catalogue,
        FileHashes(folder),
        hub=Hub() if files.hub else None,
        most_bytes_per_second=None if files.most_mib_per_second is None else files.most_mib_per_second * 2**20,
    )


def own_entry(catalogue: Catalogue, model: str) -> ModelEntry | None:
    """The entry of a model that other nodes' catalogues do not have; None for one that comes with TARS."""
    return None if model in builtin_names() else catalogue.find(model)
