"""torch-fidelity's Inception network and scores, from weights on the user's disk."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_models.extras import require

POOL_SIZE, NUM_LOGITS = 2048, 1008
# ADM's sFID reads "mixed_6/conv": the first branch of the fourth 17x17 block, after its ReLU.
_SPATIAL_MODULE, SPATIAL_CHANNELS, SPATIAL_SIZE = "Mixed_6d.branch1x1", 7, 7 * 17 * 17
NEIGHBOURS = 3
# Images of one split of the inception score in ADM's evaluator: 10 splits of 50,000.
SPLIT_SIZE = 5000
_ROWS_AT_A_TIME = 1000


class InceptionFeatures(NamedTuple):
    """Features of n images, float32 on the CPU.

    Attributes:
        pool: (n, 2048), for FID, precision and recall.
        spatial: (n, 2023), for sFID: (row, column, channel) of 17x17 positions and 7 channels.
        logits: (n, 1008), for the inception score: the last matrix without its bias.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


def fidelity_module(name: str) -> ModuleType:
    """Import ``torch_fidelity`` or a module of it.

    Raises:
        ImportError: torch-fidelity, or the torchvision that it imports, is missing or does not fit.
    """
    advice = (
        "torch-fidelity (0.4 or newer) imports torchvision, and that must be the release made for "
        f"torch {torch.__version__.split('+')[0]}; pip install torch-fidelity torchvision in an "
        "environment where that exists."
    )
    try:
        module = require(name, extra="eval")
        package = require("torch_fidelity", extra="eval")
    except ImportError as error:
        raise ImportError(f"{error}. {advice}") from error
    except RuntimeError as error:  # what a torchvision of another torch raises
        raise ImportError(f"{name} cannot be imported ({error}). {advice}") from error
    version = tuple(int(part) for part in package.__version__.split(".")[:2])
    if version < (0, 4):
        raise ImportError(
            f"torch-fidelity is {package.__version__}; 0.4 or newer is needed: earlier releases "
            "took precision for recall."
        )
    return module


class Inception:
    """The Inception-v3 of 2015-12-05 as torch-fidelity has it, nothing is ever downloaded.

    Its input is resized to 299 pixels by TensorFlow 1's bilinear rule, inside the network.

    Args:
        weights: path of torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``, or of the
            same tensors as safetensors.
        device: where it runs.

    Raises:
        ValueError: the file is missing, or is not that network's.
        ImportError: torch-fidelity or its torchvision is missing.
    """

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        network_class = fidelity_module(
            "torch_fidelity.feature_extractor_inceptionv3"
        ).FeatureExtractorInceptionV3
        state = _read_weights(weights)
        # It unpickles the file that it is given, whatever that holds: it is given one that holds
        # the tensors found here, and nothing else.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "inception.pth"
            torch.save(state, copy)
            try:
                network = network_class(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(copy),
                )
            except (RuntimeError, TypeError, AttributeError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{weights} does not hold torch-fidelity's Inception weights ({reason})."
                ) from error
        self.device = torch.device(device)
        self._network = network.to(self.device)
        self._spatial: list[Tensor] = []
        module = self._network.get_submodule(_SPATIAL_MODULE)
        module.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: Any, inputs: Any, output: Tensor) -> None:
        # As in TensorFlow's order of dimensions, so that statistics made there fit.
        chosen = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        self._spatial.append(chosen.flatten(1).float().cpu())

    @torch.inference_mode()
    def features(self, pixels: np.ndarray) -> InceptionFeatures:
        """Features of (n, H, W, 3) uint8 images."""
        images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).to(self.device)
        self._spatial.clear()
        pool, logits = self._network(images)
        (spatial,) = self._spatial
        return InceptionFeatures(pool.cpu(), spatial, logits.cpu())

    def features_of(
        self, images: Any, batch_size: int, progress: Callable[[int], None] = lambda count: None
    ) -> InceptionFeatures:
        """Features of all images of a source with ``batches(batch_size)``."""
        parts = []
        for pixels in images.batches(batch_size):
            parts.append(self.features(pixels))
            progress(len(pixels))
        return InceptionFeatures(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state = require("safetensors.torch", extra="train").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, safetensors: each has its own
        raise ValueError(
            f"--inception {path} cannot be read ({str(error).splitlines()[0]}); expected "
            "torch-fidelity's weights-inception-2015-12-05-6726825d.pth, from its releases page."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"--inception {path} is not a dictionary of tensors.")
    return state


def inception_score(logits: Tensor, splits: int) -> dict[str, float]:
    """exp(mean KL(p(y|x) || p(y))) of each split, by torch-fidelity, images in their order.

    Args:
        logits: (n, 1008).
        splits: consecutive parts of equal size; the score is their mean.

    Returns:
        ``inception_score`` and ``inception_score_std`` (over the splits; 0 for one).

    Source: Salimans et al. (arXiv 1606.03498).
    """
    scores = fidelity_module("torch_fidelity.metric_isc").isc_features_to_metric(
        logits, splits=splits, shuffle=False
    )
    return {
        "inception_score": scores["inception_score_mean"],
        "inception_score_std": scores["inception_score_std"],
    }


def precision_recall(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Improved precision and recall with 3 neighbours, by torch-fidelity.

    Precision is the share of generated images within the distance of some real image to its third
    nearest real neighbour; recall is the same with the roles exchanged.

    Args:
        generated, real: (n, d) and (m, d) features, at least 4 each.

    Raises:
        ValueError: fewer images.

    Source: Kynkäänniemi et al. (arXiv 1904.06991); ADM's evaluator has 3 neighbours in the pool
        features, as here.
    """
    least = NEIGHBOURS + 1
    if len(generated) < least or len(real) < least:
        raise ValueError(
            f"precision and recall of {len(generated)} images against {len(real)}; expected at "
            f"least {least} each."
        )
    # 50,000 x 50,000 distances would be 10 GB: a part at a time.
    scores = fidelity_module("torch_fidelity.metric_prc").prc_features_to_metric(
        generated, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=_ROWS_AT_A_TIME,
        save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    return {"precision": scores["precision"], "recall": scores["recall"]}
