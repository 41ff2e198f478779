"""Number formats of trainer and servers: what is refused before anything is started, and what bounds they have."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.record import FEWEST_TOKENS, DriftBounds, DriftConfig
from ctpo_megatron.config.train import Fp8Config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.weights.proof.canary import canary_tolerance

QUANTISED = {"weights": {"type": "broadcast", "quantization": "fp8"}}
CORRECTED = {"algorithm": {"correction": {"type": "truncate", "level": "token"}}}


def config(**sections: Any) -> RunConfig:
    needed = {"name": "r", "run_dir": "r", "model": {"path": "m"}, "data": {"train": "d"}}
    return RunConfig.model_validate(needed | sections)


@pytest.mark.parametrize("transport", [{"type": "broadcast"}, {"type": "colocated"}, {"type": "disk", "directory": "d"}])
def test_every_transport_takes_it(transport: dict[str, Any]) -> None:
    given = config(weights={"quantization": "fp8"} | transport, **CORRECTED)
    assert given.weights.quantization == "fp8"
    assert given.without_trainer.weights.quantization is None
    assert given.without_trainer.weights.type == given.weights.type
    with pytest.raises(ValidationError, match="fp8"):
        config(weights={"quantization": "int4"} | transport, **CORRECTED)


@pytest.mark.parametrize(
    "counted",
    [
        CORRECTED,
        {"algorithm": {"anchor": "rollout"}},
        {"algorithm": {"objective": {"type": "dppo"}}},
        {"drift": {"mean": 0.2}},
        {"drift": {"mean": None}},
    ],
)
def test_a_gap_that_is_counted_or_bounded_by_hand(counted: dict[str, Any]) -> None:
    """Ratios against the engine count it, corrections weigh it, and whoever sets a bound knows of it."""
    config(**QUANTISED, **counted)
    config(**counted)


def test_a_bound_that_single_tokens_pass_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"drift.max=0.001: single log-probs.*set drift.max to null"):
        config(**QUANTISED, **CORRECTED, drift={"max": 1e-3})
    config(**QUANTISED, **CORRECTED, drift={"max": 2.0})
    config(drift={"max": 1e-3})


def test_a_gap_that_nothing_counts_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"not quite the trainer's.*Set algorithm.correction.*or say by a drift.mean"):
        config(**QUANTISED)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"path": "m", "dtype": "float32"}}, "model.dtype=float32, which is float32 here; set model.dtype=bfloat16"),
        ({"cluster": {"device": "cpu"}}, "bfloat16 only, not with model.dtype=auto, which is float32 here"),
    ],
)
def test_beside_fp8_servers_compute_in_bfloat16(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**QUANTISED, **CORRECTED, **sections)
    config(**QUANTISED, **CORRECTED, model={"path": "m", "dtype": "bfloat16"}, cluster={"device": "cpu"})


def test_drafts_of_speculative_decoding() -> None:
    words = {"rollout": {"engine": {"extra_args": ["--speculative_draft_model_path=d"]}}}
    config(**words)
    with pytest.raises(ValidationError, match=r"--speculative-draft-model-path beside .* leave one of the two out"):
        config(**words, **QUANTISED, **CORRECTED)


def test_the_device_is_known_later() -> None:
    """`auto` is neither: what it turns out to be is looked at then."""
    given = config(**QUANTISED, **CORRECTED)
    given.check_device("cuda")
    with pytest.raises(ConfigError, match=r"set model.dtype=bfloat16, or weights.quantization=null"):
        given.check_device("cpu")
    config().check_device("cpu")


def test_training_in_fp8_is_for_gpus_and_bfloat16() -> None:
    recipe = {"train": {"fp8": {"recipe": "mxfp8"}}}
    with pytest.raises(ValidationError, match=r"train.fp8.recipe=mxfp8 needs GPUs and TransformerEngine.*Set train.fp8=null"):
        config(**recipe, cluster={"device": "cpu"})
    with pytest.raises(ValidationError, match=r"train.fp8 is for weights in bfloat16, not with model.dtype=float32"):
        config(**recipe, model={"path": "m", "dtype": "float32"})
    given = config(**recipe)
    given.check_device("cuda")
    with pytest.raises(ConfigError, match="needs GPUs and TransformerEngine"):
        given.check_device("cpu")


def test_an_offloaded_optimizer_is_of_bfloat16() -> None:
    with pytest.raises(ValidationError, match=r"optimizer.cpu_offload=0.5 is for weights in bfloat16.*set model.dtype=bfloat16"):
        config(optimizer={"cpu_offload": 0.5}, model={"path": "m", "dtype": "float32"})
    assert config(optimizer={"cpu_offload": 0.5}).optimizer.cpu_offload == 0.5


@pytest.mark.parametrize(
    ("recipe", "number_format", "multiple"),
    [("delayed", "hybrid", 16), ("tensorwise", "hybrid", 16), ("blockwise", "e4m3", 128), ("mxfp8", "e4m3", 32)],
)
def test_recipes(recipe: str, number_format: str, multiple: int) -> None:
    fp8 = Fp8Config(recipe=recipe)
    assert (fp8.number_format, fp8.token_multiple) == (number_format, multiple)
    assert Fp8Config(recipe=recipe, format="hybrid").number_format == "hybrid"
    tokens = {"fp8": {"recipe": recipe}, "max_tokens_per_micro_batch": 4096}
    assert config(train=tokens, parallel={"tp": 2}).train.token_multiple == multiple
    with pytest.raises(ValidationError, match=f"=4104 is no multiple of {2 * multiple}"):
        config(train=tokens | {"max_tokens_per_micro_batch": 4104}, parallel={"tp": 2})
    config(train={"max_tokens_per_micro_batch": 4103}, parallel={"tp": 2})


def test_delayed_scaling_keeps_no_layer_out() -> None:
    with pytest.raises(ValidationError, match="recipe=delayed knows no layers in bfloat16"):
        Fp8Config(recipe="delayed", bf16_layers_at_end=1)
    Fp8Config(recipe="tensorwise", bf16_layers_at_end=1)


def test_bounds_of_quantised_servers_are_wider() -> None:
    for mixture in (False, True):
        assert DriftConfig().bounds("bfloat16", mixture=mixture, quantised=True) == DriftBounds(None, 0.5, FEWEST_TOKENS)
        assert canary_tolerance("bfloat16", mixture=mixture, replayed=True, quantised=True) == 1.0
    assert DriftConfig(mean=0.01).bounds("bfloat16", mixture=False, quantised=True).mean == 0.01
