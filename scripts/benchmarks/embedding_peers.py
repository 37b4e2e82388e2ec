"""What TARS's embeddings are compared with, each a program of its own: `python embedding_peers.py raw|plain ...`.

Law of this file: `plain` is what a person writes in ten lines: sentence-transformers' `encode` behind an aiohttp handler. `raw` is the
limit: the forward passes of the back end that the node chose, over all texts at once, sorted by length under its token budget, in one
process without server, queue or answers. It answers questions on standard input, a JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any


def plain(path: str, port: int) -> None:
    from aiohttp import web
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(path)
    one_at_a_time = asyncio.Lock()

    async def embed(request: web.Request) -> web.Response:
        texts = (await request.json())["texts"]
        # Two passes at once on the same cores only take turns at their barriers.
        async with one_at_a_time:
            vectors = await asyncio.to_thread(model.encode, texts)
        return web.json_response({"embeddings": vectors.tolist()})

    async def health(_: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/embed", embed)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


class Raw:
    """The back end as the node built it: same name, token budget, threads, precision and device."""

    def __init__(self, path: str, tuned: dict[str, Any], cuda_device: str | None) -> None:
        from tars.config import DevicesSection
        from tars.core.tuning import settings_for
        from tars.core.types import DeviceKind, ModelKind, NodeId
        from tars.devices.inventory import Inventory
        from tars.messages.node import TunedSettings
        from tars.model_files import inspect_folder
        from tars.workers.embedding_choice import Chooser
        from tars.workers.embedding_model import LoadedModel, import_engine
        from tars.workers.engine import LoadSpec

        inventory = Inventory(NodeId("bench"), DevicesSection())
        wanted = DeviceKind.CPU if cuda_device is None else DeviceKind.CUDA
        device = next(one for one in inventory.snapshot({}) if one.kind is wanted)
        inventory.close()
        settings = settings_for(device, ModelKind.EMBEDDING, inspect_folder(Path(path)).shape)
        spec = LoadSpec(
            replica="raw",
            model="raw",
            engine="sentence-transformers",
            path=path,
            cuda_device=cuda_device,
            threads=settings.threads,
            precision=settings.precision.value,
            batch_tokens=settings.batch_tokens,
            tuned=TunedSettings.model_validate(tuned),
        )
        import_engine()
        model = LoadedModel(path, "embedding")
        model.torch.set_num_threads(max(1, spec.threads))
        self._tokenizer = model.tokenizer()
        choice = Chooser(model, self._tokenizer, spec, lambda line: print(line, file=sys.stderr)).choose()
        self._backend = choice.backend
        self._budget = choice.tuned.batch_tokens or spec.batch_tokens
        self.name = choice.backend.name

    def many(self, texts: list[str]) -> dict[str, Any]:
        """Seconds of all forward passes alone; tokenising and choosing batches are done before."""
        rows = sorted((row for row, _ in self._tokenizer.texts("", texts)), key=len)
        batches = []
        while rows:
            taken = self._backend.select([len(row) for row in rows], self._budget)
            batches.append([rows[index] for index in taken])
            chosen = set(taken)
            rows = [row for index, row in enumerate(rows) if index not in chosen]
        began = time.perf_counter()
        for batch in batches:
            self._backend.forward(batch)
        return {"seconds": time.perf_counter() - began, "passes": len(batches)}

    def one(self, text: str) -> dict[str, Any]:
        """Seconds from the text to its vector."""
        began = time.perf_counter()
        ((row, _),) = self._tokenizer.texts("", [text])
        vector = self._backend.forward([row])[0]
        return {"seconds": time.perf_counter() - began, "vector": [float(value) for value in vector]}


def raw(path: str, tuned: str, cuda_device: str | None) -> None:
    loaded = Raw(path, json.loads(tuned), cuda_device)
    print(json.dumps({"backend": loaded.name}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = loaded.many(asked["many"]) if "many" in asked else loaded.one(asked["one"])
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("plain", "raw"))
    parser.add_argument("--path", required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--tuned", default="{}")
    parser.add_argument("--cuda-device")
    options = parser.parse_args()
    if options.what == "plain":
        plain(options.path, options.port)
    else:
        raw(options.path, options.tuned, options.cuda_device)


if __name__ == "__main__":
    main()
