"""Quality figures of generated images, from small classifiers trained on the real ones."""

from dit_models.quality.digits import DigitQuality, evaluate_digits
from dit_models.quality.frechet import frechet_distance
from dit_models.quality.reader import ReaderAccuracy, ReaderSettings
from dit_models.quality.scenes import SceneQuality, evaluate_scenes

__all__ = [
    "DigitQuality",
    "ReaderAccuracy",
    "ReaderSettings",
    "SceneQuality",
    "evaluate_digits",
    "evaluate_scenes",
    "frechet_distance",
]
