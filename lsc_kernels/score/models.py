"""Loading policies and reward models, and running them on right-padded batches."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

import lsc_kernels as lk

from ..errors import UserError
from ..wording import counted, first_line
from .batching import pad_right, plan_batches
from .extras import offline_note, quiet_hub

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import ModelSource


# What a configuration also records, and what changes when a folder is moved or a library updated.
NOT_THE_MODEL = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device in evaluation mode, its tokenizer, what to call it, and a digest of both."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    digest: str

    @property
    def limit(self) -> int | None:
        """The most tokens the model has positions for, as far as its configuration says."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def resolve_device(name: str) -> torch.device:
    """The device to run on: ``auto`` is the GPU when there is one.

    Raises:
        UserError: there is no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).cpu()  # a device without data (meta) exists, and computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise UserError(f"--device {name}: not available: {first_line(problem)}") from problem
    return device


def load(
    source: ModelSource,
    *,
    option: str,
    classifier: bool,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
) -> LoadedModel:
    """Load a causal language model or a sequence classifier with its tokenizer.

    Args:
        source: a folder, a name on the hub, or (model, tokenizer), which is moved to the device.
        option: the option that named it, for messages.
        classifier: load a sequence classifier (a reward model).
        dtype: ``auto`` is the checkpoint's own on a GPU and float32 on the CPU, where half precision is slow.

    Raises:
        UserError: it cannot be loaded, or it holds no trained head.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        label = type(model).__name__
    else:
        label = str(source)
        own = "float32" if device.type == "cpu" else "auto"
        model, tokenizer = _from_pretrained(
            label, option, classifier, own if dtype == "auto" else dtype, trust_remote_code
        )
    digest = _digest(model, tokenizer)
    try:
        cast("nn.Module", model).to(device)
    except torch.OutOfMemoryError as problem:
        raise UserError(f"--{option} {label}: does not fit into the memory of {device}") from problem
    return LoadedModel(model, tokenizer, label, digest)


