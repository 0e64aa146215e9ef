"""The page in a real browser: keys and mouse move it, and what it shows equals the arrays."""

import pytest

from dit_models.analyze.collect import NOBODY, collect
from dit_models.analyze.page import page_data, page_html
from dit_models.analyze.tables import tables_of

from .browser import browser, why_no_browser
from .stub import EXPERTS, GRID, LAYERS, STEPS, StubArtist, subjects
from .test_page import ABOUT, HOSTILE

pytestmark = pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))


@pytest.fixture(scope="module")
def analysis():
    return collect(StubArtist(), subjects(4, [HOSTILE, "green"]), shown=2)


@pytest.fixture(scope="module")
def data(analysis):
    return page_data(analysis, tables_of(analysis), ABOUT)


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


@pytest.fixture
def page(window, analysis, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(page_html(analysis, tables_of(analysis), ABOUT))
    window.resize(1280, 900)
    window.open(path)
    return window


def painted(page) -> list[str]:
    """The colour of the middle of each token, as the canvas shows it."""
    script = """
    const [rows, columns] = arguments[0];
    const canvas = document.getElementById("picture"), paint = canvas.getContext("2d");
    const colors = [];
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const x = (column + 0.5) * canvas.width / columns, y = (row + 0.5) * canvas.height / rows;
      const [r, g, b] = paint.getImageData(x, y, 1, 1).data;
      colors.push("#" + [r, g, b].map((part) => part.toString(16).padStart(2, "0")).join(""));
    }
    return colors;"""
    return page.run(script, list(GRID))


def expected(data, values) -> list[str]:
    shades = len(data["scale"]) - 1
    # As JavaScript rounds: halves up.
    return [
        data["scale"][int(value / data["largest_count"] * shades + 0.5)]
        for value in values.flatten().tolist()
    ]


def test_keys_choose_timestep_and_layer(page, analysis, data):
    maps = analysis.maps.experts_per_token
    page.click("#opacity", 0.99)  # the overlay alone
    assert page.text("#opacity-value") == "100 %"
    page.click("h1")  # leave the slider
    step = layer = 0
    for key in ("right", "right", "up", "left", "up", "right", "right", "right", "down"):
        page.press(key)
        step = min(max(step + {"left": -1, "right": 1}.get(key, 0), 0), STEPS - 1)
        layer = min(max(layer + {"down": -1, "up": 1}.get(key, 0), 0), LAYERS - 1)
        assert page.text("#step-value") == f"noise {data['noise'][step]:.2f}"
        assert page.text("#layer-value") == f"{layer} (0\u2013{LAYERS - 1})"
        assert painted(page) == expected(data, maps[step, layer, 0])
    assert (step, layer) == (STEPS - 1, 0)
    assert page.errors() == []


def test_the_mouse_moves_the_sliders_and_chooses_the_image(page, analysis, data):
    maps = analysis.maps.experts_per_token
    page.click("#opacity", 0.99)
    page.click("#step", 0.99)
    page.click("#layer", 0.99)
    page.click("#images button:nth-child(2)")
    assert page.text("#title") == "green"
    assert painted(page) == expected(data, maps[STEPS - 1, LAYERS - 1, 1])
    page.hover("#picture", 0.99, 0.01)  # first row, last column
    held = maps[STEPS - 1, LAYERS - 1, 1, 0, GRID[1] - 1]
    assert page.text("#token") == f"Row 0, column {GRID[1] - 1}: {held} of {EXPERTS} experts"
    page.click("#opacity", 0.01)  # the image alone: grey, as it was drawn
    assert len(set(painted(page))) == 1
    assert page.errors() == []


def test_load_and_figures_are_those_of_the_tables(page, analysis):
    tables = tables_of(analysis)
    page.click("#step", 0.99)
    shares = tables["timestep_by_expert"]["weight_share"][STEPS - 1, 0]
    script = "return [...document.querySelectorAll('#load .value')].map((e) => e.textContent)"
    assert page.run(script) == [f"{100 * round(share, 5):.1f} %" for share in shares.tolist()]
    unrouted = tables["coverage"]["unrouted_share"][STEPS - 1, 0]
    entropy = tables["entropy"]["entropy"][STEPS - 1, 0]
    assert page.text("#figures").startswith(
        f"Mean router entropy {entropy:.2f} of 1.61 nats. "
        f"{100 * unrouted:.1f} % of tokens have no expert."
    )


def test_the_other_maps(page, analysis, data):
    page.click("#opacity", 0.99)
    choose = """
    const list = document.getElementById("map");
    list.value = arguments[0];
    list.dispatchEvent(new Event("input", { bubbles: true }));"""
    page.run(choose, "top")
    top = analysis.maps.top_expert[0, 0, 0].flatten().tolist()
    for color, expert in zip(painted(page), top, strict=True):
        if expert != NOBODY:
            assert color == data["expert_colors"][expert]
    assert NOBODY in top
    page.hover("#picture", (top.index(NOBODY) % GRID[1] + 0.5) / GRID[1],
               (top.index(NOBODY) // GRID[1] + 0.5) / GRID[0])  # fmt: skip
    assert page.text("#token").endswith("no expert")
    page.run(choose, "entropy")
    page.hover("#picture", 0.01, 0.01)
    nats = analysis.maps.entropy[0, 0, 0, 0, 0]
    shown = float(page.text("#token").removeprefix("Row 0, column 0: entropy ")[:-5])
    assert shown == pytest.approx(nats, abs=0.01)


def test_a_hostile_caption_is_text(page):
    assert page.run("return document.getElementById('title').textContent") == HOSTILE
    assert page.run("return document.querySelectorAll('script').length") == 2
    assert page.text("#about").startswith("stub <b> trained on none")


def test_it_fits_a_phone(page):
    page.resize(390, 844)
    widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
    assert page.run(widths) == [390, 390]
    below = "return document.querySelector('section').getBoundingClientRect().top > document.getElementById('picture').getBoundingClientRect().bottom"  # noqa: E501
    assert page.run(below)
    page.click("#step", 0.99)
    assert page.text("#step-value") == "noise 0.40"
