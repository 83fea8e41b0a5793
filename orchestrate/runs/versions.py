"""Versions for `zscl --version`: zscl, Python, the libraries, CUDA and the platform."""

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "open_clip_torch", "ray", "mlflow", "webdataset", "pydantic")


def collect_versions() -> dict[str, str]:
    """Collect the versions that a bug report needs. Of the libraries, only torch is imported, to list the GPUs."""
    return {
        "zscl": _version("zscl"),
        "python": platform.python_version(),
        **{library: _version(library) for library in LIBRARIES},
        "CUDA": _cuda(),
        "platform": platform.platform(),
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    """Return the CUDA version that torch was built for, and the GPUs that it detects."""
    try:
        import torch
    except (ImportError, OSError) as error:  # for example, a CUDA library is missing
        return f"torch cannot be imported ({error})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda or 'none'}, {', '.join(names) or 'no GPU'}"
