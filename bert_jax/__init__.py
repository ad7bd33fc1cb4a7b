"""BERT in JAX (Flax NNX).

With published checkpoints, the models' outputs match those of Hugging Face Transformers (PyTorch). This module lists
the public names. Each name is imported on first use, so `import bert_jax` does not import JAX.
"""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CONTENTS = {
    "BertConfig": "config",
    "BertModel": "model",
    "SentenceEmbedding": "sentence_embedding",
    "Tokenizer": "tokenizer",
    "pipeline": "inference.pipelines",
    "push_folder": "upload",
    "train": "training.loop",
    "export": "tools.export",
    "lora": "training.lora",
    "optim": "training.optim",
    "sharding": "sharding",
    "tree": "tree",
}

# The class names of models with heads are read from the text of heads.py, because importing heads.py would import JAX.
_MODELS = re.findall(r"^class (BertFor\w+)", Path(__file__).with_name("heads.py").read_text("utf-8"), re.MULTILINE)
_CONTENTS |= dict.fromkeys(_MODELS, "heads")

__all__ = sorted(_CONTENTS)

if TYPE_CHECKING:
    from bert_jax import sharding as sharding
    from bert_jax import tree as tree
    from bert_jax.config import BertConfig as BertConfig
    from bert_jax.heads import *  # noqa: F403
    from bert_jax.inference.pipelines import pipeline as pipeline
    from bert_jax.model import BertModel as BertModel
    from bert_jax.sentence_embedding import SentenceEmbedding as SentenceEmbedding
    from bert_jax.tokenizer import Tokenizer as Tokenizer
    from bert_jax.tools.export import export as export
    from bert_jax.training import lora as lora
    from bert_jax.training import optim as optim
    from bert_jax.training.loop import train as train
    from bert_jax.upload import push_folder as push_folder


def __getattr__(name: str) -> Any:
    if name not in _CONTENTS:
        from bert_jax.porting import ours

        other = ours(name)
        hint = f"; use bert_jax.{other}" if other in _CONTENTS else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    module = importlib.import_module(f"{__name__}.{_CONTENTS[name]}")
    # Some public names, such as `tree`, are submodules. The others, such as `export`, are attributes of a submodule.
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
