"""Extras of TRL 0.4 to 0.11: best-of-n sampling."""

from trl.extras.best_of_n_sampler import BestOfNSampler, Candidates

__all__ = ["BestOfNSampler", "Candidates"]
