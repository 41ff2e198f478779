"""Whether a model directory is complete."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
FOREIGN_TOKENIZERS = ("tiktoken.model", "qwen.tiktoken", "cl100k_base.tiktoken", "o200k_base.tiktoken")
TOKENIZER_BODIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, sorted. Raises ModelError when there are none or the index lists missing ones."""
    index = directory / INDEX_FILE
    if index.exists():
        names = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(name for name in names if not (directory / name).is_file())
        if missing:
            raise ModelError(f"{directory}: {INDEX_FILE} lists {', '.join(missing)}, which is missing. Fetch the model again.")
        files = sorted(directory / name for name in names)
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{directory}: no *.safetensors weights. Formats such as pytorch_model.bin are not read, because they hold "
            "pickled code; save the model once with save_pretrained(..., safe_serialization=True)."
        )
    return files


def check_tokenizer(directory: Path) -> None:
    """Raise ModelError when files of the tokenizer are missing, or only code of the model's own could read them."""
    if not any(all((directory / name).is_file() for name in body) for body in TOKENIZER_BODIES):
        foreign = [name for name in FOREIGN_TOKENIZERS if (directory / name).is_file()]
        if foreign:
            raise ModelError(
                f"{directory}: the tokenizer is there as {foreign[0]} only, for Python code that comes with the model and "
                'is never run here. Save it once as tokenizer.json beside it: docs/models.md, "Tokenizers", has the lines.'
            )
        bodies = ", or ".join(" with ".join(body) for body in TOKENIZER_BODIES)
        raise ModelError(f"{directory}: tokenizer files are missing: found none of {bodies}.")
    if not (directory / "tokenizer_config.json").is_file():
        raise ModelError(f"{directory}: tokenizer_config.json is missing.")


def check_what_is_there(directory: Path) -> list[str]:
    """What of a model `directory` lacks altogether, in words; what it has is checked, as before a run. Raises ModelError.

    For plans, which need no more than a config.json.
    """
    absent = []
    names = {name for body in TOKENIZER_BODIES for name in body} | {*FOREIGN_TOKENIZERS, "tokenizer_config.json"}
    if any((directory / name).is_file() for name in names):
        check_tokenizer(directory)
    else:
        absent.append("tokenizer")
    if (directory / INDEX_FILE).is_file() or any(any(directory.glob(pattern)) for pattern in WEIGHTS):
        check_safetensors(directory)
    else:
        absent.append("weights")
    return absent


def check_safetensors(directory: Path) -> None:
    """Each file is as long as its own header says: catches cut downloads and Git LFS pointers."""
    for file in weight_files(directory):
        size = file.stat().st_size
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length)) if length < size else {}
            end = 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{file}: not a safetensors file ({error}). Fetch the model again, with Git LFS if you use git."
            ) from error
        if end != size:
            raise ModelError(f"{file}: {size} bytes long, but its header announces {end}. Fetch the file again.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises ModelError, naming the file, for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file}: file is missing; this is not a model directory in Hugging Face format.") from error
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, but must be a JSON object.")
    return content
