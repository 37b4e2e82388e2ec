"""Model files from Hugging Face: what a repository holds, with sizes and checksums, and ranges of one file of it.

Law of this file: `huggingface_hub` says which file of which commit that is and whether this user may have it (HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE and its own token file count); the bytes come as ranges, as from a peer. It is imported only when it is needed: it costs a
node's start a second. Every failure is one sentence on what happened and one on what to do.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tars.errors import ModelError, ModelFileMissing, TransferFailed
from tars.mesh.file_transfer import SourceFailed
from tars.mesh.partial_file import Digest

TITLE = "Hugging Face"
ENDPOINT = "https://huggingface.co"
METADATA_SECONDS = 30.0
"""For one question about a repository; `huggingface_hub` itself waits 10 s for an answer and asks again some times."""
CONNECT_SECONDS = 15.0
READ_SIZE = 256 * 2**10
BUSY_SECONDS = 5.0
"""How long to wait after "too many requests" that does not say."""
TRUE_WORDS = {"1", "ON", "YES", "TRUE"}
"""As `huggingface_hub` reads its switches."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPO = re.compile(rf"{_NAME}/{_NAME}")
_PREFIX = re.compile(r"(https?://)?(www\.)?(hf\.co|huggingface\.co)/", re.IGNORECASE)
_REVISION = re.compile(r"(resolve|blob|tree)/([^/]+)/?")


@dataclass(frozen=True, slots=True)
class HubName:
    """A file of a repository, or (`file` None) the repository as a whole."""

    repo: str
    file: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of one commit."""

    repo: str
    path: str
    commit: str
    size: int
    digest: Digest
    location: str | None = None
    """Where its bytes are now: a signed address that ends after a while, so it can be asked for again."""


def hub_name(text: str) -> HubName | None:
    """What `hf.co/owner/repo/file.gguf`, the address of a file's page, or `owner/repo:file.gguf` names; None for anything else."""
    if prefix := _PREFIX.match(text):
        owner, _, rest = text[prefix.end() :].split("?")[0].split("#")[0].strip("/").partition("/")
        name, _, file = rest.partition("/")
        revision = None
        if found := _REVISION.match(file):
            revision, file = found[2], file[found.end() :]
        if ":" in name and not file:
            name, _, file = name.partition(":")
        repo = f"{owner}/{name}"
    else:
        repo, colon, file = text.partition(":")
        revision = None
        if not colon or not file:
            return None
    if not _REPO.fullmatch(repo) or any(part in ("", ".", "..") for part in file.split("/")[:-1]):
        return None
    return HubName(repo, file or None, revision)


