"""Who may ask and for how much; what strangers send."""

import base64
import io
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.serve.servers import KEY, RED, REPO, until
from wan.command import run_command
from wan.serve.__main__ import main as serve

LONG = {"num_frames": 33, "num_inference_steps": 900}  # is cancelled, or the test ends first
GIGABYTE = 1_000_000_000


@pytest.fixture(scope="module")
def server(make_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    (folder / "keys.txt").write_text(f"# of the tests\n{KEY}\nanother-key-of-some-length\n")
    (folder / "models.yaml").write_text("i2v: {task: i2v-tiny}\nt2v: {task: t2v-tiny}\n")
    flags = (
        "--api_key_file",
        folder / "keys.txt",
        "--max_upload_mb",
        "1",
        "--max_queue",
        "2",
        "--allow_urls",
        "--max_hours",
        "0.2",  # far from what is asked for below, on slow machines and on quick ones
    )
    made = make_server("--models", folder / "models.yaml", "--ram_gb", "2", *flags, key=KEY)
    until(lambda: made.ask("GET", "/health")[0] == 200)
    return made


def url_of(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width=64, height=64):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, format="PNG")
    return file.getvalue()


def bomb():
    """A PNG of few bytes that claims 900 million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a", bytes(10_000_000))
    return file.getvalue()


def form(*parts):
    """(body, headers) of a form; a part: (its header's parameters, what it holds)."""
    body = b"".join(
        b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + data + b"\r\n"
        for head, data in parts
    )
    return body + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize("header", [None, "", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer é"])
@pytest.mark.parametrize("path", ["/v1/videos", "/metrics", "/openapi.json", "/v1/tasks/"])
def test_nothing_without_a_key(server, header, path):
    server.headers = {} if header is None else {"Authorization": header.encode().decode("latin-1")}
    try:
        status, told, headers = server.ask("GET", path)
        assert (status, told["error"]["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert server.ask("GET", "/health")[0] == 200
    finally:
        server.headers = {"Authorization": f"Bearer {KEY}"}


def test_any_of_the_keys(server):
    assert server.ask("GET", "/v1/videos", headers={"Authorization": "bearer another-key-of-some-length"})[0] == 200


@pytest.mark.parametrize(
    "data, told",
    [
        (b"<!doctype html><html><script>alert(1)</script></html>", "no picture of a format"),
        (zipped(), "no picture of a format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a format"),
        (bomb(), "pixels"),
        (png()[:100], "cannot read image image-0.png"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 500, "cannot read image image-0.png"),
        (b"", "no picture of a format"),
    ],
)
def test_inputs_that_are_no_pictures(server, data, told):
    assert told in server.refused(input_reference=url_of(data))["message"]
    body, headers = form(('name="prompt"', b"a"), ('name="input_reference"; filename="cat.png"', data))
    status, answer, _ = server.ask("POST", "/v1/videos", body, headers)
    assert status == 400 and told in answer["error"]["message"]
    nothing_is_there(server)


def nothing_is_there(server):
    jobs = server.ask("GET", "/v1/videos?limit=100")[1]["data"]
    until(lambda: len(list((server.folder / "jobs").iterdir())) == len(jobs))


@pytest.mark.parametrize("name", ["../../../../tmp/x.png", "/etc/passwd", "..\\..\\x.png", "a\0b.png", "é" * 300, ".."])
def test_names_of_files_are_not_used(server, name):
    head = f'name="input_reference"; filename="{name}"'
    body, headers = form(('name="prompt"', "ein Würfel 🎲".encode()), ('name="num_frames"', b"5"), (head, png()))
    status, job, _ = server.ask("POST", "/v1/videos", body, headers)
    if status == 200:
        assert job["prompt"] == "ein Würfel 🎲"
        [inputs] = (server.folder / "jobs" / job["id"]).iterdir()
        assert [path.name for path in inputs.iterdir()] == ["image-0.png"]
        assert server.ask("DELETE", f"/v1/videos/{job['id']}")[0] == 200
    else:
        assert status == 400
    nothing_is_there(server)


@pytest.mark.parametrize("id", ["..", "..%2f..%2fjobs.db", "%2e%2e", "video_' OR 1=1 --", "a" * 5000, "%00", "ü"])
@pytest.mark.parametrize("end", ["", "/content", "/events"])
def test_ids_are_no_paths(server, id, end):
    status, told, _ = server.ask("GET", f"/v1/videos/{id.replace(' ', '%20').replace('ü', '%C3%BC')}{end}")
    assert status == 404 and told["error"]["message"]


@pytest.mark.parametrize(
    "body, kind, status",
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'"a"', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "a", "seed": 1e999}', "application/json", 400),
        (b'{"prompt": "a", "seed": 99999999999999999999999999}', "application/json", 400),
        (b'{"prompt": ["a"]}', "application/json", 400),
        (b"", "application/json", 400),
        (b"--x", "multipart/form-data", 400),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x", 400),
        (b"prompt=a", "text/plain", 415),
        (b"<a/>", "application/xml", 415),
    ],
)
def test_bodies_that_are_wrong(server, body, kind, status):
    got, told, _ = server.ask("POST", "/v1/videos", body, {"Content-Type": kind})
    assert (got, set(told)) == (status, {"error"}), told
    nothing_is_there(server)


@pytest.mark.parametrize("query", ["limit=-1", "limit=x", "order=up", "after=video_none", "limit=1e9"])
def test_lists_of_wrong_places(server, query):
    assert server.ask("GET", f"/v1/videos?{query}")[0] == 400


def test_a_gigabyte_is_not_taken(server):
    """By what it says of itself, and by what comes."""
    host, port = urlsplit(server.url).netloc.split(":")
    start = f"POST /v1/videos HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    start += "Content-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection((host, int(port)), 60) as said:
        said.sendall(f"{start}Content-Length: {GIGABYTE}\r\n\r\n".encode())
        assert b" 413 " in said.recv(100)
    with socket.create_connection((host, int(port)), 60) as sent:
        sent.sendall(f"{start}Transfer-Encoding: chunked\r\n\r\n".encode())
        block = bytes(100_000)
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        sent.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        taken = 0
        try:
            while taken < GIGABYTE:
                sent.sendall(f"{len(block):x}\r\n".encode() + block + b"\r\n")
                taken += len(block)
        except OSError:  # the server has answered and closed
            pass
        assert taken < 50_000_000  # a few buffers of the system's beyond the limit
    nothing_is_there(server)


def test_too_large_a_video_is_refused_with_what_would_fit(server):
    told = server.refused(model="t2v", size="1280x704", num_frames=401)["message"]
    assert "2.0 GB" in told and "it fits with --" in told and ("--size" in told or "--frame_num" in told)
    for flag in ("--dtype", "--offload", "--gguf", "python -m"):  # not for a client to say
        assert flag not in told
    told = server.refused(model="t2v", size="512x512", num_frames=17, num_inference_steps=1000)["message"]
    assert "would take about" in told and "are allowed" in told
    assert "--frame_num" in server.refused(model="t2v", frame_num=6)["message"]
    assert "nearest is" in server.refused(model="t2v", size="100x100")["message"]


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:{port}/health", "http://[::1]/", "http://169.254.169.254/latest", "http://localhost:{port}/"],
)
def test_urls_of_this_machine_are_not_fetched(server, url):
    url = url.format(port=urlsplit(server.url).port)
    told = server.refused(input_reference={"image_url": url})
    assert told["code"] == "url_refused" and told["param"] == "image"


def test_the_queue_is_limited_and_a_cancelled_job_makes_room(server):
    running = server.post(model="t2v", **LONG)
    server.wait(running["id"], "in_progress")
    waiting = [server.post(model="t2v", **LONG) for _ in range(2)]
    assert [server.wait(one["id"], "queued")["queue_position"] for one in waiting] == [0, 1]
    status, told, headers = server.ask("POST", "/v1/videos", {"prompt": RED, "model": "t2v"})
    assert (status, told["error"]["type"], told["error"]["code"]) == (429, "rate_limit_error", "queue_full")
    assert int(headers["Retry-After"]) >= 1

    folder = server.folder / "jobs" / running["id"]
    until(lambda: server.ask("GET", f"/v1/videos/{running['id']}")[1].get("stage") == "denoise")
    assert server.ask("DELETE", f"/v1/videos/{running['id']}")[1]["deleted"]
    assert server.ask("GET", f"/v1/videos/{running['id']}")[0] == 404
    server.wait(waiting[0]["id"], "in_progress")  # hundreds of steps earlier than it would have been
    until(lambda: not folder.exists())
    for one in (waiting[1], waiting[0]):
        assert server.ask("DELETE", f"/v1/videos/{one['id']}")[0] == 200
    until(lambda: server.ask("GET", "/health")[1]["busy"] == 0)
    nothing_is_there(server)
    assert server.wait(server.post(model="t2v")["id"])["status"] == "completed"


def test_an_idempotency_key_makes_one_job(server):
    fields = {"prompt": RED, "model": "t2v", "num_frames": 1, "num_inference_steps": 1}
    first, again = (server.ask("POST", "/v1/videos", fields, {"Idempotency-Key": "k1"}) for _ in range(2))
    assert first[0] == again[0] == 200 and first[1]["id"] == again[1]["id"]
    assert (
        server.refused(status=422, headers={"Idempotency-Key": "k1"}, model="t2v")["code"] == "idempotency_key_reused"
    )
    assert server.refused(headers={"Idempotency-Key": "k" * 300})["param"] == "Idempotency-Key"
    server.wait(first[1]["id"])


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--host", "0.0.0.0"], "can be reached by others: give --api_key_file"),
        (["--host", "::"], "can be reached by others"),
        (["--port", "99999"], "--port must be a whole number"),
        (["--port", "1", "--host", "203.0.113.7", "--api_key_file", "keys.txt"], "cannot listen at 203.0.113.7"),
        (["--api_key_file", "short.txt"], "must have keys of at least 16 letters"),
        (["--api_key_file", "none.txt"], "no such file"),
        (["--max_queue", "0"], "--max_queue must be a whole number"),
        (["--keep_gb", "-1"], "--keep_gb must be a number above 0"),
        (["--lora_dir", "none"], "--lora_dir: no folder none"),
        (["--models", "none.json"], "--models: no file none.json"),
        (["--models", "models.json"], "a: unknown option tusk"),
        (["--task", "t2v-14B"], "t2v-14B needs --ckpt_dir"),
        (["--pages"], "unrecognized arguments: --pages"),
        (["--root_path", "/a"], "--root_path is of --web"),
        (["--web", "--root_path", "a"], "--root_path is of --web"),
    ],
)
def test_wrong_arguments_are_one_line(argv, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.txt").write_text(KEY)
    (tmp_path / "short.txt").write_text("key")
    (tmp_path / "models.json").write_text('{"a": {"tusk": "t2v-tiny"}}')
    assert run_command(lambda: serve(["--port", "0", *argv])) in (1, 2)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_without_its_packages_it_says_what_to_install(tmp_path):
    code = "import runpy, sys; sys.modules['uvicorn'] = None; sys.argv[1:] = []; "
    code += "runpy.run_module('wan.serve', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install swan-video[serve]" in done.stderr
