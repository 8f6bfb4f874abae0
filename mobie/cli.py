"""The command line. One verb is one rule of the workflow; libraries are imported by the verb that needs them.

Verbs live in the `command.py` of what they start. Exit status: 0 done (a method that fails is a record with a status,
not an error), 2 wrong input or a disk that cannot be written, told in one message without a traceback. Anything else is
a defect of the program and shows its traceback.
"""

from __future__ import annotations

import os
from typing import Any

import click

from mobie.by_hand import chat_command, methods_command, schema_command, try_command
from mobie.check.command import check_command
from mobie.determinism import read_locally
from mobie.doctor.command import doctor_command
from mobie.errors import MobieError
from mobie.fetching.command import fetch_command, lock_command
from mobie.jobs.attempt import is_out_of_memory
from mobie.jobs.command import (
    calibrate_command,
    expert_usage_command,
    mirror_command,
    quantize_command,
    self_sample_command,
    train_nano_command,
    windows_command,
)
from mobie.kernels.command import kernels_command, tune_command
from mobie.paper.audit.command import audit_command
from mobie.plan.command import plan_command
from mobie.publish.command import publish_command, rebuild_command
from mobie.redaction import has_login, redact
from mobie.reliability import reliability_command
from mobie.report.command import (
    claims_command,
    figure_command,
    readme_command,
    report_command,
    sensitivity_command,
    table_command,
)
from mobie.scoring.code.command import generate_code_command, score_code_command
from mobie.scoring.command import gate_command, score_commands
from mobie.speed.command import speed_command

NO_MEMORY = (
    "no memory left; finished files are as they were; close other programs, or use a machine with more memory, and run "
    "the same command again"
)
ONLINE = {"fetch", "lock"}  # every other verb reads local files only


class ErrorsWithoutTraceback(click.Group):
    """A group whose verbs report a `MobieError` as one message on stderr and exit with status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MobieError as error:
            click.echo(f"error: {redact(str(error))}", err=True)
            ctx.exit(2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            click.echo(f"error: {NO_MEMORY} ({redact(str(error)) or type(error).__name__})", err=True)
            ctx.exit(2)


@click.group(
    cls=ErrorsWithoutTraceback, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.pass_context
def main(context: click.Context) -> None:
    """MoBiE: quantize mixture-of-experts language models, score them, rebuild the paper's tables and figures.

    The whole job is `snakemake --cores all`; it calls the verbs below, each of which can be called by hand as well.
    METHOD is a file in workflow/config/methods, or one with changes: `mobie+regularization=0.3` or
    `billm+calibration.text=web-calibration`. To look at one method in two seconds, use `try`.
    """
    context.obj = has_login(os.environ)  # `doctor` tells; afterwards there are no secrets to look at
    if context.invoked_subcommand not in ONLINE:
        read_locally()


# before anything runs
main.add_command(plan_command)
main.add_command(doctor_command)
# data, models and records
main.add_command(fetch_command)
main.add_command(lock_command)
main.add_command(mirror_command)
main.add_command(train_nano_command)
main.add_command(calibrate_command)
main.add_command(self_sample_command)
main.add_command(windows_command)
main.add_command(quantize_command)
for score_command in score_commands:
    main.add_command(score_command)
main.add_command(expert_usage_command)
main.add_command(gate_command)
main.add_command(generate_code_command)
main.add_command(score_code_command)
main.add_command(speed_command)
# tables, figures, verdicts and documents
main.add_command(audit_command)
main.add_command(table_command)
main.add_command(figure_command)
main.add_command(sensitivity_command)
main.add_command(claims_command)
main.add_command(report_command)
main.add_command(readme_command)
main.add_command(check_command)
main.add_command(publish_command)
main.add_command(rebuild_command)
main.add_command(reliability_command)
# by hand
main.add_command(try_command)
main.add_command(chat_command)
main.add_command(methods_command)
main.add_command(schema_command)
main.add_command(kernels_command)
main.add_command(tune_command)
