"""The tables of ``docs/scaling.md``, written between two markers."""

from pathlib import Path

from dit_models.atomic import write_text
from dit_models.models import get_config
from dit_models.plan.mesh import sensible_meshes
from dit_models.plan.report import memory_cells, time_cells
from dit_models.plan.settings import Cluster, Run
from dit_models.plan.times import Estimate, estimate, recommend

BEGIN, END = "<!-- plan tables: begin -->", "<!-- plan tables: end -->"
MODELS = ("DiT-MoE-G/2-16E2A", "EC-DiT-M-64E")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
IMAGES_PER_GPU = 32
_HEADINGS = (
    "GPUs", "mesh (replicate x shard x expert)", "recompute", "param", "optim", "EMA", "grad",
    "gathered", "reduce", "activ", "**total**", "NVLink", "network", "compute", "hidden",
    "exposed", "step", "serial",
)  # fmt: skip


def plan(run: Run, cluster: Cluster, **options: bool) -> list[Estimate]:
    """Every sensible mesh, with and without recompute."""
    meshes = sensible_meshes(cluster, run.model.num_experts, **options)
    return [estimate(run, cluster, mesh, again) for mesh in meshes for again in (False, True)]


def tables() -> str:
    """A table for each model."""
    parts = []
    for name in MODELS:
        run = Run(get_config(name), images_per_gpu=IMAGES_PER_GPU)
        rows = [_row(run, Cluster(gpus, gpu_memory=80)) for gpus in GPUS]
        parts.append("\n".join([f"`{name}`", "", _line(_HEADINGS), _line(["---"] * 18), *rows]))
    return "\n\n".join(parts)


def _row(run: Run, cluster: Cluster) -> str:
    estimates = plan(run, cluster)
    best = recommend(estimates)
    shown = best or min(estimates, key=lambda each: each.memory.total)
    mesh = shown.mesh
    shape = f"{mesh.replicate} x {mesh.expert_shards} x {mesh.expert}"
    cells = memory_cells(shown)
    total = f"**{cells[-1]}**" if best else f"{cells[-1]} (does not fit)"
    again = "yes" if shown.recompute else "no"
    return _line([str(cluster.gpus), shape, again, *cells[:-1], total, *time_cells(shown)])


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def with_tables(page: str) -> str:
    """The page with fresh tables between its markers.

    Raises:
        ValueError: it lacks a marker.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the lines {BEGIN} and {END}; put them in.")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def write_tables(path: Path) -> None:
    """Bring the tables of a page up to date."""
    if not path.is_file():
        raise ValueError(f"--tables {path}: no such file.")
    write_text(path, with_tables(path.read_text()))
