"""Running experiments: the command line, recipes, runs on Ray, hyperparameter search, MLflow tracking and reports."""

import os
from pathlib import Path

# The libraries send usage statistics to their makers by default. They read these variables when they are imported, and
# child processes inherit them. A value that the user has set is kept.
NO_TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
for _name, _value in NO_TELEMETRY.items():
    os.environ.setdefault(_name, _value)

# A user id without an entry in the password database, as in a container, has no home directory, and then Ray cannot be
# imported. A home directory that does not exist is enough.
try:
    Path.home()
except RuntimeError:
    os.environ["HOME"] = "/nonexistent"
