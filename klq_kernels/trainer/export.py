"""The policy's weights as an engine loads them: whole, merged with their adapters, by the base model's own names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import gathered


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every parameter and saved buffer of a model, one at a time.

    Adapters of PEFT are merged into a copy of their layer, so the model stays as it is to the last bit, and memory for
    one layer is enough. A weight that is sharded (a ``DTensor``, or by ZeRO-3) is gathered, which all its processes
    must do together, and is whole until the next is asked for. A weight that several layers share comes once, under its
    first name; an adapter on one of them (a head tied to the embeddings) makes them two weights, which an engine has to
    hold apart.

    Args:
        model: a transformers model, with or without PEFT's layers in it.
    """
    return _weights(model, "", set())


def _weights(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if hasattr(module, "modules_to_save"):  # PEFT trains a copy of the whole layer
        yield from _weights(trained_copy(module), prefix, seen)
        return
    if hasattr(module, "get_base_layer"):  # a layer with adapters
        with gathered(module.parameters()):
            base = _merged(module)
            fresh = base is not module.get_base_layer()  # a copy has weights of its own, whose ids others have later
            yield from _weights(base, prefix, set() if fresh else seen)
        return
    passing = module._non_persistent_buffers_set
    buffers = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in passing]
    for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            with gathered([tensor]):
                yield prefix + name, _whole(tensor)
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.", seen)


def trained_copy(module: Any) -> nn.Module:
    """The layer that PEFT's ``modules_to_save`` puts in place of the original."""
    plain = module.disable_adapters or not module.modules_to_save
    layer: nn.Module = module.original_module if plain else module.modules_to_save[module.active_adapters[0]]
    return layer


@torch.no_grad()
def _merged(layer: Any) -> nn.Module:
    if not layer.merged and not layer.disable_adapters:
        layer = copy.deepcopy(layer)
        layer.merge()
    base: nn.Module = layer.get_base_layer()
    return base


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return whole
