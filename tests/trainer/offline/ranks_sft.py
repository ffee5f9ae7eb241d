"""A short SFT run for one process or several: `ranks_sft.py FOLDER ROWS_PER_PROCESS`; writes its log rows as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.helpers import tiny_llama, tiny_tokenizer
from tests.trainer.offline.data import pairs, quiet
from trl import SFTConfig, SFTTrainer


def main() -> None:
    folder = Path(sys.argv[1])
    settings = quiet(per_device_train_batch_size=int(sys.argv[2]), max_steps=3, logging_steps=1, learning_rate=0.01)
    config = SFTConfig(str(folder / "out"), bf16=False, **settings)
    trainer = SFTTrainer(tiny_llama(), config, train_dataset=pairs(16), processing_class=tiny_tokenizer())
    trainer.train()
    if trainer.is_world_process_zero():
        rows = [row for row in trainer.state.log_history if "loss" in row]
        (folder / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
