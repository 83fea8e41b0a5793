"""Test that fine-tuning forgets and ZSCL does not, on the embedded suite with three seeds and two task orders."""

from pathlib import Path

import pytest
import torch

from orchestrate.recipes import recipe as recipes
from schemas.experiment import Experiment
from zscl.datasets.synthetic.suites import write_embedded
from zscl.sequence.run import run_sequence

RECIPE = Path(__file__).parent.parent / "experiments/embedded.yaml"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("order", ["alphabetical", "reversed"])
def test_finetuning_forgets_and_zscl_does_not(order: str, tmp_path: Path) -> None:
    write_embedded(tmp_path / "data", corpus=False, report=lambda text: None)
    content = recipes.read_recipe(RECIPE)
    names = [Path(path).name for path in content["tasks"]]
    content["tasks"] = [str(tmp_path / "data" / name) for name in (names if order == "alphabetical" else names[::-1])]
    content["reference"] = str(tmp_path / "data/reference")
    for seed in range(3):
        found = {}
        for method in ("finetune", content["method"]):
            experiment = Experiment.model_validate(content | {"method": method, "seed": seed})
            result = run_sequence(experiment, tmp_path / f"{experiment.method.name}-{seed}", device=torch.device("cpu"))
            found[experiment.method.name] = result.metrics
            zero_shot = result.zero_shot_metrics
            print(
                f"{order} seed {seed} {experiment.method.name}: "
                f"transfer {result.metrics.transfer:.3f} (zero-shot {zero_shot.transfer:.3f}) "
                f"avg {result.metrics.avg:.3f} last {result.metrics.last:.3f} "
                f"forgetting {result.metrics.forgetting:.3f} seconds {result.train_seconds:.0f}"
            )
        assert zero_shot.transfer is not None
        assert zero_shot.transfer - found["finetune"].transfer >= 0.10
        assert zero_shot.transfer - found["zscl"].transfer <= 0.03
        assert found["zscl"].last >= found["finetune"].last - 0.01
