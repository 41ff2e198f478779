"""Write a random model of about 0.4 million parameters with tokenizer, in Hugging Face format, to a directory."""

from __future__ import annotations

import argparse
from typing import get_args

from ctpo_megatron.toy.model import Kind, make_toy_model


def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("directory", help="where the files go; made if missing")
    parser.add_argument("--kind", choices=get_args(Kind), default="qwen3")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    print(make_toy_model(args.directory, args.kind, seed=args.seed, hidden=args.hidden, layers=args.layers))


if __name__ == "__main__":
    main()
