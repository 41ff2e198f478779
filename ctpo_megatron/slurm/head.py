"""The first node of a job: Ray, and in it the run's driver, which hears what SLURM asks. `python -m ctpo_megatron.slurm.head`.

The exit code is the driver's, but for two: 75 where the job should be requeued, 76 where this should be started again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import CtpoError
from ctpo_megatron.slurm.allocation import allocation
from ctpo_megatron.slurm.limits import raise_limits
from ctpo_megatron.slurm.orders import Orders
from ctpo_megatron.slurm.ray_node import JOIN_TIMEOUT_S, RayNode
from ctpo_megatron.slurm.requeue import (
    AGAIN,
    NO_STEP,
    STOPPED,
    Start,
    fruitless,
    newest_step,
    record_start,
    starts,
    stopped_for_good,
    what_next,
)

POLL_S = 0.2
DRIVER_ENDS_WITHIN_S = 120.0  # after Ray has: it is told after 63 s (Ray 2.60)
DRIVER_STOPS_WITHIN_S = 30.0  # after SIGTERM
TOLD_DIRECTLY_WITHIN_S = 1.0  # SLURM sends SIGTERM to all processes of a job; then the driver has had it already
ERROR_FILE = "logs/error.log"  # in the run directory: why a driver failed
MEMBERS = "ctpo_megatron.cluster.members"  # run as a program: this package does without ray


class Head:
    """Starts the driver once all nodes have joined, and passes on what the batch script says."""

    def __init__(self, address: str, hosts: list[str], words: list[str]) -> None:
        self._address, self._hosts, self._words = address, hosts, words
        self._orders = Orders()
        self._terminated = False
        self._lost = False  # Ray, here or on all other nodes
        signal.signal(signal.SIGTERM, self._note_term)

    def run(self) -> tuple[int, bool]:
        """Returns the driver's exit code as Popen gives it, and whether Ray had ended before it. Raises CtpoError."""
        with RayNode(self._address, self._address.rpartition(":")[0], is_head=True) as ray:
            if len(self._hosts) > 1 and not self._joined(ray):
                return STOPPED, False
            driver = subprocess.Popen(self._words, stdin=subprocess.DEVNULL)
            try:
                return self._attend(driver, ray), self._lost
            finally:
                if driver.poll() is None:
                    driver.kill()
                    driver.wait()

    def _note_term(self, *_: object) -> None:
        self._terminated = True

    def _joined(self, ray: RayNode) -> bool:
        """Returns whether all nodes came, before the end was asked for. Raises CtpoError where one is missing."""
        words = [sys.executable, "-m", MEMBERS, self._address, *self._hosts, f"--timeout={JOIN_TIMEOUT_S:.0f}"]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as members:
            try:
                while members.poll() is None:
                    order = self._orders.next(POLL_S)
                    if order in ("USR1", "TERM", "END") or self._terminated:
                        return False
                    if order == "LOST":
                        raise CtpoError("Ray did not start on the other nodes; what it said there is above")
                    if ray.ended:
                        raise CtpoError(f"Ray ended on the first node. It said:\n{ray.said()}")
            finally:
                members.kill()
        if members.returncode:
            raise CtpoError("not all nodes have joined Ray; the line above says which are missing")
        return True

    def _attend(self, driver: subprocess.Popen[bytes], ray: RayNode) -> int:
        """Returns the driver's exit code, once it has ended."""
        kill_at: float | None = None  # when waiting for its own end is given up
        while driver.poll() is None:
            order = self._orders.next(POLL_S)
            if order == "USR1":
                driver.send_signal(signal.SIGUSR1)
            elif order == "TERM":
                self._pass_on_term(driver)
            elif order == "END":  # the batch script is gone
                driver.terminate()
                kill_at = time.monotonic() + DRIVER_STOPS_WITHIN_S
            elif order == "LOST":
                print("Ray has ended on all other nodes", file=sys.stderr)
                self._lost = True
            if ray.ended and kill_at is None and not self._terminated:
                print(f"error: Ray ended on the first node. It said:\n{ray.said()}", file=sys.stderr)
                self._lost = True
                kill_at = time.monotonic() + DRIVER_ENDS_WITHIN_S
            if kill_at is not None and time.monotonic() > kill_at:
                driver.kill()
        return driver.wait()

    def _pass_on_term(self, driver: subprocess.Popen[bytes]) -> None:
        waited = time.monotonic() + TOLD_DIRECTLY_WITHIN_S
        while not self._terminated and time.monotonic() < waited:
            time.sleep(0.05)
        if not self._terminated:
            driver.terminate()


def driver_words(config: str, overrides: list[str], address: str) -> list[str]:
    """Returns the command that trains, and goes on where it has been. The only place that says how a run goes on."""
    return ["ctpo", "train", config, *overrides, f"cluster.address={address}", "--resume", "auto"]


def outcome(run_dir: Path, begun: float, code: int, lost: bool, limit: int) -> int:
    """Returns the exit code of this process, from that of the driver, and says what is not the driver's own."""
    error = run_dir / ERROR_FILE
    next_ = what_next(code, told=error.is_file() and error.stat().st_mtime >= begun, ray_lost=lost)
    if next_ == "again":
        print(f"The driver ended with {_named(code)}" + (", Ray before it" if lost else "") + ".", file=sys.stderr)
        return AGAIN
    if next_ == "stopped":
        if stopped_for_good(run_dir):
            print("The job is not requeued: somebody wanted the end.", file=sys.stderr)
            return 0
        step = newest_step(run_dir)
        in_vain = fruitless(starts(run_dir), step)
        if in_vain >= limit:
            where = "no checkpoint came of them" if step == NO_STEP else f"the newest checkpoint is still that of step {step}"
            print(
                f"error: the run has started {in_vain} times and {where}; the job is not requeued. Give it more time, or save "
                "more often (checkpoint.every); `starts` of the site's options sets how many starts are tried",
                file=sys.stderr,
            )
            return 1
    return code if code >= 0 else 128 - code


def main() -> int:
    """Returns the exit code of this process."""
    parser = argparse.ArgumentParser(prog="python -m ctpo_megatron.slurm.head", description=__doc__)
    parser.add_argument("--address", required=True, help="HOST:PORT at which Ray is to be reached")
    parser.add_argument("--hosts", required=True, help="names of the job's nodes, this one first")
    parser.add_argument("--starts", type=int, default=3, help="starts without a newer checkpoint before the job is given up")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    try:
        run_dir = Path(load_config(given.config, given.overrides).run_dir)
        job, begun = allocation(os.environ), time.time()
        if job is not None:
            record_start(run_dir, Start(job.job_id, job.restarts, round(begun, 3), newest_step(run_dir)))
        raise_limits()
        words = driver_words(given.config, given.overrides, given.address)
        head = Head(given.address, given.hosts.split(","), words)
        code, lost = head.run()
        return outcome(run_dir, begun, code, lost, given.starts)
    except CtpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _named(code: int) -> str:
    if code >= 0:
        return f"exit code {code} and without a message of its own"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


if __name__ == "__main__":
    sys.exit(main())
