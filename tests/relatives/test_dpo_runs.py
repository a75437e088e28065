"""DPO and TDPO: losses and gradients against the oracle, what a run learns, reading pairs, resuming, wrong input."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from klq_kernels import reference as oracle
from klq_kernels.trainer import DPOConfig, DPOTrainer
from klq_kernels.trainer.actor_critic import held
from klq_kernels.trainer.batches import Sequence, collate
from klq_kernels.trainer.frozen import Policy
from klq_kernels.trainer.relatives.dpo import pair_losses
from klq_kernels.trainer.relatives.pairs import PairReader

LOSSES = ("dpo", "tdpo1", "tdpo2")


def arguments(folder: Path, **changes: Any) -> DPOConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 8,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return DPOConfig(str(folder), **(defaults | changes))


def pairs(number: int = 32) -> list[dict[str, str]]:
    """Even characters are preferred to odd ones, of different numbers."""
    texts = [row["prompt"] for row in tiny.prompts(number)]
    even, odd = "bdfhjlnp", "acegikmo"
    return [
        {"prompt": t, "chosen": even[i % 4 :][: 2 + i % 3], "rejected": odd[i % 3 :][: 2 + i % 5]}
        for i, t in enumerate(texts)
    ]


def trainer(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> DPOTrainer:
    defaults: dict[str, Any] = {"train_dataset": pairs(), "processing_class": tiny.tokenizer()}
    given = defaults | (given or {})
    return DPOTrainer(given.pop("model", None) or tiny.model(), args=arguments(folder, **changes), **given)


def logged(run: DPOTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


# ---- against the oracle --------------------------------------------------------------------------------------------


def ragged() -> list[Sequence]:
    """Three pairs of unequal lengths, the preferred first, with tokens inside that are not trained."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for prompt, completion in ((2, 5), (1, 1), (4, 3), (2, 3), (1, 7), (4, 2)):
        ids = torch.randint(2, tiny.VOCAB, (prompt + completion,), generator=generator)
        trained = torch.rand(completion, generator=generator) < 0.7
        trained[0] = True
        out.append(Sequence(ids[:prompt], ids[prompt:], trained))
    return out


