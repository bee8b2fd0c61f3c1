"""
How bench.py measures: peers are called in turn, again and again, stage by stage.
"""
import itertools
import statistics
import time
from collections.abc import Callable

import torch


def clock(call: Callable, device: str, ahead: bool = False) -> dict[str, float]:
    """One call(mark) -> {stage: seconds}: mark(stage) ends a stage, which began at the last mark.

    ahead: keeps a GPU busy first, so that stages take as long as their kernels, not as long as
    launching them."""
    marks = []

    def mark(stage):
        now = time.perf_counter()
        if device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        marks.append((stage, now))

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(5_000_000 * ahead)
    mark("")
    call(mark)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = {}
    for (_, start), (stage, end) in itertools.pairwise(marks):
        if device == "cuda":
            passed = start.elapsed_time(end) / 1e3
        else:
            passed = end - start
        seconds[stage] = seconds.get(stage, 0) + passed
    return seconds


def race(calls: dict, args, ahead: bool = False) -> dict:
    """All in turn, --repeats times, the slow ones less often -> {key: [{stage: seconds}, ...]}."""
    times = {key: [] for key in calls}
    spent = dict.fromkeys(calls, 0)
    for _ in range(args.repeats):
        for key, call in calls.items():
            if spent[key] < args.seconds:
                times[key].append(clock(call, args.device, ahead))
                spent[key] += sum(times[key][-1].values())
    return times


def capture(run: Callable) -> Callable:
    """A call of run() as a CUDA graph, all its kernels in one launch -> what race() calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):                                   # as autograd asks for
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda mark, run=run: (graph.replay(), mark("all"))      # run keeps its tensors alive


def median(times: list[dict], stage: str = "all") -> float:
    return statistics.median(seconds[stage] for seconds in times)
