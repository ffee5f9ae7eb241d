"""Demo: PPO for positive film reviews with the two bundled tiny models, in about a minute. Run `python -m trl.demo`."""
