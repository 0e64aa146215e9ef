"""Checkpoints of any size that take no room on the disk: the structure, and holes for the numbers.

python -m tests.dit_models.convert.sparse DiT-MoE-G/2-16E2A g.pt
python -m tests.dit_models.convert.sparse --convert g.pt OUT     # and says the peak of memory
python -m tests.dit_models.convert.sparse --back OUT g2.pt
python -m tests.dit_models.convert.sparse --both g.pt OUT g2.pt
"""

import resource
import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from dit_models.convert import convert, restore
from dit_models.convert.formats import DIT_MOE
from dit_models.convert.positions import positions_of
from dit_models.convert.source import open_source
from dit_models.model_config import ModelConfig
from dit_models.models import get_config


def write_sparse(path: Path, config: ModelConfig, dtype: torch.dtype = torch.float16) -> None:
    """A DiT-MoE container of this size: zeros, but for the positions."""
    naming = "flash" if config.qk_norm else "timm"
    shapes = DIT_MOE.layout(config, {"attention": naming}).shapes()
    with FakeTensorMode():
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with skip_data(materialize_fake_tensors=True):
        torch.save({"ema": state}, path)
    place = open_source(path).tensors["pos_embed"]
    with open(path, "r+b") as stream:
        stream.seek(place.start)
        stream.write(positions_of(config, dtype).numpy().tobytes())


def peak_megabytes() -> float:
    """The most memory that this process ever had, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    before, started = peak_megabytes(), time.time()
    what, *paths = sys.argv[1:]
    if what == "--both":
        convert(Path(paths[0]), Path(paths[1]))
        restore(Path(paths[1]), Path(paths[2]))
    elif what == "--convert":
        convert(Path(paths[0]), Path(paths[1]))
    elif what == "--back":
        restore(Path(paths[0]), Path(paths[1]))
    else:
        write_sparse(Path(paths[0]), get_config(what))
    print(f"{before:.0f} {peak_megabytes():.0f} MB, {time.time() - started:.0f} s")
