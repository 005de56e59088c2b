"""A training process in which something goes wrong, as FAULTS says: JSON, a list of objects.

    {"do": "signal", "step": 3, "rank": 1, "number": 15}          this process gets a signal as step 3 begins
    {"do": "signal", ..., "to": "launcher"}                       the launcher gets it
    {"do": "kill", "step": 3, "rank": 1, "where": "step"}         kill -9; also "computing", "save", "saved"
    {"do": "kill", "where": "loading", "restart": 0}              before it has read or written anything
    {"do": "kill", "where": "sharing", "rank": 0}                 as it gives the others its parameters
    {"do": "kill", "where": "end", "rank": 0}                     when it has trained
    {"do": "kill", "where": "adapter", "rank": 0}                 while it writes the adapter
    {"do": "kill", ..., "where": "part"}                          in its own part of a sharded checkpoint
    {"do": "held", "step": 2, "rank": 1}                          that part waits until two steps later
    {"do": "later", "step": 3, ..., "number": 9, "seconds": 0.2}  a signal so long after step 3 began
    {"do": "late", "rank": 0, "seconds": 2}                       comes to the others so much later
    {"do": "slow_start", "rank": 1}                               two seconds late as training begins
    {"do": "early", "rank": 0, "to": "launcher", "number": 15}    a signal before anything is read or written
    {"do": "loaded", "rank": 1, "number": 15}                     a signal before the model is loaded
    {"do": "slow", "step": 4, "rank": 0}                          the save of step 4 takes two seconds
    {"do": "memory", "step": 3, "rank": 1, "most": 2}             no memory for more than 2 documents at once
    {"do": "memory", ..., "tokens": 200}                          nor for more tokens
    {"do": "memory", ..., "beside": "optimizer"}                  nor beside the optimizer's state
    {"do": "hog", "step": 3, "rank": 1, "leave_gib": 4}           all but so much of the GPU's memory is taken
    {"do": "nan", "step": 3, "rank": 0}                           the loss is not a number; also "gradient"
    {"do": "poison", "word": "xyzzy"}                             so it is of what holds this word
    {"do": "odd", "step": 3, "rank": 1}                           a trained number is not what the others have
    {"do": "disk", "step": 4, "bytes": 100000}                    no file can be larger while step 4 is saved
    {"do": "full", "bytes": 100000, "times": 1}                   so often while the adapter is written
    {"do": "room", "bytes": 1000000}                              so much is free on the disk before the run
    {"do": "patience", "seconds": 0.2}                            before a run with no checkpoint tries again
    {"do": "hang", "step": 3, "rank": 1}                          sleeps; "stopped": by SIGSTOP
    {"do": "write_hangs", "step": 4}                              no answer from the disk, saving step 4

`faulty_proofs` has more faults, which show in what a run proves. Steps count from 1, as users see them;
"save" on a process that writes nothing is while another one does. With "restart": only in that attempt of
torchrun's. If PLACES names a folder, each process writes there where it is, in a file named by its rank: its
process id, its step, and what it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from falcon_qlora.checkpoint import checkpointer, content, insist
from falcon_qlora.checkpoint.checkpointer import Checkpointer
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.processes import ranks, stop_signals
from falcon_qlora.processes.watchdog import WRITER, Watchdog
from falcon_qlora.step import loss as step_module
from falcon_qlora.step.global_batch import Step
from falcon_qlora.step.reduction import Reduction
from falcon_qlora.train import main
from falcon_qlora.training import build, finish
from falcon_qlora.training.trainer import FalconTrainer
from tests.integration import faulty_proofs

FAULTS = json.loads(os.environ.get("FAULTS", "[]"))
now = 0
hogs: list[torch.Tensor] = []
steps: list[Step] = []


def faults(do: str, at: int | None = None, **more: Any) -> list[dict[str, Any]]:
    """The faults of this kind that fall on this process now, or at a step that is being saved."""
    wanted = {"do": do, **more}
    step = now if at is None else at
    here, attempt = ranks.process_index(), ranks.restart_count()
    return [
        each
        for each in FAULTS
        if wanted.items() <= each.items()
        and each.get("step", step) == step
        and each.get("rank", here) == here
        and each.get("restart", attempt) == attempt
    ]


def target_of(fault: dict[str, Any]) -> int:
    """The process that gets a signal."""
    return os.getppid() if fault.get("to") == "launcher" else os.getpid()


def die() -> None:
    if file := os.environ.get("DIED"):  # made when a process dies
        Path(file).touch()
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


training_step = FalconTrainer.training_step


def faulty_training_step(self: Any, *arguments: Any, **named: Any) -> Any:
    global now
    now = self.state.global_step + 1
    steps[:] = [self.step]
    for fault in faults("later"):
        threading.Timer(fault["seconds"], os.kill, [target_of(fault), fault["number"]]).start()
    for fault in faults("signal"):
        os.kill(target_of(fault), fault["number"])
        time.sleep(fault.get("wait", 0.3))  # until the launcher has passed it on
    for fault in faults("hog"):
        torch.cuda.empty_cache()
        taken = torch.cuda.mem_get_info()[0] - int(fault["leave_gib"] * 2**30)
        hogs.append(torch.empty(taken, dtype=torch.uint8, device="cuda"))
    if faults("odd"):
        with torch.no_grad():
            next(p for p in self.model.parameters() if p.requires_grad).view(-1)[0] += 1e-3
    # Which of the saves that are under way is whole does not depend on this machine's speed.
    if faults("kill", where="step") or faults("kill", where="computing"):
        self.checkpointer.join()
    if faults("kill", where="step"):
        die()
    return training_step(self, *arguments, **named)


def dying(where: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, before which the process dies if it is to be killed there."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        if faults("kill", where=where):
            die()
        return function(*arguments, **named)

    return faulty


training_begins = stop_signals.training_begins


def faulty_training_begins(*arguments: Any) -> None:
    if faults("slow_start"):
        time.sleep(2)
    training_begins(*arguments)


def _holds_optimizer(step: Step) -> bool:
    """Whether the optimizer's state takes its memory, or something in its place does."""
    of_adapter = 8 * sum(each.numel() for each in step.reduction._parameters)  # AdamW's two in float32
    state = [value for each in step._optimizer.state.values() for value in each.values()]
    held = sum(each.nbytes for each in [step.room, *state] if isinstance(each, torch.Tensor))
    return held >= of_adapter


