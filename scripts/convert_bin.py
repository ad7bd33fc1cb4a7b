"""Converts a `pytorch_model.bin` to the `model.safetensors` that bert_jax loads. This requires torch.

    pip install torch
    python scripts/convert_bin.py FOLDER OUTPUT_FOLDER

torch loads the file with `weights_only=True`, which runs no code in it. Config and tokenizer files are copied.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bert_jax import hub


def convert(source: Path, target: Path) -> None:
    tensors = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    # Each tensor gets its own memory, because safetensors does not save tensors that share memory, as tied ones do.
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    with hub.replacing(target) as staging:
        save_file(tensors, staging / hub.WEIGHTS_FILE, metadata={"format": "pt"})
        for name in [hub.CONFIG_FILE, *hub.TOKENIZER_FILES]:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with pytorch_model.bin and config.json")
    parser.add_argument("target", type=Path, help="folder to write")
    arguments = parser.parse_args()
    if not (arguments.source / "pytorch_model.bin").is_file():
        sys.exit(f"{arguments.source} holds no pytorch_model.bin.")
    convert(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
