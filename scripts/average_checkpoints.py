"""Averages the weights of two checkpoints of the same architecture.

    python scripts/average_checkpoints.py runs/last runs/before --share 0.25 --output runs/average

Each weight of the output is (1 - share) times that of the first checkpoint plus share times that of the second. The
config and the tokenizer are those of the first, and so are the parameters whose paths match the pattern of `--keep`.
"""

import argparse
import re
import sys
from pathlib import Path

import bert_jax
from bert_jax import tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="FIRST")
    parser.add_argument("second", metavar="SECOND")
    parser.add_argument("--share", type=float, required=True, help="weight of the second checkpoint, from 0 to 1")
    parser.add_argument("--keep", default="", metavar="PATTERN", help="parameters to take from the first checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    share = arguments.share
    if not 0 <= share <= 1:
        parser.error(f"--share is {share}; expected a number from 0 to 1.")
    model, other = (bert_jax.BertForPreTraining.from_pretrained(name) for name in (arguments.first, arguments.second))
    if model.config != other.config:
        sys.exit(f"The configs of {arguments.first} and {arguments.second} differ; expected the same architecture.")
    (params, skeleton), (others, _) = tree.split(model), tree.split(other)
    flat = tree.flatten(others)
    averaged = {
        path: first if re.fullmatch(arguments.keep, path) else (1 - share) * first + share * flat[path]
        for path, first in tree.flatten(params).items()
    }
    tree.merge(skeleton, tree.unflatten(averaged)).save_pretrained(arguments.output)
    bert_jax.Tokenizer.from_pretrained(arguments.first).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
