"""The `openai` client against a server of ours: what its users write, works."""

import base64
import contextlib
import http.client
import io
import json
import warnings
from urllib.parse import urlsplit

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image

from tests.serve.servers import QUICK, RED, REPO
from wan.media import read_settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def client(server):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=0) as made:
            yield made


def picture(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, format="PNG")
    return file.getvalue()


def test_make_poll_download_remix_list_delete(client, tmp_path):
    video = client.videos.create(
        prompt=RED, seconds="1", size="64x64", extra_body={"num_inference_steps": 1, "seed": 7}
    )
    assert (video.object, video.status, video.progress, video.size, video.prompt) == (
        "video",
        "queued",
        0,
        "64x64",
        RED,
    )
    assert video.model == "t2v-tiny" and video.seconds == "1.12" and video.completed_at is None
    video = client.videos.poll(video.id)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert video.completed_at >= video.created_at
    client.videos.download_content(video.id).write_to_file(tmp_path / "a.mp4")
    settings = read_settings(tmp_path / "a.mp4")
    assert settings["prompt"] == RED and settings["seed"] == 7 and settings["frame_num"] == 9
    assert "/" not in settings.get("ckpt_dir", "")
    for variant in ("thumbnail", "spritesheet"):
        data = client.videos.download_content(video.id, variant=variant).read()
        assert Image.open(io.BytesIO(data)).format == "JPEG"

    other = client.videos.remix(video.id, prompt="a blue square")
    assert other.remixed_from_video_id == video.id
    assert client.videos.poll(other.id).status == "completed"
    client.videos.download_content(other.id).write_to_file(tmp_path / "b.mp4")
    assert read_settings(tmp_path / "b.mp4")["video"] == "video-0.mp4"  # made of the first one

    assert [one.id for one in client.videos.list(order="asc")][-2:] == [video.id, other.id]
    page = client.videos.list(limit=1)
    assert [one.id for one in page.data] == [other.id] and page.has_more
    assert page.get_next_page().data[0].id == video.id

    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (video.id, "video.deleted", True)
    with pytest.raises(NotFoundError) as caught:
        client.videos.retrieve(video.id)
    assert caught.value.code == "video_not_found"


def test_create_and_poll_with_a_picture_that_is_sent_or_a_data_url(client):
    fields = {"num_frames": 5, "num_inference_steps": 1, "seed": 1}
    sent = client.videos.create_and_poll(
        prompt="it moves", model="pictures", input_reference=("../../x.png", picture()), extra_body=fields
    )
    assert sent.status == "completed", sent.error
    url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    told = client.videos.create_and_poll(
        prompt="it moves", model="pictures", extra_body={**fields, "input_reference": {"image_url": url}}
    )
    assert told.status == "completed", told.error
    both = [client.videos.download_content(one.id).read() for one in (sent, told)]
    assert both[0] == both[1]


def test_fields_of_sglang_and_vllm_omni(client, server):
    body = {
        **{"num_frames": 6, "fps": 10, "num_inference_steps": 2, "negative_prompt": "grey", "guidance_scale": 2.5},
        **{"flow_shift": 3.0, "enable_teacache": False, "seed": 11, "width": 64, "height": 96, "user": "somebody"},
    }
    video = client.videos.create(prompt=RED, extra_body=body)
    assert (video.num_frames, video.fps, video.steps, video.size) == (5, 10, 2, "64x96")
    server.wait(video.id)
    options = settings_of(client, video.id)
    assert options["sample_guide_scale"] == 2.5 and options["sample_shift"] == 3.0 and options["fps"] == 10
    assert options["negative_prompt"] == "grey"
    blocks = client.videos.create(
        prompt=RED, extra_body={"video_params": {"num_frames": 5}, "extra_params": {"seed": 4}}
    )
    assert (blocks.num_frames, blocks.seed) == (5, 4)
    client.videos.delete(blocks.id)


def settings_of(client, id):
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        client.videos.download_content(id).write_to_file(file.name)
        return read_settings(file.name)


def test_two_guidance_scales_are_as_in_diffusers(client):
    def made(**fields):
        video = client.videos.create(
            prompt="it moves",
            model="pictures",
            input_reference=("x.png", picture()),
            extra_body={**QUICK, "num_frames": 5, **fields},
        )
        assert client.videos.poll(video.id).status == "completed"
        return settings_of(client, video.id)["sample_guide_scale"]

    assert made(guidance_scale=4, guidance_scale_2=3) == [3, 4]  # (low, high)
    assert made(guidance_scale_low=2, guidance_scale_high=5) == [2, 5]
    with pytest.raises(BadRequestError, match="one: use guidance_scale"):
        client.videos.create(prompt=RED, extra_body={**QUICK, "guidance_scale_2": 3})


