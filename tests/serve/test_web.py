"""The page, by what its scripts ask of the server: fields, jobs, files, languages, and who may do what."""

import copy
import html
import io
import json
import re
import socket
import subprocess
import sys
import wave
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.serve.pages import Tab
from tests.serve.servers import KEY, RED, REPO, until
from wan.media import read_settings
from wan.options import FLAGS
from wan.serve.fields import is_open, read_fields
from wan.serve.models import Loras, read_models
from wan.serve.refused import Refused
from wan.serve.store import Job
from wan.serve.web import form, texts
from wan.video import open_video

GIGABYTE = 1_000_000_000
LONG = {"frame_num": "33", "sample_steps": "900"}  # is cancelled
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
QUICK = {"prompt": RED, "frame_num": "5", "sample_steps": "3", "seed": "1"}


@pytest.fixture
def server(paged):
    return paged


def png(width=64, height=64):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, format="PNG")
    return file.getvalue()


def said(server):
    """What stands in its log, but for what becomes of jobs and workers."""
    lines = Path(f"{server.folder}.log").read_text().splitlines()
    return [line for line in lines if not line.startswith(("video_", "worker "))]


def job_of(tab):
    """The id of the job that a tab shows."""
    return re.search(r'data-id="(video_\w+)"', tab["job"]["value"])[1]


# Words


def test_both_languages_have_all_words():
    for key, told in {**texts.TEXTS, **texts.LABELS}.items():
        assert len(told) == len(texts.LANGUAGES) and all(told), key
        assert len({frozenset(re.findall(r"{\w+}", one)) for one in told}) == 1, key
    for field in form.FIELDS:
        assert all(form.named(field, language)[0] for language in texts.LANGUAGES), field


def test_every_option_that_may_be_asked_for_is_told_in_chinese():
    """A new option gets its words, and has a field or is listed among the others."""
    no_fields = {"first_frame", "enable_tts", "tts_text", "tts_prompt_audio", "tts_prompt_text"}  # image; refused
    told = {name for name in FLAGS if is_open(name)} - no_fields
    assert texts.HELP.keys() == told
    fields = {*form.FIELDS, *form.OTHER_FLAGS, *form.POLICIES, "lora", "lora_high", "lora_low", "cache"}
    assert told <= fields


@pytest.mark.parametrize(
    "accept, language",
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("de, zh;q=0.5", "zh"),
        ("fr", "en"),
        ("", "en"),
        ("zh;q=x,en", "en"),
        ("zh-TW", "zh"),
    ],
)
def test_language_is_the_browsers(accept, language):
    assert texts.language_of(accept) == language


# Fields


MODELS = {
    task: next(iter(read_models(None, {"task": task}).values()))
    for task in ("t2v-tiny", "i2v-tiny", "vace-tiny", "s2v-tiny", "animate-tiny")
}


def two_experts(tmp_path):
    return next(iter(read_models(None, {"task": "t2v-A14B", "ckpt_dir": str(tmp_path)}).values()))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_fields_are_those_of_the_task(model):
    shown = {name for name in form.FIELDS if form.has(model, name)}
    assert {*model.kind.inputs} & {*form.FIELDS} == shown & {*form.INPUTS}
    assert {"prompt", "seed", "others", "preset"} <= shown
    assert ("size" in shown) == model.kind.asks_size


def test_what_stands_in_empty_fields_is_what_is_made(tmp_path):
    usual = form.usual(MODELS["t2v-tiny"])
    spec = MODELS["t2v-tiny"].spec.sampling
    assert usual["sample_steps"] == str(spec.steps) and usual["sample_solver"] == spec.solver
    assert usual["size"] == spec.size and usual["frame_num"] == str(spec.frame_num)
    preset = form.usual(MODELS["t2v-tiny"], "distill-4step")
    assert (preset["sample_steps"], preset["sample_solver"], preset["sample_guide_scale"]) == ("4", "euler", "1")
    experts = form.usual(two_experts(tmp_path))
    assert (experts["guidance_low"], experts["guidance_high"], experts["sample_shift"]) == ("3", "4", "12")


