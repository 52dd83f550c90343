"""The frozen base, the adapters on it, and the kernels that make them fast."""

import logging

# bitsandbytes offers an optional CPU kernel at every import; without it nothing is missing here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
