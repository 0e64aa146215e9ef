"""The guidance sweep of embedded data sets."""

import json

import pytest
import torch

from dit_models.config import EvaluationConfig
from dit_models.evaluate import evaluate, sweep, why_not_evaluated

from .cases import command, save_run, tiny_artist


def test_the_sweep_names_the_scale_nearest_to_real_digits(tmp_path, capsys):
    run_dir = save_run(tmp_path / "run", "expert choice")
    words = (run_dir, "--samples", 12, "--guidance", 1, 3, "--json", tmp_path / "f.json")
    assert command(*words) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [each["guidance_scale"] for each in figures["guidance_sweep"]] == [1.0, 3.0]
    best = min(figures["guidance_sweep"], key=lambda each: each["frechet_distance"])
    assert {name: figures[name] for name in best} == best
    assert best["num_samples"] == 12
    assert f"best: guidance {best['guidance_scale']:g}" in capsys.readouterr().out
    assert command(*words) == 2  # the file stays
    assert "f.json exists" in capsys.readouterr().err


def test_scenes_come_with_their_categories(tmp_path, monkeypatch):
    artist = tiny_artist(tmp_path, "captions")
    distances = iter((5.0, 4.0))

    def figures_of(name, images, prompts):
        category = {"score": 0.5, "real": 1.0, "count": 3}
        geneval = {"categories": {"colors": category}, "overall": 0.5, "overall_real": 1.0,
                   "num_samples": len(images)}  # fmt: skip
        return {"class_accuracy": 0.1, "frechet_distance": next(distances), "frechet_floor": 1.0,
                "geneval": geneval}  # fmt: skip

    monkeypatch.setattr(sweep, "judge_samples", figures_of)
    lines: list[str] = []
    config = EvaluationConfig(num_samples=4, guidance_scales=[1.0, 2.0], batch_size=3)
    figures = evaluate(artist, "digit-scenes", config, report=lines.append)
    assert figures["guidance_scale"] == 2.0
    assert figures["geneval"]["overall"] == 0.5
    assert "colors             0.500   1.000       3" in lines[-1]


def test_what_is_judged_are_the_asked_images(tmp_path, monkeypatch):
    artist = tiny_artist(tmp_path, "expert choice")
    seen = {}

    def figures_of(name, images, prompts):
        seen.update(images=images, labels=prompts.labels)
        return {"class_accuracy": 0.1, "frechet_distance": 1.0, "frechet_floor": 1.0}

    monkeypatch.setattr(sweep, "judge_samples", figures_of)
    config = EvaluationConfig(num_samples=5, guidance_scales=[1.5], batch_size=2)
    evaluate(artist, "digits", config, report=lambda line: None)
    assert seen["labels"].tolist() == [0, 1, 2, 3, 4]
    from dit_models.drawing import Prompts

    last = artist.draw(Prompts(torch.tensor([4]), None), [1_000_004], guidance_scale=1.5)
    assert torch.equal(seen["images"][4:], last)


def test_other_data_has_no_classifier(tmp_path):
    assert why_not_evaluated("digits", 16) is None
    assert "reads images of 16 pixels, not 32" in str(why_not_evaluated("digits", 32))
    assert "photos has no classifier" in str(why_not_evaluated("photos", 32))
    with pytest.raises(ValueError, match="photos has no classifier"):
        evaluate(tiny_artist(tmp_path, "dense"), "photos", EvaluationConfig())