FILLED = {
    "prompt": "a = b\nc",
    "negative_prompt": "blur",
    "size": "64*96",
    "frame_num": "9",
    "fps": "12",
    "preset": "distill-4step",
    "sample_solver": "dpm++",
    "sample_shift": "3.5",
    "seed": "7",
    "cache_choice": "magcache",
    "mag_thresh": "0.2",
    "cache_force": True,
    "lora_name_1": "style",
    "lora_strength_1": "0.8",
    "others": "trim_first_frames = 2\nphases = steps=2,guide=3 | steps=2,guide=1",
}


def test_settings_come_back_as_they_were_given(tmp_path):
    """Values to a request, its job, and values again; also with guidance and LoRAs for each of two experts."""
    (tmp_path / "style.safetensors").write_bytes(b"")
    loras, models = Loras(str(tmp_path)), {"tiny": MODELS["t2v-tiny"], "two": two_experts(tmp_path)}
    for name, more in (
        ("tiny", {"sample_guide_scale": "4.5"}),
        ("two", {"guidance_low": "2", "guidance_high": "5.5", "lora_expert_1": "lora_high", "others": ""}),
    ):
        values = FILLED | more
        body = form.body_of(models[name], values, "en") | {"model": name}
        wanted = read_fields(body, models, loras)
        assert wanted.options["frame_num"] == "9" and wanted.options["magcache"] is True
        back = form.values_of(Job("id", name, wanted.options), models[name], loras)
        assert {field: back[field] for field in values} == values
        assert all(back[field] in ("", None, False, "lora") for field in form.FIELDS if field not in values)


@pytest.mark.parametrize(
    "asked",
    [
        {"lora": [{"name": "style", "scale": n / 10} for n in range(1, 8)]},
        {"prompts": ["a\nb", "c"]},
        {"prompts": ["a", "b"]},
        {"first_frame": "data:,"},
    ],
    ids=["more LoRAs than rows", "prompts of several lines", "prompts", "another name of a file"],
)
def test_what_the_routes_were_asked_for_comes_back_too(tmp_path, asked):
    (tmp_path / "style.safetensors").write_bytes(b"")
    loras, model = Loras(str(tmp_path)), MODELS["i2v-tiny"]
    first = read_fields({"prompt": "a", **asked}, {"i2v": model}, loras)
    assert first.sources.keys() <= {*form.FILES}
    values = form.values_of(Job("id", "i2v", first.options), model, loras)
    body = form.body_of(model, values, "en") | {"model": "i2v"}
    assert read_fields(body, {"i2v": model}, loras).options == first.options


@pytest.mark.parametrize(
    "values, told",
    [
        ({"others": "x"}, "line 1 of the other options"),
        ({"others": "\n\n= 3"}, "line 3 of the other options"),
        ({"others": "{"}, "no valid JSON object"),
        ({"others": "seed = 3", "seed": "4"}, "seed is given twice"),
        ({"others": "fps = 3\nfps = 3"}, "fps is given twice"),
        ({"others": "ckpt_dir = /x"}, "says what is loaded"),
        ({"others": "save_file = /x"}, "unknown field 'save_file'"),
        ({"lora_name_1": "none"}, "no LoRA 'none'"),
        ({"seconds": "many"}, "seconds must be a number"),
        ({"prompt": " "}, "prompt is missing"),
        ({"video": "none.mp4"}, "send it again"),
    ],
)
def test_what_is_wrong_in_a_field_is_named(values, told):
    with pytest.raises(Refused, match=told):
        body = form.body_of(MODELS["t2v-tiny"], {"prompt": "a", **values}, "en")
        read_fields(body, {"t2v-tiny": MODELS["t2v-tiny"]}, Loras(None))


def test_fields_of_another_model_count_for_nothing():
    values = {"prompt": "a", "image": "none.png", "guidance_low": "3", "fb_thresh": "1", "lora_expert_1": "lora_low"}
    assert form.body_of(MODELS["t2v-tiny"], values, "en") == {"model": "t2v-tiny", "prompt": "a"}


