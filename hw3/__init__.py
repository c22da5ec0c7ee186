"""Fine-tune a causal language model from a YAML recipe and evaluate it by output-only perplexity."""

import logging
import os

__version__ = "0.2.0"

# Hugging Face libraries read these variables once, when they are imported. Without the first one, TRL reports each
# trainer that is created.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On CPUs with AVX512-BF16, importing bitsandbytes reports that an optional kernel package is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
