"""The processes of a run: they join, compare what must be equal, and end together.

Process 0 listens at the coordinator's address. Every process, process 0 too, holds a connection to it on which lines of
JSON travel: what one process sends reaches all of them, in one order, and those that join later. A process whose
connection closes before it `left`, or is silent for `LOST_AFTER` seconds, is lost.

JAX's coordination service lies behind the same port. JAX aborts a process, with a stack of C++, as soon as its
connection to that service closes; therefore its connections go through a relay in its own process, which stays open
when process 0 is gone, and the sentence of `Peers.end` comes first.
"""

import asyncio
import atexit
import contextlib
import hashlib
import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from resnet_jax.config import Config, InputError, ParallelConfig, to_dict

LOST_AFTER = 30.0
"""Seconds without a sign of life after which a process counts as lost and the others end."""

BEAT, BEAT_EVERY = b"\n", 2.0
"""The sign of life, and how often, in seconds, it is sent."""

GRACE = 2.0
"""Seconds in which a process may end with words of its own after it learns that another one failed or was lost."""

TO_SERVICE = b"jax\n"
"""First line of a connection to JAX's coordination service."""

HOST_FIELDS = frozenset(
    {
        "data.dataset",
        "data.data_dir",
        "data.workers",
        "data.timeout",
        "parallel.join_within",
        "parallel.coordinator",
        "parallel.processes",
        "parallel.process_id",
    }
)
"""Fields of the recipe that may differ between the processes of a run."""


class Peers:
    """What this process knows of all processes of the run; a thread of its own keeps it up to date."""

    def __init__(self, process: int, count: int) -> None:
        self.process, self.count = process, count
        self.cause: tuple[str, int] | None = None
        """Why this process has to end, and the status to end with: another process failed or was lost."""
        self.status: int | None = None
        """The status of this process once it ends for reasons of its own."""
        self._sent: dict[str, dict[int, Any]] = defaultdict(dict)
        self._changed = threading.Condition()
        self._rounds = 0
        self._loop = asyncio.new_event_loop()
        self._writer: asyncio.StreamWriter | None = None

    def connect(self, address: tuple[str, int], own: socket.socket, hub: socket.socket | None, service: int) -> None:
        """Starts the thread.

        Args:
          address: where process 0 listens.
          own: listens for this process's JAX, to be relayed.
          hub: listens at the coordinator's address; in process 0 alone.
          service: port of JAX's coordination service on process 0.
        """

        async def listen() -> None:
            if hub:
                await asyncio.start_server(Hub(self.count, service).welcome, sock=hub, limit=2**24)
            await asyncio.start_server(lambda here, back: relay(here, back, address, TO_SERVICE), sock=own)
            ready.set()
            await asyncio.Event().wait()

        ready = threading.Event()
        threading.Thread(target=lambda: self._loop.run_until_complete(listen()), daemon=True).start()
        ready.wait()

    def join(self, connection: socket.socket) -> None:
        """Follows what all processes send on a connection to process 0."""
        asyncio.run_coroutine_threadsafe(self._follow(connection), self._loop)

    async def _follow(self, connection: socket.socket) -> None:
        reader, self._writer = await asyncio.open_connection(sock=connection, limit=2**24)
        beating = asyncio.create_task(beat([self._writer]))
        try:
            async for line in lines(reader):
                self._take(json.loads(line))
        except OSError as error:
            self._take({"process": 0, "lost": str(error)})
        beating.cancel()

    def _take(self, message: dict[str, Any]) -> None:
        process = message.pop("process")
        with self._changed:
            for kind, value in message.items():
                self._sent[kind][process] = value
            if self.cause is None and (cause := self._cause(process, message)):
                self.cause = cause
                self._loop.call_later(GRACE, self.end)
            self._changed.notify_all()

    def _cause(self, process: int, message: dict[str, Any]) -> tuple[str, int] | None:
        if "refused" in message:
            return f"process {process} cannot join: {message['refused']}", 2
        if process == self.process or process in self._sent["left"]:
            return None
        if "failed" in message:
            return f"process {process} failed: {message['failed']}", message["status"]
        if "lost" in message:
            again = "start the same command again in all processes to go on from the last checkpoint"
            return f"process {process} was lost ({message['lost']}); {again}", 1
        return None

    def send(self, **message: Any) -> None:
        """Sends to all processes."""
        line = json.dumps({"process": self.process} | message).encode() + b"\n"

        def write() -> None:
            if self._writer:
                self._writer.write(line)

        self._loop.call_soon_threadsafe(write)

    def gather(self, kind: str, seconds: float | None = None) -> dict[int, Any]:
        """Returns what each process sent of a kind, once all have, after that many seconds, or once one failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.cause or len(self._sent[kind]) == self.count, seconds)
            return dict(self._sent[kind])

    def exchange(self, value: Any) -> dict[int, Any]:
        """Returns the values of all processes; to be called by all of them equally often."""
        self._rounds += 1
        kind = f"round {self._rounds}"
        self.send(**{kind: value})
        found = self.gather(kind)
        if len(found) < self.count:
            self.end()
        return found

    def fail(self, error: BaseException) -> None:
        """Tells all others of an error, which ends them too; does not return where it came of another process's end."""
        if not isinstance(error, InputError | KeyboardInterrupt | SystemExit):
            with self._changed:
                self._changed.wait_for(lambda: self.cause, GRACE)
            if self.cause:
                self.end()
        if isinstance(error, SystemExit):
            self.status = error.code if isinstance(error.code, int) else 1
        else:
            self.status = 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        name = "" if isinstance(error, InputError) else type(error).__name__
        words = ": ".join(word for word in (name, str(error)) if word)
        self.send(failed=words, status=2 if self.status == 2 else 1)
        with self._changed:
            self._changed.wait_for(lambda: self.process in self._sent["failed"], GRACE)

    def leave(self) -> None:
        """Waits at the end of the process for the others, which may need it."""
        waited = set(range(self.count)) if self.process == 0 else {self.process}
        try:
            if self.status is None:
                self.send(done=True)
                self.gather("done")
                self.end()
                jax.distributed.shutdown()  # waits for all of them
                self.status = 0
                self.send(left=True)
                with self._changed:
                    self._changed.wait_for(lambda: self._sent["left"].keys() >= waited, GRACE)
                return
        except KeyboardInterrupt:
            self.status = 130
        leave_at_once(self.status)

    def end(self) -> None:
        """Ends the process with the words on another one, unless an error of its own ends it."""
        if self.status is None and self.cause:
            words, status = self.cause
            with contextlib.suppress(OSError):
                os.write(2, f"error: {words}\n".encode())
            leave_at_once(status)


