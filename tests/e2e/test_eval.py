"""`wintserve eval`: the real client on real servers, its own and others'."""
import json
import os
import signal
import subprocess
import tempfile
import types
import uuid
from pathlib import Path

import pytest

from server import BIN, DEVICE, DEVICE_FLAGS, PATIENCE_S, POET, ROOT, Server, wait_for

EVALS = ROOT / "tests/data/poet-eval"
SERVE_FLAGS = ["--", "--device", DEVICE, "--max-model-len", 2048, *DEVICE_FLAGS]


class Eval:
    """One run, whose processes are known by a mark in their environment."""

    def __init__(self, *flags):
        self.id = uuid.uuid4().hex
        self.runtime = tempfile.TemporaryDirectory(prefix="ws-", ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [str(word) for word in (BIN / "wintserve", "eval", *flags)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "XDG_RUNTIME_DIR": self.runtime.name, "WINTSERVE_E2E_ID": self.id})

    def processes(self):
        return Server.processes(types.SimpleNamespace(id=self.id))

    def end(self, timeout_s=120):
        """(exit code, stdout, stderr); nothing of it runs any more."""
        output, error = self.process.communicate(timeout=timeout_s)
        self.assert_nothing_left()
        return self.process.returncode, output, error

    def assert_nothing_left(self):
        wait_for(lambda: not self.processes(), PATIENCE_S, "every process has ended")


def run(*flags):
    return Eval(*flags).end()


def measures(path, task=0):
    return {name: measure["value"] for name, measure in json.loads(path.read_text())["tasks"][task]["measures"].items()}


def test_offline_recites_as_the_model_was_trained_to(tmp_path):
    code, output, error = run("--model", POET, "--exact", EVALS / "recite.jsonl", "--limit", 10,
                              "--json", tmp_path / "report.json", *SERVE_FLAGS)
    assert code == 0, error
    assert measures(tmp_path / "report.json") == {"accuracy": 1.0}
    header, row, file = output.splitlines()
    assert header.split() == ["task", "items", "tokens", "measure", "value", "±", "error"]
    assert row.split() == ["exact", "answers", "10", "-", "accuracy", "1.0000", "0.0000"]
    assert file == "recite.jsonl"


def test_offline_chat_loss_is_that_of_the_reference(tmp_path):
    """0.3016 nats over 1,030 answer tokens is what the NumPy reference gives (in float32) for the first 20
    validation chats. A GPU's bfloat16 may differ by 1 %, as tests/accuracy/check_demo_model allows it."""
    code, _, error = run("--model", POET, "--chat-loss", EVALS / "chats.jsonl", "--limit", 20,
                         "--json", tmp_path / "report.json", *SERVE_FLAGS)
    assert code == 0, error
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tasks"][0]["tokens"] == 1030
    tolerance = 5e-5 if DEVICE == "cpu" else 0.01 * 0.3016  # of the digits that the reference gives
    assert measures(tmp_path / "report.json")["nats per answer token"] == pytest.approx(0.3016, abs=tolerance)


def test_offline_scores_text_and_choices(tmp_path):
    """A poem is likelier than its characters backwards, as a text and as an answer."""
    poem = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
    (tmp_path / "poem.txt").write_text(poem)
    (tmp_path / "backwards.txt").write_text(poem[::-1])
    line = "床前明月光，疑是地上霜。"
    (tmp_path / "choices.jsonl").write_text("\n".join(json.dumps(item) for item in [
        {"prompt": "背诵李白的《静夜思》", "choices": [line[::-1], line], "answer": 1},
        {"prompt": "背诵李白的《静夜思》", "choices": [line, line[::-1]], "answer": "A"}]))
    code, _, error = run("--model", POET, "--perplexity", tmp_path / "poem.txt", "--perplexity", tmp_path / "backwards.txt",
                         "--multiple-choice", tmp_path / "choices.jsonl", "--json", tmp_path / "report.json", *SERVE_FLAGS)
    assert code == 0, error
    poem_loss, backwards_loss = (measures(tmp_path / "report.json", task)["nats per token"] for task in (0, 1))
    assert poem_loss < backwards_loss
    assert measures(tmp_path / "report.json", 2) == {"accuracy": 1.0, "accuracy, per byte": 1.0}


