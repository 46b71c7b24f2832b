"""The words that claim speed, which only generated text may use."""

import re

CLAIMED = re.compile(r"\b(faster|fastest|reaches|passes BLAS|outperforms|beats)\b", re.IGNORECASE)
