"""What shows and studies the library: built-in tasks, the demonstration, the experiments."""
