"""A model folder, prompts and a configuration that are small enough to be made by a test; verl loads them itself."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

WORDS = [*(str(number) for number in range(100)), "+", "=", "?", "user", "assistant", ":"]
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}assistant :"


def write_model(folder: Path) -> None:
    """Write `config.json` of a tiny Llama and a tokenizer of words; there are no weights."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder)
    model = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(folder)


def write_prompts(path: Path, count: int) -> None:
    """Write `count` additions as verl's datasets have them; `extra_info.index` is the number of the row."""
    with path.open("w") as file:
        for index in range(count):
            row = {
                "data_source": "additions",
                "prompt": [{"role": "user", "content": f"{index % 50} + {index % 7} = ?"}],
                "reward_model": {"style": "rule", "ground_truth": str(index % 50 + index % 7)},
                "extra_info": {"index": index},
            }
            file.write(json.dumps(row) + "\n")


def compose(folder: Path, *overrides: str) -> Any:
    """Compose verl's own `ppo_trainer` configuration for the material in `folder`, for two ranks and no accelerator."""
    from hydra import compose, initialize_config_dir

    settings = [
        f"actor_rollout_ref.model.path={folder / 'model'}",
        f"data.train_files={folder / 'train.jsonl'}",
        f"data.val_files={folder / 'val.jsonl'}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        "trainer.logger=[]",
        "trainer.device=cpu",
        "trainer.total_epochs=100",
        "trainer.val_before_train=false",
        "data.train_batch_size=4",
        "data.shuffle=false",
        "data.dataloader_num_workers=0",
        "data.max_prompt_length=32",
        "data.max_response_length=32",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.agent.num_workers=2",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={Path(__file__).with_name('reward.py')}",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "+transfer_queue.layout=jagged",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=2",
        *overrides,
    ]
    with initialize_config_dir(config_dir=str(files("verl") / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", settings)
