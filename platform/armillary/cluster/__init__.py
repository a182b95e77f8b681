"""Other machines: submission of jobs over the Ray Jobs API, and the doctor that says what this machine lacks."""
