"""The lock that keeps a second run out of a run's folder.

It is the file `lock` in the folder, which says who holds it. Where the disk supports `flock`, the system keeps it and
lets go of it when its process ends, however that ends. Other hosts may not see that, and some disks have no `flock`, so
the holder also touches the file every `TOUCHED_EVERY` seconds, and whoever waits watches whether it changes. Clocks of
different hosts are never compared.

In a bucket the lock is an object that the holder writes anew every `TOUCHED_EVERY` seconds with a greater `beat`.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from resnet_jax.config import InputError
from resnet_jax.files import in_bucket, modified, parse_json, read_file, to_json, write_whole
from resnet_jax.output import say

TOUCHED_EVERY, STALE_AFTER = 20.0, 120.0
"""Seconds: how often a run touches its lock, and how long ago that was when one of another host may be left behind."""

WATCHED_FOR = 2.5 * TOUCHED_EVERY
"""Seconds for which such a lock is watched before it counts as left behind."""

SETTLED_AFTER = 2.0
"""Seconds after which of several runs that start at once in a bucket each has seen the others."""

CHECKED_EVERY = 1.0
"""Seconds at least between two checks that the lock is still there."""

NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
"""How disks say that they do not support `flock`."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
      host: its name.
      pid: number of the process, within its container.
      start: what tells it from a later process of the same number; None where the system does not say.
      kernel: the running system and the container, whose process numbers these are; None where unknown.
      token: drawn anew for each lock.
      beat: how often the holder has written it, in a bucket.
    """

    host: str
    pid: int
    start: str | None = None
    kernel: str | None = None
    token: str | None = None
    beat: int = 0


class Lock:
    """A lock that is held.

    Attributes:
      path: of its file.
      holder: what the file says.
    """

    def __init__(self, path: Path, holder: Holder, descriptor: int) -> None:
        self.path, self.holder = path, holder
        self._descriptor, self._checked, self._lost = descriptor, 0.0, False

    def lost(self, now: bool = False) -> bool:
        """Returns whether the lock was removed or another run has taken it; once it is lost, it stays so.

        Args:
          now: check even where the last check was less than `CHECKED_EVERY` seconds ago.
        """
        if not self._lost and (now or time.monotonic() - self._checked >= CHECKED_EVERY):
            self._checked = time.monotonic()
            self._lost = not self.lies_in(self.path.parent)
        return self._lost

    def lies_in(self, folder: Path) -> bool:
        """Returns whether the file in a folder is this lock. A disk that does not answer leaves it as it was."""
        try:
            found, ours = os.stat(folder / self.path.name, follow_symlinks=False), os.fstat(self._descriptor)
            if read := read_holder(folder / self.path.name):
                return read.token == self.holder.token
            return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def moved_to(self) -> Path | None:
        """Returns the folder that now holds this lock, if its run's folder was renamed and the system says where to."""
        with contextlib.suppress(OSError):
            folder = Path(os.readlink(f"/proc/self/fd/{self._descriptor}")).parent
            if self.lies_in(folder):
                return folder
        return None

    def touch(self) -> None:
        """Shows other hosts that the run goes on."""
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)

    def release(self) -> None:
        """Removes the file, unless it is no longer this lock's."""
        folder = self.path.parent if self.lies_in(self.path.parent) else self.moved_to()
        with contextlib.suppress(OSError):
            if folder is not None and self.lies_in(folder):
                (folder / self.path.name).unlink()
        os.close(self._descriptor)


class BucketLock:
    """A lock that is held in a bucket, with the methods of `Lock`."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder
        self._lost = False

    def lost(self, now: bool = False) -> bool:
        """Returns whether another run has taken the lock, or it was removed; a bucket that does not answer leaves it as
        it was.

        Args:
          now: look, in place of what the last touch found.
        """
        if now and not self._lost:
            with contextlib.suppress(OSError):
                found = read_holder_or_fail(self.path)
                self._lost = found is None or found.token != self.holder.token
        return self._lost

    def moved_to(self) -> None:
        """Returns None: nothing is moved in a bucket."""

    def touch(self) -> None:
        """Shows others that the run goes on."""
        if not self.lost(now=True):
            self.holder = replace(self.holder, beat=self.holder.beat + 1)
            with contextlib.suppress(OSError):
                write_whole(self.path, to_json(asdict(self.holder)))

    def release(self) -> None:
        """Removes the object, unless it is no longer this lock's."""
        if not self.lost(now=True):
            with contextlib.suppress(Exception):
                self.path.unlink()


