"""Writes a tiny Qwen3-MoE checkpoint with a real tokenizer: `python -m deploy.demo_model FOLDER`.

For trying the stack and testing it without a download. The weights are random and large enough that routing depends on
the whole context: a model as flat as a fresh initialisation would hide wrong rows. It knows no engine;
`tests.support.checkpoints` makes other shapes with it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

from common.errors import UsageError

CORPUS = Path(__file__).with_name("demo_corpus.txt")
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOKENIZER_VOCAB_SIZE = 1000

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_demo_model(folder: Path, *, seed: int = 0, **config_overrides: Any) -> None:
    """Write config, weights (float32), generation config and tokenizer into `folder`, made if it is missing.

    Equal seeds and overrides give equal weights. `config_overrides` are fields of transformers' Qwen3MoeConfig; whoever
    sets a `vocab_size` below the tokenizer's keeps the prompts inside it.
    """
    tokenizer = train_tokenizer()
    end_of_text, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "initializer_range": 0.25,
        "eos_token_id": turn_end,
        "dtype": "float32",
    }
    config = Qwen3MoeConfig(**(fields | config_overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config).float()
        _roughen(model, config.initializer_range)
    model.generation_config = GenerationConfig(eos_token_id=[turn_end, end_of_text], pad_token_id=end_of_text)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _roughen(model: torch.nn.Module, scale: float) -> None:
    """Give vectors values of their own: norms of one and biases of zero would work unread."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centre = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, centre, scale / 2)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus beside this file; every string survives it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS.read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main(arguments: list[str]) -> int:
    """Write the demo model where the one argument says; returns the exit code."""
    try:
        if len(arguments) != 1 or arguments[0].startswith("-"):
            raise UsageError("usage: python -m deploy.demo_model FOLDER")
        folder = Path(arguments[0]).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder}: there is something already; name a new or an empty folder")
        transformers_logging.disable_progress_bar()
        write_demo_model(folder)
    except (UsageError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
