"""Starts that must fail by name, and starts and stops that must leave nothing."""
import json
import os
import shutil
import signal
import struct
from pathlib import Path

import pytest

from faults import Stream, cases, client_of, greedy, stop_cleanly, wait_for_tokens
from server import POET, wait_for

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "ernie.layers.0.input_layernorm.weight"


def read_header(path):
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length)), 8 + length


def write_header(path, header):
    _, data_begin = read_header(path)
    data = path.read_bytes()[data_begin:]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_config(model, **fields):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shard_of(model, tensor):
    return model / json.loads((model / INDEX).read_text())["weight_map"][tensor]


def truncate(model):
    os.truncate(model / SHARD, (model / SHARD).stat().st_size - 1000)


def truncate_header(model):
    os.truncate(model / SHARD, 100)


def empty(model):
    os.truncate(model / SHARD, 0)


def remove_shard(model):
    (model / SHARD).unlink()


def remove_tensor_from_index(model):
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"][NORM]
    (model / INDEX).write_text(json.dumps(index))


def damage_index(model):
    os.truncate(model / INDEX, 1000)


def wrong_shape(model):
    path = shard_of(model, NORM)
    header, _ = read_header(path)
    (size,) = header[NORM]["shape"]
    header[NORM]["shape"] = [2, size // 2]
    write_header(path, header)


def wrong_type(model):
    path = shard_of(model, NORM)
    header, _ = read_header(path)
    header[NORM]["dtype"] = "U16" if header[NORM]["dtype"] != "F32" else "I32"
    write_header(path, header)


def scale_is_not_finite(model):
    """Of the first tensor of float scales that there is."""
    for path in sorted(model.glob("*.safetensors")):
        header, data_begin = read_header(path)
        for name, tensor in header.items():
            if "scale" in name and tensor["dtype"] in ("F32", "BF16"):
                with path.open("r+b") as file:
                    file.seek(data_begin + tensor["data_offsets"][0])
                    file.write(b"\x00\x00\xc0\x7f" if tensor["dtype"] == "F32" else b"\xc0\x7f")
                return
    raise AssertionError("no scales")


def other_width(model):
    config = json.loads((model / "config.json").read_text())
    change_config(model, intermediate_size=2 * config["intermediate_size"])


def damage_config(model):
    os.truncate(model / "config.json", 100)


def other_heads(model):
    change_config(model, num_key_value_heads=1)


def damage_tokenizer(model):
    os.truncate(model / "tokenizer.model", 5000)


DAMAGES = {
    "truncated data": (truncate, [SHARD]),
    "truncated header": (truncate_header, [SHARD]),
    "empty file": (empty, [SHARD]),
    "missing file": (remove_shard, [SHARD]),
    "tensor missing in the index": (remove_tensor_from_index, [NORM]),
    "damaged index": (damage_index, [INDEX]),
    "wrong shape": (wrong_shape, [NORM, shard_of(POET, NORM).name]),
    "wrong type": (wrong_type, [NORM, shard_of(POET, NORM).name]),
    "scale that is no number": (scale_is_not_finite, ["scale"]),
    "config of another width": (other_width, ["tensor"]),
    "damaged config": (damage_config, ["config.json"]),
    "config of other heads": (other_heads, ["tensor", "qkv_proj"]),
    "damaged tokenizer": (damage_tokenizer, ["tokenizer.model"]),
}


@pytest.mark.fault(what="damaged checkpoint", when="start", holds="exit 66, names file or tensor; I9")
@pytest.mark.parametrize("damage", cases(DAMAGES, "truncated data"))
def test_damaged(start, tmp_path, damage):
    broken = tmp_path / "broken"
    shutil.copytree(POET, broken)
    apply, pieces = DAMAGES[damage]
    apply(broken)
    server = start("--tensor-parallel-size", 2, model=broken)
    assert server.process.wait(60) == 66, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()
    errors = [line for line in server.log().splitlines() if " ERROR " in line]
    assert any(all(piece in line for piece in pieces) for line in errors), server.log()


def into_shards(model, count):
    """Of a checkpoint that is split for that many ranks, but whose parts were left whole."""
    files = list(model.glob("model*"))
    for rank in range(count):
        (model / f"rank{rank}").mkdir()
        for file in files:
            (model / f"rank{rank}" / file.name).hardlink_to(file)
    for file in files:
        file.unlink()


WRONG_SHAPES = {
    "shards of another size": (lambda model: into_shards(model, 2), 2, ["rank0/", "tensor"]),
    "shards for more ranks than there are": (lambda model: into_shards(model, 4), 2, ["rank0/", "tensor"]),
    "shards for a number that does not divide": (lambda model: into_shards(model, 3), 1, ["rank*", "size 3", "num_attention_heads"]),
    "heads that 4 does not divide": (lambda model: change_config(model, num_attention_heads=6, num_key_value_heads=3), 4,
                                     ["config.json: tensor parallel size 4", "num_attention_heads is 6"]),
    "experts that 4 does not divide in whole groups": (
        lambda model: change_config(model, moe_intermediate_size=128), 4,
        ["config.json: tensor parallel size 4", "moe_intermediate_size is 128"]),
}


@pytest.mark.fault(what="checkpoint of a wrong tensor-parallel shape", when="start", holds="exit 66, names the file and the tensor, or what does not divide; I9")
@pytest.mark.parametrize("case", cases(WRONG_SHAPES, "shards of another size"))
def test_wrong_shape_for_the_ranks(start, tmp_path, case):
    broken = tmp_path / "broken"
    shutil.copytree(POET, broken)
    apply, ranks, pieces = WRONG_SHAPES[case]
    apply(broken)
    server = start("--tensor-parallel-size", ranks, model=broken)
    assert server.process.wait(60) == 66, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()
    errors = [line for line in server.log().splitlines() if " ERROR " in line]
    assert any(all(piece in line for piece in pieces) for line in errors), server.log()


@pytest.mark.fast
@pytest.mark.fault(what="tensor-parallel size that no checkpoint could fit", when="start", holds="exit 64, names the flag; I9")
def test_number_of_ranks_that_is_none(start):
    server = start("--tensor-parallel-size", 3)
    assert server.process.wait(30) == 64
    assert "--tensor-parallel-size: must be 1, 2 or 4 (got 3)" in server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


def own_descriptors():
    """But for sockets, by which this process marks the ports that it has given away."""
    targets = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    return sum(not target.startswith("socket:") for target in targets)


def system_objects(runtime):
    """What an instance with that runtime directory could leave outside of it; its sockets also within. Other instances
    may run on this machine."""
    names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "wintserve" in line}
    sockets = {name for name in names if name.startswith(str(runtime))
               or name.startswith("@") and not name.startswith("@wintserve-e2e-port-")}
    files = {str(path) for place in ("/dev/shm", "/tmp", "/var/tmp") if Path(place).is_dir()
             for path in Path(place).iterdir() if "wintserve" in path.name}
    return sockets | files


