"""The ablation: equal compute by construction, figures that repeat, nothing trained twice."""

import json
import statistics
from functools import partial

import numpy as np
import pytest
import torch

from dit_models.ablation import __main__ as command
from dit_models.ablation.arms import CAPACITY_FACTORS, activated_macs, arms, run_config
from dit_models.ablation.heldout import heldout_loss
from dit_models.ablation.results import RunResult, load_results, points, save_result, table
from dit_models.ablation.run import Judging, jobs, run_job
from dit_models.assemble import model_config_for
from dit_models.data import build_dataset
from dit_models.models import build_model
from dit_models.run_folder import load_run

WIDTH = 64
FAST = ["batch_size=4", "sampling.num_steps=2", "model_options.depth=2"]


def model_config(arm):
    config = run_config(arm, WIDTH, 0, steps=10, run_dir="unused")
    return config, model_config_for(config, build_dataset("digit-scenes").info)


@pytest.mark.parametrize("match", ["total", "experts"])
def test_arms_cost_the_same_but_for_their_routers(match):
    without_router = set()
    for arm in arms(match):
        config, model = model_config(arm)
        router = len(model.moe_blocks) * model.seq_len * model.hidden_size * model.num_experts
        without_router.add(activated_macs(config) - router)
    assert len(without_router) == 1


def test_arms_hold_the_same_number_of_expert_weights():
    held = []
    for arm in arms("total")[1:]:
        _, config = model_config(arm)
        model = build_model(config, device="meta")
        held.append(sum(p.numel() for name, p in model.named_parameters() if ".experts." in name))
    assert len(held) == 1 + len(CAPACITY_FACTORS)
    assert len(set(held)) == 1
    assert held[0] == 3 * 8 * (2 * 4 * WIDTH * WIDTH)  # 3 MoE layers, 8 times a dense FFN of 4 D


def test_matching_experts_has_eight_of_them_everywhere():
    assert {model_config(arm)[1].num_experts for arm in arms("experts")[1:]} == {8}


@pytest.mark.parametrize("factor", CAPACITY_FACTORS)
def test_tokens_meet_as_many_experts_as_the_arm_says(factor):
    arm = next(arm for arm in arms() if arm.name == f"expert-choice-{factor:g}")
    _, config = model_config(arm)
    model = build_model(config).eval()
    latents, text = torch.randn(2, 3, 32, 32), torch.randn(2, 5, config.text_dim)
    for plan in model(latents, torch.rand(2), text=text).plans:
        assert plan.num_rows == factor * 2 * config.seq_len
        assert plan.capacity == config.seq_len // 8


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"match='half'.*total or experts"):
        arms("half")
    with pytest.raises(ValueError, match="width 40; expected a multiple of 32"):
        run_config(arms()[0], 40, 0, steps=1, run_dir="unused")
    for word in ("steps=9", "model_options.hidden_size=64", "model_options.moe_every=1"):
        with pytest.raises(ValueError, match="is decided by the ablation"):
            run_config(arms()[0], 32, 0, steps=1, run_dir="unused", overrides=[word])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A job of one arm, trained for two steps and judged."""
    out = tmp_path_factory.mktemp("ablation")
    job = jobs(out, [arms()[3]], [32], 1)[0]
    assert run_job(job, 2, FAST, Judging(heldout=4, samples=4)) == 0
    return job


def test_a_run_is_trained_and_judged_once(trained, capsys):
    [result] = load_results(trained.run_dir.parent)
    assert (result.arm, result.width, result.seed, result.steps) == ("expert-choice-1", 32, 0, 2)
    assert np.isfinite([result.heldout_loss, result.frechet]).all()
    before = (trained.run_dir / "ablation.json").stat().st_mtime_ns
    assert run_job(trained, 2, FAST, Judging(heldout=4, samples=4)) == 0
    assert "nothing is trained again" in capsys.readouterr().out
    assert (trained.run_dir / "ablation.json").stat().st_mtime_ns == before


def test_heldout_loss_is_the_plain_loop_over_images_and_levels(trained):
    artist = load_run(trained.run_dir, "cpu").artist
    dataset = build_dataset("digit-scenes", split="heldout")
    losses = []
    for index in range(3):
        sample = dataset.sample(index, np.random.default_rng([20_000, index]))
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(20_000 + index))
        condition = artist.model.condition(None, [sample.caption])
        for level in range(8):
            result = artist.objective.loss_at(
                partial(artist.model, **condition),
                sample.image[None],
                noise[None],
                torch.tensor([(level + 0.5) / 8]),
            )
            losses.append(float(result.loss))
    expected = statistics.fmean(losses)
    for batch_size in (1, 2, 8):
        found = heldout_loss(artist, dataset, 3, batch_size)
        assert found == pytest.approx(expected, rel=1e-5)  # fp32 products of another batch size


def result_of(label, width, seed, loss):
    figures = dict.fromkeys(("overall", "digit", "color", "position", "frechet"), 0.5)
    return RunResult(
        arm=label, label=label, width=width, seed=seed, steps=1, batch_size=1, macs=width * 10**6,
        parameters=1, activated=1, heldout_loss=loss, guidance_scale=2.0, num_samples=1,
        train_seconds=1.0, **figures,
    )  # fmt: skip


def test_points_are_means_with_sample_deviations_in_order():
    results = [result_of("b", 64, 0, 1.0), result_of("b", 64, 1, 3.0), result_of("b", 32, 0, 9.0),
               result_of("a", 64, 0, 5.0)]  # fmt: skip
    found = points(results, ["a", "b"])
    assert [(point.label, point.width, point.seeds) for point in found] == [
        ("a", 64, 1), ("b", 32, 1), ("b", 64, 2),
    ]  # fmt: skip
    assert found[2].values["heldout_loss"] == (2.0, pytest.approx(2**0.5))
    assert found[0].values["heldout_loss"] == (5.0, 0.0)
    assert "| b | 64 | 64.0 | 2 | 2.0000 ± 1.4142 |" in table(found)


def test_the_command_reports_finished_runs_and_refuses_other_settings(tmp_path, capsys):
    out = tmp_path / "ablation"
    words = ["--out", str(out), "--widths", "32", "--seeds", "1", "--steps", "2"]
    for job in jobs(out, arms(), [32], 1):
        job.run_dir.mkdir(parents=True)
        save_result(job.run_dir, result_of(job.arm.label, 32, 0, 1.0))
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "6 runs, 0 to do" in printed
    assert "| expert choice, f_c 0.5 | 32 |" in printed
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((out / "results.json").read_text())) == 6
    with pytest.raises(SystemExit) as ended:
        command.main([*words[:-1], "3"])
    assert ended.value.code == 2
    assert "steps: 2 there, 3 now" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*words, "--only", "nothing"])
    assert "--only 'nothing'; the runs are dense-32-0" in capsys.readouterr().err
