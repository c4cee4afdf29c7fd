"""The demo from top to bottom: data, models, reference rewards, one scoring run, findings, speed, figure."""

from __future__ import annotations

import json
import os
import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..score.config import ScoreConfig
from ..score.extras import require
from ..score.pipeline import score


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    out: Path
    quick: bool = False
    seed: int = 0
    threads: int | None = None


def tell(options: Options) -> int:
    """Run everything, print what it shows, leave models, data, rewards and figure in ``options.out``."""
    _check(options)
    from . import chain, data, figure, findings, report, speed

    started = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    size, shape = (chain.QUICK, speed.QUICK) if options.quick else (chain.FULL, speed.FULL)
    train_split, held_out = data.load(options.seed)
    teller = report.Teller()
    teller.opening(train_split)

    with _quiet_libraries():
        with teller.stage() as say, _one_thread():
            models = chain.train_models(train_split, size, options.seed, say)
        teller.trained(models, train_split, held_out)
        with teller.stage() as say, _one_thread():
            references = chain.find_references(models, held_out, size, say)

        folders = models.save(options.out)
        rows = chain.write_rows(options.out, held_out, references)
        config = _scoring(options.out, folders, rows)
        with teller.stage() as say:
            say("lsc-kernels score")
            summary = score(config, progress=False)
        found = findings.read(options.out / "rewards.parquet", held_out)
        teller.referenced(references, found)
        teller.scored(summary, found, references)

        with teller.stage() as say:
            cells = speed.measure(shape, options.seed, say)
        teller.timed(cells, shape)

    figure.draw(options.out / "demo.png", found, cells, shape)
    measured = {"shape": asdict(shape), "cells": [asdict(cell) for cell in cells]}
    (options.out / "speed.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    teller.closing(options.out, command(config), time.perf_counter() - started)
    return 0


def command(config: ScoreConfig) -> str:
    """The ``lsc-kernels score`` command that does what ``config`` says, into a file of its own."""
    words: list[object] = ["lsc-kernels", "score", "--data", config.data]
    words += ["--policy", config.policy, "--ref", config.ref]
    for model in config.reward_models:
        words += ["--reward-model", model]
    words += ["--names", ",".join(config.names or ())]
    for rule in map(str, config.references()):
        words += ["--reference", rule]
    words += ["--scale", ",".join(f"{scale:g}" for scale in config.numbers("scale"))]
    words += ["--kl", config.kl, "--out", Path(config.out).with_name("again.parquet")]
    return shlex.join(map(str, words))


def _scoring(out: Path, folders: dict[str, Path], rows: Path) -> ScoreConfig:
    from . import chain
    from .data import PROPERTIES

    return ScoreConfig(
        data=rows,
        policy=folders["policy"],
        ref=folders["reference"],
        reward_models=[folders[name] for name in PROPERTIES],
        names=PROPERTIES,
        reference=[f"column:reference_{name}" for name in PROPERTIES],
        scale=[chain.SCALES[name] for name in PROPERTIES],
        kl="full",  # the responses were not sampled from the policy, so the estimators would be biased
        out=out / "rewards.parquet",
        overwrite=True,
    )


def _check(options: Options) -> None:
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: wants a number of at least 0")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--out {options.out}: {problem.strerror}") from problem
    if not os.access(options.out, os.W_OK):
        raise UserError(f"--out {options.out}: cannot be written to")
    require("transformers", "datasets", "pyarrow", "rich", "matplotlib")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations this small gain nothing from a second thread, and lose a lot where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without the bars and advice of transformers, and the warning that the opening has told in words."""
    import transformers

    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"lsc_kernels\.\w+: no compiled kernel")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
