"""What an analysis draws."""

from types import SimpleNamespace

import pytest

from dit_models.analyze.subjects import choose_subjects
from dit_models.config import DataConfig
from dit_models.data import DatasetInfo


def run_of(num_classes: int) -> SimpleNamespace:
    backbone = SimpleNamespace(config=SimpleNamespace(num_classes=num_classes))
    info = DatasetInfo("digit-scenes", 32, 3, num_classes, has_captions=not num_classes)
    return SimpleNamespace(
        artist=SimpleNamespace(model=SimpleNamespace(backbone=backbone)),
        info=info,
        config=SimpleNamespace(data=DataConfig(name="digit-scenes")),
    )


def choose(classes=0, labels=None, captions=None, captions_file=None, each=2):
    return choose_subjects(run_of(classes), labels, captions, captions_file, each)


def test_every_class_alike_and_in_turn():
    subjects = choose(classes=3)
    assert subjects.prompts.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert subjects.groups == [0, 1, 2, 0, 1, 2]
    assert subjects.group_names == ["0", "1", "2"]
    assert subjects.title(4) == "class 1"


def test_some_classes_keep_their_names():
    subjects = choose(classes=10, labels=[7, 3, 7])
    assert subjects.prompts.labels.tolist() == [7, 3, 7, 3]
    assert subjects.group_names == ["7", "3"]
    assert subjects.groups == [0, 1, 0, 1]
    assert subjects.title(1) == "class 3"


def test_captions_are_groups_of_their_own_or_of_a_file(tmp_path):
    subjects = choose(captions=["a cat", "a dog"])
    assert subjects.prompts.captions == ["a cat", "a dog", "a cat", "a dog"]
    assert subjects.group_names == ["a cat", "a dog"]
    assert subjects.title(1) == "a dog"
    path = tmp_path / "captions.txt"
    path.write_text("pets\ta cat\n\npets\ta dog\na car\n", encoding="utf-8")
    subjects = choose(captions_file=path, each=1)
    assert subjects.prompts.captions == ["a cat", "a dog", "a car"]
    assert subjects.group_names == ["pets", "a car"]
    assert subjects.groups == [0, 0, 1]


def test_scenes_are_grouped_by_their_objects():
    subjects = choose(each=1)
    assert set(subjects.group_names) == {"1 object", "2 objects"}
    for caption, group in zip(subjects.prompts.captions, subjects.groups, strict=True):
        two = " a " in caption
        assert subjects.group_names[group] == ("2 objects" if two else "1 object")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": 10, "labels": [10, 3]}, r"--labels \[10\]: expected 0 to 9"),
        ({"classes": 10, "captions": ["a"]}, "this model reads labels"),
        ({"labels": [1]}, "this model reads captions"),
        ({"classes": 10, "each": 0}, "--images-per-class 0; expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        choose(**arguments)


def test_wrong_files_are_refused(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no caption"):
        choose(captions_file=empty)
    with pytest.raises(ValueError, match="No such file"):
        choose(captions_file=tmp_path / "none.txt")
    with pytest.raises(ValueError, match="both given"):
        choose(captions=["a"], captions_file=empty)
