"""Tiny models of many architectures, built from their configs by the sizes that configs have in common."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 64
# Those that these sizes make small and consistent. The others need sizes of their own (latent attention, hybrids with
# per-layer settings), or read more than text.
FAMILIES = """
    afmoe apertus apertus1p5_text arcee aria_text beam bert bert-generation big_bird biogpt bitnet bloom camembert
    codegen cohere cohere2 cohere2_moe cpmant ctrl cwm data2vec-text deepseek_v4 diffllama doge dory electra ernie
    ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_mamba flex_olmo flint gemma gemma2 gemma3_text glm glm4
    glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
    inkling_text internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lara_mini lfm2 llama llama4_text mamba
    megatron-bert mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
    modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta roberta-prelayernorm roformer rwkv
    sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma xglm xlm xlm-roberta xlm-roberta-xl
""".split()
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    "head_dim": 8, "rotary_dim": 8, "state_size": 8, "num_experts_per_tok": 2, "sliding_window": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
RATE = re.compile(r"drop|jitter")


def known(family: str) -> bool:
    """Whether the installed transformers has it."""
    return family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def config(family: str, **changes: Any) -> Any:
    settings = CONFIG_MAPPING[family]
    plain = settings()
    return settings(**{name: size for name, size in SIZES.items() if hasattr(plain, name)} | changes)


def build(settings: Any, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings).float()
    with torch.no_grad():  # the usual initialisation of a tiny model makes every softmax flat, and every state alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def with_dropout(family: str, rate: float) -> PreTrainedModel:
    """A model with every rate that training mode uses at ``rate``, whatever the family calls it."""
    names = [name for name, value in vars(config(family)).items() if isinstance(value, float) and RATE.search(name)]
    try:
        return build(config(family, **dict.fromkeys(names, rate)))
    except ValueError:  # of a family that has the name and refuses a rate
        return build(config(family))
