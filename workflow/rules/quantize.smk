# Quantization, block by block. The record is the only declared output: Snakemake removes what is declared before a job
# starts, and the finished blocks in checkpoint/ are what a killed job goes on from. The record holds the checkpoint's hash.
# `--config device=cuda:0,cuda:1 memory=20GB` reaches the verb as its options.
import shlex

QUANTIZE_OPTIONS = "".join(
    f" --{name} {shlex.quote(str(config[name]))}" for name in ("device", "memory") if name in config
)


rule quantize:
    input:
        lambda wildcards: user_error(needs.quantize_inputs)(keys_of(wildcards)),
    output:
        PATHS.record("{suite}", "{model}", "{method}", "{seed}", "quantize"),
    log:
        PATHS.log("{suite}", "{model}", "{method}", "s{seed}", "quantize"),
    benchmark:
        PATHS.benchmark("{suite}", "{model}", "{method}", "s{seed}", "quantize")
    priority: priority_of_gate
    threads: 1
    resources:
        mem_mb=memory("quantize"),
        runtime=minutes("quantize"),
        gpu=gpus,
    params:
        stale=lambda wildcards: quantize_state(wildcards),
    shell:
        "{MOBIE} quantize --suite {wildcards.suite} --model {wildcards.model} --method {wildcards.method}"
        " --seed {wildcards.seed}{QUANTIZE_OPTIONS} > {log} 2>&1"


@user_error
def quantize_state(wildcards):
    """Code, method and options: a change in any of them makes the record stale."""
    method = keys_of(wildcards).method_config
    return digest([stale.quantize_code(method.method), method.method, method.options])
