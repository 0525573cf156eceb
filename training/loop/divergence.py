"""Detection of divergence, and the rollback to the last checkpoint."""

import math
from pathlib import Path

from training.config import Preset
from training.errors import TrainingDiverged
from training.loop.run_log import Row, RunLogger
from training.loop.state import State, previous


def diverged(row: Row, preset: Preset, data_saturation: float) -> bool:
    """Return whether a value is not finite, the energy gap left its limit, or the chains sit on the box more than data do."""
    return (
        not all(math.isfinite(value) for value in row.values())
        or abs(row.get("energy_gap_neg", 0.0)) > preset.energy_gap_limit
        or row.get("saturation", 0.0) - data_saturation > preset.saturation_limit
    )


def roll_back(state: State, saved: Path, run_log: RunLogger, row: Row, most: int) -> None:
    """Restore the last checkpoint with another random stream and half the learning rate, and count the rollback.

    Raises TrainingDiverged when that happened ``most`` times before, or nothing was saved yet.
    """
    rollbacks = state.rollbacks + 1
    run_log.write({"step": state.step, "diverged": rollbacks, **row})
    if rollbacks > most or not saved.is_file():
        raise TrainingDiverged(f"diverged {rollbacks} times, last at step {state.step}: {row}; lower lr or w1, or raise energy_penalty")
    # a state that was already on its way out when it was saved sends the run back once more, to the one before
    before = previous(saved)
    state.restore(before if state.fell_back and before.is_file() else saved)
    state.noise.ranks.wait()
    state.fell_back = True
    state.rollbacks = rollbacks
    state.lr_scale *= 0.5
    state.noise.generator.manual_seed(1000 * rollbacks + state.step)
    state.save(saved, keep=False)
