"""Each kind of error measured by itself."""
