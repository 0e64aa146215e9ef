"""One file a stage: its inputs, its truth in fp64, and the providers that are compared."""

from benchmarks.entry import Stage
from benchmarks.stages import (
    combine,
    dispatch,
    dit_moe_layer,
    ec_layer,
    expert_choice,
    single_op,
    token_choice,
)

STAGES: dict[str, Stage] = {
    "token_choice": token_choice.STAGE,
    "expert_choice": expert_choice.STAGE,
    "dispatch": dispatch.STAGE,
    "combine": combine.STAGE,
    "single_op": single_op.STAGE,
    "dit_moe_layer": dit_moe_layer.STAGE,
    "ec_layer": ec_layer.STAGE,
}
