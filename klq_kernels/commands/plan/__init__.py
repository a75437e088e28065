"""``klq plan``: will this model train on these GPUs, with how large a batch, how fast, and what does the loss cost.

    shapes.py     sizes of a model: presets, a transformers config, or given numbers
    run.py        how it is trained and on how many GPUs, and which combinations are possible
    memory.py     bytes per rank, term by term
    traffic.py    bytes per step and rank that each collective moves
    timing.py     seconds of a step, from given rates
    search.py     the largest batch that fits, and the option that helps most where none does
    table.py      all of that as plain JSON values, and as tables

The loss is in ``commands/loss_memory.py``.
"""
