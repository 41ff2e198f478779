"""Adapters of one rank are those of peft: values, gradients, merged weights, and files both ways. Real megatron-core."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.mcore.rank import RankInfo
from tests.support.adapters import ADAPTERS, Arrays, Found, likelihood, merged_of, start, stir, write_models
from tests.support.families import MODELS
from tests.support.ranks import run_ranks
from tests.support.tiny import micro_batches

pytestmark = pytest.mark.dist

EXPERTS = 4
NO_AUX_LOSS = MoeConfig(
    aux_loss_coeff=0.0
)  # its gradient goes through the routers' inputs, and is not in the loss of `log_probs`
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NAMES = {"qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"), "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory)


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return run_ranks(1, one_rank, models, tmp_path_factory.mktemp("peft"))[0]


@pytest.mark.parametrize("family", ADAPTERS)
def test_one_rank_is_peft(alone: dict[str, Found], models: dict[str, Path], family: str) -> None:
    """Log-probs, loss, every gradient and the merged weights, from the files that we write.

    Of experts peft trains joined tensors. A gradient of ours is the same number's there; those that join gate with up and are not
    ours peft begins at zero.
    """
    found = alone[family]
    model = of_peft(models[family], found["directory"])
    logps, loss = log_probs(model)
    np.testing.assert_allclose(found["logp"], logps.detach().numpy(), atol=2e-5)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    theirs: Arrays = {}
    for name, gradient in gradients.items():
        key = name.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector")
        theirs |= taken_apart(key, gradient, family)
    assert len(theirs) == len(found["gradients"])
    for key, gradient in theirs.items():
        np.testing.assert_allclose(found["gradients"][key], gradient, atol=1e-5, err_msg=key)
    merged = {}
    for key, tensor in model.merge_and_unload().state_dict().items():
        merged |= taken_apart(key, tensor.numpy(), family)
    for key, value in found["merged before"].items():
        np.testing.assert_allclose(value, merged[key], atol=1e-6, err_msg=key)


def taken_apart(name: str, value: Any, family: str) -> Arrays:
    """One of peft's tensors under our names: itself, or what of it is each expert's."""
    if family not in NAMES or ".mlp." not in name:
        return {name: value}
    block, gate, up, down = NAMES[family]
    prefix = name[: name.index(".mlp.")] + f".{block}"
    if name.endswith("mlp.gate.weight"):
        return {f"{prefix}.gate.weight": value}
    own, adapter = {}, re.search(r"\.lora_[AB]\.weight$", name)
    for expert in range(EXPERTS):
        each = of_expert(name, value, expert)
        parts = {down: each}
        if name.endswith("gate_up_proj") or ".base_layer." in name:
            first, second = np.split(each, 2)
            if ".lora_B." in name:  # the blocks that are ours, of four
                first, second = np.split(first, 2, axis=1)[0], np.split(second, 2, axis=1)[1]
            parts = {gate: first, up: second}
        suffix = adapter[0] if adapter else ".weight"
        own |= {f"{prefix}.experts.{expert}.{projection}{suffix}": part for projection, part in parts.items()}
    return own


def of_expert(name: str, value: Any, expert: int) -> Any:
    """What is one expert's of a tensor of all: weights expert after expert, A so too in rows, B in columns that take turns."""
    if ".lora_A." in name:
        return value.reshape(EXPERTS, -1, value.shape[1])[expert]
    if ".lora_B." in name:
        return value.reshape(len(value), -1, EXPERTS)[..., expert]
    return value[expert]


