"""Which tile sizes a product gets, and the file that keeps measured ones."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_kernels.backends import BACKENDS

if (reason := BACKENDS["triton"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)

from moe_kernels.backends.triton import config_table, configs, tuning_cache
from moe_kernels.backends.triton.config_table import Config
from moe_kernels.backends.triton.launch import Target

H100 = Target("sm_90", 132, descriptors=True)
OWN = Config(64, 256, 32, 4, 5, group_m=3, persistent=True)
KEY = ("rows_gemm", torch.bfloat16, 1152, 4608)


@pytest.fixture(autouse=True)
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("MOE_KERNELS_TUNE", raising=False)
    configs.forget()
    yield "triton"
    configs.forget()


def chosen(rows: int, target: Target = H100) -> Config:
    product, *rest = KEY
    return configs.choose(product, target, *rest, rows)


def find(bucket: str, arch: str = "sm_90") -> Config | None:
    product, *rest = KEY
    return tuning_cache.find(product, arch, *rest, bucket)


def key_of(bucket: str) -> str:
    return tuning_cache.key_of(*KEY, bucket)


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [(0, "few"), (32, "few"), (33, "some"), (256, "some"), (257, "many"), (1 << 30, "many")],
)
def test_rows_of_an_expert_choose_the_bucket(rows, bucket):
    assert configs.bucket_of(rows) == bucket
    assert chosen(rows) == configs.shipped("sm_90", torch.bfloat16)["rows_gemm"][bucket]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", config_table.FAMILIES)
def test_every_architecture_has_every_product_and_bucket(arch, dtype):
    table = configs.shipped(arch, dtype)
    assert set(table) == set(config_table.PRODUCTS)
    for by_bucket in table.values():
        assert list(by_bucket) == list(config_table.BUCKETS)
    if arch != "interpreter":
        narrow = dtype == torch.float32
        family = config_table.FAMILIES[arch]
        assert table is (config_table.FP32 if narrow else config_table.SIXTEEN_BIT)[family]


def test_an_unknown_architecture_gets_the_table_that_asks_for_the_least():
    for dtype in (torch.float32, torch.bfloat16):
        assert configs.shipped("sm_75", dtype) is configs.shipped("sm_80", dtype)
        assert configs.shipped("sm_999", dtype) is configs.shipped("sm_80", dtype)
        assert configs.shipped("gfx1100", dtype) is configs.shipped("gfx942", dtype)


@pytest.mark.parametrize("product", config_table.PRODUCTS)
def test_no_tile_is_wider_than_a_narrow_matrix(product):
    narrow = configs.choose(product, H100, torch.bfloat16, 24, 40, 1000)
    wide = configs.choose(product, H100, torch.bfloat16, 4096, 4096, 1000)
    assert wide == configs.shipped("sm_90", torch.bfloat16)[product]["many"]
    if product == "weight_bwd":
        assert (narrow.block_m, narrow.block_n, narrow.block_k) == (32, 64, wide.block_k)
    else:
        assert (narrow.block_m, narrow.block_n, narrow.block_k) == (wide.block_m, 64, 32)


def test_forced_config_goes_before_all_others_and_ends():
    tuning_cache.store("sm_90", {key_of("many"): OWN})
    other = Config(16, 16, 16, 1, 1)
    with configs.forced(other):
        assert chosen(1000) == other
    assert chosen(1000) == OWN


def test_measured_configs_are_found_again_and_only_for_their_key():
    shipped = chosen(1000)
    path = tuning_cache.store("sm_90", {key_of("many"): OWN})
    assert path == tuning_cache.path_of("sm_90")
    assert path.is_relative_to(os.environ["MOE_KERNELS_CACHE"])
    configs.forget()
    assert find("many") == OWN
    assert chosen(1000) == chosen(100_000) == OWN
    assert find("some") is None
    assert find("many", "sm_80") is None
    assert chosen(1000, Target("sm_80", 108)) != OWN
    assert shipped != OWN


def test_the_interpreter_takes_nothing_from_disk():
    tuning_cache.store("interpreter", {key_of("few"): OWN})
    assert find("few", "interpreter") is None


def test_off_ignores_the_file(monkeypatch):
    tuning_cache.store("sm_90", {key_of("many"): OWN})
    configs.forget()
    monkeypatch.setenv("MOE_KERNELS_TUNE", "off")
    assert not tuning_cache.enabled()
    assert find("many") is None
    assert chosen(1000) == configs.shipped("sm_90", torch.bfloat16)["rows_gemm"]["many"]


@pytest.mark.parametrize("value", ["", "auto"])
def test_tuned_configs_are_used_by_default(value, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_TUNE", value)
    assert tuning_cache.enabled()


@pytest.mark.parametrize("value", ["on", "OFF", "0"])
def test_a_wrong_value_is_refused_with_the_accepted_ones(value, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_TUNE", value)
    with pytest.raises(ValueError, match=f"MOE_KERNELS_TUNE is '{value}'; expected auto or off"):
        chosen(1000)


def test_storing_keeps_the_other_entries():
    first, second = OWN, Config(16, 32, 64, 2, 2)
    tuning_cache.store("sm_90", {key_of("few"): first, key_of("some"): first})
    tuning_cache.store("sm_90", {key_of("some"): second, key_of("many"): second})
    assert tuning_cache.load("sm_90") == {
        key_of("few"): first,
        key_of("some"): second,
        key_of("many"): second,
    }


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_write_that_fails_leaves_the_old_file(step, monkeypatch):
    path = tuning_cache.store("sm_90", {key_of("many"): OWN})
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(tuning_cache.tempfile, "NamedTemporaryFile", fail)
        else:
            patch.setattr(tuning_cache.os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            tuning_cache.store("sm_90", {key_of("few"): OWN})
    assert path.read_bytes() == before
    configs.forget()
    assert find("many") == OWN
    assert find("few") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"rows_gemm": 3}',
        '{"rows_gemm": {"block_m": 16}}',
        json.dumps({"rows_gemm": {**vars(OWN), "block_z": 1}}),
    ],
)
def test_a_file_that_is_not_ours_is_refused_by_its_path(text):
    path = tuning_cache.path_of("sm_90")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for call in (lambda: chosen(1000), lambda: tuning_cache.store("sm_90", {})):
        with pytest.raises(ValueError, match="not a tuning cache") as caught:
            call()
        assert str(path) in str(caught.value)
        assert "MOE_KERNELS_TUNE=off" in str(caught.value)
    assert path.read_text() == text


def test_the_key_has_widths_and_a_bucket_but_no_number_of_tokens(monkeypatch):
    asked = set()

    def load(arch: str) -> dict[str, Config]:
        return Recorder(arch)

    class Recorder(dict[str, Config]):
        def __init__(self, arch: str) -> None:
            super().__init__()
            self.arch = arch

        def get(self, key: str, default: object = None) -> object:
            asked.add((self.arch, key))
            return default

    load.cache_clear = lambda: None
    monkeypatch.setattr(tuning_cache, "load", load)
    for rows in (257, 1000, 1024, 99_999):
        chosen(rows)
        configs._choose.cache_clear()
    assert asked == {("sm_90", "rows_gemm bfloat16 1152 4608 many")}
    assert key_of("many") == "rows_gemm bfloat16 1152 4608 many"


def test_shipped_configs_are_made_of_powers_of_two():
    tables = (config_table.SIXTEEN_BIT, config_table.FP32)
    entries = [
        config
        for table in tables
        for products in table.values()
        for by_bucket in products.values()
        for config in by_bucket.values()
    ]
    for config in entries:
        for size in (config.block_m, config.block_n, config.block_k, config.num_warps):
            assert size & (size - 1) == 0
        assert min(config.block_m, config.block_n, config.block_k) >= 16  # of tl.dot
        assert config.num_stages >= 1
        assert config.group_m >= 1
