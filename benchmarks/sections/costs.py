"""What a call costs: growth, skew, memory, distance from the machine's limit."""

from collections.abc import Iterator
from typing import Any

from benchmarks import digest, scaling
from benchmarks.sections.view import View, folded
from benchmarks.words import digits, duration, listed, rate, ratio, share, size, table


def series(view: View) -> Iterator[str]:
    """Fitted exponents and the ratios at both ends of every series."""
    # Series of memory alone have their pictures with the memory.
    points = [result for result in view.results if digest.has_axis(result) and result["modes"]]
    if not points:
        return
    yield "- Time is fitted by a power of the axis: exponent 1 is proportional, 0 constant. What a"
    yield "  call costs at any size lowers it."
    yield "- Everything but the axis stays the same; with the experts only their number grows, and"
    yield "  a token passes as many of them."
    yield "- Points were measured one after the other. Along the experts `dense_limit` does the"
    yield "  same at all of them: its exponent is the machine's drift."
    yield "- *At the ends*: the strongest alternative's time over ours at the smallest and at the"
    yield "  largest value."
    yield ""
    exponents: dict[tuple[str, str], dict[str, float]] = {}
    for fit in scaling.exponents(points):
        of_mode = exponents.setdefault((fit["series"], fit["mode"]), {})
        of_mode[fit["provider"]] = fit["exponent"]
    rows = []
    for name, members in digest.by_group(points).items():
        members.sort(key=lambda result: result["axis"]["value"])
        values = [result["axis"]["value"] for result in members]
        axis = f"{members[0]['axis']['name']} {values[0]:g}-{values[-1]:g}"
        for mode in dict.fromkeys(mode for result in members for mode in result["modes"]):
            fitted = dict(exponents.get((name, mode), {}))
            ours = fitted.pop("ours", None)
            rows.append(
                (
                    name,
                    axis,
                    mode,
                    "" if ours is None else f"{ours:.2f}",
                    listed(f"{provider} {value:.2f}" for provider, value in fitted.items()),
                    _ends(members, mode),
                )
            )
    columns = ("series", "values", "mode", "ours", "others", "at the ends")
    yield from table(columns, rows)
    yield ""
    yield from view.drawn(*digest.by_group(points))


def _ends(members: list[dict[str, Any]], mode: str) -> str:
    found = [each for each in digest.comparisons(members) if each.mode == mode]
    ends = [each.strongest for each in (found[0], found[-1])] if found else []
    return " → ".join(f"{end.provider} {ratio(end.ratio)}" for end in ends if end is not None)


def skew(view: View) -> Iterator[str]:
    """Uneven loads beside the even one of the same entry."""
    cases = [result for result in view.results if digest.skew_of(result) is not None]
    rows = []
    for result in cases:
        even = _even_twin(result, cases)
        for found in digest.comparisons([result]):
            base = even["modes"].get(found.mode) if even else None
            of_even = found.seconds / base["times"]["ours"]["median"] if base else None
            other = found.strongest
            load = result.get("load")
            rows.append(
                (
                    found.entry,
                    "" if load is None else digits(load),
                    found.mode,
                    duration(found.seconds),
                    "" if of_even is None else ratio(of_even),
                    "" if other is None else f"{other.provider} {ratio(other.ratio)}",
                )
            )
    if rows:
        yield (
            "Token choice with uneven loads. *load*: rows of the fullest expert over the mean; "
            "*of even*: our time over that with the even load."
        )
        yield ""
        columns = ("entry", "load", "mode", "ours", "of even", "strongest alternative")
        yield from table(columns, rows)
        yield ""
        yield from view.drawn(*digest.by_group(cases))


def _even_twin(result: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, Any] | None:
    def same(case: dict[str, Any]) -> tuple[Any, ...]:
        shape = {key: value for key, value in case["shape"].items() if key != "skew"}
        return case["stage"], case["dtype"], shape

    twins = [case for case in cases if same(case) == same(result)]
    return next((case for case in twins if digest.skew_of(case) == "uniform"), None)


def dense(view: View) -> Iterator[str]:
    """Ours beside a dense MLP that does as much arithmetic for each token."""
    rows = [
        (entry, mode, duration(seconds), duration(other.seconds), ratio(other.ratio))
        for entry, mode, seconds, other in digest.bounds(view.results)
    ]
    if rows:
        yield (
            "A dense MLP with as much arithmetic for each token is another function and no "
            "alternative; it shows what routing and many matrices cost. Below 1 it is faster."
        )
        yield ""
        columns = ("entry", "mode", "ours", "dense", "dense/ours")
        yield from folded("All figures", list(table(columns, rows)))


def memory(view: View) -> Iterator[str]:
    """Peak and kept bytes of one forward and backward."""
    found = list(digest.memory(view.results))
    if not found:
        return
    yield (
        "One forward and backward. *kept*: alive between the two, which a deep network holds for "
        "every layer. Ratios are other/ours: above 1 ours needs less."
    )
    yield ""
    rows = [
        (
            item.entry,
            item.provider,
            size(item.peak),
            _of_ours(item.provider, item.peak_ratio),
            size(item.saved),
            _of_ours(item.provider, item.saved_ratio),
        )
        for item in found
    ]
    columns = ("entry", "provider", "peak", "other/ours", "kept", "other/ours")
    yield from view.drawn("memory")
    yield from folded("All figures", list(table(columns, rows)))


def _of_ours(provider: str, value: float | None) -> str:
    return "" if provider == "ours" or value is None else ratio(value)


def limit(view: View) -> Iterator[str]:
    """How much of the machine's rate ours reaches."""
    rows, above = [], False
    for result in view.results:
        for found in digest.comparisons([result]):
            if found.limit is None or found.group == "overhead":
                continue
            above |= found.limit > 1
            cost = result["modes"][found.mode].get("cost")
            other = found.strongest
            rows.append(
                (
                    found.entry,
                    found.mode,
                    duration(found.seconds),
                    rate(cost["flops"] / found.seconds, "FLOP") if cost else "",
                    share(found.limit),
                    "" if other is None else share(found.limit / other.ratio),
                )
            )
    if not rows:
        return
    yield (
        "The limit is the larger of the arithmetic over the rate of a large product and of the "
        "smallest possible traffic over the rate of a copy, both measured in the same run. "
        "Sorting, exponentials and calls are not in it, so routers stay far from it."
    )
    yield ""
    if above:
        yield "Above 100 %: the rates were measured lower than what the machine then reached."
        yield ""
    yield from _rates(view)
    yield from view.drawn("roofline")
    columns = ("entry", "mode", "ours", "arithmetic", "of the limit", "strongest alternative")
    yield from folded("All figures", list(table(columns, rows)))


def _rates(view: View) -> Iterator[str]:
    rates = view.document.get("rates", {})
    words = [f"{name} products {rate(value, 'FLOP')}" for name, value in _products(rates)]
    copy = rates.get("copy")
    if isinstance(copy, (int, float)):
        words.append(f"copies {rate(copy, 'B')}")
    if words and view.device == "cpu":
        yield f"Measured: {listed(words)}."
        yield ""


def _products(rates: dict[str, Any]) -> list[tuple[str, float]]:
    products = rates.get("product", {})
    return list(products.items()) if isinstance(products, dict) else []
