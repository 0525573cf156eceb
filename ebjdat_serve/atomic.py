"""Files replaced whole: written aside in the same folder, then renamed, so that neither a reader nor a kill meets half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path beside ``file`` to write to; at the end it takes the place of ``file``, on an error it is removed.

    A link is replaced, not followed. ``shared``: other processes may replace ``file`` at the same time, so each writes under a name of
    its own, which stays behind if it is killed; otherwise the next call removes it. Raises what writing and renaming raise.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}.part" if shared else f".{file.name}.part")
    aside.unlink(missing_ok=True)
    try:
        yield aside
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
