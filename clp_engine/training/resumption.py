"""What a trainer's checkpoint holds beside transformers' own: where the weightings' draws are, the rewards' statistics.

`clp_trainer_state.json` beside transformers' trainer_state.json, one for each process as its rng_state files.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from clp_engine.checkpoint.strict_json import decode, read_object
from clp_engine.training.reward_statistics import RewardStatistics
from clp_engine.training.weighting_sampler import SamplerState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumedState:
    """What a resumed run takes over: with it, on the CPU, it is the uninterrupted run bit for bit."""

    weighting_sampler: SamplerState
    reward_statistics: RewardStatistics

    def write(self, folder: Path, args: TrainingArguments) -> None:
        """Write this process's file to a checkpoint's folder."""
        _file(folder, args).write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path, rewards: list[str], args: TrainingArguments) -> ResumedState | None:
        """This process's state; None, with a warning, where the checkpoint has none.

        Raises:
            ValueError: the file is damaged, or of other rewards.
        """
        path = _file(folder, args)
        if not path.is_file():
            logger.warning(
                "%s is missing: the weightings are drawn from the start again, so this run is not the continued one "
                "step for step (another number of processes, or a checkpoint of an earlier release)",
                path,
            )
            return None
        state: ResumedState = decode(read_object(path), cls, str(path))
        if state.reward_statistics.names != rewards:
            raise ValueError(f"{path} is of a run on {state.reward_statistics.names}, this one's rewards are {rewards}")
        return state


def _file(folder: Path, args: TrainingArguments) -> Path:
    process = f"_{args.process_index}" if args.world_size > 1 else ""
    return folder / f"clp_trainer_state{process}.json"
