"""What a report shows, and what it is made from."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from bigsae.config import UserError


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML file about one run or several: curves, distributions, costs, and a browser of latents.

    The file needs no network and no server. Runs may still be going on.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders that training wrote."""
    output: str | None = None
    """File to write. Default: report.html in the folder of the first run."""
    latents: tuple[int, ...] = ()
    """Latents to show, of each SAE. Default: --num-latents random ones."""
    num_latents: int = 40
    """Random latents to show, of each SAE, among those that fired in training."""
    contexts: bool = True
    """Run the language model for the texts on which latents fire and for the tokens that they promote."""
    num_rows: int = 256
    """Token rows (of the run's ctx-len) in which contexts are looked for, from the beginning of the dataset's order."""
    num_contexts: int = 8
    """Rows shown for each latent where it fires most; half as many more from the rest of the rows where it fires."""
    context_tokens: int = 40
    """Tokens of a context."""
    model: str | None = None
    """Hub id or folder of the language model. Default: the run's."""
    dataset: str | None = None
    """Hub id or local path of the text. Default: the run's."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository carries, whatever the run did."""
    device: str | None = None
    """Where language model and SAEs run, e.g. cpu or cuda:1. Default: the accelerator where there is one."""
    seed: int = 0
    """Decides which latents are shown."""


def check_report(options: ReportConfig) -> None:
    """Find what is wrong with the values alone. Raises UserError."""
    if not options.runs:
        raise UserError("report: name the folder of a run, e.g. runs/smol")
    for flag, value, least in (
        ("--num-latents", options.num_latents, 0),
        ("--num-rows", options.num_rows, 1),
        ("--num-contexts", options.num_contexts, 1),
        ("--context-tokens", options.context_tokens, 1),
        ("--latents", min(options.latents, default=0), 0),
    ):
        if value < least:
            raise UserError(f"{flag} {value}: give {least} or more")
