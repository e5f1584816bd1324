"""The bytes of a checkpoint's tensors, read without any library of the loader under test, and what
FastDeploy's parameters must hold by them."""
import json
import re

import numpy as np

EXPERTS = re.compile(r"(?P<mlp>.*\.mlp)\.(experts|fused_moe)\.(?P<matrix>up_gate_proj|down_proj)_"
                     r"(?P<part>weight|weight_scale|super_scales|code_scale|code_zp)")


class RawCheckpoint:
    def __init__(self, directory):
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        names = ([single.name] if single.exists() else
                 sorted(set(json.loads(index.read_text())["weight_map"].values())))
        self._tensors = {}
        for name in names:
            self._read_header(directory / name)

    def _read_header(self, path):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        length = int(data[:8].view("<u8")[0])
        header = json.loads(data[8:8 + length].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            self._tensors[name] = (data[begin:end], entry["shape"])

    def names(self):
        return set(self._tensors)

    def bytes_of(self, name):
        return self._tensors[name][0].tobytes()

    def matrix(self, name):
        """[rows, columns, bytes of an element]"""
        data, shape = self._tensors[name]
        return data.reshape(*shape, -1)


def arrange_wint2(codes):
    """[K/4, N] -> for each 8 columns and 64 weights of K their 16 code bytes a column: the order of
    FastDeploy's kernel since July 2025."""
    rows, columns = codes.shape[:2]
    return codes.reshape(rows // 16, 16, columns // 8, 8).transpose(2, 0, 3, 1).tobytes()


def expected_experts(match, files):
    part = "quant_weight" if match["part"] == "weight" else match["part"]
    names = []
    while (name := f"{match['mlp']}.experts.{len(names)}.{match['matrix']}.{part}") in files.names():
        names.append(name)
    alternatives = [b"".join(map(files.bytes_of, names))] if names else []
    if names and names[0].replace(part, "super_scales") in files.names() and part == "quant_weight":
        alternatives.append(b"".join(arrange_wint2(files.matrix(name)) for name in names))
    return names, alternatives


def expected_bytes(parameter, files):
    """(the tensors that a parameter of FastDeploy is made of, the bytes that it may hold)"""
    if match := EXPERTS.fullmatch(parameter):
        return expected_experts(match, files)
    name = (parameter.replace("embed_tokens.embeddings", "embed_tokens")
            .replace("lm_head.linear", "lm_head")
            .replace("experts.gate_correction_bias", "moe_statics.e_score_correction_bias"))
    if name == "lm_head.weight" and name not in files.names():
        name = "ernie.embed_tokens.weight"
        return [name], [files.matrix(name).transpose(1, 0, 2).tobytes()]
    quantized = re.sub(r"\.weight$", ".quant_weight", name)
    name = quantized if quantized in files.names() else name
    if name not in files.names():
        return [], []
    alternatives = [files.bytes_of(name)]
    if name.endswith(".mlp.gate.weight"):  # later versions turn it, [experts, hidden]
        alternatives.append(files.matrix(name).transpose(1, 0, 2).tobytes())
    return [name], alternatives
