"""What a server bears: python -m benchmarks.serve load|cancels|kills [--out FILE]

load     64 clients poll, and post when their job is done, for two minutes: times of GET, of a server that only says
         hello beside it in the same run (what the machine and the client take), and whether the order was kept
cancels  200 jobs of which 100 are cancelled: memory of the processes before and after; from DELETE to a worker that is
         free, in steps
kills    50 times kill -9 at a random moment while jobs come in: jobs that are lost, made twice or not whole

All with t2v-tiny on a CPU: one worker with one thread, and the client on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from argparse import RawTextHelpFormatter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import machine, report
from wan.command import Parser, run_command
from wan.video import open_video

PROMPT = "a red circle moving right on a black background"
SMALL = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": 8}
LONG = {"prompt": PROMPT, "num_frames": 33, "num_inference_steps": 900}
POLL_S = 0.25
_HELLO = """
import asyncio
async def answer(reader, writer):
    try:
        while await reader.readuntil(b"\\r\\n\\r\\n"):
            writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 5\\r\\n\\r\\nhello")
    except asyncio.IncompleteReadError:
        writer.close()
async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


class Server:
    """A process of `python -m wan.serve` on this machine."""

    def __init__(self, folder: Path, *flags: str):
        self.folder = folder / "data"
        self._command = [sys.executable, "-m", "wan.serve", "--task", "t2v-tiny", "--device", "cpu", "--quiet"]
        self._command += ["--port", "0", "--data", str(self.folder), "--max_queue", "10000", *flags]

    def start(self) -> Server:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
        self.url = json.loads(self.process.stdout.readline())["url"]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        request.method = method
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def until_idle(self) -> None:
        while not self.is_idle():
            time.sleep(0.05)

    def is_idle(self) -> bool:
        rows = dict(self.rows("SELECT state, count(*) FROM jobs GROUP BY state"))
        return not rows.get("queued") and not rows.get("in_progress") and not self.ask("GET", "/health")["busy"]

    def rows(self, query: str) -> list[Any]:
        rows = sqlite3.connect(self.folder / "jobs.db")
        try:
            return rows.execute(query).fetchall()
        finally:
            rows.close()

    def rss(self) -> dict[str, int]:
        """Bytes of the server's process and of all that it has started."""
        mine = psutil.Process(self.process.pid)
        return {"server": mine.memory_info().rss, "children": sum(one.memory_info().rss for one in mine.children())}


# load


