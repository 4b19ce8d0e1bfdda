"""The lesson: one tiny step recorded line by line, for a page and for the terminal; gradients checked; exercises."""
