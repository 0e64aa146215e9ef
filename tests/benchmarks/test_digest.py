"""What is read out of results: strongest and usual alternatives, wins, losses, goals, warnings."""

from benchmarks import digest

from . import documents


def test_the_strongest_alternative_is_the_fastest_that_computes_the_same():
    entry = documents.result(
        "combine/x",
        "combine",
        {
            "forward": {
                "index_add": 3.0,
                "embedding_bag": 2.0,
                "dense_limit": 0.1,
                "ours:cuda": 0.2,
                "ours": 1.0,
            }
        },
        limit=0.25,
    )
    (found,) = digest.comparisons([entry])
    assert (found.entry, found.mode, found.group) == ("combine/x", "forward", "combine")
    assert [other.provider for other in found.others] == ["embedding_bag", "index_add"]
    assert found.strongest is not None
    assert (found.strongest.ratio, found.strongest.low) == (2.0, 1.8)
    assert found.usual is not None
    assert found.usual.provider == "index_add"
    assert (found.seconds, found.error, found.limit) == (1.0, 1e-7, 0.25)


def test_an_entry_without_alternatives_is_no_comparison():
    entry = documents.result("combine/x", "combine", {"forward": {"dense_limit": 1.0, "ours": 1.0}})
    (found,) = digest.comparisons([entry])
    assert found.strongest is None
    assert found.usual is None
    assert digest.totals([found]) == []


def test_an_entry_in_which_ours_was_not_timed_is_no_comparison():
    entry = documents.layer()
    for of_mode in entry["modes"].values():
        of_mode["times"].pop("ours")
        of_mode["ratios"] = {}
    del entry["providers"]["ours"]
    assert list(digest.comparisons([entry])) == list(digest.bounds([entry])) == []


def test_totals_count_against_the_strongest_with_a_margin():
    ratios = (1.02, 0.98, 1.04, 0.96, 3.0)
    entries = [
        documents.result(
            f"combine/{ratio}",
            "combine",
            {"forward": {"index_add": 5.0, "embedding_bag": ratio, "ours": 1.0}},
        )
        for ratio in ratios
    ]
    (found,) = digest.totals(digest.comparisons(entries))
    assert (found.faster, found.level, found.slower, found.compared) == (2, 2, 1, 5)
    assert found.strongest == 1.02
    assert found.usual == 5.0


def test_every_faster_alternative_is_named_the_worst_first():
    first = documents.result(
        "combine/a",
        "combine",
        {
            "forward": {"index_add": 0.5, "embedding_bag": 0.4, "gather_sum": 0.98, "ours": 1.0},
            "backward": {"index_add": 2.0, "ours": 1.0},
        },
    )
    second = documents.result(
        "dispatch/b", "dispatch", {"forward": {"index_select": 0.45, "ours": 1}}
    )
    found = digest.slower(digest.comparisons([first, second]))
    assert [(case.entry, case.mode, other.provider) for case, other in found] == [
        ("combine/a", "forward", "embedding_bag"),
        ("dispatch/b", "forward", "index_select"),
        ("combine/a", "forward", "index_add"),
    ]


def test_a_comparison_with_a_limit_never_counts_as_slower():
    entry = documents.result("ec_layer/x", "ec_layer", {"both": {"dense_limit": 0.5, "ours": 1.0}})
    assert digest.slower(digest.comparisons([entry])) == []


def test_memory_is_compared_and_larger_needs_are_named():
    found = list(digest.memory([documents.layer()]))
    assert [item.provider for item in found] == ["ours", "published", "dense_limit"]
    assert (found[1].peak_ratio, found[1].saved_ratio) == (0.5, 2.0)
    # What computes another function is shown, and never as an alternative that needs less.
    ((item, what, ratio),) = digest.larger(found)
    assert (item.provider, what, ratio) == ("published", "peak", 0.5)


def test_nothing_kept_is_nothing_to_divide_by():
    sizes = {"peak_bytes": 8, "saved_bytes": 0, "gradient_bytes": 0}
    entry = documents.layer() | {"memory": {"ours": sizes, "published": sizes}}
    assert [item.saved_ratio for item in digest.memory([entry])] == [None, None]


def test_missed_goals_come_first():
    figure = {"figure": "host_syncs", "wanted": "<= 0", "value": None, "met": None}
    found = digest.goals([documents.layer() | {"figure_goals": [figure]}])
    assert [(goal.what, goal.met) for goal in found] == [
        ("memory, published", False),
        ("host_syncs", None),
        ("forward, published", True),
    ]


def test_older_results_say_by_their_probes_where_they_were_measured():
    entry = documents.layer()
    del entry["device"]
    assert digest.device_of(entry) == "cpu"
    assert digest.device_of(entry | {"probes": {"ours": {}}}) == "cuda"


def test_warnings():
    good = documents.document(not_measured=[])
    assert list(digest.warnings(good)) == []
    cut = documents.document(not_measured=[{"name": "a", "reason": "needs about 9 s"}] * 2)
    assert list(digest.warnings(cut)) == ["2 steps were left out or cut short, see *Not measured*."]
    assert next(digest.warnings(documents.document())).startswith("1 step was left out")
    bad = documents.document(
        complete=False,
        environment=documents.environment()
        | {
            "load_average": [2.5, 1.0, 1.0],
            "dirty": True,
            "served_by": {"combine": "moe_kernels.backends.reference.combine"},
        },
        settings={"busy": 2},
        not_measured=[],
    )
    words = " ".join(digest.warnings(bad))
    assert "interrupted" in words
    assert "load 2.5 on 4 cores" in words
    assert "2 busy processes" in words
    assert "changes that are in no commit" in words
    assert "no kernel was measured" in words
    assert len(list(digest.warnings(bad))) == 5
    (smoke,) = digest.warnings(documents.document(settings={"suite": "gpu-smoke"}, not_measured=[]))
    assert "tiny shape" in smoke
