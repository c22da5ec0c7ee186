"""`hw3 pack`: the homework's submission folder, checked as its grader checks it."""
