"""Terms of the loss that are not ours: found by their dotted names, bound to a stage like our own parts."""

import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from schemas.base import InputError
from schemas.method import FurtherLoss
from zscl.files import digest

if TYPE_CHECKING:
    from zscl.objective import Part, Stage


def find(loss: FurtherLoss) -> Callable[..., "Part"]:
    """Import what a recipe names.

    Raises:
        InputError: there is no such module or name, or it cannot be called.
    """
    shown = f"method.further_losses: '{loss.path}'"
    try:
        found = pkgutil.resolve_name(loss.path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{shown} cannot be found ({error}), expected MODULE.NAME of code that is installed, or in a folder of "
            "PYTHONPATH, wherever workers run"
        ) from error
    if not callable(found):
        raise InputError(f"{shown} is {type(found).__name__}, expected a class or a function")
    return found  # type: ignore[no-any-return]


def digest_of(loss: FurtherLoss) -> str:
    """Identity of the code that a recipe names: the source of its module. Its settings are looked at, too.

    Raises:
        InputError: there is no such code, or it does not take the settings.
    """
    found = find(loss)
    try:
        inspect.signature(found).bind("a stage", **loss.settings)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"method.further_losses: '{loss.path}' does not take these settings ({error}), expected a stage and "
            "what its signature says"
        ) from error
    module = inspect.getmodule(found)
    try:
        return digest(inspect.getsource(module) if module else loss.path)
    except (OSError, TypeError):  # compiled, or made in an interpreter
        return digest(loss.path)


def bind(loss: FurtherLoss, stage: "Stage") -> "Part":
    """Bind a loss to a stage.

    Raises:
        InputError: what it gives is no part.
    """
    part = find(loss)(stage, **loss.settings)
    if not callable(part):
        raise InputError(
            f"method.further_losses: '{loss.path}' gives {type(part).__name__}, expected a part: something that is "
            "called with features and batch, and gives losses by name"
        )
    return part
