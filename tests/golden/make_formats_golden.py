#!/usr/bin/env python3
"""Makes tests/golden/formats.json: bytes of the quantised layouts and the weights they decode to,
and single weights of models/poet.

    python3 tests/golden/make_formats_golden.py        from the repository root; needs NumPy

Written from the formulas of the format alone, one element at a time where that is clearest, so that
it shares no idea with the code it checks.
"""
import json
import pathlib
import struct

import numpy as np

OUT = pathlib.Path(__file__).resolve().parent / "formats.json"
POET = pathlib.Path(__file__).resolve().parents[2] / "models/poet"
F32 = np.float32


def bf16(x):
    u = np.asarray(x, F32)[...].view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> 16) & 1)) & np.uint32(0xFFFF0000)).view(F32)


# --- WINT8 and WINT4: the five steps of the mixed-input GEMM's preparation, not the closed form

def pack_per_channel(codes, bits):
    k, n = codes.shape
    rows = 16 if bits == 8 else 32
    per_word = 32 // bits
    lanes = np.arange(rows)
    source = 8 * ((lanes % per_word) // 2) + lanes % 2 + 2 * (lanes // per_word)
    shuffled = codes.reshape(k // rows, rows, n)[:, source].reshape(k, n)
    columns = shuffled.T.copy()
    interleave = 2 if bits == 8 else 4
    tiles = columns.reshape(n // interleave, interleave, k // 64, 64).transpose(0, 2, 1, 3).copy()
    unsigned = (tiles + (128 if bits == 8 else 8)).reshape(-1, per_word)
    order = [0, 2, 1, 3] if bits == 8 else [0, 2, 4, 6, 1, 3, 5, 7]
    flat = unsigned[:, order].ravel().astype(np.uint8)
    return flat if bits == 8 else flat[0::2] | (flat[1::2] << 4)


def per_channel_case(rng, bits, k, n):
    low = -(1 << (bits - 1))
    codes = rng.integers(low, -low, (k, n))
    codes[0, :2] = low, -low - 1
    scale = bf16(rng.uniform(1e-3, 2e-3, n))
    weights = bf16(codes.astype(F32) * scale)
    return {
        "k": k, "n": n,
        "quant_weight_hex": pack_per_channel(codes, bits).tobytes().hex(),
        "channel_scale": scale.tolist(),
        "codes": codes.ravel().tolist(),
        "weight_bits_hex": (weights.view(np.uint32) >> 16).astype("<u2").tobytes().hex(),
    }


# --- WINT2, element by element

def byte_code(byte, code_scale, code_zp):
    zero = F32(F32(code_zp) + F32(0.5))
    # Exact in float64 (8 + 24 bits, then one addition), so the cast rounds once, as an fma does.
    return int(np.floor(F32(float(byte) * float(F32(code_scale)) + float(zero))))


def decode_wint2(t, order):
    k, n = t["k"], t["n"]
    weights = np.zeros((k, n), F32)
    for group in range(k // 64):
        for lane in range(4):
            for step in range(4):
                for slot in range(4):
                    stored = 16 * lane + 4 * step + slot
                    true = 16 * step + 8 * (slot // 2) + 2 * lane + slot % 2
                    row = 64 * group + (true if order == "mma64" else stored)
                    for column in range(n):
                        byte = t["bytes"][(64 * group + stored) // 4, column]
                        code = byte_code(byte, t["code_scale"][column], t["code_zp"][column])
                        value = ((code >> (9 - 3 * slot)) & 63) - 32
                        nibbles = int(t["local"][group // 2, column])
                        local = nibbles >> 4 if group % 2 == 0 else nibbles & 15
                        scale = bf16(F32(local) * t["super_scale"][column])
                        weights[row, column] = bf16(F32(value) * scale)
    return weights


def wint2_case(rng, order, code_scale, code_zp):
    k, n = 256, len(code_scale)
    t = {
        "k": k, "n": n,
        "bytes": rng.integers(0, 256, (k // 4, n)).astype(np.uint8),
        "local": rng.integers(0, 256, (k // 128, n)).astype(np.uint8),
        "super_scale": bf16(rng.uniform(1e-3, 2e-3, n)),
        "code_scale": np.asarray(code_scale, F32),
        "code_zp": np.asarray(code_zp, F32),
    }
    t["local"][0, :3] = 0x0F, 0xF0, 0x00  # a zero group before, after and on both sides
    weights = decode_wint2(t, order)
    return {
        "k": k, "n": n, "k_order": order,
        "quant_weight_hex": t["bytes"].tobytes().hex(),
        "weight_scale_hex": t["local"].tobytes().hex(),
        "super_scale": t["super_scale"].tolist(),
        "code_scale": t["code_scale"].tolist(),
        "code_zp": t["code_zp"].tolist(),
        "weight_bits_hex": (weights.view(np.uint32) >> 16).astype("<u2").tobytes().hex(),
    }


def fma_cases(rng):
    """Maps for which rounding the product before the addition floors to another code."""
    cases = []
    while len(cases) < 24:
        code_scale = F32(rng.uniform(100, 128))
        byte = int(rng.integers(1, 256))
        product = F32(F32(byte) * code_scale)
        # A zero point that brings the sum next to a small whole number: the sum is then finer than
        # the rounding of the product.
        code_zp = F32(float(rng.integers(1, 1000)) - 0.5 - float(byte) * float(code_scale))
        separate = int(np.floor(F32(product + F32(code_zp + F32(0.5)))))
        fused = byte_code(byte, code_scale, code_zp)
        if separate != fused:
            cases.append({"byte": byte, "code_scale": float(code_scale),
                          "code_zp": float(code_zp), "code": fused, "separate": separate})
    return cases


# --- Single weights of the demo model

def read_poet():
    types = {"BF16": np.uint16, "F32": F32, "I8": np.uint8, "U8": np.uint8}
    tensors = {}
    for path in sorted(POET.glob("*.safetensors")):
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                values = np.frombuffer(raw[begin:end], types[entry["dtype"]])
                if entry["dtype"] == "BF16":
                    values = (values.astype(np.uint32) << 16).view(F32)
                tensors[name] = values.reshape(entry["shape"])
    return tensors


def wint8_weight(tensors, name, row, column):
    codes = tensors[name + ".quant_weight"]
    k, r = codes.shape[1], row % 16
    p = row // 16 * 16 + (2 * r if r < 8 else 2 * (r - 8) + 1)
    address = column // 2 * 2 * k + p // 64 * 128 + column % 2 * 64 + p % 64
    code = int(codes.ravel()[address]) - 128
    return float(bf16(F32(code) * tensors[name + ".weight_scale"][column]))


def wint4_weight(tensors, name, row, column):
    codes = tensors[name + ".quant_weight"]
    k, r = codes.shape[1], row % 32
    p = row // 32 * 32 + 4 * (r % 8) + r // 8
    nibble = column // 4 * 4 * k + p // 64 * 256 + column % 4 * 64 + p % 64
    code = (int(codes.ravel()[nibble // 2]) >> nibble % 2 * 4 & 15) - 8
    return float(bf16(F32(code) * tensors[name + ".weight_scale"][column]))


def wint2_weight(tensors, name, row, column):
    group, k = divmod(row, 64)
    step, r = divmod(k, 16)
    half, r = divmod(r, 8)
    lane, odd = divmod(r, 2)
    byte = tensors[name + ".quant_weight"][16 * group + 4 * lane + step, column]
    code = byte_code(byte, tensors[name + ".code_scale"][column],
                     tensors[name + ".code_zp"][column])
    value = ((code >> (9 - 3 * (2 * half + odd))) & 63) - 32
    nibbles = int(tensors[name + ".weight_scale"][group // 2, column])
    local = nibbles >> 4 if group % 2 == 0 else nibbles & 15
    return float(bf16(F32(value) * bf16(F32(local) * tensors[name + ".super_scales"][column])))


def poet_weights(rng):
    tensors = read_poet()
    layer = "ernie.layers.%d."
    matrices = [  # role, layer, expert, decoder, tensor, [k, n]
        ("qkv", 0, -1, wint8_weight, layer % 0 + "self_attn.qkv_proj", (384, 1024)),
        ("output", 5, -1, wint8_weight, layer % 5 + "self_attn.o_proj", (512, 384)),
        ("gate_up", 0, -1, wint8_weight, layer % 0 + "mlp.up_gate_proj", (384, 2048)),
        ("down", 0, -1, wint8_weight, layer % 0 + "mlp.down_proj", (1024, 384)),
        ("gate_up", 1, 3, wint4_weight, layer % 1 + "mlp.experts.3.up_gate_proj", (384, 512)),
        ("down", 1, 15, wint4_weight, layer % 1 + "mlp.experts.15.down_proj", (256, 384)),
        ("gate_up", 2, 0, wint2_weight, layer % 2 + "mlp.experts.0.up_gate_proj", (384, 512)),
        ("down", 7, 9, wint2_weight, layer % 7 + "mlp.experts.9.down_proj", (256, 384)),
    ]
    spots = []
    for role, layer_index, expert, decode, name, (k, n) in matrices:
        for _ in range(12):
            row, column = int(rng.integers(k)), int(rng.integers(n))
            spots.append([role, layer_index, expert, row, column,
                          decode(tensors, name, row, column)])
    for _ in range(12):
        row, column = int(rng.integers(8192)), int(rng.integers(384))
        value = float(tensors["ernie.embed_tokens.weight"][row, column])
        spots.append(["embedding", 0, -1, row, column, value])
        spots.append(["head", 0, -1, column, row, value])
        row, column = int(rng.integers(384)), int(rng.integers(16))
        spots.append(["router", 4, -1, row, column,
                      float(tensors[layer % 4 + "mlp.gate.weight"][row, column])])
    return spots


def main():
    rng = np.random.default_rng(2)
    usual = ([120.96099, 120.91775, 120.96519, 32767 / 255], [1240.0, 1260.003, 1648.289, 0.0])
    # Codes below zero and above 15 bits: only their low bits count, as two's complement.
    wrapping = ([-120.5, 300.25, 128.0, -0.75], [100.0, -20000.5, -40000.0, 0.25])
    golden = {
        "command": "python3 tests/golden/make_formats_golden.py",
        "wint8": [per_channel_case(rng, 8, 64, 4), per_channel_case(rng, 8, 192, 6)],
        "wint4": [per_channel_case(rng, 4, 64, 4), per_channel_case(rng, 4, 192, 8)],
        "wint2": [wint2_case(rng, "mma64", *usual), wint2_case(rng, "natural", *usual),
                  wint2_case(rng, "mma64", *wrapping)],
        "fma": fma_cases(rng),
        "poet": poet_weights(rng),
    }
    text = json.dumps(golden, separators=(",", ":"))
    OUT.write_text(text.replace('],"', '],\n"').replace('","', '",\n"') + "\n")


if __name__ == "__main__":
    main()
