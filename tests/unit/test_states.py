"""Training states: complete or absent, checked when read, written beside the training."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from ddt_llama.config import UserError
from ddt_llama.states import (
    Kept,
    Saver,
    State,
    load_state,
    newest_state,
    save_state,
    states_after,
)


def state(step, value=1.0):
    weights = torch.arange(6.0).view(2, 3) * value
    return State(
        step,
        {
            "model.w": weights,
            "model.same": weights,
            "model.turned": weights.t(),
            "model.row": weights[1],
            "model.filled": torch.tensor(True),
            "optim.w/step": torch.tensor(float(step)),
            "optim.half": weights.bfloat16(),
        },
        {"loss": 0.1 + 0.2, "names": ["a"]},
    )


def written(folder):
    """Return the tensors of a state that one process wrote."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("[!.]*"))


def cut(folder):
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(b"cut")


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save_state(tmp_path, state(7))
    back = newest_state(tmp_path)
    assert back is not None
    wanted = state(7)
    assert (back.step, back.facts) == (7, wanted.facts)
    assert back.shapes == {name: tensor.shape for name, tensor in wanted.tensors.items()}
    tensors = {name: torch.zeros_like(tensor) for name, tensor in wanted.tensors.items()}
    back.read(tensors)
    for name, tensor in wanted.tensors.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_state_is_of_the_moment_when_it_was_saved(tmp_path, monkeypatch):
    """It is written while training changes the tensors."""
    from ddt_llama import states

    begins = threading.Event()
    save = states.state_dict_saver.save

    def later(*args, **kwargs):
        assert begins.wait(10)
        save(*args, **kwargs)

    monkeypatch.setattr(states.state_dict_saver, "save", later)
    tmp_path.joinpath("states").mkdir()
    saver = Saver(tmp_path / "states")
    weights = torch.ones(3)
    saver.save(State(1, {"model.w": weights}, {}), Kept())
    assert not steps(tmp_path / "states")  # training goes on
    weights += 1
    begins.set()
    saver.save(State(2, {"model.w": weights}, {}), Kept())  # waits for the first
    assert steps(tmp_path / "states") == [1]
    saver.wait()
    saver.close()
    for step in (1, 2):
        assert (
            written(tmp_path / "states" / f"step-0000000{step}")["model.w"].tolist() == [step] * 3
        )


def test_only_the_newest_and_milestones_are_kept_and_nothing_temporary(tmp_path):
    for step in (5, 10, 15, 20, 25):
        save_state(tmp_path, state(step), Kept(2))
    assert steps(tmp_path) == [20, 25]
    for step in (30, 35, 40, 45, 50):
        save_state(tmp_path, state(step), Kept(1, every=20))
    assert steps(tmp_path) == [20, 40, 50]


def test_what_a_kill_left_of_another_step_is_cleared_away(tmp_path):
    (tmp_path / ".step-00000003.partial").mkdir(parents=True)
    save_state(tmp_path, state(5))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_damaged_state_never_crowds_out_a_good_one(tmp_path):
    for step in (5, 10):
        save_state(tmp_path, state(step))
    cut(tmp_path / "step-00000010")
    with pytest.warns(UserWarning, match="skipped"):
        assert newest_state(tmp_path).step == 5
    save_state(tmp_path, state(7), Kept(1, damaged=frozenset(states_after(tmp_path, 5))))
    assert steps(tmp_path) == [7]
    assert newest_state(tmp_path).step == 7


def test_training_past_a_damaged_state_keeps_the_good_ones(tmp_path):
    for step in (5, 10, 12):
        save_state(tmp_path, state(step), Kept(3))
    cut(tmp_path / "step-00000012")
    save_state(tmp_path, state(15), Kept(2, damaged=frozenset(states_after(tmp_path, 10))))
    assert steps(tmp_path) == [10, 15]


def test_a_state_without_its_marker_is_no_state(tmp_path):
    save_state(tmp_path, state(5), Kept(3))
    (save_state(tmp_path, state(6), Kept(3)) / "COMPLETE").unlink()
    with pytest.warns(UserWarning, match="step-00000006: incomplete"):
        assert newest_state(tmp_path).step == 5
    again = save_state(tmp_path, state(6, value=2.0), Kept(3))  # replaces the damaged one
    assert torch.equal(written(again)["model.w"], state(6, 2.0).tensors["model.w"])


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_is_found_by_its_checksum(tmp_path, damage):
    folder = save_state(tmp_path, state(5))
    (path,) = folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(UserError, match=r"safetensors: damaged"):
        load_state(folder)
    with pytest.warns(UserWarning, match="checkpoint skipped"):
        assert newest_state(tmp_path) is None


def test_a_kill_while_writing_leaves_the_previous_state(tmp_path, monkeypatch):
    """Whatever the writing got to, the folder has no name until all is written."""
    save_state(tmp_path, state(5), Kept(3))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddt_llama.states.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, state(6), Kept(3))
    monkeypatch.undo()
    assert newest_state(tmp_path).step == 5
    save_state(tmp_path, state(6), Kept(3))
    assert newest_state(tmp_path).step == 6


def test_a_place_that_refuses_is_told_and_left_clean(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"step-00000001: cannot be written \(.*Not a directory"):
        save_state(tmp_path / "file", state(1))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_state_before_and_is_told_in_time(tmp_path, monkeypatch):
    save_state(tmp_path, state(5))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddt_llama.states.os.fsync", full)
    saver = Saver(tmp_path)
    saver.save(state(6), Kept())  # returns at once
    with pytest.raises(UserError, match=r"step-00000006: .*No space left on device.*free the disk"):
        saver.save(state(7), Kept())
    saver.close()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert newest_state(tmp_path).step == 5
