"""Write the toy task (train.parquet, eval.parquet, sft.parquet) to a directory."""

from __future__ import annotations

import argparse

from ctpo_megatron.toy.task import make_toy_task


def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("directory", help="where the files go; made if missing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train-rows", type=int, default=4096)
    parser.add_argument("--eval-rows", type=int, default=128)
    parser.add_argument("--sft-rows", type=int, default=4096)
    parser.add_argument("--calls", action="store_true", help="demonstrations that call a tool by name")
    args = parser.parse_args()
    rows = {"train_rows": args.train_rows, "eval_rows": args.eval_rows, "sft_rows": args.sft_rows}
    task = make_toy_task(args.directory, seed=args.seed, calls=args.calls, **rows)
    for path in task:
        print(path)


if __name__ == "__main__":
    main()
