"""Damaged checkpoints: each is refused with a short, typed error, or gives transformers' numbers.

Some damage nobody can detect: both load the checkpoint with the same numbers, and these are not the numbers of the
undamaged one. `UNDETECTED` lists these kinds and counts their checkpoints.
"""

import collections
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import damage
import damage_worker
import numpy as np

OURS, THEIRS = 5.0, 20.0
"""Seconds that each side may take for a checkpoint. transformers counts as refusing it after that."""
PROBLEM, MESSAGE, QUOTED = 600, 12_000, 200
"""Characters that a message may have in a line and in all, and that it may quote of a file in one piece."""
PARTS = ["tokenizer", "model", "fill_mask"]
WORDS = [f"over {OURS:.0f} s", "untyped", "silent", "refused", "undetected", "said", "equal"]
"""What can become of a checkpoint, worst first."""

UNDETECTED = {
    "bit flipped": 4,  # of a number in the weights, of a letter in the vocabulary
    "value changed": 1,  # another unk_token
    "names": 1,  # two tensors of one shape exchanged
    "types and shapes": 3,  # a square matrix transposed; weights rounded to float16 or bfloat16
    "config": 4,  # another activation, epsilon or number of heads; a key twice, of which the last counts
    "vocab.txt": 8,  # a vocabulary of another order, with other words, or with fewer; another do_lower_case
    "tokenizer.json": 1,  # another flag of an added token
    "tokenizer_config.json": 18,  # other special tokens and switches of the normalizer, or fewer added tokens
    "special_tokens_map.json": 2,  # another mask token
}
"""Kind of damage -> checkpoints whose damage nobody can detect."""


