"""The verdicts as the report shows them: what the dialog of a statement says."""

from __future__ import annotations

import json

from mobie.report.record_view import Tidy, tidied
from mobie.verdicts import ClaimVerdict
from mobie.verdicts.write import WORDS


def claim_about(claim: ClaimVerdict, tidy: Tidy) -> str:
    """JSON for the dialog: both verdicts, how the statement is read, every comparison, the records behind them."""
    facts = {
        "Statement": claim.claim,
        "Where": ", ".join(claim.where),
        "The paper's own entries": claim.paper,
        "Ours": claim.verdict,
        "Reason": claim.reason,
        "How it is read": claim.note,
        "Measured in its place": claim.proxy,
        "Protocol gate": claim.gate,
        "Tolerance": claim.tolerance_source,
    }
    about = {
        "title": f"Statement {claim.id}",
        "facts": [[name, text] for name, text in facts.items() if text],
        "comparisons": [
            [case.label, case.model, case.shown, case.compared, WORDS[case.outcome], case.reason]
            for case in claim.cases
        ],
        "records": claim.records,
    }
    return json.dumps(tidied(about, tidy), ensure_ascii=False)
