import subprocess
import sys

import pytest

# Faults of pages in taking and leaving 64 MB five times, after a first time.
PROGRAM = """
import resource
import sys
from bert_jax import memory
if sys.argv[1:] == ["keep"]:
    memory.keep_freed()
    memory.keep_freed()  # a second time is as good
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(8_000_000)
before = faults()
for _ in range(5):
    np.ones(8_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is glibc's on Linux alone")
def test_freed_memory_is_kept():
    def faults(*arguments):
        run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("keep") < 100
    assert faults() > 5 * 64e6 / 2e6  # 4 kB pages, or huge ones where numpy asks for them
