"""The index and the parts of the trajectory viewer: what is in them, what is kept, and what an earlier call's work saves."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpo_megatron.record.token_files import TokenFiles, TokenRecord
from ctpo_megatron.record.trajectories import TrajectoryFiles
from ctpo_megatron.report.viewer import build as building
from ctpo_megatron.report.viewer.build import Options, build
from ctpo_megatron.report.viewer.section import trajectories_section
from ctpo_megatron.report.viewer.store import PartStore
from ctpo_megatron.report.viewer.vocabulary import Vocabulary, find_vocabulary
from ctpo_megatron.types import AttemptId, GroupId, Prompt, TrajectoryGroup
from tests.support.trajectory_runs import HARM, HOSTILE, SPECIAL, record_of, text_ids, trajectory, write_step, write_tokenizer

TEXTS = ("one", "two two", HOSTILE)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    for step in (1, 2):
        write_step(run_dir, step, *TEXTS)
    write_tokenizer(run_dir / "model")
    return run_dir


def made(run_dir: Path, beside: Path, inside: int = 0, **options: Any) -> tuple[dict[str, Any], PartStore]:
    store = PartStore(beside, inside)
    return build(run_dir, beside, store, find_vocabulary([run_dir / "model"]), Options(**options)), store


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def part(beside: Path, name: str) -> tuple[list[dict[str, Any]], bytes]:
    script = (beside / f"{name}.js").read_text()
    whole = unpacked(json.loads(script.removeprefix("ctpoPart(").removesuffix(")\n")))
    (size,) = struct.unpack("<I", whole[:4])
    return json.loads(whole[4 : 4 + size]), whole[4 + size :]


def test_the_index_says_what_ranks_and_names_a_trajectory(run: Path, tmp_path: Path) -> None:
    index, _ = made(run, tmp_path / "beside")
    columns = index["columns"]
    assert {len(column) for column in columns.values()} == {6}
    assert columns["id"][:3] == ["g00000001.0", "g00000001.1", "g00000001.2"]
    assert columns["reward"][:3] == [0.0, 1.0, 2.0]
    assert columns["sampled"][:2] == [3 + 5, 7 + 5 + 5]  # with the branch
    assert columns["tokens"][:2] == [5 + 3 + 18 + 5, 5 + 7 + 18 + 5 + 5 + 5]
    assert columns["clipped"][:2] == pytest.approx([2 / 8, 4 / 17], rel=1e-3)
    assert columns["gap"][:3] == pytest.approx([0.01, 0.02, 0.03], rel=1e-2)
    assert (columns["oldest"][5], columns["newest"][5]) == (1, 2)
    assert [index["files"][number]["step"] for number in columns["file"]] == [1, 1, 1, 2, 2, 2]
    assert index["names"]["source"] == ["contest"]
    assert columns["prompt"][0] == "contest:1"
    assert index["notes"] == []


def test_a_part_holds_all_tokens_and_what_became_of_them(run: Path, tmp_path: Path) -> None:
    index, _ = made(run, tmp_path / "beside")
    facts, planes = part(tmp_path / "beside", index["parts"][0])
    second = facts[index["columns"]["place"][1]]
    assert second["segments"] == [[0, 5, 0], [1, 7, 0], [2, 18, 0], [1, 5, 0], [0, 5, 1], [1, 5, 1]]
    assert second["versions"] == [[0, 7], [1, 5], [0, 5]]
    n, m, begin = second["tokens"], second["sampled"], second["begin"]
    low, middle = (np.frombuffer(planes, np.uint8, n, begin + n * plane).astype(int) for plane in (0, 1))
    expected = [*text_ids("What?two twotool <b>bold</b>"), HARM, SPECIAL, *text_ids("done"), SPECIAL, *text_ids("Else?aside")]
    assert (low + 256 * middle).tolist() == expected
    at = begin + 3 * n
    high, rest = (np.frombuffer(planes, np.uint8, m, at + m * plane).astype(np.uint16) for plane in (0, 1))
    assert (high << 8 | rest).view(np.float16)[[0, 7]].tolist() == [-0.5, -3.0]
    high, rest = (np.frombuffer(planes, np.uint8, m, at + m * (2 + plane)).astype(np.uint16) for plane in (0, 1))
    assert (high << 8 | rest).view(np.float16).tolist() == pytest.approx([0.02] * m, rel=0.008)
    assert np.frombuffer(planes, np.uint8, m, at + 6 * m).tolist() == [1, 1] + [0] * 10 + [1, 1, 0, 0, 0]


def test_small_runs_are_inside_the_page_and_nothing_is_beside_it(run: Path, tmp_path: Path) -> None:
    section = trajectories_section([run], tmp_path / "page.html")
    assert section is not None
    assert 'data-part="index"' in section.html
    assert not (tmp_path / "page_files").exists()
    assert "<img" not in section.html
    assert "harmed" not in section.html


def test_runs_have_parts_of_their_own(run: Path, tmp_path: Path) -> None:
    section = trajectories_section([run, tmp_path, run], tmp_path / "page.html")
    assert section is not None
    assert section.html.count('class="tv"') == 2  # a directory without rows has none
    assert 'data-key="trajectories-2"' in section.html
    assert trajectories_section([tmp_path], tmp_path / "page.html") is None


def test_a_page_holds_some_of_each_kind_where_not_all_fit(run: Path, tmp_path: Path) -> None:
    texts = [f"{number}" * (1 + number) for number in range(9)]
    write_step(run, 1, *texts)
    index, _ = made(run, tmp_path / "beside", most_tokens=1)
    places = [part >= 0 for part in index["columns"]["part"]]
    assert (places[0], places[8]) == (True, True)  # the worst, and the best, which is the longest and drifted most
    assert sum(places) < 6
    assert "tokens of" in index["notes"][0]
    assert len(places) == 9


def test_what_has_not_changed_is_not_read_again(run: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made(run, tmp_path / "beside")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "beside").glob("step_*")}
    write_step(run, 3, "three")
    index, _ = made(run, tmp_path / "beside", progress=told.append)
    assert told == ["index of step_00000003.jsonl", "tokens of step_00000003.jsonl"]
    assert {name: (tmp_path / "beside" / name).stat().st_mtime_ns for name in before} == before
    assert len(index["columns"]["id"]) == 7
    write_step(run, 2, "other")  # a step that was made again; the ones after it are gone
    index, _ = made(run, tmp_path / "beside")
    assert index["columns"]["excerpt"] == [*TEXTS, "other"]
    assert not (tmp_path / "beside" / "step_00000003.0.js").exists()


def test_a_part_that_is_gone_is_made_again(run: Path, tmp_path: Path) -> None:
    index, _ = made(run, tmp_path / "beside")
    (tmp_path / "beside" / f"{index['parts'][1]}.js").unlink()
    made(run, tmp_path / "beside")
    assert (tmp_path / "beside" / f"{index['parts'][1]}.js").exists()


def test_parts_are_cut_where_they_are_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PART_TOKENS", 30)
    index, _ = made(run, tmp_path / "beside")
    assert len(index["parts"]) > 2
    for number, name in enumerate(index["parts"]):
        inside = [i for i, part in enumerate(index["columns"]["part"]) if part == number]
        facts, _ = part(tmp_path / "beside", name)
        assert [facts[index["columns"]["place"][i]]["id"] for i in inside] == [index["columns"]["id"][i] for i in inside]


def test_without_a_tokenizer_parts_have_the_text_and_the_page_says_so(run: Path, tmp_path: Path) -> None:
    (run / "model" / "tokenizer.json").unlink()
    index, _ = made(run, tmp_path / "beside")
    assert "tokenizer" in index["notes"][0]
    assert part(tmp_path / "beside", index["parts"][0])[0][2]["text"] == HOSTILE


def test_without_a_record_of_tokens_there_is_no_rank_by_it(run: Path, tmp_path: Path) -> None:
    for path in (run / "tokens").iterdir():
        path.unlink()
    index, _ = made(run, tmp_path / "beside")
    assert set(index["columns"]["clipped"]) == {None}
    assert "log.save_tokens" in index["notes"][0]


def test_a_record_of_other_trajectories_is_left_out_with_a_word(run: Path, tmp_path: Path) -> None:
    TokenFiles(run, 2).write(2, record_of([trajectory(2, 0, "another", 0.0)]))
    index, _ = made(run, tmp_path / "beside")
    assert "is not of the trajectories" in index["notes"][0]
    assert index["columns"]["gap"][3:] == [None] * 3
    assert index["columns"]["gap"][0] is not None


def test_lines_that_are_no_rows_are_left_out_with_a_word(run: Path, tmp_path: Path) -> None:
    (run / "tokens" / "step_00000002.safetensors").unlink()
    with (run / "rollouts" / "step_00000002.jsonl").open("ab") as file:
        file.write(b'{"id": "half')
    index, _ = made(run, tmp_path / "beside")
    assert len(index["columns"]["id"]) == 6
    assert "step_00000002.jsonl: 1 lines" in index["notes"][0]


def test_numbers_that_are_not_finite_have_their_names(run: Path, tmp_path: Path) -> None:
    whole = [trajectory(3, 0, "x", float("-inf"))]
    record = record_of(whole)
    empty = TokenRecord(record.lengths, record.gap * np.nan, record.log_ratio * np.nan, np.full_like(record.fate, 4))
    write_step(run, 3, "x")
    TokenFiles(run, 3).write(3, empty)
    path = run / "rollouts" / "step_00000003.jsonl"
    path.write_text(path.read_text().replace('"reward": 0.0', '"reward": "-Infinity"').replace("-0.5", '"NaN"'))
    index, _ = made(run, tmp_path / "beside")
    assert index["columns"]["reward"][-1] == "-Infinity"
    assert [index["columns"][name][-1] for name in ("clipped", "gap", "ratio")] == [None] * 3


def test_evaluations_have_sources_of_their_own(run: Path, tmp_path: Path) -> None:
    for benchmark, number in (("", 0), ("aime-25", 1)):
        name = GroupId(number, 2, benchmark)
        attempt = replace(trajectory(number, 0, "x", 1.0), id=AttemptId(name, 0))
        group = TrajectoryGroup(Prompt(number, (), "1"), [attempt], id=name)
        TrajectoryFiles(run, 9).write("eval", 2 + number, [group])
    (run / "rollouts" / "agents.jsonl").write_bytes((run / "rollouts" / "step_00000001.jsonl").read_bytes())
    (run / "rollouts" / "notes.jsonl").write_text("{}\n")
    index, _ = made(run, tmp_path / "beside")
    assert [file["kind"] for file in index["files"]] == ["step", "step", "eval", "eval", "agents"]
    sources = [index["names"]["source"][place] for place in index["columns"]["source"]]
    assert sources == ["contest"] * 6 + ["held out", "aime-25"] + ["contest"] * 3


def test_pieces_are_bytes(run: Path) -> None:
    vocabulary = find_vocabulary([run / "nowhere", run / "model"])
    assert isinstance(vocabulary, Vocabulary)
    assert vocabulary.pieces[0xE9] == b"\xe9"
    assert vocabulary.pieces[SPECIAL] == b"<|end|>"
    assert vocabulary.table([32, SPECIAL, 9999]) == {"ids": [32, SPECIAL], "pieces": [" ", "<|end|>"], "special": [SPECIAL]}


def test_pieces_of_a_tokenizer_with_spaces_and_bytes(tmp_path: Path) -> None:
    whole = {"model": {"type": "BPE", "vocab": {"▁the": 0, "<0xE2>": 1, "é": 2}}, "decoder": {"type": "Sequence", "decoders": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    vocabulary = find_vocabulary([tmp_path])
    assert vocabulary is not None
    assert vocabulary.pieces == {0: b" the", 1: b"\xe2", 2: "é".encode()}
