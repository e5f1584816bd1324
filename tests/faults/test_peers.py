"""Peers that mean no good or just go away, and a disk that is full."""
import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from faults import (Stream, assert_nothing_is_held, cases, fault_free_texts, greedy, open_descriptors, prompts, stop_cleanly)
from server import ROOT, wait_for

CORPUS = ROOT / "tests/fuzz/corpus"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def corpus(target):
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def exchange(address, data, family=socket.AF_INET, timeout_s=5, kind=socket.SOCK_STREAM):
    """What comes back until the peer closes; b"" if it closes or says nothing."""
    with socket.socket(family, kind) as s:
        s.settimeout(timeout_s)
        s.connect(address)
        answer = b""
        try:
            s.sendall(data)
            if kind == socket.SOCK_STREAM:
                s.shutdown(socket.SHUT_WR)
            while part := s.recv(65536):
                answer += part
                if kind == socket.SOCK_SEQPACKET:
                    break
        except (OSError, TimeoutError):
            pass
        return answer


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    """An HPACK field without indexing and without Huffman."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def grpc_call(path, message, token=None):
    """The bytes of one call over HTTP/2."""
    headers = b"".join([
        literal(b":method", b"POST"), literal(b":scheme", b"http"), literal(b":path", path),
        literal(b":authority", b"x"), literal(b"content-type", b"application/grpc"), literal(b"te", b"trailers"),
        literal(b"wintserve-token", token) if token else b""])
    body = b"\x00" + struct.pack(">I", len(message)) + message
    return (HTTP2_PREFACE + frame(4, 0, 0) + frame(1, 4, 1, headers) + frame(0, 1, 1, body))


def hostile_http2():
    big = b"\xff" * 16384
    yield "not HTTP/2", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    yield "random bytes", os.urandom(65536)
    yield "preface and random bytes", HTTP2_PREFACE + os.urandom(65536)
    yield "frame of 16 MiB", HTTP2_PREFACE + frame(4, 0, 0) + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + big
    yield "headers that are no HPACK", HTTP2_PREFACE + frame(4, 0, 0) + frame(1, 4, 1, big)
    yield "settings storm", HTTP2_PREFACE + frame(4, 0, 0) * 2000
    yield "ping storm", HTTP2_PREFACE + frame(4, 0, 0) + frame(6, 0, 0, b"12345678") * 2000
    yield "reset storm", HTTP2_PREFACE + frame(4, 0, 0) + b"".join(
        frame(1, 4, 2 * i + 1, literal(b":path", b"/x")) + frame(3, 0, 2 * i + 1, b"\x00\x00\x00\x08") for i in range(500))
    yield "nothing at all", b""


CALLS = {"queue": [b"/wintserve.proto.WorkQueue/Attach"],
         "cache": [b"/wintserve.proto.Cache/Session", b"/wintserve.proto.Cache/Stats", b"/wintserve.proto.Cache/Admin",
                   b"/wintserve.proto.Cache/Watch"]}
MESSAGES = {"queue": "worker_message", "cache": "cache_session"}


def assert_still_serves(server, request, expected, processes):
    assert fault_free_texts(server, [request]) == [expected]
    assert server.get("/health")[0] == 200
    assert server.processes() == processes, "a process was replaced"


@pytest.fixture
def served(start):
    server = start("--tensor-parallel-size", 2, "--max-model-len", 1024).wait_ready()
    request = greedy("床前明月光", 32)
    (expected,) = fault_free_texts(server, [request])
    yield server, lambda processes=server.processes(): assert_still_serves(server, request, expected, processes)
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fast
@pytest.mark.fault(what="hostile HTTP clients", when="any", holds="4xx or closed, nobody else notices; I8 I9")
def test_bytes_that_are_no_requests(served, note):
    server, still_serves = served
    before = open_descriptors(server)
    inputs = [data for target in ("http_request", "api_request", "chat_text", "safetensors") for data in corpus(target)]
    for body in corpus("api_request") + [b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":' + b"9" * 100_000 + b"}",
                                         json.dumps({"prompt": "x", "max_tokens": 10**400}).encode(), b"\xff" * 1000]:
        for path in (b"/v1/completions", b"/v1/chat/completions", b"/reset_prefix_cache"):
            inputs.append(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                          b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    inputs += [b"GET /" + b"a" * 100_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000, b"\x16\x03\x01\x02\x00\x01", b"\r\n" * 1000]
    statuses = {}
    for data in inputs:
        answer = exchange(("127.0.0.1", server.port), data, timeout_s=30).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        status = answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/1.") else "closed"
        statuses[status] = statuses.get(status, 0) + 1
        assert status in ("closed", "200") or status.startswith("4") or status == "505", (status, data[:200])
    still_serves()
    wait_for(lambda: open_descriptors(server)["wintserve-api-server"] <= before["wintserve-api-server"] + 4, 10,
             "descriptors are closed")
    note(f"{len(inputs)} inputs: " + ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items())))


@pytest.mark.fault(what="hostile peers of the queues", when="any", holds="refused without a word about the instance; I8 I9")
@pytest.mark.parametrize("queue", cases(["queue", "cache"], "queue"), ids=["work queue", "cache queue"])
def test_peers_without_the_token(served, queue):
    server, still_serves = served
    name = {"queue": "work_queue.sock", "cache": "cache.sock"}[queue]
    (path,) = server.runtime.rglob(name)
    port = server.queue_port if queue == "queue" else server.cache_port
    places = [(("127.0.0.1", port), socket.AF_INET), (str(path), socket.AF_UNIX)]
    for address, family in places:
        for _, data in hostile_http2():
            exchange(address, data, family, timeout_s=1)
        for call in CALLS[queue]:
            for message in (b"", b"\xff" * 100, *corpus(MESSAGES[queue])):
                for token in (None, b"0" * 64, b"x"):
                    answer = exchange(address, grpc_call(call, message, token), family, timeout_s=0.3)
                    assert b"pool" not in answer and b"epoch" not in answer, answer
    still_serves()


@pytest.mark.fault(what="hostile peers of the Unix sockets", when="any", holds="dropped or refused; I8 I9")
@pytest.mark.parametrize("name", cases(["memory.sock", "supervisor.sock"], "supervisor.sock"))
def test_packets_without_the_token(served, name):
    server, still_serves = served
    (path,) = server.runtime.rglob(name)
    packets = corpus("memory_packet") + corpus("supervisor_packet") + [b"x", b"\0" * 60_000, os.urandom(4096)]
    for packet in packets:
        answer = exchange(str(path), packet, socket.AF_UNIX, timeout_s=3, kind=socket.SOCK_SEQPACKET)
        assert b"pool" not in answer and len(answer) < 200, answer
    # Silent ones, more than anybody's list of connections is long.
    silent = []
    for _ in range(200):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.setblocking(False)
        try:
            s.connect(str(path))
        except BlockingIOError:  # the backlog is full
            s.close()
            break
        silent.append(s)
    still_serves()
    for s in silent:
        s.close()
    still_serves()


@pytest.mark.fast
@pytest.mark.fault(what="clients leave all at once", when="streaming", holds="aborted within a second, memory and blocks come back; I2 I9")
def test_mass_disconnect(start, request, note):
    count = request.config.getoption("--disconnects")
    server = start("--max-model-len", 1024, "--max-num-seqs", 16, "--max-concurrency", count + 10,
                   "--max-queue-requests", count).wait_ready()
    (expected,) = fault_free_texts(server, [greedy("床前明月光", 32)])
    before = open_descriptors(server)
    body = json.dumps({"prompt": "床前明月光", "max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}).encode()
    message = (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
               b"Content-Length: %d\r\n\r\n" % len(body)) + body

    def open_metrics():
        return server.metric("fastdeploy:num_requests_running") + server.metric("fastdeploy:num_requests_waiting")

    async def come_and_go():
        connections = []
        for begin in range(0, count, 100):  # the listening queue holds a few hundred
            connections += await asyncio.gather(*(asyncio.open_connection("127.0.0.1", server.port)
                                                  for _ in range(min(100, count - begin))))
        for _, writer in connections:
            writer.write(message)
        await asyncio.gather(*(reader.readuntil(b"\r\n\r\n") for reader, _ in connections))
        assert open_metrics() >= 0.9 * count, "the clients are not all there"
        for _, writer in connections:
            writer.transport.abort()
        return time.monotonic()

    left = asyncio.run(come_and_go())
    wait_for(lambda: open_metrics() == 0, 10, "every request is over")
    took = time.monotonic() - left
    assert fault_free_texts(server, [greedy("床前明月光", 32)]) == [expected]
    assert_nothing_is_held(server)
    wait_for(lambda: open_descriptors(server)["wintserve-api-server"] <= before["wintserve-api-server"] + 4, 10,
             "descriptors are closed")
    note(f"{count} clients, over after {took:.2f} s")
    stop_cleanly(server)


def small_disk(tmp_path):
    """Prefix of a command whose standard output is a file on a file system of 64 KiB; None: not possible here."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f'mount -t tmpfs -o size=64k none {place} && exec "$@" > {place}/log 2>&1'
    prefix = ["unshare", "-rm", "sh", "-c", script, "sh"]
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    return (prefix, place) if probe.returncode == 0 else (None, probe.stderr.strip())


