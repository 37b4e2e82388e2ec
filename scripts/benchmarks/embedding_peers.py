"""What TARS's embeddings are compared with, each a program of its own: `python embedding_peers.py raw|plain ...`.

Law of this file: `plain` is what a person writes in ten lines: sentence-transformers' `encode` behind an aiohttp handler. `raw` is the
limit: the forward passes of the back end that the node chose, over all texts at once, sorted by length under the best of several token
budgets, in one process without server, queue or answers, and with a worker's environment and settings: `engine_embeddings` gives it these,
for a second set would measure the difference. It answers questions on standard input, a JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
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
    """The back end as the node's worker builds it: same name, threads, precision, device and handling of memory."""

    def __init__(self, load_spec: str) -> None:
        from tars.workers.embedding_choice import Chooser
        from tars.workers.embedding_engine import keep_freed_memory
        from tars.workers.embedding_model import LoadedModel, import_engine
        from tars.workers.engine import LoadSpec

        spec = LoadSpec.model_validate_json(load_spec)
        import_engine()
        model = LoadedModel(spec.path, "embedding")
        model.torch.set_num_threads(max(1, spec.threads))
        keep_freed_memory()
        self._tokenizer = model.tokenizer()
        choice = Chooser(model, self._tokenizer, spec, lambda line: print(line, file=sys.stderr)).choose()
        self._backend = choice.backend
        self.budget = choice.tuned.batch_tokens or spec.batch_tokens
        self.name = choice.backend.name

    def tune(self, texts: list[str]) -> dict[str, Any]:
        """Take the budget with which these texts go fastest, in the better of two runs each: the node's own, half, twice, four times."""
        budgets = [self.budget, self.budget // 2, self.budget * 2, self.budget * 4]
        seconds = {budget: float("inf") for budget in budgets}
        for _ in range(2):
            for budget in budgets:
                self.budget = budget
                seconds[budget] = min(seconds[budget], self.many(texts)["seconds"])
        self.budget = min(budgets, key=lambda budget: seconds[budget])
        return {"budget": self.budget}

    def many(self, texts: list[str]) -> dict[str, Any]:
        """Seconds of all forward passes alone; tokenising and choosing batches are done before."""
        rows = sorted((row for row, _ in self._tokenizer.texts("", texts)), key=len)
        batches = []
        while rows:
            taken = self._backend.select([len(row) for row in rows], self.budget)
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


def raw(load_spec: str) -> None:
    loaded = Raw(load_spec)
    print(json.dumps({"backend": loaded.name}), flush=True)
    for line in sys.stdin:
        ((question, value),) = json.loads(line).items()
        answer = {"many": loaded.many, "one": loaded.one, "tune": loaded.tune}[question](value)
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("plain", "raw"))
    parser.add_argument("--path", help="plain: the model's folder")
    parser.add_argument("--port", type=int, help="plain")
    parser.add_argument("--load-spec", help="raw: a LoadSpec as JSON")
    options = parser.parse_args()
    if options.what == "plain":
        plain(options.path, options.port)
    else:
        raw(options.load_spec)


if __name__ == "__main__":
    main()
