"""The status page of a node in a mesh: its events, and the page in headless Chromium."""

from __future__ import annotations

import json
import os

import pytest

from tars.messages.files import TransferDescription
from tars.messages.mesh_state import UnservedModel
from tars.messages.node import LoadProgress, MoveDescription, VerdictDescription

GIB = 2**30


@pytest.fixture
def meshed(service, make):
    """Living-room, which is the node itself, and attic, which coordinates and loads a model."""
    own = make.node(node="node-1", name="living-room", this_node=True, coordinator=False, replicas=[])
    loading = make.mesh_replica(
        id="phi-2@gpu-1#0",
        model="phi-2",
        state="starting",
        progress=LoadProgress(stage="fetch", percent=30),
        measured=False,
    )
    attic = make.node(coordinator=True, client_url="http://192.0.2.7:8000", replicas=[make.mesh_replica(), loading])
    service.mesh_description = make.mesh(own, attic)
    # This node may call what the other one serves.
    here, other, far = service.known_models
    service.known_models = [here, other, far.model_copy(update={"deployed": True, "state": "ready"})]
    return service


def change(service, **changes):
    service.mesh_description = service.mesh_description.model_copy(update=changes)


def change_node(service, called, /, **changes):
    nodes = [
        each.model_copy(update=changes) if each.name == called else each for each in service.mesh_description.nodes
    ]
    states = [each.state for each in nodes]
    change(service, nodes=nodes, nodes_by_state={state: states.count(state) for state in states})


async def next_event(response, name):
    while True:
        line = await response.content.readline()
        assert line, "the stream ended"
        if line == f"event: {name}\n".encode():
            return json.loads((await response.content.readuntil(b"\n")).removeprefix(b"data: "))


async def test_the_mesh_is_told_once_and_again_when_it_changes(node, meshed):
    async with node.http.get(f"{node.url}/events") as response:
        assert [each["name"] for each in (await next_event(response, "mesh"))["nodes"]] == ["living-room", "attic"]
        told = 0
        for _ in range(3):
            line = b""
            while line != b"event: description\n":
                line = await response.content.readline()
                told += line == b"event: mesh\n"
        assert told == 0
        change_node(meshed, "attic", state="DEAD")
        assert (await next_event(response, "mesh"))["nodes_by_state"] == {"ALIVE": 1, "DEAD": 1}


async def test_what_stands_beside_a_description_is_made_once_for_all_who_watch(serve, meshed):
    node = await serve()
    async with node.http.get(f"{node.url}/events") as one, node.http.get(f"{node.url}/events") as other:
        for response in (one, other, one, other):
            await next_event(response, "description")
    assert meshed.mesh_described <= meshed.described


@pytest.mark.browser
async def test_a_node_alone_shows_nothing_of_a_mesh(node, service, page):
    await page.goto(node.url)
    await page.wait_for_selector(".device")
    assert not await page.locator("#mesh-section").is_visible()
    assert await page.inner_text("#devices-title") == "Devices"
    assert await page.inner_text("#replicas-title") == "Models"
    assert "Calls now" in await page.inner_text("#tiles")


@pytest.mark.browser
async def test_every_node_is_shown_with_its_devices_and_replicas(node, meshed, page):
    await page.goto(node.url)
    attic = page.locator(".node", has_text="attic")
    await attic.wait_for()
    text = await attic.inner_text()
    for words in (
        "alive",
        "coordinates",
        "GeForce RTX 4090",
        "5.0 GiB TARS, 6.0 GiB free of 12.0 GiB",
        "mistral-7b",
        "phi-2",
    ):
        assert words in text
    assert "fetching its file, 30 %" in text
    assert "Q4_K_M, about 5.0 GiB" in text
    assert await attic.locator("h3 a").get_attribute("href") == "http://192.0.2.7:8000/"
    own = page.locator(".node", has_text="this node")
    assert "read, 40 %" in await own.inner_text(), "this node's own replicas are as the description has them"
    assert await own.locator("h3 a").count() == 0
    assert "2 nodes: 2 alive; attic coordinates." in await page.inner_text("#mesh-summary")
    assert await page.inner_text("#devices-title") == "Devices of living-room"
    assert "of 4" in await page.inner_text("#tiles"), "ready ones of all nodes"
    assert "mistral-7b" in await page.inner_text("#try-model"), "any node answers for the others"
    assert not [url for url in page.asked if not url.startswith(node.url)]
    if folder := os.environ.get("TARS_SCREENSHOTS"):
        await page.screenshot(path=f"{folder}/mesh.png", full_page=True)


