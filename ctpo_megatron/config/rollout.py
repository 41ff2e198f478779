"""How trajectories are made: data, sampling, inference servers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from ctpo_megatron.config.agents import Agent
from ctpo_megatron.config.base import FilePath, Section
from ctpo_megatron.config.dynamic import DynamicConfig
from ctpo_megatron.config.environments import CodeEnvironment, Environment
from ctpo_megatron.config.feeding import MAIN, PoolsConfig, SourceConfig
from ctpo_megatron.config.rewards import AnyReward, MathReward
from ctpo_megatron.config.sglang_options import check_options
from ctpo_megatron.config.tools import PythonTool, Tool
from ctpo_megatron.config.traffic import TrafficConfig
from ctpo_megatron.types import Truncation

MAX_TOP_K = 1024  # SGLang reports supports of up to 4,096 tokens (--sampling-mask-max-tokens); ties at the cut may be many
CPU_KV_TOKENS = 65_536  # of a server on CPUs whose configuration does not say how many


class DataConfig(Section):
    """Prompts. Files are .parquet or .jsonl with the columns `prompt` and `reward_model.ground_truth` (verl's format), those of
    `ctpo sft` with the column `messages`."""

    train: FilePath
    """Prompts to train on."""
    weight: PositiveFloat = 1.0
    """How often a prompt of `train` comes, relative to the weights of the mixture's sources."""
    mixture: tuple[SourceConfig, ...] = ()
    """Further files of prompts, or for `ctpo sft` of demonstrations, to train on. Each draw picks a source by the weights; each
    source comes in epochs of its own."""
    pools: PoolsConfig | None = None
    """Pools of one difficulty in each source; `ctpo sft` has none. null: none."""
    curriculum: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    """`package.module:function` that gives the weights of sources and pools, asked after every step (docs/rollouts.md). null: the
    weights stay."""
    eval: FilePath | None = None
    """Held-out prompts, which `eval` is about; eval.benchmarks has further files. null: none."""
    system_prompt: str | None = None
    """Put before each conversation that has no system message of its own."""
    max_prompt_tokens: PositiveInt = 2048
    """A longer prompt is an error that names its row."""
    allow_change: bool = False
    """Whether a run may be resumed with other prompts than its checkpoint's, which are then counted from their first on. false:
    it is refused. Without effect where the prompts are the same."""

    @model_validator(mode="after")
    def _sources_have_names_of_their_own(self) -> DataConfig:
        names = [MAIN, *(source.name for source in self.mixture)]
        if len(set(names)) < len(names):
            raise ValueError(f"data.mixture: each source needs a name of its own, and {MAIN!r} is data.train's: {names[1:]}")
        return self


class EngineConfig(Section):
    """SGLang servers."""

    servers: PositiveInt = 1
    """Number of servers."""
    tp: PositiveInt = 1
    """Tensor parallel size of each server."""
    nodes: PositiveInt = 1
    """Nodes that each server spreads over, `tp / nodes` of its ranks on each; for models that one node cannot hold."""
    max_total_tokens: PositiveInt | None = None
    """Size of the KV cache in tokens. null: SGLang decides (GPU) or 65,536 (CPU)."""
    start_timeout_s: PositiveFloat = 1800.0
    """How long a server may take to come up: to read the weights, compile kernels and capture CUDA graphs. A server that dies
    meanwhile is noticed at once, one that is stopped after seconds (cluster.watch)."""
    restarts: NonNegativeInt = 3
    """How often each server is started again in its place after it has died, or failed twice to take the weights. The run goes on
    with the others meanwhile, and waits where there is none; it ends when all are lost for good."""
    request_timeout_s: PositiveFloat = 1800.0
    """How long one generation may take, waiting in the server's queue included, before it counts as failed and its server is
    suspended. `ctpo plan` says how fast a server must be for that. A server that dies is noticed at once, one that
    does not take its turns by cluster.watch."""
    traffic: TrafficConfig = TrafficConfig()
    """How many requests each server is sent, and when one leaves a slow server."""
    extra_args: tuple[str, ...] = ()
    """Further arguments for `sglang.launch_server`, passed as they are. Those that break what the loss needs are refused by name:
    docs/traffic.md."""

    @field_validator("extra_args")
    @classmethod
    def _options_leave_the_loss_right(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        check_options(words)
        return words

    @property
    def tp_per_node(self) -> int:
        """Ranks of one server on one node."""
        return self.tp // self.nodes

    @model_validator(mode="after")
    def _nodes_share_the_ranks(self) -> EngineConfig:
        if self.tp % self.nodes:
            raise ValueError(
                f"rollout.engine.nodes={self.nodes} does not divide rollout.engine.tp={self.tp}: nodes get equal shares"
            )
        return self


class RolloutConfig(Section):
    """Sampling of trajectories."""

    group_size: PositiveInt = 8
    """Samples per prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer applies the same to its logits."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together reach this probability. Below 1 it needs `rollout.top_k`; the trainer's policy
    is cut in the same way (docs/truncation.md). 1: no cut."""
    top_k: Annotated[int, Field(ge=2, le=MAX_TOP_K)] | None = None
    """Draw from so many of the likeliest tokens. null: no cut."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Draw from tokens that are at least so many times as likely as the likeliest one. Above 0 it needs `rollout.top_k`. 0: no
    cut."""
    max_turns: PositiveInt = 5
    """Assistant turns per trajectory."""
    max_response_tokens: PositiveInt = 1024
    """Tokens after the prompt, tool output included."""
    concurrency: PositiveInt = 64
    """Trajectories in flight."""
    retries: NonNegativeInt = 2
    """How often an attempt that failed (its servers, its sandbox, its reward) is tried again, from where it was. Then it counts
    as failed: in training its group is not trained on, and another prompt takes its place; an evaluation ends with its error."""
    failed_share: float = Field(0.05, ge=0, lt=1)
    """Share of the last failed_window attempts of training that may fail in this way; the run ends when more do. 0: the first one
    ends it. Attempts that are not used because another one of their group failed are not among them."""
    failed_window: PositiveInt = 256
    """Attempts that failed_share and undecided_share are taken of."""
    undecided_share: float = Field(0.1, ge=0, le=1)
    """Share of the last failed_window attempts of training that the reward may have looked at without coming to a verdict: a
    judge that talks nonsense, a function that raises or hangs. Each is worth 0; the run ends when more are. 1: it never does."""
    dynamic: DynamicConfig = DynamicConfig()
    deadline_s: PositiveFloat | None = None
    """How long a trajectory of training may take, from its first request on. Then it ends where it is, with one token of the turn
    that it is in at least: its status is `deadline`, and it is judged and trained on like one that `max_response_tokens` ended.
    `rollout/deadline` counts them. Evaluations have no deadline. null: none."""
    environment: Environment = CodeEnvironment()
    """What answers the model's turns."""
    tool: Tool | None = PythonTool()
    """What executes the model's code. null: single-turn."""
    agent: Agent | None = None
    """A program of others that plays the attempts through an endpoint, with tools of its own (docs/agents.md). null: the model is
    asked as it is, with rollout.tool."""
    reward: AnyReward = MathReward()
    """How an answer is judged."""
    engine: EngineConfig = EngineConfig()
    """The inference servers."""

    @property
    def code_tool(self) -> Tool | None:
        """What executes the model's code, where anything does."""
        return self.tool if isinstance(self.environment, CodeEnvironment) else None

    @property
    def truncation(self) -> Truncation:
        """What is cut off the distribution before a token is drawn."""
        return Truncation(self.top_p, self.top_k, self.min_p)

    @model_validator(mode="after")
    def _agents_bring_their_tools(self) -> RolloutConfig:
        if self.agent is not None and not isinstance(self.environment, CodeEnvironment):
            raise ValueError(
                f"rollout.agent and rollout.environment.type={self.environment.type} are both set, but an agent is what plays an "
                "attempt, and an environment with turns of its own is so too; leave one of them out"
            )
        if self.agent is not None and self.tool is not None:
            raise ValueError(
                f"rollout.agent and rollout.tool={self.tool.type} are both set, but agents bring their own tools; set "
                "rollout.tool=null, or leave rollout.agent out"
            )
        return self

    @model_validator(mode="after")
    def _supports_can_be_told(self) -> RolloutConfig:
        if self.top_k is None and self.truncation.cuts:
            key = f"rollout.top_p={self.top_p:g}" if self.top_p < 1 else f"rollout.min_p={self.min_p:g}"
            raise ValueError(
                f"{key} without rollout.top_k: what was cut off has to be known for each token, or ratios are biased, and SGLang "
                f"tells it under a finite top_k only. Set rollout.top_k too, 2 to {MAX_TOP_K} (20 beside top_p=0.95 is Qwen3's "
                f"recommendation), or leave {key.partition('=')[0]} out"
            )
        return self
