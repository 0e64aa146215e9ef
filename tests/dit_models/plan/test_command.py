"""``python -m dit_models.plan``: its report, JSON and errors; the tables of the page."""

import json
from pathlib import Path

import pytest

from dit_models.config_io import build_config
from dit_models.plan import tables
from dit_models.plan.__main__ import main
from dit_models.plan.tables import BEGIN, END, with_tables

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"
SMALL = ["--model", "DiT-MoE-XL/2-8E2A", "--gpus", "16", "--gpu-memory", "80"]


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == status
    streams = capsys.readouterr()
    return streams.err if status else streams.out


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, *SMALL)
    for part in (
        "DiT-MoE-XL/2-8E2A on 16 GPUs of 80 GB (72.0 GB usable)",
        "512 images a step: 32 a GPU",
        "Recommended: ",
        "parallel.data=16 parallel.expert=",
        "below 216 images a GPU and micro-batch",
        "Assumed, not measured: 450 GB/s",
        "more plans: --all",
    ):
        assert part in text
    assert "--all" not in output_of(capsys, *SMALL, "--all")


def test_small_models_are_not_all_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(
        capsys,
        "--model",
        "EC-DiT-tiny",
        "--gpus",
        "2",
        "--gpu-memory",
        "1",
        "--images-per-gpu",
        "1",
    )
    last = [row.split()[-1] for row in text.splitlines() if " expert  " in row]
    assert len(last) == 8  # of the tables of memory and of seconds
    assert all(len(total.replace(".", "").lstrip("0")) >= 2 for total in last), text


def test_the_options_for_the_trainer_are_those_of_the_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = output_of(
        capsys, "--model", "EC-DiT-tiny", "--gpus", "4", "--gpu-memory", "1", "--accumulate", "2",
        "--images-per-gpu", "8", "--precision", "fp32", "--optimizer", "rmsprop",
        "--checkpointing", "on", "--no-reshard-after-forward", "--model-option", "depth=3",
        "--model-option", "expert_activation=swiglu",
    )  # fmt: skip
    (line,) = (line for line in text.splitlines() if "python -m dit_models.train: " in line)
    config = build_config("digits", overrides=line.partition(": ")[2].split())
    assert config.model == "EC-DiT-tiny"
    assert config.model_options == {"depth": 3, "expert_activation": "swiglu"}
    assert (config.parallel.data, config.batch_size, config.accumulate) == (4, 64, 2)
    assert (config.precision, config.optimizer.kind) == ("fp32", "rmsprop")
    assert config.gradient_checkpointing
    assert not config.parallel.reshard_after_forward


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(output_of(capsys, *SMALL, "--json", "--checkpointing", "off"))
    assert len(plan["meshes"]) == 8
    assert not any(mesh["recompute"] for mesh in plan["meshes"])
    for mesh in plan["meshes"]:
        memory = mesh["memory_bytes"]
        assert memory["total"] == sum(memory.values()) - memory["total"]
        assert mesh["fits"] == (memory["total"] <= 72e9)
        # 4168 M parameters, also where 16 processes divide 8 experts
        held = 4 * 4.168e9 / mesh["dense_shards"]
        assert memory["parameters"] == pytest.approx(held, rel=0.01)
        assert memory["optimizer"] == 2 * memory["parameters"]
    assert plan["recommended"] in plan["meshes"]


def test_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    def least(*arguments: str) -> dict[str, int]:
        plan = json.loads(output_of(capsys, *SMALL, "--json", *arguments))
        chosen = [m for m in plan["meshes"] if m["expert"] == 2 and not m["recompute"]]
        sizes: dict[str, int] = chosen[0]["memory_bytes"]
        return sizes

    plain = least()
    assert least("--no-ema")["ema"] == 0
    assert least("--batch-size", "1024")["activations"] > 1.9 * plain["activations"]
    assert least("--precision", "fp32")["activations"] > plain["activations"]
    assert least("--imbalance", "1.5")["activations"] > plain["activations"]
    assert least("--model-option", "image_size=64")["activations"] > 3 * plain["activations"]
    assert least("--accumulate", "2")["gradients"] == plain["parameters"]
    assert least("--no-reshard-after-forward")["gathered"] > 3 * plain["gathered"]


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, *SMALL[:4], "--gpu-memory", "6")
    assert "Nothing fits. The smallest, " in text
    assert "Use more GPUs, or fewer images a GPU" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SMALL[:4], "--gpu-memory is missing"),
        (["--model", "EC-DiT-M", *SMALL[2:]], "no model preset 'EC-DiT-M'; close names"),
        ([*SMALL, "--gpus", "12"], "gpus=12 is not a multiple of gpus_per_node=8"),
        ([*SMALL, "--gpus", "0"], "gpus=0; expected at least 1"),
        ([*SMALL, "--batch-size", "100"], "--batch-size 100 is not a positive multiple of 16 GPUs"),
        ([*SMALL, "--batch-size", "64", "--images-per-gpu", "4"], "give one of them"),
        ([*SMALL, "--images-per-gpu", "0"], "images_per_gpu=0; expected at least 1"),
        ([*SMALL, "--utilization", "2"], "utilization=2.0; expected at most 1"),
        ([*SMALL, "--network-gb-s", "0"], "network_gb_s=0.0; expected a finite number above 0"),
        ([*SMALL, "--imbalance", "0.5"], "imbalance=0.5; expected a finite number of at least 1"),
        (
            ["--model", "EC-DiT-tiny-diffmoe", *SMALL[2:], "--accumulate", "2"],
            "images of a batch compete",
        ),
        ([*SMALL, "--model-option", "depth"], "expected key=value"),
        ([*SMALL, "--model-option", "dept=3"], "unknown model fields ['dept']"),
        (["--tables", "no-such-page.md"], "no such file"),
    ],
)
def test_wrong_options(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in output_of(capsys, *arguments, status=2)


def test_the_tables_of_the_page_are_up_to_date() -> None:
    page = PAGE.read_text()
    assert page == with_tables(page), "run: python -m dit_models.plan --tables docs/scaling.md"


def test_tables_replace_those_between_the_markers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GPUS", (8,))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    output_of(capsys, "--tables", str(page))
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n`DiT-MoE-G/2-16E2A`")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    page.write_text("no markers\n")
    assert "lacks the lines" in output_of(capsys, "--tables", str(page), status=2)
