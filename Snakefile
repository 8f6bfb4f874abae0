# The main job: models and data in, records, tables, figures, verdicts and a report out.
#
#   snakemake --cores all                                           everything, the embedded model, any machine
#   snakemake --cores all results/table2.csv                        one table, and what it needs
#   snakemake --cores all paper_figures/fig6.png results/claims.md  a figure, the verdicts
#   snakemake --cores all --config suite=paper results/table2.csv   the paper's models, GPU and hub
#   snakemake --cores all --config suite=paper models=olmoe-1b-7b -- results/table2.csv   of these models alone
#   snakemake --cores all --config suite=beyond                     our method against the others, per stored bit
#   snakemake --cores 1 results/audit.md                            the paper's tables against each other
#   snakemake -n                                                    what would run
#   snakemake --cores all train_nano                                train the embedded model again (hours)
#   snakemake --cores all train_nano_qwen2_moe                      train the one with a shared expert again (an hour)
#
# `python -m mobie plan [TARGET] [--config suite=paper]` says beforehand what it takes, `python -m mobie doctor` what is here.
# A rule calls one verb of `python -m mobie`; `python -m mobie VERB --help` explains it.


include: "workflow/rules/common.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/nano.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/gate.smk"
include: "workflow/rules/code.smk"
include: "workflow/rules/speed.smk"
include: "workflow/rules/audit.smk"
include: "workflow/rules/targets.smk"


rule all:
    default_target: True
    input:
        user_error(needs.everything)(SUITE, PATHS),
