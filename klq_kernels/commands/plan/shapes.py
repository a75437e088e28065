"""The sizes of a decoder-only language model, dense or with experts: given, from a preset, or from a config."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from ...call.checks import require


class Model(NamedTuple):
    """A decoder-only language model with gated MLPs. ``parameters`` and what follows, None: from the sizes."""

    hidden: int
    vocab: int
    layers: int
    intermediate: int  # of the MLP, or of one expert
    tied: bool = False
    kv_share: float = 1.0  # key/value heads over query heads
    attention: int | None = None  # width of all query heads together; None: as hidden
    heads: int | None = None  # query heads; None: unknown
    experts: int = 1  # per layer; 1: dense
    active_experts: int = 1  # of them, those that a token passes through
    parameters: int | None = None
    routed_parameters: int | None = None  # those of all experts of all layers
    block_parameters: int | None = None  # those of the largest layer

    @property
    def width(self) -> int:
        """Of all query heads together."""
        return self.attention or self.hidden

    @property
    def kv_width(self) -> int:
        """Of all key heads together, and of all value heads."""
        return int(self.kv_share * self.width)

    @property
    def embeddings(self) -> int:
        """Parameters of the input embeddings, and of the lm_head."""
        return self.vocab * self.hidden

    @property
    def ends(self) -> int:
        """Parameters outside the layers: embeddings, lm_head and the last norm."""
        return (1 if self.tied else 2) * self.embeddings + self.hidden

    @property
    def norms(self) -> int:
        """Parameters that tensor parallelism leaves whole."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def routed(self) -> int:
        """Parameters of all experts."""
        if self.routed_parameters is not None:
            return self.routed_parameters
        return self.layers * self.experts * 3 * self.hidden * self.intermediate if self.experts > 1 else 0

    @property
    def block(self) -> int:
        """Parameters of a layer, the largest where they differ."""
        if self.block_parameters is not None:
            return self.block_parameters
        if self.parameters is not None:
            return self.body // max(self.layers, 1)
        router = self.hidden * self.experts if self.experts > 1 else 0
        mlp = 3 * self.hidden * self.intermediate * self.experts + router
        return 2 * self.hidden * (self.width + self.kv_width) + mlp + 2 * self.hidden

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.parameters if self.parameters is not None else self.layers * self.block + self.ends

    @property
    def body(self) -> int:
        """Parameters of the layers."""
        return self.size - self.ends

    @property
    def active(self) -> int:
        """Parameters that a token passes through."""
        return self.size - self.routed + self.routed * self.active_experts // self.experts

    @property
    def active_body(self) -> int:
        """Those of the layers."""
        return self.active - self.ends


def _llama(hidden: int, layers: int, intermediate: int, heads: int) -> Model:
    return Model(hidden, 128_256, layers, intermediate, kv_share=8 / heads, heads=heads)


PRESETS = {  # from the config.json of each
    "llama-3.1-8b": _llama(4096, 32, 14_336, 32),
    "qwen3-32b": Model(5120, 151_936, 64, 25_600, kv_share=8 / 64, attention=8192, heads=64),
    "llama-3.1-70b": _llama(8192, 80, 28_672, 64),
    "qwen3-235b-a22b": Model(
        4096, 151_936, 94, 1536, kv_share=4 / 64, attention=8192, heads=64, experts=128, active_experts=8
    ),
    "llama-3.1-405b": _llama(16_384, 126, 53_248, 128),
}


def preset(name: str) -> Model:
    """The model of that name. Raises ValueError where there is none."""
    require(name in PRESETS, "preset", f"must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def from_config(path_or_id: str) -> Model:
    """Sizes from a Hugging Face config: a directory, a file or an id. Needs transformers.

    Parameters are counted on the model that the config makes. Those of routed experts are known by their place, in a
    module called ``experts``.

    Raises:
        ValueError: where there is no such config, or it is not that of a language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path_or_id)
    except (OSError, ValueError) as error:
        raise ValueError(f"config: cannot load {path_or_id!r}: {error}") from error
    text = config.get_text_config()
    wanted = ("hidden_size", "vocab_size", "num_hidden_layers")
    absent = [name for name in wanted if not hasattr(text, name)]
    require(not absent, "config", f"{path_or_id} has no {', '.join(absent)}")
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    by_layer: dict[str, int] = {}
    for name, count in sizes.items():
        if found := re.search(r"\.layers?\.(\d+)\.|\.h\.(\d+)\.", name):
            by_layer[found[0]] = by_layer.get(found[0], 0) + count
    routed = sum(count for name, count in sizes.items() if ".experts." in name)
    heads = getattr(text, "num_attention_heads", None) or 1
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    dense = _first(text, "intermediate_size") or 4 * text.hidden_size
    return Model(
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        layers=text.num_hidden_layers,
        intermediate=(_first(text, "moe_intermediate_size") or dense) if routed else dense,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        kv_share=(_first(text, "num_key_value_heads") or heads) / heads,
        attention=heads * head_width,
        heads=heads,
        experts=(_first(text, "num_experts", "num_local_experts", "n_routed_experts") or 1) if routed else 1,
        active_experts=(_first(text, "num_experts_per_tok") or 1) if routed else 1,
        parameters=sum(sizes.values()),
        routed_parameters=routed,
        block_parameters=max(by_layer.values(), default=None),
    )


def _first(config: Any, *names: str) -> int | None:
    """The first of these that the config has."""
    return next((value for name in names if (value := getattr(config, name, None))), None)
