"""Starts SGLang's HTTP server in this process, through the override points its own Ray backend uses."""

from __future__ import annotations

import errno
import gc
import logging
import multiprocessing
import os
import sys

from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager, run_detokenizer_process, run_scheduler_process
from sglang.srt.entrypoints.http_server import _setup_and_run_http_server
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from ctpo_megatron.engine.processes import CANNOT_LISTEN
from ctpo_megatron.engine.sglang import attention, fp8, paused, products, routed, sampling, sleep, twins
from ctpo_megatron.rendezvous.gloo import share_gloo_device


class LeanEngine(Engine):
    """Scheduler processes as ever, but no detokenizer: with --skip-tokenizer-init the scheduler answers with token ids."""

    @classmethod
    def _launch_detokenizer_subprocesses(cls, server_args, port_args, run_detokenizer_process_func):
        return [], []


class ForkingEngine(LeanEngine):
    """Schedulers forked from this process, which has imported everything: half of the start, and shared pages.

    Only for CPUs: a CUDA context does not survive a fork.
    """

    @classmethod
    def _launch_scheduler_processes(cls, *args, **kwargs):
        gc.freeze()  # modules are no garbage: SGLang collects at each flush of its cache, for half a second without this
        method = multiprocessing.get_start_method()
        multiprocessing.set_start_method("fork", force=True)
        try:
            return super()._launch_scheduler_processes(*args, **kwargs)
        finally:
            multiprocessing.set_start_method(method, force=True)


def serve(argv: list[str], api_key: str) -> None:
    """Serve until told to stop. `argv` as for `sglang.launch_server`."""
    routed.register()
    paused.register()
    sleep.register()
    products.register()
    twins.register()
    sampling.register()
    fp8.register()
    load_plugins()
    attention.register()
    server_args = prepare_server_args(argv)
    server_args.api_key = api_key
    if server_args.device == "cpu":
        from ctpo_megatron.engine.sglang import operators  # compiles for a second: here, and not in each scheduler

        operators.register()
        share_gloo_device()  # the schedulers, its forks, make ten groups each
    engine = ForkingEngine if server_args.device == "cpu" else LeanEngine
    manager, templates, ports, schedulers, watchdog, _daemons = engine._launch_subprocesses(
        server_args, init_tokenizer_manager, run_scheduler_process, run_detokenizer_process
    )
    try:
        _setup_and_run_http_server(server_args, manager, templates, ports, schedulers.scheduler_infos, watchdog)
    except SystemExit as ended:  # of uvicorn; SGLang's threads would keep this process for ever, and nobody could ask it
        cause = ended.__context__
        logging.shutdown()
        sys.stdout.flush()
        os._exit(CANNOT_LISTEN if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE else 1)
