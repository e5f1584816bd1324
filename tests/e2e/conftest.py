from pathlib import Path

import pytest
from openai import OpenAI

from server import DEVICE, Server


def skip_without_a_gpu_per_rank(flags):
    ranks = int(flags[flags.index("--tensor-parallel-size") + 1]) if "--tensor-parallel-size" in flags else 1
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if DEVICE == "cuda" and ranks > num_gpus:
        pytest.skip(f"{ranks} ranks need as many GPUs, there are {num_gpus}")


@pytest.fixture
def start(tmp_path):
    """start(*flags, model=…) -> Server; every server is stopped at the end of the test."""
    servers = []

    def start_one(*flags, **kwargs):
        skip_without_a_gpu_per_rank(flags)
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
