import pytest
from openai import OpenAI

from server import Server


@pytest.fixture
def start(tmp_path):
    """start(*flags, model=…) -> Server; every server is stopped at the end of the test."""
    servers = []

    def start_one(*flags, **kwargs):
        servers.append(Server(tmp_path, *flags, **kwargs))
        return servers[-1]

    yield start_one
    for server in servers:
        if server.process.poll() is None:
            server.stop()
        server.assert_nothing_left()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One ready TP1 server for the tests of a module."""
    one = Server(tmp_path_factory.mktemp("server"), "--max-model-len", "2048", "--max-num-seqs", "64")
    one.wait_ready()
    yield one
    assert one.stop() == 0, one.log()
    one.assert_nothing_left()
    one.assert_runtime_dir_empty()


@pytest.fixture
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY_API_KEY", max_retries=0)
