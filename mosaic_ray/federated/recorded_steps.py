"""Training steps on a GPU that are recorded once and replayed: CUDA graphs (``runtime.cuda_graphs``).

A small network's step is hundreds of short kernels, and starting them one by one takes longer than computing them. A
recorded step starts all of them with one call. The kernels and their order are the same, and so are the bits.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: Steps of each shape that are taken as usual before one is recorded: libraries choose kernels and buffers in them.
WARM_UP = 3

#: Records the work of a function, without doing it; returns a function that does it.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record ``work`` on the current stream as a CUDA graph; return what replays it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process may use the GPU meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


class RecordedStep:
    """Takes a training step of fixed work: as usual at first, then replayed.

    Args:
        step: reads its inputs and changes tensors in place; it draws no random numbers on the GPU, copies nothing to or
            from the CPU, and all tensors that it changes stay where they are.
        record: how work is recorded.
    """

    def __init__(self, step: Callable[..., None], record: Recorder) -> None:
        self._step, self._record = step, record
        self._taken: Counter[tuple[torch.Size, ...]] = Counter()
        self._recorded: dict[tuple[torch.Size, ...], tuple[list[Tensor], Callable[[], None]]] = {}

    def __call__(self, *inputs: Tensor) -> None:
        """Take a step on ``inputs``; inputs of other shapes are recorded by themselves."""
        shapes = tuple(given.shape for given in inputs)
        self._taken[shapes] += 1
        if self._taken[shapes] <= WARM_UP:
            self._step(*inputs)
            return
        if shapes not in self._recorded:
            own = [given.clone() for given in inputs]
            self._recorded[shapes] = own, self._record(lambda: self._step(*own))
        own, replay = self._recorded[shapes]
        for kept, given in zip(own, inputs, strict=True):
            kept.copy_(given)
        replay()


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work in the block on a stream of the GPU ``device`` of its own, as recording requires."""
    stream, around = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(around)
    with torch.cuda.stream(stream):
        yield
    around.wait_stream(stream)
