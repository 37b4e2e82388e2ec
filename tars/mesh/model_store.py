"""The model files of this node: what it has, and who waits for what it lacks.

Law of this file: peers are asked first, then the hub. Two who want the same file share one transfer; the last one who stops waiting ends
it, and what came is kept. What was tried stands in the error, place by place.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tars.catalogue import Catalogue
from tars.core.records import HeldFile
from tars.core.types import ModelEntry, NodeId, Variant
from tars.errors import (
    BadModelFile,
    ConfigError,
    DiskFull,
    InvalidParams,
    ModelError,
    ModelFileMissing,
    TransferFailed,
)
from tars.mesh import local_copy
from tars.mesh.fetched_folder import MARGIN, FetchedFolder, is_name
from tars.mesh.file_transfer import Progress, SourcesExhausted
from tars.mesh.held_files import HeldFiles, SharedFile
from tars.mesh.hub import TITLE, Hub, HubName, hub_name
from tars.mesh.model_fetch import HASHING_SECONDS, PREFERRED, ModelFetch, PeerFiles
from tars.messages.files import PullResult, TransferDescription
from tars.model_files import FileHashes

Report = Callable[[TransferDescription], None]


@dataclass(slots=True)
class _Job:
    """A file on its way, and who waits for it; see `model_fetch.Job`."""

    store: FileStore
    description: TransferDescription
    task: asyncio.Task[Path] | None = None
    waiting: int = 0
    reports: list[Report] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    rest: int = 0
    """Bytes that it will still write."""

    @property
    def model(self) -> str:
        return self.description.model

    def say(self, progress: Progress) -> None:
        self.rest = progress.bytes_total - progress.bytes_done if progress.stage == "fetch" else 0
        self.description = TransferDescription(
            model=self.description.model,
            variant=self.description.variant,
            stage=progress.stage,
            bytes_done=progress.bytes_done,
            bytes_total=progress.bytes_total,
            bytes_per_second=progress.bytes_per_second,
            sources=list(progress.sources),
            note=progress.note,
        )
        for report in list(self.reports):
            report(self.description)

    def came_from(self, titles: Iterable[str]) -> None:
        self.sources.update(titles)

    def room(self, size: int, there: int) -> None:
        self.store.require_room(self, size, there)


class FileStore:
    """See the module's law. `peers` may be set later, once there is a mesh; `hub` None asks no hub."""

    def __init__(
        self,
        folder: Path,
        catalogue: Catalogue,
        hashes: FileHashes,
        *,
        peers: PeerFiles | None = None,
        hub: Hub | None = None,
        most_bytes_per_second: float | None = None,
        on_change: Callable[[], None] = lambda: None,
        margin: int = MARGIN,
        hashing_seconds: float = HASHING_SECONDS,
    ):
        self._catalogue = catalogue
        self._hashes = hashes
        self._folder = FetchedFolder(folder, catalogue, hashes, margin)
        self._fetch = ModelFetch(
            self._folder,
            peers=peers,
            hub=hub,
            most_bytes_per_second=most_bytes_per_second,
            hashing_seconds=hashing_seconds,
        )
        self._jobs: dict[tuple[str, str], _Job] = {}
        self.on_change = on_change
        """Called in the event loop when `held` has changed: for the adverts."""
        self.files = HeldFiles(catalogue, hashes, lambda: self.on_change())

    # --- what is here -------------------------------------------------------------------------------------------------

    @property
    def peers(self) -> PeerFiles | None:
        """The peers' files; None on a single node."""
        return self._fetch.peers

    @peers.setter
    def peers(self, peers: PeerFiles | None) -> None:
        self._fetch.peers = peers

    @property
    def bytes_received(self) -> int:
        """From peers and the hub, since the node started."""
        return self._fetch.bytes_received

    def held(self) -> list[HeldFile]:
        """What this node can give to peers, for its advert; no file is touched."""
        return self.files.held()

    def shared(self, sha256: str) -> SharedFile | None:
        """What this node holds by that hash."""
        return self.files.shared(sha256)

    def transfers(self) -> list[TransferDescription]:
        """What is on its way to this node now."""
        return [job.description for job in self._jobs.values()]

    def attach_fetched(self) -> None:
        """At a start: put what was fetched before into the catalogue."""
        self._folder.attach_all()

    def path_of(self, entry: ModelEntry, variant: Variant) -> Path | None:
        """Where the variant's file (or folder) is on this PC; None where it is not here."""
        return self._folder.path_of(entry, variant)

    async def run(self) -> None:
        """Hash what is here in the background, until cancelled."""
        await self.files.run()

    async def close(self) -> None:
        """End every transfer, and write no more; what came is kept for the next time."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._fetch.hub is not None:
            await self._fetch.hub.close()
        self._hashes.close()

    # --- what is not here yet -----------------------------------------------------------------------------------------

    async def ensure(self, entry: ModelEntry, variant: Variant, progress: Report = lambda description: None) -> Path:
        """The variant's file (or folder) on this PC, fetched if need be: from peers, else from the hub.

        Raises `DiskFull`, `ModelFileMissing` (a person must act) or `TransferFailed` (worth another try; what came is kept). The latter two
        carry `details["tried"]`: `[{"place", "reason"}]`.
        """
        return (await self._ensured(entry, variant, progress))[0]

    async def pull(
        self, model: str, variant: str | None = None, progress: Report = lambda description: None
    ) -> PullResult:
        """`models.pull`; see `messages.files`. Raises as `ensure` does, and `UnknownModel`, `InvalidParams` or `BadModelFile`."""
        began = time.monotonic()
        entry = self._catalogue.find(model) or self._peer_entry(model)
        name = hub_name(model) if entry is None else None
        if name is not None:
            path, sources = await self._from_hub_by_name(name, variant, progress)
        else:
            entry = self._catalogue.resolve(model) if entry is None else entry
            path, sources = await self._ensured(entry, self._chosen(entry, variant), progress)
        return await self._pulled(path, sources, began)

    async def add_file(self, model: str, path: Path, variant: str | None = None) -> PullResult:
        """`models.add_file`: link or copy a file (or folder) of this PC into the folder, if it is what it is said to be.

        Raises `BadModelFile`, `ModelFileMissing`, `InvalidParams` or `DiskFull`.
        """
        began = time.monotonic()
        entry = self._catalogue.find(model) or self._peer_entry(model)
        return await self._pulled(*await self._take(model, entry, variant, path), began)

    async def _pulled(self, path: Path, sources: set[str], began: float) -> PullResult:
        self.files.look_again()
        found, found_variant = self._named(path)
        size, sha256 = await asyncio.to_thread(self._folder.described, path)
        return PullResult(
            model=found.name,
            variant=found_variant.name,
            size_bytes=size,
            sha256=sha256,
            sources=sorted(sources),
            seconds=time.monotonic() - began,
        )

    def require_room(self, job: _Job, size: int, there: int) -> None:
        """Raise `DiskFull` unless there is room for a job's file beside what the others still write."""
        coming = sum(each.rest for each in list(self._jobs.values()) if each is not job)
        self._folder.require_room(job.model, size, there, coming)

    # --- one transfer, shared -----------------------------------------------------------------------------------------

    async def _ensured(self, entry: ModelEntry, variant: Variant, progress: Report) -> tuple[Path, set[str]]:
        if (path := self.path_of(entry, variant)) is not None:
            return path, set()
        size = int(variant.shape.file_bytes)
        return await self._shared_job(
            (entry.name, variant.name), size, lambda job: self._fetched(entry, variant, job), progress
        )

    async def _shared_job(
        self, key: tuple[str, str], size: int, fetch: Callable[[_Job], Coroutine[Any, Any, Path]], progress: Report
    ) -> tuple[Path, set[str]]:
        job = self._jobs.get(key)
        if job is None:
            start = TransferDescription(
                model=key[0],
                variant=key[1],
                stage="look",
                bytes_done=0,
                bytes_total=size,
                bytes_per_second=0.0,
                sources=[],
            )
            job = self._jobs[key] = _Job(self, start)
            job.task = asyncio.create_task(fetch(job), name=f"fetch {key[0]} {key[1]}")
        assert job.task is not None
        job.waiting += 1
        job.reports.append(progress)
        progress(job.description)
        try:
            path = await asyncio.shield(job.task)
        except asyncio.CancelledError:
            if job.task.cancelled():  # the node stops
                raise TransferFailed(
                    "The node is being stopped; what came is kept. Ask again when it is back."
                ) from None
            raise
        finally:
            job.waiting -= 1
            job.reports.remove(progress)
            if job.waiting == 0:
                # From here on a new caller begins anew, and finds what came.
                if self._jobs.get(key) is job:
                    del self._jobs[key]
                if not job.task.done():
                    job.task.cancel()
                    await asyncio.wait({job.task})
                    if not job.task.cancelled():
                        job.task.exception()  # nobody waits for it any more
        return path, job.sources

    async def _fetched(self, entry: ModelEntry, variant: Variant, job: _Job) -> Path:
        tried: list[dict[str, str]] = []
        retryable = False
        failed: set[tuple[NodeId, str]] = set()
        # Again while there are others: who was still hashing may have it when the first ones did not give it.
        while groups := await self._fetch.groups(entry.name, variant, job, tried, failed):
            for sha256, holders in groups:
                try:
                    return await self._fetch.from_peers(entry, variant, sha256, holders, job)
                except SourcesExhausted as error:
                    retryable = True
                    tried += [{"place": title, "reason": reason} for title, reason in error.reasons.items()]
                except BadModelFile as error:
                    tried += [{"place": holder.name, "reason": error.message} for holder in holders]
                failed |= {(holder.node, sha256) for holder in holders}
        if self._fetch.hub is None:
            tried.append({"place": TITLE, "reason": "not asked: `hub = false` stands in [files] of the configuration"})
        elif not (variant.repo and variant.file):
            tried.append({"place": TITLE, "reason": "not asked: nobody said which of its repositories has it"})
        else:
            try:
                return await self._fetch.from_hub(HubName(variant.repo, variant.file), entry, variant, job)
            except DiskFull:
                raise
            except SourcesExhausted as error:
                retryable = True
                tried += [{"place": title, "reason": reason} for title, reason in error.reasons.items()]
            except ModelError as error:
                retryable = retryable or error.retryable
                tried.append({"place": TITLE, "reason": error.message})
        raise _nowhere(entry, variant, tried, retryable)

    async def _from_hub_by_name(self, name: HubName, variant: str | None, progress: Report) -> tuple[Path, set[str]]:
        """A file (or folder) that no catalogue knows, by its place on the hub."""
        if self._fetch.hub is None:
            raise ModelFileMissing(
                f"{TITLE} is not asked: `hub = false` stands in [files] of the node's configuration."
            )
        if name.file is None or not name.file.endswith(".gguf"):
            name = await self._fetch.one_file_of(self._fetch.hub, name, name.file or variant)

        async def fetch(job: _Job) -> Path:
            try:
                return await self._fetch.from_hub(name, None, None, job)
            except SourcesExhausted as error:
                tried = [{"place": title, "reason": reason} for title, reason in error.reasons.items()]
                raise TransferFailed(
                    f"{name.file or name.repo} did not come whole: {error}. What came is kept: ask again.",
                    details={"model": name.repo, "tried": tried},
                ) from error

        return await self._shared_job((name.repo, name.file or "all files"), 0, fetch, progress)

    # --- from a file on this PC ---------------------------------------------------------------------------------------

    async def _take(
        self, model: str, entry: ModelEntry | None, variant: str | None, path: Path
    ) -> tuple[Path, set[str]]:
        """Link or copy a file that is here already into the folder, if it is what it is said to be."""
        if entry is None and hub_name(model) is not None:
            raise InvalidParams(
                "With from_file, model is a name of the catalogue, or the name that the model shall have."
            )
        found = await asyncio.to_thread(local_copy.look, path, self._hashes)
        if variant is not None and found.variant.lower() != variant.lower():
            raise BadModelFile(
                f"The file holds {found.variant}, not {variant}. Name the right one, or leave variant out."
            )
        if entry is not None:
            if found.kind is not entry.kind and "chat" in (found.kind, entry.kind):
                raise BadModelFile(f"The file holds a {found.kind} model, and {entry.name} is of kind {entry.kind}.")
            known = next((each for each in entry.variants if each.name == found.variant), None)
            if known is not None and known.sha256 not in (None, found.sha256):
                raise BadModelFile(
                    f"The file is not the {known.name} of {entry.name} that is meant: its sha256 is {found.sha256}."
                )
            if known is not None and (here := self.path_of(entry, known)) is not None:
                if (await asyncio.to_thread(self._folder.described, here))[1] == found.sha256:
                    return here, set()
                raise BadModelFile(
                    f"{entry.name} ({known.name}) is on this PC already, as another file. Give this one a name of its own, or take the "
                    "other one away first."
                )
        target = self._folder.path / found.sha256 / (path.name if is_name(path.name) else "model")
        was_here = await asyncio.to_thread(target.exists)
        name = model if entry is None else entry.name
        if not was_here:
            await asyncio.to_thread(local_copy.place, found, target, lambda size: self._folder.require_room(name, size))
            if found.manifest is None:
                await asyncio.to_thread(self._hashes.remember, target, found.sha256)
        try:
            kind = found.kind if entry is None else entry.kind
            self._folder.note(target, found.sha256, name, kind, found.variant)
        except (ModelError, ConfigError):
            if not was_here:
                await asyncio.to_thread(self._folder.discard, target)
            raise
        return target, {"this PC"}

    # --- names --------------------------------------------------------------------------------------------------------

    def _peer_entry(self, model: str) -> ModelEntry | None:
        return None if self.peers is None else self.peers.entry(model)

    def _chosen(self, entry: ModelEntry, variant: str | None) -> Variant:
        """Which variant is meant where the caller says none: what is here, what peers hold, `PREFERRED`, the best."""
        if variant is not None:
            for each in entry.variants:
                if each.name.lower() == variant.lower():
                    return each
            raise InvalidParams(
                f"{entry.name} has no variant {variant!r}; it has {', '.join(v.name for v in entry.variants) or 'none'}."
            )
        if not entry.variants:
            raise ModelFileMissing(
                f"Nobody knows where a file of {entry.name} could be fetched. Use `tars pull {entry.name} --from-file PATH`."
            )
        here = [each for each in entry.variants if self.path_of(entry, each) is not None]
        peers = [each for each in entry.variants if self._fetch.holders(entry.name, each)]
        usual = [each for each in entry.variants if each.name == PREFERRED]
        return [*here, *peers, *usual, *entry.variants][0]

    def _named(self, path: Path) -> tuple[ModelEntry, Variant]:
        """The entry and variant that a path on this PC belongs to."""
        for entry in self._catalogue.entries.values():
            for variant in entry.variants:
                if self.path_of(entry, variant) == path:
                    return entry, variant
        raise ModelFileMissing("The file was taken away again by somebody else. Ask again.")


def _nowhere(
    entry: ModelEntry, variant: Variant, tried: list[dict[str, str]], retryable: bool
) -> ModelFileMissing | TransferFailed:
    places = "; ".join(f"{each['place']}: {each['reason'].rstrip('.')}" for each in tried)
    message = (
        f"The file of {entry.name} ({variant.name}) is not on this PC and could not be fetched. Tried: {places}. "
        f"A copy of the file helps too: `tars pull {entry.name} --from-file PATH` on this PC."
    )
    kind = TransferFailed if retryable else ModelFileMissing
    return kind(message, details={"model": entry.name, "variant": variant.name, "tried": tried})
