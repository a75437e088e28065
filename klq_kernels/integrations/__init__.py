"""Drop-ins for trainers that people already run: one file per host, which imports its host when it is called.

trl.py           TRL: ``linear_logprobs`` under the log-probabilities of its trainers
host.py          shared: what is asked of an installed host, and replacements that can be undone
"""
