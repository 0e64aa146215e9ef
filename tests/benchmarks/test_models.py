"""The benchmark of whole models: both sides compute the same, results are kept, twins are twins."""

import pytest
import torch

from benchmarks.models import results
from benchmarks.models.__main__ import latency_rows, main, sampling_table
from benchmarks.models.latency import twins
from benchmarks.models.sampling import DifferentOutputs, compare, pair
from benchmarks.models.weights import random_model
from benchmarks.output import read
from dit_models.count import count_macs


def test_the_converted_model_is_compared_with_the_published_one_before_it_is_timed():
    model, published = pair(quick=True)
    assert compare(model, published) < 1e-12
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        published.blocks[1].moe.experts[3].up_proj.weight.mul_(1.01)
    with pytest.raises(DifferentOutputs, match="Nothing was timed"):
        compare(model, published)


def test_twins_differ_by_the_routers_alone():
    for each in (*twins(), *twins(quick=True)):
        sparse = each.sparse
        routers = len(sparse.moe_blocks) * sparse.seq_len * sparse.hidden_size * sparse.num_experts
        macs, dense_macs = (
            count_macs(config, config.image_size, config.image_size, attention=True)
            for config in (sparse, each.dense)
        )
        assert macs - dense_macs == routers
        assert each.macs_ratio == macs / dense_macs < 1.003
        assert (sparse.depth, sparse.hidden_size) == (each.dense.depth, each.dense.hidden_size)


def test_random_models_route_and_predict_something():
    pair_of_tiny = twins(quick=True)[-1]
    model = random_model(pair_of_tiny.sparse)
    output = model(torch.randn(2, 1, 16, 16), torch.rand(2), torch.tensor([1, 2]))
    assert 0.05 < output.sample.std() < 50
    assert output.plans[0].num_rows == 2 * 64
    weights = list(random_model(pair_of_tiny.sparse).parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def test_a_quick_run_writes_its_results_and_never_over_others(tmp_path, capsys):
    out = tmp_path / "results"
    words = ["--quick", "--batch", "1", "--models", "tiny", "--out", str(out)]
    assert main(words) == 0
    document, report = read(out), (out / "report.md").read_text()
    printed = capsys.readouterr().out
    (sampled,) = document["sampling"]["results"]
    assert sampled["ratio"] > 0
    assert sampled["difference_of_samples"] < 0.1
    assert sampled["images_per_second"]["ours"] == pytest.approx(
        1 / 250 / sampled["seconds"]["ours"]
    )
    (tiny,) = document["latency"]
    assert tiny["results"][0]["ratio"] > 0
    for line in (*sampling_table(document["sampling"]), *latency_rows(tiny)):
        assert line in printed
        assert line in report
    assert "the times mean nothing" in report
    with pytest.raises(FileExistsError):
        main(words)


def test_both_sides_run_in_bf16(capsys):
    words = ["--quick", "--batch", "1", "--models", "tiny", "--dtype", "bfloat16"]
    assert main(words) == 0
    assert "EC-DiT-tiny, f_c 1, 1 |" in capsys.readouterr().out


def test_unknown_twins_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--models", "XXL"])
    printed = capsys.readouterr()
    assert "matches none of EC-DiT-S/2-8E" in printed.err
    assert not printed.out  # before anything is timed
    with pytest.raises(SystemExit):
        main(["--quick", "--batch", "0"])
    assert "--batch 0; expected at least 1" in capsys.readouterr().err


def test_a_run_of_the_suite_gets_sampling_beside_the_published_loop():
    (sampled,) = results.sampling([1], 0.0, quick=True)
    low, high = sampled["quartiles"]
    assert low <= sampled["ratio"] <= high
    assert sampled["against"] == "published"
    assert sampled["error"] < 1e-12
    for name in ("ours", "published"):
        rate = sampled["images_per_second"][name]
        assert rate == pytest.approx(1 / 250 / sampled["seconds"][name])


def test_a_run_of_the_suite_gets_dense_over_sparse(monkeypatch):
    def latency(pair, batch_sizes, *, seconds, repeats):
        (batch_size,) = batch_sizes
        taken = {"sparse": 0.4 * batch_size, "dense": 0.2 * batch_size}
        return [{"seconds": taken, "ratio": 2.0, "quartiles": [1.6, 2.5], "rounds": 5}]

    monkeypatch.setattr(results, "latency", latency)
    one, two = results.latencies(("S",), (1, 2), 0.0)
    assert one["name"] == two["name"] == "EC-DiT-S/2-8E: one forward"
    assert (two["batch_size"], two["against"]) == (2, "dense")
    assert two["seconds"] == {"ours": 0.8, "dense": 0.4}
    assert two["images_per_second"] == {"ours": 2.5, "dense": 5.0}
    assert (two["ratio"], two["quartiles"]) == (0.5, [0.4, 0.625])
    names = [each["name"] for each in results.latencies(("S", "B"), (1,), 0.0)]
    assert names == ["EC-DiT-S/2-8E: one forward", "EC-DiT-B/2-8E: one forward"]
