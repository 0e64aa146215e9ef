"""Files of samples: complete, resumable, the same from any number of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_models.drawing import Artist, Prompts
from dit_models.evaluate.adm import NpzImages, write_samples
from dit_models.evaluate.draw import draw_all, draw_missing, from_pixels, to_pixels
from dit_models.evaluate.folder import NpzChunks, folder_lock
from dit_models.evaluate.plan import images_depend_on_batch
from dit_models.evaluate.processes import Group, device_for
from dit_models.model_config import ModelConfig
from dit_models.run_folder import load_run

from .cases import command, save_run, tiny_artist


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "digits", "expert choice")


def drawn_by(artist: Artist, out: Path, processes: int, stop_after: int | None = None) -> int:
    """Draw 10 images in chunks of 3 as so many processes would, one after the other."""
    prompts = Prompts(torch.arange(10) % 4, None)
    count = 0
    for rank in range(processes):
        pieces = []
        count += draw_missing(
            artist,
            prompts,
            NpzChunks(out, 10, 3),
            first_seed=20,
            batch_size=2,
            group=Group(rank, processes),
            stopped=lambda pieces=pieces: len(pieces) == stop_after,
            progress=pieces.append,
        )
    return count


@pytest.mark.parametrize(
    "kind", ["expert choice", "token choice", "dense", "expert choice over the batch"]
)
def test_the_number_of_processes_does_not_change_a_bit(tmp_path, kind):
    artist = tiny_artist(tmp_path / "run", kind)
    files = []
    for processes in (1, 2, 5):
        out = tmp_path / str(processes)
        assert drawn_by(artist, out, processes) == 10
        chunks = NpzChunks(out, 10, 3)
        chunks.assemble(np.arange(10) % 4)
        assert not (out / "chunks").exists()
        files.append((out / "samples.npz").read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_stopped_job_goes_on_where_it_stopped(tmp_path):
    artist = tiny_artist(tmp_path / "run", "expert choice")
    assert drawn_by(artist, tmp_path / "a", 1, stop_after=2) == 6
    with pytest.raises(ValueError, match=r"00000006-00000008\.npz is missing or damaged"):
        NpzChunks(tmp_path / "a", 10, 3).assemble(None)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "chunks").iterdir()}
    assert len(kept) == 2
    assert drawn_by(artist, tmp_path / "a", 2) == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert drawn_by(artist, tmp_path / "a", 2) == 0
    drawn_by(artist, tmp_path / "b", 1)
    for name in ("a", "b"):
        NpzChunks(tmp_path / name, 10, 3).assemble(None)
    assert (tmp_path / "a/samples.npz").read_bytes() == (tmp_path / "b/samples.npz").read_bytes()


def test_a_damaged_chunk_is_named(tmp_path):
    chunks = NpzChunks(tmp_path, 4, 2)
    for piece in chunks.pieces:
        chunks.write(piece, np.full((2, 4, 4, 3), piece.start, np.uint8))
    path = tmp_path / "chunks/00000002-00000003.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00000002-00000003\.npz is missing or damaged"):
        chunks.assemble(None)
    assert not (tmp_path / "samples.npz").exists()
    assert not list(tmp_path.glob(".samples*"))


def test_samples_have_the_format_of_adm(run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    words = (run_dir, "--samples", 13, "--out", out, "--chunk", 5, "--batch-size", 4, "--steps", 2)
    assert command(*words, "--guidance", 2) == 0
    with np.load(out / "samples.npz") as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (13, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(13)]
    artist = load_run(run_dir, "cpu").artist
    artist.sampling.num_steps = 2
    expected = draw_all(artist, Prompts(torch.arange(13) % 10, None), 0, 4, guidance_scale=2.0)
    # Chunks of 5 in batches of 4 are other batches: equal to rounding.
    assert abs(images.astype(int) - to_pixels(expected).astype(int)).max() <= 1
    figures = json.loads((out / "figures.json").read_text())
    assert figures["samples"]["sampling.guidance_scale"] == 2.0
    assert figures["samples"]["first_seed"] == 0
    (entry,) = figures["measurements"]
    assert entry["kind"] == "classifier"
    assert entry["figures"]["num_samples"] == 13
    assert entry["versions"]["torch"] == torch.__version__
    assert "frechet_distance" in capsys.readouterr().out

    stamp = (out / "samples.npz").stat().st_mtime_ns
    assert command(*words, "--guidance", 2) == 0  # nothing is missing
    assert (out / "samples.npz").stat().st_mtime_ns == stamp
    assert json.loads((out / "figures.json").read_text()) == figures


def test_what_a_killed_process_left_is_cleared_away(run_dir, tmp_path):
    out = tmp_path / "out"
    words = (run_dir, "--samples", 2, "--out", out, "--steps", 1)
    assert command(*words) == 0
    (out / "samples.npz").unlink()
    (out / "chunks").mkdir()
    (out / ".writing-00001-7" / "samples").mkdir(parents=True)
    for name in ("chunks/.00000000-00000001.npz.7.tmp", ".samples.npz.7.tmp"):
        (out / name).write_bytes(b"half")
    assert command(*words) == 0
    names = [".lock", "figures.json", "samples.npz", "settings.json"]
    assert sorted(path.name for path in out.iterdir()) == names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--guidance", 3), "sampling.guidance_scale 1.25 there, 3.0 asked"),
        (("--samples", 7), "num_samples 6 there, 7 asked"),
        (("--first-seed", 9), "first_seed 0 there, 9 asked"),
        (("--labels", 3), "prompts_sha256"),
        (("--chunk", 3), "chunk 64 there, 3 asked"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(run_dir, tmp_path, capsys, change, words):
    out = tmp_path / "out"
    assert command(run_dir, "--samples", 6, "--out", out, "--steps", 1) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    again = dict(zip(("--samples", "--steps"), (6, 1), strict=True)) | {change[0]: change[1]}
    assert command(run_dir, "--out", out, *(word for pair in again.items() for word in pair)) == 2
    assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_other_weights_are_refused(run_dir, tmp_path, capsys):
    assert command(run_dir, "--samples", 2, "--out", tmp_path / "out", "--steps", 1) == 0
    other = save_run(tmp_path / "run", "expert choice", "seed=5")
    assert command(other, "--samples", 2, "--out", tmp_path / "out", "--steps", 1) == 2
    assert "weights_sha256" in capsys.readouterr().err


def test_the_same_weights_in_another_model_are_refused(tmp_path, capsys):
    """Capacity is in no weight, and changes the images."""
    run_dir = save_run(tmp_path / "run", "expert choice", "model_options.capacity_factor=2.0")
    words = (run_dir, "--samples", 2, "--out", tmp_path / "out", "--steps", 1)
    assert command(*words) == 0
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("capacity_factor: 2.0", "capacity_factor: 1.0"))
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert "model.capacity_factor 2.0 there, 1.0 asked" in error
    assert "weights_sha256" not in error


def test_a_folder_with_other_files_is_left_alone(run_dir, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert command(run_dir, "--samples", 2, "--out", tmp_path) == 2
    assert "holds no settings.json" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "mine.txt"]


def test_two_commands_cannot_write_to_one_folder(run_dir, tmp_path, capsys):
    with folder_lock(tmp_path / "out"):
        assert command(run_dir, "--samples", 2, "--out", tmp_path / "out") == 2
    assert "another process is writing" in capsys.readouterr().err


def test_two_real_processes_stop_on_a_signal_and_leave_whole_chunks(run_dir, tmp_path):
    words = (run_dir, "--samples", 100_000, "--chunk", 3, "--batch-size", 3, "--steps", 2)
    line = [sys.executable, "-m", "dit_models.evaluate", *map(str, words), "--device", "cpu"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*line, "--out", str(out), "--processes", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("chunks/*.npz"))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command draws what is missing" in errors
    artist = load_run(run_dir, "cpu").artist
    artist.sampling.num_steps = 2
    for path in sorted((out / "chunks").iterdir())[:4]:
        start, last = map(int, path.stem.split("-"))
        assert last == start + 2
        prompts = Prompts(torch.arange(start, start + 3) % 10, None)
        expected = to_pixels(draw_all(artist, prompts, start, 3))
        with np.load(path) as file:
            difference = file["images"].astype(int) - expected
        # The same batch gives the same bits, but for the number of threads.
        assert abs(difference).max() <= (torch.get_num_threads() > 1)


def test_processes_spread_over_the_gpus(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_for("auto", rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_for("cuda:1", 0) == "cuda:1"
    assert device_for("cpu", 1) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun on a second machine: rank 4 is its second
    assert device_for("auto", 4) == "cuda:1"


# --- the file


def test_samples_are_written_and_read_a_piece_at_a_time(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 5, 6, 3), dtype=np.uint8)
    path = tmp_path / "samples.npz"
    write_samples(path, images.shape, (images[i : i + 4] for i in range(0, 11, 4)), None)
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        assert np.array_equal(file["arr_0"], images)
    source = NpzImages(path)
    assert (len(source), source.size) == (11, (5, 6))
    assert np.array_equal(np.concatenate(list(source.batches(3))), images)
    assert [len(batch) for batch in source.batches(4)] == [4, 4, 3]


def test_compressed_samples_of_others_are_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 5, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images, np.arange(7))
    assert np.array_equal(np.concatenate(list(NpzImages(tmp_path / "x.npz").batches(2))), images)


def test_a_wrong_number_of_images_writes_nothing(tmp_path):
    pieces = [np.zeros((4, 2, 2, 3), np.uint8)]
    with pytest.raises(ValueError, match="there are 4 images; expected 5"):
        write_samples(tmp_path / "x.npz", (5, 2, 2, 3), pieces, None)
    assert list(tmp_path.iterdir()) == []


def test_damaged_samples_are_noticed(tmp_path):
    path = tmp_path / "x.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(path, images)
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        list(NpzImages(path).batches(3))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 2, 2), np.uint8), np.zeros((4, 2, 2, 1), np.uint8), np.zeros((4, 2, 2, 3))],
)
def test_a_file_of_something_else_is_refused(tmp_path, array):
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match=r"expected \(n, H, W, 3\) uint8"):
        NpzImages(tmp_path / "x.npz")


def test_pixels_round_and_come_back():
    values = torch.arange(256).float() / 127.5 - 1
    images = values.repeat(3).view(1, 3, 16, 16)
    shifts = 0.9 / 127.5 * (torch.rand_like(images) - 0.5)  # up to 0.45 of a level, either way
    pixels = to_pixels(images + shifts)
    assert pixels[0, ..., 1].flatten().tolist() == list(range(256))
    assert torch.allclose(from_pixels(pixels, 3), images, rtol=0, atol=1e-6)
    grey = to_pixels(images[:, :1])
    assert grey.shape == (1, 16, 16, 3)
    assert torch.equal(from_pixels(grey, 1), from_pixels(grey, 3)[:, 1:2])
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_pixels(images.where(images > -1, torch.nan))
    with pytest.raises(ValueError, match="Latents must be decoded"):
        to_pixels(torch.zeros(1, 4, 8, 8))


# --- words of the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--samples", 0, "--out", "o"), "--samples 0; expected at least 1"),
        (("--out", "o"), "--out needs --samples N"),
        (("--labels", 3), "--labels has no effect without --out"),
        (("--clip", "c"), "--clip has no effect without --out"),
        (("--samples", 2, "--out", "o", "--json", "f"), "--json has no effect with --out"),
        (("--samples", 2, "--out", "o", "--images-per-prompt", 2), "--images-per-prompt has no"),
        (("--geneval", "m", "--out", "o"), "--geneval: this model reads class labels"),
        (("--figure-batch-size", 2), "--figure-batch-size has no effect without --out"),
        (("--samples", 2, "--out", "o", "--guidance", 1, 2), "one scale with --out"),
        (("--samples", 2, "--out", "o", "--labels", 11), "--labels [11]: expected 0 to 9"),
        (("--samples", 2, "--out", "o", "--first-seed", 2**32 - 1), "expected 0 to 4294967294"),
        (("--samples", 2, "--out", "o", "--batch-size", 0), "--batch-size 0"),
        (("--samples", 2, "--out", "o", "--reference", "r"), "--reference needs --inception"),
        (("--samples", 2, "--out", "o", "--processes", 0), "--processes 0"),
        (("--samples", 2, "--out", "o", "--clip", "."), "a CLIP score needs captions"),
        (("--samples", 2, "--out", "o", "--clip", "c"), "--clip c does not exist"),
    ],
)
def test_wrong_words_are_one_line(run_dir, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert command(run_dir, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error


def test_a_pool_over_the_batch_is_warned_of_and_bound_to_its_batch_size(tmp_path, capsys):
    run_dir = save_run(tmp_path / "run", "expert choice over the batch")
    words = (run_dir, "--samples", 4, "--out", tmp_path / "out", "--steps", 1)
    assert command(*words, "--batch-size", 2) == 0
    assert "an image depends on those drawn with it" in capsys.readouterr().err
    assert command(*words, "--batch-size", 4) == 2
    assert "batch_size 2 there, 4 asked" in capsys.readouterr().err


def test_which_models_draw_images_that_depend_on_their_batch():
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "in_channels": 1,
             "out_channels": 1, "image_size": 8, "num_experts": 4}  # fmt: skip
    chosen = {"family": "ec_dit", "capacity_factor": 1.0, **sizes}
    assert not images_depend_on_batch(ModelConfig(**chosen))
    assert images_depend_on_batch(ModelConfig(**chosen, group="batch"))
    assert not images_depend_on_batch(ModelConfig(family="dit_moe", top_k=2, **sizes))
    for inference, expected in (("threshold", False), ("batch_topk", True)):
        options = {"routing": "diffmoe", "routing_options": {"inference": inference}}
        assert images_depend_on_batch(ModelConfig(**chosen, **options)) is expected


def test_latents_are_decoded_by_the_vae_that_is_named(run_dir, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 1,
              "down_block_types": ("DownEncoderBlock2D",) * 2,
              "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
    diffusers.AutoencoderKL(**blocks).save_pretrained(tmp_path / "vae")
    words = (run_dir, "--samples", 3, "--steps", 1, "--out", tmp_path / "out", "--device", "cpu")
    assert command(*words, "--vae", tmp_path / "vae") == 0
    assert NpzImages(tmp_path / "out/samples.npz").shape == (3, 32, 32, 3)
    assert "no classifier figures" in capsys.readouterr().out
    assert command(*words) == 2  # the same folder, but pixels
    assert "vae '" in capsys.readouterr().err


def test_captions_come_from_a_file_and_are_kept(tmp_path):
    run_dir = save_run(tmp_path / "run", "captions")
    asked = tmp_path / "prompts.txt"
    asked.write_text("a red seven\n\na blue two above a green one\n")
    out = tmp_path / "out"
    words = (run_dir, "--prompts", asked, "--samples", 3, "--out", out, "--steps", 1)
    assert command(*words, "--device", "cpu") == 0
    assert json.loads((out / "prompts.json").read_text()) == [
        "a red seven", "a blue two above a green one", "a red seven",
    ]  # fmt: skip
    with np.load(out / "samples.npz") as file:
        assert file.files == ["arr_0"]
