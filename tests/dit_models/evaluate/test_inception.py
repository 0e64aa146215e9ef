"""Inception figures: torch-fidelity's network and scores against formulae written here.

torchvision, which torch-fidelity imports for data sets and networks that nothing here uses, may be
absent or made for another torch: a few empty names take its place while it is imported.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit_models.evaluate import inception, reference
from dit_models.evaluate.adm import NpzImages
from dit_models.evaluate.inception import Inception, inception_score, precision_recall
from dit_models.evaluate.reference import FolderImages, Reference

from .cases import command

if importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("torch-fidelity is not installed", allow_module_level=True)


def _torchvision() -> dict[str, types.ModuleType]:
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    modules = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], name, type(name, (), {}))
    modules["torchvision"].datasets = modules["torchvision.datasets"]
    modules["torchvision"].transforms = modules["torchvision.transforms"]
    modules["torchvision.transforms"].functional = modules["torchvision.transforms.functional"]
    return modules


@pytest.fixture(scope="module", autouse=True)
def torch_fidelity() -> Iterator[types.ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        for name, module in _torchvision().items():
            patch.setitem(sys.modules, name, module)
        try:
            package = importlib.import_module("torch_fidelity")
        except ImportError as error:
            pytest.skip(f"torch-fidelity does not import: {error}")
    return package


@pytest.fixture(scope="module")
def weights(torch_fidelity, tmp_path_factory) -> Path:
    """Random weights in torch-fidelity's own file format."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *state: None)
        torch.save({}, path)
        network = module.FeatureExtractorInceptionV3("x", ["2048"], str(path))
        for name, parameter in network.named_parameters():
            if name.endswith("conv.weight"):  # so that 47 layers neither fade nor explode
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            elif name.endswith("bn.bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """(6, 12, 12, 3): three of one kind and three of another."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    pixels[3:] //= 3
    return pixels


@pytest.fixture(scope="module")
def network(weights) -> Inception:
    return Inception(weights)


@pytest.fixture(scope="module")
def features(network, pictures) -> inception.InceptionFeatures:
    return network.features(pictures)


def frechet(first: Tensor, second: Tensor) -> float:
    """The published formula, as it stands."""
    ours, theirs = first.double().numpy(), second.double().numpy()
    covariances = [np.cov(x, rowvar=False) for x in (ours, theirs)]
    # Tr (S1 S2)^1/2 is the sum of the roots of the eigenvalues.
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real
    difference = ours.mean(0) - theirs.mean(0)
    return float(difference @ difference + np.trace(sum(covariances)) - 2 * roots.sum())


# --- features


def test_features_are_those_of_the_published_layers(network, pictures, features):
    assert [tuple(value.shape) for value in features] == [(6, 2048), (6, 2023), (6, 1008)]
    layers = network._network
    seen: dict[str, Tensor] = {}
    names = ("Mixed_6c", "Mixed_6d.branch1x1.bn", "AvgPool")
    for name in names:
        layers.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.clone()})
        )
    layers(torch.from_numpy(pictures[:2]).permute(0, 3, 1, 2))
    # TensorFlow's "mixed_6/conv": 192 channels of 17 x 17, of which ADM keeps 7, channels last.
    branch = seen["Mixed_6d.branch1x1.bn"].relu()
    assert branch.shape == (2, 192, 17, 17)
    assert seen["Mixed_6c"].shape == (2, 768, 17, 17)
    spatial = features.spatial[:2].unflatten(1, (17, 17, 7))
    for channel in (0, 6):
        torch.testing.assert_close(spatial[..., channel], branch[:, channel])
    pool = seen["AvgPool"].flatten(1)
    torch.testing.assert_close(features.pool[:2], pool)
    torch.testing.assert_close(features.logits[:2], pool @ layers.fc.weight.T)
    assert features.pool.std(0).mean() > 1e-3  # images differ


