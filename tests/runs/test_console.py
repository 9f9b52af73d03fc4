from resnet_jax.runs import console as console_module
from resnet_jax.runs.console import Console


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
    assert first.startswith("step 10/20  epoch 1.0  loss 0.5000")
    assert last.startswith("step 20/20  epoch 2.0  loss 0.1250  validation accuracy 75.00%")


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
        "step 100/300  epoch 2.0  loss 0.5000  10 images/s",
        "step 200/300  epoch 4.0  loss 0.2500  validation accuracy 25.00% (step 198)",
        "step 210/300  epoch 4.2  validation loss 3.0000 (moving average)",
        "step 220/300  epoch 4.4  loss 0.1250",
    ]
