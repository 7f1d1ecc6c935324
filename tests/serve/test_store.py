"""Jobs in rows and folders, without a server."""

import time

import pytest

from wan.errors import SwanError
from wan.serve.store import Job, KeyTaken, NotWritten, Store

FACTS = {"frames": 1, "fps": 8, "width": 64, "height": 64}


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "data")
    yield made
    made.close()


def add(store, key=None, digest=""):
    id, folder = store.new_folder()
    (folder / "image-0.png").write_bytes(b"x" * 100)
    job = Job(id, "t2v-tiny", {"prompt": "a"}, {"image": "image-0.png"}, FACTS, key=key, digest=digest)
    return store.add(job)


def finish(store, job):
    (store.folder_of(job.id) / "video.mp4").write_bytes(b"v" * 900)
    return store.finish(job.id, "video.mp4", {"seconds": {}})


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path):
    store = Store(tmp_path / "d")
    id, _ = store.new_folder()
    store.add(Job(id, "m", {}))
    [(pages,)] = store._rows.execute("PRAGMA page_count")
    store._rows.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(NotWritten, match="cannot be written"):
        for _ in range(1000):
            other, _ = store.new_folder()
            store.add(Job(other, "m", {"prompt": "a" * 1000}))
    assert store.get(id).state == "queued"
    store._rows.execute("PRAGMA max_page_count=1000000")
    store.start(store.get(id))
    assert store.finish(id, "video.mp4", {}).state == "completed"


def test_order_and_pages(store):
    jobs = [add(store) for _ in range(5)]
    assert [one.id for one in store.page(None, 10, "desc")] == [one.id for one in reversed(jobs)]
    assert [one.id for one in store.page(jobs[1].id, 2, "asc")] == [jobs[2].id, jobs[3].id]
    assert [one.id for one in store.page(jobs[1].id, 10, "desc")] == [jobs[0].id]
    with pytest.raises(KeyError):
        store.page("video_none", 10, "asc")
    store.start(jobs[0])
    assert store.first_queued().id == jobs[1].id
    store.queue_again(jobs[0].id)
    assert store.first_queued().id == jobs[0].id and store.count("queued", before=jobs[3].number) == 3


def test_another_start_finds_all_and_queues_what_ran(tmp_path, store):
    done, ran, waits, lost = (add(store) for _ in range(4))
    for job in (done, ran, lost):
        store.start(job)
    finish(store, done), finish(store, lost)
    (store.folder_of(lost.id) / "video.mp4").unlink()
    _, orphan = store.new_folder()  # of a request that was not accepted yet
    gone = add(store)
    store.delete(gone.id)  # and whose files were not removed yet
    other = tmp_path / "data/jobs/my holidays"
    other.mkdir()
    store.close()
    again = Store(tmp_path / "data")
    states = {job.id: job.state for job in again.page(None, 10, "asc")}
    assert states == {done.id: "completed", ran.id: "queued", waits.id: "queued", lost.id: "failed"}
    assert again.result(again.get(done.id)).read_bytes() == b"v" * 900
    assert other.exists() and not orphan.exists() and not again.folder_of(gone.id).exists()
    assert again.options(again.get(ran.id))["image"] == str(again.folder_of(ran.id) / "inputs/image-0.png")
    again.close()
    store.__init__(tmp_path / "data")


def test_one_server_at_a_time(tmp_path, store):
    with pytest.raises(SwanError, match="another server uses"):
        Store(tmp_path / "data")


def test_an_idempotency_key_is_of_one_job(store):
    job = add(store, key="k", digest="d")
    with pytest.raises(KeyTaken) as caught:
        add(store, key="k", digest="e")
    assert caught.value.job.id == job.id and caught.value.job.digest == "d"


def test_the_oldest_that_are_over_are_outdated(store):
    first, second, third, waits = (add(store) for _ in range(4))
    for job in (second, first, third):
        finish(store, job)
        time.sleep(0.01)
    assert store.total_bytes() == 4 * 100 + 3 * 900
    assert store.outdated(None, None) == []
    assert store.outdated(None, 2200) == [second.id]
    assert store.outdated(time.time() + 1, None) == [second.id, first.id, third.id]


def test_what_ended_is_not_started_by_a_late_end(store):
    job = add(store)
    store.start(job)
    store.delete(job.id)
    assert finish_gone(store, job) is None and store.fail(job.id, "a", "b") is None


def finish_gone(store, job):
    return store.finish(job.id, "video.mp4", {})
