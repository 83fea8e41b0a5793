"""Packed prompts, and the text tower on packed prompts."""

import torch
from support.small_clip import TOKENS, build_small_clip
from torch import nn

from zscl.models.text_tower import TextTower, UsedEmbeddings, pack_prompts


def test_packing_stores_the_common_prefix_once_and_no_padding() -> None:
    prompts = pack_prompts(TOKENS, TOKENS.argmax(dim=1), cut=True, pack=True)
    assert prompts.prefix_length == 4
    assert prompts.ids.tolist() == [48, 5, 6, 9, 49, 7, 8, 49]
    assert prompts.positions.tolist() == [0, 1, 2, 3, 4, 4, 5, 6]
    assert prompts.row_of_slot.tolist() == [[4, 4, 4], [5, 6, 7]]
    assert prompts.slot_of_row.tolist() == [0, 3, 4, 5]
    assert prompts.end_rows.tolist() == [4, 7]


def test_a_cut_ends_at_the_longest_prompt() -> None:
    prompts = pack_prompts(TOKENS, TOKENS.argmax(dim=1), cut=True, pack=False)
    assert prompts.prefix_length == 0
    assert prompts.ids.tolist() == [48, 5, 6, 9, 49, 0, 0, 48, 5, 6, 9, 7, 8, 49]
    assert len(pack_prompts(TOKENS, TOKENS.argmax(dim=1), cut=False, pack=False).ids) == 24


def test_equal_prompts_and_a_single_prompt_have_a_suffix() -> None:
    for tokens in (TOKENS[[0, 0, 0]], TOKENS[:1]):
        prompts = pack_prompts(tokens, tokens.argmax(dim=1), cut=True, pack=True)
        assert prompts.prefix_length == 4
        features = TextTower.from_clip(build_small_clip())(prompts)
        assert torch.allclose(features, build_small_clip().encode_text(tokens, normalize=True), atol=1e-6)


def test_pooling_at_a_configured_end_token() -> None:
    model = build_small_clip(text={"pool_type": "eos", "eos_id": 7})
    prompts = torch.tensor([[48, 5, 9, 7, 0, 0, 0, 0, 0, 0, 0, 0], [48, 5, 49, 9, 7, 0, 0, 0, 0, 0, 0, 0]])
    tower = TextTower.from_clip(model)
    assert tower.end_positions(prompts).tolist() == [3, 4]
    features = tower(pack_prompts(prompts, tower.end_positions(prompts), cut=True, pack=True))
    assert torch.allclose(features, model.encode_text(prompts, normalize=True), atol=1e-6)


def test_restoring_the_table_changes_used_rows_only() -> None:
    model = build_small_clip()
    before = model.token_embedding.weight.detach().clone()
    used = UsedEmbeddings(model, TOKENS)
    assert model.token_embedding.weight.shape == (8, 16)
    with torch.no_grad():
        model.token_embedding.weight.add_(1.0)
    used.restore(model)
    expected = before.clone()
    expected[TOKENS.unique()] += 1.0
    assert torch.equal(model.token_embedding.weight, expected)
    assert isinstance(model.token_embedding.weight, nn.Parameter)
