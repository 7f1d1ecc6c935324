"""The kernels compile for GPUs, to their machine code, which takes none: in a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_they_compile(tmp_path):
    """Nothing is kept in memory for want of registers, and 16 bytes are read at a time."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), "80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) > 20
    for name, kernel in kernels.items():
        assert kernel["spilled_bytes"] == 0 and kernel["registers"] <= 128, name
        if name.startswith(("residual", "rms", "position")):
            assert kernel["reads_of_16_bytes"] > 0, name
