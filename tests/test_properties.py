"""What holds for any recipe, any data order, any split of an evaluation, any residual network."""

import contextlib
import dataclasses
import itertools
import json
import types
import typing

import chex
import jax
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from resnet_jax import from_torch, to_torch
from resnet_jax.config import MOST, AugmentConfig, Config, InputError, differences, from_dict, to_dict
from resnet_jax.data.dataset import ArraySource
from resnet_jax.data.loader import TrainExample
from resnet_jax.models.registry import variable_shapes
from resnet_jax.models.resnet import ResNet
from resnet_jax.training.losses import cross_entropy
from resnet_jax.training.metrics import add, eval_sums, means

settings.register_profile("same every time", derandomize=True, deadline=None, database=None)
settings.load_profile("same every time")
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(int, st.integers(1 - 2**63, 2**63 - 1))


def values_of(hint, limits):
    """Any values of a type, numbers within limits such as `[0, 1)`."""
    low, high = (float(end) for end in limits[1:-1].replace("MOST", str(MOST)).split(", "))
    parts = typing.get_args(hint)
    if hint is int:
        return st.integers(int(low), int(high))
    if hint is float:
        return st.floats(low, high, exclude_min=limits[0] == "(", exclude_max=limits[-1] == ")")
    if typing.get_origin(hint) is tuple and parts[1:] == (...,):
        return st.lists(values_of(parts[0], limits), max_size=3).map(tuple)
    if typing.get_origin(hint) is tuple:
        return st.tuples(*(values_of(part, limits) for part in parts))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return st.one_of(*(values_of(part, limits) for part in parts))
    return st.from_type(hint)


CHANGES = st.one_of(
    *(
        st.tuples(
            st.just((section, field.name)),
            values_of(typing.get_type_hints(type(recipe))[field.name], field.metadata.get("limits") or "[0, 9]"),
        )
        for section, recipe in vars(Config()).items()
        for field in dataclasses.fields(recipe)
    )
)


@settings(max_examples=60)
@given(st.lists(CHANGES, min_size=10, max_size=30))
def test_any_recipe_comes_back_from_json(changes):
    config = Config()
    for (section, name), value in changes:
        with contextlib.suppress(InputError):  # it does not go with the others, or is a text of no meaning
            one = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: one})
    assume(config != Config())
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config and differences(config, again) == []


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 3))
def test_every_epoch_holds_every_example_once_for_any_hosts(size, share, hosts, seed, epoch):
    source = ArraySource(np.zeros((size, 1, 1, 3), np.uint8), np.arange(size))
    plain = AugmentConfig(crop="none", flip="none", interpolation="bilinear")
    rows = [TrainExample(source, plain, 1, seed, share, rank, hosts) for rank in range(hosts)]
    positions = np.arange(epoch * size, (epoch + 1) * size)
    step, offset = np.divmod(positions, share * hosts)
    ranks, places = offset // share, step * share + offset % share
    drawn = [int(rows[r](int(place))["label"]) for r, place in zip(ranks, places, strict=True)]
    assert sorted(drawn) == list(range(size))


@settings(max_examples=25)
@given(
    st.sampled_from([1, 2, 17, 40]),  # each compiles anew
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(0, 2**31),
    st.sampled_from([3, 7]),
)
def test_masked_parts_add_up_to_the_whole(count, cuts, seed, classes):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(count, classes)).astype(np.float32), rng.integers(0, classes, count)
    losses = np.asarray(cross_entropy(logits, {"label": labels}))
    whole = means(add([eval_sums(losses, logits, labels, np.ones(count, bool))]))
    parts, edges = [], sorted({0, count, *(cut for cut in cuts if cut < count)})
    for start, stop in itertools.pairwise(edges):
        padding = 48 - (stop - start)
        filled = [np.concatenate([x[start:stop], np.full((padding, *x.shape[1:]), junk, x.dtype)])
                  for x, junk in ((losses, np.nan), (logits, 9.0), (labels, 0))]  # fmt: skip
        parts.append(eval_sums(*filled, np.arange(48) < stop - start))
    split = means(add(parts))
    assert split.keys() == whole.keys() and split["count"] == count
    for name, value in whole.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-5, err_msg=name)


NETWORKS = st.fixed_dictionaries(
    {
        "stage_sizes": st.sampled_from([(1, 1, 1, 1), (1, 2, 1, 1)]),
        "block": st.sampled_from(["basic", "bottleneck"]),
        "preact": st.booleans(),
        "cardinality": st.sampled_from([1, 2]),
        "stem": st.sampled_from(["7x7", "deep", "deep_tiered"]),
        "shortcut": st.sampled_from(["B", "D"]),
        "attention": st.sampled_from(["none", "se", "eca"]),
        "norm": st.sampled_from(["batch", "group"]),
        "in_channels": st.sampled_from([1, 3, 5]),
        "num_classes": st.sampled_from([2, 11]),
        "scan": st.booleans(),
    }
)


@settings(max_examples=8)
@given(NETWORKS, st.integers(0, 2**31))
def test_any_network_comes_back_from_pytorch_names(fields, seed):
    model = ResNet(widths=(32, 32, 64, 64), stem_width=64, **fields)
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), variable_shapes(model))
    chex.assert_trees_all_equal(from_torch(model, to_torch(model, variables)), variables)
