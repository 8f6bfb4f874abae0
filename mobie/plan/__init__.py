"""What a target needs before anything runs: jobs, hours, memory, disk, downloads; from configuration files alone.

graph.py    the jobs, as the workflow's rules say it
machine.py  what a machine has: this one, or one that is described
budget.py   what the jobs take, by kind and by model
nearest.py  what a machine cannot run, and the nearest thing that it can
show.py     the plan for people
command.py  the verb
"""
