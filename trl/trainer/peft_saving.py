"""`PeftSavingCallback` of TRL 0.4 to 0.6, for training with `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class PeftSavingCallback(TrainerCallback):
    """Saves the adapter into each checkpoint of `transformers.Trainer`, in place of the whole model's weights.

    Today's Trainer saves a PEFT model in this way by itself; the callback is for scripts that pass it.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves `kwargs["model"]` into the checkpoint that was just written, and removes its `pytorch_model.bin`."""
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            kwargs["model"].save_pretrained(folder)
            (folder / "pytorch_model.bin").unlink(missing_ok=True)