def test_what_peft_reads_otherwise_is_refused_here_for_a_reason() -> None:
    """When one of these fails, `models.adapters` need no longer refuse it."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    def adapted(family: str, *targets: str, **options: Any) -> list[tuple[str, Any]]:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | MODELS[family]))
        found = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options))
        return [(name, module) for name, module in found.named_modules() if hasattr(module, "lora_A")]

    joined, down = (module.scaling["default"] for _, module in reversed(adapted("qwen3_moe", *PROJECTIONS, use_rslora=True)[-2:]))
    assert down == pytest.approx(4.0)
    assert joined == pytest.approx(4.0 * math.sqrt(2))
    names = [name for name, _ in adapted("qwen3_moe_mixed", *PROJECTIONS)]
    assert names
    assert not any(".layers.0." in name for name in names), "the dense layer's are left out"
    names = [name for name, _ in adapted("glm4_moe", *PROJECTIONS)]
    assert names
    assert not any("shared" in name or ".layers.0." in name for name in names)
    with pytest.raises(ValueError, match="without also targeting"):
        adapted("qwen3_moe", "gate_proj", "down_proj")


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_peft_is_taken(models: dict[str, Path], tmp_path: Path, use_dora: bool) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(models["qwen2"], dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 32, "use_rslora": True, "use_dora": use_dora, "target_modules": ["down_proj", "k_proj"]}
    theirs = peft.LoraConfig(**options, init_lora_weights=False)
    model = peft.get_peft_model(base, theirs)
    model.save_pretrained(tmp_path)
    same = {"rank": 4, "alpha": 32.0, "use_rslora": True, "use_dora": use_dora, "targets": ("k_proj", "down_proj")}
    adapter = LoraConfig(**same, path=str(tmp_path))
    found = run_ranks(1, with_peft, models["qwen2"], adapter)[0]
    single, double = (log_probs(each)[0].detach().double().numpy() for each in (model, copy.deepcopy(model).double()))
    rounding = np.abs(single - double).max()  # of float32, by peft's own reading: 2e-5 where the processor has AVX-512
    assert rounding < 3e-5
    np.testing.assert_allclose(found["logp"], double, rtol=0, atol=2 * rounding)
    assert "model.adapter.alpha is 4" in found["other alpha"]
    assert "model.adapter.targets is" in found["other targets"]


def of_peft(base: Path, directory: Path) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, directory, is_trainable=True)


def log_probs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all labels of the packs, one after the other; and their masked mean negative log-likelihood."""
    packs, pieces = micro_batches(), []
    for pack in packs:
        bounds = pack.sequences.cu_seqlens.tolist()
        for first, end in pairwise(bounds):
            logits = model(input_ids=pack.tokens.input_ids[None, first:end]).logits[0]
            pieces.append(logits.log_softmax(-1).gather(-1, pack.tokens.labels[first:end, None]).squeeze(-1))
    mask, logp = torch.cat([pack.tokens.mask for pack in packs]), torch.cat(pieces)
    return logp, -logp[mask].sum() / int(mask.sum())


# ---- what runs in the ranks


def one_rank(rank: RankInfo, models: dict[str, Path], root: Path) -> dict[str, Found]:
    return {family: one_family(rank, path, family, root / family) for family, path in models.items()}


def one_family(rank: RankInfo, path: Path, family: str, directory: Path) -> Found:
    engine = start(rank, path, ParallelConfig(), ADAPTERS[family], moe=NO_AUX_LOSS)
    stir(engine)
    engine.save_adapter(directory)
    logp = torch.cat(engine.logp(engine.place(micro_batches()), 1.0)).numpy()
    found = {"directory": directory, "merged before": merged_of(engine), "logp": logp} | likelihood(engine)
    engine.close()
    return found


def with_peft(rank: RankInfo, path: Path, adapter: LoraConfig) -> Found:
    from ctpo_megatron.errors import ModelError

    found: Found = {}
    engine = start(rank, path, ParallelConfig(), adapter)
    found["logp"] = torch.cat(engine.logp(engine.place(micro_batches()), 1.0)).numpy()
    for name, change in (("alpha", {"alpha": 4.0}), ("targets", {"targets": ("q_proj",)})):
        with patch.object(engine, "adapter", adapter.model_copy(update=change)), pytest.raises(ModelError) as refused:
            engine._begin_adapters(1)
        found[f"other {name}"] = str(refused.value)
    engine.close()
    assert math.isfinite(found["logp"].sum())
    return found
