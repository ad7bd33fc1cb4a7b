"""Jobs of many clients in one batch."""

import asyncio
import threading
import time

from bert_jax.inference.batcher import Batcher, Job, Limits


def jobs(limits, work, sizes):
    """Answers of jobs that are submitted together."""

    async def run():
        batcher = Batcher(limits, lambda n: None)
        made = [Job(work, "kind", list(range(size))) for size in sizes]
        try:
            return await asyncio.gather(*(batcher.submit(job) for job in made), return_exceptions=True)
        finally:
            await asyncio.get_running_loop().run_in_executor(None, batcher.close)

    return asyncio.run(run())


def test_jobs_are_computed_together_up_to_the_limit():
    seen = []

    def work(batch):
        seen.append([len(job.requests) for job in batch])
        return [len(job.requests) for job in batch]

    assert jobs(Limits(batch=4, wait=0.2), work, [1, 2, 3, 1, 5]) == [1, 2, 3, 1, 5]
    assert seen == [[1, 2], [3, 1], [5]]


def test_a_batch_that_fails_is_nobody_else_s():
    def work(batch):
        if len(batch[0].requests) == 3:
            raise RuntimeError("broken")
        return [True for _ in batch]

    failed, fine = jobs(Limits(batch=3, wait=0.01), work, [3, 1])
    assert isinstance(failed, RuntimeError)
    assert fine is True


def test_who_waits_too_long_is_told_and_dropped():
    begun, computed = threading.Event(), []

    def work(batch):
        begun.set()
        time.sleep(0.3)
        computed.extend(batch)
        return [True for _ in batch]

    found = jobs(Limits(batch=1, timeout=0.1), work, [1, 1, 1])
    assert [error.status for error in found] == [504] * 3
    assert len(computed) == 1
