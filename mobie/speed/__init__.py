"""The speed suite: how fast a model decodes, against the same model in 16 bits and against others' runners.

Speed hangs on shapes and not on values, so models of true shape are made with random weights; tables say so. Nothing
here is imported by what quantizes or scores.
"""
