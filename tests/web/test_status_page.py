"""The status page: its files, its events, and the page itself in headless Chromium."""

from __future__ import annotations

import asyncio
import json
import os
import re
from importlib.resources import files

import pytest

from tars.errors import InternalError, UnknownModel
from tars.messages.files import TransferDescription
from tars.messages.node import CallCounters, EngineCounters, LoadProgress, MeasuredSpeeds
from tars.web.status_page import CONTENT_TYPES

BOUND = 10.0
"""Seconds for anything here; it takes a fraction of one. Chromium on a busy machine is the slowest."""


# --- files ------------------------------------------------------------------------------------------------------------


async def test_every_file_is_served_with_its_type_and_a_policy_that_allows_only_this_node(node):
    for name, content_type in CONTENT_TYPES.items():
        path = "/" if name == "index.html" else f"/static/{name}"
        async with node.http.get(node.url + path) as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == content_type
            assert response.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert await response.read() == (files("tars.web") / "static" / name).read_bytes()


async def test_every_file_that_ships_is_served_and_none_points_elsewhere():
    shipped = {entry.name: entry for entry in (files("tars.web") / "static").iterdir()}
    assert set(shipped) == set(CONTENT_TYPES)
    for name, entry in shipped.items():
        text = entry.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", text, flags=re.M)), name
        assert "innerHTML" not in text, name


async def test_a_file_that_has_not_changed_is_not_sent_again(node):
    async with node.http.get(f"{node.url}/static/app.js") as first:
        tag = first.headers["ETag"]
    async with node.http.get(f"{node.url}/static/app.js", headers={"If-None-Match": tag}) as second:
        assert second.status == 304
        assert await second.read() == b""
    async with node.http.get(f"{node.url}/static/app.js", headers={"If-None-Match": '"other"'}) as third:
        assert third.status == 200


async def test_no_other_file_can_be_reached(node):
    for path in ("/static/", "/static/../status_page.py", "/static/%2e%2e/status_page.py", "/static/index.html"):
        async with node.http.get(f"{node.url}{path}") as response:
            assert response.status == 404


# --- events -----------------------------------------------------------------------------------------------------------


async def read_description(response) -> dict:
    async with asyncio.timeout(BOUND):
        while True:
            line = await response.content.readline()
            assert line, "the stream ended"
            if line == b"event: description\n":
                return json.loads((await response.content.readline()).removeprefix(b"data: "))


async def test_events_describe_the_node_again_and_again(node, service):
    async with node.http.get(f"{node.url}/events") as response:
        assert response.content_type == "text/event-stream"
        assert (await read_description(response))["name"] == "living-room"
        service.description = service.description.model_copy(update={"name": "attic"})
        async with asyncio.timeout(BOUND):
            while (await read_description(response))["name"] != "attic":
                pass
    assert service.started == [], "looking at the page is no call"


async def test_a_watcher_too_many_is_refused_and_a_place_is_free_again_when_one_leaves(serve):
    node = await serve(watchers=1)
    async with node.http.get(f"{node.url}/events") as first:
        await read_description(first)
        async with node.http.get(f"{node.url}/events") as second:
            assert second.status == 429
            assert (await second.json())["error"]["data"]["kind"] == "overloaded"
        first.close()
    async with asyncio.timeout(BOUND):
        while True:
            async with node.http.get(f"{node.url}/events") as third:
                if third.status == 200:
                    break


async def test_events_end_promptly_when_the_node_stops(node):
    async with node.http.get(f"{node.url}/events") as response:
        await read_description(response)
        # Well under the time that the listener leaves to running answers.
        async with asyncio.timeout(2):
            stopping = asyncio.create_task(node.listener.close())
            await response.read()
            await stopping


