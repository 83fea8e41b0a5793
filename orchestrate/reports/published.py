"""Published results of the paper (ICCV 2023) on MTIL: Transfer, Avg and Last in per cent, by task order and method."""

from collections.abc import Mapping

PublishedMetrics = tuple[float, float, float]
MTIL_PUBLISHED: Mapping[str, Mapping[str, PublishedMetrics]] = {
    "I": {
        "zero-shot": (69.4, 65.3, 65.3),
        "finetune": (44.6, 55.9, 77.3),
        "lwf": (56.9, 64.7, 74.6),
        "icarl": (50.4, 65.7, 80.1),
        "lwf-vr": (57.2, 65.1, 76.6),
        "wise-ft": (52.3, 60.7, 77.7),
        "zscl*": (62.2, 72.6, 84.5),
        "zscl": (68.1, 75.4, 83.6),
    },
    "II": {
        "finetune": (46.6, 56.2, 67.4),
        "lwf": (53.2, 62.2, 71.9),
        "icarl": (50.9, 56.9, 71.6),
        "lwf-vr": (53.1, 60.6, 68.3),
        "wise-ft": (51.0, 61.5, 72.2),
        "zscl*": (59.8, 71.8, 83.3),
        "zscl": (64.2, 74.5, 83.4),
    },
}
