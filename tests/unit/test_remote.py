"""Workers on many machines, without Ray: how room is shared out, jobs given out, and files packed."""

import os
import socket
import time

import pytest

from wan.batch.jobs import Job
from wan.batch.pool import Left
from wan.errors import SwanError
from wan.options import build_load, build_sample
from wan.remote import cluster
from wan.remote.cluster import said_of, share_out
from wan.remote.luggage import pack, unpack

GPUS = {"a": {"CPU": 16, "GPU": 4}, "b": {"CPU": 16, "GPU": 3}, "head": {"CPU": 8}}
CPUS = {"a": {"CPU": 16}, "b": {"CPU": 8}}


@pytest.mark.parametrize(
    "nodes, count, ranks, on_cpu, bundles, threads, neighbours",
    [
        (GPUS, None, 1, False, [{"GPU": 1}] * 7, None, {"a": 4, "b": 3, "head": 0}),
        (GPUS, None, 2, False, [{"GPU": 2}] * 3, None, {"a": 2, "b": 1, "head": 0}),
        (GPUS, 1, 4, False, [{"GPU": 4}], None, {"a": 1, "b": 0, "head": 0}),
        (GPUS, None, 1, True, [{"CPU": 16}], 16, {"a": 1, "b": 1, "head": 0}),
        (CPUS, None, 1, False, [{"CPU": 16}], 16, {"a": 1, "b": 0}),
        (CPUS, 3, 1, False, [{"CPU": 8}] * 3, 8, {"a": 2, "b": 1}),
        (CPUS, 2, 2, False, [{"CPU": 8}] * 2, 4, {"a": 2, "b": 1}),
    ],
)
def test_room_is_shared_out(nodes, count, ranks, on_cpu, bundles, threads, neighbours):
    found = share_out(nodes, count, ranks, on_cpu)
    assert [place.bundle for place in found] == bundles
    assert {place.threads for place in found} == {threads} and found[0].neighbours == neighbours
    assert said_of(found) is None


def test_more_workers_than_there_is_room_for():
    assert said_of(share_out(CPUS, 30, 1, False)).startswith("the cluster has room for 24 of 30 workers")
    assert said_of(share_out(GPUS, 5, 2, False)).startswith("the cluster has room for 3 of 5 workers")
    with pytest.raises(SwanError, match="no machine of the cluster has 8 GPUs, which --gpus_per_job asks for"):
        share_out(GPUS, None, 8, False)
    with pytest.raises(SwanError, match="no machine of the cluster has a CPU"):
        share_out({"head": {"CPU": 0}}, None, 1, False)


def test_a_head_that_goes_is_told_of(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "_LOOK_S", 0.01)
    monkeypatch.setattr(cluster, "_AWAY_S", 0.0)
    head = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{head.getsockname()[1]}"
    with cluster.watched("the head of the cluster", address):
        head.accept()[0].close()  # it was looked at
        head.close()
        told, deadline = "", time.monotonic() + 300
        while not told.endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.01)
            told += capsys.readouterr().err
    assert told.startswith(f"warning: --ray: the head of the cluster, {address}, does not answer any more")
    assert told.count("\n") == 1


def test_a_worker_gets_what_it_has_loaded_first():
    jobs = [Job(f"{task}{at}", {"task": task}, {}) for task, count in (("a", 2), ("b", 3)) for at in range(count)]
    left, (a, b) = Left(jobs), (jobs[0].load, jobs[2].load)
    assert left.take(None, []).name == "b0"  # of which there are the most
    assert left.take(None, [b]).name == "a0"  # where nobody is
    assert left.take(b, [a]).name == "b1" and left.take(a, [b]).name == "a1"
    assert left.take(a, [b]).name == "b2" and not left  # nothing else is left
    left.put_back(jobs[4])
    assert left and left.take(a, []).name == "b2"


def test_files_lie_elsewhere_and_are_called_as_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/cat.jpg").write_bytes(b"a cat")
    (tmp_path / "dog.jpg").write_bytes(b"a dog")
    (tmp_path / "style.safetensors").write_bytes(b"loaded")
    (tmp_path / "ckpt").mkdir()
    os.symlink("in/cat.jpg", tmp_path / "link.jpg")
    options = {
        "image": "link.jpg",
        "src_ref_images": ["dog.jpg", "in/cat.jpg"],
        "audio": "gone.wav",
        "prompt": "link.jpg",
    }
    options |= {"lora": "style.safetensors:0.5", "ckpt_dir": "ckpt", "vae": "other/vae.pth", "src_root_path": "in"}
    sent, pieces = pack(options)
    assert sent == {**options, "lora": str(tmp_path / "style.safetensors:0.5"), "ckpt_dir": str(tmp_path / "ckpt")}
    assert sum(len(data) for piece in pieces for _, _, data in piece.files) == 4 * len(b"a cat")
    there = tmp_path / "there"
    moved, called, given = unpack(sent, pieces, there)
    assert os.path.basename(moved["image"]) == "link.jpg" and moved["image"].startswith(str(there))
    assert called[moved["image"]] == str(tmp_path / "in/cat.jpg") and given[moved["image"]] == "link.jpg"
    assert [open(path, "rb").read() for path in moved["src_ref_images"]] == [b"a dog", b"a cat"]
    assert os.listdir(moved["src_root_path"]) == ["cat.jpg"]
    assert called[f"{moved['src_root_path']}/cat.jpg"] == str(tmp_path / "in/cat.jpg")
    assert {flag: moved[flag] for flag in ("audio", "prompt", "vae")} == {
        flag: options[flag] for flag in ("audio", "prompt", "vae")
    }


def test_settings_name_files_as_they_are_called(tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    load = build_load({"task": "i2v-tiny"})
    request = build_sample({"image": str(tmp_path / "0.png")}, load)
    called = request.changed(called={str(tmp_path / "0.png"): "/home/me/cat.png"})
    assert called.settings()["image"] == "/home/me/cat.png"
    assert called.changed(is_private=True).settings()["image"] == "cat.png"
    assert {**called.settings(), "image": 0} == {**request.settings(), "image": 0}