async def test_without_the_key_there_is_the_page_but_no_fact_of_the_node(serve, keyed_options):
    node = await serve(keyed_options)
    for path, status in (("/", 200), ("/static/app.js", 200), ("/health", 200), ("/events", 401), ("/status", 401)):
        async with node.http.get(node.url + path) as response:
            assert response.status == status, path


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.browser
async def test_the_page_shows_the_node_and_follows_it_without_reload(node, service, page):
    await page.goto(node.url)
    await page.wait_for_selector("text=living-room")
    devices = await page.inner_text("#devices")
    assert "NVIDIA GeForce RTX 3060" in devices
    assert "5.0 GiB" in devices
    assert "6.0 GiB of 12.0 GiB" in devices
    assert "simulated" in devices
    replicas = await page.inner_text("#replicas")
    assert "read, 40 %" in replicas
    assert await page.inner_text("#errors .failure b") == "still_loading"

    await page.evaluate("window.stillTheSamePage = true")
    loaded = service.description.replicas[1].model_copy(update={"progress": LoadProgress(stage="load", percent=85)})
    service.description = service.description.model_copy(
        update={
            "replicas": [service.description.replicas[0], loaded],
            "calls": CallCounters(total=4321, failed=3, active=17, by_method={"inference.tokenize": 4321}),
            "recent_errors": [],
            "devices": service.description.devices[:1],
        }
    )
    await page.wait_for_selector("text=load, 85 %")
    await page.wait_for_selector("text=4,321")
    await page.wait_for_selector("#methods >> text=inference.tokenize")
    await page.wait_for_selector("#errors >> text=None since the node started")
    assert await page.locator(".device").count() == 1
    assert await page.evaluate("window.stillTheSamePage")
    assert {url.startswith(node.url + "/") for url in page.asked} == {True}, page.asked


@pytest.mark.browser
async def test_the_page_shows_model_files_on_their_way(node, service, page):
    await page.goto(node.url)
    await page.wait_for_selector("text=living-room")
    assert not await page.is_visible("#transfers-section")
    transfer = TransferDescription(
        model="mistral-7b",
        variant="Q4_K_M",
        stage="fetch",
        bytes_done=2**30,
        bytes_total=4 * 2**30,
        bytes_per_second=100.0 * 2**20,
        sources=["attic", "<b>evil</b>"],
    )
    service.description = service.description.model_copy(update={"transfers": [transfer]})
    await page.wait_for_selector("text=1.0 GiB of 4.0 GiB, 100 MiB/s from attic, <b>evil</b>")
    assert await page.locator(".transfer .meter span").get_attribute("style") == "width: 25%;"
    service.description = service.description.model_copy(update={"transfers": []})
    await page.wait_for_selector("#transfers-section", state="hidden")


@pytest.mark.browser
async def test_the_page_shows_how_busy_an_engine_is(node, service, page):
    await page.goto(node.url)
    await page.wait_for_selector("text=53 tokens/s")
    assert "slots busy" not in await page.inner_text("#replicas")
    counters = EngineCounters(
        running=3, waiting=2, kv_cells=8000, kv_used=2000, kv_cached=4000, prompt_tokens=1000, prompt_tokens_cached=830
    )
    ready = service.description.replicas[0]
    speeds = MeasuredSpeeds(decode_tokens_per_second=52.6, decode_tokens_per_second_all_slots=1184.4)
    info = ready.info.model_copy(update={"speeds": speeds})
    busy = ready.model_copy(update={"counters": counters, "info": info})
    service.description = service.description.model_copy(update={"replicas": [busy, *service.description.replicas[1:]]})
    await page.wait_for_selector("text=3 of 4, 2 waiting")
    readings = await page.inner_text(".replica:first-child .readings")
    assert "25 % of 8,000 tokens used, 50 % kept for reuse" in readings
    assert "83 %" in readings
    assert "53 tokens/s, 1,184 with all slots" in readings
    if folder := os.environ.get("TARS_SCREENSHOTS"):
        await page.screenshot(path=f"{folder}/engine.png", full_page=True)
        await page.set_viewport_size({"width": 390, "height": 844})
        await page.screenshot(path=f"{folder}/engine-phone.png", full_page=True)


