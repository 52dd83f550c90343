"""The frozen base, the adapters on it, and the kernels that make them fast."""

import logging

# At every import bitsandbytes warns about an optional CPU kernel that is not needed here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