async def load(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    server.ask("POST", "/v1/videos", SMALL)
    hello = subprocess.Popen([sys.executable, "-c", _HELLO], stdout=subprocess.PIPE)
    ports = {"get": server.port, "hello": int(hello.stdout.readline())}
    times: dict[str, list[float]] = {"get": [], "hello": [], "post": []}
    end = time.monotonic() + seconds
    await asyncio.gather(*(_client(ports, times, end, number) for number in range(clients)))
    hello.kill()
    waiting = [id for (id,) in server.rows("SELECT id FROM jobs WHERE state='queued'")]
    for id in waiting:
        server.ask("DELETE", f"/v1/videos/{id}")
    server.until_idle()
    ends = [at for (at,) in server.rows("SELECT completed_at FROM jobs WHERE state='completed' ORDER BY number")]
    return {
        "clients": clients,
        "seconds": seconds,
        "jobs_done": len(ends),
        "jobs_waiting_at_the_end": len(waiting),
        "order_kept": ends == sorted(ends),
        "ms": {name: _spread(one) for name, one in times.items()},
    }


async def _client(ports: dict[str, int], times: dict[str, list[float]], end: float, number: int) -> None:
    links = {name: await asyncio.open_connection("127.0.0.1", port) for name, port in ports.items()}
    await asyncio.sleep(POLL_S * number / 64)
    job = None
    while time.monotonic() < end:
        if job is None:
            job = json.loads(await _ask(links["get"], "POST", "/v1/videos", times["post"], SMALL))["id"]
        told = json.loads(await _ask(links["get"], "GET", f"/v1/videos/{job}", times["get"]))
        job = None if told["status"] == "completed" else job
        await _ask(links["hello"], "GET", "/", times["hello"])
        await asyncio.sleep(POLL_S)
    for _, writer in links.values():
        writer.close()


async def _ask(link: Any, method: str, path: str, times: list[float], body: Any = None) -> bytes:
    reader, writer = link
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    started = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    size = int(answer.partition(b"content-length:")[2].split(b"\r\n")[0])
    got = await reader.readexactly(size)
    times.append(1000 * (time.perf_counter() - started))
    return got


def _spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"count": len(values), "p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "most": round(max(values), 2)}


# cancels


def cancels(server: Server, jobs: int) -> dict[str, Any]:
    draw = random.Random(1)
    for _ in range(20):
        server.ask("POST", "/v1/videos", SMALL)
    server.until_idle()
    before = server.rss()
    ids = [server.ask("POST", "/v1/videos", SMALL)["id"] for _ in range(jobs)]
    for id in draw.sample(ids, jobs // 2):
        server.ask("DELETE", f"/v1/videos/{id}")
        time.sleep(0.02)
    server.until_idle()
    after = server.rss()
    done = server.rows("SELECT count(*) FROM jobs WHERE state='completed'")[0][0] - 20
    return {
        "jobs": jobs,
        "completed": done,
        "deleted": jobs - done,
        "rss_bytes": {"before": before, "after": after},
        "after_of_before": {name: round(after[name] / before[name], 4) for name in before},
        "cancel": _cancel_times(server),
    }


def _cancel_times(server: Server) -> dict[str, float]:
    found, step_s = [], []
    for _ in range(10):
        id = server.ask("POST", "/v1/videos", LONG)["id"]
        with urllib.request.urlopen(f"{server.url}/v1/videos/{id}/events") as lines:
            steps = 0
            for line in lines:
                if line.startswith(b"data:") and (told := json.loads(line[5:])).get("stage") == "denoise":
                    steps = told["done"]
                    if steps >= 5:
                        step_s.append(told["seconds"] / steps)
                        break
        started = time.perf_counter()
        server.ask("DELETE", f"/v1/videos/{id}")
        while server.ask("GET", "/health")["busy"]:
            time.sleep(0.001)
        found.append(time.perf_counter() - started)
    step = statistics.median(step_s)
    return {
        "step_ms": round(1000 * step, 1),
        "delete_to_free_ms": round(1000 * statistics.median(found), 1),
        "most_ms": round(1000 * max(found), 1),
        "steps": round(statistics.median(found) / step, 2),
    }


# kills


def kills(server: Server, count: int) -> dict[str, Any]:
    draw, posted, stop = random.Random(1), [], threading.Event()
    thread = threading.Thread(target=_post, args=(server, posted, stop))
    thread.start()
    made: dict[str, int] = {}
    again, killed_running = 0, 0
    for number in range(count):
        until = time.monotonic() + (60 if number % 2 else 0)  # each other time once something was made since
        done = len(made)
        while time.monotonic() < until and len(_made(server)) <= done:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 2))
        server.kill()
        killed_running += server.rows("SELECT count(*) FROM jobs WHERE state='in_progress'")[0][0]
        now = _made(server)
        again += sum(now.get(id) != at for id, at in made.items())
        made = now
        server.start()
        print(f"kill {number + 1}: {len(posted)} accepted, {len(made)} completed", file=sys.stderr)
    stop.set()
    thread.join()
    server.until_idle()
    now = _made(server)
    again += sum(now.get(id) != at for id, at in made.items())
    broken = 0
    for id in now:
        with suppress(Exception):
            broken -= len(open_video(server.folder / "jobs" / id / "video.mp4")) == SMALL["num_frames"]
    left = list(server.folder.glob("jobs/*/.swan*"))
    return {
        "kills": count,
        "while_a_job_ran": killed_running,
        "accepted": len(posted),
        "completed": len(now),
        "lost": len({*posted} - now.keys()),
        "made_again_after_completion": again,
        "not_whole": broken + len(now),
        "temporary_files_left": len(left),
    }


def _post(server: Server, posted: list[str], stop: threading.Event) -> None:
    """Jobs one after another, each asked for until it is accepted once."""
    number = 0
    while not stop.is_set():
        with suppress(OSError, ValueError, urllib.error.URLError):
            told = server.ask("POST", "/v1/videos", {**SMALL, "seed": number}, Idempotency_Key=f"job-{number}")
            posted.append(told["id"])
            number += 1
        stop.wait(1.0)


def _made(server: Server) -> dict[str, int]:
    """Completed jobs, and when their files were written."""
    ids = [id for (id,) in server.rows("SELECT id FROM jobs WHERE state='completed'")]
    return {id: os.stat(server.folder / "jobs" / id / "video.mp4").st_mtime_ns for id in ids}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.serve", description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("what", choices=("load", "cancels", "kills"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", help="add the result to this JSON file")
    args = parser.parse_args(argv)
    begun = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name)).start()
        try:
            if args.what == "load":
                found = asyncio.run(load(server, args.clients, args.seconds))
            else:
                found = cancels(server, args.jobs) if args.what == "cancels" else kills(server, args.kills)
        finally:
            server.kill()
    found["load_average"] = {"before": round(begun, 1), "after": round(os.getloadavg()[0], 1)}
    there = json.loads(Path(args.out).read_text()) if args.out and Path(args.out).is_file() else {"machine": machine()}
    report({**there, args.what: found}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
