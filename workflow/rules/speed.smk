# Speed: what takes which time and how many bytes. Models of published shape get random weights and need no download.
from mobie.jobs.speed import speed_inputs


@user_error
def speed_state(wildcards):
    """Code, protocol and method of a timing: a change in any of them makes the record stale."""
    keys = keys_of(wildcards)
    protocol = keys.protocol.speed.model_dump(mode="json")
    method = keys.method_config
    return digest([stale.speed_code(), protocol, method.method, method.options])


rule speed:
    input:
        lambda wildcards: user_error(speed_inputs)(keys_of(wildcards)),
    output:
        PATHS.record("{suite}", "{model}", "{method}", "{seed}", "speed"),
    log:
        PATHS.log("{suite}", "{model}", "{method}", "s{seed}", "speed"),
    benchmark:
        PATHS.benchmark("{suite}", "{model}", "{method}", "s{seed}", "speed")
    # Alone on the machine: other jobs would be timed with it. torch itself gets one thread. On a cluster, which has no
    # number of cores, the profile asks for a whole node instead.
    threads: lambda _: workflow.cores
    resources:
        mem_mb=memory("speed"),
        runtime=minutes("speed"),
        gpu=gpus,
    params:
        stale=speed_state,
    shell:
        "{MOBIE} speed --suite {wildcards.suite} --model {wildcards.model}"
        " --method {wildcards.method} --seed {wildcards.seed} > {log} 2>&1"
