"""List the routings with their options: ``python -m dit_models.routing``."""

import dataclasses

from dit_models.model_config import default_of
from dit_models.routing import ROUTINGS, Routing


def describe(routing: Routing) -> str:
    """A routing with the fields, options and losses that it has."""
    lines = [f"{routing.name} (family {routing.family}): {routing.summary}"]
    lines.append(f"    model_options: {', '.join(routing.fields)}")
    for field in dataclasses.fields(routing.options):
        lines.append(f"    routing_options.{field.name}={default_of(field)}")
        lines.append(f"        {field.metadata['help']}")
    for name, coefficient in routing.losses.items():
        lines.append(f"    router_loss.own.{name}={coefficient}")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n".join(map(describe, ROUTINGS.values())))
