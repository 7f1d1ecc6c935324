"""The routes of LightX2V's server, as its own scripts ask them."""

import base64
import io

import pytest
from PIL import Image

from tests.serve.servers import RED, until
from wan.serve.lightx2v import _translated
from wan.serve.refused import Refused


def picture():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, format="PNG")
    return file.getvalue()


def submit(server, **fields):
    got, told, _ = server.ask("POST", "/v1/tasks/video/", {"prompt": RED, "infer_steps": 1, "seed": 1, **fields})
    assert got == 200 and told["task_status"] == "pending", told
    return told["task_id"]


def status(server, id):
    return server.ask("GET", f"/v1/tasks/{id}/status")[1]


def test_submit_status_result(server):
    id = submit(server, target_video_length=5, save_result_path="../../x.mp4", task_id="mine", negative_prompt="")
    assert status(server, id)["status"] in ("pending", "processing", "completed")
    until(lambda: status(server, id)["status"] == "completed")
    told = status(server, id)
    assert told["save_result_path"] == f"{id}.mp4" and told["error"] is None and told["end_time"] >= told["start_time"]
    got, data, headers = server.ask("GET", f"/v1/tasks/{id}/result")
    assert (got, headers["Content-Type"], data[4:8]) == (200, "video/mp4", b"ftyp")
    assert id in server.ask("GET", "/v1/tasks/")[1]


def test_a_picture_as_base64_and_by_a_form(server):
    text = base64.b64encode(picture()).decode()
    ids = [submit(server, model="pictures", target_video_length=5, image_path=text)]
    parts = [("prompt", RED), ("infer_steps", "1"), ("seed", "1"), ("model", "pictures"), ("target_video_length", "5")]
    body = "".join(f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in parts)
    body += '--x\r\nContent-Disposition: form-data; name="image_file"; filename="a.png"\r\n\r\n'
    body = body.encode() + picture() + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    ids.append(server.ask("POST", "/v1/tasks/video/form", body, headers)[1]["task_id"])
    for id in ids:
        until(lambda: status(server, id)["status"] == "completed")  # noqa: B023
    results = [server.ask("GET", f"/v1/tasks/{id}/result")[1] for id in ids]
    assert results[0] == results[1]


def test_cancel_one_and_all(server):
    ids = [submit(server, target_video_length=33, infer_steps=900) for _ in range(3)]
    until(lambda: status(server, ids[0])["status"] == "processing")
    queue = server.ask("GET", "/v1/tasks/queue/status")[1]
    assert queue["is_processing"] and queue["current_task"] == ids[0] and queue["pending_count"] == 2
    assert server.ask("DELETE", f"/v1/tasks/{ids[0]}")[1]["stop_status"] == "success"
    assert status(server, ids[0])["status"] == "cancelled"
    until(lambda: status(server, ids[1])["status"] == "processing")
    assert server.ask("DELETE", "/v1/tasks/all/running")[1]["stop_status"] == "success"
    assert [status(server, id)["status"] for id in ids] == ["cancelled"] * 3
    assert server.ask("DELETE", f"/v1/tasks/{ids[0]}")[1]["stop_status"] == "do_nothing"
    assert server.ask("GET", f"/v1/videos/{ids[0]}")[1]["error"] == {"code": "cancelled", "message": "cancelled"}
    until(lambda: not server.ask("GET", "/v1/tasks/queue/status")[1]["is_processing"])
    assert server.ask("GET", f"/v1/tasks/{ids[0]}/result")[0] == 404
    assert server.ask("GET", "/v1/tasks/none/status")[0] == 404


def test_fields():
    told = _translated(
        {"prompt": "a", "infer_steps": 4, "target_video_length": 81, "last_frame_path": "http://x/y", "size": [64, 96]}
    )
    assert told == {"prompt": "a", "sample_steps": 4, "num_frames": 81, "last_frame": "http://x/y", "size": "64x96"}
    assert _translated({"num_fragments": 1, "use_prompt_enhancer": False, "audio_path": ""}) == {}
    with pytest.raises(Refused, match="use_prompt_enhancer: only False"):
        _translated({"use_prompt_enhancer": True})