# Jobs


def test_a_video_is_made_shown_and_its_settings_are_used_again(server):
    tab = Tab(server)
    tab.fill(**QUICK, others="trim_first_frames = 1")
    tab.fire("run")
    assert tab.message == ""
    id = job_of(tab)
    assert server.wait(id)["seed"] == 1
    other = Tab(server)  # another browser sees it too
    assert id in other["gallery"]["value"]
    tab.tick()
    assert f'src="v1/videos/{id}/content"' in tab["result"]["value"] and tab["cancel"]["visible"] is False
    path = server.folder / "jobs" / id / "video.mp4"
    settings = read_settings(path)
    assert len(open_video(path)) == 4 and (settings["prompt"], settings["sample_steps"]) == (RED, 3)
    other.fill(prompt="something else", fps="3")
    other.fire("gallery", "select", id=id)
    other.fire("again")
    assert {name: other[name]["value"] for name in QUICK} == QUICK
    assert other["fps"]["value"] == "" and other["others"]["value"] == "trim_first_frames = 1"
    other.fire("run")
    again = job_of(other)
    server.wait(again)
    assert read_settings(server.folder / "jobs" / again / "video.mp4") == settings
    other.fire("delete")
    assert server.ask("GET", f"/v1/videos/{again}")[0] == 404 and "Deleted" in other.message


def test_a_job_that_is_made_has_previews_and_is_cancelled(server):
    tab = Tab(server)
    tab.fill(**QUICK | LONG, others="preview_every = 1")
    tab.fire("run")
    id = job_of(tab)
    tab.fill(prompt="a blue square moving up on a white background")
    tab.fire("run")
    waiting = job_of(tab)
    assert "in the queue" in tab["job"]["value"]
    tab.fire("cancel")
    assert server.ask("GET", f"/v1/videos/{waiting}")[0] == 404
    tab = Tab(server)  # loaded anew, it shows what is made
    assert job_of(tab) == id

    def seen():
        tab.tick()
        return "data:image/png" in (tab["preview"]["value"] or "") and "step" in tab["job"]["value"]

    until(seen)
    assert tab["cancel"]["visible"] is True and 'role="progressbar"' in tab["job"]["value"]
    tab.fire("cancel")
    assert "Cancelled" in tab.message and server.ask("GET", f"/v1/videos/{id}")[0] == 404
    until(lambda: server.ask("GET", "/health")[1]["busy"] == 0)


def test_what_has_not_changed_is_not_sent_again(server):
    """Or a video would begin anew with each look."""
    tab = Tab(server)
    tab.fill(**QUICK)
    tab.fire("run")
    server.wait(job_of(tab))
    tab.tick()
    _, body = tab.event(None, "tick")
    told = tab.post(body)[1]["data"]
    assert all(one["__type__"] == "update" and "value" not in one for one in told[:-1]), told


@pytest.mark.parametrize(
    "values, told",
    [
        ({"size": "100*100"}, "“Size” 100*100: t2v-tiny needs multiples of 16"),
        ({"prompt": ""}, "“Prompt” is missing"),
        ({"others": "lora = ../x"}, "no LoRA"),
        ({"frame_num": "<b>6</b>"}, "“Frames” must be a whole number"),
        ({"model": "of before"}, "of before"),
    ],
)
def test_what_cannot_be_made_is_one_line(server, values, told):
    tab, before = Tab(server), len(Tab(server).jobs)
    tab.fill(**QUICK | values)
    tab.fire("run")
    assert told in tab.message and 'role="alert"' in tab.message
    assert "<b>" not in tab.message and "Traceback" not in tab.message and str(server.folder.parent) not in tab.message
    assert len(tab.jobs) == before


