"""What is drawn: prompts, seeds, and the settings that a folder of images is bound to."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_models.data import BUILTIN_DATASETS
from dit_models.drawing import Prompts, example_prompts
from dit_models.model_config import ModelConfig
from dit_models.run_folder import LoadedRun


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without empty ones.

    Raises:
        ValueError: a file that cannot be read, or without a line.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path} cannot be read: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"--prompts {path} holds no line; expected a caption a line.")
    return prompts


def choose_prompts(
    run: LoadedRun, labels: Sequence[int] | None, captions: Sequence[str] | None, count: int
) -> Prompts:
    """One prompt for each image: those given in turn, else classes in turn or held-out captions.

    Raises:
        ValueError: labels for a caption model or the reverse, a label out of range, or captions of
            a data set that is not there.
    """
    num_classes = run.artist.model.backbone.config.num_classes
    if labels and not num_classes:
        raise ValueError(f"--labels {list(labels)}: this model has no classes; use --prompts.")
    if captions and num_classes:
        raise ValueError("--prompts: this model reads class labels; use --labels.")
    if labels:
        if wrong := [label for label in labels if not 0 <= label < num_classes]:
            raise ValueError(f"--labels {wrong}: expected 0 to {num_classes - 1}.")
        return Prompts(torch.tensor([labels[i % len(labels)] for i in range(count)]), None)
    if captions:
        return Prompts(None, [captions[i % len(captions)] for i in range(count)])
    try:
        return example_prompts(run.info, run.config.data, count)
    except ValueError as error:
        raise ValueError(
            f"there are no captions to draw ({error}): give --prompts FILE."
        ) from error


def images_depend_on_batch(config: ModelConfig) -> bool:
    """Whether tokens of several images compete for an expert when images are drawn."""
    if config.family == "dit":
        return False
    # DiffMoE and Expert Race pool the batch in training, and in drawing only by this option.
    inference = getattr(config.own_routing_options, "inference", None)
    if inference is not None:
        return bool(inference == "batch_topk")
    return config.routing_idea.pools_images(config)


def job_settings(
    run: LoadedRun,
    prompts: Prompts,
    *,
    kind: str,
    first_seed: int,
    batch_size: int,
    **others: Any,
) -> dict[str, Any]:
    """All that decides the images of a folder, as plain data.

    The number of processes, the device and (but where images share their experts) the batch size
    change images by rounding only, so they may differ from one run of the command to the next; but
    for the precision, which "auto" takes from the device.

    Raises:
        ValueError: no images, a seed out of range, or a batch size below 1.
    """
    artist = run.artist
    count = len(prompts)
    if count < 1:
        raise ValueError(f"--samples {count}; expected at least 1.")
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}; expected at least 1.")
    if not 0 <= first_seed <= 2**32 - count:
        raise ValueError(
            f"--first-seed {first_seed} with {count} images; expected 0 to {2**32 - count}."
        )
    sampling = asdict(artist.sampling)
    sampling.pop("grid_images", None)
    shape = artist.model.backbone.config.to_dict()
    settings = {
        "format": 1,
        "kind": kind,
        "num_samples": count,
        "first_seed": first_seed,
        "prompts_sha256": _sha256_of_prompts(prompts),
        "data": run.config.data.name if run.config.data.name in BUILTIN_DATASETS else run.info.name,
        "model": run.config.model,
        "step": run.step,
        "weights_sha256": sha256_of_weights(artist.model),
        "objective": asdict(run.config.objective),
        "precision": "bf16" if isinstance(artist.autocast(), torch.autocast) else "fp32",
        "image_shape": list(artist.image_shape),
        # The same weights draw other images with another capacity, or another null caption.
        **{f"model.{name}": value for name, value in shape.items()},
        **{f"sampling.{name}": value for name, value in sampling.items()},
        **others,
    }
    if prompts.captions is not None:
        text = asdict(run.config.text)
        for where in ("encoder", "revision", "cache"):  # what it is counts among the weights
            del text[where]
        settings.update({f"text.{name}": value for name, value in text.items()})
    if images_depend_on_batch(artist.model.backbone.config):
        settings["batch_size"] = batch_size
    return settings


def sha256_of_weights(module: nn.Module) -> str:
    """Hex digest of a module's names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().contiguous().cpu().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256_of_prompts(prompts: Prompts) -> str:
    if prompts.labels is not None:
        text = "\n".join(map(str, prompts.labels.tolist()))
    else:
        text = repr(prompts.captions)
    return hashlib.sha256(text.encode()).hexdigest()
