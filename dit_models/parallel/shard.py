"""A model over several processes: experts divided by owner, all else by FSDP2."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from dit_models.attention import CrossAttention, SelfAttention
from dit_models.conditioned import ConditionedModel
from dit_models.parallel.world import World
from moe_kernels.distributed import shard_experts


class Sharding:
    """Divides a model among the processes of a world, block by block while it is built.

    Dense parameters are ``fully_shard``-ed over all processes that share a copy of the model.
    Experts are ``DTensor`` s over the mesh's dimension "expert", ``fully_shard``-ed over "shard".
    Gradients are summed, not averaged: divide the loss by the number of processes.

    Args:
        world: more than one process.
        dtype: of the weights that are gathered for the blocks' products, as autocast would cast
            them; ``None`` as they are. Routers, embeddings and the final layer stay as they are.
        reshard_after_forward: free a block's gathered weights between forward and backward.
        checkpointing: recompute each block in the backward pass; routing decisions are saved.
        compile: ``torch.compile`` each block's forward.
    """

    def __init__(
        self,
        world: World,
        dtype: torch.dtype | None = None,
        *,
        reshard_after_forward: bool = True,
        checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        assert world.dense is not None
        assert world.experts is not None
        self.compile = compile
        self.checkpointing = checkpointing
        self.reshard_after_forward = reshard_after_forward
        self._dense = _mesh(world.dense, "shard")
        self._experts = _mesh(world.experts, "shard")
        self._expert_owners = world.experts["expert"]
        # Autocast casts what a product reads; inputs such as timesteps must stay exact.
        reduced = torch.float32 if dtype is not None else None
        self._block_precision = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False
        )
        self._full_precision = MixedPrecisionPolicy(cast_forward_inputs=False)

    def shard_block(self, block: nn.Module) -> None:
        """Divide a block that is whole in every process; its memory is freed."""
        for module in block.modules():
            if isinstance(module, mk.MoE):
                self._shard_moe(module)
        if self.compile:
            _compile_parts(block) if self.checkpointing else _compile(block)
        if self.checkpointing:
            _checkpoint(block)
        self._fully_shard(block, self._dense, self._block_precision)

    def _shard_moe(self, layer: mk.MoE) -> None:
        # A router selects in fp32 whatever the products' precision: its own group, uncast.
        # Small, so it stays gathered until its backward.
        self._fully_shard(layer.router, self._dense, self._full_precision, reshard=False)
        if self._expert_owners.size() > 1:
            shard_experts(layer, self._expert_owners)
            self._fully_shard(layer.experts, self._experts, self._block_precision)

    def shard_rest(self, model: ConditionedModel) -> None:
        """Divide what is outside the blocks of a model whose blocks are divided.

        Buffers stay whole in every process.
        """
        self._fully_shard(model.backbone, self._dense, self._full_precision)
        encoder = model.text_encoder
        if encoder is not None and next(encoder.parameters(), None) is not None:
            self._fully_shard(encoder, self._dense, self._full_precision)

    def _fully_shard(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        precision: MixedPrecisionPolicy,
        reshard: bool = True,
    ) -> None:
        reshard = reshard and self.reshard_after_forward
        parts = mesh.size(-1)
        experts = {
            id(parameter)
            for experts in module.modules()
            if isinstance(experts, mk.GroupedExperts)
            for parameter in experts.parameters()
        }
        sharded = fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda p: _placement(p, parts) if id(p) in experts else None,
        )
        sharded.set_gradient_divide_factor(1.0)
        # Without it gloo, which knows no scaled sum, refuses the factor, and experts that are
        # divided among all processes get a gradient that is divided all the same.
        sharded.set_force_sum_reduction_for_comms(True)


# What follows changes forwards alone: the hooks of ``fully_shard`` stay outside. In a recomputed
# forward they would do other things the second time than the first.


def _compile(block: nn.Module) -> None:
    """Compile a block around its MoE layer, which exchanges rows and reads their numbers."""
    for module in block.modules():
        if isinstance(module, mk.MoE):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    block.forward = torch.compile(block.forward)


def _compile_parts(block: nn.Module) -> None:
    """Compile the attention and the dense or shared MLP of a block that is recomputed.

    A block in several compiled pieces is recomputed in other pieces than those of its forward,
    which selective checkpointing refuses (torch 2.13).
    """
    for module in block.modules():
        if isinstance(module, (SelfAttention, CrossAttention, mk.SharedExpert)):
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]


def _checkpoint(block: nn.Module) -> None:
    """Recompute a block's forward in its backward."""
    compute = block.forward

    def forward(*inputs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return compute(*inputs)
        return checkpoint(
            compute, *inputs, use_reentrant=False, context_fn=mk.save_routing_context_fn
        )

    block.forward = forward


def _placement(parameter: nn.Parameter, parts: int) -> Shard | None:
    """The dimension of an expert parameter that is cut into ``parts``.

    Whole experts where each process gets as many. Where they are fewer than the processes, or do
    not come out even, cutting them apart would leave processes without any, and ``fully_shard``
    would gather and reduce as much padding; other dimensions it cuts into equal parts only.
    """
    shape = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
    for dim, size in enumerate(shape):
        if size % parts == 0:
            return Shard(dim)
    return None


def _mesh(mesh: DeviceMesh, shard: str) -> DeviceMesh:
    """The dimensions that ``fully_shard`` takes: with copies of the model it reduces over both."""
    return mesh["replicate", shard] if mesh["replicate"].size() > 1 else mesh[shard]


def free_gathered_weights(model: nn.Module) -> None:
    """Forget gathered weights, after their shards were changed by hand."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
