"""What the cases on a GPU have in common: streams long enough that something can happen to them, on a CPU shorter
ones, so that the cases themselves can be tried there."""
import functools
import json
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from faults import POEM, greedy
from fast_stream import FastStream
from server import DEVICE, ROOT, Server

# A rank of two decodes the demo model at about a thousand tokens a second on an H200.
MAX_TOKENS = 4000 if DEVICE == "cuda" else 300
FLAGS = ("--max-model-len", 8192, "--max-num-seqs", 16, "--drain-timeout", 10)
ROW_SECONDS = 75 if DEVICE == "cuda" else 200  # of one case; the campaign has its own

# Where tests/gpu has put its libraries: of the build, or of a bundle.
FAULT_LIBRARIES = Path(os.environ.get("WINTSERVE_FAULT_LIBRARIES", ROOT / "build/cuda/tests"))

only_on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="a fault of a GPU")


def long_requests(count):
    """Of different lengths: streams that began together must not all end together."""
    return [greedy(f"{i} " + POEM * (1 + i % 7), MAX_TOKENS - i * MAX_TOKENS // 40) for i in range(count)]


def prompt_requests(count):
    """Prompts of many chunks, nine tokens a poem, and few tokens of an answer."""
    return [greedy(f"{i} " + POEM * (850 if DEVICE == "cuda" else 60), 24) for i in range(count)]


@functools.cache
def _texts_without_faults():
    requests = [*long_requests(16), *prompt_requests(8)]
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory), "--tensor-parallel-size", 2, *FLAGS)
        try:
            server.wait_ready()
            streams = [FastStream(server, request) for request in requests]
            texts = [stream.text() for stream in streams]
        finally:
            server.stop()
    return {json.dumps(request): text for request, text in zip(requests, texts)}


def expected(requests):
    """The text of each on a server to which nothing happens. There is no mode to be set for that: with one number of
    ranks a text depends on nothing that runs beside it, nor on the process."""
    return [_texts_without_faults()[json.dumps(request)] for request in requests]


@pytest.fixture
def instance(request, start):
    """instance(*flags) -> Server of two ranks. The case has `seconds` of its marker `limit`, by default ROW_SECONDS;
    the end of the servers' log is kept in the directory WINTSERVE_FAULT_LOGS, if that is set."""
    servers = []

    def start_one(*flags):
        servers.append(start("--tensor-parallel-size", 2, *FLAGS, *flags))
        return servers[-1]

    def too_long(*_):
        raise TimeoutError(f"the case has taken more than {seconds} s")

    expected(long_requests(1))  # before the clock runs
    marker = request.node.get_closest_marker("limit")
    seconds = marker.kwargs["seconds"] if marker else ROW_SECONDS
    before = signal.signal(signal.SIGALRM, too_long)  # raised in the case, whatever it waits for
    signal.alarm(seconds)
    yield start_one
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    for server in servers:
        try:
            server.stop(timeout_s=20)
        except subprocess.TimeoutExpired:
            server.process.kill()  # takes the others along, so that the next case has its GPUs
            server.process.wait(10)
        keep_log(request.node.name, server)


def keep_log(case, server):
    directory = os.environ.get("WINTSERVE_FAULT_LOGS")
    if directory:
        lines = server.log().splitlines()[-400:]
        path = Path(directory) / f"{re.sub('[^a-zA-Z0-9]+', '-', case)}.log"
        path.write_text("\n".join(lines) + "\n")
