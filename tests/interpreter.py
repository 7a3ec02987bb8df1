"""Runs tests of kernels in Triton's interpreter, in a process that has not imported Triton yet."""

import os
import subprocess
import sys


def run_tests(*arguments):
    """Arguments are pytest's; fails with the end of what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    done = subprocess.run(command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
