"""DiT-MoE and DiT checkpoints: the same function, the same bits back, and nothing unaccounted."""

import argparse
import os
import pickle
from dataclasses import replace

import pytest
import torch

from dit_models.convert import Choices, convert, open_source, restore
from dit_models.convert.dit_moe import DIT_MOE
from dit_models.convert.formats import recognise
from dit_models.models import build_model, get_config
from dit_models.pretrained import load_pretrained, read_pretrained
from dit_models.tensor_files import read_sharded

from ...models.published_dit_moe import build
from .sources import (
    DENSE,
    HEADS,
    S_LIKE,
    XL_LIKE,
    assert_same_function,
    record_of,
    same_bits,
    small,
    state_of,
)
from .sparse import write_sparse


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("config", "naming", "objective"),
    [
        (S_LIKE, "timm", "ddpm"),
        (XL_LIKE, "flash", "flow"),
        (replace(S_LIKE, out_channels=4), "timm", "flow"),
        (replace(XL_LIKE, shared_ratio=0.0, qk_norm=False), "flash", "ddpm"),
        (DENSE, "timm", "ddpm"),
    ],
    ids=["S", "XL", "S-flow", "flash-no-shared", "dense"],
)
def test_a_converted_model_is_the_same_function_and_comes_back_bit_for_bit(
    tmp_path, config, naming, objective
):
    published = build(config, naming=naming)
    torch.save({"model": {}, "ema": published.state_dict()}, tmp_path / "source.pt")
    done = convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    assert done.model == config
    assert done.described.train.objective.kind == objective
    assert done.notes[0].endswith("model")
    assert read_pretrained(tmp_path / "ours") == done.described
    ours = load_pretrained(tmp_path / "ours")
    assert_same_function(ours.backbone, published, config)

    restore(tmp_path / "ours", tmp_path / "back.pt")
    back = load(tmp_path / "back.pt")
    assert list(back) == ["ema"]
    same_bits(back["ema"], load(tmp_path / "source.pt")["ema"])


@pytest.mark.parametrize("container", ["ema", "model", "module", None])
def test_containers(tmp_path, container):
    state = state_of(S_LIKE, torch.float16)
    extra = {"opt": {"state": {0: torch.ones(2)}}, "args": argparse.Namespace(lr=1e-4), "steps": 7}
    content = state if container is None else {container: state, **extra}
    torch.save(content, tmp_path / "source.pt")
    done = convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    record = record_of(tmp_path / "ours")
    assert record["container"] == container
    if container:
        assert record["left_out"] == ["opt", "args", "steps"]
        assert "opt, args, steps" in done.notes[0]
    restore(tmp_path / "ours", tmp_path / "back.pt")
    back = load(tmp_path / "back.pt")
    same_bits(back[container] if container else back, state)
    weights = read_sharded(tmp_path / "ours", "model")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_averaged_weights_are_taken_unless_asked(tmp_path):
    averaged, latest = state_of(S_LIKE, seed=1), state_of(S_LIKE, seed=2)
    torch.save({"model": latest, "ema": averaged}, tmp_path / "source.pt")
    for weights, expected in ((None, averaged), ("model", latest)):
        folder = tmp_path / f"ours-{weights}"
        convert(tmp_path / "source.pt", folder, weights=weights, choices=HEADS)
        bias = read_sharded(folder, "model")["blocks.1.attn.qkv.bias"].read()
        assert torch.equal(bias, expected["blocks.1.attn.qkv.bias"])
    with pytest.raises(ValueError, match="expected one of model, ema"):
        convert(tmp_path / "source.pt", tmp_path / "x", weights="opt", choices=HEADS)


