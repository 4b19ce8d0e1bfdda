"""The lesson: gradients checked, one step traced."""