def acquire_in_bucket(path: Path) -> BucketLock:
    """Takes a lock in a bucket, from a run that left it behind if need be.

    Of several that start at the same time the last one to write has it: each looks again after a while.

    Raises:
      InputError: another run holds it.
      OSError: the bucket cannot be written.
    """
    before = read_holder_or_fail(path)
    if before is not None:
        alive = alive_here(before)
        if alive is None:
            who = f"process {before.pid} on {before.host}"
            say(f"{path} is that of {who}; watching for {WATCHED_FOR:.0f} s whether it goes on")
            until = time.monotonic() + WATCHED_FOR
            while not alive and time.monotonic() < until:
                time.sleep(min(2.0, WATCHED_FOR / 10))
                alive = read_holder(path) not in (before, None)
        if alive:
            refuse(path, before)
    ours = Holder(socket.gethostname(), os.getpid(), start_of(os.getpid()), kernel(), secrets.token_hex(8))
    write_whole(path, to_json(asdict(ours)))
    time.sleep(SETTLED_AFTER)
    lock = BucketLock(path, ours)
    if lock.lost(now=True):
        refuse(path, read_holder(path))
    return lock


def read_holder_or_fail(path: Path) -> Holder | None:
    """Returns what a lock's object says; None where there is none, or it says nothing that can be read.

    Raises:
      OSError: the bucket does not answer.
    """
    try:
        found: Holder = parse_json(read_file(path), Holder, "the lock")
    except (FileNotFoundError, InputError):
        return None
    return found


@contextlib.contextmanager
def hold(path: Path) -> Iterator[Lock | BucketLock]:
    """Holds the lock of this path while it lasts.

    Raises:
      InputError: another run holds it.
      OSError: its file cannot be written.
    """
    lock, done = acquire_in_bucket(path) if in_bucket(path) else acquire(path), threading.Event()

    def touch() -> None:
        while not done.wait(TOUCHED_EVERY):
            lock.touch()

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        done.set()
        thread.join()
        lock.release()


def acquire(path: Path) -> Lock:
    """Takes a lock, from a run that left it behind if need be.

    Raises:
      InputError: another run holds it.
      OSError: its file cannot be written.
    """
    ours = Holder(socket.gethostname(), os.getpid(), start_of(os.getpid()), kernel(), secrets.token_hex(8))
    for _ in range(100):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            supported = flock(descriptor, path)
            if supported is None:
                continue  # its holder has just let go of it, and removed this file
            before = read_holder(path)
            if before is not None:
                refuse_if_alive(path, before, supported)
            elif os.fstat(descriptor).st_size:
                say(f"WARNING: {path} was damaged and said nothing of who held it", error=True)
            if not supported:
                os.close(descriptor)
                descriptor = -1
                descriptor = create_alone(path, before)
            write(descriptor, ours)
            lock, descriptor = Lock(path, ours, descriptor), -1
            if not supported:
                time.sleep(0.2)  # of two that find one left behind, the later one may have replaced the other's
            if lock.lost(now=True):
                lock.release()
                continue
            return lock
        except (FileExistsError, FileNotFoundError):
            continue  # another one was quicker to take it, or to take it away
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    raise InputError(f"{path} is being taken by other runs, again and again; give another --workdir")


def flock(descriptor: int, path: Path) -> bool | None:
    """Has the system lock an open file: True, or False where the disk does not support it; None where the file is no
    longer the one of this path.

    Raises:
      InputError: another process has locked it.
    """
    for attempt in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt == 9:
                refuse(path, read_holder(path))
            time.sleep(0.03)  # `live_holder` looks at it for a moment
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            raise
        else:
            break
    try:
        found, ours = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return None
    return True if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino) else None


