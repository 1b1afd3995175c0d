"""The loop around the step: loader -> step -> log -> save -> evaluate. It knows no family.

``step`` is the whole position of a run: order, masks, dropout and schedules are functions of it, so a checkpoint holds
no random state and no loader state, and 10 + 10 steps are 20 steps to the bit on the same layout.
"""

from __future__ import annotations

import copy
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from trivium.errors import TriviumError
from trivium.train import agreement, checkpoint, distributed, optim, precision, run_folder
from trivium.train.budget import OutOfMemory, calibrate, memory_dial_named
from trivium.train.checkpoint import Saving
from trivium.train.compilation import compile_blocks
from trivium.train.logs import Log
from trivium.train.memory import keep_freed
from trivium.train.mishaps import Replaced, StopSignals, lost_processes_told, not_finite
from trivium.train.monitors import Monitors
from trivium.train.precision import Precision
from trivium.train.protocol import Batch, Key, Stream
from trivium.train.run import Outcome, Run
from trivium.train.run_folder import RunFolder
from trivium.train.selection import Selection
from trivium.train.sharding import Sharded, Trained
from trivium.train.step import Context, StepResult, backward
from trivium.train.step import step as take_step


def train(run: Run, out: Path, *, resume: bool | Path = False) -> Outcome:
    """Train to the last step, or until Ctrl-C or SIGTERM; then everything is saved.

    Args:
        out: the run folder.
        resume: go on from the newest sound checkpoint; or from this one, which the caller has checked already.

    Raises:
        TriviumError: a run stands in `out` already, or none to resume, or another process is at work there; memory or
            disk are full; the gradient of a stream was not finite three times in a row; too many samples were bad; a
            data worker or another process was killed.
    """
    distributed.start()
    with run_folder.alone_in(out):
        return _train(run, out, resume)


