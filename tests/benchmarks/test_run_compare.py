"""``--compare``: two results side by side, what is only in one, other machines, wrong files."""

import copy

import pytest

from benchmarks import compare, output, report, run


def times(**medians):
    return {name: {"median": value, "low": value, "high": value} for name, value in medians.items()}


def entry(name, ours, **others):
    return {
        "name": name,
        "providers": {
            **{other: {"kind": "plain"} for other in others},
            "dense_limit": {"kind": "limit"},
            "ours": {"kind": "ours"},
        },
        "modes": {
            "forward": {
                "times": times(ours=ours, dense_limit=ours / 2, **others),
                "ratios": times(
                    dense_limit=0.5, **{other: value / ours for other, value in others.items()}
                ),
            }
        },
    }


BEFORE = {
    "environment": {"cpu": "a", "threads": 2, "torch": "2.13.0"},
    "entries": [entry("combine/a", 1e-3, index_add=3e-3, bag=9e-4), entry("combine/old", 1e-3)],
}


def test_ours_the_peers_and_the_ratios_stand_in_a_row():
    after = copy.deepcopy(BEFORE)
    after["entries"][0] = entry("combine/a", 5e-4, index_add=6e-3, bag=18e-4)
    row = next(line for line in compare.text(BEFORE, after).splitlines() if "combine/a" in line)
    # The alternative that was fastest before is followed; dense_limit is none.
    assert row.split() == [
        *("combine/a", "forward", "1.00", "ms", "500", "us", "0.50x", "2.00x"),
        *("bag", "0.90x", "3.60x"),
    ]


def test_an_entry_of_another_shape_is_not_compared():
    after = copy.deepcopy(BEFORE)
    after["entries"][0]["shape"] = {"T": 33}
    lines = compare.text(BEFORE, after).splitlines()
    assert "not compared, of another shape or dtype: combine/a" in lines
    assert any(line.startswith("combine/old ") for line in lines)
    assert not any(line.startswith("combine/a ") for line in lines)


def test_what_is_in_one_run_only_is_named():
    after = {"environment": BEFORE["environment"], "entries": [BEFORE["entries"][0]]}
    after["entries"] = [*after["entries"], entry("combine/new", 1e-3)]
    lines = compare.text(BEFORE, after).splitlines()
    assert "only before: combine/old" in lines
    assert "only after: combine/new" in lines
    assert not any(line.startswith("other ") for line in lines)
    nothing = compare.text({"entries": []}, BEFORE)
    assert "no entry and mode, and no model, in common" in nothing
    assert "only after: combine/a, combine/old" in nothing


def test_whole_models_are_compared():
    def document(ours, published):
        model = {
            "name": "DiT-MoE-S: one guided step",
            "batch_size": 1,
            "seconds": {"ours": ours, "published": published},
            "ratio": published / ours,
            "against": "published",
        }
        return {"entries": [], "models": [model, {**model, "batch_size": published}]}

    text = compare.text(document(0.2, 0.3), document(0.1, 0.6))
    (row,) = [line for line in text.splitlines() if line.startswith("DiT-MoE-S")]
    assert row.split() == [
        *("DiT-MoE-S,", "images:", "1", "model", "200", "ms", "100", "ms", "0.50x", "2.00x"),
        *("published", "1.50x", "6.00x"),
    ]


def test_other_machines_threads_and_versions_are_said():
    after = {**BEFORE, "environment": {"cpu": "b", "threads": 1, "torch": "2.13.0"}}
    after["environment"]["device"] = {"gpu": "a GPU"}
    lines = compare.text(BEFORE, after).splitlines()
    assert lines[:3] == [
        "other cpu: a before, b after",
        "other threads: 2 before, 1 after",
        "other gpu: None before, a GPU after",
    ]


def test_the_command_reads_folders_and_files(tmp_path, capsys):
    file = output.write(tmp_path, BEFORE)
    assert run.main(["--compare", str(tmp_path), str(file)]) == 0
    printed = capsys.readouterr().out
    assert "1.00x" in printed
    assert report.main(["--compare", str(tmp_path), str(file)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a result"),
        ('{"cpu": 1}', 'no list "entries"'),
        ('{"entries": [1]}', 'no list "entries"'),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, text, words):
    file = tmp_path / "wrong.json"
    file.write_text(text)
    with pytest.raises(SystemExit):
        run.main(["--compare", str(file), str(file)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last
    assert str(file) in last
