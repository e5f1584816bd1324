"""Options, servers and the record of results. `make test-faults` runs everything and writes docs/FAULTS.md."""
import json
import os
import platform
import resource
import subprocess
import time
from pathlib import Path

import gpu_cases
import pytest

from proxy import SocketProxy
from server import ROOT, Server, wait_for


def pytest_addoption(parser):
    parser.addoption("--cycles", type=int, default=100, help="start/stop cycles")
    parser.addoption("--disconnects", type=int, default=5000, help="clients that leave at once")
    parser.addoption("--kills", type=int, default=200, help="of random engine workers, at each number of ranks")
    parser.addoption("--campaign-streams", type=int, default=16, help="that run while workers are killed")
    parser.addoption("--seed", type=int, default=None, help="of what is random; printed by a case that fails")
    parser.addoption("--fault-report", type=Path, default=None, help="JSON to add the results to; see report")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(what, when, holds): a row of docs/FAULTS.md")
    config.addinivalue_line("markers", "gpu: a case for two GPUs (WINTSERVE_DEVICE=cuda); with a CPU it only tries itself")
    config.addinivalue_line("markers", "limit(seconds): of a case on a GPU")
    config.addinivalue_line("markers", "fast: part of `make test`, where each kind of fault has one case")
    config.fault_results = {}
    # Thousands of clients at once, and a mark of each port that a server has had.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    marker = item.get_closest_marker("fault")
    if marker is None:
        return
    row = item.config.fault_results.setdefault(item.nodeid.split("tests/faults/")[-1], {
        **marker.kwargs, "case": getattr(getattr(item, "callspec", None), "id", ""), "result": "passed", "seconds": 0.0})
    row["seconds"] += report.duration
    row["notes"] = [text for name, text in report.user_properties if name == "note"]
    if report.skipped and row["result"] == "passed":
        row["result"] = "skipped"
        row["notes"] = [str(report.longrepr[2]).removeprefix("Skipped: ")]
    if report.failed:
        row["result"] = "failed"


def gpus():
    """"2 x NVIDIA H200, driver 580.159.04"; empty when the tests run on the CPU."""
    if gpu_cases.DEVICE != "cuda":
        return ""
    query = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                           capture_output=True, text=True).stdout.splitlines()
    return f"{len(query)} x {query[0].replace(', ', ', driver ')}" if query else ""


def machine():
    """What the numbers were measured on."""
    model = next((line.split(": ", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0))
    commit = os.environ.get("WINTSERVE_COMMIT") or subprocess.run(  # a bundle is no repository
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {"machine": gpus() or f"{cores} cores of {model}", "commit": commit.strip(),
            "date": time.strftime("%Y-%m-%d"), "device": gpu_cases.DEVICE}


def pytest_sessionfinish(session):
    path = session.config.getoption("--fault-report")
    if path is None or not session.config.fault_results:
        return
    old = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine(), "rows": {**old["rows"], **session.config.fault_results}},
                               ensure_ascii=False, indent=1))


instance = gpu_cases.instance  # a fixture


@pytest.fixture
def note(record_property):
    """note("p50 1.2 s"): stands in the table beside the result."""
    return lambda text: record_property("note", text)


@pytest.fixture
def seed(request):
    """Of what is random in a case; shown with its failure."""
    given = request.config.getoption("--seed")
    value = time.time_ns() % (1 << 32) if given is None else given
    print(f"--seed {value}")
    return value


@pytest.fixture
def start(tmp_path):
    """start(*flags, model=…) -> Server; every server is stopped at the end of the test and leaves nothing."""
    servers = []

    def start_one(*flags, **kwargs):
        servers.append(Server(tmp_path, *flags, **kwargs))
        return servers[-1]

    yield start_one
    for server in servers:
        if server.process.poll() is None:
            server.stop()
        server.assert_nothing_left()


@pytest.fixture
def between(start):
    """between("work_queue.sock", 2) -> (server, proxy): of two ranks, ready, with everybody's connection, of which there
    are so many, through the proxy."""
    proxies = []

    def socket_of(server, name):
        found = []

        def socket_is_there():
            found[:] = server.runtime.rglob(name)
            return found
        wait_for(socket_is_there, 30, f"{name} exists")
        return found[0]

    def start_between(name, num_connections, *flags, filters=None):
        # On a busy machine somebody may have connected before the proxy was there.
        for _ in range(10):
            server = start("--tensor-parallel-size", 2, "--max-model-len", 2048, *flags)
            proxy = SocketProxy(socket_of(server, name), filters)
            proxies.append(proxy)
            server.wait_ready()
            if proxy.num_connections == num_connections:
                return server, proxy
            server.stop()
        raise AssertionError("not everybody came through the proxy: a test of nothing")

    yield start_between
    for proxy in proxies:
        proxy.close()
