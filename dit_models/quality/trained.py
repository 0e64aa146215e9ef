"""Small networks that are trained once, reproducibly, and kept on disk."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dit_models.atomic import write_bytes
from dit_models.extras import require

NetworkT = TypeVar("NetworkT", bound=nn.Module)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Train in here whatever the caller is doing: under no_grad, inference_mode or autocast.

    The CPU generator starts at ``seed`` and is put back afterwards. GPU generators are not
    touched, which is why this does not call ``torch.manual_seed``. One thread, so that the weights
    do not depend on the thread count; on networks this small more threads gain little.
    """
    threads = torch.get_num_threads()
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.set_num_threads(1)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def load_or_train(
    build: Callable[[], NetworkT],
    train: Callable[[NetworkT], dict[str, float]],
    *,
    name: str,
    settings: Any,
    seed: int,
    cache_dir: str | Path | None,
) -> tuple[NetworkT, dict[str, float]]:
    """A trained network in eval mode with its accuracies, from the cache where it has one.

    Args:
        build: makes the untrained network; its initialisation may draw random numbers.
        train: trains it in place and returns its accuracies.
        name: start of the file's name.
        settings: dataclass; with ``seed`` it decides which file holds the network.
        cache_dir: folder of the files, made when missing; None trains every time.

    Warns:
        UserWarning: one line where a cached file is damaged, which is then replaced.
    """
    path = None
    if cache_dir is not None:
        key = json.dumps([asdict(settings), seed], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        path = Path(cache_dir) / f"{name}-{digest}.safetensors"
    with isolated(seed):
        network = build()
        if path is not None and path.is_file():
            try:
                return network.eval(), _load(network, path)
            except Exception as error:  # whatever is wrong with the file, the cure is the same
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                warnings.warn(f"training anew: {path} is damaged ({reason})", stacklevel=3)
                torch.default_generator.manual_seed(seed)
                network = build()
        accuracies = train(network)
        if path is not None:
            _save(network, accuracies, path)
    return network.eval(), accuracies


def _load(network: nn.Module, path: Path) -> dict[str, float]:
    """Read weights and accuracies; raise where the file is not exactly what was written."""
    with require("safetensors", extra="train").safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if metadata.get("sha256") != _checksum(state):
        raise ValueError("checksum differs")
    network.load_state_dict(state)
    accuracies: dict[str, float] = json.loads(metadata["accuracies"])
    return accuracies


def _save(network: nn.Module, accuracies: dict[str, float], path: Path) -> None:
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    metadata = {"accuracies": json.dumps(accuracies), "sha256": _checksum(state)}
    write_bytes(path, require("safetensors.torch", extra="train").save(state, metadata))


def _checksum(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_images(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Generated images as float32 on the CPU.

    Raises:
        ValueError: not (n, *shape) floats with n >= 2, or a NaN or infinity among them.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or len(images) < 2:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; expected (n, {', '.join(map(str, shape))}) "
            "with n >= 2"
        )
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}; expected floats in [-1, 1]")
    if not bool(images.isfinite().all()):
        raise ValueError("images holds NaN or infinity; look at the sampler or the training run")
    return images.detach().to("cpu", torch.float32)


def in_chunks(function: Callable[[Tensor], Tensor], images: Tensor, size: int = 500) -> Tensor:
    """``function`` of all images, computed on ``size`` of them at a time to bound memory."""
    return torch.cat([function(chunk) for chunk in images.split(size)])
