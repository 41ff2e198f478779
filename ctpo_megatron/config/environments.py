"""What answers the model's turns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from ctpo_megatron.config.base import Section


class CodeEnvironment(Section):
    """The code tool of rollout.tool, or nothing: one turn. rollout.reward judges what the assistant wrote."""

    type: Literal["code"] = "code"


class MultiTurn(Section):
    """What environments have in common whose steps give rewards; rollout.tool and rollout.reward have no part in them."""

    call_format: Literal["hermes", "qwen25", "qwen3_coder", "llama3"] | None = None
    """How the model writes calls of tools. null: as its chat template shows them."""
    step_timeout_s: PositiveFloat = 60.0
    """How long the environment may take to begin, for one step, and to close. Then the attempt fails and is tried again."""


class WorldEnvironment(MultiTurn):
    """An environment of your own (docs/environments.md)."""

    type: Literal["world"] = "world"
    path: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:Class`, or a function that returns an object for one attempt. Its code runs in the driver."""
    options: dict[str, Any] = Field({})
    """Arguments for it, by name."""


class OpenEnvEnvironment(MultiTurn):
    """An environment server of OpenEnv 0.10, reached by its websocket. The `openenv` package is not needed here."""

    type: Literal["openenv"] = "openenv"
    url: str = Field(pattern=r"^(http|ws)s?://")
    """Of the server, without a path."""
    action_key: str = "message"
    """The field of an action that gets the model's text."""
    action: dict[str, Any] = Field({})
    """Further fields of each action."""
    observation_key: str | None = None
    """The field of an observation that the model is shown. null: the whole of it, as JSON."""
    reset: dict[str, Any] = Field({})
    """What each episode begins with, such as `seed`."""
    session_wait_s: PositiveFloat = 30.0
    """How long to wait for a free session, within step_timeout_s. A server has one by default (`max_concurrent_envs`); set
    rollout.concurrency to what it has."""


Environment = Annotated[CodeEnvironment | WorldEnvironment | OpenEnvEnvironment, Field(discriminator="type")]
