"""transformers' FlaxBert as a server of pickles, for runtimes.py: transformers 4.57.6 is the last that has it.

    python3 -m venv flaxbert && flaxbert/bin/pip install transformers==4.57.6 jax flax
    BERT_JAX_FLAX_PYTHON=flaxbert/bin/python python scripts/benchmark peers

(Not transformers[flax], which wants a JAX of 2023. Seen working: Python 3.11, jax 0.10.2, flax 0.12.8.)

Reads (ids, mask, positions) from stdin and writes the logits at the positions to stdout.
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
