"""Functions of a trainer replaced by ours, wherever the trainer has imported them; and put back."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any


class Patch:
    """Ours in the place of functions of a trainer, all of them or none.

    Args:
        package: the trainer's, whose modules are searched for functions that were imported by value.
        functions: ours, by where theirs are defined: ``"verl.trainer.ppo.core_algos:kl_penalty"``, a method as
            ``"module:Class.method"``. Their parameters must have the same names in the same order.
    """

    def __init__(self, package: str, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._package, self._functions = package, dict(functions)
        self._replaced: list[tuple[Any, str, Any]] = []  # owner, attribute, theirs

    def apply(self) -> list[str]:
        """Replace; what was replaced, as ``owner.name``. Nothing where that has been done before.

        Raises:
            AttributeError: a function is not where it is expected to be; nothing has been replaced.
            TypeError: it has other parameters; nothing has been replaced.
        """
        if self._replaced:
            return []
        wanted = []
        for where, ours in self._functions.items():
            owner, name = _owner(where)
            theirs = getattr(owner, name)
            _check_parameters(where, theirs, ours)
            owners = [each for each in self._modules() if vars(each).get(name) is theirs]
            wanted += [
                (each, name, theirs, ours) for each in {id(each): each for each in [owner, *owners]}.values()
            ]
        for owner, name, theirs, ours in wanted:
            setattr(owner, name, ours)
            self._replaced.append((owner, name, theirs))
        return [f"{owner.__name__}.{name}" for owner, name, _, _ in wanted]

    def undo(self) -> list[str]:
        """Put the trainer's functions back, also in modules that have imported ours since."""
        if not self._replaced:
            return []
        back = {id(owner): owner for owner, _, _ in self._replaced}
        for where, ours in self._functions.items():
            name = where.rpartition(":")[2].rpartition(".")[2]
            for module in self._modules():
                if vars(module).get(name) is ours and id(module) not in back:
                    theirs = next(theirs for _, each, theirs in self._replaced if each == name)
                    self._replaced.append((module, name, theirs))
        done, self._replaced = self._replaced, []
        for owner, name, theirs in done:
            setattr(owner, name, theirs)
        return [f"{owner.__name__}.{name}" for owner, name, _ in done]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replaced for as long as the block runs; beyond it where :meth:`apply` had been called before."""
        did = self.apply()
        try:
            yield
        finally:
            if did:
                self.undo()

    def _modules(self) -> list[Any]:
        return [
            module
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == self._package and hasattr(module, "__dict__")
        ]


def _owner(where: str) -> tuple[Any, str]:
    """The module or class that has an attribute, and the attribute's name."""
    module, _, path = where.partition(":")
    *classes, name = path.split(".")
    return reduce(getattr, classes, importlib.import_module(module)), name


def _check_parameters(where: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    expected, found = (list(inspect.signature(each).parameters) for each in (ours, theirs))
    if expected != found:
        raise TypeError(
            f"{where} takes ({', '.join(found)}); what would replace it takes ({', '.join(expected)})"
        )
