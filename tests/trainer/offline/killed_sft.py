"""A short SFT run that is killed from outside: `python killed_sft.py FOLDER [resume]`; writes the weights' digest at its end."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from tests.helpers import tiny_llama, tiny_tokenizer
from tests.trainer.offline.data import quiet, texts
from trl import SFTConfig, SFTTrainer


def main() -> None:
    folder = Path(sys.argv[1])
    settings = quiet(max_steps=12, save_strategy="steps", save_steps=1, logging_steps=1, bf16=False)
    config = SFTConfig(str(folder / "out"), packing=True, max_length=32, **settings)
    model = tiny_llama(attention_dropout=0.1)
    trainer = SFTTrainer(model, config, train_dataset=texts(60), processing_class=tiny_tokenizer())
    trainer.train(resume_from_checkpoint="resume" in sys.argv)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest()
    (folder / "digest").write_text(digest)


if __name__ == "__main__":
    main()
