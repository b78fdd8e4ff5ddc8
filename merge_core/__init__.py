"""What a merge is: checkpoints, suites, task vectors, factors, methods, recipes, streaming."""
