"""What TransformerEngine keeps besides for products in fp8 (`train.fp8`), in bytes.

Read off TransformerEngine 2.11, no GPU was at hand. Its linear layers keep a copy of their weight in fp8 from one micro-batch to
the next (pytorch/module/base.py, `get_weight_workspace`, under a name of its own because megatron says which micro-batch is the
first). A copy has the numbers twice, by rows for the forward pass and by columns for the gradient of the input
(pytorch/module/linear.py and grouped_linear.py, `weight_quantizer.set_usage`), and scales (`make_empty` in
pytorch/tensor/float8_tensor.py, float8_blockwise_tensor.py and mxfp8_tensor.py). From compute capability 10.0 on `delayed` and
`tensorwise` do without the second one.

Inputs of products are kept in fp8 in place of the model's number format, a byte each. That is no more than the plan counts
for them, but for the output of attention, which attention keeps too: megatron has the projection keep that one
(transformer/attention.py, `set_save_original_input`), with every recipe but `delayed`.
"""

from __future__ import annotations

from fractions import Fraction

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import Fp8Config
from ctpo_megatron.models.rules import stage_layers
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.parameters import layer_matrices

# bytes of scales for each number: one float32 for 128 x 128 of them, one byte for 32; else one for a whole tensor
SCALES = {"blockwise": Fraction(4, 128 * 128), "mxfp8": Fraction(1, 32)}
SIDES = 2  # by rows and by columns


def weight_copies(shape: ModelShape, parallel: ParallelConfig, fp8: Fp8Config) -> list[int]:
    """Returns what one rank of each pipeline stage keeps of its weights in fp8; without padding of scales."""
    first, last = fp8.bf16_layers_at_start, shape.num_layers - fp8.bf16_layers_at_end
    each = SIDES * (1 + SCALES.get(fp8.recipe, Fraction(0)))
    found = []
    for chunks in stage_layers(shape, parallel):
        layers = [layer for chunk in chunks for layer in chunk if first <= layer < last]
        numbers = sum(layer_matrices(shape, layer, parallel.tp, parallel.ep, parallel.etp).total for layer in layers)
        found.append(-(-numbers * each.numerator // each.denominator))
    return found


def keeps_attention_again(fp8: Fp8Config | None) -> bool:
    """Whether the projection behind attention keeps a copy in fp8 of the output that attention keeps."""
    return fp8 is not None and fp8.recipe == "delayed"
