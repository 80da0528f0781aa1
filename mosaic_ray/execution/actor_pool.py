"""Dispatch one task per client to Ray actors, and retry the tasks of actors that die."""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import OutOfGpuMemory, RunError
from .ray_internals import killed_for_memory
from .watch import MapEvents, Watch, no_sign

#: Seconds between two checks for new nodes, while clients wait for an actor.
LOOK_SECONDS = 2.0

#: Consecutive deaths of actors without work before the run gives up.
MAX_LOSSES = 5

#: A call takes so many seconds, as far as it can be foreseen, by the work of at most so many clients one after another:
#: where their work is short, the driver would spend as long on a call as an actor. It changes no number.
CALL_SECONDS, MOST_IN_A_CALL = 0.25, 16

#: In the place of a call's clients: a ping, and work of an actor that was killed because it hung.
_PING, _ENDED = (-1,), (-2,)

#: Seconds to wait while no actor is alive: other jobs use the cluster, or its autoscaler is starting machines.
PATIENCE_SECONDS, PATIENCE_FOR_MACHINES = 120.0, 1800.0


@dataclass(frozen=True)
class ClientFailure:
    """Takes the place of a result: the client's work failed ``failures`` times, the last time with ``error``."""

    error: RunError
    failures: int


class ActorPool:
    """The client actors of a run: those that are up, and those that are still to start.

    ``more(have)`` starts actors on nodes that joined since; ``shared`` actors serve other runs too and are not ended.
    ``fewer(error)`` starts actors with twice the share of a GPU, none if they hold one to themselves.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        *,
        shared: bool = False,
        more: Callable[[int], list[Any]] | None = None,
        fewer: Callable[[OutOfGpuMemory], list[Any]] = lambda error: [],
        patience_seconds: float = PATIENCE_SECONDS,
        say: Callable[[str], None] = lambda text: None,
        timeout: float = 0.0,
    ) -> None:
        """``timeout``: seconds without a sign of life after which an actor at work is hung, as ``Watch`` takes them."""
        self.actors, self.shared, self.say = list(actors), shared, say
        self.watch = Watch(timeout)
        self.patience_seconds = patience_seconds
        self.seconds = 0.0  # that finished client tasks took, all together
        self.pace: dict[str, float] = {}  # kind of task -> recent seconds of one client's work
        self._up: dict[int, str] = {}  # actor -> its worker's id
        self._more, self._fewer, self._looked = more, fewer, time.monotonic()

    def is_up(self, actor: Any) -> bool:
        return id(actor) in self._up

    def mark_up(self, actor: Any, worker_id: str) -> None:
        """Record that ``actor`` answered a ping from the process ``worker_id``."""
        self._up[id(actor)] = worker_id

    def mark_down(self, actor: Any) -> str:
        """Record that ``actor`` died or left; return the id of its process, "" where unknown."""
        return self._up.pop(id(actor), "")

    @property
    def any_up(self) -> bool:
        return bool(self._up)

    def poll_scale_up(self) -> list[Any]:
        """Start actors on nodes that joined since the last check; return them."""
        if self._more is None or time.monotonic() - self._looked < LOOK_SECONDS:
            return []
        self._looked = time.monotonic()
        new = self._more(len(self.actors))
        if new:
            self.say(f"the cluster has grown: {len(new)} more client actors")
        self.actors += new
        return new

    def remove(self, actor: Any) -> bool:
        """Remove ``actor`` from the pool; return False where it is the last one."""
        if len(self.actors) == 1:
            return False
        self.actors = [other for other in self.actors if other is not actor]
        self.mark_down(actor)
        self._more = None  # memory ran out: start no more actors
        if not self.shared:
            end([actor])
        return True

    def halve(self, error: OutOfGpuMemory) -> list[Any]:
        """Replace all actors by others with twice the share of a GPU; return them, none where that cannot be."""
        new = self._fewer(error)
        if new:
            end(self.actors)  # the new ones start when these have gone
            self.actors = new
            self._up.clear()
        return new

    def close(self) -> None:
        """End the actors, unless other runs share them."""
        if not self.shared:
            end(self.actors)
        self.actors = []


def end(actors: Sequence[Any]) -> None:
    """Kill ``actors`` for good."""
    import ray

    for actor in actors:
        with contextlib.suppress(Exception):  # it may be dead already, which is what we want
            ray.kill(actor)


class ClientMap:
    """One call of ``ClientBackend.map`` on Ray: a queue of clients, the idle actors, and the running calls."""

    def __init__(
        self,
        pool: ActorPool,
        shards: Mapping[int, Any],
        call: tuple[Any, ...],
        clients: Sequence[int],
        broadcast: Any,
        per_client: Callable[[int], Any],
        cost: Callable[[int], float] | None,
        max_failures: int,
        events: MapEvents,
    ) -> None:
        """``call``: (config, facts, task); ``shards`` holds references; a client fails for good at ``max_failures``."""
        import ray

        self._pool, self._per_client, self._clients, self._shards = pool, per_client, clients, shards
        self._cost = cost or (lambda client_id: 0.0)
        self._max_failures, self._events = max_failures, events
        self._common, self._round_num = ray.put((*call, broadcast)), getattr(call[2], "round_num", None)
        self._queue = [(-self._cost(c), c) for c in clients]
        heapq.heapify(self._queue)
        self._kind = type(getattr(call[2], "task", call[2])).__name__
        #: done -> (the call's clients, _PING or _ENDED; value; actor)
        self._running: dict[Any, tuple[tuple[int, ...], Any, Any]] = {}
        #: client -> a failure, or (reference to the value of its call, its place in it, None: it is the value itself);
        #: references, not values: early results wait in the object store
        self._arrived: dict[int, ClientFailure | tuple[Any, int | None]] = {}
        self._read: tuple[Any, Any] = (None, None)  # the reference that was read last, and its value
        self._alone: set[int] = set()  # clients that share no call, since one of theirs failed
        self._failures: dict[int, int] = {}
        self._hangs: dict[int, int] = {}
        self._beside: dict[int, int] = {}  # client -> number of actors when its work began
        self._losses = 0  # of actors that held no work
        self._alone_since = time.monotonic()
        self._idle = [actor for actor in pool.actors if pool.is_up(actor)]
        for actor in pool.actors:
            if not pool.is_up(actor):
                self._ping(actor)

    def results(self, ordered: bool) -> Iterator[tuple[int, Any]]:
        """Yield (client, its result or ``ClientFailure``) for every client; ``RunError`` where no actor can work."""
        import ray
        from ray.exceptions import ObjectLostError

        turn = iter(self._clients)
        due = next(turn, None)
        try:
            while due is not None:
                self._dispatch()
                self._settle()
                self._look()
                while due is not None and self._arrived:
                    client_id = due if ordered else next(iter(self._arrived))
                    if client_id not in self._arrived:
                        break
                    try:
                        value = self._value(self._arrived[client_id])
                    except ObjectLostError:  # with its node; it is computed again
                        self._again(client_id)
                        del self._arrived[client_id]
                        break
                    del self._arrived[client_id]
                    yield client_id, value
                    del value
                    due = next(turn, None)
        finally:
            for done in self._running:
                with contextlib.suppress(Exception):  # best effort; an actor's running call cannot be interrupted
                    ray.cancel(done, force=False)

    def _value(self, found: ClientFailure | tuple[Any, int | None]) -> Any:
        """Return the result of a client that has arrived."""
        import ray

        if isinstance(found, ClientFailure):
            return found
        reference, place = found
        if self._read[0] is not reference:
            self._read = (None, None)  # its arrays may go
            self._read = reference, ray.get(reference)
        if place is not None:
            return self._read[1][place]
        value, self._read = self._read[1], (None, None)
        return value

    def _dispatch(self) -> None:
        """Give every idle actor a call, and every other one a second, which then need not wait for the driver.

        No second one where runs share the actors, nor for the last clients, which the first idle actor takes.
        """
        while self._queue and self._idle:
            self._call(self._idle.pop(0))
        if self._pool.shared:
            return
        for actor in self._pool.actors:
            if len(self._queue) > len(self._pool.actors) and self._pool.is_up(actor) and len(self._in_hand(actor)) == 1:
                self._call(actor)

    def _call(self, actor: Any) -> None:
        clients = self._next()
        for client_id in clients:
            self._beside[client_id] = len(self._pool.actors)
        inputs = [(client_id, self._shards[client_id], self._per_client(client_id)) for client_id in clients]
        if len(inputs) == 1:
            done, value = actor.work.options(num_returns=2).remote(self._common, *inputs[0])
        else:
            done, value = actor.work_in_turn.options(num_returns=2).remote(self._common, inputs)
        if not self._in_hand(actor):
            self._begin(clients, actor)
        self._running[done] = (clients, value, actor)

    def _next(self) -> tuple[int, ...]:
        """Take the clients of the next call from the queue: several where their work is short."""
        pace, each = self._pool.pace.get(self._kind), len(self._queue) // (2 * len(self._pool.actors))
        most = min(MOST_IN_A_CALL, each, int(CALL_SECONDS / pace)) if pace else 1
        clients = [heapq.heappop(self._queue)[1]]
        while len(clients) < most and not self._alone & {clients[0], self._queue[0][1]}:
            clients.append(heapq.heappop(self._queue)[1])
        return tuple(clients)

    def _begin(self, clients: tuple[int, ...], actor: Any) -> None:
        """Note that a call's work begins."""
        self._pool.watch.begin(actor)
        self._events.step(clients[0], 0, 0)

    def _in_hand(self, actor: Any) -> list[Any]:
        """Return the calls that ``actor`` has in hand, in the order in which it works on them."""
        return [done for done, (_, _, other) in self._running.items() if other is actor]

    def _settle(self) -> None:
        """Wait until a call ends, or for a moment."""
        import ray

        if not self._running:
            return
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=LOOK_SECONDS)
        for done in ready:
            self._end(done)
        if self._queue:
            for actor in self._pool.poll_scale_up():
                self._ping(actor)
        if self._pool.any_up:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > self._pool.patience_seconds:
            raise RunError(
                f"no client actor could start within {self._pool.patience_seconds:g} s: other jobs hold the cluster's "
                "CPUs, GPUs or memory, or its machines are gone (`ray status` shows them)"
            )

    def _look(self) -> None:
        """Poll the actors at work: report their steps, and end those that gave no sign of life for too long."""
        watch = self._pool.watch
        if not watch.is_due():
            return
        for done, (clients, value, actor) in list(self._running.items()):
            if clients[0] < 0 or self._running.get(done, (_ENDED,))[0] == _ENDED or self._in_hand(actor)[0] is not done:
                continue
            sign, behind = watch.look(actor), self._is_behind(done, actor)
            if sign.answer and sign.answer[0] == _id(done):
                self._events.step(clients[0], *sign.answer[1:])
            if sign.silent > watch.limit:
                self._drop_waiting(actor)
                self._running[done] = (_ENDED, value, actor)
                self._hung(clients, actor, sign.silent, behind)

    def _hung(self, clients: tuple[int, ...], actor: Any, seconds: float, behind: bool) -> None:
        """Kill a hung actor, which Ray starts again, and queue its clients; ``RunError`` where one hangs each time.

        ``behind``: another run's work hangs, and this client's waits for it.
        """
        import ray

        self._pool.mark_down(actor)
        with contextlib.suppress(Exception):  # it may have died meanwhile
            ray.kill(actor, no_restart=False)  # by SIGKILL after some seconds, which ends a stopped process, too
        if not behind and len(clients) > 1:
            self._pool.say(f"a client actor gave no sign of life for {seconds:.0f} s; its clients are tried one by one")
        elif not behind:
            hangs = self._hangs[clients[0]] = self._hangs.get(clients[0], 0) + 1
            self._events.hung(clients[0], seconds)
            if hangs >= self._max_failures:
                raise RunError(no_sign(seconds, hangs), round=self._round_num, client=clients[0])
        self._again(*clients)

    def _is_behind(self, done: Any, actor: Any) -> bool:
        """Return whether an actor that runs share had another call in hand when it last answered."""
        return self._pool.watch.call_in_hand(actor) not in ("", _id(done))

    def _drop_waiting(self, actor: Any) -> None:
        """Queue the clients again whose work waits at ``actor`` behind that in hand."""
        for done in self._in_hand(actor)[1:]:
            self._again(*self._running.pop(done)[0])

    def _end(self, done: Any) -> None:
        """Handle the end of a call, which may have ended with another that its actor died in."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        if done not in self._running:
            return
        clients, value, actor = self._running[done]
        try:
            answer = ray.get(done)
        except RayActorError as error:
            first = self._in_hand(actor)[0]
            self._drop_waiting(actor)
            clients = self._running.pop(first)[0]
            if clients == _ENDED:
                self._ping(actor)
            else:
                self._lost(clients, actor, error, clients[0] >= 0 and self._is_behind(first, actor))
            return
        except RayTaskError as error:
            answer = error
        del self._running[done]
        if clients == _ENDED:  # it hung until it was done
            self._ping(actor)
            return
        self._pool.watch.end(actor)
        if waiting := self._in_hand(actor):
            self._begin(self._running[waiting[0]][0], actor)
        if clients == _PING:
            if isinstance(answer, RayTaskError):
                raise RunError(f"a client actor cannot start: {first_line(answer.cause or answer)}") from answer
            self._idle.append(actor)
            self._pool.mark_up(actor, answer)
            self._losses = 0
            return
        if not waiting:
            self._idle.append(actor)
        if isinstance(answer, RayTaskError):
            unknown = RunError(first_line(answer.cause or answer), client=clients[0])
            self._raised(clients, answer.cause if isinstance(answer.cause, RunError) else unknown)
            return
        several = len(clients) > 1
        seconds, num_done, failed = answer if several else (answer, 1, None)
        for place, client_id in enumerate(clients[:num_done]):
            self._arrived[client_id] = value, place if several else None
        self._pool.seconds += seconds
        if num_done:
            pace = seconds / num_done
            self._pool.pace[self._kind] = (self._pool.pace.get(self._kind, pace) + pace) / 2
        if failed is not None:
            self._again(*clients[num_done + 1 :])
            self._raised(clients[num_done : num_done + 1], failed)

    def _raised(self, clients: tuple[int, ...], error: RunError) -> None:
        """Handle an exception of the work of ``clients``; several are tried again, each by itself."""
        if isinstance(error, OutOfGpuMemory) and (new := self._pool.halve(error)):
            self._begin_anew(new, clients)
        elif len(clients) > 1:
            self._again(*clients)
        else:
            self._failed(clients[0], error)

    def _failed(self, client_id: int, error: RunError) -> None:
        failures = self._failures[client_id] = self._failures.get(client_id, 0) + 1
        self._alone.add(client_id)
        if failures < self._max_failures:
            self._again(client_id)
        else:
            self._arrived[client_id] = ClientFailure(error, failures)

    def _begin_anew(self, actors: Sequence[Any], clients: tuple[int, ...]) -> None:
        """Queue the clients in hand again, ``clients`` among them, for ``actors`` in the place of all others."""
        for waiting in [clients, *(running for running, _, _ in self._running.values())]:
            if waiting[0] >= 0:
                self._again(*waiting)
        self._running.clear()
        self._idle.clear()
        for actor in actors:
            self._ping(actor)

    def _again(self, *clients: int) -> None:
        """Queue clients again; each of several by itself, since one of them may have ended their call."""
        self._alone |= set(clients) if len(clients) > 1 else set()
        for client_id in clients:
            heapq.heappush(self._queue, (-self._cost(client_id), client_id))

    def _lost(self, clients: tuple[int, ...], actor: Any, error: Exception, behind: bool) -> None:
        """Handle the death of an actor, perhaps with clients' work, and ping it until Ray has restarted it.

        ``behind``: the work had not begun.
        """
        worker_id = self._pool.mark_down(actor)
        starved = bool(worker_id) and killed_for_memory(worker_id)
        if starved and self._pool.remove(actor):
            left = len(self._pool.actors)
            self._pool.say(f"out of memory: a client actor was killed; going on with {left} at once")
            if clients != _PING:
                self._again(*clients)  # its clients have not failed
            return
        several = behind or len(clients) > 1
        if several or (starved and self._beside.get(clients[0], 1) > 1):  # the last of several that were killed at once
            self._again(*clients)
        elif clients != _PING:
            self._failed(clients[0], RunError(f"its actor died: {first_line(error)}", client=clients[0]))
        else:
            self._losses += 1
            if self._losses > MAX_LOSSES:
                raise RunError(f"a client actor cannot start: {first_line(error)}") from error
        self._ping(actor)

    def _ping(self, actor: Any) -> None:
        # with retries: Ray holds the call until the actor is up, or dead for good
        self._running[actor.ping.options(max_task_retries=-1).remote()] = (_PING, None, actor)


def _id(done: Any) -> str:
    """Return Ray's id of the task that returns ``done``, as the task itself reads it."""
    return str(done.task_id().hex())


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"
