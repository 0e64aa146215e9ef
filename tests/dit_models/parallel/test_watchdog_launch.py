"""Variables of torchrun are checked before ranks meet: every refusal says what to type."""

import pytest

from dit_models.parallel.launch import check_launch, world_size

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_MAX_RESTARTS": "2",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
}
SHARED = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
SETTING = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d"


def test_what_torchrun_sets_is_accepted():
    assert check_launch(TORCHRUN, "gloo") == []
    assert check_launch(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}, "gloo") == []


def test_the_number_of_processes():
    assert world_size(TORCHRUN) == 4
    assert world_size({}) == 1
    with pytest.raises(ValueError, match="WORLD_SIZE='four'; expected a whole number"):
        world_size({"WORLD_SIZE": "four"})


def test_other_launchers_need_only_four_variables():
    four = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert check_launch({name: TORCHRUN[name] for name in four}, "gloo") == []


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name):
    with pytest.raises(ValueError, match=f"^{name} not set.*torchrun --nproc-per-node"):
        check_launch({key: value for key, value in TORCHRUN.items() if key != name}, "gloo")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "4", "RANK=4; expected a number from 0 to 3"),
        ("RANK", "-1", "RANK='-1'; expected a whole number from 0 to 3"),
        ("RANK", "first", "RANK='first'; expected"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0; expected a number at least 1"),
        ("LOCAL_RANK", "2", "LOCAL_RANK=2; expected a number from 0 to 1"),
        ("LOCAL_WORLD_SIZE", "5", "LOCAL_WORLD_SIZE=5; expected a number from 1 to 4"),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000; expected a number from 1 to 65535"),
        ("TORCHELASTIC_MAX_RESTARTS", "²", "TORCHELASTIC_MAX_RESTARTS='²'; expected"),
    ],
)
def test_a_wrong_variable_is_refused(name, value, expected):
    with pytest.raises(ValueError, match=expected):
        check_launch(TORCHRUN | {name: value}, "gloo")


@pytest.mark.parametrize("backend", ["gloo", "nccl", "cpu:gloo,cuda:nccl"])
def test_restarts_that_will_fail_are_announced(backend):
    (warning,) = check_launch(TORCHRUN | SHARED, backend)
    assert "2 restarts" in warning
    assert SETTING in warning


def test_nothing_is_said_of_restarts_that_nobody_asked_for():
    assert check_launch(TORCHRUN | SHARED | {"TORCHELASTIC_MAX_RESTARTS": "0"}, "gloo") == []


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:nccl"])
def test_a_restart_that_cannot_connect_is_refused(backend):
    with pytest.raises(ValueError, match=r"restart 1 of 2.*cannot connect") as caught:
        check_launch(TORCHRUN | SHARED | {"TORCHELASTIC_RESTART_COUNT": "1"}, backend)
    assert SETTING in str(caught.value)


def test_the_setting_without_its_rendezvous_is_noticed():
    given = TORCHRUN | SHARED | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    (warning,) = check_launch(given, "gloo")
    assert "has no effect on this rendezvous" in warning
