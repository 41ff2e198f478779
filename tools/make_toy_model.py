"""Write a random model of about 0.4 million parameters with tokenizer, in Hugging Face format, to a directory."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from ctpo_megatron.toy.model import CALL_WORDS, CALLS_TEMPLATE, Kind, make_toy_model


def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("directory", help="where the files go; made if missing")
    parser.add_argument("--kind", choices=get_args(Kind), default="qwen3")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=4, help="of 8 heads; 8: servers can keep its weights in fp8")
    parser.add_argument("--calls", action="store_true", help="with a chat template and tokens for calls of tools by name")
    args = parser.parse_args()
    calls: dict[str, Any] = {"words": CALL_WORDS, "chat_template": CALLS_TEMPLATE} if args.calls else {}
    sizes = {"hidden": args.hidden, "layers": args.layers, "kv_heads": args.kv_heads}
    print(make_toy_model(args.directory, args.kind, seed=args.seed, **sizes, **calls))


if __name__ == "__main__":
    main()
