"""Child processes of tests: forks, which have torch loaded already.

Where there is a GPU they are new processes: torch cannot compute gradients in a fork then. A target is a function of a
module, with arguments that can be pickled.
"""

import multiprocessing
import signal
import time

import torch

from s2d3d import Callback, Trainer, load_config
from s2d3d.config.load import dump_config

START = "spawn" if torch.cuda.is_available() else "fork"


def train_and_kill(config, path, update):
    """Train in a process that is killed after an update; `path` is where its config is written."""
    path.write_text(dump_config(config))
    context = multiprocessing.get_context(START)
    done = context.Event()
    process = context.Process(target=_train_and_wait, args=(path, done, update))
    process.start()
    assert done.wait(300)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _train_and_wait(path, done, update):
    torch.set_num_threads(1)
    Trainer(load_config(path), callbacks=[_Waits(done, update)]).fit()


class _Waits(Callback):
    """Says that an update is done, and goes no further."""

    def __init__(self, done, update):
        self.done, self.update = done, update

    def on_update(self, trainer):
        if trainer.progress.updates == self.update:
            self.done.set()
            time.sleep(600)
