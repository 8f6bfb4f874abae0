"""The paper's full-precision rows: every printed entry that a model's own scores can be held against. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from mobie.paper.printed import printed_rows, same_model

#: Which of lm-eval's metrics stands in a column. The paper does not say. Its full-precision entries for HellaSwag
#: (78.21 for OLMoE) and ARC-Challenge (49.23) are as high as length-normalised scoring gives for such models; the
#: harness has no `acc_norm` for LAMBADA and WinoGrande. For ARC-Easy and PIQA the two metrics lie close together, so
#: `acc`, the customary one, is a reading that the entries do not settle. Records keep both metrics.
TASK_METRICS = {
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "lambada_openai": "acc",
    "lambada_standard": "acc",
    "piqa": "acc",
    "winogrande": "acc",
}
PERPLEXITY = "wikitext2_ppl"
#: column of means → its tasks
AVERAGES = {"avg7": tuple(TASK_METRICS), "avg4": ("arc_easy", "arc_challenge", "piqa", "winogrande")}
COLUMNS = (PERPLEXITY, *TASK_METRICS, *AVERAGES)
#: table → what its full-precision rows have in their other columns
ROWS = {
    "table2": {"method": "Baseline"},
    "table7": {"method": "Baseline"},
    "table1": {"quantized": "false", "expert_shift": "false"},
    "table4": {"cejd": "fp16", "glas": "fp16", "nges": "fp16"},
    "table5": {"backbone_bits": "fp16"},
}


@dataclass(frozen=True)
class Printed:
    """An entry of a full-precision row, in the paper's unit: perplexity, or per cent.

    text:   as printed: its digits say how exact it is.
    tables: where it stands.
    """

    column: str
    text: str
    tables: str

    @property
    def value(self) -> float:
        return float(self.text)

    @property
    def half_unit(self) -> float:
        """Half a unit of the last printed digit: what rounding alone may have moved."""
        exponent = Decimal(self.text).as_tuple().exponent
        assert isinstance(exponent, int)  # `printed_baseline` keeps finite numbers only
        return 0.5 * 10.0**exponent


def printed_baseline(model: str | None) -> tuple[Printed, ...]:
    """Entries of a model's full-precision rows by column; a value that several tables print stands once.

    `model` is its name in any of the tables; None, or one that has no such row: nothing.
    """
    found: dict[tuple[str, Decimal], Printed] = {}
    for table, keys in ROWS.items() if model is not None else ():
        for row in printed_rows(table):
            if not same_model(row["model"], model or "") or any(row[key] != value for key, value in keys.items()):
                continue
            for column in (column for column in COLUMNS if column in row):
                value = _number(row[column])
                if value is not None:
                    known = found.get((column, value))
                    tables = f"{known.tables}, {table}" if known else table
                    found[column, value] = Printed(column, known.text if known else row[column], tables)
    return tuple(entry for column in COLUMNS for (own, _), entry in found.items() if own == column)


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
