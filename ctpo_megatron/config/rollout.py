"""How trajectories are made: data, sampling, tools, rewards, inference servers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ctpo_megatron.config.base import FilePath, Section
from ctpo_megatron.config.dynamic import DynamicConfig
from ctpo_megatron.config.feeding import MAIN, PoolsConfig, SourceConfig

CPU_KV_TOKENS = 65_536  # of a server on CPUs whose configuration does not say how many


class DataConfig(Section):
    """Prompts. Files are .parquet or .jsonl with the columns `prompt` and `reward_model.ground_truth` (verl's format)."""

    train: FilePath
    """Prompts to train on."""
    weight: PositiveFloat = 1.0
    """How often a prompt of `train` comes, relative to the weights of the mixture's sources."""
    mixture: tuple[SourceConfig, ...] = ()
    """Further files of prompts to train on, for `ctpo train`. Each draw picks a source by the weights; each source comes in
    epochs of its own."""
    pools: PoolsConfig | None = None
    """Pools of one difficulty in each source. null: none."""
    curriculum: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    """`package.module:function` that gives the weights of sources and pools, asked after every step (docs/rollouts.md). null: the
    weights stay."""
    eval: FilePath | None = None
    """Held-out prompts. null: no evaluation."""
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


class PythonTool(Section):
    """Runs the model's ```python blocks confined by bubblewrap."""

    type: Literal["python"] = "python"
    timeout_s: PositiveFloat = 10.0
    """Wall time of one call."""
    memory_mb: PositiveInt = 512
    """Address space of one call."""
    max_output_chars: PositiveInt = 256
    """Longer output is cut in the middle."""
    fallback: Literal["error", "calculator"] = "error"
    """Where bubblewrap is missing: refuse to start, or use the calculator, which executes nothing."""


class CalculatorTool(Section):
    """Evaluates the arithmetic of a ```python block by parsing it; executes nothing."""

    type: Literal["calculator"] = "calculator"
    max_output_chars: PositiveInt = 256
    """Longer output is cut in the middle."""


Tool = Annotated[PythonTool | CalculatorTool, Field(discriminator="type")]


class MathReward(Section):
    r"""1.0 where the last \boxed{} equals the answer by the rules of docs/rewards.md, else 0.0."""

    type: Literal["math"] = "math"
    timeout_s: PositiveFloat = 5.0
    """Time to compare one answer; beyond it the reward is 0 and `reward/undecided` counts it."""


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
    extra_args: tuple[str, ...] = ()
    """Further arguments for `sglang.launch_server`, passed as they are. `--json-model-override-args` is refused: the trainer
    would not see it."""

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
    max_turns: PositiveInt = 5
    """Assistant turns per trajectory."""
    max_response_tokens: PositiveInt = 1024
    """Tokens after the prompt, tool output included."""
    concurrency: PositiveInt = 64
    """Trajectories in flight."""
    retries: NonNegativeInt = 2
    """How often an attempt that failed (its servers, its sandbox, its reward) is tried again, from where it was. Then it counts
    as failed: its group is not trained on, and another prompt takes its place."""
    failed_share: float = Field(0.05, ge=0, le=1)
    """Share of the last failed_window attempts that may fail in this way; the run ends when more do. 0: the first one ends it.
    Attempts that are not used because another one of their group failed are not among them."""
    failed_window: PositiveInt = 256
    """Attempts that failed_share is taken of."""
    dynamic: DynamicConfig = DynamicConfig()
    tool: Tool | None = PythonTool()
    """What executes the model's code. null: single-turn."""
    reward: MathReward = MathReward()
    """How an answer is judged."""
    engine: EngineConfig = EngineConfig()
    """The inference servers."""


class EvalConfig(Section):
    """Held-out accuracy."""

    every: NonNegativeInt = 0
    """Evaluate after every so many steps, besides before the first and after the last. 0: only these two."""
    prompts: PositiveInt | None = None
    """Use the first so many rows. null: all."""
    samples: PositiveInt = 1
    """Samples per prompt; accuracy is their mean."""
    temperature: NonNegativeFloat = 0.0
    """0: greedy."""
