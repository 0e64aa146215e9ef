"""The page of stored results: every section, pictures, and that it is up to date."""

import json

import pytest

from benchmarks import output, page, sections, words

from . import documents


def about(document, pictures=None):
    return "\n".join(sections.about(document, pictures or {}, "###"))


def section(text, title):
    """The lines of a section."""
    return text.split(f"### {title}\n", 1)[1].split("\n### ", 1)[0]


def test_the_page_is_what_the_stored_results_give():
    changes = page.difference(page.PAGE.read_text(), page.default_page())
    assert not changes, f"run python -m benchmarks.page\n{changes}"


def test_machine_and_how_to_repeat():
    text = about(documents.document())
    assert "| processor | A \\| Processor, avx2 |" in text
    assert "| used | 4 cores, 2 threads |" in text
    assert "git checkout 0123abc\npython -m benchmarks.run --only layer\n" in text
    assert "amx" not in text
    text = about(documents.document(environment=documents.environment() | {"threads": 1}))
    assert "| used | 4 cores, 1 thread |" in text


def test_wins_and_losses():
    text = about(documents.document())
    wins = section(text, "What wins")
    # The layer is slower forward and faster in both, the series 0.26, 0.51 and 1.02, loads faster.
    assert "of 7 comparisons ours is faster in 3, level (within 3 %) in 1 and slower in 3" in wins
    assert "| dit_moe_layer | 2 | 1 | 0 | 1 | 1.20x | 2.00x |" in wins
    row = "| D384-T2048 | both | 3.00 ms | good_eager 1.50x (1.35-1.65) | published 2.00x"
    assert row in wins
    slower = section(text, "Where it is slower")
    assert "| 1.00 ms | good_eager | 900 us | 0.90x (0.81-0.99) |" in slower
    assert "| dit_moe_layer/D384-T2048 | peak | published | 0.50x |" in slower
    assert "dense_limit" not in slower
    assert slower.index("0.26x") < slower.index("0.90x")


def test_a_published_model_that_is_faster_stands_with_the_slower_ones():
    model = documents.document()["models"][0]
    slow = model | {"name": "DiT-MoE-S", "against": "published", "ratio": 0.5}
    slow |= {"seconds": {"ours": 0.4, "published": 0.2}, "quartiles": [0.45, 0.55]}
    text = section(about(documents.document(models=[model, slow])), "Where it is slower")
    row = "| DiT-MoE-S, 8 images | whole model | 400 ms | published | 200 ms | 0.50x (0.45-0.55) |"
    assert row in text
    assert "EC-DiT" not in text  # beside its dense twin, another function


def test_more_than_the_limit_is_explained():
    words = "the rates were measured lower than what the machine then reached"
    assert words not in about(documents.document())
    times = {"both": {"one_hot": 2.0, "ours": 1.0}}
    entry = documents.result("ec_layer/x", "ec_layer", times, limit=1.2)
    assert words in about(documents.document(entry))


def test_nothing_slower_is_said_in_words():
    entry = documents.result("ec_layer/x", "ec_layer", {"both": {"one_hot": 2.0, "ours": 1.0}})
    text = section(about(documents.document(entry)), "Where it is slower")
    assert text.strip() == "No alternative takes more than 3 % less time than ours in this run."


def test_series_have_exponents_and_ends():
    text = section(about(documents.document()), "Cost against tokens, experts, capacity and width")
    row = "| scaling_ec_layer_tokens | tokens 256-1024 | both | 1.00 | one_hot 2.00 |"
    assert f"{row} one_hot 0.26x → one_hot 1.02x |" in text


def test_uneven_loads_are_set_beside_the_even_one():
    text = section(about(documents.document()), "Uneven loads")
    row = "| both | 1.00 ms | 1.00x | published 4.00x |"
    assert f"| dit_moe_skew/uniform-T512 | 1.00 {row}" in text
    assert (
        "| dit_moe_skew/collapsed-T512 | 4.00 | both | 1.50 ms | 1.50x | published 2.67x |" in text
    )


