"""Where metrics go beside metrics.jsonl: Accelerate's trackers. A resumed run goes on in the tracker's same run."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import ProjectConfiguration

from bigsae.config import TrainConfig
from bigsae.configfile import flat, to_dict
from bigsae.hub.files import write_json
from bigsae.hub.secrets import without_secrets
from bigsae.lm.kwargs import without_hub_kwargs
from bigsae.parallel.launch import join_launch

_IDENTITY = "trackers.json"


class Trackers:
    """The trackers of `--log-with` and `--wandb.project`; there may be none. All ranks have it, the main one logs."""

    def __init__(self, config: TrainConfig):
        """Raises UserError where a tracker's package is not installed."""
        self.config = config
        implied = ("wandb",) if config.wandb.project is not None else ()
        self.names: tuple[str, ...] = tuple(dict.fromkeys((*config.log_with, *implied)))
        self.out = Path(config.output_dir)
        self.accelerator = join_launch(
            config.timeout,
            trackers=self.names,
            project_config=ProjectConfiguration(logging_dir=str(self.out / "tensorboard")),
        )

    @property
    def takes_saes(self) -> bool:
        """Whether SAEs are to be logged as well; the same on every rank."""
        return "wandb" in self.names and self.config.wandb.artifacts

    def start(self, config: TrainConfig, resumed_step: int | None) -> None:
        """Begin, or go on after `resumed_step`. `config`: what the run came to, its sources known."""
        self.config = config
        if not self.names or not self.accelerator.is_main_process:
            return
        resumes, wandb = resumed_step is not None, self.config.wandb
        identity = self._identity(resumes)
        arguments: dict[str, dict[str, Any]] = {
            "wandb": {"name": wandb.name, "entity": wandb.entity, "dir": str(self.out), "id": identity},
            "trackio": {"name": f"{wandb.name or self.out.resolve().name}-{identity}"},
            "tensorboard": {},
        }
        if resumed_step is not None:
            arguments["wandb"]["resume"] = arguments["trackio"]["resume"] = "allow"
            # Later steps are written anew, and not to be shown twice.
            arguments["tensorboard"]["purge_step"] = resumed_step + 1
            # A file's name is the second it was made in and the host: the same second's would be written over.
            arguments["tensorboard"]["filename_suffix"] = f".resumed-{resumed_step}"
        self.accelerator.init_trackers(wandb.project or "bigsae", init_kwargs=arguments)
        values = without_secrets(to_dict(replace(config, lm=without_hub_kwargs(config.lm))))
        for tracker in self.accelerator.trackers:
            if tracker.name != "tensorboard":
                tracker.store_init_configuration(values)
            elif not resumes:
                # It takes numbers and text, in one dictionary.
                taken = (bool, int, float, str)
                plain = {n: v if isinstance(v, taken) else str(v) for n, v in flat(values).items()}
                tracker.store_init_configuration(plain)

    def _identity(self, resumes: bool) -> str:
        """The name of this run among others, kept in its folder."""
        path = self.out / _IDENTITY
        if resumes and path.exists():
            return json.loads(path.read_text())["id"]
        identity = secrets.token_hex(4)
        write_json(path, {"id": identity})
        return identity

    def log(self, values: dict[str, float], step: int) -> None:
        """Log `values`."""
        self.accelerator.log(values, step=step)

    def log_saes(self, folder: Path, step: int) -> None:
        """Log what `folder` holds as the newest version of the run's artifact; it may be removed afterwards."""
        run: Any = self.accelerator.get_tracker("wandb", unwrap=True)
        run.log_artifact(str(folder), name=f"saes-{run.id}", type="model", aliases=["latest", f"step_{step}"])

    def finish(self) -> None:
        """End all trackers' runs."""
        for tracker in self.accelerator.trackers:
            # Not end_training(): a script may train again in the same process group.
            tracker.finish()
