"""What an analysis draws: every class alike, or captions in groups."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dit_models.analyze.collect import Subjects
from dit_models.data.scenes import parse_caption
from dit_models.drawing import Prompts, example_prompts
from dit_models.run_folder import LoadedRun

_EXAMPLE_CAPTIONS = 16
_Grouped = list[tuple[str, str]]  # (group, caption)


def choose_subjects(
    run: LoadedRun,
    labels: Sequence[int] | None,
    captions: Sequence[str] | None,
    captions_file: Path | None,
    images_per_class: int,
) -> Subjects:
    """The subjects of the command line, class after class in turn.

    Captions of a caption model that names none are the first of its data; those of digit scenes
    are counted together by their number of objects.

    Raises:
        ValueError: labels for a caption model or the reverse, a label out of range, or an empty
            or unreadable file.
    """
    if images_per_class < 1:
        raise ValueError(f"--images-per-class {images_per_class}; expected at least 1.")
    if captions and captions_file:
        raise ValueError("--captions and --captions-file are both given; use one of them.")
    num_classes = run.artist.model.backbone.config.num_classes
    if num_classes:
        if captions or captions_file:
            raise ValueError("this model reads labels; use --labels instead of captions.")
        return _classes(labels, num_classes, images_per_class)
    if labels:
        raise ValueError(f"--labels {list(labels)}: this model reads captions; use --captions.")
    if captions:
        grouped = [(caption, caption) for caption in captions]
    elif captions_file:
        grouped = read_captions(captions_file)
    else:
        examples = example_prompts(run.info, run.config.data, _EXAMPLE_CAPTIONS).captions
        assert examples is not None
        by_objects = run.info.name == "digit-scenes"
        grouped = [(_objects(each) if by_objects else each, each) for each in examples]
    return _captioned(grouped, images_per_class)


def read_captions(path: Path) -> _Grouped:
    """Lines of ``caption`` or ``group<TAB>caption``; empty lines are skipped.

    Raises:
        ValueError: when the file cannot be read as UTF-8 or holds no caption.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--captions-file {path}: {error}") from error
    grouped = []
    for line in filter(str.strip, lines):
        group, tab, caption = line.partition("\t")
        grouped.append((group, caption) if tab else (line, line))
    if not grouped:
        raise ValueError(f"--captions-file {path} holds no caption.")
    return grouped


def _classes(labels: Sequence[int] | None, num_classes: int, each: int) -> Subjects:
    chosen = list(dict.fromkeys(labels)) if labels else list(range(num_classes))
    if wrong := [label for label in chosen if not 0 <= label < num_classes]:
        raise ValueError(f"--labels {wrong}: expected 0 to {num_classes - 1}.")
    # In turn, so that the first images, which are shown, are of different classes.
    groups = list(range(len(chosen))) * each
    drawn = torch.tensor([chosen[group] for group in groups])
    return Subjects(Prompts(drawn, None), groups, [str(label) for label in chosen], "class")


def _captioned(grouped: _Grouped, each: int) -> Subjects:
    names = list(dict.fromkeys(group for group, _ in grouped))
    groups = [names.index(group) for group, _ in grouped] * each
    captions = [caption for _, caption in grouped] * each
    return Subjects(Prompts(None, captions), groups, names, "prompt")


def _objects(caption: str) -> str:
    count = len(parse_caption(caption).objects)
    return "1 object" if count == 1 else f"{count} objects"
