"""Starts the real processes the way a user does, and looks at what they leave behind."""
import errno
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("WINTSERVE_BIN", ROOT / "build/cpu/bin"))
POET = ROOT / "models/poet"
DEVICE = os.environ.get("WINTSERVE_DEVICE", "cpu")

# Of a GPU a server takes nearly all memory by itself, so that a second one beside it would find none. The
# default is what tests/gpu/serve_check runs with.
DEVICE_FLAGS = [] if DEVICE == "cpu" else ["--num-gpu-blocks-override", 8192]

# A GPU rounds elsewhere, so that its text may part from the goldens at a near-tie and its logits differ by
# more than their tolerance; tests/accuracy says by how much they may.
compares_with_goldens = pytest.mark.skipif(DEVICE != "cpu", reason="the goldens are the CPU's")

# How long to wait for what is sure to come, on any machine. Shorter waits are claims.
PATIENCE_S = 60

PROCESS_NAMES = ("wintserve-api-server", "wintserve-engine-worker", "wintserve-cache-manager")


def is_free(port):
    """Whether a server that comes now could listen there, on every address as it does."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        return True


class Ports:
    """Ports that nobody else takes between the choice and the server's own bind.

    Not those that the kernel gives to who names none: the end of any connection, also one that lingers
    on another address of the machine (NCCL's), would take one. Each is given once, and marked for as
    long as this process lives by an abstract socket of its name, for other runs beside this one."""

    FIRST = 10000

    def __init__(self):
        first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        end = first_ephemeral if first_ephemeral > self.FIRST + 1000 else 1 << 16
        candidates = list(range(self.FIRST, end))
        begin = random.randrange(len(candidates))
        self._left = iter(candidates[begin:] + candidates[:begin])
        self._marks = []

    def take(self):
        for port in self._left:
            if self._mark(port) and is_free(port):
                return port
        raise AssertionError("no free port is left")

    def _mark(self, port):
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0wintserve-e2e-port-{port}")
        except OSError:
            mark.close()
            return False
        self._marks.append(mark)
        return True


PORTS = Ports()


def golden_cases(name="poet-wint2"):
    return json.loads((ROOT / f"tests/golden/{name}.json").read_text())["cases"]


def wait_for(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def processes_of(id):
    """{pid: name} of every live process that was started with that WINTSERVE_E2E_ID in its environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"WINTSERVE_E2E_ID={id}".encode() not in (entry / "environ").read_bytes():
                continue
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            argv0 = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        if state != "Z":
            found[int(entry.name)] = os.path.basename(argv0)
    return found


class Server:
    """`wintserve serve` on free ports with a runtime directory of its own, or that of another one before it.
    prefix: of the command, for example of a name space; log: where the output goes, by default into a file;
    terminal: a descriptor where it goes instead."""

    def __init__(self, tmp_path, *flags, model=POET, runtime=None, prefix=(), log=None, terminal=None):
        self.id = uuid.uuid4().hex
        # Not below tmp_path: the path of a socket has 107 bytes, and pytest's grows with the number of its runs.
        self.own_runtime = None if runtime else tempfile.TemporaryDirectory(prefix="ws-", ignore_cleanup_errors=True)
        self.runtime = runtime or Path(self.own_runtime.name)
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.port, self.metrics_port, self.queue_port, self.cache_port = self.ports = [PORTS.take() for _ in range(4)]
        self.log_path = log or tmp_path / f"log-{self.id[:8]}.txt"
        self.log_file = self.log_path.open("w") if terminal is None else os.fdopen(os.dup(terminal), "w")
        command = [*prefix, BIN / "wintserve", "serve", "--model", model, "--device", DEVICE, "--port", self.port,
                   "--metrics-port", self.metrics_port, "--engine-worker-queue-port", self.queue_port,
                   "--cache-queue-port", self.cache_port, *DEVICE_FLAGS, *flags]
        self.process = subprocess.Popen(
            [str(c) for c in command], cwd=ROOT, stdout=self.log_file, stderr=subprocess.STDOUT,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.runtime), "WINTSERVE_E2E_ID": self.id})

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def log(self):
        return self.log_path.read_text() if self.log_path.is_file() else ""

    def get(self, path, port=None):
        """(status, body) or (None, reason) when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.port}{path}", timeout=10) as r:
                return r.status, r.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()
        except OSError as e:
            return None, str(e)

    def metric(self, name):
        _, text = self.get("/metrics", self.metrics_port)
        values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
                  if line.split("{")[0].split(" ")[0] == name]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_ready(self, timeout_s=PATIENCE_S):
        def ready():
            assert self.process.poll() is None, f"exited with {self.process.returncode}:\n{self.log()}"
            return self.get("/health")[0] == 200
        wait_for(ready, timeout_s, "/health is 200")
        return self

    def processes(self):
        return processes_of(self.id)

    def pids_of(self, name):
        return sorted(pid for pid, found in self.processes().items() if found == name)

    def stop(self, sig=signal.SIGTERM, timeout_s=PATIENCE_S):
        if self.process.poll() is None:
            self.process.send_signal(sig)
        code = self.process.wait(timeout_s)
        self.log_file.close()
        return code

    def assert_nothing_left(self, timeout_s=20):
        # A killed process has no environment, by which it is known, before its files are closed; with a
        # GPU's memory to give back that takes it a moment.
        def left():
            return [*self.processes().items(), *(port for port in self.ports if not is_free(port))]

        deadline = time.monotonic() + timeout_s
        while found := left():
            assert time.monotonic() < deadline, f"left after {timeout_s} s: {found}"
            time.sleep(0.02)

    def assert_runtime_dir_empty(self):
        assert not list(self.runtime.rglob("*")), list(self.runtime.rglob("*"))
