import pytest
import torch

from tritprune.errors import ConfigError
from tritprune.training.batches import BatchOrder, step_seed


def order(rank=0, world=1, accumulate=1, n=10, batch=4, seed=0):
    return BatchOrder(n, batch_size=batch, accumulate=accumulate, rank=rank, world=world, seed=seed)


def test_an_epoch_shows_every_example_once():
    steps = [order().global_batch(step) for step in range(5)]  # 20 positions = 2 epochs of 10
    seen = torch.cat(steps)
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_a_batch_is_a_pure_function_of_seed_and_step():
    late = order()
    late.global_batch(7)
    assert torch.equal(order().global_batch(2), late.global_batch(2))
    assert not torch.equal(order(seed=1).global_batch(2), late.global_batch(2))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_processes_and_micro_batches_part_the_same_global_batch(world, accumulate):
    parts = [part for rank in range(world) for part in order(rank, world, accumulate).micro_batches(3)]
    assert len(parts) == world * accumulate
    assert torch.equal(torch.cat(parts), order().global_batch(3))


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"batch_size=4 .* 3 x 1"):
        order(world=3)


def test_step_seed_depends_on_every_part():
    assert (
        len({step_seed(0, "dense", 1), step_seed(0, "prune", 1), step_seed(0, "dense", 2), step_seed(1, "dense", 1)})
        == 4
    )
    assert 0 <= step_seed("x") < 2**63
