"""The lab: its mathematics against plain autodiff, its small trainings, and its page."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax import InputError
from resnet_jax.cli import main
from resnet_jax.lab import curvature, degradation, gradients, landscape, lesion, relatives, response
from resnet_jax.lab.captions import CAPTIONS, TITLES
from resnet_jax.lab.fit import cifar_net, fit, fit_seeds, load, pixels, recipe
from resnet_jax.lab.panels import COLOURS, draw_panels, panel_svg, short, translated, with_spread
from resnet_jax.lab.record import Notebook, Options
from resnet_jax.lab.run import EXPERIMENTS, module_of, write_page
from resnet_jax.models.blocks import PreactBlock, ResidualBlock
from resnet_jax.models.registry import count_parameters
from resnet_jax.training.state import create_state
from tests.browser import needed_width, needs_chromium, screenshot, tags


@pytest.fixture(scope="module")
def digits():
    return load("digits", train=96, test=64)


@pytest.mark.parametrize(("kind", "norm"), [("plain", "none"), ("residual", "batch"), ("preact", "batch")])
def test_gradients_along_a_network_are_those_of_autodiff(digits, kind, norm):
    """Against `jax.grad` of zeros that are added to what each block puts out."""
    model = cifar_net(kind, 14, digits, norm=norm, zero_init_last=False)
    images, labels = pixels(digits, 8, recipe(digits, 1.0))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    names = [f"stage{s}/block{b}" for s in (1, 2, 3) for b in (1, 2)]

    def loss(deltas):
        def tap(call, args, kwargs, context):
            out, name = call(*args, **kwargs), "/".join(context.module.path)
            whole = isinstance(context.module, ResidualBlock | PreactBlock) and context.method_name == "__call__"
            return out + deltas[name] if whole else out

        with nn.intercept_methods(tap):
            logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    shapes = [(8, 8 // 2**s, 8 // 2**s, 16 * 2**s) for s in (0, 0, 1, 1, 2, 2)]
    expected = jax.jit(jax.grad(loss))({name: jnp.zeros(shape) for name, shape in zip(names, shapes, strict=True)})
    found = jax.jit(lambda v: gradients.gradients_along(model, v, images, labels))(variables)
    np.testing.assert_allclose(found, [jnp.linalg.norm(expected[name]) for name in names], rtol=1e-3)


def test_gradients_vanish_and_explode_without_shortcuts_and_norms_and_not_with_them(digits):
    """Depth 56: first over last below 1e-3 and above 1e3 in the plain net; between 0.1 and 10 in the residual one as it
    starts by default."""
    images, labels = pixels(digits, 32, recipe(digits, 1.0))

    def ratios(kind, norm):
        model = cifar_net(kind, 56, digits, norm=norm)
        variables = jax.jit(model.init)(jax.random.key(0), images[:1])
        along = jax.jit(lambda v: gradients.gradients_along(model, v, images, labels))
        norms = {name: along(gradients.with_variance(variables, factor)) for name, factor in gradients.INITS.items()}
        return {name: float(values[0] / values[-1]) for name, values in norms.items()}

    plain = ratios("plain", "none")
    assert plain["LeCun"] < 1e-3 and plain["twice He"] > 1e3
    assert all(0.1 < value < 10 for value in ratios("residual", "batch").values())


def test_the_jacobian_of_a_block_is_that_of_its_branch_and_the_identity():
    assert gradients.identity()[0]["difference"] < 1e-5


def test_a_small_training_learns_and_tells(digits):
    config = recipe(digits, 36.0)
    state, curve = fit(cifar_net("residual", 8, digits), digits, config, points=3)
    assert [row["step"] for row in curve] == [0, 12, 24, 36] and int(state.step) == 36
    assert curve[-1]["train_loss"] < 0.9 * curve[0]["train_loss"] and 0 < curve[-1]["test_error"] < 1


def test_seeds_that_share_a_program_are_their_trainings_alone(digits):
    model, config = cifar_net("residual", 8, digits), recipe(digits, 2.0)
    together = fit_seeds(model, digits, config, (0, 5), points=2)
    for seed, (state, curve) in zip((0, 5), together, strict=True):
        alone, expected = fit(model, digits, recipe(digits, 2.0, seed), points=2)
        jax.tree.map(np.testing.assert_array_equal, state.params, alone.params)
        assert curve == expected
    assert together[0][1] != together[1][1]


def test_a_removed_block_hands_on_what_it_was_given(digits):
    model = cifar_net("residual", 14, digits)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    accuracy = lesion.gated_accuracy(model, digits, [(1, 1), (1, 2)])
    gone = jax.tree.map(lambda x: x, variables)
    for block in ("block1", "block2"):  # branches of zeros do the same behind a ReLU
        gone["params"]["stage1"][block]["norm2"] = jax.tree.map(
            jnp.zeros_like, gone["params"]["stage1"][block]["norm2"]
        )
    assert accuracy(variables, [0.0, 0.0]) == accuracy(gone, [1.0, 1.0])
    twice = lesion.swapped(lesion.swapped(variables, 2, 0, np.random.default_rng(0)), 2, 0, np.random.default_rng(0))
    assert accuracy(twice, [1.0, 1.0]) == accuracy(variables, [1.0, 1.0])


def test_swapped_blocks_change_places_within_their_stage(digits):
    model = cifar_net("residual", 20, digits)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    moved = lesion.swapped(variables, 3, 1, np.random.default_rng(0))
    same = [
        (stage, block)
        for stage in ("stage1", "stage2", "stage3")
        for block in ("block1", "block2", "block3")
        if moved["params"][stage][block] is variables["params"][stage][block]
    ]
    assert len(same) == 7 and all((stage, "block1") in same for stage in ("stage1", "stage2", "stage3"))


def test_responses_are_those_of_the_branches(digits):
    """A branch whose last norm has scale 0 and bias 2 puts out 2 everywhere."""
    model = cifar_net("residual", 8, digits)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    variables["params"]["stage2"]["block1"]["norm2"] = {"scale": jnp.zeros(32), "bias": jnp.full(32, 2.0)}
    rows = response.responses(model, variables, pixels(digits, 16, recipe(digits, 1.0))[0])
    assert [row["block"] for row in rows] == [1, 2, 3]
    assert rows[1]["mean"] == pytest.approx(2.0) and rows[1]["deviation"] == pytest.approx(0.0, abs=1e-6)


def test_directions_have_the_norms_of_the_filters(digits):
    model = cifar_net("plain", 8, digits)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    direction = landscape.filter_normalised(jax.random.key(1), params)
    own, drawn = (tree["stage1"]["block1"]["conv1"]["kernel"] for tree in (params, direction))
    np.testing.assert_allclose(
        jnp.linalg.norm(own.reshape(-1, 16), axis=0), jnp.linalg.norm(drawn.reshape(-1, 16), axis=0), rtol=1e-4
    )
    assert not jnp.any(direction["stem"]["norm"]["scale"]) and not jnp.allclose(own, drawn)
    config = recipe(digits, 1.0)
    state, _ = fit(model, digits, config, points=1)
    batch = pixels(digits, 32, config)
    losses = landscape.plane(model, state.variables, [direction, direction], batch, 10)(np.asarray([0.0, 0.5]), 0.0)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, _ = apply(state.variables, batch[0])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    assert float(losses[0]) == pytest.approx(float(expected), rel=1e-4)
    assert losses[1] != losses[0]


def test_the_curvature_is_measured_along_gradient_descent_of_the_same_loss(digits, monkeypatch):
    """A step goes down the gradient of the measured loss; the measures are those of the explicit functions."""
    for name, value in (("IMAGES", 12), ("ITERATIONS", 4), ("SAMPLES", 2)):
        monkeypatch.setattr(curvature, name, value)
    model, batch, step, measured = curvature.network_and_programs("residual", "batch", 8, digits)
    rows = curvature.descent(model, batch, step, measured, 0.05, seed=0, steps=2, points=2)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["loss"] < rows[1]["loss"] < rows[0]["loss"]
    state = create_state(model, curvature.descent_with(0.05), jax.random.key(0), (8, 8, 3))

    @jax.jit
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        return 0.5 * ((logits - jnp.eye(10)[batch["label"]]) ** 2).sum() / 12

    assert rows[0]["loss"] == pytest.approx(float(loss(state.params)), rel=1e-5)
    after = jax.tree.map(lambda p, g: p - 0.05 * g, state.params, jax.jit(jax.grad(loss))(state.params))
    assert rows[1]["loss"] == pytest.approx(float(loss(after)), rel=1e-5)
    assert rows[0]["eigenvalue1"] >= rows[0]["eigenvalue2"] >= rows[0]["eigenvalue3"] > rows[0]["smallest"]


def test_the_edge_is_told_from_where_the_sharpness_reaches_it():
    def training(kind, rate, sharpness):
        about = {"kind": kind, "norm": "none", "learning_rate": rate}
        return [about | {"step": i, "eigenvalue1": value} for i, value in enumerate(sharpness)]

    rows = training("plain", 0.5, [1.0, 3.8, 4.4, 4.0]) + training("residual", 0.5, [1.0, 2.0])
    reached, count, ratios = curvature.at_the_edge(rows, "none")
    assert (reached, count) == (1, 2) and ratios == pytest.approx([0.95, 1.1, 1.0])
    assert "in 1 of 2 trainings" in curvature.edge_of(rows, "none")[0]
    assert "in none of 2 trainings" in curvature.edge_of(rows[:1] + rows[4:], "none")[0]
    assert "at most it is 0.50 of it" in curvature.edge_of(rows[:1] + rows[4:], "none")[0]


def test_relatives_are_of_about_equal_size(digits):
    from resnet_jax.lab.fit import network

    sizes = {
        name: count_parameters(network(model, digits, **fields))
        for name, (model, fields, _) in relatives.RELATIVES.items()
    }
    assert max(sizes.values()) < 1.6 * min(sizes.values()), sizes


def test_a_depth_that_does_not_exist_is_refused(digits):
    with pytest.raises(InputError, match="depths are 6n \\+ 2"):
        cifar_net("plain", 21, digits)


def test_finished_parts_are_kept(tmp_path):
    made = []
    for _ in range(2):
        book = Notebook(tmp_path, "one", Options())
        assert book.part("a", lambda: made.append(1) or [{"x": len(made)}]) == [{"x": 1}]
    for name, options in (("one", dataclasses.replace(Options(), quick=True)), ("two", Options())):
        assert Notebook(tmp_path, name, options).part("a", lambda: [{"x": 9}]) == [{"x": 9}]


def test_an_experiment_leaves_its_record_and_figures(tmp_path, digits, monkeypatch):
    name = "response"
    monkeypatch.setattr(response, "load", {"digits": digits}.get)
    command = ["lab", name, "--out", str(tmp_path), "--quick", "--depths", "8", "--seeds", "0"]
    assert main(command) == 0
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["rows"] and record["options"] == {"dataset": "digits", "depths": [8], "seeds": [0], "quick": True}
    assert {path.suffix for path in tmp_path.glob(f"{name}.*")} == {".json", ".csv", ".png", ".svg"}
    page = (tmp_path / "index.html").read_text()
    assert all(text in page for text in CAPTIONS[name][1:]) and 'lang="ja"' in page and "http" not in page


def test_every_experiment_has_its_words_and_an_unknown_one_is_named(tmp_path, capsys):
    assert set(CAPTIONS) == set(EXPERIMENTS)
    assert main(["lab", "lesions", "--out", str(tmp_path)]) == 2
    assert "did you mean lesion" in capsys.readouterr().err


def test_a_part_is_named_before_it_is_made(tmp_path, capsys):
    book = Notebook(tmp_path, "one", Options())
    book.part("plain 20", lambda: [{"told": capsys.readouterr().out}])
    assert book.part("plain 20", lambda: []) == [{"told": "  plain 20 ...\n"}]
    assert capsys.readouterr().out == "  plain 20: 0 s\n"


def test_what_depth_does_to_residual_networks_is_said_in_figures():
    errors = {("plain", 20): (0.02, 0.03), ("residual", 20): (0.008, 0.025)}
    errors |= {("plain", 56): (0.5, 0.6), ("residual", 56): (0.01, 0.028)}
    rows = [
        {"kind": kind, "depth": depth, "seed": 0, "train_error": train, "test_error": test}
        for (kind, depth), (train, test) in errors.items()
    ]
    assert degradation.takeaway(rows)[0] == (
        "With 56 layers the plain network errs on 50.0 % of its own training images, the residual one on 1.0 %; with "
        "20 layers it is 2.0 % and 0.8 %. On test images the residual one errs on 2.5 % with 20 layers, on 2.8 % with "
        "56 (one seed)."
    )
    assert "no harm" not in CAPTIONS["degradation"][0]


SAME_IN_BOTH = {"plain", "LeCun", "GoogLeNet", "DenseNet-BC"}
RECORDS = Path(__file__).parents[1] / "docs" / "lab"


@pytest.fixture(scope="module", params=EXPERIMENTS)
def recorded(request):
    """The module of an experiment and the rows of its committed record."""
    return module_of(request.param), json.loads((RECORDS / f"{request.param}.json").read_text())["rows"]


def test_every_panel_names_its_axes_and_no_legend_covers_anything(recorded):
    """As drawn into one figure, where legends lie outside the axes."""
    module, rows = recorded
    figure = draw_panels(module.panels(rows))
    drawn = figure.canvas.get_renderer()
    assert len(figure.subfigs) >= len(module.panels(rows)) >= 2
    for place, panel in zip(figure.subfigs, module.panels(rows), strict=False):
        first, *bars = place.axes
        assert first.get_xlabel() and first.get_ylabel() and all(bar.get_ylabel() for bar in bars)
        assert place.get_suptitle().translate({10: " ", 160: " "}) == panel.finding[0] and first.get_legend() is None
        inside = [axes.get_tightbbox(drawn) for axes in place.axes]
        assert not any(legend.get_window_extent().overlaps(box) for legend in place.legends for box in inside)
        inside += [legend.get_window_extent() for legend in place.legends]
        assert all(place.bbox.containsx(x) for box in inside for x in (box.x0, box.x1))


def test_panels_of_the_page_are_in_both_languages_and_in_its_colours(recorded):
    module, rows = recorded
    for text in (module.takeaway(rows), *(panel.finding for panel in module.panels(rows))):
        assert len(text) == 2 and text[0] != text[1] and "nan" not in "".join(text)
    svg = "".join(panel_svg(panel) for panel in module.panels(rows))
    words = set(re.findall(r"<text[^>]*>([^<]+)</text>", svg))
    assert not any(re.search(r"[a-z]{3}", word) for word in words - SAME_IN_BOTH), words
    assert 'lang="ja"' in svg and "var(--c0)" in svg and not any(colour in svg for colour in COLOURS)


def test_one_seed_has_no_deviation():
    assert with_spread([0.5]) == "0.5" and with_spread([1.0, 3.0]) == "2.0 ± 1.0"
    rows = [{"name": "a", "seed": 0, "parameters": 1, "macs": 1e6, "layers": 3, "kept": 2.0, "images_per_second": 1.0,
             "train_error": 0.5, "test_error": 0.25}]  # fmt: skip
    assert relatives.table(rows)[0]["test error, %"] == "25.0"
    assert "±" in relatives.table([*rows, rows[0] | {"seed": 1}])[0]["test error, %"]


def test_the_blocks_that_cannot_be_removed_are_those_of_which_no_record_tells():
    rows = json.loads((RECORDS / "lesion.json").read_text())["rows"]
    removed = {row["block"] for row in rows if row["lesion"] == "remove"}
    assert set(range(1, 10)) - removed == set(lesion.cannot_be_removed(20)) == {4, 7}
    assert "cannot be removed" in panel_svg(lesion.panels(rows)[0])


def test_what_batch_norm_does_is_told_with_the_numbers_of_the_record():
    rows = json.loads((RECORDS / "gradients.json").read_text())["rows"]
    found = gradients.takeaway(rows)[0]
    assert "the dependence on the initial scale, not that on the depth" in found
    assert f"{gradients.ratio_of(rows, 'plain', 'batch', False, 'He', 56):,.0f} times" in found


def test_numbers_are_short():
    found = [short(x) for x in (3440.2, 14.5, 0.339, 3.7e-13, 0.002, 1.8e6, 1e10, 0.0, np.nan, 1.0)]
    assert found == ["3,440", "14.5", "0.339", "3.7e-13", "2e-3", "1.8e6", "1e10", "0", "–", "1"]


def test_words_are_translated_with_and_without_a_number():
    assert translated("layers") == "層" and translated("1,004 layers") == "1,004 層" and translated("x 1") == "x 1"


def test_figures_and_page_are_drawn_anew_from_records_alone(tmp_path, capsys):
    assert main(["lab", "page", "--out", str(tmp_path)]) == 2
    assert "holds no records to draw" in capsys.readouterr().err
    shutil.copy(RECORDS / "response.json", tmp_path)
    assert main(["lab", "page", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"response.json", "response.png", "response.svg", "index.html"}
    record = json.loads((tmp_path / "response.json").read_text())
    for damage in ({"rows": [{}]}, {"rows": []}, {"options": {}}):
        (tmp_path / "response.json").write_text(json.dumps(record | damage))
        capsys.readouterr()
        with pytest.raises(InputError, match=r"response\.json is damaged .* resnet-jax lab response"):
            write_page(tmp_path)


@needs_chromium
def test_a_browser_shows_the_page_of_the_committed_records(tmp_path):
    """Charts, paragraphs in two languages and tables, in a real Chromium without a word on its console."""
    (tmp_path / "lab").mkdir()
    for record in RECORDS.glob("*.json"):
        shutil.copy(record, tmp_path / "lab")
    page = tags(write_page(tmp_path / "lab"), tmp_path)
    n = len(EXPERIMENTS)
    assert page.count["section"] == page.count["li"] == n and page.count["p"] == 2 + 2 * n and "img" not in page.count
    assert page.count["svg"] == page.count["figure"] > 2 * n and page.count["input"] == 2
    assert page.rows["relatives-table"] == 1 + len(relatives.RELATIVES)
    assert page.rows["gradients-table"] > 10 and page.rows["degradation-table"] > 4
    pixels = screenshot(tmp_path / "lab" / "index.html", tmp_path, 390, 1600)
    assert pixels.shape == (1600, 390, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert needed_width(tmp_path / "lab" / "index.html", tmp_path, 390) <= 390
    text = (tmp_path / "lab" / "index.html").read_text()
    assert all(f'href="#{name}"' in text and TITLES[name][1] in text for name in EXPERIMENTS)