def _train(run: Run, out: Path, resume: bool | Path) -> Outcome:
    settings = run.train
    folder, optimizer, autocast, state = begin(run, out, resume)
    trained = _trained(run, optimizer)
    first = int(state["step"])
    log = Log(
        folder.metrics,
        first=first,
        total=settings.steps,
        seconds_before=state["seconds"],
        quiet=distributed.rank() > 0,
        tensorboard=settings.tensorboard,
    )
    replaced = Replaced(folder.skipped, settings.bad_window, settings.bad_rate, state["bad_samples"])
    monitors = Monitors(
        folder.monitors,
        log.say,
        trained.method,
        seed=settings.seed,
        every=settings.monitor_every,
        first=first,
        warmup=optim.warmup_steps(run.optim, settings.steps),
        workers=settings.workers,
        autocast=autocast,
        flops=precision.ceiling(state["layout"]),
    )

    selection = Selection.of_log(folder.metrics, run.select or "", settings.patience if run.select else None)

    def save(done: int) -> None:
        waited = saving.finish()  # before the copy: there is never a second one in memory
        state.update(step=done, seconds=log.seconds(), bad_samples=replaced.counts)
        begun = time.perf_counter()
        taken = checkpoint.snapshot(done, run.method, optimizer, state)
        told = saving.held_up(waited, time.perf_counter() - begun)
        if told and done < settings.steps:
            log.say(told)
        saving.begin(partial(write, taken, selection.best_step))

    def write(taken: checkpoint.Snapshot, best: int | None) -> None:
        checkpoint.write(folder.checkpoints, taken, run.export)
        prune(taken.step, best)

    def prune(*spared: int | None) -> None:
        checkpoint.prune(folder.checkpoints, settings.keep_last, settings.keep_every, spared)

    def keep_best(best: int) -> None:
        saving.finish()
        prune(best)

    def measured(done: int) -> dict[str, Any] | None:
        trained.gather()
        results = distributed.first_process_does(partial(evaluate, run, stop))
        if results is not None:
            log.results(done, results)
            selection.note(done, results)
        return results

    training = replace(run, method=trained.method)
    with (
        lost_processes_told(),
        log,
        StopSignals() as stop,
        Saving() as saving,
        closing(_steps(run, first, settings.steps)) as steps,
    ):
        # A run that was stopped or killed while it evaluated does that again: its old lines are gone.
        results, stopping = None, False
        if settings.evaluates_after(first) if first else run.measures_start:
            results = measured(first)
            stopping = distributed.any_process(stop.received is not None)
        if stopping or distributed.any_process(selection.is_exhausted):
            steps.close()  # before a step: the run had ended early, or is to end now
        done = first
        refused: dict[str, list[int]] = {}  # stream -> its last steps in a row whose gradient was not finite
        clock = time.perf_counter()
        for step, stream, batches in steps:
            waited = time.perf_counter() - clock
            result = one_step(training, trained.optimizer, step, batches, autocast)
            done = step + 1
            lr = run.optim.lr * optim.learning_rate(run.optim, step, settings.steps)
            seconds = time.perf_counter() - clock
            log.step(done, stream.name, result, lr=lr, samples=stream.batch, seconds=seconds)
            monitors.note(done, stream, batches, result, seconds, waited)
            clock = time.perf_counter()
            replaced.note(done, batches)
            in_a_row = refused[stream.name] = [] if result.accepted else [*refused.get(stream.name, []), step]
            if len(in_a_row) == 3:
                tell = partial(not_finite, folder.not_finite, run.mixture, in_a_row)
                raise TriviumError(distributed.chosen_by_first(tell))

            stopping = distributed.any_process(stop.received is not None or saving.failed)
            if done % settings.log_every == 0:
                log.flush()
            saved = stopping or done == settings.steps or done % settings.save_every == 0
            if saved:
                log.flush()
                trained.gather()
                distributed.first_process_does(partial(save, done))  # raises what failed in the one before
                clock = time.perf_counter()
            if settings.evaluates_after(done) and not stopping:
                results = measured(done)
                stopping = distributed.any_process(stop.received is not None)
                given_up = distributed.any_process(selection.is_exhausted)
                best = distributed.any_process(selection.best_step == done)
                if (best or given_up or stopping) and not saved:
                    distributed.first_process_does(partial(save, done))
                elif best:  # saved before it was known: the one that was the best is needed no more
                    distributed.first_process_does(partial(keep_best, done))
                if given_up and done < settings.steps and not stopping:
                    log.say(f"stopped after step {done} of {settings.steps}: {selection}")
                    break
                clock = time.perf_counter()
            if stopping:
                break
        distributed.first_process_does(saving.finish)
        if stopping:
            log.say(f"saved after step {done} of {settings.steps}; to go on: {run_folder.to_resume(out)}")
            return Outcome(done, log.seconds(), stop.received or signal.SIGTERM, results)
    if distributed.rank() == 0:  # for whoever measures it next
        run.method.to(precision.choose_device(settings.device))
    return Outcome(done, log.seconds(), None, results)


def _steps(run: Run, first: int, stop: int, rank: int | None = None) -> Generator[tuple[int, Stream, list[Batch]]]:
    """(number, stream, micro-batches) of each step in [first, stop). rank: of the process; None: this one."""
    rank = distributed.rank() if rank is None else rank
    pinned = precision.choose_device(run.train.device).type == "cuda"
    loader = run.mixture.loader(first, rank, distributed.world(), stop, pinned)
    for step, batches in enumerate(loader, start=first):
        yield step, run.mixture.stream_at(step), batches


def one_step(
    run: Run, optimizer: torch.optim.Optimizer, step: int, batches: Sequence[Batch], autocast: Context
) -> StepResult:
    """Step number `step` (0 is the first) of a run, with the rate and the decay that belong to it."""
    stream = run.mixture.stream_at(step)
    optim.set_step(optimizer, run.optim, step, run.train.steps)
    with memory_dial_named(f"a step of stream {stream.name}", stream.micro_batch):
        return take_step(
            run.method,
            batches,
            Key(run.train.seed, stream.name, step),
            optimizer,
            clip=run.optim.clip,
            clip_norm=run.optim.clip_norm,
            autocast=autocast,
        )


def evaluate(run: Run, stop: StopSignals | None = None) -> dict[str, Any] | None:
    """What the recipe measures, in eval mode; the method is left as it was. None where a signal to `stop` came."""
    if run.evaluate is None:
        return None
    measure = partial(run.evaluate, run.method)
    training, home = run.method.training, next(run.method.parameters()).device
    try:
        run.method.to(precision.choose_device(run.train.device)).eval()
        with torch.no_grad():
            return measure() if stop is None else stop.unless_stopped(measure)
    finally:
        run.method.to(home).train(training)


