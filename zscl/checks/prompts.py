"""Warnings about a task's prompts as a tokenizer reads them: prompts that are cut, and classes that it makes equal."""

from collections.abc import Sequence
from typing import Any

from zscl.data.task import TaskFolder

MOST_PROMPTS = 2_000  # of a task, the longest ones, that are counted in tokens
NAMED = 5  # classes in a sentence
BEHIND = 8  # tokens read behind the context, to see whether a prompt goes on


def prompt_warnings(task: TaskFolder, tokenizer: Any, include_equal_names: bool = True) -> list[str]:
    """Describe prompts that the model does not read to their end, and classes that no prompt tells apart.

    Args:
        task: its class names and templates; the first template trains.
        tokenizer: the model's.
        same_names: also describe classes of one name.

    Returns:
        A sentence for each kind of prompt that is cut, and for each group of classes that are equal.
    """
    return [*_cut(task, tokenizer), *_equal(task, tokenizer, include_equal_names)] if task.templates else []


def _cut(task: TaskFolder, tokenizer: Any) -> list[str]:
    context = tokenizer([""]).shape[1]
    # A prompt has no more tokens than bytes, beside the start and the end token.
    prompts = [prompt for each in task.templates for prompt in task.prompts(each) if len(prompt.encode()) > context - 3]
    longest = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))[-MOST_PROMPTS:]
    if not longest:
        return []
    padding = tokenizer([""], context_length=context + BEHIND)[0, -1]
    behind = tokenizer(longest, context_length=context + BEHIND)[:, context:]
    cut = [prompt for prompt, goes_on in zip(longest, (behind != padding).any(dim=1).tolist(), strict=True) if goes_on]
    if not cut:
        return []
    others = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
    return [
        f"task '{task.name}': found the prompt {cut[-1]!r}{others} to have more than the {context} tokens that the "
        "model reads; what lies behind them is cut off"
    ]


def _equal(task: TaskFolder, tokenizer: Any, same_names: bool) -> list[str]:
    groups: dict[bytes, list[int]] = {}
    for label, row in enumerate(tokenizer(task.prompts(task.templates[0]))):
        groups.setdefault(row.numpy().tobytes(), []).append(label)
    alike = [labels for labels in groups.values() if len(labels) > 1]
    return [
        _sentence(task, labels)
        for labels in alike
        if same_names or len({task.classnames[label] for label in labels}) > 1
    ]


def _sentence(task: TaskFolder, labels: Sequence[int]) -> str:
    names = [task.classnames[label] for label in labels]
    if len(set(names)) == 1:
        return (
            f"task '{task.name}': found {names[0]!r} to be the name of the classes {', '.join(map(str, labels))}; no "
            "prompt tells them apart"
        )
    shown = ", ".join(f"{name!r} ({label})" for name, label in list(zip(names, labels, strict=True))[:NAMED])
    more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
    return (
        f"task '{task.name}': found the classes {shown}{more} to have the same tokens in the prompt "
        f"{task.templates[0]!r}; the model cannot tell them apart"
    )
