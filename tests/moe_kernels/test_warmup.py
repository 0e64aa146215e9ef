"""``warmup``: runs each kind of layer once, leaves the model alone, tunes only when asked to."""

import json

import pytest
import torch

import moe_kernels as mk


def make_model(*routers: mk.TokenChoiceRouter | mk.ExpertChoiceRouter) -> torch.nn.Module:
    return torch.nn.ModuleList(mk.MoE(16, 24, 4, router) for router in routers)


def test_equal_layers_are_run_once_and_others_each():
    def token_choice(**options: bool) -> mk.TokenChoiceRouter:
        return mk.TokenChoiceRouter(16, 4, **options)

    model = make_model(token_choice(), token_choice(), token_choice(selection_bias=True))
    model.append(mk.MoE(16, 24, 4))
    report = mk.warmup(model, [(2, 8)])
    assert report.layers == ["0", "2", "3"]
    assert report.tuned == []
    assert "3 kinds of MoE layer" in str(report)


@pytest.mark.parametrize("backward", [False, True])
def test_the_model_and_the_random_state_stay_as_they_are(backward):
    model = make_model(mk.ExpertChoiceRouter(16, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    seen = []

    def losses(plan):
        seen.append(plan)
        return mk.load_balance_loss(plan, per_sequence=True) + mk.router_z_loss(plan)

    mk.warmup(model, [(1, 8), (2, 8)], backward=backward, losses=losses)
    assert len(seen) == (2 if backward else 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_another_dtype_is_run_by_autocast():
    dtypes = []
    layer = mk.MoE(16, 24, 4)
    layer.experts.register_forward_hook(
        lambda *_: (
            dtypes.append(torch.get_autocast_dtype("cpu"))
            if torch.is_autocast_enabled("cpu")
            else None
        )
    )
    mk.warmup(layer, [(1, 8)], dtype=torch.float16)
    assert dtypes == [torch.float16]


def test_tuning_keeps_what_is_faster(backend, tmp_path, monkeypatch):
    if backend != "triton":
        pytest.skip("only Triton kernels have tile sizes")
    from moe_kernels.backends.triton import config_table, configs, tuning, tuning_cache

    candidates = config_table.CANDIDATES[:2]
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "CANDIDATES", candidates)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    times = iter([1.0, 0.5] * 100)  # of the present config 1.0, of any other 0.5

    def rounds(step, device, choices):
        return [[0.5] if len(choices) == 1 else [next(times)] for _ in choices]

    monkeypatch.setattr(tuning, "_rounds", rounds)
    layer = mk.MoE(16, 24, 4)
    report = mk.warmup(layer, [(1, 8)], tune=True)
    (path,) = (tmp_path / "tuning").iterdir()
    stored = json.loads(path.read_text())
    assert len(report.tuned) == len(stored) > 3
    assert {entry["num_stages"] for entry in stored.values()} == {4}  # as the candidates have
    monkeypatch.setenv("MOE_KERNELS_TUNE", "off")
    assert mk.warmup(layer, [(1, 8)], tune=True).tuned == []
    monkeypatch.delenv("MOE_KERNELS_TUNE")
    configs.forget()
    tuning_cache.load.cache_clear()


def test_a_config_that_does_not_fit_is_passed_over(backend, monkeypatch):
    if backend != "triton":
        pytest.skip("only Triton kernels have tile sizes")
    from triton.runtime.errors import OutOfResources

    from moe_kernels.backends.triton import tuning

    def too_large():
        raise OutOfResources(300_000, 232_448, "shared memory")

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not tuning._compiles(too_large, {})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning._compiles(broken, {})


def test_wrong_calls_say_what_is_expected():
    with pytest.raises(ValueError, match=r"Linear has no moe_kernels\.MoE layer"):
        mk.warmup(torch.nn.Linear(2, 2), [(1, 8)])
    with pytest.raises(ValueError, match=r"shapes holds \(0, 8\)"):
        mk.warmup(mk.MoE(16, 24, 4), [(0, 8)])
    with pytest.raises(ValueError, match="tune=True with backward=False"):
        mk.warmup(mk.MoE(16, 24, 4), [(1, 8)], backward=False, tune=True)
