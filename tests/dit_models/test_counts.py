"""Parameter and multiply-accumulate counts against the papers' tables, on the meta device."""

import dataclasses

import pytest

from dit_models.count import count_macs, count_model
from dit_models.model_config import ModelConfig
from dit_models.models import build_model, count_preset, get_config, main, table
from dit_models.presets import PRESETS

# total M, activated M, published GMACs, GMACs with attention products (arXiv 2407.11633)
DIT_MOE_TABLE = {
    "DiT-MoE-S/2-8E2A": ("199.31", "71.91", "15.43", "16.03"),
    "DiT-MoE-S/2-16E2A": ("369.21", "71.94", "15.44", "16.04"),
    "DiT-MoE-B/2-8E2A": ("795.86", "286.25", "61.68", "62.89"),
    "DiT-MoE-L/2-8E2A": ("2823.8", "1011.8", "219.26", "222.48"),
    "DiT-MoE-XL/2-8E2A": ("4168.2", "1492.7", "323.74", "327.97"),
    "DiT-MoE-G/2-16E2A": ("16503.7", "3181.6", "690.94", "698.33"),
}


def _printed(value: int, unit: float, like: str) -> str:
    return f"{value / unit:.{len(like.split('.')[1])}f}"


@pytest.mark.parametrize("name", DIT_MOE_TABLE)
def test_dit_moe_matches_the_published_table_to_the_printed_digit(name: str) -> None:
    total, activated, macs, with_attention = DIT_MOE_TABLE[name]
    count = count_preset(name)
    assert _printed(count.total, 1e6, total) == total
    assert _printed(count.activated, 1e6, activated) == activated
    assert _printed(count.macs, 1e9, macs) == macs
    assert _printed(count.macs_with_attention, 1e9, with_attention) == with_attention


@pytest.mark.parametrize(
    ("size", "num_experts", "billions"),
    [("XL", 32, 4.608), ("XXL", 32, 11.117), ("3XL", 32, 27.646)],
)
def test_expert_choice_adds_exactly_the_experts_and_the_router(
    size: str, num_experts: int, billions: float
) -> None:
    sparse = get_config(f"EC-DiT-{size}-{num_experts}E")
    increment = count_preset(sparse).total - count_preset(f"EC-DiT-{size}-dense").total
    layers, width = sparse.depth // 2, sparse.hidden_size
    experts = (num_experts - 1) * layers * 8 * width**2
    assert increment == experts + layers * width * num_experts
    assert round(experts / 1e9, 3) == billions


def test_the_experts_of_the_largest_model_hold_91_80_billion() -> None:
    model = build_model("EC-DiT-M-64E", device="meta")
    held = [
        parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name
    ]
    assert sum(held) == 64 * 19 * 8 * 3072**2
    assert round(sum(held) / 1e9, 2) == 91.80


def test_class_conditional_expert_choice_L_has_1163_0_million_trainable_parameters() -> None:
    count = count_preset("EC-DiT-L/2-8E")
    assert _printed(count.trainable, 1e6, "1163.0") == "1163.0"


@pytest.mark.parametrize(
    ("size", "millions"), [("S", "33.0"), ("B", "130.5"), ("L", "458.1"), ("XL", "675.1")]
)
def test_dense_sizes_are_those_of_dit_with_a_learned_variance(size: str, millions: str) -> None:
    config = dataclasses.replace(get_config(f"DiT-{size}/2"), out_channels=8)
    assert _printed(count_preset(config).total, 1e6, millions) == millions


def test_activated_equals_the_dense_model_plus_the_extra_experts() -> None:
    dense, sparse = count_preset("EC-DiT-3XL-dense"), count_preset("EC-DiT-3XL-32E")
    one_expert = 8 * 2304**2
    # f_c = 2 experts of a token instead of one FFN, and 21 routers
    assert sparse.activated - dense.activated == 21 * (one_expert + 2304 * 32)
    assert dense.activated == dense.total


@pytest.mark.parametrize("name", PRESETS)
def test_counts_of_every_preset_are_consistent(name: str) -> None:
    count = count_preset(name)
    config = PRESETS[name]
    assert count.total == count.trainable + count.frozen
    assert count.frozen == config.seq_len * config.hidden_size
    assert (count.activated < count.total) == (config.num_experts > 0)
    assert count.macs_with_attention > count.macs > 0
    assert (count.fp32_bytes, count.bf16_bytes) == (4 * count.total, 2 * count.total)
    assert count.training_bytes == 16 * count.trainable


def test_macs_of_a_dense_model_are_its_weights_times_the_tokens_they_see() -> None:
    # Independent of the formula: each weight matrix of the built model times its token count.
    model = build_model("DiT-tiny", device="meta")
    config = model.config
    expected = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embedding_table" not in name:
            once_an_image = "adaLN" in name or name.startswith("t_embedder")
            expected += parameter.numel() * (1 if once_an_image else config.seq_len)
    assert count_model(model).macs == expected
    attention = config.depth * 2 * config.seq_len**2 * config.hidden_size
    assert count_model(model).macs_with_attention == expected + attention


def test_macs_of_a_text_model_count_each_matrix_where_it_is_used() -> None:
    model = build_model("EC-DiT-tiny-text", device="meta")
    config, text_len = model.config, 9
    expected = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if "adaLN" in name or name.startswith(("t_embedder", "text_embedder")):
            uses = 1
        elif "kv_proj" in name:
            uses = text_len
        elif ".experts." in name:
            # every expert takes S f_c / E tokens
            uses = config.seq_len * 2 // config.num_experts
        else:
            uses = config.seq_len
        expected += parameter.numel() * uses
    assert count_macs(config, 32, 32, text_len=text_len) == expected


def test_macs_of_a_small_expert_choice_group_use_the_rounded_capacity() -> None:
    config = get_config("EC-DiT-tiny")
    # 4 tokens, 8 experts, f_c 2: one token an expert, so 8 rows a layer
    rows_of_experts = 8
    width = config.hidden_size
    full = count_macs(config, 4, 4)
    without = count_macs(dataclasses.replace(config, num_experts=16), 4, 4)
    moe_layers = len(config.moe_blocks)
    # 16 experts take 1 each, too: twice the rows and twice the router
    difference = moe_layers * (rows_of_experts * 8 * width**2 + 4 * width * 8)
    assert without - full == difference


def test_table_lists_each_preset_and_the_filter_narrows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--filter", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [n for n in PRESETS if "tiny" in n]
    assert "199.31" in table(["DiT-MoE-S/2-8E2A"])
    with pytest.raises(SystemExit):
        main(["--filter", "no such model"])


def test_an_unknown_preset_names_close_ones() -> None:
    with pytest.raises(ValueError, match="DiT-MoE-XL/2-8E2A"):
        build_model("dit-moe-xl/2")


def test_count_of_a_config_does_not_need_a_name() -> None:
    assert isinstance(PRESETS["DiT-tiny"], ModelConfig)
    assert count_preset(PRESETS["DiT-tiny"]) == count_preset("DiT-tiny")
