"""`ctpo eval`: accuracy of a model on held-out prompts, through the same servers and environment as training."""

from __future__ import annotations

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.inputs import load_prompts, open_model, prepare_run_dir
from ctpo_megatron.jobs.rollouts import open_rollouts
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.loop.evaluate import evaluate
from ctpo_megatron.record import write_summary
from ctpo_megatron.record.events import print_sentence
from ctpo_megatron.rollout.tools import make_tool


async def eval_job(config: RunConfig) -> None:
    """Print the accuracy and write RUN_DIR/eval.json."""
    if config.data.eval is None:
        raise ConfigError("data.eval is not set; give the file to evaluate on")
    model = open_model(config, "eval")
    prompts = load_prompts(config.data.eval, config, model.chat, print_sentence, model.shape)
    tool = make_tool(config.rollout.tool)
    run_dir = prepare_run_dir(config)
    async with (
        Runtime(config, model.shape, topology_of(config, trainer=False), run_dir, emit=print_sentence) as runtime,
        open_rollouts(runtime, model.chat, tool) as rollouts,
    ):
        result = await runtime.guard(evaluate(rollouts.rollouter, prompts, config.eval, step=0))
    write_summary(run_dir, result.metrics(), name="eval.json")
    print(
        f"eval: accuracy {result.accuracy:.1%} on {len(result.groups)} prompts x {config.eval.samples}, "
        f"tool used in {result.tool_rate:.0%}, {result.seconds:.1f} s"
    )
