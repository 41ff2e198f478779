"""Which of SGLang's own options a run may pass on with `rollout.engine.extra_args`, and why others are refused.

What the loss needs of a server: it samples from the distribution whose log-probs it returns, with the weights whose version it
returns, and it can be proven to hold what was published. Facts are those of SGLang 0.5.23; docs/rollouts.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctpo_megatron.errors import ConfigError

_OURS = "it is set by the run itself"
_STALE = "what is kept there was computed by older weights and is not flushed when new ones are published"
_LAYOUT = "the server would keep the weights in another layout than the proof of a publication knows"
_ROUNDED = (
    "the server would keep other numbers than those that are published, which no proof fits, and sample from another policy"
)

REFUSED: dict[str, str] = {
    **dict.fromkeys(("model-path", "model", "host", "port", "api-key", "admin-api-key", "device", "weight-version"), _OURS),
    **dict.fromkeys(("nnodes", "node-rank", "dist-init-addr"), f"{_OURS}, from rollout.engine.nodes"),
    **dict.fromkeys(("tp-size", "tensor-parallel-size", "tp"), f"{_OURS}, from rollout.engine.tp"),
    "random-seed": f"{_OURS}: servers with one seed would draw the same numbers",
    "disaggregation-mode": "a request would need two servers, for its prompt and for its answer; each server of a run does both",
    **dict.fromkeys(("quantization", "quantize-and-serve"), _ROUNDED),
    **dict.fromkeys(
        ("dp-size", "data-parallel-size", "pp-size", "pipeline-parallel-size", "ep-size", "ep", "moe-dp-size"), _LAYOUT
    ),
    **dict.fromkeys(("hicache-storage-backend", "enable-lmcache"), _STALE),
    "dllm-algorithm": "its tokens are not sampled one after the other, so they have no log-probs of that kind",
    "preferred-sampling-params": "it would change the distribution that is sampled, and not its log-probs",
    "enable-lora": "the trainer trains all weights; adapters would be others than those that it publishes",
    "cpu-offload-gb": "weights that are published would not reach those that wait in host memory",
}
THRESHOLDS = ("speculative-accept-threshold-single", "speculative-accept-threshold-acc")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a command line, without its dashes, and its value; empty: it has none."""

    name: str
    value: str = ""


def options(words: Sequence[str]) -> Iterator[Option]:
    """Yields the options among `words`, written as `--name value` or `--name=value`, with - or _ in the name."""
    for at, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = words[at + 1] if at + 1 < len(words) else ""
            yield Option(name.replace("_", "-"), value if equals else "" if following.startswith("--") else following)


def check_options(words: Sequence[str]) -> None:
    """Raises ConfigError, which names all options of `rollout.engine.extra_args` that a run cannot work with, and why."""
    wrong = [f"--{each.name}: {REFUSED[each.name]}" for each in options(words) if each.name in REFUSED]
    wrong += [
        f"--{each.name} {each.value}: below 1 it takes drafted tokens more often than the model would, and the log-probs are the "
        "model's; allowed: 1.0, the default"
        for each in options(words)
        if each.name in THRESHOLDS and not _is_one(each.value)
    ]
    if wrong:
        raise ConfigError(f"rollout.engine.extra_args: {'; '.join(wrong)}. Leave it out. docs/rollouts.md has all of them")


def _is_one(value: str) -> bool:
    try:
        return float(value) == 1.0
    except ValueError:
        return False
