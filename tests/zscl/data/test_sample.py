"""Iteration over indexed and streamed samples: once in order, and endlessly in the order of a seed."""

import pytest
from support.data import fetch_first, sample_labels

from zscl.data.shard_urls import open_samples
from zscl.data.streaming import StreamedSamples


@pytest.mark.parametrize("remote", [False, True])
def test_every_sample_is_in_exactly_one_shard(shards: list[str], remote: bool) -> None:
    samples = StreamedSamples([f"file://{shard}" for shard in shards]) if remote else open_samples(shards)
    assert sample_labels(samples.iter_shard(0, 1)) == list(range(10))
    for count in (1, 2, 3, 11):
        drawn = [label for index in range(count) for label in sample_labels(samples.iter_shard(index, count))]
        assert sorted(drawn) == list(range(10))


@pytest.mark.parametrize("remote", [False, True])
def test_the_endless_order_is_a_pure_function_of_seed_and_position(shards: list[str], remote: bool) -> None:
    samples = StreamedSamples([f"file://{shard}" for shard in shards]) if remote else open_samples(shards)
    order = sample_labels(fetch_first(samples.iter_positions(range(30), seed=5)))
    assert [sorted(order[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    assert sample_labels(fetch_first(samples.iter_positions(range(13, 27), seed=5))) == order[13:27]
    assert sample_labels(fetch_first(samples.iter_positions([1, 2, 17], seed=5))) == [order[1], order[2], order[17]]
    assert sample_labels(fetch_first(samples.iter_positions(range(10), seed=6))) != order[:10]
