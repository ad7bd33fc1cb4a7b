"""Jobs of many clients, computed slice by slice in turns."""

import asyncio
import re

import numpy as np
import pytest

from bert_jax.errors import CheckpointError
from bert_jax.inference.batches import BUCKET_TOKENS
from bert_jax.inference.run import Run
from bert_jax.inference.server.batcher import SLICE_TOKENS, Batcher, Job
from bert_jax.inference.server.limits import Limits, Refused
from bert_jax.tasks.base import Features, Request

SHORT, LONG = "The [MASK] sat on the mat.", "The [MASK] and " + "the cat " * 200


def answers(pipe, jobs, *, limits=Limits(), seen=lambda n: None, late=()):  # noqa: B008
    """The results of jobs, each a list of texts, that are submitted together; `late` ones a moment later."""

    async def run():
        def compile_(pipe, bucket):
            pipe.compile(bucket)
            batcher.resume()

        batcher = Batcher(limits, seen, compile_)
        made = [Job(pipe, [pipe.request(text, {"top_k": 1}) for text in texts]) for texts in [*jobs, *late]]
        finished = []

        async def submit(i, job):
            await asyncio.sleep(0.05 * (i >= len(jobs)))
            result = await batcher.submit(job)
            finished.append(i)
            return result

        try:
            found = await asyncio.gather(*(submit(i, job) for i, job in enumerate(made)), return_exceptions=True)
            return found, finished, batcher.waiting
        finally:
            await asyncio.get_running_loop().run_in_executor(None, batcher.close)

    return asyncio.run(run())


@pytest.mark.slow
def test_each_job_gets_its_own_results(fill_mask):
    jobs = [[SHORT], [SHORT, LONG], ["A [MASK]."] * 3, [LONG] * 9]
    found, _, waiting = answers(fill_mask, jobs)
    for results, texts in zip(found, jobs, strict=True):
        for result, text in zip(results, texts, strict=True):
            expected = fill_mask(text, top_k=1)
            assert result[0]["token"] == expected[0]["token"]
            assert result[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)
    assert waiting == 0


def test_jobs_share_slices(fill_mask):
    fill_mask([SHORT] * 20)  # compiles the program
    shared = []
    answers(fill_mask, [[SHORT]] * 20, limits=Limits(wait=0.3), seen=shared.append)
    assert shared == [20]


def test_a_program_that_is_ready_does_not_end_the_wait_for_others(fill_mask):
    fill_mask([SHORT] * 3)
    shared = []

    async def run():
        batcher = Batcher(Limits(wait=0.3), shared.append, lambda pipe, bucket: None)
        first = asyncio.ensure_future(batcher.submit(Job(fill_mask, [fill_mask.request(SHORT, {})])))
        await asyncio.sleep(0.05)
        batcher.resume()
        await asyncio.sleep(0.05)
        await asyncio.gather(first, batcher.submit(Job(fill_mask, [fill_mask.request(SHORT, {})])))
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)

    asyncio.run(run())
    assert shared == [2]


@pytest.mark.slow
def test_a_small_job_passes_a_large_one(fill_mask):
    """It waits for no more than the slice that is being computed when it arrives."""
    _, finished, _ = answers(fill_mask, [[LONG] * 30], late=[[SHORT], [SHORT]])
    assert finished[-1] == 0


def test_who_waits_too_long_is_told_and_dropped(fill_mask):
    slices = []
    found, _, waiting = answers(fill_mask, [[LONG] * 60], limits=Limits(timeout=0.2), seen=slices.append)
    assert (found[0].status, waiting) == (504, 0)
    assert len(slices) < 60 * len(fill_mask.tokenizer(LONG)["input_ids"][0]) / BUCKET_TOKENS / 2