def test_batches_do_not_change_features(network, pictures, features, tmp_path):
    np.savez(tmp_path / "x.npz", pictures[:3])
    told: list[int] = []
    again = network.features_of(NpzImages(tmp_path / "x.npz"), 2, told.append)
    assert told == [2, 1]
    for ours, expected in zip(again, features, strict=True):
        torch.testing.assert_close(ours, expected[:3])  # layers of other shapes: other rounding


def test_weights_come_as_safetensors_too_and_nothing_is_unpickled(weights, tmp_path):
    from safetensors.torch import save_file

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"x": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        Inception(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "weights.safetensors")
    network = Inception(tmp_path / "weights.safetensors")._network
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception weights"):
        Inception(tmp_path / "other.safetensors")


# --- scores


def test_our_distance_is_torch_fidelitys(features):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    from dit_models.quality import frechet_distance

    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    first = torch.randn(90, 20, generator=generator, dtype=torch.float64) @ mixing
    second = torch.randn(70, 20, generator=generator, dtype=torch.float64) + 1
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), False
    )["frechet_inception_distance"]
    assert frechet_distance(first, second) == pytest.approx(theirs, rel=1e-9)


def test_inception_score_is_the_mean_over_consecutive_splits():
    logits = 3 * torch.randn(23, 10, dtype=torch.float64)
    probabilities = logits.softmax(1).numpy()
    scores = []
    for start, end in ((0, 7), (7, 15), (15, 23)):
        part = probabilities[start:end]
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    got = inception_score(logits, 3)
    assert got["inception_score"] == pytest.approx(np.mean(scores), rel=1e-12)
    assert got["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-12)
    assert got["inception_score"] != pytest.approx(inception_score(logits, 1)["inception_score"])


def brute_force_precision(generated: Tensor, real: Tensor) -> float:
    inside = 0
    for image in generated.double():
        for center in real.double():
            to_others = sorted(float((center - other).norm()) for other in real.double())
            if float((image - center).norm()) <= to_others[3]:  # the first is itself
                inside += 1
                break
    return inside / len(generated)


def test_precision_and_recall_agree_with_counting(monkeypatch):
    monkeypatch.setattr(inception, "_ROWS_AT_A_TIME", 7)
    generated = 1.5 * torch.randn(30, 4)
    real = torch.randn(25, 4) + 0.5
    got = precision_recall(generated, real)
    assert got["precision"] == pytest.approx(brute_force_precision(generated, real), abs=1e-6)
    assert got["recall"] == pytest.approx(brute_force_precision(real, generated), abs=1e-6)
    assert 0.1 < got["precision"] < got["recall"] < 1.0
    assert precision_recall(real, real) == {"precision": 1.0, "recall": 1.0}
    with pytest.raises(ValueError, match="3 images against 25"):
        precision_recall(generated[:3], real)


# --- the command


@pytest.fixture
def narrow_features(features, monkeypatch) -> inception.InceptionFeatures:
    """The first 40 pool and 30 spatial features, in the place of the network's: distances of 2048
    features would take half a minute."""
    narrow = inception.InceptionFeatures(
        features.pool[:, :40], features.spatial[:, 1000:1030], features.logits
    )

    def features_of(self: Inception, images: Any, *rest: Any) -> inception.InceptionFeatures:
        chosen = slice(len(narrow.pool) - len(images), None)  # all six pictures, or the last ones
        return inception.InceptionFeatures(*(value[chosen] for value in narrow))

    monkeypatch.setattr(Inception, "features_of", features_of)
    monkeypatch.setattr(reference, "POOL_SIZE", 40)
    monkeypatch.setattr(reference, "SPATIAL_SIZE", 30)
    return narrow


def test_figures_of_a_file_against_an_adm_reference(
    weights, pictures, narrow_features, tmp_path, capsys
):
    pool, spatial, logits = narrow_features
    np.savez(tmp_path / "samples.npz", pictures)
    moments = {"mu": pool.double().mean(0), "sigma": pool.double().T.cov(),
               "mu_s": spatial.double().mean(0), "sigma_s": spatial.double().T.cov()}  # fmt: skip
    np.savez(tmp_path / "reference.npz", **{name: value.numpy() for name, value in moments.items()})
    words = (tmp_path / "samples.npz", "--inception", weights, "--json", tmp_path / "f.json")
    assert command(*words, "--reference", tmp_path / "reference.npz") == 0
    (entry,) = json.loads((tmp_path / "f.json").read_text())["measurements"]
    figures = entry["figures"]
    assert 0 <= figures["fid"] < 1e-9 * float(moments["sigma"].trace())
    assert 0 <= figures["sfid"] < 1e-9 * float(moments["sigma_s"].trace())
    assert figures["inception_score"] == inception_score(logits, 1)["inception_score"]
    assert "precision" not in figures  # needs the images of the reference
    assert entry["settings"]["reference_moments"] == "given"
    assert entry["settings"]["torch_fidelity"] == sys.modules["torch_fidelity"].__version__
    assert "inception_score" in capsys.readouterr().out

    # Another reference is another measurement; the first stays.
    folder = tmp_path / "real"
    (folder / "a").mkdir(parents=True)
    for number, image in enumerate(pictures[2:]):
        Image.fromarray(image).save(folder / "a" / f"{number}.png")
    assert command(*words, "--reference", folder) == 0
    first, second = json.loads((tmp_path / "f.json").read_text())["measurements"]
    assert first == entry
    assert second["figures"]["fid"] == pytest.approx(frechet(pool, pool[2:]), rel=1e-6)
    assert second["figures"]["sfid"] == pytest.approx(frechet(spatial, spatial[2:]), rel=1e-6)
    assert second["figures"]["recall"] == 1.0
    assert second["settings"]["reference_images"] == 4


def test_inception_score_of_a_file_through_the_network(
    weights, pictures, features, tmp_path, capsys
):
    np.savez(tmp_path / "samples.npz", pictures[:3])
    words = ("--figure-batch-size", 2, "--json", tmp_path / "f.json")
    assert command(tmp_path / "samples.npz", "--inception", weights, *words) == 0
    (entry,) = json.loads((tmp_path / "f.json").read_text())["measurements"]
    expected = inception_score(features.logits[:3], 1)["inception_score"]
    assert entry["figures"]["inception_score"] == pytest.approx(expected, rel=1e-4)
    assert "fid" not in entry["figures"]


def test_without_torchvision_the_error_says_so(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"torch-fidelity .* imports torchvision"):
        inception.fidelity_module("torch_fidelity.metric_isc")


def test_old_releases_are_refused(torch_fidelity, monkeypatch):
    monkeypatch.setattr(torch_fidelity, "__version__", "0.3.0")
    with pytest.raises(ImportError, match=r"0\.4 or newer is needed"):
        inception.fidelity_module("torch_fidelity.metric_isc")


# --- references


def test_references_are_checked(tmp_path, pictures):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="expected mu and sigma, or arr_0"):
        Reference(tmp_path / "other.npz", (12, 12))
    np.savez(tmp_path / "images.npz", pictures)
    with pytest.raises(ValueError, match=r"are \(12, 12\), the samples \(16, 16\)"):
        Reference(tmp_path / "images.npz", (16, 16))
    assert Reference(tmp_path / "images.npz", (12, 12)).pool is None
    np.savez(tmp_path / "short.npz", mu=np.zeros(64), sigma=np.zeros((64, 64)))
    with pytest.raises(ValueError, match=r"expected \(2048,\)"):
        Reference(tmp_path / "short.npz", (12, 12))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        Reference(tmp_path / "text.npz", (12, 12))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        Reference(tmp_path / "empty", (12, 12))


def test_a_folder_is_read_in_order_cut_and_resized(tmp_path):
    for number in range(5):
        pixels = np.full((8, 40, 3), 40 * number, np.uint8)
        pixels[:, :8] = 255  # far from the central square
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    batches = list(FolderImages(tmp_path, 4).batches(2))
    assert [batch.shape for batch in batches] == [(2, 4, 4, 3), (2, 4, 4, 3), (1, 4, 4, 3)]
    together = np.concatenate(batches)
    assert all((together[number] == 40 * number).all() for number in range(5))