def test_models_and_what_is_not_there(client):
    assert [one.id for one in client.models.list()] == ["t2v-tiny", "pictures"]
    assert client.models.retrieve("pictures").id == "pictures"
    with pytest.raises(NotFoundError, match="there are: t2v-tiny, pictures"):
        client.videos.create(prompt=RED, model="sora-2")
    with pytest.raises(NotFoundError):
        client.videos.download_content("video_none")


def test_polling_is_told_when(server):
    status, job, headers = server.ask("POST", "/v1/videos", {"prompt": RED, **QUICK})
    assert status == 200 and 250 <= int(headers["openai-poll-after-ms"]) <= 10_000
    server.wait(job["id"])
    assert "openai-poll-after-ms" not in server.ask("GET", f"/v1/videos/{job['id']}")[2]


def test_a_picture_alone_is_a_png(server):
    job = server.wait(server.post()["id"])
    status, data, headers = server.ask("GET", f"/v1/videos/{job['id']}/content")
    assert headers["Content-Type"] == "image/png" and Image.open(io.BytesIO(data)).size == (64, 64)
    assert job["id"] in headers["Content-Disposition"]
    part = server.ask("GET", f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=0-7"})
    assert (part[0], part[1]) == (206, data[:8])


def test_events_tell_stages_steps_and_previews(server):
    job = server.post(num_frames=5, num_inference_steps=4, preview_every=2)
    status, text, headers = server.ask("GET", f"/v1/videos/{job['id']}/events")
    assert headers["Content-Type"].startswith("text/event-stream")
    events = [part.split("\n") for part in text.decode().strip().split("\n\n") if not part.startswith(":")]
    names = [lines[0].removeprefix("event: ") for lines in events]
    told = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert names[0] == "status" and names[-1] == "completed"
    steps = [one for name, one in zip(names, told) if name == "step"]
    assert steps[-1]["stage"] == "denoise" and (steps[-1]["done"], steps[-1]["total"]) == (4, 4)
    previews = [one for name, one in zip(names, told) if name == "preview"]
    assert previews and previews[0]["image"].startswith("data:image/png;base64,")
    percents = [one["progress"] for one in told if "progress" in one]
    assert percents == sorted(percents)
    again = server.ask("GET", f"/v1/videos/{job['id']}/events")[1].decode()
    assert again.count("event:") == 1 and '"completed"' in again


def test_a_lora_is_one_of_the_servers_folder(server, client):
    folder = next(value for flag, value in zip(server.argv, server.argv[1:]) if flag == "--lora_dir")
    lora = REPO / "wan/assets/tiny/loras/stripes.safetensors"
    (folder / "stripes.safetensors").symlink_to(lora)
    assert client.models.list().loras == ["stripes"]
    jobs = [server.post(lora=one) for one in ("stripes:0.5", {"name": "stripes", "scale": 0.5}, None)]
    made = [
        server.ask("GET", f"/v1/videos/{server.wait(job['id'])['id']}/content?variant=thumbnail")[1] for job in jobs
    ]
    assert made[0] == made[1] != made[2]
    for name in ("../stripes", str(lora), "stripes/../stripes", "none", ["stripes", "strong"], {"scale": 1}):
        assert server.refused(lora=name)["param"] == "lora"
    (folder / "junk.safetensors").write_bytes(b"no weights")
    assert server.refused(lora="junk")["message"].startswith("junk.safetensors: ")


def test_a_connection_is_kept(server):
    with contextlib.closing(http.client.HTTPConnection(urlsplit(server.url).netloc)) as connection:
        for headers in ({}, {"Content-Length": "0"}):
            connection.request("GET", "/v1/models", headers=headers)
            answer = connection.getresponse()
            assert answer.read() and answer.getheader("Connection") is None


def test_pages_of_elsewhere_may_not_ask(server):
    """Without keys this machine alone may: not a page in its browser, nor a name that stands for it by now."""
    port = urlsplit(server.url).port
    own = {"Host": f"localhost:{port}"}
    assert server.ask("GET", "/v1/models", headers={**own, "Origin": f"http://localhost:{port}"})[0] == 200
    for headers in ({"Host": "evil.example"}, {**own, "Origin": "http://evil.example"}, {**own, "Origin": "null"}):
        status, told, answered = server.ask("POST", "/v1/videos", {"prompt": RED}, headers)
        assert (status, told["error"]["type"]) == (403, "permission_error")
        assert "Access-Control-Allow-Origin" not in answered


def test_metrics(server):
    before = server.metric("swan_jobs_ended_total")
    server.wait(server.post()["id"])
    assert server.metric("swan_jobs_ended_total") == before + 1
    assert server.metric("swan_workers_ready") == 1 and server.metric("swan_kept_bytes") > 0
    assert server.ask("GET", "/health")[1] == {"status": "ok", "workers": 1, "ready": 1, "busy": 0}
