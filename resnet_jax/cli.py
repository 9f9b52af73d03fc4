"""The `resnet-jax` command, and what it does with recipes and runs: train, plan, show-batch, evaluate, report, runs."""

import argparse
import atexit
import gc
import io
import multiprocessing
import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from resnet_jax.cli_weights import CHECKPOINT_HELP, export_command, file_to_write, models_command, predict_command
from resnet_jax.config import Config, InputError, local_path, path_of
from resnet_jax.files import to_json
from resnet_jax.output import say
from resnet_jax.recipes import starting_recipe

USAGE = """usage: resnet-jax COMMAND ...

  train     [--config FILE] [--workdir DIR] [--SECTION.FIELD VALUE ...]   train as a recipe says
  plan      [--devices N] [--memory 80GiB] [--json] [flags of train]      what a run will need, before it starts
  evaluate  WORKDIR [--split validation|test] [--checkpoint best|latest|STEP]   measure a run's checkpoint
  report    WORKDIR [--checkpoint best|latest|STEP]                       a page on what a run came to
  runs      [DIR] [--json]                                                the runs under a folder and their state
  show-batch FILE [flags of train]                                        a picture of what the network sees
  predict   SOURCE PATH... [--top K] [--format table|json|csv] [--cam DIR] classes of pictures
  export    SOURCE FILE [--format safetensors|pth|stablehlo|onnx|orbax]   weights for others, a program for serving
  models    [PATTERN] [--json]                                            list the models and their weights
  lab       NAME|all [--quick] [--dataset ..] [--depths ..] [--seeds ..]  see why residual learning works

resnet-jax COMMAND --help tells more."""


MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
"""glibc's settings in our processes: large pages of memory, and the main thread keeps what it frees."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script: `main` in a process that has large pages of memory, and keeps them.

    glibc reads `MEMORY` only when a process starts, so the process replaces itself once. What it is worth to a training
    step on a CPU is a row of its own in `benchmarks/train_step.py`. Garbage is looked for less often than Python's
    default: what imports and traces make lives on, and looking through it took a tenth of the way to the first step
    where we tried (n = 5).
    """
    for number in (0, 1, 2):  # else a file of ours would get the number of a closed output, and what is printed to it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MEMORY
        os.execv(sys.executable, sys.orig_argv)
    gc.set_threshold(50_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names that are not UTF-8 come out as the bytes that they are
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    status = main(arguments)
    for output in (sys.stdout, sys.stderr):
        try:
            output.flush()
        except (OSError, ValueError):  # it takes nothing, and Python would end with a status of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status: 0, 1 (the run ended before its end, such as by diverging), 2
    (wrong input), 3 (the disk did not take the end of a run), 130 (Ctrl-C).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if any("\0" in word for word in arguments):
        return fail("a word of the command line holds a NUL character")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        return fail(f"there is no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    settle_matplotlib()
    try:
        status = command(arguments[1:])
        sys.stdout.flush()
        return status
    except InputError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted; resnet-jax train --workdir FOLDER goes on from the last checkpoint", status=130)
    except BrokenPipeError:
        if not nobody_reads():
            raise  # another pipe is broken
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        return fail(f"{NO_MEMORY} ({first_line(error)})", status=1)
    except (RuntimeError, AssertionError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return fail(f"{NO_MEMORY} ({first_line(error)})", status=1)
        if problem := no_device():
            return fail(problem)
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "gcsfs":  # such as its HttpError, where there is no right
            return fail(f"the bucket cannot be used: {first_line(error)}")
        raise


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has seen enough, such as `head`."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


NO_MEMORY = (
    "out of memory: take a smaller --train.batch_size, --train.accumulate_steps 2 or more, --model.remat block, "
    "smaller images, or --data.no_on_device; to predict, a smaller --batch"
)


def settle_matplotlib() -> None:
    """Gives matplotlib a temporary folder where there is no home to write: it cannot be imported without one."""
    if "MPLCONFIGDIR" in os.environ or "XDG_CONFIG_HOME" in os.environ:
        return
    try:
        found = os.access(Path.home(), os.W_OK)
    except RuntimeError:
        found = False
    if not found:
        os.environ["MPLCONFIGDIR"] = folder = tempfile.mkdtemp(prefix="matplotlib-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def first_line(error: BaseException) -> str:
    """Of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def no_device() -> str | None:
    """What is wrong where JAX finds no device to compute on; None where it does."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second, without words, where JAX has no plugin for a GPU
        reason = (
            first_line(error).partition(" (set JAX_PLATFORMS=")[0] if str(error) else "no plugin for it is installed"
        )
        wanted = os.environ.get("JAX_PLATFORMS")
        where = f"JAX_PLATFORMS={wanted}: JAX finds no such device" if wanted else "JAX finds no device"
        return f"{where} here ({reason}); set JAX_PLATFORMS=cpu to compute on the CPU"
    return None


def fail(message: str, status: int = 2) -> int:
    """Prints an error and returns the status to end with."""
    say(f"error: {message}", error=True)
    return status


def parse_recipe(arguments: Sequence[str]) -> tuple[Config, str | None]:
    """The recipe and the workdir of a command line: `starting_recipe` first, then the other flags over it.

    A length in epochs that a flag gives takes the place of one in steps that the recipe gives.

    Raises:
      InputError: the recipe is not as it must be. A wrong flag ends the program with status 2.
    """
    import tyro

    ours = argparse.ArgumentParser(prog="resnet-jax train", add_help=False, allow_abbrev=False)
    ours.add_argument("--config")
    ours.add_argument("--workdir")
    known, flags = ours.parse_known_args(list(arguments))
    if known.workdir is not None:
        known.workdir = str(path_of(known.workdir, "--workdir"))
    default = starting_recipe(known.config, known.workdir)
    named = {word.partition("=")[0] for word in flags}
    if "--train.epochs" in named and "--train.steps" not in named:
        default = replace(default, train=replace(default.train, steps=None))
    description = (
        "Trains as a recipe says. --config FILE loads a recipe (configs/ has some), --workdir DIR names the run's "
        "folder and resumes what it holds, by its own recipe where no FILE is given; the flags below change single "
        "fields."
    )
    flags_of_recipe = tyro.cli(
        Recipe,
        default=unchecked(default),
        args=spelt_out(flags),
        prog="resnet-jax train",
        description=description,
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return checked(flags_of_recipe), known.workdir


def without_checks(section: type) -> type:
    """Returns a section of the recipe whose values are not checked. tyro builds these, since it prints an error of a
    check in words of its own.
    """
    return type(section.__name__, (section,), {"__doc__": section.__doc__, "__post_init__": lambda self: None})


Recipe = make_dataclass(
    "Recipe", [(name, without_checks(kind)) for name, kind in get_type_hints(Config).items()], frozen=True
)


def unchecked(config: Config) -> Any:
    """Returns a recipe as one whose values are not checked."""
    return Recipe(**{f.name: f.type(**vars(getattr(config, f.name))) for f in fields(Recipe)})  # type: ignore[operator]


def checked(recipe: Any) -> Config:
    """Returns the recipe that flags have given.

    Raises:
      InputError: it is impossible.
    """
    kinds = get_type_hints(Config)
    return Config(**{name: kinds[name](**vars(section)) for name, section in vars(recipe).items()})


def spelt_out(flags: Sequence[str]) -> list[str]:
    """Turns `--section.field True` into `--section.field`, `... False` into `--section.no_field`, and `--finetune MODE`
    into `--finetune.mode MODE`.
    """
    result: list[str] = []
    for word in flags:
        if word == "--finetune":
            result.append("--finetune.mode")
        elif word in ("True", "False") and result and result[-1].startswith("--"):
            if word == "False":
                section, _, name = result.pop().rpartition(".")
                result.append(f"{section}.no_{name}")
        else:
            result.append(word)
    return result


def train_command(arguments: Sequence[str]) -> int:
    """`resnet-jax train`."""
    config, workdir = parse_recipe(arguments)
    prepare_jax()
    from resnet_jax.data.watch import Stalled
    from resnet_jax.runs.progress import Diverged
    from resnet_jax.runs.signals import FolderLost, Stopped
    from resnet_jax.training.loop import NotSaved, train

    try:
        train(config, workdir)
    except (Diverged, FolderLost) as error:
        return fail(str(error), status=1)
    except NotSaved as error:
        return fail(str(error), status=3)
    except Stalled as error:
        fail(str(error))
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)  # the threads that hang would be waited for
    except Stopped as stopped:
        say(str(stopped))
        return 130 if stopped.signal == signal.SIGINT else int(not stopped.saved)
    return 0


MOST_DEVICES = 1024
"""That `plan` imitates on a CPU."""


def plan_command(arguments: Sequence[str]) -> int:
    """`resnet-jax plan`."""
    parser = argparse.ArgumentParser(prog="resnet-jax plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--memory")
    parser.add_argument("--json", action="store_true")
    options, flags = parser.parse_known_args(arguments)
    if not 1 <= options.devices <= MOST_DEVICES:
        raise InputError(f"--devices {options.devices}: give a number from 1 to {MOST_DEVICES}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
    )
    config, _ = parse_recipe(flags)
    prepare_jax()
    from resnet_jax.runs.plan import forecast, parse_memory

    memory = None if options.memory is None else parse_memory(options.memory)
    needs = forecast(config, options.devices)
    if memory is not None:
        needs |= {"memory": memory, "fits": needs["total"] <= memory}
    print(to_json(needs, indent=2) if options.json else format_plan(needs))
    return 0


def format_plan(needs: dict[str, Any]) -> str:
    """The table that `resnet-jax plan` prints."""
    mib = {f"  {name}": count for name, count in needs["state"].items()}
    mib |= {"  batch": needs["batch"], "  activations and the like": needs["temporary"], "together": needs["total"]}
    rows = [
        f"{needs['parameters']:,} parameters, {needs['flops'] / 1e9:,.1f} GFLOP a step on {needs['devices']} devices",
        "MiB on each device, in a step compiled for CPUs; an accelerator's compiler may use less or more:",
        *(f"{name:<28}{count / 2**20:>12,.1f}" for name, count in mib.items()),
        "MiB that each device exchanges in a step:",
        *(f"  {name:<26}{count / 2**20:>12,.1f}" for name, count in needs["collectives"].items()),
    ]
    if "fits" in needs:
        rows.append(f"{'fits into' if needs['fits'] else 'does NOT fit into'} {needs['memory'] / 2**30:,.1f} GiB")
    return "\n".join(rows)


def evaluate_command(arguments: Sequence[str]) -> int:
    """`resnet-jax evaluate`."""
    parser = argparse.ArgumentParser(prog="resnet-jax evaluate", description="Evaluates a run's checkpoint.")
    parser.add_argument("workdir", type=Path, help="the folder of a run")
    parser.add_argument("--split", choices=("validation", "test"), help="by default test, where the data has it")
    parser.add_argument("--checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("--data.dataset", dest="dataset", help="where the run's data lies now")
    parser.add_argument("--data.accept_changes", dest="accept", action="store_true", help="also where it has changed")
    parser.add_argument("--per-class", action="store_true", help="accuracy of each class too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    prepare_jax()
    from resnet_jax.training.evaluation import evaluate_run

    result = evaluate_run(
        options.workdir, options.checkpoint, options.split, options.per_class, options.dataset, options.accept
    )
    print(to_json(result, indent=2) if options.json else format_result(result))
    return 0


def format_result(result: dict[str, Any]) -> str:
    """The table that `resnet-jax evaluate` prints."""
    split = result["split"]
    rows = [f"step {result['step']}, {split} split, {result[split]['count']} images"]
    for kind, label in ((split, "parameters"), (f"ema/{split}", "their moving average")):
        if kind in result:
            values = result[kind]
            top5 = f"   top-5 {values['top5']:.2%}" if "top5" in values else ""
            rows.append(f"{label:<21} loss {values['loss']:.4f}   top-1 {values['accuracy']:.2%}{top5}")
    if result["skipped_images"]:
        rows.append(f"not counted, since they cannot be decoded: {', '.join(result['skipped_images'])}")
    for name, values in result[split].get("classes", {}).items():
        accuracy = "no images" if values["accuracy"] is None else f"{values['accuracy']:7.2%} of {values['count']}"
        rows.append(f"  {name:<24} {accuracy}")
    return "\n".join(rows)


def report_command(arguments: Sequence[str]) -> int:
    """`resnet-jax report`."""
    parser = argparse.ArgumentParser(prog="resnet-jax report", description="Writes report.html into a run's folder.")
    parser.add_argument("workdir", help="the folder of a run")
    parser.add_argument("--checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("--data.dataset", dest="dataset", help="where the run's data lies now")
    options = parser.parse_args(arguments)
    folder = path_of(options.workdir, "WORKDIR")
    prepare_jax()
    from resnet_jax.runs.report_page import make_report

    print(make_report(folder, options.checkpoint, options.dataset))
    return 0


def show_batch_command(arguments: Sequence[str]) -> int:
    """`resnet-jax show-batch`."""
    files = [word for i, word in enumerate(arguments) if word.endswith(".png") and arguments[i - 1] != "--config"]
    if len(files) != 1:
        raise InputError("say which file to write: resnet-jax show-batch out.png [--config FILE] [flags of train]")
    file = file_to_write(files[0])
    config, _ = parse_recipe([word for word in arguments if word != files[0]])
    from resnet_jax.runs.show_batch import show_batch

    print(show_batch(config, file))
    return 0


def runs_command(arguments: Sequence[str]) -> int:
    """`resnet-jax runs`."""
    parser = argparse.ArgumentParser(prog="resnet-jax runs", description="Lists the runs under a folder.")
    parser.add_argument("folder", nargs="?", default="runs")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    folder = path_of(options.folder, "DIR")
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    from resnet_jax.runs.folder import runs_under

    rows = runs_under(folder)
    if options.json:
        print(to_json(rows, indent=2))
    elif not rows:
        print(f"there are no runs under {folder}")
    for row in [] if options.json else rows:
        form = ".4f" if str(row["metric"]).endswith("loss") else ".2%"
        best = "" if row["best"] is None else format(row["best"], form)
        known = f"{row['model'] or '?':<20} {row['data'] or '?':<20} step {row['step'] or 0:<8} best {best:<8}"
        print(f"{row['folder']:<36} {row['state']:<9} {known}")
        if row["problem"]:
            print(f"    {row['problem']}")
    return 0


def lab_command(arguments: Sequence[str]) -> int:
    """`resnet-jax lab`."""
    from resnet_jax.lab.captions import TITLES

    listed = "\n".join(f"  {name:<16}{titles[0]}" for name, titles in TITLES.items())
    parser = argparse.ArgumentParser(
        prog="resnet-jax lab",
        description="Experiments that show why residual learning works; stopped, they go on with the same command.",
        epilog=f"experiments:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="of an experiment, or all")
    parser.add_argument("--out", default="lab", help="folder of figures, records and index.html")
    parser.add_argument("--dataset", default="digits", help="digits, or what data.dataset takes, at 32 x 32 pixels")
    parser.add_argument("--depths", type=numbers, help="of the networks, such as 20,56")
    parser.add_argument("--seeds", type=numbers, help="such as 0,1,2")
    parser.add_argument("--quick", action="store_true", help="the smallest version that still shows the effect")
    options = parser.parse_args(arguments)
    folder = local_path(options.out, "--out")
    prepare_jax()
    from resnet_jax.lab.record import Options
    from resnet_jax.lab.run import EXPERIMENTS, run, write_page

    chosen = Options(options.dataset, options.depths, options.seeds, options.quick)
    for name in EXPERIMENTS if options.name == "all" else (options.name,):
        run(name, folder, chosen)
    print(write_page(folder))
    return 0


def numbers(text: str) -> tuple[int, ...]:
    """`20,56` -> (20, 56)."""
    return tuple(int(word) for word in text.split(","))


def prepare_jax() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told another place, and `run_in_caller`."""
    import jax

    from resnet_jax.training.sharding import run_in_caller

    run_in_caller()
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # the second where there is no home
        print(
            f"WARNING: compiled programs cannot be kept ({error}), so each start compiles anew; "
            "set XDG_CACHE_HOME to a folder that can be written",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a second start compiles nothing


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "plan": plan_command,
    "show-batch": show_batch_command,
    "evaluate": evaluate_command,
    "report": report_command,
    "runs": runs_command,
    "predict": predict_command,
    "export": export_command,
    "models": models_command,
    "lab": lab_command,
}

if __name__ == "__main__":
    run()
