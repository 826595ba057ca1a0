"""A child process that saves one version after the other until it is killed."""

import itertools
import mmap
import os
import signal
import struct
import sys
import time
import traceback

_NOTES = struct.Struct("qq")


class Writer:
    """It notes in shared memory, which outlives it, the version that it has begun and the last that it has done."""

    def __init__(self, kind, path, *, first, step=1, pause=0.0):
        self._first, self._step = first, step
        self._notes = mmap.mmap(-1, _NOTES.size)
        self._pid = os.fork()
        if not self._pid:
            self._run(kind, path, first, step, pause)

    def _run(self, kind, path, first, step, pause):
        try:
            done = 0
            for version in itertools.count(first, step):
                _NOTES.pack_into(self._notes, 0, version, done)
                kind.write(path, version)
                done = version
                _NOTES.pack_into(self._notes, 0, version, done)
                time.sleep(pause)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        # Not by an exception: the parent's own end is not the child's.
        os._exit(1)

    def begun(self):
        return _NOTES.unpack_from(self._notes)[0]

    def done(self):
        return _NOTES.unpack_from(self._notes)[1]

    def num_done(self):
        return (self.done() - self._first) // self._step + 1 if self.done() else 0

    def is_in_the_middle(self):
        return self.begun() != self.done()

    def wait_until(self, noted):
        """Returns when `noted`, one of its methods, is true, or it has failed."""
        while not noted() and os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0005)

    def stop(self):
        """Returns when it stands still; a call to the system that it was in has come to its end."""
        os.kill(self._pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self):
        os.kill(self._pid, signal.SIGCONT)

    def kill(self):
        """Whether it was still writing, and had not failed."""
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        return os.WIFSIGNALED(status)
