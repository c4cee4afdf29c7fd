"""The scoring run: read, encode, run the models, keep what is done, assemble the output.

The data is cut into windows of consecutive rows. Inside a window rows of similar length are batched; while
the models work on one window, the next is read and encoded on another thread. Finished batches are kept on
disk every few seconds, so a run that was interrupted repeats no more than that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import lsc_kernels as lk

from ..errors import UserError
from ..files import check_outputs
from ..wording import counted
from .batching import out_of_memory, pad_right, plan_batches
from .config import ReferenceRule, ScoreConfig, check_names, parts_folder, per_property
from .data import Data, Example, Scan, size
from .encode import Encoded, Encoding, TextEncoder, encoded
from .extras import require
from .progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

    from .models import CausalScorer, LoadedModel, RewardScorer
    from .store import PartStore
    from .summary import ScoreSummary

WINDOW = 1024  # rows read, encoded and sorted by length together
# Logits of one model and batch at most: 1 GiB in fp32. A single longer response still goes through, alone.
BATCH_LOGITS = 2**28
# The eager backend works in fp64 on several copies of what it is given.
KL_LOGITS = 2**26
DEFAULT_TOKENS = {"cpu": 2048, "cuda": 8192}


def score(config: ScoreConfig, *, progress: bool = True) -> ScoreSummary:
    """Score every (prompt, response) of a data set and write the output file.

    Args:
        config: what to do.
        progress: show a progress bar and notes on standard error.

    Returns:
        The numbers of the summary table; printing it with rich shows the table.

    Raises:
        UserError: the options, the data or the models do not allow it; the message says why in one line.
        KeyboardInterrupt: interrupted; what was finished is kept and ``resume`` goes on with it.
    """
    out = Path(config.out)
    outputs = [("--out", out)] + ([] if config.plot is None else [("--plot", Path(config.plot))])
    check_outputs(outputs, _inputs(config), emptied=[("--out", parts_folder(out))])
    require("transformers", "pyarrow", "rich")
    if config.plot is not None:
        require("matplotlib")
    from ..plotting import check_figure_name
    from .figure import draw
    from .models import evaluating
    from .store import PartStore, check_output
    from .summary import summarize

    check_output(out, resume=config.resume, overwrite=config.overwrite)
    if config.plot is not None:
        check_figure_name(Path(config.plot))
    newly, seconds = 0, 0.0
    with _threads(config.threads), Progress(show=progress) as shown:
        shown.say("reading the data")
        data = Data.from_config(config)
        scan = data.scan()
        _check_scan(scan, config)
        shown.bad_lines(scan.bad)
        shown.say("loading the models")
        run = _Run.prepare(config, scan)
        with closing(PartStore(out, run.identity, resume=config.resume, overwrite=config.overwrite)) as store:
            shown.notes(run.notes)
            if not store.complete:
                started = time.monotonic()
                with evaluating(run.loaded), torch.inference_mode():
                    newly = _score_windows(run, data, scan, store, shown)
                seconds = time.monotonic() - started
                shown.say("putting the rows in order")
                _assemble(run, scan, store)
            else:
                shown.note(f"{out} is complete already; nothing to do")
    summary = replace(summarize(out), scored_now=newly, seconds=seconds)
    if config.plot is not None:
        draw(out, Path(config.plot))
    return summary


def _inputs(config: ScoreConfig) -> list[tuple[str, Path]]:
    """Everything a run reads that may be a file or a folder."""
    given = [("--data", config.data), ("--policy", config.policy), ("--ref", config.ref)]
    given += [("--reward-model", model) for model in config.reward_models]
    named = [(option, str(source)) for option, source in given if isinstance(source, str | Path)]
    split_off = [(option, name.rpartition(":")[0]) for option, name in named if ":" in name]
    return [(option, Path(name)) for option, name in named + split_off]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_scan(scan: Scan, config: ScoreConfig) -> None:
    source = config.data if isinstance(config.data, str | Path) else "the records"
    if scan.records == 0:
        raise UserError(f"--data {source}: is empty")
    if scan.examples == 0:
        first = scan.bad[0]
        raise UserError(
            f"--data {source}: none of its {counted(scan.records, 'record')} can be scored; "
            f"line {first.line}: {first.reason}"
        )


@dataclass
class _Run:
    """Everything loaded and decided: what a window needs to be scored."""

    config: ScoreConfig
    names: list[str]
    rules: list[ReferenceRule]
    loaded: list[LoadedModel]  # policy, ref, then the reward models
    policy: CausalScorer
    ref: CausalScorer
    rewards: list[RewardScorer]
    policy_encoder: TextEncoder
    reward_encoders: list[TextEncoder]
    identity: dict[str, Any]
    max_tokens: int
    notes: list[str] = field(default_factory=list)

    @classmethod
    def prepare(cls, config: ScoreConfig, scan: Scan) -> _Run:
        """Load the models and check that they fit each other, the options and the data."""
        from .models import CausalScorer, RewardScorer, check_same_vocabulary, evaluating, resolve_device

        device = resolve_device(config.device)
        loaded = _load_all(config, device)
        policy, ref, *reward_models = loaded
        check_same_vocabulary(policy, ref)
        limit = min((one.limit for one in (policy, ref) if one.limit), default=None)
        policy_encoder = _encoder(policy, config, limit=limit, for_policy=True)
        encoders = [_encoder(one, config, limit=one.limit, for_policy=False) for one in reward_models]
        with evaluating(loaded), torch.inference_mode():
            rewards = [
                RewardScorer(one, _samples(one, encoder, scan))
                for one, encoder in zip(reward_models, encoders, strict=True)
            ]
        names = _property_names(config, reward_models)
        models = {"policy": policy, "ref": ref}
        models |= {f"reward model {i + 1}": one for i, one in enumerate(reward_models)}
        identity = {
            "the data": scan.digest,
            **{what: one.digest for what, one in models.items()},
            "--names": ",".join(names),
            **{f"--{name.replace('_', '-')}": value for name, value in config.result_options().items()},
            "the version of lsc-kernels": lk.__version__,
        }
        return cls(
            config=config,
            names=names,
            rules=per_property(config.references(), names, "reference"),
            loaded=loaded,
            policy=CausalScorer(policy),
            ref=CausalScorer(ref),
            rewards=rewards,
            policy_encoder=policy_encoder,
            reward_encoders=encoders,
            identity=identity,
            max_tokens=config.max_tokens or DEFAULT_TOKENS.get(device.type, DEFAULT_TOKENS["cuda"]),
            notes=_notes(loaded, rewards),
        )

    def columns(self) -> list[int]:
        """The first property of each reward model."""
        starts = [0]
        for scorer in self.rewards:
            starts.append(starts[-1] + scorer.properties)
        return starts[:-1]


def _load_all(config: ScoreConfig, device: torch.device) -> list[LoadedModel]:
    from .models import load

    asked = [("policy", config.policy), ("ref", config.ref)]
    asked += [("reward-model", source) for source in config.reward_models]
    loaded: list[LoadedModel] = []
    seen: dict[tuple[bool, str], LoadedModel] = {}
    for option, source in asked:
        classifier = option == "reward-model"
        # The same checkpoint named twice (policy and ref, say) is held once.
        key = (classifier, str(id(source)) if isinstance(source, tuple) else str(source))
        if key not in seen:
            seen[key] = load(
                source,
                option=option,
                classifier=classifier,
                device=device,
                dtype=config.dtype,
                trust_remote_code=config.trust_remote_code,
            )
        loaded.append(seen[key])
    return loaded


def _encoder(loaded: LoadedModel, config: ScoreConfig, *, limit: int | None, for_policy: bool) -> TextEncoder:
    # A tokenizer without a limit of its own says so with a number beyond any text.
    asked = config.max_length or loaded.tokenizer.model_max_length
    return TextEncoder(
        loaded.tokenizer,
        limit=min(asked, limit) if limit is not None else (asked if asked < 10**9 else None),
        chat=config.chat,
        append_eos=config.eos == "all" or (config.eos == "policy" and for_policy),
        for_policy=for_policy,
    )


def _samples(loaded: LoadedModel, encoder: TextEncoder, scan: Scan) -> list[list[int]]:
    encoded = encoder.encode(scan.first)
    samples = [one.ids for one in encoded if isinstance(one, Encoded)]
    if not samples:
        raise UserError(f"--reward-model {loaded.label}: cannot encode the first rows: {encoded[0]}")
    return samples


def _property_names(config: ScoreConfig, reward_models: Sequence[LoadedModel]) -> list[str]:
    own = [name for loaded in reward_models for name in _own_names(loaded)]
    if config.names is not None:
        if len(config.names) != len(own):
            raise UserError(
                f"--names {','.join(config.names)}: {counted(len(config.names), 'name')}, but the reward models "
                f"give {counted(len(own), 'score')}"
            )
        return list(config.names)
    doubled = {name for name in own if own.count(name) > 1}
    names = [f"{name}_{place + 1}" if name in doubled else name for place, name in enumerate(own)]
    check_names(names)
    return names


def _own_names(loaded: LoadedModel) -> list[str]:
    from .models import label_names

    labels = label_names(loaded)
    base = Path(loaded.label).name or "reward"
    if len(labels) == 1:
        return [base]
    return [f"{base}_{k}" if label == f"LABEL_{k}" else label for k, label in enumerate(labels)]


def _notes(loaded: Sequence[LoadedModel], rewards: Sequence[RewardScorer]) -> list[str]:
    notes = []
    if loaded[0].digest == loaded[1].digest:
        notes.append("policy and ref are the same model: every KL will be 0")
    for one, scorer in zip(loaded[2:], rewards, strict=True):
        if scorer.mode == "row by row":
            notes.append(f"{one.label}: padding changes its scores, so it runs one row at a time")
    return notes


@dataclass
class _Window:
    """Consecutive rows with the token ids of every model; ``errors`` says which rows cannot be scored."""

    number: int
    first_row: int
    examples: list[Example]
    policy: list[Encoding]
    rewards: list[list[Encoding]]
    canned: dict[int, list[Encoding]]  # by property: the canned response to each row's prompt
    errors: dict[int, str]


def _prepared(run: _Run, data: Data, done: set[int]) -> Iterator[_Window | tuple[int, int]]:
    """Windows that have rows to do, encoded; of a window that is done, its numbers of rows and characters."""
    first_row = 0
    for number, examples in enumerate(data.windows(WINDOW)):
        if all(row in done for row in range(first_row, first_row + len(examples))):
            yield len(examples), sum(map(size, examples))
        else:
            yield _encode(run, number, first_row, examples)
        first_row += len(examples)


def _encode(run: _Run, number: int, first_row: int, examples: list[Example]) -> _Window:
    policy = run.policy_encoder.encode(examples)
    rewards = [encoder.encode(examples) for encoder in run.reward_encoders]
    canned = {}
    for model, (start, encoder) in enumerate(zip(run.columns(), run.reward_encoders, strict=True)):
        for k in range(start, start + run.rewards[model].properties):
            if run.rules[k].kind == "canned":
                answered = [
                    replace(example, response=_canned_text(example, run.rules[k])) for example in examples
                ]
                canned[k] = encoder.encode(answered)
    errors: dict[int, str] = {}
    for encodings in (policy, *rewards, *canned.values()):
        for row, encoding in enumerate(encodings):
            if isinstance(encoding, str):
                errors.setdefault(row, encoding)
    return _Window(number, first_row, examples, policy, rewards, canned, errors)


def _canned_text(example: Example, rule: ReferenceRule) -> str:
    """The canned response, set off from the prompt by the white space the row's own response begins with."""
    response = example.response
    return response[: len(response) - len(response.lstrip())] + rule.text


