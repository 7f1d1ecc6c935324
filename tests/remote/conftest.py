import pytest

from tests.serve.conftest import make_server, server  # noqa: F401


@pytest.fixture(scope="session")
def cluster():
    """One Ray for all tests."""
    from tests.remote.clusters import Cluster

    made = Cluster()
    yield made
    made.stop()
