"""The quality figures tell good samples from bad ones, and training them disturbs nothing."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from dit_models.data import DigitDataset, Scene, SceneDataset, SceneObject, parse_caption
from dit_models.data.scenes import LAYOUTS
from dit_models.quality import ReaderSettings, evaluate_digits, evaluate_scenes, frechet_distance
from dit_models.quality.classifier import ClassifierSettings, digit_classifier, shifted
from dit_models.quality.digits import stratified_subset
from dit_models.quality.frechet import Moments, frechet_of_moments, moments
from dit_models.quality.reader import SceneLogits, read_scenes, scene_reader, scene_targets
from dit_models.quality.scenes import SceneVerdict, judge, real_scenes

TINY_CLASSIFIER = ClassifierSettings(epochs=1)
TINY_READER = ReaderSettings(steps=3, batch_size=8, heldout_scenes=20)


# --- Fréchet distance


def with_moments(mean: Tensor, covariance: Tensor, count: int = 400) -> Tensor:
    """(count, d) fp64 samples with exactly this mean and unbiased covariance."""
    samples = torch.randn(count, len(mean), dtype=torch.float64)
    samples -= samples.mean(0)
    whitener = torch.linalg.cholesky(samples.T @ samples / (count - 1)).inverse()
    return samples @ whitener.T @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(size: int) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("count", [3, 40, 300])  # rank-deficient, and full rank
def test_equal_sets_are_at_distance_zero(count: int) -> None:
    features = torch.randn(count, 64, dtype=torch.float64)
    shuffled = features[torch.randperm(count)]
    assert 0 <= frechet_distance(features, shuffled) < 1e-9


@pytest.mark.parametrize("count", [3, 300])
def test_shift_costs_its_squared_length(count: int) -> None:
    features = torch.randn(count, 16, dtype=torch.float64)
    shift = torch.randn(16, dtype=torch.float64)
    distance = frechet_distance(features + shift, features)
    assert distance == pytest.approx(float(shift.square().sum()), rel=1e-9)


def test_diagonal_gaussians_have_their_closed_form() -> None:
    first = torch.rand(8, dtype=torch.float64) + 0.1
    second = torch.rand(8, dtype=torch.float64) + 0.1
    mean = torch.randn(8, dtype=torch.float64)
    distance = frechet_distance(
        with_moments(mean, torch.diag(first**2)),
        with_moments(torch.zeros_like(mean), torch.diag(second**2), 300),
    )
    expected = mean.square().sum() + (first - second).square().sum()
    assert distance == pytest.approx(float(expected), rel=1e-9)


def test_agrees_with_the_matrix_root_of_scipy() -> None:
    first, second = random_covariance(12), random_covariance(12)
    mean = torch.randn(12, dtype=torch.float64)
    distance = frechet_distance(
        with_moments(mean, first), with_moments(torch.zeros_like(mean), second)
    )
    root = np.real(sqrtm((first @ second).numpy()))
    expected = mean.square().sum() + first.trace() + second.trace() - 2 * np.trace(root)
    assert distance == pytest.approx(float(expected), rel=1e-7)


def test_distance_is_symmetric_with_singular_covariances() -> None:
    few, many = torch.randn(5, 32), torch.randn(90, 32) + 1
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(many, few), rel=1e-6)


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4), "features has shape"),
        (torch.zeros(5, 4), torch.zeros(5), "reference has shape"),
        (torch.zeros(5, 4), torch.zeros(5, 3), "4 columns and reference 3"),
        (torch.full((5, 4), torch.nan), torch.zeros(5, 4), "NaN"),
    ],
)
def test_distance_refuses_bad_input(features: Tensor, reference: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, reference)


def test_moments_of_a_file_with_nan_are_no_perfect_distance():
    good = moments(torch.randn(9, 3))
    bad = Moments(torch.full((3,), torch.nan, dtype=torch.float64), good.covariance)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            frechet_of_moments(*pair)


# --- digits


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


def test_classifier_reads_heldout_digits(cache: Path) -> None:
    classifier, accuracy = digit_classifier(cache)
    assert accuracy >= 0.98
    heldout = DigitDataset("heldout")
    with torch.no_grad():
        right = (classifier(heldout.images).argmax(1) == heldout.labels).double().mean()
    assert accuracy == pytest.approx(float(right))
    assert not classifier.training


def test_real_digits_score_near_the_floor_and_bad_ones_do_not(cache: Path) -> None:
    heldout = DigitDataset("heldout")
    chosen = stratified_subset(heldout.labels.tolist(), 400, seed=1)
    images, labels = heldout.images[chosen], heldout.labels[chosen]
    real = evaluate_digits(images, labels, cache)
    assert real.num_samples == 400
    assert real.class_accuracy >= 0.97
    assert real.frechet_distance < 1.5 * real.frechet_floor
    mislabelled = evaluate_digits(images, (labels + 1) % 10, cache)
    assert mislabelled.class_accuracy < 0.05
    assert mislabelled.frechet_distance == real.frechet_distance
    noisy = evaluate_digits(images + 0.5 * torch.randn_like(images), labels, cache)
    assert noisy.frechet_distance > 3 * real.frechet_distance
    one_class = evaluate_digits(images[labels == 3], labels[labels == 3], cache)
    assert one_class.frechet_distance > 10 * real.frechet_distance


def test_evaluate_digits_refuses_bad_input(cache: Path) -> None:
    images, labels = torch.zeros(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \(n, 1, 16, 16\)"):
        evaluate_digits(images[:, :, :8, :8], labels, cache)
    with pytest.raises(ValueError, match="labels has shape"):
        evaluate_digits(images, labels[:3], cache)
    with pytest.raises(ValueError, match=r"integers 0\.\.9"):
        evaluate_digits(images, labels + 10, cache)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_digits(images + torch.nan, labels, cache)


def test_stratified_subset_is_balanced_and_nested() -> None:
    labels = DigitDataset("train").labels
    chosen = stratified_subset(labels.tolist(), 205, seed=0)
    counts = torch.bincount(labels[chosen], minlength=10)
    assert len(set(chosen)) == 205
    assert counts.max() - counts.min() <= 1
    assert stratified_subset(labels.tolist(), 100, seed=0) == chosen[:100]
    assert len(stratified_subset(labels.tolist(), 10_000, seed=0)) == len(labels)


def test_shifted_moves_whole_images() -> None:
    images = torch.rand(50, 2, 6, 6)
    moved = shifted(images, 1)
    offsets = set()
    for image, result in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(image, [1] * 4, mode="replicate")
        matches = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if torch.equal(padded[:, top : top + 6, left : left + 6], result)
        ]
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) == 9


# --- training once, and the cache


def weights_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_training_repeats_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, accuracy = digit_classifier(None, 3, TINY_CLASSIFIER)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        again, same_accuracy = digit_classifier(None, 3, TINY_CLASSIFIER)
    assert weights_equal(first, again)
    assert accuracy == same_accuracy
    assert not weights_equal(first, digit_classifier(None, 4, TINY_CLASSIFIER)[0])


def test_reader_trains_repeatably_on_a_tiny_budget() -> None:
    first, accuracy = scene_reader(None, 1, TINY_READER)
    again, same_accuracy = scene_reader(None, 1, TINY_READER)
    assert weights_equal(first, again)
    assert accuracy == same_accuracy


def test_cache_is_used_and_keyed_by_seed_and_settings(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    trained, accuracy = digit_classifier(folder, 0, TINY_CLASSIFIER)
    (file,) = folder.iterdir()
    stamp = file.stat().st_mtime_ns
    loaded, loaded_accuracy = digit_classifier(folder, 0, TINY_CLASSIFIER)
    assert weights_equal(trained, loaded)
    assert (loaded_accuracy, file.stat().st_mtime_ns) == (accuracy, stamp)
    digit_classifier(folder, 1, TINY_CLASSIFIER)
    digit_classifier(folder, 0, ClassifierSettings(epochs=1, noise_std=0.3))
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "empty"])
def test_damaged_cache_is_trained_anew_with_a_warning(tmp_path: Path, damage: str) -> None:
    trained, _ = digit_classifier(tmp_path, 0, TINY_CLASSIFIER)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[-100] ^= 1
    file.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(damage, len(content))])
    with pytest.warns(UserWarning, match="is damaged") as caught:
        again, _ = digit_classifier(tmp_path, 0, TINY_CLASSIFIER)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert weights_equal(trained, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weights_equal(trained, digit_classifier(tmp_path, 0, TINY_CLASSIFIER)[0])


# --- scenes


def scene(text: str) -> Scene:
    return parse_caption(text)


@pytest.mark.parametrize(
    ("asked", "shown", "expected"),
    [
        ("a red seven", "a red seven", (True, True, None, None, True)),
        ("a red seven", "a blue seven", (True, False, None, None, False)),
        ("a red seven", "a red seven above a blue two", (True, True, None, None, False)),
        (
            "a red seven right of a blue two",
            "a blue two left of a red seven",
            (True, True, True, True, True),
        ),
        (
            "a red seven left of a blue two",
            "a blue two left of a red seven",
            (True, True, False, False, False),
        ),
        (
            "a red seven left of a blue two",
            "a red seven above a blue two",
            (True, True, False, False, False),
        ),
        (
            "a red seven left of a blue two",
            "a blue seven left of a red two",
            (True, False, True, False, False),
        ),
        ("a red two above a red two", "a red two", (False, False, False, False, False)),
        (
            "a red two above a blue two",
            "a red two above a red two",
            (True, False, True, False, False),
        ),
    ],
)
def test_judge_says_what_is_right(
    asked: str, shown: str, expected: tuple[bool | None, ...]
) -> None:
    assert judge(scene(asked), scene(shown)) == SceneVerdict(*expected)


def test_reading_is_the_inverse_of_targets() -> None:
    data = SceneDataset("train", length=60)
    scenes = [parse_caption(data.scene(i).caption) for i in range(60)]
    targets = scene_targets(scenes)
    logits = SceneLogits(
        torch.eye(len(LAYOUTS))[targets.layout],
        torch.eye(10)[targets.digits.clamp(min=0)],
        torch.eye(6)[targets.colors.clamp(min=0)],
    )
    for truth, read in zip(scenes, read_scenes(logits), strict=True):
        assert read.placed == truth.placed
        assert read.layout == truth.layout


def test_evaluate_scenes_runs_end_to_end(tmp_path: Path) -> None:
    data = SceneDataset("heldout", length=12)
    samples = [data.sample(i, np.random.default_rng(i)) for i in range(12)]
    images = torch.stack([sample.image for sample in samples])
    captions = [sample.caption for sample in samples]
    before = torch.get_rng_state()
    quality = evaluate_scenes(images, captions, tmp_path, settings=TINY_READER)
    assert torch.equal(torch.get_rng_state(), before)
    assert quality == evaluate_scenes(images, captions, tmp_path, settings=TINY_READER)
    assert quality.num_samples == 12
    assert quality.color_accuracy <= quality.digit_accuracy
    assert quality.frechet_distance > 0
    assert quality.frechet_floor > 0
    singles = evaluate_scenes(images[:2], ["a red two"] * 2, tmp_path, settings=TINY_READER)
    assert singles.position_accuracy is None
    assert singles.both_objects_accuracy is None


def test_floor_and_reference_share_captions_but_neither_grounds_nor_places() -> None:
    asked = [SceneDataset("train").scene(i).caption for i in range(100)]
    scenes = [parse_caption(caption) for caption in asked]
    train, heldout = (real_scenes(split, scenes, 150) for split in ("train", "heldout"))
    assert train.shape == heldout.shape == (200, 3, 32, 32)
    same_ground = (train[..., 0, 0] == heldout[..., 0, 0]).all(1).double().mean()
    assert same_ground < 0.4  # one in five by chance


def test_evaluate_scenes_refuses_bad_input() -> None:
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        evaluate_scenes(images, ["a red two"])
    with pytest.raises(ValueError, match="caption is 'a cat'"):
        evaluate_scenes(images, ["a red two", "a cat"])
    with pytest.raises(ValueError, match=r"expected \(n, 3, 32, 32\)"):
        evaluate_scenes(images[:, :1], ["a red two"] * 2)
    with pytest.raises(ValueError, match=r"dtype torch\.uint8"):
        evaluate_scenes(images.to(torch.uint8), ["a red two"] * 2)


def test_objects_of_one_scene_are_ordered_by_place() -> None:
    first, second = SceneObject(1, "red"), SceneObject(2, "blue")
    for relation, placed in (("left of", (first, second)), ("below", (second, first))):
        targets = scene_targets([Scene((first, second), relation)])
        assert targets.digits.tolist() == [[item.digit for item in placed]]
