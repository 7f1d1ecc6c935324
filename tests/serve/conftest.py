import json

import pytest

from tests.serve.servers import KEY, Server, until


@pytest.fixture(scope="session")
def make_server(tmp_path_factory):
    """A function that starts a server, which is stopped in the end. Give its flags, and what `Server` takes."""
    made = []

    def make(*argv, **more):
        folder = tmp_path_factory.mktemp("served") / "data"
        made.append(Server(folder, *argv, **more))
        return made[-1].start()

    yield make
    for server in made:
        server.stop()


@pytest.fixture(scope="session")
def server(make_server, tmp_path_factory):
    """One that anybody on this machine may ask, with two models: t2v-tiny and, as "pictures", i2v-tiny. It is started
    as users start one."""
    folder = tmp_path_factory.mktemp("models")
    models = {"t2v-tiny": {"task": "t2v-tiny"}, "pictures": {"task": "i2v-tiny", "sample_steps": 2}}
    (folder / "models.json").write_text(json.dumps(models))
    (folder / "loras").mkdir()
    return make_server("--models", folder / "models.json", "--lora_dir", folder / "loras", is_forked=False)


@pytest.fixture(scope="session")
def paged(make_server, tmp_path_factory):
    """One with the page, for this machine alone, with models of which one needs pictures, and one two files."""
    folder = tmp_path_factory.mktemp("paged")
    models = {"words": {"task": "t2v-tiny"}, "pictures": {"task": "i2v-tiny", "sample_steps": 2}}
    (folder / "models.json").write_text(json.dumps(models | {"speech": {"task": "s2v-tiny"}}))
    (folder / "loras").mkdir()
    (folder / "loras" / "stripes.safetensors").write_bytes(b"")
    flags = ("--lora_dir", folder / "loras", "--web", "--max_upload_mb", "1")
    made = make_server("--models", folder / "models.json", *flags)
    until(lambda: made.ask("GET", "/health")[0] == 200)
    return made


@pytest.fixture(scope="session")
def locked(make_server, tmp_path_factory):
    """One with the page that asks for a key, and is at /swan/ by a proxy."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys.txt").write_text(f"{KEY}\n")
    flags = ("--root_path", "/swan", "--api_key_file", folder / "keys.txt")
    return make_server("--task", "t2v-tiny", "--web", *flags)
