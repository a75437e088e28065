"""``klq train``: its arguments, a run from there to a trained model, held-out results, the picture of a run."""