def test_what_a_call_does():
    text = about(documents.document())
    row = "| dit_moe_layer/D384-T2048 | both | 12 / 0 | published 90 / 8 |"
    assert row in section(text, "Operators and device reads of a call")
    first = section(text, "First calls")
    row = "| ec_layer | ours_compiled | 2.50 s | 8.00 s | 1.00 ms | 3.00 s, 2.00 ms | 0 | 1 |  |"
    assert row in first
    assert "| ec_layer | compiled |  |  |  |  |  |  | no C++ compiler |" in first


def test_whole_models_stages_and_the_limit():
    text = about(documents.document())
    row = "| EC-DiT-S/2-8E | 8 | ours 400 ms, dense twin 380 ms | ours 20, dense twin 21.1 |"
    assert f"{row} dense twin 0.95x | 0.94-0.97 |" in section(text, "Whole models")
    shares = "| 200 ms | experts 75%, router 24%, 1% in small ones |"
    assert shares in section(text, "Share of time by stage")
    limit = section(text, "Distance from the machine's limit")
    assert "Measured: float32 products 150 GFLOP/s, copies 12.0 GB/s." in limit
    assert "| D384-T2048 | forward |" not in limit
    assert "| forward | 1.00 ms | 2.00 TFLOP/s | 50% | 56% |" in limit
    dense = section(text, "Beside a dense MLP")
    assert "| dit_moe_layer/D384-T2048 | both | 3.00 ms | 3.00 ms | 1.00x |" in dense


def test_providers_and_what_was_not_measured():
    text = about(documents.document())
    found = section(text, "Providers")
    assert "| Liger | 0.8 | took part |" in found
    assert "| megablocks |  | left out | No module named 'megablocks' |" in found
    assert "# megablocks\npip install --no-deps megablocks\n" in found
    assert "pip install liger" not in found
    row = "| megablocks_grouped | skipped | needs a CUDA GPU | dit_moe_layer/D384-T2048 |"
    assert row in found
    assert "| model_layer/DiT-MoE-G | needs 40 GiB of memory |" in section(text, "Not measured")


def test_checks_of_a_gpu_are_shown():
    tests = {"GPU tests": {"words": "2 failed, 90 passed", "failed": True, "seconds": 9.0}}
    sanitizer = {"memcheck": {"words": "found nothing", "failed": False, "seconds": 9.0}}
    text = about(documents.document(tests=tests, sanitizer=sanitizer))
    found = section(text, "Tests before measuring")
    assert "- GPU tests: **failed**: 2 failed, 90 passed\n- memcheck: found nothing" in found


def test_what_a_document_lacks_is_named_and_has_no_section():
    entry = documents.result("combine/x", "combine", {"forward": {"index_add": 2.0, "ours": 1.0}})
    old = {key: documents.document(entry)[key] for key in ("environment", "settings", "complete")}
    text = about(old | {"entries": [entry]})
    for title in ("Memory", "First calls", "Whole models", "Not measured", "Goals"):
        assert f"### {title}" not in text
    assert "Not part of this result: goals, cost against tokens" in text
    assert "memory, " in text.split("Not part of this result:")[1]


def test_devices_of_one_document_stand_apart():
    gpu = documents.layer() | {
        "device": "cuda",
        "name": "gpu_layer/x",
        "probes": {"ours": {"mode": "both", "kernels": 9, "host_syncs": 0}},
    }
    pictures = {"dit_moe_layer": "cpu.png", "gpu_layer-cuda": "gpu.png", "roofline-cuda": "r.png"}
    pictures |= {"stages-x": "stages.png", "stages-y-cuda": "stages-gpu.png"}
    text = about(documents.document(documents.layer(), gpu), pictures)
    assert "![dit moe layer](cpu.png)" in section(text, "What wins, CPU")
    assert "gpu.png" not in section(text, "What wins, CPU")
    assert "![gpu layer](gpu.png)" in section(text, "What wins, GPU")
    assert "r.png" in section(text, "Distance from the machine's limit, GPU")
    shares = section(text, "Share of time by stage")
    assert "![stages-x](stages.png)" in shares
    assert "![stages-y](stages-gpu.png)" in shares
    counted = section(text, "Operators and device reads of a call, GPU")
    assert "| gpu_layer/x | both | 9 / 0 |" in counted


