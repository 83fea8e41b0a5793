"""What a dry run of a search checks."""

from pathlib import Path

from orchestrate.lifecycle.paths import FOUND
from orchestrate.runs.dry_run import Checklist, Connect, _check_common, _disk
from orchestrate.search.preflight import PreparedSearch, total_model_megabytes


def check_search(prepared: PreparedSearch, folder: Path, offline: bool, connect: Connect) -> Checklist:
    """Check what a search needs beside its recipe, data and models, which `search_preflight.prepare` has looked at.

    Args:
        prepared: the search.
        folder: of it.
        offline: whether it is run without MLflow.
        connect: to the cluster, if the recipe or the environment names one.
    """
    checklist, opened = Checklist(), prepared.base
    if (folder / FOUND).is_file():
        checklist.check("search", lambda: "finished before, nothing is left to do")
        return checklist
    checklist.check("recipe, data and model", lambda: f"{prepared.trial_count} trials of {prepared.stage_count} stages")
    _check_common(checklist, opened, folder, offline, connect)
    checklist.check("disk", lambda: _disk(folder, total_model_megabytes(prepared)))
    return checklist
