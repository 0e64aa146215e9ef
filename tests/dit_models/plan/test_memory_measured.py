"""The planned memory and traffic against real training steps of 1, 2 and 4 processes."""

import statistics
from dataclasses import dataclass, replace

import pytest

from dit_models.model_config import ModelConfig
from dit_models.models import get_config
from dit_models.plan import Memory, Mesh, Run, plan_memory, plan_traffic
from dit_models.plan.units import model_units
from tests.dit_models.plan.steps import Step, measure
from tests.ranks import run_ranks

SMALL = ("model_options.depth=3", "optimizer.clip_norm=1.0")
KINDS = ("parameters", "optimizer", "ema")
TOLERANCE = 0.05


@dataclass(frozen=True)
class Case:
    processes: int
    preset: str
    expert: int = 1
    replicate: int = 1
    recompute: bool = False
    accumulate: int = 1
    reshard: bool = True
    images: int = 16
    experts: int = 8
    width: int = 64
    optimizer: str = "adamw"

    def __str__(self) -> str:
        words = [self.preset, str(self.mesh)] if self.processes > 1 else [self.preset]
        words += [f"{self.experts} experts"] * (self.experts != 8)
        words += [f"width {self.width}"] * (self.width != 64)
        words += [self.optimizer] * (self.optimizer != "adamw")
        words += ["recompute"] * self.recompute + ["2 micro-batches"] * (self.accumulate > 1)
        return ", ".join(words + ["kept gathered"] * (not self.reshard))

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.processes, self.expert, self.replicate)

    @property
    def overrides(self) -> list[str]:
        return [
            *SMALL,
            f"model={self.preset}",
            f"model_options.hidden_size={self.width}",
            *[f"model_options.num_experts={self.experts}"] * (self.preset != "DiT-tiny"),
            f"batch_size={self.processes * self.images * self.accumulate}",
            f"accumulate={self.accumulate}",
            f"optimizer.kind={self.optimizer}",
            f"gradient_checkpointing={self.recompute}",
            f"parallel.expert={self.expert}",
            f"parallel.replicate={self.replicate}",
            f"parallel.reshard_after_forward={self.reshard}",
        ]

    def run(self, model: ModelConfig) -> Run:
        return Run(
            model,
            images_per_gpu=self.images,
            accumulate=self.accumulate,
            precision="fp32",
            optimizer=self.optimizer,
            reshard_after_forward=self.reshard,
            device="cpu",
        )


CASES = [
    Case(1, "DiT-tiny"),
    Case(1, "DiT-tiny", recompute=True),
    Case(1, "EC-DiT-tiny"),
    Case(1, "EC-DiT-tiny", accumulate=2, images=8),
    Case(1, "DiT-MoE-tiny"),
    Case(1, "DiT-MoE-tiny", recompute=True),
    Case(1, "DiT-tiny", recompute=True, images=1, optimizer="rmsprop"),  # full at its step
    Case(2, "DiT-tiny"),
    Case(2, "DiT-MoE-tiny", recompute=True),
    Case(2, "EC-DiT-tiny", expert=2),
    Case(4, "DiT-MoE-tiny", expert=2),
    Case(4, "EC-DiT-tiny", expert=2, replicate=2, recompute=True),
    Case(4, "EC-DiT-tiny", reshard=False, images=2),
    # Fewer experts than processes: they are divided by rows, and gathered with a copy more.
    Case(4, "EC-DiT-tiny", experts=2, images=1, width=128),
    Case(4, "DiT-MoE-tiny", expert=2, experts=2, images=4, recompute=True),
]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_real_steps_take_what_was_planned(processes: int) -> None:
    for case, steps, model in measured(processes):
        planned = plan_memory(case.run(model), case.mesh, case.recompute)
        for kind in KINDS:  # rank 0 has a part that is never smaller
            assert getattr(steps[0], kind) == getattr(planned, kind), (str(case), kind)
        assert steps[0].gradients == planned.parameters, str(case)
        held, during = _held_and_during(planned, steps)
        assert planned.total - held == pytest.approx(during, rel=TOLERANCE), str(case)
        assert _sent(case, model) == pytest.approx(_counted(steps), rel=1e-3), str(case)


def test_experts_divided_by_rows_are_copied_once_more() -> None:
    model = replace(get_config("EC-DiT-tiny"), depth=3, num_experts=2)
    planned = plan_memory(Run(model, images_per_gpu=1, precision="fp32", device="cpu"), Mesh(4))
    units = model_units(model, Mesh(4))
    block, router = units.blocks[1].dense.gathered_numel, units.blocks[1].router
    assert planned.moment == "the gathering of block 1"
    assert router is not None
    experts = 2 * (2 * 128 * 512 + 512 + 128)
    gathered = 2 * block + experts + router.gathered_numel + units.rest.gathered_numel
    assert planned.gathered == 4 * gathered


def measured(processes: int) -> list[tuple[Case, list[Step], ModelConfig]]:
    """What every rank measured, for each case of so many processes."""
    cases = [case for case in CASES if case.processes == processes]
    by_rank = run_ranks(measure, processes, [case.overrides for case in cases])
    return [
        (case, [steps[i][0] for steps in by_rank], by_rank[0][i][1]) for i, case in enumerate(cases)
    ]


def _held_and_during(planned: Memory, steps: list[Step]) -> tuple[int, float]:
    held = sum(getattr(planned, kind) for kind in KINDS)
    # Tokens choose their experts' owners: more rows arrive at one than another; the mean is planned
    return held, statistics.mean(step.during for step in steps)


def _sent(case: Case, model: ModelConfig) -> dict[str, float]:
    traffic = plan_traffic(case.run(model), case.mesh, case.processes, case.recompute)
    kinds = {
        "gather": "all-gather",
        "scatter": "reduce-scatter",
        "rows": "all-to-all",
        "counts": "row counts",
    }
    return {
        kind: sum(flow.nvlink for flow in traffic.flows if word in flow.name)
        for kind, word in kinds.items()
    }


def _counted(steps: list[Step]) -> dict[str, float]:
    return {kind: statistics.mean(step.sent[kind] for step in steps) for kind in steps[0].sent}


def table() -> str:
    """Markdown of all cases, for ``docs/scaling.md``."""
    lines = ["| run | measured MB | planned MB | error | of what a step allocates |"]
    lines.append("|---|---|---|---|---|")
    for processes in (1, 2, 4):
        for case, steps, model in measured(processes):
            planned = plan_memory(case.run(model), case.mesh, case.recompute)
            held, during = _held_and_during(planned, steps)
            total, own = planned.total / (held + during) - 1, (planned.total - held) / during - 1
            numbers = f"{(held + during) / 1e6:.2f} | {planned.total / 1e6:.2f}"
            lines.append(f"| {case} | {numbers} | {total:+.1%} | {own:+.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
