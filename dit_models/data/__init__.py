"""Data sets and the batch loader."""

from dit_models.data.base import Batch, DatasetInfo, ImageDataset, Sample
from dit_models.data.build import BUILTIN_DATASETS, build_dataset
from dit_models.data.digits import DigitDataset
from dit_models.data.folders import CaptionFolderDataset, ClassFolderDataset
from dit_models.data.latents import LatentDataset
from dit_models.data.loader import BatchLoader
from dit_models.data.scenes import Scene, SceneDataset, SceneObject, parse_caption

__all__ = [
    "BUILTIN_DATASETS",
    "Batch",
    "BatchLoader",
    "CaptionFolderDataset",
    "ClassFolderDataset",
    "DatasetInfo",
    "DigitDataset",
    "ImageDataset",
    "LatentDataset",
    "Sample",
    "Scene",
    "SceneDataset",
    "SceneObject",
    "build_dataset",
    "parse_caption",
]
