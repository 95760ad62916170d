"""Single MLP neurons and sets of them: exact effects, sparsity, adjacency, and tests of whether a set gates or contributes."""
