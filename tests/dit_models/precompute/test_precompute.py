"""Precompute: what is stored is what was encoded, a killed run goes on, damage is found."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_models.data import LatentDataset, build_dataset
from dit_models.precompute import run
from dit_models.precompute.__main__ import main
from dit_models.precompute.run import precompute
from dit_models.text import FrozenEncoder, describe_encoder
from dit_models.vae import VAE

from ..tiny_models import save_t5, save_vae
from .helpers import captioned, classes, contents, settings


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"t5": save_t5(root / "t5"), "vae": save_vae(root / "vae")}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_pixels_labels_and_order_survive(tmp_path):
    source = build_dataset("digits", split="heldout")
    manifest = precompute(settings("digits", tmp_path / "out", split="heldout", shard_size=250))
    data = build_dataset(str(tmp_path / "out"))
    assert isinstance(data, LatentDataset)
    assert len(data) == len(source) == manifest["samples"] == 896
    assert [shard["count"] for shard in manifest["shards"]] == [250, 250, 250, 146]
    assert (data.info.channels, data.info.image_size, data.info.num_classes) == (1, 16, 10)
    for index in (0, 249, 250, 777, 895):
        ours, theirs = data.sample(index, rng()), source.sample(index, rng())
        assert torch.equal(ours.image, theirs.image)
        assert (ours.label, ours.caption, ours.text) == (theirs.label, "", None)
    with pytest.raises(IndexError):
        data.sample(896, rng())


def test_latents_flips_captions_and_text_are_those_of_the_encoders(tmp_path, models):
    folder = captioned(tmp_path / "images")
    precompute(
        settings(
            folder, tmp_path / "out", image_size=16, vae=str(models["vae"]), flip=True,
            text=str(models["t5"]), text_length=8,
        )
    )  # fmt: skip
    data = LatentDataset(tmp_path / "out")
    flipped = LatentDataset(tmp_path / "out", flip=True)
    source = build_dataset(str(folder), image_size=16)
    vae = VAE(str(models["vae"]))
    encoder = FrozenEncoder(describe_encoder(str(models["t5"]), max_length=8))
    assert (data.info.channels, data.info.image_size) == (4, 8)
    for index in range(len(source)):
        original = source.sample(index, rng())
        for mirrored in (False, True):
            image = original.image[None].flip(-1) if mirrored else original.image[None]
            mean, std = vae.encode(image)
            if not mirrored:
                noise = rng(index).standard_normal(mean.shape[1:], dtype=np.float32)
                sample = data.sample(index, rng(index))
            else:
                draw = next(s for s in range(99) if rng(s).random() < 0.5)
                sample = flipped.sample(index, rng(draw))
                stream = rng(draw)
                stream.random()
                noise = stream.standard_normal(mean.shape[1:], dtype=np.float32)
            expected = mean[0] + std[0] * torch.from_numpy(noise)
            torch.testing.assert_close(sample.image, expected, rtol=0, atol=1e-5)
            assert sample.caption == original.caption
            text = encoder.encode([original.caption])[0]
            torch.testing.assert_close(sample.text, text, rtol=0, atol=1e-6)
    assert torch.equal(data.null_text, encoder.encode([""])[0])
    assert data.longest_caption == "one two three four"


@pytest.mark.parametrize("kind", ["mean", "sample"])
def test_other_kinds_of_latents(tmp_path, models, kind):
    folder = classes(tmp_path / "images", 6)
    options = {"image_size": 16, "vae": str(models["vae"]), "latents": kind}
    precompute(settings(folder, tmp_path / "out", **options))
    data, source = LatentDataset(tmp_path / "out"), build_dataset(str(folder), image_size=16)
    mean, std = VAE(str(models["vae"])).encode(
        torch.stack([source.sample(index, rng()).image for index in range(6)])
    )
    got = torch.stack([data.sample(index, rng(index)).image for index in range(6)])
    again = torch.stack([data.sample(index, rng(9)).image for index in range(6)])
    assert torch.equal(got, again)  # nothing about them is random any more
    if kind == "mean":
        torch.testing.assert_close(got, mean, rtol=0, atol=1e-5)
    else:
        noise = (got - mean) / std
        assert 0.9 < float(noise.std()) < 1.1
        assert abs(float(noise.mean())) < 0.1
    assert [data.sample(index, rng()).label for index in range(6)] == [0, 0, 0, 1, 1, 1]


def test_stored_dtypes(tmp_path):
    for dtype, relative in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        out = tmp_path / dtype
        precompute(settings("digits", out, dtype=dtype, shard_size=1000))
        got = LatentDataset(out).sample(5, rng()).image
        expected = build_dataset("digits").sample(5, rng()).image
        assert got.dtype == torch.float32
        assert ((got - expected).abs() <= relative * expected.abs()).all()
    with pytest.raises(ValueError, match="is not finite as float16; store bf16"):
        run.Encoder(
            settings("digits", out, dtype="fp16"), None, None, None, torch.device("cpu")
        )._checked("images", torch.tensor([1e6]), range(1))


def test_a_run_that_breaks_goes_on_to_the_same_bytes(tmp_path, models, monkeypatch):
    folder = captioned(tmp_path / "images")
    options = {"image_size": 16, "vae": str(models["vae"]), "text": str(models["t5"]),
               "text_length": 8, "flip": True, "latents": "sample"}  # fmt: skip
    precompute(settings(folder, tmp_path / "whole", **options))
    whole = contents(tmp_path / "whole")
    assert set(whole) == {"latents.json", "null_text.safetensors",
                          *(f"shard_{k:06d}.safetensors" for k in range(3))}  # fmt: skip
    asked = settings(folder, tmp_path / "broken", **options)
    made: list[str] = []
    write, replace = run.write_shard, os.replace

    def counted(out, name, *rest):
        made.append(name)
        write(out, name, *rest)

    def dies(source, target):
        if Path(target).name == "shard_000001.safetensors" and len(made) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(run, "write_shard", counted)
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        precompute(asked)
    with pytest.raises(ValueError, match="is not finished; run its precompute command again"):
        LatentDataset(tmp_path / "broken")
    precompute(asked)
    assert made == ["null_text.safetensors", "shard_000000.safetensors",
                    "shard_000001.safetensors", "shard_000001.safetensors",
                    "shard_000002.safetensors"]  # fmt: skip
    assert contents(tmp_path / "broken") == whole
    (tmp_path / "broken" / "null_text.safetensors").unlink()
    precompute(asked)
    assert contents(tmp_path / "broken") == whole


@pytest.fixture
def forked(monkeypatch):
    """Processes that need no second of imports each; the killed command has real ones."""
    get_context = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: get_context("fork"))


def test_killed_with_two_processes_it_goes_on_to_the_same_bytes(tmp_path, capsys, forked):
    out = tmp_path / "killed"
    asked = settings("digits", out, shard_size=8, processes=2)
    words = ["digits", str(out), "--shard-size", "8", "--batch-size", "3", "--dtype", "fp32",
             "--device", "cpu", "--processes", "2"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "dit_models.precompute", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(list(out.glob("shard_*"))) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    # The parent alone: its two children have to notice by themselves.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = len(list(out.glob("shard_*")))
    assert left < 113
    with pytest.raises(ValueError, match="is not finished"):
        build_dataset(str(out))
    precompute(asked)
    assert "shards are done" in capsys.readouterr().out
    precompute(settings("digits", tmp_path / "whole", shard_size=8))
    assert contents(out) == contents(tmp_path / "whole")
    assert ended(process.pid)  # nobody of the killed command is left


def ended(group: int, seconds: float = 60) -> bool:
    """Whether every process of a group ends; on a busy machine they take a while to notice."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_process_ends_with_its_parent(monkeypatch):
    monkeypatch.setattr(run, "_make_shards", lambda plan, shards, number, progress: progress(1))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    done = multiprocessing.Value("q", 0)
    threads = torch.get_num_threads()
    run._process(None, [], 0, threads, done, None, os.getppid())
    assert (done.value, ended) == (1, [])
    run._process(None, [], 0, threads, done, None, os.getppid() + 1)
    assert ended == [1]


