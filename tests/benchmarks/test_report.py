"""The report's text, the comparison of runs, and folders that are not overwritten."""

import copy

import pytest

from benchmarks import output, plots, report, run


def times(**medians):
    return {name: {"median": value, "low": value, "high": value} for name, value in medians.items()}


DOCUMENT = {
    "environment": {
        "cpu": "a | processor",
        "served_by": {"combine": "somewhere"},
        "command": "python -m benchmarks.run --only combine",
    },
    "settings": {"suite": "cpu", "busy": 0},
    "complete": True,
    "entries": [
        {
            "name": "combine/token_choice-T2048-D384",
            "stage": "combine",
            "shape": {"T": 2048},
            "dtype": "float32",
            "providers": {
                "index_add": {
                    "kind": "plain",
                    "status": "ok",
                    "errors": {"out": 1e-7},
                    "reason": "",
                },
                "gather_sum": {
                    "kind": "plain",
                    "status": "wrong",
                    "errors": {},
                    "reason": "out: error 0.5",
                },
                "embedding_bag": {
                    "kind": "plain",
                    "status": "ok",
                    "errors": {"out": 2e-7},
                    "reason": "",
                },
                "ours": {"kind": "ours", "status": "ok", "errors": {"out": 1e-7}, "reason": ""},
            },
            "modes": {
                "forward": {
                    "rounds": 5,
                    "limit": 5e-4,
                    "times": times(index_add=3e-3, embedding_bag=9e-4, ours=1e-3),
                    "ratios": times(index_add=3.0, embedding_bag=0.9),
                },
            },
            "memory": {
                "ours": {"peak_bytes": 2**20, "saved_bytes": 2**19, "gradient_bytes": 2**18},
                "index_add": {"reason": "killed"},
            },
            "goals": [
                {
                    "mode": "forward",
                    "against": "index_add",
                    "wanted": ">= 2.8x",
                    "ratio": 3.0,
                    "met": True,
                },
                {
                    "mode": "memory",
                    "against": "index_add",
                    "wanted": "<= 0.5 of it",
                    "ratio": 1.0,
                    "met": False,
                },
            ],
            "slower": [{"mode": "forward", "provider": "embedding_bag", "ratio": 0.9}],
        }
    ],
}


def test_report_says_what_matters():
    text = report.markdown(DOCUMENT)
    entry = "combine/token_choice-T2048-D384"
    assert "| cpu | a \\| processor |" in text
    assert f"| {entry} | forward | index_add | 3000.0 us | 3.00x | 3.00-3.00 | 1e-07 | " in text
    assert "goal >= 2.8x: met" in text
    assert "limit 500.0 us (50%)" in text
    assert f"| {entry} | all | gather_sum | wrong |" in text
    assert f"- {entry}, forward: embedding_bag takes 0.90 of our time" in text
    assert "1 of 2 met" in text
    assert f"| {entry} | memory | index_add | <= 0.5 of it | 1.00x | **missed** |" in text
    assert "0.5 MiB kept for backward; 0.2 MiB gradients" in text
    assert text.rstrip().endswith("```\npython -m benchmarks.run --only combine\n```")
    assert "Interrupted" not in text


def test_an_interrupted_run_says_so():
    assert "Interrupted" in report.markdown({**DOCUMENT, "complete": False, "entries": []})


def test_compare_shows_our_change_and_that_of_the_peers():
    after = copy.deepcopy(DOCUMENT)
    after["entries"][0]["modes"]["forward"]["times"] = times(
        index_add=6e-3, embedding_bag=18e-4, ours=5e-4
    )
    text = report.compare(DOCUMENT, after)
    assert text.splitlines()[1].split() == [
        "combine/token_choice-T2048-D384",
        "forward",
        "1000.0",
        "us",
        "500.0",
        "us",
        "0.50x",
        "2.00x",
    ]
    assert "nothing" in report.compare({"entries": []}, DOCUMENT) or "no entry" in report.compare(
        {"entries": []}, DOCUMENT
    )


def test_report_command_reads_a_folder(tmp_path, capsys):
    output.write(tmp_path, DOCUMENT)
    assert report.main([str(tmp_path)]) == 0
    assert "embedding_bag takes 0.90" in (tmp_path / "results.md").read_text()
    assert report.main(["--compare", str(tmp_path), str(tmp_path / "results.json")]) == 0
    assert "1.00x" in capsys.readouterr().out


def test_results_are_not_overwritten(tmp_path, capsys):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "results.json").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        run.main(["--suite", "smoke", "--only", "dispatch", "--out", str(folder)])
    assert stop.value.code == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / "results.json").read_text() == "precious"
    assert output.claim(folder, force=True) == folder
    with pytest.raises(FileExistsError, match="not a folder"):
        output.claim(folder / "results.json", force=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--only", "nothing-like-it"], "no entry"), (["--only", "("], "regular expression")],
)
def test_a_bad_selection_is_explained(arguments, words, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert words in capsys.readouterr().err


def test_list_prints_the_entries_and_measures_nothing(capsys):
    assert run.main(["--list", "--only", "^combine/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("combine/") and "ours" in line for line in lines)


def test_plots_are_drawn(tmp_path):
    (path,) = plots.draw(tmp_path, DOCUMENT["entries"])
    assert path.name == "combine.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"\[bench\]"):
        plots.draw(tmp_path, DOCUMENT["entries"])
