"""Tensors on disk: complete or absent, checked when read, and clear about what does not fit."""

import json

import pytest
import torch
from torch import nn

from ddt_llama.checkpoint import (
    load_into,
    load_tensors,
    put_back,
    replaced,
    save_release,
    save_tensors,
)
from ddt_llama.config import UserError


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "release"
    with replaced(folder) as partial:
        (partial / "a").write_text("old")
        assert not folder.exists()
    with pytest.raises(FileNotFoundError), replaced(folder) as partial:
        (partial / "absent" / "a").write_text("half")
    assert (folder / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    with replaced(folder) as partial:
        assert not list(partial.iterdir())
        (partial / "b").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_a_folder_lost_between_two_renames_is_put_back(tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "a").write_text("old")
    folder.rename(tmp_path / ".release.old")
    put_back(folder)
    assert (folder / "a").read_text() == "old"
    put_back(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_a_release_halves_in_bfloat16_and_comes_back_as_float32(tmp_path):
    weights = {"w": torch.randn(64, 64), "codes": torch.arange(9)}
    save_release(tmp_path / "full", weights, {"a": 1})
    save_release(tmp_path / "half", weights, {"a": 1}, torch.bfloat16)
    full, half = (tmp_path / name / "model.safetensors" for name in ("full", "half"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == {"a": 1}
    assert torch.equal(load_tensors(full)["w"], weights["w"])
    back = load_tensors(half)
    assert back["w"].dtype == torch.float32
    assert torch.equal(back["w"], weights["w"].bfloat16().float())
    assert torch.equal(back["codes"], weights["codes"])
    assert load_tensors(half, dtype=None)["w"].dtype == torch.bfloat16


def test_eight_bits_quarter_the_file_and_keep_each_row_to_half_a_unit(tmp_path):
    torch.manual_seed(0)
    rows = torch.randn(64, 200) * torch.logspace(-6, 3, 64)[:, None]
    weights = {"w": rows, "zero": torch.zeros(3, 70), "norm": torch.randn(64), "book": rows[:, :8]}
    weights["codes"] = torch.arange(9)
    path = tmp_path / "model.safetensors"
    save_tensors(path, weights, torch.int8)
    assert path.stat().st_size < 64 * 200 * 1.25 + 4000
    back = load_tensors(path)
    assert set(back) == set(weights)
    unit = rows.abs().amax(1, keepdim=True) / 127
    assert ((back["w"] - rows).abs() <= 0.501 * unit).all()
    assert (back["w"] != rows).any()
    assert not back["zero"].any()
    assert torch.equal(back["norm"], weights["norm"].half().float())
    assert torch.equal(back["book"], weights["book"].half().float())  # short rows
    assert torch.equal(back["codes"], weights["codes"])


def test_a_scale_without_its_matrix_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w.row_scale": torch.ones(3, 1)})
    with pytest.raises(UserError, match="without its matrix"):
        load_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"PK\x03\x04" + bytes(100)])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="truncated or not a safetensors file") as error:
        load_tensors(path)
    assert "\n" not in str(error.value)


def test_a_truncated_or_absent_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="truncated"):
        load_tensors(path)
    with pytest.raises(UserError, match="no such file"):
        load_tensors(tmp_path / "absent.safetensors")


def test_an_unwritable_place_is_refused_and_left_clean(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        save_tensors(tmp_path / "file" / "model.safetensors", {"w": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_loading_names_the_first_differences_and_changes_nothing():
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    wrong = {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        load_into(net, wrong, "model.safetensors")
    message = str(error.value)
    for words in ("bias missing", "extra unknown", "weight is [2, 4], expected [2, 3]"):
        assert words in message
    assert torch.equal(net.weight, before)
    load_into(net, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "x")
    assert torch.equal(net.weight, torch.ones(2, 3))


def test_others_may_read_weights_as_any_new_file(tmp_path):
    save_tensors(tmp_path / "w.safetensors", {"w": torch.ones(2)})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
