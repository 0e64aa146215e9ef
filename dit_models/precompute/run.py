"""Plan the shards, make those that are missing in one or several processes, write the manifest."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_models.assemble import pick_device
from dit_models.data.latents import FORMAT, FORMAT_VERSION, NULL_TEXT_NAME, read_manifest
from dit_models.extras import require
from dit_models.precompute.encode import Encoder
from dit_models.precompute.folder import (
    finish,
    finished_note,
    folder_lock,
    is_finished,
    prepare,
    shard_name,
    write_shard,
)
from dit_models.precompute.settings import Settings
from dit_models.precompute.sources import Source, open_source
from dit_models.text import EncoderSpec, FrozenEncoder, describe_encoder
from dit_models.vae import VAE, VAEInfo, describe_vae


@dataclass(frozen=True)
class _Plan:
    """All that a process needs; small enough to be sent to it."""

    settings: Settings
    source: Source
    vae: VAEInfo | None
    text: EncoderSpec | None

    def indices(self, shard: int) -> range:
        """Samples of a shard."""
        size = self.settings.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.source.dataset)))

    @property
    def shards(self) -> int:
        return -(-len(self.source.dataset) // self.settings.shard_size)

    def bound(self) -> dict[str, Any]:
        """Everything that the shards depend on, by content and not by path."""
        settings = self.settings
        return {
            "source": self.source.fingerprint,
            "samples": len(self.source.dataset),
            "split": settings.split,
            "image_size": self.source.dataset.info.image_size,
            "conditions": "labels" if self.source.dataset.info.num_classes else "captions",
            "flip": settings.flip,
            "vae": None if self.vae is None else self.vae.identity,
            "vae_dtype": settings.vae_dtype,
            "latents": settings.latents if self.vae is not None else "pixels",
            "dtype": settings.dtype,
            "text": None if self.text is None else self.text.features_key,
            "shard_size": settings.shard_size,
            "seed": settings.seed,
            "skip_broken": settings.skip_broken,
        }


def precompute(settings: Settings) -> dict[str, Any]:
    """Fill ``settings.out``; a second call goes on where a first one was cut off.

    Returns:
        the manifest.

    Raises:
        ValueError: a source, model or setting that does not do, or a folder with other ones.
    """
    settings.validate()
    source = open_source(settings)
    text = None
    if settings.text != "none":
        if not source.dataset.info.has_captions:
            raise ValueError(f"--text {settings.text}: {settings.source} has no captions.")
        text = describe_encoder(
            settings.text,
            revision=settings.text_revision,
            max_length=settings.text_length,
            layer=settings.text_layer,
            dtype=settings.text_dtype,
        )
    vae = None
    if settings.vae != "none":
        vae = describe_vae(settings.vae)
        if source.dataset.info.image_size % vae.downscale:
            raise ValueError(
                f"--image-size {source.dataset.info.image_size} is no multiple of the VAE's "
                f"{vae.downscale}."
            )
    plan = _Plan(settings, source, vae, text)
    settings.out.mkdir(parents=True, exist_ok=True)
    with folder_lock(settings.out):
        prepare(settings.out, plan.bound())
        if is_finished(settings.out):
            print(f"{settings.out} is complete; nothing is encoded again.")
        else:
            _fill(plan)
            finish(settings.out, _manifest(plan))
    return read_manifest(settings.out)


def _fill(plan: _Plan) -> None:
    out = plan.settings.out
    missing = [n for n in range(plan.shards) if finished_note(out, shard_name(n)) is None]
    done = sum(len(plan.indices(n)) for n in range(plan.shards) if n not in set(missing))
    if done:
        print(
            f"Going on with {out}: {plan.shards - len(missing)} of {plan.shards} shards are done."
        )
    bar = require("tqdm.auto", extra="train").tqdm(
        total=len(plan.source.dataset), initial=done, desc="encoding", unit="image",
        dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        count = min(plan.settings.processes, len(missing))
        if count > 1:
            _in_processes(plan, missing, count, bar)
        else:
            _make_shards(plan, missing, 0, bar.update)


def _make_shards(
    plan: _Plan, shards: list[int], process: int, progress: Callable[[int], None]
) -> None:
    """Make these shards; process 0 also writes the null caption's features."""
    settings = plan.settings
    device = _device_of(settings.device, process)
    vae = VAE(settings.vae, device, settings.vae_dtype) if plan.vae is not None else None
    text = FrozenEncoder(plan.text) if plan.text is not None else None
    encoder = Encoder(settings, plan.source.dataset, vae, text, device)
    if text is not None and process == 0 and finished_note(settings.out, NULL_TEXT_NAME) is None:
        write_shard(settings.out, NULL_TEXT_NAME, {"text": encoder.null_text()}, {})
    for shard in shards:
        tensors, skipped = encoder.shard(plan.indices(shard), progress)
        count = len(plan.indices(shard)) - len(skipped)
        longest = _longest_caption(tensors)
        note = {"count": count, "skipped": skipped, "longest_caption": longest}
        write_shard(settings.out, shard_name(shard), tensors, note)