@pytest.mark.parametrize("image_size", [32, 64])
def test_256_and_1024_positions(tmp_path, image_size):
    config = replace(XL_LIKE, image_size=image_size)
    state = state_of(config, torch.float16)
    assert state["pos_embed"].shape[1] == (image_size // 2) ** 2
    torch.save(state, tmp_path / "source.pt")
    done = convert(tmp_path / "source.pt", tmp_path / "ours")
    assert done.model.image_size == image_size
    assert not record_of(tmp_path / "ours")["positions"]["kept"]
    restore(tmp_path / "ours", tmp_path / "back.pt")
    same_bits(load(tmp_path / "back.pt"), state)


def test_drifted_positions_are_kept_for_going_back(tmp_path):
    state = state_of(S_LIKE)
    state["pos_embed"] = state["pos_embed"] * (1 + 1e-5)
    torch.save(state, tmp_path / "source.pt")
    done = convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    assert any("source.safetensors" in note for note in done.notes)
    restore(tmp_path / "ours", tmp_path / "back.pt")
    same_bits(load(tmp_path / "back.pt"), state)


def test_other_positions_are_refused(tmp_path):
    state = state_of(S_LIKE)
    side = S_LIKE.image_size // 2
    grid = state["pos_embed"].unflatten(1, (side, side))
    state["pos_embed"] = grid.transpose(1, 2).flatten(1, 2).contiguous()  # rows and columns swapped
    torch.save(state, tmp_path / "source.pt")
    with pytest.raises(ValueError, match="pos_embed differs from DiT's fixed 2-D sin-cos"):
        convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_safetensors_in_and_out(tmp_path):
    from safetensors.torch import load_file, save_file

    state = state_of(XL_LIKE, torch.bfloat16)
    save_file(state, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", tmp_path / "ours")
    restore(tmp_path / "ours", tmp_path / "back.safetensors")
    same_bits(load_file(tmp_path / "back.safetensors"), state)
    # Our own files are ordinary safetensors, for anybody to load.
    model = build_model(XL_LIKE)
    model.load_state_dict(load_file(tmp_path / "ours" / "model.safetensors"))


def test_sharded_files_hold_the_same(tmp_path):
    from safetensors.torch import load_file

    state = state_of(S_LIKE)
    torch.save(state, tmp_path / "source.pt")
    convert(tmp_path / "source.pt", tmp_path / "one", choices=HEADS)
    convert(tmp_path / "source.pt", tmp_path / "many", choices=HEADS, max_shard_bytes=100_000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    whole = load_file(tmp_path / "one" / "model.safetensors")
    same_bits({k: v for shard in shards for k, v in load_file(shard).items()}, whole)
    same_bits(load_pretrained(tmp_path / "many").backbone.state_dict(), whole)
    restore(tmp_path / "many", tmp_path / "back.pt")
    same_bits(load(tmp_path / "back.pt"), state)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1].name}"):
        load_pretrained(tmp_path / "many")


def broken(tmp_path, change, words):
    state = state_of(S_LIKE)
    change(state)
    torch.save({"ema": state}, tmp_path / "source.pt")
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_every_key_is_accounted_for(tmp_path):
    def change(state):
        del state["blocks.1.moe.experts.3.up_proj.weight"], state["t_embedder.mlp.2.bias"]
        state["blocks.0.attn.rope"] = torch.ones(2)

    broken(
        tmp_path,
        change,
        r"2 missing tensors: blocks.1.moe.experts.3.up_proj.weight, t_embedder.mlp.2.bias; "
        r"1 unknown tensor: blocks.0.attn.rope\.",
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("blocks.1.attn.proj.bias", torch.ones(31), r"blocks.1.attn.proj.bias \[31\], expected"),
        ("blocks.1.moe.experts.3.up_proj.weight", torch.ones(128, 32).half(), "different dtypes"),
        ("blocks.1.attn.proj.bias", torch.ones(32).int(), "tensors of torch.int32"),
        ("blocks.1.attn.proj.weight", torch.ones(32, 32).tril().t(), "is not contiguous"),
        ("note", "trained long", "entry 'note' is a str, not a tensor"),
    ],
)
def test_wrong_tensors(tmp_path, name, value, words):
    broken(tmp_path, lambda state: state.update({name: value}), words)


def test_a_structure_that_is_not_known(tmp_path):
    torch.save({"ema": {"layers.0.weight": torch.ones(2)}}, tmp_path / "source.pt")
    with pytest.raises(ValueError, match=r"no known format .*layers\.0\.weight"):
        convert(tmp_path / "source.pt", tmp_path / "ours")


def test_heads_of_an_unpublished_size_must_be_given(tmp_path):
    torch.save(state_of(S_LIKE), tmp_path / "source.pt")
    with pytest.raises(ValueError, match="give --num-heads"):
        convert(tmp_path / "source.pt", tmp_path / "ours")
    torch.save(state_of(XL_LIKE), tmp_path / "normed.pt")
    with pytest.raises(ValueError, match="the query norm of a DiT-MoE checkpoint says 4"):
        convert(tmp_path / "normed.pt", tmp_path / "ours", choices=Choices(num_heads=8))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


