"""Custom losses: loss terms from code outside this package, imported by the dotted name in the recipe and checked."""

import inspect
import pkgutil
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.errors import ErrorCode, InputError
from schemas.method import CustomLoss
from zscl.methods.interfaces import Batch, Features, LossTerm, StageContext
from zscl.runtime.distributed import world_size
from zscl.runtime.hashing import sha256_of

FIELD = "method.custom_losses"
# Names that MLflow accepts for metrics.
LOSS_NAME = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9_.: -]*(/[A-Za-z0-9_:-][A-Za-z0-9_.: -]*)*")
RESERVED_NAMES = ("step", "learning_rate", "gradient_norm")  # the other columns of losses.csv


def import_custom_loss(loss: CustomLoss) -> Callable[..., LossTerm]:
    """Import the class or function of a custom loss.

    Args:
        loss: The entry of `method.custom_losses` in the recipe.

    Returns:
        The class or function, which takes a `StageContext` and the settings and returns a loss term.

    Raises:
        InputError: The module or name does not exist, or is not callable.
    """
    try:
        factory = pkgutil.resolve_name(loss.path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{FIELD}: '{loss.path}' cannot be found ({error}), expected MODULE.NAME of code that is installed or "
            "in a folder of PYTHONPATH on every machine with workers",
            code=ErrorCode.UNKNOWN_NAME,
            field=FIELD,
        ) from error
    if not callable(factory):
        raise InputError(
            f"{FIELD}: '{loss.path}' is {type(factory).__name__}, expected a class or a function",
            code=ErrorCode.CUSTOM_CODE,
            field=FIELD,
        )
    return factory  # type: ignore[no-any-return]


def code_digest(loss: CustomLoss) -> str:
    """Hash the source code of a custom loss, and check that the code accepts the settings in the recipe.

    Args:
        loss: The entry of `method.custom_losses` in the recipe.

    Returns:
        A hash of the source code of the module, or of the dotted name if there is no source code. The hash is part of
        the run's fingerprint.

    Raises:
        InputError: The code does not exist, or does not accept the settings.
    """
    factory = import_custom_loss(loss)
    try:
        inspect.signature(factory).bind("a stage", **loss.settings)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{FIELD}: '{loss.path}' does not accept these settings ({error}), expected the arguments of its "
            "signature that follow the stage context",
            code=ErrorCode.INVALID_VALUE,
            field=FIELD,
        ) from error
    module = inspect.getmodule(factory)
    try:
        return sha256_of(inspect.getsource(module) if module else loss.path)
    except (OSError, TypeError):  # compiled code, or code from an interactive session
        return sha256_of(loss.path)


def build_custom_term(loss: CustomLoss, context: StageContext) -> LossTerm:
    """Build the loss term of a custom loss for one stage.

    Args:
        loss: The entry of `method.custom_losses` in the recipe.
        context: Information about the stage, which is passed to the custom code.

    Returns:
        The term, with a check of its result at every call.

    Raises:
        InputError: The code raises an error, or does not return a callable.
    """
    with _errors_located(loss):
        term = import_custom_loss(loss)(context, **loss.settings)
    if not callable(term):
        raise InputError(
            f"{FIELD}: '{loss.path}' returns {type(term).__name__}, expected a loss term: a callable that takes "
            "features and batch, and returns a dict of named losses",
            code=ErrorCode.CUSTOM_CODE,
            field=FIELD,
        )
    return CheckedTerm(loss, term)


@dataclass(frozen=True)
class CheckedTerm:
    """A custom loss term whose results are checked.

    If the term raises an error or returns a wrong result, an `InputError` with a one-line message is raised. An
    `InputError` is not retried.

    Attributes:
        loss: The entry of `method.custom_losses` in the recipe.
        term: The term.
    """

    loss: CustomLoss
    term: LossTerm

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the term and check its result.

        Args:
            features: The student's features of the global batch.
            batch: This rank's slice of the global batch.

        Returns:
            The term's named losses.

        Raises:
            InputError: The term raises an error, or does not return a dict of named scalars.
        """
        with _errors_located(self.loss):
            losses = self.term(features, batch)
        _check_losses(self.loss, losses, features.images.device)
        return losses


def _check_losses(loss: CustomLoss, losses: object, device: torch.device) -> None:
    """Check that a term returned a dict of named floating-point scalars."""
    if not isinstance(losses, dict):
        raise _wrong_result(loss, type(losses).__name__)
    for name, value in losses.items():
        if not isinstance(name, str) or not LOSS_NAME.fullmatch(name) or name in RESERVED_NAMES:
            raise InputError(
                f"{FIELD}: '{loss.path}' returns a loss named {name!r}, expected a name of letters, digits and any of "
                f"_.:-/ other than {', '.join(RESERVED_NAMES)}",
                code=ErrorCode.CUSTOM_CODE,
                field=FIELD,
            )
        if not isinstance(value, torch.Tensor):
            raise _wrong_result(loss, f"{type(value).__name__} as '{name}'")
        if value.ndim:
            raise _wrong_result(loss, f"a tensor of shape {list(value.shape)} as '{name}'")
        if not value.is_floating_point() or value.device != device:
            raise _wrong_result(loss, f"{value.dtype} on {value.device} as '{name}'")


def _wrong_result(loss: CustomLoss, result: str) -> InputError:
    return InputError(
        f"{FIELD}: '{loss.path}' returns {result}, expected a dict of named losses, which are floating-point tensors "
        "of shape [] on the model's device",
        code=ErrorCode.CUSTOM_CODE,
        field=FIELD,
    )


@contextmanager
def _errors_located(loss: CustomLoss) -> Iterator[None]:
    """Turn any error of custom code into an `InputError` with the file and line that raised it."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and world_size() > 1:
            raise  # another worker may have died during a collective; then the worker group restarts
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{FIELD}: '{loss.path}' fails in {Path(frame.filename).name}, line {frame.lineno} "
            f"({type(error).__name__}: {' '.join(str(error).split())}), expected a loss term",
            code=ErrorCode.CUSTOM_CODE,
            field=FIELD,
        ) from error
