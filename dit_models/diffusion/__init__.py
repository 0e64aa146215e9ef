"""Training objectives, guidance and samplers for any denoiser that returns ``.sample``."""

from dit_models.diffusion.ddpm import DDPM
from dit_models.diffusion.flow import RectifiedFlow
from dit_models.diffusion.guidance import Denoised, guided
from dit_models.diffusion.noise import noise_from_seeds
from dit_models.diffusion.objective import HasSample, LossOutput
from dit_models.diffusion.samplers import Callback, generate

__all__ = [
    "DDPM",
    "Callback",
    "Denoised",
    "HasSample",
    "LossOutput",
    "RectifiedFlow",
    "generate",
    "guided",
    "noise_from_seeds",
]
