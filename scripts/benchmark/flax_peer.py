"""Computes logits with FlaxBert for runtimes.py. The last version of `transformers` with FlaxBert is 4.57.6.

    python3 -m venv flaxbert && flaxbert/bin/pip install transformers==4.57.6 jax flax
    BERT_JAX_FLAX_PYTHON=flaxbert/bin/python python scripts/benchmark peers

Do not install `transformers[flax]`, which requires a JAX version from 2023. Python 3.11, JAX 0.10.2 and Flax 0.12.8
work.

Reads pickled tuples (ids, mask, positions) from stdin and writes the pickled logits at the positions to stdout.
"""

import pickle
import sys


def main() -> None:
    import jax
    import jax.numpy as jnp
    import transformers

    model = transformers.FlaxBertForMaskedLM.from_pretrained(sys.argv[1])

    @jax.jit
    def program(params, ids, mask, positions):
        logits = model(ids, attention_mask=mask, params=params, train=False).logits
        return jnp.take_along_axis(logits, positions[..., None], axis=1)

    answers = sys.stdout.buffer
    while True:
        try:
            inputs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(jax.device_get(program(model.params, *inputs)), answers)
        answers.flush()


if __name__ == "__main__":
    main()