class Worker:
    """A process that loads checkpoints. One that takes too long or dies is replaced by another.

    Args:
        undamaged: A checkpoint that the process loads first, so that importing and compiling are not timed.
    """

    def __init__(self, undamaged: Path):
        self.undamaged = undamaged
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=damage_worker.serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        for side in ("ours", "theirs"):
            self.connection.send((side, self.undamaged, PARTS))
            self.connection.recv()

    def ask(self, side: str, folder: Path, parts: list[str], seconds: float) -> Any:
        """What a side makes of a folder (see `damage_worker.serve`), or a text that says why there is no answer."""
        try:
            self.connection.send((side, folder, parts))
            if self.connection.poll(seconds):
                return self.connection.recv()
            reason = f"over {seconds:.0f} s"
        except EOFError:
            reason = "the process died"
        self.stop()
        self.start()
        return reason

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass
class Verdict:
    """What became of a damaged checkpoint."""

    damage: damage.Damage
    parts: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Part -> one of `WORDS`, and why."""
    messages: list[str] = field(default_factory=list)
    """What is wrong with the error messages."""

    @property
    def word(self) -> str:
        return min((word for word, _ in self.parts.values()), key=WORDS.index)

    def problems(self) -> Iterator[str]:
        """What is not as it must be."""
        allowed = {"": ["refused", "said", "equal"], "undetected": ["refused", "undetected", "said", "equal"]}
        expected = self.damage.expected
        if self.word not in allowed.get(expected, [expected]):
            yield f"{self}\n    expected: {expected or 'refused, said or equal'}"
        for message in self.messages:
            yield f"{self.damage}: {message}"

    def __str__(self) -> str:
        reasons = [f"\n    {part}: {word}: {why}" for part, (word, why) in self.parts.items() if word != "equal"]
        return f"{self.word}: {self.damage}" + "".join(reasons)


def test_damaged_checkpoints_are_refused_or_as_transformers_has_them(tmp_path):
    problems, verdicts = judged(damage.damages(), tmp_path)
    counts = collections.Counter(verdict.word for verdict in verdicts)
    print(f"{len(verdicts)} damaged checkpoints: " + " · ".join(f"{counts[word]} {word}" for word in WORDS))
    problems += [problem for verdict in verdicts for problem in verdict.problems()]
    assert not problems, "\n".join([f"{len(problems)} problems; {dict(counts)}", *problems])
    undetected = collections.Counter(verdict.damage.kind for verdict in verdicts if verdict.word == "undetected")
    assert undetected == UNDETECTED


def judged(damages: list[damage.Damage], folder: Path) -> tuple[list[str], list[Verdict]]:
    """What is wrong with the undamaged checkpoints, and what becomes of the damaged ones."""
    for form in damage.FORMS:
        damage.write(form, folder / form)
    worker, problems, undamaged = Worker(folder / "cased"), [], {}
    try:
        for form in damage.FORMS:
            undamaged[form], theirs = (worker.ask(side, folder / form, PARTS, 120) for side in ("ours", "theirs"))
            for part in PARTS:
                (result, error), (reference, refusal) = undamaged[form][0][part], theirs[0][part]
                if differs := error or refusal or difference(part, result, reference):
                    problems.append(f"undamaged {form}, {part}: {differs}")
        return problems, [judge(worker, one, folder / str(i), *undamaged[one.form]) for i, one in enumerate(damages)]
    finally:
        worker.stop()


def judge(worker: Worker, one: damage.Damage, folder: Path, undamaged: dict[str, Any], said: list[str]) -> Verdict:
    """Writes a damaged checkpoint, loads it here and, as far as it loads here, in transformers.

    Args:
        worker: The process that loads it.
        one: The damage.
        folder: The folder to write.
        undamaged: Part -> our result and error for the undamaged checkpoint.
        said: What we log for the undamaged checkpoint.
    """
    one.write(folder)
    verdict = Verdict(one)
    answer = worker.ask("ours", folder, PARTS, OURS)
    if isinstance(answer, str):  # once more, because the machine may have been busy
        answer = worker.ask("ours", folder, PARTS, OURS)
    if isinstance(answer, str):
        verdict.parts["all"] = (answer if answer in WORDS else "untyped", answer)
        return verdict
    ours, lines = answer
    news = sorted(set(lines) - set(said))
    loaded = [part for part in PARTS if ours[part][1] is None]
    answer = worker.ask("theirs", folder, loaded, THEIRS) if loaded else ({}, [])
    theirs = {part: (None, {"message": answer}) for part in loaded} if isinstance(answer, str) else answer[0]
    config = folder / damage.CONFIG
    if not config.is_file() or config.read_bytes() != damage.files(one.form)[damage.CONFIG]:
        theirs["tokenizer"] = undamaged["tokenizer"]  # theirs reads config.json, and ours does not
    for part in PARTS:
        (result, error), (before, _) = ours[part], undamaged[part]
        if error is not None:
            word = "refused" if error["typed"] else "untyped"
            verdict.parts[part] = word, f"{error['type']} ({error['where']}): {error['message'][:300]}"
            verdict.messages += [fault for fault in faults(error["message"], folder) if fault not in verdict.messages]
            continue
        reference, refusal = theirs[part]
        differs = f"transformers refuses: {refusal['message']}" if refusal else difference(part, result, reference)
        changed = difference(part, result, before)
        if not finite(part, result) and (part == "fill_mask" or refusal or finite(part, reference)):
            verdict.parts[part] = "silent", "results that are not finite"
        elif differs:
            verdict.parts[part] = "said" if news and not changed else "silent", f"{differs[:300]}; said: {news}"
        else:
            verdict.parts[part] = "undetected" if changed else "equal", changed
    return verdict


def difference(part: str, ours: Any, theirs: Any) -> str:
    """How two results of a part differ; empty where they agree, numbers to 1e-5."""
    if part == "tokenizer":
        for text, a, b in zip([*damage_worker.TEXTS, damage_worker.PAIR], ours["ids"], theirs["ids"], strict=True):
            if a != b:
                return f"{text!r} has the ids {a}, not {b}"
        for a, b in zip(ours["type_ids"], theirs["type_ids"], strict=True):
            if b is not None and a != b:  # not all of their tokenizers return them
                return f"the type ids are {a}, not {b}"
        if ours["special_ids"] != theirs["special_ids"]:
            return f"the special ids are {ours['special_ids']}, not {theirs['special_ids']}"
        other = set(ours["vocabulary"].items()) ^ set(theirs["vocabulary"].items())
        return f"the vocabularies differ in {sorted(other)[:4]}" if other else ""
    if part == "fill_mask" and [token for token, _ in ours] != [token for token, _ in theirs]:
        return f"{ours[:1]}, not {theirs[:1]}"
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape:
        return f"results of {a.shape}, not {b.shape}"
    if np.isnan(a).all() and np.isnan(b).all():  # of a model; what a pipeline returns is finite
        return ""
    most = float(np.max(np.abs(a - b))) / max(1.0, float(np.max(np.abs(b))))
    return "" if most <= 1e-5 else f"results differ by {most:.1e}"


def finite(part: str, result: Any) -> bool:
    """Whether there are numbers, and they are finite."""
    return part == "tokenizer" or (len(result) > 0 and bool(np.isfinite(np.asarray(result)).all()))


def faults(message: str, folder: Path) -> list[str]:
    """What is wrong with an error message: too long, quotes too much of a file, or cannot be printed."""
    lines = message.replace(str(folder), "").split("\n")
    found = [f"{len(line)} characters in a line: {line[:100]} …" for line in lines if len(line) > PROBLEM]
    if len(message) > MESSAGE:
        found.append(f"{len(message)} characters: {message[:100]} …")
    if any("\ud800" <= character <= "\udfff" for character in message):
        found.append(f"holds a lone surrogate: {message[:100]!r} …")
    texts = [path.read_bytes().decode("utf-8", "replace") for path in folder.iterdir() if path.is_file()]
    for line in lines:
        pieces = {line[i : i + QUOTED + 1] for i in range(min(len(line), PROBLEM) - QUOTED)}
        if any(piece in text for piece in pieces for text in texts):
            found.append(f"quotes over {QUOTED} characters: {line[:100]} …")
    return found
