"""Frozen models, the reference and reward models: where their weights are, and how the reference is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..call.checks import require
from .actor_critic import Objective, States
from .batches import Inputs
from .models import LanguageModel
from .sharding import reshard, shard_frozen, shards_weights


class Policy(nn.Module):
    """A causal LM called with an objective as ``ActorCritic`` is; it has no values."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.language_model = LanguageModel(model)

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.model, "_no_split_modules", None)

    def forward(self, inputs: Inputs, objective: Objective) -> Any:
        """objective(states) of a batch; whatever it returns is returned."""
        hidden = self.language_model.hidden_states(inputs).index_select(0, inputs.rows)
        nothing = hidden.new_zeros(0)
        return objective(States(hidden, self.language_model.head(self.temperature), nothing, nothing))


class FrozenPolicy(Policy):
    """One that is not trained."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__(model.requires_grad_(False).eval(), temperature)


class Placed:
    """A frozen module whose weights are on the device, on the host between uses, or sharded over the processes.

    Args:
        module: frozen; its weights are moved.
        placement: 'device', 'cpu', 'sharded', or None: sharded where the engine shards the policy, else on the device.
        accelerator: accelerate's, which knows the engine.
        name: the argument that says where.

    Raises:
        ValueError: where it is to be sharded and no engine shards.
    """

    def __init__(self, module: nn.Module, placement: str | None, accelerator: Any, name: str) -> None:
        shards = shards_weights(accelerator)
        placement = placement or ("sharded" if shards else "device")
        require(shards or placement != "sharded", name, "'sharded' needs an engine that shards: FSDP2 or ZeRO-3")
        self.device = accelerator.device
        self.placement = placement
        if placement == "sharded":
            self.module = shard_frozen(accelerator, module)
        else:
            self.module = module.to("cpu" if placement == "cpu" else self.device)
        self._host: list[tuple[Tensor, Tensor]] = []
        if placement == "cpu":
            self._host = [(tensor, self._held(tensor)) for tensor in (*module.parameters(), *module.buffers())]

    def _held(self, tensor: Tensor) -> Tensor:
        tensor.data = tensor.data.pin_memory() if self.device.type == "cuda" else tensor.data
        return tensor.data

    @contextmanager
    def present(self) -> Iterator[nn.Module]:
        """Inside, the module can run. Frozen weights are not copied back: the host still has them."""
        try:
            with torch.no_grad():
                for tensor, host in self._host:
                    tensor.data = host.to(self.device, copy=True, non_blocking=True)
            yield self.module
        finally:
            for tensor, host in self._host:
                tensor.data = host
            reshard(self.module)


@contextmanager
def reference_policy(
    reference: Placed | None, trained: Any, language_model: LanguageModel
) -> Iterator[Callable[[Inputs, Objective], Any]]:
    """The reference, called as a policy is: a model of its own, or ``trained`` without its adapters."""
    if reference is not None:
        with reference.present() as frozen:
            yield frozen
        return

    def without_adapters(batch: Inputs, objective: Objective) -> Any:
        with language_model.without_adapters():
            return trained(batch, objective)

    yield without_adapters
