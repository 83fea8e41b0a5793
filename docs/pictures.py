"""The pictures of docs/concepts.md, and its table, from the runs of experiments/parts-embedded.yaml.

zscl run experiments/parts-embedded.yaml --variant all --out runs/parts
python docs/pictures.py runs/parts
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from orchestrate.reports.results import format_percent, load_result
from schemas.results import Result

FOLDER = Path(__file__).parent / "pictures"


def matrices(*results: Result) -> None:
    """Accuracy matrices side by side, the zero-shot row above each."""
    figure, panels = plt.subplots(1, len(results), figsize=(6 * len(results), 4.6), layout="constrained", sharey=True)
    for axes, result in zip(panels, results, strict=True):
        names = [task.name for task in result.tasks]
        rows = [result.zero_shot, *result.accuracy_matrix]
        shown = axes.imshow(rows, cmap="viridis", vmin=0.2, vmax=1.0)
        for stage, row in enumerate(rows):
            for task, value in enumerate(row):
                dark = value < 0.65
                axes.text(
                    task, stage, format_percent(value), ha="center", va="center", color="white" if dark else "black"
                )
                if stage == task + 1:
                    axes.add_patch(plt.Rectangle((task - 0.5, stage - 0.5), 1, 1, fill=False, lw=2))
        axes.set(title=result.method, xticks=range(len(names)), yticks=range(len(rows)))
        axes.set_xticklabels(names, rotation=30, ha="right")
        axes.set_yticklabels(["zero-shot", *(f"after {name}" for name in names)])
    figure.colorbar(shown, ax=panels, label="accuracy", shrink=0.8)
    figure.savefig(FOLDER / "matrices.png", dpi=110)


def parts(results: list[Result]) -> None:
    """Transfer against Last, a point a method."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for result in results:
        at = 100 * (result.metrics.transfer or 0), 100 * result.metrics.last
        axes.plot(*at, "o", color="C1" if result.method.startswith("zscl") else "C0")
        beside = (-26, -13) if result.method == "zscl" else (6, 4)  # which lies close to zscl*
        axes.annotate(result.method, at, xytext=beside, textcoords="offset points")
    axes.set(xlabel="Transfer: zero-shot ability that is left", ylabel="Last: what is known in the end")
    axes.grid(alpha=0.3)
    axes.margins(0.16)
    figure.savefig(FOLDER / "parts.png", dpi=110)


def table(results: list[Result]) -> str:
    """The figures, a row a method."""
    lines = ["| method | Transfer | Avg | Last | forgetting |", "|---|---:|---:|---:|---:|"]
    for result in results:
        figures = (result.metrics.transfer, result.metrics.avg, result.metrics.last, result.metrics.forgetting)
        lines.append(f"| {result.method} | {' | '.join(map(format_percent, figures))} |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Draw the pictures and print the table."""
    found = {run.parent.name: load_result(run.parent) for run in folder.glob("*/result.json")}
    order = ["zero-shot", "finetune", "we", "wc", "we-wc", "wise-ft", "lwf", "lwf-vr", "icarl", "zscl-star", "zscl"]
    results = [found[name] for name in order if name in found]
    matrices(found["finetune"], found["zscl"])
    parts(results)
    print(table(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
