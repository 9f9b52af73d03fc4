import sys
from types import SimpleNamespace

import jax.numpy as jnp

from resnet_jax.config import Config, LogConfig
from resnet_jax.output import wrapped
from resnet_jax.runs import console as console_module
from resnet_jax.runs.console import Console
from resnet_jax.runs.reporter import Reporter
from resnet_jax.runs.trackers import read_lines
from resnet_jax.training.build import Plan
from resnet_jax.training.run_progress import RunProgress


def test_the_last_step_is_one_line_with_its_own_evaluation(capsys):
    console = Console(0, 20, 10.0)
    for step, numbers in (
        (10, {"train/loss": 0.5}),
        (10, {"validation/accuracy": 0.25}),
        (20, {"train/loss": 0.125}),
        (20, {"validation/accuracy": 0.75}),
    ):
        console.update(step, numbers)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 10/20  epoch 1.0  train loss 0.5000")
    assert last.startswith("step 20/20  epoch 2.0  train loss 0.1250  validation accuracy 75.00%")


def test_a_line_tells_figures_of_its_own_steps_alone(capsys, monkeypatch):
    """An evaluation is told once, with its step where the line is of another one; the loss of other steps never."""
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(0, 300, 50.0)
    console.update(1, {"train/loss": 2.5})
    console.update(100, {"train/loss": 0.5, "images_per_second": 10.0})
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 1e9)
    console.update(198, {"validation/accuracy": 0.25, "validation/loss": 1.0})
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 0.0)
    console.update(200, {"train/loss": 0.25})
    console.update(210, {"ema/validation/loss": 3.0, "validation/loss": 4.0})
    console.update(220, {"train/loss": 0.125})
    lines = [line.partition(" s left")[0].rpartition("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        "step 100/300  epoch 2.0  train loss 0.5000  10 images/s",
        "step 200/300  epoch 4.0  train loss 0.2500  validation accuracy 25.00% (step 198)",
        "step 210/300  epoch 4.2  validation loss 3.0000 (moving average)",
        "step 220/300  epoch 4.4  train loss 0.1250",
    ]


def test_the_time_that_is_left_counts_the_steps_and_the_time_of_this_start_alone(capsys, monkeypatch):
    """A run that resumes evaluates first and then compiles; neither belongs to its steps."""
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 0.0)
    now = [1000.0]
    monkeypatch.setattr(console_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    console = Console(936, 1000, 50.0)
    console.update(936, {"validation/accuracy": 0.25})
    now[0] += 30
    console.update(937, {"train/loss": 1.0})
    now[0] += 2
    console.update(957, {"train/loss": 1.0})
    evaluated, first, second = capsys.readouterr().out.splitlines()
    assert "left" not in evaluated and "left" not in first and second.endswith("  4 s left")


def test_the_first_evaluation_compiles_and_does_not_count_for_the_time_that_is_left(capsys, monkeypatch):
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 0.0)
    now = [1000.0]
    monkeypatch.setattr(console_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    console = Console(0, 31, 10.0)
    console.update(1, {"train/loss": 1.0})
    for step, trained, evaluated in ((11, 10, 500), (21, 10, 2)):
        now[0] += trained
        console.update(step, {"train/loss": 1.0})
        console.pause()
        now[0] += evaluated
        console.update(step, {"validation/accuracy": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("  ")[2] for line in lines[1:]] == ["20 s left", "20 s left", "10 s left", "11 s left"]


def test_the_metric_that_selects_stands_beside_the_accuracy(capsys):
    console = Console(0, 20, 10.0, metric="macro_recall")
    result = {"accuracy": 0.25, "macro_recall": 0.125, "loss": 1.0}
    console.update(
        20, {f"{kind}/{name}": value for kind in ("validation", "ema/validation") for name, value in result.items()}
    )
    assert "  validation accuracy 25.00%, macro recall 12.50% (moving average)" in capsys.readouterr().out
    console = Console(0, 20, 10.0, metric="mine")
    console.update(20, {"validation/loss": 1.0, "validation/mine": 0.5})
    assert "  validation loss 1.0000, mine 0.5000" in capsys.readouterr().out


def test_a_line_says_that_the_device_waited_where_that_is_much(capsys, monkeypatch):
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(0, 30, 10.0)
    for step, waited in ((1, 0.0), (10, 0.01), (20, 0.25)):
        console.update(step, {"images_per_second": 1234.0, "data_wait": waited})
    _, little, much = capsys.readouterr().out.splitlines()
    assert "1,234 images/s  " in little and "waiting" not in little
    assert "1,234 images/s  25% of it waiting for data  " in much


def test_long_lines_break_between_words_on_a_terminal_alone(monkeypatch):
    line = "data: digits: 10 classes; 1,155 train, 282 validation, 360 test"
    assert wrapped(line) == line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    first, *rest = wrapped(line).splitlines()
    assert rest and all(len(part) <= 40 and part.startswith("  ") for part in rest) and len(first) <= 40
    assert " ".join([first, *(part.strip() for part in rest)]) == line


def sums(*losses):
    """Of steps with four images each."""
    return {"loss": jnp.asarray(losses) * 4, "count": jnp.full(len(losses), 4.0)}


def test_the_first_line_follows_the_first_step_and_an_evaluation_has_the_loss_of_its_steps(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 0.0)
    config = Config(log=LogConfig(tensorboard=False))
    progress, state = RunProgress({}, [], False), SimpleNamespace(params={"w": jnp.zeros(2)}, batch_stats={}, step=8)
    with Reporter(tmp_path, config, Plan(20, 10.0, 8, 8, 5), None, 0, progress, lambda: None) as reporter:
        assert capsys.readouterr().out == ""
        reporter.steps(1, 1, sums(3.0), 0.0)
        assert capsys.readouterr().out == "step 1/20  epoch 0.1  train loss 3.0000\n"
        reporter.steps(5, 4, sums(1.0, 1.0, 1.0, 2.0), 0.0)
        reporter.flush()
        reporter.steps(8, 3, sums(0.5, 0.5, 2.0), 0.0)
        reporter.settle(state)
        reporter.evaluation(8, {"validation": {"loss": 4.0, "accuracy": 0.5}})
    of_five, of_eight = capsys.readouterr().out.splitlines()
    assert of_five.startswith("step 5/20  epoch 0.5  train loss 1.6000  ")
    assert of_eight.startswith("step 8/20  epoch 0.8  train loss 1.0000  validation accuracy 50.00%  ")
    written = {line["step"]: line for line in read_lines(tmp_path / "metrics.jsonl")}
    assert sorted(written) == [5, 8] and abs(written[5]["train/loss"] - 1.6) < 1e-6 and "train/loss" not in written[8]


def test_a_start_without_a_step_leaves_no_metrics(tmp_path):
    plan, progress = Plan(20, 10.0, 8, 8, 5), RunProgress({}, [], False)
    with Reporter(tmp_path, Config(log=LogConfig(tensorboard=False)), plan, None, 0, progress, lambda: None):
        assert (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "metrics.jsonl").exists()
