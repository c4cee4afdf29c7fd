"""Tokenizer and transformers made on the spot: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

Model = TypeVar("Model", bound=torch.nn.Module)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer learnt from ``texts``; any other text can be written in it too."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def build_language_model(
    tokenizer: PreTrainedTokenizerBase, *, hidden_size: int = 128, layers: int = 2, positions: int = 512
) -> LlamaForCausalLM:
    """A small Llama with random weights, drawn from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def on_device(model: Model, device: torch.device) -> Model:
    """The model on a device; as a function of its own because transformers hides the type of ``model.to``."""
    torch.nn.Module.to(model, device)
    return model


def reward_model_from(language_model: LlamaForCausalLM) -> LlamaForSequenceClassification:
    """A reward model that starts as a copy of the language model's body, with a fresh head of one score."""
    config = LlamaConfig.from_dict(language_model.config.to_dict())
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(language_model.model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=0.02)
    return on_device(model, language_model.device)