def refuse_if_alive(path: Path, holder: Holder, flocked: bool) -> None:
    """Raises InputError where the holder that a lock's file names may be alive.

    Args:
      flocked: the system has locked the file for us, so that the holder is no process of this system.
    """
    alive = alive_here(holder)
    if alive or (alive is None and not (flocked and same_system(holder)) and touched(path, holder)):
        refuse(path, holder)


def touched(path: Path, holder: Holder) -> bool:
    """Returns whether a lock of another host is being touched.

    It is taken for granted where that was a moment ago by the clock of the disk. Else the lock is watched, since some
    disks take the clock of whoever touches a file; so it is where a host of this name may have started anew.
    """
    before = os.stat(path).st_mtime_ns
    if holder.host != socket.gethostname() and abs(age(path)) < STALE_AFTER:
        return True
    say(f"{path} is that of process {holder.pid} on {holder.host}; watching for {WATCHED_FOR:.0f} s whether it goes on")
    until = time.monotonic() + WATCHED_FOR
    while time.monotonic() < until:
        time.sleep(min(0.5, WATCHED_FOR / 10))
        if os.stat(path).st_mtime_ns != before:
            return True
    return False


def age(path: Path) -> float:
    """Returns seconds since a file was touched, by the clock that the disk stamps files with; 0.0 where it takes no
    file.
    """
    probe = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        try:
            return os.fstat(descriptor).st_mtime - os.stat(path).st_mtime
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError:
        return time.time() - os.stat(path).st_mtime


def alive_here(holder: Holder) -> bool | None:
    """Returns whether the process that a lock names is alive; None where its number is none of this system and
    container.
    """
    if holder.kernel != kernel() if holder.kernel else holder.host != socket.gethostname():
        return None
    return holder.start is not None and start_of(holder.pid) == holder.start


def same_system(holder: Holder) -> bool:
    """Returns whether a holder ran under the system that is running here, in whatever container."""
    ours = kernel()
    return holder.kernel is not None and ours is not None and holder.kernel.split()[0] == ours.split()[0]


def create_alone(path: Path, before: Holder | None) -> int:
    """Opens a new file where the disk has no `flock`, in place of that of a holder who left it behind.

    Raises:
      FileExistsError: another process was quicker,
      FileNotFoundError: or is just replacing it.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    os.rename(path, aside)
    moved = read_holder(aside)
    if moved != before:
        with contextlib.suppress(OSError):
            os.link(aside, path)  # it was another one's already
        aside.unlink()
        raise FileExistsError(path)
    aside.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write(descriptor: int, holder: Holder) -> None:
    """Writes a holder into an open file."""
    data = to_json(asdict(holder)).encode()
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))


def read_holder(path: Path) -> Holder | None:
    """Returns what a lock's file says; None where it says nothing that can be read."""
    try:
        return parse_json(read_file(path), Holder, "the lock")
    except (OSError, InputError):
        return None


def live_holder(path: Path) -> Holder | None:
    """Returns who holds a lock; None where nobody does, or it was left behind. Never waits."""
    holder = read_holder(path)
    if holder and (alive := alive_here(holder)) is not None:
        return holder if alive else None
    if in_bucket(path):
        return holder if holder and abs(time.time() - modified(path)) < STALE_AFTER else None
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if holder and same_system(holder):
                return None
    except BlockingIOError:
        return holder or Holder("this host", 0)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            return None
    return holder if holder and abs(age(path)) < STALE_AFTER else None


def refuse(path: Path, holder: Holder | None) -> None:
    """Raises InputError with who holds a lock."""
    who = f"process {holder.pid} on {holder.host}" if holder else "a process that is just starting"
    with contextlib.suppress(OSError):
        who += f", which touched it at {datetime.fromtimestamp(modified(path)):%Y-%m-%d %H:%M:%S} the last time"
    raise InputError(
        f"{path.parent} is in use by {who}; wait for it, stop it, or give another --workdir. If there is no such "
        f"process, remove {path}"
    )


def kernel() -> str | None:
    """Returns what names the running system and the container whose process numbers are ours; None where it is not
    Linux.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def start_of(pid: int) -> str | None:
    """Returns what tells a process from a later one of the same number: its start, if the system says; None if it is
    dead.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass
    return "alive"