@pytest.mark.browser
async def test_a_node_that_dies_keeps_no_memory_and_no_replica_on_the_page(node, meshed, page):
    await page.goto(node.url)
    attic = page.locator(".node", has_text="attic")
    await attic.locator(".memory-bar").wait_for()
    change_node(meshed, "attic", state="DEAD")
    change(meshed, isolated=True)
    await attic.locator("text=/Does not answer since .* It had mistral-7b, phi-2/").wait_for()
    assert not await attic.locator(".memory-bar").count()
    assert "1 alive, 1 dead" in await page.inner_text("#mesh-summary")
    assert "look first at its own network" in await page.inner_text("#mesh-summary")
    assert "of 2" in await page.inner_text("#tiles")


@pytest.mark.browser
async def test_moves_transfers_and_what_nobody_serves_are_shown_with_the_reason(node, meshed, page):
    transfer = TransferDescription(
        model="phi-2", variant="Q8_0", stage="fetch", bytes_done=GIB, bytes_total=4 * GIB,
        bytes_per_second=100 * 2**20, sources=["living-room"],
    )  # fmt: skip
    verdict = VerdictDescription(
        device="node-2/gpu-1", device_name="RTX 4090", node_name="attic", variant="Q4_K_M", accepted=False,
        needed_bytes=40 * GIB, free_bytes=22 * GIB, reason="too small",
    )  # fmt: skip
    refused = meshed.known_models[2].model_copy(update={"name": "llama-70b", "state": "refused"})
    meshed.known_models = [*meshed.known_models, refused]
    change_node(meshed, "attic", transfers=[transfer])
    change(
        meshed,
        moves=[
            MoveDescription(
                replica="a",
                successor="b",
                model="phi-2",
                source="card of attic",
                target="card of cellar",
                gain="attic is draining",
            )
        ],
        unserved=[UnservedModel(model="llama-70b", why="llama-70b fits on no device here.", verdicts=[verdict])],
    )
    await page.goto(node.url)
    await page.wait_for_selector("#transfers >> text=1.0 GiB of 4.0 GiB, 100 MiB/s from living-room")
    assert "phi-2 Q8_0 → attic" in await page.inner_text("#transfers")
    moves = await page.inner_text("#moves")
    assert "card of attic → card of cellar" in moves
    assert "attic is draining" in moves
    unserved = await page.inner_text("#unserved")
    assert "llama-70b fits on no device here." in unserved
    assert "RTX 4090 of attic: Q4_K_M needs 40.0 GiB, 22.0 GiB free; too small" in unserved
    assert "tars explain llama-70b says more" in unserved
    assert "llama-70b" not in await page.inner_text("#replicas")
    if folder := os.environ.get("TARS_SCREENSHOTS"):
        await page.screenshot(path=f"{folder}/mesh-refused.png", full_page=True)
        await page.set_viewport_size({"width": 360, "height": 800})
        await page.screenshot(path=f"{folder}/mesh-refused-phone.png", full_page=True)


@pytest.mark.browser
async def test_of_a_thousand_nodes_the_page_shows_fifty_and_says_so(node, meshed, make, page):
    many = [make.node(node=f"node-{n}", name=f"pc{n:03}") for n in range(2, 51)]
    change(
        meshed,
        nodes=[meshed.mesh_description.nodes[0], *many],
        nodes_left_out=950,
        nodes_by_state={"ALIVE": 998, "DEAD": 2},
    )
    await page.goto(node.url)
    await page.locator(".node").nth(49).wait_for()
    assert await page.locator(".node").count() == 50
    summary = await page.inner_text("#mesh-summary")
    assert "1000 nodes: 998 alive, 2 dead" in summary
    assert "50 of 1000 are shown" in summary


