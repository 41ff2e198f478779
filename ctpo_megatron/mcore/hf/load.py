"""Weights from a Hugging Face directory into Megatron's model: each rank reads only the slices it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ctpo_megatron.errors import ModelError
from ctpo_megatron.mcore.groups import current_coords
from ctpo_megatron.mcore.hf.cuts import pack
from ctpo_megatron.models.adapters import ADAPTER
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.models.files import weight_files
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import EMBEDDING_KEY, EXPERT_BIAS, OUTPUT_KEY, VALUE_HEAD, HfTensor, hf_tensors, parameter_key


def unwrap(model: nn.Module) -> Any:
    """The GPTModel, a class without types, inside megatron's wrappers (data parallelism, 16-bit)."""
    inner: Any = model
    while not hasattr(inner, "decoder"):
        inner = inner.module
    return inner


def layer_numbers(model: nn.Module) -> list[int]:
    """Numbers, from 0 over the whole model, of the layers that this rank's part holds."""
    return [layer.layer_number - 1 for layer in unwrap(model).decoder.layers]


def keyed_tensors(model: nn.Module, shape: ModelShape, coords: RankCoords) -> Iterator[tuple[str, Tensor]]:
    """The rank's parameters, and its routers' biases, under their keys (see `models.tensors`).

    Neither adapters nor a value head are among them.
    """
    layers, inner = layer_numbers(model), unwrap(model)
    first_expert = coords.ep_rank * (shape.num_experts // coords.ep_size)
    biases = ((name, buffer) for name, buffer in inner.named_buffers() if name.endswith(EXPERT_BIAS))
    for name, tensor in (*inner.named_parameters(), *biases):
        if f".{ADAPTER}." not in name and not name.startswith(f"{VALUE_HEAD}."):
            yield parameter_key(name, layers, first_expert), tensor


@torch.no_grad()
def load_hf(models: list[nn.Module], shape: ModelShape, path: str | Path) -> None:
    """Fill the parameters of `models` from the safetensors in `path`, tensor by tensor.

    Layers of multi-token prediction are passed over.
    Megatron's optimizers keep a copy in higher precision: call their `reload_model_params()` when they exist already.
    Raises ModelError for tensors that the directory lacks, has too many of, or has in another shape.
    """
    coords = current_coords()
    by_key: dict[str, list[HfTensor]] = {}
    for tensor in hf_tensors(shape):
        by_key.setdefault(tensor.key, []).append(tensor)
    if shape.tie_embeddings:  # with pipeline parallelism the last stage holds a copy of the embedding
        by_key[OUTPUT_KEY] = by_key[EMBEDDING_KEY]
    with HfReader(Path(path)) as reader:
        reader.check(shape)
        for model in models:
            for key, parameter in keyed_tensors(model, shape, coords):
                if key not in by_key:
                    raise ModelError(f"{path}: megatron's parameter {key} has no counterpart in the {shape.family} format.")
                sources = by_key[key]
                pieces = [reader.piece(source, shape, coords) for source in sources]
                local = pack(sources[0].cut, pieces, shape)
                if local.shape != parameter.shape:
                    raise ModelError(
                        f"{path}: {key} is {list(parameter.shape)} in megatron, but the file gives {list(local.shape)}."
                    )
                parameter.copy_(local)


class HfReader:
    """Slices of the tensors in a directory of safetensors files; files are mapped, not read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = ExitStack()
        self.handles: dict[str, Any] = {}

    def __enter__(self) -> Self:
        for file in weight_files(self.directory):
            try:
                handle = self.files.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise ModelError(f"{file}: not a readable safetensors file: {error}.") from error
            self.handles |= dict.fromkeys(handle.keys(), handle)
        return self

    def __exit__(self, *exc: object) -> None:
        self.files.close()

    def check(self, shape: ModelShape) -> None:
        """Raise ModelError unless the files hold exactly the model's tensors, in its shapes."""
        expected = {tensor.name: tensor.shape for tensor in hf_tensors(shape)}
        # two things that older exports also wrote, the tied head a second time and RoPE's frequencies; and what is not trained
        spare = {name for name in self.handles if name.endswith(".rotary_emb.inv_freq")}
        spare |= {"lm_head.weight"} if shape.tie_embeddings else set()
        mtp = tuple(f"model.layers.{shape.num_layers + number}." for number in range(shape.mtp_layers))
        spare |= {name for name in self.handles if name.startswith(mtp)}
        self._refuse("lacks", expected.keys() - self.handles.keys())
        self._refuse("also holds, and the model has no place for", self.handles.keys() - expected.keys() - spare)
        for name, wanted in expected.items():
            found = tuple(self.handles[name].get_slice(name).get_shape())
            if found != wanted:
                raise ModelError(f"{self.directory}: {name} has shape {list(found)}; config.json asks for {list(wanted)}.")

    def piece(self, tensor: HfTensor, shape: ModelShape, coords: RankCoords) -> Tensor:
        """The part of `tensor` that the rank at `coords` holds."""
        source = self.handles[tensor.name].get_slice(tensor.name)
        dim = tensor.cut.dim
        if dim is None:
            return source[:]
        rank, size = coords.share(tensor)
        rows = tensor.shape[dim]
        if tensor.key in (EMBEDDING_KEY, OUTPUT_KEY):
            rows = shape.padded_vocab_size(size)
        step = rows // size
        first = rank * step
        last = min(first + step, tensor.shape[dim])
        found = source[first:last] if dim == 0 else source[:, first:last]
        if last - first < step:  # padding of the vocabulary
            found = torch.nn.functional.pad(found, (0, 0, 0, step - (last - first)))
        return found

    def _refuse(self, verb: str, names: set[str]) -> None:
        if names:
            some = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(f"{self.directory}: {verb}: {some}. Do config.json and the weights belong together?")