async def test_events_tell_the_deployed_models_once_and_again_when_they_change(node, service):
    async def events_until_models(response) -> tuple[list[str], list[str]]:
        before: list[str] = []
        async with asyncio.timeout(BOUND):
            while (name := (await response.content.readuntil(b"\n")).decode().strip()) != "event: models":
                before += [name] if name.startswith("event: ") else []
            data = await response.content.readuntil(b"\n")
        return before, [model["name"] for model in json.loads(data.removeprefix(b"data: "))["models"]]

    async with node.http.get(f"{node.url}/events") as response:
        assert await events_until_models(response) == ([], ["help-desk", "all-MiniLM-L6-v2"])
        for _ in range(3):
            await read_description(response)
        service.known_models = service.known_models[:1]
        before, names = await events_until_models(response)
        assert names == ["help-desk"]
        assert set(before) <= {"event: description"}


@pytest.mark.browser
async def test_a_deployed_model_that_fits_nowhere_is_shown_too(node, service, page):
    refused = service.known_models[2].model_copy(update={"deployed": True, "state": "refused"})
    await page.goto(node.url)
    await page.wait_for_selector(".device")
    assert await page.locator(".replica").count() == 2
    service.known_models = [*service.known_models[:2], refused]
    row = page.locator(".replica", has_text="mistral-7b")
    await row.wait_for()
    assert "refused" in await row.inner_text()
    assert "tars explain mistral-7b says why" in await row.inner_text()
    assert "of 3" in await page.inner_text("#tiles")


@pytest.mark.browser
async def test_names_and_errors_are_shown_as_text_and_never_run(node, service, page):
    evil = "<img src=x onerror='window.broken=true'>"
    description = service.description
    service.description = description.model_copy(
        update={
            "name": evil,
            "replicas": [
                description.replicas[0].model_copy(update={"model": evil, "last_error": evil, "state": "failed"}),
                description.replicas[0].model_copy(update={"id": "second", "model": evil}),
            ],
            "devices": [description.devices[0].model_copy(update={"name": evil, "notes": [evil]})],
            "recent_errors": [description.recent_errors[0].model_copy(update={"message": evil, "error_kind": evil})],
            "calls": CallCounters(total=1, by_method={evil: 1}),
        }
    )
    service.pieces = [evil]
    await page.goto(node.url)
    for place in ("#node-name", "#replicas h3", "#replicas .error-text", "#devices h3", "#errors b", "#methods .mono"):
        assert await page.locator(place).first.text_content() == evil, place
    await page.select_option("#try-model", evil)
    await page.fill("#try-text", evil)
    service.error = UnknownModel(evil)
    await page.click("#try-send")
    await page.wait_for_selector(".turn.failed")
    assert evil in await page.text_content("#try-log")
    assert await page.locator("main img").count() == 0
    assert await page.evaluate("window.broken") is None


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1280])
async def test_no_width_needs_sideways_scrolling(node, service, page, width):
    long_name = "a-model-with-a-very-long-name-that-somebody-really-published-" * 2
    replicas = [replica.model_copy(update={"model": long_name}) for replica in service.description.replicas]
    service.description = service.description.model_copy(update={"replicas": replicas, "name": "n" * 60})
    await page.set_viewport_size({"width": width, "height": 780})
    await page.goto(node.url)
    await page.wait_for_selector(".device")
    assert await page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
async def test_every_text_has_enough_contrast_in_light_and_dark(node, browser, low_contrast):
    for scheme in ("light", "dark"):
        page = await browser.new_page(color_scheme=scheme)
        await page.goto(node.url)
        await page.wait_for_selector(".failure")
        low = await page.evaluate(low_contrast)
        assert low == [], scheme
        await page.close()


