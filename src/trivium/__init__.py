"""Trivium: train, evaluate and serve compact vision-language foundation models.

``trivium.load(path)`` opens a model folder, a run folder or a foreign checkpoint and returns a ``Bundle``.
Importing the package loads no torch; the first use of ``load`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.load import Bundle, load

__version__ = "0.1.0"
__all__ = ["Bundle", "TriviumError", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name in ("load", "Bundle"):
        import importlib

        module = importlib.import_module("trivium.load")
        globals()["load"] = module.load
        return getattr(module, name)
    raise AttributeError(f"module 'trivium' has no attribute {name!r}")
