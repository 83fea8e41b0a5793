"""Warnings about a task's prompts after tokenization: truncated prompts, and classes with equal tokens."""

from collections.abc import Sequence
from typing import Any

from zscl.data.task import TaskFolder

MAX_PROMPTS = 2_000  # per task; the tokens of shorter prompts are not counted
MAX_CLASSES = 5  # in a message
EXTRA_TOKENS = 8  # after the context length, to detect longer prompts


def prompt_warnings(task: TaskFolder, tokenizer: Any, include_equal_names: bool = True) -> list[str]:
    """Return warnings about prompts that exceed the context length, and about classes with equal prompt tokens.

    Args:
        task: The task. All templates are checked for truncation, and the first template for equal tokens.
        tokenizer: The model's tokenizer.
        include_equal_names: Whether to include warnings about classes with the same name.

    Returns:
        One message if prompts are truncated, and one message for each group of classes whose prompts have equal tokens.
    """
    if not task.templates:
        return []
    return [*_truncated_prompts(task, tokenizer), *_equal_classes(task, tokenizer, include_equal_names)]


def _truncated_prompts(task: TaskFolder, tokenizer: Any) -> list[str]:
    context_length = tokenizer([""]).shape[1]
    # Without the start and the end token, a prompt has at most as many tokens as bytes.
    min_bytes = context_length - 2
    prompts = {prompt for template in task.templates for prompt in task.prompts(template)}
    candidates = [prompt for prompt in prompts if len(prompt.encode()) >= min_bytes]
    longest = sorted(candidates, key=lambda prompt: (len(prompt), prompt))[-MAX_PROMPTS:]
    if not longest:
        return []
    padding = tokenizer([""], context_length=context_length + EXTRA_TOKENS)[0, -1]
    extra = tokenizer(longest, context_length=context_length + EXTRA_TOKENS)[:, context_length:]
    is_truncated = (extra != padding).any(dim=1).tolist()
    truncated = [prompt for prompt, is_cut in zip(longest, is_truncated, strict=True) if is_cut]
    if not truncated:
        return []
    more = f" and {len(truncated) - 1} more" if len(truncated) > 1 else ""
    return [
        f"task '{task.name}': found prompts of more than {context_length} tokens, which the model truncates: "
        f"{truncated[-1]!r}{more}"
    ]


def _equal_classes(task: TaskFolder, tokenizer: Any, include_equal_names: bool) -> list[str]:
    labels_of: dict[bytes, list[int]] = {}
    for label, tokens in enumerate(tokenizer(task.prompts(task.templates[0]))):
        labels_of.setdefault(tokens.numpy().tobytes(), []).append(label)
    return [
        _equal_classes_message(task, labels)
        for labels in labels_of.values()
        if len(labels) > 1 and (include_equal_names or len({task.classnames[label] for label in labels}) > 1)
    ]


def _equal_classes_message(task: TaskFolder, labels: Sequence[int]) -> str:
    names = [task.classnames[label] for label in labels]
    if len(set(names)) == 1:
        return (
            f"task '{task.name}': found the name {names[0]!r} for the classes {', '.join(map(str, labels))}; prompts "
            "cannot distinguish them"
        )
    classes = ", ".join(f"{name!r} ({label})" for name, label in list(zip(names, labels, strict=True))[:MAX_CLASSES])
    more = f" and {len(labels) - MAX_CLASSES} more" if len(labels) > MAX_CLASSES else ""
    return (
        f"task '{task.name}': found the classes {classes}{more} with the same tokens in the prompt "
        f"{task.templates[0]!r}; the model cannot distinguish them"
    )