def leave_at_once(status: int) -> NoReturn:
    """Ends the process with what it started; anything that would tidy up waits for a process that is gone."""
    if threading.current_thread() is threading.main_thread():
        sys.stdout.flush()
        sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


class Hub:
    """Process 0's end of all connections."""

    def __init__(self, count: int, service: int) -> None:
        self.count, self.service = count, service
        self._log: list[bytes] = []
        self._members: dict[int, asyncio.StreamWriter] = {}
        self._beating: asyncio.Task[None] | None = None

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message to all processes, also to those that join later."""
        self._log.append(json.dumps(message).encode() + b"\n")
        for writer in self._members.values():
            writer.write(self._log[-1])

    async def welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            first = await asyncio.wait_for(reader.readline(), LOST_AFTER)
            if first == TO_SERVICE:
                await relay(reader, writer, ("127.0.0.1", self.service))
                return
            hello = json.loads(first)
            writer.write(BEAT)
            if refused := self._refuse(hello["process"], hello["joined"]):
                message = {"process": hello["process"], "refused": refused}
                if len(self._members) < self.count:
                    self.tell(message)
                writer.write(json.dumps(message).encode() + b"\n")
                await reader.read()  # until it is gone
                return
            await self._serve(hello, reader, writer)

    def _refuse(self, process: int, count: int) -> str | None:
        if count != self.count:
            return f"it was given {count} processes, process 0 was given {self.count}: give all the same number"
        if process in self._members:
            return f"there is a process {process} already: give each process another --parallel.process_id"
        return None

    async def _serve(self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        process = hello["process"]
        self._members[process] = writer
        self._beating = self._beating or asyncio.create_task(beat(self._members.values()))
        writer.writelines(self._log)
        self.tell(hello)
        try:
            async for line in lines(reader):
                self.tell(json.loads(line) | {"process": process})
        except (OSError, ValueError) as error:
            del self._members[process]
            self.tell({"process": process, "lost": str(error)})


async def lines(reader: asyncio.StreamReader) -> Any:
    """Yields the lines of a connection but for signs of life.

    Raises:
      OSError: it was closed, or silent for `LOST_AFTER` seconds.
    """
    while True:
        try:
            line = await asyncio.wait_for(reader.readline(), LOST_AFTER)
        except TimeoutError as error:
            raise OSError(f"it gave no sign of life for {LOST_AFTER:.0f} seconds") from error
        except (ConnectionError, ValueError):  # reset, or a line without an end
            line = b""
        if not line.endswith(b"\n"):
            raise OSError("its connection was closed")
        if line != BEAT:
            yield line


async def beat(writers: Any) -> None:
    """Gives signs of life on connections as long as it runs."""
    while True:
        for writer in list(writers):
            writer.write(BEAT)
        await asyncio.sleep(BEAT_EVERY)


async def relay(
    here: asyncio.StreamReader, back: asyncio.StreamWriter, address: tuple[str, int], first: bytes = b""
) -> None:
    """Copies a connection to another address, after a first line, and back; ends when `here` does, not before."""
    with contextlib.suppress(OSError):
        there, forth = await asyncio.open_connection(*address)
        forth.write(first)
        await asyncio.gather(copy(there, back), copy(here, forth, close=True))
    with contextlib.suppress(OSError):
        while await here.read(2**16):  # the address is gone, which JAX must not see
            pass
    back.close()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, close: bool = False) -> None:
    """Copies bytes until there are no more, or nobody takes them."""
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    if close:
        writer.close()


_peers: Peers | None = None


def start_processes(recipe: ParallelConfig) -> None:
    """Joins the processes of a cluster if `distributed` is `auto`; call before any other use of JAX.

    Who they are says the recipe, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment,
    or else what JAX finds out from the cluster.

    Raises:
      InputError: there is no cluster to join, or a process did not join within `join_within` seconds.
    """
    global _peers
    if recipe.distributed == "off" or jax.distributed.is_initialized():
        return
    found = identity(recipe)
    if found is None:
        join_detected()
        return
    coordinator, count, process = found
    host, port = split_address(coordinator)
    deadline = time.monotonic() + recipe.join_within
    own = socket.create_server(("127.0.0.1", 0))
    hub, service = (listen_at(port), free_port()) if process == 0 else (None, 0)
    _peers = Peers(process, count)
    _peers.connect((host, port), own, hub, service)
    _peers.join(reach(host, port, {"process": process, "joined": count}, deadline))
    atexit.register(_peers.leave)
    joined = _peers.gather("joined", deadline - time.monotonic())
    _peers.end()
    if missing := [str(i) for i in range(count) if i not in joined]:
        raise InputError(
            f"process {', '.join(missing)} of {count} did not join within {recipe.join_within:g} seconds: is it "
            f"running, and may it reach {coordinator}?"
        )
    exempt = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")  # noqa: SIM112
    os.environ["no_grpc_proxy"] = f"{exempt},127.0.0.1" if exempt else "127.0.0.1"  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            f"127.0.0.1:{own.getsockname()[1]}",
            count,
            process,
            coordinator_bind_address=f"127.0.0.1:{service}",
            heartbeat_timeout_seconds=round(4 * LOST_AFTER),  # words come before JAX's own end
            shutdown_timeout_seconds=round(10 * LOST_AFTER),
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"parallel.distributed auto: {error}") from error


def join_detected() -> None:
    """Joins the cluster that JAX detects, by JAX's own means alone: where a process is lost, JAX aborts the others.

    Raises:
      InputError: JAX detects none.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"parallel.distributed auto: {error}; give --parallel.distributed off on one host, or "
            "--parallel.coordinator ADDRESS:PORT --parallel.processes N --parallel.process_id I"
        ) from error


