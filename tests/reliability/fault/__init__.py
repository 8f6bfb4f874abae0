"""Faults: the workshop that is disturbed, the ways of disturbing it, and the judgement of what came of it."""