def steps_in(run: Run, minutes: float) -> int:
    """Steps that this run would take in the minutes on this machine. Works on a copy: the run itself stays new."""
    run, optimizer, autocast = _trial(run)

    def one(step: int) -> None:
        one_step(run, optimizer, step, next(steps)[2], autocast)

    with closing(_steps(run, 0, 10**9)) as steps:
        return calibrate(one, lambda step: run.mixture.stream_at(step).name, minutes)


def try_streams(run: Run) -> None:
    """Two steps of each stream, on a copy: raises OutOfMemory where one of them does not fit (micro-batch "auto").

    The second finds what the first left: the optimizer's state, and a schedule that has begun, such as a teacher's.
    Each process takes the step alone, on the first one's micro-batches, and then all of them vote: one that ran out in
    the midst of a common step would leave the others waiting. The rows gathered from the others, a few megabytes, are
    not counted.
    """
    run, optimizer, autocast = _trial(run)
    drawn: dict[str, list[int]] = defaultdict(list)
    for step in range(min(run.train.steps, 1000)):
        drawn[run.mixture.stream_at(step).name].append(step)
    for step in [steps[0] for steps in drawn.values()] + [steps[1] for steps in drawn.values() if len(steps) > 1]:
        with closing(_steps(run, step, step + 1, rank=0)) as loaded:
            _, stream, batches = next(loaded)
        error = None
        try:
            with distributed.alone():
                one_step(run, optimizer, step, [_all_different(batch) for batch in batches], autocast)
        except OutOfMemory as raised:
            error = raised
        if distributed.any_process(error is not None):
            raise error or OutOfMemory(f"out of memory in a step of stream {stream.name} on another process")


def _all_different(batch: Batch) -> Batch:
    """With no picture that several rows share: such a one may be encoded once, and a later step have none."""
    images = [replace(each, same_B=torch.arange(len(each.same_B))) for each in batch.images]
    return replace(batch, images=tuple(images))


def _trial(run: Run) -> tuple[Run, torch.optim.Optimizer, Context]:
    """A copy of the run on its device, to be thrown away."""
    distributed.start()
    device = precision.choose_device(run.train.device)
    if run.train.threads is not None:
        torch.set_num_threads(run.train.threads)
    method, blocks = copy.deepcopy((run.method, [] if run.blocks is None else list(run.blocks())))
    run = replace(run, method=method.to(_home(run, device)), blocks=lambda: blocks)
    if run.train.compile:
        compile_blocks(blocks)
    autocast = partial(precision.autocast, device, _common_precision(run, device))
    trained = _trained(run, optim.build(run.method, run.optim))
    return replace(run, method=trained.method), trained.optimizer, autocast


def _home(run: Run, device: torch.device) -> torch.device:
    """Where the whole method lives: in main memory, where devices train parts of it."""
    return torch.device("cpu") if run.train.in_parts else device


def _trained(run: Run, optimizer: torch.optim.Optimizer) -> Trained:
    if not run.train.in_parts:
        return Trained(run.method, optimizer)
    blocks = [] if run.blocks is None else list(run.blocks())
    return Sharded(run.method, optimizer, run.optim, blocks, precision.choose_device(run.train.device))


# ---------------------------------------------------------------------------------------- beginning and resuming


