"""The training loop: one stage, from its first step or its last checkpoint to its weights."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import Preset
from training.data.datasets import Dataset
from training.distributed import Ranks
from training.errors import OutOfTime, TrainingError
from training.loop.clock import Clock
from training.loop.divergence import diverged, roll_back
from training.loop.run_log import RunLogger, scalars
from training.loop.start import new_state
from training.loop.state import load_position, save_weights
from training.loop.stream import Stream, steps_per_epoch
from training.loop.validator import Validator
from training.methods import StepContext, Terms
from training.methods.sharpness import perturbed


def train(
    preset: Preset,
    data: Dataset,
    folder: Path,
    *,
    init: Path | None,
    clock: Clock,
    device: torch.device,
    ranks: Ranks = Ranks(),
    tensorboard: bool = False,
) -> Path:
    """Train one stage in ``folder``, resuming its checkpoint if there is one, and return its weights file (EMA applied).

    At the clock's deadline the stage ends cleanly with the weights it has. Raises TrainingDiverged after too many rollbacks,
    and KeyboardInterrupt, with the state saved, when it was interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, saved = folder / "weights.safetensors", folder / "state.pt"
    if ranks.rank == 0:
        weights.unlink(missing_ok=True)  # a weights file always belongs to the final state
    state = new_state(preset, data, init, device, ranks)
    stream = Stream(preset, data, device, state.noise)
    model = DistributedDataParallel(state.model) if ranks.world > 1 else state.model
    method, parameters = preset.method, list(state.model.parameters())
    validator, data_saturation = Validator(preset, data, device), stream.saturation()
    if ranks.agree(load_position(saved).step > 0):  # at step 0 ``init`` decides: it may have been trained on since
        state.restore(saved)
    else:
        state.save(saved)  # there is always a good state to return to
    total = total_steps(preset, len(data.train))
    run_log = RunLogger(folder, preset, total, state.step, writes=ranks.rank == 0, tensorboard=tensorboard)
    since_save = time.monotonic()

    with clock.listening():
        over = ranks.any(clock.over())
        while state.step < total and not over:
            started = time.monotonic()
            progress = state.step / total
            for group in state.optimiser.param_groups:
                group["lr"] = state.lr_scale * preset.lr * learning_rate(progress, preset.lr_peak, preset.schedule)
            state.model.train(not preset.frozen_norm)
            context = StepContext(preset.threat, state.noise, progress)
            batch = method.solve(state.model, stream.batch(state.step), state.method_state, context)  # x_adv and x_neg
            terms = descend(model, lambda: method.loss(model, batch, state.method_state, context), preset, progress)  # noqa: B023
            gradient_norm = clipped(parameters, preset.gradient_clip)
            due = time.monotonic() - since_save > preset.save_seconds
            row, (over, due) = scalars(terms, gradient_norm, ranks, clock.over(), due)  # waits for the device
            if diverged(row, preset, data_saturation):  # of averages: on all ranks; before the step, so that weights stay finite
                roll_back(state, saved, run_log, row, preset.rollbacks)
                continue
            state.optimiser.step()
            state.step += 1
            state.update_ema(preset.ema)
            state.seconds += time.monotonic() - started
            if state.step % 20 == 0 or state.step == total:
                speed = preset.batch_size * state.step / state.seconds
                run_log.write({"step": state.step, "of": total, **row, "images_per_second": round(speed, 1)})
            if state.step % stream.steps_per_epoch == 0 or state.step == total:
                state.save(saved)  # validation takes a while
                figures, samples = validator.validate(state.ema)
                run_log.write({"step": state.step, **figures})
                run_log.write_samples(state.step, samples)
            if due:
                state.save(saved)
                since_save = time.monotonic()

        state.save(saved)
        interrupted = ranks.any(clock.interrupted)
    run_log.close()
    if interrupted:
        raise KeyboardInterrupt
    if state.step == 0:
        raise OutOfTime(f"the time ran out before {preset.name} began")
    if ranks.rank == 0:
        save_weights(state.ema, weights)
    ranks.wait()  # others start their next stage from this file
    return weights


def clipped(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Return the global norm of the gradients, which are then scaled to a norm of at most ``most``; 0: not scaled."""
    return torch.nn.utils.clip_grad_norm_(parameters, most or math.inf, foreach=True)


def descend(model: nn.Module, loss: Callable[[], Terms], preset: Preset, progress: float) -> Terms:
    """Compute the gradient of ``loss``, at perturbed weights where the preset asks for sharpness-aware steps, and return its terms."""
    if preset.sharpness is None or progress < preset.sharpness.after:
        for parameter in model.parameters():
            parameter.grad = None
        terms = loss()
        terms.loss.backward()  # type: ignore[no-untyped-call]
        return terms
    with perturbed(model, lambda: loss().loss.backward(), preset.sharpness):  # type: ignore[no-untyped-call]
        terms = loss()
        terms.loss.backward()  # type: ignore[no-untyped-call]
    return terms


def total_steps(preset: Preset, images: int) -> int:
    """Return the number of steps of the preset's epochs over so many images."""
    return math.ceil(preset.epochs * steps_per_epoch(preset, images))


def learning_rate(progress: float, peak: float, schedule: str) -> float:
    """Return the learning rate as a fraction of its maximum: linear up to ``peak``, then linear or cosine to zero, or constant."""
    if progress < peak:
        return progress / peak
    rest = (1 - progress) / (1 - peak)
    match schedule:
        case "linear":
            return rest
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * rest))
        case "constant":
            return 1.0
    raise TrainingError(f"schedule must be linear, cosine or constant, not {schedule!r}")
