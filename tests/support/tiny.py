"""Tiny models, a byte-level tokenizer and a dataset for the tests of the trainer: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from klq_kernels.trainer import KLQConfig, KLQTrainer

FAMILIES = ("gpt_neox", "llama", "qwen2", "qwen3", "gemma2", "cohere", "granite")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PAD, EOS, VOCAB = 0, 1, 2 + len(ALPHABET)


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, <pad> and <eos>."""
    vocab = {"<pad>": PAD, "<eos>": EOS, **{c: i + 2 for i, c in enumerate(ALPHABET)}}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    if chat:
        out.chat_template = CHAT
    return out


def config(family: str = "llama", **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": EOS,
        "pad_token_id": PAD,
    }  # fmt: skip
    if family != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    if family == "gemma2":
        sizes |= {"head_dim": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
    if family == "qwen3":
        sizes["head_dim"] = 8
    if family == "cohere":
        sizes["logit_scale"] = 0.25
    if family == "granite":
        sizes["logits_scaling"] = 4.0
    return AutoConfig.for_model(family, **(sizes | changes))


def model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    out = AutoModelForCausalLM.from_config(config(family, **changes))
    with torch.no_grad():  # spread the logits: with the usual tiny initialisation every softmax is flat
        out.get_output_embeddings().weight.normal_(std=0.5)
    return out.float()


def classifier(seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config(num_labels=1, **changes)).float()


def prompts(number: int = 32) -> list[dict[str, str]]:
    """Prompts of unequal length, and a column for the rewards. Plain rows, which need no package ``datasets``."""
    texts = [chr(97 + i % 26) * (1 + i % 5) for i in range(number)]
    return [{"prompt": text, "letter": text[0]} for text in texts]


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even ids, of eight: learnt in a few steps."""
    return [sum(i % 2 == 0 for i in ids) / 8 for ids in completion_ids]


def arguments(folder: Path | str, **changes: Any) -> KLQConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_completion_length": 8, "bootstrap_truncated": False, "max_steps": 8,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return KLQConfig(str(folder), **(defaults | changes))


def trainer(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> KLQTrainer:
    """A trainer of a tiny Llama; ``given`` are arguments of the trainer, ``changes`` of its config."""
    defaults: dict[str, Any] = {"reward_funcs": even, "train_dataset": prompts(), "processing_class": tokenizer()}
    given = defaults | (given or {})
    return KLQTrainer(given.pop("model", None) or model(), args=arguments(folder, **changes), **given)


def losses(trained: KLQTrainer) -> list[float]:
    """The logged losses of a run."""
    return [logs["loss"] for logs in trained.state.log_history if "loss" in logs]
