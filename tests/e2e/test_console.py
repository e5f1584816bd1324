"""What a terminal shows of a model that loads, and what everything else gets."""
import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import tempfile
import termios
import threading
import time
import uuid

import pytest

from made_model import write_model
from server import BIN, DEVICE, ROOT, processes_of

COLUMNS = 100
LAYERS = 6
LINE = re.compile(rb"^loading: \d+\.\d of \d+\.\d [MG]iB \(\d+%\)(, .*)?$", re.MULTILINE)

# What slows loading down is of no use for memory that a GPU fills at its own speed.
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the model is too small for a bar")


def write_empty_model(directory, layers=LAYERS):
    """A model of 100 MiB a layer whose weights are all zero: a file with nothing on the disk."""
    write_model(directory, lambda name, shape: None, layers=layers, hidden=1024, width=1024, experts=16)
    return directory


def load_slowly(id, until, timeout_s=60):
    """Lets the engine workers run a twentieth of the time until something has been shown, so that they load for long
    enough on any machine. id: of their processes; until: says what has been shown, empty at first."""
    deadline = time.monotonic() + timeout_s
    while not until():
        workers = [pid for pid, name in processes_of(id).items() if name == "wintserve-engine-worker"]
        for how, pause_s in ((signal.SIGSTOP, 0.4), (signal.SIGCONT, 0.02)):
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
            time.sleep(pause_s if workers else 0.01)
        assert time.monotonic() < deadline, f"not shown within {timeout_s} s"


class Terminal:
    """A terminal, and all that was written to it."""

    def __init__(self):
        self.master, self.fd = os.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self.bytes = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        try:
            while data := os.read(self.master, 65536):
                self.bytes += data
        except OSError:  # nobody has the other end any more
            pass

    def close(self):
        """All of it, once everybody who writes has gone."""
        os.close(self.fd)
        self._reader.join(10)
        os.close(self.master)
        return self.bytes


