"""Starts `wintserve serve` for a benchmark."""
import json
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("", 0))  # on every address, as the server does
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class RunningServer:
    """A context: the server with these flags, ready. load(...) runs the load generator on it."""

    def __init__(self, build, *flags, model="models/poet", log_level="warning", ready_seconds=60):
        self.build = Path(build).resolve()
        self.port, self.metrics_port = free_ports(2)
        self.ready_seconds = ready_seconds
        self.command = [str(self.build / "bin/wintserve"), "serve", "--model", str(model),
                        "--port", str(self.port), "--metrics-port", str(self.metrics_port),
                        "--log-level", log_level, *flags]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, cwd=ROOT)
        deadline = time.monotonic() + self.ready_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}: {self.command}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return self
            except OSError:
                time.sleep(0.05)
        self.__exit__()
        raise SystemExit(f"the server was not ready within {self.ready_seconds} s")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(90)

    def load(self, *arguments):
        result = self.build / "load_generator.json"
        subprocess.run([self.build / "bench/load_generator", "--port", str(self.port),
                        "--metrics-port", str(self.metrics_port), "--json", result,
                        *map(str, arguments)], cwd=ROOT, check=True)
        return json.loads(result.read_text())

    def metrics(self):
        """{name: value}, labelled samples added up."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        values = {}
        for line in urllib.request.urlopen(url, timeout=30).read().decode().splitlines():
            if line and line[0] != "#":
                name = line.split("{")[0].split(" ")[0]
                values[name] = values.get(name, 0) + float(line.rsplit(" ", 1)[1])
        return values

    def process_ids(self):
        """{pid: name} of the launcher and its children."""
        found = {self.process.pid: "wintserve"}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except OSError:
                continue
            name, rest = text[text.index("(") + 1:].rsplit(") ", 1)
            if int(rest.split()[1]) == self.process.pid:
                found[int(stat.parent.name)] = name
        return found


def commit():
    """What is measured: the checkout's commit, and whether something differs from it."""
    git = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
