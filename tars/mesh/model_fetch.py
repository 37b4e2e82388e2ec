"""The ways in which a model's file comes here: from the peers that hold it, or from the hub.

Law of this file: each way ends with a verified file in the folder of fetched files and in the catalogue, or with an error that says why
not. Which way is tried first, and who waits for it, is `model_store`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tars.core.records import HeldFile
from tars.core.transfer import TokenBucket
from tars.core.types import ModelEntry, ModelKind, NodeId, Variant
from tars.errors import BadModelFile, InvalidParams, ModelFileMissing
from tars.mesh import folder_manifest
from tars.mesh.fetched_folder import FetchedFolder, file_name, is_name
from tars.mesh.file_transfer import FileTransfer, Progress, Source, SourceFailed, SourcesExhausted
from tars.mesh.folder_manifest import Manifest
from tars.mesh.hub import TITLE, Hub, HubFile, HubName
from tars.mesh.partial_file import Digest, WantedFile, held_on_disk

log = logging.getLogger(__name__)

HASHING_SECONDS = 600.0
"""How long a peer that is still hashing the file is waited for: 100 GB at 200 MB/s. Downloading it again would take longer."""
LOOK_SECONDS = 1.0
"""How often its advert is looked at meanwhile."""
PREFERRED = "Q4_K_M"
"""Fetched where nobody says which quantisation: the usual choice, half of Q8_0's size for little of its quality."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A peer, alive, that says it has a file."""

    node: NodeId
    name: str
    file: HeldFile


class PeerFiles(Protocol):
    """The peers' files. `resource` is `<sha256>`, or `<sha256>/<relative path>` of a folder; a folder's own is its manifest."""

    def holders(self) -> Sequence[Holder]:
        """Every file of every peer that is alive, from their adverts."""
        ...

    async def size(self, node: NodeId, resource: str) -> int:
        """Bytes. Raises `SourceFailed`."""
        ...

    def entry(self, model: str) -> ModelEntry | None:
        """A model that is in no catalogue but a peer's, by name."""
        ...

    def read(self, node: NodeId, resource: str, start: int, stop: int, size: int) -> AsyncGenerator[bytes, None]:
        """A range of a resource of `size` bytes; see `file_transfer.Source`. Raises `SourceFailed`."""
        ...


@dataclass(frozen=True, slots=True)
class PeerSource:
    """A peer's copy of one file as a source of ranges."""

    peers: PeerFiles
    holder: Holder
    resource: str
    size: int

    @property
    def name(self) -> str:
        """See `file_transfer.Source`."""
        return self.holder.node

    @property
    def title(self) -> str:
        """See `file_transfer.Source`."""
        return self.holder.name

    def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """See `file_transfer.Source`."""
        return self.peers.read(self.holder.node, self.resource, start, stop, self.size)


class Job(Protocol):
    """Who is told how far a fetch is, and knows what else is on its way."""

    @property
    def model(self) -> str:
        """For messages."""
        ...

    def say(self, progress: Progress) -> None:
        """How far it is."""
        ...

    def came_from(self, titles: Iterable[str]) -> None:
        """Whose bytes are in the file."""
        ...

    def room(self, size: int, there: int) -> None:
        """Raise `DiskFull` unless there is room for `size` bytes, of which `there` are on the disk already. In a thread."""
        ...


