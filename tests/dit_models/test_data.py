"""Data sets are what they say, and batches depend on the seed and the position alone."""

import json
import multiprocessing
import pickle
import random
import re
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_models.data import (
    BatchLoader,
    DigitDataset,
    Sample,
    Scene,
    SceneDataset,
    SceneObject,
    build_dataset,
    parse_caption,
)
from dit_models.data.base import DatasetInfo, split_indices
from dit_models.data.digits import load_scans
from dit_models.data.scenes import COLORS, GROUNDS, LAYOUTS, RELATIONS

objects = st.builds(SceneObject, st.integers(0, 9), st.sampled_from(sorted(COLORS)))
scenes = st.one_of(
    st.builds(lambda a: Scene((a,)), objects),
    st.builds(lambda a, b, r: Scene((a, b), r), objects, objects, st.sampled_from(RELATIONS)),
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- splits and digits


def test_halves_are_disjoint_complete_and_stratified() -> None:
    _, labels = load_scans("all")
    train, heldout = (split_indices(labels.tolist(), name) for name in ("train", "heldout"))
    assert sorted(train + heldout) == list(range(1797))
    counts = [torch.bincount(labels[chosen], minlength=10) for chosen in (train, heldout)]
    assert ((counts[0] - counts[1]).abs() <= 1).all()


def test_split_never_moves() -> None:
    # A moved split would mix held-out scans into what a released model was trained on.
    labels = load_scans("all")[1].tolist()
    assert split_indices(labels, "train")[:8] == [2, 4, 5, 6, 8, 9, 11, 13]
    assert split_indices(labels, "heldout")[:8] == [0, 1, 3, 7, 10, 12, 14, 18]


def test_digits_keep_the_scans_range_and_labels() -> None:
    data = DigitDataset("all", image_size=8)
    scans, labels = load_scans("all")
    assert torch.equal(data.labels, labels)
    torch.testing.assert_close(data.images[:, 0], scans * 2 - 1)
    large = DigitDataset("heldout")
    assert large.images.shape == (len(large), 1, 16, 16)
    assert large.images.min() == -1
    assert large.images.max() == 1
    sample = large.sample(5, rng())
    assert torch.equal(sample.image, large.images[5])
    assert (sample.label, sample.caption) == (int(large.labels[5]), "")


def test_digits_survive_their_resize() -> None:
    scans, _ = load_scans("train")
    pooled = torch.nn.functional.avg_pool2d(DigitDataset("train").images, 2)[:, 0]
    assert (pooled - (scans * 2 - 1)).abs().mean() < 0.1


# --- scenes


@given(scenes)
def test_caption_and_scene_are_inverse(scene: Scene) -> None:
    assert parse_caption(scene.caption) == scene
    assert scene.layout in LAYOUTS


def test_captions_read_as_documented() -> None:
    scene = Scene((SceneObject(7, "red"), SceneObject(2, "green")), "right of", "navy")
    assert scene.caption == "a red seven right of a green two"
    assert scene.placed == (SceneObject(2, "green"), SceneObject(7, "red"))
    assert Scene((SceneObject(7, "red"),)).caption == "a red seven"


@pytest.mark.parametrize(
    "caption", ["", "a red", "a pink two", "a red seven near a green two", "a red seven above"]
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="caption is"):
        parse_caption(caption)


def test_scene_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match="has 2 object"):
        Scene((SceneObject(1, "red"),), "above")
    with pytest.raises(ValueError, match="digit is 10"):
        SceneObject(10, "red")


def centres_of_ink(image: torch.Tensor, ground: str, color: str) -> torch.Tensor:
    """Mean (row, column) of the pixels on the line from the ground to the ink colour."""
    base = torch.tensor(GROUNDS[ground])[:, None, None]
    toward = torch.tensor(COLORS[color])[:, None, None] - base
    offset = (image + 1) / 2 - base
    alpha = (offset * toward).sum(0) / toward.square().sum()
    off_line = (offset - alpha * toward).abs().amax(0)
    ink = ((alpha > 0.3) & (off_line < 1e-3)).nonzero().double()
    assert len(ink) > 10
    return ink.mean(0)