@pytest.mark.parametrize(
    "values, told",
    [
        ({"frame_num": "6"}, "“帧数”: "),
        ({"fps": "x"}, "“帧率” must be "),
        ({"prompt": ""}, "“提示词” is missing"),
        ({"seed": "2", "others": "seed = 3"}, "“随机种子” 重复"),
        ({"others": "sigmas = 1,0.5"}, "“步数” '3' contradicts sigmas, which"),
        ({"others": "preview_every = x"}, "：preview_every must be"),
        ({"others": "ckpt_dir = /x"}, "：ckpt_dir says what is loaded"),
    ],
)
def test_a_refusal_names_fields_as_the_page_does(server, values, told):
    tab = Tab(server)
    tab.fill(language="zh", **QUICK | values)
    tab.fire("run")
    assert told in html.unescape(tab.message) and "--" not in tab.message


def test_a_warning_names_fields_as_the_page_does(server):
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    tab = Tab(server)
    tab.fill(prompt=RED, model="speech", image=tab.send(png()), audio=tab.send(sound.getvalue(), "a.wav"), num_clip="9")
    tab.fire("run")
    assert "“Clips” 9 is more than “Speech or song” needs" in tab["job"]["value"], tab.message
    tab.fire("cancel")


def test_models_have_their_fields_and_languages_their_words(server):
    tab = Tab(server)
    assert tab["image"]["visible"] is False and tab["run"]["value"] == "Generate"
    tab.fill(model="pictures", language="zh", cache_choice="fbcache")
    tab.fire("model", "change")
    assert tab["image"]["visible"] is True and tab["sample_steps"]["placeholder"] == "2"
    assert tab["fb_thresh"]["visible"] is True and tab["mag_K"]["visible"] is False
    tab.fire("language", "input")
    assert tab["run"]["value"] == "生成" and tab["prompt"]["label"] == "提示词"
    assert Tab(server, **{"Accept-Language": "zh-CN"})["run"]["value"] == "生成"


# Files


def test_a_file_is_sent_used_and_used_again(server):
    tab = Tab(server)
    tab.fill(**QUICK, model="pictures", image=tab.send(png()))
    tab.fire("run")
    assert tab.message == "", tab.message
    id = job_of(tab)
    server.wait(id)
    [sent] = (server.folder / "jobs" / id / "inputs").iterdir()
    assert sent.name == "image-0.png" and sent.read_bytes() == png()
    tab.fire("again")
    again = tab["image"]["value"]
    assert again["orig_name"] == "image-0.png"
    status, data, _ = server.ask("GET", f"/gradio_api/file={again['path']}")
    assert status == 200 and data == png()
    tab.fire("run")
    assert job_of(tab) != id and server.wait(job_of(tab))["status"] == "completed"


