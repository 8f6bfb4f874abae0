# Calibration tokens of a model: drawn from a text, or written by the model itself.
rule calibrate:
    input:
        model=model_inputs,
        text=lambda wildcards: text_source(wildcards.text),
    output:
        PATHS.calibration("{suite}", "{model}", "{text}", "{sequences}", "{length}", "{seed}"),
    log:
        PATHS.log("{suite}", "{model}", "calibrate-{text}-n{sequences}-l{length}-s{seed}"),
    wildcard_constraints:
        text=rf"(?!{needs.WRITTEN}-n)[^/]+",
        sequences=r"\d+",
        length=r"\d+",
    threads: 1
    resources:
        mem_mb=memory("calibrate"),
        runtime=minutes("calibrate"),
    params:
        code=stale.calibrate_code(),
    shell:
        "{MOBIE} calibrate --suite {wildcards.suite} --model {wildcards.model} --seed {wildcards.seed}"
        " --text {wildcards.text} --sequences {wildcards.sequences} --length {wildcards.length} > {log} 2>&1"


# MoEQuant's expert-balanced self-sampling, with the checkpoint in full precision (mobie/jobs/ebss.py).
rule self_sample:
    input:
        lambda wildcards: user_error(needs.self_sample_inputs)(keys_of(wildcards)),
    output:
        PATHS.calibration("{suite}", "{model}", "{text}", "{sequences}", "{length}", "{seed}"),
    log:
        PATHS.log("{suite}", "{model}", "self-sample-{text}-n{sequences}-l{length}-s{seed}"),
    benchmark:
        PATHS.benchmark("{suite}", "{model}", "self-sample-{text}-n{sequences}-l{length}-s{seed}")
    wildcard_constraints:
        text=needs.WRITTEN,
        sequences=r"\d+",
        length=r"\d+",
    threads: 1
    resources:
        mem_mb=memory("self_sample"),
        runtime=minutes("self_sample"),
        gpu=gpus,
    params:
        code=stale.self_sample_code(),
    shell:
        "{MOBIE} self-sample --suite {wildcards.suite} --model {wildcards.model} --seed {wildcards.seed}"
        " --text {wildcards.text} --sequences {wildcards.sequences} --length {wildcards.length} > {log} 2>&1"


# How evenly a method's calibration text uses the experts, beside the model's ordinary text.
rule expert_usage:
    input:
        lambda wildcards: user_error(needs.usage_inputs)(keys_of(wildcards)),
    output:
        PATHS.record("{suite}", "{model}", "{method}", "{seed}", "expert_usage"),
    log:
        PATHS.log("{suite}", "{model}", "{method}", "s{seed}", "expert_usage"),
    benchmark:
        PATHS.benchmark("{suite}", "{model}", "{method}", "s{seed}", "expert_usage")
    threads: 1
    resources:
        mem_mb=memory("expert_usage"),
        runtime=minutes("expert_usage"),
        gpu=gpus,
    params:
        code=stale.usage_code(),
    shell:
        "{MOBIE} expert-usage --suite {wildcards.suite} --model {wildcards.model} --method {wildcards.method}"
        " --seed {wildcards.seed} > {log} 2>&1"
