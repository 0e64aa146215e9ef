"""The libraries, and their expert MLPs by the name of the provider."""

from dataclasses import dataclass

import torch

from benchmarks.libraries import (
    liger,
    megablocks,
    moe_ops,
    scattermoe,
    sonicmoe,
    transformer_engine,
    transformers,
)
from benchmarks.libraries.library import ExpertMLP, Experts, Library

MEGABLOCKS = Library(
    "megablocks",
    "megablocks",
    "megablocks",
    load=megablocks.grouped,
    install=megablocks.INSTALL,
    experts={
        "megablocks_grouped": Experts(
            megablocks.grouped, "megablocks, grouped products, PyTorch router"
        ),
        "megablocks_sparse": Experts(
            megablocks.sparse, "megablocks, block-sparse products, PyTorch router"
        ),
    },
)

LIBRARIES: tuple[Library, ...] = (
    transformers.LIBRARY,
    MEGABLOCKS,
    liger.LIBRARY,
    moe_ops.LIBRARY,
    scattermoe.LIBRARY,
    sonicmoe.LIBRARY,
    transformer_engine.LIBRARY,
)


@dataclass(frozen=True)
class ExpertProvider:
    """A library's expert MLP, under the name of a provider."""

    library: Library
    experts: Experts

    @property
    def summary(self) -> str:
        """One line for the tables' legend."""
        return self.experts.summary

    def on(self, device: torch.device) -> ExpertMLP:
        """The adapter, or the reason why there is none on a device."""
        return self.library.on(device, self.experts.make)


EXPERTS: dict[str, ExpertProvider] = {
    name: ExpertProvider(library, experts)
    for library in LIBRARIES
    for name, experts in library.experts.items()
}
