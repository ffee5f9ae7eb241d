"""Demo: PPO for positive film reviews with the two bundled tiny models, in about a minute on two idle cores.

Run `python -m trl.demo`.
"""
