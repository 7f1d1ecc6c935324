"""A server that is ended in any way, or loses its workers, has every job, and makes none twice that was done."""

import io
import random
import re
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.serve.servers import until
from wan.media import read_settings
from wan.video import open_video

pytestmark = pytest.mark.slow

FIELDS = {"num_frames": 5, "num_inference_steps": 3}


def status(server, id):
    return server.ask("GET", f"/v1/videos/{id}")[1]["status"]


def test_killed_at_any_moment(make_server):
    server, draw = make_server(), random.Random(1)
    jobs = [server.post(**FIELDS, seed=seed)["id"] for seed in range(8)]
    paths = [server.folder / "jobs" / id / "video.mp4" for id in jobs]
    made = {}
    for id in jobs[:6:2]:
        server.wait(id)
        time.sleep(draw.random())
        server.kill()
        made |= {path: path.stat().st_mtime_ns for path in paths[: jobs.index(id) + 1]}
        server.start()
        assert "failed" not in [status(server, id) for id in jobs]
    for id in jobs:
        server.wait(id)
    for seed, path in enumerate(paths):
        assert len(open_video(path)) == 5 and read_settings(path)["seed"] == seed
        assert made.get(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns  # not made again
    assert [one["id"] for one in server.ask("GET", "/v1/videos?order=asc")[1]["data"]] == jobs
    left = [path.name for id in jobs for path in (server.folder / "jobs" / id).iterdir()]
    assert set(left) <= {"inputs", "video.mp4", "thumbnail.jpg", "spritesheet.jpg"}
    server.stop()


def test_two_workers_and_their_ends(make_server):
    server = make_server("--workers", "2")
    until(lambda: server.ask("GET", "/health")[1]["ready"] == 2)
    jobs = [server.post(**FIELDS, seed=5)["id"] for _ in range(4)]
    pictures = [server.ask("GET", f"/v1/videos/{server.wait(id)['id']}/content?variant=thumbnail")[1] for id in jobs]
    assert len({*pictures}) == 1 and Image.open(io.BytesIO(pictures[0])).size == (64, 64)

    log = Path(f"{server.folder}.log").read_text()
    processes = {int(process) for process in re.findall(r"is ready \(process (\d+)\)", log)}
    assert len(processes) == 2
    job = server.post(num_frames=9, num_inference_steps=900)["id"]
    for deaths in (1, 2):  # the other one takes it up
        until(lambda: status(server, job) == "in_progress")
        told = re.findall(rf"{job} is made by process (\d+)", Path(f"{server.folder}.log").read_text())
        psutil.Process(int(told[-1])).kill()
        until(lambda: server.metric("swan_worker_deaths_total") == deaths)  # noqa: B023
    assert server.wait(job, "failed")["error"]["code"] == "worker_died"
    assert server.wait(server.post()["id"])["status"] == "completed"

    processes = psutil.Process(server.process.pid).children(recursive=True)
    server.kill()
    until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes))


@pytest.mark.dist
def test_two_processes_make_one_video_together(server, make_server):
    both, fields = make_server("--gpus_per_job", "2"), {"num_frames": 5, "num_inference_steps": 2, "seed": 3}
    long = both.post(num_frames=9, num_inference_steps=900)["id"]
    until(lambda: both.ask("GET", f"/v1/videos/{long}")[1].get("stage") == "denoise")
    assert both.ask("DELETE", f"/v1/videos/{long}")[0] == 200  # others take the place of those that made it
    made = [
        one.ask("GET", f"/v1/videos/{one.wait(one.post(**fields)['id'])['id']}/content")[1] for one in (server, both)
    ]
    assert made[0] == made[1]
    both.stop()
