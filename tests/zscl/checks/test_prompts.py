"""Warnings about truncated prompts and classes with equal tokens."""

import open_clip
import torch

from zscl.checks.prompts import prompt_warnings
from zscl.data.task import TaskFolder


class PaddedWithOnes:
    """A tokenizer like SigLIP's: no start token, padding with the end token, no case and no punctuation."""

    def __call__(self, texts: list[str], context_length: int = 6) -> torch.Tensor:
        rows = torch.ones(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            words = text.lower().replace("!", "").split()[:context_length]
            row[: len(words)] = torch.tensor([2 + sum(word.encode()) for word in words], dtype=torch.long)
        return rows


def task(*names: str, templates: tuple[str, ...] = ("a photo of a {c}.",)) -> TaskFolder:
    return TaskFolder("mine", "mine", names, templates)


def test_a_prompt_is_cut_where_it_has_more_tokens_than_the_context() -> None:
    clip = open_clip.get_tokenizer("ViT-B-32", context_length=12)
    fits, cut = (
        "one two three four five six seven eight nine {c}",
        "one two three four five six seven eight nine ten {c}",
    )
    assert prompt_warnings(task("cat", "dog", templates=(fits,)), clip) == []
    [sentence, _] = prompt_warnings(task("cat", "dog", templates=(cut,)), clip)
    assert sentence == (
        "task 'mine': found prompts of more than 12 tokens, which the model truncates: "
        f"{cut.replace('{c}', 'dog')!r} and 1 more"
    )
    [sentence] = prompt_warnings(task("\N{PILE OF POO}" * 12, "dog", templates=("{c}",)), clip)  # few characters
    assert "more than 12 tokens" in sentence
    fits, cut = "the dog sees red and {c}", "the dog sees red and blue {c}"
    assert prompt_warnings(task("cat", "dog", templates=(fits,)), PaddedWithOnes()) == []
    assert "more than 6 tokens" in prompt_warnings(task("cat", "dog", templates=(fits, cut)), PaddedWithOnes())[0]


def test_classes_are_equal_where_their_tokens_are() -> None:
    clip = open_clip.get_tokenizer("ViT-B-32")
    assert prompt_warnings(task("cat", "dog", "caf\u00e9"), clip) == []
    for names in (("cat", "Cat"), ("caf\u00e9", "cafe\u0301"), ("two words", "two  words"), ("a\u2028b", "a b")):
        [sentence] = prompt_warnings(task("dog", *names), clip)
        assert f"found the classes {names[0]!r} (1), {names[1]!r} (2) with the same tokens" in sentence
    assert "'cat' (0), 'cat!' (1)" in prompt_warnings(task("cat", "cat!", "dog"), PaddedWithOnes())[0]
    same = task("crane", "heron", "crane")
    assert prompt_warnings(same, clip, include_equal_names=False) == []
    assert "found the name 'crane' for the classes 0, 2" in prompt_warnings(same, clip)[0]