def _score_windows(run: _Run, data: Data, scan: Scan, store: PartStore, shown: Progress) -> int:
    """Score all rows that are not done; returns how many were."""
    shown.begin(scan.examples, scan.characters)
    before = len(store.done)
    prepared = _prepared(run, data, store.done)
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(next, prepared, None)
        while (window := coming.result()) is not None:
            coming = ahead.submit(next, prepared, None)
            if isinstance(window, tuple):
                shown.skip(*window)
                continue
            with _explained_memory(run):
                if window.canned:
                    shown.say("scoring canned responses")
                references = _given_references(run, window, store)
                shown.say("scoring")
                _score_window(run, window, references, store, shown)
    return len(store.done) - before


def _score_window(run: _Run, window: _Window, references: Tensor, store: PartStore, shown: Progress) -> None:
    pending: list[dict[str, Any]] = []
    kept_at = time.monotonic()

    def keep() -> None:
        nonlocal kept_at
        if pending:
            store.add(window.number, _table(pending))
            pending.clear()
        kept_at = time.monotonic()

    done_before = [row for row in range(len(window.examples)) if window.first_row + row in store.done]
    shown.skip(len(done_before), sum(size(window.examples[row]) for row in done_before))
    todo = set(range(len(window.examples))) - set(done_before)
    for row in sorted(set(window.errors) & todo):
        pending.append(_refused(window, row))
        shown.advance(1, size(window.examples[row]))
    try:
        for batch in _plan(run, window):
            rows = [row for row in batch if row in todo]
            if rows:
                pending += _score_batch(run, window, rows, references)
                shown.advance(len(rows), sum(size(window.examples[row]) for row in rows))
            if time.monotonic() - kept_at >= run.config.checkpoint_seconds:
                keep()
    finally:
        keep()


