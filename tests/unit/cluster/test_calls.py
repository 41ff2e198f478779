"""Which of several failures is reported: the cause, not the peers that lost their connection to it."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from ctpo_megatron.cluster.calls import Process, call_all, first_of
from ctpo_megatron.errors import MismatchError, ProcessDied


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.cluster.calls.PEERS_FAIL_WITHIN_S", 0.5)


class Call:
    """What a Ray call gives its caller: a reference with a future."""

    def __init__(self, result=None, error: BaseException | None = None, after_s: float | None = 0.0) -> None:
        self.outcome = (result, error, after_s)

    def future(self) -> Future:
        future, (result, error, after_s) = Future(), self.outcome
        settle = (lambda: future.set_exception(error)) if error else (lambda: future.set_result(result))
        if after_s is not None:
            asyncio.get_running_loop().call_later(after_s, settle)
        return future


def wait_for(*calls: Call, timeout_s: float = 5.0):
    ranks = [Process(f"trainer rank {i}", None, Path(f"logs/trainer_{i}.log")) for i in range(len(calls))]

    async def run():
        return await call_all(list(zip(ranks, calls, strict=True)), timeout_s)

    return asyncio.run(run())


def test_results_keep_their_order():
    assert wait_for(Call(1, after_s=0.05), Call(2)) == [1, 2]
    assert wait_for() == []


def test_a_death_is_told_before_the_peers_it_took_along():
    peer = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(ProcessDied, match=r"trainer rank 1 died(.|\n)*logs/trainer_1.log"):
        wait_for(Call(error=peer), Call(error=ActorDiedError(), after_s=0.2), Call(after_s=None))


def test_a_part_that_died_is_told_before_the_one_that_lost_its_connection_to_it():
    lost = ProcessDied("the SGLang server has lost a scheduler\n  RuntimeError: Connection reset by peer")
    died = ProcessDied("the SGLang server has lost a scheduler\n  the last thing that it said")
    with pytest.raises(ProcessDied, match=r"trainer rank 1: (.|\n)*last thing"):
        wait_for(Call(error=lost), Call(error=died, after_s=0.2))


def test_our_own_errors_keep_their_type_and_name_the_process():
    peer = RuntimeError("Connection reset by peer")
    with pytest.raises(MismatchError, match=r"trainer rank 0: they disagree\nlog: logs/trainer_0.log"):
        wait_for(Call(error=MismatchError("they disagree")), Call(error=peer))


def test_any_other_error_names_process_type_and_log():
    with pytest.raises(ProcessDied, match=r"trainer rank 0 failed: KeyError: 'x'\nlog: logs/trainer_0.log"):
        wait_for(Call(error=KeyError("x")))


def test_no_answer_in_time_names_who_is_late():
    with pytest.raises(ProcessDied, match=r"no answer from trainer rank 1 within 0 s; logs: logs/trainer_1.log"):
        wait_for(Call(1), Call(after_s=None), timeout_s=0.1)


def test_the_first_wait_that_ends_ends_all():
    ended: list[str] = []

    async def wait(name: str, seconds: float, error: Exception | None = None) -> None:
        try:
            await asyncio.sleep(seconds)
            if error is not None:
                raise error
        finally:
            ended.append(name)

    asyncio.run(first_of([wait("long", 60.0), wait("short", 0.01)]))
    assert sorted(ended) == ["long", "short"]
    with pytest.raises(ProcessDied, match="rank 3"):
        asyncio.run(first_of([wait("other", 60.0), wait("failed", 0.01, ProcessDied("rank 3"))]))
    assert sorted(ended) == ["failed", "long", "other", "short"]
