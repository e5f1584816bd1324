"""Start, stop, and the death of every process: what a supervisor and an operator see."""
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server import BIN, PATIENCE_S, POET, PROCESS_NAMES, ROOT, wait_for


def run_serve(*flags):
    return subprocess.run([str(BIN / "wintserve"), "serve", *map(str, flags)], cwd=ROOT,
                          capture_output=True, text=True, timeout=30)


NOT_READY = (r"The server is not ready: (waiting for engine workers: 0 of 1 connected"
             r"|waiting for the cache manager( to create the KV pool)?"
             r"|engine worker 0 is warming up)")


def test_health_is_503_with_a_reason_and_then_200(start):
    server = start()
    seen = []

    def ready():
        seen.append(server.get("/health"))
        return seen[-1][0] == 200
    wait_for(ready, PATIENCE_S, "/health is 200")
    reasons = [json.loads(body)["error"]["message"] for status, body in seen if status == 503]
    assert reasons and all(re.fullmatch(NOT_READY, reason) for reason in reasons), seen
    assert {status for status, _ in seen} <= {503, 200, None}
    assert server.get("/live")[0] == 200


def test_start_up_lines_of_the_documentation(start):
    server = start().wait_ready()
    for line in (f"Launching metrics service at http://0.0.0.0:{server.metrics_port}/metrics",
                 f"Launching chat completion service at http://0.0.0.0:{server.port}/v1/chat/completions",
                 f"Launching completion service at http://0.0.0.0:{server.port}/v1/completions"):
        assert line in server.log()
    wait_for(lambda: "Application startup complete." in server.log(), PATIENCE_S, "the last line")


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing_behind_and_exits_0(start, sig):
    server = start("--tensor-parallel-size", 2).wait_ready()
    assert server.stop(sig) == 0, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


def test_signal_during_start_up_exits_0(start):
    server = start()
    wait_for(lambda: len(server.processes()) >= 2, PATIENCE_S, "a child exists")
    assert server.stop(signal.SIGTERM) == 0, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


def test_without_a_fault_hold_every_open_request_gets_an_error_when_a_worker_dies(start):
    server = start("--max-model-len", 8192, "--max-num-seqs", 4, "--fault-hold", 0).wait_ready()
    num_requests = 200

    def lines(stream):
        body = json.dumps({"prompt": "the moon", "max_tokens": 8000, "ignore_eos": True, "stream": stream}).encode()
        http = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(http, timeout=60) as response:
                return response.read().decode().splitlines()
        except urllib.error.HTTPError as error:
            assert error.code == 503
            return error.read().decode().splitlines()

    with ThreadPoolExecutor(num_requests) as pool:
        answers = [pool.submit(lines, stream=i % 2 == 0) for i in range(num_requests)]
        wait_for(lambda: server.metric("fastdeploy:num_requests_waiting") == num_requests - 4, PATIENCE_S, "all have come")
        os.kill(server.pids_of("wintserve-engine-worker")[0], signal.SIGKILL)
        for i, answer in enumerate(answers):
            error, *end = answer.result()[-4 if i % 2 == 0 else -1:]
            assert "engine worker 0 " in json.loads(error.removeprefix("data: "))["error"]["message"]
            assert end == (["", "data: [DONE]", ""] if i % 2 == 0 else [])
    server.wait_ready()


@pytest.mark.parametrize("name", PROCESS_NAMES)
def test_child_killed_while_loading_is_started_again(start, name):
    server = start()
    wait_for(lambda: server.pids_of(name), PATIENCE_S, f"{name} exists")
    os.kill(server.pids_of(name)[0], signal.SIGKILL)
    server.wait_ready()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hanging"])
def test_streams_survive_the_cache_manager(start, how):
    server = start("--tensor-parallel-size", 2).wait_ready()
    request = {"prompt": "the moon over the river " * 20, "temperature": 0, "max_tokens": 600,
               "ignore_eos": True}

    def text(on_chunk=lambda n: None):
        body = json.dumps({**request, "stream": True}).encode()
        http = urllib.request.Request(f"{server.url}/v1/completions", body,
                                      {"Content-Type": "application/json"})
        parts = []
        with urllib.request.urlopen(http, timeout=120) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    parts.append(json.loads(line[6:])["choices"][0]["text"])
                    on_chunk(len(parts))
        return "".join(parts)

    def end_cache_manager(num_chunks):
        if num_chunks == 30:
            os.kill(server.pids_of("wintserve-cache-manager")[0], how)
    expected = text()
    first = server.pids_of("wintserve-cache-manager")
    assert text(end_cache_manager) == expected, server.log()
    assert server.get("/health")[0] == 200
    wait_for(lambda: server.pids_of("wintserve-cache-manager") not in ([], first), PATIENCE_S,
             "another cache manager runs")
    wait_for(lambda: server.metric("wintserve:kv_pool_replacements_total") == 1, PATIENCE_S,
             "its pool is in use")
    assert text() == expected, server.log()