class Hub:
    """The hub that the environment names. Not opened until it is asked."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ if environment is None else environment
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        # The library's own, which it keeps for the process; it makes new ones when it is asked again.
        library = sys.modules.get("huggingface_hub")
        if (close := getattr(library, "close_session", None)) is not None:
            await asyncio.to_thread(close)

    @property
    def endpoint(self) -> str:
        """Its address."""
        return (self._environment.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")

    async def file(self, repo: str, path: str, revision: str | None = None) -> HubFile:
        """One file. Raises `ModelFileMissing` (not there, gated, offline: a person must act) or `TransferFailed` (later, perhaps)."""
        found: HubFile = await self._asked(repo, path, self._file, repo, path, revision)
        return found

    async def files(self, repo: str, revision: str | None = None) -> list[HubFile]:
        """Every file of a repository, in one question. Raises as `file` does."""
        found: list[HubFile] = await self._asked(repo, None, self._files, repo, revision)
        return found

    def source(self, file: HubFile) -> HubSource:
        """Ranges of one file; see `file_transfer.Source`."""
        return HubSource(self, file)

    # --- inside: in a thread ------------------------------------------------------------------------------------------

    async def _asked(self, repo: str, path: str | None, ask: Any, *arguments: Any) -> Any:
        if self._environment.get("HF_HUB_OFFLINE", "").upper() in TRUE_WORDS:
            raise ModelFileMissing(
                f"{TITLE} is not asked, because HF_HUB_OFFLINE is set where tars-node was started. Unset it there."
            )
        try:
            async with asyncio.timeout(METADATA_SECONDS):
                return await asyncio.to_thread(ask, *arguments)
        except ModelError:
            raise
        except (
            Exception
        ) as error:  # the library raises some thirty classes over two HTTP libraries; each becomes one sentence
            raise await asyncio.to_thread(self._explained, error, repo, path) from error

    def _file(self, repo: str, path: str, revision: str | None) -> HubFile:
        import huggingface_hub

        url = huggingface_hub.hf_hub_url(repo, path, revision=revision, endpoint=self.endpoint)
        found = huggingface_hub.get_hf_file_metadata(url, token=self.token() or False)
        return HubFile(
            repo,
            path,
            found.commit_hash or revision or "main",
            _size(found.size, path),
            _digest(found.etag, path),
            found.location,
        )

    def _files(self, repo: str, revision: str | None) -> list[HubFile]:
        import huggingface_hub

        api = huggingface_hub.HfApi(endpoint=self.endpoint, token=self.token() or False)
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = []
        for each in info.siblings or []:
            lfs: Any = each.lfs
            sha256 = getattr(lfs, "sha256", None) or (lfs.get("sha256") if isinstance(lfs, dict) else None)
            digest = _digest(sha256 or each.blob_id, each.rfilename)
            size = _size(each.size, each.rfilename)
            files.append(HubFile(repo, each.rfilename, info.sha or revision or "main", size, digest))
        return files

    def token(self) -> str | None:
        """The user's access token; None where there is none. Reads a file, perhaps."""
        if self._environment is not os.environ:
            return self._environment.get("HF_TOKEN")
        import huggingface_hub

        return huggingface_hub.get_token()

    def _explained(self, error: Exception, repo: str, path: str | None) -> ModelError:
        import huggingface_hub.errors as hf

        status = getattr(getattr(error, "response", None), "status_code", None)
        page = f"{self.endpoint}/{repo}"
        if isinstance(error, hf.OfflineModeIsEnabled):
            return ModelFileMissing(
                f"{TITLE} is not asked, because HF_HUB_OFFLINE is set. Unset it, and start the node again."
            )
        if isinstance(error, hf.GatedRepoError):
            if self.token():
                return ModelFileMissing(
                    f"{repo} on {TITLE} is gated, and the account of this node's token may not have it. Accept its terms with that "
                    f"account at {page}, wait until access is granted, then ask again."
                )
            return ModelFileMissing(
                f"{repo} on {TITLE} is gated. Accept its terms at {page}, make an access token, and start tars-node with it in HF_TOKEN "
                "(or run `hf auth login` as the node's user); then ask again."
            )
        if isinstance(error, hf.EntryNotFoundError):
            return ModelFileMissing(
                f"{repo} on {TITLE} has no file {path}. See {page}/tree/main for those that it has."
            )
        if isinstance(error, hf.RevisionNotFoundError):
            return ModelFileMissing(f"{repo} on {TITLE} has no such revision. See {page} for those that it has.")
        if isinstance(error, hf.RepositoryNotFoundError):
            return ModelFileMissing(
                f"There is no repository {repo} on {TITLE}, or it is private. Correct the name; for a private one start tars-node with "
                "an access token of its owner in HF_TOKEN."
            )
        if isinstance(error, hf.HFValidationError):
            return ModelFileMissing(f"{repo!r} is no name of a repository on {TITLE}. Write it as owner/repo.")
        if status in (401, 403):
            return ModelFileMissing(
                f"{TITLE} refuses this node's access token. Make a new one with read access, and start tars-node with it in HF_TOKEN."
            )
        if status == 429:
            return TransferFailed(f"{TITLE} has had too many requests from here. Ask again in some minutes.")
        if status is not None:
            return TransferFailed(f"{TITLE} has a fault of its own (it answered {status}). Ask again in some minutes.")
        return TransferFailed(
            f"{TITLE} cannot be reached from this node: no network, a firewall, or a proxy that HTTPS_PROXY does not name. Correct that; "
            "or set HF_ENDPOINT to a mirror."
        )

    # --- inside: in the loop ------------------------------------------------------------------------------------------

    def session(self) -> aiohttp.ClientSession:
        """The connections for bytes; proxies as the environment says."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout, trust_env=True, auto_decompress=False)
        return self._session


class HubSource:
    """One file of the hub as a source of ranges."""

    name = "hub"
    title = TITLE

    def __init__(self, hub: Hub, file: HubFile):
        self._hub = hub
        self._file = file
        self._location = file.location
        self._asking = asyncio.Lock()

    async def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """See `file_transfer.Source`."""
        location = self._location or await self._resolved(None)
        for again in (True, False):
            headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            # The token goes to the hub itself, never to where it sends us for the bytes.
            if _origin(location) == _origin(self._hub.endpoint) and (token := await asyncio.to_thread(self._hub.token)):
                headers["Authorization"] = f"Bearer {token}"
            try:
                async with self._hub.session().get(location, headers=headers) as response:
                    if response.status in (401, 403, 404, 410) and again:
                        pass  # a signed address that has ended: ask for a new one, once
                    else:
                        check_range(response, start, stop, self._file.size)
                        async for chunk in response.content.iter_chunked(READ_SIZE):
                            yield chunk
                        return
            except aiohttp.ClientError as error:
                raise SourceFailed("the connection to it broke") from error
            location = await self._resolved(location)

    async def _resolved(self, stale: str | None) -> str:
        async with self._asking:
            if self._location is None or self._location == stale:
                try:
                    fresh = await self._hub.file(self._file.repo, self._file.path, self._file.commit)
                except ModelError as error:
                    raise SourceFailed(error.message, final=not error.retryable) from error
                if fresh.digest != self._file.digest:
                    raise SourceFailed("its file is another one now: ask again", final=True)
                self._location = fresh.location
            if self._location is None:
                raise SourceFailed("it does not say where the file is", final=True)
            return self._location


def check_range(response: aiohttp.ClientResponse, start: int, stop: int, size: int) -> None:
    """Raise `SourceFailed` unless the answer is the bytes from `start` up to `stop` of a file of `size` bytes."""
    status = response.status
    if status in (429, 503):
        given = response.headers.get("Retry-After", "")
        seconds = float(given) if given.isascii() and given.isdigit() and len(given) < 5 else BUSY_SECONDS
        raise SourceFailed("it is busy", pause=max(0.1, seconds))
    if status in (401, 403):
        raise SourceFailed("it does not allow it", final=True)
    if status in (404, 410):
        raise SourceFailed("it does not have the file any more", final=True)
    if status == 416:
        raise SourceFailed("its file has another size", final=True)
    if status == 200 and start == 0 and stop == size and response.content_length in (None, size):
        return
    if status == 200:
        raise SourceFailed("it does not answer ranges", final=True)
    if status != 206:
        raise SourceFailed(f"it answered {status}")
    found = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", response.headers.get("Content-Range", ""))
    if found is None or (int(found[1]), int(found[2])) != (start, stop - 1):
        raise SourceFailed("it answered another range than it was asked for", final=True)
    if found[3] not in ("*", str(size)):
        raise SourceFailed("its file has another size", final=True)


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _size(size: int | None, path: str) -> int:
    if type(size) is not int or not 0 <= size < 2**50:
        raise ModelFileMissing(f"{TITLE} does not say how large {path} is, so it is not fetched.")
    return size


def _digest(etag: str | None, path: str) -> Digest:
    if etag is not None and re.fullmatch("[0-9a-f]{64}", etag):
        return Digest("sha256", etag)
    if etag is not None and re.fullmatch("[0-9a-f]{40}", etag):
        return Digest("git-sha1", etag)
    raise ModelFileMissing(
        f"{TITLE} (or the mirror in HF_ENDPOINT) gives no checksum of {path}, so it is not fetched: nobody could tell whether it is right."
    )
