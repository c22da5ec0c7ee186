"""The generated blocks of the documents, each a function that returns Markdown."""
