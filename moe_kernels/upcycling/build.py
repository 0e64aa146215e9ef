"""How router, experts and shared expert are made from the weights of a dense MLP."""

import torch
from torch import Tensor, nn

from moe_kernels.layers import ExpertChoiceRouter, GroupedExperts, TokenChoiceRouter
from moe_kernels.upcycling.activations import FUSED
from moe_kernels.upcycling.blocks import DenseMLP, Unreadable
from moe_kernels.upcycling.experts import UnfusedExperts
from moe_kernels.upcycling.module import UpcycledMLP
from moe_kernels.upcycling.recipe import Recipe


def build(
    block: nn.Module,
    dense: DenseMLP,
    recipe: Recipe,
    generator: torch.Generator,
    importance: Tensor | None = None,
) -> UpcycledMLP:
    """Make the replacement of one block.

    Args:
        block: the dense block; it becomes the shared expert where the recipe keeps one.
        dense: its weights.
        recipe: what to do.
        generator: of all random numbers, on the CPU, so that every device gets the same.
        importance: (F,) of each channel, for mode ``"split"``; by default ``weight_importance``.

    Raises:
        Unreadable: when F cannot be cut into the shards.
    """
    router = _router(dense, recipe, generator)
    if recipe.mode == "split":
        if dense.intermediate_size % recipe.num_shards:
            raise Unreadable(
                f"intermediate size {dense.intermediate_size} is no multiple of "
                f"shards = {recipe.shards}"
            )
        if importance is None:
            importance = weight_importance(dense)
        weights = _split(dense, recipe, importance)
    else:
        weights = _copy(dense, recipe.num_experts)
        if recipe.mode == "drop":
            _drop(weights, dense, recipe.drop_ratio, generator)
    if recipe.keeps_by_shared_expert:
        weights["down_proj"].zero_()
        if "down_proj_bias" in weights:
            weights["down_proj_bias"].zero_()
    experts = _experts(dense, recipe, weights)
    upcycled = UpcycledMLP(router, experts, block if recipe.keeps_by_shared_expert else None)
    for part in (router, experts):
        part.train(block.training)
    upcycled.training = block.training
    return upcycled


def weight_importance(dense: DenseMLP) -> Tensor:
    """(F,) product of the norms of a channel's weights: what it can add to the output."""
    halves = dense.w_in.chunk(2) if dense.gated else (dense.w_in,)
    norms = torch.stack([half.float().norm(dim=1) for half in halves])
    return norms.prod(dim=0) * dense.w_out.float().norm(dim=0)


def deal_channels(importance: Tensor, shards: int) -> Tensor:
    """(shards, F / shards) channels of each shard, dealt out there and back by importance.

    Every shard gets its share of important channels: which experts a token meets after the first
    steps is the router's choice, and no shard should be the one that it cannot do without.
    """
    order = importance.argsort(descending=True, stable=True).view(-1, shards).clone()
    order[1::2] = order[1::2].flip(1)
    return order.t().sort(dim=1).values


def _router(
    dense: DenseMLP, recipe: Recipe, generator: torch.Generator
) -> ExpertChoiceRouter | TokenChoiceRouter:
    assert recipe.normalize is not None
    sizes = (dense.hidden_size, recipe.num_experts)
    router: ExpertChoiceRouter | TokenChoiceRouter
    if recipe.routing == "expert_choice":
        router = ExpertChoiceRouter(
            *(*sizes, recipe.capacity_factor),
            group=recipe.group,
            normalize=recipe.normalize,
            device="meta",
        )
    else:
        assert recipe.top_k is not None
        # The weights of a token's K experts sum to 1; its K / shards whole copies must.
        scale = float(recipe.num_shards) if recipe.keeps_by_weights else 1.0
        router = TokenChoiceRouter(
            *(*sizes, recipe.top_k), normalize=recipe.normalize, scale=scale, device="meta"
        )
    # Equal rows in a group of shards have equal affinities, so that top-k takes whole groups.
    repeats = recipe.num_shards if recipe.keeps_by_weights else 1
    rows = torch.randn(recipe.num_experts // repeats, dense.hidden_size, generator=generator)
    weight = rows.mul_(recipe.router_std).repeat_interleave(repeats, dim=0)
    router.weight = nn.Parameter(weight.to(dense.w_in), requires_grad=any(dense.trained))
    return router


def _copy(dense: DenseMLP, num_experts: int) -> dict[str, Tensor]:
    return {
        name: tensor.unsqueeze(0).repeat(num_experts, *(1 for _ in tensor.shape))
        for name, tensor in zip(dense.names, dense.tensors, strict=True)
        if tensor is not None
    }


def _split(dense: DenseMLP, recipe: Recipe, importance: Tensor) -> dict[str, Tensor]:
    channels = deal_channels(importance, recipe.num_shards).to(dense.w_in.device)
    copies = recipe.num_experts // recipe.num_shards
    rows_in = channels
    if dense.gated:
        rows_in = torch.cat([channels, channels + dense.intermediate_size], dim=1)
    bias_in, bias_out = dense.bias_in, dense.bias_out
    shards = (
        dense.w_in[rows_in],  # (shards, F or 2F of a shard, D)
        dense.w_out[:, channels].movedim(1, 0),  # (shards, D, F of a shard)
        None if bias_in is None else bias_in[rows_in],
        # The shards of a copy add up to the dense bias.
        None if bias_out is None else (bias_out / len(channels)).expand(len(channels), -1),
    )
    return {
        name: tensor.repeat(copies, *(1 for _ in tensor.shape[1:]))
        for name, tensor in zip(dense.names, shards, strict=True)
        if tensor is not None
    }


def _drop(
    weights: dict[str, Tensor], dense: DenseMLP, drop_ratio: float, generator: torch.Generator
) -> None:
    """Redraw a share of each expert's channels from mean and deviation of what they replace."""
    dropped = round(drop_ratio * dense.intermediate_size)
    if not dropped:
        return
    w_in, w_out, bias_in, _ = dense.names
    halves = 2 if dense.gated else 1
    for expert in range(weights[w_out].shape[0]):
        order = torch.randperm(dense.intermediate_size, generator=generator)
        channels = order[:dropped].to(dense.w_in.device)
        for half in range(halves):
            rows = channels + half * dense.intermediate_size
            weights[w_in][expert, rows] = _like(dense.w_in[rows], generator)
            if dense.bias_in is not None:
                weights[bias_in][expert, rows] = _like(dense.bias_in[rows], generator)
        weights[w_out][expert, :, channels] = _like(dense.w_out[:, channels], generator)


def _like(sample: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the sample's shape, mean and standard deviation."""
    deviation, mean = torch.std_mean(sample.float(), correction=0)
    noise = torch.randn(sample.shape, generator=generator).to(sample.device)
    return (noise * deviation + mean).to(sample.dtype)


def _experts(dense: DenseMLP, recipe: Recipe, weights: dict[str, Tensor]) -> GroupedExperts:
    sizes = (
        dense.hidden_size,
        dense.intermediate_size // recipe.num_shards,
        recipe.num_experts,
    )
    fused = FUSED.get((dense.elementwise, dense.gated))
    if fused is not None:
        experts = GroupedExperts(*sizes, fused, bias=True, device="meta")
    else:
        experts = UnfusedExperts(*sizes, dense.elementwise, dense.gated, bias=True, device="meta")
    # A dense MLP may have one bias and not the other.
    for name, trained in zip(dense.names, dense.trained, strict=True):
        tensor = weights.get(name)
        parameter = None if tensor is None else nn.Parameter(tensor.contiguous(), trained)
        experts.register_parameter(name, parameter)
    return experts
