"""`ctpo sft`: demonstrations in, a Hugging Face model out."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.jobs.export import export
from ctpo_megatron.jobs.inputs import check_output, load_demonstrations, open_model, prepare_run_dir
from ctpo_megatron.jobs.recording import closing_sinks, make_sinks, shown
from ctpo_megatron.jobs.skipping import make_skipping
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.loop.sft import run_sft
from ctpo_megatron.record import Recorder, write_summary
from ctpo_megatron.record.events import Event, print_sentence
from ctpo_megatron.record.sink_feed import SinkFeed
from ctpo_megatron.record.sink_process import check_sinks
from ctpo_megatron.record.storage import Storage


async def sft_job(config: RunConfig) -> None:
    """Train on data.train until sft.steps or sft.stop_loss, then write sft.output."""
    begun = time.monotonic()
    config.optimizer.check_length(config.sft.steps)
    check_sinks(config.log.sinks)
    model = open_model(config, "sft")
    if config.sft.output:
        check_output("sft.output", Path(config.sft.output))
    feed = SinkFeed()

    def emit(event: Event) -> None:
        print_sentence(event)
        feed(event)

    samples = load_demonstrations(config, model, emit)
    run_dir = prepare_run_dir(config)
    output = Path(config.sft.output) if config.sft.output else run_dir / "model"
    topology = topology_of(config, engines=False)
    one = config.in_layout(config.parallel)  # nothing of it is started again
    runtime = Runtime(one, model.shape, topology, run_dir, total_steps=config.sft.steps)
    storage = Storage(run_dir, config.checkpoint.storage_wait_s)
    async with storage.outlasting(emit, runtime.stages):
        async with closing_sinks(feed, print_sentence), AsyncExitStack() as ends, runtime:
            feed.begin(make_sinks(config, run_dir, resumed=False))
            recorder = Recorder(
                run_dir,
                config.log,
                settings=shown(config),
                sinks=feed.sinks,
                emit=emit,
                through=storage.write,
                aside=storage.attempt,
            )
            ends.callback(recorder.close)
            skipping = make_skipping(runtime.trainer, config, run_dir, emit)
            result = await runtime.guard(run_sft(config, samples, runtime.trainer, recorder, skipping, storage))
            await runtime.guard(storage.patiently(partial(export, runtime.trainer, model.chat, output)))
        wall = time.monotonic() - begun
        write_summary(run_dir, {"steps": result.steps, "loss": result.loss, "tokens": result.tokens, "wall_s": wall})
    print(f"sft: {result.steps} steps, loss {result.loss:.3f} per token, {wall:.0f} s; model written to {output}")
