"""`tars-node`: the composition root. It builds every part, serves, and takes all of it down again.

Law of this file: wiring only. It and `tars.cli` are the only ones that know everything; nobody imports them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
from aiohttp import web

from tars import __version__
from tars.config import load_config
from tars.core.addresses import own_addresses
from tars.core.types import NodeSnapshot
from tars.devices.inventory import Inventory
from tars.errors import TarsError
from tars.mesh.administration import Administration
from tars.mesh.client_keys import ClientKeys
from tars.mesh.coordinator import Coordinator
from tars.mesh.deployments import Deployments
from tars.mesh.draining import Draining
from tars.mesh.measured_memory import MeasuredMemory
from tars.mesh.model_store import FileStore
from tars.mesh.network_interfaces import NetworkWatch
from tars.mesh.operator_key import make_operator_key, remove_operator_key
from tars.mesh.replicated_store import ReplicatedStore
from tars.mesh.tuned_settings import TunedSettingsStore
from tars.node_mesh import NodeMesh, enter, founded
from tars.node_preparation import Prepared, check_files, file_store, own_entry, prepare, rpc_options, worker_options
from tars.node_report import NodeReport, set_up_logging
from tars.rpc.access import Access, access_middleware
from tars.rpc.admission import Admission
from tars.rpc.dispatcher import Dispatcher
from tars.rpc.http_server import add_rpc_routes, closing_middleware, refusal_renderer
from tars.rpc.listener import Listener, listen
from tars.rpc.mesh_listener import HINT_PATH, add_mesh_hint
from tars.rpc.options import RpcOptions
from tars.serving.local_service import LocalNodeService
from tars.state_folder import StateFolder
from tars.web.routes import PUBLIC_PATHS, add_web_routes, render_refusal
from tars.workers.engines_installed import probe_engines
from tars.workers.supervisor import ReplicaWorker

log = logging.getLogger(__name__)

LAST_WORDS_PART, LAST_WORDS_LEAST_SECONDS, LAST_WORDS_MOST_SECONDS = 0.2, 0.5, 2.0
"""Of the grace time, at its end: for calls to hear that it is over, and for the successors of answers to fetch their states. Whoever waits
for the process (`docker stop`) kills it when the grace time is over."""
CLOSE_SECONDS = 1.0
"""For connections that are still open after the grace time: status pages, idle clients."""
EXIT_USAGE = 2
"""The configuration, the port or the state folder cannot be used; nothing was started."""


class Node:
    """One running node: `start`, then `stop`."""

    def __init__(self, prepared: Prepared, report: NodeReport):
        self._config = prepared.config
        self._prepared = prepared
        self._report = report
        self._folder = StateFolder(prepared.config.node.state_dir)
        self._inventory: Inventory | None = None
        self._listener: Listener | None = None
        self._admission: Admission | None = None
        self._rounds: asyncio.Task[None] | None = None
        self._hashing: asyncio.Task[None] | None = None
        self.files: FileStore | None = None
        self._store: ReplicatedStore | None = None
        self._saving: asyncio.Task[None] | None = None
        self._mesh: NodeMesh | None = None

    async def start(self) -> None:
        """Take the state folder, find the devices, open the port, begin to load; returns before the models are loaded."""
        config, prepared = self._config, self._prepared
        self._folder.open()
        # First what takes seconds: whoever has joined is expected to answer.
        inventory, engines = await asyncio.gather(
            asyncio.to_thread(Inventory, self._folder.node_id(), config.devices), asyncio.to_thread(probe_engines)
        )
        self._inventory = inventory
        identity, store = await enter(config, self._folder, prepared.join)
        self._store = store
        node_id = store.map.node
        if node_id != inventory.node:
            # It was thrown out of this mesh before, and joined as another node.
            inventory.close()
            inventory = self._inventory = await asyncio.to_thread(Inventory, node_id, config.devices)
        keys = ClientKeys(store, {each.name: each.key.get_secret_value() for each in config.security.api_key})
        self.files = file_store(config, prepared.catalogue, self._folder)
        self.files.attach_fetched()
        declared = prepared.declared
        if identity is not None:
            self._mesh = NodeMesh(config, identity, store, self._folder, keys, self.files, prepared.join)
            if not founded(identity, store):
                declared = tuple(each for each in declared if each not in prepared.unasked)
        mesh, options = self._mesh, worker_options(config)
        self.coordinator = Coordinator(
            NodeSnapshot(node_id, config.node.name, priority=config.node.priority),
            probe=lambda held: engines.annotate(inventory.snapshot(held, engines.cpu_share)),
            catalogue=prepared.catalogue,
            records=store,
            deployments=Deployments(store, declared, self._folder, entry_of=partial(own_entry, prepared.catalogue)),
            measured=MeasuredMemory(store),
            tuned=TunedSettingsStore(self._folder),
            engines=config.engines,
            make_worker=lambda spec, on_change: ReplicaWorker(spec, options, on_change),
            process_memory=inventory.process_memory,
            mesh=(lambda: None) if mesh is None else mesh.view,
            takes_part=lambda: mesh is None or mesh.takes_part,
            files=self.files,
            hub=config.files.hub,
            draining=Draining(self._folder),
            client_url=self._client_url,
            transfers=self.files.transfers,
        )
        self.files.on_change = self.coordinator.wake
        self.service = LocalNodeService(
            self.coordinator,
            name=config.node.name,
            redacted_config=config.redacted(),
            wsl2=inventory.wsl2 is not None,
            addresses=lambda: [self.url] if mesh is None else list(mesh.addresses()),
            mesh=Administration(keys, store) if mesh is None else mesh.administration(),
            peers=None if mesh is None else mesh.peers,
            states=None if mesh is None else mesh.states,
            keys_at=None if mesh is None else mesh.keys_at,
            on_traffic=(lambda node: None) if mesh is None else mesh.gossip.traffic,
            on_drain=(lambda draining: None) if mesh is None else mesh.gossip.drain,
            others=list if mesh is None else mesh.described,
            files=self.files,
            file_bytes_sent=(lambda: 0) if mesh is None else mesh.file_bytes_sent,
            load_on_demand=config.node.load_on_demand,
        )
        rpc = rpc_options(config)
        self._listener, dispatcher = await self._listen(rpc, keys)
        keys.accept_operator_key(make_operator_key(self._folder.path, self._listener.port))
        if mesh is not None:
            await self.coordinator.announce()
            await mesh.start(dispatcher, rpc, self.service, self.coordinator)
        self._report.started(
            self.url,
            config.node.name,
            node_id,
            await self.coordinator.snapshot(),
            [*inventory.warnings, *filter(None, [inventory.no_gpu_reason])],
        )
        if (reached := self._client_url()) is not None:
            self._report.elsewhere(reached)
        # A collector keeps what it is told: secrets are for a person at the terminal.
        told = not self._report.is_collected
        if config.exposed and not keys.exist:
            self._report.first_key(keys.first_admin_key() if told else None)
        if mesh is not None:
            self._report.in_mesh(mesh.addresses(), mesh.names(), mesh.invitation() if told else None)
        self._saving = asyncio.create_task(store.run(), name="saving the replicated map")
        self._rounds = asyncio.create_task(self.coordinator.run(), name="placement rounds")
        self._hashing = asyncio.create_task(self.files.run(), name="hash model files")

    @property
    def url(self) -> str:
        """Where this node answers."""
        assert self._listener is not None
        return self._listener.url

    def _client_url(self) -> str | None:
        """Where clients on other PCs reach this node; None where only this PC does."""
        if self._listener is None or not self._config.exposed:
            return None
        reached = own_addresses(self._config.node.address.host, self._listener.port, NetworkWatch().addresses)
        return f"http://{reached[0]}" if reached else None

    async def _listen(self, options: RpcOptions, keys: ClientKeys) -> tuple[Listener, Dispatcher]:
        access = Access(options.access, keys, open_without_keys=not self._config.exposed)

        application = web.Application(client_max_size=self._config.limits.max_body_bytes)
        dispatcher = add_rpc_routes(application, self.service, options)
        refuse = refusal_renderer(dispatcher, partial(render_refusal, node=self.service.node_id))
        application.middlewares.append(access_middleware(access, refuse, PUBLIC_PATHS | {HINT_PATH}))
        application.middlewares.append(closing_middleware(dispatcher.admission))
        self._admission = dispatcher.admission
        # Before the faces, whose last route takes what is left.
        add_mesh_hint(application, lambda: None if self._mesh is None else self._mesh.port)
        add_web_routes(application, self.service, options, admission=dispatcher.admission)
        address = self._config.node.address
        listener = await listen(application, address.host, address.port, access, shutdown_seconds=CLOSE_SECONDS)
        return listener, dispatcher

    async def keep_reporting(self) -> None:
        """Say what is loaded where, as it happens, and once what can be tried: when nothing is left to load. Until cancelled."""
        settled = False
        while True:
            self._report.progress(self.coordinator)
            if not settled and self.coordinator.settled():
                settled = True
                self._report.ready(self.url, self.coordinator)
            await self.coordinator.changed()

    async def stop(self, grace: float) -> None:
        """Take no more calls, let the running ones end within `grace` seconds, then end every worker and close everything.

        It closes what a `start` that failed midway had opened, too. When it is cancelled, call it again with less grace.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + grace
        if self._listener is not None:
            self.service.refuse_calls()
            if self._admission is not None:
                self._admission.close()
            # First, so that the others take over meanwhile.
            await asyncio.gather(self.service.hand_over(), *([] if self._mesh is None else [self._mesh.leave()]))
            last_words = min(LAST_WORDS_MOST_SECONDS, LAST_WORDS_PART * grace)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(ends_at - last_words):
                    await self.service.idle()
            if self._admission is not None:
                self._admission.end()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(LAST_WORDS_LEAST_SECONDS, last_words)):
                    await self.service.idle()
                    await self.service.handed_over()
            await self.service.close()
        if self._hashing is not None:
            self._hashing.cancel()
        if self.files is not None:
            await self.files.close()
        if self._rounds is not None:
            self._rounds.cancel()
            # Not `await` under a suppress, which would swallow a cancellation of this very call: the second Ctrl-C.
            await asyncio.wait({self._rounds})
            await self.coordinator.stop(max(0.0, ends_at - loop.time()))
        if self._mesh is not None:
            await self._mesh.stop()
        if self._listener is not None:
            await self._listener.close()
            remove_operator_key(self._folder.path)
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait({self._saving})
        if self._store is not None:
            self._store.close()
        if self._inventory is not None:
            self._inventory.close()
        self._folder.close()


