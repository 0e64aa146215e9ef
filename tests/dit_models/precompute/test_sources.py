"""Sources of precompute: our readers read what the libraries read, and errors name the place."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from dit_models.data import Sample
from dit_models.precompute.settings import Settings
from dit_models.precompute.sources import open_source


def png(value: int, size: tuple[int, int] = (6, 4)) -> bytes:
    stream = io.BytesIO()
    rng = np.random.default_rng(value)
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def pixels(data: bytes) -> torch.Tensor:
    """The centre square of 4, unresized."""
    image = np.asarray(Image.open(io.BytesIO(data)), np.float32)[1:5]
    return torch.from_numpy(image.transpose(2, 0, 1) / 127.5 - 1)


def samples_of(source: str, **options: object) -> list[Sample]:
    settings = Settings(source, out=None, image_size=4, **options)  # type: ignore[arg-type]
    dataset = open_source(settings).dataset
    return [dataset.sample(i, np.random.default_rng(0)) for i in range(len(dataset))]


@pytest.fixture
def shards(tmp_path):
    """Two tars made by the webdataset library, with odd names."""
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"part-{number:04d}.tar")) as out:
            for k in range(3):
                out.write({
                    "__key__": f"folder.v1/{number}_{k}",
                    "png": png(10 * number + k),
                    "cls": str(k),
                    "txt": f"caption {number} {k}\n",
                    "seg.PNG": png(99),  # another image under a longer ending
                })  # fmt: skip
            out.write({"__key__": "no-image", "txt": "nothing"})
    return tmp_path


def test_tars_hold_what_the_webdataset_library_reads(shards):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    library = [s for s in webdataset.WebDataset(urls, shardshuffle=False) if "png" in s]
    got = samples_of(str(shards))
    assert len(got) == len(library) == 6
    for ours, theirs in zip(got, library, strict=True):
        assert torch.equal(ours.image, pixels(theirs["png"]))
        assert ours.label == int(theirs["cls"])
    captions = samples_of(str(shards), conditions="captions")
    assert [s.caption for s in captions] == [s["txt"].decode().strip() for s in library]
    assert {s.label for s in captions} == {-1}


def test_patterns_of_tars_and_their_fingerprint(shards):
    first = samples_of(str(shards / "part-0000.tar"))
    assert len(first) == 3
    for pattern in ("part-{0000..0001}.tar", "part-*.tar"):
        assert len(samples_of(str(shards / pattern))) == 6
    with pytest.raises(ValueError, match=r"no such tar file: .*part-0002.tar"):
        samples_of(str(shards / "part-{0000..0002}.tar"))

    def fingerprint() -> str:
        return open_source(Settings(str(shards), out=None, image_size=4)).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    with webdataset.TarWriter(str(shards / "part-0001.tar")) as out:
        out.write({"__key__": "a", "png": png(1), "cls": "0"})
    assert fingerprint() != before


def test_json_members(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as out:
        for k in range(2):
            out.write({"__key__": str(k), "jpg": _jpeg(),
                       "json": json.dumps({"caption": f"c{k}", "width": 3}).encode()})  # fmt: skip
    assert [s.caption for s in samples_of(str(tmp_path))] == ["c0", "c1"]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as out:
        out.write({"__key__": "0", "jpg": _jpeg(), "json": json.dumps({"label": 7}).encode()})
    assert samples_of(str(tmp_path))[0].label == 7


def _jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 5), (200, 10, 10)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"txt": b"a"}, "hold no images"),
        ({"png": png(1)}, "a.tar: x has neither class .cls. nor caption"),
        ({"png": png(1), "cls": b"cat"}, "a.tar: x: the class 'cat' is no number"),
        ({"png": png(1), "cls": b"-1"}, "a.tar: x has class -1"),
        (
            {"png": b"no image", "cls": b"0"},
            "cannot decode the image .*a.tar: x: its format is not known",
        ),
        ({"png": png(1), "json": b"{"}, "a.tar: x: cannot read json"),
        ({"png": png(1), "json": b'{"label": 1.7}'}, "a.tar: x: the class 1.7 is no number"),
        ({"png": png(1), "json": b'{"text": ["a"]}'}, r"a.tar: x: the caption is \['a'\]"),
    ],
)
def test_bad_samples_are_named(tmp_path, members, message):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for ending, data in members.items():
            info = tarfile.TarInfo(f"x.{ending}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=message):
        samples_of(str(tmp_path))


def test_a_compressed_or_cut_tar_is_refused(shards):
    first = shards / "part-0000.tar"
    data = first.read_bytes()
    first.write_bytes(data[:700])
    with pytest.raises(ValueError, match="is not an uncompressed tar file, or is cut off"):
        samples_of(str(shards))
    with tarfile.open(first, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x.png"))
    with pytest.raises(ValueError, match="is not an uncompressed tar file"):
        samples_of(str(shards))


def test_a_folder_without_tars(tmp_path):
    with pytest.raises(ValueError, match="holds no tar files"):
        samples_of(str(tmp_path), kind="webdataset")


# --- Hugging Face


def table(labels: bool = True, captions: bool = False) -> datasets.Dataset:
    columns: dict = {"picture": [{"bytes": png(k), "path": None} for k in range(3)]}
    features: dict = {"picture": datasets.Image()}
    if labels:
        columns["kind"] = [1, 0, 1]
        features["kind"] = datasets.ClassLabel(names=["cat", "dog", "owl"])
    if captions:
        columns["text"] = ["a cat", "a dog", "an owl"]
        features["text"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_a_saved_data_set_with_classes(tmp_path):
    table().save_to_disk(str(tmp_path / "saved"))
    got = samples_of(str(tmp_path / "saved"))
    assert [s.label for s in got] == [1, 0, 1]
    for k, sample in enumerate(got):
        assert torch.equal(sample.image, pixels(png(k)))
    source = open_source(Settings(str(tmp_path / "saved"), out=None, image_size=4))
    assert source.class_names == ["cat", "dog", "owl"]
    assert source.dataset.info.num_classes == 3


def test_parquet_with_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table(labels=False, captions=True).to_parquet(str(tmp_path / "train.parquet"))
    for source in (tmp_path, tmp_path / "train.parquet"):
        got = samples_of(str(source))
        assert [s.caption for s in got] == ["a cat", "a dog", "an owl"]
        assert torch.equal(got[2].image, pixels(png(2)))


def test_splits_and_columns_are_chosen_or_asked_for(tmp_path):
    both = datasets.DatasetDict(
        {"train": table(captions=True), "test": table(captions=True).select([0])}
    )
    both.save_to_disk(str(tmp_path))
    assert len(samples_of(str(tmp_path))) == 3
    assert len(samples_of(str(tmp_path), split="test")) == 1
    with pytest.raises(ValueError, match="has the splits train, test; asked for validation"):
        samples_of(str(tmp_path), split="validation")
    assert samples_of(str(tmp_path), conditions="captions")[0].caption == "a cat"
    assert samples_of(str(tmp_path), caption_column="text")[0].caption == "a cat"
    with pytest.raises(ValueError, match="--label-column age: the columns are"):
        samples_of(str(tmp_path), label_column="age")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", ["a", "b", "a"], "column label .* 3 rows whose class is no number .* is 'a'"),
        ("label", [0, None, 1], "column label .* 1 rows .* the first is None"),
        ("label", [0, 1, -1], "column label .* 1 rows .* the first is -1"),
        ("text", [["one", "two"]] * 3, r"row 0: the caption is \['one', 'two'\]"),
    ],
)
def test_conditions_of_another_kind_are_refused(tmp_path, column, values, message):
    table(labels=False).add_column(column, values).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        samples_of(str(tmp_path))


def test_another_column_is_another_source(tmp_path):
    both = table(labels=False, captions=True).add_column("other", ["x", "y", "z"])
    both.save_to_disk(str(tmp_path))
    prints = {
        open_source(Settings(str(tmp_path), out=None, image_size=4, caption_column=c)).fingerprint
        for c in ("text", "text", "other")
    }
    assert len(prints) == 2


def test_a_split_where_there_is_none(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table().to_parquet(str(tmp_path / "test.parquet"))
    for source in (shards, tmp_path / "test.parquet"):
        with pytest.raises(ValueError, match="--split test has no effect on"):
            samples_of(str(source), split="test")


def test_a_data_set_without_images_or_conditions(tmp_path):
    table(labels=False).save_to_disk(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="no class or caption column that is known"):
        samples_of(str(tmp_path / "a"))
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"no column of .* holds images"):
        samples_of(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digits", {"flip": True}, "would contradict labels"),
        ("digits", {"conditions": "captions"}, "--conditions has no effect"),
        ("digits", {"label_column": "x"}, "--label-column has no effect"),
        ("/none", {}, "neither a built-in data set"),
    ],
)
def test_options_that_do_not_fit_are_refused(source, options, message):
    size = {"image_size": 16}
    with pytest.raises(ValueError, match=message):
        open_source(Settings(source, out=None, **size, **options))
