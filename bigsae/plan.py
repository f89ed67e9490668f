"""Plan a run before it starts: `python -m bigsae.plan --model … --hookpoints … --sae.d-sae … --gpus …`."""

from __future__ import annotations

import json
import sys

from bigsae.commands import parse_config, run_command
from bigsae.planning.options import PlanConfig


def main() -> None:
    """Parse the command line and print the plan."""
    config = parse_config(PlanConfig, "bigsae.plan", sys.argv[1:])
    # After parsing, so that --help is quick.
    from bigsae.planning.model import lm_facts, with_chosen_rows
    from bigsae.planning.recommend import check_plan, recommend, remedies
    from bigsae.planning.report import as_numbers, as_text

    check_plan(config)
    facts = lm_facts(config)
    config = with_chosen_rows(config, facts)
    plan = recommend(config, facts)
    fixes = [] if plan.fits else remedies(config, facts)
    numbers = as_numbers(config, facts, plan, fixes)
    print(json.dumps(numbers, indent=2) if config.json else as_text(config, numbers))


if __name__ == "__main__":
    run_command(main)
