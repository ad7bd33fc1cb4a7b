"""What the command line runs: settings in, a folder or metrics out.

Only this package, `settings`, `yaml_file` and `cli` use YAML.
"""

from bert_jax.recipes.finetuning import dry_run, evaluate, finetune
from bert_jax.recipes.pretraining import evaluate_held_out, pretrain

__all__ = ["dry_run", "evaluate", "evaluate_held_out", "finetune", "pretrain"]
