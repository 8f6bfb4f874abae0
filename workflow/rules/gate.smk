# The protocol gate: does the suite's protocol reproduce the paper's full-precision row of a model (mobie/jobs/gate.py).
# It and what it reads run first, so that a suite which measures something else than the paper shows it early. Nothing
# waits for its answer but what shows it: a model that does not reproduce the row is marked and quantized all the same.
from mobie.jobs.gate import gate_state


rule gate:
    input:
        lambda wildcards: user_error(needs.gate_inputs)(keys_of(wildcards)),
    output:
        PATHS.record("{suite}", "{model}", REFERENCE, "{seed}", "gate"),
    log:
        PATHS.log("{suite}", "{model}", REFERENCE, "s{seed}", "gate"),
    benchmark:
        PATHS.benchmark("{suite}", "{model}", REFERENCE, "s{seed}", "gate")
    priority: GATE
    threads: 1
    resources:
        mem_mb=memory("gate"),
        runtime=minutes("gate"),
        gpu=gpus,
    params:
        stale=lambda wildcards: user_error(gate_state)(keys_of(wildcards)),
    shell:
        "{MOBIE} gate --suite {wildcards.suite} --model {wildcards.model} > {log} 2>&1"
