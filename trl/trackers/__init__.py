"""Where statistics and completions go."""

from trl.trackers.completions import completions_table

__all__ = ["completions_table"]
