"""python -m wan.serve --ray: the same server, with workers on other machines."""

import base64
import io
import re
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.serve.servers import until

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install swan-video[ray]")
pytestmark = [pytest.mark.slow, needs_ray]
FIELDS = {"num_frames": 5, "num_inference_steps": 2, "seed": 3}


def content(server, **fields):
    id = server.wait(server.post(**fields)["id"])["id"]
    return [
        server.ask("GET", f"/v1/videos/{id}/content?variant={variant}")[1]
        for variant in ("video", "thumbnail", "spritesheet")
    ]


def log(server):
    return Path(f"{server.folder}.log").read_text()


@pytest.fixture(scope="module")
def away(make_server, cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "models.yaml").write_text("t2v-tiny: {task: t2v-tiny}\npictures: {task: i2v-tiny, sample_steps: 2}\n")
    server = make_server("--models", folder / "models.yaml", "--ray", cluster.address)
    yield server
    server.stop()


def test_the_same_bytes_as_without_ray(server, away):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="PNG")
    picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    for fields in (FIELDS, {**FIELDS, "model": "pictures", "input_reference": picture}):
        assert content(away, **fields) == content(server, **fields)
    assert re.search(r"worker 0 is ready \(process \d+ of \S+\)", log(away))


def test_a_job_is_shown_and_cancelled(away):
    job = away.post(num_frames=9, num_inference_steps=900, preview_every=1)["id"]
    until(lambda: away.ask("GET", f"/v1/videos/{job}")[1].get("stage") == "denoise")
    assert away.ask("DELETE", f"/v1/videos/{job}")[0] == 200
    until(lambda: not (away.folder / "jobs" / job).exists())
    assert away.wait(away.post()["id"])["status"] == "completed"
    assert away.metric("swan_worker_deaths_total") == 0


def test_workers_that_are_killed_cost_a_retry(away):
    job = away.post(num_frames=9, num_inference_steps=900)["id"]
    for deaths in (1, 2):
        until(lambda: away.ask("GET", f"/v1/videos/{job}")[1]["status"] == "in_progress")
        process = psutil.Process(int(re.findall(rf"{job} is made by process (\d+) of ", log(away))[-1]))
        (process if deaths == 1 else process.parent()).kill()  # what makes it, and the actor above that
        until(lambda: away.metric("swan_worker_deaths_total") == deaths)  # noqa: B023
    assert away.wait(job, "failed")["error"]["code"] == "worker_died"
    assert away.wait(away.post()["id"])["status"] == "completed"


@pytest.mark.dist
def test_two_processes_there_make_one_video_together(server, away, make_server, cluster):
    away.stop()  # which leaves the cluster's two CPUs to others
    both = make_server("--gpus_per_job", "2", "--ray", cluster.address)
    assert content(both, **FIELDS) == content(server, **FIELDS)
    processes = psutil.Process(int(re.search(r"is ready \(process (\d+) of", log(both))[1])).parent().children()
    both.kill()
    gone, alive = psutil.wait_procs(processes, timeout=300)
    assert len(gone) >= 2 and not alive
