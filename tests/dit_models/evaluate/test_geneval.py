"""GenEval's folders, and the small GenEval of digit scenes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit_models.data import Scene, SceneObject, parse_caption
from dit_models.drawing import Prompts
from dit_models.evaluate import scene_geneval, scene_geneval_table
from dit_models.evaluate.draw import draw_all, to_pixels
from dit_models.evaluate.geneval import PromptFolders
from dit_models.evaluate.scenes import scene_categories
from dit_models.quality import ReaderSettings
from dit_models.run_folder import load_run

from .cases import command, save_run, tiny_artist

LINES = [
    '{"tag": "single_object", "include": ["seven"], "prompt": "a red seven"}',
    '{"tag":"position",  "prompt": "a blue two above a green one", "note": "größer"}',
    '{"tag": "colors", "prompt": "a white zero"}',
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "scenes", "captions")


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


# --- the layout


def test_folders_are_those_that_geneval_reads(run_dir, metadata, tmp_path):
    out = tmp_path / "out"
    words = (run_dir, "--geneval", metadata, "--out", out, "--steps", 2, "--batch-size", 6)
    assert command(*words, "--first-seed", 40, "--images-per-prompt", 3) == 0
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["00000", "00001", "00002"]
    artist = load_run(run_dir, "cpu").artist
    artist.sampling.num_steps = 2
    captions = [json.loads(line)["prompt"] for line in LINES for _ in range(3)]
    expected = to_pixels(draw_all(artist, Prompts(None, captions), 40, 6))
    for number, folder in enumerate(folders):
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        assert files == ["grid.png", "metadata.jsonl", "samples", "samples/0000.png",
                         "samples/0001.png", "samples/0002.png"]  # fmt: skip
        assert (folder / "metadata.jsonl").read_text(encoding="utf-8") == LINES[number] + "\n"
        for image in range(3):
            pixels = np.asarray(Image.open(folder / f"samples/{image:04d}.png"))
            difference = pixels.astype(int) - expected[3 * number + image]
            assert abs(difference).max() <= 1
        grid = np.asarray(Image.open(folder / "grid.png"))
        assert grid.shape == (64, 64, 3)
        assert np.array_equal(grid[:32, 32:], np.asarray(Image.open(folder / "samples/0001.png")))
        assert np.array_equal(grid[32:, :32], np.asarray(Image.open(folder / "samples/0002.png")))
        assert (grid[32:, 32:] == 0).all()


def test_what_is_there_is_not_drawn_again(run_dir, metadata, tmp_path, capsys):
    out = tmp_path / "out"
    words = (run_dir, "--geneval", metadata, "--out", out, "--steps", 1)
    assert command(*words) == 0
    first = {path: path.read_bytes() for path in out.rglob("*.png")}
    kept = (out / "00000").stat().st_mtime_ns
    for path in sorted((out / "00001").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (out / "00001").rmdir()
    assert command(*words) == 0
    assert (out / "00000").stat().st_mtime_ns == kept
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == first
    assert command(*words, "--images-per-prompt", 2) == 2
    assert "images_per_prompt 4 there, 2 asked" in capsys.readouterr().err
    metadata.write_text(metadata.read_text(encoding="utf-8").replace("colors", "counting"))
    assert command(*words) == 2  # the same prompts, judged otherwise
    assert "metadata_sha256" in capsys.readouterr().err


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    store = PromptFolders(tmp_path, LINES, 2, 1)
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    monkeypatch.setattr("dit_models.evaluate.geneval._grid", lambda pixels: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.write(store.pieces[0], pixels)
    assert list(tmp_path.iterdir()) == []
    assert not store.has(store.pieces[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "x"}\nnot json\n', "line 2 of"),
        ('{"text": "x"}\n', 'expected a JSON object with a "prompt"'),
        ('{"prompt": 3}\n', "expected a string"),
        ("\n", "holds no line"),
    ],
)
def test_wrong_metadata_is_named(run_dir, tmp_path, capsys, text, words):
    (tmp_path / "m.jsonl").write_text(text)
    assert command(run_dir, "--geneval", tmp_path / "m.jsonl", "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err


# --- digit scenes


CAPTIONS = ["a red seven", "a blue two above a green one", "a white zero left of a red five"]


def stand_in_reader(monkeypatch: pytest.MonkeyPatch, scenes: dict[int, list[Scene]]) -> None:
    """A reader that says ``scenes[n]`` of the n-th set of images that it is shown."""
    shown = iter(range(len(scenes)))

    class Reader:
        def features(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), 1)

        def heads(self, features: Tensor) -> Tensor:
            return features

    module = "dit_models.evaluate.scenes"
    monkeypatch.setattr(f"{module}.scene_reader", lambda *words: (Reader(), None))
    monkeypatch.setattr(f"{module}.read_scenes", lambda logits: scenes[next(shown)])


def test_categories_count_what_geneval_counts(monkeypatch):
    seven, two, one = SceneObject(7, "green"), SceneObject(2, "blue"), SceneObject(1, "green")
    read = [
        Scene((seven,)),  # the right digit in the wrong colour
        Scene((two, one), "left of"),  # both right, on the wrong sides
        Scene((SceneObject(0, "red"), SceneObject(5, "white")), "left of"),  # colours exchanged
    ]
    stand_in_reader(monkeypatch, {0: read, 1: [parse_caption(caption) for caption in CAPTIONS]})
    figures = scene_categories(torch.zeros(3, 3, 32, 32), CAPTIONS)
    scores = {name: (c["score"], c["count"]) for name, c in figures["categories"].items()}
    assert scores == {
        "single_object": (1.0, 1), "two_object": (1.0, 2), "colors": (0.0, 1),
        "position": (0.5, 2), "color_attr": (0.5, 2),
    }  # fmt: skip
    assert figures["overall"] == pytest.approx(0.6)
    assert figures["overall_real"] == 1.0
    assert figures["everything_right"] == 0.0
    table = scene_geneval_table(figures)
    assert "position           0.500   1.000       2" in table
    assert "overall            0.600   1.000       3" in table


def test_categories_nobody_asked_for_are_none(monkeypatch):
    scenes = [parse_caption(caption) for caption in ("a red seven", "a blue two")]
    stand_in_reader(monkeypatch, {0: scenes, 1: scenes})
    figures = scene_categories(torch.zeros(2, 3, 32, 32), ["a red seven", "a blue two"])
    assert figures["categories"]["position"] == {"score": None, "real": None, "count": 0}
    assert figures["overall"] == 1.0
    assert "position" not in scene_geneval_table(figures)


def test_scene_geneval_draws_heldout_captions(tmp_path, monkeypatch):
    artist = tiny_artist(tmp_path, "captions")
    settings = ReaderSettings(steps=1, batch_size=4, heldout_scenes=4)
    words = {"cache_dir": tmp_path, "settings": settings, "guidance_scale": 2.0}
    first = scene_geneval(artist, 6, batch_size=6, **words)
    again = scene_geneval(artist, 6, batch_size=2, **words)
    assert first == again
    assert first["guidance_scale"] == 2.0
    assert first["num_samples"] == 6
    counts = {name: category["count"] for name, category in first["categories"].items()}
    assert counts["single_object"] + counts["two_object"] == 6
    with pytest.raises(ValueError, match="num_samples=1"):
        scene_geneval(artist, 1)
    with pytest.raises(ValueError, match="expected a model of captioned scenes"):
        scene_geneval(replace(artist, image_shape=(3, 16, 16)), 6)