def begin(run: Run, out: Path, resume: bool | Path) -> tuple[RunFolder, torch.optim.Optimizer, Context, dict[str, Any]]:
    """Make the run folder or reopen it, and put method and optimizer where the run stands.

    Returns: folder, optimizer, the context of forwards, and what the next checkpoint's state.json will say.
    """
    settings = run.train
    distributed.start()
    say: Callable[[str], None] = print if distributed.rank() == 0 else lambda sentence: None
    device = precision.choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if device.type == "cpu":
        keep_freed()
    data = agreement.facts_of(_streams(run).values())
    agreement.refuse_other_processes(run.config, data)
    run.mixture.loader(0, distributed.rank(), distributed.world(), 0)  # refuses processes that cannot share a batch
    run.method.to(_home(run, device))
    optimizer = optim.build(run.method, run.optim)
    distributed.first_process_does(lambda: (run_folder.reopen if resume else run_folder.create)(out, run.config))
    folder = RunFolder(out)

    step, seconds, layout = 0, 0.0, _layout(run, device)
    bad_samples: dict[str, int] = {}
    found = resume if isinstance(resume, Path) else _checkpoint_to_resume(folder, say) if resume else None
    if found is not None:
        saved = checkpoint.restore(found, run.method, optimizer)
        agreement.refuse_other_data(data, saved.get("data", {}), out)
        step, seconds = int(saved["step"]), float(saved["seconds"])
        bad_samples = saved.get("bad_samples", {})  # checkpoints of older versions hold none
        layout = _settled_layout(layout, saved["layout"], settings.precision, say)
        say(f"resuming after step {step} of {settings.steps}")
    distributed.refuse_differences({"the step to begin at": step}, "put the run folder where all see the same files")

    def rewind() -> None:
        checkpoint.set_aside_after(folder.checkpoints, step)
        run_folder.rewind(folder, step)

    if resume:
        distributed.first_process_does(rewind)
    if settings.compile and run.blocks is not None:
        compile_blocks(run.blocks())
    state = {
        "step": step,
        "seconds": seconds,
        "seed": settings.seed,
        "config_sha256": run.config.digest(),
        "versions": run_folder.versions(),
        "layout": layout,
        "data": data,
        "bad_samples": bad_samples,
    }
    return folder, optimizer, partial(precision.autocast, device, layout["precision"]), state


def _checkpoint_to_resume(folder: RunFolder, say: Callable[[str], None]) -> Path | None:
    """The newest sound checkpoint; None where the run ended before its first."""
    found = run_folder.newest_sound(folder.path, say)
    if found is None:
        say(f"{folder.path} holds no checkpoint yet: beginning at step 0")
    return found


def _streams(run: Run) -> dict[str, Stream]:
    drawn = (run.mixture.stream_at(step) for step in range(min(run.train.steps, 1000)))
    return {stream.name: stream for stream in drawn}


def _layout(run: Run, device: torch.device) -> dict[str, Any]:
    """What the last bit of the weights depends on, besides the recipe."""
    return {
        "processes": distributed.world(),
        "micro_batch": {name: stream.micro_batch for name, stream in _streams(run).items()},
        "sharded": run.train.in_parts,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "precision": _common_precision(run, device),
    }


def _common_precision(run: Run, device: torch.device) -> Literal["fp32", "bf16"]:
    """Every process measures for itself, and all of them take bfloat16 only where none found it the slower."""
    found = precision.choose(run.train.precision, device)
    if distributed.any_process(found == "fp32"):
        return "fp32"
    if run.train.precision == "auto" and device.type == "cpu":
        with distributed.alone():
            found = _precision_of_a_step(run)
    return "fp32" if distributed.any_process(found == "fp32") else "bf16"


def _precision_of_a_step(run: Run) -> Literal["fp32", "bf16"]:
    """The faster one for a micro-batch of the stream that is drawn most often. Works on a copy of the method."""
    names = [run.mixture.stream_at(step).name for step in range(min(run.train.steps, 100))]
    at = names.index(max(names, key=names.count))
    method, key = copy.deepcopy(run.method).cpu().train(), Key(run.train.seed, names[at], at)
    with closing(_steps(run, at, at + 1)) as steps:
        batches = next(steps)[2][:1]
    return precision.faster(
        lambda kind: backward(method, batches, key, partial(precision.autocast, torch.device("cpu"), kind))
    )


def _settled_layout(
    now: dict[str, Any], saved: dict[str, Any], asked: Precision, say: Callable[[str], None]
) -> dict[str, Any]:
    """A precision that was measured once stays for the run; any other difference is said aloud."""
    if asked == "auto" and now["device"] == saved["device"]:
        now = {**now, "precision": saved["precision"]}
    changed = [f"{name} {saved.get(name)} before, {now[name]} now" for name in now if now[name] != saved.get(name)]
    if changed:
        say(f"the last bits may differ from a run that was never stopped: {'; '.join(changed)}")
    return now
