"""Nodes' model files in one process: stores, and peers that are other stores behind the real serving part."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import aclosing

from tars.catalogue import Catalogue
from tars.core.types import NodeId
from tars.mesh.file_server import FileServer, NotShared
from tars.mesh.file_transfer import SourceFailed
from tars.mesh.model_fetch import Holder
from tars.mesh.model_store import FileStore
from tars.model_files import FileHashes
from tars.state_folder import StateFolder

NAME = "tiny"
"""Of the model in these stores."""


class Peers:
    """Other nodes' stores, by name. `tamper[name]` changes what that one sends; `asked` counts ranges by name."""

    def __init__(self, **stores):
        self.stores = stores
        self.tamper = {}
        self.gone = set()
        self.asked = dict.fromkeys(stores, 0)
        self.gate = None
        self.more = []
        """Further files that somebody says to hold."""

    def holders(self):
        return [
            Holder(NodeId(f"id-{name}"), name, file)
            for name, store in self.stores.items()
            if name not in self.gone
            for file in store.held()
        ] + self.more

    def entry(self, model):
        for store in self.stores.values():
            if (entry := store._catalogue.find(model)) is not None:
                return entry
        return None

    def _opened(self, node, resource):
        name = node.removeprefix("id-")
        if name in self.gone:
            raise SourceFailed("it does not answer", final=True)
        sha256, _, path = resource.partition("/")
        server = FileServer(self.stores[name].shared)
        try:
            return name, server, server.open(sha256, path)
        except NotShared:
            raise SourceFailed("it does not have the file any more", final=True) from None

    async def size(self, node, resource):
        _, _, opened = self._opened(node, resource)
        opened.close()
        return opened.size

    async def read(self, node, resource, start, stop, size):
        name, server, opened = self._opened(node, resource)
        self.asked[name] += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            async with aclosing(server.read(opened, start, stop)) as chunks:
                async for chunk in chunks:
                    yield self.tamper.get(name, lambda content: content)(chunk)
        finally:
            opened.close()


async def until(happened, seconds=20.0):
    """Wait for what a task does on its own."""
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends
        await asyncio.sleep(0.001)


def store_in(folder, *files, catalogue=None, **options):
    """A node's store; its catalogue has the files as `NAME`, and no others."""
    catalogue = catalogue or Catalogue.load(builtin=False)
    for file in files:
        catalogue.add_file(file, NAME)
    state = StateFolder(folder)
    state.path.mkdir(exist_ok=True)
    return FileStore(state.path / "models", catalogue, FileHashes(state), **{"margin": 0, **options})


def knowing(store):
    """A catalogue that knows the model, and has no file of it."""
    catalogue = Catalogue.load(builtin=False)
    catalogue._register(store._catalogue.find(NAME))
    return catalogue


def wanted(store):
    """The model's entry and its only variant."""
    entry = store._catalogue.find(NAME)
    return entry, entry.variants[0]


def digest(path):
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_embedder(folder):
    """The smallest folder that is an embedding model's, with a file in it that is no part of one."""
    (folder / "1_Pooling").mkdir(parents=True)
    counts = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **counts}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4000))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "evil.py").write_text("print('never copied')")
    return folder
