"""Environments of `verifiers` 0.4, played by its harnesses: `rollout.agent.path: ctpo_megatron.agents.adapters.verifiers:Player`.

It runs in processes of an interpreter that has the package (`rollout.agent.python`), whose prompts are written by

    python -m ctpo_megatron.agents.adapters.verifiers '{"taskset": {"id": "gsm8k-v1"}}' train.jsonl 1000

A harness asks a server of verifiers in this process, and that asks the attempt's endpoint, with chat completions: the client that
trains in verifiers sends token ids to a server of vLLM's, and knows nothing of ours. Rewards are the environment's own.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ctpo_megatron.agents.play.task import AgentTask
from ctpo_megatron.errors import storing

NAME = "ctpo_megatron.agents.adapters.verifiers"
VERSION = "0.4"
OVER = 404  # what the endpoint says of an attempt whose bounds are reached
CHAT = "null"  # the harness that executes nothing
HERE = "subprocess"  # the runtime on this machine, unconfined


class Player:
    """Plays attempts in one environment.

    `env`: its configuration, as in the section `env` of verifiers' own files. Where a role names no runtime its harness runs on
    this machine; where it names no harness, and the taskset brings none, it gets one that executes nothing. `tasks`: so many of
    the taskset's first tasks are known; None: all. Raises ImportError without verifiers 0.4, ValueError for what cannot be
    played.
    """

    def __init__(self, env: dict[str, Any], tasks: int | None = None) -> None:
        self._verifiers, self._loaders = _package(), importlib.import_module("verifiers.v1.utils.loaders")
        self._config = self._checked(env)
        self._tasks = dict(self.tasks(tasks))

    async def __call__(self, task: AgentTask) -> dict[str, Any]:
        """Returns the last reply of the policy in an episode of the task with this prompt, and the environment's reward.

        An attempt whose bounds ended it is worth 0. Raises LookupError where there is no such task, RuntimeError with what went
        wrong in the episode.
        """
        played = self._tasks.get(task.question)
        if played is None:
            raise LookupError(
                f"no task of {self._config.env_id} has the prompt {task.question[:80]!r}; write data.train anew with "
                f"`python -m {NAME}`, with the same environment and no more tasks"
            )
        # Its own environment for each attempt: what they share would keep a client of each attempt's address until its end.
        environment = self._loaders.load_environment(self._config)
        with _known_by_name(task) as name:
            client = self._verifiers.EvalClientConfig(base_url=task.openai_url, api_key_var=name)
            async with environment.serving():
                episode = await environment.run_episode(played, self._verifiers.ModelContext(model=task.model, client=client))
        return _answer(episode, task)

    def tasks(self, most: int | None) -> Iterator[tuple[str, Any]]:
        """Yields the taskset's tasks and their prompts, in its order. Raises ValueError for those that cannot be told apart."""
        taskset = self._loaders.load_taskset(self._config.taskset)
        if most is None and not taskset.bounded:
            raise ValueError(f"the taskset {self._config.taskset.id} never ends; give `tasks`, how many of it are played")
        seen: dict[str, int] = {}
        for number, task in enumerate(itertools.islice(taskset, most)):
            prompt = task.data.prompt_text
            if not prompt.strip():
                raise ValueError(f"task {number} of {self._config.taskset.id} has no prompt: a user would have to begin")
            if prompt in seen:
                raise ValueError(f"tasks {seen[prompt]} and {number} of {self._config.taskset.id} have the same prompt")
            seen[prompt] = number
            yield prompt, task

    def _checked(self, env: dict[str, Any]) -> Any:
        """Returns the configuration, with its roles' places filled in. Raises ValueError where a model would get a shell here."""
        data = {"interception": {"type": "server"}, **env}
        taskset = data.get("taskset", {}).get("id", "")
        kind = self._loaders.env_config_type(taskset, data.get("id", ""))
        roles = [name for name, field in kind.model_fields.items() if isinstance(field.default, self._verifiers.AgentConfig)]
        brought = self._loaders.default_harness_id(taskset)
        for role in roles:
            given = data.get(role, {})
            data[role] = {"runtime": {"type": HERE}, **given}
            if brought == "bash" and not given.get("harness"):
                data[role]["harness"] = {"id": CHAT}
        config = self._loaders.resolve_env_config(data)
        for role, harness in config.agent_harnesses().items():
            executes = self._loaders.harness_class(harness.id).EXECUTES_CODE
            if executes and getattr(config, role).runtime.type == HERE:
                raise ValueError(
                    f"options.env.{role}: the harness {harness.id} lets the model execute code, which would run unconfined on "
                    "this machine. Give a runtime that confines it, such as `runtime: {type: docker}`, or "
                    f'`harness: {{id: "{CHAT}"}}`'
                )
        return config


def _package() -> ModuleType:
    """Returns `verifiers.v1` of a version that is known here. Raises ImportError, which says what to do."""
    try:
        package, top = importlib.import_module("verifiers.v1"), importlib.import_module("verifiers")
    except ImportError as error:
        raise ImportError(
            f"{sys.executable} has no verifiers {VERSION} ({error}). It needs other versions of packages than a run, so make an "
            f"environment for it: `python3 -m venv V && V/bin/pip install 'verifiers=={VERSION}.*'`, and set "
            "rollout.agent.python=V/bin/python"
        ) from error
    if not str(top.__version__).startswith(f"{VERSION}."):
        raise ImportError(f"{sys.executable} has verifiers {top.__version__}; needed: {VERSION}")
    return package


@contextmanager
def _known_by_name(task: AgentTask) -> Iterator[str]:
    """The attempt's key as a variable, since clients of verifiers are told of no other.

    Programs that verifiers starts get no variable with API_KEY in its name.
    """
    name = f"ATTEMPT_API_KEY_{task.attempt}_{id(task)}"
    os.environ[name] = task.api_key
    try:
        yield name
    finally:
        del os.environ[name]


def _answer(episode: Any, task: AgentTask) -> dict[str, Any]:
    """Returns what an episode came to. Raises RuntimeError where it failed."""
    traces = [trace for trace in episode.traces if trace.agent.config.client.base_url == task.openai_url]
    if len(traces) > 1:
        raise RuntimeError(
            f"{len(traces)} agents of the environment played with the policy, and an attempt is one agent's; give the other "
            "roles a `model` and a `client` of their own"
        )
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if traces and traces[0].num_turns and any(error.status_code == OVER for error in errors):
        return {"text": traces[0].last_reply, "reward": 0.0}
    if not episode.ok or not traces:
        why = f"{errors[-1].type}: {errors[-1].message}" if errors else "no agent of the environment asked the policy"
        raise RuntimeError(f"the episode failed: {why}")
    return {"text": traces[0].last_reply, "reward": traces[0].reward}


def write_prompts(env: dict[str, Any], path: Path, tasks: int | None = None) -> int:
    """Write a file of prompts for `data.train` or `data.eval`; returns how many. Each row has the task's key, and no answer."""
    rows = []
    for prompt, task in Player(env, 0).tasks(tasks):
        system = [{"role": "system", "content": task.data.system_prompt}] if task.data.system_prompt else []
        rows.append({"prompt": [*system, {"role": "user", "content": prompt}], "reward_model": {"ground_truth": task.key}})
    with storing(path):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(f"usage: python -m {NAME} ENVIRONMENT_AS_JSON FILE.jsonl [TASKS]")
    count = write_prompts(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) == 4 else None)
    print(f"{sys.argv[2]}: {count} prompts")
