"""Models in the Hugging Face layout that tests write for themselves."""
import json
import math
import shutil
import struct

from server import ROOT

TINY = ROOT / "tests/data/tiny-bf16"


def shapes_of(config):
    """{name: shape} of every tensor."""
    layers, hidden, experts, width = (config[key] for key in ("num_hidden_layers", "hidden_size", "moe_num_experts",
                                                              "moe_intermediate_size"))
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = [hidden]
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": shape for name, shape in
                   (("q", [256, hidden]), ("k", [128, hidden]), ("v", [128, hidden]), ("o", [hidden, 256]))}
        shapes[prefix + "mlp.gate.weight"] = [experts, hidden]
        shapes[prefix + "mlp.moe_statics.e_score_correction_bias"] = [1, experts]
        for expert in range(experts):
            shapes |= {f"{prefix}mlp.experts.{expert}.{name}_proj.weight": shape for name, shape in
                       (("gate", [width, hidden]), ("up", [width, hidden]), ("down", [hidden, width]))}
    return shapes


def write_model(directory, weights, layers, hidden, width, experts):
    """A model with tiny-bf16's tokenizer; most of it is experts. weights(name, shape): the bytes of a tensor in
    bfloat16; None: zeros, which take no room on the disk."""
    directory.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, directory)
    config = json.loads((TINY / "config.json").read_text())
    config.update(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=64, intermediate_size=256, moe_intermediate_size=width, moe_num_experts=experts, moe_k=2,
                  moe_num_shared_experts=0, moe_layer_start_index=0, moe_layer_end_index=layers - 1)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = shapes_of(config)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            data = weights(name, shape)
            if data is not None:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(data)
        file.truncate(8 + len(text) + end)
