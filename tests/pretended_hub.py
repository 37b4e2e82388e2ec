"""A server that answers like Hugging Face: metadata in headers, a redirect to another origin for the bytes, its own error codes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from aiohttp import web

COMMIT = "c0ffee" + "0" * 34


@dataclass
class PretendedHub:
    """`repos`: name -> path -> content. `gated` and `private` repositories want one of their tokens."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: dict[str, set[str]] = field(default_factory=dict)
    """Repository -> tokens whose accounts may have it."""
    private: dict[str, set[str]] = field(default_factory=dict)
    endpoint: str = ""
    cdn: str = ""
    signature: int = 1
    """Of the addresses that the other origin takes; a new one ends those that were given before."""
    fault: int | None = None
    """What the hub itself answers to everything."""
    cdn_fault: int | None = None
    plain: bool = False
    """Like a mirror that gives no checksums."""
    change_bytes: bool = False
    heads: int = 0
    ranges: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    """Authorization headers that came to the other origin."""
    asked: list[str] = field(default_factory=list)

    def _token(self, request: web.Request) -> str:
        return request.headers.get("Authorization", "").removeprefix("Bearer ")

    def _refusal(self, request: web.Request, repo: str) -> web.Response | None:
        token = self._token(request)
        if self.fault is not None:
            return web.Response(status=self.fault)
        if token == "wrong":
            return web.Response(status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo in self.private and token not in self.private[repo]:
            return web.Response(status=401, headers={"X-Error-Code": "RepoNotFound"})
        if repo not in self.repos:
            return web.Response(status=401 if not token else 404, headers={"X-Error-Code": "RepoNotFound"})
        if repo in self.gated and token not in self.gated[repo]:
            return web.Response(status=403 if token else 401, headers={"X-Error-Code": "GatedRepo"})
        return None

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        self.heads += request.method == "HEAD"
        repo, revision, path = (request.match_info[name] for name in ("repo", "revision", "path"))
        self.asked.append(f"{repo}@{revision}:{path}")
        if (refusal := self._refusal(request, repo)) is not None:
            return refusal
        if revision not in ("main", COMMIT):
            return web.Response(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        content = self.repos[repo].get(path)
        if content is None:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_sha1(content)}"', "Accept-Ranges": "bytes"}
        if self.plain:
            headers["ETag"] = 'W/"5f3a-18"'
        if not is_large(path):
            return web.Response(body=content, headers=headers)
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"' if not self.plain else 'W/"x"'
        headers["X-Linked-Size"] = str(len(content))
        headers["Location"] = f"{self.cdn}/blob/{repo}/{path}?signature={self.signature}"
        return web.Response(status=302, headers=headers)

    async def blob(self, request: web.Request) -> web.StreamResponse:
        if authorization := request.headers.get("Authorization"):
            self.leaked.append(authorization)
        if self.cdn_fault is not None:
            return web.Response(status=self.cdn_fault)
        if request.query.get("signature") != str(self.signature):
            return web.Response(status=403)
        content = self.repos[request.match_info["repo"]][request.match_info["path"]]
        self.ranges.append(request.headers["Range"])
        wanted = request.http_range
        part = content[wanted]
        if self.change_bytes:
            part = bytes(len(part))
        headers = {"Content-Range": f"bytes {wanted.start}-{wanted.start + len(part) - 1}/{len(content)}"}
        return web.Response(status=206, body=part, headers=headers)

    async def info(self, request: web.Request) -> web.StreamResponse:
        repo = request.match_info["repo"]
        if (refusal := self._refusal(request, repo)) is not None:
            return refusal
        siblings = []
        for path, content in self.repos[repo].items():
            row = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if is_large(path):
                row["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(row)
        return web.json_response({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []})

    def applications(self) -> tuple[web.Application, web.Application]:
        """The hub, and the origin that has the large files' bytes."""
        hub, cdn = web.Application(), web.Application()
        hub.router.add_get("/api/models/{repo:[^/]+/[^/]+}", self.info)
        hub.router.add_get("/api/models/{repo:[^/]+/[^/]+}/revision/{revision}", self.info)
        hub.router.add_get("/{repo:[^/]+/[^/]+}/resolve/{revision}/{path:.+}", self.resolve)
        cdn.router.add_get("/blob/{repo:[^/]+/[^/]+}/{path:.+}", self.blob)
        return hub, cdn


def is_large(path: str) -> bool:
    """Whether the hub keeps it beside git, and knows its sha256."""
    return path.endswith((".gguf", ".safetensors"))


def git_sha1(content: bytes) -> str:
    """git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
