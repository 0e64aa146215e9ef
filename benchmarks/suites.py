"""The suites: which entries and which other parts they have, in which order."""

import re
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.entry import Entry
from benchmarks.parts import (
    FIRST_CALLS,
    FIRST_CALLS_SHORT,
    MODELS,
    MODELS_SHORT,
    STAGE_SHARES,
    Part,
)
from benchmarks.registry import ENTRIES, find_entry
from benchmarks.registry_gpu import GPU_ENTRIES

Step = Entry | Part
# Their loop and their grouped products are much like the published code and ``grouped_mm``.
_TRANSFORMERS = ("transformers_eager", "transformers_grouped_mm")


def _named(*prefixes: str) -> tuple[Entry, ...]:
    return tuple(entry for entry in ENTRIES if entry.name.startswith(prefixes))


def _tiny(entry: Entry) -> Entry:
    """The entry at its tiny shape, where neither goals nor memory nor a series mean anything."""
    return replace(entry, shape=entry.tiny, goals=(), memory=(), figures=(), axis=None)


def _memory_only() -> Iterator[Entry]:
    """Every entry that has a memory to measure, without its times."""
    for entry in ENTRIES:
        if entry.memory:
            goals = tuple(goal for goal in entry.goals if goal.mode in ("memory", "saved"))
            yield replace(entry, modes=(), goals=goals)


def _default() -> Iterator[Step]:
    """What tells most in ten minutes on two cores, the most telling first.

    Compiled peers, memory and large layers take the most time, so only a few entries have them.
    """
    yield _without("ec_layer/D384-T2048", "reference")
    yield _without("expert_choice/B8-S256-E8", "reference")
    yield _without("dit_moe_layer/D384-T2048", "reference", *_TRANSFORMERS)
    yield _without("token_choice/T2048-E8-K2", "reference", "compiled")
    yield MODELS_SHORT
    yield STAGE_SHARES
    for name in (
        "ec_layer/D384-T2048-bf16",
        "dit_moe_layer/D384-T2048-bf16",
        "ec_layer/D384-T128",
        "dit_moe_layer/D384-T128",
        "expert_choice/B4-S1024-E64",
        "token_choice/T2048-E64-K6",
        "dispatch/T2048-D1152",
        "combine/token_choice-T2048-D1152",
        "combine/expert_choice-T2048-D384",
    ):
        yield _without(name, "reference", "compiled")
    yield from _named("overhead/")
    yield from _named("dit_moe_skew/", "token_choice_skew/")
    yield FIRST_CALLS_SHORT
    yield from _named("scaling_ec_layer_images/", "scaling_dit_moe_layer_experts/")
    yield from _named("scaling_memory_ec_layer_tokens/S1024")
    yield from _named("scaling_dit_moe_layer_capacity/", "scaling_ec_layer_width/")
    yield from _named("scaling_ec_layer_tokens/")
    yield from map(find_entry, ("model_layer/EC-DiT-B/2-8E", "model_layer/DiT-MoE-S/2-8E2A"))
    yield from _named("scaling_expert_choice", "scaling_token_choice")


def _without(name: str, *left_out: str) -> Entry:
    """An entry without some of its providers, and without memory."""
    entry = find_entry(name)
    providers = tuple(provider for provider in entry.providers if provider not in left_out)
    goals = tuple(
        goal
        for goal in entry.goals
        if goal.against in providers and goal.mode not in ("memory", "saved")
    )
    return replace(entry, providers=providers, memory=(), goals=goals)


_LAYERS = _named("dit_moe_layer/", "ec_layer/", "model_layer/", "dit_moe_skew/")
_ROUTERS = _named("token_choice/", "expert_choice/", "token_choice_skew/")
_SCALING = tuple(entry for entry in ENTRIES if entry.axis is not None and entry.modes)

STEPS: dict[str, tuple[Step, ...]] = {
    "default": tuple(_default()),
    "cpu": (*ENTRIES, MODELS, STAGE_SHARES, FIRST_CALLS),
    "router": _ROUTERS,
    "layer": (*_LAYERS, STAGE_SHARES),
    "model": (*_named("model_layer/"), MODELS),
    "memory": tuple(_memory_only()),
    "compile": (FIRST_CALLS,),
    "scaling": _SCALING,
    "smoke": tuple(_tiny(entry) for entry in ENTRIES),
    "gpu": GPU_ENTRIES,
    "gpu-smoke": tuple(_tiny(entry) for entry in GPU_ENTRIES),
}
SUITES: dict[str, tuple[Entry, ...]] = {
    name: tuple(step for step in steps if isinstance(step, Entry)) for name, steps in STEPS.items()
}


def steps(suite: str, pattern: str = "") -> list[Step]:
    """Steps of a suite whose name contains a match of the pattern.

    Raises:
        ValueError: for an unknown suite, a broken pattern, or when nothing matches.
    """
    if suite not in STEPS:
        raise ValueError(f"--suite is {suite!r}; expected one of {', '.join(STEPS)}")
    try:
        found = [step for step in STEPS[suite] if re.search(pattern, step.name)]
    except re.error as error:
        raise ValueError(f"--only is {pattern!r}, not a regular expression: {error}") from error
    if not found:
        raise ValueError(
            f"--only is {pattern!r}; no entry of suite {suite!r} matches (see --list; "
            "suites cpu and gpu have every entry)"
        )
    return found


def select(suite: str, pattern: str) -> list[Entry]:
    """The entries among the steps of a suite, see ``steps``."""
    return [step for step in steps(suite, pattern) if isinstance(step, Entry)]
