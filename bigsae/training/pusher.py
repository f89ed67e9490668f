"""Pushing a folder of SAEs to the Hub while training goes on, by `bigsae.export` in a process of its own.

A process, not a thread: it takes no time from the trainer's interpreter, and one that hangs can be ended, so that a run
that is told to stop does not wait for the Hub. What it had uploaded is nothing to see before its commit.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from bigsae.config import HubConfig, TrainConfig
from bigsae.training.signals import StopSignal

logger = logging.getLogger("bigsae")

_LOG = "push.log"
_SECONDS_TO_END = 5.0
_SECONDS_BETWEEN_LOOKS = 0.2
# Of a launch, which the process is no rank of; and it needs no device.
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def open_pusher(config: TrainConfig) -> Pusher | None:
    """What pushes to --hub.repo-id, where that is given; the repository is made. Raises UserError where it cannot be.

    Where the Hub is away now it is left to the pushes.
    """
    hub = config.hub
    if hub.repo_id is None:
        return None
    # Opened when used: huggingface_hub's whole interface.
    from bigsae.hub.repository import HubDown, open_repository

    try:
        open_repository(hub.repo_id, hub.private, "--hub.repo-id")
    except HubDown as error:
        logger.warning("%s; training begins, and the SAEs are pushed when it is back", error)
    return Pusher(hub, Path(config.output_dir))


class Pusher:
    """At most one push at a time; that of a run's main rank."""

    def __init__(self, hub: HubConfig, out: Path):
        self.hub, self.out = hub, out
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0

    def start(self, folder: Path, step: int) -> None:
        """Push the SAEs in `folder`, as of `step`, and return at once; the folder must stay. None may be under way."""
        assert self._process is None
        environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / _LOG).open("wb") as log:
            self._process = subprocess.Popen(
                self._command(folder, f"step {step}"),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._step = step

    def _command(self, folder: Path, message: str) -> list[str]:
        assert self.hub.repo_id is not None
        command = [sys.executable, "-m", "bigsae.export", str(folder), "--push-to-hub", self.hub.repo_id]
        command += ["--license", self.hub.license, "--message", message]
        return [*command, "--private"] if self.hub.private else command

    def busy(self) -> bool:
        """Whether a push is under way; says how the last one ended, once."""
        if self._process is None or self._process.poll() is None:
            return self._process is not None
        self._end("the next push tries again")
        return False

    def push_last(self, folder: Path, step: int, stop: StopSignal) -> None:
        """Push the SAEs in `folder` and wait for it, until told to stop. One that is under way is given up for it."""
        self.stop()
        self.start(folder, step)
        assert self._process is not None
        while self._process.poll() is None and not stop.asked:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        again = "python -m bigsae.export " + shlex.join(self._command(folder, f"step {step}")[3:])
        if self._process.poll() is None:
            self.stop()
            logger.warning("told to stop before the SAEs were on the Hub; push them by: %s", again)
        else:
            self._end(f"push them by: {again}")

    def _end(self, advice: str) -> None:
        assert self._process is not None
        code, self._process = self._process.returncode, None
        lines = (self.out / _LOG).read_text(errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("error: ") if lines else f"exit status {code}"
        if code:
            logger.warning("the SAEs of step %d did not get to the Hub (%s); %s", self._step, said, advice)
        else:
            logger.info("pushed the SAEs of step %d: %s", self._step, said)

    def stop(self) -> None:
        """End a push that is under way."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
