"""Start, stop, and the death of every process: what a supervisor and an operator see."""
import os
import shutil
import signal
import socket
import subprocess

import pytest

from server import BIN, POET, PROCESS_NAMES, ROOT, wait_for


def run_serve(*flags):
    return subprocess.run([str(BIN / "wintserve"), "serve", *map(str, flags)], cwd=ROOT,
                          capture_output=True, text=True, timeout=30)


def test_health_is_503_with_a_reason_and_then_200(start):
    server = start()
    seen = []

    def ready():
        seen.append(server.get("/health"))
        return seen[-1][0] == 200
    wait_for(ready, 60, "/health is 200")
    waiting = [body for status, body in seen if status == 503]
    assert waiting and all("waiting for" in body for body in waiting), seen
    assert {status for status, _ in seen} <= {503, 200, None}
    assert server.get("/live")[0] == 200


def test_start_up_lines_of_the_documentation(start):
    server = start().wait_ready()
    for line in (f"Launching metrics service at http://0.0.0.0:{server.metrics_port}/metrics",
                 f"Launching chat completion service at http://0.0.0.0:{server.port}/v1/chat/completions",
                 f"Launching completion service at http://0.0.0.0:{server.port}/v1/completions"):
        assert line in server.log()
    wait_for(lambda: "Application startup complete." in server.log(), 5, "the last line")


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing_behind_and_exits_0(start, sig):
    server = start("--tensor-parallel-size", 2).wait_ready()
    assert server.stop(sig) == 0, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


def test_signal_during_start_up_exits_0(start):
    server = start()
    wait_for(lambda: len(server.processes()) >= 2, 10, "a child exists")
    assert server.stop(signal.SIGTERM) == 0, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


@pytest.mark.parametrize("name", PROCESS_NAMES)
def test_killed_child_ends_the_instance_with_70_and_says_who(start, name):
    server = start("--tensor-parallel-size", 2).wait_ready()
    os.kill(server.pids_of(name)[-1], signal.SIGKILL)
    assert server.process.wait(20) == 70, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()
    assert any(name.removeprefix("wintserve-") in line.replace(" ", "-") and "signal 9" in line
               for line in server.log().splitlines()), server.log()


@pytest.mark.parametrize("name", PROCESS_NAMES)
def test_child_killed_while_loading_ends_the_instance(start, name):
    server = start()
    wait_for(lambda: server.pids_of(name), 10, f"{name} exists")
    os.kill(server.pids_of(name)[0], signal.SIGKILL)
    assert server.process.wait(20) == 70, server.log()
    server.assert_nothing_left()


def test_killed_launcher_takes_its_children_along_and_the_next_start_sweeps(start):
    server = start("--tensor-parallel-size", 2).wait_ready()
    server.process.kill()
    server.process.wait()
    server.assert_nothing_left(timeout_s=2)


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
    (["--model", "/no/such/model"], 66, ["/no/such/model"]),
], ids=["unknown", "port", "ranks", "model"])
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
