# Tables and figures: records in, files out; seconds, no model. What a target reads is asked of the code that builds it.
from mobie.figures import ALL_FIGURES
from mobie.tables import ALL_TABLES


localrules:
    table,
    figure,
    claims,
    report,


@user_error
def target_state(name):
    """Code, suite, protocol and labels: a change in any of them makes a table or figure stale."""
    return stale.target_state(name, SUITE, PATHS)


rule table:
    input:
        lambda wildcards: user_error(needs.table_inputs)(wildcards.table, SUITE, PATHS, MODELS),
    output:
        [PATHS.table("{table}", suffix) for suffix in needs.TABLE],
    log:
        PATHS.log("tables", "{table}"),
    wildcard_constraints:
        table="|".join(ALL_TABLES),
    threads: 1
    params:
        suite=SUITE,
        stale=lambda wildcards: target_state(f"mobie.tables.{wildcards.table}"),
    shell:
        "{MOBIE} table {wildcards.table} --suite {params.suite} > {log} 2>&1"


rule figure:
    input:
        lambda wildcards: user_error(needs.figure_inputs)(wildcards.figure, SUITE, PATHS, MODELS),
    output:
        [PATHS.figure("{figure}", suffix) for suffix in needs.FIGURE],
    log:
        PATHS.log("figures", "{figure}"),
    wildcard_constraints:
        figure="|".join(ALL_FIGURES),
    threads: 1
    params:
        suite=SUITE,
        stale=lambda wildcards: target_state(f"mobie.figures.{wildcards.figure}"),
    shell:
        "{MOBIE} figure {wildcards.figure} --suite {params.suite} > {log} 2>&1"


rule claims:
    input:
        lambda _: user_error(needs.claims_inputs)(SUITE, PATHS, MODELS),
    output:
        [PATHS.table("claims", suffix) for suffix in needs.CLAIMS],
    log:
        PATHS.log("claims"),
    threads: 1
    params:
        suite=SUITE,
        stale=lambda _: target_state("mobie.verdicts"),
    shell:
        "{MOBIE} claims --suite {params.suite} > {log} 2>&1"


# The report reads every record by itself, logs too; what it is made of is declared so that it comes last.
rule report:
    input:
        user_error(needs.report_inputs)(SUITE, PATHS),
    output:
        PATHS.report,
    log:
        PATHS.log("report"),
    threads: 1
    params:
        suite=SUITE,
        stale=lambda _: target_state("mobie.report.build"),
    shell:
        "{MOBIE} report --suite {params.suite} > {log} 2>&1"
