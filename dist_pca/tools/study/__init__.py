"""Studies: a grid of runs trained, scored and compared, and the choice of one without target labels."""