def test_images_show_what_captions_say() -> None:
    data = SceneDataset("train")
    seen = set()
    for index in range(200):
        scene = data.scene(index)
        seen.add(scene.relation)
        if scene.relation is None or scene.objects[0].color == scene.objects[1].color:
            continue
        image = data.sample(index, rng(index)).image
        assert scene.ground is not None
        first, second = (centres_of_ink(image, scene.ground, o.color) for o in scene.objects)
        row, column = (first - second).tolist()
        if scene.layout == "horizontal":
            assert (column < -8) == (scene.relation == "left of")
            assert abs(column) > abs(row)
        else:
            assert (row < -8) == (scene.relation == "above")
            assert abs(row) > abs(column)
    assert seen == {None, *RELATIONS}


def test_scene_depends_on_index_and_rng_alone() -> None:
    data, again = SceneDataset("train"), SceneDataset("train")
    one, other = data.sample(3, rng(1)), again.sample(3, rng(1))
    assert torch.equal(one.image, other.image)
    assert one.caption == other.caption == data.scene(3).caption
    assert one.image.shape == (3, 32, 32)
    assert one.image.dtype == torch.float32
    assert one.image.abs().max() <= 1
    assert not all(torch.equal(data.sample(3, rng(s)).image, one.image) for s in range(2, 6))


def test_position_is_independent_of_what_a_scene_shows() -> None:
    # Fails when the caller's streams and those behind the scenes coincide.
    data = SceneDataset("train")
    rows = []
    for index in range(300):
        if data.scene(index).relation is None:
            image = data.sample(index, np.random.default_rng([0, index])).image
            rows.append(int((image != image[:, :1, :1]).any(0).any(1).nonzero().min()))
    assert set(rows) >= set(range(min(rows), min(rows) + 10))


def test_draw_renders_the_scene_asked_for() -> None:
    data = SceneDataset("heldout")
    asked = Scene((SceneObject(7, "red"), SceneObject(2, "green")), "below", "slate")
    for seed in range(5):
        image = data.draw(asked, rng(seed))
        red, green = (centres_of_ink(image, "slate", color) for color in ("red", "green"))
        assert red[0] - green[0] > 8
        assert torch.equal(image, data.draw(asked, rng(seed)))
    open_ground = parse_caption(asked.caption)
    corners = [tuple(data.draw(open_ground, rng(seed))[:, 0, 0].tolist()) for seed in range(30)]
    assert len(set(corners)) == len(GROUNDS)


def test_splits_of_scenes_share_no_scan() -> None:
    train, heldout = SceneDataset("train"), SceneDataset("heldout")
    assert {ink.tobytes() for ink in train._ink}.isdisjoint(ink.tobytes() for ink in heldout._ink)
    assert [train.scene(i) for i in range(9)] != [heldout.scene(i) for i in range(9)]


@pytest.mark.parametrize("image_size", [16, 64])
def test_scenes_come_in_other_sizes(image_size: int) -> None:
    data = SceneDataset("heldout", image_size, length=40)
    for index in range(40):
        assert data.sample(index, rng(index)).image.shape == (3, image_size, image_size)
    with pytest.raises(IndexError):
        data.sample(40, rng())


# --- folders


def write_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def write_metadata(folder: Path, *entries: object) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_class_folder_sorts_classes_and_decodes(tmp_path: Path) -> None:
    write_image(tmp_path / "zebra" / "a.png", (255, 0, 0))
    write_image(tmp_path / "ant" / "deep" / "b.PNG", (0, 255, 0))
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    data = build_dataset(str(tmp_path), image_size=4)
    assert data.info == DatasetInfo(tmp_path.name, 4, 3, 2, has_captions=False)
    assert [data.sample(i, rng()).label for i in range(len(data))] == [0, 1]
    expected = torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 4, 4)
    assert torch.equal(data.sample(0, rng()).image, expected)


def test_crop_is_central_and_flip_mirrors(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :2] = 255  # outside the central square
    pixels[:, 2] = [255, 0, 0]  # its first column
    (tmp_path / "c").mkdir()
    Image.fromarray(pixels).save(tmp_path / "c" / "a.png")
    plain = build_dataset(str(tmp_path), image_size=4).sample(0, rng()).image
    assert torch.equal(plain[:, :, 0], torch.tensor([1.0, -1.0, -1.0])[:, None].expand(3, 4))
    assert (plain[:, :, 1:] == -1).all()
    flipping = build_dataset(str(tmp_path), image_size=4, flip=True)
    images = [flipping.sample(0, rng(seed)).image for seed in range(20)]
    flipped = [torch.equal(image, plain.flip(-1)) for image in images]
    assert all(
        is_flipped or torch.equal(i, plain) for i, is_flipped in zip(images, flipped, strict=True)
    )
    assert 0 < sum(flipped) < 20


