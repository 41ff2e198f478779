"""What the configuration, the model's config.json, its tokenizer and the data say about the same thing, compared before a start.

`ctpo plan` and the jobs that it plans call the same functions. Each raises an InputError that names both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.evaluation import benchmarks_of
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import ConfigError, DataError, ModelError
from ctpo_megatron.models.context import check_context, check_length
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.vocabulary import check_ordinary, tokens_beyond
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Prompt, TrainSample

ALL_SPARSE = ("qwen3_moe",)  # families whose every layer has experts in SGLang 0.5.23, whatever config.json says


def check_training(config: RunConfig, shape: ModelShape, model: Path) -> None:
    """All that `ctpo train` can compare without data, but for the layout, which whoever reads the shape checks.

    `model`: the directory that the model's config.json lies in.
    What only servers on CPUs need is checked where `cluster.device` says cpu.
    """
    check_rollouts(config, shape, model)
    on_cpu, quantised = config.cluster.device == "cpu", config.weights.quantization is not None
    EngineLayout(shape, config.rollout.engine.tp, cpu=on_cpu, quantised=quantised)  # that servers can be proven to hold it


def check_rollouts(config: RunConfig, shape: ModelShape, model: Path) -> None:
    """What `ctpo eval` can compare without data: the model with its servers, its context with the lengths, its tokenizer."""
    tp = config.rollout.engine.tp
    if shape.num_heads % tp:
        raise ConfigError(f"rollout.engine.tp={tp} does not divide the {shape.num_heads} attention heads of {model}")
    if shape.unserved:
        raise ModelError(
            f"{model}: config.json lacks {', '.join(shape.unserved)}, without which SGLang does not start. Write what the "
            "published model of this architecture has there."
        )
    if shape.family in ALL_SPARSE and len(shape.expert_layers) < shape.num_layers:
        raise ModelError(
            f"{model}: config.json has layers without experts (mlp_only_layers, decoder_sparse_step), and SGLang 0.5.23 builds "
            f"experts in every layer of {shape.family}, so it cannot hold this model. `ctpo sft` trains it; servers need another."
        )
    check_context(shape, config.data, config.rollout)
    for each in benchmarks_of(config.data, config.eval, config.rollout):
        longer = config.rollout.model_copy(update={"max_response_tokens": each.max_response_tokens})
        check_context(shape, config.data, longer, of_response=f"max_response_tokens of benchmark {each.name}")
    check_ordinary(tokens_beyond(model, shape.vocab_size), model, shape.vocab_size)


def check_own_tokens(chat: ChatTokenizer, shape: ModelShape) -> None:
    """Check that the model has an embedding for every token that the chat template itself writes, and one that ends a turn."""
    frame = {*chat.assistant_ids("a"), *chat.tool_ids("a")}
    for id_ in sorted(frame):
        if id_ >= shape.vocab_size:
            raise ModelError(
                f"the chat template writes {chat.decode([id_], special=True)!r}, token {id_}, but the model has "
                f"{shape.vocab_size} embeddings (vocab_size of config.json), for ids below that."
            )
    if all(id_ >= shape.vocab_size for id_ in chat.stop_token_ids):
        raise ModelError(
            f"the model can write none of its stop tokens {chat.stop_token_ids}: it has {shape.vocab_size} embeddings "
            "(vocab_size of config.json), for ids below that."
        )


def check_prompt_tokens(prompts: Sequence[Prompt], path: str | None, chat: ChatTokenizer, shape: ModelShape, model: Path) -> None:
    """Raise DataError for the first prompt of the file `path` with a token that the model has no embedding for."""
    if not tokens_beyond(model, shape.vocab_size):
        return  # the usual case: nothing is encoded a second time
    for prompt in prompts:
        _check_ids(f"{path} row {prompt.index}", chat.prompt_ids(prompt.messages), chat, shape)


def check_demonstrations(samples: Sequence[TrainSample], path: str, chat: ChatTokenizer, shape: ModelShape) -> None:
    """Check that each demonstration fits into the model's context and that the model has an embedding for each of its tokens."""
    for sample in samples:
        place, ids = f"{path} row {sample.group}", [*sample.input_ids[:1], *sample.labels]
        check_length(len(ids), shape, place)
        _check_ids(place, ids, chat, shape)


def _check_ids(place: str, ids: Sequence[int], chat: ChatTokenizer, shape: ModelShape) -> None:
    if max(ids, default=0) >= shape.vocab_size:
        wrong = next(id_ for id_ in ids if id_ >= shape.vocab_size)
        raise DataError(
            f"{place}: the tokenizer reads {chat.decode([wrong], special=True)!r} as token {wrong}, but the model has "
            f"{shape.vocab_size} embeddings (vocab_size of config.json), for ids below that. Change the row, or resize the "
            "model's embedding to its tokenizer."
        )
