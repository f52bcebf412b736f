"""A trainer's state saved on one layout of ranks and loaded on another by fresh processes, and how far apart they end.

Used by `test_megatron_state.py` and `benchmarks/resharding.py`. Speaks only the `TrainerBackend` protocol.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layouts import Case, build, enter_process_group, leave_process_group, weights

from miles.training.backend import TrainerBackend, UpdateStats

UPDATES_BEFORE = 2
UPDATES_AFTER = 2
WEIGHT_DECAY = 0.1
JOBS_PER_PROCESS = 8
"""A process group leaves threads behind that spin: after dozens of them in one process the machine does little else."""


@dataclass(frozen=True)
class Pair:
    """A state's way from one layout to another."""

    saved: Case
    loaded: Case

    def __str__(self) -> str:
        return f"{self.saved} -> {self.loaded}"


@dataclass(frozen=True)
class Course:
    """What a rank saw from the moment of the save on."""

    log_probs: dict[str, torch.Tensor]
    """Of the saved state, by number of the sequence; this rank's."""
    stats: list[UpdateStats]
    weights: dict[str, torch.Tensor]
    """At the end."""
    seconds: float
    """Of `begin_save` and `finalize`, which hold the trainer up, or of `load_state`."""
    write_seconds: float
    """Of `write`, beside the trainer."""


@dataclass(frozen=True)
class Distance:
    """max |difference| between going on and resuming elsewhere; `grad_norm` is relative. All 0: the same bits."""

    log_probs: float
    loss: float
    """Of each update after the save."""
    grad_norm: float
    weights: float
    """After these updates."""
    hold_seconds: float
    write_seconds: float
    load_seconds: float


def run_pairs(pairs: list[Pair], root: Path) -> dict[Pair, Distance]:
    """Save on each layout that is left, then load on each that is gone to, in processes started anew in between."""
    for model in {pair.saved.model for pair in pairs}:
        reference.build_model(model, root / model)
    origins = list(dict.fromkeys(pair.saved for pair in pairs))
    gone_on = _start("save", origins, _save, [case.ranks for case in origins], root)
    resumed = _start("load", pairs, _load, [pair.loaded.ranks for pair in pairs], root)
    return {pair: _distance(gone_on[pair.saved], resumed[pair]) for pair in pairs}


def save(
    backend: TrainerBackend, directory: Path, meanwhile: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """A whole save as the loop does it, with something happening between the copy and the write; returns seconds."""
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    start = time.perf_counter()
    pending = backend.begin_save(directory)
    copied = time.perf_counter()
    meanwhile()
    dist.barrier()
    began = time.perf_counter()
    thread = threading.Thread(target=pending.write)
    thread.start()
    thread.join()
    written = time.perf_counter()
    pending.finalize()
    return copied - start + time.perf_counter() - written, written - began


def state_directory(root: Path, case: Case) -> Path:
    return root / f"state {case}"


def _save(case: Case, root: Path) -> Course:
    backend = build(case, root / case.model, weight_decay=WEIGHT_DECAY)
    for _ in range(UPDATES_BEFORE):
        _update(backend, case)
    log_probs = _log_probs(backend, case)
    stats: list[UpdateStats] = []
    seconds = save(backend, state_directory(root, case), meanwhile=lambda: stats.append(_update(backend, case)))
    stats += [_update(backend, case) for _ in range(UPDATES_AFTER - 1)]
    return Course(log_probs, stats, weights(backend), *seconds)


def _load(pair: Pair, root: Path) -> Course:
    backend = build(pair.loaded, root / pair.loaded.model, weight_decay=WEIGHT_DECAY)
    start = time.perf_counter()
    backend.load_state(state_directory(root, pair.saved))
    seconds = time.perf_counter() - start
    log_probs = _log_probs(backend, pair.loaded)
    stats = [_update(backend, pair.loaded) for _ in range(UPDATES_AFTER)]
    return Course(log_probs, stats, weights(backend), seconds, 0.0)


def _update(backend: TrainerBackend, case: Case) -> UpdateStats:
    return backend.update(_batches(backend, case), reference.loss, lr=reference.LR, temperature=reference.TEMPERATURE)


def _batches(backend: TrainerBackend, case: Case) -> list:
    share = (backend.layout.data_parallel_rank, backend.layout.data_parallel_size)
    return reference.micro_batches(reference.sequences(), case.micro_batches, *share)


def _log_probs(backend: TrainerBackend, case: Case) -> dict[str, torch.Tensor]:
    batches = _batches(backend, case)
    return {
        str(index): part
        for batch, found in zip(batches, backend.log_probs(batches, reference.TEMPERATURE), strict=True)
        for index, part in zip(batch.indices, found.log_probs.cpu().split(batch.lengths), strict=True)
    }


def _distance(gone_on: list[Course], resumed: list[Course]) -> Distance:
    pairs = list(zip(gone_on[0].stats, resumed[0].stats, strict=True))
    return Distance(
        log_probs=reference.largest_difference(_merged(gone_on), _merged(resumed))[0],
        loss=max(abs(a.loss - b.loss) for a, b in pairs),
        grad_norm=max(abs(b.grad_norm / a.grad_norm - 1) for a, b in pairs),
        weights=max(reference.largest_difference(gone_on[0].weights, course.weights)[0] for course in resumed),
        hold_seconds=max(course.seconds for course in gone_on),
        write_seconds=max(course.write_seconds for course in gone_on),
        load_seconds=max(course.seconds for course in resumed),
    )


def _merged(courses: list[Course]) -> dict[str, torch.Tensor]:
    return {index: part for course in courses for index, part in course.log_probs.items()}


def _start(name: str, jobs: list, work: Callable, ranks: list[int], root: Path) -> dict:
    """The courses of all ranks by job, from processes of their own."""
    processes = max(ranks)
    courses: dict = {}
    for first in range(0, len(jobs), JOBS_PER_PROCESS):
        some = slice(first, first + JOBS_PER_PROCESS)
        label = f"{name}-{first}"
        arguments = (processes, label, jobs[some], work, ranks[some], str(root))
        mp.start_processes(_process_main, arguments, nprocs=processes, start_method="spawn")
        parts = [torch.load(root / f"{label}-{process}.pt", weights_only=False) for process in range(processes)]
        courses |= {job: [part[job] for part in parts if job in part] for job in jobs[some]}
    return courses


def _process_main(
    process: int, processes: int, name: str, jobs: list, work: Callable, ranks: list[int], root: str
) -> None:
    """Take part in the jobs in turn. Those with few ranks go round the processes."""
    torch.set_num_threads(1)
    results = {}
    for number, (job, count) in enumerate(zip(jobs, ranks, strict=True)):
        rank = process - number % (processes // count) * count
        if not 0 <= rank < count:
            continue
        case = job.loaded if isinstance(job, Pair) else job
        enter_process_group(case, rank, process, f"file://{root}/rendezvous-{name}-{number}")
        results[job] = work(job, Path(root))
        leave_process_group()
    torch.save(results, f"{root}/{name}-{process}.pt")
