"""The quickstart, played by an agent of OpenAI's SDK through the endpoint: `examples/quickstart_agent.py`, unchanged.

The agent's module is looked for where this is run, in the project's directory; `make quickstart-agent` is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from quickstart import play


def main(
    seed: Annotated[int, typer.Option(help="of data, model and training")] = 1,
    run_dir: Annotated[Path, typer.Option(help="where everything is written")] = Path("runs/quickstart-agent"),
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value for `ctpo train`")] = None,
) -> None:
    """Run it; exit code 0 when every step succeeded."""
    play("quickstart_agent", seed, run_dir, overrides or [], "--calls")


if __name__ == "__main__":
    typer.run(main)
