"""Refuses a wrong configuration: check_config.py CONFIG [dotted.key=value ...] [--OPTION ...]. Exits with 0, or with 2."""

from __future__ import annotations

import sys

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    try:
        if not words:
            raise ConfigError("no configuration given; the command is: sbatch launch/ctpo.sbatch CONFIG [dotted.key=value ...]")
        load_config(words[0], words[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
