"""Random inputs that every precision routes alike, and the truth about rows of a selection."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import moe_kernels as mk
from benchmarks.entry import BY_BACKEND, CPU, Inputs, Provider, Run
from benchmarks.op_counts import counting
from moe_kernels.backends import BACKENDS

# Smallest relative gap between the last chosen and the first rejected affinity. fp32 routers err
# by about 1e-6 at hidden size 768, and a comparison of selections needs one right answer.
MIN_GAP = 1e-5
# How far a token is moved away from a narrow boundary, in its own standard deviations.
STEP = 1 / 32


def by_backend(library: Callable[[str | None], Callable[[Inputs], Run]]) -> dict[str, Provider]:
    """The providers ``BY_BACKEND``; an interpreter or simulator of their kernels is not timed.

    Args:
        library: from a backend's name to the ``build`` of a provider.
    """

    def provider(backend: str) -> Provider:
        def build(inputs: Inputs) -> Run:
            device_type = next(iter(inputs.leaves.values())).device.type
            if device_type in BACKENDS[backend].on_request:
                raise mk.BackendUnavailable(f"{backend} would only be emulated on {device_type}")
            return library(backend)(inputs)

        return Provider(build, f"moe_kernels, {backend} backend", kind="backend")

    return {name: provider(name.removeprefix("ours:")) for name in BY_BACKEND}


def leaf(tensor: Tensor) -> Tensor:
    """A leaf that requires a gradient and shares the memory of ``tensor``."""
    return tensor.detach().requires_grad_()


def generator_on(device: torch.device = CPU, seed: int = 0) -> torch.Generator:
    """A seeded generator of the device: billions of weights are drawn where they are used."""
    return torch.Generator(device).manual_seed(seed)


def normal(
    generator: torch.Generator, *sizes: int, dtype: torch.dtype = torch.float32, fan_in: int = 1
) -> Tensor:
    """Normal numbers of variance 1/fan_in on the generator's device."""
    drawn = torch.randn(sizes, generator=generator, device=generator.device)
    return drawn.mul_(fan_in**-0.5).to(dtype)


def gap(affinity: Tensor, count: int) -> float:
    """Smallest relative gap at the boundary of a top-``count`` over the last dimension."""
    if count == affinity.shape[-1]:
        return 1.0
    return float(_boundary(affinity, count)[0].min())


def _boundary(affinity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Relative gaps at the boundary of a top-``count``, and who is the last chosen."""
    ranked = affinity.double().topk(count + 1, dim=-1)
    last, first_rejected = ranked.values[..., count - 1], ranked.values[..., count]
    return (last - first_rejected) / last, ranked.indices[..., count - 1]


def separated_tokens(
    tokens: Tensor,
    affinity_of: Callable[[Tensor], Tensor],
    count: int,
    generator: torch.Generator,
    num_groups: int = 0,
) -> Tensor:
    """The tokens, some moved a little, so that no boundary of a top-``count`` is narrow.

    A token that was drawn anew would cross boundaries of other experts, and in a pool of a million
    tokens one of them would always be narrow.

    Args:
        tokens: (T, ·) normal numbers: logits or hidden states.
        affinity_of: their (T, E) affinities in fp64.
        count: K, or C when experts choose.
        generator: of the moves.
        num_groups: G when experts choose inside groups; 0 when tokens choose.
    """
    for _ in range(200):
        affinity = affinity_of(tokens)
        if count == (tokens.shape[0] // num_groups if num_groups else affinity.shape[1]):
            return tokens
        narrow = _narrow(affinity, count, num_groups)
        if not bool(narrow.any()):
            return tokens
        tokens = tokens.clone()
        moves = normal(generator, int(narrow.sum()), *tokens.shape[1:], dtype=tokens.dtype)
        tokens[narrow] += STEP * moves
    raise AssertionError("no move gives a selection that rounding cannot change")


def _narrow(affinity: Tensor, count: int, num_groups: int) -> Tensor:
    """(T,) True for tokens that are the last chosen at a boundary narrower than ``MIN_GAP``."""
    if not num_groups:
        return _boundary(affinity, count)[0] < MIN_GAP
    grouped = affinity.view(num_groups, -1, affinity.shape[1])  # (G, S, E)
    gaps, last = _boundary(grouped.mT, count)  # (G, E)
    group, expert = (gaps < MIN_GAP).nonzero(as_tuple=True)
    narrow = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=affinity.device)
    narrow[group, last[group, expert]] = True
    return narrow.flatten()


def top_mask(affinity: Tensor, count: int, dim: int) -> Tensor:
    """True for the ``count`` largest along ``dim``; ties to the lower index."""
    order = affinity.detach().sort(dim=dim, descending=True, stable=True).indices
    return torch.zeros_like(affinity, dtype=torch.bool).scatter(
        dim, order.narrow(dim, 0, count), True
    )


def expert_tokens(mask: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert of a (T, E) mask with its tokens in ascending order."""
    for expert in range(mask.shape[1]):
        yield expert, mask[:, expert].nonzero().flatten()


def count_experts(chosen: Tensor, experts: int) -> Tensor:
    """Rows of each expert; on a GPU ``bincount`` would wait for it to read the largest index."""
    if chosen.device.type == "cpu" and not counting():
        return torch.bincount(chosen, minlength=experts)
    return (chosen.unsqueeze(1) == torch.arange(experts, device=chosen.device)).sum(0)


def count_tokens(tokens: Tensor, num_tokens: int) -> Tensor:
    """Rows of each token, likewise; few rows of a token meet in one addition."""
    if tokens.device.type == "cpu" and not counting():
        return torch.bincount(tokens, minlength=num_tokens)
    return tokens.new_zeros(num_tokens).scatter_add_(0, tokens, torch.ones_like(tokens))


def rows_of_tokens(token_indices: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Row numbers of token 0, then of token 1, ..., and where each token's rows start."""
    tokens = token_indices.cpu().numpy()
    rows = np.argsort(tokens, kind="stable")
    starts = np.concatenate([[0], np.bincount(tokens, minlength=num_tokens).cumsum()])
    device = token_indices.device
    return torch.from_numpy(rows).to(device), torch.from_numpy(starts).to(device)
