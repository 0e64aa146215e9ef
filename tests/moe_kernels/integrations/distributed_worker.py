"""Swapped models under DDP and FSDP2, on two processes of the CPU.

``python -m tests.moe_kernels.integrations.distributed_worker FOLDER NAMES`` runs scenarios one
after the other, each in two processes forked from one that has imported everything, and prints
what failed as JSON.
"""

import copy
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import moe_kernels as mk

from .blocks import assert_parity
from .distributed_training import ALL, RANKS, check_training, make_net, trained_by_one, whole
from .parity import Family, cast, exact_copy, swapped_blocks

SECONDS = 40  # for a scenario


# Scenarios: what is done to a model before it is trained.


def ddp_after_the_swap(family: Family) -> None:
    net = make_net(family)
    mk.apply(net, verify=True)
    check_training(DistributedDataParallel(net), family)


def ddp_before_the_swap(family: Family) -> None:
    net = DistributedDataParallel(make_net(family), gradient_as_bucket_view=True)
    assert mk.apply(net, verify=True).swapped[0].startswith("module.block")
    check_training(net, family)


def ddp_reverted(family: Family) -> None:
    net = DistributedDataParallel(make_net(family))
    mk.apply(net)
    assert mk.revert(net).reverted
    check_training(net, family, swapped=0)


def fsdp_of_the_model(family: Family) -> None:
    net = make_net(family)
    mk.apply(net)
    fully_shard(net)
    check_training(net, family)


def fsdp_of_block_and_model(family: Family) -> None:
    net = make_net(family)
    mk.apply(net)
    for module in (swapped_blocks(net)[0], net):
        fully_shard(module)
    assert "FSDP" in type(swapped_blocks(net)[0]).__name__
    check_training(net, family)


def fsdp_before_the_swap(family: Family) -> None:
    net = make_net(family)
    mk.apply(net)
    path = next(name for name, module in net.named_modules() if module is swapped_blocks(net)[0])
    mk.revert(net)
    fully_shard(net.get_submodule(path))
    fully_shard(net)
    assert mk.apply(net).swapped == [path]
    check_training(net, family)


def fsdp_before_a_swap_that_is_to_be_verified(family: Family) -> None:
    net = make_net(family)
    fully_shard(net)
    (row,) = mk.apply(net, verify=True).rows
    assert "not verified: weights are sharded" in row.detail, row
    check_training(net, family)


def fsdp_reverted(family: Family) -> None:
    """Of a model whose blocks were sharded before the swap, or not for themselves."""
    net = make_net(family)
    mk.apply(net)
    fully_shard(net)
    assert mk.revert(net).reverted
    check_training(net, family, swapped=0)


def fsdp_around_a_swapped_block_is_not_reverted(family: Family) -> None:
    net = make_net(family)
    mk.apply(net)
    (block,) = swapped_blocks(net)
    fully_shard(block)
    wrapped = type(block)
    with pytest.raises(ValueError, match="fully_shard"):
        mk.revert(net)
    assert type(block) is wrapped
    fully_shard(net)
    check_training(net, family)


def fsdp_of_every_expert(family: Family) -> None:
    """Whoever reads the weights of a sharded expert gets a shard: the experts are called."""
    for swap_first in (True, False):
        net = make_net(family)
        if swap_first:
            mk.apply(net)
        for expert in net.block.get_submodule("experts").children():
            fully_shard(expert)
        fully_shard(net)
        if not swap_first:
            (row,) = mk.apply(net, strict=False).rows
            assert row.status == "skipped"
            assert "hooks" in row.detail or "FSDP" in row.detail, row
        check_training(net, family, swapped=int(swap_first))


def fsdp_of_the_stacked_experts(family: Family) -> None:
    net = make_net(family)
    mk.apply(net)
    fully_shard(net.block.get_submodule("experts"))
    fully_shard(net)
    check_training(net, family)


def fsdp_in_bf16(family: Family) -> None:
    net = make_net(family)
    mk.apply(net)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    fully_shard(net, mp_policy=policy)
    out = net(*family.inputs(torch.bfloat16)).detach()
    plain, inputs = make_net(family), family.inputs(torch.bfloat16)
    with torch.no_grad():
        expected = copy.deepcopy(plain).bfloat16()(*inputs)
        exact = exact_copy(plain)(*cast(inputs, torch.float64))
    assert_parity({"out": out}, {"out": expected}, {"out": exact})


def fsdp_state(family: Family) -> None:
    """Whole state dicts out of a sharded swapped model and into one."""
    plain, net = make_net(family), make_net(family)
    mk.apply(net)
    fully_shard(swapped_blocks(net)[0])
    fully_shard(net)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(net, options=options)
    if dist.get_rank() == 0:
        assert state.keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            assert torch.equal(state[name], value), name
    sharded = net.state_dict()
    assert sharded.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(whole(sharded[name]), value), name
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    set_model_state_dict(net, plain.state_dict(), options=options)
    check_training(net, family)


FOR_ALL = (
    ddp_after_the_swap,
    ddp_before_the_swap,
    fsdp_of_the_model,
    fsdp_of_block_and_model,
    fsdp_before_the_swap,
    fsdp_state,
)
FOR_ONE = (
    (ddp_reverted, "HiDream"),
    (fsdp_reverted, "HiDream"),
    (fsdp_before_a_swap_that_is_to_be_verified, "HiDream"),
    (fsdp_around_a_swapped_block_is_not_reverted, "HiDream"),
    (fsdp_of_every_expert, "HiDream"),
    (fsdp_in_bf16, "HiDream"),
    (fsdp_of_the_stacked_experts, "Nucleus"),
    (fsdp_in_bf16, "Nucleus"),
)
SCENARIOS: dict[str, tuple[Callable[[Family], None], str]] = {
    f"{scenario.__name__} {name}": (scenario, name)
    for scenario, name in (*((s, n) for s in FOR_ALL for n in ALL), *FOR_ONE)
}


def run_rank(scenario: str, rank: int, folder: Path) -> None:
    """One process of a scenario; writes its traceback to a file, empty when all is well."""
    function, family = SCENARIOS[scenario]
    store = folder / f"{scenario} store"
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=SECONDS), RANKS, rank)
    failure = ""
    try:
        torch.manual_seed(0)
        function(ALL[family])
    except Exception:
        failure = traceback.format_exc()
    (folder / f"{scenario} {rank}").write_text(failure)
    os._exit(0)  # whatever the other process is waiting for


def run_scenario(scenario: str, folder: Path) -> str:
    """What failed in either process; they are stopped when they take too long."""
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                run_rank(scenario, rank, folder)
            finally:
                os._exit(1)
        pids.append(pid)
    end = time.monotonic() + SECONDS
    running = set(pids)
    while running and time.monotonic() < end:
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    files = [folder / f"{scenario} {rank}" for rank in range(RANKS)]
    told = [file.read_text() if file.exists() else "no answer" for file in files]
    return "\n".join(text for text in told if text)


def main(folder: str, names: list[str]) -> dict[str, str]:
    torch.set_num_threads(1)  # a process of several threads cannot be forked
    for name in ALL:
        trained_by_one(name)  # for all that are forked
    failures = {}
    for name in names:
        failure = run_scenario(name, Path(folder))
        if failure:
            failures[name] = failure
    return failures


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:] or list(SCENARIOS))))