def identity(recipe: ParallelConfig) -> tuple[str, int, int] | None:
    """Returns the coordinator's address, the number of processes and the number of this one, by recipe and environment;
    None where these do not say all of it.

    Raises:
      InputError: they make no sense.
    """
    coordinator = recipe.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = from_environment("JAX_NUM_PROCESSES") if recipe.processes is None else recipe.processes
    process = from_environment("JAX_PROCESS_ID") if recipe.process_id is None else recipe.process_id
    if not 0 < recipe.join_within < threading.TIMEOUT_MAX:
        raise InputError(f"parallel.join_within {recipe.join_within}: give a number of seconds above 0")
    if coordinator is None or count is None or process is None:
        return None
    if not 0 <= process < count:
        raise InputError(f"parallel.process_id {process}: with {count} processes it is from 0 to {count - 1}")
    return coordinator, count, process


def from_environment(name: str) -> int | None:
    """Returns a whole number from the environment; None where it is not set.

    Raises:
      InputError: it is something else.
    """
    text = os.environ.get(name)
    if text and not text.isdigit():
        raise InputError(f"{name}={text} in the environment: give a whole number, or unset it")
    return int(text) if text else None


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of `host:port`.

    Raises:
      InputError: it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"parallel.coordinator {address}: give a host and a port, such as 10.0.0.1:1234")
    return host.strip("[]"), int(port)