def _plan(run: _Run, window: _Window) -> list[list[int]]:
    """Batches of the rows that can be scored, the same whether or not some are done already."""
    rows = [row for row in range(len(window.examples)) if row not in window.errors]
    tokens = [encoded(window.policy[row]) for row in rows]
    # Every model gets the same rows; the one whose tokenizer makes the most of them decides how many fit.
    every = (window.policy, *window.rewards)
    batches = plan_batches(
        [max(len(encoded(encodings[row]).ids) for encodings in every) for row in rows],
        max_tokens=run.max_tokens,
        batch_size=run.config.batch_size,
        counted=[len(one.ids) - one.start for one in tokens],
        max_counted=max(1, BATCH_LOGITS // run.policy.vocabulary),
    )
    return [[rows[at] for at in batch] for batch in batches]


def _score_batch(run: _Run, window: _Window, rows: list[int], references: Tensor) -> list[dict[str, Any]]:
    tokens = _token_values(run, [encoded(window.policy[row]) for row in rows])
    scores = torch.cat(
        [
            scorer.score(
                [encoded(encodings[row]).ids for row in rows],
                max_tokens=run.max_tokens,
                batch_size=run.config.batch_size,
            )
            for scorer, encodings in zip(run.rewards, window.rewards, strict=True)
        ],
        dim=1,
    )
    return [
        _finished(window, row, scores[at].tolist(), references[row].tolist(), tokens[at])
        for at, row in enumerate(rows)
    ]


@contextmanager
def _explained_memory(run: _Run) -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        if not out_of_memory(problem):
            raise
        raise UserError(
            f"out of memory with batches of {run.max_tokens} tokens; what is done is kept: "
            f"go on with --resume --max-tokens {max(1, run.max_tokens // 2)}"
        ) from problem


def _token_values(run: _Run, texts: Sequence[Encoded]) -> list[tuple[Tensor, ...]]:
    """Log-probability under policy and ref and KL of each response token, per row."""
    ids, mask = pad_right([one.ids for one in texts], 0, run.policy.device)
    lengths = [len(one.ids) - one.start for one in texts]
    rows = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(lengths)).to(ids.device)
    positions = torch.cat([torch.arange(one.start, len(one.ids)) for one in texts]).to(ids.device)
    actions = ids[rows, positions]
    # The logits that predict a token stand one position before it.
    policy_logits = run.policy.logits(ids, mask, rows, positions - 1)
    ref_logits = run.ref.logits(ids, mask, rows, positions - 1)
    step = max(1, KL_LOGITS // policy_logits.shape[-1])
    pieces = [
        lk.token_kl(
            policy_logits[at : at + step],
            ref_logits[at : at + step],
            actions[at : at + step],
            kl=run.config.kl,
            temperature=run.config.temperature,
        )
        for at in range(0, len(actions), step)
    ]
    values = [
        torch.cat([getattr(piece, name) for piece in pieces]).float().cpu().split(lengths)
        for name in ("logprobs", "ref_logprobs", "kl")
    ]
    return list(zip(*values, strict=True))


def _given_references(run: _Run, window: _Window, store: PartStore) -> Tensor:
    """Reference rewards [rows, K] from columns and canned responses; NaN where the whole file decides."""
    references = torch.full((len(window.examples), len(run.names)), float("nan"))
    columns = run.config.reference_columns()
    for k, rule in enumerate(run.rules):
        if rule.kind == "column":
            at = columns.index(rule.text)
            references[:, k] = torch.tensor([example.columns[at] for example in window.examples])
    if not window.canned:
        return references
    name = f"canned-{window.number:06d}"
    kept = store.kept(name)
    if kept is None:
        kept = _canned_table(run, window)
        store.keep(name, kept)
    for k in window.canned:
        references[:, k] = torch.tensor(kept[str(k)].to_pylist())
    return references


def _canned_table(run: _Run, window: _Window) -> pa.Table:
    """Scores of the canned responses, one per row; rows with equal tokens are scored once."""
    import pyarrow as pa

    table = {}
    for k, encodings in window.canned.items():
        model = max(at for at, start in enumerate(run.columns()) if start <= k)
        keys = [None if isinstance(one, str) else tuple(one.ids) for one in encodings]
        unique = list(dict.fromkeys(key for key in keys if key is not None))
        scored = run.rewards[model].score(unique, max_tokens=run.max_tokens, batch_size=run.config.batch_size)
        known = dict(zip(unique, scored[:, k - run.columns()[model]].tolist(), strict=True))
        table[str(k)] = pa.array([float("nan") if key is None else known[key] for key in keys], pa.float32())
    return pa.table(table)


def _finished(
    window: _Window, row: int, scores: list[float], references: list[float], tokens: tuple[Tensor, ...]
) -> dict[str, Any]:
    policy = encoded(window.policy[row])
    logprobs, ref_logprobs, kl = (values.numpy() for values in tokens)
    rewards = [encoded(encodings[row]) for encodings in window.rewards]
    return {
        **_about(window, row),
        "scores": scores,
        "references": references,
        "prompt_tokens": policy.start,
        "prompt_tokens_cut": policy.prompt_cut,
        "response_tokens_cut": policy.response_cut,
        "reward_tokens_cut": sum(one.prompt_cut + one.response_cut for one in rewards),
        "token_ids": policy.ids[policy.start :],
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "kl": kl,
    }


def _refused(window: _Window, row: int) -> dict[str, Any]:
    return {**_about(window, row), "error": window.errors[row]}


def _about(window: _Window, row: int) -> dict[str, Any]:
    example = window.examples[row]
    return {
        "row": window.first_row + row,
        "line": example.line,
        "id": example.id,
        "side": example.side,
        "prompt": example.prompt_text,
        "response": example.response,
    }


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    from .assemble import part_schema

    return pa.Table.from_pylist(rows, schema=part_schema())


def _assemble(run: _Run, scan: Scan, store: PartStore) -> None:
    from .assemble import Shaping, assemble

    about = {
        "identity": run.identity,
        "names": run.names,
        "kl": run.config.kl,
        "references": [str(rule) for rule in run.rules],
        "records": scan.records,
    }
    windows = -(-scan.examples // WINDOW)
    assemble(store, windows, Shaping.from_config(run.config, run.names), about, scan.bad)
