"""Some of many: which steps, layers or ticks are shown."""


def spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of 0 .. count - 1, evenly spaced, both ends included."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [0]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
