"""What a job of the workflow does: read its inputs, call the mathematics, write one file; one function per verb."""
