"""Studies: datasets x weightings x seeds, their statistics and figures."""
