"""The training steps that `benchmark` compares.

A step is a function (rows, tokens) -> (seconds, seconds for the call alone, loss). The second number is 0 if it is not
measured.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHARE = 0.15


def classified(rows: int, tokens: int) -> Any:
    import numpy as np

    random = np.random.default_rng(0)
    ids, labels = random.integers(1000, 28000, (rows, tokens)), random.integers(0, 2, rows)
    return ids.astype(np.int32), labels.astype(np.int32)


def classifier(folder: Path, dropout: bool) -> Any:
    """Our task, and a model whose classifier weights are all zero."""
    from flax import nnx

    import bert_jax
    from bert_jax.tasks.sequence_classification import SequenceClassification

    rates = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = bert_jax.BertForSequenceClassification.from_pretrained(
        folder, new=[r"classifier\..*"], rngs=nnx.Rngs(0), problem_type="single_label_classification", **rates
    )
    params = bert_jax.tree.split(model)[0]
    params["classifier"]["weight"] = params["classifier"]["weight"] * 0
    model = bert_jax.tree.merge(bert_jax.tree.split(model)[1], params)
    task = SequenceClassification(bert_jax.Tokenizer.from_pretrained(folder), model.config, 512)
    return task, model


def our_fine_tuning(folder: Path, dropout: bool, dtype: str = "float32") -> Any:
    import jax

    from bert_jax import sharding
    from bert_jax.data.loader import Examples, one_a_row
    from bert_jax.training import optim, step

    task, model = classifier(folder, dropout)
    model.encoder.compute_dtype = dtype
    planned, mesh = step.plan(model, optim.adamw(optim.schedule("linear", 2e-5, 1000))), sharding.mesh()
    everywhere = sharding.replicated(mesh)
    state = jax.device_put(step.init_state(planned, 0), everywhere)
    train_step = step.make_step(task, planned, out_shardings=everywhere)

    # A program that has the arguments and results of the step but computes nothing. It serves to measure the time for
    # the call alone. The step itself cannot be used for this measurement, because this thread computes part of the step
    # during the call.
    hand_back = jax.jit(
        lambda state, frozen, batch: (state, {"loss": jax.numpy.zeros(()), "grad_norm": jax.numpy.zeros(())}),
        donate_argnums=0, out_shardings=everywhere, keep_unused=True,
    )  # fmt: skip

    def run(rows: int, tokens: int) -> tuple[float, float, float]:
        nonlocal state
        import numpy as np

        ids, labels = classified(rows, tokens)
        examples = Examples(list(ids), list(np.zeros_like(ids)), {"labels": labels})
        batch = examples.batch(one_a_row(np.arange(rows), rows, tokens))  # not timed: the loader works ahead
        state, _ = hand_back(state, {}, sharding.put_batch(batch, mesh))
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, metrics = hand_back(state, {}, sharding.put_batch(batch, mesh))
        host = time.perf_counter() - start
        jax.block_until_ready((state, metrics))
        start = time.perf_counter()
        state, metrics = train_step(state, {}, sharding.put_batch(batch, mesh))
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        return time.perf_counter() - start, host, loss

    return run


def arrangements(folder: Path, lengths: Sequence[int]) -> dict[str, Callable[[], tuple[int, float]]]:
    """Prepares passes over random sentences with these lengths: training and prediction, with three kinds of rows each.

    Returns:
        Name, such as "training, packed" -> function that makes a pass and returns the number of tokens (excluding
        padding) and the seconds.
    """
    import jax
    import numpy as np

    from bert_jax import sharding, tree
    from bert_jax.data.loader import Examples, Loader, one_a_row
    from bert_jax.evaluation import measure
    from bert_jax.training import optim, step

    size, padded = 16, 128
    random = np.random.default_rng(0)
    ids = [random.integers(1000, 28000, n).astype(np.int32) for n in random.permutation(lengths)]
    labels = {"labels": random.integers(0, 2, len(ids)).astype(np.int32)}
    examples = Examples(ids, [np.zeros_like(row) for row in ids], labels)
    places = {"padded": [one_a_row(part, size, padded) for part in np.split(np.arange(len(ids)), len(ids) // size)]}
    for name, packing in (("by length", None), ("packed", 512)):
        loader = Loader(examples, size, seed=0, packing=packing)
        places[name] = [loader.place(n) for n in range(loader.steps_per_epoch)]
    batches = {name: [examples.batch(place) for place in found] for name, found in places.items()}

    task, model = classifier(folder, dropout=True)
    planned, mesh = step.plan(model, optim.adamw(optim.schedule("linear", 2e-5, 1000))), sharding.mesh()
    everywhere = sharding.replicated(mesh)
    state = jax.device_put(step.init_state(planned, 0), everywhere)
    train_step = step.make_step(task, planned, out_shardings=everywhere)
    params, skeleton = tree.split(model)
    predict = measure.program(task, skeleton)

    def train(name: str) -> Any:
        nonlocal state
        for batch in batches[name]:
            state, metrics = train_step(state, {}, sharding.put_batch(batch, mesh))
        return state, metrics

    def look(name: str) -> Any:
        return [predict(params, sharding.put_batch(batch, mesh)) for batch in batches[name]]

    def timed(work: Callable[[str], Any], name: str) -> tuple[int, float]:
        with jax.set_mesh(mesh):
            start = time.perf_counter()
            jax.block_until_ready(work(name))
            return sum(lengths), time.perf_counter() - start

    return {
        f"{what}, {name}": lambda work=work, name=name: timed(work, name)
        for what, work in {"training": train, "prediction": look}.items()
        for name in batches
    }


def torch_step(model: Any, optimizer: Any, dtype: str = "float32", **inputs: Any) -> tuple[float, float, float]:
    import torch

    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start, 0.0, float(loss.detach())


def their_fine_tuning(folder: Path, dropout: bool, dtype: str = "float32") -> Any:
    import torch
    import transformers

    rates = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForSequenceClassification.from_pretrained(folder, **rates).train()
    torch.nn.init.zeros_(model.classifier.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)

    def run(rows: int, tokens: int) -> tuple[float, float, float]:
        ids, labels = (torch.from_numpy(array).long() for array in classified(rows, tokens))
        return torch_step(model, optimizer, dtype, input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)

    return run


def keras_fine_tuning(folder: Path, dropout: bool) -> Any:
    """Prepares KerasHub's fine-tuning step, with random weights.

    Losses are not compared, because KerasHub's GELU is the tanh approximation.
    """
    import keras
    import keras_hub
    import numpy as np

    rate = 0.1 if dropout else 0.0
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=28996, num_layers=12, num_heads=12, hidden_dim=768, intermediate_dim=3072, dropout=rate,
        max_sequence_length=512,
    )  # fmt: skip
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=2, dropout=rate, preprocessor=None)
    optimizer = keras.optimizers.AdamW(2e-5, weight_decay=0.0, global_clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=True)

    def run(rows: int, tokens: int) -> tuple[float, float, float]:
        ids, labels = classified(rows, tokens)
        inputs = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": np.ones_like(ids)}
        start = time.perf_counter()
        loss = float(model.train_on_batch(inputs, labels, return_dict=True)["loss"])
        return time.perf_counter() - start, 0.0, loss

    return run


def masked(rows: int, tokens: int) -> Any:
    """Token ids in which 15% of each row is masked, the masked positions, and the ids of the true tokens."""
    import numpy as np

    random = np.random.default_rng(0)
    ids = random.integers(1000, 28000, (rows, tokens)).astype(np.int32)
    most = round(SHARE * tokens)
    positions = np.stack([np.sort(random.choice(tokens, most, replace=False)) for _ in range(rows)]).astype(np.int32)
    labels = np.take_along_axis(ids, positions, 1)
    np.put_along_axis(ids, positions, 103, 1)
    return ids, positions, labels


def our_pretraining(folder: Path, dropout: bool) -> Any:
    import jax
    import numpy as np

    import bert_jax
    from bert_jax import sharding
    from bert_jax.tasks.pretraining import MaskedLanguageModeling
    from bert_jax.training import optim, step

    rates = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased", **rates)
    planned, mesh = step.plan(model, optim.adamw(optim.schedule("linear", 4e-4, 1000))), sharding.mesh()
    everywhere = sharding.replicated(mesh)
    state = jax.device_put(step.init_state(planned, 0), everywhere)
    train_step = step.make_step(MaskedLanguageModeling(), planned, out_shardings=everywhere)

    def run(rows: int, tokens: int) -> tuple[float, float, float]:
        nonlocal state
        ids, positions, labels = masked(rows, tokens)
        batch: Any = {
            "inputs": {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)},
            "targets": {"masked_positions": positions, "labels": labels},
        }
        start = time.perf_counter()
        state, metrics = train_step(state, {}, sharding.put_batch(batch, mesh))
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        return time.perf_counter() - start, 0.0, loss

    return run


def their_pretraining(folder: Path, dropout: bool) -> Any:
    """Prepares a step with `transformers`, which computes the logits of all tokens, not only of masked tokens."""
    import torch
    import transformers

    from bert_jax import hub

    rates = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForMaskedLM.from_pretrained(
        hub.download("bert-mini-cased"), dtype=torch.float32, **rates
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.0)

    def run(rows: int, tokens: int) -> tuple[float, float, float]:
        ids, positions, labels = (torch.from_numpy(array).long() for array in masked(rows, tokens))
        targets = torch.full_like(ids, -100).scatter(1, positions, labels)
        return torch_step(model, optimizer, input_ids=ids, attention_mask=torch.ones_like(ids), labels=targets)

    return run


SIDES = {
    "ours": our_fine_tuning,
    "theirs": their_fine_tuning,
    "ours bfloat16": functools.partial(our_fine_tuning, dtype="bfloat16"),
    "theirs bfloat16": functools.partial(their_fine_tuning, dtype="bfloat16"),
    "keras": keras_fine_tuning,
    "ours pretraining": our_pretraining,
    "theirs pretraining": their_pretraining,
}