async def serve(prepared: Prepared, report: NodeReport) -> None:
    """Run a node until SIGTERM or SIGINT; a second signal ends the grace time at once."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    asked_again = asyncio.Event()

    def on_signal() -> None:
        (asked_again if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    node = Node(prepared, report)
    try:
        await node.start()
        reporting = asyncio.create_task(node.keep_reporting(), name="report")
        await asked.wait()
        reporting.cancel()
        report.stopping(node.service.active_calls, prepared.config.node.grace_seconds)
    finally:
        stopping = asyncio.ensure_future(node.stop(prepared.config.node.grace_seconds))
        hurry = asyncio.ensure_future(asked_again.wait())
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            stopping.cancel()
            await asyncio.wait({stopping})
            stopping = asyncio.ensure_future(node.stop(0.0))
        await stopping
    report.stopped()
    # All is saved and said. A signal that still comes (a service manager's second one) ends the process at once, as one that ended well.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, lambda *_: os._exit(0))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML configuration; see node_configs/.")
@click.option("--listen", metavar="HOST:PORT", help="Where to listen. Default: 127.0.0.1:8000.")
@click.option(
    "--model",
    "model_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Serve this GGUF file (or sentence-transformers folder) instead of the demo models. May be repeated.",
)
@click.option(
    "--join", metavar="TOKEN@HOST:PORT", help="Join a mesh: the line that the first PC, or `tars token new`, printed."
)
@click.option(
    "--mesh-listen", metavar="HOST:PORT", help="Where peers reach this node. Default: the port after --listen's."
)
@click.option("--state-dir", type=click.Path(path_type=Path), help="State folder. Default: ~/.local/state/tars.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="json: one object a line.")
@click.option("--check", is_flag=True, help="Check the configuration and end.")
@click.version_option(__version__, prog_name="tars-node")
def main(
    config_file: Path | None,
    listen: str | None,
    model_files: tuple[Path, ...],
    join: str | None,
    mesh_listen: str | None,
    state_dir: Path | None,
    log_format: str | None,
    check: bool,
) -> None:
    """Serve the models of this PC: JSON-RPC at /rpc, the OpenAI API at /v1, a status page at /.

    Without arguments: this PC's devices, the two demo models, http://127.0.0.1:8000.
    """
    overrides: Mapping[str, object] = {
        "node.listen": listen,
        "mesh.listen": mesh_listen,
        "node.state_dir": state_dir,
        "node.log_format": log_format,
    }
    try:
        config = load_config(config_file, environment=os.environ, overrides=overrides)
        prepared = prepare(config, model_files, join)
        if check:
            check_files(prepared)
            models = ", ".join(each.model for each in prepared.declared) or "none"
            click.echo(
                f"The configuration is right: {config.node.name} would listen on {config.node.address}; models: {models}."
            )
            return
        set_up_logging(config.node.log_format)
        asyncio.run(serve(prepared, NodeReport(config.node.log_format)))
        # The interpreter's own end gives Python's handlers back, not this.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    except TarsError as error:
        click.echo(f"tars-node: {error.message}", err=True)
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
