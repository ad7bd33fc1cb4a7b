"""The functions behind the `finetune`, `pretrain` and `evaluate` commands. Each function takes settings.

`finetune`, `finetune_seeds` and `pretrain` return a run's folder, `dry_run` returns a description, and `evaluate` and
`evaluate_held_out` return metrics. The library functions behind these recipes take plain arguments instead of settings.
"""

from bert_jax.recipes.finetuning import dry_run, evaluate, finetune
from bert_jax.recipes.pretraining import evaluate_held_out, pretrain
from bert_jax.recipes.seeds import finetune_seeds, read_seeds

__all__ = ["dry_run", "evaluate", "evaluate_held_out", "finetune", "finetune_seeds", "pretrain", "read_seeds"]
