"""A GPTModel that ends in hidden states, and what the last stage makes of them: log-probs without the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.mcore.hf.load import unwrap
from ctpo_megatron.parallel import WordLogp, vocab_parallel_logp


class HiddenGPTModel(GPTModel):
    """megatron's model without its last product: parameters and checkpoints are the same, the output is [1, T, H].

    The output matrix keeps its place among the parameters (`output_layer`, or the tied embedding) and is used by `Head`.
    """

    def _postprocess(self, hidden_states: Tensor, **_inputs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        group = self.pg_collection.tp
        # each rank goes on to its own words, so gradients come back as parts, to be summed over the ranks
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        return hidden_states.transpose(0, 1)

    def head_weight(self) -> Tensor:
        """The output matrix [V / tp, H] of the last stage."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight


@dataclass(frozen=True, slots=True)
class Head:
    """From hidden states to log-probs, on the last pipeline stage."""

    weight: Tensor  # [V / tp, H]
    vocab_size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, models: list[torch.nn.Module], vocab_size: int, group: dist.ProcessGroup) -> Head | None:
        """That of a rank's model chunks; None where none of them ends the model."""
        ends = [unwrap(model) for model in models if unwrap(model).post_process]
        return cls(ends[0].head_weight(), vocab_size, group) if ends else None

    def __call__(
        self, hidden: Tensor, shard: MicroBatch, temperature: float, *, labels_only: bool = False, written: Tensor | None = None
    ) -> WordLogp:
        """What `vocab_parallel_logp` finds for hidden states [1, T_local, H] of `shard`.

        Besides the labels' log-probs the entropy, and the top-k tokens' log-probs where the shard has some, unless `labels_only`.
        Where the shard has supports, log-probs are those of the distribution that is cut to them. `written` [W]: the positions
        that are wanted, with zeros at all others; None: all.
        """
        tokens, hidden = shard.tokens, hidden.squeeze(0)
        if written is not None:
            tokens, hidden = tokens.at(written), hidden.index_select(0, written)
        found = vocab_parallel_logp(
            hidden,
            self.weight,
            tokens.labels,
            group=self.group,
            temperature=temperature,
            vocab_size=self.vocab_size,
            entropy=not labels_only,
            top_k_ids=None if labels_only else tokens.top_k_ids,
            support_ids=tokens.support_ids,
        )
        if written is None:
            return found
        whole = shard.tokens.labels.numel()
        others = (None if each is None else spread(each, written, whole) for each in found[1:])
        return WordLogp(spread(found.logp, written, whole), *others)


def spread(found: Tensor, places: Tensor, whole: int) -> Tensor:
    """[whole, ...] with `found` [W, ...] at its places and zeros elsewhere."""
    return found.new_zeros(whole, *found.shape[1:]).index_copy(0, places, found)


def in_model_precision(model: torch.nn.Module) -> dict[str, bool]:
    """Arguments for a forward whose output stays in the number format of the weights; Float16Module would make it float32."""
    return {"fp32_output": False} if unwrap(model).config.bf16 else {}
