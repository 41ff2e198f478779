"""Training in fp8: what reaches Megatron's configuration, and what is refused where TransformerEngine or the GPU are missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.train import Fp8Config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.mcore import fp8
from tests.unit.cluster.test_runtime import DENSE

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def check(recipe: str, device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16, **other: Any) -> None:
    fp8.check_fp8(Fp8Config(recipe=recipe), device, dtype, **({"recompute": "none", "mixture": False} | other))


@pytest.fixture
def _engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """TransformerEngine, on a GPU of the capability asked for."""
    monkeypatch.setattr(fp8, "use_transformer_engine", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A GPU")


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_transformer_engine(recipe: str) -> None:
    """Megatron takes the options there and computes as before, without a word."""
    with pytest.raises(
        ConfigError, match=rf"train.fp8.recipe={recipe} needs .*the trainer runs on a CPU: .* in bfloat16 as before"
    ):
        check(recipe, CPU)
    with pytest.raises(ConfigError, match=r"but the package is not installed \(`make install-gpu`\)"):
        check(recipe)
    fp8.check_fp8(None, CPU, torch.float32, recompute="none", mixture=False)


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize(
    ("_engine", "allowed"),
    [((8, 0), ()), ((8, 9), RECIPES[:2]), ((9, 0), RECIPES[:3]), ((10, 0), RECIPES), ((10, 3), RECIPES)],
    indirect=["_engine"],
)
def test_by_the_capability_of_the_gpu(allowed: tuple[str, ...]) -> None:
    for recipe in RECIPES:
        if recipe in allowed:
            check(recipe)
        else:
            instead = ", ".join(allowed) if allowed else "Set train.fp8 to null"
            with pytest.raises(ConfigError, match=rf"recipe={recipe} needs a GPU of compute capability .* is A GPU, .*{instead}"):
                check(recipe)


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("_engine", [(9, 0)], indirect=True)
def test_what_else_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="is for bfloat16 weights, but the trainer's are float32"):
        check("tensorwise", dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"recipe=delayed with train.recompute=selective"):
        check("delayed", recompute="selective", mixture=True)
    check("delayed", recompute="selective")
    check("tensorwise", recompute="selective", mixture=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_megatron_is_told(recipe: str) -> None:
    from ctpo_megatron.mcore.host import prepare_host

    prepare_host("cpu")
    from ctpo_megatron.mcore.model.transformer import transformer_config

    def made(given: Fp8Config | None) -> Any:
        return transformer_config(DENSE, ParallelConfig(), MoeConfig(), torch.bfloat16, CPU, "none", given)

    plain = made(Fp8Config(recipe=recipe))
    assert (plain.fp8, plain.fp8_recipe, plain.first_last_layers_bf16) == (Fp8Config(recipe=recipe).number_format, recipe, False)
    assert not plain.fp8_param, "weights stay in bfloat16"
    if recipe != "delayed":
        kept = made(Fp8Config(recipe=recipe, format="hybrid", bf16_layers_at_start=1, bf16_layers_at_end=0))
        assert (kept.fp8, kept.first_last_layers_bf16) == ("hybrid", True)
        assert (kept.num_layers_at_start_in_bf16, kept.num_layers_at_end_in_bf16) == (1, 0)
    assert made(None).fp8 is None
