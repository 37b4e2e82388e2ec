"""What a person at the terminal reads of a node: what it found, what it loaded where, how much that took, what to try next.

Law of this file: words only. With `log_format = json` the same events are log records, so that a collector's lines stay JSON.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence

import orjson
from aiohttp.http_exceptions import HttpProcessingError

from tars import __version__
from tars.config import DEFAULT_PORT
from tars.core.types import Bytes, DeviceKind, DeviceSnapshot, ModelKind, NodeSnapshot, ReplicaState
from tars.mesh.coordinator import Coordinator, LiveReplica

log = logging.getLogger("tars.node")

DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"
"""Where the `tars` command looks when it is not told."""
_LINES_REMEMBERED = 100
"""Of the network libraries, to know a repetition: they have about a dozen kinds of them."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


class CallersNoise(logging.Filter):
    """Keeps strangers from filling the log: what the network libraries say is said once a second, and a caller's broken HTTP in one line.

    One burst of connections over the limit of open files made 65,000 tracebacks in six seconds (measured).
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._said: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a repetition."""
        if record.name.partition(".")[0] not in ("asyncio", "aiohttp"):
            return True
        if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
            record.exc_info = None
        first_line = str(record.msg).partition("\n")[0]
        key, now = (record.name, first_line), self._now()
        if now - self._said.get(key, -math.inf) < 1.0:
            return False
        if len(self._said) >= _LINES_REMEMBERED:
            self._said.clear()
        self._said[key] = now
        return True


def set_up_logging(log_format: str) -> None:
    """Log to stderr: people get warnings (the report tells the rest), a collector gets everything from `info` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(CallersNoise())
    if log_format == "json":
        handler.setFormatter(JsonLines())
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class NodeReport:
    """Lines for a person on stdout, or log records."""

    def __init__(self, log_format: str):
        self._json = log_format == "json"
        self._said: set[tuple[str, str]] = set()
        self._here: dict[str, str] = {}
        """Replicas of which it was said that they load or are ready, with how people call them."""
        self._began = time.monotonic()

    def started(self, url: str, name: str, node_id: str, snapshot: NodeSnapshot, warnings: Sequence[str]) -> None:
        """The port is open; nothing is loaded yet."""
        self._say(f"TARS {__version__}  node {name}  {url}  (id {node_id})")
        for device in snapshot.devices:
            self._say(f"  device   {describe_device_line(device)}")
            for reason in dict.fromkeys(reason for _, reason in device.cannot_run):
                self._say(f"           {reason}")
        for warning in warnings:
            self._say(f"  note     {warning}")

    def elsewhere(self, url: str) -> None:
        """Where clients on other PCs reach the node."""
        self._say(f"  clients  on other PCs: {url}")

    @property
    def is_collected(self) -> bool:
        """Whether what is said goes into a log that others keep."""
        return self._json

    def first_key(self, key: str | None) -> None:
        """The admin key that the node made for itself, because others can reach it: shown this once. None: none was made."""
        if key is None:
            self._say(
                "  key      other machines need an API key, and there is none yet: `tars key new NAME` on this PC makes one"
            )
            return
        self._say("  key      other machines need an API key. This one may do everything, and is shown this once:")
        self._say(f"             {key}")
        self._say("           `tars key new NAME` makes more; on this PC `tars` needs none")

    def in_mesh(self, addresses: Sequence[str], others: Sequence[str], invitation: str | None) -> None:
        """The port for peers is open. `invitation`: what the next PC gives to --join, where this node is alone so far."""
        where = addresses[0] if addresses else "nowhere: this PC has no network"
        self._say(f"  mesh     peers reach this node at {where}" + (f"; with {', '.join(others)}" if others else ""))
        if invitation is not None:
            self._say(
                "           add the next PC with one line there (good once, for an hour; `tars token new` makes another):"
            )
            self._say(f"             tars-node --join {invitation}")

    def progress(self, coordinator: Coordinator) -> None:
        """Say each replica's beginning and end once."""
        for replica in [replica for replica in self._here if replica not in coordinator.replicas]:
            self._say(f"  unloaded {self._here.pop(replica)}")
            # It may come back, and that is news again.
            self._said = {(subject, event) for subject, event in self._said if subject != replica}
        for live in coordinator.replicas.values():
            state = live.worker.state
            self._here[live.assignment.replica] = f"{live.assignment.model} from {_where(live)}"
            if state in (ReplicaState.STARTING, ReplicaState.LOADING):
                self._once(
                    live.assignment.replica, "loading", f"  loading  {live.assignment.model} on {_where(live)} ..."
                )
            elif state is ReplicaState.READY:
                self._once(live.assignment.replica, f"ready {live.worker.restarts}", f"  ready    {_loaded(live)}")
            elif state is ReplicaState.FAILED and live.worker.last_error is not None:
                self._once(
                    live.assignment.replica,
                    "failed",
                    f"  FAILED   {live.assignment.model}: {live.worker.last_error.message}",
                )
        for model, problem in coordinator.problems.items():
            self._once(model, problem.kind, f"  refused  {model}: {problem.message}")

    def ready(self, url: str, coordinator: Coordinator) -> None:
        """Everything that could be loaded is."""
        live = [each for each in coordinator.replicas.values() if each.worker.state is ReplicaState.READY]
        if not live and not coordinator.replicas and not coordinator.problems:
            self._say(
                f"  no model is to be loaded here now; `tars deploy MODEL` asks for one. {url}/ shows the state     Ctrl-C to stop"
            )
            return
        if not live:
            self._say(f"  no model is ready; the lines above say why. {url}/ shows the state     Ctrl-C to stop")
            return
        seconds = time.monotonic() - self._began
        self._say(f"  {len(live)} model{'s' * (len(live) != 1)} ready after {seconds:.1f} s. Try:")
        tars = "tars" if url == DEFAULT_URL else f"tars --url {url}"
        if any(each.kind is ModelKind.CHAT for each in live):
            self._say(f'    {tars} chat "How do I add a second PC?"')
        if any(each.kind is ModelKind.EMBEDDING for each in live):
            self._say(f'    {tars} embed "a sentence" "another one"')
        if any(each.kind is ModelKind.RERANK for each in live):
            self._say(f'    {tars} rerank "a question" "a text" "another one"')
        self._say(f"    {url}/  in a browser     {url}/v1  for OpenAI clients     Ctrl-C to stop")

    def stopping(self, active_calls: int, grace: float) -> None:
        """A signal came."""
        running = (
            f"; up to {grace:.0f} s for {active_calls} running call{'s' * (active_calls != 1)}" if active_calls else ""
        )
        self._say(f"  stopping: no new calls{running} (again to end at once)")

    def stopped(self) -> None:
        """Everything is closed."""
        self._say("  stopped")

    def _once(self, subject: str, event: str, line: str) -> None:
        if (subject, event) not in self._said:
            self._said.add((subject, event))
            self._say(line)

    def _say(self, line: str) -> None:
        if self._json:
            log.info("%s", line.strip())
        else:
            print(line, flush=True)