def test_tokens_are_admitted_not_inputs(fill_mask):
    limits = Limits(max_queue_tokens=64, wait=0.3)
    found, _, _ = answers(fill_mask, [[SHORT] * 3, [SHORT], [SHORT]], limits=limits)
    assert [isinstance(result, Refused) for result in found] == [False, False, True]
    assert found[2].status == 429
    found, _, _ = answers(fill_mask, [[LONG] * 3, [SHORT]], limits=limits)  # counts as 48 tokens
    assert len(found[0]) == 3
    assert len(found[1]) == 1


def steps(*rows, result="done", fail=None):
    if fail:
        raise fail
    for row in rows:
        _ = yield row
    return result


def test_a_request_that_fails_is_nobody_else_s(fill_mask):
    row = Features([101, 103, 102], [0, 0, 0], [1])
    run = Run(fill_mask)
    run.add("fails", [Request(steps([row])), Request(steps(fail=ValueError("broken")))])
    run.add("fine", [Request(steps([row], [row, row], result=n)) for n in range(3)])
    finished = {}
    while run.owners:
        finished |= dict(run.compute(64))
    assert finished["fine"] == [0, 1, 2]
    assert str(finished["fails"]) == "broken"


def test_a_request_without_rows_ends(fill_mask):
    row = Features([101, 103, 102], [0, 0, 0], [1])
    run = Run(fill_mask)
    run.add("a", [Request(steps([], result=1)), Request(steps([], [row], [], result=2))])
    assert dict(run.compute()) == {"a": [1, 2]}


def test_large_jobs_leave_room_for_small_ones():
    batcher = Batcher(Limits(max_queue_tokens=6400), lambda count: None, lambda pipe, bucket: None)
    batcher.waiting = 5600
    batcher.check_room(100)
    with pytest.raises(Refused, match="Too many requests"):
        batcher.check_room(101)
    batcher.waiting = 6400
    with pytest.raises(Refused, match="Too many requests"):
        batcher.check_room()
    batcher.close()


def test_results_that_are_not_finite_fail_who_needs_them(fill_mask, monkeypatch):
    row = Features([101, 103, 102], [0, 0, 0], [1])
    monkeypatch.setattr(fill_mask, "forward", lambda batch: {"probabilities": np.full((1, 2, 9), np.nan)})
    run = Run(fill_mask)
    run.add("a", [Request(steps([row]))])
    error = dict(run.compute())["a"]
    assert isinstance(error, CheckpointError)
    assert re.search("not finite", str(error))
    assert run.owners == []


def test_owners_take_turns(fill_mask, monkeypatch):
    monkeypatch.setattr(
        fill_mask, "forward", lambda b: {"probabilities": np.zeros((b.bucket.rows, b.bucket.masks, 9), np.float32)}
    )
    long, short = Features([101] * 500, [0] * 500, [1]), Features([101, 103, 102], [0, 0, 0], [1])
    run = Run(fill_mask)
    for n in range(8):
        run.add(n, [Request(steps([long]))])
    assert list(dict(run.compute(SLICE_TOKENS))) == [0, 1]
    run.add("short", [Request(steps([short]))])
    assert "short" in dict(run.compute(SLICE_TOKENS))  # it passes long texts that came before
    for n in range(200):  # ever new texts, more than are computed, do not keep the long ones waiting
        for i in range(33):
            run.add((n, i), [Request(steps([short]))])
        dict(run.compute(SLICE_TOKENS))
    assert not set(range(8)) & set(run.owners)


def test_requests_start_as_they_are_needed(fill_mask):
    """So a job of many inputs does not hold the outputs of all of them at once."""
    begun = []

    def counted(n):
        begun.append(n)
        yield [Features([101] * 500, [0] * 500, [1])]

    run = Run(fill_mask)
    run.add("a", [Request(counted(n)) for n in range(50)])
    dict(run.compute(BUCKET_TOKENS))
    assert len(begun) == 6  # five rows, and the one that comes next
    run.remove("a")
    assert dict(run.compute(BUCKET_TOKENS)) == {}
