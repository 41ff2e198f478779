"""Prints the run directory of a configuration: run_dir.py CONFIG [dotted.key=value ...]. Exits with 2 where it is wrong."""

from __future__ import annotations

import sys

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError

if __name__ == "__main__":
    try:
        print(load_config(sys.argv[1], sys.argv[2:]).run_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