def screen(data):
    """The lines that a terminal shows of it, where each is as long as it is written."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\x1b|.", data.decode(), re.DOTALL):
        if token == "\n":
            lines.append("")
        elif token == "\r":
            column = 0
        elif token == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif token.startswith("\x1b"):
            assert re.fullmatch(r"\x1b\[[0-9;]*m", token), token
        else:
            lines[-1] = lines[-1][:column] + token + lines[-1][column + 1:]
            column += 1
    return lines


def percentages(written, label="loading"):
    """Those of the bars in what a terminal got."""
    bar = re.compile(rf"{label} ━*╸?─*  +(\d+)%  \d+\.\d/\d+\.\d [MG]iB(  [\d a-z]+ left  [\d.]+ [MG]iB/s)?")
    rows = [row.decode(errors="replace") for row in re.findall(rb"\r(loading [^\r\n\x1b]*)\x1b\[K", written)]
    assert all(len(row) < COLUMNS for row in rows), rows
    return [int(match[1]) for match in map(bar.fullmatch, rows) if match]


def moves(terminal, label="loading"):
    """Whether its bar has."""
    return len(set(percentages(terminal.bytes, label))) > 1


def assert_a_bar_came_and_went(written, label="loading"):
    shares = percentages(written, label)
    assert shares == sorted(shares) and len(set(shares)) > 1, shares
    assert not any("loading" in line for line in screen(written)), screen(written)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


@pytest.mark.parametrize("ranks, load_format", [(1, "auto"), (2, "auto"), (1, "dummy"), (2, "dummy")])
def test_a_terminal_shows_a_bar_while_the_model_loads(start, tmp_path, bars, ranks, load_format):
    terminal = Terminal()
    model = write_empty_model(tmp_path / "model", LAYERS * ranks)
    server = start("--tensor-parallel-size", ranks, "--max-model-len", 512, "--cpu-threads", 1, "--load-format",
                   load_format, "--log-dir", tmp_path / "log", model=model, terminal=terminal.fd)
    label = "loading" if ranks == 1 else "loading 2 ranks"
    load_slowly(server.id, lambda: moves(terminal, label))
    server.wait_ready()
    assert server.stop() == 0
    written = terminal.close()
    assert_a_bar_came_and_went(written, label)
    shown = screen(written)
    assert all(re.match(r"(\[[a-z_.0-9]+\] )?(INFO|WARNING) ", line) for line in shown[:-1]), shown
    assert shown[-1] == ""
    for file in (tmp_path / "log").iterdir():
        assert b"\x1b" not in file.read_bytes(), file


@pytest.mark.parametrize("how, load_format", [("file", "auto"), ("file", "dummy"), ("dumb terminal", "auto")])
def test_where_no_row_can_be_drawn_there_are_lines_and_no_escape_sequence(start, tmp_path, monkeypatch, how,
                                                                          load_format):
    monkeypatch.setenv("TERM", "xterm-256color" if how == "file" else "dumb")
    terminal = Terminal()
    server = start("--max-model-len", 512, "--cpu-threads", 1, "--load-format", load_format,
                   model=write_empty_model(tmp_path / "model"), terminal=terminal.fd if how != "file" else None)

    def written():
        return terminal.bytes if how != "file" else server.log_path.read_bytes()

    load_slowly(server.id, lambda: b" engine_worker.0: loading: " in written())
    server.wait_ready()
    assert server.stop() == 0
    terminal.close()
    assert b"Application startup complete." in written()
    assert b"\x1b" not in written() and b"\r" not in written().replace(b"\r\n", b"\n")
    assert "━".encode() not in written() and b"###" not in written()


class Command:
    """`wintserve ARGUMENTS`, each of whose output streams goes to a file or to the terminal that it controls, where who
    is in the background may not write."""

    def __init__(self, tmp_path, arguments, stdout, stderr):
        self.id = uuid.uuid4().hex
        self.terminal = Terminal()
        modes = termios.tcgetattr(self.terminal.fd)
        modes[3] |= termios.TOSTOP
        termios.tcsetattr(self.terminal.fd, termios.TCSANOW, modes)
        self.files = {name: tmp_path / f"{name}.txt" for name in ("stdout", "stderr")}
        self._runtime = tempfile.TemporaryDirectory(prefix="ws-", ignore_cleanup_errors=True)
        with contextlib.ExitStack() as opened:
            streams = {"stdout": stdout, "stderr": stderr}
            for name, where in streams.items():
                file = self.files[name]
                streams[name] = self.terminal.fd if where == "terminal" else opened.enter_context(file.open("wb"))
            self.process = subprocess.Popen(
                [str(word) for word in (BIN / "wintserve", *arguments)], cwd=ROOT, stdin=self.terminal.fd, **streams,
                env={**os.environ, "XDG_RUNTIME_DIR": self._runtime.name, "WINTSERVE_E2E_ID": self.id},
                start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    def file(self, name):
        """What has come there."""
        return self.files[name].read_bytes() if self.files[name].exists() else b""

    def has_shown_loading(self, stderr):
        assert self.process.poll() is None, (self.process.returncode, self.terminal.bytes, self.file("stderr"))
        return moves(self.terminal) if stderr == "terminal" else LINE.search(self.file("stderr"))

    def end(self):
        """What the terminal, stdout's and stderr's files have got."""
        assert self.process.wait(60) == 0, (self.terminal.bytes, self.file("stderr"))
        return self.terminal.close(), self.file("stdout"), self.file("stderr")


@pytest.fixture
def run(tmp_path, bars):
    """run(*arguments, stdout=…, stderr=…) -> Command, which has ended at the end of the test."""
    commands = []

    def run_one(*arguments, stdout, stderr):
        commands.append(Command(tmp_path, arguments, stdout, stderr))
        return commands[-1]

    yield run_one
    for command in commands:
        command.process.kill()
        command.process.wait()


@pytest.mark.parametrize("stdout, stderr, load_format",
                         [("terminal", "terminal", "auto"), ("file", "terminal", "auto"), ("terminal", "file", "auto"),
                          ("file", "file", "dummy")])
def test_generate_shows_loading_on_stderr_and_the_answer_on_stdout(run, tmp_path, stdout, stderr, load_format):
    command = run("generate", "--model", write_empty_model(tmp_path / "model"), "--load-format", load_format,
                  "--cpu-threads", 1, "--prompt", "月", "--max-tokens", 5, "--print-ids", stdout=stdout, stderr=stderr)
    load_slowly(command.id, lambda: command.has_shown_loading(stderr))
    terminal, out, err = command.end()
    answer = terminal if stdout == "terminal" else out
    if stderr == "terminal":
        assert_a_bar_came_and_went(terminal)
        answer = "\n".join(screen(answer)).encode()
    else:
        assert all(LINE.fullmatch(line) for line in err.splitlines()), err
    assert re.fullmatch(rb"\d+( \d+){4}\r?\n", answer), answer
    if "terminal" not in (stdout, stderr):
        assert terminal == b""


@pytest.mark.parametrize("stderr", ["terminal", "file"])
def test_eval_shows_how_far_the_server_that_it_starts_has_loaded(run, tmp_path, stderr):
    (tmp_path / "text.txt").write_text("the moon is bright " * 20)
    command = run("eval", "--model", write_empty_model(tmp_path / "model"), "--perplexity", tmp_path / "text.txt",
                  "--context-tokens", 64, "--server-log", tmp_path / "log.txt", "--", "--max-model-len", 512,
                  "--cpu-threads", 1, stdout="file", stderr=stderr)
    load_slowly(command.id, lambda: command.has_shown_loading(stderr))
    terminal, out, err = command.end()
    if stderr == "terminal":
        assert_a_bar_came_and_went(terminal)
        assert screen(terminal) == [""]
    else:
        assert b"\x1b" not in err and terminal == b""
    assert b"perplexity" in out and b"loading" not in out
    assert b"Application startup complete." in (tmp_path / "log.txt").read_bytes()