@pytest.mark.parametrize("data", [b"<!doctype html><script>alert(1)</script>", png()[:100], b"<svg/>"])
def test_files_that_are_no_pictures_are_refused(server, data):
    tab, before = Tab(server), len(Tab(server).jobs)
    sent = tab.send(data)
    status, _, headers = server.ask("GET", f"/gradio_api/file={sent['path']}")
    assert status == 200 and "script" not in headers["Content-Type"] and headers["X-Content-Type-Options"] == "nosniff"
    tab.fill(**QUICK, model="pictures", image=sent)
    tab.fire("run")
    assert re.search("image|“First frame”", tab.message) and 'role="alert"' in tab.message
    assert len(tab.jobs) == before


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://127.0.0.1:1/x.png", "{}/../jobs.db", "{}/uploads/../jobs.db", "x.png", "", 3, None]
)
def test_events_name_no_files_but_those_that_were_sent(server, path):
    tab = Tab(server)
    path = path.format(server.folder) if isinstance(path, str) else path
    file = {"path": path, "url": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    for name in ("image", "prompt"):
        tab.fill(**QUICK, model="pictures", image=None)
        tab.fill(**{name: file})
        status, told, _ = tab.post(tab.event("run", "click")[1])
        wanted = "files that were sent to it" if name == "image" else "prompt must be a text"
        assert status == 400 and wanted in told["error"]["message"]
    assert not any((server.folder / "uploads").glob("*/passwd"))


@pytest.mark.parametrize("path", ["x/a.png", "", "\0", "x" * 5000, "x/" * 5000])
def test_a_file_that_is_gone_is_asked_for_again(server, path):
    tab, before = Tab(server), said(server)
    file = {"path": f"{server.folder}/uploads/{path}", "meta": {"_type": "gradio.FileData"}}
    tab.fill(**QUICK, model="pictures", image=file)
    tab.fire("run")
    assert "First frame: the file is not here any more" in tab.message
    assert said(server) == before


@pytest.mark.parametrize("path", ["/etc/passwd", "{}/jobs.db", "{}/uploads/../jobs.db", "http://127.0.0.1:1/", "x", ""])
def test_only_what_was_sent_is_fetched(server, path):
    status, told, _ = server.ask("GET", f"/gradio_api/file={path.format(server.folder)}")
    assert status == 404 and told["error"]["message"]


def large(server, how):
    """The answer to a gigabyte for the page, and how much of it was taken."""
    host, port = urlsplit(server.url).netloc.split(":")
    start = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\n"
    start += "Content-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection((host, int(port)), 60) as to:
        if how == "said":
            to.sendall(f"{start}Content-Length: {GIGABYTE}\r\n\r\n".encode())
            return to.recv(100), 0
        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        to.sendall(f"{start}Transfer-Encoding: chunked\r\n\r\n{len(part):x}\r\n".encode() + part + b"\r\n")
        taken, block = 0, bytes(100_000)
        try:
            while taken < GIGABYTE:
                to.sendall(f"{len(block):x}\r\n".encode() + block + b"\r\n")
                taken += len(block)
        except OSError:  # the server has answered and closed
            pass
        return b"", taken


def test_a_gigabyte_is_not_taken(server):
    assert b" 413 " in large(server, "said")[0]
    assert large(server, "sent")[1] < 50_000_000
    kept = sum(path.stat().st_size for path in (server.folder / "uploads").rglob("*") if path.is_file())
    assert kept < 5_000_000
    assert server.ask("GET", "/health")[0] == 200


# Events


@pytest.mark.parametrize(
    "part, values, told",
    [
        ("fn_index", (None, "0", -1, 10**30, 1.0, True), "the number of an event"),
        ("data", (None, [], ["en"], [None] * 999, {"0": "en"}, "en"), "a list of"),
        ("session_hash", (None, 5, "", "../x", "x" * 65, []), "a text of"),
        ("event_data", (5, "id", ["id"], {"id": 5}), "an object"),
    ],
)
def test_a_part_of_an_event_that_is_wrong_is_named(server, part, values, told):
    tab = Tab(server)
    body = tab.event("run", "click")[1]
    for value in values:
        status, answer, _ = tab.post(body | {part: value})
        assert (status, answer["error"]["param"]) == (400, part) and told in answer["error"]["message"], value
    for value in ([body], 7):
        assert tab.post(value)[1]["error"]["param"] == "fn_index"
    assert server.ask("POST", "/gradio_api/run/predict", b"{}", {"Content-Type": "text/plain"})[0] == 415


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("language", 5, "language must be a text"),
        ("others", {"a": 1}, "others must be a text"),
        ("cache_choice", ["x"], "cache_choice must be a text"),
        ("cache_force", "yes", "cache_force must be true or false"),
        ("image", "x.png", "image: an event of the page names files"),
    ],
)
def test_a_field_of_a_wrong_kind_is_named(server, name, value, told):
    tab = Tab(server)
    tab.fill(**{name: value})
    status, answer, _ = tab.post(tab.event("run", "click")[1])
    assert (status, answer["error"]["param"]) == (400, name) and told in answer["error"]["message"]


