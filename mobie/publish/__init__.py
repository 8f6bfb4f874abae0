"""One archive with a suite's records and all that is made of them, and the way back, without a model or a GPU.

targets.py   every table, figure, verdict and the report, made from the records under a folder
manifest.py  what an archive says of itself
archive.py   the zip file: written with the same bytes each time, read with every member checked
pack.py      `python -m mobie publish`
rebuild.py   `python -m mobie rebuild`
"""
