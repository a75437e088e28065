"""A policy that learns to call a calculator: python examples/calculator_tool.py

A prompt is a product, "37*48=". The policy may write an expression in brackets; a calculator puts its value behind the
closing bracket, and the policy goes on from there. So a completion takes turns, and looks like this:

    [37*48]1776.        the calculator wrote 1776, the policy the rest

``rollout`` samples such completions. It marks the calculator's tokens as not trained: policy and V read them, and learn
nothing from them. The policy is a small model whose supervised start uses the calculator well in one of three answers
and guesses in the others; the reward is for the right result alone. A minute or two on one CPU thread.
"""

import re
from copy import deepcopy
from random import Random

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from klq_kernels.lab.tasks.task import byte_tokenizer, small_model
from klq_kernels.lab.tasks.warm_start import supervise
from klq_kernels.trainer import Completions, KLQConfig, KLQTrainer
from klq_kernels.trainer.rollout import RolloutContext, generate

CALLS = 2  # of the calculator, in one completion
CALL = re.compile(r"\[(\d{1,4})([+*-])(\d{1,4})\]$")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def calculator(text: str) -> str:
    """The value of the expression in brackets at the end of ``text``, or a question mark."""
    call = CALL.search(text)
    return "?" if call is None else str(OPERATIONS[call[2]](int(call[1]), int(call[3])))


def rollout(prompts: list[str], trainer: RolloutContext) -> Completions:
    """Completions in turns of the policy and the calculator, with a mark at each token of whose it is."""
    tokenizer, args = trainer.tokenizer, trainer.args
    (bracket,) = tokenizer("]")["input_ids"]
    eos, most = tokenizer.eos_token_id, args.max_completion_length
    turn = deepcopy(trainer.generation_config)
    turn.eos_token_id = [eos, bracket]  # a turn of the policy is over at either
    asked = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    said: list[list[int]] = [[] for _ in prompts]
    trained: list[list[bool]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for call in range(CALLS + 1):
        if not going:
            break
        written = generate(
            trainer.policy, [asked[i] + said[i] for i in going], turn,
            batch_size=args.rollout_forward_batch_size, device=args.device,
        ).completion_ids  # fmt: skip
        for i, ids in zip(going, written, strict=True):
            ids = ids[: most - len(said[i])]
            said[i] += ids
            trained[i] += [True] * len(ids)
            if call < CALLS and ids and ids[-1] == bracket:
                answer = tokenizer(calculator(tokenizer.decode(said[i])))["input_ids"][: most - len(said[i])]
                said[i] += answer
                trained[i] += [False] * len(answer)
        going = [i for i in going if call < CALLS and said[i] and not trained[i][-1] and len(said[i]) < most]
    return Completions(said, trained=trained, truncated=[not ids or ids[-1] != eos for ids in said])


def right(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """1 for a completion that ends with the value of its prompt and a full stop."""
    values = [calculator(f"[{prompt[:-1]}]") for prompt in prompts]
    return [float(text.endswith(f"]{value}.")) for text, value in zip(completions, values, strict=True)]


def problem(rng: Random) -> str:
    return f"{rng.randint(10, 99)}*{rng.randint(10, 99)}="


def answer(prompt: str, rng: Random) -> str:
    """One answer in three uses the calculator; the others guess, in brackets or without them."""
    call = f"[{prompt[:-1]}]"
    wrong = f"[{rng.randint(10, 99)}*{rng.randint(10, 99)}]"
    return rng.choice([f"{call}{calculator(call)}.", f"{wrong}{calculator(wrong)}.", f"{rng.randint(100, 9999)}."])


def warm_started(tokenizer: PreTrainedTokenizerBase, steps: int, rng: Random) -> PreTrainedModel:
    """A small model after supervised steps on such answers."""
    model = small_model(tokenizer, seed=0, hidden_size=64)
    examples = ((prompt, answer(prompt, rng)) for prompt in iter(lambda: problem(rng), None))
    for _ in supervise(model, tokenizer, examples, steps=steps, batch=64, lr=4e-3):
        pass
    return model.eval()


def train(folder: str = "klq_output", warm_steps: int = 400, episodes: int = 32 * 80) -> KLQTrainer:
    rng, tokenizer = Random(0), byte_tokenizer()
    args = KLQConfig(
        folder,
        total_episodes=episodes,
        per_device_train_batch_size=32,
        num_generations=4,
        num_update_epochs=2,
        learning_rate=3e-4,
        value_learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_completion_length=24,
        bootstrap_truncated=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = KLQTrainer(
        warm_started(tokenizer, warm_steps, rng),
        right,
        args,
        train_dataset=[{"prompt": problem(rng)} for _ in range(512)],
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    for logs in train().state.log_history:
        if "objective/scores" in logs:
            print(f"step {logs['step']:4}   right {logs['objective/scores']:.0%}   KL {logs['objective/kl']:.2f}")
