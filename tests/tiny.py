"""Tiny random models of many architectures, built from configs: shapes and numerics without a download."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 64

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "query_pre_attn_scalar": 12,
}

WINDOWS = {key: HYBRID[key] for key in ("layer_types", "sliding_window")}

SUPPORTED: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "phi3": {},
    "gemma2": HYBRID,
    "gemma3_text": HYBRID,
    "gemma4_text": {
        **WINDOWS,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "olmo2": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "smollm3": {},
    "mixtral": MOE,
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 48},
}

REFUSED: dict[str, dict] = {
    "deepseek_v3": {
        "head_dim": 4,
        **MOE,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
    "mamba": {},
    "t5": {},
    "qwen3_next": {
        **MOE,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}


def build(model_type: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 model of `model_type`; norms and biases randomised too, so that nothing cancels."""
    settings = {**COMMON, **SUPPORTED.get(model_type, {}), **REFUSED.get(model_type, {}), **changes}
    if model_type == "gpt2":
        settings = {key: value for key, value in settings.items() if not key.startswith(("num_", "hidden", "head_dim"))}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    if model_type == "t5":
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM.from_config(config)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.uniform_(0.6, 1.4)
    return model


@cache
def stock_model(model_type: str) -> PreTrainedModel:
    """One model of each type for the whole test run, never given to `ModelKVzip`: it would run our attention."""
    return build(model_type)


def ids(n: int, seed: int = 0) -> list[int]:
    """`n` random ids without special ones."""
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
