"""From a file of rows to batches: rows, prompt, few-shot examples, tokenization, collator, sampler."""