def stated(policy: Policy, frozen: Policy, sequences: list[Sequence], config: DPOConfig) -> Tensor:
    """The loss of each pair by ``reference``, one sequence after another, from whole logits in float64."""
    sums, divergences = [], []
    for sequence in sequences:
        both = []
        for model in (policy.model, frozen.model):
            logits = model(input_ids=sequence.ids.unsqueeze(0)).logits[0, len(sequence.prompt) - 1 : -1].double()
            both.append(logits[sequence.trained])
        identity = torch.eye(both[0].shape[1], dtype=torch.float64)
        actions = sequence.completion[sequence.trained]
        logp, ref = (oracle.linear_logprobs(logits, identity, actions).logprobs for logits in both)
        kl = oracle.linear_kl(both[0], identity, both[1], identity, direction="reverse")
        whole = torch.tensor([0, len(actions)])
        sums.append(oracle.sequence_sums(logp - ref, cu_seqlens=whole))
        divergences.append(oracle.sequence_sums(kl, cu_seqlens=whole))
    chosen, rejected = torch.cat(sums).chunk(2)
    if config.loss == "dpo":
        return oracle.dpo_loss(chosen, rejected, beta=config.beta)
    alpha = None if config.loss == "tdpo1" else config.tdpo_alpha
    return oracle.tdpo_loss(chosen, rejected, *torch.cat(divergences).chunk(2), beta=config.beta, alpha=alpha)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "concatenated"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_the_oracle(tmp_path: Path, loss: str, padding_free: bool) -> None:
    config = arguments(tmp_path, loss=loss, beta=0.3, tdpo_alpha=0.7)
    policy, frozen = (Policy(tiny.model(seed=seed)) for seed in (0, 1))
    batch = collate(ragged(), pad_id=tiny.PAD, padding_free=padding_free)
    with torch.no_grad():
        states = frozen(batch, held)
    losses, _ = policy(batch, partial(pair_losses, inputs=batch, reference=states, config=config))
    losses.mean().backward()

    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    expected = stated(exact, copy.deepcopy(frozen).double(), ragged(), config)
    expected.mean().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(policy.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        error = (ours.grad.double() - theirs.grad).norm()
        assert error <= 2e-4 * theirs.grad.norm(), name


def test_the_oracle_states_the_papers_equations() -> None:
    chosen, rejected, chosen_kl, rejected_kl = (
        torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (2.0, -1.0, 0.5, 3.0)
    )
    assert oracle.dpo_loss(chosen, rejected, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    first = oracle.tdpo_loss(chosen, rejected, chosen_kl, rejected_kl, beta=0.5)
    assert first.item() == pytest.approx(math.log1p(math.exp(-1.5 + 0.5 * 2.5)))
    second = oracle.tdpo_loss(chosen, rejected, chosen_kl, rejected_kl, beta=0.5, alpha=0.2)
    assert second.item() == pytest.approx(math.log1p(math.exp(-1.5 + 0.2 * 0.5 * 2.5)))
    assert torch.autograd.grad(second, chosen_kl, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(second, rejected_kl)[0].item() > 0
    assert torch.autograd.grad(first, chosen_kl)[0].item() < 0


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_learns_what_is_preferred(tmp_path: Path, loss: str) -> None:
    run = trainer(tmp_path, {"eval_dataset": pairs(48)[32:]}, loss=loss, max_steps=24)
    before = run.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is its reference
    run.train()
    after = run.evaluate()
    assert after["eval_rewards/accuracies"] == 1.0
    assert after["eval_rewards/margins"] > 0.5
    assert after["eval_loss"] < before["eval_loss"] - 0.2
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]
    if loss != "dpo":
        assert logged(run, "kl/chosen")[0] == 0.0
        assert logged(run, "kl/rejected")[-1] > 0.01
    for ours, given in zip(run.reference.module.parameters(), tiny.model().parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(ours, given)


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_adapters_learn_with_the_base_model_as_reference(tmp_path: Path, loss: str) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.1)
    run = trainer(tmp_path, {"peft_config": lora}, loss=loss, learning_rate=1e-2)
    assert run.reference is None
    run.train()
    assert logged(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(run, "rewards/margins")[-1] > 0.1
    with run.policy.disable_adapter():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(run.policy(input_ids=ids).logits, tiny.model()(input_ids=ids).logits)


def test_a_run_does_not_depend_on_how_its_pairs_are_laid_out(tmp_path: Path) -> None:
    """Padded or concatenated, in one micro-batch or in two, with the reference on the host between uses."""
    found = []
    for changes in (
        {},
        {"padding_free": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"ref_placement": "cpu", "gradient_checkpointing": True},
    ):
        run = trainer(tmp_path, loss="tdpo2", max_steps=3, **changes)
        run.train()
        found.append(logged(run, "loss"))
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "max_steps": 6}
    whole = trainer(tmp_path, loss="tdpo2", **settings)
    whole.train()
    again = trainer(tmp_path, loss="tdpo2", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for ours, theirs in zip(again.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name in ("rewards/margins", "kl/chosen"):  # the log at step 4 has the step before the checkpoint in it
        assert logged(again, name)[-2:] == pytest.approx(logged(whole, name)[-2:], rel=1e-6)
    again.save_model(str(tmp_path / "saved"))
    saved = type(whole.policy).from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(saved(input_ids=ids).logits, whole.policy(input_ids=ids).logits)


# ---- reading pairs -------------------------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return tiny.tokenizer()(text)["input_ids"]


def test_texts_are_read_with_one_eos() -> None:
    read = PairReader(tiny.tokenizer(), tiny.VOCAB, max_prompt_length=2, max_completion_length=3)
    chosen, rejected = read.sequences([{"prompt": "abc", "chosen": "de", "rejected": "fghi"}])
    assert chosen.prompt.tolist() == rejected.prompt.tolist() == ids("bc")
    assert chosen.completion.tolist() == [*ids("de"), tiny.EOS]
    assert rejected.completion.tolist() == ids("fgh")  # cut
    assert chosen.trained.all()
    ended, _ = read.sequences([{"prompt": "a", "chosen": "d<eos>", "rejected": "e"}])
    assert ended.completion.tolist() == [*ids("d"), tiny.EOS]


def test_chats_are_read_through_the_template() -> None:
    read = PairReader(tiny.tokenizer(chat=True), tiny.VOCAB)
    chat = [{"role": "user", "content": "hi"}]
    reply = [{"role": "assistant", "content": "yo"}]
    chosen, rejected = read.sequences([{"prompt": chat, "chosen": reply, "rejected": "no"}])
    assert chosen.prompt.tolist() == ids("<user>hi<assistant>")
    assert chosen.completion.tolist() == [*ids("yo"), tiny.EOS]
    assert rejected.completion.tolist() == [*ids("no"), tiny.EOS]
    for wrong in ({"prompt": "hi", "chosen": chat}, {"prompt": chat, "chosen": chat}):  # a reply by the user
        with pytest.raises(ValueError, match=r"^chosen: "):
            read.sequences([{"rejected": "no", **wrong}])


# ---- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("loss", {"loss": "ipo"}),
        ("beta", {"beta": 0.0}),
        ("tdpo_alpha", {"tdpo_alpha": -1.0}),
        ("max_completion_length", {"max_completion_length": 0}),
        ("ref_placement", {"ref_placement": "disk"}),
        ("ref_dtype", {"ref_dtype": "int8"}),
        ("remove_unused_columns", {"remove_unused_columns": True}),
        ("label_smoothing_factor", {"label_smoothing_factor": 0.1}),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        arguments(tmp_path, **changes)


def test_wrong_models_and_data_are_named(tmp_path: Path) -> None:
    model = tiny.model()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("train_dataset", {"train_dataset": tiny.prompts()}),
        ("train_dataset", {"train_dataset": []}),
        ("eval_dataset", {"eval_dataset": tiny.prompts()}),
        ("rejected", {"train_dataset": [{"prompt": "a", "chosen": "b", "rejected": ""}]}),
        ("ref_model", {"ref_model": model, "model": model}),  # would be trained along
        ("ref_model", {"ref_model": tiny.model(vocab_size=40)}),
    ]
    for argument, given in wrong:
        with pytest.raises(ValueError, match=f"^{argument}: "):
            trainer(tmp_path, given)
    with pytest.raises(ValueError, match=r"^args: must be a DPOConfig"):
        DPOTrainer(model, tiny.arguments(tmp_path), pairs(), None, tiny.tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^ref_placement: must be one of device, cpu"):
        trainer(tmp_path, ref_placement="sharded")
