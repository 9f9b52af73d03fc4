"""`python -m benchmarks`: runs what fits the hardware and draws one chart of all results beside it."""

import json
import subprocess
import sys

from benchmarks.measure import RESULTS, hardware, options

SCRIPTS = ("train_step", "inference", "startup", "overhead", "weights")


def draw(short: str) -> None:
    """Draws a bar for each opponent in each case on that hardware: how many times as fast ours is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    bars = []
    for file in sorted(RESULTS.glob(f"*-{short}.json")):
        for r in json.loads(file.read_text())["rows"]:
            if "ours_over_this" in r and r["contender"] != "resnet_jax":
                bars.append((f"{r['case']} / {r['contender']}", r["ours_over_this"]))
    figure = Figure(figsize=(9, 0.8 + 0.26 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names, ratios = zip(*reversed(bars), strict=True)
    axes.barh(
        names,
        [ratio - 1 for ratio in ratios],
        left=1,
        color=["#0b62a4" if ratio >= 1 else "#d1495b" for ratio in ratios],
    )
    axes.axvline(1, color="black", linewidth=1)
    for i, ratio in enumerate(ratios):
        axes.text(max(ratio, 1.0), i, f" {ratio:.2f}", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(ratios), 1.3 * max(ratios))
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.margins(y=0.01)
    figure.suptitle(f"times as fast as the opponent, on {short}; right of the line ours is faster", x=0.01, ha="left")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path = RESULTS / f"ratios-{short}.png"
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


def main() -> None:
    """Runs the scripts that need no data, then draws."""
    flags = options(__doc__ or "")
    for script in SCRIPTS:
        command = [sys.executable, "-m", f"benchmarks.{script}", *(["--quick"] if flags.quick else [])]
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, check=True)
    draw(hardware()["short"])


if __name__ == "__main__":
    main()
