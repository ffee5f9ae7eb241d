"""The optimisation loop and its supporting parts: compute dtype, guards, optimizers, processes, resuming."""
