"""Does a model answer right: graders judge one answer, `run.evaluate` a whole set."""
