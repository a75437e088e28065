"""Demonstrations and studies of the library: built-in tasks, the demonstration, the experiments."""