@pytest.mark.fast
@pytest.mark.fault(what="log disk full", when="from the first line", holds="I1 I7 I8 I9")
def test_log_device_is_full(start):
    server = start("--tensor-parallel-size", 2, "--log-level", "debug", log=Path("/dev/full"))
    server.wait_ready()
    requests = [greedy(prompt, 64) for prompt in prompts(4)]
    assert fault_free_texts(server, requests) == fault_free_texts(server, requests)
    assert_nothing_is_held(server)
    assert server.stop() == 0
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


@pytest.mark.fault(what="log disk full", when="streaming", holds="I1 I7 I8 I9")
def test_log_disk_fills_up(start, tmp_path):
    prefix, place = small_disk(tmp_path)
    if prefix is None:
        pytest.skip(f"no mount in a user name space: {place}")
    server = start("--tensor-parallel-size", 2, "--log-level", "debug", prefix=prefix)
    server.wait_ready()
    disk = Path(f"/proc/{server.process.pid}/root{place}")
    requests = [greedy(prompt, 64) for prompt in prompts(8)]
    expected = fault_free_texts(server, requests)

    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    # The log's last page has room yet.
    deadline = time.monotonic() + 60
    size = -1
    while (disk / "log").stat().st_size != size:
        assert time.monotonic() < deadline, "the log grows on a full disk: a test of nothing"
        size = (disk / "log").stat().st_size
        assert fault_free_texts(server, requests) == expected
    streams = [Stream(server, request) for request in requests]
    assert [stream.text() for stream in streams] == expected
    assert server.get("/health")[0] == 200
    assert_nothing_is_held(server)
    (disk / "ballast").unlink()  # someone makes room
    assert fault_free_texts(server, requests) == expected
    wait_for(lambda: (disk / "log").stat().st_size > size, 5, "the log goes on")
    assert server.stop() == 0
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


@pytest.mark.fast
@pytest.mark.fault(what="clients that never finish their request", when="any", holds="closed in time, others are served; I8 I9")
def test_half_requests(served):
    server, still_serves = served
    halves = [b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", b"GET / HT", b""]
    sockets = []
    for i in range(300):
        s = socket.create_connection(("127.0.0.1", server.port))
        s.sendall(halves[i % 3])
        sockets.append(s)
    still_serves()
    for s in sockets[::2]:
        s.close()
    still_serves()
    for s in sockets[1::2]:
        s.close()
