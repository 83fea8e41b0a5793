"""Where it runs: Ray, MLflow and the command line."""

import os
from pathlib import Path

# The libraries send usage statistics to their makers by default. They read these variables when they are imported, and
# the processes that are started here inherit them. A value that the user has set stays.
NO_TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
for _name, _value in NO_TELEMETRY.items():
    os.environ.setdefault(_name, _value)

# A user without an entry in the system's list, as in a container that runs under another user's number, has no home;
# Ray cannot be imported then. A home that cannot be written will do.
try:
    Path.home()
except RuntimeError:
    os.environ["HOME"] = "/nonexistent"
