import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has glibc's malloc")

START = """
import resource
import sys
from bert_jax.training import memory
if "keep" in sys.argv:
    memory.keep_freed(asynchronous="asynchronous" in sys.argv)
    memory.keep_freed(asynchronous="asynchronous" in sys.argv)  # a second time is as good
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
"""

# Faults of pages in taking and leaving 64 MB, or 200 MB, five times, after a first time.
FAULTS = """
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
size = int(sys.argv[1])
np.ones(size, np.int8)
before = faults()
for _ in range(5):
    np.ones(size, np.int8)
print(faults() - before)
"""

# Blocks of 200 and 150 MB in turn, as of programs. While one is held, small arrays come that outlive it by a turn, and
# one in ten for good.
FRAGMENTS = """
import numpy as np
base, kept, lasting = peak(), [], []
for turn in range(20):
    block = np.ones((200 if turn % 3 else 150) << 20, np.int8)
    fresh = [np.ones(n << 10, np.int8) for n in (1, 3, 30, 500, 3000)]
    lasting.append(np.ones(100 << 10, np.int8))
    del block
    kept = fresh
print(peak() - base)
"""

# A chain of programs whose temporaries are 200 MB, each dispatched while the one before may be computing.
PROGRAMS = """
import jax
import jax.numpy as jnp
step = jax.jit(lambda x: jnp.tanh(x @ jnp.ones((8, 7000))) @ jnp.ones((7000, 8)) / 7000)
temporaries = step.lower(jnp.ones((7000, 8))).compile().memory_analysis().temp_size_in_bytes
assert temporaries > 190e6
x = jax.block_until_ready(step(jnp.ones((7000, 8))))
before = peak()
for _ in range(30):
    x = step(x)
jax.block_until_ready(x)
print(peak() - before)
"""

# What is in use stays as it is, what is free goes, and the next block is as good as the first.
RELEASE = """
import numpy as np
used = [np.full(size, n % 100, np.int8) for n, size in enumerate([10, 5000, 3 << 20, 80 << 20, 70000])]
holes = [np.ones(3 << 20, np.int8) for _ in range(20)]
more = [np.full(2 << 20, 77, np.int8)]
block = np.ones(300 << 20, np.int8)
del block, holes
full = memory.resident()
memory.release()
freed = full - memory.resident()
assert all((array == n % 100).all() for n, array in enumerate(used)) and (more[0] == 77).all()
block = np.full(300 << 20, 5, np.int8)
assert all((array == n % 100).all() for n, array in enumerate(used)) and (block == 5).all()
print(freed)
"""


def run(program: str, *arguments: str) -> int:
    command = [sys.executable, "-c", START + program, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("size", [64_000_000, 200_000_000])
def test_freed_memory_is_kept(size):
    assert run(FAULTS, str(size), "keep") < 100
    assert run(FAULTS, str(size)) > 5 * size / 2e6  # 4 kB pages, or huge ones where numpy asks for them


def test_no_more_is_kept_than_the_largest_block_and_what_is_in_use():
    assert run(FRAGMENTS, "keep") < (200 + 25) << 20


@pytest.mark.slow
def test_one_program_takes_memory_at_a_time():
    assert run(PROGRAMS, "keep") < 50e6


@pytest.mark.parametrize("how", ["keep", "left alone"])
def test_release_gives_back_what_is_free_and_no_more(how):
    assert run(RELEASE, how) > (0.9 * 300e6 if how == "keep" else -10e6)


def test_another_call_leaves_the_heap_as_it_is():
    size = "int(open('/proc/self/statm').read().split()[0])"  # in pages
    calls = "memory.keep_freed(asynchronous=True); memory.keep_freed(asynchronous=False); memory.keep_freed()"
    program = f"memory.keep_freed()\nbefore = {size}\n{calls}\nprint({size} - before)"
    assert run(program) == 0


def test_dispatch_stays_asynchronous_where_asked():
    program = "from jax._src import xla_bridge\nprint(int(xla_bridge._CPU_ENABLE_ASYNC_DISPATCH.value))"
    assert run(program, "keep", "asynchronous") == 1
    assert run(program, "keep") == 0
