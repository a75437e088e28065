"""The pass over the vocabulary, written once over any backend, which it is handed: it imports none."""
