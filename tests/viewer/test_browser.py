"""The page in a real browser: Debian's Chromium, or any that FP8COMPILE_CHROMIUM names."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8compile
from tests.models import Llama
from tests.viewer.test_collect import PASSES as SNAPSHOTS

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("FP8COMPILE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), "")
if not CHROMIUM:
    pytest.skip("no Chromium found (apt-get install chromium)", allow_module_level=True)

PASSES = SNAPSHOTS[:-1]
FOLDED = "f:layers.0-2"
# What must not lie over each other: boxes that are not open, by their corners in the window.
OVERLAPS = """() => {
  const boxes = [...document.querySelectorAll(".box:not(.open)")].map(box => {
    const own = box.querySelector("rect:last-of-type").getBoundingClientRect();
    return { id: box.dataset.id, ...own.toJSON() };
  });
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1).map(b => [a.id, b.id]));
}"""
# Labels that are wider than their boxes.
TOO_WIDE = """() => [...document.querySelectorAll(".box:not(.open) text")].filter(text => {
  const box = text.parentNode.querySelector("rect:last-of-type");
  return text.getBoundingClientRect().right > box.getBoundingClientRect().right;
}).map(text => text.textContent)"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a narrow Llama, whose head stays in high precision."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = Llama(layers=3, width=64, heads=2, kv_heads=1, hidden=64)
        ids = torch.zeros(1, 16, dtype=torch.long)
    path = tmp_path_factory.mktemp("browser") / "graph.html"
    return fp8compile.view(model, ids, path=path, options={"skip": ["lm_head"]})


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1400, 900), (500, 800)], ids=["wide", "narrow"])
def page(chromium: Any, file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; the test fails on any error in it, and on any request but for itself."""
    width, height = request.param
    page = chromium.new_page(viewport={"width": width, "height": height})
    errors: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(file.as_uri())
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    yield page
    assert errors == []
    assert [url for url in requests if not url.startswith(("blob:", "data:"))] == [file.as_uri()]
    page.close()


def ids(page: Any) -> list[str]:
    """The visible boxes."""
    return page.eval_on_selector_all(".box", "boxes => boxes.map(box => box.dataset.id)")


def label(page: Any, box: str) -> str:
    """The first line in a box."""
    return page.text_content(f'[data-id="{box}"] > text')


def press(page: Any, box: str) -> None:
    """Open or close a box, and wait for the new picture."""
    state = page.eval_on_selector_all(".box", "boxes => boxes.length")
    page.dispatch_event(f'[data-id="{box}"] > .toggle', "click")
    page.wait_for_function(f"document.querySelectorAll('.box').length != {state}", timeout=30_000)


def find(page: Any, text: str) -> None:
    """Search, and go to the first hit."""
    page.fill("#query", text)
    page.press("#query", "Enter")
    page.wait_for_selector(".box.selected", timeout=30_000)


def test_the_first_view_is_an_overview(page: Any) -> None:
    shown = ids(page)
    assert FOLDED in shown and len(shown) < 12
    assert label(page, FOLDED) == "layers.0-2, 3 alike"
    assert "in FP8" in page.inner_text("#summary")
    assert page.evaluate(OVERLAPS) == [] and page.evaluate(TOO_WIDE) == []
    window = page.viewport_size
    for box in page.query_selector_all(".box"):
        place = box.bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= window["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= window["width"]


def test_a_fold_opens_to_one_layer_or_to_all(page: Any) -> None:
    press(page, FOLDED)
    shown = ids(page)
    assert {"m:layers.0", "m:layers.0.mlp", "f:layers.1-2"} <= set(shown)
    assert page.evaluate(OVERLAPS) == [] and page.evaluate(TOO_WIDE) == []
    press(page, "m:layers.0")
    assert FOLDED in ids(page), "a closed layer goes back to those like it"
    page.dispatch_event(f'[data-id="{FOLDED}"]', "click")
    page.click("#panel button:has-text('show all 3')")
    page.wait_for_selector('[data-id="m:layers.2"]', timeout=30_000)
    assert FOLDED not in ids(page)
    assert page.evaluate(OVERLAPS) == []


def test_what_is_opened_is_in_sight(page: Any) -> None:
    press(page, FOLDED)
    press(page, "m:layers.0.attention")
    opened = page.wait_for_selector('[data-id="m:layers.0.attention"].selected', timeout=30_000)
    box = opened.bounding_box()
    frame = page.query_selector("#picture").bounding_box()
    assert 0 <= box["y"] - frame["y"] < frame["height"] / 2
    middle = box["x"] + box["width"] / 2 - frame["x"]
    assert abs(middle - frame["width"] / 2) < frame["width"] / 4


def test_a_region_opens_to_its_nodes_and_its_source(page: Any) -> None:
    press(page, FOLDED)
    region = next(i for i in ids(page) if i.startswith("n:forward.region_"))
    page.dispatch_event(f'[data-id="{region}"]', "click")
    source = page.inner_text("#source")
    assert "@triton.jit" in source and "tl.store" in source
    assert "reads" in page.inner_text("#panel") and "writes" in page.inner_text("#panel")
    before = set(ids(page))
    press(page, region)
    inside = set(ids(page)) - before
    assert "quantize" in [label(page, box) for box in inside]
    assert page.evaluate(OVERLAPS) == [] and page.evaluate(TOO_WIDE) == []


def test_search_goes_to_a_site_and_shows_what_is_known(page: Any) -> None:
    find(page, "layers.1.mlp.down fprop")
    panel = page.inner_text("#panel")
    assert "layers.1.mlp.down fprop" in panel
    for text in ("e4m3", "M 16, N 64, K 64", "scaled_mm", "models.py"):
        assert text in panel
    place = page.query_selector(".box.selected").bounding_box()
    assert 0 < place["x"] < page.viewport_size["width"]
    assert 0 < place["y"] < page.viewport_size["height"]
    find(page, "lm_head fprop")
    assert "skipped by the user" in page.inner_text("#panel dd.reason")
    page.fill("#query", "no such thing")
    assert "nothing of that name" in page.inner_text("#hits")


def test_casts_tell_their_scales(page: Any) -> None:
    find(page, "layers.0.attention.wo quantize")
    assert re.search(r"slot \d+, of layers\.0\.attention\.wo\.\w+", page.inner_text("#panel"))


def test_edges_are_coloured_by_format(page: Any) -> None:
    find(page, "layers.1.mlp.down dgrad")
    colours = {
        name: page.eval_on_selector(f".edge.{name}", "edge => getComputedStyle(edge).stroke")
        for name in ("high", "e4m3", "e5m2")
    }
    assert len(set(colours.values())) == 3


def test_the_slider_goes_through_the_passes(page: Any) -> None:
    count = int(page.get_attribute("#slider", "max"))
    names = [page.inner_text("#pass").split()[1]]
    for _ in range(count):
        page.click("#earlier")
        page.wait_for_timeout(50)
        names.append(page.inner_text("#pass").split()[1])
    assert names[::-1] == [*PASSES, "fused"]
    assert "before the passes" in page.inner_text("#pass")
    find(page, "layers.0.mlp.down")
    page.evaluate(f"document.querySelector('#slider').value = {PASSES.index('insert_casts')}")
    page.dispatch_event("#slider", "input")
    page.wait_for_selector(".box.changed", timeout=30_000)
    assert re.search(r"\d+ new, .*\d+ gone", page.inner_text("#pass"))


def test_views_are_left_out_until_they_are_asked_for(page: Any) -> None:
    find(page, "layers.0.attention")
    press(page, "m:layers.0.attention")
    few = len(ids(page))
    page.check("#views")
    page.wait_for_function(f"document.querySelectorAll('.box').length > {few}", timeout=30_000)


def test_dark_and_light(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    first = page.evaluate(ground)
    page.click("#theme")
    second = page.evaluate(ground)
    page.click("#theme")
    assert first != second and page.evaluate(ground) == first
