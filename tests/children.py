"""Child processes of tests: forks, which have torch loaded already.

Where there is a GPU they are new processes: torch cannot compute gradients in a fork then. A target is a function of a
module, with arguments that can be pickled.
"""

import torch

START = "spawn" if torch.cuda.is_available() else "fork"
