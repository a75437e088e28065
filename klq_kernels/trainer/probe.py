"""Probes: a few tokens show whether a model does what the trainer takes it to do, whatever its family.

``KLQTrainer`` runs them at construction. A model that fails is refused with a ValueError that names the argument, or
is run in another way that is right; no list of families decides.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessor

from ..call.checks import require
from ..guidance.guide import FAILURES
from ..logprobs import linear_logprobs
from .batches import Sequence, collate
from .models import LanguageModel, backbone_states
from .rollout import generate

LENGTH = 6  # tokens of a probe
PROMPTS, SAMPLED = (3, 20), 4  # tokens of the prompts that sampling is probed with, and of their completions
# Names that modules and configs give to rates at which training mode changes something at random.
RANDOM_RATE = re.compile(r"drop|jitter|noise", re.IGNORECASE)
# PEFT initialisations that take the adapter's first value out of the base weights.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


def probe_ids(language_model: LanguageModel, number: int = LENGTH, first: int = 3) -> Tensor:
    """Token ids [number] within the vocabulary, all but for tiny vocabularies different."""
    vocab, device = language_model.vocab_size, next(language_model.model.parameters()).device
    return torch.arange(first, first + number, device=device).mul_(7).remainder_(vocab)


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the module is in training or evaluation mode; no gradient, and no trace in the random numbers."""
    before = {m: m.training for m in module.modules()}
    devices = sorted({p.device.index for p in module.parameters() if p.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices):
        module.train(training)
        try:
            yield
        finally:
            for m, was in before.items():
                m.training = was


def logits_of(language_model: LanguageModel) -> Tensor:
    """The model's own logits of the probe, fp32 [1, LENGTH, V], in evaluation mode."""
    with mode(language_model.model, training=False):
        ids = probe_ids(language_model).unsqueeze(0)
        return language_model.model(input_ids=ids, use_cache=False).logits.float()


def prove_head(language_model: LanguageModel) -> None:
    """Holds softcap(lm_head(hidden) * scale), as the trainer computes it, against the model's own logits.

    Raises:
        ValueError: where the log-probabilities differ, because the model does something else with its logits.
    """
    logits = logits_of(language_model)
    unlikely = logits.argmin(-1)  # farthest from the normaliser: another scale or cap shows most there
    with mode(language_model.model, training=False):
        ids = probe_ids(language_model).unsqueeze(0)
        hidden = language_model.backbone(input_ids=ids, use_cache=False).last_hidden_state
        head = language_model.head()
        require(
            hidden.shape[-1] == head.weight.shape[1],
            "model",
            f"{type(language_model.model).__name__} is not supported: its states have {hidden.shape[-1]} elements, its "
            f"lm_head reads {head.weight.shape[1]}",
        )
        ours = linear_logprobs(hidden, **head._asdict(), actions=unlikely).logprobs
    theirs = logits.log_softmax(-1).gather(-1, unlikely.unsqueeze(-1)).squeeze(-1)
    tolerance = max(1e-3, 4 * torch.finfo(head.weight.dtype).eps)  # in 16 bits every step rounds the logits
    error = (ours - theirs).abs().max().item()
    require(
        error <= 1e-3 + tolerance * logits.abs().max().item(),
        "model",
        f"{type(language_model.model).__name__} is not supported: its log-probabilities are not those of "
        f"softcap(lm_head(hidden) * scale); they differ by {error:.3g} on a probe",
    )


def prove_adapters(language_model: LanguageModel, given: Tensor | None) -> None:
    """Holds a PEFT model's head against its logits for adapters of any value, and its base against ``given``.

    Args:
        language_model: with adapters.
        given: ``logits_of`` the model before it got them; None where they are not known, or not needed.

    Raises:
        ValueError: where an adapter on the lm_head does something that the trainer does not, or where the model with
            its adapters switched off is not the model that was given.
    """
    if not language_model.is_peft:
        return
    with perturbed(language_model.model):
        try:
            prove_head(language_model)
        except ValueError as error:
            kinds = ", ".join(sorted(type(c).__name__ for c in language_model.model.peft_config.values()))  # type: ignore[operator]
            raise ValueError(
                f"peft_config: {kinds} on this model is not supported: {error}. Leave the lm_head out of "
                "target_modules, or use plain LoRA there"
            ) from error
    if given is not None:
        with language_model.without_adapters():
            change = _difference(logits_of(language_model), given)
        require(
            change <= _tolerance(language_model.head().weight.dtype),
            "peft_config",
            f"changes the base model: without adapters its logits differ from the given model's by {change:.3g}, so it "
            "is not the reference. Use init_lora_weights=True, or give the reference as ref_model",
        )


def check_initialisation(model: Any) -> None:
    """Refuses a PEFT model whose base was changed before it came here, where no probe can tell."""
    for name, settings in getattr(model, "peft_config", {}).items():
        kind = str(getattr(settings, "init_lora_weights", "")).lower()
        require(
            not kind.startswith(CHANGE_THE_BASE),
            "model",
            f"adapter {name!r} was initialised by {kind}, which changes the base model: without adapters it is not the "
            "reference. Give the reference as ref_model",
        )


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Inside, every trained parameter has another value, so that adapters that begin at zero do something."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted({p.device.index for p in trained if p.is_cuda})):
            for at, parameter in enumerate(trained):
                torch.manual_seed(at)
                parameter.add_(0.1 * torch.randn_like(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)


def silence(module: nn.Module, backbones: dict[str, nn.Module], language_model: LanguageModel) -> None:
    """Sets every rate of dropout and its relatives to 0, and proves that training mode is evaluation mode.

    Rates are numbers on modules or, where a family reads them at each call, in its config: whatever is called drop,
    jitter or noise.

    Args:
        module: everything that is trained.
        backbones: by the argument that brought them; each maps ids to ``last_hidden_state``.
        language_model: the policy.

    Raises:
        ValueError: naming the argument whose model still computes something else in training mode.
    """
    for part in module.modules():
        _zero_rates(part, vars(part))
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
    if all(_changes_in_training(b, language_model) == 0 for b in backbones.values()):
        return
    for config in {id(c): c for p in module.modules() if (c := getattr(p, "config", None)) is not None}.values():
        _zero_rates(config, vars(config))
    for name, backbone in backbones.items():
        error = _changes_in_training(backbone, language_model)
        require(
            error == 0,
            name,
            f"{type(backbone).__name__} computes something else in training mode than in evaluation mode (states "
            f"differ by {error:.3g}), so the policy that learns is not the one that sampled. Set its dropout, jitter "
            "or noise to 0 in its config before it is built; disable_dropout=False trains it as it is",
        )


def check_head_dropout(language_model: LanguageModel) -> None:
    """Refuses a lm_head that drops something in training mode, which the loss would not see."""
    dropped = [m for m in language_model.lm_head.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    require(
        not dropped,
        "disable_dropout",
        "must be True where an adapter on the lm_head has dropout: the loss computes with the merged weight",
    )


def _zero_rates(owner: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if isinstance(value, float) and RANDOM_RATE.search(name):
            setattr(owner, name, 0.0)


def _changes_in_training(backbone: nn.Module, language_model: LanguageModel) -> float:
    """The distance of states in training mode from those in evaluation mode, over a few draws; 0 for mere rounding."""
    ids = probe_ids(language_model).unsqueeze(0)

    def states() -> Tensor:
        return backbone(input_ids=ids, use_cache=False).last_hidden_state.float()

    with mode(backbone, training=False):
        calm = states()
    worst = 0.0
    for seed in range(4):  # a whole layer may be dropped, or not
        with mode(backbone, training=True):
            torch.manual_seed(seed)
            worst = max(worst, _difference(states(), calm))
    return worst if worst > _tolerance(next(backbone.parameters()).dtype) else 0.0


def prove_padding(name: str, backbone: nn.Module, language_model: LanguageModel) -> None:
    """Holds the states of a sequence in a batch padded on the right against those of the sequence alone.

    Raises:
        ValueError: naming the argument whose model lets the padding in.
    """
    long, short = _probe_sequence(language_model, 3), _probe_sequence(language_model, 5, LENGTH - 2)
    device = next(backbone.parameters()).device

    def states(*sequences: Sequence) -> Tensor:
        batch = collate(sequences, pad_id=0, padding_free=False).to(device)
        return backbone_states(backbone, batch)[batch.rows[-(LENGTH - 3) :]].float()

    with mode(backbone, training=False):
        alone = states(short)
        try:
            error = _difference(states(long, short), alone)
        except FAILURES as failure:
            raise ValueError(
                f"{name}: {type(backbone).__name__} is not supported: it fails on a batch that is padded on the right "
                f"({type(failure).__name__}: {str(failure).splitlines()[0]})"
            ) from failure
    require(
        error <= _tolerance(next(backbone.parameters()).dtype),
        name,
        f"{type(backbone).__name__} is not supported: padding on the right changes its states (by {error:.3g})",
    )


def prove_causal(name: str, backbone: nn.Module, language_model: LanguageModel) -> None:
    """Holds the first states of a sequence against those of one that goes on otherwise.

    Raises:
        ValueError: naming the argument whose model reads tokens that come later, which no policy has at hand as it
            samples.
    """
    kept = LENGTH // 2
    sequence, other = (_probe_sequence(language_model, at).ids for at in (3, 11))
    device = next(backbone.parameters()).device

    def states(ids: Tensor) -> Tensor:
        alone = Sequence(ids[:1], ids[1:], torch.ones(LENGTH - 1, dtype=torch.bool))
        batch = collate([alone], pad_id=0, padding_free=False).to(device)
        return backbone_states(backbone, batch)[:kept].float()

    with mode(backbone, training=False):
        error = _difference(states(torch.cat([sequence[:kept], other[kept:]])), states(sequence))
    require(
        error <= _tolerance(next(backbone.parameters()).dtype),
        name,
        f"{type(backbone).__name__} is not causal: tokens that come later change its states (by {error:.3g}); give a "
        "decoder (some families are one with is_decoder=True in their config)",
    )


def prove_value_head(model: Any, value: Any, language_model: LanguageModel) -> None:
    """Holds the values of a model's own head, as a ``ValueFunction`` computes them, against what the model returns.

    Raises:
        ValueError: naming ``value_model``, where its head reads anything else than the last hidden states.
    """
    ids = probe_ids(language_model).to(next(model.parameters()).device)
    ids = ids[ids != model.config.get_text_config().pad_token_id].unsqueeze(0)  # it reads the last that is no padding

    def in_its_precision(head: nn.Linear, inputs: Any) -> Any:
        return (inputs[0].to(head.weight.dtype), *inputs[1:])  # the head is fp32, whatever the model is

    hook = value.head.register_forward_pre_hook(in_its_precision)
    try:
        with mode(model, training=False):
            theirs = model(input_ids=ids).logits.float().flatten()[-1]
            ours = value(value.backbone(input_ids=ids, use_cache=False).last_hidden_state[:, -1])[0]
    finally:
        hook.remove()
    error = _difference(ours, theirs)
    require(
        error <= max(1e-3, _tolerance(next(value.backbone.parameters()).dtype)),
        "value_model",
        f"{type(model).__name__} is not supported: its score is not its head's of the last token's hidden state (they "
        f"differ by {error:.3g}); give its backbone (AutoModel), and a head that begins at 0 is trained on it",
    )


class _Forced(LogitsProcessor):
    """Has ``generate`` choose known tokens, and notes the logits that it would have chosen by."""

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen  # [B, steps]
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.float())
        token = self.chosen[:, len(self.logits) - 1 : len(self.logits)].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def prove_sampling(language_model: LanguageModel) -> None:
    """Holds the log-probabilities by which ``rollout.generate`` samples against those that the trainer scores.

    Sampling pads on the left and goes on from a KV cache, scoring pads on the right and reads a sequence at once. The
    prompts are of unequal length. What begins beyond so few tokens, such as a sliding window of thousands, is not seen.

    Raises:
        ValueError: naming ``model``, where they differ, or where it cannot generate.
    """
    model = language_model.model
    name, device = type(model).__name__, next(model.parameters()).device
    prompts = [probe_ids(language_model, number, 3 + number).tolist() for number in PROMPTS]
    chosen = torch.stack([probe_ids(language_model, SAMPLED, first) for first in (5, 12)])
    advice = "sample with a rollout_func or an engine"
    config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=SAMPLED, pad_token_id=0, eos_token_id=None, use_cache=True
    )
    forced = _Forced(chosen)
    with mode(model, training=False):
        try:
            generate(model, prompts, config, batch_size=len(prompts), device=device, processor=lambda mask: forced)
        except FAILURES as failure:
            raise ValueError(
                f"model: {name} cannot sample: its generate fails on a batch that is padded on the left "
                f"({type(failure).__name__}: {' '.join(str(failure).splitlines()[:1])}); {advice}"
            ) from failure
        batch = collate(
            [
                Sequence(torch.tensor(p), c, torch.ones(SAMPLED, dtype=torch.bool))
                for p, c in zip(prompts, chosen.cpu(), strict=True)
            ],
            pad_id=0,
            padding_free=False,
        ).to(device)
        logits = torch.stack(forced.logits, 1).flatten(0, 1).to(device)  # a row per scored token
        hidden = language_model.hidden_states(batch).index_select(0, batch.rows)
        head = language_model.head()
        error = 0.0
        for actions in (batch.actions, logits.argmin(-1)):  # the latter are farthest from the normaliser
            ours = linear_logprobs(hidden.unsqueeze(0), **head._asdict(), actions=actions.unsqueeze(0)).logprobs[0]
            theirs = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            error = max(error, (ours - theirs).abs().nan_to_num(torch.inf).max().item())
    tolerance = max(1e-3, _tolerance(head.weight.dtype))
    require(
        error <= 1e-3 + tolerance * logits.abs().max().item(),
        "model",
        f"{name} samples by other log-probabilities than those it is scored by: they differ by {error:.3g} on a probe, "
        f"so padding on the left or its KV cache changes what it computes; {advice}",
    )


def prove_settings(language_model: LanguageModel, generation_config: GenerationConfig) -> None:
    """Samples two tokens after prompts of unequal length under the settings that a user has given.

    Raises:
        ValueError: naming ``generation_kwargs``, where ``rollout.generate`` cannot.
    """
    model, settings = language_model.model, copy.deepcopy(generation_config)
    settings.max_new_tokens, settings.min_new_tokens, settings.min_length = 2, None, 0
    prompts = [probe_ids(language_model, number).tolist() for number in (1, LENGTH)]
    with mode(model, training=False):
        try:
            generate(model, prompts, settings, batch_size=len(prompts), device=next(model.parameters()).device)
        except FAILURES as failure:
            raise ValueError(
                "generation_kwargs: generate fails with them on a batch of prompts "
                f"({type(failure).__name__}: {' '.join(str(failure).split())}); leave out what it cannot do"
            ) from failure


def shared_positions(backbones: Iterable[nn.Module], language_model: LanguageModel) -> int | None:
    """The smallest ``positions_of`` backbones that read the same sequences."""
    known = (positions_of(backbone, language_model) for backbone in backbones)
    return min((number for number in known if number is not None), default=None)


def positions_of(backbone: nn.Module, language_model: LanguageModel) -> int | None:
    """How many tokens a backbone has learned positions for; None where it looks positions up in no table.

    The table shows itself: its rows are read one after another, whatever the tokens are.
    """
    lookups = _Lookups()
    ids = probe_ids(language_model).unsqueeze(0).to(next(backbone.parameters()).device)
    with mode(backbone, training=False), lookups:
        try:
            backbone(input_ids=ids, use_cache=False)
        except FAILURES:  # ``prove_padding`` says of what it fails
            return None
    counting, learned = torch.arange(LENGTH, device=ids.device), {id(p) for p in backbone.parameters()}
    known = [
        len(table) - int(rows[0])
        for rows, table in lookups.found
        if id(table) in learned and rows.shape == counting.shape and torch.equal(rows - rows[0], counting)
    ]
    return min(known, default=None)


class _Lookups(TorchFunctionMode):
    """Notes the rows that embeddings are asked for, flat, and their tables."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.embedding:
            rows, table = args[:2]
            self.found.append((rows.flatten(), table))
        return function(*args, **(kwargs or {}))


def keeps_sequences_apart(backbone: nn.Module, language_model: LanguageModel) -> bool:
    """Whether a backbone reads concatenated sequences, told apart by their positions, as if each were alone.

    Two packs differ in their first sequence alone; then the states of the second must be the same in both, and those of
    the second by itself.
    """
    first, other, second = (_probe_sequence(language_model, at) for at in (3, 11, 5))
    device = next(backbone.parameters()).device

    def states(*sequences: Sequence) -> Tensor:
        batch = collate(sequences, pad_id=0, padding_free=True).to(device)
        return backbone_states(backbone, batch)[-LENGTH:].float()

    with mode(backbone, training=False):
        try:
            packed, after_other, alone = states(first, second), states(other, second), states(second)
        except FAILURES:
            return False  # takes no positions, or no batch without a mask
    if _difference(packed, after_other) > _tolerance(torch.float32):
        return False
    return _difference(packed, alone) <= _tolerance(next(backbone.parameters()).dtype)


def _probe_sequence(language_model: LanguageModel, first: int, length: int = LENGTH) -> Sequence:
    ids = probe_ids(language_model, length, first).cpu()
    return Sequence(ids[:1], ids[1:], torch.ones(length - 1, dtype=torch.bool))


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, over the largest element; infinite where something is not a number."""
    found = ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()
    return found if found == found else float("inf")


def _tolerance(dtype: torch.dtype) -> float:
    """The difference that rounding may make when the same computation is done in another order."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 16 * torch.finfo(dtype).eps
