"""Which pipeline a model has."""

from dit_models.model_config import ModelConfig
from dit_models.pipelines.base import MoEPipeline
from dit_models.pipelines.dit_moe import DiTMoEPipeline
from dit_models.pipelines.ec_dit import ECDiTPipeline


def pipeline_class(model: ModelConfig) -> type[MoEPipeline]:
    """``ECDiTPipeline`` for expert choice and for captions, else ``DiTMoEPipeline``."""
    if model.family == "ec_dit" or model.text_dim:
        return ECDiTPipeline
    return DiTMoEPipeline
