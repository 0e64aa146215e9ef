"""Safetensors files: read by the library, written for it, and refused when damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_models.tensor_files import (
    entry_of,
    read_header,
    read_sharded,
    write_safetensors,
    write_sharded,
)

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "wide": torch.randn(3, 2, dtype=torch.float64),
    "half": torch.randn(3).half(),
    "brain": torch.randn(2, 3).bfloat16(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5),
    "mask": torch.tensor([True, False, True]),
    "turned": torch.randn(4, 3).t(),
}


def same(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


def test_the_library_reads_what_we_write_and_the_reverse(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, {name: entry_of(value) for name, value in TENSORS.items()})
    same(load_file(ours), TENSORS)
    save_file({name: value.contiguous() for name, value in TENSORS.items()}, theirs)
    same({name: stored.read() for name, stored in read_header(theirs).items()}, TENSORS)
    copied = tmp_path / "copied.safetensors"
    write_safetensors(copied, {n: entry_of(stored) for n, stored in read_header(ours).items()})
    same(load_file(copied), TENSORS)
    # Each tensor starts where its elements may be read from a mapped file.
    for name, stored in read_header(ours).items():
        assert stored.start % stored.dtype.itemsize == 0, name


def test_damaged_files(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": entry_of(torch.arange(100))})
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    for data, words in (
        (good[:-1], "tensor a of 800 bytes has the byte range 0-800"),
        (good[:4], "no safetensors file"),
        (b"\xff" * 8 + good[8:], "no safetensors file"),
        (good[:8] + b"[" + good[9:], "damaged safetensors header"),
        (with_header(good, header | {"b": {"dtype": "F32"}}), "damaged safetensors header"),
        (with_header(good, {"a": {**header["a"], "shape": [99]}}), "tensor a of 792 bytes"),
        (with_header(good, {"a": {**header["a"], "data_offsets": [8, 808]}}), "in a file of"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read_header(path)


def with_header(good: bytes, header) -> bytes:
    length = int.from_bytes(good[:8], "little")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


def test_an_index_names_every_tensor_and_only_files_beside_it(tmp_path):
    entries = {name: entry_of(torch.randn(10)) for name in "abcdef"}
    files = write_sharded(tmp_path, "model", entries, max_shard_bytes=80)
    assert files[0] == "model-00001-of-00003.safetensors"
    assert list(read_sharded(tmp_path, "model")) == list("abcdef")
    index = tmp_path / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    assert written["metadata"]["total_size"] == 6 * 40
    for change, words in (
        ({"g": files[0]}, "1 missing tensor: g"),
        ({"a": "../secret.safetensors"}, "files outside its folder"),
        ({"a": "model-00009-of-00003.safetensors"}, "lacks model-00009"),
        ({"a": 3}, "is damaged"),
    ):
        index.write_text(json.dumps({"weight_map": written["weight_map"] | change}))
        with pytest.raises(ValueError, match=words):
            read_sharded(tmp_path, "model")
    with pytest.raises(ValueError, match=r"has neither other\.safetensors nor"):
        read_sharded(tmp_path, "other")