def describe_device_line(device: DeviceSnapshot) -> str:
    """`NVIDIA GeForce RTX 3060 (simulated)  11.6 GiB, 11.1 GiB for models  cc 8.6, bf16, driver 550`."""
    facts = [f"cc {device.compute_capability[0]}.{device.compute_capability[1]}"] if device.compute_capability else []
    if device.kind is DeviceKind.CPU and device.cpu_threads:
        facts.append(f"{device.cpu_threads} threads")
    facts.append(device.precision.value)
    if device.driver:
        facts.append(f"driver {device.driver}")
    label = f"{device.name} (simulated)" if device.simulated else device.name
    return f"{label}  {device.memory_total}, {device.capacity} for models  {', '.join(facts)}"


def _where(live: LiveReplica) -> str:
    return f"{live.device.name} (simulated)" if live.device.simulated else live.device.name


def _loaded(live: LiveReplica) -> str:
    info = live.worker.info
    assert info is not None
    speeds = info.speeds
    facts = [f"{Bytes(info.memory_bytes)} in {info.load_seconds:.1f} s", info.backend]
    if info.context:
        facts.append(f"context {info.context}")
    if info.dimensions:
        facts.append(f"{info.dimensions} dimensions")
    if speeds.decode_tokens_per_second:
        facts.append(f"{speeds.decode_tokens_per_second:.0f} tokens/s")
    if speeds.texts_per_second:
        facts.append(f"{speeds.texts_per_second:.0f} texts/s")
    return f"{live.assignment.model} {live.assignment.variant} on {_where(live)}: {', '.join(fact for fact in facts if fact)}"