def test_what_a_process_says_reaches_the_command_line(tmp_path, capsys, forked):
    folder = classes(tmp_path / "images", 6)
    (folder / "dogs" / "3.png").write_bytes(b"broken")
    words = [str(folder), str(tmp_path / "out"), "--image-size", "8", "--shard-size", "2",
             "--device", "cpu", "--processes", "2"]  # fmt: skip
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert "cannot decode the image" in error
    assert "3.png" in error
    assert "--skip-broken" in error
    assert "Traceback" not in error


def test_a_finished_folder_is_left_alone(tmp_path, capsys):
    asked = settings("digits", tmp_path, shard_size=500)
    precompute(asked)
    before = contents(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard_*")}
    precompute(asked)
    assert "is complete; nothing is encoded again" in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard_*")} == times


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_another_source_are_refused(tmp_path, models, monkeypatch, finished):
    folder = classes(tmp_path / "images")
    out = tmp_path / "out"
    asked = settings(folder, out, image_size=8)
    if not finished:
        monkeypatch.setattr(run, "finish", lambda *_: None)
    precompute_quietly(asked, finished)
    before = contents(out)
    for options, message in (
        ({"image_size": 4}, "image_size: 8 before, 4 now"),
        ({"image_size": 8, "shard_size": 5}, "shard_size: 4 before, 5 now"),
        ({"image_size": 8, "vae": str(models["vae"])}, "latents: 'pixels' before, 'moments' now"),
        ({"image_size": 8, "flip": True}, "flip: False before, True now"),
    ):
        with pytest.raises(ValueError, match=message):
            precompute(settings(folder, out, **options))
    (folder / "dogs" / "new.png").write_bytes((folder / "dogs" / "1.png").read_bytes())
    with pytest.raises(ValueError, match="samples: 10 before, 11 now; source: "):
        precompute(asked)
    assert contents(out) == before


def precompute_quietly(asked, finished: bool) -> None:
    if finished:
        precompute(asked)
    else:
        with pytest.raises(ValueError, match="is not finished"):
            precompute(asked)


def test_a_folder_of_latents_is_no_source(tmp_path):
    precompute(settings(classes(tmp_path / "photos"), tmp_path / "out", image_size=8))
    with pytest.raises(ValueError, match="is precomputed already"):
        precompute(settings(tmp_path / "out", tmp_path / "again"))


def test_what_a_killed_command_leaves_is_removed(tmp_path):
    source = classes(tmp_path / "photos")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").touch()
    (out / ".unfinished.json.7.7.tmp").write_text("{")  # killed before anything was whole
    precompute(settings(source, out, image_size=8))
    expected = contents(out)
    assert not list(out.glob(".*.tmp"))
    (out / "..note_shard_000001.json.7.7.tmp").write_text("{")
    (out / ".null_text.safetensors.7.tmp").write_text("{")
    (out / "shard_000001.safetensors").unlink()
    precompute(settings(source, out, image_size=8))
    assert contents(out) == expected


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no precomputed shards"):
        precompute(settings("digits", tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_damage_is_found_and_mended(tmp_path, capsys):
    out = tmp_path / "out"
    asked = settings("digits", out, shard_size=300)
    precompute(asked)
    before = contents(out)
    assert command("--verify", str(out)) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    bad = out / "shard_000001.safetensors"
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    assert command("--verify", str(out)) == 1
    assert f"{bad} has another SHA-256" in capsys.readouterr().out
    bad.unlink()
    with pytest.raises(ValueError, match=r"shard_000001.safetensors is missing"):
        LatentDataset(out)
    precompute(asked)
    assert contents(out) == before
    bad.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"has .* bytes, not"):
        LatentDataset(out)
    assert command("--verify", str(out)) == 1
    assert command("--verify", str(tmp_path)) == 2  # no such folder of latents
    assert command(str(out), "--verify", str(out)) == 2


def test_broken_samples_are_left_out_on_request(tmp_path, capsys):
    folder = captioned(tmp_path / "images", 5)
    (folder / "2.png").write_bytes(b"broken")
    words = [str(folder), str(tmp_path / "out"), "--image-size", "8", "--device", "cpu",
             "--shard-size", "2"]  # fmt: skip
    assert command(*words) == 2
    assert "2.png" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert command(*words, "--skip-broken") == 0
    assert "1 samples were left out" in capsys.readouterr().out
    data = LatentDataset(tmp_path / "out")
    assert len(data) == 4
    source = build_dataset(str(folder), image_size=8)
    for row, index in enumerate((0, 1, 3, 4)):
        got, expected = data.sample(row, rng()), source.sample(index, rng())
        assert got.caption == expected.caption
        assert (got.image - expected.image).abs().max() < 1e-3
    assert "2.png" in data.manifest["shards"][1]["skipped"][0]


def test_two_commands_on_one_folder(tmp_path):
    with run.folder_lock(tmp_path), pytest.raises(ValueError, match="another command is filling"):
        precompute(settings("digits", tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "--shard-size 0; expected >= 1"),
        ({"dtype": "int8"}, "--dtype int8; expected fp32, bf16, fp16"),
        ({"latents": "mean"}, "--latents has no effect without --vae"),
        ({"text_length": 5}, "--text-length has no effect without --text"),
        ({"text": "somewhere"}, "digits has no captions"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        precompute(settings("digits", tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_an_image_size_that_does_not_fit_the_vae(tmp_path, models):
    with pytest.raises(ValueError, match="--image-size 15 is no multiple of the VAE's 2"):
        precompute(settings("digits", tmp_path / "out", image_size=15, vae=str(models["vae"])))


def test_command_without_a_source(capsys):
    assert command() == 2
    assert "expected SOURCE and OUT" in capsys.readouterr().err