DEEP = json.loads("[" * 600 + "]" * 600)
ODD = [True, 5, -1, 1e300, 10**30, float("nan"), "", "x", "\ud800", "\0", [], {}, [5], {"path": "/etc/passwd"}, DEEP]
ODD += [{"meta": 5, "path": "x"}, {"meta": {"_type": "gradio.FileData"}}, {"id": ["x"]}, {"url": "http://127.0.0.1:1/"}]
ODD += [{"language": ["zh"], "job": {}, "count": -1}, {"job": "\ud800", "path": "x", "meta": "y"}, "x" * 10_000]
MORE = ("event_id", "event_data", "batched", "simple_format", "oauth_token")


def change(body, random):
    """A part of an event, or a value of its data, is left out, added, moved or of any kind."""
    data, how = body.get("data"), random.randrange(6)
    if how == 0:
        body.pop(random.choice([*body, "data"]), None)
    elif how == 1:
        body[random.choice([*body, *MORE])] = random.choice([None, *ODD])
    elif isinstance(data, list) and data:
        odd = random.choice([None, *ODD])
        at = random.randrange(len(data))
        data[:] = (
            random.choice([data[1:], [*data, odd], data[::-1]]) if how == 2 else [*data[:at], odd, *data[at + 1 :]]
        )


def test_no_event_whatever_it_says_is_an_error_of_the_server(server):
    tab, before, random = Tab(server), said(server), Random(1)
    bodies = [tab.body(event) for event in tab.config["dependencies"]]
    for number in range(400):
        body = copy.deepcopy(bodies[number % len(bodies)])
        for _ in range(random.randint(1, 3)):
            change(body, random)
        sent = body if number % 40 else random.choice(ODD)
        status, told, _ = tab.post(sent)
        assert status == 200 or (status == 400 and "\n" not in told["error"]["message"]), (sent, told)
    assert said(server) == before


# Who may do what


def test_the_page_asks_nothing_of_others(server):
    status, page, headers = server.ask("GET", "/", headers={"Accept-Encoding": "br, gzip"})
    shown = page.decode()
    assert status == 200 and "gradio_config" in shown
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert not re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', shown)
    for path in re.findall(r'(?:src|href)="\./([^"]+)"', shown):
        assert server.ask("GET", f"/{path}")[0] == 200, path
    assert b"url(http" not in server.ask("GET", "/theme.css")[1]


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/gradio_api/proxy=https://example.com/"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/call/predict"),
        ("POST", "/gradio_api/run/generate"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/monitoring"),
        ("POST", "/login"),
        ("GET", "/nothing"),
        ("GET", "/v1/nothing"),
    ],
)
def test_no_more_of_gradio_is_reached_than_the_page_needs(server, method, path):
    status, told, _ = server.ask(method, path, {} if method == "POST" else None)
    assert status == 404 and told["error"]["message"] == "Not Found"


@pytest.mark.parametrize("headers", [{"Origin": "https://example.com"}, {"Origin": "null"}, {"Host": "example.com"}])
def test_pages_of_others_start_no_job(server, headers):
    tab = Tab(server)
    before = len(tab.jobs)
    tab.fill(**QUICK)
    tab.headers = headers
    status, told, _ = tab.post(tab.event("run", "click")[1])
    assert status == 403 and told["error"]["code"] in ("origin_refused", "host_refused")
    assert server.ask("POST", "/gradio_api/upload", b"", headers)[0] == 403
    assert server.ask("GET", "/", headers={"Host": "example.com"})[0] == 403
    own = {"Origin": server.url}
    assert "access-control-allow-origin" not in server.ask("GET", "/config", headers=own)[2]
    assert len(Tab(server).jobs) == before


