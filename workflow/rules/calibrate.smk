# Calibration tokens of a model.
rule calibrate:
    input:
        model=model_inputs,
        text=lambda wildcards: text_source(wildcards.text),
    output:
        PATHS.calibration("{suite}", "{model}", "{text}", "{sequences}", "{length}", "{seed}"),
    log:
        PATHS.log("{suite}", "{model}", "calibrate-{text}-n{sequences}-l{length}-s{seed}"),
    wildcard_constraints:
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
