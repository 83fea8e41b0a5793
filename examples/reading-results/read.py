"""What runs have left, as pandas tables: from their folders, and from MLflow.

python examples/reading-results/read.py runs/examples/own-folders
"""

import json
import sys
from pathlib import Path

import mlflow
import pandas as pd


def matrix(run: Path) -> pd.DataFrame:
    """Accuracy of each task (columns) after each stage (rows; 0: before the first)."""
    result = json.loads((run / "result.json").read_text())
    rows = [result["zero_shot"], *result["accuracy_matrix"]]
    table = pd.DataFrame(rows, columns=[task["name"] for task in result["tasks"]]).rename_axis("stage")
    return (100 * table).round(1)


def curves(run: Path) -> pd.DataFrame:
    """Every step's losses, by stage."""
    tables = {file.parent.name: pd.read_csv(file) for file in sorted(run.glob("stages/*/losses.csv"))}
    return pd.concat(tables, names=["stage", "row"])


def figures(store: str) -> pd.DataFrame:
    """Transfer, Avg, Last and forgetting of all finished runs of a store, in per cent."""
    mlflow.set_tracking_uri(store)
    runs = mlflow.search_runs(search_all_experiments=True, filter_string="tags.`zscl.level` = 'sequence'")
    columns = [
        "params.method.name",
        "params.seed",
        "metrics.transfer",
        "metrics.avg",
        "metrics.last",
        "metrics.forgetting",
    ]
    table = runs[[column for column in columns if column in runs]].rename(columns=lambda name: name.partition(".")[2])
    numbers = table.select_dtypes("number").columns
    return table.assign(**{name: (100 * table[name]).round(1) for name in numbers})


def main(folder: Path) -> None:
    """Show the runs in a folder."""
    runs = sorted(file.parent for file in folder.glob("*/result.json"))
    if not runs:
        sys.exit(f"{folder}: found no run in it, expected the folder that holds runs' folders")
    for run in runs:
        print(f"\n{run.name}: accuracy\n{matrix(run)}")
        losses = curves(run).drop(columns=["step", "learning_rate"]).groupby("stage").mean().round(3)
        print(f"\n{run.name}: mean losses and gradient norm of each stage\n{losses.to_string()}")
    print(f"\nin MLflow\n{figures(f'sqlite:///{folder}/mlflow.db').to_string(index=False)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
