"""Guides: a language model's backbone and a linear head, which says the law of the reward after each token.

    ValueGuide    V-type: a head [A, H] reads the state after a token. Candidates for the next token are read by the
                  backbone, each of them
    ActionGuide   Q-type: a head [V A, H] reads the state before a token, and has A rows for each token of the
                  vocabulary. Outputs of the taken or candidate tokens alone are ever computed (``linear_select``)

A head begins at zero, which tilts nothing. It cannot learn from there where the states do not tell rewards apart yet:
it has no gradient then, and through zeros they have none either. ``wake`` gives it small random values, with which
training begins. A guide may be smaller than the reference; it reads the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ..call.checks import require
from ..selected import linear_select
from .laws import Law

FAILURES = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)  # of models in a probe
SETTINGS, HEAD = "guide.json", "guide_head.safetensors"


class ValueGuide(nn.Module):
    """V-type: reads the law of the reward-to-go under the reference policy in the state after each token.

    Args:
        backbone: a decoder; of a model with a head on top, its ``base_model`` is taken, and is trained in place.
        law: what the head's outputs mean.

    Raises:
        ValueError: where the model is no decoder with states, or ``law`` is no ``Law``.
    """

    def __init__(self, backbone: PreTrainedModel, law: Law | None = None) -> None:
        super().__init__()
        require(
            isinstance(backbone, PreTrainedModel),
            "backbone",
            f"must be a transformers model, got {type(backbone).__name__}",
        )
        require(law is None or isinstance(law, Law), "law", f"must be a Law, such as Law('bernoulli'); got {law!r:.80}")
        self.law = Law() if law is None else law
        self.backbone: Any = backbone.base_model
        config = backbone.config.get_text_config()
        require(not config.is_encoder_decoder, "backbone", "is an encoder-decoder; a decoder is needed")
        device = next(self.backbone.parameters()).device
        self.head = nn.Linear(width_of(self.backbone), self._rows(), dtype=torch.float32, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _rows(self) -> int:
        """Rows of the head."""
        return self.law.outputs

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the guide can read."""
        return int(self.backbone.get_input_embeddings().num_embeddings)

    @property
    def is_zero(self) -> bool:
        """Whether the head is zero, as it begins: the guide says the same of every token."""
        return not (self.head.weight.any() or self.head.bias.any())

    @torch.no_grad()
    def wake(self, seed: int) -> None:
        """Puts a head of zeros at random values of a size at which its outputs are of order 1, a function of seed."""
        if self.is_zero:
            generator = torch.Generator().manual_seed(seed)
            scale = self.head.weight.shape[1] ** -0.5
            values = torch.empty(self.head.weight.shape).uniform_(-scale, scale, generator=generator)
            self.head.weight.copy_(values)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """The outputs of the law after each token, fp32 [B, L, A]; ``inputs`` are further ones of the backbone."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        return self.read(states)

    def tail(self, candidates: Tensor) -> Tensor:
        """Of candidates [B, k], those that the backbone reads behind a prefix, for ``after``: all."""
        return candidates

    def after(self, states: Tensor, candidates: Tensor) -> Tensor:
        """The outputs after each candidate [B, k], fp32 [B, k, A], of states [B, L, H] that end with the tail's."""
        return self.read(states[:, -candidates.shape[1] :])

    def read(self, states: Tensor) -> Tensor:
        """The head's outputs, fp32 [..., A], of states [..., H] in any dtype."""
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float())

    @contextmanager
    def evaluating(self) -> Iterator[ValueGuide]:
        """Inside, the guide has no dropout and no gradients."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            self.train(was_training)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the backbone as transformers does, and the head and its law in two files beside it."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        parts = {
            part: {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}
            for part in ("backbone", "head")
        }
        self.backbone.save_pretrained(place, state_dict=parts["backbone"])
        save_file({name: tensor.contiguous() for name, tensor in parts["head"].items()}, place / HEAD)
        (place / SETTINGS).write_text(json.dumps({"kind": type(self).__name__, "law": asdict(self.law)}))

    @staticmethod
    def from_pretrained(folder: str | Path, **kwargs: Any) -> ValueGuide:
        """The guide that ``save_pretrained`` wrote; ``kwargs`` are those of transformers' ``from_pretrained``.

        Raises:
            ValueError: where the folder holds no guide.
        """
        place = Path(folder)
        missing = [name for name in (SETTINGS, HEAD) if not (place / name).is_file()]
        require(
            not missing,
            "folder",
            f"{place} is no guide, it lacks {', '.join(missing)}; build one with ValueGuide(backbone, law)",
        )
        settings = json.loads((place / SETTINGS).read_text())
        kind = {each.__name__: each for each in (ValueGuide, ActionGuide)}[settings["kind"]]
        guide = kind(AutoModel.from_pretrained(str(place), **kwargs), Law(**settings["law"]))
        guide.head.load_state_dict(load_file(place / HEAD))
        return guide


def width_of(backbone: Any) -> int:
    """The size of a backbone's last hidden states: some families project them to another than ``hidden_size``.

    Where it cannot read a token here (without memory, or on another device than its kernels want), its config says.
    """
    modes = {module: module.training for module in backbone.modules()}
    token = torch.zeros(1, 1, dtype=torch.long, device=next(backbone.parameters()).device)
    backbone.eval()
    try:
        with torch.no_grad():
            return int(backbone(input_ids=token, use_cache=False).last_hidden_state.shape[-1])
    except FAILURES:
        return int(backbone.config.get_text_config().hidden_size)
    finally:
        for module, training in modes.items():
            module.training = training


class ActionGuide(ValueGuide):
    """Q-type: reads the law after a token in the state before it, in the rows of the head that are that token's.

    A step of guided decoding costs one token of the backbone, whatever the number of candidates; the head has as many
    parameters as an lm_head, A times over. Arguments are those of ``ValueGuide``.
    """

    def _rows(self) -> int:
        return self.vocab_size * self.law.outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """The outputs of the law after each token, fp32 [B, L, A]; 0 after the first, which has no state before it."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        outputs = self._select(states[:, :-1], input_ids[:, 1:, None]).squeeze(2)
        return torch.cat([outputs.new_zeros(len(outputs), 1, self.law.outputs), outputs], 1)

    def tail(self, candidates: Tensor) -> Tensor:
        """None of the candidates: the state of the prefix says it of all."""
        return candidates[:, :0]

    def after(self, states: Tensor, candidates: Tensor) -> Tensor:
        return self._select(states[:, -1], candidates)

    def _select(self, states: Tensor, ids: Tensor) -> Tensor:
        """fp32 [..., k, A] for states [..., H] and ids [..., k]."""
        head = self.head
        with torch.autocast(states.device.type, enabled=False):
            return linear_select(states, head.weight, ids, bias=head.bias, atoms=self.law.outputs)
