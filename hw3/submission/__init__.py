"""`hw3 pack`: write the homework's submission folder, and verify it as its grader would."""
