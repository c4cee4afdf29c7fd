"""Training in seconds: a language model on responses, reward models on pairs with the Bradley-Terry loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

import lsc_kernels as lk

from .data import Pair

Progress = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss)."""


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int, *, end: bool
) -> tuple[list[int], int]:
    """Token ids of prompt + response (+ the end-of-text token), and how many of them are the prompt's.

    A text that is too long loses the beginning of its prompt first: what is answered stands at the end.
    A policy must learn to end; a reward model reads the response as it stands, as ``lsc-kernels score`` does.
    """
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    response_ids = (response_ids + [tokenizer.eos_token_id] * end)[:max_length]
    prompt_ids = prompt_ids[len(prompt_ids) - min(len(prompt_ids), max_length - len(response_ids)) :]
    return prompt_ids + response_ids, len(prompt_ids)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and attention mask, both [B, S]."""
    length = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def batches(lengths: Sequence[int], size: int, rng: random.Random | None = None) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little is padded; with ``rng`` in a new order every time."""
    order = list(range(len(lengths)))
    if rng is None:
        order.sort(key=lambda i: lengths[i])
        yield from (order[i : i + size] for i in range(0, len(order), size))
        return
    rng.shuffle(order)
    window = 8 * size
    chunks = [sorted(order[i : i + window], key=lambda i: lengths[i]) for i in range(0, len(order), window)]
    drawn = [chunk[i : i + size] for chunk in chunks for i in range(0, len(chunk), size)]
    rng.shuffle(drawn)
    yield from drawn


def train_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Supervised fine-tuning on (prompt, response): maximises the responses' mean token log-probability."""
    limit = model.config.max_position_embeddings
    encoded = [encode(tokenizer, prompt, response, limit, end=True) for prompt, response in texts]

    def loss(rows: list[int]) -> Tensor:
        ids, mask = pad([encoded[i][0] for i in rows], tokenizer.pad_token_id, model.device)
        starts = torch.tensor([encoded[i][1] for i in rows], device=model.device)
        is_response = (torch.arange(ids.shape[1], device=model.device) >= starts[:, None]) & mask.bool()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        counted = is_response[:, 1:]
        logprobs = lk.token_logprobs(logits, ids[:, 1:], mask=counted).logprobs
        return -logprobs.sum() / counted.sum()

    _optimise(model, [len(e[0]) for e in encoded], loss, epochs, learning_rate, batch_size, seed, progress)


def train_reward_model(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    epochs: int,
    learning_rate: float,
    scale: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Bradley-Terry: the mean of -log sigmoid((score of the chosen - score of the rejected) / scale).

    That is minus the LSC transform of the chosen score with the rejected one as its reference reward; with a scale
    of 1 it is ``lk.bradley_terry_loss``. ``scale`` is the temperature, and so the unit in which this model's scores
    come out.
    """
    limit = model.config.max_position_embeddings
    chosen = [encode(tokenizer, p.prompt, p.chosen, limit, end=False)[0] for p in pairs]
    rejected = [encode(tokenizer, p.prompt, p.rejected, limit, end=False)[0] for p in pairs]

    def loss(rows: list[int]) -> Tensor:
        both = [chosen[i] for i in rows] + [rejected[i] for i in rows]
        better, worse = _scores(model, *pad(both, tokenizer.pad_token_id, model.device)).chunk(2)
        return -lk.lsc_transform(better, worse, scale=scale).mean()

    lengths = [max(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    _optimise(model, lengths, loss, epochs, learning_rate, batch_size, seed, progress)


@torch.no_grad()
def score_texts(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    batch_size: int = 64,
) -> Tensor:
    """A reward model's scores of (prompt, response), [len(texts)] on the CPU."""
    limit = model.config.max_position_embeddings
    encoded = [encode(tokenizer, prompt, response, limit, end=False)[0] for prompt, response in texts]
    scores = torch.empty(len(texts))
    for rows in batches([len(e) for e in encoded], batch_size):
        ids, mask = pad([encoded[i] for i in rows], tokenizer.pad_token_id, model.device)
        scores[rows] = _scores(model, ids, mask).cpu()
    return scores


def pair_accuracy(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> float:
    """Share of the pairs whose chosen response gets the higher score; ties count half."""
    texts = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    chosen, rejected = score_texts(model, tokenizer, texts).chunk(2)
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """``n`` responses of the policy to each prompt, all in one batch, drawn with torch's global generator."""
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    # Generation goes on at the right end, so the padding stands on the left.
    ids, mask = (t.flip(1) for t in pad([e[::-1] for e in encoded], tokenizer.pad_token_id, model.device))
    drawn = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        num_return_sequences=n,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(drawn[:, ids.shape[1] :], skip_special_tokens=True)
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def _scores(model: LlamaForSequenceClassification, ids: Tensor, mask: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return lk.reward_head(hidden, model.score.weight, attention_mask=mask)[:, 0]


def _optimise(
    model: nn.Module,
    lengths: Sequence[int],
    loss: Callable[[list[int]], Tensor],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    progress: Progress | None,
) -> None:
    rng = random.Random(seed)
    steps = epochs * -(-len(lengths) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    done = 0
    for _ in range(epochs):
        for rows in batches(lengths, batch_size, rng):
            value = loss(rows)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, steps, value.item())
    model.eval()
