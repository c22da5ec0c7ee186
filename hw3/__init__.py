"""Fine-tune a causal language model from a YAML recipe and evaluate it by output-only perplexity."""

import logging
import os

__version__ = "0.2.0"

# Hugging Face libraries read these variables once, when they are imported. Without the first one, TRL reports each
# trainer that is created.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# cuBLAS needs a fixed workspace to give the same bits in every process. The size is its default on Hopper GPUs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# OpenMP's threads wait actively for 20,000 rounds rather than millions. That costs nothing on an idle machine; beside
# other busy processes, training is several times as fast.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# On CPUs with AVX512-BF16, importing bitsandbytes reports that an optional kernel package is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# If the hub cannot be reached, huggingface_hub reports each of its retries. `hw3.modeling.loading` reports the failure.
logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
