"""The run's folder: its configuration, its status, and whether a command may use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bigsae.config import TrainConfig, UserError
from bigsae.configfile import flat, read_config, to_dict
from bigsae.hub.files import write_json
from bigsae.training.checkpoint import checkpoints

# What a resumed run may change: nothing here changes what is computed.
_MAY_CHANGE = {
    "output_dir",
    "resume",
    "log_every",
    "log_with",
    "lm.shard_size",
    "lm.replicate_size",
    "buffer.device",
    "activations",  # the cache may have moved; its content is compared with the checkpoint's
    "timeout",
    "max_hours",
    "on_nonfinite",
    "check_replicas_every",
}
_MAY_CHANGE_UNDER = {"checkpoint", "hub", "wandb", "eval", "mesh"}


def check_folder(config: TrainConfig) -> None:
    """Refuse an output folder that holds a run which this command neither is nor continues. Raises UserError."""
    written = Path(config.output_dir) / "config.json"
    if not written.exists():
        return
    if not config.resume:
        raise UserError(
            f"--output-dir {config.output_dir} already holds a run: go on with --resume, or give another folder"
        )
    saved = _saved(config)
    if saved is None:
        return  # it failed before its first checkpoint: this command starts it afresh, perhaps mended
    before, now = flat(to_dict(saved)), flat(to_dict(config))
    for name, value in now.items():
        if before[name] != value and name not in _MAY_CHANGE and name.split(".")[0] not in _MAY_CHANGE_UNDER:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"--resume: {flag} is {value!r}, the run in {config.output_dir} has {before[name]!r}: "
                f"give the same {flag}, or another --output-dir"
            )


def with_saved_rows(config: TrainConfig) -> TrainConfig:
    """`config` with the rows of a forward that the run has which it resumes, where it says none. Raises UserError."""
    if config.lm.micro_batch_rows is not None or not config.resume:
        return config
    saved = _saved(config)
    rows = None if saved is None else saved.lm.micro_batch_rows
    return replace(config, lm=replace(config.lm, micro_batch_rows=rows))


def _saved(config: TrainConfig) -> TrainConfig | None:
    """The configuration of the run in the output folder, if it has a checkpoint. Raises UserError."""
    written = Path(config.output_dir) / "config.json"
    if not written.exists() or not checkpoints(Path(config.output_dir) / "checkpoints"):
        return None
    try:
        return read_config(written)
    except UserError as error:
        raise UserError(f"--output-dir: {error}; or give another folder") from None


def write_config(config: TrainConfig) -> None:
    """Write the run's configuration to its folder, where `--config` reads it back."""
    write_json(Path(config.output_dir) / "config.json", to_dict(config))


def write_status(
    config: TrainConfig, status: str, step: int, reason: str, left_out: dict[str, int] | None = None
) -> None:
    """Write status.json: running, finished, preempted or failed, at which step, and why.

    `left_out`: how much of the data came into no row, by name, where that is known.
    """
    tokens = step * config.batch_size_tokens
    values = {"status": status, "reason": reason, "step": step, "tokens": tokens, **(left_out or {})}
    write_json(Path(config.output_dir) / "status.json", values)
