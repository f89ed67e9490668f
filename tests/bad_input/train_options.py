"""Options of training that cannot be right, by themselves, together, or with the model."""

from __future__ import annotations

from tests.bad_input.cases import Case, train

CASES: dict[str, Case] = {
    "no such module": train(
        r"--hookpoints model\.layer\.1: .*nearest are model\.layers\.", hookpoints="model.layer.1"
    ),
    "no such layer": train(r"--hookpoints model\.layers\.7", hookpoints="model.layers.7"),
    "no such model": train(r"--model nowhere/at-all", model="nowhere/at-all"),
    "k beyond d_sae": train(r"--sae\.k 65 exceeds d_sae 64: raise --sae\.d-sae", sae__k=65),
    "k beyond the expansion": train(
        r"--sae\.k 65 exceeds d_sae 64: raise --sae\.expansion-factor",
        sae__k=65,
        sae__d_sae=None,
        sae__expansion_factor=2,
    ),
    "both widths": train(r"--sae\.d-sae and --sae\.expansion-factor", sae__expansion_factor=2),
    "buffer below a batch": train(
        r"--buffer\.tokens 63 is smaller .*raise --buffer\.tokens", buffer__tokens=63
    ),
    "less than a batch": train(r"--tokens 63 is less than one batch: lower --batch-size-tokens", tokens=63),
    "less than one row": train(r"--ctx-len 1 must be at least 2", ctx_len=1),
    "rows of nothing": train(r"--eval\.rows and --eval\.ce need .*--data\.heldout-documents", eval__rows=5),
    "no project": train(r"--wandb\.name .*--wandb\.project", wandb__name="x"),
    "no artifacts": train(r"--wandb\.no-artifacts, do nothing .*--log-with wandb", wandb__no_artifacts=True),
    "no repository": train(r"--hub\.push-every, .* need a --hub\.repo-id", hub__push_every=5),
    "a token": train(
        r"--lm\.kwargs sets 'token': leave it out, .*HF_TOKEN decides it", lm__kwargs='{"token": "hf_x"}'
    ),
    "no auxk": train(r"--sae\.k-aux does nothing", sae__k_aux=3, sae__auxk_coefficient=0),
    "nothing held out": train(r"--eval\.every, .*--data\.heldout-documents", eval__every=5),
    "layout": train(r"--lm\.shard-size", lm__shard_size=3),
    "kwargs": train(r"--lm\.kwargs is not JSON", lm__kwargs="{attn"),
    "reserved kwargs": train(r"--lm\.kwargs sets 'dtype': .*--lm\.dtype", lm__kwargs='{"dtype": "float16"}'),
    "beta": train(r"--optim\.beta1 1\.0", optim__beta1=1),
    "negative": train(r"--optim\.lr -1\.0 must be greater than 0", optim__lr=-1),
    "decay": train(r"--optim\.decay-fraction 1\.5", optim__decay_fraction=1.5),
    "jumprelu's k": train(
        r"--sae\.k is not used by --sae\.architecture jumprelu .*leave it out", sae__architecture="jumprelu"
    ),
    "topk's threshold": train(r"--sae\.target-l0 is not used by --sae\.architecture topk", sae__target_l0=8),
    "topk's l1": train(r"--sae\.l1-coefficient is not used .*gated, standard", sae__l1_coefficient=5),
    "gated's auxk": train(
        r"--sae\.auxk-coefficient is not used by --sae\.architecture gated",
        sae__architecture="gated",
        sae__k=None,
        sae__auxk_coefficient=0.1,
    ),
    "topk's resampling": train(r"--sae\.resample-every-tokens is not used", sae__resample_every_tokens=64),
    "gated transcoder": train(
        r"--sae\.output-hookpoint is not used by --sae\.architecture gated",
        sae__architecture="gated",
        sae__k=None,
        sae__output_hookpoint="model.layers.0",
    ),
    "quadratic without a target": train(
        r"--sae\.sparsity-loss quadratic needs --sae\.target-l0",
        sae__architecture="jumprelu",
        sae__k=None,
        sae__sparsity_loss="quadratic",
    ),
    "a target for tanh": train(
        r"--sae\.target-l0 does nothing with --sae\.sparsity-loss tanh",
        sae__architecture="jumprelu",
        sae__k=None,
        sae__sparsity_loss="tanh",
        sae__target_l0=8,
    ),
    "a target beyond d_sae": train(
        r"--sae\.target-l0 65 exceeds d_sae 64", sae__architecture="jumprelu", sae__k=None, sae__target_l0=65
    ),
    "tanh's scale": train(
        r"--sae\.tanh-scale does nothing", sae__architecture="jumprelu", sae__k=None, sae__tanh_scale=2
    ),
    "four times k": train(r"4 x --sae\.k 20 .*exceeds d_sae 64", sae__k=20, sae__multi_topk=True),
    "prefixes": train(
        r"--sae\.prefixes 16 8 must be positive and ascend",
        sae__architecture="matryoshka",
        sae__prefixes=(16, 8),
    ),
    "wide prefixes": train(
        r"--sae\.prefixes 80 exceeds d_sae 64", sae__architecture="matryoshka", sae__prefixes=(16, 80)
    ),
    "decoder norm": train(
        r"--sae\.decoder-init-norm does nothing .*normalize-decoder False", sae__decoder_init_norm=0.1
    ),
    "skip without a transcoder": train(
        r"--sae\.skip is for transcoders: set --sae\.output-hookpoint", sae__skip=True
    ),
    "transcoder's layer_norm": train(
        r"--sae\.normalize layer_norm is not for transcoders",
        sae__normalize="layer_norm",
        sae__output_hookpoint="model.layers.0",
    ),
    "no such output": train(
        r"--sae\.output-hookpoint model\.layer\.0: .*nearest", sae__output_hookpoint="model.layer.0"
    ),
    "pairs": train(
        r"--hookpoints names 1 activations and --sae\.output-hookpoint 2: they pair up one to one",
        sae__output_hookpoint=("model.layers.0", "model.layers.1"),
    ),
    "predicts itself": train(
        r"--sae\.output-hookpoint model\.layers\.1 is what", sae__output_hookpoint="model.layers.1"
    ),
    "no such start": train(r"--sae\.init-from: .*nowhere", sae__init_from="nowhere"),
    "start and b_dec": train(
        r"--sae\.b-dec-init does nothing with --sae\.init-from",
        sae__init_from="nowhere",
        sae__b_dec_init="mean",
    ),
    "bfloat16's beta2": train(
        r"--optim\.beta2 0\.999 is too slow .*set --optim\.beta2 0\.99", sae__dtype="bfloat16"
    ),
    "bfloat16 twice": train(
        r"--sae\.autocast does nothing with", sae__dtype="bfloat16", sae__autocast=True, optim__beta2=0.99
    ),
    "never dead": train(
        r"--sae\.resample-every-tokens does nothing: .*lower --sae\.dead-after-tokens",
        sae__architecture="gated",
        sae__k=None,
        sae__resample_every_tokens=64,
    ),
    "cycles": train(
        r"--optim\.num-cycles does nothing without --optim\.schedule cosine_restarts", optim__num_cycles=2
    ),
    "floor": train(
        r"--optim\.min-factor does nothing with --optim\.schedule constant", optim__min_factor=0.1
    ),
    "accumulation": train(
        r"--tokens 640 is less than one update of 11 batches", optim__accumulation_steps=11
    ),
    "autocast": train(
        r"--lm\.autocast does nothing .*--lm\.dtype float32", lm__autocast=True, lm__dtype="bfloat16"
    ),
    "more than can be counted": train(
        r"--tokens 1\d+ is beyond all that can be meant: lower it", tokens=2**60
    ),
    "a buffer beyond all memory": train(
        r"there is no memory for --buffer\.tokens .*: lower --buffer\.tokens or --lm\.micro-batch-rows",
        buffer__tokens=2**46,
    ),
    "an SAE beyond all memory": train(
        r"there is no memory for \d+ latents of SAE .*: lower --sae\.d-sae", sae__d_sae=2**44
    ),
    "more shards than there is memory": train(
        r"--data\.num-shards \d+ must be at most", data__num_shards=2**40
    ),
    "a seed of too many bits": train(r"--seed 18446744073709551616 must be .* below 2\^64", seed=2**64),
    "an endless wait": train(r"--timeout inf must be .*at most", timeout="inf"),
    "no wait": train(r"--timeout 0\.0 must be greater than 0", timeout=0),
}
