"""The study of docs/study.md: its plan, its runs, and its figures."""
