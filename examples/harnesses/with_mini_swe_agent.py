"""mini-swe-agent with its own instructions. What the model writes runs in bubblewrap, with the network of this host.

Its models come from litellm: see with_litellm.py about the environment.
"""

from __future__ import annotations

from pathlib import Path

import minisweagent
import yaml
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.extra.bubblewrap import BubblewrapEnvironment
from minisweagent.models.litellm_model import LitellmModel

from ctpo_megatron.agents.play.task import AgentTask

MOST_STEPS = 10
GIVEN = yaml.safe_load((Path(minisweagent.__file__).parent / "config" / "mini.yaml").read_text(encoding="utf-8"))
SAID = ("system_template", "instance_template")  # what the agent is told; the rest of its section is for people at a terminal


def play(task: AgentTask) -> str:
    """Returns what the agent submits; what was printed after the word that ends it."""
    where = {"api_base": task.openai_url, "api_key": task.api_key}
    settings = {**GIVEN["model"], "model_kwargs": {**GIVEN["model"].get("model_kwargs", {}), **where}}
    model = LitellmModel(**settings, model_name=f"openai/{task.model}", cost_tracking="ignore_errors")
    told = {name: GIVEN["agent"][name] for name in SAID}
    agent = DefaultAgent(model, BubblewrapEnvironment(**GIVEN["environment"]), step_limit=MOST_STEPS, cost_limit=0, **told)
    return agent.run(task.question)["submission"]
