"""Runs of DPO, KTO and reward models that read the same in TRL 1: `python tests/trainer/offline/parity_job.py FILE.json`.

In an environment with TRL 1.16 it made `data/trl_1_16.json`; `test_parity.py` runs it with this library. Weights are a formula,
so that they depend on no version of a random generator.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

WORDS = 40
PAIRS = [
    {"prompt": f"w{4 + i % 6} w5", "chosen": f" w{4 + i * 3 % 6} w7 w9", "rejected": f" w{4 + i * 5 % 6} w8"}
    for i in range(8)
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
    for i, row in enumerate(PAIRS)
]
DPO: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name]} for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "apo_zero", "apo_down")},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "several": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3]},
}
KTO: dict[str, dict[str, Any]] = {
    "kto": {"desirable_weight": 1.2},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
REWARD: dict[str, dict[str, Any]] = {"reward": {}, "centred": {"center_rewards_coefficient": 0.1}}


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "w0", "eos_token": "w1", "bos_token": "w2", "unk_token": "w3"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def model_folder(folder: Path, kind: Any) -> Any:
    """A Llama with weights by a formula, through a folder: TRL 1 loads its reference from there."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "num_labels": 1}
    config = transformers.LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, **sizes, **special)
    model = kind(config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "norm" not in name:
                wave = torch.sin(torch.arange(parameter.numel()) * (1.3 + 0.1 * number))
                parameter.copy_(0.2 * wave.view(parameter.shape))
    model.save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32)


def runs(own: bool) -> dict[str, list[dict[str, float]]]:
    """Log rows by run; `own`: of this library, whose reward models append no end token by default."""
    import datasets

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        usual = {
            "output_dir": str(folder / "out"), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
            "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
            "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False,
        }  # fmt: skip
        stages = [
            (DPOTrainer, DPOConfig, DPO, PAIRS, transformers.LlamaForCausalLM),
            (KTOTrainer, KTOConfig, KTO, LABELLED, transformers.LlamaForCausalLM),
            (RewardTrainer, RewardConfig, REWARD, PAIRS, transformers.LlamaForSequenceClassification),
        ]
        rows = {}
        for trainer_class, config_class, cases, data, kind in stages:
            for case, options in cases.items():
                if own and trainer_class is RewardTrainer:
                    options = options | {"append_eos": True}
                trainer = trainer_class(
                    model=model_folder(folder / "model", kind),
                    args=config_class(**usual, **options),
                    train_dataset=datasets.Dataset.from_list(data),
                    processing_class=tokenizer(),
                )
                trainer.train()
                rows[case] = [row for row in trainer.state.log_history if "loss" in row]
    return rows


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(runs(own=False), indent=1) + "\n")
