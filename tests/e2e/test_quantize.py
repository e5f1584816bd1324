"""`wintserve quantize` as a user runs it, and what it makes, served."""
import array
import json
import random
import shutil
import signal
import struct
import subprocess
import time

from server import BIN, DEVICE, POET, ROOT

TINY = ROOT / "tests/data/tiny-bf16"


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


def write_random_model(directory, layers=2, hidden=256, width=256, experts=32, vocab=8192):
    """A model in the Hugging Face layout with tiny-bf16's tokenizer; most of it is experts."""
    directory.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, directory)
    config = json.loads((TINY / "config.json").read_text())
    config.update(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=64, intermediate_size=256, moe_intermediate_size=width, moe_num_experts=experts, moe_k=2,
                  moe_num_shared_experts=0, moe_layer_start_index=0, moe_layer_end_index=layers - 1)
    (directory / "config.json").write_text(json.dumps(config))

    rng = random.Random(5)
    normals = [rng.gauss(0, hidden ** -0.5) for _ in range(4099)]  # repeated: quick, and no column twice alike

    def weights(rows, columns):
        count = rows * columns
        begin = rng.randrange(4099)
        repeated = bf16(normals[begin:] + normals[:begin]) * (count // 4099 + 1)
        return ([rows, columns], repeated[:2 * count])

    ones = ([hidden], bf16([1.0] * hidden))
    tensors = {"model.embed_tokens.weight": weights(vocab, hidden), "model.norm.weight": ones}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = tensors[prefix + "post_attention_layernorm.weight"] = ones
        for name, rows in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128), ("o_proj", hidden)):
            tensors[f"{prefix}self_attn.{name}.weight"] = weights(rows, 256 if name == "o_proj" else hidden)
        tensors[prefix + "mlp.gate.weight"] = weights(experts, hidden)
        tensors[prefix + "mlp.moe_statics.e_score_correction_bias"] = ([1, experts], bf16([0.0] * experts))
        for expert in range(experts):
            for name in ("gate_proj", "up_proj"):
                tensors[f"{prefix}mlp.experts.{expert}.{name}.weight"] = weights(width, hidden)
            tensors[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = weights(hidden, width)
    header, end = {}, 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, data in tensors.values():
            file.write(data)


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
            (tmp_path / "none", "wint8", 66, "none/config.json: No such file"),
            (TINY, "int3", 64, "--scheme: int3 not in {wint2,wint4,wint8}")):
        result = quantize("--model", model, "--output", tmp_path / "out", "--scheme", scheme)
        assert result.returncode == code, result
        assert result.stderr.count("\n") == 1 and text in result.stderr, result.stderr
        assert not list(tmp_path.glob("out*"))


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
