"""What the command does with its words: a sweep, a file of samples, GenEval's folders."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from dit_models.assemble import pick_device
from dit_models.atomic import sha256_of, write_text
from dit_models.data import BUILTIN_DATASETS
from dit_models.drawing import Prompts
from dit_models.evaluate.adm import NpzImages
from dit_models.evaluate.draw import Store, draw_missing
from dit_models.evaluate.figures import classifier_figures, clip_figures, inception_figures
from dit_models.evaluate.folder import SAMPLES_NAME, NpzChunks, folder_lock, open_folder
from dit_models.evaluate.geneval import PromptFolders, read_metadata
from dit_models.evaluate.plan import (
    choose_prompts,
    images_depend_on_batch,
    job_settings,
    read_prompts,
)
from dit_models.evaluate.processes import Group, device_for, parent_is_gone
from dit_models.evaluate.report import (
    FIGURES_NAME,
    measurement,
    print_measurements,
    save_measurements,
)
from dit_models.evaluate.sweep import evaluate, figures_line, why_not_evaluated
from dit_models.extras import require
from dit_models.interrupt import StopRequest
from dit_models.run_folder import LoadedRun, load_run
from dit_models.vae import VAE

PROMPTS_NAME = "prompts.json"


def progress_bar(what: str, count: int) -> Callable[[int], None]:
    """A function that moves a progress bar of ``count`` images."""
    bar = require("tqdm.auto", extra="train").tqdm(total=count, desc=what, unit="image")

    def move(images: int) -> None:
        bar.update(images)
        if bar.n >= count:
            bar.close()

    return move


def sweep_job(options: argparse.Namespace) -> int:
    """The guidance sweep of a run on embedded data."""
    loaded = load_run(options.folder, options.device)
    config = replace(
        loaded.config.evaluation,
        num_samples=options.samples or loaded.config.evaluation.num_samples,
        guidance_scales=options.guidance or loaded.config.evaluation.guidance_scales,
        batch_size=_batch_size(options, loaded),
    )
    if options.json is not None and options.json.exists():
        raise ValueError(f"--json {options.json} exists; choose another file.")
    figures = evaluate(loaded.artist, loaded.config.data.name, config)
    print(f"best: {figures_line(figures).strip()}")
    if options.json is not None:
        write_text(options.json, json.dumps({"step": loaded.step, **figures}, indent=2) + "\n")
    return 0


def file_job(options: argparse.Namespace) -> int:
    """The figures of an ``.npz`` of samples, without a model."""
    samples = NpzImages(options.folder)
    captions = None if options.prompts is None else read_prompts(options.prompts)
    if captions is not None:
        captions = [captions[i % len(captions)] for i in range(len(samples))]
    entries = _network_figures(options, samples, captions, str(pick_device(options.device)))
    if not entries:
        raise ValueError("nothing to compute: give --inception and --reference, or --clip.")
    print_measurements(entries)
    if options.json is not None:
        identity = {"file": options.folder.name, "sha256": sha256_of(options.folder)}
        save_measurements(options.json, identity, entries)
    return 0


def samples_job(options: argparse.Namespace, group: Group) -> int:
    """Draw ``samples.npz`` in the folder, then measure it."""
    loaded, batch_size, vae = _load(options, group)
    captions = None if options.prompts is None else read_prompts(options.prompts)
    count = options.samples or (len(captions) if captions else 0)
    prompts = choose_prompts(loaded, options.labels, captions, count)
    store = NpzChunks(options.out, count, options.chunk)
    settings = {"kind": "samples", "chunk": options.chunk, "vae": vae}
    with ExitStack() as held:
        saved = _prepare(options, loaded, prompts, settings, batch_size, group, held)
        if status := _draw(options, loaded, prompts, store, batch_size, group):
            return status
        if group.rank == 0:
            labels = None if prompts.labels is None else prompts.labels.numpy()
            store.assemble(labels)
            path = options.out / SAMPLES_NAME
            print(f"{count} images: {path}")
            _measure(options, loaded, prompts, saved, NpzImages(path))
    return 0


def geneval_job(options: argparse.Namespace, group: Group) -> int:
    """Draw the images of GenEval's prompts into its folders."""
    loaded, batch_size, vae = _load(options, group)
    if loaded.artist.model.backbone.config.num_classes:
        raise ValueError("--geneval: this model reads class labels; give one that reads captions.")
    lines, captions = read_metadata(options.geneval)
    each = options.images_per_prompt
    if each < 1:
        raise ValueError(f"--images-per-prompt {each}; expected at least 1.")
    repeated = [caption for caption in captions for _ in range(each)]
    prompts = choose_prompts(loaded, None, repeated, len(repeated))
    store = PromptFolders(options.out, lines, each, max(1, batch_size // each))
    with ExitStack() as held:
        settings = {"kind": "geneval", "images_per_prompt": each, "vae": vae,
                    "metadata_sha256": sha256_of(options.geneval)}  # fmt: skip
        _prepare(options, loaded, prompts, settings, batch_size, group, held)
        if status := _draw(options, loaded, prompts, store, batch_size, group):
            return status
    if group.rank == 0:
        print(f"{len(lines)} prompts, {len(repeated)} images: {options.out}")
    return 0


def _load(options: argparse.Namespace, group: Group) -> tuple[LoadedRun, int, str | None]:
    """The model, the batch size, and the SHA-256 of its VAE (None for a model of pixels)."""
    loaded = load_run(options.folder, device_for(options.device, group.rank))
    changes = {
        "sampler": options.sampler,
        "num_steps": options.steps,
        "guidance_scale": options.guidance[0] if options.guidance else None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    artist = replace(loaded.artist, sampling=replace(loaded.artist.sampling, **given))
    identity = None if loaded.info.vae is None else str(loaded.info.vae["identity"])
    if options.vae is not None:
        vae = VAE(options.vae, artist.device)
        artist, identity = replace(artist, decode=vae.decode), vae.info.identity
    if artist.decode is None and artist.image_shape[0] not in (1, 3):
        raise ValueError(
            f"this model draws latents of {artist.image_shape[0]} channels; give the folder of "
            "their VAE with --vae."
        )
    if group.rank == 0 and images_depend_on_batch(artist.model.backbone.config):
        print(
            "warning: images of a batch compete for the experts of this model, so that an image "
            "depends on those drawn with it: keep --batch-size to get the same images again.",
            file=sys.stderr,
        )
    return replace(loaded, artist=artist), _batch_size(options, loaded), identity


def _batch_size(options: argparse.Namespace, loaded: LoadedRun) -> int:
    if options.batch_size is None:
        return loaded.config.evaluation.batch_size
    return int(options.batch_size)


def _prepare(
    options: argparse.Namespace,
    loaded: LoadedRun,
    prompts: Prompts,
    extra: dict[str, Any],
    batch_size: int,
    group: Group,
    held: ExitStack,
) -> dict[str, Any]:
    """Process 0 takes the folder and checks its settings; returns them there, else nothing."""
    settings: dict[str, Any] = {}

    def prepare() -> None:
        if options.clip is not None and prompts.captions is None:
            raise ValueError("--clip: this model draws labels; a CLIP score needs captions.")
        settings.update(
            job_settings(
                loaded,
                prompts,
                first_seed=options.first_seed,
                batch_size=batch_size,
                **extra,
            )
        )
        held.enter_context(folder_lock(options.out))
        open_folder(options.out, settings)
        if prompts.captions is not None:
            text = json.dumps(prompts.captions, indent=0, ensure_ascii=False) + "\n"
            write_text(options.out / PROMPTS_NAME, text)

    group.lead(prepare)
    return settings


def _draw(
    options: argparse.Namespace,
    loaded: LoadedRun,
    prompts: Prompts,
    store: Store,
    batch_size: int,
    group: Group,
) -> int:
    """Draw what is missing; 0, or 128 + the signal's number when it was asked to stop."""
    mine = sum(map(len, store.pieces[group.rank :: group.size]))
    progress = progress_bar("drawing", mine) if group.rank == 0 and mine else lambda count: None
    with StopRequest() as stop:
        draw_missing(
            loaded.artist,
            prompts,
            store,
            first_seed=options.first_seed,
            batch_size=batch_size,
            group=group,
            stopped=lambda: stop.signal_number is not None or parent_is_gone(),
            progress=progress,
        )
        number = group.largest(stop.signal_number or 0)
    if number and group.rank == 0:
        print("\nstopped; the same command draws what is missing.", file=sys.stderr)
    return 128 + number if number else 0


def _measure(
    options: argparse.Namespace,
    loaded: LoadedRun,
    prompts: Prompts,
    settings: dict[str, Any],
    samples: NpzImages,
) -> None:
    name = loaded.config.data.name
    entries = []
    if name in BUILTIN_DATASETS and len(samples) > 1:
        channels, _, side = loaded.artist.image_shape
        if why_not_evaluated(name, side) is None:
            try:
                found = classifier_figures(samples, prompts, name, channels)
                entries.append(measurement("classifier", *found))
            except ValueError as error:  # prompts of the user's own that its classifier cannot read
                print(f"no classifier figures: {error}")
    entries += _network_figures(options, samples, prompts.captions, str(loaded.artist.device))
    path = options.out / FIGURES_NAME
    save_measurements(path, settings, entries)
    print_measurements(entries)
    print(f"all figures: {path}")


def _network_figures(
    options: argparse.Namespace, samples: NpzImages, captions: list[str] | None, device: str
) -> list[dict[str, Any]]:
    words = {"device": device, "batch_size": options.figure_batch_size, "progress": progress_bar}
    entries = []
    if options.inception is not None:
        found = inception_figures(samples, options.inception, options.reference, **words)
        entries.append(measurement("inception", *found, device))
    if options.clip is not None:
        found = clip_figures(samples, captions, options.clip, **words)
        entries.append(measurement("clip", *found, device))
    return entries
