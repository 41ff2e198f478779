"""Commands about models and checkpoints: `ctpo convert` and `ctpo checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctpo_megatron.config.sources import home_path


def at_home(path: Path | None) -> Path | None:
    """Returns a path of the command line with the home directory in it, None for none."""
    return None if path is None else home_path(path)


convert_app = typer.Typer(
    no_args_is_help=True, help="A model's weights in other formats; every tensor of the output is verified."
)
checkpoint_app = typer.Typer(no_args_is_help=True, help="Checkpoints of a run.")


@convert_app.command("to-megatron")
def to_megatron(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory", show_default=False, callback=at_home)],
    out: Annotated[Path, typer.Argument(help="checkpoint to write", show_default=False, callback=at_home)],
    overrides: Annotated[list[str] | None, typer.Argument(help="the layout that writes: parallel.tp=2 ...")] = None,
) -> None:
    """A checkpoint of weights only (torch_dist), with config.json and tokenizer in it."""
    from ctpo_megatron.jobs.convert import convert_to_megatron

    convert_to_megatron(model, out, overrides or [])


@convert_app.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="of a run (RUN_DIR/checkpoints/step_*), or of weights only", show_default=False, callback=at_home),
    ],
    out: Annotated[Path, typer.Argument(help="Hugging Face directory to write", show_default=False, callback=at_home)],
    overrides: Annotated[list[str] | None, typer.Argument(help="the layout that reads: parallel.tp=2 ...")] = None,
) -> None:
    """A Hugging Face model directory of the weights in a checkpoint; adapters are merged into the model they belong to."""
    from ctpo_megatron.jobs.convert import convert_to_hf

    convert_to_hf(checkpoint, out, overrides or [])


@convert_app.command("to-peft")
def to_peft(
    checkpoint: Annotated[Path, typer.Argument(help="of a run with model.adapter", show_default=False, callback=at_home)],
    out: Annotated[Path, typer.Argument(help="directory in peft's format to write", show_default=False, callback=at_home)],
    overrides: Annotated[list[str] | None, typer.Argument(help="the layout that reads: parallel.tp=2 ...")] = None,
) -> None:
    """The adapters in a checkpoint, in the format of the package peft."""
    from ctpo_megatron.jobs.convert import convert_to_peft

    convert_to_peft(checkpoint, out, overrides or [])


@checkpoint_app.command("verify")
def verify(
    directory: Annotated[
        Path, typer.Argument(help="a checkpoint, or a directory of step_*", show_default=False, callback=at_home)
    ],
) -> None:
    """Read every file again and compare its hash; exit code 1 when a checkpoint is damaged."""
    from ctpo_megatron.jobs.checkpoints import verify_checkpoints

    verify_checkpoints(directory)