def test_against_a_running_server(server):
    code, output, error = run("--server", f"{server.url}/v1", "--exact", EVALS / "recite.jsonl", "--limit", 5)
    assert code == 0, error
    assert "1.0000" in output


def test_a_model_that_the_server_lacks_is_told_with_those_that_it_has(server):
    code, _, error = run("--server", server.url, "--served-model-name", "other", "--exact", EVALS / "recite.jsonl")
    assert code == 64
    assert "has no model 'other'; it has: " in error


def test_a_server_that_does_not_answer_is_told_at_once():
    code, _, error = run("--server", "http://127.0.0.1:1", "--exact", EVALS / "recite.jsonl")
    assert code == 69
    assert "http://127.0.0.1:1/v1/models: no answer" in error


def test_a_bad_line_is_found_before_a_server_is_started(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "p"}\n')
    code, output, error = run("--model", "no-such-model", "--exact", tmp_path / "bad.jsonl")
    assert (code, output) == (64, "")
    assert error == f"error: {tmp_path}/bad.jsonl:2: answer: is missing\n"


def test_a_flag_that_the_server_refuses_is_told_with_its_exit_code():
    code, _, error = run("--model", POET, "--exact", EVALS / "recite.jsonl", "--", "--max-model-len", 0)
    assert code == 64
    assert "--max-model-len: must be 16..1048576 (got 0)" in error
    assert "`wintserve serve` ended before it was ready with exit code 64" in error


def test_a_report_that_cannot_be_written_is_told_before_the_work():
    code, output, error = run("--model", POET, "--exact", EVALS / "recite.jsonl", "--json", "/no-such-directory/report.json")
    assert (code, output) == (64, "")
    assert error == "error: --json: cannot write into /no-such-directory: No such file or directory\n"


def test_a_log_that_cannot_be_written_is_told_as_the_flag_that_it_is():
    log = "/no-such-directory/log"
    code, output, error = run("--model", POET, "--exact", EVALS / "recite.jsonl", "--server-log", log)
    assert (code, output) == (64, "")
    assert error == f"error: --server-log: cannot write {log}: No such file or directory\n"


def test_a_full_disk_behind_its_output_is_an_error_and_no_crash():
    with open("/dev/full", "w") as full:
        result = subprocess.run([BIN / "wintserve", "eval", "--exact", "a"], stdout=full, stderr=full, timeout=60)
        assert result.returncode == 64
        result = subprocess.run([BIN / "wintserve", "eval", "--help"], stdout=full, stderr=subprocess.PIPE,
                                timeout=60)
        assert (result.returncode, result.stderr) == (0, b"")


def launcher_of(evaluation):
    """Its process id, once the server is at work."""
    wait_for(lambda: "wintserve-engine-worker" in evaluation.processes().values(), PATIENCE_S, "a server has started")
    return next(pid for pid, name in evaluation.processes().items() if name == "wintserve")


# For long enough that it is still at work when something happens to it.
LONG_TASKS = [word for _ in range(40) for word in ("--exact", EVALS / "recite.jsonl")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_server(number):
    evaluation = Eval("--model", POET, *LONG_TASKS, *SERVE_FLAGS)
    launcher_of(evaluation)
    evaluation.process.send_signal(number)
    code, output, error = evaluation.end(timeout_s=40)
    assert (code, output) == (128 + number, "")
    assert f"stopped by signal {number.value}" in error


def test_nothing_survives_when_it_is_killed():
    evaluation = Eval("--model", POET, *LONG_TASKS, *SERVE_FLAGS)
    launcher_of(evaluation)
    evaluation.process.kill()
    evaluation.end(timeout_s=40)


def test_the_death_of_its_server_is_told():
    evaluation = Eval("--model", POET, *LONG_TASKS, *SERVE_FLAGS)
    os.kill(launcher_of(evaluation), signal.SIGKILL)
    code, output, error = evaluation.end(timeout_s=40)
    assert (code, output) == (70, "")
    assert "`wintserve serve` ended " in error and "signal 9 (Killed)" in error