class ModelFetch:
    """See the module's law."""

    def __init__(
        self,
        folder: FetchedFolder,
        *,
        peers: PeerFiles | None,
        hub: Hub | None,
        most_bytes_per_second: float | None = None,
        hashing_seconds: float = HASHING_SECONDS,
    ):
        self._folder = folder
        self.peers = peers
        self.hub = hub
        self._hashing_seconds = hashing_seconds
        self._incoming = TokenBucket(most_bytes_per_second)
        self._liars: set[tuple[str, str]] = set()
        """(node, sha256): gave wrong bytes of that file; not asked for it again before the next start."""

    @property
    def bytes_received(self) -> int:
        """Of all transfers, what was thrown away too."""
        return self._incoming.passed

    # --- from peers -----------------------------------------------------------------------------------------------------

    def holders(self, model: str, variant: Variant) -> list[Holder]:
        """Peers that say that they have it."""
        everybody = [] if self.peers is None else self.peers.holders()
        return [
            holder
            for holder in everybody
            if (holder.file.model, holder.file.variant) == (model, variant.name)
            and (variant.sha256 is None or holder.file.sha256 in (None, variant.sha256))
        ]

    async def groups(
        self,
        model: str,
        variant: Variant,
        job: Job,
        tried: list[dict[str, str]],
        failed: Collection[tuple[NodeId, str]] = (),
    ) -> list[tuple[str, list[Holder]]]:
        """Peers by the hash of what they hold, the most common first, without the `failed` (node, hash) of this attempt.

        Waits for one that is still hashing where no other has it. Who has nothing to give is noted in `tried`, with the reason.
        """
        give_up = asyncio.get_running_loop().time() + self._hashing_seconds
        while True:
            holders = self.holders(model, variant)
            groups: dict[str, list[Holder]] = {}
            for holder in holders:
                claim = (holder.node, holder.file.sha256)
                if holder.file.sha256 is not None and claim not in self._liars and claim not in failed:
                    groups.setdefault(holder.file.sha256, []).append(holder)
            hashing = [holder.name for holder in holders if holder.file.sha256 is None]
            if groups or not hashing or asyncio.get_running_loop().time() >= give_up:
                break
            job.say(
                Progress(
                    "look",
                    0,
                    int(variant.shape.file_bytes),
                    note=f"{', '.join(hashing)} has it and is still hashing it",
                )
            )
            await asyncio.sleep(LOOK_SECONDS)
        if not holders:
            known = "no peer has it" if self.peers is not None else "this node has no peers"
            tried.append({"place": "peers", "reason": known})
        for holder in holders:
            if (holder.node, holder.file.sha256) in failed:
                continue  # that is said already
            if holder.file.sha256 is None and not groups:
                tried.append({"place": holder.name, "reason": "it has not hashed the file yet"})
            elif (holder.node, holder.file.sha256) in self._liars:
                tried.append({"place": holder.name, "reason": "not asked again: it gave wrong bytes before"})
        return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))

    async def from_peers(
        self, entry: ModelEntry, variant: Variant, sha256: str, holders: list[Holder], job: Job
    ) -> Path:
        """From peers that hold the same file. Raises `SourcesExhausted`, `BadModelFile` (it is another model) or `DiskFull`."""
        assert self.peers is not None
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise SourcesExhausted({holder.name: "it gave no sha256" for holder in holders})
        if any(holder.file.folder for holder in holders):
            return await self._folder_from_peers(entry, variant, sha256, holders, job)
        sizes = {int(holder.file.size) for holder in holders}
        size = max(sizes)
        target = self._folder.path / sha256 / file_name(entry, variant)
        sources = [PeerSource(self.peers, holder, sha256, size) for holder in holders if holder.file.size == size]
        await self._transfer(WantedFile(target, size, Digest("sha256", sha256)), sources, job, sha256=sha256)
        return await self._folder.arrived(target, sha256, entry, variant)

    async def _folder_from_peers(
        self, entry: ModelEntry, variant: Variant, sha256: str, holders: list[Holder], job: Job
    ) -> Path:
        assert self.peers is not None
        manifest, sizes = await self._manifest(sha256, holders)
        target = self._folder.path / sha256 / file_name(entry, variant)
        files = []
        for file in manifest.files:
            resource, size = f"{sha256}/{file.path}", sizes[file.path]
            sources: list[Source] = [PeerSource(self.peers, holder, resource, size) for holder in holders]
            files.append((file.path, size, Digest("sha256", file.sha256), sources))
        await self._fetch_folder(target, files, job, sha256=sha256)
        return await self._folder.arrived(target, sha256, entry, variant)

    async def _manifest(self, sha256: str, holders: Iterable[Holder]) -> tuple[Manifest, dict[str, int]]:
        """The folder's list, which its own hash proves, and the size of each file."""
        assert self.peers is not None
        reasons: dict[str, str] = {}
        for holder in holders:
            try:
                size = await self.peers.size(holder.node, sha256)
                if not 0 < size <= folder_manifest.MOST_MANIFEST:
                    raise SourceFailed("its list of the folder's files is too long")
                text = bytearray()
                async for chunk in self.peers.read(holder.node, sha256, 0, size, size):
                    text += chunk
                    if len(text) > size:
                        raise SourceFailed("it sent more than it was asked for")
                manifest = folder_manifest.parse(bytes(text))
                if manifest.sha256 != sha256:
                    self._liars.add((holder.node, sha256))
                    raise SourceFailed("it gave a wrong list of the folder's files")
                sizes = {
                    each.path: await self.peers.size(holder.node, f"{sha256}/{each.path}") for each in manifest.files
                }
                return manifest, sizes
            except SourceFailed as error:
                reasons[holder.name] = error.reason
            except BadModelFile as error:
                reasons[holder.name] = error.message
        raise SourcesExhausted(reasons)

    # --- from the hub ---------------------------------------------------------------------------------------------------

    async def one_file_of(self, hub: Hub, name: HubName, wanted: str | None) -> HubName:
        """Which file of the repository is meant where none is named. Raises `InvalidParams` with the choices."""
        paths = [each.path for each in await hub.files(name.repo, name.revision)]
        ggufs = [path for path in paths if path.endswith(".gguf") and "-of-0" not in path]
        if not ggufs and "config.json" in paths:
            return HubName(name.repo, None, name.revision)
        quantisation = (wanted or PREFERRED).lower()
        fitting = [
            path for path in ggufs if re.search(rf"(^|[^a-z0-9]){re.escape(quantisation)}([^a-z0-9_]|$)", path.lower())
        ]
        if len(fitting) == 1 or (wanted is None and len(ggufs) == 1):
            return HubName(name.repo, (fitting or ggufs)[0], name.revision)
        if not ggufs:
            raise ModelFileMissing(
                f"{name.repo} on {TITLE} has no .gguf file and no model folder that TARS could serve."
            )
        raise InvalidParams(
            f"{name.repo} on {TITLE} has {len(ggufs)} .gguf files; name one: "
            + ", ".join(f"{name.repo}:{path}" for path in (fitting or ggufs)[:20])
        )

    async def from_hub(self, name: HubName, entry: ModelEntry | None, variant: Variant | None, job: Job) -> Path:
        """From the hub; without an entry a model that no catalogue knows. Raises as `from_peers` and `Hub.file` do."""
        assert self.hub is not None
        if name.file is None or (entry is not None and entry.kind is not ModelKind.CHAT):
            return await self._folder_from_hub(self.hub, name, entry, variant, job)
        file = await self.hub.file(name.repo, name.file, name.revision)
        own = name.file.rpartition("/")[2]
        if not is_name(own):
            raise ModelFileMissing(f"{own!r} is no name for a file here. Fetch it by hand, and use --from-file.")
        # Named by its hash where the hub says it, else by where it came from, until it is here and was hashed.
        exact = file.digest.algorithm == "sha256"
        target = self._folder.path / (file.digest.value if exact else f"hub-{file.digest.value}") / own
        await self._transfer(WantedFile(target, file.size, file.digest), [self.hub.source(file)], job)
        sha256 = file.digest.value
        if not exact:
            target, sha256 = await asyncio.to_thread(self._folder.settle, target)
        return await self._folder.arrived(target, sha256, entry, variant)

    async def _folder_from_hub(
        self, hub: Hub, name: HubName, entry: ModelEntry | None, variant: Variant | None, job: Job
    ) -> Path:
        chosen: list[HubFile] = [
            each for each in await hub.files(name.repo, name.revision) if folder_manifest.is_model_file(each.path)
        ]
        if not any(each.path.endswith(".safetensors") for each in chosen):
            raise ModelFileMissing(
                f"{name.repo} on {TITLE} has no safetensors weights, so TARS does not load it. Use a model that has them."
            )
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "--", name.repo)
        target = (
            self._folder.path
            / f"hub-{slug}-{chosen[0].commit[:40]}"
            / (file_name(entry, variant) if entry is not None and variant is not None else name.repo.rpartition("/")[2])
        )
        await self._fetch_folder(
            target, [(each.path, each.size, each.digest, [hub.source(each)]) for each in chosen], job
        )
        target, sha256 = await asyncio.to_thread(self._folder.settle, target)
        return await self._folder.arrived(target, sha256, entry, variant)

    # --- what both share ------------------------------------------------------------------------------------------------

    async def _transfer(
        self,
        wanted: WantedFile,
        sources: Sequence[Source],
        job: Job,
        *,
        sha256: str = "",
        before: int = 0,
        total: int = 0,
    ) -> None:
        """One file; `before` and `total` count the other files of a folder."""
        await asyncio.to_thread(job.room, wanted.size, held_on_disk(wanted.target))
        last = ""

        def report(progress: Progress) -> None:
            nonlocal last
            last = progress.note or last
            job.say(
                replace(
                    progress,
                    bytes_done=before + progress.bytes_done,
                    bytes_total=total or progress.bytes_total,
                    note=last,
                )
            )

        try:
            outcome = await FileTransfer(wanted, sources, bandwidth=self._incoming, report=report).run()
        except SourcesExhausted as error:
            self._avoid(error.liars, sha256, sources)
            raise
        self._avoid(outcome.liars, sha256, sources)
        job.came_from(outcome.sources)

    def _avoid(self, liars: Iterable[str], sha256: str, sources: Sequence[Source]) -> None:
        titles = {source.name: source.title for source in sources}
        for name in liars:
            log.warning(
                "%s (%s) gave wrong bytes of the file %s: it is not asked for it again before the next start",
                titles.get(name, "a former node"),
                name,
                sha256,
            )
            self._liars.add((name, sha256))

    async def _fetch_folder(
        self, target: Path, files: Sequence[tuple[str, int, Digest, Sequence[Source]]], job: Job, *, sha256: str = ""
    ) -> None:
        """All files of a folder, one after another, beside the target; then the whole is renamed into place."""
        partial = target.with_name(target.name + ".folder")
        total, before = sum(size for _, size, _, _ in files), 0
        if await asyncio.to_thread(target.exists):
            return
        for path, size, digest, sources in files:
            wanted = WantedFile(partial / path, size, digest)
            if not await asyncio.to_thread(_is_there, wanted):
                await self._transfer(wanted, sources, job, sha256=sha256, before=before, total=total)
            before += size
        await asyncio.to_thread(os.replace, partial, target)


def _is_there(wanted: WantedFile) -> bool:
    """Whether an earlier attempt at the folder brought this file already, whole."""
    try:
        content = wanted.target.read_bytes() if wanted.target.stat().st_size == wanted.size else None
    except OSError:
        return False
    if content is None:
        return False
    found = wanted.digest.start(wanted.size)
    found.update(content)
    return bool(found.hexdigest() == wanted.digest.value)
