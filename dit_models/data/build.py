"""A data set from its name or its folder."""

from pathlib import Path

from dit_models.data.base import ImageDataset
from dit_models.data.digits import DigitDataset
from dit_models.data.folders import (
    METADATA_NAME,
    CaptionFolderDataset,
    ClassFolderDataset,
    split_folder,
)
from dit_models.data.latents import LatentDataset, is_latents_folder
from dit_models.data.scenes import SceneDataset

BUILTIN_DATASETS = ("digits", "digit-scenes")


def build_dataset(
    name_or_path: str, *, split: str = "train", image_size: int | None = None, flip: bool = False
) -> ImageDataset:
    """Build a data set.

    Args:
        name_or_path: "digits", "digit-scenes", a folder that ``python -m dit_models.precompute``
            made, or a folder of images: with ``metadata.jsonl`` (captions) or with one sub-folder
            a class.
        split: "train", "heldout" or "all"; for a folder the name of a split's sub-folder, and of
            no effect where the folder has none.
        image_size: height and width; None is the built-in data sets' own (16 and 32) and an
            error for a folder of images; precomputed ones have theirs.
        flip: mirror half of the images (folders only).

    Raises:
        ValueError: says what is unknown, missing or does not fit.
    """
    if name_or_path in BUILTIN_DATASETS:
        if flip:
            raise ValueError(
                f"flip is set for {name_or_path!r}; mirrored digits, and left and right swapped, "
                "would contradict labels and captions"
            )
        sizes = {} if image_size is None else {"image_size": image_size}
        dataset_class = DigitDataset if name_or_path == "digits" else SceneDataset
        return dataset_class(split, **sizes)
    root = Path(name_or_path)
    if not root.is_dir():
        raise ValueError(
            f"{name_or_path!r} is neither a built-in data set ({', '.join(BUILTIN_DATASETS)}) "
            "nor a folder"
        )
    if is_latents_folder(root):
        if image_size is not None:
            raise ValueError(
                f"image_size is {image_size}; that of the precomputed {name_or_path!r} is fixed, "
                "so leave it out"
            )
        return LatentDataset(root, flip)
    if image_size is None:
        raise ValueError(f"image_size is missing; the folder {name_or_path!r} needs one")
    has_captions = (split_folder(root, split) / METADATA_NAME).is_file()
    folder_class = CaptionFolderDataset if has_captions else ClassFolderDataset
    return folder_class(root, image_size, split, flip)
