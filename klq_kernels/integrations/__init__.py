"""Drop-ins for trainers that people already run: one file per host, which imports its host when it is called.

trl.py           TRL: ``linear_logprobs`` under the log-probabilities of its trainers
verl.py          verl: a policy loss and an advantage estimator in its registries
skyrl.py         SkyRL: the same
slime.py         slime: an advantage function and a loss, which it loads by path
prime_rl.py      prime-rl: a custom loss
nemo_rl.py       NeMo-RL: a loss of its protocol
host.py          shared: what is asked of an installed host, and replacements that can be undone
objective.py     shared: KLQ as the policy loss of a host that trains its critic apart
"""
