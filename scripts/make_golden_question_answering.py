"""Writes tests/golden/question_answering.json with the answers of the question-answering pipeline in `transformers`.

`transformers` 5 no longer contains this pipeline. Run the script in a separate environment, from the repository root:

    python3 -m venv qa && qa/bin/pip install torch==2.13.0 transformers==4.57.6
    qa/bin/python scripts/make_golden_question_answering.py
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import questions  # noqa: E402


def main() -> None:
    assert transformers.__version__ == "4.57.6", transformers.__version__
    with tempfile.TemporaryDirectory() as folder:
        questions.write_model(Path(folder))
        pipeline = transformers.pipeline("question-answering", model=folder, device="cpu")
    answers = []
    for case in questions.cases():
        found = pipeline(question=case["question"], context=case["context"], **case["parameters"])
        found = [found] if isinstance(found, dict) else found
        for entry in found:
            assert entry["answer"] == case["context"][entry["start"] : entry["end"]]
        answers.append([[round(entry["score"], 8), entry["start"], entry["end"]] for entry in found])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "content": answers}, separators=(",", ":"))
    (ROOT / "tests" / "golden" / "question_answering.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
