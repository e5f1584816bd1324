"""`wintserve quantize` as a user runs it, and what it makes, served."""
import array
import json
import math
import random
import signal
import subprocess
import time

from made_model import TINY, write_model
from server import BIN, DEVICE, POET, ROOT


def quantize(*args, **kwargs):
    return subprocess.run([str(BIN / "wintserve"), "quantize", *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, **kwargs)


def generate(model, prompt="床前明月光"):
    result = subprocess.run(
        [str(BIN / "wintserve"), "generate", "--model", str(model), "--device", DEVICE, "--prompt", prompt, "--raw",
         "--temperature", "0", "--max-tokens", "24", "--print-ids"],
        cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def bf16(values):
    """The upper halves of float32 numbers."""
    return array.array("H", (word >> 16 for word in array.array("I", array.array("f", values).tobytes()))).tobytes()


def write_random_model(directory, layers=2, hidden=256, width=256, experts=32):
    rng = random.Random(5)
    normals = [rng.gauss(0, hidden ** -0.5) for _ in range(4099)]  # repeated: quick, and no column twice alike

    def weights(name, shape):
        if "norm" in name:
            return bf16([1.0] * hidden)
        if "bias" in name:
            return None
        count = math.prod(shape)
        begin = rng.randrange(4099)
        return (bf16(normals[begin:] + normals[:begin]) * (count // 4099 + 1))[:2 * count]

    write_model(directory, weights, layers, hidden, width, experts)


def test_a_quantised_model_answers_nearly_as_before(tmp_path):
    for scheme in ("wint8", "wint4"):
        result = quantize("--model", TINY, "--output", tmp_path / scheme, "--scheme", scheme)
        assert result.returncode == 0, result.stderr
        assert f"{scheme} experts" in result.stdout and "layer 2: " in result.stderr
        assert generate(tmp_path / scheme).strip()
    # Rounded to 8 bits the likeliest tokens stay what they were.
    assert generate(tmp_path / "wint8").split()[:4] == generate(TINY).split()[:4]


def test_two_bits_are_made_and_served(tmp_path):
    write_random_model(tmp_path / "model", experts=4)
    result = quantize("--model", tmp_path / "model", "--output", tmp_path / "out", "--max-shard-gib", "0.004")
    assert result.returncode == 0, result.stderr
    assert "wint2 experts" in result.stdout and "wint4 experts" in result.stdout
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not (tmp_path / "out.partial").exists()
    assert generate(tmp_path / "out").strip()


def test_what_cannot_be_quantised_is_one_line(tmp_path):
    for model, scheme, code, text in (
            (TINY, "wint2", 66, "ernie.layers.2.mlp.experts.0.up_gate_proj is a matrix of 64 inputs and 256 outputs, "
                                "which cannot be stored as wint2; allowed: multiples of 128 inputs"),
            (POET, "wint2", 66, "models/poet: is quantised already, to wint2; allowed: a checkpoint in bfloat16, "
                                "float16 or float32"),
            (tmp_path / "none", "wint8", 66, "none/config.json: no such file"),
            (TINY, "int3", 64, "--scheme: int3 not in {wint2,wint4,wint8}")):
        result = quantize("--model", model, "--output", tmp_path / "out", "--scheme", scheme)
        assert result.returncode == code, result
        assert result.stderr.count("\n") == 1 and text in result.stderr, result.stderr
        assert not list(tmp_path.glob("out*"))


def test_a_full_disk_behind_its_output_is_no_crash(tmp_path):
    with open("/dev/full", "w") as full:
        for flags, code in ((("--help",), 0), (("--model", "none", "--output", tmp_path / "out"), 66)):
            result = subprocess.run([str(BIN / "wintserve"), "quantize", *map(str, flags)], stdout=full, stderr=full,
                                    timeout=60)
            assert result.returncode == code


def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(tmp_path):
    write_random_model(tmp_path / "model")
    args = ("--model", tmp_path / "model", "--threads", "1", "--output")
    assert quantize(*args, tmp_path / "whole").returncode == 0
    for number in (signal.SIGINT, signal.SIGKILL):
        out = tmp_path / f"after-{number.name}"
        partial = out.with_name(out.name + ".partial")
        process = subprocess.Popen([str(BIN / "wintserve"), "quantize", *map(str, args), str(out)], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        # The embedding and the first matrices are on the disk.
        while '"steps_done": 0' in (journal := read(partial / "quantize-journal.json")) or not journal:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == -number, stderr
        assert not out.exists()
        if number == signal.SIGINT:
            assert f"error: stopped; the same command goes on with {partial}" in stderr
        result = quantize(*args, out)
        assert result.returncode == 0, result.stderr
        assert "going on after" in result.stderr
        assert files_of(out) == files_of(tmp_path / "whole")


def read(path):
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
