"""`zscl --version`: the versions, GPU and platform that a report of a bug needs, one a line."""

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "open_clip_torch", "ray", "mlflow", "webdataset", "pydantic")


def versions() -> dict[str, str]:
    """By name. Of the libraries, only torch is imported, which alone knows of GPUs; what is missing is named, too."""
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
    """What torch was built for, and the GPUs that it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of CUDA's that is not there, say
        return f"torch cannot be imported ({error})"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{torch.version.cuda or 'none'}, {', '.join(names) or 'no GPU'}"
