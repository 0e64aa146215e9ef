"""The report's text and its command, and folders that are not overwritten."""

from pathlib import Path

import pytest

from benchmarks import output, report, run


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
            "calls": {"index_add": {"mode": "forward", "ops": 7, "device_reads": 1}},
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
    found = f"| {entry} | forward | index_add | 3.00 ms | 3.00x | 3.00-3.00 | 1e-07 | 7 | 1 | "
    assert found in text
    assert "goal >= 2.8x: met" in text
    assert "limit 500 us (50%)" in text
    assert f"| {entry} | all | gather_sum | wrong |" in text
    slower = f"| {entry} | forward | 1.00 ms | embedding_bag | 900 us | 0.90x (0.90-0.90) |"
    assert slower in text
    assert "1 of 2 met" in text
    assert f"| {entry} | memory, index_add | <= 0.5 of it | 1.00x | **missed** |" in text
    assert "0.5 MiB kept for backward; 0.2 MiB gradients" in text
    assert "```\npython -m benchmarks.run --only combine\n```" in text
    assert "interrupted" not in text


def test_pictures_stand_with_their_section():
    names = ("combine", "combine-2", "combine-cuda", "combine_skew")
    text = report.markdown(DOCUMENT, [Path(f"x/{name}.png") for name in names])
    assert "![combine](combine.png)" in text
    assert "![combine-2](combine-2.png)" in text
    assert "combine-cuda.png" not in text
    assert "combine_skew.png" not in text


def test_an_interrupted_run_says_so():
    assert "interrupted" in report.markdown({**DOCUMENT, "complete": False, "entries": []})


def test_report_command_reads_a_folder(tmp_path, capsys):
    output.write(tmp_path, DOCUMENT)
    (tmp_path / "combine.png").write_bytes(b"")
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "embedding_bag | 900 us" in text
    assert "![combine](combine.png)" in text
    assert report.main(["--compare", str(tmp_path), str(tmp_path / "results.json")]) == 0
    assert "1.00x" in capsys.readouterr().out


def test_a_file_of_another_name_has_its_report_beside_it(tmp_path):
    (tmp_path / "gpu-1.json").write_text(output.text(DOCUMENT))
    (tmp_path / "gpu-1-combine.png").write_bytes(b"")
    (tmp_path / "gpu-2-combine.png").write_bytes(b"")
    assert report.main([str(tmp_path / "gpu-1.json")]) == 0
    text = (tmp_path / "gpu-1.md").read_text()
    assert "![combine](gpu-1-combine.png)" in text
    assert "gpu-2" not in text


def test_what_is_no_result_is_said(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "results.json" in capsys.readouterr().err


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
    assert run.main(["--list", "--suite", "cpu", "--only", "^combine/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("combine/") and "ours" in line for line in lines)
