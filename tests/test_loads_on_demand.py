"""A call for a model that nobody deployed, over real nodes: its file is at one PC, its caller at another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from mesh_processes import Pc, assemble, stopping
from tiny_gguf import write_tiny_gguf

from tars.errors import UnknownModel
from tars.messages.inference import Progress

pytestmark = [pytest.mark.slow, pytest.mark.model]


async def test_a_call_has_a_model_loaded_whose_file_is_at_another_pc_and_its_reader_hears_of_it(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    gateway = Pc(tmp_path, "gateway", priority=10, memory_mib=64)
    more = "".join(f'[[model]]\nname = "{name}"\npath = "{model}"\n' for name in ("tiny", "other"))
    server = Pc(tmp_path, "server", more=more)
    async with stopping([gateway, server]):
        await assemble([gateway, server])
        heard: list[Progress] = []
        stream = gateway.client.chat_stream("Hello", model="tiny", max_tokens=8, timeout=120)
        stream.on_progress = heard.append
        pieces = [delta async for delta in stream]
        assert pieces
        assert stream.result.served_by.node == server.node_id()
        assert [each.outcome for each in stream.result.served_by.attempts] == ["answered"]
        assert heard, "the load took longer than a look at it"
        assert heard[-1].stage
        listed = {each.name: each for each in (await gateway.client.models()).models}
        assert listed["tiny"].deployed
        assert "other" not in {name for name, each in listed.items() if each.deployed}
        with pytest.raises(UnknownModel):
            await gateway.client.chat("Hello", model="nobody")
