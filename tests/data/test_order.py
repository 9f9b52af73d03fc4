import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.data.order import example_index, is_mirrored


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1437, 50_000])
def test_every_epoch_is_a_permutation_and_no_two_are_alike(size):
    order = example_index(np.arange(3 * size, dtype=np.uint32), size, seed=5).reshape(3, size)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    if size > 50:
        other_seed = example_index(np.arange(size, dtype=np.uint32), size, seed=6)
        for a, b in [(order[0], order[1]), (order[1], order[2]), (order[0], other_seed), (order[0], np.arange(size))]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(size)
            assert np.mean(a == b) < 0.05


def test_any_position_alone_is_what_it_is_in_the_row():
    row = example_index(np.arange(500, dtype=np.uint32), 97, seed=1)
    alone = [int(example_index(np.asarray([p], np.uint32), 97, seed=1)[0]) for p in range(500)]
    np.testing.assert_array_equal(row, alone)


@pytest.mark.parametrize("size", [1, 2, 97, 1437])
def test_the_device_draws_what_the_host_draws(size):
    positions = np.arange(3 * size, dtype=np.uint32)
    on_device = jax.jit(lambda p: example_index(p, size, 3, jnp))(positions)
    np.testing.assert_array_equal(on_device, example_index(positions, size, 3))


def test_alternating_flips_mirror_every_image_in_every_second_epoch():
    positions = np.arange(4 * 97, dtype=np.uint32)
    index = example_index(positions, 97, seed=3)
    mirrored = is_mirrored(positions, index, 97, seed=3)
    by_image = np.stack([mirrored[i : i + 97][np.argsort(index[i : i + 97])] for i in range(0, 4 * 97, 97)])
    np.testing.assert_array_equal(by_image[0], ~by_image[1])
    np.testing.assert_array_equal(by_image[::2], [by_image[0]] * 2)
    assert 30 < by_image[0].sum() < 67
    on_device = jax.jit(lambda p, i: is_mirrored(p, i, 97, 3, jnp))(positions, index)
    np.testing.assert_array_equal(on_device, mirrored)
