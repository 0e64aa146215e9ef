"""The formats of others, by name."""

from dit_models.convert.diffusers_dit import DIFFUSERS_DIT
from dit_models.convert.dit import DIT
from dit_models.convert.dit_moe import DIT_MOE
from dit_models.convert.layout import Format, Tensors

FORMATS = {format.name: format for format in (DIT_MOE, DIT, DIFFUSERS_DIT)}


def recognise(tensors: Tensors, where: str) -> Format:
    """The format of a checkpoint, by the names of its tensors.

    Raises:
        ValueError: none fits.
    """
    for candidate in FORMATS.values():
        if candidate.recognises(tensors):
            return candidate
    some = ", ".join(list(tensors)[:5]) or "none at all"
    raise ValueError(
        f"{where}: tensors named as in no known format ({', '.join(FORMATS)}); it has {some}, ..."
    )
