"""`wmss lab`: arms × learning rates × paired seeds, at equal steps, with intervals."""
