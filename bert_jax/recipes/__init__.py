"""What the command line runs: settings in, a folder or metrics out.

Only this package, `settings`, `yaml_file` and `cli` use YAML.
"""

from bert_jax.recipes.evaluation import evaluate as evaluate
from bert_jax.recipes.evaluation import evaluate_held_out as evaluate_held_out
from bert_jax.recipes.finetuning import finetune as finetune
from bert_jax.recipes.forecast import dry_run as dry_run
from bert_jax.recipes.pretraining import pretrain as pretrain
