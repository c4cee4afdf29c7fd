"""The extra packages scoring needs, and the manners of the Hugging Face hub."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlparse

from ..errors import UserError
from ..extras import EXTRA_OF


def require(*modules: str) -> None:
    """Check that extra packages are installed.

    Raises:
        UserError: one is missing; the message says what to install.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as problem:
            extra = EXTRA_OF[module]
            raise UserError(f"{problem.name} is missing: pip install 'lsc-kernels[{extra}]'") from problem


@cache
def offline_note() -> str:
    """Why the hub cannot be asked, or nothing when it can.

    Asked once per process with a short time limit: without a network the hub's own client tries every file
    for half a minute. Behind a proxy a direct connection says nothing, so the client is left to try.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and it is not in the cache"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return ""
    address = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return f"{address.hostname} cannot be reached and it is not in the cache"
    return ""


@contextmanager
def quiet_hub(*, offline: bool) -> Iterator[None]:
    """Load from the hub without its progress bars and warnings, from the cache alone when ``offline``."""
    import huggingface_hub
    import transformers

    with ExitStack() as restore:
        for name in ("transformers", "huggingface_hub", "datasets", "httpx"):
            logger = logging.getLogger(name)
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        bars_were_off = huggingface_hub.utils.are_progress_bars_disabled()
        huggingface_hub.utils.disable_progress_bars()
        if not bars_were_off:
            restore.callback(huggingface_hub.utils.enable_progress_bars)
        if transformers.utils.logging.is_progress_bar_enabled():
            transformers.utils.logging.disable_progress_bar()
            restore.callback(transformers.utils.logging.enable_progress_bar)
        # Both libraries read the environment once, at import; a variable set now would come too late.
        for settings in _settings() if offline else ():
            restore.callback(setattr, settings, "HF_HUB_OFFLINE", settings.HF_HUB_OFFLINE)
            settings.HF_HUB_OFFLINE = True
        yield


def _settings() -> list[Any]:
    """The modules that keep whether to ask the hub, of the libraries that are loaded."""
    names = ("huggingface_hub.constants", "datasets.config")
    return [sys.modules[name] for name in names if name in sys.modules]
