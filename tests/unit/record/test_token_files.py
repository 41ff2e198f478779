"""What training made of tokens, on disk: it comes back as it was, step by step, and what is no such file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctpo_megatron.errors import InputError
from ctpo_megatron.record.token_files import StoredTokens, TokenFiles, TokenRecord, token_file

RECORD = TokenRecord(
    np.array([2, 0, 3]),
    np.array([1e-5, -0.25, 0.5, np.nan, 1e9]),
    np.array([0.0, 0.125, -7.0, np.nan, -np.inf]),
    np.array([0, 1, 2, 4, 3], np.uint8),
)


def test_streams_come_back_sample_by_sample(tmp_path: Path) -> None:
    TokenFiles(tmp_path).write(3, RECORD)
    stored = StoredTokens(tmp_path / "tokens" / token_file(3))
    assert stored.lengths.tolist() == [2, 0, 3]
    first, last = stored.samples(0, 1), stored.samples(1, 2)
    assert first.gap.tolist() == pytest.approx([1e-5, -0.25], rel=1e-2)
    assert first.log_ratio.tolist() == [0.0, 0.125]
    assert last.fate.tolist() == [2, 4, 3]
    assert last.gap[0] == 0.5
    assert np.isnan(last.gap[1])
    assert last.gap[2] == 65504  # the largest of float16, not infinity
    assert last.log_ratio[2] == -65504


def test_steps_that_are_made_again_are_deleted(tmp_path: Path) -> None:
    files = TokenFiles(tmp_path)
    for step in (1, 2, 3):
        files.write(step, RECORD)
    TokenFiles(tmp_path, first_step=2)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [token_file(1)]


@pytest.mark.parametrize("lengths", [[2, 2], [2, 0, 4]])
def test_lengths_that_do_not_fit_are_refused(tmp_path: Path, lengths: list[int]) -> None:
    TokenFiles(tmp_path).write(1, TokenRecord(np.array(lengths), RECORD.gap, RECORD.log_ratio, RECORD.fate))
    with pytest.raises(InputError, match="streams do not have"):
        StoredTokens(tmp_path / "tokens" / token_file(1))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match="no record of tokens"):
        StoredTokens(tmp_path / "x.safetensors")
