"""The functions behind the command line: they take settings, and return the folder of a run, a description or metrics.

Only this package and the modules `settings`, `yaml_file` and `cli` use YAML.
"""

from bert_jax.recipes.finetuning import dry_run, evaluate, finetune
from bert_jax.recipes.pretraining import evaluate_held_out, pretrain

__all__ = ["dry_run", "evaluate", "evaluate_held_out", "finetune", "pretrain"]
