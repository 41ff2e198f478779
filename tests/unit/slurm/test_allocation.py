"""What a job was given, from its environment. SLURM itself is asked in tests/integration/test_slurm.py."""

from __future__ import annotations

from ctpo_megatron.slurm.allocation import Allocation, allocation, end_time


def test_a_job_is_read_from_its_environment() -> None:
    first = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert allocation(first) == Allocation(41, 2, "n[1-2]", 0)
    assert allocation({**first, "SLURM_RESTART_COUNT": "3"}) == Allocation(41, 2, "n[1-2]", 3)
    assert allocation({}) is None
    assert allocation({"SLURM_JOB_ID": ""}) is None


def test_ports_of_a_job_differ_and_lie_below_those_that_the_system_hands_out() -> None:
    for job_id in (1, 5_999, 6_000, 11_999, 12_000, 123_456_789):
        job = Allocation(job_id, 1, "n1", 0)
        assert job.port != job.preflight_port
        assert all(20_000 <= port < 32_000 for port in (job.port, job.preflight_port))


def test_newer_slurm_tells_the_end_itself() -> None:
    job = Allocation(41, 1, "n1", 0)
    assert end_time(job, {"SLURM_JOB_END_TIME": "1790000000"}) == 1_790_000_000.0
