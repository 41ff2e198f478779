"""`ctpo doctor`: findings on this machine, and on machines that lack things."""

from __future__ import annotations

import io
import resource
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from ctpo_megatron import doctor
from ctpo_megatron.doctor import Row
from ctpo_megatron.engine import toolkit
from ctpo_megatron.engine.toolkit import Part
from ctpo_megatron.rollout.sandbox import sandbox_available
from ctpo_megatron.rollout.sandbox.escape import Escape

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


@pytest.mark.parametrize(
    ("driver", "cuda", "state"),
    [("580.65.06", "13.0", "ok"), ("570.12", "13.0", "note"), ("570.12", "12.8", "ok"), ("", "13.0", "ok")],
)
def test_the_driver_is_held_against_torchs_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str, state: str
) -> None:
    put(tmp_path, "nvidia-smi", f"echo '{driver}'; echo '{driver}'")
    monkeypatch.setenv("PATH", str(tmp_path))
    row = doctor.driver_row(cuda)
    assert (row.state, row.found) == (state, driver or "unknown")
    assert ("580 or newer" in row.meaning) is (state == "note")


def test_what_servers_compile_with_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Part("nvcc", "13.0 at /cuda/bin/nvcc"), Part("CUDA runtime", "no /cuda/lib64/libcudart.so", "set CUDA_HOME")]
    monkeypatch.setattr(toolkit, "parts", lambda _cuda: found)
    assert doctor.toolkit_rows("13.0") == [
        Row("nvcc", "ok", "13.0 at /cuda/bin/nvcc"),
        Row("CUDA runtime", "bad", "no /cuda/lib64/libcudart.so", "set CUDA_HOME"),
    ]


def test_transformer_engine_is_imported_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there and does not load: a row that says why. Without a GPU nothing uses it."""
    assert doctor.transformer_engine_row(has_gpu=True).found == "not installed"
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    pytorch = tmp_path / "transformer_engine" / "pytorch.py"
    pytorch.write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = doctor.transformer_engine_row(has_gpu=True)
    assert row.state == "bad"
    assert "does not load: ImportError: undefined symbol: _ZN3c10" in row.found
    assert "make install-gpu" in row.meaning
    assert doctor.transformer_engine_row(has_gpu=False).state == "ok"
    pytorch.write_text("")
    assert doctor.transformer_engine_row(has_gpu=True).state == "ok"


def test_gpus_want_more_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 20000, resource.RLIMIT_MEMLOCK: 8 * 2**20}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=16 * 2**30, free=16 * 2**30))

    def states(*, has_gpu: bool) -> dict[str, str]:
        return {row.topic: row.state for row in doctor.host_rows(tmp_path, has_gpu=has_gpu)}

    on_cpus, on_gpus = states(has_gpu=False), states(has_gpu=True)
    assert (on_cpus["open files"], on_cpus["/dev/shm"], "locked memory" in on_cpus) == ("ok", "ok", False)
    assert (on_gpus["open files"], on_gpus["/dev/shm"], on_gpus["locked memory"]) == ("note", "note", "note")
    limits.update({resource.RLIMIT_NOFILE: resource.RLIM_INFINITY, resource.RLIMIT_MEMLOCK: resource.RLIM_INFINITY})
    unlimited = states(has_gpu=True)
    assert (unlimited["open files"], unlimited["locked memory"]) == ("ok", "ok")


def test_variables_of_a_run_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    rows = {row.topic: row for row in doctor.environment_rows("cuda")}
    assert rows["NCCL_DEBUG"].found == "INFO (trainer and servers)"
    assert rows["CUDA_DEVICE_MAX_CONNECTIONS"].found == "1 (trainer)"
    assert "NCCL_DEBUG" not in {row.topic for row in doctor.environment_rows("cpu")}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    monkeypatch.setenv("SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED", "1")
    rows = {row.topic: row for row in doctor.environment_rows("cuda")}
    assert "set aside" in rows["PYTORCH_CUDA_ALLOC_CONF"].found
    assert rows["environment"].state == "bad"
    assert "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED=1" in rows["environment"].meaning


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
    put(tmp_path, "bwrap", "echo 'bubblewrap 9.9'; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "sandbox_available", sandbox_available.__wrapped__)  # what this test finds is not to be kept
    assert doctor.sandbox_row().found == "installed, but cannot confine"
    monkeypatch.setattr(doctor, "sandbox_available", lambda: None)
    monkeypatch.setattr(doctor, "escapes", lambda _config: [Escape("files", "/etc/passwd read")])
    row = doctor.sandbox_row()
    assert (row.state, row.found) == ("note", "does not hold: files (/etc/passwd read)")
    assert "refuses to start" in row.meaning
    put(tmp_path, "bwrap", "echo 'bubblewrap 9.9'")
    monkeypatch.setattr(doctor, "escapes", lambda _config: [])
    row = doctor.sandbox_row()
    assert (row.state, row.found) == ("ok", "9.9")
    assert "network, processes, environment, files, forks, memory, disk, output, time" in row.meaning


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
