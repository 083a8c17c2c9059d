"""How a process takes the machine: what it freed is there for the next step."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from mmfm_core.process import keep_memory, one_thread
{prepare}
def step():
    return [np.ones(1 << 20) for _ in range(20)]  # 20 arrays of 8 MiB, as the activations of a model
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 20 * (8 << 20) // 4096


def faults(prepare: str) -> int:
    program = [sys.executable, "-c", FAULTS.format(prepare=prepare)]
    return int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such thresholds")
def test_memory_that_was_freed_is_not_asked_for_again():
    assert faults("") > PAGES / 4
    assert faults("keep_memory()") < PAGES / 20


@pytest.mark.parametrize("given, taken", [(None, "1"), ("3", "3")])
def test_one_thread_unless_the_environment_says_otherwise(monkeypatch, given, taken):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    program = "from mmfm_core.process import one_thread; one_thread(); import os; print(os.environ['OMP_NUM_THREADS'])"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == taken
