"""The ``klq`` command."""
