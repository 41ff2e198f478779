"""Which of SGLang's own options a run may pass on with `rollout.engine.extra_args`, and why others are refused.

What the loss needs of a server: it samples from the distribution whose log-probs it returns, with the weights whose version it
returns, and it can be proven to hold what was published. Facts are those of SGLang 0.5.23; docs/traffic.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_OURS = "it is set by the run itself"
_STALE = "what is kept there was computed by older weights and is not flushed when new ones are published"
_LAYOUT = "the server would keep the weights in another layout than the proof of a publication knows"
_ROUNDED = (
    "the server would keep other numbers than those that are published, which no proof fits; weights.quantization=fp8 has the "
    "trainer publish weights in fp8 (docs/precision.md)"
)
_SAME_DRAWS = "each request then draws by its own seed, 42 where it names none, so all attempts at a prompt would be the same one"
_ADAPTERS = "the trainer trains all weights; adapters would be others than those that it publishes"
_ELSEWHERE = "weights that are published would not reach those that wait in host memory"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("model-path", "model", "host", "port", "api-key", "admin-api-key", "device", "weight-version"), _OURS),
    "dtype": f"{_OURS}, from model.dtype",
    **dict.fromkeys(("nnodes", "node-rank", "dist-init-addr", "nccl-init-addr"), f"{_OURS}, from rollout.engine.nodes"),
    **dict.fromkeys(("tp-size", "tensor-parallel-size"), f"{_OURS}, from rollout.engine.tp"),
    "random-seed": f"{_OURS}: servers with one seed would draw the same numbers",
    "config": "a file of arguments cannot be checked; write them into rollout.engine.extra_args",
    "json-model-override-args": (
        "the servers would read another config.json than the trainer; write what it says into the model's config.json"
    ),
    "disaggregation-mode": "a request would need two servers, for its prompt and for its answer; each server of a run does both",
    **dict.fromkeys(("quantization", "quantize-and-serve", "modelopt-quant", "rl-quant-profile"), _ROUNDED),
    **dict.fromkeys(("dp-size", "data-parallel-size", "pp-size", "pipeline-parallel-size"), _LAYOUT),
    **dict.fromkeys(("ep-size", "ep", "expert-parallel-size", "moe-dp-size", "moe-data-parallel-size"), _LAYOUT),
    **dict.fromkeys(("attn-dp-size", "attention-data-parallel-size", "enable-dp-attention"), _LAYOUT),
    **dict.fromkeys(("hicache-storage-backend", "enable-lmcache", "enable-flexkv", "radix-cache-backend"), _STALE),
    "enable-unified-cache-external-linker": _STALE,
    **dict.fromkeys(("enable-deterministic-inference", "rl-on-policy-target"), _SAME_DRAWS),
    "allow-auto-truncate": "a context that is too long would lose its end without a word, and the trainer would see all of it",
    "enable-strict-thinking": "tokens are kept from being drawn that the policy of the trainer can draw",
    "dllm-algorithm": "its tokens are not sampled one after the other, so they have no log-probs of that kind",
    "preferred-sampling-params": "it adds to every request; set rollout.temperature, top_p, top_k and min_p instead",
    "enable-watermark": "a watermark changes which tokens are drawn, but not the log-probs that are reported",
    **dict.fromkeys(("enable-lora", "lora-paths"), _ADAPTERS),
    **dict.fromkeys(("cpu-offload-gb", "offload-group-size"), _ELSEWHERE),
}
THRESHOLDS = ("speculative-accept-threshold-single", "speculative-accept-threshold-acc")
_THRESHOLD = "below 1 drafts are accepted that are not drawn from the policy, and the log-probs are the policy's; leave it out"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a command line, without its dashes, and its value; empty: it has none."""

    name: str
    value: str = ""

    @property
    def faults(self) -> Iterator[tuple[str, str]]:
        """Yields the refused options that it is, or is the beginning of, which argparse takes too; each with the reason."""
        yield from ((name, why) for name, why in REFUSED.items() if name.startswith(self.name))
        if not _is_one(self.value):
            yield from ((name, _THRESHOLD) for name in THRESHOLDS if name.startswith(self.name))


def options(words: Sequence[str]) -> Iterator[Option]:
    """Yields the options among `words`, written as `--name value` or `--name=value`, with - or _ in the name."""
    for at, word in enumerate(words):
        if word.startswith("--") and word != "--":
            name, equals, value = word[2:].partition("=")
            following = words[at + 1] if at + 1 < len(words) else ""
            yield Option(name.replace("_", "-"), value if equals else "" if following.startswith("--") else following)


def check_options(words: Sequence[str]) -> None:
    """Raises ValueError, which names all options among `words` that a run cannot work with, and why."""
    wrong = dict(fault for each in options(words) for fault in each.faults)
    if wrong:
        told = "; ".join(f"--{name} is not allowed: {why}" for name, why in wrong.items())
        raise ValueError(f"{told}. docs/traffic.md has all of them")


def _is_one(value: str) -> bool:
    try:
        return float(value) == 1.0
    except ValueError:
        return False
