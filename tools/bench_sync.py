"""What it costs to bring a trainer's weights to a server, against a bare broadcast of the same bytes.

    python tools/bench_sync.py                    a model of 0.6 B parameters; about five minutes on two cores, 10 GB of memory
    python tools/bench_sync.py --layers 4 --hidden 256 --ffn 768 --vocab 8192 --repeats 2     a minute
    python tools/bench_sync.py --json found.json  the numbers as a file too

A trainer of two tensor-parallel ranks publishes to one SGLang server, all on CPUs over gloo: whole publications with pause, proof
and canary, as a run makes them. Ways take turns within one run; a number is the median over repeats, a ratio the median of the
ratios within each repeat. Ends with exit code 1, and says which, when a bound is missed. docs/bench_sync.md has a run and its
reading.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_loss import Check
from bench_sync_ranks import HOST, RANKS, Row, Task, measure
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from ctpo_megatron.cluster.local_ranks import run_local_ranks
from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.engine.server import SGLangServer, new_api_key
from ctpo_megatron.engine.server_args import server_args, server_env
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.owners import make_buckets, nbytes
from ctpo_megatron.models.tensors import HfTensor, hf_tensors
from ctpo_megatron.ports import free_port

MIN_BANDWIDTH = 0.7  # of a bare broadcast
MIN_COLOCATED = 0.9  # the same, handed over within a node
MAX_DELTA = (
    0.3  # pause for a delta, of a full broadcast's: half of 0.6, which it was when all weights were gathered and read for it
)
MAX_ATTESTATION = 0.1  # of the time without generation
MAX_MEMORY = 2.0  # buckets, on the sender
START_S = 300.0
KV_TOKENS = 2048  # nothing but canaries is computed


def write_model(directory: Path, config: dict) -> list[HfTensor]:
    """Random weights in bfloat16 under `directory`, as Hugging Face has them. Returns what there is."""
    from transformers import AutoConfig

    AutoConfig.for_model(**config, architectures=["Qwen3ForCausalLM"], dtype="bfloat16").save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    generator = torch.Generator().manual_seed(1)
    tensors = hf_tensors(parse_config(json.loads((directory / "config.json").read_text()), str(directory)))

    def weight(tensor: HfTensor) -> torch.Tensor:
        if len(tensor.shape) == 1:  # of a norm
            return torch.ones(tensor.shape, dtype=torch.bfloat16)
        return 0.02 * torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16)

    save_file({each.name: weight(each) for each in tensors}, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def start_server(model: Path, log: Path, key: str, dtype: str) -> SGLangServer:
    engine, port = EngineConfig(max_total_tokens=KV_TOKENS), free_port(HOST)
    arguments = server_args(model, engine, device="cpu", dtype=dtype, port=port, seed=1)
    return SGLangServer(arguments, url=f"http://{HOST}:{port}", api_key=key, log=log, env=server_env(engine, device="cpu"))


def median(rows: list[Row], way: str, what: str, name: str) -> float:
    """Over the repeats."""
    return statistics.median(row.get(name, 0.0) for row in rows if (row["way"], row["what"]) == (way, what))


def ratios(rows: list[Row]) -> dict[str, float]:
    """Ratios of full publications: medians of the ratios within each repeat. Those of broadcasts have bounds.

    `bandwidth` is that of the update, while servers are paused; `whole` counts the first bucket too, which is gathered before.
    """
    bare = {row["repeat"]: row["bytes"] / row["transfer"] for row in rows if row["way"] == "bare"}
    ready = [row for row in rows if row["way"] == "ready-made"]
    found = {"server": statistics.median(row["bytes"] / row["update"] / bare[row["repeat"]] for row in ready)}
    for way, prefix in (("broadcast", ""), ("colocated", "colocated ")):
        full = [row for row in rows if (row["way"], row["what"]) == (way, "full")]
        seconds = {"bandwidth": lambda row: row["update"], "whole": lambda row: row["prepare"] + row["update"]}
        for name, of in seconds.items():
            found[prefix + name] = statistics.median(row["bytes"] / of(row) / bare[row["repeat"]] for row in full)
        delta = [row for row in rows if (row["way"], row["what"]) == (way, "delta")]
        of_full = {row["repeat"]: row["paused"] for row in rows if (row["way"], row["what"]) == ("broadcast", "full")}
        found[prefix + "delta"] = statistics.median(row["paused"] / of_full[row["repeat"]] for row in delta)
        found[prefix + "attestation"] = statistics.median(row["attestation"] / row["paused"] for row in full)
        found[prefix + "memory"] = statistics.median(row["memory"] / row["bucket"] for row in full)
    return found


def checks(found: dict[str, float]) -> list[Check]:
    """The bounds."""
    bandwidth, attestation, memory = found["bandwidth"], found["attestation"], found["memory"]
    colocated, delta = found["colocated bandwidth"], found["delta"]
    low, share, buckets = MIN_BANDWIDTH, MAX_ATTESTATION, MAX_MEMORY
    return [
        Check(f"bandwidth of an update {bandwidth:.2f} of a bare broadcast (at least {low})", bandwidth >= low),
        Check(f"colocated {colocated:.2f} (at least {MIN_COLOCATED})", colocated >= MIN_COLOCATED),
        Check(f"pause for a delta {delta:.2f} of that for all weights (at most {MAX_DELTA})", delta <= MAX_DELTA),
        Check(f"attestation {attestation:.3f} of the time without generation (at most {share})", attestation <= share),
        Check(f"memory of the sender {memory:.2f} buckets (at most {buckets:.0f})", memory <= buckets),
    ]


COLUMNS = {
    "prepare": "prepare s",
    "paused": "paused s",
    "update": "update s",
    "gather": "gather",
    "digest": "digest",
    "send": "send",
    "write": "write",
    "checksums": "checksums",
    "attestation": "attestation",
    "canary": "canary",
    "trainer cpu": "trainer CPU",
    "server cpu": "server CPU",
}


def table(rows: list[Row]) -> Table:
    """A line for each way."""
    shown = Table("way", "what", "MB", "GB/s", *COLUMNS.values(), "extra MB", title="Medians")
    for way, what in dict.fromkeys((row["way"], row["what"]) for row in rows):
        seconds = median(rows, way, what, "update") or median(rows, way, what, "transfer")
        size = median(rows, way, what, "bytes")
        numbers = [f"{median(rows, way, what, name):.2f}" for name in COLUMNS]
        memory = f"{median(rows, way, what, 'memory') / 1e6:.0f}"
        shown.add_row(way, what, f"{size / 1e6:.0f}", f"{size / seconds / 1e9:.2f}", *numbers, memory)
    return shown


def main(
    layers: int = 28,
    hidden: int = 1024,
    ffn: int = 3072,
    heads: int = 16,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab: int = 151_936,
    bucket_mb: Annotated[int, typer.Option(help="half of what runs take, so that a small model has several")] = 256,
    repeats: Annotated[int, typer.Option(help="of which the median counts, after one that does not")] = 3,
    changed: Annotated[float, typer.Option(help="share of the tensors that a delta brings")] = 0.03,
    dtype: str = "bfloat16",
    files: Annotated[bool, typer.Option(help="measure publications over files too")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Print the table and the bounds."""
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tensors, key = write_model(root / "model", config), new_api_key()
        element = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        buckets = [sum(nbytes(each, element) for each in bucket) for bucket in make_buckets(tensors, element, bucket_mb * 2**20)]
        server = start_server(root / "model", root / "server.log", key, dtype)
        try:
            server.wait_healthy(START_S)
            task = Task(
                model=str(root / "model"),
                dtype=dtype,
                bucket_mb=bucket_mb,
                repeats=repeats,
                changed=max(1, round(changed * len(tensors))),
                url=server.url,
                key=key,
                server=server.pid,
                directory=str(root / "versions"),
                bare_port=free_port(HOST),
                ways=("broadcast", "colocated", *(["disk"] if files else [])),
            )
            rows = run_local_ranks(RANKS, measure, task, buckets)[0]
        finally:
            server.stop()
    for row in rows:
        row["bucket"] = max(buckets)
    found = ratios(rows)
    about: dict[str, Any] = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load before": load,
        "dtype": dtype,
        "tensors": len(tensors),
    }
    about |= {"buckets": buckets, **config}
    if json_file:
        json_file.write_text(json.dumps({"about": about, "ratios": found, "rows": rows}, indent=1))
    console = Console(width=170)
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    size, largest = sum(buckets) / 1e6, max(buckets) / 1e6
    console.print(f"{len(tensors)} tensors, {size:.0f} MB of {dtype} in {len(buckets)} buckets, largest {largest:.0f} MB")
    console.print(table(rows))
    shares = {"buckets that lie ready": "server", "colocated": "colocated bandwidth"}
    shares |= {"broadcast and its first gathering": "whole", "colocated and its first gathering": "colocated whole"}
    console.print("bandwidth, of a bare broadcast: " + ", ".join(f"{what} {found[name]:.2f}" for what, name in shares.items()))
    bounds = checks(found)
    for check in bounds:
        print(f"{'holds ' if check.holds else 'MISSED'}  {check.text}")
    raise typer.Exit(0 if all(check.holds for check in bounds) else 1)


if __name__ == "__main__":
    typer.run(main)
