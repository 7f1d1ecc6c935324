import json

import pytest

from tests.serve.servers import Server


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