def memory_files(server):
    """{name: inodes} of the shared memory that processes of the instance map or hold open."""
    found = {}
    for pid in server.processes():
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            links = [(os.readlink(fd), os.stat(fd).st_ino) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        files = [(line.split("/memfd:", 1)[1], int(line.split()[4])) for line in lines if "/memfd:" in line]
        files += [(link.removeprefix("/memfd:"), inode) for link, inode in links if link.startswith("/memfd:")]
        for name, inode in files:
            if name.startswith("wintserve-kv") or name.startswith("wintserve-host"):
                found.setdefault(name.split()[0], set()).add(inode)
    return found


def zombies_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in children
            if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"]


def test_streams_survive_a_cache_manager_that_dies_again_and_again(start):
    server = start("--tensor-parallel-size", 2, "--swap-space", 0.01, "--max-model-len", 2048).wait_ready()
    prompts = [f"chapter {i}. the moon over the river " + "and the stars " * (7 * i) for i in range(6)]

    def text(prompt):
        body = json.dumps({"prompt": prompt, "temperature": 0, "max_tokens": 400, "ignore_eos": True,
                           "stream": True}).encode()
        http = urllib.request.Request(f"{server.url}/v1/completions", body,
                                      {"Content-Type": "application/json"})
        with urllib.request.urlopen(http, timeout=180) as response:
            return "".join(json.loads(line[6:])["choices"][0]["text"]
                           for line in response if line.startswith(b"data: {"))

    seed = random.randrange(1 << 32)
    moments = random.Random(seed)

    def kill_one(dead):
        """Sometimes just as it has created a pool that no worker maps yet, sometimes later."""
        seen = server.log().count(": created, ")
        pids = []

        def another():
            pids[:] = [pid for pid in server.pids_of("wintserve-cache-manager") if pid not in dead]
            return pids
        wait_for(another, PATIENCE_S, "a cache manager runs")
        if dead and len(dead) % 2 == 1:
            deadline = time.monotonic() + 2
            while server.log().count(": created, ") == seen and time.monotonic() < deadline:
                pass
        else:
            time.sleep(moments.uniform(0, 1.5))
        os.kill(pids[0], signal.SIGKILL)
        dead.append(pids[0])

    with ThreadPoolExecutor(len(prompts)) as pool:
        expected = list(pool.map(text, prompts))
        memory = memory_files(server)
        streams = [pool.submit(text, prompt) for prompt in prompts]
        dead = []
        for _ in range(5):
            kill_one(dead)
        assert [stream.result() for stream in streams] == expected, f"seed {seed}\n{server.log()}"
    assert server.process.poll() is None and server.get("/health")[0] == 200
    assert text(prompts[0]) == expected[0], f"seed {seed}\n{server.log()}"
    after = memory_files(server)  # of the last pool alone
    assert {name: len(inodes) for name, inodes in after.items()} == {name: 1 for name in memory}, after
    assert not zombies_of(server.process.pid)


def test_a_cache_manager_that_dies_before_the_last_rank_has_mapped_the_first_pool(start):
    server = start("--tensor-parallel-size", 2, "--log-level", "debug")
    wait_for(lambda: len(server.pids_of("wintserve-engine-worker")) == 2, PATIENCE_S, "workers exist")
    early, late = server.pids_of("wintserve-engine-worker")
    os.kill(early, signal.SIGSTOP)
    wait_for(lambda: "of 2 is attached" in server.log(), PATIENCE_S, "a worker is attached")
    os.kill(late, signal.SIGSTOP)  # for less than the 3 s after which it counts as gone
    os.kill(early, signal.SIGCONT)
    wait_for(lambda: " is mapped" in server.log(), PATIENCE_S, "a rank has mapped the first pool")
    os.kill(server.pids_of("wintserve-cache-manager")[0], signal.SIGKILL)
    os.kill(late, signal.SIGCONT)
    server.wait_ready()
    assert server.log().count(": created, ") == 2, server.log()
    lost = [line for line in server.log().splitlines() if "engine_worker" in line and "WARNING" in line]
    assert len(lost) == 2 and all("is lost with its cache manager" in line for line in lost), server.log()
    assert sum("another rank could not map it" in line for line in lost) == 1, server.log()


def test_killed_launcher_takes_its_children_along_and_the_next_start_sweeps(start):
    server = start("--tensor-parallel-size", 2).wait_ready()
    server.process.kill()
    server.process.wait()
    server.assert_nothing_left()


def test_busy_port_is_named_before_anything_loads():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        for flag in ("--port", "--metrics-port", "--engine-worker-queue-port", "--cache-queue-port"):
            result = run_serve("--model", POET, flag, port)
            assert result.returncode == 69, result.stderr
            assert flag in result.stderr and str(port) in result.stderr and "in use" in result.stderr


def test_two_instances_on_the_same_queue_port_are_refused(start):
    first = start().wait_ready()
    result = run_serve("--model", POET, "--port", 0, "--cache-queue-port", first.cache_port)
    assert result.returncode == 69 and "--cache-queue-port" in result.stderr, result.stderr


@pytest.mark.parametrize("flags, code, pieces", [
    (["--max-num-sequences", "4"], 64, ["--max-num-sequences"]),
    (["--port", "99999999"], 64, ["--port", "99999999"]),
    (["--tensor-parallel-size", "3"], 64, ["--tensor-parallel-size", "3"]),
    (["--swap-space", "4", "--no-enable-prefix-caching"], 64, ["--swap-space", "--no-enable-prefix-caching"]),
    (["--model", "/no/such/model"], 66, ["/no/such/model"]),
], ids=["unknown", "port", "ranks", "together", "model"])
def test_bad_flag_is_one_line(flags, code, pieces):
    result = run_serve(*flags)
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(p in result.stderr for p in pieces), result.stderr


def test_bad_yaml_key_is_one_line_and_exit_78(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("max_num_seqs: 4\nmax-model-lenght: 2048\n")
    result = run_serve("--config", config)
    assert result.returncode == 78, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "max-model-lenght" in result.stderr


def test_truncated_checkpoint_is_named_and_exits_66(start, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(POET, broken)
    shard = broken / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    server = start(model=broken)
    assert server.process.wait(30) == 66, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()
    assert "model-00002-of-00003.safetensors" in server.log()
