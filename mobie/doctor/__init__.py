"""Whether this machine and environment are fit for the suite: one line per finding, each with its remedy.

checks.py   the checks, one function each; nothing is imported that may be missing
command.py  the verb
"""
