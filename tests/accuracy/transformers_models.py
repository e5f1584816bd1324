"""Checkpoints run by the transformers library, and random ones made with it."""
import gc
import json
import types

import numpy as np
import torch
import transformers

from outputs import GREEDY_TOKENS, STOP_ID

# The published configurations, but for the number of layers.
# https://huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT, ERNIE-4.5-0.3B-PT
RANDOM_MODELS = {
    "0.3b": {
        "class": "Ernie4_5",
        "vocab_size": 103424, "hidden_size": 1024, "num_hidden_layers": 18,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
        "intermediate_size": 3072,
    },
    "21b": {
        "class": "Ernie4_5_Moe",
        "vocab_size": 103424, "hidden_size": 2560, "num_hidden_layers": 3,
        "num_attention_heads": 20, "num_key_value_heads": 4, "intermediate_size": 12288,
        "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
        "moe_layer_interval": 1, "moe_norm_min": 1e-12,
    },
}
COMMON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": True,
          "hidden_act": "silu", "use_bias": False, "bos_token_id": 1, "eos_token_id": 2,
          "pad_token_id": 0,
          "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}


def _free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_random_checkpoint(name, directory, device, overrides=None):
    """Writes a bfloat16 checkpoint of the shapes of RANDOM_MODELS[name].

    A matrix has the variance 1 / inputs, which keeps activations near 1; the embedding is small, so
    that the layers outweigh it in the residual and a tied head does not just repeat its input. The
    routing bias is large and nearly constant, as trained ones are."""
    settings = {**COMMON, **RANDOM_MODELS[name], **(overrides or {})}
    kind = settings.pop("class")
    config = getattr(transformers, kind + "Config")(**settings)
    torch.manual_seed(21)
    with torch.device(device):
        model = getattr(transformers, kind + "ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("e_score_correction_bias"):
                # float32 in a checkpoint, and so is the router's matrix
                parameter.data = 30 + 0.01 * torch.randn(parameter.shape, device=device)
            elif "embed_tokens" in parameter_name:
                parameter.normal_(std=0.02)
            elif parameter.dim() == 1:
                parameter.uniform_(0.8, 1.2)
            else:
                if parameter_name.endswith("mlp.gate.weight"):
                    parameter.data = parameter.data.float()
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    del model
    _free()


class TransformersModel:
    """One checkpoint on one device. dtype: "float32" or "bfloat16"."""

    def __init__(self, directory, device, dtype):
        # Plain float32: no TensorFloat-32, and one expert after the other.
        torch.set_float32_matmul_precision("highest")
        self.device = device
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), experts_implementation="eager").to(device).eval()
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=GREEDY_TOKENS, eos_token_id=STOP_ID, pad_token_id=0)

    def close(self):
        del self.model
        _free()

    @torch.no_grad()
    def logits(self, sequences, batch=32):
        """float32 [all positions, vocabulary] of the sequences one after the other."""
        rows = [None] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda s: len(sequences[s]))
        for begin in range(0, len(order), batch):
            chosen = order[begin:begin + batch]
            # Padding stands behind: causal attention does not see it.
            ids = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(sequences[s]) for s in chosen], batch_first=True).to(self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits
            for place, s in enumerate(chosen):
                rows[s] = logits[place, :len(sequences[s])].float().cpu().numpy()
        return np.concatenate(rows) if rows else np.zeros((0, self.model.config.vocab_size))

    @torch.no_grad()
    def greedy(self, prompts):
        longest = max(map(len, prompts))
        padding = [[0] * (longest - len(ids)) for ids in prompts]
        ids = torch.tensor([pad + ids for pad, ids in zip(padding, prompts)], device=self.device)
        mask = torch.tensor([pad + [1] * len(ids) for pad, ids in zip(padding, prompts)],
                            device=self.device)
        continuations = self.model.generate(input_ids=ids, attention_mask=mask)[:, longest:].tolist()
        return [ids[:ids.index(STOP_ID) + 1] if STOP_ID in ids else ids for ids in continuations]

    def run(self, sequences, prompts=()):
        """As outputs.Run."""
        return types.SimpleNamespace(logits=self.logits(sequences),
                                     greedy=self.greedy(prompts) if prompts else [])
