"""Multi-turn environments put together: what the configuration names, a parser of calls, and the model's own chat template."""

from __future__ import annotations

from functools import partial

from ctpo_megatron.config.environments import CodeEnvironment, OpenEnvEnvironment
from ctpo_megatron.config.environments import Environment as EnvironmentConfig
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.protocols import Generator
from ctpo_megatron.rollout.worlds.environment import WorldEnvironment
from ctpo_megatron.rollout.worlds.formats import call_format
from ctpo_megatron.rollout.worlds.load import load_worlds
from ctpo_megatron.rollout.worlds.openenv import OpenEnvWorld
from ctpo_megatron.rollout.worlds.protocols import Worlds


def worlds_of(config: EnvironmentConfig) -> Worlds | None:
    """Returns what makes a world for each attempt; None where the code tool answers. Raises ConfigError."""
    if isinstance(config, CodeEnvironment):
        return None
    if isinstance(config, OpenEnvEnvironment):
        return partial(OpenEnvWorld, config)
    return load_worlds(config.path, config.options)


def world_environment(generator: Generator, chat: ChatTokenizer, config: EnvironmentConfig) -> WorldEnvironment:
    """Returns the environment that `config` names, over `generator`. It imports SGLang's parsers: a second or two."""
    from ctpo_megatron.engine.sglang.parsers import SGLangCallParser  # with torch, which no check of a configuration needs

    worlds = worlds_of(config)
    assert worlds is not None, "the code tool is no world"
    assert not isinstance(config, CodeEnvironment)
    parser = SGLangCallParser(config.call_format or call_format(chat.template), thinks=chat.thinks)
    return WorldEnvironment(generator, chat, parser, worlds, step_timeout_s=config.step_timeout_s)