def _longest_caption(tensors: dict[str, torch.Tensor]) -> str:
    if "captions" not in tensors or len(tensors["captions_offsets"]) < 2:
        return ""
    offsets = tensors["captions_offsets"]
    row = int((offsets[1:] - offsets[:-1]).argmax())
    return bytes(tensors["captions"][offsets[row] : offsets[row + 1]].tolist()).decode()


def _device_of(name: str, process: int) -> torch.device:
    """The device of a process: with ``auto``, the GPUs in turn."""
    device = pick_device(name)
    if name == "auto" and device.type == "cuda":
        return torch.device("cuda", process % torch.cuda.device_count())
    return device


def _manifest(plan: _Plan) -> dict[str, Any]:
    out, info = plan.settings.out, plan.source.dataset.info
    shards = [finished_note(out, shard_name(number)) for number in range(plan.shards)]
    kept = [shard for shard in shards if shard is not None]
    assert len(kept) == plan.shards
    samples = sum(shard["count"] for shard in kept)
    if not samples:
        raise ValueError(
            f"no sample of {plan.settings.source} can be read: {kept[0]['skipped'][0]}"
        )
    size, channels = info.image_size, info.channels
    if plan.vae is not None:
        size, channels = size // plan.vae.downscale, plan.vae.latent_channels
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "settings": plan.bound(),
        "source": {"kind": plan.source.kind, "path": plan.settings.source},
        "info": {
            "name": info.name,
            "image_size": size,
            "channels": channels,
            "num_classes": info.num_classes,
            "has_captions": info.has_captions,
        },
        "class_names": plan.source.class_names,
        "vae": None if plan.vae is None else asdict(plan.vae),
        "text": None if plan.text is None else asdict(plan.text),
        "null_text": finished_note(out, NULL_TEXT_NAME) if plan.text is not None else None,
        "longest_caption": max((shard["longest_caption"] for shard in kept), key=_byte_length),
        "samples": samples,
        "shards": kept,
    }


def _byte_length(text: str) -> int:
    return len(text.encode())


def _in_processes(plan: _Plan, shards: list[int], count: int, bar: Any) -> None:
    """Deal the shards to ``count`` processes and wait for all of them.

    Raises:
        ValueError: what the first process that failed says.
    """
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    errors = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // count)
    processes = [
        context.Process(
            target=_process, args=(plan, shards[k::count], k, threads, done, errors, os.getpid())
        )
        for k in range(count)
    ]
    try:
        for process in processes:
            process.start()
        running = True
        while running:
            time.sleep(0.1)
            alive = [process.is_alive() for process in processes]
            running = any(alive) and not any(process.exitcode for process in processes)
            if new := done.value - (bar.n - bar.initial):
                bar.update(new)
        if not errors.empty():
            raise ValueError(errors.get())
        if failed := [p.exitcode for p in processes if p.exitcode]:
            raise ValueError(
                f"a process ended with status {failed[0]}; what it finished is kept. The same "
                "command goes on from there."
            )
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join()


def _process(
    plan: _Plan, shards: list[int], number: int, threads: int, done: Any, errors: Any, parent: int
) -> None:
    """A process's whole life. It ends when its parent does, so that none is left behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and terminates it
    torch.set_num_threads(threads)

    def progress(count: int) -> None:
        with done.get_lock():
            done.value += count
        if os.getppid() != parent:
            os._exit(1)

    try:
        _make_shards(plan, shards, number, progress)
    except (ValueError, OSError, ImportError) as error:
        errors.put(str(error))
        sys.exit(1)
