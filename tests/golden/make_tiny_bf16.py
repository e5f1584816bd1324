#!/usr/bin/env python3
"""Makes tests/data/tiny-bf16 and, where torch and transformers are installed, its goldens.

    python3 tests/golden/make_tiny_bf16.py             from the repository root; needs NumPy

The model is random but has every feature that models/poet lacks: the Hugging Face layout, shared
experts, a number of experts that is no power of two, and fewer key/value heads. Weights are scaled
so that the layers outweigh the embedding in the residual: otherwise a tied head would just repeat
its input.
"""
import json
import pathlib
import shutil
import struct

import numpy as np

SEED = 20
ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests/data/tiny-bf16"
GOLDEN = ROOT / "tests/golden/tiny-bf16.json"
TOKENIZER = ROOT / "models/poet"

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 3, 4, 2, 32
DENSE_WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K, SHARED = 128, 128, 5, 3, 2
VOCAB = 8192
PROMPT_LENGTHS = (1, 5, 12, 70, 130)  # within one block of 64 tokens, across one, across two
GREEDY_TOKENS = 48
# Prompts are drawn until no greedy step is closer than this to its runner-up, so that rounding in
# another order of summation cannot change an id.
LEAST_MARGIN = 0.02

CONFIG = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "use_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": DENSE_WIDTH,
    "moe_intermediate_size": EXPERT_WIDTH,
    "moe_num_experts": EXPERTS,
    "moe_k": TOP_K,
    "moe_num_shared_experts": SHARED,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": LAYERS - 1,
    "moe_layer_interval": 1,
    "moe_use_aux_free": True,
    "moe_norm_min": 1e-12,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


def bfloat16_bits(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def make_tensors():
    rng = np.random.default_rng(SEED)
    tensors = {}

    def matrix(name, rows, columns, gain=1.0, dtype="BF16"):
        values = rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)
        tensors[name] = (values.astype(np.float32), dtype)

    def norm(name):
        tensors[name] = ((1 + 0.2 * rng.standard_normal(HIDDEN)).astype(np.float32), "BF16")

    def mlp(prefix, width, gain):
        matrix(prefix + ".gate_proj.weight", width, HIDDEN, 1.5)
        matrix(prefix + ".up_proj.weight", width, HIDDEN, 1.5)
        matrix(prefix + ".down_proj.weight", HIDDEN, width, gain)

    tensors["model.embed_tokens.weight"] = (
        (0.5 * rng.standard_normal((VOCAB, HIDDEN))).astype(np.float32), "BF16")
    for layer in range(LAYERS):
        prefix = "model.layers.%d" % layer
        norm(prefix + ".input_layernorm.weight")
        matrix(prefix + ".self_attn.q_proj.weight", HEADS * HEAD_DIM, HIDDEN, 1.5)
        matrix(prefix + ".self_attn.k_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN, 1.5)
        matrix(prefix + ".self_attn.v_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN, 1.5)
        matrix(prefix + ".self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM, 1.5)
        norm(prefix + ".post_attention_layernorm.weight")
        if layer < CONFIG["moe_layer_start_index"]:
            mlp(prefix + ".mlp", DENSE_WIDTH, 1.5)
            continue
        matrix(prefix + ".mlp.gate.weight", EXPERTS, HIDDEN, 1.0, "F32")
        # As in the released models: large, nearly equal, its spread alone decides anything.
        bias = 25 + 0.05 * rng.standard_normal((1, EXPERTS))
        tensors[prefix + ".mlp.moe_statics.e_score_correction_bias"] = (
            bias.astype(np.float32), "F32")
        for expert in range(EXPERTS):
            mlp("%s.mlp.experts.%d" % (prefix, expert), EXPERT_WIDTH, 1.5)
        mlp(prefix + ".mlp.shared_experts", SHARED * EXPERT_WIDTH, 1.0)
    norm("model.norm.weight")
    return tensors


def write_safetensors(path, tensors):
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (values, dtype) in tensors.items():
        blob = (bfloat16_bits(values) if dtype == "BF16" else values).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape),
                        "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_model():
    MODEL.mkdir(parents=True, exist_ok=True)
    write_safetensors(MODEL / "model.safetensors", make_tensors())
    (MODEL / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, MODEL / name)


def golden_case(model, ids):
    import torch

    def logits_of(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].float()

    prompt_logits = logits_of(ids)
    positions = range(max(0, len(ids) - 4), len(ids))
    top = {p: torch.topk(prompt_logits[p], 8) for p in positions}
    tokens, margins = list(ids), []
    for _ in range(GREEDY_TOKENS):
        best = torch.topk(logits_of(tokens)[-1], 2)
        margins.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return {
        "ids": ids,
        "logits": [{"position": p, "top8_ids": top[p].indices.tolist(),
                    "top8": [round(v, 5) for v in top[p].values.tolist()]} for p in positions],
        "last_logits_l2": round(float(prompt_logits[-1].double().norm()), 4),
        "greedy": {
            "max_tokens": GREEDY_TOKENS,
            "ids": tokens[len(ids):],
            "finish": "length",
            "min_top2_margin": round(min(margins), 5),
            "min_top2_margin_step": int(np.argmin(margins)),
        },
    }


def write_goldens():
    try:
        import torch
        import transformers
    except ImportError as error:
        print("goldens left as they are: %s" % error)
        return
    torch.use_deterministic_algorithms(True)
    model = transformers.Ernie4_5_MoeForCausalLM.from_pretrained(
        str(MODEL), dtype=torch.float32, attn_implementation="eager")
    model.eval()
    rng = np.random.default_rng(SEED + 1)
    cases = []
    while len(cases) < len(PROMPT_LENGTHS):
        length = PROMPT_LENGTHS[len(cases)]
        case = golden_case(model, rng.integers(10, VOCAB, length).tolist())
        if case["greedy"]["min_top2_margin"] >= LEAST_MARGIN and 2 not in case["greedy"]["ids"]:
            cases.append(case)
    golden = {
        "command": "python3 tests/golden/make_tiny_bf16.py",
        "model": "tiny-bf16",
        "made_by": "transformers %s Ernie4_5_MoeForCausalLM, float32" % transformers.__version__,
        "arithmetic": "float32 throughout, bf16 weights widened exactly",
        "tolerance": {
            "float32_activations_abs": 0.002,
            "note": "absolute, on the logits; every greedy margin is ten times that",
        },
        "notes": "random prompts, given as ids. logits: the last four prompt positions, the eight "
                 "largest, best first. greedy: 48 tokens, nothing stops it",
        "cases": cases,
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    for case in cases:
        print("%4d ids, logits %s, least margin %g, eos %s, %d distinct" % (
            len(case["ids"]), case["logits"][-1]["top8"][:3], case["greedy"]["min_top2_margin"],
            2 in case["greedy"]["ids"], len(set(case["greedy"]["ids"]))))


if __name__ == "__main__":
    write_model()
    write_goldens()
