"""The page as a file: one file, nothing from outside, and data that equal the arrays."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest

from dit_models.analyze.collect import NOBODY, collect
from dit_models.analyze.page import page_data, page_html
from dit_models.analyze.tables import tables_of

from .stub import EXPERTS, GRID, LAYERS, STEPS, StubArtist, subjects

HOSTILE = '</script><script>alert(1)</script><!-- & "quoted" \u2028'
ABOUT = {
    "model": "stub <b>",
    "data": "none",
    "training_step": 0,
    "steps": STEPS,
    "sampler": "euler",
    "guidance_scale": 2.0,
}


@pytest.fixture
def analysis():
    return collect(StubArtist(), subjects(4, [HOSTILE, "green"]), shown=2)


def decoded(text: str, width: int) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(text), "<u1" if width == 1 else "<u2")
    return values.reshape(STEPS, LAYERS, 2, *GRID)


def test_the_maps_inside_equal_the_arrays(analysis):
    data = page_data(analysis, tables_of(analysis), ABOUT)
    maps = analysis.maps
    np.testing.assert_array_equal(decoded(data["counts"], 1), maps.experts_per_token)
    top = decoded(data["top"], 1).astype(int)
    np.testing.assert_array_equal(np.where(top == EXPERTS, NOBODY, top), maps.top_expert)
    assert data["first_map"] == "counts"
    entropy = decoded(data["entropy"], 1) / 255 * np.log(EXPERTS)
    np.testing.assert_allclose(entropy, maps.entropy, atol=np.log(EXPERTS) / 510 + 1e-6)


def test_text_of_a_user_cannot_end_the_data(analysis):
    page = page_html(analysis, tables_of(analysis), ABOUT)
    assert page.count("<script") == 2  # the data, and the page's own
    assert page.count("</script>") == 2
    assert "alert(1)<" not in page
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data = json.loads(text[1])
    assert data["images"][0]["title"] == HOSTILE
    assert data["about"]["model"] == "stub <b>"


def test_the_page_asks_for_nothing_and_allows_only_its_own_script(analysis):
    page = page_html(analysis, tables_of(analysis), ABOUT)
    assert not re.search(r"(src|href)\s*=\s*[\"']|https?://|@import|url\(", page)
    assert not re.search(r"\son\w+\s*=\s*[\"']", page)  # no inline handlers
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "@" + "DATA@" not in page


def test_token_choice_starts_with_the_map_that_differs():
    analysis = collect(StubArtist(router="token_choice"), subjects(2))
    data = page_data(analysis, tables_of(analysis), ABOUT)
    assert (decoded(data["counts"], 1) == 2).all()
    assert data["first_map"] == "top"
