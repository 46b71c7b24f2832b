"""The words that claim speed, which only generated text may use."""

import re

CLAIMED = re.compile(
    r"\b(faster|fastest|slower|slowest|reach(?:es)?|outperforms|outruns|beats|wins?|pays off|ahead of|competes with"
    r"|passes (?:Open)?BLAS|(?:Open)?BLAS speed|speed\s+of\s+(?:Open)?BLAS)\b",
    re.IGNORECASE,
)