@pytest.mark.browser
async def test_every_field_has_a_name_for_screen_readers(node, page):
    await page.goto(node.url)
    await page.wait_for_selector(".device")
    for role, name in (("textbox", "Your message"), ("combobox", "Model"), ("button", "Send"), ("main", None)):
        assert await page.get_by_role(role, name=name).count() == 1, (role, name)
    bar = page.get_by_role("img", name=re.compile("5.0 GiB held by TARS, 1.0 GiB by others, 6.0 GiB free of 12.0 GiB"))
    assert await bar.count() == 1


@pytest.mark.browser
async def test_trying_it_streams_the_answer_and_can_be_stopped(node, service, page):
    await page.goto(node.url)
    service.gate = asyncio.Event()
    await page.fill("#try-text", "How do I add a second PC?")
    await page.press("#try-text", "Enter")
    await page.wait_for_selector(".turn.running >> text=Hello")
    service.gate.set()
    await page.wait_for_selector(".turn.assistant >> text=Hello, wörld")
    assert "3 tokens" in await page.inner_text(".turn.assistant .note")

    service.gate = asyncio.Event()
    await page.fill("#try-text", "And a third?")
    await page.click("#try-send")
    await page.wait_for_selector(".turn.running >> text=Hello")
    await page.click("#try-stop")
    async with asyncio.timeout(BOUND):
        await service.closed.wait()
    assert [message.role for message in service.params[1].messages] == ["user", "assistant", "user"]


@pytest.mark.browser
async def test_a_node_that_stops_is_said_to_be_unreachable_and_its_return_is_noticed(node, serve, page, service):
    await page.goto(node.url)
    await page.wait_for_selector(".device")
    await node.listener.close()
    await page.wait_for_selector("#notice >> text=/^Node unreachable since .*\\d\\d/")
    assert await page.locator("main").is_visible(), "what was known last stays readable"
    # The same node again, on the same port.
    port = int(node.url.rpartition(":")[2])
    service.description = service.description.model_copy(update={"name": "back-again"})
    await serve(port=port)
    await page.wait_for_selector("text=back-again")
    assert not await page.locator("#notice").is_visible()


@pytest.mark.browser
async def test_a_node_that_hangs_is_noticed_too(node, service, page):
    await page.clock.install()
    await page.goto(node.url)
    await page.wait_for_selector(".device")

    async def hang() -> None:
        await asyncio.Event().wait()

    whole = service.describe
    service.describe = hang
    # Twice the silence that is borne: a node that only seemed silent would have been back after the first.
    for _ in range(2):
        before = len(page.asked)
        await page.clock.run_for(7_000)
        await page.wait_for_selector("#notice >> text=Node unreachable since")
        assert len(page.asked) > before, "it tries again"
    service.describe = whole
    await page.clock.run_for(7_000)
    await page.wait_for_selector("#notice", state="hidden")


@pytest.mark.browser
async def test_a_node_with_keys_asks_for_one_and_uses_it(serve, keyed_options, page):
    node = await serve(keyed_options)
    await page.goto(node.url)
    await page.get_by_label("API key").fill("wrong")
    await page.click("text=Open")
    await page.wait_for_selector("#key-error >> text=does not know that key")
    await page.get_by_label("API key").fill("sesame")
    await page.click("text=Open")
    await page.wait_for_selector(".device")
    assert not await page.locator("#key-form").is_visible()
    await page.fill("#try-text", "hello")
    await page.click("#try-send")
    await page.wait_for_selector(".turn.assistant >> text=Hello, wörld")
    await page.reload()
    await page.wait_for_selector(".device")


async def test_a_description_that_fails_is_a_heartbeat_and_the_page_goes_on(node, service):
    async def broken():
        raise InternalError("no")

    whole = service.describe
    async with node.http.get(f"{node.url}/events") as response:
        await read_description(response)
        service.describe = broken
        async with asyncio.timeout(BOUND):
            while not (await response.content.readline()).startswith(b": the node could not be described"):
                pass
        service.describe = whole
        assert (await read_description(response))["name"] == "living-room"
