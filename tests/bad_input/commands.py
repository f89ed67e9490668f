"""Command lines of everything but training."""

from __future__ import annotations

from typing import Any

from tests.bad_input.cases import Case, call, copied, holding, written

LAYER = "--hookpoints model.layers.1"


def plan(more: str, message: str, **others: Any) -> Case:
    return call("plan", f"--model {{home}}/lm {LAYER} {more}", message, **others)


def measure(more: str, message: str, **others: Any) -> Case:
    return call("evaluate", f"--saes {{home}}/run {more}", message, **others)


def report(more: str, message: str, **others: Any) -> Case:
    return call("report", f"{{home}}/run --output {{tmp}}/r.html {more}", message, **others)


def cache(more: str, message: str, **others: Any) -> Case:
    common = (
        f"--model {{home}}/lm --dataset {{home}}/corpus.jsonl {LAYER} --output-dir {{tmp}}/out --tokens 99"
    )
    return call("cache_activations", f"{common} {more}", message, **others)


def tokenise(more: str, message: str, **others: Any) -> Case:
    common = "--model {home}/lm --dataset {home}/corpus.jsonl --output-dir {tmp}/out --ctx-len 16"
    return call("pretokenize", f"{common} {more}", message, **others)


CASES: dict[str, Case] = {
    "plan: no model": call("plan", LAYER, r"--model", boxed=True),
    "plan: no such model": call(
        "plan", f"--model {{home}}/nowhere {LAYER}", r"--model .*nowhere cannot be opened"
    ),
    "plan: no such layer": plan("--hookpoints model.layers.9", r"--hookpoints model\.layers\.9"),
    "plan: no GPUs": plan("--gpus 0", r"--gpus 0 must be greater than 0"),
    "plan: part of a node": plan(
        "--gpus 12 --batch-size-tokens 4800", r"--gpus 12 makes no whole nodes .*set it to a"
    ),
    "plan: no memory": plan("--memory-gib 0", r"--memory-gib 0\.0 must be greater than 0"),
    "plan: a GPU that is none": plan("--gpu v100", r"--gpu", boxed=True),
    "plan: k beyond d_sae": plan(
        "--sae.k 65 --sae.d-sae 64", r"--sae\.k 65 exceeds d_sae 64: raise --sae\.d-sae"
    ),
    "plan: latents that do not divide": plan(
        "--gpus 8 --mesh.latent 3", r"--mesh\.latent 3 does not divide the 8"
    ),
    "plan: no variants": plan("--variants 0", r"--variants 0 must be greater than 0"),
    "plan: a seed of a run": plan("--seed 1", r"--seed", boxed=True),
    "evaluate: no SAE": call("evaluate", "", r"--saes", boxed=True),
    "evaluate: an empty list": call("evaluate", "--saes", r"--saes", boxed=False),
    "evaluate: one twice": measure(
        "{home}/run", r"--saes names .*model\.layers\.1 twice: leave one of them out"
    ),
    "evaluate: no rows": measure("--rows 0", r"--rows 0 must be greater than 0"),
    "evaluate: no tokens": measure("--ctx-len 1", r"--ctx-len 1 must be at least 2"),
    "evaluate: two hookpoints for one": measure(
        "--hookpoints a b", r"--hookpoints names 2 hookpoints for 1 SAEs"
    ),
    "evaluate: no such hookpoint": measure("--hookpoints model.layers.9", r"--hookpoints model\.layers\.9"),
    "evaluate: data without dataset": measure(
        "--data.split test", r"--data\.… does nothing without --dataset: set it"
    ),
    "evaluate: a seed without dataset": measure("--seed 1", r"--seed does nothing without --dataset: set it"),
    "evaluate: nothing to splice": measure(
        "--no-ce --ablate-everywhere", r"--ablate-everywhere .* --no-ce: leave one"
    ),
    "evaluate: no text": call(
        "evaluate", "--saes {home}/saes/saelens", r"--dataset: .* name the text to measure on"
    ),
    "evaluate: an endless wait": measure("--timeout 1e300", r"--timeout 1e\+300 must be .*at most"),
    "evaluate: no such dataset": measure(
        "--dataset {home}/nowhere.txt", r"--dataset .*nowhere\.txt: there is no such"
    ),
    "evaluate: a name without a project": measure(
        "--wandb.name x", r"--wandb\.name .* without --wandb\.project: set"
    ),
    "report: no run": call("report", "", r"RUNS|runs", boxed=True),
    "report: no such run": call(
        "report", "{home}/nowhere", r"nowhere: no config\.json of a run there: name a folder"
    ),
    "report: one twice": call("report", "{home}/run {home}/run", r"named twice, leave one out"),
    "report: no such latent": report("--latents 64", r"--latents 64: .* has latents 0 to 63"),
    "report: a negative latent": report("--latents -1", r"--latents -1: give 0 or more"),
    "report: no contexts": report("--num-contexts 0", r"--num-contexts 0: give 1 or more"),
    "report: no rows": report("--num-rows 0", r"--num-rows 0: give 1 or more"),
    "report: no such model": report("--model {home}/nowhere", r"--model .*nowhere .*--no-contexts leaves"),
    "report: no such dataset": report(
        "--dataset {home}/nowhere.txt", r"--dataset .*nowhere\.txt: .*--no-contexts"
    ),
    "report: a torn configuration": call(
        "report",
        "{tmp}/run --no-contexts",
        r"config\.json is not JSON",
        copied("run", holding("config.json", "{")),
    ),
    "report: rows that are none": call(
        "report",
        "{tmp}/run --no-contexts",
        r"metrics\.jsonl: line 1 is no row of metrics: leave it out",
        copied("run", holding("metrics.jsonl", "[1]\n")),
    ),
    "report: a status that is a list": call(
        "report",
        "{tmp}/run --no-contexts",
        r"status\.json is no JSON object",
        copied("run", holding("status.json", "[]")),
    ),
    "cache: no folder": call(
        "cache_activations", f"--model m --dataset d {LAYER} --tokens 9", "--output-dir", boxed=True
    ),
    "cache: no such layer": cache("--hookpoints model.layers.9", r"--hookpoints model\.layers\.9"),
    "cache: no shard": cache("--shard-tokens 0", r"--shard-tokens 0 must be greater than 0"),
    "cache: no rows kept": cache("--heldout-rows 0", r"--heldout-rows 0 must be greater than 0"),
    "cache: two epochs": cache(
        "--data.epochs 2", r"--data\.epochs 2: a cache holds every document once: leave it out"
    ),
    "cache: no tokens": cache("--tokens 0", r"--tokens 0 must be greater than 0"),
    "cache: private nothing": cache("--private", r"--private does nothing without --push-to-hub: set it"),
    "cache: more than the disk": cache(
        "--tokens 100000000000000", r"--output-dir .* are free: lower --tokens"
    ),
    "cache: other files": cache(
        "",
        r"--output-dir .*out holds other files: give a new folder",
        prepare=written("out/mine.txt", "mine"),
    ),
    "cache: in use": cache(
        "--output-dir {home}/cache", r"--output-dir .*cache already holds a cache: go on with --resume"
    ),
    "cache: another one": cache(
        "--output-dir {home}/cache --resume --seed 7",
        r"--resume: --\S+ is .*, the cache in .* has .*: give the same",
    ),
    "cache: torn notes": cache(
        "--output-dir {tmp}/cache --resume",
        r"--resume: .*cache\.json cannot be read",
        prepare=copied("cache", holding("cache.json", "{")),
    ),
    "cache: notes of a list": cache(
        "--output-dir {tmp}/cache --resume",
        r"--resume: .*cache\.json is not what was written",
        prepare=copied("cache", holding("cache.json", "[]")),
    ),
    "export: no run": call("export", "--output {tmp}/out", r"run|RUN", boxed=True),
    "export: no such run": call(
        "export", "{home}/nowhere --output {tmp}/out", r"nowhere is no folder: give that of a run"
    ),
    "export: no SAE": call(
        "export", "{home}/lm --output {tmp}/out", r"--output|holds no SAE yet|cannot be read"
    ),
    "export: nothing to do": call(
        "export", "{home}/run", r"nothing to do: set --push-to-hub user/name, or --output"
    ),
    "export: a folder in use": call(
        "export", "{home}/run --output {home}/lm", r"--output .*lm is there and not empty"
    ),
    "export: no such format": call(
        "export", "{home}/run --output {tmp}/out --format h5", r"--format", boxed=True
    ),
    "export: no name of the Hub": call("export", "{home}/run --push-to-hub a/b/c", r"--push-to-hub a/b/c: "),
    "pretokenize: no text": call("pretokenize", "--model m --output-dir o", "--dataset", boxed=True),
    "pretokenize: no such model": tokenise(
        "--model {home}/nowhere", r"--model .*nowhere: its tokenizer cannot be loaded"
    ),
    "pretokenize: one token a row": tokenise("--ctx-len 1", r"--ctx-len 1 must be at least 2"),
    "pretokenize: no shards": tokenise("--data.num-shards 0", r"--data\.num-shards 0 must be at least 1"),
    "pretokenize: no workers": tokenise("--num-workers 0", r"--num-workers 0 must be at least 1"),
    "pretokenize: no commits": tokenise("--commit-tokens 0", r"--commit-tokens 0 must be at least 1"),
    "pretokenize: files of nothing": tokenise(
        "--tokens-per-file 1", r"--tokens-per-file 1 must be between --ctx-len 16"
    ),
    "pretokenize: a token that is none": tokenise(
        "--begin-batch-token cls", r"--begin-batch-token cls: give one of bos"
    ),
    "pretokenize: a token that it lacks": tokenise(
        "--begin-batch-token sep", r"--begin-batch-token sep: .*name another"
    ),
    "pretokenize: arrow for the Hub": tokenise(
        "--push-to-hub a/b --format arrow", r"--push-to-hub needs --format parquet"
    ),
    "pretokenize: other files": tokenise(
        "",
        r"--output-dir .*out holds mine\.txt .*choose an empty folder",
        prepare=written("out/mine.txt", "mine"),
    ),
    "pretokenize: torn notes": tokenise(
        "--resume",
        r"--resume: \.pretokenize/made\.json .* cannot be read",
        prepare=written("out/.pretokenize/made.json", "{"),
    ),
    "pretokenize: torn origin": tokenise(
        "--resume", r"--resume: sae_lens\.json .* cannot be read", prepare=written("out/sae_lens.json", "{")
    ),
    "pretokenize: another's origin": tokenise(
        "--resume",
        r"--resume: sae_lens\.json .* was not written by this",
        prepare=written("out/sae_lens.json", "{}"),
    ),
    "pretokenize: a column of none": tokenise(
        "--data.text-column body", r"--data\.text-column body: .*it has text"
    ),
}
