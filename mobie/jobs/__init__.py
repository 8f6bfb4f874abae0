"""What a job of the workflow does: read declared inputs, call the mathematics, write one file. One verb, one function."""
