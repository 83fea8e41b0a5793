"""Checks of `zscl search --dry-run`: everything that could stop a search at its start."""

from pathlib import Path

from orchestrate.lifecycle.paths import SEARCH_RESULT
from orchestrate.runs.dry_run import Checklist, ConnectCluster, add_common_checks, check_disk_space
from orchestrate.search.preflight import PreparedSearch, estimate_total_model_megabytes


def check_search(prepared: PreparedSearch, folder: Path, offline: bool, connect: ConnectCluster) -> Checklist:
    """Check everything that could stop a search at its start.

    Args:
        prepared: The search. `prepare_search` has checked its recipe, data and model.
        folder: The search's folder.
        offline: Whether the search would run without MLflow.
        connect: Function that connects to the Ray cluster. It is called only if the recipe or the environment names a
            cluster.

    Returns:
        The checks and their outcomes.
    """
    checklist = Checklist()
    if (folder / SEARCH_RESULT).is_file():
        checklist.add("search", lambda: "finished before, nothing is left to do")
        return checklist
    size = f"{prepared.trial_count} trials of {prepared.stage_count} stages"
    checklist.add("recipe, data and model", lambda: size)
    add_common_checks(checklist, prepared.base, folder, offline, connect)
    checklist.add("disk", lambda: check_disk_space(folder, estimate_total_model_megabytes(prepared)))
    return checklist
