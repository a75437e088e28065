"""A language model trained with ``fused_klq_loss`` in a plain PyTorch loop: python examples/plain_loop.py

The model is random and tiny; a response earns 1/16 for every even token id, and is over at its EOS or after 16 tokens.
Replace ``build_model``, ``prompts`` and ``reward`` with your own; the rest stays. For prompts of unequal length, and
for responses that a limit cuts off before they are over, see ``klq_kernels/lab/demo/train.py``.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from klq_kernels import KLQTargets, fused_klq_loss, klq_targets, linear_logprobs

VOCAB, PAD, EOS = 64, 0, 1
PROMPT, RESPONSE = 4, 16
TAU, EPOCHS, MINIBATCHES = 0.02, 4, 2


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, PROMPT))


def reward(actions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ((actions % 2 == 0) & mask).sum(1) / RESPONSE


def train(steps: int = 40, batch: int = 64, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    model = build_model()
    reference = copy.deepcopy(model).requires_grad_(False)
    value_head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(value_head.weight)
    optimizer = torch.optim.AdamW([*model.parameters(), *value_head.parameters()], lr=1e-3)
    curve = []
    for step in range(steps):
        # Rollout. mask is True at sampled tokens, the EOS among them.
        ids = model.generate(prompts(batch), do_sample=True, top_k=0, max_new_tokens=RESPONSE)
        actions = ids[:, PROMPT:]
        ended = (actions == EOS).long()
        mask = ended.cumsum(1) - ended == 0
        rewards = reward(actions, mask)

        # Targets. hidden[:, t] is what actions[:, t] was predicted from: the state one token earlier.
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[:, PROMPT - 1 : -1]
            ref_hidden = reference.model(ids).last_hidden_state[:, PROMPT - 1 : -1]
            logprobs = linear_logprobs(hidden, model.lm_head.weight, actions, mask=mask).logprobs
            ref_logprobs = linear_logprobs(ref_hidden, reference.lm_head.weight, actions, mask=mask).logprobs
            values = value_head(hidden).squeeze(-1)
            targets = klq_targets(logprobs, ref_logprobs, values, rewards, mask=mask, tau=TAU)

        # Updates.
        for _ in range(EPOCHS):
            for rows in torch.randperm(batch).chunk(MINIBATCHES):
                hidden = model.model(ids[rows]).last_hidden_state[:, PROMPT - 1 : -1]
                loss = fused_klq_loss(
                    hidden, model.lm_head.weight, actions[rows], value_head(hidden).squeeze(-1),
                    targets=KLQTargets(*(t[rows] for t in targets)), mask=mask[rows],
                    denom=mask.sum() / MINIBATCHES, tau=TAU,
                ).loss  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        kl = (logprobs - ref_logprobs).sum(1).mean()
        curve.append(rewards.mean().item())
        print(f"step {step:3d}  reward {curve[-1]:.3f}  KL {kl:.2f}  length {mask.sum(1).float().mean():.1f}")
    return curve


if __name__ == "__main__":
    train()
