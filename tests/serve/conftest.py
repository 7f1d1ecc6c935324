import pytest

from tests.serve.servers import Server


@pytest.fixture(scope="session")
def make_server(tmp_path_factory):
    """A function that starts a server, which is stopped in the end. Give its flags."""
    made = []

    def make(*argv, **more):
        folder = tmp_path_factory.mktemp("served") / "data"
        made.append(Server(folder, *argv, **more))
        return made[-1].start()

    yield make
    for server in made:
        server.stop()
