"""Loading, sampling and padding of prompts."""

from trl.data.collators import PadCollator, pad, place_on_columns, response_columns
from trl.data.loader import is_hub_dataset, prompt_loader
from trl.data.prompts import Prompt, column_fingerprints, fingerprint, load_prompts
from trl.data.sampler import PromptSampler

__all__ = [
    "PadCollator",
    "Prompt",
    "PromptSampler",
    "column_fingerprints",
    "fingerprint",
    "is_hub_dataset",
    "load_prompts",
    "pad",
    "place_on_columns",
    "prompt_loader",
    "response_columns",
]
