"""Prompts and responses as padded batches."""

from trl.data.collators import PadCollator, pad, place_on_columns, response_columns
from trl.data.loader import is_hub_dataset, prompt_loader

__all__ = ["PadCollator", "is_hub_dataset", "pad", "place_on_columns", "prompt_loader", "response_columns"]
