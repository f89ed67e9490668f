"""Files of --config and --sweep, and sweeps on the command line."""

from __future__ import annotations

import json
from typing import Any

from tests.bad_input.cases import Case, call, train, written


def configured(message: str, text: str | bytes, name: str = "run.yaml", **more: Any) -> Case:
    """Training with a file of --config that holds `text`."""
    return call(
        "train",
        f"--config {{tmp}}/{name}",
        rf"--config {{tmp}}/{name}.*{message}",
        written(name, text),
        **more,
    )


def swept(message: str, text: str) -> Case:
    """Training with a file of --sweep that holds `text`."""
    return train(rf"--sweep.*{message}", written("grid.json", text), sweep="{tmp}/grid.json")


def grid(message: str, *sweep: str, **more: Any) -> Case:
    """Training with a sweep on the command line."""
    return train(message, sweep=sweep, **more)


CASES: dict[str, Case] = {
    "no file": call("train", "--config", r"--config needs a file: YAML, JSON"),
    "no such file": call(
        "train", "--config nowhere.json", r"--config nowhere\.json cannot be read: No such file"
    ),
    "a folder": call("train", "--config {home}", r"--config .* cannot be read: Is a directory"),
    "not text": configured("is not text in UTF-8: give a .yaml or .json file", b"\xff\xfe\x00"),
    "broken": configured("is not YAML: while parsing a flow mapping", "sae: {k: 8"),
    "tabs": configured("is not YAML: while scanning", "sae:\n\tk: 8\n"),
    "broken JSON": configured("is not JSON: Expecting property name", "{'seed': 1}", "run.json"),
    "deep JSON": configured("is not JSON: maximum recursion", "[" * 99_999, "run.json"),
    "an integer of many digits": configured(
        "is not JSON: Exceeds the limit", '{"tokens": ' + "9" * 5000 + "}", "run.json"
    ),
    "a large float": configured(
        "optim: lr: 1000.* is larger than any float", '{"optim": {"lr": 1' + "0" * 400 + "}}", "run.json"
    ),
    "an option twice": configured("'seed' stands in it twice", "seed: 1\nseed: 2\n"),
    "a list": configured("expected options and their values, found", "- model\n"),
    "a near name": configured("sae: unknown option 'kaux': the nearest is 'k_aux'", "sae: {kaux: 8}"),
    "a flag's name": configured("unknown option 'sae.k': write 'k' under 'sae'", "sae.k: 8"),
    "another group": configured("unknown option 'lr': 'lr' belongs under 'optim'", "lr: 1e-4"),
    "a long name": configured("unknown option 'xxx", "x" * 900 + ": 1\n"),
    "a word for a number": configured("tokens: expected int, found 'many'", "tokens: many"),
    "a number for a list": configured("hookpoints: expected a list, found 6", "hookpoints: 6"),
    "no such choice": configured("architecture: 'relu' is none of topk", "sae: {architecture: relu}"),
    "code": configured(
        "is not YAML: could not determine a constructor", "model: !!python/object/apply:os.getcwd []"
    ),
    "an integer of nothing": configured("is not YAML", 'seed: !!int ""'),
    "a date that is none": configured("is not YAML", "seed: !!timestamp x"),
    "a truth that is none": configured("is not YAML", "resume: !!bool x"),
    "a bomb": configured(
        "seed: expected int, found", "sweep: &a [x,x,x,x]\nbuffer: &b [*a,*a,*a,*a]\nseed: [*b,*b]\n"
    ),
    "a value beyond all": train(
        r"--sae\.l1-coefficient inf is beyond all",
        written("a.json", json.dumps({"sae": {"architecture": "standard", "l1_coefficient": float("inf")}})),
        config="{tmp}/a.json",
        sae__k=None,
    ),
    "a rate that is no number": train(
        r"--optim\.lr nan must be greater than 0",
        written("a.json", json.dumps({"optim": {"lr": float("nan")}})),
        config="{tmp}/a.json",
    ),
    "sweep: no such file": train(
        r"--sweep .*nowhere\.json cannot be read \(No such file.*give a \.json file, or options",
        sweep="{home}/nowhere.json",
    ),
    "sweep: not JSON": swept(r"grid\.json is not JSON .*give a \.json file, or options like", "sae.k: 8"),
    "sweep: deep": swept(r"grid\.json is not JSON", "[" * 99_999),
    "sweep: a number": swept(r"grid\.json: give an object of lists", "3"),
    "sweep: an empty list": swept(r"grid\.json: give an object of lists", "[]"),
    "sweep: a list of numbers": swept(r"\[1, 2\]: give an object of lists", "[1, 2]"),
    "sweep: no values": swept(r"sae\.k has no values: give some, or leave it out", '{"sae.k": []}'),
    "sweep: a wrong value": swept(r"k: expected int, found 'many'", '{"sae.k": ["many"]}'),
    "sweep: too long a list": swept(
        r"lists 5000 SAEs, at most 4096 can be", json.dumps([{"seed": i} for i in range(5000)])
    ),
    "sweep: no option": grid(r"--sweep =3: write options with their values, like sae\.k", "=3", "seed=1"),
    "sweep: no such option": grid(r"--sweep sae\.kk=3: sweep options of --sae and --optim", "sae.kk=3"),
    "sweep: not of the SAE": grid(r"--sweep tokens=3: sweep options of --sae and --optim", "tokens=3"),
    "sweep: twice": grid(r"--sweep .*each option once, with all its values", "sae.k=2", "sae.k=4"),
    "sweep: one value twice": grid(r"--sweep names k_2 twice: leave one out", "sae.k=2,2"),
    "sweep: beyond d_sae": grid(r"--sae\.k 65 exceeds d_sae 64", "sae.k=2,65"),
    "sweep: one that does not go together": grid(
        r"--optim\.lr -1\.0 must be greater than 0 \(--sweep: lr_-1\.0\)", "optim.lr=-1.0"
    ),
    "sweep: a seed that is none": grid(r"--sweep seed=True: sweep options", "seed=true"),
    "sweep: updates": grid(
        r"--sweep optim\.accumulation_steps: it decides the number of steps", "optim.accumulation_steps=2"
    ),
    "sweep: too many": grid(
        r"--sweep makes 10000 SAEs on each hookpoint, at most 4096 can be: give fewer",
        *(
            f"{name}={','.join(map(str, range(1, 11)))}"
            for name in ("sae.k", "sae.d_sae", "seed", "sae.slab_mb")
        ),
    ),
    "sweep: too long a name": grid(
        r"--sweep .*too long for the name of a folder", "sae.init_from=" + "x" * 300
    ),
}