def listen_at(port: int) -> socket.socket:
    """Listens at a port of all addresses of this host.

    Raises:
      InputError: something else does, or it may not be used.
    """
    six = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if six else socket.AF_INET, dualstack_ipv6=six, backlog=1024
        )
    except OSError as error:
        raise InputError(
            f"parallel.coordinator: process 0 cannot listen at port {port} ({error.strerror}); is another run using "
            "it? Give all processes another port"
        ) from error


def free_port() -> int:
    """Returns a port of the loopback that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def reach(host: str, port: int, hello: dict[str, int], deadline: float) -> socket.socket:
    """Connects to process 0 and greets it; tries again until the deadline, a time of `time.monotonic`.

    Raises:
      InputError: nothing answered, or something else than process 0 of a run.
    """
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            connection.settimeout(LOST_AFTER)
            connection.sendall(json.dumps(hello).encode() + b"\n")
            if connection.recv(1) != BEAT:
                connection.close()
                raise OSError("what listens there is not process 0 of a run")
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"process 0 did not answer at parallel.coordinator {host}:{port} in time "
                    f"({error}); is it running there, and may this host reach that port?"
                ) from error
            time.sleep(0.2)


@contextlib.contextmanager
def ending_together(*orderly: type[BaseException]) -> Iterator[None]:
    """Tells all processes of the run of an error in it, which ends them within seconds with that error's words.

    Args:
      orderly: errors that all processes raise together, as the end of a run.
    """
    try:
        yield
    except BaseException as error:
        if _peers and not isinstance(error, orderly):
            _peers.fail(error)
        raise


def check_equal(facts: dict[str, str]) -> None:
    """Compares facts by name between all processes; to be called by all of them.

    Raises:
      InputError: in every process, where some differ; it names them, and the processes.
    """
    if jax.process_count() == 1:
        return
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in facts.items()}
    shown = {name: text if len(text) <= 60 else f"sha256 {digests[name][:12]}" for name, text in facts.items()}
    tables = exchange({name: [digest, shown[name]] for name, digest in digests.items()})
    names = dict.fromkeys(name for i in sorted(tables) for name in tables[i])
    differing = [name for name in names if len({(tables[i].get(name) or [""])[0] for i in tables}) > 1]
    if not differing:
        return

    def values(name: str) -> str:
        by_value: dict[str, list[int]] = defaultdict(list)
        for i in sorted(tables):
            by_value[(tables[i].get(name) or ["", "nothing"])[1]].append(i)
        return f"{name} is " + ", ".join(
            f"{value} on process{'es' if len(them) > 1 else ''} {', '.join(map(str, them))}"
            for value, them in by_value.items()
        )

    raise InputError(
        "the processes of a run must be given the same recipe and data, and these differ: "
        + "; ".join(map(values, differing))
    )


def exchange(value: Any) -> dict[int, Any]:
    """Returns what each process gave, by number; to be called by all of them."""
    if _peers:
        return _peers.exchange(value)
    from jax.experimental import multihost_utils  # the user joined the processes

    text = json.dumps(value).encode()
    size = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(size), np.uint8))
    return {i: json.loads(bytes(row)) for i, row in enumerate(np.asarray(rows).reshape(jax.process_count(), -1))}


def facts_of(config: Config) -> dict[str, str]:
    """Returns the fields of the recipe, and the devices and versions, that all processes must have in common."""
    fields = {
        f"{section}.{name}": json.dumps(value)
        for section, values in to_dict(config).items()
        for name, value in values.items()
        if f"{section}.{name}" not in HOST_FIELDS
    }
    devices = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    return fields | {"number of devices": devices, "version of jax": jax.__version__}


def check_one_folder(folder: Path) -> None:
    """Raises InputError in every process where the run's folder is not the same one for all.

    Process 0 writes a file of a random name, which the others must see.
    """
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    sign = folder / f".same-{secrets.token_hex(8)}"
    if first:
        sign.touch()
    try:
        there = folder / exchange(sign.name)[0]
        seen = exchange([there.exists(), f"{socket.gethostname()}:{folder.resolve()}"])
    finally:
        if first:
            sign.unlink(missing_ok=True)
    if other := [f"process {i} has {place}" for i, (found, place) in seen.items() if not found]:
        raise InputError(
            f"--workdir must be the same folder for all processes, on a disk that all see: process 0 has {seen[0][1]}, "
            + ", ".join(other)
        )
