"""What the tokenize commands are as processes: the device they pick, how they refuse."""

import pytest
import torch

from tokenize_stage.process import pick_device, refuse


def test_auto_follows_the_place_on_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert str(pick_device("encode.device", "auto", {"SLURM_LOCALID": "6"})) == "cuda:2"
    assert str(pick_device("encode.device", "auto", {})) == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert str(pick_device("encode.device", "auto", {"SLURM_LOCALID": "6"})) == "cpu"


@pytest.mark.parametrize("option", ["encode.device", "training.device"])
@pytest.mark.parametrize(
    "name, message", [("cuda:99", "=cuda:99, but torch sees"), ("abacus", "=abacus: legal are")]
)
def test_an_error_names_the_option_it_came_from(option: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=option + message):
        pick_device(option, name, {})


def test_refusing_is_one_line_and_a_status(capsys: pytest.CaptureFixture) -> None:
    assert refuse(ValueError("task=2: no")) == 2
    assert capsys.readouterr() == ("", "error: task=2: no\n")