def _from_pretrained(
    name: str, option: str, classifier: bool, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    is_folder = Path(name).is_dir()
    if is_folder and not (Path(name) / "config.json").is_file():
        raise UserError(f"--{option} {name}: the folder holds no config.json, so it is no saved model")
    if not is_folder and (Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"--{option} {name}: no such folder")
    offline = "" if is_folder else offline_note()
    options = {"trust_remote_code": trust_remote_code, "local_files_only": bool(offline)}
    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        with quiet_hub(offline=bool(offline)):
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    except Exception as problem:  # what a checkpoint can get wrong is as varied as the libraries that read it
        where = "cannot be loaded" if is_folder else "no such folder here, and not to be had from the hub"
        raise UserError(f"--{option} {name}: {where}: {offline or first_line(problem)}") from problem
    missing = sorted(report["missing_keys"])
    if missing:
        what = "is it a trained reward model?" if classifier else "is it a causal language model?"
        more = f" and {counted(len(missing) - 1, 'more weight')}" if len(missing) > 1 else ""
        raise UserError(
            f"--{option} {name}: the checkpoint lacks {missing[0]}{more}, which would be random; {what}"
        )
    if not classifier:
        _check_not_classifier(name, option, model, report["unexpected_keys"])
    return model, tokenizer


def _check_not_classifier(name: str, option: str, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """A reward model has all the weights of a language model whose output head is its embedding."""
    made_as = [
        kind for kind in model.config.architectures or () if kind.endswith("ForSequenceClassification")
    ]
    head = [key for key in unused if key.startswith("score.")]
    if made_as or head:
        what = made_as[0] if made_as else f"it holds {head[0]}"
        raise UserError(f"--{option} {name}: is a reward model ({what}); wants a causal language model")


def _digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of weights, configuration and tokenizer: by content, so moving a folder changes nothing.

    Every weight is read once where it lies: rows are reduced by xor on the device, and what is left is
    hashed.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.numel() == 0:
            continue
        rows = weight.detach().contiguous().reshape(weight.shape[0] if weight.ndim > 1 else 1, -1)
        words = rows.view(torch.uint8) if weight.ndim <= 1 else torch.hash_tensor(_hashable(rows), dim=1)
        digest.update(words.cpu().numpy().tobytes())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass"))
    digest.update(repr(getattr(tokenizer, "chat_template", None)).encode())
    return digest.hexdigest()


def _hashable(rows: Tensor) -> Tensor:
    known = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return rows if rows.dtype in known else rows.view(torch.uint8)


@contextmanager
def evaluating(models: Sequence[LoadedModel]) -> Iterator[None]:
    """Models without dropout while scoring; those that were given loaded go back to the mode they had."""
    were_training = [(loaded.model, loaded.model.training) for loaded in models]
    for model, _ in were_training:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in were_training:
            model.train(was_training)


def check_same_vocabulary(policy: LoadedModel, ref: LoadedModel) -> None:
    """Refuse two models whose logits do not mean the same tokens.

    Raises:
        UserError: tokenizers or numbers of logits differ.
    """
    sizes = [_logit_count(loaded) for loaded in (policy, ref)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--policy {policy.label} has {sizes[0]} logits and --ref {ref.label} {sizes[1]}: the KL "
            "compares them one by one, so both must come from the same base model"
        )
    if policy.tokenizer.get_vocab() != ref.tokenizer.get_vocab():
        raise UserError(
            f"--policy {policy.label} and --ref {ref.label} have different vocabularies: the KL compares "
            "them token by token, so both must share one tokenizer"
        )


def label_names(loaded: LoadedModel) -> list[str]:
    """The labels of a classifier, in the order of its scores."""
    labels: dict[Any, str] = dict(loaded.model.config.id2label or {})
    return [str(labels[k]) for k in sorted(labels, key=int)]


def _logit_count(loaded: LoadedModel) -> int:
    head = loaded.model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else loaded.model.config.get_text_config().vocab_size


class CausalScorer:
    """A causal language model that makes logits at response positions only.

    The rows wanted are taken from the hidden states on their way into the output head, so whatever the model
    does behind it (soft caps, logit scales) applies, and no [B, S, V] tensor is made.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.model = loaded.model
        self.device = loaded.device
        self.vocabulary = _logit_count(loaded)
        self._options = {"use_cache": False} if _takes(self.model, "use_cache") else {}

    def logits(self, ids: Tensor, mask: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits [N, V] at N places of a batch: ids and mask [B, S], rows and positions [N]."""
        chosen = False

        def choose(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal chosen
            chosen = True
            return (arguments[0][rows, positions][None], *arguments[1:])

        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(choose) if head is not None else None
        try:
            logits = self.model(input_ids=ids, attention_mask=mask, **self._options).logits
        finally:
            if hook is not None:
                hook.remove()
        # A model that multiplies by the head's weight itself never calls the head: all positions came back.
        return logits[0] if chosen else logits[rows, positions]


class RewardScorer:
    """A sequence-classification model that gives each text one score per label.

    Where the head is a plain linear layer ``score`` on the last token, the base model runs and
    `lsc_kernels.reward_head` scores the last token of each row, found from the attention mask: the model's
    own forward pass scores every position and then looks for the padding token, which picks the wrong place
    when padding and end of text share a token. Other heads (first token, pooled, with hidden layers) go
    through the model's own forward pass, in batches if padding on the right leaves their scores as they are,
    else row by row. Which of the three holds is tried out on the first rows of the data, not guessed from the
    name.

    Args:
        loaded: the model.
        samples: token ids of a few rows, to try out.
    """

    def __init__(self, loaded: LoadedModel, samples: Sequence[Sequence[int]]) -> None:
        self.model = loaded.model
        self.device = loaded.device
        self._options = {"use_cache": False} if _takes(self.model, "use_cache") else {}
        pad = loaded.tokenizer.pad_token_id
        self.pad = pad if pad is not None else self.model.config.get_text_config().pad_token_id
        self.properties = len(label_names(loaded))
        by_length = sorted(samples, key=len)
        self.mode = self._try_out([by_length[0], by_length[-1]])

    def score(self, rows: Sequence[Sequence[int]], *, max_tokens: int, batch_size: int | None) -> Tensor:
        """Scores [n, labels] in float32 on the CPU."""
        scores = torch.empty(len(rows), self.properties)
        batches = plan_batches([len(row) for row in rows], max_tokens=max_tokens, batch_size=batch_size)
        if self.mode == "row by row":
            batches = [[row] for row in range(len(rows))]
        run = self._head if self.mode == "head" else self._forward
        for batch in batches:
            scores[batch] = run([rows[row] for row in batch]).float().cpu()
        return scores

    def _head(self, rows: Sequence[Sequence[int]]) -> Tensor:
        # Any token can fill the padding: nothing looks at it.
        ids, mask = pad_right(rows, 0, self.device)
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, **self._options).last_hidden_state
        head: Any = self.model.score
        return lk.reward_head(hidden, head.weight, head.bias, attention_mask=mask)

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        ids, mask = pad_right(rows, 0 if self.pad is None else self.pad, self.device)
        return self.model(input_ids=ids, attention_mask=mask, **self._options).logits

    def _try_out(self, samples: Sequence[Sequence[int]]) -> str:
        # The model's own pooling is right where the last token is not the padding token.
        rows = [row for row in (self._without_padding(sample) for sample in samples) if row]
        alone = [self._forward([row]) for row in rows]
        head = getattr(self.model, "score", None)
        plain = isinstance(head, nn.Linear) and head.weight.is_floating_point()
        if plain and self.model.base_model is not self.model:
            if all(self._agree(self._head([row]), own) for row, own in zip(rows, alone, strict=True)):
                return "head"
        try:
            together = self._forward(rows)
        except (ValueError, RuntimeError, IndexError):
            return "row by row"
        return "forward" if self._agree(together, torch.cat(alone)) else "row by row"

    def _without_padding(self, row: Sequence[int]) -> list[int]:
        end = len(row)
        while end and row[end - 1] == self.model.config.get_text_config().pad_token_id:
            end -= 1
        return list(row[:end])

    def _agree(self, one: Tensor, other: Tensor) -> bool:
        tolerance = 1e-4 if self.model.dtype in (torch.float32, torch.float64) else 5e-2
        return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