def test_splits_of_a_class_folder_agree_on_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "ant" / "a.png", (0, 0, 0))
    write_image(tmp_path / "train" / "bee" / "a.png", (0, 0, 0))
    write_image(tmp_path / "test" / "bee" / "a.png", (0, 0, 0))
    test = build_dataset(str(tmp_path), split="test", image_size=4)
    assert (len(test), test.info.num_classes, test.sample(0, rng()).label) == (1, 2, 1)
    with pytest.raises(ValueError, match="asked for 'heldout'"):
        build_dataset(str(tmp_path), split="heldout", image_size=4)


def test_caption_folder_reads_metadata(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "images" / "a.png", (0, 0, 255))
    write_metadata(
        tmp_path / "train", {"file_name": "images/a.png", "text": "blüe", "other": 1}, ""
    )
    data = build_dataset(str(tmp_path), image_size=4)
    assert len(data) == 1
    assert data.info.has_captions
    sample = data.sample(0, rng())
    assert (sample.label, sample.caption) == (-1, "blüe")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{not json", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({"file_name": "ok.png"}, "line 2 lacks the string field 'text'"),
        ({"file_name": "gone.png", "text": ""}, r"line 2: there is no file .*gone\.png"),
        ({"file_name": "../outside.png", "text": ""}, "line 2: .* leads outside"),
        ({"file_name": "/etc/outside.png", "text": ""}, "line 2: .* leads outside"),
        ({"file_name": "..\\outside.png", "text": ""}, "line 2: .* leads outside"),
        ({"file_name": "C:\\outside.png", "text": ""}, "line 2: .* leads outside"),
    ],
)
def test_bad_metadata_names_its_line(tmp_path: Path, entry: object, message: str) -> None:
    write_image(tmp_path / "outside.png", (0, 0, 0))
    folder = tmp_path / "data"
    write_image(folder / "ok.png", (0, 0, 0))
    write_metadata(folder, {"file_name": "ok.png", "text": "fine"}, entry)
    with pytest.raises(ValueError, match=message):
        build_dataset(str(folder), image_size=4)


def test_undecodable_image_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "c" / "good.png", (0, 0, 0))
    content = (tmp_path / "c" / "good.png").read_bytes()
    (tmp_path / "c" / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "c" / "text.jpg").write_text("hello")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "c" / "deep.png")
    data = build_dataset(str(tmp_path), image_size=4)
    messages = []
    for index in range(len(data)):
        try:
            data.sample(index, rng())
        except ValueError as error:
            messages.append(str(error))
    for name in ("cut.png", "deep.png", "good.png", "text.jpg"):
        assert any(name in message for message in messages) == (name != "good.png")


def test_build_dataset_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        build_dataset(str(tmp_path), image_size=4)
    with pytest.raises(ValueError, match="image_size is missing"):
        build_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="neither a built-in data set"):
        build_dataset("digit")
    with pytest.raises(ValueError, match="flip"):
        build_dataset("digit-scenes", flip=True)
    with pytest.raises(ValueError, match="split is 'test'"):
        build_dataset("digits", split="test")
    with pytest.raises(ValueError, match="image_size is 4"):
        build_dataset("digits", image_size=4)
    write_metadata(tmp_path)
    with pytest.raises(ValueError, match="lists no images"):
        build_dataset(str(tmp_path), image_size=4)


# --- loader