@pytest.fixture
def results(tmp_path):
    """A folder with a run, a GPU's file, and something else."""
    folder = tmp_path / "results"
    (folder / "mine").mkdir(parents=True)
    output.write(folder / "mine", documents.document())
    (folder / "mine" / "memory.png").write_bytes(b"")
    (folder / "other.json").write_text('{"kernels": []}')
    return folder


def test_results_of_a_folder_are_found_with_their_pictures(results):
    gpu = documents.document(documents.layer() | {"device": "cuda"})
    gpu["environment"]["device"] = {"gpu": "A GPU"}
    (results / "a-gpu.json").write_text(json.dumps(gpu))
    (results / "a-gpu-memory-cuda.png").write_bytes(b"")
    first, second = page.find(results)
    assert first.path.name == "a-gpu.json"
    assert list(first.pictures) == ["memory-cuda"]
    assert list(second.pictures) == ["memory"]
    text = page.page([first, second], results.parent / "page.md")
    assert "## a-gpu: A GPU; 4 cores of A | Processor" in text
    assert "## mine: 4 cores of A | Processor" in text
    assert "All figures: [results.json](results/mine/results.json)." in text
    assert "![memory](results/a-gpu-memory-cuda.png)" in text
    assert "![memory](results/mine/memory.png)" in text
    assert "No result of" not in text


def test_links_hold_where_a_name_has_spaces(results):
    (results / "mine").rename(results / "my (own) run")
    text = page.page(page.find(results), results.parent / "page.md")
    assert "![memory](results/my%20%28own%29%20run/memory.png)" in text


def test_a_cell_is_neither_a_column_nor_a_tag():
    rows = list(words.table(("a", "b"), [("x | y", "<class 'X'> <= 3\nnext")]))
    assert rows[2] == "| x \\| y | \\<class 'X'> <= 3 next |"


def test_a_device_without_results_is_named(results):
    text = page.page(page.find(results), results.parent / "page.md")
    assert "**No result of a GPU is stored: nothing on this page was measured on one.**" in text


def test_the_command_writes_a_page_of_ones_own_runs_and_checks_it(results, tmp_path, capsys):
    out = tmp_path / "page.md"
    arguments = ["--results", str(results), "--out", str(out)]
    assert page.main(arguments) == 0
    assert out.read_text().startswith(page.MARK)
    assert page.main([*arguments, "--check"]) == 0
    changed = documents.document()
    changed["entries"][0]["modes"]["both"]["times"]["ours"]["median"] = 7.0
    output.write(results / "mine", changed)
    capsys.readouterr()
    assert page.main([*arguments, "--check"]) == 1
    assert "7.00 s" in capsys.readouterr().out
    assert "7.00 s" not in out.read_text()
    assert page.main(arguments) == 0
    assert "7.00 s" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--results", "nowhere", "--out", "page.md"], "no results.json in nowhere"),
        (["--results", "nowhere"], "belong together"),
        (["--out", "page.md"], "belong together"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        page.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_file_of_somebody_else_is_kept(results, tmp_path, capsys):
    out = tmp_path / "notes.md"
    out.write_text("precious")
    arguments = ["--results", str(results), "--out", str(out)]
    with pytest.raises(SystemExit):
        page.main(arguments)
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert page.main([*arguments, "--force"]) == 0
