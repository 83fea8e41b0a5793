"""Terms of the loss that are not ours: found by their dotted names, bound to a stage like our own parts."""

import inspect
import pkgutil
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from schemas.errors import InputError
from schemas.method import CustomLoss
from zscl.runtime.distributed import world_size
from zscl.runtime.hashing import sha256_of

if TYPE_CHECKING:
    from zscl.methods.interfaces import Batch, Features, LossTerm, StageContext

NAME = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9_.: -]*(/[A-Za-z0-9_:-][A-Za-z0-9_.: -]*)*")  # of an MLflow metric
COLUMNS = ("step", "learning_rate", "gradient_norm")  # of losses.csv, beside the losses


def import_custom_loss(loss: CustomLoss) -> Callable[..., "LossTerm"]:
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


def code_digest(loss: CustomLoss) -> str:
    """Identity of the code that a recipe names: the source of its module. Its settings are looked at, too.

    Raises:
        InputError: there is no such code, or it does not take the settings.
    """
    found = import_custom_loss(loss)
    try:
        inspect.signature(found).bind("a stage", **loss.settings)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"method.further_losses: '{loss.path}' does not take these settings ({error}), expected a stage and "
            "what its signature says"
        ) from error
    module = inspect.getmodule(found)
    try:
        return sha256_of(inspect.getsource(module) if module else loss.path)
    except (OSError, TypeError):  # compiled, or made in an interpreter
        return sha256_of(loss.path)


def build_custom_term(loss: CustomLoss, context: "StageContext") -> "LossTerm":
    """Bind a loss to a stage.

    Raises:
        InputError: it fails, or what it gives is no part.
    """
    with _failure_told(loss):
        part = import_custom_loss(loss)(context, **loss.settings)
    if not callable(part):
        raise InputError(
            f"method.further_losses: '{loss.path}' gives {type(part).__name__}, expected a part: something that is "
            "called with features and batch, and gives losses by name"
        )
    return CheckedTerm(loss, part)


@dataclass(frozen=True)
class CheckedTerm:
    """Another's part, whose mistakes are said in a sentence: starting again would not mend them."""

    loss: CustomLoss
    part: "LossTerm"

    def __call__(self, features: "Features", batch: "Batch") -> dict[str, torch.Tensor]:
        """Return the part's losses by name.

        Raises:
            InputError: it fails, or gives something else than scalars by name.
        """
        with _failure_told(self.loss):
            found = self.part(features, batch)
        if not isinstance(found, dict):
            raise InputError(self._expected(f"gives {type(found).__name__}"))
        for name, value in found.items():
            if not isinstance(name, str) or not NAME.fullmatch(name) or name in COLUMNS:
                raise InputError(
                    f"method.further_losses: '{self.loss.path}' gives a loss called {name!r}, expected a name of "
                    f"letters, digits and any of _.:-/ that is none of {', '.join(COLUMNS)}"
                )
            if not isinstance(value, torch.Tensor):
                raise InputError(self._expected(f"gives {type(value).__name__} as '{name}'"))
            if value.ndim:
                raise InputError(self._expected(f"gives a tensor of shape {list(value.shape)} as '{name}'"))
            if not value.is_floating_point() or value.device != features.images.device:
                raise InputError(self._expected(f"gives {value.dtype} on {value.device} as '{name}'"))
        return found

    def _expected(self, gives: str) -> str:
        return (
            f"method.further_losses: '{self.loss.path}' {gives}, expected a dict of losses by name, each a tensor of "
            "shape [], of floating-point numbers on the model's device"
        )


@contextmanager
def _failure_told(loss: CustomLoss) -> Iterator[None]:
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and world_size() > 1:
            raise  # a worker that died makes the others' collectives fail, and the group starts again
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"method.further_losses: '{loss.path}' fails in {Path(place.filename).name}, line {place.lineno} "
            f"({type(error).__name__}: {' '.join(str(error).split())}), expected a part of the loss"
        ) from error
