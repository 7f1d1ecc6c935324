"""Servers with tiny models: as users start them, or forked, which is quicker."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.dist.processes import Forked
from tests.serve.forked import serve

REPO = Path(__file__).parents[2]
QUICK = {"num_frames": 1, "num_inference_steps": 1, "seed": 1}
KEY = "a-key-of-some-length"
RED = "a red circle moving right on a black background"
PATIENCE_S = 600  # for a state, on a machine that is busy


class Server:
    """A server on a port of its own, which may be killed and started again. is_forked: see `forked`"""

    def __init__(self, folder, *argv, key=None, is_forked=True):
        self.folder, self.argv, self.key, self.is_forked = folder, argv, key, is_forked
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.process = None

    def start(self):
        flags = ["--port", "0", "--data", self.folder, "--device", "cpu", *self.argv]
        flags, stdout, stderr = list(map(str, flags)), Path(f"{self.folder}.url"), Path(f"{self.folder}.log")
        stdout.unlink(missing_ok=True)
        if self.is_forked:
            self.process = Forked(serve, flags, self.folder.parent, stdout, stderr)
        else:
            self.process = self._spawn(flags, stdout, stderr)
        while not (stdout.exists() and stdout.read_text().endswith("\n")):
            assert self.process.poll() is None, stderr.read_text()
            time.sleep(0.05)
        self.url = json.loads(stdout.read_text())["url"]
        return self

    def _spawn(self, flags, stdout, stderr):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with open(stdout, "a") as out, open(stderr, "a") as log:
            command = [sys.executable, "-m", "wan.serve", *flags]
            return subprocess.Popen(command, stdout=out, stderr=log, env=env, cwd=self.folder.parent)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
            self.process.kill()
        self.process.wait()

    def ask(self, method, path, body=None, headers=None):
        """(status, object of the body or its bytes, headers). body: an object, sent as JSON, or bytes as they are."""
        headers = {**self.headers, **(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        with contextlib.closing(
            http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE_S)
        ) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            is_json = answer.getheader("Content-Type", "").startswith("application/json")
            return answer.status, json.loads(data) if is_json else data, answer.headers

    def post(self, **fields):
        """The job of a request that is accepted."""
        status, job, _ = self.ask("POST", "/v1/videos", {"prompt": RED, **QUICK, **fields})
        assert status == 200, job
        return job

    def refused(self, *, status=400, headers=None, **fields):
        """The error of a request that is not."""
        got, told, _ = self.ask("POST", "/v1/videos", {"prompt": RED, **QUICK, **fields}, headers)
        assert got == status, told
        assert set(told["error"]) == {"message", "type", "param", "code"}
        assert not any(str(path) in told["error"]["message"] for path in (self.folder.parent, REPO)), told
        return told["error"]

    def wait(self, id, *states):
        """The job once it is in one of the states: completed, if none are given."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            status, job, _ = self.ask("GET", f"/v1/videos/{id}")
            assert status == 200, job
            if job["status"] in (states or ("completed",)):
                return job
            assert states or job["status"] != "failed", job
            time.sleep(0.05)
        raise AssertionError(f"{id} is still {job['status']}")

    def metric(self, name):
        """The sum of all values of a metric."""
        text = self.ask("GET", "/metrics")[1].decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))


def until(condition):
    """What a condition says, once that is something."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it does not come")
