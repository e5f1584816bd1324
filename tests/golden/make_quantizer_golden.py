#!/usr/bin/env python3
"""Makes tests/golden/quantizer.json: weights and what encoders that are not ours make of them.

    python3 tests/golden/make_quantizer_golden.py REFERENCE      from the repository root

REFERENCE: the directory of wint2_reference.py, the format's reference in NumPy, whose encoder is
the oracle of WINT2. The oracle of WINT8 and WINT4 is PaddlePaddle's own weight_quantize: needs
paddlepaddle 3.3.1 (for the CPU) and NumPy.
"""
import hashlib
import json
import pathlib
import sys

import numpy as np

OUT = pathlib.Path(__file__).resolve().parent / "quantizer.json"
F32 = np.float32


def bits_hex(x):
    return (np.ascontiguousarray(x, F32).view(np.uint32) >> 16).astype("<u2").tobytes().hex()


def wint2_cases(ref):
    rng = np.random.default_rng(7)
    k, n = 256, 16
    w = ref.bf16(rng.standard_normal((k, n)) * 0.02 * rng.uniform(0.7, 1.3, n))
    w[64:128, 3] = 0  # a group of zeros
    w[:, 5] *= F32(1024)
    importance = ref.bf16(rng.uniform(0.25, 4, k))
    cases = []
    for order, num_maps, weighted in (("mma64", 1, False), ("mma64", 4, True),
                                      ("natural", 4, False), ("natural", 1, True)):
        t = ref.encode_wint2(w, maps=ref.GOOD_MAPS[:num_maps], k_order=order,
                             hdiag=importance if weighted else None, span=2)
        cases.append({
            "k_order": order, "num_maps": num_maps, "weighted": weighted, "local_scale_radius": 2,
            "quant_weight_hex": t["quant_weight"].tobytes().hex(),
            "weight_scale_hex": t["weight_scale"].tobytes().hex(),
            "super_scales_hex": bits_hex(t["super_scales"]),
            "code_scale": t["code_scale"].astype(F32).tolist(),
            "code_zp": t["code_zp"].astype(F32).tolist(),
        })
    return {"k": k, "n": n, "weight_bits_hex": bits_hex(w),
            "importance_bits_hex": bits_hex(importance),
            "maps": [list(map(float, m)) for m in ref.GOOD_MAPS], "cases": cases}


def mixed_weights(ref, k, n):
    """The weights of MixedWeights in tools/quantizer/encode/encode_test_util.h."""
    z = np.arange(1, k * n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(40)).astype(F32) * F32(2.0**-24) - F32(0.5)
    factor = (1 + np.arange(n) % 7).astype(F32) * F32(0.03125)
    return ref.bf16(uniform.reshape(k, n) * factor)


def tied_weights(ref):
    """Small; columns 0 (WINT4) and 1 (WINT8) have weights halfway between two codes."""
    w = mixed_weights(ref, 64, 16)
    halves = np.arange(64) - 32 + F32(0.5)
    w[:, 0] = np.clip(halves, -7, 7) * F32(2.0**-7)
    w[:, 1] = halves * F32(2.0**-9)
    w[0, 1] = F32(127 * 2.0**-9)
    assert np.array_equal(w, ref.bf16(w))
    return w


def quantize_by_paddle(ref, w, bits):
    import paddle
    from paddle.nn.quant import weight_quantize
    assert paddle.__version__ == "3.3.1", paddle.__version__
    x = paddle.to_tensor(w).astype("bfloat16")
    results = []
    for arch in (80, 90):
        codes, scale = weight_quantize(x, algo=f"weight_only_int{bits}", arch=arch)
        results.append((codes.numpy().tobytes(), bits_hex(scale.astype("float32").numpy())))
    assert results[0] == results[1]
    t = (ref.encode_wint4 if bits == 4 else ref.encode_wint8)(w)
    assert results[0] == (t["quant_weight"].tobytes(), bits_hex(t["weight_scale"]))
    return results[0]


def per_channel_cases(ref, bits):
    w = tied_weights(ref)
    codes, scale = quantize_by_paddle(ref, w, bits)
    small = {"k": 64, "n": 16, "weight_bits_hex": bits_hex(w), "quant_weight_hex": codes.hex(),
             "weight_scale_hex": scale}
    large = []
    for k, n in ((256, 192), (384, 1024), (1024, 384)):
        codes, scale = quantize_by_paddle(ref, mixed_weights(ref, k, n), bits)
        large.append({"k": k, "n": n, "quant_weight_sha256": hashlib.sha256(codes).hexdigest(),
                      "weight_scale_hex": scale})
    return {"small": small, "large": large}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.path.insert(0, sys.argv[1])
    import wint2_reference as ref
    golden = {
        "command": "python3 tests/golden/make_quantizer_golden.py REFERENCE",
        "wint2": wint2_cases(ref),
        "wint4": per_channel_cases(ref, 4),
        "wint8": per_channel_cases(ref, 8),
    }
    text = json.dumps(golden, separators=(",", ":"))
    OUT.write_text(text.replace('],"', '],\n"').replace('","', '",\n"') + "\n")


if __name__ == "__main__":
    main()
