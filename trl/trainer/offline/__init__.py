"""Training on data sets: supervised fine-tuning and what else learns from rows instead of rollouts."""
