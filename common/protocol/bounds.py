"""How much of everything one request may have, whatever the model. A refusal names the field and the number here.

What depends on the model is in `limits`; the size of a whole body is `--max-body-bytes`, and how many answers may be open
`--max-open-requests`.
"""

from typing import Final

MAX_PROMPTS: Final = 4096
"""Prompts of one list."""
MAX_SAMPLES: Final = 128
"""Answers to one prompt, n."""
MAX_RID_CHARS: Final = 512
MAX_MODEL_CHARS: Final = 1024
"""OpenAI's `model`, which every event of a stream repeats."""
MAX_MESSAGES: Final = 4096
"""Messages of a conversation, and parts of one of them."""
MAX_NESTING: Final = 32
"""Lists and objects inside of each other, in what is passed on to the chat template as it is."""
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_STOP_TOKEN_IDS: Final = 1024
MAX_LOGIT_BIAS_TOKENS: Final = 65536
MAX_LOGIT_BIAS: Final = 100.0
MAX_TOP_LOGPROBS: Final = 20
MAX_HOST_CHARS: Final = 255
"""`bootstrap_host`: the longest name that DNS has."""
