"""The paper as data: tables, claims, formulas, prompts and model shapes; the audit of its printed numbers."""
