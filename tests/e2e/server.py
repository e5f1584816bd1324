"""Starts the real processes the way a user does, and looks at what they leave behind."""
import json
import os
import signal
import socket
import subprocess
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

# A GPU rounds elsewhere, so that its text may part from the goldens at a near-tie and its logits differ by
# more than their tolerance; tests/accuracy says by how much they may.
compares_with_goldens = pytest.mark.skipif(DEVICE != "cpu", reason="the goldens are the CPU's")

PROCESS_NAMES = ("wintserve-api-server", "wintserve-engine-worker", "wintserve-cache-manager")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def golden_cases(name="poet-wint2"):
    return json.loads((ROOT / f"tests/golden/{name}.json").read_text())["cases"]


def wait_for(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def is_free(port):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Server:
    """`wintserve serve` on free ports with a runtime directory of its own, or that of another one before it.
    prefix: of the command, for example of a name space; log: where the output goes, by default into a file."""

    def __init__(self, tmp_path, *flags, model=POET, runtime=None, prefix=(), log=None):
        self.id = uuid.uuid4().hex
        self.runtime = runtime or tmp_path / f"run-{self.id[:8]}"
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.port, self.metrics_port, self.queue_port, self.cache_port = (free_port() for _ in range(4))
        self.log_path = log or tmp_path / f"log-{self.id[:8]}.txt"
        self.log_file = self.log_path.open("w")
        command = [*prefix, BIN / "wintserve", "serve", "--model", model, "--device", DEVICE, "--port", self.port,
                   "--metrics-port", self.metrics_port, "--engine-worker-queue-port", self.queue_port,
                   "--cache-queue-port", self.cache_port, *flags]
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

    def wait_ready(self, timeout_s=60):
        def ready():
            assert self.process.poll() is None, f"exited with {self.process.returncode}:\n{self.log()}"
            return self.get("/health")[0] == 200
        wait_for(ready, timeout_s, "/health is 200")
        return self

    def processes(self):
        """{pid: name} of every live process of this instance, by the mark in its environment."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if f"WINTSERVE_E2E_ID={self.id}".encode() not in (entry / "environ").read_bytes():
                    continue
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                argv0 = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
            except OSError:
                continue
            if state != "Z":
                found[int(entry.name)] = os.path.basename(argv0)
        return found

    def pids_of(self, name):
        return sorted(pid for pid, found in self.processes().items() if found == name)

    def stop(self, sig=signal.SIGTERM, timeout_s=30):
        if self.process.poll() is None:
            self.process.send_signal(sig)
        code = self.process.wait(timeout_s)
        self.log_file.close()
        return code

    def assert_nothing_left(self, timeout_s=5):
        wait_for(lambda: not self.processes(), timeout_s, f"all processes gone, left: {self.processes()}")
        # A process whose first thread is gone may have others that are about to close what it held.
        for port in (self.port, self.metrics_port, self.queue_port, self.cache_port):
            wait_for(lambda port=port: is_free(port), timeout_s, f"port {port} is free")

    def assert_runtime_dir_empty(self):
        assert not list(self.runtime.rglob("*")), list(self.runtime.rglob("*"))
