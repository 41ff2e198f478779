"""`ctpo doctor`: findings on this machine, and on machines that lack things."""

from __future__ import annotations

import io
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from ctpo_megatron import doctor
from ctpo_megatron.doctor import Row

STUBS = "#!/bin/sh\n"


def put(directory: Path, name: str, body: str) -> None:
    """A program called `name` in `directory`."""
    path = directory / name
    path.write_text(STUBS + body + "\n")
    path.chmod(0o755)


def test_this_machine_is_diagnosed() -> None:
    diagnosis = doctor.diagnose()
    by_topic = {row.topic: row for row in diagnosis.rows}
    assert len(by_topic) == len(diagnosis.rows)
    assert by_topic["torch"].found == metadata.version("torch")
    assert {"Python", "sglang", "megatron-core", "ray", "GPUs", "bubblewrap", "SLURM", "/dev/shm"} <= set(by_topic)
    assert diagnosis.exit_code == int(any(row.state == "bad" for row in diagnosis.rows))


def test_packages_are_held_against_their_requirements() -> None:
    numpy = metadata.version("numpy")
    wanted = ["numpy>=1", "numpy<1", "no-such-package>=2", 'ruff; extra == "dev"', "pytest"]
    rows = doctor.package_rows(wanted)
    assert [(row.topic, row.state) for row in rows] == [
        ("numpy", "ok"),
        ("numpy", "bad"),
        ("no-such-package", "bad"),
        ("pytest", "ok"),
    ]
    assert rows[1].found == numpy
    assert "<1" in rows[1].meaning
    assert rows[2].found == "not installed"


def test_a_machine_without_anything_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (gpu,) = doctor.gpu_rows()
    assert (gpu.state, gpu.found) == ("note", "none")
    assert "gloo" in gpu.meaning
    assert doctor.sandbox_row().state == "note"
    assert doctor.slurm_row() == Row("SLURM", "note", "no sbatch", "one-machine runs need none")


def test_gpus_that_torch_cannot_use_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "nvidia-smi", "echo 'Some GPU, 80000 MiB'; echo 'Some GPU, 80000 MiB'")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "TORCH_QUERY", "print(0, None)")
    (row,) = doctor.gpu_rows()
    assert (row.state, row.found) == ("bad", "2: Some GPU, 80000 MiB")
    monkeypatch.setattr(doctor, "TORCH_QUERY", "print(2, '13.0')")
    assert [(row.topic, row.state, row.found) for row in doctor.gpu_rows()] == [
        ("GPUs", "ok", "2: Some GPU, 80000 MiB"),
        ("torch CUDA", "ok", "13.0, 2 usable"),
    ]


def test_the_other_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apex() -> Row:
        return next(row for row in doctor.extra_rows(has_gpu=True) if row.topic == "NVIDIA apex")

    assert apex().state == "note"
    (tmp_path / "apex.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert apex().state == "bad"
    (tmp_path / "amp_C.py").touch()
    assert apex().state == "ok"


def test_a_sandbox_that_cannot_confine_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "bwrap", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.sandbox_row().found == "installed, but cannot confine"
    put(tmp_path, "bwrap", "echo 'bubblewrap 9.9'")
    assert doctor.sandbox_row() == Row("bubblewrap", "ok", "9.9")


def test_slurm_commands_without_a_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "sbatch", "echo 'slurm 23.11.4'")
    put(tmp_path, "sinfo", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.slurm_row().state == "note"
    put(tmp_path, "sinfo", "echo up")
    assert doctor.slurm_row() == Row("SLURM", "ok", "23.11.4")


def test_a_command_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "sbatch", "echo slurm")
    put(tmp_path, "sinfo", "exec /bin/sleep 30")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "COMMAND_TIMEOUT_S", 0.2)
    assert doctor.slurm_row().found == "commands without a controller"


def test_the_disk_of_a_run_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    rows = {row.topic: row for row in doctor.host_rows(tmp_path / "runs" / "new")}
    assert "GiB at" in rows["free disk"].found
    assert not (tmp_path / "runs").exists()


def test_the_verdict_names_what_is_broken() -> None:
    good, bad = Row("torch", "ok", "2"), Row("ray", "bad", "not installed")
    assert "ray" in doctor.verdict([good, bad])
    assert "will not work" in doctor.verdict([good, bad])
    assert "gloo" in doctor.verdict([good, Row("GPUs", "note", "none")])
    assert "nccl" in doctor.verdict([good, Row("GPUs", "ok", "1: X")])
    assert (doctor.Diagnosis([good], "").exit_code, doctor.Diagnosis([good, bad], "").exit_code) == (0, 1)


def test_the_table_shows_brackets_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(doctor.as_table(doctor.Diagnosis([Row("TransformerEngine", "note", "none", "`pip install .[gpu]`")], "")))
    assert ".[gpu]" in console.file.getvalue()
