"""PPO for positive film reviews on the two tiny models of the package, in a minute or so: `python -m trl.demo`."""