def test_no_code_of_a_file_runs(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"ema": state_of(S_LIKE), "args": Malicious(str(trap))}, tmp_path / "source.pt")
    with pytest.raises(ValueError, match="could run code"):
        convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    assert not trap.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(str(trap))))
    with pytest.raises(ValueError, match=r"plain\.pt"):
        convert(tmp_path / "plain.pt", tmp_path / "ours")
    assert not trap.exists()
    torch.save({"ema": {}, "args": os.system}, tmp_path / "blocked.pt")
    with pytest.raises(ValueError, match=r"unsupported GLOBAL .*\.system") as refused:
        convert(tmp_path / "blocked.pt", tmp_path / "ours")
    assert "will likely succeed" not in str(refused.value)


def test_files_that_cannot_be_read(tmp_path):
    state = state_of(S_LIKE)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save([1], tmp_path / "list.pt")
    torch.save(state, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("old.pt", "before torch 1.6"),
        ("list.pt", "holds a list"),
        ("cut.pt", "damaged"),
        ("noise.safetensors", "no safetensors file"),
        ("empty", "no folder of diffusers weights"),
        ("missing.pt", "does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / name, tmp_path / "ours", choices=HEADS)
    assert not (tmp_path / "ours").exists()


def test_nothing_is_overwritten(tmp_path):
    torch.save(state_of(S_LIKE), tmp_path / "source.pt")
    convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    with pytest.raises(ValueError, match=r"ours exists; choose another name"):
        convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    source = (tmp_path / "source.pt").read_bytes()
    with pytest.raises(ValueError, match=r"source\.pt exists; choose another name"):
        restore(tmp_path / "ours", tmp_path / "source.pt")
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before
    assert (tmp_path / "source.pt").read_bytes() == source


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    torch.save(state_of(S_LIKE), tmp_path / "source.pt")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("dit_models.convert.forward.model_card", fail)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


@pytest.mark.parametrize(
    ("preset", "half_bytes"),
    [("DiT-MoE-S/2-8E2A", 0.40e9), ("DiT-MoE-XL/2-8E2A", 8.34e9)],
    ids=["S", "XL"],
)
def test_the_released_structures_are_their_presets(tmp_path, preset, half_bytes):
    write_sparse(tmp_path / "released.pt", get_config(preset))
    source = open_source(tmp_path / "released.pt")
    found = recognise(source.tensors, "")
    model, variant = found.describe(source.tensors, {}, Choices())
    assert model == get_config(preset)
    assert variant == {"attention": "flash" if "XL" in preset else "timm"}
    total = sum(tensor.num_bytes for tensor in source.tensors.values())
    assert abs(total / half_bytes - 1) < 0.01


def test_models_that_were_trained_here_take_the_published_names_too(tmp_path):
    """And DiT-MoE's balance, routing and swap helpers for the published class can read them."""
    config = small("DiT-MoE-XL/2-8E2A", hidden_size=48)
    torch.save(state_of(config), tmp_path / "source.pt")
    convert(tmp_path / "source.pt", tmp_path / "ours")
    (tmp_path / "ours" / "conversion.json").unlink()
    with pytest.raises(ValueError, match="say which with --to"):
        restore(tmp_path / "ours", tmp_path / "back.pt")
    restore(tmp_path / "ours", tmp_path / "back.pt", to="dit-moe")
    same_bits(load(tmp_path / "back.pt"), load(tmp_path / "source.pt"))
    with pytest.raises(ValueError, match="cannot be written as a DiT checkpoint: family='dit_moe'"):
        restore(tmp_path / "ours", tmp_path / "other.pt", to="dit")


@pytest.mark.parametrize(
    ("field", "value"),
    [("time_scale", 1000.0), ("qk_norm_kind", "rms_norm"), ("routing", "loss_free"),
     ("routing_scale", 2.5), ("normalize", "per_token"), ("positions", "rope")],
)  # fmt: skip
def test_what_published_code_would_compute_otherwise_is_not_written(tmp_path, field, value):
    config = small("DiT-MoE-XL/2-8E2A", hidden_size=48)
    with pytest.raises(ValueError, match=f"cannot be written as .*{field}="):
        DIT_MOE.default_variant(replace(config, **{field: value}))