def test_a_key_is_asked_for(locked):
    for path in ("/config", "/theme.css", "/assets/x.js", "/v1/videos", "/gradio_api/startup-events"):
        assert locked.ask("GET", path)[0] == 401, path
    status, page, headers = locked.ask("GET", "/", headers={"Accept-Language": "zh"})
    assert status == 401 and 'action="login"' in page.decode() and "密钥" in page.decode()
    assert "default-src 'none'" in headers["Content-Security-Policy"] and b"<script" not in page
    for wrong in (b"key=", b"key=wrong", b"", b"key=%ff%fe", b"key=a&key=b"):
        status, page, headers = locked.ask("POST", "/login", wrong, FORM)
        assert status == 401 and b"no valid key" in page and "Set-Cookie" not in headers
    status, _, headers = locked.ask("GET", "/login")
    assert (status, headers["Location"]) == (303, "./")
    assert locked.ask("POST", "/login", b"key=" + bytes(20_000), FORM)[0] == 413  # from strangers little is taken
    assert locked.ask("POST", "/logout", b"", {"Cookie": "swan=00"})[0] == 303  # of a server that was started again
    assert locked.ask("POST", "/login", f"key={KEY}".encode(), FORM | {"Origin": "https://example.com"})[0] == 403
    status, _, headers = locked.ask("POST", "/login", f"key={KEY}".encode(), FORM)
    cookie = headers["Set-Cookie"]
    assert status == 303 and "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and KEY not in cookie
    given = {"Cookie": f"other=1; {cookie.partition(';')[0]}"}
    assert locked.ask("GET", "/v1/videos", headers=given)[0] == 200
    tab = Tab(locked, **given)
    assert "logout" in str(tab.config)
    tab.headers = given | {"Origin": "https://example.com"}
    assert tab.post(tab.event("run", "click")[1])[0] == 403
    for wrong in ("swan=", "swan=00", f"swan={KEY}", "swan=zz"):
        assert locked.ask("GET", "/v1/videos", headers={"Cookie": wrong})[0] == 401
    _, _, headers = locked.ask("POST", "/logout", b"", given)
    assert 'swan=""' in headers["Set-Cookie"]


@pytest.mark.parametrize("headers", [{"Origin": "http{}"}, {"Origin": "https{}"}, {"X-Forwarded-Proto": "https"}, {}])
def test_the_cookie_is_secure_where_the_browser_came_by_https(locked, headers):
    own = locked.url.removeprefix("http")
    sent = {name: value.format(own) for name, value in headers.items()}
    status, _, answer = locked.ask("POST", "/login", f"key={KEY}".encode(), FORM | sent)
    is_secure = "https" in str(headers)
    assert status == 303 and ("secure" in answer["Set-Cookie"].lower()) == is_secure


@pytest.mark.parametrize("at", ["", "/swan"], ids=["taken off", "left"])
def test_the_page_is_where_a_proxy_has_it(locked, at):
    """Whether the proxy takes the path off or not."""
    status, page, _ = locked.ask("GET", f"{at}/")
    assert status == 401 and 'action="login"' in page.decode()
    status, _, headers = locked.ask("POST", f"{at}/login", f"key={KEY}".encode(), FORM)
    assert (status, headers["Location"]) == (303, "./")
    given = {"Cookie": headers["Set-Cookie"].partition(";")[0]}
    status, page, _ = locked.ask("GET", f"{at}/", headers=given)
    paths = re.findall(r'(?:src|href)="\./([^"]+)"', page.decode())
    for path in (*paths, "v1/videos", "v1/models", "health"):
        assert locked.ask("GET", f"{at}/{path}", headers=given)[0] in (200, 503), path
    assert paths
    tab = Tab(locked, **given)
    assert urlsplit(tab.config["root"]).path == "/swan"
    assert locked.ask("POST", f"{at}/gradio_api/run/predict", tab.event(None, "tick")[1], given)[0] == 200
    for path in ("/swans/config", "/swan/swan/config"):
        assert locked.ask("GET", path, headers=given)[0] == 404
    status, _, headers = locked.ask("GET", "/swan")
    assert (status, headers["Location"]) == (307, "/swan/")


def test_the_process_of_the_page_has_no_torch():
    code = "import sys, wan.serve.web.page; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_without_gradio_it_says_what_to_install():
    code = "import runpy, sys; sys.modules['gradio'] = None; sys.argv[1:] = ['--web']; "
    code += "runpy.run_module('wan.serve', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install swan-video[web]" in done.stderr
