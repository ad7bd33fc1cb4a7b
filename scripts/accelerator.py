"""Measures one side of a comparison on this machine's accelerator. scripts/accelerator_day.sh measures all sides.

    python scripts/accelerator.py ours training base 128
    python scripts/accelerator.py torch inference large 512

The sides are `ours` (plain attention and, in training, attention dropout), `fused` (`bert_jax` with fused attention,
without attention dropout) and `torch` (`transformers` in PyTorch with `sdpa` and `torch.compile`). All sides compute in
bfloat16 with random weights. In training, the parameters and the optimizer state are float32. The script prints one
line of JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

ROWS = {("base", 128): 256, ("base", 512): 64, ("large", 128): 128, ("large", 512): 32}
SHAPES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}
VOCABULARY = 28996


def ours(what: str, size: str, rows: int, tokens: int, fused: bool) -> tuple[float, str]:
    import jax

    import bert_jax
    from bert_jax.tools import check

    config = bert_jax.BertConfig(vocab_size=VOCABULARY, **SHAPES[size])  # type: ignore[arg-type]
    if fused:
        config = config.replace(attention_probs_dropout_prob=0.0)
    measure = check.training if what == "training" else check.inference
    seconds, _, _ = measure(config, "bfloat16", rows, tokens, attention="auto" if fused else "plain")
    return seconds, jax.devices()[0].device_kind


def with_torch(what: str, size: str, rows: int, tokens: int) -> tuple[float, str]:
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    config = transformers.BertConfig(vocab_size=VOCABULARY, attn_implementation="sdpa", **SHAPES[size])
    ids = torch.randint(1000, VOCABULARY, (rows, tokens), device=device)
    step: Callable[[], Any]
    if what == "training":
        model = transformers.BertForSequenceClassification(config).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=cuda)
        labels = torch.zeros(rows, dtype=torch.long, device=device)
        compiled = torch.compile(model) if cuda else model

        def step() -> None:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = compiled(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    else:
        model = transformers.BertForMaskedLM(config).to(device, torch.bfloat16).eval()

        def logits(ids: Any) -> Any:
            hidden = model.bert(input_ids=ids).last_hidden_state
            return model.cls(hidden[:, 1:3])

        fast = torch.compile(logits) if cuda else logits

        def step() -> None:
            with torch.inference_mode():
                fast(ids)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    count, began = 0, time.perf_counter()
    while count < 4 or time.perf_counter() - began < 2:
        for _ in range(4):
            step()
        wait()
        count += 4
    return (time.perf_counter() - began) / count, torch.cuda.get_device_name() if cuda else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "fused", "torch"])
    parser.add_argument("what", choices=["training", "inference"])
    parser.add_argument("size", choices=list(SHAPES))
    parser.add_argument("tokens", type=int)
    given = parser.parse_args()
    rows = ROWS.get((given.size, given.tokens), 4)
    if given.side == "torch":
        seconds, device = with_torch(given.what, given.size, rows, given.tokens)
    else:
        seconds, device = ours(given.what, given.size, rows, given.tokens, given.side == "fused")
    print(json.dumps({
        **vars(given), "rows": rows, "milliseconds": round(1000 * seconds, 2),
        "tokens_per_second": round(rows * given.tokens / seconds), "device": device,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