@pytest.mark.fast
@pytest.mark.fault(what="start and stop", when="again and again", holds="I9 after each")
def test_cycles_of_start_and_stop_leave_nothing(start, request, note, tmp_path):
    cycles = request.config.getoption("--cycles")
    before = system_objects(tmp_path)
    descriptors = own_descriptors()
    expected = None
    for cycle in range(cycles):
        ranks = 1 + cycle % 2
        server = start("--tensor-parallel-size", ranks, "--max-model-len", 512, "--max-num-seqs", 4)
        if cycle % 5 == 4:  # it is stopped while it starts
            wait_for(lambda server=server: len(server.processes()) >= 2, 10, "a child exists")
        else:
            server.wait_ready()
            with client_of(server) as client:
                text = client.completions.create(**greedy("床前明月光", 8)).choices[0].text
            assert text == (expected := expected or text)
        if cycle % 10 == 9:
            server.process.kill()  # the launcher alone
            server.process.wait(10)
            server.log_file.close()
            server.assert_nothing_left(timeout_s=2)
            shutil.rmtree(server.runtime)  # what a killed launcher leaves; the next start with it sweeps
        else:
            sig = signal.SIGINT if cycle % 3 == 0 else signal.SIGTERM
            assert server.stop(sig) == 0, server.log()
            server.assert_nothing_left()
            server.assert_runtime_dir_empty()
        assert system_objects(tmp_path) <= before, (cycle, system_objects(tmp_path) - before)
    assert own_descriptors() <= descriptors + 2
    note(f"{cycles} cycles")


@pytest.mark.fault(what="kill -9 launcher", when="streaming", holds="all gone in 2 s, the next start is clean; I9")
@pytest.mark.parametrize("ranks", cases([1, 2], 2), ids=["1 rank", "2 ranks"])
def test_a_killed_launcher_takes_all_along(start, ranks):
    server = start("--tensor-parallel-size", ranks).wait_ready()
    stream = Stream(server, greedy("床前明月光", 1000))
    wait_for_tokens([stream], 5)
    server.process.kill()
    server.process.wait(10)
    server.assert_nothing_left(timeout_s=2)
    assert stream.wait(5).error is not None
    left = list(server.runtime.rglob("*.sock"))
    assert left, "a killed launcher cannot tidy up: a test of nothing"
    # The next start of the same user sweeps.
    again = start("--tensor-parallel-size", ranks, runtime=server.runtime)
    again.wait_ready()
    assert not any(path.exists() for path in left)
    stop_cleanly(again)
