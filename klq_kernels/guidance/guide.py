"""``ValueGuide``: a language model's backbone and a linear head, which reads the law of the reward after each token.

It is V-type: the state after a token says what the reference earns from there. The head begins at zero, which tilts
nothing. A guide may be smaller than the reference; it reads the same tokens.
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
from .laws import Law

SETTINGS, HEAD = "guide.json", "guide_head.safetensors"


class ValueGuide(nn.Module):
    """Reads the law of the reward-to-go under the reference policy after each token.

    Args:
        backbone: a decoder; of a model with a head on top, its ``base_model`` is taken, and is trained in place.
        law: what the head's outputs mean.

    Raises:
        ValueError: where the model is no decoder with states.
    """

    def __init__(self, backbone: PreTrainedModel, law: Law | None = None) -> None:
        super().__init__()
        require(
            isinstance(backbone, PreTrainedModel),
            "backbone",
            f"must be a transformers model, got {type(backbone).__name__}",
        )
        self.law = Law() if law is None else law
        self.backbone: Any = backbone.base_model
        config = backbone.config.get_text_config()
        require(not config.is_encoder_decoder, "backbone", "is an encoder-decoder; a decoder is needed")
        first = next(self.backbone.parameters())
        self.head = nn.Linear(config.hidden_size, self.law.outputs, dtype=torch.float32, device=first.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the guide can read."""
        return int(self.backbone.get_input_embeddings().num_embeddings)

    @property
    def is_zero(self) -> bool:
        """Whether the head is zero, as it begins: the guide says the same of every token."""
        return not (self.head.weight.any() or self.head.bias.any())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """The outputs of the law after each token, fp32 [B, L, A]; ``inputs`` are further ones of the backbone."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        return self.read(states)

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
        (place / SETTINGS).write_text(json.dumps(asdict(self.law)))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> ValueGuide:
        """A guide that ``save_pretrained`` wrote; ``kwargs`` are those of transformers' ``from_pretrained``.

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
        law = Law(**json.loads((place / SETTINGS).read_text()))
        guide = cls(AutoModel.from_pretrained(str(place), **kwargs), law)
        guide.load_head(place)
        return guide

    def load_head(self, folder: Path) -> None:
        """The head that was saved in a folder."""
        self.head.load_state_dict(load_file(folder / HEAD))
