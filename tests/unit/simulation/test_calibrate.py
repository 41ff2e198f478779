"""Speeds from logs and metrics: what wrote them is found again, and a run that does not tell enough is refused."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.simulation.calibrate import LOGGED_STEPS, fit, measured, server_speed, trainer_speed
from ctpo_megatron.simulation.speeds import ServerSpeed
from ctpo_megatron.simulation.workload import LogNormal, Said, read_recorded

TRUE = ServerSpeed(0.004, 5e-5, 3e-7, prefill_s=0.004, prefill_token_s=5e-5)
DECODE = (
    "[2026-01-01 00:00:00] Decode batch, #running-req: {}, #token: {}, token usage: 0.01, cpu graph: False, "
    "gen throughput (token/s): {:.6f}, #queue-req: 0"
)
PREFILL = (
    "[2026-01-01 00:00:00] Prefill batch, #new-seq: 1, #new-token: {}, #cached-token: 0, token usage: 0.00, #running-req: {}, "
    "#queue-req: 0, #pending-token: 0, cpu graph: False, input throughput (token/s): {:.2f}"
)
START = (
    "max_total_num_tokens=65536, chunked_prefill_size=4096, max_prefill_tokens=16384, max_running_requests=512, context_len=4096"
)


def log_of(speed: ServerSpeed, slow: float = 1.0, lines: int = 120) -> str:
    """What a server of `speed` writes; every twentieth interval takes `slow` times as long, as another process works."""
    rng, found, before = Random(0), [START], (10, 500)
    for number in range(lines):
        now = (2 * rng.randint(1, 100), 2 * rng.randint(100, 30_000))
        requests, tokens = (before[0] + now[0]) // 2, (before[1] + now[1]) / 2
        prompts = [rng.randint(10, 2000) for _ in range(rng.choice([0, 0, 1, 4]))]
        seconds = LOGGED_STEPS * (speed.step_s + speed.request_s * requests + speed.token_s * tokens)
        seconds += len(prompts) * speed.prefill_s + sum(prompts) * speed.prefill_token_s
        seconds *= slow if number % 20 == 7 else 1
        found += [PREFILL.format(each, max(requests - 1, 1), 1 / speed.prefill_token_s) for each in prompts]
        found.append(DECODE.format(*now, LOGGED_STEPS * requests / seconds))
        before = now
    return "\n".join(found)


def test_the_speed_of_the_server_that_wrote_a_log_is_found() -> None:
    found = server_speed([log_of(TRUE, slow=1).splitlines()], name="a run")
    for name in ("step_s", "request_s", "token_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.05)
    assert found.prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=0.1)
    for requests, tokens in ((10, 5000), (100, 30_000), (190, 55_000)):
        assert found.decode_s(1, requests, tokens) == pytest.approx(TRUE.decode_s(1, requests, tokens), rel=0.03)
    assert (found.cache_tokens, found.max_running) == (65536, 512)


def test_time_that_something_else_took_is_part_of_the_speed_and_idle_time_is_not() -> None:
    work = (100, 30_000)
    quiet, busy = (server_speed([log_of(TRUE, slow).splitlines()], name="a run").decode_s(1, *work) for slow in (1.0, 5.0))
    assert busy == pytest.approx(1.2 * quiet, rel=0.15)  # a twentieth of the intervals takes four times more
    idle = [PREFILL.format(10, 0, 1.0), DECODE.format(20, 2000, 0.5)]
    kept = server_speed([[*log_of(TRUE).splitlines(), *idle]], name="a run").decode_s(1, *work)
    assert kept == pytest.approx(quiet)


def test_a_fit_has_nothing_below_zero() -> None:
    rows = [(1.0, float(n)) for n in range(20)]
    assert fit(rows, [5.0 + 2 * n for n in range(20)]) == pytest.approx([5.0, 2.0])
    assert fit(rows, [40.0 - 2 * n for n in range(20)]) == pytest.approx([21.0, 0.0])


def test_the_trainer_costs_what_it_cost_for_each_token() -> None:
    steps = [
        {"step": n, "time/train": 2.0 * n, "time/rollout": 1.0, "time/publish": 0.5, "time/step": 2.0 * n + 1.6} for n in (2, 3)
    ]
    found = trainer_speed(steps, {n: [n * 10, n * 10] for n in (2, 3)}, attention=0.0)
    assert found.token_s == pytest.approx(0.1)
    assert found.step_s == pytest.approx(0.1)


def test_what_an_optimizer_step_takes_besides_is_told_by_steps_of_different_lengths() -> None:
    def step(tokens: int) -> dict[str, float]:
        train = 2 * 0.3 + 0.01 * tokens
        return {"step": tokens, "time/train": train, "time/rollout": 1.0, "time/publish": 0.5, "time/step": train + 1.5}

    told = trainer_speed([step(n) for n in (50, 100, 150, 200)], {n: [n] for n in (50, 100, 150, 200)}, 0.0, optimizer_steps=2)
    assert (told.token_s, told.optimizer_s) == (pytest.approx(0.01), pytest.approx(0.3))
    alike = trainer_speed([step(n) for n in (100, 101, 102, 103)], {n: [n] for n in (100, 101, 102, 103)}, 0.0, optimizer_steps=2)
    assert alike.optimizer_s == 0.0


def a_run(where: Path) -> Path:
    """A run directory with what speeds and lengths are read from."""
    for name in ("logs", "rollouts"):
        (where / name).mkdir(parents=True)
    (where / "logs" / "server_0.log").write_text(log_of(TRUE))
    metrics = {"time/train": 4.0, "time/rollout": 9.0, "time/publish": 0.5, "time/step": 13.7, "publish/total": 0.5}
    times = {1: 0.0, 2: 2e9, 3: 2e9}
    lines = [{"step": n, "time": times[n], **metrics, "publish/paused": 0.4, "perf/train_tokens_per_s": 25.0} for n in (1, 2, 3)]
    (where / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    turns = [("assistant", 30), ("tool", 4), ("assistant", 12)]
    said = [{"role": role, "token_ids": [1] * count} for role, count in turns]
    line = {"group": "g00000000", "prompt_ids": [1] * 9, "turns": said, "reward": 1.0}
    (where / "rollouts" / "step_00000002.jsonl").write_text("\n".join([json.dumps(line)] * 4))
    return where


def test_a_run_directory_tells_speeds_and_lengths(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    found = measured(run, dp=2, attention=0.0)
    assert (found.publish_s, found.paused_s) == (0.5, 0.4)
    assert found.trainer.token_s == pytest.approx(2 * 8 / (216 + 100))  # of steps 2 and 3: samples, and tokens per second
    assert "steps 2 to 3" in found.source
    assert "steps 2 to 2" in measured(run, dp=1, attention=0.0, first=2).source
    recorded = read_recorded(run, 5)
    assert recorded.prompts()[0].messages[0]["tokens"] == 9
    assert recorded.script(0, 17, 3).turns == (Said(30, 4), Said(12))


def test_a_run_that_was_stopped_or_goes_on_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    """The step at which it was stopped has published nothing; a half line is being written; a damaged one is named."""
    run = a_run(tmp_path / "run")
    metrics, rollouts = run / "metrics.jsonl", run / "rollouts" / "step_00000002.jsonl"
    *lines, last = map(json.loads, metrics.read_text().splitlines())
    last = {name: value for name, value in last.items() if not name.startswith("publish/")}
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, last]) + '{"step": 4, "ti')
    rollouts.write_text(rollouts.read_text() + '\n{"group": "g0')
    found = measured(run, dp=1, attention=0.0)
    assert (found.publish_s, found.paused_s) == (0.5, 0.4)
    assert "steps 2 to 3" in found.source
    assert len(read_recorded(run, 5).prompts()) == 1
    rollouts.write_text("\n" + rollouts.read_text())
    with pytest.raises(ConfigError, match=r"step_00000002.jsonl line 1 is damaged"):
        read_recorded(run, 5)


def test_a_ledger_tells_lengths_where_no_trajectories_were_kept(tmp_path: Path) -> None:
    attempts = [{"attempt": n, "status": "finished", "reward": 0.5, "tokens": 10 * n} for n in (1, 2)]
    lines = [{"back": 3}, {"step": 1, "group": "g00000000", "attempts": attempts}]
    (tmp_path / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recorded = read_recorded(tmp_path, 7)
    assert {recorded.script(0, 0, n).turns[0].tokens for n in (0, 1)} == {10, 20}


def test_a_run_that_does_not_tell_enough_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no step after the first 1 in metrics.jsonl"):
        measured(tmp_path, dp=1, attention=0.0)
    run = a_run(tmp_path / "run")
    (run / "logs" / "server_0.log").unlink()
    with pytest.raises(ConfigError, match=r"no logs/server_\*.log"):
        measured(run, dp=1, attention=0.0)
    with pytest.raises(ConfigError, match="has neither rollouts"):
        read_recorded(tmp_path, 5)
    with pytest.raises(ConfigError, match="0 pairs of lines about decoding; 8 are needed"):
        server_speed([[START]], name="a run")


def test_log_normal_lengths_have_the_mean_that_was_asked_for_and_depend_on_nothing_but_names() -> None:
    lengths = LogNormal(500, 0.8, 20, seed=3)
    said = [lengths.script(n % 4096, n, 0).turns[0].tokens for n in range(4000)]
    assert sum(said) / len(said) == pytest.approx(500, rel=0.08)
    assert lengths.script(5, 77, 2) == LogNormal(500, 0.8, 20, seed=3).script(5, 77, 2)
    assert lengths.script(5, 77, 2) != lengths.script(5, 78, 2)
