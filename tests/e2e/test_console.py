"""What a terminal shows of a server that loads, and what everything else gets."""
import fcntl
import os
import re
import struct
import termios
import threading

import pytest

from made_model import write_model
from server import DEVICE

COLUMNS = 100

# The model has to take a good part of a second, which is more than it takes a GPU's machine.
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the model is too small for a bar")


def write_empty_model(directory, layers=4):
    """A model of 100 MiB a layer whose weights are all zero: a file with nothing on the disk, which takes time to
    load: an idle core needs a quarter of a second a layer."""
    write_model(directory, lambda name, shape: None, layers=layers, hidden=1024, width=1024, experts=16)
    return directory


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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_shows_a_bar_while_the_model_loads(start, tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    terminal = Terminal()
    server = start("--tensor-parallel-size", ranks, "--max-model-len", 512, "--cpu-threads", 1, "--log-dir",
                   tmp_path / "log", model=write_empty_model(tmp_path / "model", 8 * ranks), terminal=terminal.fd)
    server.wait_ready()
    assert server.stop() == 0
    written = terminal.close()
    rows = [row.decode() for row in re.findall(rb"\r(loading [^\r\n\x1b]*)\x1b\[K", written)]
    label = "loading" if ranks == 1 else "loading 2 ranks"
    bar = re.compile(rf"{label} ━*╸?─*  +(\d+)%  \d+\.\d/\d+\.\d [MG]iB(  \d+ s left  [\d.]+ [MG]iB/s)?")
    matches = [match for match in map(bar.fullmatch, rows) if match]
    assert matches, written
    assert all(len(row) < COLUMNS for row in rows)
    percentages = [int(match[1]) for match in matches]
    assert percentages == sorted(percentages) and percentages[-1] > percentages[0], percentages
    shown = screen(written)
    assert not any("loading" in line for line in shown), shown
    assert all(re.match(r"(\[[a-z_.0-9]+\] )?(INFO|WARNING) ", line) for line in shown[:-1]), shown
    assert shown[-1] == ""
    for file in (tmp_path / "log").iterdir():
        assert b"\x1b" not in file.read_bytes(), file


@pytest.mark.parametrize("how", ["file", "dumb terminal"])
def test_where_no_row_can_be_drawn_there_is_no_escape_sequence(start, tmp_path, monkeypatch, how):
    monkeypatch.setenv("TERM", "xterm-256color" if how == "file" else "dumb")
    terminal = Terminal()
    server = start("--max-model-len", 512, "--cpu-threads", 1, model=write_empty_model(tmp_path / "model"),
                   terminal=terminal.fd if how != "file" else None)
    server.wait_ready()
    assert server.stop() == 0
    written = terminal.close() if how != "file" else server.log_path.read_bytes()
    assert b"Application startup complete." in written
    assert b"\x1b" not in written and b"\r" not in written.replace(b"\r\n", b"\n")
    assert "━".encode() not in written and b"###" not in written
