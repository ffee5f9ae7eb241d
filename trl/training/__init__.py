"""The loop, and what each algorithm puts through it."""
