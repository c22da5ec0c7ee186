"""Fine-tune a causal language model from a YAML recipe and judge it by output-only perplexity."""

import logging
import os

__version__ = "0.1.0"

# Before any Hugging Face library is imported: they read these once. TRL reports every trainer otherwise.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On CPUs with AVX512-BF16 bitsandbytes reports at import that an optional kernel package is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
