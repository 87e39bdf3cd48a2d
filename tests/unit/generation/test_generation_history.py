"""What a release knows of its trainings, and what it does not."""

from pathlib import Path

import pytest
import torch

from ddt_llama.config import UserError, save_json, to_dict
from ddt_llama.generation.history import NEW, History, Training, history_of
from ddt_llama.language import Batch
from ddt_llama.recipes.jobs import mean_length

SEE = Training("tokenizer", "a", 10, 2e9)
READ = Training("language", "b", 5, 1e9)


def test_trainings_add_up_by_part() -> None:
    both = NEW + History((SEE,)) + History((READ,))
    assert both.trainings == (SEE, READ)
    assert both.flops == 3e9
    assert both.of("language").trainings == (READ,)
    assert NEW.flops == 0


def test_what_is_not_known_stays_so() -> None:
    unknown = History()
    assert (unknown + History((SEE,))).flops is None
    assert (History((SEE,)) + unknown).flops is None
    assert unknown.of("tokenizer").trainings is None


def test_a_folder_says_it_or_nothing(tmp_path: Path) -> None:
    assert history_of(tmp_path) == History()
    save_json(tmp_path / "config.json", to_dict(History((SEE, READ))))
    assert history_of(tmp_path) == History((SEE, READ))
    save_json(tmp_path / "config.json", {"trainings": "many"})
    with pytest.raises(UserError, match="trainings"):
        history_of(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert history_of(tmp_path) == History()


def test_padding_is_no_length() -> None:
    def stream(step: int) -> Batch:
        odd = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
        mask = odd if step % 2 else torch.ones(2, 4, dtype=torch.long)
        return Batch(mask, mask, mask)

    assert mean_length(stream, 2) == (4 + 4 + 3 + 1) / 4
