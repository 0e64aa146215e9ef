"""docs/routing.md, "Add a routing idea in one file and one line", followed to the letter."""

import ast
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_models.routing import ROUTINGS
from dit_models.trainer import Trainer

from ..training import tiny_config
from .models import gradients, inputs_for, moved, tiny

PAGE = Path(__file__).parents[3] / "docs" / "routing.md"


@pytest.fixture
def by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the file of the page, and register what its line says."""
    section = PAGE.read_text().split("## Add a routing idea in one file and one line")[1]
    source, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    module = types.ModuleType("by_place")
    exec(compile(source, "by_place.py", "exec"), module.__dict__)
    entry = ast.parse("{" + line.strip() + "}", mode="eval").body
    assert isinstance(entry, ast.Dict)
    (key,), (value,) = entry.keys, entry.values
    assert isinstance(key, ast.Constant)
    assert isinstance(value, ast.Call)
    assert isinstance(value.func, ast.Name)
    assert not value.args
    monkeypatch.setitem(ROUTINGS, str(key.value), module.__dict__[value.func.id]())


def _command() -> list[str]:
    """The overrides of the page's training command."""
    line = next(line for line in PAGE.read_text().splitlines() if "routing=by_place" in line)
    words = line.split()
    assert words[:5] == ["python", "-m", "dit_models.train", "--recipe", "digits"]
    return words[5:-1]  # the last is the run's name


@pytest.mark.usefixtures("by_place")
def test_the_new_routing_trains_resumes_and_adds_its_loss(tmp_path: Path) -> None:
    def trainer(folder: str) -> Trainer:
        run_dir = tmp_path / folder
        return Trainer(tiny_config(run_dir, *_command()), run_dir)

    def steps(trained: Trainer, count: int) -> list[dict[str, Any]]:
        values = [trained.train_step() for _ in range(count)]
        return [{n: torch.as_tensor(v).tolist() for n, v in each.items()} for each in values]

    expected = steps(trainer("a"), 3)
    first = trainer("b")
    half = steps(first, 1)
    first.save()
    second = trainer("b")
    assert second.resume()
    assert half + steps(second, 2) == expected
    total = expected[0]["diffusion_loss"] + 0.01 * expected[0]["gate_size_loss"]
    assert expected[0]["loss"] == pytest.approx(total, rel=1e-6)
    assert expected[0]["gate_size_loss"] > 0


@pytest.mark.usefixtures("by_place")
def test_each_place_goes_to_its_experts_with_and_without_checkpointing() -> None:
    model = moved(tiny("EC-DiT-tiny", routing="by_place"))
    inputs = inputs_for(model.config)
    plan = model(**inputs).plans[0].validate()
    pairs = {
        (int(token) % 64, int(expert))
        for token, expert in zip(plan.token_indices, plan.expert_of_row, strict=True)
    }
    assert pairs == {(s, (s + k) % 4) for s in range(64) for k in range(2)}
    sample, plain = gradients(model, inputs)
    model.gradient_checkpointing = True
    again, checkpointed = gradients(model, inputs)
    assert torch.equal(sample, again)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.usefixtures("by_place")
def test_its_options_are_checked() -> None:
    with pytest.raises(ValueError, match="experts=0: expected at least 1"):
        tiny("EC-DiT-tiny", routing="by_place", routing_options={"experts": 0})
    with pytest.raises(ValueError, match="group='batch': routing 'by_place' does not use it"):
        tiny("EC-DiT-tiny", routing="by_place", group="batch")


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_page_names_every_routing(name: str) -> None:
    assert f"| `{name}` |" in PAGE.read_text()
    assert ROUTINGS[name].name == name