@pytest.mark.browser
async def test_names_from_peers_are_text_and_no_address_of_theirs_runs(node, meshed, make, page):
    evil = "<script>window.broken=true</script><img src=x onerror='window.broken=true'>"
    replica = make.mesh_replica(model=evil, variant=evil, device_name=evil, state="failed", last_error=evil)
    transfer = TransferDescription(
        model=evil,
        variant=evil,
        stage="fetch",
        bytes_done=0,
        bytes_total=1,
        bytes_per_second=0,
        sources=[evil],
        note=evil,
    )
    verdict = VerdictDescription(
        device="d",
        device_name=evil,
        node_name=evil,
        variant=evil,
        accepted=False,
        needed_bytes=1,
        free_bytes=0,
        reason=evil,
    )
    meshed.known_models = [
        *meshed.known_models, meshed.known_models[2].model_copy(update={"name": evil + "2", "state": "refused"}),
    ]  # fmt: skip
    change_node(
        meshed, "attic", name=evil, version=evil, client_url="javascript:window.broken=true", replicas=[replica],
        transfers=[transfer], devices=[make.device(id="x", name=evil)],
    )  # fmt: skip
    change(
        meshed,
        coordinator=evil,
        moves=[MoveDescription(replica="a", successor="b", model=evil, source=evil, target=evil, gain=evil)],
        unserved=[UnservedModel(model=evil + "2", why=evil, verdicts=[verdict])],
    )
    await page.goto(node.url)
    card = page.locator(".node").nth(1)
    await card.wait_for()
    assert await card.locator("h3").text_content() == evil
    assert await card.locator("a").count() == 0, "only web addresses become links"
    for place in ("#mesh-summary", "#nodes .node-device", "#nodes .node-replica", "#transfers", "#moves", "#unserved"):
        assert evil in await page.locator(place).last.text_content(), place
    assert await page.locator("main img, main script").count() == 0
    assert await page.evaluate("window.broken") is None
    assert not [url for url in page.asked if not url.startswith(node.url)]


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1280])
async def test_no_width_needs_sideways_scrolling_in_a_mesh(node, meshed, make, page, width):
    long_name = "a-name-that-somebody-really-gave-to-a-model-or-a-node-and-that-never-ends-" * 2
    change_node(
        meshed, "attic", name=long_name, version=long_name, replicas=[make.mesh_replica(model=long_name, variant=long_name)],
        devices=[make.device(name=long_name, simulated=True)],
    )  # fmt: skip
    change(
        meshed,
        moves=[
            MoveDescription(
                replica="a", successor="b", model=long_name, source=long_name, target=long_name, gain=long_name
            )
        ],
    )
    await page.set_viewport_size({"width": width, "height": 780})
    await page.goto(node.url)
    await page.wait_for_selector(".move")
    wide = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.className)"
    assert await page.evaluate("document.documentElement.scrollWidth") <= width, await page.evaluate(wide)


@pytest.mark.browser
async def test_every_text_of_a_mesh_has_enough_contrast(node, meshed, make, browser, low_contrast):
    nodes = [
        make.node(node=f"n{n}", name=f"pc{n}", state=state, client_url="http://192.0.2.7:8000")
        for n, state in enumerate(("ALIVE", "SUSPECT", "DRAINING", "DEAD", "LEFT"))
    ]
    change(meshed, nodes=[*meshed.mesh_description.nodes, *nodes])
    change(meshed, moves=[MoveDescription(replica="a", successor="b", model="m", source="s", target="t", gain="g")])
    for scheme in ("light", "dark"):
        page = await browser.new_page(color_scheme=scheme)
        await page.goto(node.url)
        await page.wait_for_selector(".move")
        assert await page.evaluate(low_contrast) == [], scheme
        await page.close()