class Numbers:
    """Sample i is an image that holds i and a number from its rng."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.info = DatasetInfo("numbers", 1, 2, length, has_captions=True)

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image = torch.tensor([float(index), rng.random()]).reshape(2, 1, 1)
        return Sample(image, index, str(index))


@given(length=st.integers(1, 12), batch_size=st.integers(1, 30), seed=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_every_epoch_holds_every_sample_once(length: int, batch_size: int, seed: int) -> None:
    loader = BatchLoader(Numbers(length), batch_size, seed=seed)
    labels: list[int] = []
    while len(labels) < 3 * length:
        batch = next(loader)
        assert batch.labels is not None
        assert batch.captions == [str(label) for label in batch.labels.tolist()]
        labels += batch.labels.tolist()
    for epoch in range(3):
        assert sorted(labels[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_batches_are_a_pure_function_of_seed_and_number() -> None:
    data = Numbers(50)
    in_order = [batch.images for batch in islice(BatchLoader(data, 8, seed=3), 20)]
    loader = BatchLoader(data, 8, seed=3)
    for number in (13, 2, 19, 0):
        assert torch.equal(loader.batch(number).images, in_order[number])
    assert torch.equal(next(BatchLoader(data, 8, seed=3, start=13)).images, in_order[13])
    assert not torch.equal(next(BatchLoader(data, 8, seed=4)).images, in_order[0])
    draws = torch.cat(in_order)[:, 1].flatten()
    assert len(draws.unique()) == len(draws)  # no two positions share a random stream


def test_epochs_differ_in_order() -> None:
    loader = BatchLoader(Numbers(50), 50)
    first, second = next(loader).labels, next(loader).labels
    assert first is not None
    assert not torch.equal(first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_resume_change_nothing(num_workers: int) -> None:
    data = SceneDataset("train", 16, length=30)
    plain = BatchLoader(data, 7, seed=5)
    expected = [next(plain) for _ in range(9)]

    loader = BatchLoader(data, 7, seed=5, num_workers=num_workers)
    got = [next(loader) for _ in range(4)]
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    got += [next(loader) for _ in range(2)]
    loader.load_state_dict(state)  # back to batch 4, whatever the workers have prepared
    assert loader.position == 4
    resumed = BatchLoader(data, 7, seed=5, num_workers=num_workers)
    resumed.load_state_dict(state)
    for other in (loader, resumed):
        for number in (4, 5, 6):
            batch = next(other)
            assert torch.equal(batch.images, expected[number].images)
            assert batch.captions == expected[number].captions
    for batch, wanted in zip(got, expected[:6], strict=True):
        assert torch.equal(batch.images, wanted.images)
        assert batch.labels is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_global_random_states_alone(num_workers: int) -> None:
    data = SceneDataset("train", 16, length=30)
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    loader = BatchLoader(data, 7, num_workers=num_workers)
    first = next(loader)
    after = (random.getstate(), np.random.get_state()[1], torch.get_rng_state())  # noqa: NPY002
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    assert torch.equal(BatchLoader(data, 7, num_workers=num_workers).batch(0).images, first.images)


def test_errors_in_workers_keep_their_message(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "bad.png").write_text("hello")
    loader = BatchLoader(build_dataset(str(tmp_path), image_size=4), 2, num_workers=1)
    with pytest.raises(ValueError, match=r"bad\.png"):
        next(loader)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS does not tell who sent it")
def test_workers_end_when_their_parent_says_so_alone() -> None:
    before = multiprocessing.active_children()  # of other tests
    loader = BatchLoader(SceneDataset("train", 16, length=30), 7, num_workers=1)
    next(loader)
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    if sys.platform == "linux":  # a thread of a library's would take the signal, and end the worker
        statuses = [file.read_text() for file in Path(f"/proc/{worker.pid}/task").glob("*/status")]
        blocked = [int(re.search(r"SigBlk:\s*(\w+)", text)[1], 16) for text in statuses]
        takers = [mask for mask in blocked if not mask >> (signal.SIGTERM - 1) & 1]
        assert len(takers) <= 1  # the one that waits for it
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(4):
        next(loader)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_state_of_another_loader_is_refused() -> None:
    state = BatchLoader(Numbers(10), 4, seed=1, start=6).state_dict()
    assert state == {"dataset": "numbers", "length": 10, "batch_size": 4, "seed": 1, "position": 6}
    with pytest.raises(ValueError, match="length = 10 and this loader 11"):
        BatchLoader(Numbers(11), 4, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size = 4 and this loader 5"):
        BatchLoader(Numbers(10), 5, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="seed = 1 and this loader 0"):
        BatchLoader(Numbers(10), 4).load_state_dict(state)
    with pytest.raises(ValueError, match="dataset = 'other' and this loader 'numbers'"):
        BatchLoader(Numbers(10), 4, seed=1).load_state_dict({**state, "dataset": "other"})
    with pytest.raises(ValueError, match="lacks position"):
        BatchLoader(Numbers(10), 4).load_state_dict({k: state[k] for k in list(state)[:-1]})


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"seed": -1}, {"start": -1}])
def test_loader_refuses_bad_arguments(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        BatchLoader(Numbers(3), **{"batch_size": 2, **bad})
