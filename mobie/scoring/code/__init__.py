"""Programs that a model writes: HumanEval(+) and MBPP(+) by evalplus.

`protocol.py` says what decides a score, `generate.py` lets a model write (needs torch), `samples.py` is the file
between the two jobs, `score.py` judges (needs no torch and no model).
"""
