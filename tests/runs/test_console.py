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