sum_of_losses = step_module.sum_of_losses


def faulty_sum_of_losses(model: Any, batch: Any) -> torch.Tensor:
    if faults("kill", where="computing"):
        die()
    if faults("hang"):
        time.sleep(3600)
    if faults("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    for fault in faults("memory"):
        if "beside" in fault and not _holds_optimizer(steps[-1]):
            continue
        if len(batch.lengths) > fault.get("most", 2**31) or sum(batch.lengths) > fault.get("tokens", 2**31):
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
    loss = sum_of_losses(model, batch)
    if faults("nan"):
        loss = loss * float("nan")
    for fault in faults("poison"):
        if fault["word"] in load_tokenizer("tiny").decode(batch.input_ids[0]):
            loss = loss * float("nan")
    if faults("gradient"):
        loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


write_manifest = content.write_manifest


def faulty_write_manifest(folder: Path, record: dict[str, Any], *arguments: Any) -> None:
    """Called in the middle of a save: the files are there, the manifest and the name are not."""
    if faults("kill", at=record["step"], where="save"):
        die()
    if faults("slow", at=record["step"]):
        time.sleep(2)
    write_manifest(folder, record, *arguments)


save_checkpoint = FalconTrainer._save_checkpoint


def faulty_save_checkpoint(self: Any, *arguments: Any) -> None:
    if not ranks.is_main_process() and faults("kill", where="save"):
        threading.Timer(1.0, die).start()
    save_checkpoint(self, *arguments)


@contextlib.contextmanager
def disk(do: str = "disk", at: int | None = None) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = [fault for fault in faults(do, at=at) if fault.setdefault("times", 1 << 30) > 0]
    for fault in found:
        fault["times"] -= 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], before[1]))
    try:
        yield
    finally:
        if found:  # the limit is of all threads
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


write_checkpoint = Checkpointer._write


def faulty_write(self: Any, wanted: Any) -> None:
    if faults("write_hangs", at=wanted.step):
        time.sleep(3600)
    with disk(at=wanted.step):
        write_checkpoint(self, wanted)
    if faults("kill", at=wanted.step, where="saved"):
        die()


write_part = checkpointer.write_part


def faulty_write_part(part: Any, folder: Path, **named: Any) -> Any:
    step = int(folder.name.removeprefix(".step-").removesuffix(".partial"))
    deadline = time.monotonic() + 60
    while faults("held", at=step) and now < step + 2:
        assert time.monotonic() < deadline, "training waits for the save"
        time.sleep(0.01)
    with disk(at=step):
        described = write_part(part, folder, **named)
    if faults("kill", at=step, where="part"):
        os.truncate(folder / next(iter(described)), 1000)
        die()
    return described


replaced_folder = finish.replaced_folder


@contextlib.contextmanager
def faulty_replaced_folder(target: Path) -> Iterator[Path]:
    for thread in threading.enumerate() if faults("full") else ():
        if thread.name == WRITER:  # whose files would be limited too
            thread.join()
    with disk("full"), replaced_folder(target) as folder:
        yield folder


at = Watchdog.at


def told_at(self: Watchdog, step: int, phase: int, what: str) -> None:
    at(self, step, phase, what)
    if folder := os.environ.get("PLACES"):
        part = Path(folder, f".{ranks.process_index()}")
        part.write_text(f"{os.getpid()} {step} {what}")
        part.rename(Path(folder, str(ranks.process_index())))


load = build.model_with_adapter


def faulty_load(*arguments: Any, **named: Any) -> Any:
    for fault in faults("loaded"):
        os.kill(target_of(fault), fault["number"])
        time.sleep(10)
    return load(*arguments, **named)


for patience in faults("patience"):
    insist.PATIENT_SECONDS = patience["seconds"]
if rooms := faults("room"):
    shutil.disk_usage = lambda path: SimpleNamespace(free=rooms[0]["bytes"])  # type: ignore[assignment,misc]

finish.require_moved = dying("end", finish.require_moved)
finish.check_tensors = dying("adapter", finish.check_tensors)
Reduction.share_parameters = dying("sharing", Reduction.share_parameters)  # type: ignore[method-assign]
stop_signals.training_begins = faulty_training_begins
FalconTrainer._save_checkpoint = faulty_save_checkpoint  # type: ignore[method-assign]
FalconTrainer.training_step = faulty_training_step  # type: ignore[method-assign]
step_module.sum_of_losses = faulty_sum_of_losses
content.write_manifest = faulty_write_manifest
Checkpointer._write = faulty_write  # type: ignore[method-assign]
checkpointer.write_part = faulty_write_part
build.model_with_adapter = faulty_load
Watchdog.at = told_at  # type: ignore[method-assign]
finish.replaced_folder = faulty_replaced_folder  # type: ignore[assignment]
faulty_proofs.install(faults)

if __name__ == "__main__":
    for each in faults("late"):
        time.sleep(each["seconds"])
    for each in faults("early"):
        os.kill(target_of(each), each["number"])
        time.sleep(2)
    if faults("kill", where="loading"):
        die()
    main()
