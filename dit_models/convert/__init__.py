"""Weights of others in, weights of others out: DiT-MoE, DiT and diffusers' DiT checkpoints.

``python -m dit_models.convert SOURCE FOLDER``, and back with ``--back FOLDER OUT``.
"""

from dit_models.convert.backward import restore
from dit_models.convert.formats import FORMATS
from dit_models.convert.forward import Conversion, convert, guess_objective
from dit_models.convert.layout import Choices
from dit_models.convert.source import open_source

__all__ = [
    "FORMATS",
    "Choices",
    "Conversion",
    "convert",
    "guess_objective",
    "open_source",
    "restore",
]
