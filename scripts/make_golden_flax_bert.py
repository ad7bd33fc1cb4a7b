"""Writes the outputs of FlaxBert, and the digests of the files that it writes, to tests/golden/flax_bert.json.

`transformers` 5 no longer contains FlaxBert. Run the script in a separate environment, without `bert_jax`:

    pip install transformers==4.57.6 torch "flax<0.12" "jax<0.9" safetensors
    python scripts/make_golden_flax_bert.py
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import flax_bert  # noqa: E402
import reference  # noqa: E402


def outputs(folder: Path, architecture: str, shape: str) -> dict:
    """Returns the digest of the file that FlaxBert writes, and FlaxBert's outputs for the inputs from `reference`."""
    config = flax_bert.config(architecture, shape)
    (folder / "config.json").write_text(json.dumps(config))
    model_class = getattr(transformers, f"Flax{architecture}")
    parameters = flax_bert.parameters(flax_bert.tensors(architecture, shape))
    empty = model_class(transformers.BertConfig.from_dict(config), _do_init=False)
    empty.save_pretrained(folder, params=parameters)
    model = model_class.from_pretrained(folder)
    with jax.default_matmul_precision("highest"):
        out = model(**reference.inputs(config), output_hidden_states=False)
    file = (folder / "flax_model.msgpack").read_bytes()
    return {
        "sha256": hashlib.sha256(file).hexdigest(),
        "outputs": {name: flax_bert.sample(np.asarray(value)) for name, value in out.items()},
    }


def main() -> None:
    content = {}
    for shape in flax_bert.SHAPES:
        for architecture in reference.HEADS:
            with tempfile.TemporaryDirectory() as folder:
                content[f"{shape} {architecture}"] = outputs(Path(folder), architecture, shape)
                print(shape, architecture, content[f"{shape} {architecture}"]["sha256"])
    versions = {module.__name__: module.__version__ for module in (transformers, jax)}
    text = json.dumps({"versions": versions, "content": content}, indent=1)
    (reference.GOLDEN / "flax_bert.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
