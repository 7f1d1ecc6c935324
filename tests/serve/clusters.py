"""A Ray cluster on this machine."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
# Ports of Ray are open to others: no more than that, for whoever has no token.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
ENV = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
STORE_BYTES = 100_000_000
PATIENCE_S = 300


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]


class Cluster:
    """Of one machine, at this one's loopback."""

    def __init__(self, cpus=2):
        self._folder = tempfile.mkdtemp(prefix="swan-", dir="/tmp")  # names of sockets are short
        self._nodes = []
        for _ in range(3):  # another process may take a port before Ray does
            port = str(free_port())
            self.address = f"127.0.0.1:{port}"
            if self._started("--head", "--port", port, "--include-dashboard=false", cpus=cpus):
                return
        raise AssertionError(Path(f"{self._folder}/node-2.log").read_text())

    def _started(self, *argv, cpus):
        """Its process; None where it has ended."""
        log = open(f"{self._folder}/node-{len(self._nodes)}.log", "w+")
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block", *argv]
        command += ["--node-ip-address", "127.0.0.1", "--num-cpus", str(cpus), "--num-gpus", "0"]
        command += ["--object-store-memory", str(STORE_BYTES)]
        command += ["--temp-dir", self._folder] if "--head" in argv else []
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENV, start_new_session=True)
        self._nodes.append(process)
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in Path(log.name).read_text():
            assert time.monotonic() < deadline, Path(log.name).read_text()
            if process.poll() is not None:
                return None
            time.sleep(0.1)
        return process

    def lose(self, node):
        """As if its power went."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def stop(self):
        for node in reversed(self._nodes):
            if node.poll() is None:
                node.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.wait(30)
            self.lose(node)
        shutil.rmtree(self._folder, ignore_errors=True)
