"""``python -m bench``: the command line of ``cli``."""

from .cli import app

app(prog_name="python -m bench")
