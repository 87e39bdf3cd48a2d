"""What people see: a line a record without a terminal, a bar with the time left on one."""

import pytest

from ddt_llama.training.progress import Display, duration

RECORD = {"step": 30, "loss": 0.5, "lr": 1e-3, "images_per_second": 1234.0, "step_ms": 2000.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_without_a_terminal_each_record_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    display = Display(100, 0)
    display.record(RECORD)
    display.message("done")
    display.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step      30/100  loss 0.5  lr 0.001  1,234 images/s  2 min 20 s left"
    assert last == "done"


def test_what_tokens_hold_is_told_where_it_was_measured(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    display = Display(100, 0)
    tokens = {"probe.own": 0.0081, "probe.none": 0.14, "codebook.used": 0.93}
    display.record({**RECORD, **tokens})
    display.close()
    first = capsys.readouterr().out.splitlines()[0]
    told = "error at t = 1 with own tokens 0.0081, none 0.14, codes used 0.93"
    assert first == f"step      30  tokens: {told}"


def test_on_a_terminal_the_bar_shows_the_same_and_is_taken_down(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    display = Display(100, 20)
    try:
        display.record(RECORD)
    finally:
        display.close()
    shown = capsys.readouterr().out
    assert "30/100" in shown
    assert "2 min 20 s left" in shown


def test_other_processes_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    display = Display(100, 0)
    display.record(RECORD)
    display.close()
    assert capsys.readouterr().out == ""
