"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: the run ends after the steps that the device was given, with a checkpoint.

SIGUSR1 is what SLURM sends before a job's time is over (`--signal=USR1@90`), SIGHUP what a terminal sends that goes.
Several processes end after the same step.
"""

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax


class Stopped(RuntimeError):
    """The run in `folder` was told to stop by `signal`; `saved` says whether the disk took the step. The message says
    how to go on: `resnet-jax` and `command`, or the same command again where the run has parts of the user's own.
    """

    def __init__(self, folder: Path, step: int, number: int, saved: bool, command: str = "train") -> None:
        self.step, self.signal, self.saved = step, number, saved
        which = "which is saved" if saved else "which could NOT be saved: what counts is the last checkpoint"
        start = "the same command with" if (folder / "parts.json").exists() else f"resnet-jax {command}"
        command = f"{start} --workdir {shlex.quote(str(folder))}"
        how = command if jax.process_count() == 1 else "the same command in all processes"
        what = f"stopped by {signal.Signals(number).name} after step {step}, {which}"
        super().__init__(f"{what}; {how} goes on from there")


class FolderLost(RuntimeError):
    """The folder of a run was deleted, moved or taken by another run.

    `saved` is the folder in which the state of the step was saved after all; None where it could not be.
    """

    def __init__(self, folder: Path, step: int, saved: Path | None) -> None:
        self.step, self.saved = step, saved
        command = f"resnet-jax train --workdir {shlex.quote(str(saved))} goes on from there"
        which = f"is saved in {saved}; {command}" if saved else "could NOT be saved"
        super().__init__(
            f"{folder} is no longer this run's: it was deleted or moved, its lock was removed, or another run has "
            f"taken it. The run ends after step {step}, which {which}"
        )


class Stop:
    """Whether the run is to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked, self._together, self._calls = False, False, 0

    def ask(self) -> None:
        """Has the run end, without a signal from outside; several processes learn of it from the one that asks."""
        if not self._asked and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's own service takes it
        self._asked = True

    def asked(self) -> bool:
        """Returns whether this process knows that the run is to end, several of them having agreed on it."""
        return self._asked or self.signal is not None if jax.process_count() == 1 else self._together

    def due(self) -> bool:
        """Returns whether to end after the call that has just been dispatched; to be asked once for each, by all
        processes.

        Several processes agree on one, by its number: the steps in a call may be many.
        """
        if jax.process_count() > 1 and not self._together:
            from jax.experimental import multihost_utils

            self._calls += 1
            self._together = multihost_utils.reached_preemption_sync_point(self._calls)
            self.signal = (self.signal or signal.SIGTERM) if self._together else self.signal
        return self.asked()


CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Catches `CAUGHT` while it lasts; a second Ctrl-C ends the process at once with status 130.

    A thread of its own learns of them, also while the main one compiles. With several processes JAX's own service
    catches SIGTERM and tells the others; the others are handed on to it. What is ignored stays so, such as SIGHUP under
    nohup. Outside the main thread, where Python allows no handlers, nothing is caught.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    multiprocess = jax.process_count() > 1
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=listen, args=(reading, stop, multiprocess), daemon=True)
    thread.start()
    caught = [
        number
        for number in CAUGHT
        if not (multiprocess and number == signal.SIGTERM)
        and not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
    ]
    handlers = {number: signal.signal(number, lambda *_: None) for number in caught}
    woken = signal.set_wakeup_fd(writing)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)


def listen(pipe: int, stop: Stop, multiprocess: bool) -> None:
    """Takes the numbers of signals from a pipe until a 0 comes."""
    while number := os.read(pipe, 1)[0]:
        if number == signal.SIGINT and stop.signal == signal.SIGINT:
            os._exit(130)
        if number not in CAUGHT:
            continue
        stop.signal = number
        again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: saving after this step{again}\n".encode())
        if multiprocess:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def cleaned_up() -> Iterator[None]:
    """Has SIGTERM and SIGHUP end the process after the `finally` blocks inside, such as that of a file half written.

    What is ignored or caught already stays so. Outside the main thread nothing is caught.
    """
    came: list[int] = []

    def leave(number: int, frame: object) -> None:
        came.append(number)
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()
    caught = [n for n in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(n) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), came[0])
